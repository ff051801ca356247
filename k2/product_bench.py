"""How fast one token's products read their weights, at K2's own widths: `python -m k2 bench --products`. No weights needed.
With `--rows N` it is N tokens', as in a prompt, which are bound by arithmetic: only the lines compare then, not the shares.

An expert in each format and each form that this project has for it, beside the best reading of memory in the same run.
Copies take turns, more than a processor's cache holds; the forms take turns too, so that a machine that is slower for a
while is slower for all. The INT4 line counts scales as they lie beside the packed weights while it computes, twice as
large as in the file.
"""

import copy
import time
from statistics import median

import torch
from torch import nn

from .ceilings import keep_freed_memory, ram_bandwidth
from .compiled import Compiled, Compiler
from .config import K2Config
from .machine import module_of
from .needs import in_format
from .quantization import INT4KernelLinear

COPIES = 6  # of an expert; six in INT4 are 165 MB
TOKENS = 2  # that each copy answers when its form's turn comes


def forms(config: K2Config, compiled: bool) -> dict[str, nn.Module]:
    """One expert of a model in each form."""
    made = {format: module_of(in_format(config, format), "expert", torch.device("cpu")) for format in ("bf16", "fp8", "int4")}
    plain = copy.deepcopy(made["bf16"])
    for name, linear in list(plain.named_children()):
        setattr(plain, name, library_linear(linear))
    found = {"bf16, F.linear": plain, "bf16": made["bf16"], "fp8": made["fp8"], "int4": made["int4"]}
    if compiled:
        compiler = Compiler()  # which leaves to torch.mv what products.py gives it: here is what bfloat16 would be
        found["bf16, compiled"] = Compiled(made["bf16"], compiler.expert, [linear.weight for linear in made["bf16"].children()])
        found["fp8, compiled"] = compiler.form_of(copy.deepcopy(made["fp8"]))
    return found


def library_linear(linear: nn.Linear) -> nn.Linear:
    """The same matrix by F.linear, whatever the rows."""
    with torch.device("meta"):
        made = nn.Linear(linear.in_features, linear.out_features, bias=False)
    made.weight = linear.weight
    return made


def bytes_of(expert: nn.Module) -> int:
    """What an answer to one row reads."""
    expert = getattr(expert, "plain", expert)
    size = sum(t.numel() * t.element_size() for t in expert.state_dict().values())
    scales = (m.weight_scale for m in expert.modules() if isinstance(m, INT4KernelLinear))
    return size + sum(t.numel() * t.element_size() for t in scales)


@torch.inference_mode()
def measure(config: K2Config, rounds: int, compiled: bool, copies: int = COPIES, rows: int = 1) -> dict[str, tuple[float, float]]:
    """{form: (bytes a second, share of the reading in the same round)}, medians, and "reading" itself."""
    keep_freed_memory()
    x_MD = torch.randn(rows, config.hidden_size, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    experts = {name: [expert, *(copy.deepcopy(expert) for _ in range(copies - 1))] for name, expert in forms(config, compiled).items()}
    for same in experts.values():  # INT4 is brought into its kernel's order, and what is compiled is compiled, at the first use
        [expert(x_MD) for expert in same]
    found = {name: [] for name in ["reading", *experts]}
    for _ in range(rounds):
        reading = ram_bandwidth()
        found["reading"].append((reading, 1.0))
        for name, same in experts.items():
            started = time.perf_counter()
            for _ in range(TOKENS):
                [expert(x_MD) for expert in same]
            rate = TOKENS * sum(map(bytes_of, same)) / (time.perf_counter() - started)
            found[name].append((rate, rate / reading))
    return {name: (median(r for r, _ in pairs), median(s for _, s in pairs)) for name, pairs in found.items()}


def bench(config: K2Config, rounds: int, compiled: bool, rows: int = 1):
    """Print the table."""
    found = measure(config, rounds, compiled, rows=rows)
    D, width = config.hidden_size, config.moe_intermediate_size
    print(f"{rows} token{'s' * (rows > 1)} through an expert of {D} x {width}, {torch.get_num_threads()} threads, medians of {rounds} rounds; memory was read at {found['reading'][0] / 1e9:.1f} GB/s")
    print(f"{'form':16}{'GB/s':>8}{'of the reading':>16}")
    for name, (rate, share) in found.items():
        if name != "reading":
            print(f"{name:16}{rate / 1e9:8.1f}{share:16.0%}")
