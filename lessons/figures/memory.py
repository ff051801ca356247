"""Lesson 14: the most tokens a second of K2, by how much memory is bought, and the two sizes that people buy by."""

from k2.config import K2Error
from k2.machine import Machine
from k2.needs import needs
from k2.plan import seconds_per_token
from lessons.counts import cfg
from lessons.figures import COLOURS, empty, finish

SIZES = [16, 24, 33, 48, 64, 96, 128, 192, 256, 384, 512, 594, 640, 768, 896, 960, 1000, 1029, 1100, 1280]  # GB
FORMATS = {"FP8": ("fp8",), "INT4": ("int4", "bf16")}


def limit(gigabytes: int, formats) -> float:
    """Tokens a second at most, 0 where what every token needs does not fit."""
    machine = Machine(ram=gigabytes * 10**9, gpu_memory=0, disk=10**13, ram_bandwidth=300e9, disk_bandwidth=7e9)
    try:
        return round(1 / seconds_per_token(needs(cfg, *formats), machine, None).limit, 3)
    except K2Error:
        return 0.0


def data() -> dict:
    """The limit for each size of memory: 300 GB a second, in front of a disk of 7."""
    return {"GB": SIZES, **{name: [limit(size, formats) for size in SIZES] for name, formats in FORMATS.items()}}


def draw(data: dict, path):
    """Two curves on logarithmic axes, and where the counts of weights lie."""
    figure, ax = empty(1, 1, height=3.5)
    for name, style, colour in (("INT4", "--", COLOURS[1]), ("FP8", "-", COLOURS[0])):
        points = [(x, y) for x, y in zip(data["GB"], data[name]) if y]
        ax.plot(*zip(*points), style, marker=".", color=colour, linewidth=2, label=name)
    for size, text in ((33, "33: active,\nin bytes of FP8"), (594, "594: all,\nin INT4"), (1029, "1,029: all, in FP8")):
        ax.axvline(size, color="#999999", linewidth=1, linestyle=":")
        ax.annotate(text, (size, 14 if size < 1000 else 0.22), xytext=(-4 if size > 500 else 4, 0), textcoords="offset points", fontsize=9, va="center", ha="right" if size > 500 else "left")
    ax.set(xscale="log", yscale="log", xlim=(14, 1400), ylim=(0.18, 22), xlabel="GB of memory", ylabel="tokens a second, at most")
    ax.set_xticks([16, 32, 64, 128, 256, 512, 1024], ["16", "32", "64", "128", "256", "512", "1,024"])
    ax.set_yticks([0.25, 0.5, 1, 2, 4, 8, 16], ["0.25", "0.5", "1", "2", "4", "8", "16"])
    ax.minorticks_off()
    ax.set_title("memory of 300 GB/s, disk of 7 GB/s, experts asked evenly", fontsize=10)
    ax.legend(loc="center left", fontsize=9, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure, data, path)
