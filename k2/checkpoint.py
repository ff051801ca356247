"""A checkpoint is a file format: sharded safetensors, an index, a config. Opened by memory map, checked name by name.

    config.json                      what the model is; every tensor's name, shape and dtype follow from it
    model.safetensors.index.json     {"weight_map": {tensor: file}}; the only truth about which shard holds what
    model-1-of-61.safetensors        8 bytes of header length, a JSON header, then the tensors' bytes

Opening costs the headers. A tensor is a view into the map and costs memory when it is touched. Nothing is guessed: a
tensor is used, or ignored by name with a reason, or refused.
"""

import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import nn

from .attention import MultiHeadLatentAttention
from .ceilings import forget_pages, give_back_freed_memory, keep_freed_memory
from .config import FP8_CONFIG, INT4_CONFIG, K2Config, K2Error, read_json_object, without_repeats
from .embedding import OutputHead
from .model import K2
from .moe import resident_experts
from .products import RowLinear, many_rows_product, wants_row_kernel
from .router import Router
from .quantization import (
    BLOCK,
    GROUP,
    KERNEL_STEP,
    NIBBLES,
    FP8CodesLinear,
    FP8Linear,
    INT4KernelLinear,
    INT4Linear,
    fp8_dequantize,
    fp8_has_nan,
    fp8_quantize,
    int4_dequantize,
    int4_quantize,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"  # a small checkpoint in one file has no index
DTYPE_NAMES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32, "I64": torch.int64}
NAME_OF = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPES = {"auto": "auto", "stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}  # as flags name them
SCALE_LIMIT = 2.0**7  # a block of weights up to 57,344 is no block of weights
# Every dtype that the container knows. K2's tensors use those above; a stranger's shard is judged by its bytes all the same.
DTYPE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6} | {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16), **dict.fromkeys(("I32", "U32", "F32"), 32), **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library; K2's are 315,000
MOST_TENSORS = 500_000  # in one shard; all of K2-Thinking has 208,215
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
RECORD = "k2-download.json"  # beside downloaded files: where they came from, their hashes, and which part of it they are
LONGEST_NAME = 500  # characters; the family's longest has 76

IGNORED_TENSORS = (
    (re.compile(r"^(language_model\.)?model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq$"), "a stale buffer of another head size (56 numbers where K2 has 32 pairs); the angles follow from config.json"),
    (re.compile(r"^(vision_tower|mm_projector)\."), "the vision part of K2.5; this project runs the text part"),
)


def reason_to_ignore(name: str) -> str | None:
    """Why a tensor of this name is left alone; None for one that is used or unknown."""
    return next((why for pattern, why in IGNORED_TENSORS if pattern.search(name)), None)


