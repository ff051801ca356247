"""From nothing to a checkpoint, and from a checkpoint further."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import random_model, small_config

import k2
from k2 import K2Error
from k2.__main__ import MINI, main
from k2.checkpoint import load
from k2.tokenizer import RESERVED, tokenizer_files, train_ranks
from k2.training import recipe
from k2.training.curves import read
from k2.training.pretraining import Run

TEXT = "def read(path):\n    return open(path).read()\n"


@pytest.fixture
def start(tmp_path):
    """A small checkpoint with a tokenizer, and a text to go on with."""
    ranks = train_ranks([TEXT * 4], 300)
    model = random_model(small_config(vocab_size=len(ranks) + RESERVED, eos_token_id=len(ranks) + 1))
    k2.save(model, tmp_path / "start", format="bf16", files=tokenizer_files(ranks))
    (tmp_path / "text.txt").write_text(TEXT * 60, encoding="utf-8")
    return tmp_path


def go_on(folder: Path, *more: str) -> int:
    sizes = {"steps": 16, "rows": 4, "window": 32, "save-every": 4, "lr": 0.01}
    return main(["train", "--init", str(folder / "start"), "--data", str(folder / "text.txt"), "--out", str(folder / "out"),
                 *(part for name, value in sizes.items() for part in (f"--{name}", str(value))), *more])  # fmt: skip


def test_fine_tuning_learns_the_users_text_and_writes_a_checkpoint_of_the_same_format(start):
    assert go_on(start) == 0
    out = start / "out"
    assert {p.name for p in out.iterdir()} == {"state.pt", "curve.csv", "curve.png", "checkpoint-bf16"}
    rows = read(out / "curve.csv")
    assert len(rows) == 16 and float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    probed = [float(row["held_out"]) for row in rows if row["held_out"]]
    assert len(probed) == 4 and probed[-1] < probed[0]
    before, after = (load(start / name, dtype=torch.float32) for name in ("start", "out/checkpoint-bf16"))
    assert after.config == before.config and not torch.equal(after.lm_head.weight, before.lm_head.weight)
    assert (out / "checkpoint-bf16" / "tiktoken.model").read_bytes() == (start / "start" / "tiktoken.model").read_bytes()


def test_the_first_step_starts_from_the_checkpoints_weights(start):
    assert go_on(start, "--lr", "1e-12") == 0
    before, after = (load(start / name, dtype=torch.float32) for name in ("start", "out/checkpoint-bf16"))
    for (name, a), b in zip(before.named_parameters(), after.parameters()):
        assert torch.equal(a, b), name


def test_minutes_are_turned_into_steps_once(start):
    assert go_on(start, "--minutes", "0.01") == 0
    steps = len(read(start / "out" / "curve.csv"))
    assert steps >= 1 and go_on(start, "--minutes", "5") == 0  # a run that was planned keeps its plan
    assert len(read(start / "out" / "curve.csv")) == steps


def test_a_run_that_cannot_fit_is_refused_before_it_starts(start, capsys, monkeypatch):
    monkeypatch.setattr(recipe, "free_memory", lambda: 10_000)
    assert go_on(start) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "training: needs" in line and "momenta" in line and "--rows" in line and not (start / "out" / "state.pt").exists()


def test_moonlight_is_planned_on_paper():
    config = k2.K2Config.from_json(Path(k2.__file__).parent / "configs" / "moonlight-16b-a3b-instruct.json")
    parts = recipe.training_bytes(config, Run(steps=1, rows=1, window=4096), torch.bfloat16)
    assert abs(parts["weights"] / 2 / 15.96e9 - 1) < 0.01 and parts["momenta"] == 2 * parts["weights"]
    assert 190e9 < sum(parts.values()) < 260e9


def test_every_weight_is_planned():
    config = k2.K2Config.from_json(MINI)
    model = load(MINI, dtype=torch.float32)
    assert recipe.training_bytes(config, Run(steps=1))["weights"] == 4 * sum(p.numel() for p in model.parameters())


PEAK = """
import sys, numpy as np, torch
sys.path.insert(0, {root!r})
from k2.bench import peak_megabytes
from k2.config import K2Config
from k2.training.pretraining import Run, Trainer
torch.set_num_threads(1)
before, run = peak_megabytes(), Run(steps=9, rows={rows})
trainer = Trainer(K2Config.from_json({mini!r}), np.random.default_rng(0).integers(0, 3000, 20_000).astype(np.uint16), run)
for _ in range(3):
    trainer.step()
print(peak_megabytes() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("rows", [4, 16, 32])
def test_the_plan_is_what_a_run_takes(rows):
    source = PEAK.format(root=str(Path(__file__).parent.parent), mini=str(MINI), rows=rows)
    found = float(subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout) * 1e6
    planned = sum(recipe.training_bytes(k2.K2Config.from_json(MINI), Run(steps=9, rows=rows)).values())
    assert 0.8 < found / planned < 1.15, f"{found / 1e6:.0f} MB taken, {planned / 1e6:.0f} MB planned"


@pytest.mark.parametrize("arguments, words", [
    (["--data", "gone.txt"], "gone.txt: expected a text file"), (["--data", "empty.txt"], "found an empty file"), (["--data", "bytes.bin"], "expected UTF-8 text, found byte 0xff at 3"),
    (["--data", "short.txt"], "expected at least"), (["--rows", "0"], "--rows: found 0"), (["--minutes", "0"], "--minutes: found 0"), (["--lr", "nan"], "--lr: found nan"),
    (["--init", "gone"], "gone"),
])  # fmt: skip
def test_what_cannot_be_trained_on_is_one_line(start, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(start)
    Path("empty.txt").write_text("\n")
    Path("bytes.bin").write_bytes(b"abc\xff")
    Path("short.txt").write_text("def f")
    assert go_on(start, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("plan:")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


def test_data_without_a_checkpoint_is_one_line(tmp_path, capsys):
    assert main(["train", "--out", str(tmp_path), "--data", "x.txt"]) == 2
    assert "expected a checkpoint to train further" in capsys.readouterr().err


def test_bfloat16_is_chosen_on_a_gpu_and_float32_on_a_cpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert recipe.training_dtype("auto", cpu) == torch.float32 and recipe.training_dtype("bfloat16", cpu) == torch.bfloat16
    assert recipe.training_dtype("auto", gpu) == torch.bfloat16 and recipe.training_dtype("float32", gpu) == torch.float32


def test_bfloat16_training_learns_too(start):
    assert go_on(start, "--dtype", "bfloat16") == 0
    rows = read(start / "out" / "curve.csv")
    assert float(rows[-1]["loss"]) < 0.7 * float(rows[0]["loss"])


def test_held_out_text_of_the_users_own_is_the_end_and_is_not_trained_on(start):
    tokenizer = k2.Tokenizer.from_directory(start / "start")
    stream = np.arange(1000, dtype=np.uint16) % 300
    kept, probe = recipe.split_text(tokenizer, stream)
    assert len(kept) == 950 and np.array_equal(kept, stream[:950]) and callable(probe)
    uniform = lambda ids, positions: torch.zeros(len(ids), tokenizer.vocab_size)[positions]  # noqa: E731
    uniform.config = replace(small_config(), vocab_size=tokenizer.vocab_size)
    size = sum(len(tokenizer.bytes_of[i]) for i in stream[950:].tolist())
    assert abs(probe(uniform) - 49 * math.log2(tokenizer.vocab_size) / size) < 1e-4
