"""Which part of a checkpoint: all of it, or some layers, some experts, some kinds of tensors.

    --layers 0-3            those layers; from 0 on also embedding, last norm and head, so that it runs
    --experts 1:17,203      of all routed experts only 17 and 203 of layer 1; without --layers and --part nothing else
    --part attention        of those layers only this kind, by the names below; several by repeating the flag
    --part tokenizer        no tensor at all: config and tokenizer

What is chosen is told from a tensor's name alone, so that the index of a checkpoint which is not here is enough.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .checkpoint import RECORD, expected_tensors, reason_to_ignore
from .config import K2Config, K2Error, read_json_object

KINDS = {  # kind: the names' part behind "model.layers.N." or, where there is no layer, the whole name
    "embedding": r"model\.embed_tokens\.",
    "attention": r"self_attn\.|input_layernorm\.",
    "norm": r"post_attention_layernorm\.",
    "dense": r"mlp\.(gate|up|down)_proj\.",
    "router": r"mlp\.gate\.",
    "shared-expert": r"mlp\.shared_experts\.",
    "expert": r"mlp\.experts\.",
    "head": r"model\.norm\.|lm_head\.",
}
LAYER = re.compile(r"^(?:language_model\.)?model\.layers\.(\d{1,4})\.(?:mlp\.experts\.(\d{1,6})\.)?")


class Place(NamedTuple):
    """Where a tensor belongs: its kind, its layer and its expert, or None where it has none."""

    kind: str | None
    layer: int | None
    expert: int | None


def place_of(name: str) -> Place:
    """A tensor's place, from its name; a stranger's kind is None."""
    found = LAYER.match(name)
    layer, expert = found.groups() if found else (None, None)
    if expert is not None:
        return Place("expert", int(layer), int(expert))
    rest = name[found.end() :] if found else name.removeprefix("language_model.")
    kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, rest)), None)
    return Place(kind, int(layer) if found else None, None)


@dataclass(frozen=True)
class Part:
    """A choice of tensors. None is no restriction; `experts` maps a layer to the routed experts wanted of it."""

    layers: tuple[int, ...] | None = None
    experts: dict[int, tuple[int, ...]] | None = None
    kinds: tuple[str, ...] | None = None

    def whole(self) -> bool:
        """True if nothing is left out."""
        return self == Part()

    def runs(self) -> bool:
        """True if what is chosen is a model: layers from the first on, with all that stands before and behind them."""
        return self.kinds is None and self.experts is None and (self.layers is None or self.layers == tuple(range(len(self.layers))))

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name is chosen. What the code ignores is fetched only with the whole."""
        if self.whole():
            return True
        kind, layer, expert = place_of(name)
        if kind is None or (expert is None and reason_to_ignore(name)):
            return False
        if self.experts is not None and expert is not None:
            return expert in self.experts.get(layer, ())
        if self.kinds is None and self.experts is not None and self.layers is None:
            return False
        if self.kinds is not None and kind not in self.kinds:
            return False
        layers = tuple(self.experts) if self.layers is None and self.experts is not None else self.layers
        if layer is None:
            return self.kinds is not None or layers is None or self.runs()
        return layers is None or layer in layers

    def check(self, config: K2Config):
        """Raise K2Error for a layer or an expert that the model does not have."""
        for layer in [*(self.layers or ()), *(self.experts or ())]:
            if layer >= config.num_hidden_layers:
                raise K2Error(f"--layers, --experts: found layer {layer}; expected 0 to {config.num_hidden_layers - 1}, the layers of this model.")
        for layer, experts in (self.experts or {}).items():
            if config.is_dense(layer) or max(experts) >= config.n_routed_experts:
                has = "no routed experts" if config.is_dense(layer) else f"experts 0 to {config.n_routed_experts - 1}"
                raise K2Error(f"--experts {layer}:{max(experts)}: layer {layer} has {has}. Name others.")

    def flags(self) -> str:
        """The flags that ask for it."""
        layers = f"--layers {spelled(self.layers)}" if self.layers is not None else ""
        experts = f"--experts {';'.join(f'{layer}:{spelled(ids)}' for layer, ids in self.experts.items())}" if self.experts else ""
        return " ".join(filter(None, [layers, experts, *(f"--part {kind}" for kind in self.kinds or ())]))

    def to_dict(self) -> dict:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict) -> "Part":
        """And back."""
        layers, experts, kinds = (raw[key] for key in ("layers", "experts", "kinds"))
        numbers = [*(layers or ()), *(e for ids in (experts or {}).values() for e in ids)]
        if not all(type(number) is int and number >= 0 for number in numbers) or not set(kinds or ()) <= {*KINDS, "tokenizer"} or isinstance(kinds, str):
            raise ValueError("a part of other types")
        return cls(None if layers is None else tuple(layers), None if experts is None else {int(layer): tuple(ids) for layer, ids in experts.items()},
                   None if kinds is None else tuple(kinds))  # fmt: skip


