"""Multi-head latent attention: keys and values of all heads are read out of one short vector per token.

    paper       ours            checkpoint (model.layers.L.self_attn.)   K2's shape
    W^DQ        q_a_proj        q_a_proj.weight                          [1536, 7168]
    W^UQ, W^QR  q_b_proj        q_b_proj.weight                          [64 x (128 + 64), 1536]
    W^DKV, W^KR kv_a_proj_...   kv_a_proj_with_mqa.weight                [512 + 64, 7168]
    W^UK, W^UV  kv_b_proj       kv_b_proj.weight                         [64 x (128 + 128), 512]
    W^O         o_proj          o_proj.weight                            [7168, 64 x 128]

    T tokens in this call · S tokens attended to · D hidden · H heads · N no-position part of a head · R rotary part
    A = N + R · V value width · Q query rank · C kv rank · M rows of kv_b_proj that belong to the heads at hand
    I, O columns and rows of whichever matrix a product is with

DeepSeek-V2, arXiv 2405.04434, section 2.1; K2 halves the heads to 64 (report, section 2.3). Two forms of the same
mathematics: the expanded one builds every head's keys and values, cheapest when many tokens attend at once; the
absorbed one moves kv_b_proj to the query's side and attends to the latents themselves, cheapest for a single token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .config import K2Config
from .kv_cache import NO_CACHE, LayerCache, NoCache
from .norm import RMSNorm
from .rope import rotate

EXPANDED = 2**28  # numbers of keys and values at a time: all heads of K2 up to 16,384 tokens, eight at 131,072
LATENT_EPS = 1e-6  # the latent norms' own constant, whatever rms_norm_eps says, as in DeepSeek's code and transformers


def causal_mask(T: int, S: int, device):
    """True where a query may look: the T queries are the last T of S positions, and none sees past its own. (T, S)."""
    position_S = torch.arange(S, device=device)
    return position_S <= position_S[S - T :, None]


class ScaledDotProduct(nn.Module):
    """softmax(scale q k^T + causal mask) v. A module without weights, so that training can watch q and k with a hook."""

    def __init__(self, scale: float):
        super().__init__()
        self.scale = scale

    def forward(self, q_TA, k_SA, v_SV):
        """For all heads or some: q (..., heads, T, A), k (..., heads, S, A), v (..., heads, S, V) -> (..., heads, T, V)."""
        mask_TS = causal_mask(q_TA.shape[-2], k_SA.shape[-2], q_TA.device)
        # The fused kernels, which never hold all T x S scores, want exactly one batch axis, and values as wide as keys:
        # zeros in, zeros cut off. Where they do not get both, torch takes the plain way without a word.
        leading, V = q_TA.shape[:-3], v_SV.shape[-1]
        padded_SA = F.pad(v_SV, (0, k_SA.shape[-1] - V))
        q_TA, k_SA, padded_SA = (x.reshape(-1, *x.shape[-3:]) for x in (q_TA, k_SA, padded_SA))
        # scale is given, since the default 1/sqrt(A) lacks YaRN's factor.
        mixed_TA = F.scaled_dot_product_attention(q_TA, k_SA, padded_SA, attn_mask=mask_TS, scale=self.scale)
        return mixed_TA[..., :V].reshape(*leading, *mixed_TA.shape[-3:-1], V)


class MultiHeadLatentAttention(nn.Module):
    """x (..., T, D) -> (..., T, D). With a cache the T tokens stand behind those that it holds, and are added to it."""

    def __init__(self, config: K2Config):
        super().__init__()
        self.config = config
        D, H, C = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        N, R, V = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.add_query_projections(config)
        self.kv_a_proj_with_mqa = nn.Linear(D, C + R, bias=False)
        self.kv_a_layernorm = RMSNorm(C, LATENT_EPS)
        self.kv_b_proj = nn.Linear(C, H * (N + V), bias=False)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        self.dot_product = ScaledDotProduct(config.softmax_scale)

    def add_query_projections(self, config: K2Config):
        """Queries go through a narrow latent too, of rank Q: fewer weights, and less to keep for the backward pass."""
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_EPS)
        self.q_b_proj = nn.Linear(config.q_lora_rank, config.num_attention_heads * config.qk_head_dim, bias=False)

    def project_queries(self, x_TD):
        """All heads' queries side by side, (..., T, H x A), not yet rotated."""
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD)))

    def forward(self, x_TD, cos_TP, sin_TP, cache: LayerCache | NoCache = NO_CACHE):
        q_nope_HTN, q_rope_HTR = self.queries(x_TD, cos_TP, sin_TP)
        c_kv_SC, k_rope_SR = cache.append(*self.latents(x_TD, cos_TP, sin_TP))
        # One new token: expanding all S keys and values for it would cost far more than absorbing.
        attend = self.absorbed if x_TD.shape[-2] == 1 else self.expanded
        mixed_HTV = attend(q_nope_HTN, q_rope_HTR, c_kv_SC, k_rope_SR)
        return self.o_proj(mixed_HTV.transpose(-3, -2).flatten(-2))

    @staticmethod
    def product(x_MI, weight_OI):
        """x W^T for some rows of x and of W, either of which may be a batch: (..., M, I), (..., O, I) -> (..., M, O).

        For matrices that are no module of their own. A loader may put another here, which a processor does faster.
        """
        return x_MI @ weight_OI.mT

    def queries(self, x_TD, cos_TP, sin_TP):
        """The two parts of each head's query, (..., H, T, N) and, rotated, (..., H, T, R): no-position part first."""
        c = self.config
        q_HTA = self.project_queries(x_TD).unflatten(-1, (c.num_attention_heads, c.qk_head_dim)).transpose(-3, -2)
        q_nope_HTN, q_rope_HTR = q_HTA.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return q_nope_HTN, rotate(q_rope_HTR, cos_TP, sin_TP)

    def latents(self, x_TD, cos_TP, sin_TP):
        """What the cache keeps: the normalised latent (..., T, C) and the rotated key (..., T, R), which has no norm."""
        c = self.config
        c_kv_TC, k_rope_TR = self.kv_a_proj_with_mqa(x_TD).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(c_kv_TC), rotate(k_rope_TR, cos_TP, sin_TP)

    def up_projections(self):
        """kv_b_proj's matrix head by head, as W^UK (H, N, C) and W^UV (H, V, C): a head's key rows come first."""
        c = self.config
        by_head_HOC = self.kv_b_proj.weight.unflatten(0, (c.num_attention_heads, -1))
        return by_head_HOC.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)

    def expanded(self, q_nope_HTN, q_rope_HTR, c_kv_SC, k_rope_SR):
        """Attention as the paper writes it: every head's keys and values are made first. -> (..., H, T, V).

        They are 20,480 numbers a token, and more than 10 GB with all that is made of them at 131,072 tokens. So where
        there are many tokens, a few heads are done after the other.
        """
        some = self.heads_at_once(c_kv_SC.shape[-2])
        rows = some * (self.config.qk_nope_head_dim + self.config.v_head_dim)
        groups = zip(q_nope_HTN.split(some, dim=-3), q_rope_HTR.split(some, dim=-3), self.kv_b_proj.weight.split(rows))
        return torch.cat([self.expanded_heads(*group, c_kv_SC, k_rope_SR) for group in groups], dim=-3)

    def heads_at_once(self, S: int) -> int:
        """For how many heads keys and values of S tokens exist at a time; in training for all, as QK-Clip watches all."""
        c = self.config
        most = EXPANDED // (S * (c.qk_nope_head_dim + c.v_head_dim))
        return c.num_attention_heads if self.training else min(max(most, 1), c.num_attention_heads)

    def expanded_heads(self, q_nope_TN, q_rope_TR, weight_MC, c_kv_SC, k_rope_SR):
        """The same for some heads, a leading axis here, and the M rows of kv_b_proj that are theirs."""
        c = self.config
        kv_SO = self.product(c_kv_SC, weight_MC).unflatten(-1, (q_nope_TN.shape[-3], -1)).transpose(-3, -2)
        k_nope_SN, v_SV = kv_SO.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        shared_SR = k_rope_SR.unsqueeze(-3).expand(*k_nope_SN.shape[:-1], -1)  # one rotary key for all heads
        q_TA = torch.cat((q_nope_TN, q_rope_TR), dim=-1)
        k_SA = torch.cat((k_nope_SN, shared_SR), dim=-1)
        return self.dot_product(q_TA, k_SA, v_SV)

    def absorbed(self, q_nope_HTN, q_rope_HTR, c_kv_SC, k_rope_SR):
        """The same result without keys or values: q (W^UK c) = (q W^UK) c, so the latent itself serves as both.

        The heads' queries then all look at one sequence of S latents, so that heads and tokens fold into one matrix
        product with it. -> (..., H, T, V).
        """
        key_HNC, value_HVC = self.up_projections()
        H, T, S = q_nope_HTN.shape[-3], q_nope_HTN.shape[-2], c_kv_SC.shape[-2]
        q_latent_HTC = q_nope_HTN @ key_HNC
        scores_MS = self.product(q_latent_HTC.flatten(-3, -2), c_kv_SC) + self.product(q_rope_HTR.flatten(-3, -2), k_rope_SR)
        # The softmax is float32: its sum runs over up to 131,072 terms, and bfloat16 would stop adding after 256.
        wide_HTS = scores_MS.unflatten(-2, (H, T)).to(torch.promote_types(scores_MS.dtype, torch.float32))
        wide_HTS.mul_(self.config.softmax_scale).masked_fill_(~causal_mask(T, S, wide_HTS.device), -torch.inf)
        weights_HTS = wide_HTS.softmax(dim=-1).to(c_kv_SC.dtype)
        mixed_HTC = self.product(weights_HTS.flatten(-3, -2), c_kv_SC.mT).unflatten(-2, (H, T))
        return (value_HVC @ mixed_HTC.mT).mT  # the matrix first: as a transposed second factor it would be copied


class DirectQueryAttention(MultiHeadLatentAttention):
    """The member without a query latent (Moonlight: `q_lora_rank: null`): q_proj makes the queries in one product."""

    def add_query_projections(self, config: K2Config):
        """One matrix, checkpoint name q_proj.weight, (H x A, D)."""
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.qk_head_dim, bias=False)

    def project_queries(self, x_TD):
        """All heads' queries side by side, (..., T, H x A), not yet rotated."""
        return self.q_proj(x_TD)
