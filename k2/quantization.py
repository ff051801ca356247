"""The two formats K2's weights are released in, to and from, in plain torch; and the Linears that compute from them.

    FP8 (Instruct, Base, 0905)     weight [O, I] float8_e4m3fn, weight_scale_inv [B, G] float32, one per 128 x 128 block
    INT4 (Thinking, K2.5)          weight_packed [O, U] int32, weight_scale [O, G] bfloat16, one per 32 inputs

    O, I a matrix's rows and columns · B blocks of 128 rows · G blocks of 128 columns, or groups of 32 · U words of 8
    L place within a block or a group, or a row's bytes · N blocks of a piece · M rows sent here · C the same, filled up to what is fast

Despite its name weight_scale_inv is multiplied: weight = code x scale (DeepSeek-V3, README_WEIGHTS.md). Where a matrix
does not divide by 128 its last blocks are smaller: kv_a_proj_with_mqa has 576 rows and 5 rows of scales.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from .products import STEP, mv_is_shared, panel_product, panels, wants_float32

BLOCK = 128
GROUP = 32
NIBBLES = 8  # 4-bit values in an int32 word
FP8_MAX = 448.0  # the largest float8_e4m3fn
LEFT_OUT = 2.0**8  # the factor by which fp8_halves' numbers are too small
FEW = 16  # rows of x from which widening the weights is worth its time
PIECE = 2**20  # weights that a CPU widens at a time, at most: 2 MiB of float16
LARGE_PIECE = 2**24  # the same for a GPU, which takes longer to be asked than to widen fewer


def fp8_halves(code_OI):
    """float8_e4m3fn codes as float16, exactly, 2^8 times too small: see LEFT_OUT. A NaN comes out as 480.

    On the CPU torch's own cast takes codes one by one, at half a gigabyte a second and less. Shifted by 7 bits an e4m3
    code is already a float16, sign and exponent and fraction in place, its smallest numbers too; only the exponent's
    bias differs, by 8.
    """
    bits_OI = code_OI.view(torch.int8).to(torch.int16)
    bits_OI.mul_(2**7)  # the shift; torch multiplies faster than it shifts
    bits_OI.bitwise_and_(-0x4080)  # the sign, and the seven bits below the shifted copy of it
    return bits_OI.view(torch.float16)


def fp8_is_nan(code_OI):
    """Where the codes are one of e4m3's two NaNs, 0x7F and 0xFF."""
    return (code_OI.view(torch.int8) & 0x7F) == 0x7F


def fp8_has_nan(code_OI) -> bool:
    """True if there is one among them, found without a mask in memory."""
    return bool(code_OI.view(torch.int8).amax() == 0x7F or code_OI.view(torch.uint8).amax() == 0xFF)