class Spec(NamedTuple):
    """What a tensor must be: its dtypes as safetensors spells them (the first is what we write), and its shape."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]


def check_one_commit(directory: Path, files):
    """Raise K2Error if download_weights.py left some of these files for a commit that others have not reached yet: each
    would be whole, and together they would be no model."""
    record = read_json_object(directory / RECORD) if (directory / RECORD).exists() else {}
    held, planned = record.get("files"), record.get("planned")
    if not isinstance(held, dict) or not isinstance(planned, dict):
        return  # no download, or none that this program wrote: --verify tells
    for file in files:
        known = held.get(file)
        if isinstance(known, dict) and planned.get(file, known.get("source")) != known.get("source"):
            raise K2Error(f"{directory / file}: of another commit than the one that was begun last; expected all files of one. Finish the download: run the command of {directory / RECORD} again.")


# ---- what a config implies ----


def matrix_specs(name: str, shape: tuple[int, int], stored: str, plain: str) -> dict[str, Spec]:
    """The one, two or three tensors that hold a matrix (rows, columns) in a stored format."""
    rows, columns = shape
    if stored == "fp8":
        grid = (math.ceil(rows / BLOCK), math.ceil(columns / BLOCK))
        return {f"{name}.weight": Spec(("F8_E4M3",), shape), f"{name}.weight_scale_inv": Spec(("F32",), grid)}
    if stored == "int4":
        return {
            f"{name}.weight_packed": Spec(("I32",), (rows, columns // NIBBLES)),
            f"{name}.weight_scale": Spec(("BF16",), (rows, columns // GROUP)),
            f"{name}.weight_shape": Spec(("I32", "I64"), (2,)),
        }
    return {f"{name}.weight": Spec((plain,), shape)}


def expected_tensors(config: K2Config) -> dict[str, Spec]:
    """Every tensor that a checkpoint of this config must have, by name: 139,583 for K2-Instruct (and 61 stale ones)."""
    plain, stored = NAME_OF[config.torch_dtype], config.weight_format
    rest = "plain" if stored == "int4" else stored  # INT4 checkpoints quantise routed experts and nothing else
    # The router's bias is float32. Only unquantised files (Moonlight, transformers') may have it in their own dtype.
    bias = ("F32",) if stored != "plain" else ("F32", plain)
    D, specs = config.hidden_size, {}
    table = Spec((plain,), (config.vocab_size, D))
    specs |= {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": Spec((plain,), (D,))}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, width in norm_widths(config).items():
            specs[f"{layer}.{name}.weight"] = Spec((plain,), (width,))
        for name, shape in attention_shapes(config).items():
            specs |= matrix_specs(f"{layer}.self_attn.{name}", shape, rest, plain)
        for name, width in feed_forward_widths(config, i).items():
            for part, shape in (("gate_proj", (width, D)), ("up_proj", (width, D)), ("down_proj", (D, width))):
                specs |= matrix_specs(f"{layer}.{name}.{part}", shape, stored if ".experts." in name else rest, plain)
        if not config.is_dense(i):
            specs[f"{layer}.mlp.gate.weight"] = Spec((plain,), (config.n_routed_experts, D))
            specs[f"{layer}.mlp.gate.e_score_correction_bias"] = Spec(bias, (config.n_routed_experts,))
    return {config.tensor_prefix + name: spec for name, spec in specs.items()}


def norm_widths(config: K2Config) -> dict[str, int]:
    """A layer's norms and their widths."""
    latent = {"self_attn.q_a_layernorm": config.q_lora_rank} if config.q_lora_rank else {}
    D = config.hidden_size
    return {"input_layernorm": D, "post_attention_layernorm": D, "self_attn.kv_a_layernorm": config.kv_lora_rank} | latent


def attention_shapes(config: K2Config) -> dict[str, tuple[int, int]]:
    """A layer's attention matrices, (rows, columns)."""
    D, H, A, Q, C = config.hidden_size, config.num_attention_heads, config.qk_head_dim, config.q_lora_rank, config.kv_lora_rank
    queries = {"q_a_proj": (Q, D), "q_b_proj": (H * A, Q)} if Q else {"q_proj": (H * A, D)}
    return queries | {
        "kv_a_proj_with_mqa": (C + config.qk_rope_head_dim, D),
        "kv_b_proj": (H * (config.qk_nope_head_dim + config.v_head_dim), C),
        "o_proj": (D, H * config.v_head_dim),
    }


def feed_forward_widths(config: K2Config, layer: int) -> dict[str, int]:
    """A layer's feed-forwards by name, and their widths: one wide one, or the shared and all routed experts."""
    if config.is_dense(layer):
        return {"mlp": config.intermediate_size}
    F = config.moe_intermediate_size
    return {"mlp.shared_experts": F * config.n_shared_experts} | {f"mlp.experts.{e}": F for e in range(config.n_routed_experts)}


def shard_names(config: K2Config, names, shards: int) -> dict[str, str]:
    """Which file each tensor is written to, as in K2-Instruct: layers in order, a shard a layer if there are as many;
    the embedding with the first layer, the last norm and the head with the last."""
    if not 1 <= shards <= config.num_hidden_layers:
        raise K2Error(f"save: {shards} shards; expected 1 to num_hidden_layers = {config.num_hidden_layers}, as a layer is never split.")
    files = {}
    for name in names:
        found = re.search(r"layers\.(\d+)\.", name)
        layer = int(found[1]) if found else 0 if "embed_tokens" in name else config.num_hidden_layers - 1
        files[name] = f"model-{layer * shards // config.num_hidden_layers + 1}-of-{shards}.safetensors"
    return files


