"""Attention from the latents.

Complete `answer(q_nope, q_rope, c_kv, k_rope, kv_b, scale)`: what multi-head latent attention mixes for T queries that are
the last T of S tokens.

    q_nope (H, T, N), q_rope (H, T, R)   the two parts of the queries, the second one already rotated
    c_kv (S, C), k_rope (S, R)           the cache: latents, already normalised, and the rotated key that all heads share
    kv_b (H * (N + V), C)                each head's rows: N that make its key part, then V that make its value
    scale                                what the scores are multiplied with; use it as it is given

Returns (H, T, V): softmax over the keys that a query may see, its own token and those before it, times the values.
"""

import torch


def stub(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    """A tensor (H, T, V)."""
    raise NotImplementedError


def check(answer):
    H, N, R, V, C, S = 3, 4, 6, 5, 8, 7
    g = torch.Generator().manual_seed(6)
    q_nope, q_rope, c_kv, k_rope, kv_b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((H, S, N), (H, S, R), (S, C), (S, R), (H * (N + V), C)))
    for T, where in ((S, "T = S = 7"), (2, "T = 2 queries behind 5 cached tokens")):
        arguments = (q_nope[:, :T], q_rope[:, :T], c_kv, k_rope, kv_b, 0.3)
        found, expected = answer(*arguments), solution(*arguments)
        assert found.shape == (H, T, V), f"{where}: found shape {tuple(found.shape)}, expected (H, T, V) = {(H, T, V)}"
        if torch.allclose(found, expected):
            continue
        known = {
            "the scores need `scale` as it is given: the default of scaled_dot_product_attention, 1 / sqrt(N + R), is another number": {"scale": (N + R) ** -0.5},
            "the mask is aligned to the first keys: query 0 of T stands at position S - T and sees all keys up to there": {"offset": 0},
            "queries see the future: mask the keys behind a query's own position": {"offset": S},
            "the rotary part is missing in the scores: q_rope . k_rope, the same k_rope for every head": {"rotary": 0.0},
        }
        why = next((words for words, change in known.items() if torch.allclose(found, mixed(*arguments[:5], **{"scale": 0.3, **change}))), None)
        if why is None and torch.allclose(found, mixed(*arguments[:4], kv_b.unflatten(0, (N + V, H)).transpose(0, 1).flatten(0, 1), 0.3)):
            why = "the rows of kv_b are head by head, (H, N + V, C), not (N + V, H, C)"
        raise AssertionError(f"{where}: {why or f'largest error {(found - expected).abs().max():.3g}. A head has N rows for its key first, then V for its value'}")


HINT = """kv_b.unflatten(0, (H, -1)) is (H, N + V, C); einsum or @ with c_kv gives keys and values (H, S, ...). The mask:
torch.arange(S) <= torch.arange(S - T, S)[:, None]."""


def solution(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    return mixed(q_nope, q_rope, c_kv, k_rope, kv_b, scale)


def mixed(q_nope, q_rope, c_kv, k_rope, kv_b, scale, offset=None, rotary=1.0):
    (H, T, N), S = q_nope.shape, len(c_kv)
    made = c_kv @ kv_b.unflatten(0, (H, -1)).mT  # (H, S, N + V)
    scores = scale * (q_nope @ made[..., :N].mT + rotary * q_rope @ k_rope.mT)
    first = S - T if offset is None else offset
    seen = torch.arange(S) <= torch.arange(first, first + T)[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ made[..., N:]


def heads_in_the_wrong_axis(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    H = len(q_nope)
    return mixed(q_nope, q_rope, c_kv, k_rope, kv_b.unflatten(0, (-1, H)).transpose(0, 1).flatten(0, 1), scale)


WRONG = {
    "the default scale": (lambda a, b, c, d, e, scale: mixed(a, b, c, d, e, (a.shape[-1] + b.shape[-1]) ** -0.5), "as it is given"),
    "the mask of a square": (lambda *given: mixed(*given, offset=0), "aligned to the first keys"),
    "no mask": (lambda *given: mixed(*given, offset=given[2].shape[0]), "see the future"),
    "no rotary part": (lambda *given: mixed(*given, rotary=0.0), "rotary part is missing"),
    "rows of kv_b taken in the wrong order": (heads_in_the_wrong_axis, "head by head"),
}
