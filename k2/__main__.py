"""python -m k2 COMMAND. This file only parses, dispatches and prints: text to stdout, all else to stderr."""

import argparse
import os
import sys
import time
from pathlib import Path

import torch

from . import reference
from .checkpoint import load
from .config import K2Error
from .generation import generate
from .tokenizer import Tokenizer

MINI = Path(__file__).parent / "mini"
DTYPES = {"auto": "auto", "stored": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main(arguments=None) -> int:
    """Run one command; 0, or 2 for something the user can mend, or 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
    except K2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    parser = argparse.ArgumentParser(prog="python -m k2", description="Kimi K2, built from scratch to be read.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_generate(commands)
    return parser


def add_generate(commands):
    """python -m k2 generate"""
    sub = commands.add_parser("generate", help="continue a text", description="Continue a text, greedy by default.")
    sub.add_argument("prompt", nargs="?", help="the text to continue; - reads standard input")
    sub.add_argument("--prompt-file", metavar="FILE", help="read the prompt from a file instead")
    sub.add_argument("--model", default=MINI, metavar="DIR", help="a checkpoint directory (default: the shipped K2-mini)")
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    sub.add_argument("--dtype", default="auto", choices=tuple(DTYPES), help="stored: keep the checkpoint's format at rest")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; K2's own setting is 0.6")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int)
    sub.add_argument("--backend", default="torch", choices=("torch", "numpy"), help="numpy: the float64 reference, greedy")
    sub.set_defaults(run=run_generate)


def read_prompt(options) -> str:
    """The prompt from the argument, a file or standard input, exactly as it stands."""
    if (options.prompt is None) == (options.prompt_file is None):
        raise K2Error("generate: expected a prompt or --prompt-file, found both or neither. Write: python -m k2 generate \"def \"")
    if options.prompt_file is None and options.prompt != "-":
        return options.prompt
    path = options.prompt_file
    if path is not None and not Path(path).is_file():
        raise K2Error(f"{path}: expected a text file, found {'something else' if Path(path).exists() else 'nothing'}. Give an existing file to --prompt-file.")
    try:
        return (sys.stdin.buffer.read() if path is None else Path(path).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise K2Error(f"{path or 'standard input'}: expected UTF-8 text, found byte {error.object[error.start]:#x} at {error.start}. Convert it to UTF-8.") from None


def pick_device(name: str) -> torch.device:
    """auto is the GPU if torch sees one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise K2Error("--device cuda: torch sees no CUDA device. Use --device cpu, or install the CUDA build of torch.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def run_generate(options):
    """Stream the continuation to stdout; the plan before and the measured line after go to stderr."""
    text, device = read_prompt(options), pick_device(options.device)
    if options.max_new_tokens < 0:
        raise K2Error(f"--max-new-tokens: found {options.max_new_tokens}; expected 0 or more.")
    tokenizer = Tokenizer.from_directory(options.model)
    started = time.perf_counter()
    model = load(options.model, device="cpu" if options.backend == "numpy" else device, dtype=torch.float32 if options.backend == "numpy" else DTYPES[options.dtype])
    ids = tokenizer.encode(text)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{options.model}: {size / 1e6:,.1f} MB of weights as {model.lm_head.weight.dtype} on {options.backend} {device}, "
          f"loaded in {time.perf_counter() - started:.2f} s; prompt of {len(ids)} tokens", file=sys.stderr)  # fmt: skip
    new_ids = numpy_continuation(model, ids, tokenizer, options) if options.backend == "numpy" else generate(
        model, ids, options.max_new_tokens, options.temperature, options.top_p, options.seed, tokenizer.stop_ids)  # fmt: skip
    stream(new_ids, tokenizer)


def numpy_continuation(model, ids, tokenizer: Tokenizer, options):
    """The reference on the same weights, widened to float64."""
    if options.temperature != 0:
        raise K2Error(f"--temperature: found {options.temperature} with --backend numpy; expected 0, as the reference is greedy.")
    generate(model, ids, options.max_new_tokens)  # its checks of the prompt; the iterator it returns is not run
    count = min(options.max_new_tokens, model.config.max_position_embeddings - len(ids) + 1)
    weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    return reference.generate(model.config, weights, ids, count, tokenizer.stop_ids)


def stream(new_ids, tokenizer: Tokenizer):
    """Print ids as text as they come, then the speed: the first token apart, as it pays for the prompt."""
    decoder, times = tokenizer.stream(), [time.perf_counter()]
    try:
        for i in new_ids:
            times.append(time.perf_counter())
            print(decoder.push(i), end="", flush=True)
    finally:
        print(decoder.finish(), flush=True)
        first = times[1] - times[0] if len(times) > 1 else 0.0
        rate = f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tokens/s" if len(times) > 2 else ""
        print(f"{len(times) - 1} tokens; the first after {first:.2f} s{rate}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