# ---- reading ----


def read_header(path: Path) -> dict[str, dict]:
    """A shard's header, {tensor: {dtype, shape, data_offsets}}, after checking that it and the file's size agree."""
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise K2Error(f"{path}: expected a shard, found {'no regular file' if os.path.exists(path) else 'no file'}. Fetch this shard.")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = header_length(file.read(8), size, path)
            raw = file.read(length)
    except OSError as error:
        raise K2Error(f"{path}: expected a shard, could not read it: {error.strerror}. Check its permissions and the disk.") from None
    return parse_header(raw, size, path)


def header_length(first: bytes, size: int, where) -> int:
    """How long the header is, from a shard's first 8 bytes; `size` is the whole file's. Nothing is read on a lie's word."""
    length = int.from_bytes(first, "little")
    if len(first) < 8 or 8 + length > size:
        raise K2Error(f"{where}: expected a header of {length} bytes behind the first 8, found a file of {size}. The shard is cut or damaged: fetch it again.")
    if length > LONGEST_HEADER:
        raise K2Error(f"{where}: expected a header of at most {LONGEST_HEADER} bytes, found one of {length}. The shard is damaged: fetch it again.")
    return length


def parse_header(raw: bytes, size: int, where) -> dict[str, dict]:
    """The header from its bytes, wherever they came from; `size` is the whole file's, `where` names it in errors.

    safetensors' own rules, and the reader's caution: names are unique and of a line's length, shapes and offsets are
    whole numbers, each tensor is as long as its dtype and shape say, and one follows the other without gap or overlap
    from the header's end to the file's. Raises K2Error for the first that does not hold.
    """
    if max(raw.count(b"{"), raw.count(b"[") // 2) > MOST_TENSORS:  # before Python makes objects of them
        raise K2Error(f"{where}: expected at most {MOST_TENSORS} tensors in a JSON header, found more. No shard of the family comes near: fetch it again.")
    try:
        if raw[:1] != b"{" or SURROGATE.search(raw):  # half a character has no UTF-8, and Python's reader lets it pass
            raise ValueError
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        twice = f" with {error}" if str(error).startswith("the key") else ""
        raise K2Error(f"{where}: expected a JSON header of {len(raw)} bytes, found something else{twice}. The shard is damaged: fetch it again.") from None
    notes = header.pop("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise K2Error(f"{where}: expected __metadata__ to map text to text in the JSON header, found {str(notes)[:80]}. The shard is damaged: fetch it again.")
    for name, entry in header.items():
        check_entry(name, entry, where)
    check_offsets(header, 8 + len(raw), size, where)
    return header


def check_entry(name: str, entry, where):
    """A tensor's entry in a header: its keys, their types, and as many bytes as its dtype and shape say."""
    damaged = "The shard is damaged: fetch it again."
    if len(name) > LONGEST_NAME:
        raise K2Error(f"{where}: expected tensor names of at most {LONGEST_NAME} characters, found {name[:40]!r}... of {len(name)}. {damaged}")
    if not isinstance(entry, dict) or not all(whole_numbers(entry.get(key)) for key in ("shape", "data_offsets")) or len(entry["data_offsets"]) != 2:
        raise K2Error(f"{where}: {name}: expected dtype, shape and two data_offsets, whole numbers from 0, found {str(entry)[:120]}. {damaged}")
    if not isinstance(entry.get("dtype"), str) or entry["dtype"] not in DTYPE_BITS:
        raise K2Error(f"{where}: {name}: dtype is {str(entry.get('dtype'))[:40]}; expected one that safetensors has. {damaged}")
    begin, end = entry["data_offsets"]
    bits = math.prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]]
    if (end - begin) * 8 != bits:
        raise K2Error(f"{where}: {name}: expected {-(-bits // 8)} bytes by its dtype and shape, found data_offsets {entry['data_offsets']}. {damaged}")


