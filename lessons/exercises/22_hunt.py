"""Find the first wrong module.

Complete `answer(clean, suspect, call)`: the name of the module in which the mistake is, for

    clean, suspect    two torch modules with the same names inside and the same weights, unless a weight is the mistake
    call              a function; call(model) runs a model on some input and returns what it gives

The mistake is in the module whose inputs are the clean one's, whose output is not, and which finishes before any other
such.

A forward hook (module.register_forward_hook) sees inputs and output of each call. It must return None: anything else that
it returns takes the output's place. Take your hooks away again.

Every module here is called once, takes tensors and gives one tensor. Names are those of named_modules(). Two tensors are
the same within 1e-6.
"""

import torch
from torch import nn


def stub(clean, suspect, call):
    """A module's name."""
    raise NotImplementedError


class Half(nn.Module):
    """y = outer(sigmoid(first(x)) * second(x)). "swapped" has the sigmoid on the other; "turned" also runs them in turn."""

    def __init__(self, fault=""):
        super().__init__()
        self.outer, self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)  # registered in another order than they run
        self.fault = fault

    def forward(self, x):
        if self.fault == "turned":
            second, first = self.second(x), self.first(x)
        else:
            first, second = self.first(x), self.second(x)
        return self.outer(torch.sigmoid(second) * first if self.fault else torch.sigmoid(first) * second)


class Whole(nn.Module):
    """Three halves with residuals."""

    def __init__(self, **faults):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(22)
            self.halves = nn.ModuleList(Half(faults.get(f"half{i}", "")) for i in range(3))

    def forward(self, x):
        for half in self.halves:
            x = x + half(x)
        return x


def check(answer):
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))

    def call(model):
        return model(x)

    def heavier(name):
        model = Whole()
        model.get_submodule(name).weight.data[0] *= 1.5
        return model

    cases = (
        ("halves.1.second", heavier("halves.1.second"), "a weight of it is wrong"),
        ("halves.1.outer", heavier("halves.1.outer"), "a weight of it is wrong"),
        ("halves.2", Whole(half2="swapped"), "what is inside is right by itself and put together wrongly, so that outer has a wrong input and is not the culprit"),
        ("halves.0", Whole(half0="turned"), "modules may run in another order than in the clean model: compare by name, not by place"),
    )
    for right, suspect, words in cases:
        clean = Whole()
        found = answer(clean, suspect, call)
        assert isinstance(found, str) and found in dict(clean.named_modules()), f"expected a name of named_modules(), found {found!r}"
        inside = right.startswith(found + ".") or not found
        assert not inside, f"{found!r} contains the culprit {right!r}: what is inside finishes first, and is asked first"
        assert found == right, f"found {found!r}, expected {right!r}: {words}"
        assert not any(m._forward_hooks for m in (*clean.modules(), *suspect.modules())), "right, but a hook is left behind: call remove() on what register_forward_hook gave you"


HINT = """found = {}; hook = module.register_forward_hook(lambda m, inputs, output, name=name: found.update({name: (inputs, output)}))
for every name and module. Run call(clean) into one such dict and call(suspect) into another. A dict keeps the order in
which its keys came, so the first name whose inputs agree and whose outputs do not is the answer."""


def recorded(model, call):
    found, hooks = {}, []
    for name, module in model.named_modules():
        hooks.append(module.register_forward_hook(lambda m, inputs, output, name=name: found.update({name: (inputs, output)})))
    call(model)
    for hook in hooks:
        hook.remove()
    return found


def close(some, others):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(some, others))


def solution(clean, suspect, call):
    right, found = recorded(clean, call), recorded(suspect, call)
    return next(n for n in right if close(right[n][0], found[n][0]) and not close([right[n][1]], [found[n][1]]))


def first_wrong_output(clean, suspect, call):
    right, found = recorded(clean, call), recorded(suspect, call)
    return next(n for n in right if not close([right[n][1]], [found[n][1]]))


def outermost(clean, suspect, call):
    right, found = recorded(clean, call), recorded(suspect, call)
    return next(n for n, _ in clean.named_modules() if n in right and close(right[n][0], found[n][0]) and not close([right[n][1]], [found[n][1]]))


def by_place(clean, suspect, call):
    pairs = zip(recorded(clean, call).items(), recorded(suspect, call).items())
    return next(n for (n, right), (_, found) in pairs if close(right[0], found[0]) and not close([right[1]], [found[1]]))


def hooks_left(clean, suspect, call):
    suspect.register_forward_hook(lambda *_: None)
    return solution(clean, suspect, call)


WRONG = {
    "the first wrong output": (first_wrong_output, "is not the culprit"),
    "the outermost module": (outermost, "contains the culprit"),
    "compared by place": (by_place, "by name, not by place"),
    "a hook left behind": (hooks_left, "remove()"),
}
