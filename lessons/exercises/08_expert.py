"""Several experts as one.

Complete `answer(experts)`: given a list of experts, each a triple (gate, up, down) of matrices as nn.Linear stores them,
gate and up (F, D) and down (D, F), the widths F possibly different, return the one triple whose answer
down @ (silu(gate @ x) * (up @ x)) is the sum of all their answers, for every x.
"""

import torch


def stub(experts):
    """A triple (gate, up, down)."""
    raise NotImplementedError


def check(answer):
    g = torch.Generator().manual_seed(8)
    D, widths = 6, (4, 4, 3)
    experts = [tuple(torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((F, D), (F, D), (D, F))) for F in widths]
    x = torch.randn(D, 5, generator=g, dtype=torch.float64)

    def says(gate, up, down):
        return down @ (torch.nn.functional.silu(gate @ x) * (up @ x))

    for chosen in (experts[:1], experts[:2], experts):
        found, F = answer(chosen), sum(len(gate) for gate, _, _ in chosen)
        shapes = [tuple(m.shape) for m in found]
        right = [(F, D), (F, D), (D, F)]
        assert shapes == right, f"{len(chosen)} experts of widths {[len(e[0]) for e in chosen]}: shapes {shapes}, expected {right}: their detectors side by side, none added into another"
        total = sum(says(*e) for e in chosen)
        if not torch.allclose(says(*found), total):
            assert not torch.allclose(says(*found), total / len(chosen)), "that is the mean of the answers; the task asks for their sum"
            assert not torch.allclose(says(found[1], found[0], found[2]), total), "gate and up are swapped"
            raise AssertionError(f"{len(chosen)} experts: the answers differ by up to {(says(*found) - total).abs().max():.3g}. Detector f has row f of gate, row f of up and column f of down: are they joined in one order?")


HINT = """Detector f is row f of gate, row f of up, column f of down. Put the rows of all experts below one another, and the
columns side by side: torch.cat with dim=0 and with dim=1."""


def solution(experts):
    gates, ups, downs = zip(*experts)
    return torch.cat(gates), torch.cat(ups), torch.cat(downs, dim=1)


WRONG = {
    "the weights added": (lambda experts: tuple(sum(parts[i][:3] if i < 2 else parts[i][:, :3] for parts in experts) for i in range(3)), "side by side"),
    "the mean": (lambda experts: (*solution(experts)[:2], solution(experts)[2] / len(experts)), "that is the mean"),
    "down joined in another order": (lambda experts: (*solution(experts)[:2], torch.cat([d for _, _, d in experts[::-1]], dim=1)), "joined in one order"),
    "gate and up swapped": (lambda experts: (solution(experts)[1], solution(experts)[0], solution(experts)[2]), "swapped"),
}
