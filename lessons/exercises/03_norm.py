"""RMSNorm to the last bit.

Complete `answer(x, weight, eps)`: x / sqrt(mean(x^2) + eps), times weight, over the last axis, for x of any float dtype
and with a result of the same dtype. As in K2: the statistics and the division are float32 at least, the quotient is rounded
to x's dtype, and only then multiplied by weight (which has x's dtype).
"""

import torch


def stub(x, weight, eps):
    """A tensor of x's shape and dtype."""
    raise NotImplementedError


def check(answer):
    from k2.norm import RMSNorm

    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    found = answer(x, torch.ones(4), 0.0)
    assert not torch.allclose(found, torch.tensor([[2.4, -3.2, 0.0, 0.0]])), "x = [3, -4, 0, 0], weight 1: twice too large; the weight counts as it is, not as 1 + weight"
    assert torch.allclose(found, torch.tensor([[1.2, -1.6, 0.0, 0.0]])), f"x = [3, -4, 0, 0], weight 1: found {found.tolist()}, expected [[1.2, -1.6, 0, 0]]: the mean of the squares is 25 / 4; no mean is subtracted"
    found = answer(torch.zeros(1, 4), torch.ones(4), 1e-6)
    assert found.isfinite().all(), "a vector of zeros became NaN: eps belongs under the root"
    g = torch.Generator().manual_seed(3)
    small = 1e-3 * torch.randn(8, 64, generator=g)
    module = RMSNorm(64, 1e-6)
    module.weight.data = 1 + 0.3 * torch.randn(64, generator=g)
    found, expected = answer(small, module.weight, 1e-6), module(small)
    assert torch.allclose(found, expected, rtol=1e-5), f"small x: found {found[0, 0]:.5f} where {expected[0, 0]:.5f} was expected: eps = 1e-6 is added to the mean of squares, under the root"
    module, x = module.to(torch.bfloat16), torch.randn(64, 64, generator=g).to(torch.bfloat16)
    found = answer(x, module.weight, 1e-6)
    assert found.dtype == torch.bfloat16, f"bfloat16 in, {found.dtype} out: expected bfloat16"
    differing = (found != module(x)).float().mean().item()
    assert differing == 0, f"bfloat16: {differing:.0%} of the numbers differ in their last bits. Float32 until the division is done, then x's dtype, and the weight after that"


HINT = """Three lines: wide = x.to(torch.promote_types(x.dtype, torch.float32)); wide times torch.rsqrt of (mean of squares
plus eps), keepdim=True; then .to(x.dtype), and the weight last."""


def solution(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def weight_first(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (weight.to(wide.dtype) * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


WRONG = {
    "LayerNorm": (lambda x, weight, eps: weight * torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps), "no mean is subtracted"),
    "eps outside of the root": (lambda x, weight, eps: weight * (x.float() / (x.float().square().mean(-1, keepdim=True).sqrt() + eps)).to(x.dtype), "under the root"),
    "weight before the rounding": (weight_first, "the weight after that"),
    "1 + weight": (lambda x, weight, eps: solution(x, 1 + weight, eps), "not as 1 + weight"),
}
