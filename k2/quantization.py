"""The two formats K2's weights are released in, to and from, in plain torch; and the two Linears that compute from them.

    FP8 (Instruct, Base, 0905)     weight [O, I] float8_e4m3fn, weight_scale_inv [B, G] float32, one per 128 x 128 block
    INT4 (Thinking, K2.5)          weight_packed [O, U] int32, weight_scale [O, G] bfloat16, one per 32 inputs

    O, I a matrix's rows and columns · B blocks of 128 rows · G blocks of 128 columns, or groups of 32 · U words of 8
    L place within a block or a group · P rows of a panel, some of a matrix's

Despite its name weight_scale_inv is multiplied: weight = code x scale (DeepSeek-V3, README_WEIGHTS.md). Where a matrix
does not divide by 128 its last blocks are smaller: kv_a_proj_with_mqa has 576 rows and 5 rows of scales.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .products import OneRow, float32_product, panels, wants_float32

BLOCK = 128
GROUP = 32
NIBBLES = 8  # 4-bit values in an int32 word
FP8_MAX = 448.0  # the largest float8_e4m3fn
FEW = 16  # rows of x from which widening the weights is worth its time
FAINT = 2.0**-16  # float16 has fewer bits below 2^-14: here they are about bfloat16's
FAINT_SHARE = 1 / 8  # of a row's numbers that may be smaller; more are, where one number is 2^14 times as large as most


def fp8_halves(code_OI, room=None):
    """float8_e4m3fn codes as float16, exactly, 2^8 times too small: see fp8_dequantize. There must be no NaN among them.
    `room` may be int16 memory for them, of as many rows at least.

    On the CPU torch's own cast takes codes one by one, at half a gigabyte a second and less. Shifted by 7 bits an e4m3
    code is already a float16, sign and exponent and fraction in place, its smallest numbers too; only the exponent's
    bias differs, by 8.
    """
    room = torch.empty_like(code_OI, dtype=torch.int16) if room is None else room[: len(code_OI)]
    bits_OI = room.copy_(code_OI.view(torch.int8))
    bits_OI.mul_(2**7)  # the shift; torch multiplies faster than it shifts
    bits_OI.bitwise_and_(-0x4080)  # the sign, and the seven bits below the shifted copy of it
    return bits_OI.view(torch.float16)


def fp8_finite_values(code_OI):
    """The same as float32, to which a processor widens float16 by an instruction."""
    return fp8_halves(code_OI).float()


def fp8_values(code_OI):
    """The same where a code may be NaN, and stays it."""
    value_OI = fp8_finite_values(code_OI)
    return value_OI.masked_fill_((code_OI.view(torch.int8) & 0x7F) == 0x7F, torch.nan) if fp8_has_nan(code_OI) else value_OI


def fp8_has_nan(code_OI) -> bool:
    """True if a code is one of e4m3's two NaNs, 0x7F and 0xFF."""
    return bool(code_OI.view(torch.int8).amax() == 0x7F or code_OI.view(torch.uint8).amax() == 0xFF)


