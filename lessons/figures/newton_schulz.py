"""Lesson 18: the singular values of one real gradient through five Newton-Schulz steps, quintic and cubic."""

import torch

from k2.training.muonclip import CUBIC, QUINTIC
from lessons import lab
from lessons.figures import COLOURS, empty, finish

NAME = "model.layers.1.self_attn.o_proj.weight"


def data() -> dict:
    """The gradient's singular values over their norm, and what each step makes of each, in the gradient's order; float64."""
    values = torch.linalg.svdvals(lab.gradients()[NAME])
    values = values / values.norm()
    found = {}
    for name, (a, b, c) in (("quintic", QUINTIC), ("cubic", CUBIC)):
        s, found[name] = values, [values.tolist()]
        for _ in range(5):
            s = a * s + b * s**3 + c * s**5
            found[name].append(s.tolist())
    return found


def draw(data: dict, path):
    """Two panels of equal axes, a line a step, dark to light."""
    figure, axes = empty(1, 2, height=3.6)
    shades = ("#000000", "#440154", "#3b528b", "#21918c", "#5ec962", COLOURS[1])
    for ax, name in zip(axes, ("quintic", "cubic")):
        for step, values in enumerate(data[name]):
            ax.plot(range(1, len(values) + 1), values, color=shades[step], linewidth=2.2 if step in (0, 5) else 1.2, linestyle="--" if step == 0 else "-",
                    label="gradient" if step == 0 else f"{step} step{'s' if step > 1 else ''}")  # fmt: skip
        ax.set(yscale="log", ylim=(2e-5, 2.5), xlabel="singular values, in the gradient's order", title=f"five {name} steps")
        ax.axhline(1, color="grey", linewidth=0.6)
        ax.tick_params(labelsize=8)
    axes[1].legend(fontsize=8, loc="lower left")
    axes[0].set_ylabel("singular value")
    finish(figure, data, path)
