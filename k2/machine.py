"""What a machine has and what this project's code reaches on it: free bytes of each tier, and rates, measured.

The bandwidths are the hardware's (k2/ceilings.py). Torch's products take weights more slowly than that, each format at
its own rate, and every layer costs a little however narrow it is: both are measured here, on the real code.
"""

import copy
import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

from . import ceilings
from .attention import DirectQueryAttention, MultiHeadLatentAttention
from .checkpoint import DTYPE_NAMES, NAME_OF, Checkpoint, expected_tensors, filled, head_for, save
from .config import K2Config, K2Error
from .expert import Expert
from .generation import decode, prefill
from .kv_cache import LatentCache
from .model import K2
from .needs import in_format, needs
from .offload import TAKEN, free_memory, load
from .quantization import NIBBLES
from .router import Router

@dataclass(frozen=True)
class Machine:
    """Bytes that a program may take of each tier, and bytes a second; 0 where there is none, or for a rate nobody needs."""

    ram: int
    gpu_memory: int
    disk: int
    ram_bandwidth: float
    disk_bandwidth: float
    bus_bandwidth: float = 0.0
    gpu_bandwidth: float = 0.0


SCRATCH = 2**28  # bytes written to measure a disk that holds no weights yet


def this_machine(folder: Path, given: dict[str, float | None]) -> Machine:
    """What a program may take here and how fast it is; what is given is neither looked up nor measured."""
    gpu = torch.device("cuda") if torch.cuda.is_available() else None
    has_gpu = given["gpu_memory"] or (gpu and given["gpu_memory"] is None)
    look = {
        "ram": lambda: int(free_memory() * TAKEN),
        "gpu_memory": lambda: int(torch.cuda.mem_get_info(gpu)[0] * TAKEN) if gpu else 0,
        "disk": lambda: shutil.disk_usage(folder).free,
        "ram_bandwidth": ceilings.ram_bandwidth,
        "disk_bandwidth": lambda: measured_disk(folder),
        "bus_bandwidth": lambda: ceilings.bus_bandwidth(gpu) if gpu and has_gpu else 0.0,
        "gpu_bandwidth": lambda: ceilings.device_bandwidth(gpu) if gpu and has_gpu else 0.0,
    }
    found = Machine(**{name: find() if given[name] is None else given[name] for name, find in look.items()})
    if found.gpu_memory and not (found.bus_bandwidth and found.gpu_bandwidth):
        raise K2Error("--gpu-memory: found without a bandwidth, and there is no GPU here to measure; expected --gpu-bandwidth and --bus-bandwidth as well, such as 1TB and 25GB.")
    return found


