"""Lesson 07: multiplications of the expanded and the absorbed form for one layer of K2, one new token and a whole prompt."""

from lessons.counts import absorbed_flops, cfg, expanded_flops
from lessons.figures import COLOURS, empty, finish

CONTEXTS = [2**i for i in range(4, 18)]


def data() -> dict:
    """Billions of floating-point operations by context, for T = 1 and T = S."""
    return {
        "contexts": CONTEXTS,
        "one token, expanded": [expanded_flops(cfg, 1, s) / 1e9 for s in CONTEXTS],
        "one token, absorbed": [absorbed_flops(cfg, 1, s) / 1e9 for s in CONTEXTS],
        "whole prompt, expanded": [expanded_flops(cfg, s, s) / 1e9 for s in CONTEXTS],
        "whole prompt, absorbed": [absorbed_flops(cfg, s, s) / 1e9 for s in CONTEXTS],
    }


def draw(data: dict, path):
    """Two panels with the same two lines."""
    figure, axes = empty(1, 2, height=3.2)
    for ax, case in zip(axes, ("one token", "whole prompt")):
        ax.plot(data["contexts"], data[f"{case}, expanded"], "s--", color=COLOURS[1], markersize=4, label="expanded")
        ax.plot(data["contexts"], data[f"{case}, absorbed"], "o-", color=COLOURS[0], markersize=4, label="absorbed")
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="tokens attended to", title=f"{case}: billions of operations a layer")
        ax.title.set_fontsize(9)
        ax.legend(fontsize=8)
    finish(figure, data, path)
