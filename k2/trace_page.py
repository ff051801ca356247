"""A trace as one page for a browser: trace_page.html and its script, with the numbers in it. Nothing is fetched.

Numbers travel as base64 of little-endian arrays, shares as 16 bits (steps of 0.000015): a token of K2 takes about ten
kilobytes, 61 layers in all. A token's text is data and stays it: it is escaped in the page, put in by textContent, and
the page's policy lets no script run but its own, known by its hash.

    T tokens · I numbers of each token
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path

import numpy as np
import torch

from .trace import LayerTrace, Trace

HERE = Path(__file__).parent


def page(found: Trace, token: int | None = None) -> str:
    """The whole page, which opens with a token chosen: the last, unless another is given."""
    script = "\n" + (HERE / "trace_page.js").read_text(encoding="utf-8")
    parts = {
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "TITLE": html.escape(f"{found.model}: a trace of {len(found.ids)} tokens"),
        "SCRIPT": script,
        "DATA": embedded(data(found) | {"start": len(found.ids) - 1 if token is None else token}),
    }
    text = (HERE / "trace_page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], text)  # one pass: nothing that was put in is looked at again


def embedded(value) -> str:
    """JSON that can stand in a script element: no < that could end it, and no line separators."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def data(found: Trace) -> dict:
    """What the script reads: tokens as places in a list of names, and each layer's arrays."""
    place = {i: n for n, i in enumerate(found.names)}

    def places(ids_TI):
        return torch.tensor([[place[i] for i in row] for row in ids_TI.tolist()])

    layers = []
    for layer in found.layers:
        packed_of = {name: packed(getattr(layer, name), name) for name in LayerTrace._fields[1:]}
        layers.append(packed_of | {"top_ids": packed(places(layer.top_ids), "top_ids"), "shapes": layer.shapes})
    return {"model": found.model, "head": found.head, "heads": found.heads, "experts": found.experts, "tokens": len(found.ids),
            "names": list(found.names.values()), "ids": packed(places(torch.tensor(found.ids)[:, None]), "ids"), "layers": layers}  # fmt: skip


def packed(values_TI, name: str) -> dict | None:
    """An array as {"kind", "width", "numbers"}: whole numbers as they fit, shares in 65,535ths, all else float32."""
    if values_TI is None:
        return None
    array_TI = values_TI.double().numpy() if values_TI.is_floating_point() else values_TI.numpy()
    if not values_TI.is_floating_point():
        kind = "u16" if array_TI.max() < 2**16 else "u32"
    else:
        kind = "p16" if name.endswith("shares") else "f32"
    array_TI = np.round(array_TI * 65535) if kind == "p16" else array_TI
    raw = array_TI.astype({"u16": "<u2", "u32": "<u4", "p16": "<u2", "f32": "<f4"}[kind]).tobytes()
    return {"kind": kind, "width": array_TI.shape[-1], "numbers": base64.b64encode(raw).decode()}