def whole_numbers(values) -> bool:
    """Whether it is a list of ints from 0 that fit into 64 bits; True and 1.0 are none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**64 for value in values)


def check_offsets(header: dict, start: int, size: int, where):
    """The tensors must cover the file of `size` bytes from the header's end at `start`, without a hole and without an overlap."""
    reached = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != reached:
            raise K2Error(f"{where}: {name}: expected data_offsets from {reached}, where the tensor before ends, found {begin}. The shard is damaged: fetch it again.")
        reached = end
    if start + reached != size:
        raise K2Error(f"{where}: expected {start + reached} bytes by its header, found {size}. The shard is {'cut' if size < start + reached else 'too long'}: fetch it again.")


def read_index(directory: Path) -> dict[str, str]:
    """{tensor: file}, from the index, or from the one file of a checkpoint without an index."""
    path = directory / INDEX
    if not path.exists() and (directory / SINGLE).exists():
        return dict.fromkeys(read_header(directory / SINGLE), SINGLE)
    return parse_index(read_json_object(path), path)


def parse_index(index: dict, where) -> dict[str, str]:
    """The index's weight_map, its files' names checked before anything is opened; `where` names it in errors."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise K2Error(f"{where}: expected weight_map to map tensors to files, found {type(weight_map).__name__}. Fetch the index again.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise K2Error(f"{where}: weight_map[{name}] is {file!r}; expected the name of a .safetensors file in this folder. Fetch the index again.")
    return weight_map


def first_layers(config: K2Config, weight_map: dict[str, str], count: int) -> tuple[K2Config, dict[str, str]]:
    """The config and the index of a model that ends after `count` layers; embedding, last norm and head stay."""
    if not 1 <= count <= config.num_hidden_layers:
        raise K2Error(f"layers: expected 1 to {config.num_hidden_layers} of them, found {count}. Name the first and the last, such as 0-3.")
    found = {name: re.search(r"layers\.(\d{1,4})\.", name) for name in weight_map}
    kept = {name: file for name, file in weight_map.items() if found[name] is None or int(found[name][1]) < count}
    return replace(config, num_hidden_layers=count, first_k_dense_replace=min(config.first_k_dense_replace, count)), kept


def identity(path: Path) -> tuple:
    """What changes when a file is written to, cut, or replaced by another; None of a file that is gone."""
    try:
        status = os.stat(path)
    except OSError:
        return (None,)
    return status.st_size, status.st_mtime_ns, status.st_ino


def all_finite(values: torch.Tensor) -> bool:
    """True if no number is NaN or infinite; looked at in pieces, since the answers for a whole head are large themselves."""
    return all(piece.isfinite().all() for piece in values.flatten().split(2**22))


class Checkpoint:
    """An open checkpoint directory. Everything is checked when it is made; `tensor` then gives views into the maps.

    With `layers` it is the model of that many first layers, and no shard that holds only later ones is opened. With
    `partial` tensors may be missing: what is there must still be as config.json implies.
    """

    def __init__(self, directory, layers: int | None = None, partial: bool = False):
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise K2Error(f"{self.directory}: expected a checkpoint directory, found {'something else' if self.directory.exists() else 'nothing'}. Give the folder that holds config.json.")
        self.config = K2Config.from_json(self.directory)
        index = self.weight_map = read_index(self.directory)
        if layers is not None:
            self.config, self.weight_map = first_layers(self.config, index, layers)
        self.headers = {file: read_header(self.directory / file) for file in sorted(set(self.weight_map.values()))}
        self._cross_check(index)
        check_one_commit(self.directory, self.headers)
        self.ignored = self._account_for_every_tensor(partial)
        self._shards = {file: self._map(file) for file in self.headers}
        self.identity = {file: identity(self.directory / file) for file in self.headers}

    def _cross_check(self, index: dict[str, str]):
        """The index and the headers must tell one story."""
        for name, file in self.weight_map.items():
            if name not in self.headers[file]:
                raise K2Error(f"{self.directory / file}: expected {name}, which the index places here; the header lacks it. Index and shards are not of one checkpoint.")
        for file, header in self.headers.items():
            for name in header:
                if index.get(name) != file:
                    raise K2Error(f"{self.directory / file}: holds {name}, which the index places in {index.get(name, 'no file')}. Index and shards are not of one checkpoint.")

    def _account_for_every_tensor(self, partial: bool) -> dict[str, str]:
        """Each tensor is as the config implies, or ignored: returns {ignored tensor: reason}."""
        expected, ignored = expected_tensors(self.config), {}
        for name, file in self.weight_map.items():
            reason = reason_to_ignore(name)
            if reason:
                ignored[name] = reason
            elif name not in expected:
                raise K2Error(f"{self.directory / file}: unknown tensor {name}; config.json implies none of this name. Is this config.json this checkpoint's own?")
            else:
                self._check_tensor(name, file, expected[name])
        for name in expected:
            if name not in self.weight_map and not partial:
                raise K2Error(f"{self.directory}: tensor {name} is missing; config.json implies it. Is the checkpoint whole, and config.json its own? A part of one runs with --layers 0-N.")
        return ignored

    def _check_tensor(self, name: str, file: str, spec: Spec):
        found = self.headers[file][name]
        if found.get("dtype") not in spec.dtypes:
            raise K2Error(f"{self.directory / file}: {name} has dtype {found.get('dtype')}; expected {' or '.join(spec.dtypes)}. Is config.json this checkpoint's own?")
        if found.get("shape") != list(spec.shape):
            raise K2Error(f"{self.directory / file}: {name} has shape {found.get('shape')}; expected {list(spec.shape)}. Is config.json this checkpoint's own?")

    def _map(self, file: str):
        try:
            return safetensors.safe_open(self.directory / file, framework="pt")
        except (safetensors.SafetensorError, OSError) as error:
            raise K2Error(f"{self.directory / file}: expected a safetensors file, found: {error}. Fetch this shard again.") from None

    def tensor(self, name: str) -> torch.Tensor:
        """A view into the memory map, in the stored dtype; `name` is without the prefix that K2.5 adds."""
        return self.stored(self.config.tensor_prefix + name)

    def stored(self, name: str) -> torch.Tensor:
        """The same by the name in the file, of whatever part of the model."""
        return self._shards[self.weight_map[name]].get_tensor(name)

    def let_go(self, name: str):
        """Give back the map's pages of a tensor that was copied: they would count as memory."""
        forget_pages(self.tensor(name))

    def check_unchanged(self):
        """Raise K2Error if a shard is no longer the file that was opened. The map would show another program's writing in
        silence, and a page that was cut off ends this one. What changes between this look and the use is not seen."""
        for file, before in self.identity.items():
            if identity(self.directory / file) != before:
                raise K2Error(f"{self.directory / file}: expected the file as it was at the start, found it changed or replaced while running. Start again with a whole checkpoint.")

    def holds(self, name: str) -> bool:
        """True if there is a tensor of this name."""
        return self.config.tensor_prefix + name in self.weight_map

    def where(self, name: str) -> str:
        """The shard and the tensor, for messages."""
        return f"{self.directory / self.weight_map[self.config.tensor_prefix + name]}: {name}"

    def scale(self, name: str) -> torch.Tensor:
        """An FP8 matrix's scales, after a look at all: raises K2Error for one that no real matrix has."""
        scale_BG = self.finite(name)
        if scale_BG.abs().max() >= SCALE_LIMIT:
            raise K2Error(f"{self.where(name)} holds {scale_BG.abs().max():g}; expected below {SCALE_LIMIT:g}. The shard is damaged: fetch it again.")
        return scale_BG

    def finite(self, name: str) -> torch.Tensor:
        """The same, after reading it all: raises K2Error if a number in it is NaN or infinite."""
        values = self.tensor(name)
        if fp8_has_nan(values) if values.dtype == torch.float8_e4m3fn else not all_finite(values):
            raise K2Error(f"{self.where(name)}: expected finite numbers, found NaN or infinity. The shard is damaged: fetch it again.")
        return values


