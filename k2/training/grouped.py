"""All experts of a layer at once: what a training step gains where experts are many and small.

K2-mini's step asks 144 experts, each for about 340 rows: nine matrix products and a dozen small operations apiece. Side
by side in memory their matrices are one tensor, and torch's grouped product (F.grouped_mm) takes each group of rows
through its own matrix of it. Nothing is padded and no token is dropped; sums differ from one expert after the other in
their last bits. `python -m k2 bench --train` shows the speed.

    M rows, sorted by expert · D hidden · F an expert's width · X gate and up together, 2 F · E experts · J matrices of one shape
"""

import functools

import torch
import torch.nn.functional as F

from ..model import K2
from ..moe import MoE
from .muonclip import together

ALIGNED = 16  # bytes; F.grouped_mm takes no row that begins elsewhere


class Joined(torch.autograd.Function):
    """`together` for parameters: each gets its own part of the gradient."""

    @staticmethod
    def forward(ctx, *weights):
        """(J, O, I)."""
        return together(weights)

    @staticmethod
    def backward(ctx, grad_JOI):
        """The parts are views, so that the optimizer finds them side by side again."""
        return grad_JOI.unbind()


def matrices(experts) -> tuple[list, list]:
    """(gate and up of each expert in turn, down of each) of a layer."""
    return [w for e in experts for w in (e.gate_proj.weight, e.up_proj.weight)], [e.down_proj.weight for e in experts]


def lay_together(model: K2):
    """Give each layer's experts one storage for gates and ups and one for downs; a layer at a time is there twice."""
    for moe in moe_layers(model):
        for parameters in matrices(moe.experts):
            for p, own_OI in zip(parameters, together(parameters)):
                p.data = own_OI


def group_experts(model: K2):
    """Have a model's MoE layers ask all experts at once, where F.grouped_mm takes their shapes and dtype."""
    lay_together(model)
    for moe in moe_layers(model):
        if can_be_grouped(moe.experts[0].gate_proj.weight):
            moe.answers = functools.partial(grouped_answers, moe.experts)


def moe_layers(model: K2) -> list:
    """The layers' MoE blocks."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def can_be_grouped(weight_FD) -> bool:
    """Whether F.grouped_mm multiplies by matrices like this one."""
    return weight_FD.dtype in (torch.float32, torch.bfloat16) and all(size * weight_FD.element_size() % ALIGNED == 0 for size in weight_FD.shape)


def grouped_answers(experts, arriving, x_MD, counts: dict[int, int]):
    """MoE.answers by products of all experts together; (M, D) -> (M, D)."""
    ends_E = torch.tensor([counts.get(e, 0) for e in range(len(experts))]).cumsum(0).to(x_MD.device, torch.int32)
    gates_and_ups, downs = matrices(experts)
    gate_up_EXD = Joined.apply(*gates_and_ups).unflatten(0, (len(experts), 2)).flatten(1, 2)
    down_EDF = Joined.apply(*downs)
    gate_MF, up_MF = F.grouped_mm(x_MD, gate_up_EXD.mT, offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate_MF) * up_MF, down_EDF.mT, offs=ends_E)
