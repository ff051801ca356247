"""Lesson 13: the numbers that FP8 E4M3 and INT4 can store, on lines."""

import torch

from lessons.figures import COLOURS, empty, finish


def data() -> dict:
    """All positive finite E4M3 numbers, decoded by torch, and the integers of INT4."""
    every = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    return {"E4M3": [v for v in every if v > 0], "INT4": list(range(-8, 8))}


def draw(data: dict, path):
    """Three lines of ticks."""
    figure, axes = empty(3, 1, height=3.3)
    lines = (
        (data["E4M3"], "log", "the 126 positive E4M3 numbers, logarithmic: eight to each doubling", COLOURS[0]),
        (data["E4M3"], "linear", "the same, linear: 32 apart from 256 to 448", COLOURS[0]),
        (data["INT4"], "linear", "the 16 INT4 numbers", COLOURS[1]),
    )
    for ax, (values, scale, title, colour) in zip(axes, lines):
        ax.vlines(values, 0, 1, color=colour, linewidth=1.2)
        ax.set_xscale(scale)
        ax.set_title(title, fontsize=10)
        ax.set_yticks([])
        ax.tick_params(labelsize=9)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_xticks([2.0**-9, 2.0**-6, 0.125, 1, 8, 64, 448], ["0.00195", "0.0156", "0.125", "1", "8", "64", "448"])
    axes[0].minorticks_off()
    axes[1].set_xticks([0, 64, 128, 256, 448])
    axes[2].set_xticks(data["INT4"])
    finish(figure, data, path)