def measured_disk(folder: Path) -> float:
    """Bytes a second of cold reads from the folder's disk: of its shards, or of a scratch file that is written for it."""
    shards = [path.stat().st_size for path in folder.glob("*.safetensors")]
    if sum(shards) >= SCRATCH and max(shards) >= ceilings.BLOCK:
        return ceilings.disk_bandwidth(folder)
    scratch = folder / f".k2-plan-{os.getpid()}"
    try:
        with open(scratch, "wb") as file:
            for _ in range(SCRATCH // 2**24):
                file.write(secrets.token_bytes(2**24))  # zeros would be a hole on some disks
            file.flush()
            os.fsync(file.fileno())
        return ceilings.disk_bandwidth(scratch)
    except OSError as error:
        raise K2Error(f"{folder}: the disk could not be measured: {error.strerror}. Give --path a folder that can be written, or --disk-bandwidth.") from None
    finally:
        scratch.unlink(missing_ok=True)


class OnPaper(Checkpoint):
    """A checkpoint of a config that is nowhere: each tensor is made when asked for, of its dtype and shape, full of noise."""

    def __init__(self, config: K2Config):
        self.config, self.specs, self.directory = config, expected_tensors(config), Path("paper")
        self.weight_map = dict.fromkeys(self.specs, "paper")

    def tensor(self, name: str) -> torch.Tensor:
        """Numbers that keep a layer's output finite."""
        dtypes, shape = self.specs[self.config.tensor_prefix + name]
        if name.endswith("weight_shape"):
            return torch.tensor([shape_of_packed(self.specs[self.config.tensor_prefix + name.replace("_shape", "_packed")])]).flatten()
        if dtypes[0] == "F8_E4M3":
            return torch.randint(8, 100, shape, dtype=torch.uint8).view(torch.float8_e4m3fn)  # normal numbers, as nearly all of a real matrix are
        if dtypes[0] == "I32":
            return torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
        return torch.empty(shape, dtype=DTYPE_NAMES[dtypes[0]]).uniform_(-0.01, 0.01)

    finite = tensor

    def let_go(self, name: str):
        """There is no map whose pages could be given back."""


def shape_of_packed(spec) -> list[int]:
    """Rows and columns of a matrix whose packed words have this spec."""
    return [spec.shape[0], spec.shape[1] * NIBBLES]


@dataclass(frozen=True)
class Speeds:
    """What this project's code reaches with one token: bytes at rest a second by the kind of tensor, and the fixed
    seconds of a layer."""

    rates: dict[str, float]
    layer: float


def measured_speeds(config: K2Config, format: str, rest: str, resident: bool, device: torch.device) -> Speeds:
    """Both, measured here: each kind by a module of this config's widths less one of a narrow model's, and the layer's
    fixed cost by that narrow model, its experts in memory or, not `resident`, half of them read from disk."""
    narrow = narrow_config(config)
    if config.first_k_dense_replace >= config.num_hidden_layers:
        raise K2Error("plan: expected a model with experts in some layer, found none. Its speed is not planned here.")
    rates = {}
    for kind in ("attention", "router", "shared-expert", "expert", "head"):
        (size, wide), (_, fixed) = (module_seconds(in_format(c, format if kind == "expert" else rest), kind, device) for c in (config, narrow))
        rates[kind] = size / max(wide - fixed, 1e-3 * wide)
    rates |= {"norm": rates["attention"], "dense": rates["shared-expert"]}
    return Speeds(rates, fixed_layer_seconds(in_format(narrow, format), format, resident, device))


def narrow_config(config: K2Config) -> K2Config:
    """A model of the same make and hardly any width."""
    K = config.num_experts_per_tok
    return replace(
        config, vocab_size=64, hidden_size=128, intermediate_size=64, moe_intermediate_size=64, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=32 if config.q_lora_rank else None, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
        n_routed_experts=4 * K, num_hidden_layers=config.first_k_dense_replace + 6, bos_token_id=0, eos_token_id=1, pad_token_id=None, tensor_prefix="",
    )  # fmt: skip


MOMENT = 0.1  # seconds


def module_seconds(config: K2Config, kind: str, device: torch.device) -> tuple[int, float]:
    """(bytes at rest, seconds for one token) of the module that reads the tensors of a kind, in one layer.

    As many copies take turns as make it read memory and not the processor's cache, but no more than a moment's work.
    """
    module = module_of(config, kind, device)
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    angle_TP = torch.ones(1, config.qk_rope_head_dim // 2, device=device)
    x_TD = torch.randn(1, config.hidden_size, device=device).to(DTYPE_NAMES[NAME_OF[config.torch_dtype]])
    given = (x_TD, angle_TP, angle_TP) if kind == "attention" else (x_TD,)

    @torch.inference_mode()
    def seconds(modules):
        started = time.perf_counter()
        ceilings.finished(device, [module(*given) for module in modules])
        return (time.perf_counter() - started) / len(modules)

    once = min(seconds([module]) for _ in range(2))
    if once > MOMENT:
        return size, once
    count = min(2**28 // size + 1, 512, int(MOMENT / once) + 1)
    modules = [module, *(copy.deepcopy(module) for _ in range(count - 1))]
    return size, median(seconds(modules) for _ in range(5))


def module_of(config: K2Config, kind: str, device: torch.device):
    """The module of a kind in the first layer with experts, as the loader makes it, full of noise. The head is cut to
    16,384 rows, and of the experts one is made: each row, and each expert, is read alike."""
    layer = config.first_k_dense_replace
    config = replace(config, num_hidden_layers=layer + 1, vocab_size=min(config.vocab_size, 16384), bos_token_id=0, eos_token_id=0, pad_token_id=None)
    config = replace(config, n_routed_experts=config.num_experts_per_tok) if kind == "expert" else config
    D, F, name = config.hidden_size, config.moe_intermediate_size, f"model.layers.{layer}."
    attention = MultiHeadLatentAttention if config.q_lora_rank else DirectQueryAttention
    make, prefix = {
        "attention": (lambda: attention(config), f"{name}self_attn."),
        "router": (lambda: Router(config), f"{name}mlp.gate."),
        "shared-expert": (lambda: Expert(D, F * config.n_shared_experts), f"{name}mlp.shared_experts."),
        "expert": (lambda: Expert(D, F), f"{name}mlp.experts.0."),
        "head": (lambda: head_for(OnPaper(config), None, device), "lm_head."),
    }[kind]
    with torch.device("meta"):
        module = make()
    return filled(OnPaper(config), prefix, module, None, device)


def fixed_layer_seconds(narrow: K2Config, format: str, resident: bool, device: torch.device) -> float:
    """Seconds a token a layer of a model so narrow that its weights do not count: the median of a few tokens.

    It is written to a temporary folder and loaded as any other.
    """
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save(K2(replace(narrow, quantization_config=None)), f"{folder}/narrow", format=format)
        found = needs(narrow, format)
        half = sum(found.rest.values()) + found.experts * found.expert // 2
        model = load(f"{folder}/narrow", device, None, ram=None if resident else half)
        cache = LatentCache(model.config)
        i = int(prefill(model, [2, 3], cache).argmax())
        seconds = []
        for _ in range(12):
            started = time.perf_counter()
            i = int(decode(model, i, cache).argmax())
            seconds.append(time.perf_counter() - started)
    return median(seconds) / narrow.num_hidden_layers


def decode_seconds(directory, ram: int | None, device: torch.device, count: int) -> float:
    """Seconds a token that a checkpoint really takes, the median of `count`. The ids are drawn, since a random model that
    goes on by itself soon asks for the same experts again; the tokens before them touch nearly every expert once, as
    the first touch of a mapped one reads the disk."""
    model = load(directory, device, ram=ram)
    cache, seconds = LatentCache(model.config), []
    warm_up = count + 4 * model.config.n_routed_experts // model.config.num_experts_per_tok
    ids = torch.randint(0, model.config.vocab_size, (warm_up + count + 1,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill(model, ids[:1], cache)
    for i in ids[1:]:
        started = time.perf_counter()
        decode(model, i, cache).argmax().item()
        seconds.append(time.perf_counter() - started)
    return median(seconds[warm_up:])
