"""Small random models for the tests, the numpy weights of one, and how far two results are apart.

The sizes of `small_config` are pairwise distinct. K2's own are not (N = V = 128), and a swap of two axes of one size
passes every shape check. Its norm weights are not ones and its router bias is not zero, since fresh values hide terms.
"""

import contextlib
from dataclasses import replace

import numpy as np
import torch

from k2 import reference
from k2.config import K2Config, YarnScaling
from k2.model import K2

# An original window of 16 tokens: with theta 100 the pairs 0 and 1 of 6 turn in it and the others do not, so YaRN acts.
YARN = YarnScaling(factor=32.0, original_max_position_embeddings=16, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)


def small_config(**changes) -> K2Config:
    """W 97, D 48, H 3, N 10, R 12, A 22, V 14, Q 28, C 20, E 11, K 4, P 6, widths 72 and 26; layer 0 of 3 is dense."""
    config = K2Config(
        vocab_size=97, hidden_size=48, intermediate_size=72, moe_intermediate_size=26, num_hidden_layers=3, first_k_dense_replace=1,
        num_attention_heads=3, num_key_value_heads=3, q_lora_rank=28, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=12, v_head_dim=14,
        n_routed_experts=11, n_shared_experts=1, num_experts_per_tok=4, routed_scaling_factor=2.827,
        rms_norm_eps=1e-6, rope_theta=100.0, rope_scaling=YARN, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1, pad_token_id=None, torch_dtype="float32", quantization_config=None,
    )  # fmt: skip
    if "num_attention_heads" in changes:  # latent attention has no grouped heads: one number under two names
        changes = {"num_key_value_heads": changes["num_attention_heads"], **changes}
    return replace(config, **changes)


def random_config(seed: int) -> K2Config:
    """Other shapes and switches: no query latent in every third, no YaRN in every fourth, beta_fast 32, two shared experts."""
    rng = np.random.default_rng(seed)

    def between(low, high):
        return int(rng.integers(low, high + 1))

    E, R, N = between(3, 14), 2 * between(1, 8), between(1, 24)
    yarn = replace(YARN, factor=float(rng.choice([2, 32, 64])), beta_fast=float(rng.choice([1, 32])), original_max_position_embeddings=between(8, 64))
    return small_config(
        vocab_size=between(20, 120), hidden_size=between(8, 64), intermediate_size=between(5, 80), moe_intermediate_size=between(3, 40),
        num_hidden_layers=3, first_k_dense_replace=seed % 3, num_attention_heads=between(1, 5),
        q_lora_rank=None if seed % 3 == 0 else between(4, 32), kv_lora_rank=between(4, 32),
        qk_nope_head_dim=N, qk_rope_head_dim=R, v_head_dim=between(1, N + R),
        n_routed_experts=E, n_shared_experts=1 + seed % 2, num_experts_per_tok=between(1, min(E, 8)),
        routed_scaling_factor=float(rng.choice([1.0, 2.446, 2.827])), rms_norm_eps=float(rng.choice([1e-6, 1e-5])),
        rope_theta=float(rng.choice([100.0, 10000.0, 50000.0])), rope_scaling=None if seed % 4 == 0 else yarn,
    )  # fmt: skip


def random_model(config: K2Config, seed: int = 0, dtype=torch.float32) -> K2:
    """A whole model with random weights; see `randomised`."""
    return randomised(K2(config), seed, dtype)