def fp8_dequantize(code_OI, scale_BG, dtype=torch.float32, values=fp8_values):
    """code x the scale of its block, in float32, then rounded once to `dtype`; (O, I). Exact but for that rounding.

    `values` may be fp8_finite_values where no code is NaN.
    """
    O, I = code_OI.shape
    weight_OI = torch.empty(O, I, dtype=dtype, device=code_OI.device)
    scale_BI = by_column(scale_BG * 2.0**8, I)
    for rows in panels(O, I, BLOCK):
        weight_OI[rows] = fp8_scaled(values(code_OI[rows]), scale_BI[rows.start // BLOCK :])
    return weight_OI


def by_column(scale_BG, columns: int):
    """Each block's scale once for every column, (B, I)."""
    return scale_BG.repeat_interleave(BLOCK, dim=1)[:, :columns]


def fp8_scaled(value_OI, scale_BI):
    """The float32 weights of a panel, in place, its blocks' scales given column by column."""
    whole = len(value_OI) // BLOCK
    value_OI[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mul_(scale_BI[:whole].unsqueeze(1))
    if whole * BLOCK < len(value_OI):  # a last block of fewer rows
        value_OI[whole * BLOCK :].mul_(scale_BI[whole])
    return value_OI


def fp8_product(x_MI, code_OI, scale_BG, values=fp8_values):
    """x W^T for a few rows of x, (M, O): a weight is read once then, and scaling all of them would cost more than the
    product. So each block of 128 rows meets its own scaled copy of x, and its codes are only widened.

    float32 throughout (float64 for a float64 x): more exact than rounding the weights to bfloat16 first. `values` may
    be fp8_finite_values where no code is NaN.
    """
    wide, (O, I) = torch.promote_types(x_MI.dtype, torch.float32), code_OI.shape
    x_BMI = x_MI.to(wide) * by_column(scale_BG.to(wide) * 2.0**8, I).unsqueeze(1)
    parts = [part for rows in panels(O, I, BLOCK) for part in panel_products(x_BMI[rows.start // BLOCK :], values(code_OI[rows]))]
    return torch.cat(parts, dim=-1).to(x_MI.dtype)


def panel_products(x_BMI, value_OI):
    """The columns of a panel's product, (M, whole blocks' rows) and, of a last block with fewer rows, (M, the rest)."""
    value_OI, whole = value_OI.to(x_BMI.dtype), len(value_OI) // BLOCK
    blocks = x_BMI[:whole] @ value_OI[: whole * BLOCK].unflatten(0, (whole, BLOCK)).mT
    yield blocks.transpose(0, 1).flatten(1)
    if whole * BLOCK < len(value_OI):
        yield x_BMI[whole] @ value_OI[whole * BLOCK :].mT


def fp8_row_product(x_I, code_OI, scale_BG):
    """W x for one row of bfloat16, (I,) -> (O,), by torch's float16 kernel, which sums in float32: codes are float16
    numbers as they are, and what a product of one row takes is mostly time to make them. No code may be NaN.

    Each block of 128 rows has its own x times scales, brought to just below 1 by a power of two, rounded to float16, which
    has three bits more than bfloat16, and the answer is brought back. None where float16's range is too short for that.
    """
    O, I = code_OI.shape
    x_BI = x_I.float() * by_column(scale_BG, I)
    power_B = x_BI.abs().amax(1).frexp().exponent.clamp(-126, 126)
    x_BI *= power_of_two(-power_B).unsqueeze(1)
    if (x_BI.abs() < FAINT).sum() > FAINT_SHARE * x_BI.numel():
        return None
    half_BI = x_BI.half()
    y_O, pieces = torch.empty(O, dtype=torch.float16), panels(O, I, BLOCK)
    room = torch.empty(pieces[0].stop, I, dtype=torch.int16)
    for rows in pieces:
        half_PI = fp8_halves(code_OI[rows], room)
        for begin in range(rows.start, rows.stop, BLOCK):
            block = slice(begin - rows.start, begin - rows.start + BLOCK)
            torch.mv(half_PI[block], half_BI[begin // BLOCK], out=y_O[rows][block])
    back_O = power_of_two(power_B).repeat_interleave(BLOCK)[:O]
    return (y_O.float() * 2.0**8 * back_O).to(x_I.dtype)


def power_of_two(exponent):
    """2^exponent exactly, float32, for int32 exponents -126 ... 127: they are the upper bits."""
    return (exponent + 127 << 23).view(torch.float32)


def fp8_many_rows_product(x_MI, code_OI, scale_BG, values=fp8_values):
    """x W^T for many rows, (..., M, O): the weights are widened, to x's dtype or to the one that the CPU multiplies in."""
    O, I = code_OI.shape
    if not wants_float32(x_MI):
        return F.linear(x_MI, fp8_dequantize(code_OI, scale_BG, x_MI.dtype, values))
    scale_BI = by_column(scale_BG * 2.0**8, I)
    return float32_product(x_MI, panels(O, I, BLOCK), lambda rows: fp8_scaled(values(code_OI[rows]), scale_BI[rows.start // BLOCK :]))


def fp8_quantize(weight_OI):
    """The inverse: codes (O, I) float8_e4m3fn and scales (B, G) float32, each block's largest value mapped to 448."""
    O, I = weight_OI.shape
    block_BLGL = F.pad(weight_OI.float(), (0, -I % BLOCK, 0, -O % BLOCK)).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale_BG = block_BLGL.abs().amax(dim=(1, 3)) / FP8_MAX
    scale_BG = torch.where(scale_BG == 0, 1.0, scale_BG)  # an all-zero block: any scale will do, but not 0 / 0
    code_OI = (block_BLGL / scale_BG[:, None, :, None]).flatten(2).flatten(0, 1)[:O, :I]
    return code_OI.contiguous().to(torch.float8_e4m3fn), scale_BG


def int4_unpack(packed_OU):
    """The integers -8 ... 7 of packed words, int32 (O, I). The nibble holds value + 8, and the first input lies lowest.

    Not two's complement: reading it so turns small weights into large ones of the wrong sign.
    """
    return ((packed_OU.unsqueeze(-1) >> nibble_shifts(packed_OU.device) & 15) - 8).flatten(-2)


def nibble_shifts(device):
    """How far each of a word's 8 values is shifted, int32 (8,)."""
    return torch.arange(0, 32, 4, device=device, dtype=torch.int32)


def int4_dequantize(packed_OU, scale_OG, dtype=torch.float32):
    """integer x the scale of its group of 32 inputs, in float32, then rounded once to `dtype`; (O, I)."""
    value_OI = int4_unpack(packed_OU).float()
    return (value_OI.unflatten(-1, (-1, GROUP)) * scale_OG.float().unsqueeze(-1)).flatten(-2).to(dtype)


def int4_quantize(weight_OI):
    """The inverse: packed words (O, I / 8) int32 and scales (O, I / 32) bfloat16, each group's largest value at 7.

    Moonshot trained with INT4 in the loop and has not published its rounding; this is round-to-nearest.
    """
    group_OGL = weight_OI.float().unflatten(-1, (-1, GROUP))
    scale_OG = (group_OGL.abs().amax(-1) / 7).to(torch.bfloat16)
    scale_OG = torch.where(scale_OG == 0, torch.ones_like(scale_OG), scale_OG)
    value_OI = (group_OGL / scale_OG.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int32).flatten(-2)
    return ((value_OI + 8).unflatten(-1, (-1, NIBBLES)) << nibble_shifts(weight_OI.device)).sum(-1, dtype=torch.int32), scale_OG


class FP8Linear(nn.Module):
    """nn.Linear without bias whose weight stays FP8 at rest and is widened to x's dtype for each product."""

    def __init__(self, code_OI, scale_BG):
        super().__init__()
        self.weight = nn.Parameter(code_OI, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale_BG, requires_grad=False)

    def forward(self, x_MI):
        return F.linear(x_MI, fp8_dequantize(self.weight, self.weight_scale_inv, x_MI.dtype))


class FP8CodesLinear(OneRow, FP8Linear):
    """The same for a CPU, where few rows of x meet the codes themselves."""

    def __init__(self, code_OI, scale_BG, values=None):
        super().__init__(code_OI, scale_BG)
        self.values = values  # fp8_values or fp8_finite_values; known once the codes have been looked at

    def one_row(self, x_MI):
        """W x, (..., I) -> (..., O)."""
        self.values = self.values or self.reading()
        y_O = None
        if x_MI.dtype == torch.bfloat16 and self.values is fp8_finite_values and not x_MI.requires_grad:
            y_O = fp8_row_product(x_MI.flatten(), self.weight, self.weight_scale_inv)
        return self.few_rows(x_MI) if y_O is None else y_O.view(*x_MI.shape[:-1], -1)

    def many_rows(self, x_MI):
        """x W^T, (..., M, I) -> (..., M, O)."""
        self.values = self.values or self.reading()
        if x_MI.shape[:-1].numel() < FEW:
            return self.few_rows(x_MI)
        return fp8_many_rows_product(x_MI, self.weight, self.weight_scale_inv, self.values)

    def few_rows(self, x_MI):
        """The same where the rows are fewer than FEW, or one that float16 does not do."""
        rows = x_MI.reshape(-1, x_MI.shape[-1])
        return fp8_product(rows, self.weight, self.weight_scale_inv, self.values).view(*x_MI.shape[:-1], -1)

    def reading(self):
        """The faster reading, unless there is a NaN among the codes."""
        return fp8_values if fp8_has_nan(self.weight) else fp8_finite_values


class INT4Linear(nn.Module):
    """nn.Linear without bias whose weight stays packed INT4 at rest and is widened to x's dtype for each product."""

    def __init__(self, packed_OU, scale_OG, shape_2):
        super().__init__()
        self.weight_packed = nn.Parameter(packed_OU, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_OG, requires_grad=False)
        self.weight_shape = nn.Parameter(shape_2, requires_grad=False)

    def forward(self, x_MI):
        return F.linear(x_MI, int4_dequantize(self.weight_packed, self.weight_scale, x_MI.dtype))


class INT4KernelLinear(INT4Linear):
    """The same for a CPU, by torch's own kernel, which multiplies packed weights as they are, in its own order of them.

    They are brought into that order at the first use; with `in_place` where they lie, which then hold nothing else.
    """

    def __init__(self, packed_OU, scale_OG, shape_2, in_place: bool = False):
        super().__init__(packed_OU, scale_OG, shape_2)
        self.in_place, self.ordered = in_place, None

    def forward(self, x_MI):
        weight_OL, scale_GO2 = self.ordered = self.ordered or self.in_kernel_order(x_MI.dtype)
        rows = x_MI.reshape(-1, x_MI.shape[-1])
        return torch._weight_int4pack_mm_for_cpu(rows, weight_OL, GROUP, scale_GO2).view(*x_MI.shape[:-1], -1)

    def in_kernel_order(self, dtype):
        """The packed words as uint8 (O, I / 2), and (scale, zero) of each group (G, O, 2) in the dtype of x."""
        weight_OL = int4_kernel_order(self.weight_packed)
        if self.in_place:
            weight_OL = self.weight_packed.data.view(torch.uint8).copy_(weight_OL)
        scale_GO = self.weight_scale.mT.to(dtype)
        return weight_OL, torch.stack((scale_GO, torch.zeros_like(scale_GO)), dim=-1)


KERNEL_STEP = 16  # torch's kernel takes matrices whose rows divide by it
KERNEL_ROWS = 64  # rows whose nibbles torch's kernel keeps together, where it has AVX-512


def int4_kernel_order(packed_OU):
    """Packed words (O, U) int32 -> the bytes (O, 4 U) that torch's CPU kernel reads; O must divide by KERNEL_STEP.

    torch's own converter wants every nibble as an int32 first. Where its order is the one written here, and a trial on
    a small matrix says so, bytes are moved directly, seven times as fast.
    """
    if len(packed_OU) % KERNEL_ROWS or not kernel_order_is_known():
        return torch._convert_weight_to_int4pack_for_cpu(int4_unpack(packed_OU) + 8, 1)
    return reordered_nibbles(packed_OU)


def reordered_nibbles(packed_OU):
    """For each 64 rows and each input: 32 bytes, byte j holding row j in its low and row j + 32 in its high nibble."""
    O, U = packed_OU.shape
    first_BLG, second_BLG = packed_OU.view(torch.uint8).unflatten(0, (-1, 2, KERNEL_ROWS // 2)).unbind(1)
    even_BGL = (first_BLG & 15 | second_BLG << 4).mT  # a stored byte holds an even input low and the odd one high
    odd_BGL = (first_BLG >> 4 | second_BLG & 240).mT
    return torch.stack((even_BGL, odd_BGL), dim=2).view(O, 4 * U)


@functools.cache
def kernel_order_is_known() -> bool:
    """True if torch's converter makes, on this machine, what `reordered_nibbles` makes."""
    words_OU = torch.randint(-(2**31), 2**31 - 1, (2 * KERNEL_ROWS, 12), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.equal(torch._convert_weight_to_int4pack_for_cpu(int4_unpack(words_OU) + 8, 1), reordered_nibbles(words_OU))
