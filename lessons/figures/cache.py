"""Lesson 06: what a token leaves behind, by scheme: multi-head, grouped-query with 8 groups, multi-query, latent."""

from lessons.counts import cache_numbers, cfg, full_cache_numbers
from lessons.figures import COLOURS, empty, finish


def data() -> dict:
    """Numbers a token a layer, and GiB of bfloat16 for one sequence of K2's longest."""
    head = cfg.qk_head_dim + cfg.v_head_dim
    numbers = {"multi-head, 64 heads": full_cache_numbers(cfg), "grouped, 8 heads": 8 * head, "multi-query, 1 head": head, "latent (K2)": cache_numbers(cfg)}
    return {"tokens": cfg.max_position_embeddings, "numbers": numbers, "GiB": {k: n * 2 * cfg.num_hidden_layers * cfg.max_position_embeddings / 2**30 for k, n in numbers.items()}}


def draw(data: dict, path):
    """Bars, each with both of its numbers."""
    figure, ax = empty(1, 1, height=2.6)
    names = list(data["numbers"])
    bars = ax.barh(names, list(data["GiB"].values()), color=[COLOURS[6], COLOURS[4], COLOURS[5], COLOURS[0]], hatch=["", "//", "..", ""], edgecolor="white")
    ax.bar_label(bars, [f" {data['GiB'][n]:,.1f} GiB ({data['numbers'][n]:,} numbers)" for n in names], fontsize=9)
    ax.invert_yaxis()
    ax.set(xlim=(0, 500))
    ax.set_title("cache of 131,072 tokens, GiB of bfloat16 in 61 layers (numbers a token a layer)", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    finish(figure, data, path)
