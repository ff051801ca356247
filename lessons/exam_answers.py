"""The answers of lessons/exam.md, and the judging of a reader's sheet: `python -m lessons exam`.

Each answer says where it is found: a lesson, or a file of k2/ and a symbol. What code can compute is computed, so that an
answer cannot go stale.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from . import lab
from .checker import HERE, ROOT, read_text, symbol_source
from .counts import absorbed_flops, active, cache_numbers, cfg, expanded_flops, expert, full_cache_numbers, moe_layers, table, total

SHEET = HERE / "work" / "exam.txt"


@dataclass(frozen=True)
class Answer:
    """What is right, and the place to read. `right` is a letter, a name, or a function that computes a number."""

    right: str | Callable[[], float]
    place: str  # "lessons/09_router.md", or "k2/router.py::Router.forward"
    decimals: int = 0  # of a number, as the question asks

    def accepts(self, said: str) -> bool:
        """Whether what a reader wrote is right."""
        if isinstance(self.right, str):
            return said.strip(" ()`.").lower() == self.right.lower()
        try:
            found = float(said.replace(",", "").strip(" %`"))
        except ValueError:
            return False
        return math.isclose(found, round(self.right(), self.decimals), rel_tol=0, abs_tol=0.1 * 10.0**-self.decimals)

    def text(self) -> str:
        """The right answer, written out."""
        return self.right if isinstance(self.right, str) else f"{round(self.right(), self.decimals):,.{self.decimals}f}"


def first_slowed_pair() -> int:
    """The first pair whose frequency is not the plain one."""
    from dataclasses import replace

    from k2.reference import rope_frequencies

    return int((rope_frequencies(cfg) != rope_frequencies(replace(cfg, rope_scaling=None))).argmax())


def idle_experts() -> int:
    """Experts of K2-mini's layer 1 that get no token of CODE."""
    return 48 - lab.routes(lab.CODE)[1][0].unique().numel()


def drawn(probabilities, top_p: float) -> int:
    """How many ids a Sampler can draw, by drawing often."""
    from k2.sampling import Sampler

    sampler = Sampler(1.0, top_p, seed=0)
    return len({sampler(torch.tensor(probabilities).log()) for _ in range(200)})


def fp8_scales() -> int:
    """Scales of layer 0's kv_a_proj_with_mqa."""
    from k2.checkpoint import expected_tensors

    return math.prod(expected_tensors(cfg)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape)


def tensors() -> int:
    """Tensors of the checkpoint."""
    from k2.checkpoint import expected_tensors

    return len(expected_tensors(cfg))


def stored():
    """K2's needs in FP8."""
    from k2.needs import needs

    return needs(cfg, "fp8")


def nibble() -> float:
    """What INT4 code 3 with scale 0.5 is."""
    from k2.quantization import int4_dequantize

    packed = torch.tensor([[3, 0, 0, 0]], dtype=torch.int32)
    return int4_dequantize(packed, torch.tensor([[0.5]], dtype=torch.bfloat16), torch.float32)[0, 0].item()


def rotary_factor() -> float:
    """What QK-Clip leaves of a rotary query row of a head whose largest logit is 4 tau."""
    from k2.training.muonclip import clip_heads

    with torch.no_grad():
        layer = lab.small()[1].model.layers[1].self_attn
        c, weights = layer.config, {p: p.detach().clone() for p in layer.parameters()}
        clip_heads(layer, torch.full((c.num_attention_heads,), 0.25, dtype=torch.float64), weights)
        return (weights[layer.q_b_proj.weight] / layer.q_b_proj.weight)[c.qk_head_dim - 1, 0].item()


def lifted() -> float:
    """By how much five quintic steps multiply a singular value of next to nothing."""
    from k2.training.muonclip import QUINTIC

    start = value = 1e-9
    for _ in range(5):
        value = QUINTIC[0] * value + QUINTIC[1] * value**3 + QUINTIC[2] * value**5
    return value / start


