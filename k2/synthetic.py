"""Checkpoints of random weights in the released layout, as large as one likes: to measure with, not to read from.

    mid      K2 / 4 in every width, 12 layers of 64 experts: 2.2 billion weights, fits into memory
    big      K2 / 2 in every width, 9 layers of 64 experts: 6.3 billion weights, to be streamed from disk
    slice    K2's own widths and head, a dense layer and one or more MoE layers of all 384 experts

Written tensor by tensor, so that memory holds one and not the model. The values keep activations finite and routing
uniform, and say nothing: a real model's routing is more uneven, and its caches do better.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoint import DTYPE_NAMES, FORMATS, INDEX, Spec, expected_tensors, shard_names, write_through
from .config import K2Config, K2Error
from .quantization import BLOCK, FP8_MAX, GROUP, NIBBLES, nibble_shifts

WIDTHS = {
    "mid": {"hidden_size": 1792, "intermediate_size": 4608, "moe_intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 16,
            "num_key_value_heads": 16, "q_lora_rank": 384, "n_routed_experts": 64, "vocab_size": 32768},
    "big": {"hidden_size": 3584, "intermediate_size": 9216, "moe_intermediate_size": 1024, "num_hidden_layers": 9, "num_attention_heads": 32,
            "num_key_value_heads": 32, "q_lora_rank": 768, "n_routed_experts": 64, "vocab_size": 32768},
    "slice": {"num_hidden_layers": 2},
}  # fmt: skip
POOL = 2**24  # random numbers drawn once; tensors are cut from them at random places, since drawing billions takes minutes
INT4_STEP = 0.35  # the spread of a weight in steps of its group's scale, as round-to-nearest leaves it for normal weights: 1 / 2.9


def preset(name: str, instruct: K2Config, layers: int | None = None) -> K2Config:
    """A preset's config, on K2-Instruct's own; `layers` in place of its number of layers. Raises K2Error for another name."""
    if name not in WIDTHS:
        raise K2Error(f"bench: preset {name!r}; expected one of {', '.join(WIDTHS)}.")
    widths = {**WIDTHS[name], **({"num_hidden_layers": layers} if layers else {})}
    if "vocab_size" in widths:  # K2's own ids would lie beyond the smaller table
        widths |= {"bos_token_id": 0, "eos_token_id": 1}
    return replace(instruct, **widths)


def write(config: K2Config, format: str, directory, seed: int = 0):
    """Write a checkpoint of random weights, a shard a layer; format as for `checkpoint.save`. Raises K2Error if the
    folder has content or the disk has too little room."""
    directory = Path(directory)
    torch_dtype, quantization = FORMATS[format]
    config = replace(config, torch_dtype=torch_dtype, quantization_config=quantization)
    specs = expected_tensors(config)
    file_of, need = shard_names(config, specs, config.num_hidden_layers), sum(map(size_of, specs.values()))
    if directory.exists() and any(directory.iterdir()):
        raise K2Error(f"{directory}: expected a new or empty folder, found one with content. Choose another folder; nothing was overwritten.")
    directory.mkdir(parents=True, exist_ok=True)
    room = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    if need > room:
        raise K2Error(f"{directory}: {need:,} bytes are needed; found {room:,} free on this disk. Choose another disk or a smaller preset.")
    values = Values(seed)
    for file in sorted(set(file_of.values())):
        write_shard(directory / file, {name: specs[name] for name in file_of if file_of[name] == file}, values)
    write_through(directory / INDEX, (json.dumps({"metadata": {"total_size": need}, "weight_map": file_of}) + "\n").encode())
    write_through(directory / "config.json", (json.dumps(config.to_dict(), indent=2) + "\n").encode())  # last: without it there is no checkpoint


def size_of(spec: Spec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec.shape) * DTYPE_NAMES[spec.dtypes[0]].itemsize


def write_shard(path: Path, specs: dict[str, Spec], values: "Values"):
    """One shard, its tensors sorted by dtype and then by name as the safetensors library sorts them."""
    order = sorted(specs, key=lambda name: (-DTYPE_NAMES[specs[name].dtypes[0]].itemsize, name))
    header, end = {}, 0
    for name in order:
        begin, end = end, end + size_of(specs[name])
        header[name] = {"dtype": specs[name].dtypes[0], "shape": list(specs[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(values.of(name, specs).contiguous().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())


class Values:
    """Random tensors of each kind, the same for one seed. Matrices have gain 1 in every format."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        normal = torch.randn(POOL, generator=self.random)
        self.pools = {
            "BF16": normal.bfloat16(), "F32": normal,
            "F8_E4M3": (normal * 100).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn),  # codes of spread 100: scales bring them to size
            "I32": nibble_words(normal),
        }  # fmt: skip

    def of(self, name: str, specs: dict[str, Spec]) -> torch.Tensor:
        """The tensor of a name, flat."""
        spec = specs[name]
        dtype, count = spec.dtypes[0], math.prod(spec.shape)
        if name.endswith("weight_shape"):
            rows, words = specs[name.replace("weight_shape", "weight_packed")].shape
            return torch.tensor([rows, words * NIBBLES], dtype=torch.int32)
        if name.endswith("weight_scale_inv"):
            return torch.full((count,), (spec.shape[1] * BLOCK) ** -0.5 / 100)
        if name.endswith("weight_scale"):
            return torch.full((count,), (spec.shape[1] * GROUP) ** -0.5 * INT4_STEP, dtype=torch.bfloat16)
        if len(spec.shape) == 1:
            return torch.zeros(count) if "bias" in name else torch.ones(count, dtype=DTYPE_NAMES[dtype])
        drawn = self.cut(self.pools[dtype], count)
        return drawn if dtype != "BF16" or "embed_tokens" in name else drawn * spec.shape[1] ** -0.5

    def cut(self, pool, count: int) -> torch.Tensor:
        """`count` values from random places of the pool."""
        parts = []
        while count:
            length = min(count, POOL // 2)
            begin = int(torch.randint(POOL // 2, (), generator=self.random)) % max(1, len(pool) - length)
            parts.append(pool[begin : begin + length])
            count -= len(parts[-1])
        return torch.cat(parts)


def nibble_words(normal) -> torch.Tensor:
    """Normal numbers as 4-bit integers, eight to an int32 word."""
    nibbles_UL = (normal / INT4_STEP).round().clamp(-8, 7).to(torch.int32).unflatten(0, (-1, NIBBLES)) + 8
    return (nibbles_UL << nibble_shifts(normal.device)).sum(-1, dtype=torch.int32)
