"""What a model's own routing says about caches: recorded once, replayed through policies without reading a weight.

    record      the experts that each token chose, layer by layer, and what each layer's router would have said before
                its attention, and before the layer in front of it, for the first one a dense layer
    replay      the share of them that a store of so many slots would have held, by policy
    precision   how often such a guess is asked for, by its rank

`python -m k2 bench --replay` prints all three for K2-mini. A policy is an order of eviction: the first of it goes.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch

from .model import K2

AGEING = 0.98  # what a count keeps from one token to the next: it halves in 34 tokens


@dataclass
class Routes:
    """chosen and guessed: for each token, for each layer with experts, expert ids, best first; `earlier` the guesses made a
    layer earlier, of all layers but the first, whose guesses before the dense layer are `first`; `experts` a layer has so many."""

    chosen: list[list[list[int]]]
    guessed: list[list[list[int]]]
    earlier: list[list[list[int]]]
    first: list[list[list[int]]]
    experts: int


@torch.inference_mode()
def record(model: K2, ids: list[int], window: int = 512) -> Routes:
    """Routes of a text, read in windows; as in decoding, every token sees all before it in its window."""
    dense, layers = list(model.model.layers[: model.config.first_k_dense_replace]), list(model.model.layers[model.config.first_k_dense_replace :])
    said: dict[tuple[str, int], list] = {}

    def guess(layer, arguments):
        index = layers.index(layer)
        for kind, judge in zip(("guessed", "earlier"), layers[index : index + 2]):
            ask(kind, judge, arguments)

    def ask(kind, judge, arguments):
        said.setdefault((kind, layers.index(judge)), []).extend(judge.mlp.gate.forward(judge.post_attention_layernorm(arguments[0]))[0].tolist())

    def choose(router, _, result):
        index = [layer.mlp.gate for layer in layers].index(router)
        said.setdefault(("chosen", index), []).extend(result[0].tolist())

    hooks = [layer.register_forward_pre_hook(guess) for layer in layers] + [layer.mlp.gate.register_forward_hook(choose) for layer in layers]
    hooks += [layer.register_forward_pre_hook(lambda _, arguments: ask("first", layers[0], arguments)) for layer in dense[-1:] if layers]
    for begin in range(0, len(ids), window):
        model(torch.tensor(ids[begin : begin + window]), positions=slice(-1, None))
    for hook in hooks:
        hook.remove()
    by_token = {kind: [list(token) for token in zip(*(said[kind, i] for i in range(len(layers)) if (kind, i) in said))] for kind in ("chosen", "guessed", "earlier", "first")}
    return Routes(**by_token, experts=model.config.n_routed_experts)


def replay(routes: Routes, slots: int, policy: str) -> float:
    """The share of choices that were in one of so many slots. policy: "lru" evicts what was not used for longest, "ageing"
    what was used least, each use counting less from token to token."""
    held: OrderedDict = OrderedDict()
    hits, asked, worth = 0, 0, 1.0
    for token in routes.chosen:
        worth /= AGEING  # a newer use counts more: the same as letting all older counts fall
        for layer, ids in enumerate(token):
            for e in ids:
                asked += 1
                hits += (layer, e) in held
                count = held.pop((layer, e), 0.0)
                if len(held) >= slots:
                    held.pop(next(iter(held)) if policy == "lru" else min(held, key=held.get))
                held[layer, e] = count + worth
    return hits / asked


def precision(routes: Routes, kind: str = "guessed") -> list[float]:
    """For each rank of a guess, the share that the router then chose. kind: "guessed", before attention, "earlier", before
    the layer in front, or "first", before the dense layer."""
    layers = {"guessed": slice(None), "earlier": slice(1, None), "first": slice(1)}[kind]
    pairs = [(guess, set(choice)) for g, c in zip(getattr(routes, kind), routes.chosen) for guess, choice in zip(g, c[layers])]
    return [sum(guess[rank] in choice for guess, choice in pairs) / len(pairs) for rank in range(len(pairs[0][0]))] if pairs else []


def table(texts: dict[str, Routes], shares=(0.125, 0.25, 0.5, 0.75)) -> str:
    """Hit rates by text, policy and share of all experts that have a slot; then the guesses' precision."""
    lines = [f"{'hits of a store that holds':34}" + "".join(f"{share:>8.1%}" for share in shares)]
    for name, routes in texts.items():
        total = routes.experts * len(routes.chosen[0])
        for policy in ("lru", "ageing"):
            rates = [replay(routes, max(1, int(share * total)), policy) for share in shares]
            lines.append(f"{name + ', ' + policy:34}" + "".join(f"{rate:>8.1%}" for rate in rates))
    for name, routes in texts.items():
        for when, kind in (("before attention", "guessed"), ("a layer earlier", "earlier"), ("before the dense layer", "first")):
            rates = ", ".join(f"{rate:.0%}" for rate in precision(routes, kind))
            lines += [f"{name}: guessed {when} and then chosen, by rank: {rates}"] if rates else []
    return "\n".join(lines)
