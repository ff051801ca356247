"""The expert store: room for some experts, all of them in reach.

A token of K2 asks for 480 of 23,040 experts, 21 GB of FP8. Nobody's memory holds all 1,015 GB; every disk does. So the
experts stay in the shards, and a fixed number of slots in memory holds those that were used last.

    slot      one expert's bytes, exactly as stored, in one preallocated arena; its tensors are views into it
    hit       the expert is in a slot
    miss      its slot is filled by one read of 44,040,192 bytes (FP8), while others compute
    eviction  the expert that was not used for longest makes room

The store has the `fetch` of moe.py's resident experts and the layers know nothing more of it. Which slot an expert lies
in, and when it arrives, changes no bit of what it computes: the same bytes meet the same kernel.

    O, I a matrix's rows and columns
"""

import math
import os
import re
import time
from collections import OrderedDict, deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import checkpoint as files
from .ceilings import PAGE, open_direct
from .checkpoint import DTYPE_NAMES, Checkpoint, compute_dtype, expected_tensors, filled_model
from .config import K2Config, K2Error
from .expert import Expert
from .model import K2
from .quantization import NIBBLES

PARTS = ("gate_proj", "up_proj", "down_proj")
Key = tuple[int, int]  # layer, expert


class Span(NamedTuple):
    """Bytes of a shard that are read at once, widened to whole pages, and where in the slot they go."""

    file: str
    begin: int
    end: int
    slot_offset: int


class Place(NamedTuple):
    """Where in a slot a tensor lies, and what it is."""

    offset: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Record(NamedTuple):
    """One expert on the disk: what to read, and what is in it, by part and kind ("gate_proj", "weight")."""

    spans: list[Span]
    places: dict[tuple[str, str], Place]
    size: int


def expert_record(checkpoint: Checkpoint, starts: dict[str, int], layer: int, expert: int) -> Record:
    """Find an expert's tensors by the headers' offsets and join neighbours; nothing is assumed about their order."""
    spans, places, size = [], {}, 0
    for file, begin, end, part, kind, entry in sorted(expert_tensors(checkpoint, starts, layer, expert), key=lambda tensor: tensor[:3]):
        first, last = begin // PAGE * PAGE, -(-end // PAGE) * PAGE
        if spans and spans[-1].file == file and spans[-1].end >= first:
            spans[-1] = spans[-1]._replace(end=last)
        else:
            spans.append(Span(file, first, last, size))
        size = spans[-1].slot_offset + last - spans[-1].begin
        offset = spans[-1].slot_offset + begin - spans[-1].begin
        places[part, kind] = Place(offset, end - begin, DTYPE_NAMES[entry["dtype"]], tuple(entry["shape"]))
    return Record(spans, places, size)


def expert_tensors(checkpoint: Checkpoint, starts: dict[str, int], layer: int, expert: int):
    """(file, first byte, end, part, kind, header entry) of each large tensor of an expert."""
    kinds = {"plain": ("weight",), "fp8": ("weight",), "int4": ("weight_packed", "weight_scale")}[checkpoint.config.weight_format]
    for part in PARTS:
        for kind in kinds:
            name = f"{checkpoint.config.tensor_prefix}model.layers.{layer}.mlp.experts.{expert}.{part}.{kind}"
            file = checkpoint.weight_map[name]
            entry = checkpoint.headers[file][name]
            begin, end = (starts[file] + offset for offset in entry["data_offsets"])
            yield file, begin, end, part, kind, entry


class Shards:
    """The checkpoint's files, read past the page cache where the file system allows it, so that slots are the only cache.

    Every read is checked against what the file was when it was opened: a shard that shrinks or is written to while the
    program runs ends it with an error, and never gives new bytes in silence. A shard that is replaced by another file
    changes nothing, since the old one stays open.
    """

    def __init__(self, checkpoint: Checkpoint, files):
        self.directory = checkpoint.directory
        self.open = {file: open_direct(self.directory / file) for file in files}
        self.identity = {file: self._identity(file) for file in self.open}

    def _identity(self, file: str):
        status = os.fstat(self.open[file])
        return status.st_size, status.st_mtime_ns

    def read(self, span: Span, slot: memoryview) -> int:
        """Fill the span's part of a slot; returns the bytes read. The last page of a file may be a part of one."""
        target = slot[span.slot_offset : span.slot_offset + span.end - span.begin]
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
        """Close all files."""
        for descriptor in self.open.values():
            os.close(descriptor)


