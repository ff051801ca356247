"""The answers of lessons/exam.md, and the judging of a reader's sheet: `python -m lessons exam`.

Each answer says where it is found: a lesson, or a file of k2/ and a symbol. What code can compute is computed, so that an
answer cannot go stale.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import lab
from .checker import HERE, ROOT, read_text, symbol_source
from .counts import absorbed_flops, active, cache_numbers, cfg, expanded_flops, full_cache_numbers, moe_layers, router, table, total

SHEET = HERE / "work" / "exam.txt"


SMALL_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"thousand": 1e3, "kb": 1e3, "million": 1e6, "millions": 1e6, "m": 1e6, "yi": 1e8, "wan": 1e4, "mb": 1e6,
          "billion": 1e9, "billions": 1e9, "b": 1e9, "bn": 1e9, "gb": 1e9, "trillion": 1e12, "t": 1e12, "tb": 1e12}  # fmt: skip
UNITS = set("about bits bit bytes byte per a an id ids is fold gb/s id layers layer number numbers pair pairs percent position s second scales step steps tensors times token tokens tokens/s weight weights x × %".split())
CHINESE = {"万亿": " trillion ", "十亿": " billion ", "百万": " million ", "千": " thousand ", "亿": " yi ", "万": " wan "}
COUNTERS = re.compile("(?:大约|左右|约|第|个|层|倍|字节|比特|位|对|步|张量|秒|每|权重|参数|专家|缩放因子|%)+")


def half_width(text: str) -> str:
    """Full-width signs, as Chinese keyboards give them, and a true minus as ASCII; nothing else, as 10² is not 102."""
    return text.translate({code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " ", 0x2212: "-"})


def without_chinese(text: str) -> str:
    """An answer with the Chinese names of scales as English ones, and counters taken out."""
    text = half_width(text)
    for name, english in CHINESE.items():
        text = text.replace(name, english)
    return COUNTERS.sub(" ", text)


def number_in(said: str) -> tuple[float, float] | None:
    """(a number, the scale that a word behind it names, or 1), None where it cannot be read without guessing: 70,272 and
    70 272, 1026.4 billion, 35.6x, 1/4, sixty-one."""
    text = without_chinese(said).lower().strip(" `()~≈=。")
    text = re.sub(r"(?<=\d)[ ,_\u00a0\u202f](?=\d{3}(?!\d))", "", text)
    found = re.fullmatch(r"([a-z%= ]*?)([+-]?\d*\.?\d+(?:e[+-]?\d+)?)(?:\s*/\s*(\d+\.?\d*))?\.?(\s*[a-z%×/ ]*)", text)
    if found:
        value, words = float(found[2]) / float(found[3] or 1), f"{found[1]} {found[4]}".split()
    else:
        words = re.split(r"[\s-]+", text)
        named = [w for w in words if w in SMALL_NUMBERS or w in TENS]
        tens, ones = [10 * TENS.index(w) + 20 for w in named if w in TENS], [SMALL_NUMBERS.index(w) for w in named if w in SMALL_NUMBERS]
        if not named or len(tens) > 1 or len(ones) > 1 or (tens and ones and not (named[0] in TENS and 0 < ones[0] < 10)):
            return None
        value, words = float(sum(tens + ones)), [w for w in words if w not in named]
    scales = [SCALES[w] for w in words if w in SCALES]
    return (value, scales[0] if scales else 1.0) if len(scales) < 2 and all(w in UNITS or w in SCALES for w in words) else None


@dataclass(frozen=True)
class Answer:
    """What is right, and the place to read. `right` is a letter, a name, or a function that computes a number."""

    right: str | Callable[[], float]
    place: str  # "lessons/09_router.md", or "k2/router.py::Router.forward"
    decimals: int = 0  # of a number, as the question asks
    unit: float = 1.0  # what the question counts in: 1e9 where it asks for billions or GB
    also: tuple[str, ...] = ()  # other names that are as good

    def kind(self) -> str:
        """Which of three an answer is: a number, a letter or a name."""
        return "number" if not isinstance(self.right, str) else "letter" if len(self.right) == 1 else "name"

    def read(self, said: str):
        """What a reader wrote, as this kind of answer: a letter, a name, or the numbers that it may stand for; None if it
        cannot be read. A bare number may count the question's unit or single things."""
        if self.kind() == "letter":
            found = re.fullmatch(r"选?\s*\(?([a-d])\)?[.:、]?|选?\s*\(?([a-d])[).:、]\s?.*", half_width(said).strip(" `。").lower())
            return found and (found[1] or found[2])
        if self.kind() == "name":
            return said.strip(" ()`\"'。").removesuffix(".").lower() or None
        found = number_in(said)
        if found is None:
            return None
        value, scale = found
        return {value, value / self.unit} if scale == 1 else {value * scale / self.unit}

    def accepts(self, said: str) -> bool:
        """Whether what a reader wrote is right. More digits than were asked for do no harm."""
        found = self.read(said)
        if found is None:
            return False
        if isinstance(self.right, str):
            return found in {self.right, *self.also}
        return round(self.right(), self.decimals) in {round(n, self.decimals) for n in found}

    def text(self) -> str:
        """The right answer, written out."""
        return self.right if isinstance(self.right, str) else f"{round(self.right(), self.decimals):,.{self.decimals}f}"


