"""K2's training claims, in small: each a handful of runs that differ in one thing, minutes on two cores.

    python -m k2 experiment clip            Muon lets attention logits grow; QK-Clip holds them at tau      report, 2.1
    python -m k2 experiment optimizer       Muon beside AdamW, at equal steps and at equal time             report, 2.1
    python -m k2 experiment newton-schulz   cubic beside quintic iteration                                  Muon, Jordan 2024
    python -m k2 experiment sparsity        more experts, as many active: sparsity 8, 16, 32, 48            report, 2.3
    python -m k2 experiment balance         router bias against the load, beside none                       DeepSeek-V3, 2.1.2
    python -m k2 experiment rephrasing      ten wordings read once, beside one wording read ten times       report, 2.2

The models read bytes, so no vocabulary stands between: bits per byte is their loss. `facts.py` makes the text of the
last one. Each run's seed, settings and curves go into one JSON file, from which the table and the figure are made.
"""

import json
import math
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from ..ceilings import keep_freed_memory
from ..config import K2Config, K2Error, YarnScaling
from . import facts
from .corpus import held_out_files, read_texts, training_files
from .curves import draw_experiment
from .evaluation import bits_per_byte
from .muonclip import CUBIC
from .pretraining import Run, Trainer

SMALL = K2Config(  # K2's mechanisms over bytes: 0.4 million weights, 0.1 million of them active
    vocab_size=256, hidden_size=96, intermediate_size=256, moe_intermediate_size=48, num_hidden_layers=3, first_k_dense_replace=1,
    num_attention_heads=4, num_key_value_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=2, routed_scaling_factor=2.0, rms_norm_eps=1e-6, rope_theta=10000.0,
    rope_scaling=YarnScaling(4.0, 64, 1.0, 1.0, 1.0, 1.0), max_position_embeddings=256,
    bos_token_id=0, eos_token_id=0, pad_token_id=None, torch_dtype="float32", quantization_config=None,
)  # fmt: skip
BASE = Run(steps=600, rows=16, window=128, lr=1e-2, adamw_lr=3e-3, warmup=20, decay_share=0.35)
BYTES = 8_000_000  # of the corpus; more than the runs read, so that no byte comes twice
HELD_OUT_BYTES = 40_000
POINTS = 120  # of a curve, in the file


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: what it changes in SMALL and in BASE, and what it reads."""

    name: str
    config: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    text: str = "corpus"  # or a key of facts.WORDINGS
    seconds_of: str = ""  # train for as long as this arm took, instead of as many steps


@dataclass(frozen=True)
class Experiment:
    """A claim and the arms that test it."""

    question: str
    arms: tuple[Arm, ...]
    run: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    panels: tuple[str, str] = ("loss", "bits_per_byte")  # of the figure: a curve, and what it came to


EXPERIMENTS = {
    "clip": Experiment(
        "Do attention logits grow past tau under Muon, and does QK-Clip hold them there at no loss of loss?",
        (Arm("Muon", run={"tau": math.inf}), Arm("MuonClip, tau 100", run={"tau": 100.0}), Arm("MuonClip, tau 30", run={"tau": 30.0})),
        run={"lr": 6e-2, "weight_decay": 0.0}, panels=("largest_logit", "bits_per_byte"),    ),
    "optimizer": Experiment(
        "Which loss do Muon and AdamW reach after equal steps, and after equal time?",
        (Arm("Muon"), Arm("Muon, lr / 2", run={"lr": 5e-3}), Arm("Muon, lr x 2", run={"lr": 2e-2}),
         Arm("AdamW", run={"muon": False}), Arm("AdamW, lr / 2", run={"muon": False, "adamw_lr": 1.5e-3}), Arm("AdamW, lr x 2", run={"muon": False, "adamw_lr": 6e-3}),
         Arm("AdamW, equal time", run={"muon": False}, seconds_of="Muon")),
    ),  # fmt: skip
    "newton-schulz": Experiment("Do five quintic steps train better than five cubic ones?", (Arm("quintic"), Arm("cubic", run={"newton_schulz": CUBIC}))),
    "sparsity": Experiment(
        "With as many active weights, does a larger pool of experts lower the loss?",
        tuple(Arm(f"sparsity {s}", config={"n_routed_experts": 2 * s}) for s in (8, 16, 32, 48)),
        run={"steps": 1000},
    ),
    "balance": Experiment(
        "What does the router's bias do to the load, and to the loss?",
        (Arm("bias", run={"balance_loss": 0.0}), Arm("none", run={"bias_step": 0.0, "balance_loss": 0.0})),
        config={"n_routed_experts": 32}, panels=("busiest_expert", "bits_per_byte"),
    ),
    "rephrasing": Experiment(
        "Is a fact better learnt from ten wordings read once than from one wording read ten times?",
        tuple(Arm(name, text=name) for name in facts.WORDINGS),
        run={"steps": 1500, "window": 64, "rows": 16},
        config={"vocab_size": facts.VOCABULARY}, panels=("loss", "never_asked"),
    ),
}


def experiment(name: str, seeds: list[int], steps: int | None = None, command: str = "") -> dict:
    """Run all arms of an experiment with each seed; what was measured, ready for JSON."""
    if name not in EXPERIMENTS:
        raise K2Error(f"experiment: found {name!r}; expected one of {', '.join(EXPERIMENTS)}.")
    keep_freed_memory(large_too=True)
    chosen, results = EXPERIMENTS[name], []
    for seed in seeds:
        for arm in chosen.arms:
            result = run_arm(chosen, arm, seed, steps, [r for r in results if r["seed"] == seed])
            results.append(result)
            print(f"seed {seed}, {arm.name}: {result['steps']} steps in {result['seconds']:.0f} s, {describe(result)}", file=sys.stderr, flush=True)
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    return {"experiment": name, "question": chosen.question, "command": command, "machine": machine, "results": results}


def describe(result: dict) -> str:
    """A result's figures in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in result["figures"].items())


