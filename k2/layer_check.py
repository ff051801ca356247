"""One layer of a checkpoint against the numpy reference: how someone with a laptop proves our layers on K2's own weights.

    attention     the block behind its norm: multi-head latent attention on a few tokens
    router        the same experts chosen, and their weights; not at rest, where a rounded input may choose another
    experts       the shared one, and the routed ones that are there or are named, one at a time
    layer         all of it, if every expert that the tokens choose is there

Each is run in torch as `k2.load` would make it and in numpy on weights that are dequantised here once more, from the
bytes and from the formats' definitions. In float64 the two must agree to rounding, in float32 nearly so; at rest, where
products are in the checkpoint's own dtype, to the precision of that dtype. What it cannot see is a wrong byte that is still
a number: both sides read it. For that there are the hub's hashes (download_weights.py --verify). Only one expert is in memory at a time: a
whole layer of K2 in float64 would be 136 GB.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from . import reference
from .attention import DirectQueryAttention, MultiHeadLatentAttention
from .checkpoint import Checkpoint, attention_shapes, filled
from .config import K2Error
from .decoder import DecoderLayer
from .expert import Expert
from .norm import RMSNorm
from .quantization import BLOCK, GROUP, NIBBLES
from .rope import rope_angles, rope_frequencies
from .router import Router

# Relative L2 of the worst row against float64, for one layer: what rounding explains, and no mistake that we know of.
LIMITS = {"float64": 1e-10, "float32": 1e-5, "stored": 4e-2}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "stored": None}

MOST_TOKENS = 4096  # scores are tokens x tokens x heads in float64, twice


class Result(NamedTuple):
    """What was compared, in which dtype, the worst row's relative error, and the most that rounding explains."""

    what: str
    dtype: str
    error: float
    limit: float


# ---- the reference's weights, dequantised apart from quantization.py ----


def e4m3(code) -> np.ndarray:
    """float8_e4m3fn codes as float64: sign, four bits of exponent with bias 7, three of fraction; 0x7F is no number."""
    exponent, fraction = (code >> 3 & 15).astype(np.float64), (code & 7).astype(np.float64)
    value = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * 2.0 ** (exponent - 7))
    return np.where(code >= 128, -value, value)


class Weights(Mapping):
    """The checkpoint's weights as the reference wants them: float64 arrays by name, made when asked for and not kept."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def __getitem__(self, name: str) -> np.ndarray:
        base, held = name.removesuffix(".weight"), self.checkpoint.weight_map
        prefix = self.checkpoint.config.tensor_prefix
        if f"{prefix}{base}.weight_packed" in held:
            return self.int4(base)
        if f"{prefix}{name}_scale_inv" in held:
            return self.fp8(name)
        return self.checkpoint.tensor(name).double().numpy()

    def fp8(self, name: str) -> np.ndarray:
        """Each code times the scale of its block of 128 x 128, rounded to float32 as the format's own text has it."""
        code_OI = self.checkpoint.tensor(name).view(torch.uint8).numpy()
        scale_BG = self.checkpoint.tensor(f"{name}_scale_inv").numpy()
        O, I = code_OI.shape
        product_OI = e4m3(code_OI).astype(np.float32) * scale_BG.repeat(BLOCK, axis=0)[:O].repeat(BLOCK, axis=1)[:, :I]
        return product_OI.astype(np.float64)

    def int4(self, base: str) -> np.ndarray:
        """Each nibble, lowest first, less 8, times the scale of its group of 32."""
        packed_OU = self.checkpoint.tensor(f"{base}.weight_packed").numpy().view(np.uint32)
        scale_OG = self.checkpoint.tensor(f"{base}.weight_scale").double().numpy()
        nibble_OUL = packed_OU[:, :, None] >> (4 * np.arange(NIBBLES, dtype=np.uint32)) & 15
        return (nibble_OUL.reshape(len(packed_OU), -1) - 8.0) * scale_OG.repeat(GROUP, axis=1)

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.weight_map)

    def __len__(self) -> int:
        return len(self.checkpoint.weight_map)


# ---- our side ----


class OneAtATime(nn.Module):
    """A layer's experts, each made when it is its turn and forgotten after it: the `fetch` of moe.Experts."""

    def __init__(self, checkpoint: Checkpoint, layer: int, dtype):
        super().__init__()
        self.checkpoint, self.layer, self.dtype = checkpoint, layer, dtype

    def fetch(self, ids: list[int]):
        """Yield (id, expert) for each id."""
        for e in ids:
            yield e, expert_of(self.checkpoint, f"model.layers.{self.layer}.mlp.experts.{e}.", self.dtype, self.checkpoint.config.moe_intermediate_size)


def made(checkpoint: Checkpoint, prefix: str, dtype, make) -> nn.Module:
    """A module of the checkpoint's weights, as the loader makes it."""
    with torch.device("meta"):
        module = make()
    return filled(checkpoint, prefix, module, dtype, torch.device("cpu"))