def yarn(**changes):
    """K2's config with other YaRN numbers."""
    return replace(cfg, rope_scaling=replace(cfg.rope_scaling, **changes))


def first_slowed_pair(config) -> int:
    """The first pair whose frequency is not the plain one."""
    from k2.reference import rope_frequencies

    return int((rope_frequencies(config) != rope_frequencies(replace(config, rope_scaling=None))).argmax())


def first_expanded() -> int:
    """The fewest new tokens of 4,096 for which the expanded form is the cheaper one."""
    return next(T for T in range(1, 4097) if expanded_flops(cfg, T, 4096) < absorbed_flops(cfg, T, 4096))


def with_two_experts() -> float:
    """Bits per byte of PROSE under K2-mini with two experts a token."""
    import copy

    model = copy.deepcopy(lab.mini())
    for layer in model.model.layers[1:]:
        layer.mlp.gate.top_k = 2
    return lab.bits_per_byte(model, lab.PROSE)


def weight_of_a_half() -> float:
    """What a router makes of K2's best scores where all are 0.5."""
    from k2.router import Router

    router = Router(cfg)
    with torch.inference_mode():
        return router(torch.zeros(1, cfg.hidden_size))[1][0, 0].item()


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


def steps_to_lift(start: float, goal: float) -> int:
    """How many quintic steps bring a singular value from start above goal."""
    from k2.training.muonclip import QUINTIC

    steps = 0
    while start <= goal:
        start, steps = QUINTIC[0] * start + QUINTIC[1] * start**3 + QUINTIC[2] * start**5, steps + 1
    return steps


