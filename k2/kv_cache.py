"""The latent cache: what attention keeps of the past, C + R = 512 + 64 numbers a token a layer.

    paper     ours         what it is
    c_kv      c_kv_SC      the compressed key-value, after kv_a_layernorm
    k_R       k_rope_SR    the one rotary key that all heads share, after rotation

    T tokens in this call · S tokens attended to · M rows of a buffer · C kv rank · R rotary part · I either width

Full keys and values would be 64 heads x (192 + 128) = 20,480 numbers: 35.6 times as many. Both parts are stored when
nothing remains to be done to them: normalised, and turned to their position.
"""

import torch

from .config import K2Config, K2Error


class LayerCache:
    """One layer's past. Room is taken in doubling steps, so that appending a token rarely copies."""

    def __init__(self):
        self.length = 0
        self.c_kv_MC = None
        self.k_rope_MR = None

    def append(self, c_kv_TC, k_rope_TR):
        """Write T new tokens behind the past and return all S, (..., S, C) and (..., S, R).

        `length` moves only in LatentCache.advance, when every layer has written: a call that was interrupted half way
        leaves no trace, since the next one writes over it.
        """
        end = self.length + c_kv_TC.shape[-2]
        self.c_kv_MC = with_room(self.c_kv_MC, c_kv_TC, self.length, end)
        self.k_rope_MR = with_room(self.k_rope_MR, k_rope_TR, self.length, end)
        self.c_kv_MC[..., self.length : end, :] = c_kv_TC
        self.k_rope_MR[..., self.length : end, :] = k_rope_TR
        return self.c_kv_MC[..., :end, :], self.k_rope_MR[..., :end, :]


def with_room(old_MI, new_TI, length: int, end: int):
    """The buffer itself if `end` rows fit, or a larger one that holds its first `length` rows. Batch axes as in `new`."""
    if old_MI is not None and old_MI.shape[:-2] != new_TI.shape[:-2]:
        raise K2Error(f"cache: holds sequences of batch shape {tuple(old_MI.shape[:-2])}; this call has {tuple(new_TI.shape[:-2])}. Use one cache per batch.")
    if old_MI is not None and old_MI.shape[-2] >= end:
        return old_MI
    rows = max(64, 2 ** (end - 1).bit_length())
    larger = torch.empty(*new_TI.shape[:-2], rows, new_TI.shape[-1], dtype=new_TI.dtype, device=new_TI.device)
    if old_MI is not None:
        larger[..., :length, :] = old_MI[..., :length, :]
    return larger


class NoCache:
    """Stands where no past is kept, for training and for one-off calls: gives back what it is given, holds nothing."""

    length = 0

    def layer(self, index: int) -> "NoCache":
        """The same for every layer."""
        return self

    def append(self, c_kv_TC, k_rope_TR):
        """The new tokens are all there is: S = T."""
        return c_kv_TC, k_rope_TR

    def advance(self, tokens: int):
        """Nothing to count."""


NO_CACHE = NoCache()


class LatentCache:
    """All layers' past for one sequence, or for one batch of equally long ones. Empty when made."""

    def __init__(self, config: K2Config):
        self.layers = [LayerCache() for _ in range(config.num_hidden_layers)]

    @property
    def length(self) -> int:
        """How many tokens are held; the next call's first position."""
        return self.layers[0].length

    def layer(self, index: int) -> LayerCache:
        """The past of one layer."""
        return self.layers[index]

    def advance(self, tokens: int):
        """Count `tokens` more as past, in every layer at once."""
        for layer in self.layers:
            layer.length += tokens
