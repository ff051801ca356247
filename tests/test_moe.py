"""Dispatch and weighted sum: the same output whatever the experts' order, home or number of rows."""

import numpy as np
import pytest
import torch
from small import as_float64, assert_close, assert_gradients_are_right, assert_same, numbers, numpy_weights, random_config, randomised, small_config

from k2 import moe as moe_layer
from k2 import reference
from k2.config import K2Config, K2Error
from k2.moe import Experts, MoE

NAME = "model.layers.2.mlp"


def one_moe(config: K2Config, seed: int = 0, dtype=torch.float64):
    """(the experts' block of layer 2, its weights for the reference)."""
    moe = randomised(MoE(config, 2), seed, dtype)
    return moe, numpy_weights(moe, f"{NAME}.")


def smallest_margin(config: K2Config, weights, x_TD) -> float:
    """Between the worst chosen and the best other expert, over all tokens; infinite where all experts are chosen."""
    K = config.num_experts_per_tok
    scores_TE = reference.sigmoid(as_float64(x_TD) @ weights[f"{NAME}.gate.weight"].T) + weights[f"{NAME}.gate.e_score_correction_bias"]
    ordered_TE = -np.sort(-scores_TE, axis=-1)
    return float(np.min(ordered_TE[:, K - 1] - ordered_TE[:, K])) if K < scores_TE.shape[-1] else np.inf


@torch.no_grad()
def assert_equals_reference(dtype, limit: float):
    for seed in range(24):
        config = random_config(seed)
        moe, weights = one_moe(config, seed, dtype)
        x_TD = numbers(12, config.hidden_size, seed=seed, dtype=dtype)
        assert smallest_margin(config, weights, x_TD) > 1e-5, f"seed {seed}: take another, the choice hangs on rounding"
        assert_close(moe(x_TD), reference.moe(config, weights, NAME, as_float64(x_TD)), limit, f"seed {seed}")


def test_moe_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_moe_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


@torch.no_grad()
def test_batch_axes_change_nothing():
    moe, _ = one_moe(small_config())
    x_TD = numbers(2, 3, 5, 48)
    alone_TD = torch.stack([moe(sequence) for sequence in x_TD.flatten(0, 1)]).unflatten(0, (2, 3))
    assert_close(moe(x_TD), alone_TD, 1e-12)


class Reversed(Experts):
    """The last one asked for comes first."""

    def fetch(self, ids):
        return super().fetch(ids[::-1])


class Shuffled(Experts):
    """They come as they like, in another order at each call."""

    generator = torch.Generator().manual_seed(5)

    def fetch(self, ids):
        return super().fetch([ids[i] for i in torch.randperm(len(ids), generator=self.generator)])


@torch.no_grad()
def test_the_order_in_which_experts_arrive_changes_no_bit():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        moe, _ = one_moe(small_config(), 0, dtype)
        x_TD = numbers(13, 48, dtype=dtype)
        expected_TD = moe(x_TD)
        for home in (Reversed, Shuffled, Shuffled, Shuffled):
            moe.experts = home(moe.experts)
            assert_same(moe(x_TD), expected_TD, f"{home.__name__}, {dtype}")


class Recording(Experts):
    """Keeps what it was asked for."""

    def fetch(self, ids):
        self.asked = ids
        return super().fetch(ids)


@torch.no_grad()
def test_exactly_the_chosen_experts_are_fetched_each_once():
    moe, weights = one_moe(small_config())
    moe.experts = Recording(moe.experts)
    x_TD = numbers(2, 48)
    moe(x_TD)
    ids_TK, _ = reference.route(small_config(), weights, NAME, x_TD.numpy())
    assert moe.experts.asked == sorted(set(ids_TK.flatten().tolist()))
    assert len(moe.experts.asked) < 8 + 1


