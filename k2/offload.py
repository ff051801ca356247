"""The expert store: room for some experts, all of them in reach.

A token of K2 asks for 480 of 23,040 experts, 21 GB of FP8. Nobody's memory holds all 1,015 GB; many a disk does. So the
experts stay in the shards, and a fixed number of slots in memory holds those that were used last.

    slot      room for one expert's bytes, exactly as stored (k2/slots.py)
    hit       the expert is in a slot
    miss      its slot is filled from the disk, while others compute
    eviction  the expert that was not used for longest makes room
    ahead     read before it is asked for: while a layer's attention computes, the router that follows it already
              guesses, and the disk would have nothing to do

The store has the `fetch` of moe.py's resident experts and the layers know nothing more of it. Which slot an expert lies
in, when it arrives, and whether it was read for nothing, changes no bit of what is computed: the same bytes meet the
same kernel.

    M rows sent here · O, I a matrix's rows and columns
"""

import functools
import math
import os
import re
import time
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import checkpoint as files
from .checkpoint import Checkpoint, expected_tensors, filled_model, resolved_dtypes
from .compiled import Compiler, with_compiled_products
from .config import K2Config, K2Error
from .expert import Expert
from .interrupts import whole
from .model import K2
from .products import OneRow, many_rows_product, single_row_product
from .quantization import NIBBLES, fp8_dequantize, fp8_has_nan, int4_dequantize
from .reading import PARTS, READERS, Key, Record, Shards, data_start, expert_record, tensor_at
from .slots import SMALL, Bus, Slots, kernel_bytes, room_size

TAKEN = 0.9  # of the memory that is free, where the user gives no number
AHEAD = 2  # experts that are read on a guess while a token's attention computes; about as long as the disk then idles
SOON = 2  # of the next layer's, while this one's last experts compute
RISING = 2  # experts sent from RAM to a device before any computes; each that was handed out is followed by one more


@dataclass
class Statistics:
    """What moved since the store was made."""

    hits: int = 0
    misses: int = 0
    guessed: int = 0
    guessed_right: int = 0
    lifted: int = 0
    bytes_lifted: int = 0
    bytes_read: int = 0
    seconds_waited: float = 0.0

    def line(self) -> str:
        """The same in words."""
        asked = max(self.hits + self.misses, 1)
        bus = f", {self.bytes_lifted / 1e9:.2f} GB moved to the device" if self.lifted else ""
        ahead = f"; {self.guessed_right} of {self.guessed} read ahead were wanted" if self.guessed else ""
        return f"experts: {self.hits / asked:.0%} of {asked} were in memory; {self.bytes_read / 1e9:.2f} GB read from disk, {self.seconds_waited:.2f} s waited for{bus}{ahead}"


