"""What a run looks like: its CSV, a row a step, and figures drawn from such files. The home of matplotlib."""

import csv
import os
from pathlib import Path

from ..config import K2Error

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's: told apart by all eyes


class Curve:
    """A CSV that is written as a run goes; the header follows from the first row."""

    def __init__(self, path: Path):
        self.path = path

    def keep(self, steps: int):
        """Drop what lies beyond `steps`: a resumed run writes those rows again."""
        rows = [row for row in read(self.path) if int(row["step"]) <= steps] if steps and self.path.exists() else []
        temporary = self.path.with_name(f".{self.path.name}")
        self._write(temporary, "w", rows, header=True)
        os.replace(temporary, self.path)

    def add(self, row: dict):
        """One step more."""
        self._write(self.path, "a", [row], header=not self.path.exists() or not self.path.stat().st_size)

    def _write(self, path: Path, mode: str, rows: list[dict], header: bool):
        try:
            with open(path, mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
                if header and rows:
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as error:
            raise K2Error(f"{path}: could not be written: {error.strerror}. Make room and run the same command again.") from None


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return list(csv.DictReader(lines))


def draw_run(rows: list[dict[str, str]], path: Path, tau: float):
    """Four panels: loss, largest logit per layer beside tau, load per expert in the last layer, tokens per second."""
    figure, ((loss, logits), (load, speed)) = panels(2, 2)
    steps = [int(row["step"]) for row in rows]
    loss.plot(steps, [float(row["loss"]) for row in rows], color=COLOURS[0], linewidth=0.8)
    loss.set(title="loss, nats per token", ylim=(0, None))
    for i, name in enumerate(name for name in rows[0] if name.startswith("max_logit_")):
        logits.plot(steps, [float(row[name]) for row in rows], color=COLOURS[i % len(COLOURS)], linewidth=0.8, label=f"layer {name.rpartition('_')[2]}")
    logits.axhline(tau, color="black", linestyle="--", linewidth=0.8, label=f"tau = {tau:g}")
    logits.set(title="largest attention logit")
    logits.legend(fontsize=7)
    names = [name for name in rows[0] if name.startswith("load_")]
    last = [name for name in names if name.split("_")[1] == names[-1].split("_")[1]]
    image = load.imshow([[float(row[name]) for row in rows] for name in last], aspect="auto", vmin=0, vmax=3, cmap="cividis", extent=(steps[0], steps[-1], len(last), 0))
    figure.colorbar(image, ax=load)
    load.set(title=f"load per expert over the mean, layer {names[-1].split('_')[1]}", ylabel="expert")
    speed.plot(steps, [float(row["tokens_per_second"]) for row in rows], color=COLOURS[2], linewidth=0.8)
    speed.set(title="tokens per second", ylim=(0, None), xlabel="step")
    load.set_xlabel("step")
    save_figure(figure, path)


def draw_experiment(result: dict, path: Path, curve: str, figure_name: str):
    """Two panels: one curve of each run over its steps, and one figure of each run, a dot a seed."""
    figure, (left, right) = panels(1, 2)
    arms = list(dict.fromkeys(r["arm"] for r in result["results"]))
    for r in result["results"]:
        colour = COLOURS[arms.index(r["arm"]) % len(COLOURS)]
        first = r is next(s for s in result["results"] if s["arm"] == r["arm"])
        left.plot(r["curves"]["step"], r["curves"][curve], color=colour, linewidth=0.9, alpha=0.8, label=r["arm"] if first else None)
        right.plot([r["figures"][figure_name]], [arms.index(r["arm"])], "o", color=colour)
    if curve == "largest_logit":
        left.set_yscale("log")
    left.set(title=curve.replace("_", " "), xlabel="step")
    left.legend(fontsize=7)
    right.set(title=f"{figure_name.replace('_', ' ')}, a dot a seed", ylim=(len(arms) - 0.5, -0.5))
    right.set_yticks(range(len(arms)), arms)
    right.grid(axis="x", linewidth=0.3)
    save_figure(figure, path)


def panels(rows: int, columns: int):
    """An empty figure of this many axes, without the state that pyplot keeps."""
    from matplotlib.figure import Figure  # here, because it takes half a second that no other command should pay

    figure = Figure(figsize=(9, 3.4 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure, path: Path):
    """As PNG, whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    os.replace(temporary, path)
