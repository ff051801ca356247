"""The two ends of the model: ids to vectors, vectors to logits.

    ours            checkpoint                    K2's shape
    Embedding       model.embed_tokens.weight     [163840, 7168]
    OutputHead      lm_head.weight                [163840, 7168]

    T tokens · D hidden · W vocabulary

In K2 the two tables are untied: two matrices of 1.17 billion weights each. A token reads one row of the first and
every row of the second.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .config import K2Config


class Embedding(nn.Module):
    """ids (..., T) int64 -> x (..., T, D). No scaling, no position: position enters in attention.

    Rows are looked up where the table lies. A checkpoint's table stays in its memory map, so 2.3 GB never become
    resident: only the pages of the rows that were asked for are read, and then sent to `ids`' device.
    """

    def __init__(self, config: K2Config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size).uniform_(-0.03, 0.03))

    def forward(self, ids_T):
        return F.embedding(ids_T.to(self.weight.device), self.weight).to(ids_T.device)


class OutputHead(nn.Linear):
    """x (..., T, D) -> logits (..., T, W), float32 (float64 for a float64 model).

    The product runs in the weights' dtype; the logits are widened because everything after them compares and
    exponentiates, and bfloat16 ties neighbouring candidates.
    """

    def __init__(self, config: K2Config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, x_TD):
        logits_TW = super().forward(x_TD)
        return logits_TW.to(torch.promote_types(logits_TW.dtype, torch.float32))