class ExpertStore:
    """All routed experts of a checkpoint, as many of them in memory as `ram` bytes hold.

    With `device_memory` there is a second tier of so many bytes on `device`, where the experts then compute: an expert
    that is in RAM and not there is copied up, and stays in RAM too until it is evicted. Copies wait for the products that
    were started before, and products for the copy that they need (slots.Bus), so no slot is overwritten while it is read. With `dtype` the
    experts compute in it, else in the checkpoint's own; a `compiler` gives them their compiled form.
    """

    def __init__(self, checkpoint: Checkpoint, ram: int, device=torch.device("cpu"), device_memory: int | None = None, readers: int = READERS, dtype=None, compiler: Compiler | None = None):
        if not hasattr(os, "preadv"):
            raise K2Error("ram: reading experts from disk needs preadv, which this operating system lacks. Use Linux, or a model that fits into memory.")
        config = checkpoint.config
        layers = range(config.first_k_dense_replace, config.num_hidden_layers)
        self.checkpoint, self.device, self.dtype, self.compiler = checkpoint, device, dtype, compiler
        self.count, size, beside = len(layers) * config.n_routed_experts, room_size(checkpoint), kernel_bytes(checkpoint, dtype, device)
        self.ram = Slots(size, ram, self.count, torch.device("cpu"), beside if device_memory is None else 0)
        self.upper = self.ram if device_memory is None else Slots(size, device_memory, self.count, device, beside)  # where experts compute
        self.starts = {file: data_start(checkpoint.directory / file) for file in checkpoint.headers}
        self.records: dict[Key, Record] = {}
        self.shards = Shards(checkpoint.directory, {file for name, file in checkpoint.weight_map.items() if ".mlp.experts." in name}, readers)
        self.reading: dict[Key, list[Future]] = {}  # slots that are being filled
        self.guesses: set[Key] = set()  # those of them, or of the filled ones, that nobody has asked for yet
        self.handing_out = lambda: None  # the last request's experts, `arriving`, if they are still about
        self.soon: tuple[int, list[int], int] | None = None  # what `ahead` is to be asked once the disk is done with a layer
        self.kept: dict[str, torch.Tensor] = {}
        self.bus = Bus(size, device) if self.upper is not self.ram else None
        self.crossing: dict[Key, object] = {}  # experts on their way up, and what tells that they are there
        self.statistics = Statistics()

    def plan(self) -> str:
        """What is in memory and what is not, in words."""
        count, size = len(self.ram.rooms), self.ram.rooms[0].numel()
        above = f" and {len(self.upper.rooms)} on {self.device}" if self.upper is not self.ram else ""
        return f"experts: {count} slots of {size / 1e6:.2f} MB in RAM{above} for {self.count} experts; the others are read from disk when they are asked for"

    def layer(self, config: K2Config, index: int) -> "StoredExperts":
        """What moe.py is given in place of resident experts."""
        return StoredExperts(self, index)

    def visited_layer(self, config: K2Config, index: int) -> "VisitedExperts":
        """The same for a model whose other weights are elsewhere."""
        return VisitedExperts(self, index)

    @whole
    def fetch(self, layer: int, ids: list[int]):
        """Start reading what is not in memory, as far as there are slots to read into; an iterator of (id, expert)."""
        keys = [(layer, e) for e in ids]
        wanted = set(keys)
        self.settle(layer, wanted)
        ready = [key for key in keys if self.upper.hold(key) and key not in self.reading]
        below = [key for key in keys if key not in self.upper.held and key not in self.reading and self.ram.hold(key)]
        coming = deque(key for key in self.reading if key in wanted)  # in the order in which they will land
        missing = deque(key for key in keys if key not in self.upper.held and key not in self.ram.held)
        self.statistics.hits += len(ready) + len(below)
        self.statistics.misses += len(coming) + len(missing)
        self.start_reading(missing, coming)
        rising = deque(below)
        for _ in range(RISING):
            self.lift_next(rising)
        if self.soon and not missing:
            self.ahead(*self.soon)
        arriving = self.arriving(ready + below, rising, missing, coming)
        self.handing_out = weakref.ref(arriving)
        return arriving

    def settle(self, layer: int, wanted: set[Key]):
        """End the request before, call off what was read ahead for this layer and is not wanted, and make ordinary tenants
        of what came to its end."""
        if before := self.handing_out():
            before.close()
        self.call_off_all_but(wanted, layer)
        for key, parts in list(self.reading.items()):
            of_no_use = key in wanted if called_off(parts) else key not in self.guesses  # the latter: a request that was broken off
            if of_no_use or all(part.done() for part in parts):
                self.end(key)
        self.let_go()
        self.guesses &= self.ram.slot_of.keys()
        self.statistics.guessed_right += len(self.guesses & wanted)
        self.guesses -= wanted

    @whole
    def ahead(self, layer: int, ids: list[int], most: int):
        """Start reading what is not in memory of the `most` experts that a layer will most probably ask for; what an earlier
        guess wanted and this one does not is called off."""
        self.call_off_all_but({(layer, e) for e in ids}, layer)
        for key, parts in list(self.reading.items()):
            if all(part.done() for part in parts) and called_off(parts):
                self.end(key)
        for key in [(layer, e) for e in ids[:most] if (layer, e) not in self.ram.slot_of and (layer, e) not in self.upper.slot_of]:
            if len(self.reading) + 1 < len(self.ram.rooms) // 2 and self.ram.reserve(key):  # the rest stays free for what is asked for
                self.begin(key)
                self.guesses.add(key)
                self.statistics.guessed += 1

    @whole
    def start_reading(self, missing: deque, coming: deque):
        """Hand the readers as many experts as there are slots that nobody holds."""
        while missing and self.ram.reserve(missing[0]):
            self.begin(missing[0])
            coming.append(missing.popleft())

    def begin(self, key: Key):
        """Let the readers fill an expert's slot, or give it back."""
        try:
            self.reading[key] = self.shards.start(self.record(key), memoryview(self.ram.room(key).numpy()))
        except BaseException:
            self.ram.forget(key)
            raise

    def record(self, key: Key) -> Record:
        """Where the expert lies; looked up once."""
        if key not in self.records:
            self.records[key] = expert_record(self.checkpoint, self.starts, key)
        return self.records[key]

    def call_off_all_but(self, wanted: set[Key], layer: int):
        """Of a layer's guesses, leave unread what no reader has begun to read; a slot is free once the readers are out of it."""
        for key in [k for k in self.guesses & self.reading.keys() - wanted if k[0] == layer]:
            for part in self.reading[key]:
                part.cancel()
            self.guesses.discard(key)

    def end(self, key: Key):
        """See a read to its end that nobody asked for: a tenant, or a free slot where it failed or was called off."""
        try:
            self.land(key)
        except BaseException:  # what a reader met or died of; whoever asks for this expert will read it again, and be told
            pass

    def land(self, key: Key):
        """Wait until a slot is filled. However this fails, no slot that was not filled counts as filled; a Ctrl-C while it
        waits leaves the read as it is, under way."""
        started = time.perf_counter()
        while not self.shards.ended(self.reading[key]):
            pass
        self.statistics.seconds_waited += time.perf_counter() - started
        self.landed(key)

    @whole
    def landed(self, key: Key):
        """The readers are out of a slot: take it for filled, or give it back and say why."""
        try:
            for part in self.reading.pop(key):
                self.statistics.bytes_read += part.result()
        except BaseException:
            self.ram.forget(key)
            raise

    def arriving(self, hits: list[Key], rising: deque, missing: deque, coming: deque):
        """Yield the hits, then each miss as it lands, in the order in which they are read. An expert may be used until
        the next one is asked for: only then is its slot let go. However this ends, only what is being read is held."""
        try:
            for key in hits:
                yield key[1], self.expert(key)
                self.release(key)
                self.lift_next(rising)
                self.start_reading(missing, coming)
            while coming or missing:
                if not coming:
                    self.make_way()
                    self.start_reading(missing, coming)
                    continue
                self.land(coming[0])
                key = coming.popleft()
                yield key[1], self.expert(key)
                self.release(key)
                self.start_reading(missing, coming)
        finally:
            self.let_go()

    @whole
    def let_go(self):
        """Hold nothing but what is being read."""
        self.ram.held = set(self.reading)
        self.upper.held = self.ram.held if self.upper is self.ram else set()

    @whole
    def make_way(self):
        """Every slot is taken by what was read ahead: wait for one and let it go."""
        key = next(iter(self.reading))
        self.end(key)
        self.ram.held.discard(key)

    @whole
    def release(self, key: Key):
        """Let its slots be given to others."""
        self.ram.held.discard(key)
        self.upper.held.discard(key)

    @whole
    def lift_next(self, rising: deque):
        """Start copying up the first of those that lie in RAM, if a slot above is free; else it stays the first. In the order
        in which they are handed out: the slot that each release frees is then there for the one whose turn is next."""
        if rising and self.lift(rising[0]):
            rising.popleft()

    def lift(self, key: Key) -> bool:
        """Start copying an expert up, unless every slot there is held."""
        if key in self.upper.held or not self.upper.reserve(key):
            return key in self.upper.held
        try:
            self.crossing[key] = self.bus.carry(self.ram.room(key), self.upper.room(key))
        except BaseException:
            self.upper.forget(key)
            raise
        self.ram.held.discard(key)
        self.statistics.lifted += 1
        self.statistics.bytes_lifted += self.record(key).size
        return True

    @whole
    def expert(self, key: Key) -> nn.Module:
        """The expert's module in the tier that computes, its bytes copied up if they were not there."""
        if self.bus and not self.upper.hold(key):
            self.lift(key)
        if key in self.crossing:
            self.bus.arrived(self.crossing.pop(key))
        slot = self.upper.slot_of[key]
        if slot not in self.upper.experts:
            expert = self.expert_in(self.upper.rooms[slot], key)
            expert = self.compiler.form_of(expert) if self.compiler else expert
            self.upper.experts[slot] = GivingWay(expert, self.upper) if self.bus else expert
        return self.upper.experts[slot]

    def expert_in(self, room, key: Key) -> Expert:
        """The expert's module around its bytes."""
        expert = Expert.__new__(Expert)  # without __init__: making matrices to replace them would cost more than the rest
        nn.Module.__init__(expert)
        for part in PARTS:
            tensors = {kind: tensor_at(room, place) for (of, kind), place in self.record(key).places.items() if of == part}
            setattr(expert, part, self.linear(f"model.layers.{key[0]}.mlp.experts.{key[1]}.{part}", tensors))
        return expert

    def linear(self, name: str, parts: dict) -> nn.Module:
        """A matrix of an expert, from its bytes in a slot and what is kept of it for good."""
        if self.checkpoint.config.weight_format == "plain":
            return files.plain_linear(parts["weight"], self.device) if self.dtype in (None, parts["weight"].dtype) else WideningLinear(parts)
        if "weight" in parts:
            parts["weight_scale_inv"] = self.small(f"{name}.weight_scale_inv", parts)
        else:
            parts["weight_shape"] = self.small(f"{name}.weight_shape", parts)
        if self.dtype:
            return WideningLinear(parts)
        return files.linear_at_rest(parts, self.device, by_codes=self.device.type == "cpu", own=True)

    def small(self, full: str, parts: dict) -> torch.Tensor:
        """A tensor that lies far from its weights in the file and is small: kept once read, 250 MB for all of K2. With it
        the weights are looked at, once: what is read again was read before."""
        if full not in self.kept:
            if "weight" in parts and fp8_has_nan(parts["weight"]):
                raise K2Error(f"{self.checkpoint.where(full.removesuffix('_scale_inv'))}: expected finite numbers, found NaN. The shard is damaged: fetch it again.")
            small = (self.checkpoint.scale if "weight" in parts else self.checkpoint.tensor)(full)
            if "weight_packed" in parts:
                files.check_int4_shape(self.checkpoint, full.removesuffix(".weight_shape"), {**parts, "weight_shape": small})
            self.kept[full] = small.clone().to(self.device)
        return self.kept[full]


