"""The two formats K2's weights are released in, to and from, in plain torch; and the two Linears that compute from them.

    FP8 (Instruct, Base, 0905)     weight [O, I] float8_e4m3fn, weight_scale_inv [B, G] float32, one per 128 x 128 block
    INT4 (Thinking, K2.5)          weight_packed [O, U] int32, weight_scale [O, G] bfloat16, one per 32 inputs

    O, I a matrix's rows and columns · B blocks of 128 rows · G blocks of 128 columns, or groups of 32 · U words of 8
    L place within a block or a group

Despite its name weight_scale_inv is multiplied: weight = code x scale (DeepSeek-V3, README_WEIGHTS.md). Where a matrix
does not divide by 128 its last blocks are smaller: kv_a_proj_with_mqa has 576 rows and 5 rows of scales.
"""

import torch
import torch.nn.functional as F
from torch import nn

BLOCK = 128
GROUP = 32
NIBBLES = 8  # 4-bit values in an int32 word
FP8_MAX = 448.0  # the largest float8_e4m3fn


def fp8_values(code_OI):
    """float8_e4m3fn codes as float32, exactly, 2^120 times too small: see fp8_dequantize. NaN codes stay NaN.

    On the CPU torch's own cast takes codes one by one, at half a gigabyte a second. Shifted by 20 bits an e4m3 code is
    already a float32, sign and exponent and fraction in place; only the exponent's bias differs, by 120.
    """
    byte_OI = code_OI.view(torch.int8)
    bits_OI = byte_OI.to(torch.int32) << 20
    value_OI = (bits_OI & -0x78100000).view(torch.float32)  # the sign, and the seven bits below the shifted copies of it
    return value_OI.masked_fill_((byte_OI & 0x7F) == 0x7F, torch.nan)


def fp8_dequantize(code_OI, scale_BG, dtype=torch.float32):
    """code x the scale of its block, in float32, then rounded once to `dtype`; (O, I). Exact but for that rounding.

    Every |scale| must be below 2^7, or scale x 2^120 overflows float32: the checkpoint refuses others at load.
    """
    O, I = code_OI.shape
    weight_OI = torch.empty(O, I, dtype=dtype, device=code_OI.device)
    for b, scale_G in enumerate(scale_BG * 2.0**120):  # panels of 128 rows, small enough to stay in the cache
        scale_I = scale_G.repeat_interleave(BLOCK)[:I]
        rows = slice(b * BLOCK, (b + 1) * BLOCK)
        weight_OI[rows] = fp8_values(code_OI[rows]) * scale_I
    return weight_OI


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


class INT4Linear(nn.Module):
    """nn.Linear without bias whose weight stays packed INT4 at rest and is widened to x's dtype for each product."""

    def __init__(self, packed_OU, scale_OG, shape_2):
        super().__init__()
        self.weight_packed = nn.Parameter(packed_OU, requires_grad=False)
        self.weight_scale = nn.Parameter(scale_OG, requires_grad=False)
        self.weight_shape = nn.Parameter(shape_2, requires_grad=False)

    def forward(self, x_MI):
        return F.linear(x_MI, int4_dequantize(self.weight_packed, self.weight_scale, x_MI.dtype))