def expert_of(checkpoint: Checkpoint, prefix: str, dtype, width: int) -> Expert:
    """One expert, shared or routed."""
    return made(checkpoint, prefix, dtype, lambda: Expert(checkpoint.config.hidden_size, width))


def quiet():
    """A context without numpy's warnings: what is no number gets its line here."""
    return np.errstate(over="ignore", invalid="ignore", divide="ignore")


def relative_error(found, expected) -> float:
    """The worst row's |found - expected| / |expected|, L2; infinite where a row is no number, or all zeros: no layer of a
    trained model answers nothing, and a shard of zeros must not pass for one."""
    length = np.linalg.norm(expected, axis=-1)
    error = np.linalg.norm(found.double().numpy() - expected, axis=-1) / np.where(length > 0, length, np.nan)
    return float(np.max(error)) if np.isfinite(error).all() else float("inf")


# ---- the comparisons ----


class LayerCheck:
    """The comparisons of one layer, on seeded tokens."""

    def __init__(self, checkpoint: Checkpoint, layer: int, tokens: int, seed: int):
        self.checkpoint, self.config, self.layer = checkpoint, checkpoint.config, layer
        self.name, self.weights = f"model.layers.{layer}", Weights(checkpoint)
        # Rows of unit variance: what a norm in front would make of any hidden state.
        self.x_TD = np.random.default_rng(seed).standard_normal((tokens, self.config.hidden_size))
        self.angles = rope_angles(rope_frequencies(self.config), 0, tokens)

    def has(self, *names: str) -> bool:
        """Whether the checkpoint holds all these tensors, or their packed ones, of this layer."""
        prefix, held = f"{self.config.tensor_prefix}{self.name}.", self.checkpoint.weight_map
        return all(f"{prefix}{name}" in held or f"{prefix}{name}_packed" in held for name in names)

    def inputs(self, dtype) -> torch.Tensor:
        """The tokens in the dtype that is computed in."""
        return torch.from_numpy(self.x_TD).to(DTYPES[dtype] or getattr(torch, self.config.torch_dtype))

    def tables(self, x_TD) -> tuple:
        """cos and sin, as the model makes them for such states."""
        return tuple(table_TP.to(torch.promote_types(x_TD.dtype, torch.float32)) for table_TP in self.angles)

    def compared(self, what: str, expected, run) -> Iterator[Result]:
        """`run(dtype's name)` against what the reference says, in each dtype."""
        for dtype, limit in LIMITS.items():
            with torch.inference_mode():
                yield Result(what, dtype, relative_error(run(dtype), expected), limit)

    def attention(self) -> Iterator[Result]:
        """The attention block behind its norm."""
        c, x_TD = self.config, self.x_TD
        norm = self.weights[f"{self.name}.input_layernorm.weight"]
        expected = reference.attention(c, self.weights, f"{self.name}.self_attn", reference.rms_norm(x_TD, norm, c.rms_norm_eps))

        def run(dtype):
            x_TD = self.inputs(dtype)
            first = made(self.checkpoint, f"{self.name}.input_layernorm.", DTYPES[dtype], lambda: RMSNorm(c.hidden_size, c.rms_norm_eps))
            kind = MultiHeadLatentAttention if c.q_lora_rank else DirectQueryAttention
            return made(self.checkpoint, f"{self.name}.self_attn.", DTYPES[dtype], lambda: kind(c))(first(x_TD), *self.tables(x_TD))

        return self.compared("attention", expected, run)

    def router(self) -> Iterator[Result]:
        """The weights of the chosen experts, each at its expert's place: another choice is an error of its own size."""
        c = self.config
        ids_TK, weights_TK = reference.route(c, self.weights, f"{self.name}.mlp", self.x_TD)

        def placed(ids_TK, weights_TK):
            return torch.zeros(len(self.x_TD), c.n_routed_experts, dtype=torch.float64).scatter(1, ids_TK, weights_TK.double())

        def run(dtype):
            return placed(*made(self.checkpoint, f"{self.name}.mlp.gate.", DTYPES[dtype], lambda: Router(c))(self.inputs(dtype)))

        return exact(self.compared("router", placed(torch.from_numpy(ids_TK), torch.from_numpy(weights_TK)).numpy(), run))

    def feed_forward(self, what: str, name: str, width: int) -> Iterator[Result]:
        """An expert, shared or routed, or the wide feed-forward of a dense layer."""
        expected = reference.swiglu(self.weights, f"{self.name}.{name}", self.x_TD)
        return self.compared(what, expected, lambda dtype: expert_of(self.checkpoint, f"{self.name}.{name}.", DTYPES[dtype], width)(self.inputs(dtype)))

    def whole(self) -> Iterator[Result]:
        """The decoder layer, norms and residuals included, its experts one at a time."""
        expected = reference.decoder_layer(self.config, self.weights, self.layer, self.x_TD)

        def run(dtype):
            def experts(config, layer):
                return OneAtATime(self.checkpoint, layer, DTYPES[dtype])

            x_TD = self.inputs(dtype)
            return made(self.checkpoint, f"{self.name}.", DTYPES[dtype], lambda: DecoderLayer(self.config, self.layer, experts))(x_TD, *self.tables(x_TD))

        return exact(self.compared("whole layer", expected, run))

    def chosen(self) -> list[int]:
        """The experts that the whole layer's tokens ask for, by the reference. Needs attention and router."""
        c, w = self.config, self.weights
        attended = reference.attention(c, w, f"{self.name}.self_attn", reference.rms_norm(self.x_TD, w[f"{self.name}.input_layernorm.weight"], c.rms_norm_eps))
        normed_TD = reference.rms_norm(self.x_TD + attended, w[f"{self.name}.post_attention_layernorm.weight"], c.rms_norm_eps)
        return sorted(set(reference.route(c, w, f"{self.name}.mlp", normed_TD)[0].flatten().tolist()))

    def has_expert(self, name: str) -> bool:
        """Whether all three matrices of a feed-forward are there."""
        return self.has(*(f"{name}.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")))

    def has_attention(self) -> bool:
        """Whether the block and its norm are there."""
        return self.has("input_layernorm.weight", *(f"self_attn.{name}.weight" for name in attention_shapes(self.config)))

    def present_experts(self) -> list[int]:
        """The routed experts that the checkpoint holds of this layer."""
        return [] if self.config.is_dense(self.layer) else [e for e in range(self.config.n_routed_experts) if self.has_expert(f"mlp.experts.{e}")]


