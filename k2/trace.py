"""The tracer: `python -m k2 trace "prompt"` walks one prompt through the model and shows what every layer did to it.

    stream      RMS of the residual stream before a layer, after its attention, and after its feed-forward
    experts     the chosen ones and their weights
    attention   the tokens that a token looked at most, by one head or on average over all of them
    reading     what the model would say if this layer were the last: its output through the last norm and the head
                (nostalgebraist's logit lens, 2020), the likeliest tokens and their probabilities

Nothing grows with T x S: attention is computed a block of tokens at a time and KEYS of each row are kept, and the
head's 163,840 numbers a token live for a block only. So a prompt of thousands of tokens can be traced.

    T tokens · S tokens attended to · D hidden · H heads · N, R a head's plain and rotary part · C kv rank · K chosen experts
    W vocabulary · M rows of a block · I what is kept of each: KEYS or TOP
"""

import contextlib
import json
import unicodedata
from pathlib import Path
from typing import NamedTuple

import torch

from .attention import causal_mask
from .config import K2Error
from .generation import prefill
from .kv_cache import LatentCache
from .model import K2
from .tokenizer import Tokenizer

KEYS = 8  # the most attended tokens that are kept
TOP = 5  # the likeliest tokens
NUMBERS = 2**21  # at a time, of scores or of logits
COLUMNS = 100
LONGEST = 24  # characters of a token that are shown


class LayerTrace(NamedTuple):
    """One layer, for all T tokens; the experts' are None in a dense layer."""

    shapes: dict[str, tuple[int, ...]]
    rms: torch.Tensor  # (T, 3)
    expert_ids: torch.Tensor | None  # (T, K), best first
    weights: torch.Tensor | None  # (T, K)
    keys: torch.Tensor  # (T, KEYS) places of the most attended tokens, the most attended first
    shares: torch.Tensor  # (T, KEYS) their parts of all attention
    top_ids: torch.Tensor  # (T, TOP)
    top_shares: torch.Tensor  # (T, TOP) probabilities


class Trace(NamedTuple):
    """A prompt and its layers. `head` is None for the average over `heads`; `names` are the tokens' texts by id."""

    model: str
    ids: list[int]
    head: int | None
    heads: int
    experts: int
    names: dict[int, str]
    layers: list[LayerTrace]


# ---- collecting ----


