"""One row at a time: what a CPU does differently where a single token is decoded.

A prompt's product is bound by arithmetic, one token's by reading the matrix once. F.linear, made for the first, takes its
time with a single row of bfloat16, and torch.mv reads the matrix faster (`python -m k2 bench --products` shows both).
compiled.py puts a compiled function in the same place.

    M rows sent here · I, O a matrix's columns (inputs) and rows (outputs)
"""

import torch
import torch.nn.functional as F
from torch import nn

from .embedding import OutputHead


class OneRow:
    """A module's other way: `one_row` where x is a single row, (I,) -> O numbers, and `many_rows` for whatever else."""

    def forward(self, x_MI):
        if x_MI.shape[:-1].numel() != 1:
            return self.many_rows(x_MI)
        return self.one_row(x_MI.flatten()).view(*x_MI.shape[:-1], -1)


def wants_mv(dtype, device) -> bool:
    """Whether torch.mv is the faster way for a single row."""
    return dtype == torch.bfloat16 and device.type == "cpu"


def single_row_product(x_I, weight_OI):
    """W x, (I,) -> (O,), by the kernel that every such product of one row takes, wherever its matrix comes from."""
    return torch.mv(weight_OI, x_I) if wants_mv(weight_OI.dtype, weight_OI.device) else F.linear(x_I[None], weight_OI)[0]


class RowLinear(OneRow, nn.Linear):
    """nn.Linear without bias whose single rows go to torch.mv."""

    many_rows = nn.Linear.forward

    def one_row(self, x_I):
        """W x, (I,) -> (O,)."""
        return single_row_product(x_I, self.weight)


class RowHead(OutputHead, RowLinear):
    """OutputHead with the same: the product that it widens, its super().forward, is then RowLinear's."""
