"""The absorbed form, at its price.

Complete `answer(q_nope, q_rope, c_kv, k_rope, kv_b, scale)`. It is lesson 6's exercise again (same arguments, same result),
but no key and no value may be built: move each head's key rows of kv_b to the query's side, compare with the latents
themselves, sum the latents, and apply the value rows last. Your operations are counted.

    q_nope (H, T, N), q_rope (H, T, R), c_kv (S, C), k_rope (S, R), kv_b (H * (N + V), C): N key rows, then V value rows a head
"""

import torch


def stub(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    """A tensor (H, T, V)."""
    raise NotImplementedError


def check(answer):
    from torch.utils.flop_counter import FlopCounterMode

    H, N, R, V, C, S = 3, 5, 6, 5, 8, 40
    g = torch.Generator().manual_seed(7)
    q_nope, q_rope, c_kv, k_rope, kv_b = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((H, S, N), (H, S, R), (S, C), (S, R), (H * (N + V), C)))
    for T in (1, 3):
        arguments = (q_nope[:, :T], q_rope[:, :T], c_kv, k_rope, kv_b, 0.3)
        expected = expanded(*arguments)
        with FlopCounterMode(display=False) as counter:
            found = answer(*arguments)
        swapped = kv_b.unflatten(0, (H, 2, N)).flip(1).flatten(0, 2)
        assert not torch.allclose(found, expanded(*arguments[:4], swapped, 0.3)), "key and value rows are swapped: a head's first N rows of kv_b are its key's"
        assert not torch.allclose(found, expanded(*arguments, offset=0)), f"T = {T}: the queries are the last T of S: query 0 sees all keys up to position S - T, its own"
        assert torch.allclose(found, expected), f"T = {T}, S = {S}: largest difference to the expanded form {(found - expected).abs().max():.3g}"
        budget = 2 * H * T * (N * C + S * (C + R) + S * C + C * V)
        spent = counter.get_total_flops()
        assert spent <= 1.05 * budget, f"T = {T}: the result is right, at {spent:,} operations; {budget:,} are enough. Is kv_b multiplied with all {S} latents anywhere?"


HINT = """key, value = kv_b.unflatten(0, (H, -1)).split((N, V), dim=1). q_nope @ key is (H, T, C): that is the query to compare
with c_kv. V is kv_b's rows over H, less N."""


def solution(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (H, T, N), S = q_nope.shape, len(c_kv)
    rows = kv_b.unflatten(0, (H, -1))
    key, value = rows[:, :N], rows[:, N:]
    scores = scale * ((q_nope @ key) @ c_kv.mT + q_rope @ k_rope.mT)
    seen = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ c_kv) @ value.mT


def expanded(q_nope, q_rope, c_kv, k_rope, kv_b, scale, offset=None):
    (H, T, N), S = q_nope.shape, len(c_kv)
    made = c_kv @ kv_b.unflatten(0, (H, -1)).mT
    scores = scale * (q_nope @ made[..., :N].mT + q_rope @ k_rope.mT)
    first = S - T if offset is None else offset
    seen = torch.arange(S) <= torch.arange(first, first + T)[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ made[..., N:]


def values_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (H, T, N), S = q_nope.shape, len(c_kv)
    rows = kv_b.unflatten(0, (H, -1))
    scores = scale * ((q_nope @ rows[:, :N]) @ c_kv.mT + q_rope @ k_rope.mT)
    seen = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ (c_kv @ rows[:, N:].mT)


WRONG = {
    "the expanded form again": (lambda *given: expanded(*given), "the result is right, at"),
    "values still built": (values_expanded, "multiplied with all 40 latents"),
    "key and value rows swapped": (lambda a, b, c, d, kv_b, s: solution(a, b, c, d, kv_b.unflatten(0, (len(a), 2, a.shape[-1])).flip(1).flatten(0, 2), s), "swapped"),
    "the mask of a square": (lambda *given: expanded(*given, offset=0), "the last T of S"),
}