# ---- into a model and out of one ----

SMALL = 2**30  # bytes


def resolved_dtypes(config: K2Config, dtype, device: torch.device) -> tuple:
    """(that of the routed experts, that of all else): None is the stored format at rest. Where `dtype` is "auto", a CPU
    takes float32 for a model that then needs at most 1 GiB, so that every machine gives the same text; and of a larger FP8
    model it widens all but the experts if that takes at most 4 GiB, as two cores multiply bfloat16 twice as fast as FP8.
    It depends on model and device kind, never on free memory."""
    if dtype != "auto" or device.type != "cpu":
        return (None, None) if dtype == "auto" else (dtype, dtype)
    routed, rest = weight_counts(config)
    if (routed + rest) * torch.float32.itemsize <= SMALL:
        return torch.float32, torch.float32
    wide = DTYPE_NAMES[NAME_OF[config.torch_dtype]]
    return None, wide if config.weight_format == "fp8" and rest * wide.itemsize <= 4 * SMALL else None


def weight_counts(config: K2Config) -> tuple[int, int]:
    """How many numbers the routed experts hold, and how many all else; one layer with experts stands for all of them."""
    dense, counts = config.first_k_dense_replace, {True: 0, False: 0}
    short = replace(config, num_hidden_layers=min(dense + 1, config.num_hidden_layers))
    for name, spec in expected_tensors(short).items():
        times = config.num_hidden_layers - dense if f"layers.{dense}." in name else 1
        counts[".mlp.experts." in name] += math.prod(spec.shape) * (NIBBLES if "packed" in name else 1) * times
    return counts[True], counts[False]


