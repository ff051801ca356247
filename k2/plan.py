"""What a model needs and how fast a machine can run it, from its config alone: no weights, no network

    seconds per token = rest + max(routed, bus, disk) + last + layers x fixed
        rest     every token reads all weights that are no routed experts        bytes / what the products take a second
        routed   and the chosen experts: 8 of 384 in each of K2's 60 layers      bytes / the same, while experts arrive
        bus      those not in the GPU's memory cross the bus                     missing share x bytes / bus bandwidth
        disk     those in no memory come from the disk                           missing share x bytes / disk bandwidth
        last     a layer's last expert is computed when nothing arrives any more, or its first arrives when there is
                 nothing to compute: an eighth of the shorter of the two, where experts arrive from elsewhere
        fixed    Python, the router and small operations, however wide the model is: measured on a narrow one

The limit is what no program with this share of experts in memory can beat: the slowest of the tiers, all at their full
bandwidth at once. Experts in RAM may cross the bus or be computed by the CPU there, whichever is faster. Bandwidths are
measured (k2/machine.py), or given by flags to plan for a machine that one does not have; what the products take a second
is always measured on this machine's processor, unless the bandwidth they read at is given: then it is that bandwidth.
"""

import json
import os
import shlex
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from .config import K2Config, K2Error
from .generation import chunk_size
from .machine import Machine, Speeds, measured_speeds
from .needs import FAMILY, MINI, Needs, family_config, formats_in_memory, needs, own_format, stale_buffers

WELL = 1.0  # tokens a second from which on this page says that a machine runs a model well



@dataclass(frozen=True)
class Seconds:
    """Where a token's time goes, in seconds, and the shares of all experts that lie in either memory."""

    gpu_share: float
    ram_share: float
    rest: float
    routed: float
    bus: float
    disk: float
    last: float
    fixed: float
    limit: float

    @property
    def planned(self) -> float:
        """What this project should take; see the formula above."""
        return self.rest + max(self.routed, self.bus, self.disk) + self.last + self.fixed


def shares(found: Needs, machine: Machine, context: int) -> tuple[float, float]:
    """The shares of experts that fit into the GPU's memory and, beyond those, into RAM. Raises K2Error if what every
    token needs does not fit."""
    cache, rest = found.cache_per_token * context, sum(found.rest.values())
    first = machine.gpu_memory or machine.ram
    if first < rest + cache + found.expert:
        raise K2Error(f"memory: {first:,} bytes are free for what every token reads; expected {rest + cache + found.expert:,}: {rest:,} of weights, {cache:,} of cache, one expert. Plan with more, or for a smaller model.")
    everything = max(found.expert * found.experts, 1)
    on_gpu = min(1.0, (machine.gpu_memory - rest - cache) / everything) if machine.gpu_memory else 0.0
    in_ram = machine.ram if machine.gpu_memory else machine.ram - rest - cache
    return on_gpu, max(0.0, min(1.0 - on_gpu, in_ram / everything))


def seconds_per_token(found: Needs, machine: Machine, speeds: Speeds | None, context: int = 0, hits: float | None = None) -> Seconds:
    """The formula. Without `speeds` the products are as fast as the memory and nothing is fixed. `hits` is the share of
    chosen experts found in memory where it is known; else routing is taken to be even, and the share is that which fits."""
    on_gpu, in_ram = shares(found, machine, context)
    bandwidth = machine.gpu_bandwidth if machine.gpu_memory else machine.ram_bandwidth
    rates = {kind: min(bandwidth, speeds.rates[kind]) if speeds else bandwidth for kind in [*found.rest, "expert"]}
    rest, routed = sum(size / rates[kind] for kind, size in found.rest.items()), found.routed / rates["expert"]
    cache = found.cache_per_token * context / bandwidth
    missing = 1 - (on_gpu + in_ram if hits is None else hits)
    bus = (1 - on_gpu if hits is None else 1 - min(on_gpu, hits)) * found.routed / machine.bus_bandwidth if machine.gpu_memory else 0.0
    disk = missing * found.routed / machine.disk_bandwidth if missing > 0 else 0.0
    # Without a GPU all is read from RAM. With one the experts outside it go through RAM once: over the bus, or to the CPU.
    away = bus * machine.bus_bandwidth
    first = (sum(found.rest.values()) + found.routed - away) / bandwidth + cache
    beside = away / max(machine.bus_bandwidth, machine.ram_bandwidth) if away else 0.0
    last = min(routed, max(bus, disk)) / found.chosen
    return Seconds(on_gpu, in_ram, rest + cache, routed, bus, disk, last, found.layers * speeds.layer if speeds else 0.0, max(first, beside, disk))


