"""What a checkpoint holds, by name: shape, dtype, bytes, shard, and on demand what its numbers are like.

Only the headers are read, here or over the network, so that a checkpoint of a terabyte is told in seconds. Its tensors
are compared with what its config implies, name by name.
"""

import fnmatch
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

from .checkpoint import Checkpoint, expected_tensors, read_header, read_index, reason_to_ignore
from .config import K2Config, K2Error, printable
from .part import KINDS, Layout, Part, place_of
from .quantization import int4_unpack

CHUNK = 2**24  # numbers at a time: a statistic of K2's embedding must not need 5 GB


class Row(NamedTuple):
    """A tensor as a table shows it."""

    name: str
    dtype: str
    shape: list[int]
    bytes: int
    file: str


def local_layout(directory) -> Layout:
    """The layout of a folder's checkpoint, from its config, its index and its shards' headers. Raises K2Error."""
    directory = Path(directory)
    if not directory.is_dir():
        raise K2Error(f"{directory}: expected a checkpoint directory or a repository such as moonshotai/Kimi-K2-Instruct, found {'a file' if directory.exists() else 'nothing'}. Check the name.")
    weight_map = read_index(directory)
    return Layout(K2Config.from_json(directory), weight_map, {file: read_header(directory / file) for file in sorted(set(weight_map.values()))})


def rows(layout: Layout, patterns: list[str]) -> list[Row]:
    """The tensors that match one of the patterns (* and ? as in a shell), all without one, in the index's order."""
    chosen = [name for name in layout.weight_map if not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise K2Error(f"{' '.join(patterns)}: expected the names of tensors, or patterns such as '*.layers.1.self_attn.*', found none that match. Without a pattern inspect shows what there is.")
    found = []
    for name in chosen:
        file = layout.weight_map[name]
        entry = layout.headers[file].get(name)
        if entry is not None:
            begin, end = entry["data_offsets"]
            found.append(Row(name, entry["dtype"], entry["shape"], end - begin, file))
    return found


def summary(layout: Layout, part: Part) -> list[str]:
    """A line for each kind of tensor, one for the sum, and how far that is what config.json implies."""
    kinds: dict[str, list[Row]] = {kind: [] for kind in [*KINDS, "ignored"]}
    everything = rows(layout, [])
    for row in everything:
        kinds["ignored" if reason_to_ignore(row.name) else place_of(row.name).kind or "ignored"].append(row)
    lines = [f"{'':14}{'tensors':>9}{'bytes':>20}  dtypes"]
    for kind, held in kinds.items():
        if held:
            lines.append(f"{kind:14}{len(held):>9,}{sum(row.bytes for row in held):>20,}  {', '.join(sorted({row.dtype for row in held}))}")
    shards = len(layout.headers)
    lines.append(f"{'all':14}{len(everything):>9,}{sum(row.bytes for row in everything):>20,}  in {shards} shard{'s' if shards > 1 else ''}")
    reasons = sorted({reason for row in kinds["ignored"] if (reason := reason_to_ignore(row.name))})
    lines += [f"ignored: {reason}" for reason in reasons]
    wanted = sum(part.takes(name) for name in expected_tensors(layout.config))
    of = "" if part.whole() else f", which is a part of {len(expected_tensors(layout.config)):,}"
    return [*lines, f"as config.json implies: {wanted:,} tensors by name, dtype and shape{of}"]


def table(chosen: list[Row]) -> list[str]:
    """A line for each tensor."""
    width = max(len(row.name) for row in chosen)
    return [f"{printable(row.name):{width}}  {row.dtype:8} {str(row.shape):16} {row.bytes:>15,} bytes  {row.file}" for row in chosen]


def as_json(layout: Layout, chosen: list[Row]) -> str:
    """The same for programs: {"tensors": {name: {dtype, shape, bytes, file}}, "bytes", "count"}."""
    tensors = {row.name: {"dtype": row.dtype, "shape": row.shape, "bytes": row.bytes, "file": row.file} for row in chosen}
    return json.dumps({"count": len(chosen), "bytes": sum(row.bytes for row in chosen), "shards": len(layout.headers), "tensors": tensors})


def statistics(checkpoint: Checkpoint, row: Row) -> str:
    """What a tensor's stored numbers are like: range, mean, spread, zeros and those that are none. Packed INT4 words are
    told apart into their integers, -8 to 7; FP8 codes are shown without their blocks' scales."""
    flat = checkpoint.stored(row.name).flatten()
    low, high, total, squares, zeros, bad, count = math.inf, -math.inf, 0.0, 0.0, 0, 0, 0
    for start in range(0, len(flat), CHUNK):
        piece = flat[start : start + CHUNK]
        numbers = (int4_unpack(piece) if row.name.endswith("weight_packed") else piece.float()).double().flatten()
        finite = numbers[numbers.isfinite()]
        count, bad, zeros = count + len(numbers), bad + len(numbers) - len(finite), zeros + int((finite == 0).sum())
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            total, squares = total + float(finite.sum()), squares + float(finite.square().sum())
    if count == bad:
        return f"{count} numbers, none of them finite" if count else "no numbers"
    mean = total / (count - bad)
    deviation = math.sqrt(max(squares / (count - bad) - mean**2, 0.0))
    return f"{low:.4g} to {high:.4g}, mean {mean:.3g}, deviation {deviation:.4g}, zero {zeros / count:.2%}, not finite {bad}"