def load(directory, device="cpu", dtype="auto", layers: int | None = None) -> K2:
    """A model with a checkpoint's weights, all experts in it, ready to run (eval mode, no gradients).

    dtype None keeps the stored format at rest and computes in the checkpoint's torch_dtype; a torch dtype dequantises
    and casts at load; "auto" takes whichever serves the device (see resolved_dtypes). The non-routed weights are read
    and checked for NaN now; routed experts stay in the map until they are asked for, if they need no cast. The
    embedding stays in the map on the CPU. With `layers` only that many first layers are taken, and the shards of the
    others need not be there. Raises K2Error for whatever is wrong with the files.
    """
    return filled_model(Checkpoint(directory, layers), torch.device(device), dtype, resident_experts)


def filled_model(checkpoint: Checkpoint, device: torch.device, dtype, make_experts) -> K2:
    """The same for an open checkpoint, its routed experts made by `make_experts(config, layer)`."""
    with torch.device("meta"):
        model = K2(checkpoint.config, make_experts)
    return filled(checkpoint, "", model, dtype, device)


def filled(checkpoint: Checkpoint, prefix: str, module: nn.Module, dtype, device: torch.device):
    """A module made on the meta device, given the checkpoint's weights under its prefix ("model.layers.1."), ready to run."""
    of_experts, of_the_rest = resolved_dtypes(checkpoint.config, dtype, device)
    keep_freed_memory()
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear) and not isinstance(child, OutputHead):
            parent, _, attribute = name.rpartition(".")
            of_this = of_experts if ".mlp.experts." in prefix + name else of_the_rest
            setattr(module.get_submodule(parent), attribute, linear_from(checkpoint, prefix + name, of_this, device))
        else:
            if name == "lm_head":
                child = module.lm_head = head_for(checkpoint, of_the_rest, device)
            fill_tensors(checkpoint, prefix + name, child, of_the_rest, device)
        if isinstance(child, MultiHeadLatentAttention):
            child.product = many_rows_product
    give_back_freed_memory()
    return module.eval().requires_grad_(False)


