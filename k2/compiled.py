"""torch.compile for decode on a CPU, an option: `--compile`.

A token's product with a matrix reads the matrix once. The library's kernel for one row of bfloat16 leaves bandwidth
unused, and an expert is three calls of it. Here the product is written out as multiply and sum, which the compiler fuses
into one pass over the weights, an expert's three matrices in one function. The first tokens pay for compiling, some ten
to thirty seconds; prompts, and weights in other formats than bfloat16 or float32, go the plain way.

    M rows sent here, one in the compiled forms · D hidden · F width · O, I a matrix's rows and columns
"""

import torch
import torch.nn.functional as F
from torch import nn

from .embedding import OutputHead
from .expert import Expert
from .model import K2


def row_product(x_MI, weight_OI):
    """x W^T for one row of x, (1, O), summed in float32."""
    return (weight_OI.float() * x_MI[0].float()).sum(-1)[None].to(x_MI.dtype)


def row_logits(x_MI, weight_OI):
    """The output head's product, widened as the head widens it: rounded first, so that ties are the same."""
    return row_product(x_MI, weight_OI).float()


def row_expert(x_MD, gate_FD, up_FD, down_DF):
    """An expert's answer to one row, (1, D); what lies between its products stays float32."""
    gate_F, up_F = (gate_FD.float() * x_MD[0].float()).sum(-1), (up_FD.float() * x_MD[0].float()).sum(-1)
    return (down_DF.float() * (F.silu(gate_F) * up_F)).sum(-1)[None].to(x_MD.dtype)


class Compiled(nn.Module):
    """A module, and a compiled function of x and some weights that stands in for it where x is one row."""

    def __init__(self, plain: nn.Module, function, weights):
        super().__init__()
        self.plain, self.function, self.weights = plain, function, weights
        self.weight = weights[0]  # the model asks its head for device and dtype

    def forward(self, x_MI):
        if x_MI.shape[:-1].numel() > 1:
            return self.plain(x_MI)
        return self.function(x_MI.reshape(1, -1), *self.weights).view(*x_MI.shape[:-1], -1)


def with_compiled_products(model: K2) -> K2:
    """The model with its Linears and experts in compiled forms, as far as they are plain matrices in memory."""
    product, expert, logits = (torch.compile(function) for function in (row_product, row_expert, row_logits))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Expert) and all(type(m) is nn.Linear for m in child.children()):
                weights = [m.weight for m in (child.gate_proj, child.up_proj, child.down_proj)]
                setattr(parent, name, Compiled(child, expert, weights))
            elif isinstance(child, OutputHead) and child.weight.dtype != torch.float64:
                setattr(parent, name, Compiled(child, logits, [child.weight]))
            elif type(child) is nn.Linear and name != "kv_b_proj" and not isinstance(parent, (Expert, Compiled)):
                setattr(parent, name, Compiled(child, product, [child.weight]))
    return model
