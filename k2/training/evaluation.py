"""How good a model is on text it never saw: bits per byte, beside what xz needs, and how evenly its experts are used.

    T tokens of a window · W vocabulary · E experts
"""

import lzma
import math

import torch
import torch.nn.functional as F

from ..model import K2
from ..router import Router
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


def training_text() -> str:
    """All that training saw, each file once."""
    return "".join(read_texts([path for path, _ in training_files()]))


def held_out_text() -> str:
    """All held-out modules as one stream."""
    return "".join(read_texts(held_out_files()))