def linear_from(checkpoint: Checkpoint, name: str, dtype, device) -> nn.Module:
    """The Linear of a stored matrix: nn.Linear in a dtype, or without one at rest in the stored format.

    kv_b_proj never stays quantised: absorption reads its matrix, not its product with a vector.
    """
    wide, at_rest = dtype or DTYPE_NAMES[NAME_OF[checkpoint.config.torch_dtype]], dtype is None and not name.endswith("kv_b_proj")
    if checkpoint.holds(f"{name}.weight_packed"):
        parts = {kind: checkpoint.tensor(f"{name}.{kind}") for kind in ("weight_packed", "weight_scale", "weight_shape")}
        check_int4_shape(checkpoint, name, parts)
        if at_rest:
            return linear_at_rest(parts, device, device.type == "cpu")
        return plain_linear(int4_dequantize(parts["weight_packed"], parts["weight_scale"], wide), device)
    weight_OI = (checkpoint.tensor if ".experts." in name else checkpoint.finite)(f"{name}.weight")
    if weight_OI.dtype != torch.float8_e4m3fn:
        return plain_linear(weight_OI.to(wide), device)
    scale_BG = checkpoint.scale(f"{name}.weight_scale_inv")
    if at_rest:
        return linear_at_rest({"weight": weight_OI, "weight_scale_inv": scale_BG}, device, device.type == "cpu")
    linear = plain_linear(fp8_dequantize(weight_OI, scale_BG, wide), device)
    checkpoint.let_go(f"{name}.weight")
    return linear


def linear_at_rest(parts: dict, device, by_codes: bool, own: bool = False) -> nn.Module:
    """The Linear that keeps its stored tensors, given by kind. `by_codes` takes the one that a CPU computes fastest with.
    `own` memory is nobody else's, so that it may be written to, and was looked at for NaN."""
    parts = {kind: tensor.to(device) for kind, tensor in parts.items()}
    if "weight_scale_inv" in parts:
        code_OI, scale_BG = parts["weight"], parts["weight_scale_inv"]
        return (FP8CodesLinear if by_codes else FP8Linear)(code_OI, scale_BG, own or None)
    packed_OU, scale_OG, shape_2 = (parts[kind] for kind in ("weight_packed", "weight_scale", "weight_shape"))
    if by_codes and len(packed_OU) % KERNEL_STEP == 0:
        return INT4KernelLinear(packed_OU, scale_OG, shape_2, in_place=own)
    return INT4Linear(packed_OU, scale_OG, shape_2)


def check_int4_shape(checkpoint: Checkpoint, name: str, parts):
    """weight_shape repeats what the packed words' shape says; a file in which they differ was packed otherwise."""
    packed_OU, shape_2 = parts["weight_packed"], parts["weight_shape"]
    if shape_2.tolist() != [packed_OU.shape[0], packed_OU.shape[1] * NIBBLES]:
        raise K2Error(f"{checkpoint.directory}: {name}.weight_shape is {shape_2.tolist()}; expected {[packed_OU.shape[0], packed_OU.shape[1] * NIBBLES]}. The shard is damaged: fetch it again.")


class RowHead(OutputHead, RowLinear):
    """OutputHead by RowLinear's kernels: the product that it widens, its super().forward, is theirs."""


def head_for(checkpoint: Checkpoint, dtype, device) -> OutputHead:
    """The output head, on the meta device, in the form that computes fastest."""
    rows = wants_row_kernel(dtype or checkpoint.tensor("lm_head.weight").dtype, device)
    with torch.device("meta"):
        return (RowHead if rows else OutputHead)(checkpoint.config)


