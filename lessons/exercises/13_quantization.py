"""Decode FP8 from its bits.

Complete `answer(code, scale)`: the matrix (O, I), float64, of

    code     uint8 (O, I), E4M3 bytes: one bit of sign, four of exponent e, three of fraction f, the sign highest.
             The value is (1 + f / 8) * 2^(e - 7); for e = 0 it is f / 8 * 2^-6; all seven lower bits set is NaN.
    scale    float64 (B, G), by which each block of 128 x 128 is multiplied. O and I need not divide by 128: the last
             blocks are then smaller.

Do not view the bytes as torch.float8_e4m3fn: decode them.
"""

import torch


def stub(code, scale):
    """A float64 tensor (O, I)."""
    raise NotImplementedError


def check(answer):
    every = torch.arange(256, dtype=torch.uint8).view(1, 256)
    right = every.view(torch.float8_e4m3fn).double()
    found = answer(every.clone(), torch.ones(1, 2, dtype=torch.float64))
    assert isinstance(found, torch.Tensor) and found.shape == (1, 256), f"expected a tensor (1, 256) for codes (1, 256), found {tuple(getattr(found, 'shape', ()))}"
    assert found.dtype == torch.float64, f"expected float64, found {found.dtype}"
    found, right, codes = found[0], right[0], list(range(256))
    assert found[127].isnan() and found[255].isnan(), f"codes 0x7F and 0xFF are NaN; found {found[127]:g} and {found[255]:g}"
    ordinary = [i for i in codes if 8 <= i % 128 < 127]
    assert torch.equal(found[0x38], right[0x38]), f"code 0x38, exponent 7 and fraction 0, is 1; found {found[0x38]:g}: is the exponent's bias 7, and the fraction an eighth?"
    wrong = [i for i in ordinary if found[i] != right[i]]
    assert not wrong, f"code {wrong[0]:#04x} is {right[wrong[0]]:g}; found {found[wrong[0]]:g}"
    wrong = [i for i in codes if i % 128 < 8 and found[i] != right[i]]
    assert not wrong, f"code {wrong[0]:#04x} has exponent 0: no 1 stands in front of its fraction, and the factor is 2^-6. It is {right[wrong[0]]:g}; found {found[wrong[0]]:g}"

    g = torch.Generator().manual_seed(13)
    O, I = 200, 300
    code = torch.randint(1, 126, (O, I), generator=g, dtype=torch.uint8)
    scale = 2.0 ** torch.randint(-9, 9, (2, 3), generator=g).double()
    found, plain = answer(code.clone(), scale.clone()), code.view(torch.float8_e4m3fn).double()
    expected = solution(code, scale)
    assert found.shape == (O, I), f"codes of shape {(O, I)} gave {tuple(found.shape)}: cut the scales to the matrix where the last block is smaller"
    ratio = found / plain
    assert not torch.equal(ratio[:128, :128], (1 / scale[0, 0]).expand(128, 128)) or scale[0, 0] == 1, "the scale is multiplied, though the checkpoint calls it weight_scale_inv"
    assert torch.equal(ratio[:100, :100], scale[0, 0].expand(100, 100)), f"the first block is not {scale[0, 0]:g} times its codes"
    assert torch.equal(ratio[100:128, 100:128], scale[0, 0].expand(28, 28)), "a block is 128 x 128 and only the last ones are smaller: rows and columns are not shared out evenly"
    assert torch.equal(ratio[:128, 128:256], scale[0, 1].expand(128, 128)), "scale[b, g] belongs to rows 128 b onwards and columns 128 g onwards: are the two exchanged?"
    assert torch.equal(found, expected), "a last, smaller block is wrong"


HINT = """sign = code >> 7; e = (code >> 3) & 15; f = code & 7, all made int64 first. torch.where chooses between the two
formulas. For the scales: repeat_interleave(128) along both axes, then cut to [:O, :I]."""


def values(code, bias=7, small=True, nan=True):
    code = code.long()
    sign, e, f = 1.0 - 2.0 * (code >> 7), (code >> 3 & 15).double(), (code & 7).double()
    value = sign * (1 + f / 8) * 2.0 ** (e - bias)
    value = torch.where(e == 0, sign * f / 8 * 2.0**-6, value) if small else value
    return torch.where((code & 127) == 127, torch.nan, value) if nan else value


def grid(scale, O, I):
    return scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:O, :I]


def solution(code, scale):
    code = code.long()
    sign, e, f = 1.0 - 2.0 * (code >> 7), (code >> 3 & 15).double(), (code & 7).double()
    value = torch.where(e == 0, f / 8 * 2.0**-6, (1 + f / 8) * 2.0 ** (e - 7))
    value = torch.where((code & 127) == 127, torch.nan, sign * value)
    O, I = code.shape
    return value * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:O, :I]


def wrong_bias(code, scale):
    return values(code, bias=8) * grid(scale, *code.shape)


def no_small(code, scale):
    return values(code, small=False) * grid(scale, *code.shape)


def no_nan(code, scale):
    return values(code, nan=False) * grid(scale, *code.shape)


def divided(code, scale):
    return values(code) / grid(scale, *code.shape)


def shared_evenly(code, scale):
    O, I = code.shape
    rows, columns = -(-O // scale.shape[0]), -(-I // scale.shape[1])
    return values(code) * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[:O, :I]


def exchanged(code, scale):
    return values(code) * grid(scale.T.reshape(scale.shape), *code.shape)


WRONG = {
    "a bias of 8": (wrong_bias, "bias 7"),
    "a 1 in front of every fraction": (no_small, "has exponent 0"),
    "NaN read as 480": (no_nan, "are NaN"),
    "divided by the scale": (divided, "is multiplied"),
    "blocks of equal size": (shared_evenly, "not shared out evenly"),
    "the scales' rows and columns exchanged": (exchanged, "exchanged"),
}
