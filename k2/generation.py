"""The generation loop: read the prompt in chunks, then one token after the other.

    prefill   many tokens a call: matrix times matrix, bound by arithmetic
    decode    one token a call: every weight is read for one vector, bound by bandwidth

    T tokens · W vocabulary
"""

import torch

from .config import K2Config, K2Error
from .kv_cache import LatentCache
from .model import K2
from .sampling import Sampler

CHUNK = 512  # tokens a prefill call, at least
ROWS = 32  # of a chunk's tokens that meet an expert, in the mean, at least


def chunk_size(config: K2Config) -> int:
    """Tokens a prefill call, 1,536 for K2. A chunk asks for nearly every expert, wherever it lies, so the fewer of them a
    token meets the more tokens should share that. It depends on the model alone, so that results depend on no budget."""
    return max(CHUNK, ROWS * config.n_routed_experts // config.num_experts_per_tok)


@torch.inference_mode()
def prefill(model: K2, ids: list[int], cache: LatentCache):
    """Read ids into the cache, chunk by chunk; logits (W,) of the last position only."""
    size = chunk_size(model.config)
    for start in range(0, len(ids), size):
        chunk_T = torch.tensor(ids[start : start + size])
        logits_TW = model(chunk_T, cache, positions=slice(-1, None))
    return logits_TW[-1]


@torch.inference_mode()
def decode(model: K2, i: int, cache: LatentCache):
    """Logits (W,) after one more id."""
    return model(torch.tensor([i]), cache)[-1]


class Unconstrained:
    """What `generate` asks of a constraint, answered as if there were none."""

    done, stop_ids = False, frozenset()  # done: nothing can follow what was accepted

    def check(self, count: int, width: int):
        """Refuse, before any work, a number of tokens that is too small, or a model of another vocabulary."""

    def mask(self, left: int):
        """Which ids may come next, (W,) bool, or None for all, when so many may still come, this one among them."""

    def accept(self, i: int):
        """The text goes on with id i."""


def generate(model: K2, ids, max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None, stop_ids=(),
             cache: LatentCache | None = None, constraint=None):  # fmt: skip
    """Yield ids that continue `ids`, greedy by default, until max_new_tokens, a stop id (not yielded) or the context's end.

    With a cache, `ids` follow what it holds. With a constraint (k2/constraint.py makes them) only ids that it allows are
    chosen, and its end is the end. Raises K2Error, before any work, for an empty prompt or one that leaves no room in the
    context. The last id yielded is not in the cache: nothing has attended to it yet.
    """
    ids, sampler = [int(i) for i in ids], Sampler(temperature, top_p, seed)
    cache = LatentCache(model.config) if cache is None else cache
    room = model.config.max_position_embeddings - cache.length - len(ids)
    if not ids:
        raise K2Error("prompt: expected at least one token, found none. K2 adds no start token: give it some text.")
    if room < 0:
        raise K2Error(f"prompt: {cache.length + len(ids)} tokens; expected at most {model.config.max_position_embeddings}, the context of this model. Shorten it.")
    constraint, count = constraint or Unconstrained(), min(max_new_tokens, room + 1)
    constraint.check(count, model.config.vocab_size)
    return continuation(model, ids, count, sampler, frozenset(stop_ids) | constraint.stop_ids, cache, constraint)


def continuation(model: K2, ids: list[int], count: int, sampler: Sampler, stop_ids: frozenset, cache: LatentCache, constraint):
    """The loop itself, an iterator of ids; nothing runs until the first is asked for."""
    if count < 1:
        return
    logits_W = prefill(model, ids, cache)
    for step in range(count):
        i = sampler(logits_W, constraint.mask(count - step))
        if i in stop_ids:
            return
        constraint.accept(i)
        yield i
        if constraint.done or step + 1 == count:
            return
        logits_W = decode(model, i, cache)
