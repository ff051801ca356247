"""One decoder layer: attention, then the feed-forward, each behind a norm and beside a residual connection.

    ours                       checkpoint (model.layers.L.)
    input_layernorm            input_layernorm.weight            [7168]
    self_attn                  self_attn.*
    post_attention_layernorm   post_attention_layernorm.weight   [7168]
    mlp                        mlp.*: one wide Expert in layer 0, a MoE in layers 1 to 60

    T tokens · D hidden

The residual stream x is only ever added to. Each half reads it through its own norm.
"""

from torch import nn

from .attention import DirectQueryAttention, MultiHeadLatentAttention
from .config import K2Config
from .expert import Expert
from .kv_cache import NO_CACHE, LayerCache, NoCache
from .moe import MoE, resident_experts
from .norm import RMSNorm


class DecoderLayer(nn.Module):
    """x (..., T, D) -> (..., T, D)."""

    def __init__(self, config: K2Config, layer: int, make_experts=resident_experts):
        super().__init__()
        attention = MultiHeadLatentAttention if config.q_lora_rank else DirectQueryAttention
        dense = config.is_dense(layer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Expert(config.hidden_size, config.intermediate_size) if dense else MoE(config, layer, make_experts)

    def forward(self, x_TD, cos_TP, sin_TP, cache: LayerCache | NoCache = NO_CACHE):
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), cos_TP, sin_TP, cache)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))
