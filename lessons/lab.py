"""What lessons run on: the shipped K2-mini, two texts, and the same model with one of tests/mutants.py's mistakes in it."""

import contextlib
import functools
import importlib
import io
import json
import math
import sys

import torch
import torch.nn.functional as F

from .checker import ROOT, tests_on_path

CODE = '''import os
import re


class Reader:
    """Read lines from a file, one after the other."""

    def __init__(self, path, encoding="utf-8"):
        self.path = path
        self.encoding = encoding
        self._lines = []

    def read(self):
        """Return the next line, or None at the end of the file."""
        if not self._lines:
            with open(self.path, encoding=self.encoding) as f:
                self._lines = f.readlines()
        for line in self._lines:
            if line.startswith("#"):
                continue
            yield line.rstrip()


def count_words(text):
    result = {}
    for word in re.split(r"\\W+", text):
        if not word:
            continue
        result[word] = result.get(word, 0) + 1
    return result


def main(args=None):
    for name in os.listdir("."):
        if not name.endswith(".txt"):
            raise ValueError("expected a text file, got %r" % name)
        print(name, len(count_words(open(name).read())))


if __name__ == "__main__":
    main()
'''

PROSE = """The old keeper of the lighthouse had a habit of writing down the weather every evening, and nobody in the village
knew why. He began when he was young, in a year when the ships were still made of wood. On the first page there is only a
date and the word calm. Later he wrote longer lines: how the gulls sat on the rocks, how the sea looked before the storm
of that winter, and which of the fishermen came home late. When he died, his daughter gave the books to the school, and
for some years the children were told to read from them aloud, until the teacher found that they had learned half of them
by heart. It is said that the last entry was made by another hand. It has no date, and it says that the light was lit on
time, that the wind came from the west, and that there was nothing else to tell of the day."""

LONG = (ROOT / "lessons" / "sample.txt").read_text(encoding="utf-8")  # a day's k2/tokenizer.py, kept as it was: 1,025 tokens


@functools.cache
def mini():
    """K2-mini in float32 on the CPU."""
    import k2

    return k2.load(ROOT / "k2" / "mini", dtype=torch.float32)


@functools.cache
def tokenizer():
    """K2-mini's tokenizer."""
    import k2

    return k2.Tokenizer.from_directory(ROOT / "k2" / "mini")


def ids(text: str) -> torch.Tensor:
    """A text's ids under K2-mini's tokenizer, int64 (T,)."""
    return torch.tensor(tokenizer().encode(text))


@torch.inference_mode()
def bits_per_byte(model, text: str = CODE, chunk: int | None = None) -> float:
    """How many bits a model needs for a byte of a text, the first token not counted: less is better, 8 is no model.

    Read in one go, or with a cache and `chunk` tokens a call, which must come to the same.
    """
    ids_T = ids(text)
    if chunk is None:
        logits_TW = model(ids_T[:-1])
    else:
        cache = sys.modules[type(model).__module__].LatentCache(model.config)
        logits_TW = torch.cat([model(part_T, cache) for part_T in ids_T[:-1].split(chunk)])
    nats = F.cross_entropy(logits_TW.float(), ids_T[1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


@torch.inference_mode()
def loss_by_place(model, parts: int = 4) -> list[float]:
    """Mean loss in nats a token of LONG, for each quarter of its 1,024 predictions."""
    ids_T = ids(LONG)
    nats_T = F.cross_entropy(model(ids_T[:-1]).float(), ids_T[1:], reduction="none")
    return [round(part.mean().item(), 2) for part in nats_T.chunk(parts)]


@functools.cache
def broken(mistake: str, measure=None):
    """What `measure(k2)` gives where the package k2 has the named mistake of tests/mutants.py in it; by default how many
    bits per byte K2-mini then needs for CODE. Nothing outside sees the broken package."""
    with tests_on_path():
        import mutants

        mutant = next((m for m in mutants.MUTANTS if m.name == mistake), None)
        if mutant is None:
            raise LookupError(f"tests/mutants.py has no {mistake!r}")
        with mutants.patched(mutant):
            package = importlib.import_module("k2")
            return (measure or mini_bits)(package)


def mini_bits(package) -> float:
    """bits_per_byte of K2-mini as this k2 computes it."""
    return bits_per_byte(package.load(ROOT / "k2" / "mini", dtype=torch.float32))


def small(seed: int = 0):
    """The tests' small config and a random model of it in float64: every axis has a size of its own."""
    with tests_on_path():
        import small as tests

        config = tests.small_config()
        return config, tests.random_model(config, seed, torch.float64)


@torch.inference_mode()
def routes(text: str, model=None) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{layer: (expert ids (T, K), weights (T, K))} that K2-mini's routers give for a text."""
    model, found = model or mini(), {}
    gates = {layer.mlp.gate: i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "gate")}
    hooks = [gate.register_forward_hook(lambda gate, _, result: found.update({gates[gate]: result})) for gate in gates]
    model(ids(text))
    for hook in hooks:
        hook.remove()
    return found


@contextlib.contextmanager
def hub(folder=ROOT / "k2" / "mini"):
    """While this lasts, a hub on this machine, tests/local_hub.py, with one repository, the folder's files; and a function that runs
    download_weights.py on it in this process: (status, what it said, a line each)."""
    with tests_on_path():
        import local_hub

    import download_weights
    from k2.hub import Hub, Patience

    server, real = local_hub.LocalHub(folder), download_weights.Hub

    def command(*flags):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = download_weights.main([str(flag) for flag in flags])
        return status, said.getvalue().strip().split("\n")

    download_weights.Hub = lambda: Hub(server.endpoint, patience=Patience(tries=4, first=0.001, timeout=5.0))
    try:
        yield server, command
    finally:
        download_weights.Hub = real
        server.close()


@functools.cache
def gradients() -> dict[str, torch.Tensor]:
    """K2-mini's gradients on CODE, by parameter name, in float64: {name: tensor}; an expert that no token chose has none."""
    import copy

    from k2.training.pretraining import next_token_loss

    model = copy.deepcopy(mini()).double().requires_grad_()
    next_token_loss(model, ids(CODE)[None]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def experiment(name: str) -> dict:
    """What lessons/experiments/NAME.json holds."""
    return json.loads((ROOT / "lessons" / "experiments" / f"{name}.json").read_text(encoding="utf-8"))


@torch.no_grad()
def clipped_heads(package, tau: float = 10.0, index: int = 1) -> dict:
    """A layer of K2-mini before and after QKClip on CODE, given the same input twice: each head's largest logit, the
    length of each head's output over that before, and the whole model's bits per byte. `package` is k2, or a broken copy."""
    muonclip = importlib.import_module(package.__name__ + ".training.muonclip")
    model = package.load(ROOT / "k2" / "mini", dtype=torch.float32)
    layer, inputs, mixed = model.model.layers[index].self_attn, [], []
    clip = muonclip.QKClip(model, tau)
    layer.register_forward_pre_hook(lambda _, given: inputs.append(given))
    layer.dot_product.register_forward_hook(lambda *call: mixed.append(call[2].norm(dim=-1).mean(-1).flatten()))
    model.train()(ids(CODE))
    before = clip.max_logits[layer].tolist()
    cut = clip.apply({p: p for p in model.parameters()})
    layer(*inputs[0])
    after = clip.max_logits[layer].tolist()
    lengths = (mixed[1] / mixed[0]).tolist()
    found = {"before": before, "after": after, "output": lengths}
    return {name: [round(v, 2) for v in values] for name, values in found.items()} | {"cut": cut, "bits": bits_per_byte(model.eval())}