def exact(found: Iterator[Result]) -> Iterator[Result]:
    """Without the results at rest: where two experts score alike, inputs rounded to bfloat16 may choose another."""
    return (result for result in found if result.dtype != "stored")


def results(checkpoint: Checkpoint, layer: int, experts: tuple[int, ...] | None, tokens: int, seed: int) -> Iterator[Result]:
    """Every comparison that the layer's tensors allow, one after the other; of the routed experts those named, or else
    the first two that are there. Raises K2Error if there is nothing to compare."""
    config = checkpoint.config
    if not 0 <= layer < config.num_hidden_layers:
        raise K2Error(f"check-layer: found layer {layer}; expected 0 to {config.num_hidden_layers - 1}.")
    check = LayerCheck(checkpoint, layer, tokens, seed)
    dense, present = config.is_dense(layer), check.present_experts()
    if dense and experts:
        raise K2Error(f"--experts: layer {layer} is dense and has no routed experts; expected a layer from {config.first_k_dense_replace} on. Leave --experts away.")
    for e in experts or ():
        if e not in present:
            raise K2Error(f"{checkpoint.directory}: expert {e} of layer {layer} is not here. Fetch it: download_weights.py ... --experts {layer}:{e}")
    parts = [
        (check.has_attention(), check.attention),
        (not dense and check.has("mlp.gate.weight", "mlp.gate.e_score_correction_bias"), check.router),
        (not dense and check.has_expert("mlp.shared_experts"), lambda: check.feed_forward("shared expert", "mlp.shared_experts", config.moe_intermediate_size * config.n_shared_experts)),
        (dense and check.has_expert("mlp"), lambda: check.feed_forward("dense feed-forward", "mlp", config.intermediate_size)),
    ]
    if not present and not any(there for there, _ in parts):
        raise K2Error(f"{checkpoint.directory}: holds nothing whole of layer {layer}. Fetch a part of it: download_weights.py ... --layers {layer} --part attention")
    for there, run in parts:
        if there:
            yield from run()
    for e in experts if experts is not None else present[:2]:
        yield from check.feed_forward(f"expert {e}", f"mlp.experts.{e}", config.moe_intermediate_size)
    if all(there for there, _ in (parts[:3] if not dense else (parts[0], parts[3]))) and (dense or set(check.chosen()) <= set(present)):
        yield from check.whole()


def line(result: Result) -> str:
    """attention in float64: 1.2e-15 of 1e-10."""
    verdict = "" if result.error <= result.limit else "   NO"
    return f"{result.what:20} {result.dtype:8} relative error {result.error:.2e}, limit {result.limit:.0e}{verdict}"


def verdict(where, layer: int, found: list[Result]):
    """Raise K2Error if an error is larger than rounding explains."""
    wrong = [result for result in found if not result.error <= result.limit]
    if wrong:
        raise K2Error(f"{where}: layer {layer}: {wrong[0].what} in {wrong[0].dtype} differs by {wrong[0].error:.2e}; expected at most {wrong[0].limit:.0e}. The weights are damaged (download_weights.py --verify), or this code is wrong.")
