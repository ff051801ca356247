"""Lesson 16: how often an expert is found in memory, by how many have room there, replayed from K2-mini's own routing."""

from k2 import routes
from lessons import lab
from lessons.figures import COLOURS, empty, finish

SLOTS = (3, 9, 18, 36, 72, 108, 144)


def data() -> dict:
    """Percent of the requests that an LRU cache of so many of the 144 experts answers, for two texts."""
    found = {"percent of the experts": [round(100 * slots / 144, 1) for slots in SLOTS]}
    for name, text in (("code", lab.LONG), ("prose", lab.PROSE)):
        said = routes.record(lab.mini(), lab.tokenizer().encode(text))
        found[name] = [round(100 * routes.replay(said, slots, "lru"), 1) for slots in SLOTS]
    return found


def draw(data: dict, path):
    """Two curves and the diagonal of even routing."""
    figure, ax = empty(1, 1, height=3.5)
    shares = data["percent of the experts"]
    ax.plot(shares, data["prose"], marker="s", color=COLOURS[1], label="prose, LRU")
    ax.plot(shares, data["code"], marker="o", color=COLOURS[0], label="code, LRU")
    ax.plot([0, 100], [0, 100], "--", color=COLOURS[6], linewidth=1, label="even routing, any rule")
    for x, y in list(zip(shares, data["code"]))[2:-1]:
        ax.annotate(f"{y:.0f}", (x, y), xytext=(7, -11), textcoords="offset points", fontsize=9, color=COLOURS[0])
    ax.axvline(100 * 12 / 144, color="#999999", linewidth=1, linestyle=":")
    ax.annotate("one token's 12 experts", (100 * 12 / 144, 93), xytext=(5, 0), textcoords="offset points", fontsize=9)
    ax.set(xlim=(0, 101), ylim=(0, 101), xlabel="experts that have a slot, percent of K2-mini's 144", ylabel="found in memory, %")
    ax.legend(loc="lower right", fontsize=9, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure, data, path)
