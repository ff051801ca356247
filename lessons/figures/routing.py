"""Lesson 09: which experts of K2-mini's three routers answer to code and which to prose."""

import torch

from lessons import lab
from lessons.figures import empty, finish


def data() -> dict:
    """For each layer and text: each expert's number of tokens over the mean of the layer, in the experts' order."""
    found = {}
    for name, text in (("code", lab.CODE), ("prose", lab.PROSE)):
        for layer, (ids_TK, _) in lab.routes(text).items():
            load = torch.bincount(ids_TK.flatten(), minlength=48).double()
            found[f"layer {layer}, {name}"] = [round(v, 3) for v in (load / load.mean()).tolist()]
    return found


def draw(data: dict, path):
    """Two strips a layer, experts sorted by how much more they answer to code than to prose."""
    figure, axes = empty(3, 1, height=3.2)
    for layer, ax in zip((1, 2, 3), axes):
        code, prose = data[f"layer {layer}, code"], data[f"layer {layer}, prose"]
        order = sorted(range(48), key=lambda e: prose[e] - code[e])
        image = ax.imshow([[code[e] for e in order], [prose[e] for e in order]], aspect="auto", cmap="cividis", vmin=0, vmax=4)
        ax.set_yticks([0, 1], [f"layer {layer}, code", "prose"], fontsize=8)
        ax.set_xticks([])
        ax.tick_params(length=0)
    axes[-1].set_xlabel("48 experts a layer, from those of code to those of prose")
    figure.colorbar(image, ax=list(axes), label="tokens, over the mean", shrink=0.8)
    finish(figure, data, path)