def spelled(numbers: Iterable[int]) -> str:
    """0-3,7 for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """0-3,7 as numbers, in order and each once."""
    numbers = set()
    for piece in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", piece)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise K2Error(f"{flag} {text[:100]}: expected numbers and ranges such as 0-3,7, found {piece[:100]!r}.")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers))


def parse_experts(texts: list[str]) -> dict[int, tuple[int, ...]]:
    """1:17,203 as {1: (17, 203)}; several layers by several flags, or with a semicolon between them."""
    found = {}
    for text in (piece for given in texts for piece in given.split(";")):
        layer, colon, experts = text.partition(":")
        if not colon or not re.fullmatch(r"\s*[0-9]{1,4}\s*", layer) or int(layer) in found:
            raise K2Error(f"--experts {text[:100]}: expected a layer, a colon and its experts, such as 1:17,203, each layer once.")
        found[int(layer)] = parse_numbers(experts, f"--experts {layer}:")
    return found


def parse_part(layers: str | None, experts: list[str] | None, kinds: list[str] | None) -> Part:
    """The part that the flags ask for."""
    known = (*KINDS, "tokenizer")
    for kind in kinds or ():
        if kind not in known:
            raise K2Error(f"--part {kind}: expected one of {', '.join(known)}.")
    return Part(parse_numbers(layers, "--layers") if layers is not None else None, parse_experts(experts) if experts else None, tuple(kinds) if kinds else None)


def part_of(directory) -> Part:
    """Which part of a checkpoint a folder holds, by the record that its download left: the whole one where there is none."""
    path = Path(directory) / RECORD
    raw = read_json_object(path).get("part") if path.exists() else None
    try:
        return Part() if raw is None else Part.from_dict(raw)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise K2Error(f"{path}: expected a part with layers, experts and kinds, found {str(raw)[:200]}. Run the download again.") from None


class Layout(NamedTuple):
    """A checkpoint as its config, index and headers tell it; an open Checkpoint has the same three."""

    config: K2Config
    weight_map: dict[str, str]
    headers: dict[str, dict[str, dict]]


def differences(layout: Layout, part: Part) -> list[str]:
    """What is not as the config implies, one line each: a tensor of the part that is missing, unknown, or of another
    dtype or shape, and one that index and headers disagree about."""
    expected, found = expected_tensors(layout.config), []
    for name, file in layout.weight_map.items():
        entry = layout.headers.get(file, {}).get(name)
        if entry is None:
            found.append(f"{file}: expected {name}, which the index places here; the header lacks it")
        elif reason_to_ignore(name):
            continue
        elif name not in expected:
            found.append(f"{file}: unknown tensor {name}; config.json implies none of this name")
        elif entry["dtype"] not in expected[name].dtypes or entry["shape"] != list(expected[name].shape):
            found.append(f"{file}: {name} is {entry['dtype']} {entry['shape']}; expected {' or '.join(expected[name].dtypes)} {list(expected[name].shape)}")
    held = ((name, file) for file, header in layout.headers.items() for name in header)
    found += [f"{file}: holds {name}, which the index places in {layout.weight_map.get(name, 'no file')}" for name, file in held if layout.weight_map.get(name) != file]
    return found + [f"{name} is missing; config.json implies it" for name in expected if name not in layout.weight_map and part.takes(name)]


def check_layout(where, layout: Layout, part: Part):
    """Raise K2Error if a tensor is not as the config implies; it names the first and counts the others."""
    found = differences(layout, part)
    if found:
        raise K2Error(f"{where}: {found[0]}; {len(found) - 1} more. Expected what config.json implies. Is it this checkpoint's own, and the checkpoint whole?")