def pieces(rows: int, columns: int, most: int) -> list[slice]:
    """The rows to widen at a time, `most` weights but one row at least: as many whole blocks as that takes, or equal parts of one."""
    if blocks := most // (BLOCK * columns):
        whole = rows // BLOCK * BLOCK
        starts = [*range(0, whole, blocks * BLOCK), *[whole] * (whole < rows)]  # the last block may be smaller
    else:
        step = -(-BLOCK // -(-BLOCK * columns // most))
        starts = [begin for block in range(0, rows, BLOCK) for begin in range(block, min(block + BLOCK, rows), step)]
    return [slice(begin, end) for begin, end in zip(starts, [*starts[1:], rows])]


def blocks_of(rows: slice) -> slice:
    """The block rows that a piece lies in: one, or several whole ones."""
    return slice(rows.start // BLOCK, -(-rows.stop // BLOCK))


def by_column(scale_BG, columns: int):
    """Each block's scale once for every column, (B, I)."""
    return scale_BG.repeat_interleave(BLOCK, dim=1)[:, :columns]


def fp8_dequantize(code_OI, scale_BG, dtype=torch.float32, finite: bool = False):
    """code x the scale of its block, in float32, then rounded once to `dtype`; (O, I). Exact but for that rounding.

    `finite` says that no code is NaN, and spares the looking.
    """
    if code_OI.device.type != "cpu":
        return fp8_cast(code_OI, scale_BG, dtype)
    some_nan = not finite and fp8_has_nan(code_OI)
    weight_OI = torch.empty(code_OI.shape, dtype=dtype)
    scale_BI = by_column(scale_BG * LEFT_OUT, code_OI.shape[1])
    for rows in pieces(*code_OI.shape, PIECE):
        some_NI = scale_BI[blocks_of(rows)]
        value_NLI = fp8_halves(code_OI[rows]).float().unflatten(0, (len(some_NI), -1))
        weight_OI[rows] = value_NLI.mul_(some_NI.unsqueeze(1)).flatten(0, 1)
        if some_nan:
            weight_OI[rows].masked_fill_(fp8_is_nan(code_OI[rows]), torch.nan)
    return weight_OI


def fp8_cast(code_OI, scale_BG, dtype):
    """The same numbers, for scales below 2^119, by torch's own cast, which on a GPU should be bound by its memory alone. Every code is a
    bfloat16, a NaN too; from there one pass scales in float32 and rounds to `dtype`, so that 7 bytes are moved for a weight in
    bfloat16. Without a gradient."""
    weight_OI = torch.empty(code_OI.shape, dtype=dtype, device=code_OI.device)
    scale_BI = by_column(scale_BG.float(), code_OI.shape[1])
    for rows in pieces(*code_OI.shape, LARGE_PIECE):
        some_NI = scale_BI[blocks_of(rows)]
        value_NLI = code_OI[rows].bfloat16().unflatten(0, (len(some_NI), -1))
        torch.mul(value_NLI, some_NI.unsqueeze(1), out=weight_OI[rows].unflatten(0, (len(some_NI), -1)))
    return weight_OI


def fp8_product(x_MI, code_OI, scale_BG, finite: bool = False):
    """x W^T for a few rows of x, (M, O): a weight is read once then, and scaling all of them would cost more than the
    product. So each block of 128 rows meets its own scaled copy of x, and its codes are only widened.

    float32 throughout (float64 for a float64 x): more exact than rounding the weights to bfloat16 first.
    """
    wide = torch.promote_types(x_MI.dtype, torch.float32)
    x_CI = F.pad(x_MI.to(wide).contiguous(), (0, 0, 0, columns_for(len(x_MI)) - len(x_MI)))
    x_BIC = (x_CI * by_column(scale_BG.to(wide) * LEFT_OUT, code_OI.shape[1]).unsqueeze(1)).mT
    products = []
    for rows in pieces(*code_OI.shape, PIECE):
        some_NIC = x_BIC[blocks_of(rows)]
        value_NLI = fp8_halves(code_OI[rows]).to(wide).unflatten(0, (len(some_NIC), -1))
        products.append((value_NLI.squeeze(0) @ some_NIC.squeeze(0)).flatten(0, -2))  # a block alone is no batch
    y_OM = torch.cat(products)[:, : len(x_MI)]
    if not finite and fp8_has_nan(code_OI):
        y_OM = y_OM.masked_fill(fp8_is_nan(code_OI).any(-1, keepdim=True), torch.nan)
    return y_OM.to(x_MI.dtype).mT.contiguous()


def columns_for(rows: int) -> int:
    """How many columns the second factor of W x^T is filled up to. For one alone torch takes another function, which but on Intel's
    processors runs on one core and then has to fetch what the others have just widened; and above half a kernel's step a whole one is faster."""
    least = 2 if torch.get_num_threads() > 1 and not mv_is_shared() else 1
    return max(rows, least) if rows <= STEP // 2 else -(-rows // STEP) * STEP


def fp8_many_rows_product(x_MI, code_OI, scale_BG, finite: bool = False, dequantize=fp8_dequantize):
    """x W^T for many rows, (..., M, O): the weights are widened, to x's dtype or to the one that the CPU multiplies in, a
    panel at a time, which then is still in a cache."""
    dtype = torch.float32 if wants_float32(x_MI) else x_MI.dtype
    if x_MI.requires_grad:  # a graph of panels would be walked back slowly
        return F.linear(x_MI, fp8_dequantize(code_OI, scale_BG, dtype, finite))

    def widened(rows):
        return dequantize(code_OI[rows], scale_BG[blocks_of(rows)], dtype, finite)

    return panel_product(x_MI, panels(*code_OI.shape, BLOCK, dtype), widened, dtype)


def fp8_quantize(weight_OI):
    """The inverse: codes (O, I) float8_e4m3fn and scales (B, G) float32, each block's largest value mapped to 448."""
    O, I = weight_OI.shape
    block_BLGL = F.pad(weight_OI.float(), (0, -I % BLOCK, 0, -O % BLOCK)).unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale_BG = block_BLGL.abs().amax(dim=(1, 3)) / FP8_MAX
    scale_BG = torch.where(scale_BG == 0, 1.0, scale_BG)  # an all-zero block: any scale will do, but not 0 / 0
    code_OI = (block_BLGL / scale_BG[:, None, :, None]).flatten(2).flatten(0, 1)[:O, :I]
    return code_OI.contiguous().to(torch.float8_e4m3fn), scale_BG


def int4_unpack(packed_OU):
    """The integers -8 ... 7 of packed words, int8 (O, I). The nibble holds value + 8, and the first input lies lowest.

    Not two's complement: reading it so turns small weights into large ones of the wrong sign.
    """
    byte_OL = packed_OU.contiguous().view(torch.uint8)  # a word's four, the lowest first, two inputs in each
    return (torch.stack((byte_OL & 15, byte_OL >> 4), dim=-1).view(torch.int8) - 8).flatten(-2)


def nibble_shifts(device):
    """How far each of a word's 8 values is shifted, int32 (8,)."""
    return torch.arange(0, 32, 4, device=device, dtype=torch.int32)


def int4_dequantize(packed_OU, scale_OG, dtype=torch.float32):
    """integer x the scale of its group of 32 inputs, in float32, then rounded once to `dtype`; (O, I). Without a gradient."""
    value_OGL = int4_unpack(packed_OU).unflatten(-1, (-1, GROUP))
    weight_OGL = torch.empty(value_OGL.shape, dtype=dtype, device=packed_OU.device)
    return torch.mul(value_OGL, scale_OG.float().unsqueeze(-1), out=weight_OGL).flatten(-2)


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

    def __init__(self, code_OI, scale_BG, finite: bool | None = None):
        super().__init__()
        self.weight = nn.Parameter(code_OI, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale_BG, requires_grad=False)
        self.finite = finite  # whether no code is NaN; known once they have been looked at

    def forward(self, x_MI):
        return F.linear(x_MI, fp8_dequantize(self.weight, self.weight_scale_inv, x_MI.dtype, bool(self.finite)))


class FP8CodesLinear(FP8Linear):
    """The same for a CPU, where few rows of x meet the codes themselves."""

    dequantize = staticmethod(fp8_dequantize)  # compiled.py has another

    def has_no_nan(self) -> bool:
        """Whether every code is a number; they are looked at once."""
        if self.finite is None:
            self.finite = not fp8_has_nan(self.weight)
        return self.finite

    def forward(self, x_MI):
        """x W^T, (..., M, I) -> (..., M, O)."""
        if x_MI.shape[:-1].numel() >= FEW:
            return fp8_many_rows_product(x_MI, self.weight, self.weight_scale_inv, self.has_no_nan(), self.dequantize)
        rows = x_MI.reshape(-1, x_MI.shape[-1])
        return fp8_product(rows, self.weight, self.weight_scale_inv, self.has_no_nan()).view(*x_MI.shape[:-1], len(self.weight))


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
        return torch._convert_weight_to_int4pack_for_cpu(int4_unpack(packed_OU).int() + 8, 1)
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
    return torch.equal(torch._convert_weight_to_int4pack_for_cpu(int4_unpack(words_OU).int() + 8, 1), reordered_nibbles(words_OU))
