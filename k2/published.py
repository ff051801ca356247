"""What others report for K2 and its like, between the planner's own lines: `python -m k2 plan --published`.

Each report's machine goes through plan.seconds_per_token, the formula that plans this one: its limit is the 100 % line.
The bytes follow from a config where the model is of this family's shape, and are the authors' own where it is another. A
bandwidth that is nobody's measurement is channels x transfer rate, and says "theory"; the cards' are their makers'. All
speeds are the authors' claims for one request, not repeated here.
"""

from dataclasses import replace
from typing import NamedTuple

from .machine import Machine
from .needs import Needs, family_config, needs
from .plan import Seconds, seconds_per_token

DEEPSEEK_V3 = {"n_routed_experts": 256, "first_k_dense_replace": 3, "num_attention_heads": 128, "num_key_value_heads": 128}  # else K2's sizes
CARDS = {"no GPU": (0, 0.0, 0.0), "4090": (24, 1008, 32), "4090D": (24, 1008, 32), "RTX PRO 6000": (96, 1792, 64)}  # GB, its GB/s, its bus' GB/s
AMPLE = 2**41  # bytes of RAM, of machines that hold the whole model in it


class Published(NamedTuple):
    """One report. `model` is of K2's or V3's shape, or so many gigabytes a token from the disk that the authors give, with
    what their hit rate saved taken off."""

    source: str
    hardware: str
    card: str
    name: str
    model: str | float
    bits: float
    tier: str
    bandwidth: float  # GB/s
    reported: float  # tokens/s
    why: str


REPORTS = (
    Published("ktransformers, DeepSeek tutorial", "1 socket, 8 x DDR5-4800, RTX 4090D", "4090D", "V3 Q4_K_M", "V3", 4.85, "RAM, theory", 307, 8.7, "one socket's cores do not use all its channels"),
    Published("ktransformers, DeepSeek tutorial", "2 sockets, RTX 4090", "4090", "V3 Q4_K_M", "V3", 4.85, "RAM, theory", 614, 13.5, "a second socket adds half: experts read across the sockets' link"),
    Published("llama.cpp, measured by ktransformers", "2 sockets, RTX 4090", "4090", "V3 Q4_K_M", "V3", 4.85, "RAM, theory", 614, 4.5, "BELOW: it spread memory over both sockets without regard to which core reads; of one socket's 307 GB/s it is 18 %"),
    Published("ktransformers, Kimi-K2 page", "1 socket, 8 x DDR5-4800 assumed, 1 GPU", "4090", "K2 Q4_K_M", "K2", 4.85, "RAM, theory", 307, 10, "the best of the tuned engines on one socket"),
    Published("ktransformers, Kimi-K2 page", "2 sockets, 1 GPU", "4090", "K2 Q4_K_M", "K2", 4.85, "RAM, theory", 614, 14, "the second socket again adds half"),
    Published("ktransformers issue 314", "EPYC 9654, 12 x DDR5-4800, RTX 4090", "4090", "R1 Q4", "V3", 4.85, "RAM, theory", 461, 14, "at 1,000 tokens; 10 tokens/s at 10,000, where attention takes its share"),
    Published("ktransformers issue 797", "2 x EPYC 9135, 24 x DDR5-6400, RTX 4090", "4090", "R1 Q4", "V3", 4.85, "RAM, theory", 1229, 17.3, "by the planner the card would be the slowest; 16 cores a socket cannot ask for 614 GB/s"),
    Published("kt-kernel issue 1730", "Xeon 6960P, 12 x MRDIMM-8800, RTX PRO 6000", "RTX PRO 6000", "K2-Thinking INT4", "K2", 4.5, "RAM, theory", 845, 9.5, "a first version of its INT4 product: bound by arithmetic, not by memory"),
    Published("llama.cpp issue 14642", "2 x EPYC 9355, 23 x DDR5-5600 assumed, RTX PRO 6000", "RTX PRO 6000", "K2 Q4_K_XL", "K2", 4.35, "RAM, theory", 1030, 22.1, "a large GPU holds a part of the experts, and two sockets cost what they gain"),
    Published("ik_llama.cpp issue 612", "EPYC 9965, no GPU", "no GPU", "K2 IQ2_KL", "K2", 2.9, "RAM, measured", 256, 13.4, "nearest to its limit: measured bandwidth, one socket, its own layout of weights"),
    Published("study of K2.5 on a CPU", "EPYC 9175F, 12 x DDR5-6400, no GPU", "no GPU", "K2.5 Q4_K_S", "K2", 4.57, "RAM, theory", 614, 11, "16 cores; reported as 10 to 12"),
    Published("colibri README", "25 GB RAM, disk of about 1 GB/s", "no GPU", "GLM-5.2 int4", 11.4, 4.0, "disk, about", 1.0, 0.075, "cold cache; reported as 0.05 to 0.1, and the disk as about 1 GB/s"),
    Published("colibri README", "62 GB RAM, Gen4 disk, RTX 5070 Ti", "no GPU", "GLM-5.2 int4", 3.1, 4.0, "disk, measured", 5.9, 0.98, "55 % of the experts found in memory; reading and computing overlap in part"),
    Published("colibri README", "121 GB RAM, Gen5 disk, RTX 5090", "no GPU", "GLM-5.2 int4", 3.4, 4.0, "disk, measured", 11.5, 1.23, "a disk twice as fast, and then other things are in the way"),
    Published("colibri issue 720", "36 GB resident, disk of 3.5 GB/s observed", "no GPU", "Kimi K3 MXFP4", 17.0, 4.25, "disk, observed", 3.5, 0.2, "bound by its disk and nothing else; 17 to 20 GB a token"),
    Published("flash-moe", "M3 Max 48 GB, SSD of 17.5 GB/s", "no GPU", "Qwen3.5-397B 4 bit, 4 of its 10 experts", 0.5, 4.0, "disk, measured", 17.5, 4.4, "71 % of reads come from the page cache; bound by the GPU's arithmetic"),
)  # fmt: skip