def called_off(parts: list[Future]) -> bool:
    """Whether some pieces of an expert will not be read."""
    return any(part.cancelled() for part in parts)


class GivingWay(nn.Module):
    """An expert on a device. Where its product finds no memory there, a slot is given up and it is tried again."""

    def __init__(self, expert: Expert, tier: Slots):
        super().__init__()
        self.expert, self.tier = expert, tier

    def forward(self, x_MD):
        return self.in_less_and_less(x_MD)

    def in_less_and_less(self, x_MD):
        """The answer, however many slots it takes."""
        while True:
            try:
                return self.expert(x_MD)
            except torch.OutOfMemoryError:
                if not self.tier.shrink():
                    raise K2Error("memory: the device has no room left beside one expert. Give less to --gpu-memory, or a shorter prompt.") from None
                torch.cuda.empty_cache()


class Visited(nn.Module):
    """An expert that stays in RAM and computes on the CPU: the rows travel to it, and its answer back."""

    def __init__(self, expert: Expert):
        super().__init__()
        self.expert = expert

    def forward(self, x_MD):
        return self.expert(x_MD.cpu()).to(x_MD.device)


class WideningLinear(OneRow, nn.Module):
    """A matrix that stays in its stored form, its tensors given by kind, and is widened to x's dtype for each product: the
    same numbers, by the same kernels, as of one that was widened at load."""

    def __init__(self, parts: dict):
        super().__init__()
        self.parts = parts

    def many_rows(self, x_MI):
        """x W^T."""
        return many_rows_product(x_MI, self.widened(x_MI.dtype))

    def one_row(self, x_MI):
        """W x."""
        return single_row_product(x_MI, self.widened(x_MI.dtype))

    def widened(self, dtype):
        """The matrix, (O, I). What the store hands out has no NaN among its codes."""
        if "weight_scale_inv" in self.parts:
            return fp8_dequantize(self.parts["weight"], self.parts["weight_scale_inv"], dtype, finite=True)
        if "weight_packed" in self.parts:
            return int4_dequantize(self.parts["weight_packed"], self.parts["weight_scale"], dtype)
        return self.parts["weight"].to(dtype)