def run_arm(chosen: Experiment, arm: Arm, seed: int, steps: int | None, before: list[dict]) -> dict:
    """Train one model and measure it."""
    config = replace(SMALL, **{**chosen.config, **arm.config})
    run = replace(BASE, **{**chosen.run, **arm.run, "seed": seed})
    run = replace(run, steps=steps or run.steps)
    if arm.seconds_of:
        model = next(r for r in before if r["arm"] == arm.seconds_of)
        alike = next(r for r in before if r["arm"] == arm.name.split(",")[0])
        run = replace(run, steps=round(alike["steps"] * model["seconds"] / alike["seconds"]))
    stream = corpus_bytes() if arm.text == "corpus" else facts.stream(arm.text, seed)
    trainer, reports, started = Trainer(config, stream, run), [], time.perf_counter()
    for _ in range(run.steps):
        reports.append(trainer.step())
    seconds = time.perf_counter() - started
    trainer.model.eval()
    figures = facts.accuracy(trainer.model, seed) if arm.text != "corpus" else held_out_figures(trainer.model)
    return {"arm": arm.name, "seed": seed, "steps": run.steps, "seconds": seconds, "settings": {k: v for k, v in asdict(run).items() if v != math.inf},
            "figures": {**figures, **summary(reports)}, "curves": curves(reports)}  # fmt: skip


def held_out_figures(model) -> dict[str, float]:
    """Bits per byte on text of modules that training never sees."""
    text = held_out_bytes()
    return {"bits_per_byte": bits_per_byte(model, text, len(text), window=128, stride=64)}


def summary(reports: list[dict]) -> dict[str, float]:
    """What a run's curves come down to. The load is of the last tenth of the steps."""
    late = reports[-max(1, len(reports) // 10) :]
    losses = [r["loss"] for r in reports]
    rises = [b - a for a, b in zip(losses, losses[1:])]
    return {
        "final_loss": statistics.fmean(r["loss"] for r in late),
        "largest_logit": max(max(r["max_logits"]) for r in reports),
        "clips": sum(r["clipped"] for r in reports),
        "largest_rise": max(rises[len(rises) // 10 :], default=0.0),  # of the loss from one step to the next, after the start
        "busiest_expert": statistics.fmean(max(map(max, r["loads"])) for r in late),
        "idle_experts": statistics.fmean(sum(load < 0.1 for layer in r["loads"] for load in layer) for r in late),
    }


def curves(reports: list[dict]) -> dict[str, list[float]]:
    """Thinned to at most POINTS: means for the loss, maxima for the rest."""
    size = math.ceil(len(reports) / POINTS)
    parts = [reports[i : i + size] for i in range(0, len(reports), size)]
    return {
        "step": [min((i + 1) * size, len(reports)) for i in range(len(parts))],
        "loss": [round(statistics.fmean(r["loss"] for r in part), 4) for part in parts],
        "largest_logit": [round(max(max(r["max_logits"]) for r in part), 2) for part in parts],
        "busiest_expert": [round(max(max(map(max, r["loads"])) for r in part), 3) for part in parts],
    }


def corpus_bytes() -> np.ndarray:
    """The corpus' first BYTES, files in a fixed random order, as ids."""
    files = [path for path, _ in training_files()]
    order, parts, size = np.random.default_rng(0).permutation(len(files)), [], 0
    for i in order:
        parts += [text.encode() for text in read_texts([files[i]])]
        size += len(parts[-1]) if parts else 0
        if size >= BYTES:
            break
    return np.frombuffer(b"".join(parts)[:BYTES], dtype=np.uint8)


def held_out_bytes() -> list[int]:
    """As many bytes of held-out modules, from the start of each."""
    texts = read_texts(held_out_files())
    share = HELD_OUT_BYTES // len(texts) + 1
    return list(b"".join(text.encode()[:share] for text in texts)[:HELD_OUT_BYTES])


def table(result: dict) -> list[list[str]]:
    """Rows of arm, runs, steps, seconds and figures: the mean over seeds, with the range where there are several."""
    names = list(dict.fromkeys(r["arm"] for r in result["results"]))
    keys = list(result["results"][0]["figures"])
    rows = [["arm", "seeds", "steps", "seconds", *(key.replace("_", " ") for key in keys)]]
    for name in names:
        runs = [r for r in result["results"] if r["arm"] == name]
        cells = [spread([r["figures"][key] for r in runs]) for key in keys]
        rows.append([name, str(len(runs)), spread([r["steps"] for r in runs]), spread([r["seconds"] for r in runs]), *cells])
    return rows


def spread(values: list[float]) -> str:
    """mean (lowest to highest)"""
    low, high = min(values), max(values)
    return f"{statistics.fmean(values):.4g}" + (f" ({low:.4g} to {high:.4g})" if low != high else "")


def table_text(result: dict) -> str:
    """The table in Markdown."""
    header, *rows = table(result)
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


def read(name: str, folder: Path) -> dict:
    """A result that `write` wrote."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise K2Error(f"{folder / f'{name}.json'}: expected an experiment's result: {error}. Run the experiment first.") from None


def write(result: dict, folder: Path) -> Path:
    """The result as JSON and its figure, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['experiment']}.json"
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    temporary.replace(path)
    draw_experiment(result, path.with_suffix(".png"), *EXPERIMENTS[result["experiment"]].panels)
    return path
