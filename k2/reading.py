"""One expert on the disk: which bytes to read, and how they get from there into memory.

    place     where one of its tensors lies in the memory that it is read into
    span      neighbouring tensors, read at once: an FP8 expert's three matrices are 44,040,192 bytes in a row
    piece     a part of a span; all readers work on one expert's pieces before the next, so that it lands early

The safetensors library sorts a shard by dtype and then by name, so that an expert's large tensors are neighbours and its
FP8 scales lie elsewhere. Nothing here relies on it: offsets are read from the headers, and what is no neighbour becomes
a span of its own.
"""

import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from .ceilings import PAGE, open_direct
from .checkpoint import DTYPE_NAMES, Checkpoint
from .config import K2Error
from .interrupts import whole

PARTS = ("gate_proj", "up_proj", "down_proj")
PIECE = 2**21  # bytes
PATIENCE = 0.1  # seconds; a Ctrl-C comes through between two waits
READERS = 4  # threads: while one waits for the interpreter, which computes, the disk has the others' pieces
Key = tuple[int, int]  # layer, expert


class Span(NamedTuple):
    """Bytes of a shard that are read at once, widened to whole pages, and where in the room they go."""

    file: str
    begin: int
    end: int
    offset: int


class Place(NamedTuple):
    """Where in a room a tensor lies, and what it is."""

    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Record(NamedTuple):
    """One expert on the disk: what to read, and what is in it, by part and kind ("gate_proj", "weight")."""

    spans: list[Span]
    places: dict[tuple[str, str], Place]
    size: int


def expert_record(checkpoint: Checkpoint, starts: dict[str, int], key: Key) -> Record:
    """Find an expert's tensors by the headers' offsets and join neighbours; nothing is assumed about their order."""
    spans, places, size = [], {}, 0
    for file, begin, end, part, kind, entry in sorted(expert_tensors(checkpoint, starts, key), key=lambda tensor: tensor[:3]):
        first, last = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        if spans and spans[-1].file == file and spans[-1].end >= first:
            spans[-1] = spans[-1]._replace(end=last)
        else:
            spans.append(Span(file, first, last, size))
        size = spans[-1].offset + last - spans[-1].begin
        places[part, kind] = Place(spans[-1].offset + begin - spans[-1].begin, end - begin, DTYPE_NAMES[entry["dtype"]], tuple(entry["shape"]))
    return Record(spans, places, size)


def expert_tensors(checkpoint: Checkpoint, starts: dict[str, int], key: Key):
    """(file, first byte, end, part, kind, header entry) of each large tensor of an expert."""
    kinds = {"plain": ("weight",), "fp8": ("weight",), "int4": ("weight_packed", "weight_scale")}[checkpoint.config.weight_format]
    prefix = f"{checkpoint.config.tensor_prefix}model.layers.{key[0]}.mlp.experts.{key[1]}."
    for part in PARTS:
        for kind in kinds:
            name = f"{prefix}{part}.{kind}"
            file = checkpoint.weight_map[name]
            entry = checkpoint.headers[file][name]
            begin, end = entry["data_offsets"]
            yield file, starts[file] + begin, starts[file] + end, part, kind, entry


def data_start(path: Path) -> int:
    """Where a shard's tensors begin: behind the header's length and the header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def tensor_at(room, place: Place) -> torch.Tensor:
    """The tensor at a place of a room: a view, or a copy where the file puts it at an address its dtype cannot have."""
    raw = room[place.offset : place.offset + place.size]
    raw = raw if place.offset % place.dtype.itemsize == 0 else raw.clone()
    return raw.view(place.dtype).view(place.shape)


class Shards:
    """The checkpoint's files, read past the page cache where the file system allows it, so that slots are the only cache.

    Every read is checked against what the file was when it was opened: a shard that shrinks or is written to while the
    program runs ends it with an error, and never gives new bytes in silence. A shard that is replaced by another file
    changes nothing, since the old one stays open.
    """

    def __init__(self, directory: Path, files, readers: int = READERS):
        self.directory = directory
        self.open = {file: open_direct(directory / file) for file in files}
        self.identity = {file: self._identity(file) for file in self.open}
        self.readers = ThreadPoolExecutor(readers, thread_name_prefix="expert-reader")

    def _identity(self, file: str):
        status = os.fstat(self.open[file])
        return status.st_size, status.st_mtime_ns

    def start(self, record: Record, room: memoryview) -> list[Future]:
        """Hand an expert's pieces to the readers, in order, all or none; each future gives the bytes it read."""
        parts = []
        try:
            for piece in [piece for span in record.spans for piece in pieces(span)]:
                parts.append(self.readers.submit(self.read, piece, room))
        except BaseException:
            wait([part for part in parts if not part.cancel()])
            raise
        return parts

    @whole
    def ended(self, parts: list[Future]) -> bool:
        """Whether no reader is at these pieces any more, which it waits for up to PATIENCE seconds."""
        return not wait([part for part in parts if not part.cancelled()], PATIENCE).not_done

    def read(self, span: Span, room: memoryview) -> int:
        """Fill the span's part of a room; returns the bytes read. The last page of a file may be a part of one."""
        target = room[span.offset : span.offset + span.end - span.begin]
        done, wanted = 0, min(span.end, self.identity[span.file][0]) - span.begin
        while done < wanted:
            try:
                count = os.preadv(self.open[span.file], [target[done:]], span.begin + done)
            except OSError as error:
                raise K2Error(f"{self.directory / span.file}: could not be read at {span.begin + done}: {error.strerror}. Check the disk, then fetch the shard again.") from None
            if count == 0:
                break
            done += count
        if done < wanted or self._identity(span.file) != self.identity[span.file]:
            raise K2Error(f"{self.directory / span.file}: expected the file as it was at the start, found it changed while running. Start again with a whole checkpoint.")
        return done

    def close(self):
        """End the readers and close all files."""
        self.readers.shutdown()
        for descriptor in self.open.values():
            os.close(descriptor)


def pieces(span: Span) -> list[Span]:
    """A span in parts of at most PIECE bytes, at whole pages."""
    begins = range(span.begin, span.end, PIECE)
    return [span._replace(begin=begin, end=min(begin + PIECE, span.end), offset=span.offset + begin - span.begin) for begin in begins]