class StoredExperts(nn.Module):
    """One layer's experts, wherever they are: the `fetch` of moe.Experts."""

    def __init__(self, store: ExpertStore, layer: int):
        super().__init__()
        self.store, self.layer = store, layer

    def fetch(self, ids: list[int]):
        """Yield (id, expert) for each id asked for, as they become available; reads start now."""
        return self.store.fetch(self.layer, ids)


class VisitedExperts(StoredExperts):
    """The same for a model on a GPU whose experts compute on the CPU."""

    def fetch(self, ids: list[int]):
        """Yield (id, expert that takes rows from anywhere)."""
        return ((e, Visited(expert)) for e, expert in super().fetch(ids))


def guess_ahead(layer, arguments, following=None):
    """Before a decoder layer runs: let its router judge what attention has not changed yet, and read what it would ask for.
    The router of the layer that follows says what to read once this one's experts are all read."""
    x_TD = arguments[0].flatten(0, -2)
    store = layer.mlp.experts.store
    store.ahead(*guess(layer, x_TD, AHEAD))
    store.soon = guess(following, x_TD, SOON) if following else None


def guess_first(first, layer, arguments):
    """The same before the last dense layer, for the first one with experts."""
    first.mlp.experts.store.ahead(*guess(first, arguments[0].flatten(0, -2), SOON))


