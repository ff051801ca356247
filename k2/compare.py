"""The debugger: `python -m k2 compare A B` runs two variants on the same tokens and names the first tensor that differs.

    torch, stored, float32, bfloat16, float64    our model, as loaded or in a dtype
    numpy                                        k2/reference.py in float64, on weights dequantised apart from ours
    transformers                                 its deepseek_v3 in float32, where it is installed
    mutant:NAME                                  our model with one of tests/mutants.py's mistakes in it
    DIR                                          our model on another checkpoint

What rounding explains, as the relative L2 error of the worst row: LIMITS of the coarser dtype of the two, times the
square root of the layers that the tensor lies behind, since independent roundings that are added up layer by layer grow
so; measured, they did up to 61 layers. Float64's 1e-10 and float32's 1e-5 a layer are the house's bounds. In bfloat16
the residual stream was measured at 8.5e-3 sqrt(layers) on random models, with the routing held, and four to five times
that is allowed (layer_check.py's "stored" limit is the same number); float16 has three bits more. A part of a layer can
cancel to a short vector that keeps the errors of long ones: on sixty random models, some of them a few numbers wide, the
worst row took 3.6 times the stream's bound, and in these two dtypes PART times as much is allowed (1e-5 has the room).
The router is judged more sharply: it computes in float32 whatever the model does, so where its input is equal to the
bit, float32 is its bound.

Experts are chosen by comparing scores, so that two right programs may choose differently. A choice that differs is rounding if
the experts' scores lie closer together than the errors of these scores, and a mistake otherwise. From such a token on the
two have parted rightly, and only the tokens before it, which cannot see it, are compared further. That makes a comparison
in bfloat16 blind quickly: where it does, the verdict says from where on and how much was left.

    T tokens · M rows of some of them · I a tensor's width · E experts
"""

import importlib
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .checkpoint import DTYPES, Checkpoint, save
from .config import K2Config, K2Error
from .kv_cache import LatentCache
from .layer_check import LIMITS as LAYER_LIMITS
from .layer_check import Weights
from .offload import load
from .recording import FEWEST, Recording, Rows, call_names, layer_and_part, numpy_recording, place, torch_recording, transformers_recording

LIMITS = {"float64": LAYER_LIMITS["float64"], "float32": LAYER_LIMITS["float32"], "float16": LAYER_LIMITS["stored"] / 8, "bfloat16": LAYER_LIMITS["stored"]}
PART = 4  # what a part of a layer may be off, beside the residual stream
OURS = ("stored", "float32", "bfloat16", "float64")
MUTANT = "mutant:"
PROMPT = "def read(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n"


class Setting(NamedTuple):
    """What both variants have in common: a checkpoint, ids, and the dtype and memory of our model where its variant does not say."""

    directory: str
    ids: list[int]
    dtype: str = "auto"
    ram: int | None = None


# ---- variants ----


def record(variant: str, setting: Setting) -> Recording:
    """Run a variant by its name. Raises K2Error for one that there is not."""
    check_variant(variant)
    if variant == "numpy":
        checkpoint = Checkpoint(setting.directory)
        return numpy_recording(variant, checkpoint.config, Weights(checkpoint), setting.ids)
    if variant == "transformers":
        return their_recording(setting)
    if variant.startswith(MUTANT):
        return mutant_recording(variant, setting)
    if variant == "torch" or variant in OURS:
        return our_recording(variant, setting._replace(dtype=setting.dtype if variant == "torch" else variant))
    return our_recording(variant, setting._replace(directory=variant))


def check_variant(variant: str):
    """Raise K2Error for a name that is none, before anything is loaded."""
    if variant.startswith(MUTANT):
        mutant_of(variant)
    elif variant == "transformers" and importlib.util.find_spec("transformers") is None:
        raise K2Error("transformers: not installed. Install tests/requirements-oracles.txt, or compare with numpy.")
    elif variant not in ("torch", "numpy", "transformers", *OURS) and not os.path.isdir(variant):
        raise K2Error(f"{variant}: no such variant. Expected torch, numpy, transformers, {', '.join(OURS)}, a checkpoint directory, or mutant:NAME of tests/mutants.py.")


def our_recording(variant: str, setting: Setting) -> Recording:
    """The model of this package."""
    model = our_model(setting, load)
    return torch_recording(variant, model, LatentCache(model.config), setting.ids)


