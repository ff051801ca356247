"""Assemble the model.

Complete `answer(ids, embed, layers, norm, head, positions)`: the logits (P, W) of the asked positions, for

    ids            int64 (T,)
    embed          a function: ids (T,) -> rows (T, D)
    layers         a list of (norm of attention, attention, norm of the feed-forward, feed-forward), four functions
                   of rows (T, D) -> rows (T, D) each
    norm           the last norm, rows -> rows
    head           rows (P, D) -> logits (P, W). It is the dearest single matrix: it may be given only the rows asked for
    positions      a list of P positions that get logits

Each half of a layer reads the stream through its own norm, and its answer is added to the stream.
"""

import torch


def stub(ids, embed, layers, norm, head, positions):
    """A tensor (P, W)."""
    raise NotImplementedError


def check(answer):
    g = torch.Generator().manual_seed(11)
    T, D, W, positions = 6, 5, 7, [5, 2]
    table, out = torch.randn(W, D, generator=g, dtype=torch.float64), torch.randn(D, W, generator=g, dtype=torch.float64)
    matrices = torch.randn(3, 2, D, D, generator=g, dtype=torch.float64)
    ids, given, hooks = torch.randperm(W, generator=g)[:T], [], []

    def scaled(weight):
        return lambda x: weight * x / x.square().mean(-1, keepdim=True).sqrt()

    def half(matrix):
        return lambda x: torch.tanh(x @ matrix)

    def head(x):
        given.append(x)
        return x @ out

    def watched(name, function):
        def call(x):
            hooks.append(name)
            return function(x)

        return call

    layers = [
        (watched("norm", scaled(1.5 + i)), watched("attention", half(matrices[i, 0])), watched("norm", scaled(0.5 + i)), watched("feed-forward", half(matrices[i, 1])))
        for i in range(3)
    ]
    last = scaled(2.0)
    found = answer(ids, lambda i: table[i], layers, watched("last norm", last), head, positions)
    expected = solution(ids, lambda i: table[i], layers, last, lambda x: x, positions)

    assert isinstance(found, torch.Tensor) and found.shape[-1] == W, "expected logits, a tensor that the head gave"
    rows = max(len(x) for x in given)
    assert rows == len(positions), f"the head was given {rows} rows where {len(positions)} are asked for: pick the positions first, then multiply"
    assert found.shape == (len(positions), W), f"the shape is {tuple(found.shape)}; expected {(len(positions), W)}"
    assert "last norm" in hooks, "the last norm is missing: the head's matrix was trained on vectors of one size"
    seen = given[-1]
    plain = stream(ids, table, layers)
    assert not torch.allclose(seen, last(added_to_the_normed_stream(ids, table, layers))[positions]), "the half's answer is added to the stream itself, not to the normed stream: only the branch goes through the norm"
    assert not torch.allclose(seen, last(both_halves_on_one(ids, table, layers))[positions]), "the feed-forward reads the stream *after* attention's answer was added"
    assert torch.allclose(seen.sort(dim=0).values, last(plain)[positions].sort(dim=0).values), "the vectors at the head are wrong: is every answer added, layer by layer, each half behind its own norm?"
    assert torch.allclose(seen, expected), "right vectors in another order: row p of the result belongs to positions[p]"


def stream(ids, table, layers):
    x = table[ids]
    for attention_norm, attention, mlp_norm, mlp in layers:
        x = x + attention(attention_norm(x))
        x = x + mlp(mlp_norm(x))
    return x


def added_to_the_normed_stream(ids, table, layers):
    x = table[ids]
    for attention_norm, attention, mlp_norm, mlp in layers:
        x = attention_norm(x)
        x = x + attention(x)
        x = mlp_norm(x)
        x = x + mlp(x)
    return x


def both_halves_on_one(ids, table, layers):
    x = table[ids]
    for attention_norm, attention, mlp_norm, mlp in layers:
        x = x + attention(attention_norm(x)) + mlp(mlp_norm(x))
    return x


HINT = """x = embed(ids); a loop over the layers in which x is added to twice, each time f(norm_of_f(x)); then
norm(x)[positions] goes to the head."""


def solution(ids, embed, layers, norm, head, positions):
    x = embed(ids)
    for attention_norm, attention, mlp_norm, mlp in layers:
        x = x + attention(attention_norm(x))
        x = x + mlp(mlp_norm(x))
    return head(norm(x)[positions])


def all_positions(ids, embed, layers, norm, head, positions):
    return solution(ids, embed, layers, norm, head, list(range(len(ids))))[positions]


def no_last_norm(ids, embed, layers, norm, head, positions):
    return solution(ids, embed, layers, lambda x: x, head, positions)


def on_the_normed(ids, embed, layers, norm, head, positions):
    return head(norm(added_to_the_normed_stream(ids, embed(torch.arange(7)), layers))[positions])


def side_by_side(ids, embed, layers, norm, head, positions):
    return head(norm(both_halves_on_one(ids, embed(torch.arange(7)), layers))[positions])


def sorted_positions(ids, embed, layers, norm, head, positions):
    return solution(ids, embed, layers, norm, head, sorted(positions))


def overwritten(ids, embed, layers, norm, head, positions):
    x = embed(ids)
    for attention_norm, attention, mlp_norm, mlp in layers:
        x = x + attention(attention_norm(x))
        x = mlp(mlp_norm(x))
    return head(norm(x)[positions])


WRONG = {
    "logits for all, then a choice": (all_positions, "pick the positions first"),
    "no last norm": (no_last_norm, "last norm is missing"),
    "the normed stream is added to": (on_the_normed, "not to the normed stream"),
    "both halves read one stream": (side_by_side, "*after* attention's answer"),
    "the second residual forgotten": (overwritten, "is every answer added"),
    "positions sorted": (sorted_positions, "another order"),
}