class Notes:
    """What hooks saw of one layer: in this call, where the last word counts (a store that guesses asks a router twice), and
    in the calls before."""

    def __init__(self):
        self.now: dict[str, torch.Tensor] = {}
        self.kept: dict[str, list[torch.Tensor]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def end_call(self):
        """Put this call's rows behind those of the calls before."""
        for name, values in self.now.items():
            self.kept.setdefault(name, []).append(values.cpu())
        self.now = {}

    def trace(self) -> LayerTrace:
        """All rows."""
        rows = {name: torch.cat(parts) for name, parts in self.kept.items()}
        return LayerTrace(self.shapes, **{name: rows.get(name) for name in LayerTrace._fields[1:]})


def trace(model: K2, tokenizer: Tokenizer, ids: list[int], head: int | None = None, name: str = "") -> Trace:
    """Read the prompt as generation does, and note what each layer does. Raises K2Error for a prompt that is empty or too long, or no head of the model's."""
    c = model.config
    if not 1 <= len(ids) <= c.max_position_embeddings:
        raise K2Error(f"prompt: {len(ids)} tokens; expected 1 to {c.max_position_embeddings}, the context of this model.")
    if head is not None and not 0 <= head < c.num_attention_heads:
        raise K2Error(f"--head: found {head}; expected 0 to {c.num_attention_heads - 1}, or no --head for the average of all.")
    notes = [Notes() for _ in model.model.layers]
    with watched(model, notes, head):
        prefill(model, ids, LatentCache(c))
    layers = [note.trace() for note in notes]
    said = {i for layer in layers for i in layer.top_ids.unique().tolist()} | set(ids)
    return Trace(name, list(ids), head, c.num_attention_heads, c.n_routed_experts, {i: token_text(tokenizer, i) for i in sorted(said)}, layers)


@contextlib.contextmanager
def watched(model: K2, notes: list[Notes], head: int | None):
    """While this lasts, the layers' calls go to their notes."""
    handles = []
    for layer, note in zip(model.model.layers, notes):
        handles.append(layer.self_attn.register_forward_hook(lambda module, inputs, _, note=note: note_attention(note, module, inputs, head)))
        handles.append(layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs, note=note: note.now.update(middle=rms(inputs[0]))))
        handles.append(layer.register_forward_hook(lambda _, inputs, output, note=note: note_layer(note, model, inputs[0], output)))
        if hasattr(layer.mlp, "gate"):
            handles.append(layer.mlp.gate.register_forward_hook(lambda _, inputs, output, note=note: note.now.update(expert_ids=output[0], weights=output[1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def note_layer(note: Notes, model: K2, before_TD, after_TD):
    """The stream around a layer, and what could be read off behind it. The layer's hook runs last: it ends the call."""
    note.now["rms"] = torch.stack((rms(before_TD), note.now.pop("middle"), rms(after_TD)), dim=-1)
    note.now["top_ids"], note.now["top_shares"] = readings(model, after_TD)
    note.shapes["stream"] = tuple(after_TD.shape)
    if "expert_ids" in note.now:
        note.shapes["chosen experts"] = tuple(note.now["expert_ids"].shape)
    note.end_call()


def rms(x_TD):
    """Root mean square of each row, float64 (T,)."""
    return x_TD.double().square().mean(-1).sqrt()


def readings(model: K2, x_TD):
    """The likeliest next tokens after these states, ids and probabilities (T, TOP)."""
    parts = []
    for block_MD in x_TD.split(max(1, NUMBERS // model.config.vocab_size)):
        shares_MW = model.lm_head(model.model.norm(block_MD)).softmax(dim=-1)
        parts.append(shares_MW.topk(min(TOP, shares_MW.shape[-1])))
    shares_TI, ids_TI = (torch.cat(values) for values in zip(*parts))
    return ids_TI, shares_TI


def note_attention(note: Notes, attention, inputs, head: int | None):
    """What each token looks at most, from the same inputs and the cache as the layer has just written it."""
    x_TD, cos_TP, sin_TP, cache = inputs
    T, S = len(x_TD), cache.length + len(x_TD)
    q_nope_HTN, q_rope_HTR = attention.queries(x_TD, cos_TP, sin_TP)
    c_kv_SC, k_rope_SR = cache.c_kv_MC[:S], cache.k_rope_MR[:S]
    note.shapes |= {"queries": (*q_nope_HTN.shape[:2], q_nope_HTN.shape[-1] + q_rope_HTR.shape[-1]), "cached latents": tuple(c_kv_SC.shape), "cached rotary keys": tuple(k_rope_SR.shape)}
    heads = slice(None) if head is None else slice(head, head + 1)
    q_latent_HTC, q_rope_HTR = q_nope_HTN[heads] @ attention.up_projections()[0][heads], q_rope_HTR[heads]
    mask_TS, step, parts = causal_mask(T, S, x_TD.device), max(1, NUMBERS // (len(q_rope_HTR) * S)), []
    for begin in range(0, T, step):
        rows = slice(begin, begin + step)
        parts.append(most_attended(q_latent_HTC[:, rows], q_rope_HTR[:, rows], c_kv_SC, k_rope_SR, mask_TS[rows], attention.config.softmax_scale))
    note.now["keys"], note.now["shares"] = (torch.cat(values) for values in zip(*parts))


def most_attended(q_latent_HTC, q_rope_HTR, c_kv_SC, k_rope_SR, mask_TS, scale: float):
    """The absorbed form's scores, and of their softmax, on average over the H heads at hand, the largest: places and shares (T, KEYS)."""
    scores_HTS = q_latent_HTC @ c_kv_SC.mT + q_rope_HTR @ k_rope_SR.mT
    # float32 at least, as in attention itself
    wide_HTS = scores_HTS.to(torch.promote_types(scores_HTS.dtype, torch.float32)) * scale
    shares_TS = wide_HTS.masked_fill(~mask_TS, -torch.inf).softmax(dim=-1).mean(dim=0)
    shares_TI, places_TI = shares_TS.topk(min(KEYS, shares_TS.shape[-1]))
    return places_TI, shares_TI


def token_text(tokenizer: Tokenizer, i: int) -> str:
    """A token as one line of visible text: bytes that are no UTF-8, what cannot be printed, and the backslash as escapes."""
    text = tokenizer.token_bytes(i).decode("utf-8", errors="surrogateescape")
    return "".join(visible(c) for c in text)


def visible(c: str) -> str:
    """One character, or its escape; a lone surrogate stands for a byte."""
    if "\udc80" <= c <= "\udcff":
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode()


# ---- as text ----


def text(found: Trace, token: int | None = None) -> str:
    """A page for a terminal of 100 columns: what the layers did to one token, the last unless another is given. Raises K2Error."""
    T = len(found.ids)
    token = T - 1 if token is None else token
    if not 0 <= token < T:
        raise K2Error(f"--token: found {token}; expected 0 to {T - 1}, the tokens of the prompt.")
    by = f"the average of {found.heads} heads" if found.head is None else f"head {found.head} of {found.heads}"
    lines = [f"{T} tokens; what the layers do to token {token}, {quoted(found, found.ids[token])}; attention by {by}"]
    for number, layer in enumerate(found.layers):
        lines += layer_text(found, number, layer, token)
    return "\n".join(lines)


def layer_text(found: Trace, number: int, layer: LayerTrace, token: int) -> list[str]:
    """One layer's lines."""
    before, middle, after = layer.rms[token].tolist()
    keys = [f"{k} {quoted(found, found.ids[k])} {share:.0%}" for k, share in zip(layer.keys[token].tolist(), layer.shares[token].tolist()) if share >= 0.005]
    top = [f"{quoted(found, i)} {share:.1%}" for i, share in zip(layer.top_ids[token].tolist(), layer.top_shares[token].tolist())]
    lines = ["", f"layer {number}{'' if layer.weights is not None else ', dense'}   stream {before:.3g}, after attention {middle:.3g}, after the feed-forward {after:.3g}"]
    if shapes_are_new(found, number):
        lines += entry("shapes", [f"{name} {' x '.join(map(str, shape))}" for name, shape in layer.shapes.items()])
    lines += entry("attends to", keys)
    if layer.weights is not None:
        lines += entry("experts", [f"{e} ({weight:.2f})" for e, weight in zip(layer.expert_ids[token].tolist(), layer.weights[token].tolist())])
    return lines + entry("reads as", top)


def shapes_are_new(found: Trace, number: int) -> bool:
    """Shapes are said where they differ from the layer's above."""
    return number == 0 or found.layers[number].shapes != found.layers[number - 1].shapes


def entry(label: str, items: list[str]) -> list[str]:
    """A label and items, broken between items where they can be; a token's spaces stay."""
    lines = [f"  {label:11}"]
    for n, item in enumerate(items):
        piece = item + (", " if n + 1 < len(items) else "")
        if columns(lines[-1]) + columns(piece.rstrip()) > COLUMNS and len(lines[-1]) > 13:
            lines.append(" " * 13)
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def columns(line: str) -> int:
    """How wide a terminal shows it: Chinese, Japanese, Korean and emoji take two columns each."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


def quoted(found: Trace, i: int) -> str:
    """A token in quotes; of a long one the beginning."""
    name = found.names[i]
    return f"'{name}'" if len(name) <= LONGEST else f"'{name[:LONGEST]}...'"


# ---- as JSON ----


def rounded(values, digits: int = 5):
    """Nested lists of floats of so many significant digits."""
    return [rounded(v, digits) for v in values] if isinstance(values, list) else float(f"{values:.{digits}g}")


def as_dict(found: Trace) -> dict:
    """All of it, as JSON has it."""
    layers = []
    for layer in found.layers:
        row = {"shapes": {name: list(shape) for name, shape in layer.shapes.items()}}
        for name in LayerTrace._fields[1:]:
            values = getattr(layer, name)
            row[name] = None if values is None else rounded(values.tolist()) if values.is_floating_point() else values.tolist()
        layers.append(row)
    return {"model": found.model, "head": found.head, "heads": found.heads, "experts": found.experts, "ids": found.ids,
            "names": {str(i): name for i, name in found.names.items()}, "layers": layers}  # fmt: skip


def write(path, content: str):
    """Write a file of text. Raises K2Error where that is not possible."""
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise K2Error(f"{path}: could not be written: {error.strerror}. Name a file in a folder that exists.") from None


def write_json(found: Trace, path):
    """The same as one file."""
    write(path, json.dumps(as_dict(found), separators=(",", ":")) + "\n")
