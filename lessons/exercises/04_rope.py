"""From neighbouring pairs to half-split: reorder a projection's rows.

K2's q_b_proj has the rows of all heads below one another; a head's rows are N that are never rotated, then R that are, as
neighbouring pairs (0, 1), (2, 3), ... Engines in the style of Llama rotate coordinate i of the R with coordinate i + R / 2.

Complete `answer(weight, heads, N, R)`: the same matrix with its rows in the order that such an engine needs, so that every
query is the same up to the order of its rotary coordinates. Row i of the new R must be row 2i of the old for the first half,
and row 2(i - R/2) + 1 for the second. `weight` has shape (heads * (N + R), inputs).
"""

import torch


def stub(weight, heads, N, R):
    """A tensor of weight's shape."""
    raise NotImplementedError


def check(answer):
    H, N, R = 3, 4, 6
    weight = torch.arange(H * (N + R), dtype=torch.float64)[:, None] * torch.ones(1, 2, dtype=torch.float64)
    found = answer(weight.clone(), H, N, R)
    assert found.shape == weight.shape, f"found shape {tuple(found.shape)}, expected {tuple(weight.shape)}"
    rows = found[:, 0].reshape(H, N + R).tolist()
    old = weight[:, 0].reshape(H, N + R).tolist()
    assert sorted(found[:, 0].tolist()) == weight[:, 0].tolist(), "every row must appear exactly once: this is a reordering"
    assert rows[0][:N] == old[0][:N], f"head 0 with N = 4, R = 6: rows 0 to 3 are not rotated and stay; found {rows[0][:N]}"
    inverse = [old[0][N + j] for j in (0, 3, 1, 4, 2, 5)]
    assert rows[0][N:] != inverse, "head 0: that is the way back, from half-split to neighbours; needed is 4 6 8 5 7 9"
    assert rows[0][N:] == [4, 6, 8, 5, 7, 9], f"head 0 with N = 4, R = 6: expected rows 4 6 8 5 7 9 behind the first four, found {rows[0][N:]}"
    assert rows[1:] == [[v + h * (N + R) for v in rows[0]] for h in (1, 2)], f"head 0 is right; heads 1 and 2 need the same order within their own rows, found {rows[1:]}"


HINT = """weight.unflatten(0, (heads, N + R)) gives each head its own axis. The new order of a head's rows is
[*range(N), *range(N, N + R, 2), *range(N + 1, N + R, 2)]."""


def solution(weight, heads, N, R):
    order = [*range(N), *range(N, N + R, 2), *range(N + 1, N + R, 2)]
    return weight.unflatten(0, (heads, N + R))[:, order].flatten(0, 1)


def all_rows(weight, heads, N, R):
    A = N + R
    return weight.unflatten(0, (heads, A))[:, [*range(0, A, 2), *range(1, A, 2)]].flatten(0, 1)


def way_back(weight, heads, N, R):
    order = [*range(N), *(N + i // 2 + (i % 2) * R // 2 for i in range(R))]
    return weight.unflatten(0, (heads, N + R))[:, order].flatten(0, 1)


def first_head_only(weight, heads, N, R):
    return torch.cat((solution(weight[: N + R], 1, N, R), weight[N + R :]))


WRONG = {
    "rotary and other rows mixed": (all_rows, "not rotated and stay"),
    "the inverse permutation": (way_back, "the way back"),
    "only the first head": (first_head_only, "heads 1 and 2"),
}