def our_model(setting: Setting, load):
    """The model that the setting describes, by this package's `load` or by a mutated one's."""
    dtype = DTYPES[setting.dtype]
    model = load(setting.directory, dtype=dtype, ram=setting.ram)
    # Changes no weight any more; it is here for what a conversion must not touch.
    return model.to(dtype) if isinstance(dtype, torch.dtype) else model


def their_recording(setting: Setting) -> Recording:
    """transformers on the same weights in float32, handed over as a file: it knows neither our FP8 nor our INT4."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "plain"
        save(load(setting.directory, dtype=torch.float32), plain, format="fp32")
        config = transformers.DeepseekV3Config.from_dict({**json.loads((plain / "config.json").read_text()), "model_type": "deepseek_v3"})
        model = transformers.DeepseekV3ForCausalLM.from_pretrained(plain, config=config, dtype=torch.float32).eval()
        return transformers_recording("transformers", model, transformers.DynamicCache(), setting.ids)


def mutant_of(variant: str) -> tuple:
    """tests/mutants.py and the mistake in it that the variant names, or a K2Error that helps to find the name."""
    mutants, name = mutants_module(), variant.removeprefix(MUTANT)
    mutant = next((m for m in mutants.MUTANTS if m.name == name), None)
    if mutant is None:
        near = [m.name for m in mutants.MUTANTS if name and name.lower() in m.name.lower()]
        raise K2Error(f"{variant}: tests/mutants.py has no mistake of this name. {'Do you mean: ' + '; '.join(near[:3]) + '?' if near else 'Names stand in its list MUTANTS.'}")
    return mutants, mutant


def mutant_recording(variant: str, setting: Setting) -> Recording:
    """Our model, imported anew with a mistake in it."""
    mutants, mutant = mutant_of(variant)
    with mutants.patched(mutant):
        package = importlib.import_module("k2")
        try:
            model = mutated_model(package, setting)
            return torch_recording(variant, model, package.LatentCache(model.config), setting.ids)
        except package.K2Error as error:  # its class is not ours: it comes from the copy
            raise K2Error(str(error)) from None


def mutated_model(package, setting: Setting):
    """The model of a mutated package; partly filled where it wants tensors that the checkpoint does not have."""
    try:
        return our_model(setting, package.load)
    except KeyError:
        return partly_filled(package, setting)


def partly_filled(package, setting: Setting):
    """A model of that package with the checkpoint's weights as far as it has a place for them; the others stay random."""
    dtype = DTYPES[setting.dtype]
    dense = load(setting.directory, dtype=dtype if isinstance(dtype, torch.dtype) else torch.float32)
    model = package.K2(dense.config).to(dense.lm_head.weight.dtype).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    return model


