"""The sampler's distribution, weight by weight, against a plain computation over Python lists."""

import math
import random

import pytest
import torch

from k2 import K2Error
from k2.sampling import Sampler


def plain_distribution(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """softmax(logits / temperature); the likeliest ids until their mass reaches top_p; what is left, renormalised."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    probability = [w / math.fsum(weights) for w in weights]
    kept, mass = set(), 0.0
    for i in sorted(range(len(logits)), key=lambda i: (-probability[i], i)):
        if mass < top_p:
            kept.add(i)
            mass += probability[i]
    total = math.fsum(probability[i] for i in kept)
    return [probability[i] / total if i in kept else 0.0 for i in range(len(logits))]


def distribution(monkeypatch, sampler: Sampler, logits_W) -> list[float]:
    """What the sampler would draw from, exactly: the draw is replaced by each outcome in turn, its weight noted."""
    weight_of, drawn_from = {}, []
    for outcome in range(len(logits_W)):
        monkeypatch.setattr(torch, "multinomial", lambda w_W, count, generator: drawn_from.append(w_W / w_W.sum()) or torch.tensor([outcome]))
        i = sampler(logits_W)
        weight_of[i] = float(drawn_from[-1][outcome])
    return [weight_of[i] for i in range(len(logits_W))]


def test_temperature_zero_takes_the_largest_logit():
    rng = torch.Generator().manual_seed(0)
    for _ in range(200):
        logits_W = torch.randn(50, generator=rng)
        assert Sampler()(logits_W) == max(range(50), key=lambda i: float(logits_W[i]))


def test_of_equal_logits_greedy_takes_the_first():
    assert Sampler()(torch.tensor([0.0, 2.0, 2.0, 1.0])) == 1


@pytest.mark.parametrize("temperature", [0.3, 0.6, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_the_distribution_is_exactly_top_p_of_the_tempered_softmax(monkeypatch, temperature, top_p):
    rng = random.Random(1)
    for size in (1, 2, 5, 11):
        logits = torch.tensor([rng.gauss(0, 2) for _ in range(size)]).tolist()  # numbers that float32 holds exactly
        found = distribution(monkeypatch, Sampler(temperature, top_p, seed=0), torch.tensor(logits))
        expected = plain_distribution(logits, temperature, top_p)
        worst = max(abs(a - b) for a, b in zip(found, expected))
        assert worst <= 1e-12, f"W = {size}: largest difference {worst:.3e}; {found} against {expected}"
        assert [a > 0 for a in found] == [b > 0 for b in expected]


def test_equal_logits_at_the_edge_of_top_p_are_kept_by_lower_id(monkeypatch):
    found = distribution(monkeypatch, Sampler(1.0, 0.6, seed=0), torch.zeros(4))
    assert found == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0], abs=1e-12)


def test_a_tiny_top_p_leaves_the_likeliest_id():
    logits_W = torch.tensor([0.1, 0.3, 0.2])
    assert {Sampler(5.0, 1e-9, seed)(logits_W) for seed in range(50)} == {1}


def test_drawn_frequencies_follow_the_distribution():
    logits, draws = [0.5, -1.0, 2.0, 0.0, 1.0], 6000
    sampler, expected = Sampler(0.8, 0.95, seed=3), plain_distribution([0.5, -1.0, 2.0, 0.0, 1.0], 0.8, 0.95)
    counts = [0] * 5
    for _ in range(draws):
        counts[sampler(torch.tensor(logits))] += 1
    for count, p in zip(counts, expected):
        assert abs(count - draws * p) <= 4 * math.sqrt(draws * p * (1 - p)), f"{counts} of {draws} against {expected}"


def test_one_seed_gives_one_sequence_and_another_seed_another():
    logits_W = torch.randn(30, generator=torch.Generator().manual_seed(4))

    def sequence(seed):
        sampler = Sampler(1.0, 1.0, seed)
        return [sampler(logits_W) for _ in range(40)]

    assert sequence(7) == sequence(7) != sequence(8)


def test_no_seed_means_another_sequence_each_time():
    logits_W = torch.zeros(1000)
    first, second = Sampler(1.0), Sampler(1.0)
    assert [first(logits_W) for _ in range(20)] != [second(logits_W) for _ in range(20)]


def test_sampling_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    Sampler(1.0, 0.9, seed=1)(torch.zeros(10))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_logits_are_drawn_from_in_float64(monkeypatch):
    logits_W = torch.tensor([1.0, 1.5, -2.0, 0.25], dtype=torch.bfloat16)
    found = distribution(monkeypatch, Sampler(0.7, 0.99, seed=0), logits_W)
    assert found == pytest.approx(plain_distribution(logits_W.tolist(), 0.7, 0.99), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(K2Error, match="expected finite numbers") as raised:
        Sampler(temperature, seed=0)(torch.tensor([0.0, bad, 1.0]))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("temperature", [-0.1, math.inf, math.nan, -math.inf])
def test_a_bad_temperature_is_refused(temperature):
    with pytest.raises(K2Error, match=f"temperature: found {temperature}"):
        Sampler(temperature=temperature)


@pytest.mark.parametrize("top_p", [0.0, -0.5, 1.0001, math.nan, math.inf])
def test_a_bad_top_p_is_refused(top_p):
    with pytest.raises(K2Error, match=f"top_p: found {top_p}"):
        Sampler(0.6, top_p)


@pytest.mark.parametrize("temperature", [1e-6, 1e-300, 5e-324, 1e300])
def test_extreme_temperatures_give_an_id_and_no_crash(temperature):
    logits_W = torch.tensor([-3.0, 4.0, 3.9])
    found = Sampler(temperature, 1.0, seed=0)(logits_W)
    assert found == 1 if temperature < 1 else found in (0, 1, 2)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, 1.0), (3.0, 1.0), (1.0, 0.8)])
def test_a_mask_leaves_the_others_as_if_the_rest_did_not_exist(monkeypatch, temperature, top_p):
    logits_W, allowed_W = torch.tensor([5.0, 1.0, 4.0, 2.0, 0.0]), torch.tensor([False, True, False, True, True])
    found = distribution(monkeypatch, lambda logits_W: Sampler(temperature, top_p)(logits_W, allowed_W), logits_W)
    expected = plain_distribution([1.0, 2.0, 0.0], temperature, top_p)
    assert found == pytest.approx([0.0, expected[0], 0.0, expected[1], expected[2]], abs=1e-6)
    assert Sampler()(logits_W, allowed_W) == 3, "greedy: the best that is allowed"
