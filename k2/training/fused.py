"""What a training step computes in fewer passes than the layer files: a layer's experts together, a norm's gradient by hand.

    MoE.ask, one expert after the other      ask_together
    RMSNorm and what autograd makes of it    Normalised

K2-mini's step asks 144 experts for about 341 rows each: nine matrix products and a dozen small operations apiece. If their
matrices lie side by side they are one tensor, and torch's grouped product (F.grouped_mm) takes each group of rows through
its own part of it: nothing is padded, no token is dropped. The results differ from the layer files' in the last bits.
`python -m k2 bench --train` shows the speed.

    T tokens · M rows, sorted by expert · D hidden · F an expert's width · X gate and up together, 2 F · E experts
    O, I a matrix's rows and columns, J matrices of one shape
"""

import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..model import K2
from ..moe import MoE
from ..norm import RMSNorm
from .muonclip import together

ALIGNED = 16  # bytes; F.grouped_mm takes no row that begins elsewhere


def fuse(model: K2):
    """Have a model that trains compute so, in the dtype that it has now."""
    lay_together(model)
    for module in model.modules():
        if isinstance(module, MoE) and can_be_grouped(module.experts[0].gate_proj.weight):
            module.ask = functools.partial(ask_together, module.experts)
        if isinstance(module, RMSNorm):
            module.forward = functools.partial(normalised, module)


def lay_together(model: K2):
    """Give each layer's experts one storage for gates and ups and one for downs; a layer at a time is there twice."""
    for moe in (module for module in model.modules() if isinstance(module, MoE)):
        for parameters in matrices(moe.experts):
            for p, own_OI in zip(parameters, together(parameters)):
                p.data = own_OI


def matrices(experts) -> tuple[list, list]:
    """(each expert's gate and up in turn, each expert's down) of a layer."""
    return [w for e in experts for w in (e.gate_proj.weight, e.up_proj.weight)], [e.down_proj.weight for e in experts]


def can_be_grouped(weight_FD) -> bool:
    """Whether F.grouped_mm multiplies by matrices like this one and its transpose."""
    return weight_FD.dtype in (torch.float32, torch.bfloat16) and all(size * weight_FD.element_size() % ALIGNED == 0 for size in weight_FD.shape)


def ask_together(experts, arriving, x_MD, counts: dict[int, int]):
    """MoE.ask, by products of all experts at once; (M, D) -> (M, D)."""
    ends_E = torch.tensor([counts.get(e, 0) for e in range(len(experts))]).cumsum(0).to(x_MD.device, torch.int32)
    gates_and_ups, downs = matrices(experts)
    gate_up_EXD = Joined.apply(*gates_and_ups).unflatten(0, (len(experts), 2)).flatten(1, 2)
    gate_MF, up_MF = F.grouped_mm(x_MD, gate_up_EXD.mT, offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_MF) * up_MF, Joined.apply(*downs).mT, offs=ends_E)


class Joined(torch.autograd.Function):
    """`together` for parameters, (J, O, I); each gets its own part of the gradient."""

    @staticmethod
    def forward(ctx, *weights):
        """No copy where they lie side by side."""
        return together(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_JOI):
        """Views, so that the optimizer finds the gradients side by side too."""
        return grad_JOI.unbind()


def normalised(norm: RMSNorm, x_TI):
    """RMSNorm.forward, (..., T, I) -> (..., T, I)."""
    return Normalised.apply(x_TI, norm.weight, norm.eps)


class Normalised(torch.autograd.Function):
    """y = w u with u = r x and r = 1 / sqrt(mean(x^2) + eps), in the dtypes of norm.py.

    A step along x changes u by r (1 - u u^T / I): what points along u itself is divided out again. Hence, with g the
    gradient of y, that of x is r (w g - u mean(w g u)), and that of w the sum of g u over all tokens.
    """

    @staticmethod
    def forward(ctx, x_TI, weight_I, eps: float):
        """(..., T, I); keeps u and r."""
        wide_TI = x_TI.to(torch.promote_types(x_TI.dtype, torch.float32))
        scale_T1 = torch.rsqrt(torch.linalg.vector_norm(wide_TI, dim=-1, keepdim=True).square_().div_(x_TI.shape[-1]).add_(eps))
        unit_TI = (wide_TI * scale_T1).to(x_TI.dtype)
        ctx.save_for_backward(unit_TI, scale_T1, weight_I)
        return weight_I * unit_TI

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TI):
        """The gradients of x and of the weight."""
        unit_TI, scale_T1, weight_I = ctx.saved_tensors
        wide_TI, wide_I, wide_grad_TI = (t.to(scale_T1.dtype) for t in (unit_TI, weight_I, grad_TI))
        along_TI = wide_grad_TI * wide_TI
        mean_T1 = (along_TI @ wide_I).unsqueeze(-1) / len(weight_I)
        x_TI = (wide_grad_TI * wide_I).addcmul_(wide_TI, mean_T1, value=-1).mul_(scale_T1)
        return x_TI.to(grad_TI.dtype), along_TI.flatten(0, -2).sum(0).to(weight_I.dtype), None
