"""Lesson 11: the weights that one token meets, in a layer and in the whole of K2."""

from lessons.counts import attention, cfg, dense, expert, moe_layers, table
from lessons.figures import COLOURS, empty, finish

PARTS = ("attention", "dense feed-forward", "router", "shared expert", "routed experts", "head")
SHADES = dict(zip(PARTS, (COLOURS[1], COLOURS[4], COLOURS[6], COLOURS[2], COLOURS[0], COLOURS[5])))


def data() -> dict:
    """Millions in a layer of each kind, billions in the model; vectors are left out."""
    router, chosen = cfg.n_routed_experts * cfg.hidden_size, cfg.num_experts_per_tok * expert(cfg)
    first = {"attention": attention(cfg), "dense feed-forward": dense(cfg)}
    other = {"attention": attention(cfg), "router": router, "shared expert": expert(cfg), "routed experts": chosen}
    sums = {part: first.get(part, 0) + moe_layers(cfg) * other.get(part, 0) for part in PARTS} | {"head": table(cfg)}
    return {
        "layer 0": {part: n / 1e6 for part, n in first.items()},
        "layers 1 to 60,\neach": {part: n / 1e6 for part, n in other.items()},
        "the whole model": {part: n / 1e9 for part, n in sums.items()},
        "totals": [sum(first.values()) / 1e6, sum(other.values()) / 1e6, sum(sums.values()) / 1e9],
    }


def draw(data: dict, path):
    """Two bars in millions above one in billions; the small parts have no label inside."""
    figure, axes = empty(2, 1, height=3.6)
    names = [name for name in data if name != "totals"]
    for ax, rows, unit, form in ((axes[0], names[:2], "millions of weights", ".0f"), (axes[1], names[2:], "billions of weights", ".2f")):
        for row in rows:
            left, whole = 0.0, sum(data[row].values())
            for part, value in data[row].items():
                ax.barh(row, value, left=left, color=SHADES[part], edgecolor="white", height=0.62)
                if value > 0.06 * whole:
                    ax.text(left + value / 2, row, f"{value:{form}}", ha="center", va="center", fontsize=9, color="white" if part in ("attention", "routed experts", "shared expert") else "black")
                left += value
            total = data["totals"][names.index(row)]
            ax.text(left * 1.01, row, f"{total:,.1f}" if unit[0] == "m" else f"{total:,.2f}", va="center", fontsize=9)
        ax.invert_yaxis()
        ax.set_xlim(0, max(data["totals"][names.index(row)] for row in rows) * 1.1)
        ax.set_xlabel(unit, fontsize=9)
        ax.tick_params(labelsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    from matplotlib.patches import Patch

    figure.legend(handles=[Patch(color=SHADES[part], label=part) for part in PARTS], loc="outside upper center", ncols=3, fontsize=9, frameon=False)
    finish(figure, data, path)