def needs_of(report: Published) -> Needs:
    """The report's model in its format: bf16's bytes times bits over 16, every kind of tensor alike."""
    config = family_config("instruct")
    found = needs(replace(config, **DEEPSEEK_V3) if report.model == "V3" else config, "bf16")
    if isinstance(report.model, float):  # all that is known of it: what a token reads from the disk
        return replace(found, rest={}, routed=int(report.model * 1e9), expert=1, experts=1)
    share = report.bits / 16
    return replace(found, rest={kind: int(size * share) for kind, size in found.rest.items()}, routed=int(found.routed * share), expert=int(found.expert * share))


def machine_of(report: Published) -> Machine:
    """The report's machine, as the planner takes one. Where a disk is what limits, RAM is taken to be no obstacle."""
    memory, rate, bus = (int(gigabytes * 1e9) for gigabytes in CARDS[report.card])
    given = int(report.bandwidth * 1e9)
    from_disk = isinstance(report.model, float)
    return Machine(ram=AMPLE, gpu_memory=memory, disk=AMPLE, ram_bandwidth=1e15 if from_disk else given, disk_bandwidth=given, bus_bandwidth=bus, gpu_bandwidth=rate)


def seconds(report: Published) -> Seconds:
    """The planner's answer. An engine that computes experts where they are needs no bus for them, and the limit knows."""
    return seconds_per_token(needs_of(report), machine_of(report), None, hits=0.0 if isinstance(report.model, float) else None)


def limit(report: Published) -> float:
    """Tokens a second at the planner's limit: the 100 % line. The 10 % line is a tenth of it."""
    return 1 / seconds(report).limit


def slowest(report: Published) -> tuple[str, float, float]:
    """(which tier sets the limit, its GB/s, the GB that a token moves through it)."""
    found, machine = seconds(report), machine_of(report)
    beside = found.bus * machine.bus_bandwidth / max(machine.bus_bandwidth, machine.ram_bandwidth) if machine.gpu_memory else 0.0
    on_card = machine.gpu_memory and found.limit > max(beside, found.disk)
    tier, rate = ("the card, theory", machine.gpu_bandwidth / 1e9) if on_card else (report.tier, report.bandwidth)
    return tier, rate, found.limit * rate


def is_between(report: Published) -> bool:
    """Whether the reported speed lies between the two lines."""
    return 0.1 * limit(report) <= report.reported <= limit(report)


def page() -> str:
    """The table as Markdown."""
    between = sum(map(is_between, REPORTS))
    lines = [
        "# Published speeds between the planner's lines", "",
        "Made by `python -m k2 plan --published`; a test compares. The 100 % line is the limit that `python -m k2 plan` gives for the machine: all of its tiers", "at full bandwidth at once, and no program crosses it. "
        "A card holds first what every token reads, then experts; the tier named is", "the slowest, with what a token moves through it at the limit. Speeds are the authors' own, for one request. Reports that name no", "bandwidth for any tier are left out.", "",
        f"{between} of {len(REPORTS)} lie between a tenth of that line and the line.", "",
        "| who | hardware | model | GB a token, tier | GB/s | 10 % | **reported** | 100 % | share | why not all of it, as we read it |", "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in REPORTS:
        tier, rate, moved = slowest(r)
        lines.append(f"| {r.source} | {r.hardware} | {r.name} | {moved:.3g}, {tier} | {rate:g} | {limit(r) / 10:.2g} | **{r.reported:g}** | {limit(r):.3g} | {r.reported / limit(r):.0%} | {r.why} |")
    return "\n".join([*lines, "", "What repeats: products for few bits are bound by arithmetic before memory is full; two sockets give half as much again as one; and on a",
                      "disk, engines that read whole experts past the page cache come near their line while those that map files do not.", ""])  # fmt: skip
