"""SwiGLU, the feed-forward block. One class at three widths: the dense layer 0, the shared expert, a routed expert.

    paper    ours        checkpoint                                            K2's shape (F, D)
    W_gate   gate_proj   mlp.[experts.J. | shared_experts.]gate_proj.weight    routed and shared [2048, 7168]
    W_up     up_proj     ...up_proj.weight                                     dense [18432, 7168]
    W_down   down_proj   ...down_proj.weight                                   transposed

    M rows sent here · D hidden · F width

The gate decides, coordinate by coordinate, how much of the up-projection passes (Shazeer, arXiv 2002.05202).
"""

import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    """y = down(silu(gate(x)) * up(x)); x (..., M, D) -> (..., M, D)."""

    def __init__(self, hidden_size: int, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x_MD):
        return self.down_proj(F.silu(self.gate_proj(x_MD)) * self.up_proj(x_MD))