# ---- in words ----


@dataclass(frozen=True)
class Plan:
    """One model on one machine. `seconds` is None where it does not fit, and `obstacle` then says why."""

    name: str
    config: K2Config
    found: Needs
    seconds: Seconds | None
    obstacle: str
    speeds: Speeds | None
    given: bool = False  # the products read at a bandwidth given by a flag, and not at what was measured here
    beside_gpu: bool = False  # planned for the CPU alone, as the GPU has no room for what every token reads

    @property
    def rate(self) -> float:
        """Tokens a second as planned; 0 where it does not fit."""
        return 1 / self.seconds.planned if self.seconds else 0.0


def plan(name: str, config: K2Config, machine: Machine, context: int = 0, hits: float | None = None, measure: bool = True, given=frozenset()) -> Plan:
    """Plan a model in the format that the program would keep it in. What needs more disk than is free does not fit; what
    has no room on the GPU is planned for the CPU. `given` names what of the machine was given and not measured."""
    if machine.gpu_memory and not has_room(config, machine, context):
        return replace(plan(name, config, replace(machine, gpu_memory=0), context, hits, measure, given), beside_gpu=True)
    fast = ("gpu_bandwidth" if machine.gpu_memory else "ram_bandwidth") in given
    formats = formats_in_memory(config, "cuda" if machine.gpu_memory else "cpu")
    found = needs(config, *formats)
    try:
        resident = sum(shares(found, machine, context)) >= 1
        device = torch.device("cuda" if machine.gpu_memory and torch.cuda.is_available() else "cpu")
        speeds = measured_speeds(config, *formats, resident, device) if measure else None
        if speeds and fast:  # another machine's products are not measured here: taken to be as fast as its memory
            speeds = Speeds(dict.fromkeys(speeds.rates, float("inf")), speeds.layer)
        seconds = seconds_per_token(found, machine, speeds, context, hits)
    except K2Error as error:
        return Plan(name, config, found, None, str(error), None)
    return Plan(name, config, found, seconds, obstacle_of(name, config, machine, context), speeds, fast)


def has_room(config: K2Config, machine: Machine, context: int) -> bool:
    """Whether what every token reads, and one expert, fit into the GPU."""
    try:
        shares(needs(config, *formats_in_memory(config, "cuda")), machine, context)
    except K2Error:
        return False
    return True


def obstacle_of(name: str, config: K2Config, machine: Machine, context: int) -> str:
    """What keeps a model that has room in memory from running: its context, or the disk for what is not there yet."""
    if context > config.max_position_embeddings:
        return f"context: {context:,} tokens; expected at most {config.max_position_embeddings:,}"
    folder = MINI if FAMILY.get(name, ("", ""))[1] is None and name in FAMILY else Path(name)
    missing = needs(config, own_format(config)).disk - sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return f"disk: {machine.disk:,} bytes are free; expected {missing:,}" if missing > machine.disk else ""


def amount(size: float) -> str:
    """Bytes as GB, or MB or KB where GB would show few digits or none."""
    unit, name = (1e9, "GB") if size >= 1e9 or not size else (1e6, "MB") if size >= 1e6 else (1e3, "KB")
    return f"{size / unit:,.2f} {name}"


def machine_lines(machine: Machine) -> list[str]:
    """What the machine has, and how fast each tier is."""
    gpu = f"GPU {machine.gpu_memory / 1e9:,.1f} GB at {machine.gpu_bandwidth / 1e9:,.1f} GB/s, behind a bus of {machine.bus_bandwidth / 1e9:,.1f} GB/s" if machine.gpu_memory else "no GPU"
    return [f"machine: RAM {machine.ram / 1e9:,.1f} GB free at {machine.ram_bandwidth / 1e9:,.1f} GB/s; {gpu}; disk {machine.disk / 1e9:,.1f} GB free at {machine.disk_bandwidth / 1e9:,.2f} GB/s"]


