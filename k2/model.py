"""K2: the body (embedding, 61 layers, a last norm) and the head.

    ours                 checkpoint
    model.embed_tokens   model.embed_tokens.weight
    model.layers         model.layers.0.* ... model.layers.60.*
    model.norm           model.norm.weight
    lm_head              lm_head.weight

    T tokens · D hidden · W vocabulary · P rotary pairs
"""

import torch
from torch import nn

from .config import K2Config, K2Error
from .decoder import DecoderLayer
from .embedding import Embedding, OutputHead
from .kv_cache import NO_CACHE, LatentCache, NoCache
from .moe import resident_experts
from .norm import RMSNorm
from .rope import rope_angles, rope_frequencies


class Body(nn.Module):
    """ids (..., T) -> the last layer's normalised state (..., T, D)."""

    def __init__(self, config: K2Config, make_experts):
        super().__init__()
        self.embed_tokens = Embedding(config)
        self.layers = nn.ModuleList(DecoderLayer(config, i, make_experts) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.frequencies_P = rope_frequencies(config)  # no parameter and no buffer: float64, whatever the weights are

    def forward(self, ids_T, cache: LatentCache | NoCache = NO_CACHE):
        T = ids_T.shape[-1]
        x_TD = self.embed_tokens(ids_T)
        # float32 tables at least: a bfloat16 cosine would move every token by its rounding.
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        cos_TP, sin_TP = (table_TP.to(x_TD.device, wide) for table_TP in rope_angles(self.frequencies_P, cache.length, T))
        for i, layer in enumerate(self.layers):
            x_TD = layer(x_TD, cos_TP, sin_TP, cache.layer(i))
        cache.advance(T)
        return self.norm(x_TD)


class K2(nn.Module):
    """The whole model. Made here it has no useful weights; `k2.load` fills it from a checkpoint.

    `make_experts(config, layer)` gives each MoE layer its experts; by default they are modules of the model.
    """

    def __init__(self, config: K2Config, make_experts=resident_experts):
        super().__init__()
        self.config = config
        self.model = Body(config, make_experts)
        self.lm_head = OutputHead(config)

    def forward(self, ids, cache: LatentCache | None = None, positions=slice(None)):
        """Logits (..., T, W), float32, of ids (..., T) int64; `positions` picks the ones of the T that get logits.

        With a cache the call goes on where the cache ends, and adds its tokens to it. At 128K tokens all logits would
        be 86 GB: generation asks for slice(-1, None). Raises K2Error for ids that have no row in the embedding, and for
        a call that would pass the context.
        """
        cache = cache or NO_CACHE
        ids_T = self.checked(ids, cache)
        return self.lm_head(self.model(ids_T, cache)[..., positions, :])

    def checked(self, ids, cache: LatentCache | NoCache):
        """ids as a tensor on the head's device, or a K2Error."""
        c = self.config
        if not isinstance(ids, torch.Tensor) or ids.dtype != torch.int64 or ids.ndim == 0 or ids.shape[-1] == 0:
            raise K2Error("ids: expected an int64 tensor (..., T) of at least one token, sequences of one length. Give at least one id, and unequal lengths in calls of their own.")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= c.vocab_size:
            raise K2Error(f"ids: found {low if low < 0 else high}; expected 0 to {c.vocab_size - 1}, the rows of the embedding. Was the text encoded with this checkpoint's tokenizer?")
        end = cache.length + ids.shape[-1]
        if end > c.max_position_embeddings:
            raise K2Error(f"context: {end} tokens; expected at most max_position_embeddings = {c.max_position_embeddings}. Shorten the prompt.")
        return ids.to(self.lm_head.weight.device)