@torch.no_grad()
def test_permuting_experts_permutes_ids_and_nothing_else():
    moe, _ = one_moe(small_config())
    permuted, _ = one_moe(small_config())
    place_E = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    permuted.gate.weight.data = moe.gate.weight.data[place_E]
    permuted.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias[place_E])
    permuted.experts = Experts(moe.experts[e] for e in place_E.tolist())
    x_TD = numbers(40, 48)
    assert_close(permuted(x_TD), moe(x_TD), 1e-13)


@torch.no_grad()
def test_the_shared_expert_counts_once_and_unscaled():
    moe, _ = one_moe(small_config())
    x_TD = numbers(6, 48)
    whole_TD, shared_TD = moe(x_TD), moe.shared_experts(x_TD)
    moe.shared_experts.down_proj.weight.zero_()
    assert_close(whole_TD - moe(x_TD), shared_TD, 1e-12)


@torch.no_grad()
def test_two_shared_experts_are_two_experts_side_by_side():
    moe, _ = one_moe(small_config(n_shared_experts=2))
    both, x_TD = moe.shared_experts, numbers(6, 48)
    halves_TD = 0
    for rows in (slice(None, 26), slice(26, None)):
        gate_TF, up_TF = x_TD @ both.gate_proj.weight[rows].T, x_TD @ both.up_proj.weight[rows].T
        halves_TD = halves_TD + (gate_TF * gate_TF.sigmoid() * up_TF) @ both.down_proj.weight[:, rows].T
    assert_close(both(x_TD), halves_TD, 1e-12)


@torch.no_grad()
def test_damage_is_reported_with_layer_and_expert():
    for value in (torch.nan, torch.inf):
        moe, _ = one_moe(small_config(), 0, torch.float32)
        x_TD = numbers(5, 48, dtype=torch.float32)
        chosen = moe.gate(x_TD)[0].flatten().tolist()
        moe.experts[chosen[3]].down_proj.weight[7, 3] = value
        with pytest.raises(K2Error, match=rf"layer 2, expert {chosen[3]}\b") as error:
            moe(x_TD)
        assert "\n" not in str(error.value)


@torch.no_grad()
def test_damage_in_an_expert_that_nobody_chose_does_no_harm():
    moe, _ = one_moe(small_config())
    x_TD = numbers(1, 48)
    expected_TD = moe(x_TD)
    (idle, *_) = set(range(11)) - set(moe.gate(x_TD)[0].flatten().tolist())
    moe.experts[idle].gate_proj.weight.fill_(torch.nan)
    assert_same(moe(x_TD), expected_TD)


def test_gradients_of_moe():
    config = small_config(hidden_size=4, moe_intermediate_size=3, n_routed_experts=5, num_experts_per_tok=2)
    moe, weights = one_moe(config)
    x_TD = numbers(4, 4, seed=1)
    assert smallest_margin(config, weights, x_TD) > 1e-3  # the choice is piecewise constant
    assert_gradients_are_right(moe, x_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_answers_added_up_a_few_tokens_at_a_time_are_the_same_to_the_bit(monkeypatch, dtype):
    moe = MoE(small_config(), 1)
    answers, wide = numbers(12, 40, dtype=dtype), torch.promote_types(dtype, torch.float32)
    back, weights = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(6, 2), numbers(6, 2, seed=1, dtype=wide)
    right = torch.stack([(weights[t, 0] * answers[back[t, 0]].to(wide) + weights[t, 1] * answers[back[t, 1]].to(wide)) for t in range(6)])
    whole = moe.weighted_sum(answers, back, weights)
    assert whole.dtype == dtype
    assert_close(whole, right, 4e-3 if dtype == torch.bfloat16 else 1e-6, "sum")
    for most in (1, 2 * 40, 4 * 2 * 40):  # one token at a time, and four and two
        monkeypatch.setattr(moe_layer, "SUMMED", most)
        assert_same(moe.weighted_sum(answers, back, weights), whole, f"{most}")
        trained = answers.clone().requires_grad_()
        assert_same(moe.weighted_sum(trained, back, weights).detach(), whole, "training")
