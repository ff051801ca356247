"""The two ways to a checkpoint: K2-mini from nothing, and any checkpoint further on text of one's own.

    python -m k2 train --out DIR                               corpus -> vocabulary -> tokens -> run -> checkpoint
    python -m k2 train --out DIR --init CHECKPOINT --data F    CHECKPOINT's vocabulary and weights, F's text

Both plan their memory before they start, and go on where they were stopped.
"""

import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..ceilings import keep_freed_memory
from ..checkpoint import FORMATS, Checkpoint, expected_tensors, filled_model, save
from ..config import K2Config, K2Error
from ..model import resident_experts
from ..offload import free_memory
from ..tokenizer import RESERVED, Tokenizer, tokenizer_files, train_ranks
from .corpus import read_texts, token_stream, training_files
from .curves import Curve, draw_run, read
from .evaluation import bits_per_byte, held_out_text
from .pretraining import HEAD_ROWS, Run, Trainer, read_state, train

HELD_OUT_SHARE = 0.05  # of the user's own text, its end, is measured and not trained on
TEXTS = ("tiktoken.model", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


def training_bytes(config: K2Config, run: Run, dtype=torch.float32) -> dict[str, int]:
    """What a run holds in memory, part by part, known before anything is allocated."""
    shapes = [s.shape for name, s in expected_tensors(replace(config, quantization_config=None)).items() if not name.endswith("_bias")]
    count, width = sum(map(math.prod, shapes)), dtype.itemsize
    tables = 2 * config.vocab_size * config.hidden_size
    D, F, K, H = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok + config.n_shared_experts, config.num_attention_heads
    # Kept per token for the way back: the residual stream and its norms; queries, keys, values; each expert's inside.
    per_layer = 10 * D + H * (3 * config.qk_head_dim + 2 * config.v_head_dim) + K * (4 * F + 2 * D)
    tokens = run.rows * run.window
    return {
        "weights": count * width,
        "gradients": count * width,
        "float32 masters": count * 4 if dtype != torch.float32 else 0,  # float32 weights are their own
        "momenta": count * 4,
        "second moments": tables * 4,
        "activations": tokens * (config.num_hidden_layers * per_layer + 2 * D) * width + 2 * min(HEAD_ROWS, tokens) * config.vocab_size * 4,  # logits: a block of HeadLoss
    }


def check_memory(config: K2Config, run: Run, dtype, free: int):
    """Print the plan; refuse a run that cannot fit, before it has allocated anything."""
    parts = training_bytes(config, run, dtype)
    total = sum(parts.values())
    plan = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
    print(f"plan: {total / 1e9:.2f} GB ({plan}); {free / 1e9:.1f} GB are free", file=sys.stderr)
    if total > free:
        raise K2Error(f"training: needs {total / 1e9:.1f} GB ({plan}), found {free / 1e9:.1f} GB free. Fewer --rows shrink the activations; the rest needs a larger machine or a smaller model.")


def training_dtype(name: str, device: torch.device):
    """auto is bfloat16 on a GPU, and float32 on a CPU, where even one with instructions for bfloat16 trained K2-mini faster
    in float32, in nearly every run: `python -m k2 bench --train` shows both."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def make_checkpoint(config: K2Config, out: Path, run: Run, dtype=torch.float32, device="cpu", minutes: float | None = None):
    """From this machine's Python sources to `out`/checkpoint-fp8 and, to compare with, `out`/checkpoint-bf16."""
    make_folder(out)
    check_memory(config, run, dtype, memory_of(device))
    files = prepare_text(config, out)
    tokenizer, stream = Tokenizer.from_directory(out), np.load(out / "tokens.npy")
    stops = [config.eos_token_id + 1, config.eos_token_id]  # <|im_end|> and [EOS]
    files["generation_config.json"] = json.dumps({"max_length": config.max_position_embeddings, "eos_token_id": stops}, indent=2) + "\n"
    run_and_save(lambda run: Trainer(config, stream, run, dtype, device=device), out, run, minutes, files, ("fp8", "bf16"), corpus_probe(tokenizer))


def continue_checkpoint(init: Path, data: list[Path], out: Path, run: Run, dtype=torch.float32, device="cpu", minutes: float | None = None):
    """The weights of `init` trained further, on `data` or on K2-mini's corpus, to `out`/checkpoint in the same format."""
    make_folder(out)
    checkpoint = Checkpoint(init)
    config = checkpoint.config
    check_memory(config, run, dtype, memory_of(device))
    tokenizer = Tokenizer.from_directory(init)
    if data:
        stream, probe = split_text(tokenizer, own_text(tokenizer, data))
    else:
        stream, probe = token_stream(tokenizer, training_files()), corpus_probe(tokenizer)
    files = {name: (init / name).read_text(encoding="utf-8") for name in TEXTS if (init / name).exists()}

    def trainer(run):
        return Trainer(config, stream, run, dtype, filled_model(checkpoint, torch.device("cpu"), torch.float32, resident_experts), device)

    name = config.weight_format if config.weight_format in FORMATS else "bf16"
    run_and_save(trainer, out, run, minutes, files, (name,), probe)


def run_and_save(make_trainer, out: Path, run: Run, minutes: float | None, files: dict[str, str], formats: tuple, probe):
    """Train, draw, and write the checkpoints that are not there yet."""
    if minutes:
        run = replace(run, steps=planned_steps(make_trainer, out, run, minutes))
    keep_freed_memory(large_too=True)
    trainer = make_trainer(run)
    train(trainer, out / "state.pt", Curve(out / "curve.csv"), probe)
    draw_run(read(out / "curve.csv"), out / "curve.png", run.tau)
    for format in formats:
        if not (out / f"checkpoint-{format}").exists():  # an earlier run of this command may have found room for one only
            save(trainer.model.cpu(), out / f"checkpoint-{format}", format, shards=min(3, trainer.model.config.num_hidden_layers), files=files)


def planned_steps(make_trainer, out: Path, run: Run, minutes: float) -> int:
    """How many steps fit into the time, measured on three of them; a run that was stopped keeps its first answer."""
    if (out / "state.pt").exists():
        return read_state(out / "state.pt")["run"]["steps"]
    trainer = make_trainer(replace(run, steps=4))
    trainer.step()
    started = time.perf_counter()
    for _ in range(3):
        trainer.step()
    steps = max(1, int(minutes * 60 / ((time.perf_counter() - started) / 3)))
    print(f"{steps} steps fit into {minutes:g} minutes", file=sys.stderr)
    return steps


def memory_of(device) -> int:
    """Free bytes where the run will live."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else free_memory()


def make_folder(out: Path):
    """--out, if it can be one."""
    if out.exists() and not out.is_dir():
        raise K2Error(f"{out}: expected a directory or a new name for --out, found a file. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)


def corpus_probe(tokenizer: Tokenizer):
    """probe(model): bits per byte on the first 40,000 characters of the held-out modules."""
    text = held_out_text()[:40_000]
    ids = tokenizer.encode(text)
    return lambda model: bits_per_byte(model, ids, len(text.encode()))


def own_text(tokenizer: Tokenizer, data: list[Path]) -> np.ndarray:
    """The user's files as one stream. Unlike the corpus' own, a file that cannot be read is refused and not skipped."""
    for path in data:
        try:
            if not path.read_text(encoding="utf-8").strip():
                raise K2Error(f"--data {path}: expected text, found an empty file. Leave it out.")
        except OSError as error:
            raise K2Error(f"--data {path}: expected a text file, could not read it: {error.strerror}. Check the name.") from None
        except UnicodeDecodeError as error:
            raise K2Error(f"--data {path}: expected UTF-8 text, found byte {error.object[error.start]:#x} at {error.start}. Convert it, or leave it out.") from None
    return token_stream(tokenizer, [(path, 1) for path in data])


def split_text(tokenizer: Tokenizer, stream: np.ndarray):
    """(what is trained on, a probe of bits per byte on the end, which is not)."""
    cut = len(stream) - int(len(stream) * HELD_OUT_SHARE)
    ids = stream[cut:].tolist()
    size = sum(len(tokenizer.bytes_of[i]) for i in ids)
    return stream[:cut], (lambda model: bits_per_byte(model, ids, size)) if len(ids) > 1 and size else None


def prepare_text(config: K2Config, out: Path) -> dict[str, str]:
    """Learn the vocabulary and encode the corpus into `out`, unless an earlier run did; returns the tokenizer's files."""
    if not (out / "tokens.npy").exists():
        corpus = training_files()
        print(f"corpus: {len(corpus)} files; learning {config.vocab_size - RESERVED} tokens from the twice-read ones", file=sys.stderr)
        ranks = train_ranks(read_texts([path for path, times in corpus if times > 1]), config.vocab_size - RESERVED)
        for name, text in tokenizer_files(ranks).items():
            (out / name).write_text(text, encoding="utf-8")
        stream = token_stream(Tokenizer.from_directory(out), corpus)
        with open(out / ".tokens.npy", "wb") as file:
            np.save(file, stream)
        os.replace(out / ".tokens.npy", out / "tokens.npy")
    return {name: (out / name).read_text(encoding="utf-8") for name in TEXTS[:2]}
