"""The mixture of experts: send every token to its K experts, and add what they say to what the shared expert says.

    paper             ours             checkpoint (model.layers.L.mlp.)
    FFN^(s)           shared_experts   shared_experts.*: one expert of n_shared x moe width, for every token
    FFN^(r)_i         experts[i]       experts.0.* ... experts.383.*
    g_i               weights_TK       -

    T tokens, any batch folded in · L of them at a time · D hidden · K chosen experts · M = T x K rows, one per token and choice

The block is given its experts and does not know where they live: `experts.fetch(ids)` yields each one asked for, in
whatever order it becomes available. Nothing below depends on that order, so the bits are the same whether an expert
was resident or came from a disk.
"""

import torch
from torch import nn

from .config import K2Config, K2Error
from .expert import Expert
from .router import Router

SUMMED = 2**21  # numbers of the answers that are added up at a time: 8 MiB in float32


class Experts(nn.ModuleList):
    """All experts of a layer, resident. Any other home of experts has this same `fetch`."""

    def fetch(self, ids: list[int]):
        """Yield (id, expert) for each id asked for, in any order. Called before the shared expert runs."""
        for e in ids:
            yield e, self[e]


def resident_experts(config: K2Config, layer: int) -> Experts:
    """All experts of a layer as modules of the model."""
    return Experts(Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts))


class MoE(nn.Module):
    """x (..., T, D) -> sum over the K chosen experts of weight x expert(x), plus the shared expert(x), (..., T, D)."""

    def __init__(self, config: K2Config, layer: int, make_experts=resident_experts):
        super().__init__()
        D, F = config.hidden_size, config.moe_intermediate_size
        self.layer = layer
        self.gate = Router(config)
        self.experts = make_experts(config, layer)
        # Several shared experts are stored as one of their joint width: side by side they are the same function.
        self.shared_experts = Expert(D, F * config.n_shared_experts)

    def forward(self, x_TD):
        leading, x_TD = x_TD.shape[:-1], x_TD.flatten(0, -2)
        expert_ids_TK, weights_TK = self.gate(x_TD)
        # Rows sorted by expert: row m belongs to token order_M[m] // K, and each expert's rows lie together.
        K = expert_ids_TK.shape[-1]
        order_M = expert_ids_TK.flatten().argsort(stable=True)
        ids, counts = expert_ids_TK.unique(return_counts=True)  # sorted
        counts = dict(zip(ids.tolist(), counts.tolist()))
        arriving = self.experts.fetch(list(counts))  # reads start here, and land while the shared expert computes
        shared_TD = self.shared_experts(x_TD)
        y_MD = self.checked(self.ask(arriving, x_TD.index_select(0, order_M // K), counts), counts)
        back_TK = order_M.argsort().unflatten(0, (-1, K))  # to the tokens' order: the row of each answer
        return (shared_TD + self.weighted_sum(y_MD, back_TK, weights_TK)).unflatten(0, leading)

    def ask(self, arriving, x_MD, counts: dict[int, int]):
        """Each chosen expert's answers to its own rows, (M, D) -> (M, D). counts: expert -> rows, in the rows' order."""
        rows = dict(zip(counts, x_MD.split(list(counts.values()))))
        answers = {e: expert(rows[e]) for e, expert in arriving}
        return torch.cat([answers[e] for e in counts])

    def weighted_sum(self, y_MD, back_TK, weights_TK):
        """Each token's K answers by their weights, (T, D): of L tokens at a time, as all answers in float32 would be a prompt's
        largest tensor. In training of all, since the way back would fill a gradient of all answers for each part."""
        T, K = back_TK.shape
        L = T if y_MD.requires_grad else max(1, SUMMED // (K * y_MD.shape[-1]))
        sums = []
        for rows_LK, some_LK in zip(back_TK.split(L), weights_TK.split(L)):
            y_LKD = y_MD.index_select(0, rows_LK.flatten()).unflatten(0, rows_LK.shape)
            # One sum over K, in float32 at least: bfloat16 would round after each of the eight terms.
            y_LD = (some_LK.unsqueeze(-2) @ y_LKD.to(some_LK.dtype)).squeeze(-2)
            sums.append(y_LD.to(y_MD.dtype))
        return torch.cat(sums)

    def checked(self, y_MD, counts: dict[int, int]):
        """The same rows, or a K2Error that names the first expert whose answer is not finite."""
        if y_MD.sum().isfinite():  # one pass, and never finite when a term is not
            return y_MD
        bad = [e for e, rows_MD in zip(counts, y_MD.split(list(counts.values()))) if not rows_MD.isfinite().all()]
        if bad:
            raise K2Error(f"layer {self.layer}, expert {bad[0]}: expected finite numbers, found NaN or infinity in its output. Its weights are damaged, or its input overflowed: check this expert's tensors.")
        return y_MD