def needs_lines(config: K2Config, context: int) -> list[str]:
    """A line for each format, the released one first: what it takes on disk and in memory."""
    own = own_format(config)
    found = needs(config, own)
    lines = [f"weights: {found.weights / 1e9:,.3f} billion in all, which disk and memory must hold; {found.active / 1e9:,.3f} billion active, which one token meets",
             f"cache: {found.cache_per_token:,} bytes a token of context, {amount(found.cache_per_token * context)} for {context:,} tokens",
             f"{'format':16}{'on disk GB':>12}{'resident GB':>13}{'at least GB':>13}{'an expert MB':>14}{'experts a token GB':>20}"]  # fmt: skip
    for format in dict.fromkeys([own, "bf16", "fp8", "int4"]):
        try:
            x = needs(config, format)
        except K2Error:
            continue
        least = sum(x.rest.values()) + x.expert + x.cache_per_token * context
        lines.append(f"{format + (' (released)' if format == own else ''):16}{x.disk / 1e9:>12,.2f}{x.memory / 1e9:>13,.2f}{least / 1e9:>13,.2f}{x.expert / 1e6:>14,.2f}{x.routed / 1e9:>20,.2f}")
    stale, size = stale_buffers(config)
    return lines + ([f"on disk: {found.tensors:,} tensors, {found.disk:,} bytes; with {stale} stale buffers of the released file {found.tensors + stale:,} and {found.disk + size:,}"] if stale else
                    [f"on disk: {found.tensors:,} tensors, {found.disk:,} bytes"])  # fmt: skip


def seconds_lines(p: Plan, machine: Machine, context: int = 0) -> list[str]:
    """The formula with its numbers."""
    if not p.seconds:
        return [f"{'does not fit' if p.obstacle.startswith('memory') else 'not planned'}: {p.obstacle}"]
    s, x, fixed = p.seconds, p.found, p.speeds.layer if p.speeds else 0.0
    cache = x.cache_per_token * context
    read = sum(x.rest.values()) + cache
    rate = f"{amount(read)} at {read / s.rest / 1e9:,.2f} GB/s"
    missing = max(0.0, 1 - s.gpu_share - s.ram_share)
    lines = [f"experts: {x.experts:,} of {x.expert / 1e6:,.2f} MB; {s.gpu_share:.1%} fit into the GPU, {s.ram_share:.1%} into RAM, {missing:.1%} stay on disk",
             "seconds a token = rest + max(routed, bus, disk) + last + layers x fixed",
             f"  rest    {rate:40} = {s.rest:9.4f}{f'  of it cache {amount(cache)}' if cache else ''}",
             f"  routed  {f'{amount(x.routed)} at {x.routed / s.routed / 1e9:,.2f} GB/s':40} = {s.routed:9.4f}"]  # fmt: skip
    if s.bus:
        lines.append(f"  bus     {f'{amount(s.bus * machine.bus_bandwidth)} at {machine.bus_bandwidth / 1e9:,.2f} GB/s':40} = {s.bus:9.4f}")
    if s.disk:
        lines.append(f"  disk    {f'{amount(s.disk * machine.disk_bandwidth)} at {machine.disk_bandwidth / 1e9:,.2f} GB/s':40} = {s.disk:9.4f}")
    if s.last:
        lines.append(f"  last    {f'of {x.chosen} experts, not at the same time':40} = {s.last:9.4f}")
    lines.append(f"  fixed   {f'{x.layers} layers x {fixed * 1e3:,.2f} ms':40} = {s.fixed:9.4f}  measured on this machine")
    lines.append(f"  rest and routed at {'the bandwidth given by a flag' if p.given else 'what the products take a second, measured on this machine'}")
    if p.beside_gpu:
        lines.append("  the GPU has no room for what every token reads: planned for the CPU alone, --device cpu")
    lines.append(f"planned: {s.planned:.4g} s a token, {1 / s.planned:.4g} tokens/s; the limit of its bandwidths, all tiers at once and at full rate: {s.limit:.4g} s, {1 / s.limit:.4g} tokens/s")
    if s.disk:
        size = missing * x.experts * x.expert
        lines.append(f"prompt: nearly all experts on the disk are read for each {chunk_size(p.config):,} tokens: {amount(size)}, at least {size / machine.disk_bandwidth:,.3g} s")
    return lines + ([f"but: {p.obstacle}"] if p.obstacle else [])


def measured_line(rounds: list[tuple[Plan, float]]) -> str:
    """What a token really took, beside what was planned: medians of a few rounds, each planned afresh and then measured, as
    a machine that others use too is not the same from one minute to the next."""
    seconds = [measured for _, measured in rounds]
    middle = f"measured: {median(seconds):.4g} s a token, {1 / median(seconds):.4g} tokens/s"
    if not all(p.seconds for p, _ in rounds):
        return middle
    off = sorted(p.seconds.planned / measured - 1 for p, measured in rounds)
    return f"{middle}; planned over measured, of {len(off)} rounds: {median(off):+.0%} ({off[0]:+.0%} to {off[-1]:+.0%})"


