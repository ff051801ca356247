"""QK-Clip on latent attention.

Complete `answer(q_b, kv_b, kv_a, largest, tau, sizes)`: the three matrices of one layer behind the clip, as a tuple of new
tensors (q_b, kv_b, kv_a), for

    q_b        (H * (N + R), Q), each head's N + R query rows: N without position, then R rotary ones
    kv_b       (H * (N + V), C), each head's N key rows, then its V value rows
    kv_a       (C + R, D), the latent's C rows, then the R rows of the rotary key that all heads share
    largest    (H,), each head's largest logit
    tau        the limit, positive
    sizes      a dict with H, N, R, V and C

Every head whose largest logit passes tau must come to it exactly. No other head's logits and no value may change. Do not
change the tensors that you are given.
"""

import torch


def stub(q_b, kv_b, kv_a, largest, tau, sizes):
    """(q_b, kv_b, kv_a), clipped"""
    raise NotImplementedError


def check(answer):
    H, N, R, V, C, Q, D, T = 4, 3, 2, 5, 6, 7, 8, 9
    g = torch.Generator().manual_seed(19)
    q_b, kv_b, kv_a = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((H * (N + R), Q), (H * (N + V), C), (C + R, D)))
    c_q, c, x = (torch.randn(T, n, generator=g, dtype=torch.float64) for n in (Q, C, D))

    def parts(q_b, kv_b, kv_a):
        """Each head's two scores (H, T, T) and its values."""
        q, kv = (c_q @ q_b.mT).unflatten(-1, (H, N + R)).transpose(0, 1), (c @ kv_b.mT).unflatten(-1, (H, N + V)).transpose(0, 1)
        return q[..., :N] @ kv[..., :N].mT, q[..., N:] @ (x @ kv_a[C:].mT).mT, kv[..., N:]

    nope, rope, values = parts(q_b, kv_b, kv_a)
    largest = (nope + rope).amax(dim=(-2, -1))
    tau = float(largest.sort().values[1:3].mean())  # two heads are above, two below
    largest[largest.argmin()] = -1.0  # a head may have no positive logit at all
    given = [t.clone() for t in (q_b, kv_b, kv_a)]
    found = answer(q_b, kv_b, kv_a, largest.clone(), tau, {"H": H, "N": N, "R": R, "V": V, "C": C})
    assert all(torch.equal(a, b) for a, b in zip(given, (q_b, kv_b, kv_a))), "a matrix that you were given has changed: work on copies"
    assert len(found) == 3 and [t.shape for t in found] == [t.shape for t in given], "expected three matrices of the shapes that you were given"
    assert torch.equal(found[2], kv_a), "kv_a has changed: its rotary key serves all heads, so that clipping it for one turns down every other"
    new_nope, new_rope, new_values = parts(*found)
    assert torch.equal(new_values, values), "a head's values have changed: of kv_b only each head's first N rows make keys"
    for h in largest.argsort().tolist():  # those below tau first
        if largest[h] <= tau:
            assert torch.equal(new_nope[h], nope[h]) and torch.equal(new_rope[h], rope[h]), f"head {h} with largest logit {largest[h]:.2f} is below tau = {tau:.2f}, and has changed: each head has a gamma of its own, and none where it is not above"
            continue
        gamma = tau / largest[h]
        assert not torch.allclose(new_rope[h], gamma.sqrt() * rope[h]), f"head {h}'s rotary half shrank by sqrt(gamma) only: its key does not move, so the query must take all of gamma"
        assert torch.allclose(new_rope[h], gamma * rope[h]), f"head {h}'s rotary scores should be gamma = {gamma:.3f} times what they were"
        assert not torch.allclose(new_nope[h], gamma.square() * nope[h]), f"head {h}'s other half shrank by gamma twice: query and key share it, sqrt(gamma) each"
        assert torch.allclose(new_nope[h], gamma * nope[h]), f"head {h}'s scores without position should be gamma = {gamma:.3f} times what they were"
        assert torch.allclose(found[0].unflatten(0, (H, N + R))[h, :N], gamma.sqrt() * q_b.unflatten(0, (H, N + R))[h, :N]), "gamma is shared out evenly between a head's query and key, sqrt(gamma) each"


HINT = """gamma = torch.where(largest > tau, tau / largest, 1.0). q = q_b.clone().unflatten(0, (H, N + R)) is (H, N + R, Q), a row
of heads first; multiply q[:, :N] and q[:, N:] by factors of shape (H, 1, 1), and flatten(0, 1) at the end."""


def gammas(largest, tau):
    return torch.where(largest > tau, tau / largest, 1.0)[:, None, None]


def clipped(q_b, kv_b, gamma, sizes, rope_power=1.0, half=0.5, values=False):
    H, N = sizes["H"], sizes["N"]
    q, kv = q_b.clone().unflatten(0, (H, -1)), kv_b.clone().unflatten(0, (H, -1))
    q[:, :N] *= gamma**half
    q[:, N:] *= gamma**rope_power
    kv[:, : None if values else N] *= gamma**half
    return q.flatten(0, 1), kv.flatten(0, 1)


def solution(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, gammas(largest, tau), sizes), kv_a.clone()


def square_root_everywhere(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, gammas(largest, tau), sizes, rope_power=0.5), kv_a.clone()


def shared_key_too(q_b, kv_b, kv_a, largest, tau, sizes):
    gamma, kv_a = gammas(largest, tau), kv_a.clone()
    kv_a[sizes["C"] :] *= gamma.min().sqrt()
    return *clipped(q_b, kv_b, gamma, sizes, rope_power=0.5), kv_a


def values_too(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, gammas(largest, tau), sizes, values=True), kv_a.clone()


def one_gamma(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, gammas(largest.max().expand(len(largest)), tau), sizes), kv_a.clone()


def negative_gamma(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, (tau / largest).clamp(max=1.0).abs()[:, None, None], sizes), kv_a.clone()


def gamma_twice(q_b, kv_b, kv_a, largest, tau, sizes):
    return *clipped(q_b, kv_b, gammas(largest, tau), sizes, half=1.0), kv_a.clone()


WRONG = {
    "sqrt(gamma) on the rotary query": (square_root_everywhere, "must take all of gamma"),
    "the shared key clipped": (shared_key_too, "serves all heads"),
    "values clipped": (values_too, "values have changed"),
    "one gamma for the layer": (one_gamma, "gamma of its own"),
    "gamma of a head whose logits are negative": (negative_gamma, "none where it is not above"),
    "gamma on query and on key": (gamma_twice, "twice"),
}