ANSWERS = {
    1: Answer(lambda: total(cfg) / 1e9, "lessons/01_config.md", 1, 1e9),
    2: Answer(lambda: total(replace(cfg, n_routed_experts=256)) / 1e9, "lessons/01_config.md", 1, 1e9),
    3: Answer(lambda: (active(replace(cfg, num_experts_per_tok=16)) - table(cfg)) / 1e9, "lessons/01_config.md", 1, 1e9),
    4: Answer(lambda: moe_layers(cfg), "lessons/01_config.md"),
    5: Answer("d", "lessons/02_tokenizer.md"),
    6: Answer("a", "lessons/06_attention.md"),
    7: Answer("c", "lessons/04_rope.md"),
    8: Answer(lambda: first_slowed_pair(yarn(original_max_position_embeddings=8192)), "lessons/05_yarn.md"),
    9: Answer(lambda: yarn(factor=64.0).softmax_scale, "lessons/05_yarn.md", 4),
    10: Answer(lambda: 8 * (128 + 128) / cache_numbers(cfg), "lessons/06_attention.md", 1),
    11: Answer(lambda: full_cache_numbers(cfg) / cache_numbers(cfg), "lessons/06_attention.md", 1),
    12: Answer("d", "lessons/07_kv_cache.md"),
    13: Answer(first_expanded, "lessons/07_kv_cache.md"),
    14: Answer(lambda: expanded_flops(cfg, 1, 4096) / absorbed_flops(cfg, 1, 4096), "lessons/07_kv_cache.md"),
    15: Answer("b", "lessons/07_kv_cache.md"),
    16: Answer("a", "lessons/07_kv_cache.md"),
    17: Answer("c", "lessons/22_hunt.md"),
    18: Answer(lambda: moe_layers(cfg) * (router(replace(cfg, n_routed_experts=768)) - router(cfg)) / 1e6, "lessons/01_config.md", 0, 1e6),
    19: Answer("b", "lessons/08_expert.md"),
    20: Answer("d", "lessons/09_router.md"),
    21: Answer(weight_of_a_half, "lessons/09_router.md", 4),
    22: Answer(idle_experts, "lessons/10_moe.md"),
    23: Answer("a", "lessons/10_moe.md"),
    24: Answer(with_two_experts, "lessons/10_moe.md", 2),
    25: Answer(tensors, "lessons/12_checkpoint.md"),
    26: Answer("model.safetensors.index.json", "lessons/12_checkpoint.md", also=("index", "the index", "model.safetensors.index")),
    27: Answer(fp8_scales, "lessons/13_quantization.md"),
    28: Answer(nibble, "lessons/13_quantization.md", 1),
    29: Answer(lambda: 4 * cfg.vocab_size * cfg.max_position_embeddings / 1e9, "lessons/11_model.md", 0, 1e9),
    30: Answer(lambda: 3.5e9 / (stored().routed / 5), "lessons/16_offload.md", 2),
    31: Answer(lambda: stored().cache_per_token, "lessons/14_plan.md"),
    32: Answer("b", "lessons/15_download.md"),
    33: Answer("c", "lessons/16_offload.md"),
    34: Answer(lambda: drawn([0.4, 0.3, 0.2, 0.1], 0.5), "lessons/17_generation.md"),
    35: Answer(lambda: steps_to_lift(1e-4, 0.5), "lessons/18_muonclip.md"),
    36: Answer("a", "lessons/18_muonclip.md"),
    37: Answer(rotary_factor, "lessons/19_clip.md", 2),
    38: Answer(lambda: 2 / math.log(2) / 3.2, "lessons/20_pretraining.md", 2),
    39: Answer(lambda: cfg.vocab_size - 16 * 1024, "lessons/21_article.md"),
    40: Answer("d", "lessons/24_constraint.md"),
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
    found = re.findall(r"^\s*(\d+)\s*[:：][ \t]*(\S.*?)\s*$", text, re.MULTILINE)
    return {int(n): said for n, said in found if int(n) in ANSWERS}


def judged(text: str) -> list[str]:
    """One line for each answer that is wrong or cannot be read, and the sum."""
    sheet = read_sheet(text)
    unread = [n for n, said in sheet.items() if ANSWERS[n].read(said) is None]
    wrong = [n for n, said in sheet.items() if n not in unread and not ANSWERS[n].accepts(said)]
    example = {"number": "one number, as 12.5 or 44,040 or 3 billion", "letter": "one letter, as b", "name": "a name"}
    lines = {n: f"{n}: not yet ({sheet[n]}). Read {ANSWERS[n].place}" for n in wrong}
    lines |= {n: f"{n}: {sheet[n]!r} cannot be read as a {ANSWERS[n].kind()}. Write {example[ANSWERS[n].kind()]}" for n in unread}
    right, not_read = len(sheet) - len(wrong) - len(unread), f", {len(unread)} not readable" if unread else ""
    total_line = f"{right} of {len(ANSWERS)} right, {len(wrong)} not yet, {len(ANSWERS) - len(sheet)} open{not_read}"
    return [*(lines[n] for n in sorted(lines)), total_line]


def sheet(path: Path = SHEET) -> list[str]:
    """Judge the reader's sheet; the first call puts it there."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(empty_sheet(), encoding="utf-8")
    return judged(path.read_text(encoding="utf-8"))
