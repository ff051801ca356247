"""The router: who is chosen, what they weigh, and that the bias does the first and never the second."""

import numpy as np
import pytest
import torch
from small import as_float64, assert_close, assert_same, numbers, numpy_weights, random_config, random_model, randomised, small_config

from k2 import reference
from k2.config import K2Config
from k2.router import Router

NAME = "model.layers.2.mlp"


def one_router(config: K2Config, seed: int = 0, dtype=torch.float64):
    """(a router, its weights for the reference)."""
    router = randomised(Router(config), seed, dtype)
    return router, numpy_weights(router, f"{NAME}.gate.")


def gaps(config: K2Config, weights, x_TD):
    """Between each of the K + 1 best biased scores and the next, (T, K): one below 1e-5 leaves the order to rounding."""
    scores_TE = reference.sigmoid(x_TD @ weights[f"{NAME}.gate.weight"].T) + weights[f"{NAME}.gate.e_score_correction_bias"]
    return -np.diff(-np.sort(-scores_TE, axis=-1), axis=-1)[:, : config.num_experts_per_tok]


def assert_equals_reference(dtype, limit: float):
    clear, seen = 0, 0
    for seed in range(24):
        config = random_config(seed)
        router, weights = one_router(config, seed, dtype)
        x_TD = numbers(30, config.hidden_size, seed=seed, dtype=dtype)
        found_ids_TK, found_TK = router(x_TD)
        ids_TK, weights_TK = reference.route(config, weights, NAME, as_float64(x_TD))
        rows = (gaps(config, weights, as_float64(x_TD)) > 1e-5).all(axis=-1)
        clear, seen = clear + rows.sum(), seen + len(rows)
        assert found_ids_TK.dtype == torch.int64
        assert (found_ids_TK.numpy() == ids_TK)[rows].all(), f"seed {seed}: other experts, or in another order"
        assert_close(found_TK[torch.from_numpy(rows)], weights_TK[rows], limit, f"seed {seed}")
    assert clear > 0.98 * seen


def test_router_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_router_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


def test_a_bfloat16_model_routes_in_float32():
    config = small_config()
    router, weights = one_router(config, 0, torch.bfloat16)
    x_TD = numbers(200, 48, dtype=torch.bfloat16)
    found_ids_TK, found_TK = router(x_TD)
    ids_TK, weights_TK = reference.route(config, weights, NAME, as_float64(x_TD))
    assert (gaps(config, weights, as_float64(x_TD)) > 1e-6).all()
    assert found_TK.dtype == torch.float32
    assert (found_ids_TK.numpy() == ids_TK).all()
    assert_close(found_TK, weights_TK, 1e-5)


def test_weights_sum_to_the_scaling_factor():
    for seed in range(12):
        config = random_config(seed)
        router, _ = one_router(config, seed)
        ids_TK, weights_TK = router(numbers(50, config.hidden_size, seed=seed) * 3)
        assert (weights_TK > 0).all()
        assert_close(weights_TK.sum(-1, keepdim=True), np.full((50, 1), config.routed_scaling_factor), 1e-12, f"seed {seed}")
        assert all(len(set(row)) == config.num_experts_per_tok for row in ids_TK.tolist())


def hand_made_router(bias: list[float]) -> Router:
    """Four experts, two chosen, x the experts' logits themselves."""
    router = Router(small_config(hidden_size=4, n_routed_experts=4, num_experts_per_tok=2)).double()
    router.weight.data = torch.eye(4, dtype=torch.float64)
    router.e_score_correction_bias.copy_(torch.tensor(bias))
    return router


def test_the_bias_chooses_and_never_weighs():
    score = np.array([0.9, 0.6, 0.5, 0.2])
    x_TD = torch.from_numpy(np.log(score / (1 - score)))[None]  # the sigmoid's inverse
    ids_TK, weights_TK = hand_made_router([0.0, 0.0, 0.0, 0.0])(x_TD)
    assert ids_TK.tolist() == [[0, 1]]
    assert_close(weights_TK, [[2.827 * 0.9 / 1.5, 2.827 * 0.6 / 1.5]], 1e-12)
    ids_TK, weights_TK = hand_made_router([0.0, 0.0, 0.0, 2.0])(x_TD)
    assert ids_TK.tolist() == [[3, 0]]
    assert_close(weights_TK, [[2.827 * 0.2 / 1.1, 2.827 * 0.9 / 1.1]], 1e-12)


def test_a_constant_added_to_every_bias_changes_nothing():
    config = small_config()
    x_TD = numbers(200, 48)
    router, weights = one_router(config)
    assert (gaps(config, weights, x_TD.numpy()) > 1e-5).all()
    expected_ids_TK, expected_TK = router(x_TD)
    for constant in (-3.0, 0.5, 7.0):
        router, _ = one_router(config)
        router.e_score_correction_bias += constant
        ids_TK, weights_TK = router(x_TD)
        assert_same(ids_TK, expected_ids_TK, f"constant {constant}")
        assert_same(weights_TK, expected_TK, f"constant {constant}")


def test_permuting_experts_permutes_ids_and_nothing_else():
    config, x_TD = small_config(), numbers(100, 48)
    router, _ = one_router(config)
    ids_TK, weights_TK = router(x_TD)
    place_E = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    permuted, _ = one_router(config)
    permuted.weight.data = router.weight.data[place_E]
    permuted.e_score_correction_bias.copy_(router.e_score_correction_bias[place_E])
    permuted_ids_TK, permuted_TK = permuted(x_TD)
    assert_same(place_E[permuted_ids_TK], ids_TK)
    assert_close(permuted_TK, weights_TK, 1e-14)


def test_a_token_without_any_affinity_gets_finite_weights():
    router = hand_made_router([0.0] * 4)
    _, weights_TK = router(torch.full((1, 4), -2000.0, dtype=torch.float64))  # every sigmoid underflows to zero
    assert weights_TK.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("convert", ["bfloat16", "half", "to", "type"])
def test_no_conversion_touches_the_bias(convert):
    config = small_config()
    kept_E = random_model(config).model.layers[1].mlp.gate.e_score_correction_bias.clone()
    arguments = {"bfloat16": (), "half": (), "to": (torch.bfloat16,), "type": (torch.bfloat16,)}[convert]
    model = getattr(random_model(config), convert)(*arguments)
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.dtype in (torch.bfloat16, torch.float16)
    assert_same(gate.e_score_correction_bias, kept_E)
    assert gate.state_dict()["e_score_correction_bias"] is not None
    assert_same(model.float().model.layers[1].mlp.gate.e_score_correction_bias, kept_E)
    assert_same(model.double().model.layers[1].mlp.gate.e_score_correction_bias, kept_E)
