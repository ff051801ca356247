"""The router.

Complete `answer(x, weight, bias, top_k, scaling)` for x (T, D), weight (E, D), bias (E,):

    score of an expert       sigmoid of its row of weight times x
    chosen                   the top_k experts by score + bias
    weight of a chosen one   its score, without the bias, over the sum of the chosen ones' scores, times scaling

Return (ids, weights), each (T, top_k), in any order that fits.
"""

import torch


def stub(x, weight, bias, top_k, scaling):
    """Expert ids (T, top_k) int64 and their weights (T, top_k)."""
    raise NotImplementedError


def check(answer):
    # Scores 0.9, 0.5, 0.2, 0.1 for the one token x = 1.
    weight = torch.logit(torch.tensor([[0.9], [0.5], [0.2], [0.1]], dtype=torch.float64))
    x = torch.ones(1, 1, dtype=torch.float64)

    def as_dict(bias, scaling=2.0):
        ids, weights = answer(x, weight, torch.tensor(bias, dtype=torch.float64), 2, scaling)
        assert ids.shape == weights.shape == (1, 2), f"expected ids and weights of shape (1, 2), found {tuple(ids.shape)} and {tuple(weights.shape)}"
        return {int(i): round(float(w), 6) for i, w in zip(ids[0], weights[0])}

    plain = as_dict([0.0, 0.0, 0.0, 0.0])
    assert set(plain) == {0, 1}, f"scores 0.9 0.5 0.2 0.1, no bias, top 2: chosen {sorted(plain)}, expected experts 0 and 1"
    assert plain != {0: 1.8, 1: 1.0}, "the chosen scores 0.9 and 0.5 must be divided by their sum before they are scaled"
    assert abs(sum(plain.values()) - 2.0) < 1e-5, f"the weights sum to {sum(plain.values()):g}; with scaling 2 every token's sum to 2"
    assert plain == {0: round(1.8 / 1.4, 6), 1: round(1.0 / 1.4, 6)}, f"scores 0.9 and 0.5: weights {plain}, expected 2 x 0.9 / 1.4 and 2 x 0.5 / 1.4. Sigmoid and not softmax: each expert by itself"
    biased = as_dict([0.0, 0.0, 0.0, 0.6])
    assert set(biased) == {0, 3}, f"with a bias of 0.6 expert 3 has 0.1 + 0.6 and passes expert 1: chosen {sorted(biased)}, expected 0 and 3"
    assert biased == {0: 1.8, 3: 0.2}, f"expert 3 was chosen for its bias, but it weighs by its score 0.1: weights {biased}, expected 1.8 and 0.2"
    g = torch.Generator().manual_seed(9)
    x, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((50, 8), (20, 8), (20,)))
    found, shifted = (answer(x, weight, b, 4, 2.827) for b in (bias, bias + 7))
    assert torch.equal(found[0].sort().values, shifted[0].sort().values), "a constant added to every bias must change nothing"


HINT = """Keep two tensors: scores, and scores + bias. topk(...).indices of the second, scores.gather(-1, ids) of the first."""


def solution(x, weight, bias, top_k, scaling):
    scores = (x @ weight.T).sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(-1, ids)
    return ids, scaling * chosen / chosen.sum(-1, keepdim=True)


def bias_weighs(x, weight, bias, top_k, scaling):
    chosen, ids = ((x @ weight.T).sigmoid() + bias).topk(top_k, dim=-1)
    return ids, scaling * chosen / chosen.sum(-1, keepdim=True)


def softmax(x, weight, bias, top_k, scaling):
    scores = (x @ weight.T).softmax(-1)
    ids = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(-1, ids)
    return ids, scaling * chosen / chosen.sum(-1, keepdim=True)


def no_bias(x, weight, bias, top_k, scaling):
    return solution(x, weight, 0 * bias, top_k, scaling)


def not_renormalised(x, weight, bias, top_k, scaling):
    scores = (x @ weight.T).sigmoid()
    ids = (scores + bias).topk(top_k, dim=-1).indices
    return ids, scaling * scores.gather(-1, ids)


WRONG = {
    "the bias weighs": (bias_weighs, "it weighs by its score"),
    "softmax": (softmax, "Sigmoid and not softmax"),
    "the bias ignored": (no_bias, "passes expert 1"),
    "renormalisation skipped": (not_renormalised, "divided by their sum"),
}