@torch.no_grad()
def randomised(module, seed: int = 0, dtype=torch.float32):
    """Matrices of gain 1, norm weights around 1, a router bias as wide as the scores' spread; the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(1 + 0.2 * noise if parameter.ndim == 1 else noise if "embed_tokens" in name else noise * parameter.shape[-1] ** -0.5)
    for buffer in module.buffers():
        buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
    return module.to(dtype)


def random_ids(config: K2Config, *shape: int, seed: int = 0):
    """Ids of the given shape, int64."""
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def numpy_weights(module, prefix: str = "") -> dict:
    """The weights as k2.reference wants them: exactly the module's own values, as float64 arrays under the checkpoint's names.

    `prefix` is what stands before the names where the module is a part of the model, as in "model.layers.0.".
    """
    return {prefix + name: tensor.detach().double().cpu().numpy() for name, tensor in module.state_dict().items()}


def as_float64(values) -> np.ndarray:
    """A tensor or an array as float64."""
    return np.asarray(values.detach().double().cpu().numpy() if isinstance(values, torch.Tensor) else values, dtype=np.float64)


def relative_error(found, expected) -> float:
    """The worst row's |found - expected| / |expected|, L2 norms over the last axis. Not finite where a result is not."""
    found, expected = as_float64(found), as_float64(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    length = np.maximum(np.linalg.norm(expected, axis=-1), np.finfo(np.float64).tiny)
    return float(np.max(np.linalg.norm(found - expected, axis=-1) / length))


def assert_close(found, expected, limit: float, where: str = ""):
    """Every row within `limit`, relative L2; the failure says where, and by how much."""
    relative = relative_error(found, expected)
    largest = float(np.max(np.abs(as_float64(found) - as_float64(expected))))
    assert relative <= limit, f"{where}: relative error {relative:.3g} of the worst row, limit {limit:.3g}; largest absolute error {largest:.3g}"


def assert_same(found, expected, where: str = ""):
    """Equal bit for bit, dtype and shape too."""
    assert found.dtype == expected.dtype and found.shape == expected.shape, f"{where}: {found.dtype} {tuple(found.shape)}, expected {expected.dtype} {tuple(expected.shape)}"
    differing = int((found != expected).sum())
    largest = float((found.detach().double() - expected.detach().double()).abs().max())
    assert torch.equal(found, expected), f"{where}: {differing} of {found.numel()} numbers differ, by at most {largest:.3g}"


@contextlib.contextmanager
def recorded_choices(model):
    """The expert ids that each router of `model` chooses in the one call made inside, by the name k2.reference gives the block."""
    names = {layer.mlp.gate: f"model.layers.{i}.mlp" for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}
    choices = {}

    def keep(router, _, result):
        choices[names[router]] = result[0].numpy()

    handles = [router.register_forward_hook(keep) for router in names]
    yield choices
    for handle in handles:
        handle.remove()


def reference_logits(model, ids, choices=None, tolerance: float = 1e-5) -> np.ndarray:
    """k2.reference's logits (T, W) of one sequence. With `choices` the routing is held: the reference takes the experts
    that the model took, after checking that none of them scores more than `tolerance` below the worst of its own choice."""
    weights = numpy_weights(model)
    plain = reference.route

    def held(config, weights, name, x_TD):
        free_TK, _ = plain(config, weights, name, x_TD)
        held_TK = choices[name]
        scores_TE = reference.sigmoid(x_TD @ weights[f"{name}.gate.weight"].T)
        biased_TE = scores_TE + weights[f"{name}.gate.e_score_correction_bias"]
        worst_free_T, worst_held_T = (np.take_along_axis(biased_TE, ids_TK, axis=-1).min(axis=-1) for ids_TK in (free_TK, held_TK))
        shortfall = float(np.max(worst_free_T - worst_held_T))
        assert shortfall <= tolerance, f"{name}: an expert was chosen that scores {shortfall:.3g} too little, limit {tolerance:.3g}"
        weights_TK = np.take_along_axis(scores_TE, held_TK, axis=-1)
        return held_TK, config.routed_scaling_factor * weights_TK / weights_TK.sum(axis=-1, keepdims=True)

    try:
        reference.route = held if choices is not None else plain
        return reference.logits(model.config, weights, as_float64(ids).astype(int))
    finally:
        reference.route = plain


def rotary_tables(config: K2Config, start: int, tokens: int, dtype):
    """cos and sin (T, P) of the positions, as precise as `dtype` and at least float32, without k2.rope's own tables."""
    angle_TP = (start + np.arange(tokens))[:, None] * reference.rope_frequencies(config)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.from_numpy(np.cos(angle_TP)).to(wide), torch.from_numpy(np.sin(angle_TP)).to(wide)


def numbers(*shape: int, seed: int = 0, dtype=torch.float64):
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_gradients_are_right(module, *inputs, constants=()):
    """Derivatives by the inputs and by every parameter against finite differences, float64."""
    names, parameters = zip(*((name, p.detach().requires_grad_()) for name, p in module.named_parameters()))
    inputs = [x.clone().requires_grad_() for x in inputs]

    def call(*values):
        return torch.func.functional_call(module, dict(zip(names, values)), (*values[len(names) :], *constants))

    assert torch.autograd.gradcheck(call, (*parameters, *inputs), eps=1e-6, atol=1e-6, rtol=1e-5)