def family_lines(plans: list[Plan], context: int = 0) -> list[str]:
    """A line for each member: what it takes, and how fast it would be here."""
    lines = [f"{'model':16}{'weights':>11}{'active':>9}{'format':>8}{'disk GB':>10}{'at least GB':>13}{'planned tokens/s':>18}{'limit':>10}"]
    for p in plans:
        least = sum(p.found.rest.values()) + p.found.expert + p.found.cache_per_token * context
        speed = f"{p.rate:>18.3g}{1 / p.seconds.limit:>10.3g}" if p.seconds else f"{'-':>18}{'-':>10}"
        released = needs(p.config, own_format(p.config))
        lines.append(f"{p.name:16}{released.weights / 1e9:>10,.4g}B{released.active / 1e9:>8,.3g}B{released.format:>8}{released.disk / 1e9:>10,.2f}{least / 1e9:>13,.2f}{speed}  {'on the CPU  ' if p.beside_gpu and p.seconds else ''}{p.obstacle}")
    return lines


def best(plans: list[Plan]) -> Plan:
    """The largest member that fits and runs well; of equals the first. Where none does, the smallest."""
    well = [p for p in plans if not p.obstacle and p.rate >= WELL] or [min(plans, key=lambda p: p.found.weights)]
    return max(well, key=lambda p: p.found.weights)


def advice(plans: list[Plan]) -> list[str]:
    """Which member this machine runs well, if any, and what to type next."""
    chosen = best(plans)
    if chosen.obstacle or not chosen.seconds:
        block = next((p for p in plans if FAMILY[p.name][1]), chosen)
        return ["no model of the family fits this machine. One attention block does. Next:", f"    {next_command(block)}"]
    well = f"runs {chosen.name} well" if chosen.rate >= WELL else f"runs none well; best {chosen.name}"
    return [f"this machine {well}, at {chosen.rate:.3g} tokens/s. Next:", f"    {next_command(chosen)}"]


def next_command(p: Plan) -> str:
    """What to type now to run this member, or one real attention block of a member that does not fit."""
    device = " --device cpu" if p.beside_gpu else ""
    if p.name not in FAMILY:  # a path: there is nothing to fetch
        folder = Path(p.name) if os.path.isdir(p.name) else Path(p.name).parent
        runs = p.seconds and not p.obstacle and any(folder.glob("*.safetensors"))
        return f'python -m k2 generate "def " --model {shlex.quote(str(folder))}{device}' if runs else f"python -m k2 inspect {shlex.quote(str(folder))}"
    repository = FAMILY[p.name][1]
    if repository is None:
        return f'python -m k2 generate "def "{device}'
    part = " --layers 1 --part attention" if p.obstacle or not p.seconds else ""
    return f"python download_weights.py {repository} --local-dir weights/{p.name}{part}"


def whole_family(machine: Machine, context: int = 0, hits: float | None = None, given=frozenset()) -> list[Plan]:
    """Every member planned. Members of one size and format share their measured speeds."""
    plans: list[Plan] = []
    for name in FAMILY:
        config = family_config(name)
        found = [needs(config, *formats_in_memory(config, device)) for device in ("cpu", "cuda")]
        twin = next((p for p in plans if p.found in found), None)
        obstacle = twin and (obstacle_of(name, config, machine, context) if twin.seconds else twin.obstacle)
        plans.append(replace(twin, name=name, config=config, obstacle=obstacle) if twin else plan(name, config, machine, context, hits, given=given))
    return plans


def as_json(plans: list[Plan], machine: Machine) -> str:
    """The same numbers for programs."""
    models = {p.name: {"needs": asdict(p.found), "seconds": asdict(p.seconds) | {"planned": p.seconds.planned} if p.seconds else None, "obstacle": p.obstacle, "device": "cpu" if p.beside_gpu or not machine.gpu_memory else "cuda",
                       "formats": {f: {"disk": needs(p.config, f).disk, "memory": needs(p.config, f).memory} for f in [own_format(p.config), "bf16"]}} for p in plans}  # fmt: skip
    return json.dumps({"machine": asdict(machine), "models": models}, indent=1)
