"""Lesson 19: the largest attention logit of nine runs, three without the clip, and one clip of K2-mini head by head."""

import k2
from lessons import lab
from lessons.figures import COLOURS, empty, finish

TAU = 10.0


def data() -> dict:
    """The curves of lessons/experiments/clip.json, and layer 1 of K2-mini before and after a clip at 10."""
    runs = {}
    for r in lab.experiment("clip")["results"]:
        runs.setdefault(r["arm"], []).append(r["curves"]["largest_logit"])
        steps = r["curves"]["step"]
    heads = lab.clipped_heads(k2, TAU)
    return {"steps": steps, "runs": runs, "before": heads["before"], "after": heads["after"], "at the end": {arm: [c[-1] for c in curves] for arm, curves in runs.items()}}


def draw(data: dict, path):
    """Curves on the left, bars on the right."""
    figure, (left, right) = empty(1, 2, height=3.6)
    for (arm, curves), colour, style in zip(data["runs"].items(), (COLOURS[1], COLOURS[0], COLOURS[2]), ("-", "--", ":")):
        for i, curve in enumerate(curves):
            left.plot(data["steps"], curve, color=colour, linestyle=style, linewidth=1.4, label=arm if i == 0 else None)
    left.set(yscale="log", xlabel="step", title="nine runs: the largest logit")
    left.legend(fontsize=8)
    places = range(len(data["before"]))
    right.bar([p - 0.2 for p in places], data["before"], 0.38, color=COLOURS[1], hatch="//", edgecolor="white", label="before")
    right.bar([p + 0.2 for p in places], data["after"], 0.38, color=COLOURS[0], label="after")
    right.axhline(TAU, color="black", linestyle="--", linewidth=0.8, label=f"tau = {TAU:g}")
    right.set(title="one clip: K2-mini, layer 1", ylim=(0, 21))
    right.set_xticks(places, [f"head {p}" for p in places], fontsize=8)
    right.legend(fontsize=8, ncols=3, loc="upper center")
    for ax in (left, right):
        ax.title.set_fontsize(10)
    finish(figure, data, path)
