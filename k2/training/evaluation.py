"""How good a model is on text it never saw: bits per byte, beside what xz and an n-gram model need, how evenly its
experts are used, and whether it finds again what stood far before.

    T tokens of a window · W vocabulary · E experts
"""

import lzma
import math

import numpy as np
import torch
import torch.nn.functional as F

from ..model import K2
from ..router import Router
from ..tokenizer import Tokenizer
from .corpus import held_out_files, read_texts, training_files


@torch.inference_mode()
def bits_per_byte(model: K2, ids: list[int], text_bytes: int, window: int = 1024, stride: int = 512) -> float:
    """Cross-entropy of a token stream, in bits per byte of its text: every token but the first is predicted once.

    A window of T tokens slides by `stride`; what the window before has scored is only context to it, so that all tokens
    but the first ones are predicted from at least T - stride before them. Windows end at the model's context.
    """
    window = min(window, model.config.max_position_embeddings)
    stride = min(stride, window)
    stream, nats, scored = torch.tensor(ids), 0.0, 1  # tokens before `scored` have been predicted; the first cannot be
    for start in range(0, max(1, len(ids) - 1 - window + stride), stride):
        ids_T = stream[start : start + window + 1]
        logits_TW = model(ids_T[:-1], positions=slice(scored - 1 - start, None))
        nats += F.cross_entropy(logits_TW, ids_T[scored - start :], reduction="sum").item()
        scored = start + len(ids_T)
    return nats / math.log(2) / text_bytes


def expert_shares(model: K2, ids: list[int]) -> list[tuple[float, float]]:
    """Per MoE layer, the idlest and the busiest expert's number of tokens over the mean, on these ids in one call."""
    shares = []

    def count(router: Router, inputs, outputs):
        load_E = torch.bincount(outputs[0].flatten(), minlength=router.weight.shape[0]).double()
        shares.append(((load_E.min() / load_E.mean()).item(), (load_E.max() / load_E.mean()).item()))

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, Router)]
    with torch.inference_mode():
        model(torch.tensor(ids).unflatten(0, (-1, 256)), positions=slice(-1, None))
    for hook in hooks:
        hook.remove()
    return shares


def xz_bits_per_byte(text: str, before: str = "") -> float:
    """Bits per byte that `xz -9e` needs for a text, given another text in front of it inside the window."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 2**27}]
    front, whole = before.encode(), (before + text).encode()
    sizes = [len(lzma.compress(part, format=lzma.FORMAT_XZ, filters=filters)) for part in (whole, front) if part]
    return (sizes[0] - sum(sizes[1:])) * 8 / len(text.encode())


def ngram_bits_per_byte(training: np.ndarray, ids: list[int], text_bytes: int, vocabulary: int, order: int = 5) -> float:
    """What counting would do: an n-gram model of the same tokens, the orders interpolated as by Witten and Bell (1991).

    p_n(w | context) = (c(context, w) + t(context) p_{n-1}(w)) / (c(context) + t(context)), with t distinct followers.
    """
    seen, asked = training.astype(np.int64), np.array(ids, dtype=np.int64)
    probability = np.full(len(asked), 1 / vocabulary)
    for n in range(1, order + 1):
        if vocabulary**n >= 2**63:  # an n-gram is one number
            break
        grams, counts = np.unique(packed(seen, n, vocabulary), return_counts=True)
        contexts, first = np.unique(grams // vocabulary, return_index=True)
        totals, kinds = np.add.reduceat(counts, first), np.diff(np.append(first, len(grams)))
        keys = packed(asked, n, vocabulary)
        count, total, kind = found(grams, counts, keys), found(contexts, totals, keys // vocabulary), found(contexts, kinds, keys // vocabulary)
        lower = probability[n - 1 :]
        probability[n - 1 :] = np.where(total > 0, (count + kind * lower) / np.maximum(total + kind, 1), lower)
    return float(-np.log2(probability[1:]).sum() / text_bytes)  # as for the model, the first token is not predicted


def packed(ids: np.ndarray, n: int, vocabulary: int) -> np.ndarray:
    """Every n tokens in a row as one number, the last token in its lowest digit."""
    keys = np.zeros(max(0, len(ids) - n + 1), dtype=np.int64)
    for i in range(n):
        keys = keys * vocabulary + ids[i : i + len(keys)]
    return keys


def found(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The values of the asked keys, 0 where a key is not there; keys ascend."""
    at = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)


SECRETS = "apple river stone cloud tiger maple ember frost piano lemon robot cedar comet delta eagle flint".split()
NAMES = "PASSWORD FAVORITE KEYWORD DESTINATION".split()
CHOICES = 8


@torch.inference_mode()
def needle_accuracy(model: K2, tokenizer: Tokenizer, length: int, depth: float, trials: int = 40, seed: int = 0) -> float:
    """How often the model names, of eight words, the one that a line in held-out code assigned: chance is 1/8.

    `length` tokens in all; the line stands at `depth` (0 first, 1 last), the question at the end.
    """
    rng, hay = np.random.default_rng((seed, length)), tokenizer.encode(held_out_text()[:400_000])
    firsts = {word: tokenizer.encode(word)[0] for word in SECRETS}
    words = [word for word in SECRETS if list(firsts.values()).count(firsts[word]) == 1]  # told apart by their first token
    right = 0
    for _ in range(trials):
        options, name = rng.permutation(words)[:CHOICES], rng.choice(NAMES)
        needle, question = tokenizer.encode(f'\n{name}_NAME = "{options[0]}"\n'), tokenizer.encode(f'\n{name}_NAME = "')
        room = length - len(needle) - len(question)
        start, cut = int(rng.integers(len(hay) - room)), int(depth * room)
        ids = hay[start : start + cut] + needle + hay[start + cut : start + room] + question
        logits_W = model(torch.tensor(ids), positions=slice(-1, None))[-1]
        right += int(logits_W[[firsts[word] for word in options]].argmax()) == 0
    return right / trials


def seen_share(text: str, training: str, shortest: int = 30) -> float:
    """The share of a text's bytes in lines of some length that stand in the training text as well."""
    known = {line.strip() for line in training.splitlines()}
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= shortest]
    return sum(len(line.encode()) for line in lines if line in known) / max(1, sum(len(line.encode()) for line in lines))


def training_text() -> str:
    """All that training saw, each file once."""
    return "".join(read_texts([path for path, _ in training_files()]))


def held_out_text() -> str:
    """All held-out modules as one stream."""
    return "".join(read_texts(held_out_files()))