def guess(layer, x_TD, each: int) -> tuple[int, list[int], int]:
    """(a layer's number, the experts that its router would choose now, most wanted first, how many of them to read)."""
    expert_ids_TK, _ = layer.mlp.gate(layer.post_attention_layernorm(x_TD))
    ids, counts = expert_ids_TK.unique(return_counts=True)
    most_wanted = expert_ids_TK[0] if len(x_TD) == 1 else ids[counts.argsort(descending=True, stable=True)]
    return layer.mlp.experts.layer, most_wanted.tolist(), each * len(x_TD)


# ---- how much fits ----


def weight_bytes(checkpoint: Checkpoint, dtype, device=torch.device("cpu")) -> tuple[int, int]:
    """(routed experts, all else that must be in memory), bytes, in the stored format or widened as resolved_dtypes says.

    The embedding is not counted, as its rows are read from the map. The experts' small tensors count as all else.
    """
    sizes, (of_experts, of_the_rest) = {True: 0, False: 0}, resolved_dtypes(checkpoint.config, dtype, device)
    for name, spec in expected_tensors(checkpoint.config).items():
        entry = checkpoint.headers[checkpoint.weight_map[name]][name]
        stored = entry["data_offsets"][1] - entry["data_offsets"][0]
        widened_to = of_experts if ".mlp.experts." in name else of_the_rest
        widened = math.prod(spec.shape) * (NIBBLES if name.endswith("packed") else 1) * (widened_to.itemsize if widened_to else 1)
        if "embed_tokens" not in name:
            sizes[".mlp.experts." in name and not name.endswith(SMALL)] += stored if widened_to is None else widened
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


