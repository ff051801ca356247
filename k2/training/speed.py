"""How fast a training step is, beside the same model in transformers under torch's AdamW: `python -m k2 bench --train`.

Each engine runs in a process of its own, in turn; what counts is the ratio within one round. Both take K2-mini's config
from nothing and the same windows: in float32, and in bfloat16, of which this project's optimizer keeps float32 masters and
the other does not.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from ..beside import run_child
from ..ceilings import keep_freed_memory, peak_megabytes
from ..checkpoint import load, save
from ..config import K2Config
from .pretraining import Run, Trainer

STEPS = 6  # measured, after two that warm up
ROWS, WINDOW = 16, 256


def compare(mini: Path, rounds: int, rows: int = ROWS, window: int = WINDOW):
    """Print both engines' tokens per second, the ratios, and the optimizer's share of a step, in each dtype."""
    for dtype in (torch.float32, torch.bfloat16):
        compare_in(str(dtype).removeprefix("torch."), mini, rounds, rows, window)


def compare_in(dtype: str, mini: Path, rounds: int, rows: int, window: int):
    """The same in one dtype."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save(load(mini, dtype=torch.float32), directory, format="fp32")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
        runs = [{engine: run_child(engine, directory, rows, window, dtype) for engine in ENGINES} for _ in range(rounds)]
    print(f"training K2-mini: {rows} windows of {window} tokens a step, {dtype}, {torch.get_num_threads()} threads, median of {rounds} rounds")
    for engine in ENGINES:
        rate, share = (median(run[engine][key] for run in runs) for key in ("rate", "optimizer_share"))
        print(f"{engine:22} {rate:7.0f} tokens/s, of which the optimizer takes {share:.0%}, peak {median(run[engine]['peak'] for run in runs):.0f} MB")
    ratios = sorted(run["k2-train"]["rate"] / run["transformers-train"]["rate"] for run in runs)
    print(f"ratio: {median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


def child(engine: str, directory: str, rows: int, window: int, dtype) -> dict:
    """One engine's training speed: median seconds of a step, and of the optimizer in it."""
    forward_backward, optimize = ENGINES[engine](directory, rows, window, dtype)
    seconds = []
    for _ in range(STEPS + 2):
        started = time.perf_counter()
        forward_backward()
        middle = time.perf_counter()
        optimize()
        seconds.append((time.perf_counter() - started, time.perf_counter() - middle))
    step = median(s for s, _ in seconds[2:])
    return {"rate": rows * window / step, "optimizer_share": median(o for _, o in seconds[2:]) / step, "peak": peak_megabytes()}


def windows(vocabulary: int, rows: int, window: int) -> np.ndarray:
    """Random tokens: what they say does not change the work, which experts they choose hardly does."""
    return np.random.default_rng(0).integers(0, vocabulary, rows * window * 12).astype(np.uint16)


def ours(directory: str, rows: int, window: int, dtype):
    """(forward and backward, optimizer) of this project, cut at the optimizer's own call."""
    keep_freed_memory(large_too=True)
    config = K2Config.from_json(directory)
    trainer = Trainer(config, windows(config.vocab_size, rows, window), Run(steps=100, rows=rows, window=window), dtype)
    optimizer_step, trainer.optimizer.step = trainer.optimizer.step, lambda lr_scale: 0
    return trainer.step, lambda: optimizer_step(0.1)


def theirs(directory: str, rows: int, window: int, dtype):
    """The same of transformers' DeepseekV3ForCausalLM and torch.optim.AdamW, in their default settings."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    model = transformers.DeepseekV3ForCausalLM(config).to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    ids = torch.from_numpy(windows(config.vocab_size, rows, window).astype(np.int64)).reshape(-1, rows, window)
    batches = iter(ids)

    def forward_backward():
        batch = next(batches)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()

    def optimize():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward_backward, optimize


ENGINES = {"k2-train": ours, "transformers-train": theirs}
