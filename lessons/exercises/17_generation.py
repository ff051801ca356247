"""Temperature and top-p.

Complete `answer(logits, temperature, top_p)`: the probability (W,), float64, with which each id is to be drawn, for

    logits         float32 (W,), finite, of any size
    temperature    above 0: the scores are divided by it. It may be tiny, such as 1e-310
    top_p          above 0, at most 1: of the tempered probabilities, from the largest down, an id is kept if the mass
                   ahead of it is below top_p. The others get 0, and what is kept sums to 1. Of equal ones the lower id
                   comes first
"""

import torch


def stub(logits, temperature, top_p):
    """A float64 tensor (W,)."""
    raise NotImplementedError


def check(answer):
    logits = torch.tensor([0.5, 2.0, -1.0, 1.0, 2.0, -3.0])
    plain = answer(logits.clone(), 1.0, 1.0)
    assert isinstance(plain, torch.Tensor) and plain.shape == logits.shape, f"expected a tensor {tuple(logits.shape)}, a probability for each id in its own place"
    assert plain.dtype == torch.float64, f"expected float64, found {plain.dtype}"
    assert torch.allclose(plain, logits.double().softmax(-1)), "temperature 1 and top_p 1 change nothing: the result is the softmax, in the order of the ids and not sorted"
    half = answer(logits.clone(), 0.5, 1.0)
    assert abs((half[1] / half[3]).item() / (plain[1] / plain[3]).item() ** 2 - 1) < 1e-6, "at temperature 0.5 the ratio of two probabilities is squared: divide the logits by the temperature"
    cold = answer(logits.clone(), 1e-310, 1.0)
    assert cold.isfinite().all(), f"temperature 1e-310 gave {cold.tolist()}: take the largest logit away before you divide, so that nothing is infinite but on the harmless side"
    sure = torch.tensor([0.0, 9.0, 0.0])
    kept = answer(sure, 1.0, 0.5)
    assert kept.isfinite().all() and kept[1] == 1, f"one id has more than top_p by itself and must be kept; found {kept.tolist()}: the mass *ahead* of it is 0"
    for top_p in (0.5, 0.8, 0.95):
        found, expected = answer(logits.clone(), 1.0, top_p), solution(logits, 1.0, top_p)
        assert abs(found.sum().item() - 1) < 1e-9, f"with top_p {top_p} the probabilities sum to {found.sum().item():.3f}: what is kept must sum to 1"
        assert (found > 0).sum() == (expected > 0).sum(), f"top_p {top_p} keeps {int((expected > 0).sum())} ids, found {int((found > 0).sum())}: an id that crosses the line is kept"
    found, expected = answer(logits.clone(), 3.0, 0.8), solution(logits, 3.0, 0.8)
    assert (found > 0).sum() == (expected > 0).sum(), f"at temperature 3 top_p 0.8 keeps {int((expected > 0).sum())} ids, found {int((found > 0).sum())}: the temperature comes first, and top_p looks at the tempered probabilities"
    assert answer(torch.zeros(4), 1.0, 0.25).tolist() == [1.0, 0.0, 0.0, 0.0], "of equal probabilities the lower id comes first"
    assert torch.allclose(found, expected), "the right ids are kept, with wrong probabilities"


HINT = """p = ((logits.double() - logits.max()) / temperature).softmax(-1); sort descending and stable; ahead = cumsum - itself;
keep where ahead < top_p, scatter back to the ids' places, divide by the sum."""


def solution(logits, temperature, top_p):
    p = ((logits.double() - logits.max()) / temperature).softmax(-1)
    ordered, ids = p.sort(descending=True, stable=True)
    kept = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0.0)
    result = torch.zeros_like(p).scatter(-1, ids, kept)
    return result / result.sum()


def cut(p, top_p, crossing=True, normalise=True):
    ordered, ids = p.sort(descending=True, stable=True)
    ahead = ordered.cumsum(-1) - ordered
    kept = torch.where(ahead < top_p if crossing else ordered.cumsum(-1) <= top_p, ordered, 0.0)
    result = torch.zeros_like(p).scatter(-1, ids, kept)
    return result / result.sum() if normalise else result


def no_maximum(logits, temperature, top_p):
    return cut((logits.double() / temperature).softmax(-1), top_p)


def multiplied(logits, temperature, top_p):
    return cut(((logits.double() - logits.max()) * temperature).softmax(-1), top_p)


def crossing_dropped(logits, temperature, top_p):
    return cut(((logits.double() - logits.max()) / temperature).softmax(-1), top_p, crossing=top_p == 1)


def not_normalised(logits, temperature, top_p):
    return cut(((logits.double() - logits.max()) / temperature).softmax(-1), top_p, normalise=top_p in (1, 0.5, 0.25) and len(logits) < 6)


def top_p_first(logits, temperature, top_p):
    kept = cut(logits.double().softmax(-1), top_p) > 0
    return ((logits.double() - logits.max()) / temperature).masked_fill(~kept, -torch.inf).softmax(-1)


def left_sorted(logits, temperature, top_p):
    return solution(logits, temperature, top_p).sort(descending=True).values


WRONG = {
    "the maximum not taken away": (no_maximum, "before you divide"),
    "multiplied by the temperature": (multiplied, "ratio of two probabilities is squared"),
    "the crossing id dropped": (crossing_dropped, "mass *ahead*"),
    "not made to sum to 1": (not_normalised, "must sum to 1"),
    "top-p before temperature": (top_p_first, "temperature comes first"),
    "left in sorted order": (left_sorted, "in the order of the ids"),
}