def load(directory, device="cpu", dtype="auto", gpu_memory=None, ram=None, layers: int | None = None, compiled: bool = False, experts_on: str = "device") -> K2:
    """A model with a checkpoint's weights, ready to run: `checkpoint.load` where all experts fit into the device's
    memory, and else with an expert store in their place.

    ram and gpu_memory are the bytes that weights may take in either; the non-routed ones lie on the device and count
    there. Without a number it is nine tenths of what is free now. The tokens do not depend on them. With `layers` it is
    the model of that many first layers; `compiled` lets torch.compile make the products of decode and widen a prompt's
    FP8 experts; `experts_on` "cpu" leaves the experts in RAM and computes them there, which rounds differently from a
    GPU. Raises K2Error if the non-routed weights and one expert do not fit.
    """
    checkpoint, device = Checkpoint(directory, layers), torch.device(device)
    if gpu_memory is not None and device.type == "cpu":
        raise K2Error("--gpu-memory: set for a model on the CPU; expected a GPU. Use --ram, or --device cuda.")
    of_experts, _ = resolved_dtypes(checkpoint.config, dtype, device)
    routed, rest = weight_bytes(checkpoint, dtype, device)
    ram = int(free_memory() * TAKEN) if ram is None else ram
    on_gpu = device.type != "cpu"
    room = ram if not on_gpu else gpu_memory if gpu_memory is not None else int(torch.cuda.mem_get_info(device)[0] * TAKEN)
    if room < rest:
        raise K2Error(f"{directory}: the weights that every token needs take {rest:,} bytes; expected at most the {room:,} given. Give more with {'--gpu-memory' if on_gpu else '--ram'}, or use a machine with more memory.")
    make_experts, compiler = files.resident_experts, Compiler(device, experts=of_experts is None) if compiled else None
    of_stored = compiler if of_experts is None else None
    if experts_on == "cpu" and routed:
        make_experts = ExpertStore(checkpoint, ram if on_gpu else ram - rest, dtype=of_experts, compiler=of_stored).visited_layer
    elif routed + rest > room:
        tiers = (ram, device, room - rest) if on_gpu else (ram - rest,)
        store = ExpertStore(checkpoint, *tiers, dtype=of_experts, compiler=of_stored)
        make_experts = store.layer
    model = filled_model(checkpoint, device, dtype, make_experts)
    model.register_forward_pre_hook(lambda *_: checkpoint.check_unchanged())
    model = model if make_experts is files.resident_experts else with_guesses(model)
    return with_compiled_products(model, compiler) if compiled else model


def with_guesses(model: K2) -> K2:
    """The model, its layers with experts told to read ahead."""
    dense, layers = model.model.layers[: model.config.first_k_dense_replace], model.model.layers[model.config.first_k_dense_replace :]
    for layer, following in zip(layers, [*layers[1:], None]):
        layer.register_forward_pre_hook(functools.partial(guess_ahead, following=following))
    if dense and layers:
        dense[-1].register_forward_pre_hook(functools.partial(guess_first, layers[0]))
    return model


def store_of(model: K2) -> ExpertStore | None:
    """The store that a model's experts come from; None where they are resident."""
    return next((module.store for module in model.modules() if isinstance(module, StoredExperts)), None)
