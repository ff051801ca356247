"""Lesson 01: where K2's weights are, as areas. Left all of them, then all but the routed experts, then what a token meets."""

from lessons.counts import active, cfg, expert, moe_layers, parts, total
from lessons.figures import COLOURS, empty, finish

ORDER = ("routed experts", "attention", "shared experts", "embedding", "head", "dense layer", "routers", "norms")

SHADES = dict(zip(ORDER, (*COLOURS[:6], "#555555", "#999999")))


def data() -> dict:
    """Billions of weights by part, for each of the three squares."""
    everything = {name: parts(cfg)[name] / 1e9 for name in ORDER}
    resident = {name: value for name, value in everything.items() if name != "routed experts"}
    met = everything | {"routed experts": moe_layers(cfg) * cfg.num_experts_per_tok * expert(cfg) / 1e9}
    return {"all weights": everything, "all but the routed experts": resident, "what one token meets": met,
            "totals": [total(cfg) / 1e9, total(cfg) / 1e9 - everything["routed experts"], active(cfg) / 1e9]}  # fmt: skip


def boxes(values: list[float], x=0.0, y=0.0, width=1.0, height=1.0):
    """A treemap: (x, y, width, height) for each value, halving the rest across its longer side."""
    if len(values) == 1:
        return [(x, y, width, height)]
    cut = next(i for i in range(1, len(values) + 1) if sum(values[:i]) * 2 >= sum(values) or i == len(values) - 1)
    share = sum(values[:cut]) / sum(values)
    if width >= height:
        return boxes(values[:cut], x, y, width * share, height) + boxes(values[cut:], x + width * share, y, width * (1 - share), height)
    return boxes(values[:cut], x, y, width, height * share) + boxes(values[cut:], x, y + height * share, width, height * (1 - share))


def draw(data: dict, path):
    """Three squares of equal size; what each area stands for is in its title."""
    from matplotlib.patches import Rectangle

    figure, axes = empty(1, 3, height=2.9)
    for ax, name, whole in zip(axes, ("all weights", "all but the routed experts", "what one token meets"), data["totals"]):
        parts_here = sorted(data[name].items(), key=lambda item: -item[1])
        for (part, value), (x, y, width, height) in zip(parts_here, boxes([v for _, v in parts_here])):
            ax.add_patch(Rectangle((x, y), width, height, facecolor=SHADES[part], edgecolor="white", linewidth=1))
            if width * height > 0.025:
                ax.text(x + width / 2, y + height / 2, f"{part.replace(' ', chr(10))}\n{value:,.1f}", ha="center", va="center", fontsize=8, rotation=90 if width < 0.13 else 0,
                        color="white" if ORDER.index(part) in (0, 1) else "black")  # fmt: skip
        ax.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
        ax.set_title(f"{name}{'*' if 'token' in name else ''}\n{whole:,.1f} billion", fontsize=9)
        ax.axis("off")
    finish(figure, data, path)