ANSWERS = {
    1: Answer(lambda: total(cfg) / 1e9, "lessons/01_config.md", 1),
    2: Answer(lambda: 100 * moe_layers(cfg) * cfg.n_routed_experts * expert(cfg) / total(cfg), "lessons/01_config.md", 1),
    3: Answer(lambda: (active(cfg) - table(cfg)) / 1e9, "lessons/01_config.md", 1),
    4: Answer(lambda: moe_layers(cfg), "k2/decoder.py::DecoderLayer"),
    5: Answer("b", "lessons/23_chat.md"),
    6: Answer("b", "k2/attention.py::LATENT_EPS"),
    7: Answer("b", "lessons/04_rope.md"),
    8: Answer(first_slowed_pair, "lessons/05_yarn.md"),
    9: Answer(lambda: cfg.softmax_scale, "lessons/05_yarn.md", 4),
    10: Answer(lambda: cache_numbers(cfg), "lessons/06_attention.md"),
    11: Answer(lambda: full_cache_numbers(cfg) / cache_numbers(cfg), "lessons/06_attention.md", 1),
    12: Answer("b", "lessons/07_kv_cache.md"),
    13: Answer("b", "lessons/07_kv_cache.md"),
    14: Answer(lambda: expanded_flops(cfg, 1, 4096) / absorbed_flops(cfg, 1, 4096), "lessons/07_kv_cache.md"),
    15: Answer("a", "lessons/07_kv_cache.md"),
    16: Answer("b", "lessons/07_kv_cache.md"),
    17: Answer("a", "lessons/22_hunt.md"),
    18: Answer(lambda: expert(cfg), "lessons/08_expert.md"),
    19: Answer("a", "k2/expert.py::Expert.forward"),
    20: Answer("a", "lessons/09_router.md"),
    21: Answer(lambda: cfg.routed_scaling_factor, "k2/router.py::Router.forward", 3),
    22: Answer(idle_experts, "lessons/10_moe.md"),
    23: Answer("c", "lessons/10_moe.md"),
    24: Answer(lambda: lab.broken("shared expert dropped"), "lessons/10_moe.md", 2),
    25: Answer(tensors, "k2/checkpoint.py::expected_tensors"),
    26: Answer("model.safetensors.index.json", "k2/checkpoint.py::INDEX"),
    27: Answer(fp8_scales, "k2/quantization.py::fp8_dequantize"),
    28: Answer(nibble, "k2/quantization.py::int4_dequantize", 1),
    29: Answer(lambda: 4 * cfg.vocab_size * cfg.max_position_embeddings / 1e9, "k2/model.py::K2.forward"),
    30: Answer(lambda: stored().routed / 1e9, "k2/needs.py::needs", 1),
    31: Answer(lambda: stored().cache_per_token, "k2/needs.py::needs"),
    32: Answer("c", "k2/download.py"),
    33: Answer("c", "k2/offload.py"),
    34: Answer(lambda: drawn([0.4, 0.3, 0.2, 0.1], 0.5), "k2/sampling.py::Sampler"),
    35: Answer(lifted, "lessons/18_muonclip.md"),
    36: Answer("c", "k2/training/muonclip.py::parameter_groups"),
    37: Answer(rotary_factor, "lessons/19_clip.md", 2),
    38: Answer(lambda: 2 / math.log(2) / 3.2, "lessons/20_pretraining.md", 2),
    39: Answer(lambda: cfg.vocab_size - 16 * 1024, "lessons/21_article.md"),
    40: Answer("c", "lessons/24_constraint.md"),
}


def questions() -> list[int]:
    """The numbers on the page."""
    return [int(n) for n in re.findall(r"^\*\*(\d+)\.\*\*", read_text(HERE / "exam.md"), re.MULTILINE)]


def place_exists(place: str) -> bool:
    """Whether a file, and a symbol in it, is there."""
    file, _, symbol = place.partition("::")
    path = ROOT / file
    return path.is_file() and (not symbol or symbol_source(read_text(path), symbol) is not None)


def empty_sheet() -> str:
    """What a reader fills in."""
    return "".join(f"{n}: \n" for n in questions())


def read_sheet(text: str) -> dict[int, str]:
    """{question: what was written}, of the lines that have something behind the colon."""
    found = re.findall(r"^\s*(\d+)\s*:[ \t]*(\S.*?)\s*$", text, re.MULTILINE)
    return {int(n): said for n, said in found if int(n) in ANSWERS}


def judged(text: str) -> list[str]:
    """One line a wrong answer, and the sum."""
    sheet = read_sheet(text)
    wrong = [n for n, said in sheet.items() if not ANSWERS[n].accepts(said)]
    lines = [f"{n}: not yet ({sheet[n]}). Read {ANSWERS[n].place}" for n in sorted(wrong)]
    return [*lines, f"{len(sheet) - len(wrong)} of {len(ANSWERS)} right, {len(wrong)} not yet, {len(ANSWERS) - len(sheet)} open"]


def sheet(path: Path = SHEET) -> list[str]:
    """Judge the reader's sheet; the first call puts it there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(empty_sheet(), encoding="utf-8")
    return judged(path.read_text(encoding="utf-8"))
