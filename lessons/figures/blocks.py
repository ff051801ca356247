"""Lesson 13: what a coarser scale costs each list of codes, when a few weights are a hundred times larger than the rest."""

import torch

from lessons.figures import COLOURS, empty, finish

SIZES = (16, 32, 128, 1024, 16384, 2**21)
ROUND = {
    "INT4": (7, lambda x: x.round()),
    "FP8": (448, lambda x: x.to(torch.float8_e4m3fn).float()),
    "INT8": (127, lambda x: x.round()),
}


def data() -> dict:
    """Relative error, in percent, of two million normal weights, not counting the twenty outliers among them."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2**21, generator=g)
    outliers = torch.randperm(2**21, generator=g)[:20]
    plain = weight.clone()
    plain[outliers] = 0
    weight[outliers] = 100.0
    found = {"weights that share a scale": list(SIZES)}
    for name, (largest, rounded) in ROUND.items():
        found[name] = []
        for size in SIZES:
            parts = weight.view(-1, size)
            scale = parts.abs().amax(1, keepdim=True) / largest
            error = (rounded(parts / scale) * scale).flatten() - weight
            error[outliers] = 0
            found[name].append(round(100 * (error.norm() / plain.norm()).item(), 2))
    return found


def draw(data: dict, path):
    """Three lines, both axes logarithmic, each named where it ends."""
    figure, ax = empty(1, 1, height=3.4)
    sizes = data["weights that share a scale"]
    for name, marker, colour in (("INT4", "s", COLOURS[1]), ("INT8", "^", COLOURS[2]), ("FP8", "o", COLOURS[0])):
        ax.plot(sizes, data[name], marker=marker, color=colour)
        ax.annotate(f"{name}, {data[name][-1]:.3g} %", (sizes[-1], data[name][-1]), xytext=(8, 0), textcoords="offset points", va="center", fontsize=9, color=colour)
    for name, size in (("INT4", 32), ("FP8", 16384)):
        at = data[name][sizes.index(size)]
        ax.plot([size], [at], "o", markersize=13, markerfacecolor="none", markeredgecolor=COLOURS[6])
        ax.annotate(f"K2: {at:.3g} %", (size, at), xytext=(0, 10), textcoords="offset points", ha="center", fontsize=9)
    ax.set(xscale="log", yscale="log", xlim=(12, 3e7), ylim=(0.3, 200))
    ax.set_xticks(sizes, ["16", "32", "128", "1,024", "16,384", "all"])
    ax.minorticks_off()
    ax.set_yticks([1, 10, 100], ["1 %", "10 %", "100 %"])
    ax.set_xlabel("weights that share a scale")
    ax.set_title("relative error of the ordinary weights; one in 100,000 is a hundred times larger", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure, data, path)
