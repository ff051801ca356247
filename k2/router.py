"""The router: which K of the E experts a token goes to, and how much each of them counts.

    paper     ours                       checkpoint (model.layers.L.mlp.gate.)   K2's shape
    e_i       weight                     weight                                  [384, 7168]
    s_i       scores_TE                  -                                       sigmoid, not softmax
    b_i       e_score_correction_bias    e_score_correction_bias                 [384], always float32
    g_i       weights_TK                 -                                       sums to 2.827 per token

    T tokens · D hidden · E experts · K chosen experts

The bias balances the load during training without a loss term (arXiv 2408.15664): it is raised for idle experts and
lowered for busy ones. It takes part in the choice and in nothing else; a chosen expert is weighed by its own score.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .config import K2Config


class Router(nn.Module):
    """x (T, D) -> expert ids (T, K) int64, best first, and their weights (T, K) in float32 at least."""

    def __init__(self, config: K2Config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scaling = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size).uniform_(-0.03, 0.03))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def scores(self, x_TD):
        """Each expert's affinity, in (0, 1), (T, E): experts do not compete for a share as under a softmax."""
        # float32, because neighbours among 384 scores lie closer together than bfloat16 can tell apart.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return F.linear(x_TD.to(wide), self.weight.to(wide)).sigmoid()

    def forward(self, x_TD):
        scores_TE = self.scores(x_TD)
        expert_ids_TK = (scores_TE + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, expert_ids_TK)
        # 1e-20 as in the released code: it only matters where every chosen sigmoid underflows to zero.
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return expert_ids_TK, weights_TK * self.scaling

    def _apply(self, fn, recurse=True):
        """Module.to and its kin: the bias changes its device but never its precision."""
        kept_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = kept_E.to(self.e_score_correction_bias.device)
        return self