def data_start(path: Path) -> int:
    """Where a shard's tensors begin: behind the header's length and the header."""
    with open(path, "rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


class Slots:
    """One tier: equal rooms in one arena, and who is in which, least recently used first."""

    def __init__(self, size: int, budget: int, most: int, device: torch.device):
        count = min(budget // size, most)
        if count < 1:
            raise K2Error(f"memory: {budget:,} bytes are left for experts on {device}; expected at least {size:,}, the size of one. Give more, or use a smaller model.")
        arena = torch.empty(count * size + PAGE, dtype=torch.uint8, device=device)
        start = -arena.data_ptr() % PAGE
        self.rooms = arena[start : start + count * size].view(count, size)
        self.free = deque(range(count))
        self.experts: dict[int, Expert] = {}  # modules around a slot's bytes, by slot
        self.slot_of: OrderedDict[Key, int] = OrderedDict()
        self.held: set[Key] = set()

    def hold(self, key: Key) -> bool:
        """True if the expert is in a slot, which it then keeps until it is released."""
        if key not in self.slot_of:
            return False
        self.slot_of.move_to_end(key)
        self.held.add(key)
        return True

    def reserve(self, key: Key) -> bool:
        """Give a slot to an expert, held, its bytes not yet there; False while every slot is held."""
        if not self.free:
            oldest = next((k for k in self.slot_of if k not in self.held), None)
            if oldest is None:
                return False
            self.forget(oldest)
        self.slot_of[key] = self.free.popleft()
        self.held.add(key)
        return True

    def forget(self, key: Key):
        """Empty the expert's slot; a module that was around it must not serve the next tenant."""
        slot = self.slot_of.pop(key)
        self.experts.pop(slot, None)
        self.free.append(slot)
        self.held.discard(key)

    def room(self, key: Key) -> torch.Tensor:
        """The expert's slot, uint8."""
        return self.rooms[self.slot_of[key]]


@dataclass
class Statistics:
    """What moved since the store was made."""

    hits: int = 0
    lifted: int = 0
    misses: int = 0
    bytes_lifted: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0

    def line(self) -> str:
        """The same in words."""
        asked = max(self.hits + self.misses, 1)
        bus = f", {self.bytes_lifted / 1e9:.2f} GB moved to the device" if self.lifted else ""
        return f"experts: {self.hits / asked:.0%} of {asked} were in memory; {self.bytes_read / 1e9:.2f} GB read from disk, {self.seconds_waited:.2f} s waited for{bus}"


class ExpertStore:
    """All routed experts of a checkpoint, as many of them in memory as `ram` bytes hold.

    With `device_memory` there is a second tier of so many bytes on `device`, where the experts then compute: an expert
    that is in RAM and not there is copied up, and stays in RAM too until it is evicted. The order of copies and of the
    products that use them is the device's own queue, so that no slot is overwritten while it is read.
    """

    def __init__(self, checkpoint: Checkpoint, ram: int, device=torch.device("cpu"), device_memory: int | None = None, readers: int = 2):
        if not hasattr(os, "preadv"):
            raise K2Error("ram: reading experts from disk needs preadv, which this operating system lacks. Use Linux, or a model that fits into memory.")
        config = checkpoint.config
        layers = range(config.first_k_dense_replace, config.num_hidden_layers)
        starts = {file: data_start(checkpoint.directory / file) for file in checkpoint.headers}
        self.checkpoint = checkpoint
        self.records = {(i, e): expert_record(checkpoint, starts, i, e) for i in layers for e in range(config.n_routed_experts)}
        size = max(record.size for record in self.records.values())
        self.ram = Slots(size, ram, len(self.records), torch.device("cpu"))
        self.upper = self.ram if device_memory is None else Slots(size, device_memory, len(self.records), device)  # where experts compute
        self.device = device
        self.shards = Shards(checkpoint, {span.file for record in self.records.values() for span in record.spans})
        self.kept: dict[str, torch.Tensor] = {}
        self.readers = ThreadPoolExecutor(readers, thread_name_prefix="expert-reader")
        self.statistics = Statistics()

    def plan(self) -> str:
        """What is in memory and what is not, in words."""
        count, size = self.ram.rooms.shape
        above = f" and {len(self.upper.rooms)} on {self.device}" if self.upper is not self.ram else ""
        return f"experts: {count} slots of {size / 1e6:.2f} MB in RAM{above} for {len(self.records)} experts; the others are read from disk when they are asked for"

    def layer(self, config: K2Config, index: int) -> "StoredExperts":
        """What moe.py is given in place of resident experts."""
        return StoredExperts(self, index)

    def fetch(self, layer: int, ids: list[int]):
        """Start reading what is not in memory, as far as there are slots to read into; an iterator of (id, expert)."""
        keys = [(layer, e) for e in ids]
        ready = [key for key in keys if self.upper.hold(key)]
        below = [key for key in keys if key not in self.upper.held and self.ram.hold(key)]
        missing = deque(key for key in keys if key not in self.upper.held and key not in self.ram.held)
        self.statistics.hits += len(keys) - len(missing)
        self.statistics.misses += len(missing)
        reading: dict[Future, Key] = {}
        self.start_reading(missing, reading)
        return self.arriving(ready + below, missing, reading)

    def start_reading(self, missing: deque, reading: dict):
        """Hand the readers as many experts as there are slots that nobody holds."""
        while missing and self.ram.reserve(missing[0]):
            key = missing.popleft()
            reading[self.readers.submit(self.read, key, memoryview(self.ram.room(key).numpy()))] = key

    def read(self, key: Key, slot: memoryview) -> int:
        """All of one expert's spans, in a reader's thread; the number of bytes."""
        return sum(self.shards.read(span, slot) for span in self.records[key].spans)

    def arriving(self, hits: list[Key], missing: deque, reading: dict):
        """Yield the hits, then each miss as it lands. An expert may be used until the next one is asked for: only then
        is its slot let go. However this ends, no slot is left held and none that was not filled counts as filled."""
        try:
            for key in hits:
                yield key[1], self.expert(key)
                self.release(key)
                self.start_reading(missing, reading)
            while reading:
                started = time.perf_counter()
                landed = wait(reading, return_when=FIRST_COMPLETED).done
                self.statistics.seconds_waited += time.perf_counter() - started
                for future in landed:
                    self.statistics.bytes_read += future.result()
                    key = reading.pop(future)
                    yield key[1], self.expert(key)
                    self.release(key)
                self.start_reading(missing, reading)
        finally:
            wait(reading)
            for key in reading.values():
                self.ram.forget(key)
            self.ram.held.clear()
            self.upper.held.clear()

    def release(self, key: Key):
        """Let its slots be given to others."""
        self.ram.held.discard(key)
        self.upper.held.discard(key)

    def expert(self, key: Key) -> Expert:
        """The expert's module in the tier that computes, its bytes copied up if they were not there."""
        if not self.upper.hold(key):
            self.upper.reserve(key)
            self.upper.room(key).copy_(self.ram.room(key))
            self.ram.held.discard(key)
            self.statistics.lifted += 1
            self.statistics.bytes_lifted += self.records[key].size
        slot = self.upper.slot_of[key]
        if slot not in self.upper.experts:
            self.upper.experts[slot] = self.expert_in(self.upper.rooms[slot], key)
        return self.upper.experts[slot]

    def expert_in(self, room, key: Key) -> Expert:
        """The expert's module around its bytes."""
        expert = Expert.__new__(Expert)  # without __init__: making matrices to replace them would cost more than the rest
        nn.Module.__init__(expert)
        record = self.records[key]
        for part in PARTS:
            tensors = {kind: tensor_at(room, place) for (of, kind), place in record.places.items() if of == part}
            setattr(expert, part, self.linear(f"model.layers.{key[0]}.mlp.experts.{key[1]}.{part}", tensors))
        return expert

    def linear(self, name: str, parts: dict) -> nn.Module:
        """A matrix of an expert, from its bytes in a slot and what is kept of it for good."""

        def get(full: str) -> torch.Tensor:
            kind = full.rpartition(".")[2]
            return parts[kind] if kind in parts else self.small(full)

        linear = files.linear_from(self.checkpoint, name, None, self.device, get)
        return WideningLinear(linear.weight) if type(linear) is nn.Linear else linear

    def small(self, full: str) -> torch.Tensor:
        """A tensor that lies far from its weights in the file and is small: kept once read, 250 MB for all of K2."""
        if full not in self.kept:
            self.kept[full] = self.checkpoint.finite(full).clone().to(self.device)
        return self.kept[full]


def tensor_at(room, place: Place) -> torch.Tensor:
    """The tensor at a place of a slot: a view, or a copy where the file puts it at an address its dtype cannot have."""
    raw = room[place.offset : place.offset + place.size]
    raw = raw if place.offset % place.dtype.itemsize == 0 else raw.clone()
    return raw.view(place.dtype).view(place.shape)


class WideningLinear(nn.Module):
    """nn.Linear without bias whose weight stays in its stored dtype and is widened to x's for each product."""

    def __init__(self, weight_OI):
        super().__init__()
        self.weight = nn.Parameter(weight_OI, requires_grad=False)

    def forward(self, x_MI):
        return F.linear(x_MI, self.weight.to(x_MI.dtype))


class StoredExperts(nn.Module):
    """One layer's experts, wherever they are: the `fetch` of moe.Experts."""

    def __init__(self, store: ExpertStore, layer: int):
        super().__init__()
        self.store, self.layer = store, layer

    def fetch(self, ids: list[int]):
        """Yield (id, expert) for each id asked for, as they become available; reads start now."""
        return self.store.fetch(self.layer, ids)


# ---- how much fits ----


def weight_bytes(checkpoint: Checkpoint, dtype) -> tuple[int, int]:
    """(routed experts, all else that must be in memory), bytes at rest, in the stored format or widened to a dtype.

    The embedding is not counted, as its rows are read from the map.
    """
    sizes = {True: 0, False: 0}
    for name, spec in expected_tensors(checkpoint.config).items():
        entry = checkpoint.headers[checkpoint.weight_map[name]][name]
        stored = entry["data_offsets"][1] - entry["data_offsets"][0]
        widened = math.prod(spec.shape) * (NIBBLES if name.endswith("packed") else 1) * (dtype.itemsize if dtype else 1)
        if "embed_tokens" not in name:
            sizes[".mlp.experts." in name] += stored if dtype is None else widened
    return sizes[True], sizes[False]


def free_memory() -> int:
    """Bytes that a new program may take without pushing others out; Linux says so, elsewhere half of what is installed."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 * 2**30


def parse_size(text: str | None) -> int | None:
    """Bytes of "3GB", "512 MB" or "2.5e9": decimal units, as memory and disks are sold. None stays None."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?) ?(|B|KB|MB|GB|TB)", text.strip(), re.IGNORECASE)
    try:
        return int(float(found[1]) * {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[found[2].upper()])
    except (TypeError, ValueError, OverflowError):
        raise K2Error(f"size: found {text!r}; expected a number of bytes with or without a unit, such as 3GB.") from None


def load(directory, device="cpu", dtype="auto", gpu_memory=None, ram=None, layers: int | None = None) -> K2:
    """A model with a checkpoint's weights, ready to run: `checkpoint.load` where all experts fit into the device's
    memory, and else with an expert store in their place.

    ram and gpu_memory are the bytes that weights may take in either; the non-routed ones lie on the device and count
    there. Without a number it is nine tenths of what is free now. The tokens do not depend on them. Raises K2Error if
    the non-routed weights and one expert do not fit. With `layers` it is the model of that many first layers.
    """
    checkpoint, device = Checkpoint(directory, layers), torch.device(device)
    if gpu_memory is not None and device.type == "cpu":
        raise K2Error("--gpu-memory: set for a model on the CPU; expected a GPU. Use --ram, or --device cuda.")
    dtype = compute_dtype(checkpoint.config, dtype, device)
    routed, rest = weight_bytes(checkpoint, dtype)
    ram = int(free_memory() * 0.9) if ram is None else ram
    on_gpu = device.type != "cpu"
    room = ram if not on_gpu else gpu_memory if gpu_memory is not None else int(torch.cuda.mem_get_info(device)[0] * 0.9)
    if routed + rest <= room:
        return filled_model(checkpoint, device, dtype, files.resident_experts)
    if room < rest:
        raise K2Error(f"{directory}: the weights that every token needs take {rest:,} bytes; expected at most the {room:,} given. Give more with {'--gpu-memory' if on_gpu else '--ram'}, or use a machine with more memory.")
    store = ExpertStore(checkpoint, ram, device, room - rest) if on_gpu else ExpertStore(checkpoint, ram - rest)
    return filled_model(checkpoint, device, dtype, store.layer)


def store_of(model: K2) -> ExpertStore | None:
    """The store that a model's experts come from; None where they are resident."""
    return next((module.store for module in model.modules() if isinstance(module, StoredExperts)), None)
