"""One Muon step.

Complete `answer(weight, gradient, momentum, lr)`: the pair (new weight, new momentum) of one step on one matrix, for

    weight, gradient, momentum    float64 tensors of one shape (n, m); either side may be the longer one
    lr                            the learning rate

with momentum 0.95, Nesterov's look ahead, five quintic Newton-Schulz steps with the coefficients (3.4445, -4.7750, 2.0315),
the factor 0.2 * sqrt(max(n, m)), and weight decay 0.1. Use products of matrices only, no torch.linalg. Do not change the
tensors that you are given.
"""

import torch


def stub(weight, gradient, momentum, lr):
    """(new weight, new momentum)"""
    raise NotImplementedError


def check(answer):
    from k2.training.muonclip import orthogonalized

    for n, m in ((6, 10), (10, 6)):
        g = torch.Generator().manual_seed(18)
        weight, gradient, momentum = (torch.randn(n, m, generator=g, dtype=torch.float64) for _ in range(3))
        gradient = 30 * gradient
        given = [t.clone() for t in (weight, gradient, momentum)]
        found, kept = answer(weight, gradient, momentum, 0.01)
        assert all(torch.equal(a, b) for a, b in zip(given, (weight, gradient, momentum))), "a tensor that you were given has changed: work on copies"
        assert found.shape == weight.shape, f"the new weight has shape {tuple(found.shape)}, expected {(n, m)}: turn a tall matrix on its side first, and back at the end"
        new = 0.95 * momentum + gradient
        assert torch.allclose(kept, new), "the new momentum is 0.95 times the old plus the gradient, before anything is orthogonalised"
        assert found.isfinite().all(), "the new weight is not finite: divide by the Frobenius norm first, or the iteration explodes"

        def stepped(direction, factor=0.2 * max(n, m) ** 0.5, decay=0.1):
            return weight - 0.01 * (factor * orthogonalized(direction) + decay * weight)

        def same(other):
            return torch.allclose(found, other, atol=1e-7)

        assert not same(stepped(gradient + 0.95 * new, decay=0.0)), "the weight decay is missing: the step also takes away lr * 0.1 * weight"
        rest = weight - 0.01 * 0.2 * max(n, m) ** 0.5 * orthogonalized(gradient + 0.95 * new) - found
        decay = ((rest * weight).sum() / (0.01 * weight.square().sum())).item()
        assert abs(decay - 0.1) < 1e-4 or not same(stepped(gradient + 0.95 * new, decay=decay)), f"all is right but the weight decay: your step takes away lr * {decay:.3g} * weight, expected lr * 0.1 * weight"
        assert not same(stepped(new)), "that is the momentum without Nesterov's look ahead: orthogonalise gradient + 0.95 * new momentum"
        assert not same(stepped(gradient)), "the momentum is not used: orthogonalise gradient + 0.95 * new momentum"
        assert not same(stepped(gradient + 0.95 * new, factor=1.0)), "the factor 0.2 * sqrt(max(n, m)) is missing"
        assert not same(stepped(gradient + 0.95 * new, factor=0.2 * min(n, m) ** 0.5)), "the factor takes the longer side, max(n, m)"
        assert not same(stepped(gradient + 0.95 * new + 0.1 * weight, decay=0.0)), "the decay belongs outside: it is not part of what is orthogonalised"
        assert same(stepped(gradient + 0.95 * new)), f"the step of a {n} x {m} matrix is off by up to {(found - stepped(gradient + 0.95 * new)).abs().max():.2g}: follow a * x + b * (x x^T) x + c * (x x^T)^2 x, five times"


HINT = """new = 0.95 * momentum + gradient; x = gradient + 0.95 * new; x = x / x.norm(). If n > m, work on x.mT. Five times:
g = x @ x.mT; x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x. Then weight - lr * (0.2 * max(n, m) ** 0.5 * x + 0.1 * weight)."""


def newton_schulz(x, normalise=True):
    x = x / (x.norm() + 1e-7) if normalise else x
    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.mT, False).mT
    for _ in range(5):
        g = x @ x.mT
        x = 3.4445 * x + (-4.7750 * g + 2.0315 * g @ g) @ x
    return x


def solution(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    factor = 0.2 * max(weight.shape) ** 0.5
    return weight - lr * (factor * newton_schulz(gradient + 0.95 * new) + 0.1 * weight), new


def no_look_ahead(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * (0.2 * max(weight.shape) ** 0.5 * newton_schulz(new) + 0.1 * weight), new


def shorter_side(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * (0.2 * min(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new) + 0.1 * weight), new


def decay_inside(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * 0.2 * max(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new + 0.1 * weight), new


def not_normalised(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * (0.2 * max(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new, False) + 0.1 * weight), new


def in_place(weight, gradient, momentum, lr):
    new = momentum.mul_(0.95).add_(gradient)
    return weight - lr * (0.2 * max(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new) + 0.1 * weight), new


def decay_without_the_rate(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * 0.2 * max(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new) - 0.1 * weight, new


def small_decay(weight, gradient, momentum, lr):
    new = 0.95 * momentum + gradient
    return weight - lr * (0.2 * max(weight.shape) ** 0.5 * newton_schulz(gradient + 0.95 * new) + 0.01 * weight), new


WRONG = {
    "decay without the learning rate": (decay_without_the_rate, "lr * 10 * weight"),
    "a tenth of the decay": (small_decay, "lr * 0.01 * weight"),
    "momentum without Nesterov": (no_look_ahead, "look ahead"),
    "the factor of the shorter side": (shorter_side, "longer side"),
    "decay inside of the orthogonalisation": (decay_inside, "outside"),
    "no division by the norm": (not_normalised, "Frobenius"),
    "the momentum changed in place": (in_place, "work on copies"),
}
