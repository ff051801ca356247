"""What the figure scripts share. A script has `data()`, a JSON object computed from the code, and `draw(data, path)`.

The data travels inside the PNG, so that a test can tell a picture that no longer shows what the code computes.
"""

import json
from pathlib import Path

from k2.training.curves import COLOURS

__all__ = ["COLOURS", "draw", "drawn_from", "empty", "finish"]
WIDTH = 7.2  # inches; the text is legible when the picture is half a screen wide


def empty(rows: int = 1, columns: int = 1, height: float = 3.6):
    """A figure and its axes, without the state that pyplot keeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=120)
    return figure, figure.subplots(rows, columns)


def finish(figure, data: dict, path: Path):
    """Write the PNG with its data inside."""
    figure.savefig(path, format="png", metadata={"Software": None, "Data": json.dumps(data)})


def draw(script, path: Path):
    """Run one script."""
    script.draw(script.data(), path)


def drawn_from(path: Path) -> dict:
    """The data that a picture was drawn from."""
    from PIL import Image

    with Image.open(path) as picture:
        return json.loads(picture.text["Data"])
