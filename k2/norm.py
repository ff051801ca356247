"""RMSNorm: divide a vector by its root mean square, then scale each coordinate by a learned weight.

    paper            ours      checkpoint                      K2's shape
    x / RMS(x) * g   weight    ...layernorm.weight, norm.weight  [7168], in the latents [1536] and [512]

    T tokens · I the width of the vector at hand

Unlike LayerNorm it subtracts no mean and adds no bias (Zhang and Sennrich, arXiv 1910.07467).
"""

import torch
from torch import nn


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last axis; x (..., I), any float dtype, y the same."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_TI):
        # Squares of bfloat16 lose most of their 8 bits, so the statistics are float32 (float64 stays float64).
        wide_TI = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
        wide_TI = wide_TI * torch.rsqrt(wide_TI.square().mean(-1, keepdim=True) + self.eps)
        # Back to the input's dtype before the weight, as in the released model: the order decides the last bit.
        return self.weight * wide_TI.to(x_TI.dtype)
