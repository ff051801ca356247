"""The bug hunt of lesson 22: three models with one mistake each, and the judging of what a reader says of them.

    python -m lessons hunt 1                                          what is known of the first
    python -m lessons hunt 1 model.layers.0.self_attn.o_proj swapped  judge an answer: a module, and one of CAUSES

The mistakes are three of tests/mutants.py. Which ones stands here as hashes only, so that nobody reads it by accident.
"""

import hashlib
import importlib

import torch

from . import lab
from .checker import ROOT, tests_on_path

CAUSES = {
    "dropped": "a term or a factor that the formula has is left out",
    "added": "a term or a factor is there that the formula does not have",
    "swapped": "two parts stand in each other's place",
    "position": "a token is taken for one at another place",
    "mask": "a token sees what it must not, or does not see what it should",
    "order": "rows or experts come back in another order",
    "block": "a stored number is read with the scale of another block",
    "precision": "a number is rounded where it must not be",
    "stale": "a value of an earlier call is used again",
}
CASES = {  # number: the hash of a mutant's name, those of the right answers, and those of a right module with any cause
    "1": {"mistake": "002de67fc6cb06ef", "answers": ["3936300e77342600"], "modules": ["1bea957b7ba0a1cc"]},
    "2": {"mistake": "2bb7ff1457287266", "answers": ["bdcecb7fd069fac3"], "modules": ["d19fe8eac11b8422"]},
    "3": {"mistake": "d181abc415b7730d", "answers": ["264c521b707f62af"], "modules": ["2005171a2e92a75b"]},
}


TEXT = lab.PROSE[:160]  # what `symptoms` lets the models read


def digest(*words: str) -> str:
    """A short hash of words, to compare with."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]


def mistakes() -> dict[str, object]:
    """The mutants by the hashes of their names."""
    with tests_on_path():
        import mutants
    return {digest(m.name): m for m in mutants.MUTANTS}


def case(number) -> dict:
    """One of CASES, or a LookupError that names them."""
    if str(number) not in CASES:
        raise LookupError(f"no hunt {number}; there are {', '.join(CASES)}")
    return CASES[str(number)]


class Suspect:
    """K2-mini computed by a k2 with a mistake in it: `model` to call and to hook, `new_cache()` for calls with a past."""

    def __init__(self, mistake):
        """The number of a hunt, or the name of one of tests/mutants.py's mistakes."""
        wanted = case(mistake)["mistake"] if str(mistake).isdigit() else digest(mistake)
        if wanted not in mistakes():
            raise LookupError(f"tests/mutants.py has no {mistake!r}")
        with tests_on_path():
            import mutants

            with mutants.patched(mistakes()[wanted]):
                package = importlib.import_module("k2")
                self.model = package.load(ROOT / "k2" / "mini", dtype=torch.float32)
                self.cache_class = package.LatentCache

    def new_cache(self):
        """An empty past for this model."""
        return self.cache_class(self.model.config)


class Clean(Suspect):
    """The same without a mistake."""

    def __init__(self):
        import k2

        self.model, self.cache_class = lab.mini(), k2.LatentCache


@torch.inference_mode()
def bits(suspect, chunk: int | None = None, text: str = TEXT) -> float:
    """Bits per byte of a text, the first token not counted, read at once, or `chunk` tokens a call behind a cache."""
    ids_T = lab.ids(text)
    cache = suspect.new_cache() if chunk else None
    logits_TW = torch.cat([suspect.model(part_T, cache) for part_T in ids_T[:-1].split(chunk or len(ids_T))])
    return torch.nn.functional.cross_entropy(logits_TW, ids_T[1:], reduction="sum").item() / torch.log(torch.tensor(2.0)).item() / len(text.encode())


@torch.inference_mode()
def symptoms(number) -> str:
    """What is known of a case before anyone has looked inside."""
    suspect, clean, first_T = Suspect(number), Clean(), lab.ids(TEXT)[:1]
    off = difference([suspect.model(first_T)], [clean.model(first_T)])
    lines = [f"  {'the first token alone':32} its logits are {f'off by {off:.3f} of their length' if off > 1e-4 else 'right'}"]
    for name, chunk in (("all at once", None), ("16 tokens a call, with a cache", 16), ("one token a call, with a cache", 1)):
        lines.append(f"  {name:32} {bits(clean, chunk):.3f}   suspect {bits(suspect, chunk):.3f}")
    return "\n".join([f"hunt {number}: bits per byte of the first {len(TEXT)} characters of lab.PROSE, as it should be and as it is", *lines])


@torch.inference_mode()
def recorded(model, call) -> dict[str, tuple[list, list]]:
    """{module's name: (its tensor inputs, its tensor outputs)} for all modules that `call(model)` runs, in the order in
    which they first finish: what is inside comes before what it is inside of. Of several calls the tensors are joined."""
    found, names = {}, {module: name for name, module in model.named_modules()}

    def keep(module, inputs, outputs):
        kept = found.setdefault(names[module], ([], []))
        for tensors, values in zip(kept, (inputs, outputs if isinstance(outputs, tuple) else (outputs,))):
            tensors += [t.detach().clone() for t in values if isinstance(t, torch.Tensor)]

    hooks = [module.register_forward_hook(keep) for module in names]
    try:
        call(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def difference(some, others) -> float:
    """The largest relative difference of two lists of tensors, pair by pair: the length of a - b over that of b, both
    taken over all numbers of a tensor; infinite where their shapes differ."""
    if [t.shape for t in some] != [t.shape for t in others]:
        return float("inf")
    return max(((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item() for a, b in zip(some, others)) if some else 0.0


def judged(number, module: str, cause: str) -> str:
    """What is said of an answer: it begins with "right" or with "not yet"."""
    if cause not in CAUSES:
        raise LookupError(f"no cause {cause!r}; there are {', '.join(CAUSES)}")
    if module not in dict(lab.mini().named_modules()):
        raise LookupError(f"K2-mini has no module {module!r}; names are those of model.named_modules(), as model.layers.0.mlp")
    facts = case(number)
    if digest(str(number), module, cause) in facts["answers"]:
        return f"right: in {module} something is {cause}" if cause in ("dropped", "added", "swapped") else f"right: {module}, {cause}"
    if digest(str(number), module) in facts["modules"]:
        return f"not yet: {module} is the place, but the cause is not {cause!r} ({CAUSES[cause]})"
    return f"not yet: {module} is not the first place where right inputs give a wrong output"