def plain_linear(weight_OI, device) -> nn.Linear:
    """An nn.Linear around a given matrix, without making a random one first."""
    with torch.device("meta"):
        linear = (RowLinear if wants_row_kernel(weight_OI.dtype, device) else nn.Linear)(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    linear.weight = nn.Parameter(weight_OI.to(device), requires_grad=False)
    return linear


def fill_tensors(checkpoint: Checkpoint, prefix: str, module: nn.Module, dtype, device):
    """Give a module its own vectors and tables (norms, router, embedding, head), not those of its children."""
    for name, old in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        full = f"{prefix.rstrip('.')}.{name}"
        values = checkpoint.finite(full)
        if name == "e_score_correction_bias":
            module.register_buffer(name, values.float().to(device))
            continue
        home = torch.device("cpu") if prefix == "model.embed_tokens" else device
        kind = dtype or values.dtype
        if isinstance(module, Router):  # it computes in float32: widening 384 rows for each token would cost more than the product
            kind = torch.promote_types(kind, torch.float32)
        setattr(module, name, nn.Parameter(values.to(kind).to(home), requires_grad=False))
        if prefix == "model.embed_tokens":
            checkpoint.let_go(full)  # its rows are read when they are asked for


FORMATS = {"bf16": ("bfloat16", None), "fp32": ("float32", None), "fp8": ("bfloat16", FP8_CONFIG), "int4": ("bfloat16", INT4_CONFIG)}


def save(model: K2, directory, format: str = "bf16", shards: int | None = None, files: dict[str, str] | None = None):
    """Write a checkpoint in the released layout: format bf16, fp8 or int4 (fp32 for tests), a shard a layer by default.

    `files` are texts to put beside it (the tokenizer's). All is written to a folder beside the target, flushed to the
    disk and renamed as one: the target appears whole or not at all. Raises K2Error if it exists already or does not fit.
    """
    directory = Path(directory)
    if format not in FORMATS:
        raise K2Error(f"save: format {format!r}; expected one of {', '.join(FORMATS)}.")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise K2Error(f"{directory}: expected a new or empty folder, found one with content. Choose another folder; nothing was overwritten.")
    torch_dtype, quantization = FORMATS[format]
    config = replace(model.config, torch_dtype=torch_dtype, quantization_config=quantization, tensor_prefix="")
    if format == "int4" and (config.hidden_size % GROUP or config.moe_intermediate_size % GROUP):
        raise K2Error(f"save: int4 packs groups of {GROUP} inputs; hidden_size {config.hidden_size} or moe_intermediate_size {config.moe_intermediate_size} does not divide. Save as fp8.")
    file_of = shard_names(config, expected_tensors(config), shards or config.num_hidden_layers)
    temporary = directory.with_name(f".{directory.name}.saving-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write_shards(model, config, file_of, temporary)
        texts = {"config.json": json.dumps(config.to_dict(), indent=2) + "\n", **(files or {})}
        for name, text in texts.items():
            write_through(temporary / name, text.encode())
        if directory.exists():
            directory.rmdir()
        os.rename(temporary, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise K2Error(f"{directory}: could not be written: {error}. Nothing was put there; make room or choose another folder.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_shards(model: K2, config: K2Config, file_of: dict[str, str], folder: Path):
    """The shards one after the other, each flushed, and then the index."""
    modules, total = dict(model.named_modules()), 0
    for file in sorted(set(file_of.values())):
        tensors = {name: stored_tensor(modules, name, config) for name in file_of if file_of[name] == file}
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        safetensors.torch.save_file(tensors, folder / file, metadata={"format": "pt"})
        os.chmod(folder / file, 0o644)  # the library leaves them readable by their owner alone
        with open(folder / file, "rb+") as written:
            os.fsync(written.fileno())
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    write_through(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_through(path: Path, content: bytes):
    """Write a file and wait until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def stored_tensor(modules: dict, name: str, config: K2Config) -> torch.Tensor:
    """One tensor as the checkpoint of this config stores it, computed from the model's module."""
    owner, _, kind = name.rpartition(".")
    if owner not in modules:
        raise K2Error(f"save: expected a module {owner}, found none. A model with compiled products cannot be saved: load it without them.")
    if kind == "e_score_correction_bias":
        return modules[owner].e_score_correction_bias.float().contiguous().cpu()
    weight = dense_weight(modules[owner])
    if kind == "weight_shape":
        return torch.tensor(weight.shape, dtype=torch.int32)
    if kind in ("weight_packed", "weight_scale"):
        return int4_quantize(weight)[kind == "weight_scale"]
    if config.weight_format == "fp8" and isinstance(modules[owner], (nn.Linear, FP8Linear, INT4Linear)) and owner != "lm_head":
        return fp8_quantize(weight)[kind == "weight_scale_inv"]
    return weight.to(DTYPE_NAMES[NAME_OF[config.torch_dtype]]).contiguous().cpu().clone()


def dense_weight(module: nn.Module) -> torch.Tensor:
    """A module's weight in float32 (plain ones in their own dtype), whatever it is at rest, on the CPU."""
    if isinstance(module, FP8Linear):
        return fp8_dequantize(module.weight, module.weight_scale_inv).cpu()
    if isinstance(module, INT4Linear):
        return int4_dequantize(module.weight_packed, module.weight_scale).cpu()
    return module.weight.detach().cpu()
