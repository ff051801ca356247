"""How fast a training step is, beside the same model in transformers under torch's AdamW: `python -m k2 bench --train`.

Each engine is a process of its own, and the two take a step in turn: what counts is the ratio of two neighbouring steps,
as a machine may be twice as fast a second later. Both take K2-mini's config from nothing and the same windows: in
float32, and in bfloat16, of which this project's optimizer keeps float32 masters and the other does not.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch

from ..beside import child_process, failure
from ..ceilings import keep_freed_memory, peak_megabytes
from ..checkpoint import load, save
from ..config import K2Config
from .pretraining import Run, Trainer

WARM_UP, STEPS = 2, 8  # of each engine and round
ROWS, WINDOW = 16, 256


def compare(mini: Path, rounds: int, rows: int = ROWS, window: int = WINDOW):
    """Print both engines' tokens per second, the ratios, and the optimizer's share of a step, in each dtype."""
    for dtype in ("float32", "bfloat16"):
        compare_in(dtype, mini, rounds, rows, window)


def compare_in(dtype: str, mini: Path, rounds: int, rows: int, window: int):
    """The same in one dtype."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        save(load(mini, dtype=torch.float32), directory, format="fp32")
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "model_type": "deepseek_v3"}))
        pairs = [pair for _ in range(rounds) for pair in in_turn(directory, rows, window, dtype)]
    print(f"training K2-mini: {rows} windows of {window} tokens a step, {dtype}, {torch.get_num_threads()} threads, median of {len(pairs)} steps of each, taken in turn")
    for engine in ENGINES:
        seconds, optimizer, peak = (median(pair[engine][key] for pair in pairs) for key in ("seconds", "optimizer", "peak"))
        print(f"{engine:22} {rows * window / seconds:7.0f} tokens/s, of which the optimizer takes {optimizer / seconds:.0%}, peak {peak:.0f} MB")
    low, middle, high = quantiles([pair["transformers-train"]["seconds"] / pair["k2-train"]["seconds"] for pair in pairs], n=4)
    print(f"ratio: {middle:.2f} (half of the pairs between {low:.2f} and {high:.2f})")


def in_turn(directory: Path, rows: int, window: int, dtype: str) -> list[dict]:
    """Pairs of steps, one of each engine directly after the other."""
    engines = {engine: Engine(engine, directory, rows, window, dtype) for engine in ENGINES}
    pairs = [{name: engine.step() for name, engine in engines.items()} for _ in range(WARM_UP + STEPS)]
    for engine in engines.values():
        engine.end()
    return pairs[WARM_UP:]


class Engine:
    """A process that takes one training step for each line it is sent, and waits."""

    def __init__(self, name: str, directory: Path, rows: int, window: int, dtype: str):
        self.name, self.said = name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(**child_process(name, directory, rows, window, dtype), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said)

    def step(self) -> dict:
        """Seconds of a step and of the optimizer in it, and the peak so far."""
        try:
            print(file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, ValueError):
            self.said.seek(0)
            raise failure(self.name, self.said.read()) from None

    def end(self):
        """No more lines."""
        self.process.communicate()


def child(engine: str, directory: str, rows: int, window: int, dtype):
    """The other end: a step for each line, and a line of JSON for each step."""
    forward_backward, optimize = ENGINES[engine](directory, rows, window, dtype)
    for _ in sys.stdin:
        started = time.perf_counter()
        forward_backward()
        middle = time.perf_counter()
        optimize()
        done = time.perf_counter()
        print(json.dumps({"seconds": done - started, "optimizer": done - middle, "peak": peak_megabytes()}), flush=True)


def windows(vocabulary: int, rows: int, window: int) -> np.ndarray:
    """Random tokens: what they say does not change the work, which experts they choose hardly does."""
    return np.random.default_rng(0).integers(0, vocabulary, rows * window * (WARM_UP + STEPS + 2)).astype(np.uint16)


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