def mutants_module():
    """tests/mutants.py, which is no part of the package."""
    path = Path(__file__).parent.parent / "tests" / "mutants.py"
    if not path.is_file():
        raise K2Error(f"{path}: expected the list of mistakes, found nothing. mutant: needs the repository, not only the package.")
    spec = importlib.util.spec_from_file_location("mutants_to_compare", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- judging ----


class Line(NamedTuple):
    """One tensor: rows compared, the worst row's relative error, what rounding explains, what that means; `differs` if it does not explain it."""

    name: str
    rows: int
    error: float
    allowed: float
    verdict: str
    differs: bool = False
    tokens: tuple[int, ...] = ()  # those whose rows differ, or whose choice does


def row_errors(a: Rows, b: Rows) -> np.ndarray:
    """|b - a| / |a| of each row, L2 (M,); infinite where a row is no number or has another width."""
    if a.values.shape != b.values.shape:
        return np.full(max(len(a.tokens), len(b.tokens)), np.inf)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error_M = np.linalg.norm(b.values - a.values, axis=-1)
        error_M = np.where(error_M == 0, 0.0, error_M / np.linalg.norm(a.values, axis=-1))
    return np.where(np.isfinite(error_M), error_M, np.inf)


def common(a: Rows, b: Rows, limit: int) -> tuple[Rows, Rows]:
    """The rows of tokens that both have, before the limit."""
    tokens = [t for t in np.intersect1d(a.tokens, b.tokens) if t < limit]
    return tuple(Rows(rows.tokens[np.isin(rows.tokens, tokens)], rows.values[np.isin(rows.tokens, tokens)]) for rows in (a, b))


def allowed_error(name: str, a: Recording, b: Recording, same_input: bool) -> float:
    """What rounding explains; see the top of this file."""
    limit, (layer, part, _) = max(LIMITS[a.dtype], LIMITS[b.dtype]), layer_and_part(name)
    if part.startswith("mlp.gate") and same_input:
        limit = min(limit, LIMITS["float32"])
    if layer >= 0 and part and limit > LIMITS["float32"]:
        limit *= PART
    depth = layer + 1 if layer >= 0 else 1 if name == "model.embed_tokens" else a.layers
    return limit * math.sqrt(depth)


def lines(a: Recording, b: Recording) -> Iterator[Line]:
    """A line for each tensor in the order in which a token meets them; `a` is taken for right."""
    limit, input_error = 10**9, math.inf
    for name in sorted(a.tensors.keys() | b.tensors.keys(), key=place):
        if layer_and_part(name)[1] in a.hidden + b.hidden:
            continue
        if name not in a.tensors or name not in b.tensors:
            if layer_and_part(name)[2] < 0:  # an expert that one of them did not ask is judged by the choice
                yield Line(name, 0, math.inf, 0.0, f"only in {(a if name in a.tensors else b).variant}", True)
            continue
        rows = common(a.tensors[name], b.tensors[name], limit)
        if name.endswith("mlp.gate.ids"):
            line = judged_choice(name, *rows, *common(a.tensors[biased(name)], b.tensors[biased(name)], limit))
            limit = min((limit, *line.tokens))
        else:
            if name.endswith("mlp.gate.weights"):
                rows = tuple(in_order_of_ids(r, common(x.tensors[ids_of(name)], y.tensors[ids_of(name)], limit)[0]) for r, x, y in zip(rows, (a, b), (b, a)))
            line = judged(name, *rows, allowed_error(name, a, b, input_error == 0))
        if name.endswith("post_attention_layernorm"):
            input_error = line.error
        if line.rows or line.differs:
            yield line
        elif limit == 0 and layer_and_part(name)[2] < 0:
            yield Line(name, 0, 0.0, 0.0, "nothing left to compare")


def biased(name: str) -> str:
    """The scores that this choice was made by."""
    return name.replace("gate.ids", "gate.biased_scores")


def ids_of(name: str) -> str:
    """The choice that these weights belong to."""
    return name.replace("gate.weights", "gate.ids")


def in_order_of_ids(weights: Rows, ids: Rows) -> Rows:
    """Weights sorted by expert: the order of a choice, best first, is not part of it."""
    return Rows(weights.tokens, np.take_along_axis(weights.values, ids.values.argsort(axis=-1), axis=-1))


def judged(name: str, a: Rows, b: Rows, allowed: float) -> Line:
    """A tensor of numbers."""
    error_M = row_errors(a, b)
    if not len(error_M):
        return Line(name, 0, 0.0, allowed, "no rows")
    error, wrong = float(error_M.max()), error_M > allowed
    if a.values.shape != b.values.shape:
        return Line(name, len(error_M), error, allowed, f"DIFFERS: shape {a.values.shape} and {b.values.shape}", True)
    verdict = "DIFFERS" if wrong.any() else "rounding" if error else "same"
    return Line(name, len(error_M), error, allowed, verdict, bool(wrong.any()), tuple(a.tokens[wrong].tolist()))


def judged_choice(name: str, a: Rows, b: Rows, scores_a: Rows, scores_b: Rows) -> Line:
    """Chosen experts: the largest margin that was passed over, beside the error of the two scores that it lies between."""
    if a.values.shape != b.values.shape:
        return Line(name, len(a.tokens), math.inf, 0.0, "DIFFERS: another number of experts", True)
    parted = [t for t in range(len(a.tokens)) if set(a.values[t]) != set(b.values[t])]
    margins = [margin_and_error(set(a.values[t].astype(int)), set(b.values[t].astype(int)), scores_a.values[t], scores_b.values[t]) for t in parted]
    wrong = [t for t, (margin, error) in zip(parted, margins) if margin > error]
    if not parted:
        return Line(name, len(a.tokens), 0.0, 0.0, "same")
    margin, error = max(margins, key=lambda pair: pair[0] - pair[1])
    tokens = tuple(int(a.tokens[t]) for t in wrong or parted)
    verdict = "DIFFERS" if wrong else f"rounding: {len(parted)} of {len(a.tokens)} tokens choose others by a hair; compared on: those before token {min(tokens)}"
    return Line(name, len(a.tokens), margin, error, verdict, bool(wrong), tokens)


def margin_and_error(chosen_a: set, chosen_b: set, scores_a, scores_b) -> tuple[float, float]:
    """Of the experts that only one side chose: how far their scores lie apart on either side, and by how much the scores differ."""
    mine, other = list(chosen_a - chosen_b), list(chosen_b - chosen_a)
    best, worst = max(mine, key=lambda e: scores_a[e]), min(other, key=lambda e: scores_a[e])
    margin = max(abs(scores[best] - scores[worst]) for scores in (scores_a, scores_b))
    return margin, sum(abs(scores_a[e] - scores_b[e]) for e in (best, worst)) * (1 + 1e-9)  # equality is the usual case of a flip at a tie


# ---- what is printed ----


def table(found: list[Line], everything: bool) -> str:
    """The lines up to the first difference, or all; neighbouring experts that agree share one."""
    end = next((n + 1 for n, line in enumerate(found) if line.differs), len(found))
    shown = found if everything else merged(found[:end])
    width = max(len(line.name) for line in shown)
    rows = [f"{line.name:{width}}  {line.rows:>5}  {line.error:>8.1e}  {line.allowed:>8.1e}  {line.verdict}" for line in shown]
    return "\n".join([f"{'tensor':{width}}  {'rows':>5}  {'error':>8}  {'allowed':>8}  verdict", *rows])


def merged(found: list[Line]) -> list[Line]:
    """A layer's experts as one line each layer, with the worst error, as far as they do not differ."""
    kept: list[Line] = []
    for line in found:
        layer, part, expert = layer_and_part(line.name)
        name = f"model.layers.{layer}.{part}.*"
        if expert < 0 or line.differs:
            kept.append(line)
        elif kept and kept[-1].name == name:
            kept[-1] = kept[-1]._replace(rows=kept[-1].rows + line.rows, error=max(kept[-1].error, line.error), verdict="rounding" if max(kept[-1].error, line.error) else "same")
        else:
            kept.append(line._replace(name=name))
    return kept


def sentence(found: list[Line], a: Recording, b: Recording, tokens: int) -> str:
    """The finding, in one sentence."""
    first = next((line for line in found if line.differs), None)
    if first is not None:
        return f"{first.name} is the first tensor that differs: {what_differs(first, a, b, tokens)}."
    if not any(line.error for line in found):
        return f"Nothing differs between {a.variant} and {b.variant}: {len(found)} tensors of {tokens} tokens are equal to the bit."
    worst = max(found, key=lambda line: line.error / line.allowed if line.allowed and not line.name.endswith("gate.ids") else 0.0)
    flip = next((line for line in found if line.name.endswith("gate.ids") and line.tokens), None)
    nearest = f"the nearest to its bound is {worst.name}, {worst.error:.1e} of {worst.allowed:.1e}"
    said = f"Nothing differs beyond rounding between {a.variant} and {b.variant} in {len(found)} tensors of {tokens} tokens; {nearest}"
    if flip is None:
        return f"{said}."
    left = min(line.rows for line in found if line.name == "lm_head")
    rest = f"at the end {left} of {tokens} tokens were left" if left else "at the end nothing was left, so that this says little"
    return f"{said}. From {flip.name} on only tokens before a choice by a hair were compared (there the first was token {min(flip.tokens)}); {rest}."


def what_differs(line: Line, a: Recording, b: Recording, tokens: int) -> str:
    """Error, bound, and in which calls."""
    if not line.rows or not line.tokens:
        return line.verdict.removeprefix("DIFFERS: ")
    names = call_names(tokens)
    calls = ", ".join(dict.fromkeys(names[t] for t in line.tokens))
    where = f"in {len(line.tokens)} of {line.rows} rows, the first that of token {line.tokens[0]} ({calls})"
    if line.name.endswith("gate.ids"):
        return f"experts {line.error:.1e} apart are taken for one another, though their scores agree to {line.allowed:.1e}, {where}"
    return f"relative error {line.error:.1e}, where rounding explains {line.allowed:.1e}, {where}"


def checked_ids(directory, ids: list[int]) -> list[int]:
    """The same ids, if there are enough and no more than the context holds."""
    most = K2Config.from_json(directory).max_position_embeddings
    if not FEWEST <= len(ids) <= most:
        raise K2Error(f"--prompt: {len(ids)} tokens; expected {FEWEST} to {most}: two chunks of a prompt, and some tokens one by one.")
    return ids


def compare(a: str, b: str, setting: Setting, everything: bool = False) -> int:
    """Run both, print table and sentence; 0 where nothing differs beyond rounding, 1 where something does."""
    checked_ids(setting.directory, setting.ids)
    for variant in (a, b):
        check_variant(variant)
    first, second = record(a, setting), record(b, setting)
    found = list(lines(first, second))
    print(table(found, everything))
    print(sentence(found, first, second, len(setting.ids)))
    return int(any(line.differs for line in found))
