"""Counting with configs: the names that a lesson's `<!-- check: ... -->` may use, and that its exercises compare with."""

import math

from k2.checkpoint import attention_shapes, expected_tensors, feed_forward_widths, norm_widths
from k2.config import K2Config

from .checker import ROOT


def config(name: str) -> K2Config:
    """A member of the family by its file's name in k2/configs, or "mini"."""
    return K2Config.from_json(ROOT / "k2" / "mini" if name == "mini" else ROOT / "k2" / "configs" / f"{name}.json")


cfg = config("kimi-k2-instruct")
mini = config("mini")
SIZES = {"F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8}


def total(c: K2Config) -> int:
    """All weights of a model. That this is what a checkpoint's tensors hold, lesson 01 and a test show."""
    return sum(parts(c).values())


def attention(c: K2Config) -> int:
    """The attention matrices of one layer."""
    return sum(rows * columns for rows, columns in attention_shapes(c).values())


def expert(c: K2Config) -> int:
    """One routed expert."""
    return 3 * c.hidden_size * c.moe_intermediate_size


def dense(c: K2Config) -> int:
    """The wide feed-forward of a dense layer."""
    return 3 * c.hidden_size * c.intermediate_size


def table(c: K2Config) -> int:
    """The embedding, and the output head again."""
    return c.vocab_size * c.hidden_size


def router(c: K2Config) -> int:
    """A router's matrix and its bias."""
    return c.n_routed_experts * (c.hidden_size + 1)


def norms(c: K2Config) -> int:
    """All norm weights."""
    return c.num_hidden_layers * sum(norm_widths(c).values()) + c.hidden_size


def moe_layers(c: K2Config) -> int:
    """Layers with experts."""
    return c.num_hidden_layers - c.first_k_dense_replace


def parts(c: K2Config) -> dict[str, int]:
    """Where the weights are; the values sum to `total`."""
    return {
        "routed experts": moe_layers(c) * c.n_routed_experts * expert(c),
        "attention": c.num_hidden_layers * attention(c),
        "shared experts": moe_layers(c) * c.n_shared_experts * expert(c),
        "embedding": table(c),
        "head": table(c),
        "dense layer": c.first_k_dense_replace * dense(c),
        "routers": moe_layers(c) * router(c),
        "norms": norms(c),
    }


def active(c: K2Config) -> int:
    """The weights of all matrices that one token meets: of the routed experts only the chosen ones."""
    idle = moe_layers(c) * (c.n_routed_experts - c.num_experts_per_tok) * expert(c)
    return total(c) - idle


def stored_bytes(c: K2Config) -> int:
    """Bytes of all tensors as a checkpoint stores them."""
    return sum(math.prod(s.shape) * SIZES[s.dtypes[0]] for s in expected_tensors(c).values())


def cache_numbers(c: K2Config) -> int:
    """Numbers a token a layer in the latent cache."""
    return c.kv_lora_rank + c.qk_rope_head_dim


def full_cache_numbers(c: K2Config) -> int:
    """The same if every head's key and value were kept."""
    return c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)


def widths(c: K2Config, layer: int) -> dict[str, int]:
    """The feed-forwards of a layer and their widths."""
    return feed_forward_widths(c, layer)


def special_names() -> dict[int, str]:
    """K2-Instruct's named special tokens, as offsets behind the ranks."""
    from k2.tokenizer import SPECIAL_NAMES

    return SPECIAL_NAMES


def expanded_flops(c: K2Config, T: int, S: int) -> int:
    """A layer's attention from latents to mixed values, all keys and values made first: two operations a product."""
    H, N, V = c.num_attention_heads, c.qk_nope_head_dim, c.v_head_dim
    return 2 * (S * c.kv_lora_rank * H * (N + V) + H * T * S * (c.qk_head_dim + V))


def absorbed_flops(c: K2Config, T: int, S: int) -> int:
    """The same with W^UK moved to the query's side and W^UV behind the sum."""
    H, C = c.num_attention_heads, c.kv_lora_rank
    return 2 * (H * T * c.qk_nope_head_dim * C + H * T * S * (C + c.qk_rope_head_dim) + H * T * S * C + H * T * C * c.v_head_dim)


def float32_angle_error(position: int) -> float:
    """Radians by which the worst of K2's angles is off at a position if it is computed in float32, to three decimals."""
    import torch

    from k2.rope import rope_frequencies

    frequencies = rope_frequencies(cfg)
    return round((torch.tensor(position, dtype=torch.float32) * frequencies.float() - position * frequencies).abs().max().item(), 3)


def characters() -> int:
    """Rows of the grammar's table of a character in a string."""
    from k2.grammar import CHARACTER

    return len(CHARACTER)
