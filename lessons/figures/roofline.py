"""Lesson 16: the most tokens a second that a disk and a memory allow K2, by how many of the chosen experts are in memory."""

from k2.machine import Machine
from k2.needs import needs
from k2.plan import seconds_per_token
from lessons.counts import cfg
from lessons.figures import COLOURS, empty, finish

DISK, RAM = 7e9, 100e9
HITS = [round(0.02 * i, 2) for i in range(51)]


def data() -> dict:
    """Tokens a second, the limit of the formula in k2/plan.py, for both released formats."""
    machine = Machine(ram=10**12, gpu_memory=0, disk=10**13, ram_bandwidth=RAM, disk_bandwidth=DISK)
    found = {"found in memory": HITS}
    for name, formats in (("FP8", ("fp8",)), ("INT4", ("int4", "bf16"))):
        found[name] = [round(1 / seconds_per_token(needs(cfg, *formats), machine, None, hits=hits).limit, 3) for hits in HITS]
    return found


def draw(data: dict, path):
    """Two curves, linear in hits and logarithmic in speed, with the two bounds named."""
    figure, ax = empty(1, 1, height=3.4)
    x = [100 * hits for hits in data["found in memory"]]
    for name, style, colour in (("INT4", "--", COLOURS[1]), ("FP8", "-", COLOURS[0])):
        ax.plot(x, data[name], style, color=colour, linewidth=2, label=name)
        for hits in (0.0, 0.5, 1.0):
            y = data[name][data["found in memory"].index(hits)]
            ax.annotate(f"{y:.2f}", (100 * hits, y), xytext=(0, 7 if name == "INT4" else -14), textcoords="offset points", ha="center", fontsize=9, color=colour)
    ax.set(yscale="log", ylim=(0.2, 9), xlim=(-4, 105), xlabel="chosen experts found in memory, %", ylabel="tokens a second, at most")
    ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["0.25", "0.5", "1", "2", "4", "8"])
    ax.minorticks_off()
    ax.set_title("K2 with RAM of 100 GB/s and a disk of 7 GB/s", fontsize=10)
    ax.legend(loc="upper left", fontsize=9, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure, data, path)
