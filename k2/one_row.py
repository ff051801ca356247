"""One row at a time: what a CPU does differently where a single token is decoded.

A prompt's product is bound by arithmetic, one token's by reading the matrix once. F.linear, made for the first, takes its
time with a single row of bfloat16; torch.mv reads as fast as memory gives (`python -m k2 bench --products` shows both).
compiled.py puts a compiled function in the same place.

    M rows sent here · I, O a matrix's columns (inputs) and rows (outputs)
"""

import torch
from torch import nn

from .embedding import OutputHead


class OneRow:
    """A module's other way: `one_row` where x is a single row, (I,) -> O numbers, and `many_rows` for whatever else."""

    def forward(self, x_MI):
        if x_MI.shape[:-1].numel() != 1:
            return self.many_rows(x_MI)
        return self.one_row(x_MI.flatten()).view(*x_MI.shape[:-1], -1)


class RowLinear(OneRow, nn.Linear):
    """nn.Linear without bias whose single rows go to torch.mv."""

    many_rows = nn.Linear.forward

    def one_row(self, x_I):
        """W x, (I,) -> (O,)."""
        return torch.mv(self.weight, x_I)


class RowHead(OutputHead, RowLinear):
    """OutputHead with the same: the product that it widens, its super().forward, is then RowLinear's."""
