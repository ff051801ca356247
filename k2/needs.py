"""What a model needs, from its config alone: weights in all and weights active, bytes on disk and in memory, by format.

People buy hardware on the wrong one of two numbers. K2 has 1,026 billion weights, and disk and memory must hold all of
them; a token meets 33 billion of these, and only its seconds depend on that.
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoint import DTYPE_BITS, DTYPE_NAMES, FORMATS, NAME_OF, SMALL, expected_tensors, resolved_dtypes
from .config import K2Config, K2Error
from .part import place_of
from .quantization import GROUP

MINI = Path(__file__).parent / "mini"
FAMILY = {  # the name on the command line: config, and the repository that has the weights
    "instruct": ("kimi-k2-instruct", "moonshotai/Kimi-K2-Instruct"),
    "instruct-0905": ("kimi-k2-instruct-0905", "moonshotai/Kimi-K2-Instruct-0905"),
    "base": ("kimi-k2-base", "moonshotai/Kimi-K2-Base"),
    "thinking": ("kimi-k2-thinking", "moonshotai/Kimi-K2-Thinking"),
    "k2.5": ("kimi-k2.5", "moonshotai/Kimi-K2.5"),
    "moonlight": ("moonlight-16b-a3b-instruct", "moonshotai/Moonlight-16B-A3B-Instruct"),
    "mini": (None, None),
}


def family_config(name: str) -> K2Config:
    """A member's config by its name here, or that of a path. Raises K2Error."""
    if name in FAMILY:
        file = FAMILY[name][0]
        return K2Config.from_json(Path(__file__).parent / "configs" / f"{file}.json" if file else MINI)
    if not os.path.exists(name):
        raise K2Error(f"{name}: expected one of {', '.join(FAMILY)}, or a path to a config.json or its folder, found nothing there. Check the name.")
    return K2Config.from_json(name)


@dataclass(frozen=True)
class Needs:
    """Bytes and counts of a model in a format; kinds of tensors as in part.py."""

    format: str
    weights: int  # numbers in all, and those that one token meets
    active: int
    tensors: int
    disk: int
    embedding: int  # stays in the map on the disk: a row a token is read
    rest: dict[str, int]  # by kind, the other bytes that every token reads: they must be in memory
    routed: int  # bytes of the chosen experts of one token
    expert: int
    experts: int
    chosen: int  # of a layer's experts, by one token
    layers: int
    cache_per_token: int

    @property
    def memory(self) -> int:
        """All that decoding reads, if it is to be resident."""
        return sum(self.rest.values()) + self.expert * self.experts


def in_format(config: K2Config, format: str) -> K2Config:
    """The same model in another format: bf16, fp8, int4 or fp32. Raises K2Error where it cannot be packed."""
    torch_dtype, quantization = FORMATS[format]
    if format == "int4" and (config.hidden_size % GROUP or config.moe_intermediate_size % GROUP):
        raise K2Error(f"int4: packs groups of {GROUP} inputs; hidden_size {config.hidden_size} or moe_intermediate_size {config.moe_intermediate_size} does not divide. Use fp8.")
    return replace(config, torch_dtype=torch_dtype, quantization_config=quantization)


def own_format(config: K2Config) -> str:
    """The format a model is released in."""
    return {"plain": "fp32" if config.torch_dtype == "float32" else "bf16"}.get(config.weight_format, config.weight_format)


def tensors_by_layer(config: K2Config) -> list[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, how often) of every tensor: one layer with experts stands for all of them, which are alike."""
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    short = expected_tensors(replace(config, num_hidden_layers=min(dense + 1, layers)))
    return [(name, spec.dtypes[0], spec.shape, layers - dense if f"layers.{dense}." in name else 1) for name, spec in short.items()]


def needs(config: K2Config, format: str, rest: str | None = None) -> Needs:
    """What a model of this config needs in a format; `rest` is that of all but the routed experts where it is another."""
    sizes = by_kind(stored_sizes(config, rest or format)) | {"expert": by_kind(stored_sizes(config, format)).get("expert", 0)}
    plain = by_kind((name, math.prod(shape) * times) for name, _, shape, times in tensors_by_layer(in_format(config, "bf16")))
    E, K = config.n_routed_experts, config.num_experts_per_tok
    experts = (config.num_hidden_layers - config.first_k_dense_replace) * E
    return Needs(
        format=format,
        weights=sum(plain.values()),
        active=sum(plain.values()) - plain.get("expert", 0) // E * (E - K),
        tensors=sum(times for *_, times in tensors_by_layer(in_format(config, format))),
        disk=sum(sizes.values()),
        embedding=sizes["embedding"],
        rest={kind: size for kind, size in sizes.items() if kind not in ("embedding", "expert")},
        routed=sizes["expert"] // E * K,
        expert=sizes["expert"] // max(experts, 1),
        experts=experts,
        chosen=K,
        layers=config.num_hidden_layers,
        cache_per_token=config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * DTYPE_NAMES[NAME_OF[config.torch_dtype]].itemsize,
    )


def stored_sizes(config: K2Config, format: str):
    """(name, bytes) of every tensor in a format, alike layers together."""
    return ((name, math.prod(shape) * DTYPE_BITS[dtype] // 8 * times) for name, dtype, shape, times in tensors_by_layer(in_format(config, format)))


def by_kind(pairs) -> dict[str, int]:
    """Pairs of a tensor's name and a number, added up by the tensor's kind."""
    found: dict[str, int] = {}
    for name, number in pairs:
        kind = place_of(name).kind
        found[kind] = found.get(kind, 0) + number
    return found


def stale_buffers(config: K2Config) -> tuple[int, int]:
    """How many tensors, and bytes, the released FP8 files hold besides: a rotary buffer a layer, of half an ordinary head."""
    if config.weight_format != "fp8":
        return 0, 0
    return config.num_hidden_layers, config.num_hidden_layers * (config.hidden_size // config.num_attention_heads // 2) * 2


def formats_in_memory(config: K2Config, device: str = "cpu") -> tuple[str, str]:
    """The formats that the program keeps in memory, of the routed experts and of the rest: see resolved_dtypes."""
    plain, own = needs(config, "bf16"), own_format(config)
    if plain.weights * 4 > SMALL and sum(plain.rest.values()) > 4 * SMALL:  # spares K2 the list of all its tensors
        return own, own
    names = {None: own, torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: own}
    return tuple(names[dtype] for dtype in resolved_dtypes(config, "auto", torch.device(device)))
