"""Lesson 20: six runs of a small model, three with the router's bias and three without: the loss, and the busiest expert."""

from lessons import lab
from lessons.figures import COLOURS, empty, finish


def data() -> dict:
    """The curves of lessons/experiments/balance.json."""
    runs = {"with the bias": [], "without": []}
    for r in lab.experiment("balance")["results"]:
        runs["with the bias" if r["arm"] == "bias" else "without"].append({"loss": r["curves"]["loss"], "busiest": r["curves"]["busiest_expert"]})
        steps = r["curves"]["step"]
    return {"steps": steps, "runs": runs}


def draw(data: dict, path):
    """Two panels, three thin lines an arm."""
    figure, (left, right) = empty(1, 2, height=3.4)
    for (arm, curves), colour, style in zip(data["runs"].items(), (COLOURS[0], COLOURS[1]), ("-", "--")):
        for i, curve in enumerate(curves):
            left.plot(data["steps"], curve["loss"], color=colour, linestyle=style, linewidth=1.1, label=arm if i == 0 else None)
            right.plot(data["steps"], curve["busiest"], color=colour, linestyle=style, linewidth=1.1, label=arm if i == 0 else None)
    left.set(title="loss, nats a byte", xlabel="step", ylim=(1.2, 3.2))
    right.set(title="tokens of the busiest expert, over the mean", xlabel="step", ylim=(0, 16.5))
    for ax in (left, right):
        ax.legend(fontsize=9)
        ax.title.set_fontsize(10)
    finish(figure, data, path)
