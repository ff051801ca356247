"""From logits to the next id: greedy, or a draw at a temperature from the most likely part.

    W vocabulary
"""

import torch

from .config import K2Error


class Sampler:
    """Picks an id from logits (W,). temperature 0 is greedy; top_p keeps the smallest set of ids of that much mass."""

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None):
        if not 0 <= temperature < float("inf"):
            raise K2Error(f"temperature: found {temperature}; expected 0 (greedy) or a positive number, such as K2's 0.6.")
        if not 0 < top_p <= 1:
            raise K2Error(f"top_p: found {top_p}; expected above 0 and at most 1.")
        if seed is not None and not 0 <= seed < 2**64:
            raise K2Error(f"seed: found {seed}; expected 0 to 2^64 - 1.")
        self.temperature, self.top_p = temperature, top_p
        self.random = torch.Generator().manual_seed(seed) if seed is not None else torch.Generator()
        if seed is None:
            self.random.seed()

    def __call__(self, logits_W, allowed_W=None) -> int:
        logits_W = logits_W.cpu()  # the draw is made on the CPU, so that a seed gives one text on every device
        if not logits_W.isfinite().all():
            raise K2Error("logits: expected finite numbers, found NaN or infinity. The weights are damaged, or activations overflowed: try --dtype float32.")
        if allowed_W is not None:  # a constraint's mask; none of the mass goes to the others
            logits_W = logits_W.masked_fill(~allowed_W, -torch.inf)
        if self.temperature == 0:
            return int(logits_W.argmax())
        # Less their maximum before the division, so that no temperature, however small, makes an infinity.
        probability_W = ((logits_W.double() - logits_W.max()) / self.temperature).softmax(-1)
        ordered_W, ids_W = probability_W.sort(descending=True, stable=True)
        before_W = ordered_W.cumsum(-1) - ordered_W  # the mass ahead of each id; the first is always kept
        kept_W = torch.where(before_W < self.top_p, ordered_W, 0.0)
        return int(ids_W[torch.multinomial(kept_W, 1, generator=self.random)])
