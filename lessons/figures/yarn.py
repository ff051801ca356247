"""Lesson 05: how often each rotary pair turns inside the window, before and after YaRN, for K2 and for K2.5's betas."""

import math
from dataclasses import replace

from k2.rope import rope_frequencies
from lessons.counts import cfg, config
from lessons.figures import COLOURS, empty, finish


def data() -> dict:
    """Full turns of each of the 32 pairs."""
    plain_P = rope_frequencies(replace(cfg, rope_scaling=None))

    def turns(frequencies_P, window):
        return [round(f * window / (2 * math.pi), 5) for f in frequencies_P.tolist()]

    blended_P = rope_frequencies(config("kimi-k2.5")) / rope_frequencies(replace(cfg, rope_scaling=None))
    return {
        "windows": [4096, 131072],
        "trained": turns(plain_P, 4096),
        "stretched without YaRN": turns(plain_P, 131072),
        "stretched with YaRN": turns(rope_frequencies(cfg), 131072),
        "K2, slowed by": [round(v, 3) for v in (plain_P / rope_frequencies(cfg)).tolist()],
        "K2.5, slowed by": [round(1 / v, 3) for v in blended_P.tolist()],
    }


def draw(data: dict, path):
    """Left the turns, right by how much each pair is slowed."""
    figure, (left, right) = empty(1, 2, height=3.4)
    pairs = range(32)
    left.plot(pairs, data["trained"], "o-", color=COLOURS[6], markersize=3, linewidth=1, label="4,096 tokens, as trained")
    left.plot(pairs, data["stretched without YaRN"], "s--", color=COLOURS[1], markersize=3, linewidth=1, label="131,072 tokens, no YaRN")
    left.plot(pairs, data["stretched with YaRN"], "^-", color=COLOURS[0], markersize=3, linewidth=1, label="131,072 tokens, YaRN")
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(yscale="log", xlabel="pair", title="full turns inside the window")
    left.legend(fontsize=7)
    right.step(pairs, data["K2, slowed by"], where="mid", color=COLOURS[0], label="K2: beta 1 and 1, factor 32")
    right.plot(pairs, data["K2.5, slowed by"], "o", color=COLOURS[1], markersize=3, label="K2.5: beta 32 and 1, factor 64")
    right.set(yscale="log", xlabel="pair", title="slowed by")
    right.set_yticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    right.minorticks_off()
    right.legend(fontsize=7)
    finish(figure, data, path)
