"""Dispatch and combine.

Complete `answer(x, ids, weights, experts, shared)`: the mixture's output (T, D) for

    x (T, D)          one row a token
    ids, weights      (T, K), the chosen experts of each token and how much each counts
    experts           a dict {id: function}; a function takes rows (M, D) and returns rows (M, D)
    shared            one more such function, for every token, with weight 1

Each function may be called at most once: an expert gets all of its tokens' rows together, and one that no token chose is
not called.
"""

import torch


def stub(x, ids, weights, experts, shared):
    """A tensor (T, D)."""
    raise NotImplementedError


def check(answer):
    g = torch.Generator().manual_seed(10)
    T, K, D, E = 9, 2, 4, 6
    x = torch.randn(T, D, generator=g, dtype=torch.float64)
    ids = torch.stack([torch.randperm(E - 1, generator=g)[:K] for _ in range(T)])  # nobody asks the last expert
    weights = torch.rand(T, K, generator=g, dtype=torch.float64)
    matrices = torch.randn(E + 1, D, D, generator=g, dtype=torch.float64)
    calls = []

    def function(e):
        def call(rows):
            calls.append(e)
            assert rows.shape[-1] == D and rows.ndim == 2, f"an expert takes rows (M, {D}), found {tuple(rows.shape)}"
            assert len(rows), f"expert {e} was called with no rows: nobody chose it"
            return rows @ matrices[e]

        return call

    found = answer(x, ids, weights, {e: function(e) for e in range(E)}, function(E))
    assert found.shape == x.shape, f"found shape {tuple(found.shape)}, expected {tuple(x.shape)}"
    routed = torch.stack([sum(w * (x[t] @ matrices[e]) for e, w in zip(ids[t].tolist(), weights[t])) for t in range(T)])
    shared = x @ matrices[E]
    assert not torch.allclose(found, routed), "the shared expert's answer is missing"
    assert not torch.allclose(found, routed + weights.sum(-1, keepdim=True) * shared), "the shared expert counts once for every token, with weight 1"
    off = (~torch.isclose(found, routed + shared).all(-1)).sum().item()
    assert off == 0, f"{off} of {T} tokens have a wrong result: does each token get its own rows back, each times the weight of that very choice?"
    often = {e: calls.count(e) for e in set(calls) if calls.count(e) > 1}
    assert not often, f"right, but expert {min(often)} was called {often[min(often)]} times; collect its rows first and call it once"


HINT = """For each expert id e in ids.unique(): where = (ids == e) is (T, K); its tokens are where.any(-1), and each one's
weight is (weights * where).sum(-1). result[tokens] += weight[tokens, None] * experts[e](x[tokens])."""


def solution(x, ids, weights, experts, shared):
    result = shared(x)
    for e in ids.unique().tolist():
        where = ids == e
        tokens = where.any(-1)
        result[tokens] += (weights * where).sum(-1)[tokens, None] * experts[e](x[tokens])
    return result


def token_by_token(x, ids, weights, experts, shared):
    result = shared(x)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), weights[t]):
            result[t] += w * experts[e](x[t : t + 1])[0]
    return result


def rows_not_put_back(x, ids, weights, experts, shared):
    K = ids.shape[-1]
    order = ids.flatten().argsort(stable=True)
    chosen, counts = ids.unique(return_counts=True)
    rows = torch.cat([experts[e](part) for e, part in zip(chosen.tolist(), x[order // K].split(counts.tolist()))])
    return shared(x) + (weights.unsqueeze(-1) * rows.unflatten(0, (-1, K))).sum(1)


def no_shared(x, ids, weights, experts, shared):
    return solution(x, ids, weights, experts, lambda rows: torch.zeros_like(rows))


def shared_scaled(x, ids, weights, experts, shared):
    return solution(x, ids, weights, experts, lambda rows: weights.sum(-1, keepdim=True) * shared(rows))


WRONG = {
    "a call for each token and choice": (token_by_token, "call it once"),
    "rows left in the experts' order": (rows_not_put_back, "its own rows back"),
    "no shared expert": (no_shared, "shared expert's answer is missing"),
    "the shared expert scaled": (shared_scaled, "with weight 1"),
}
