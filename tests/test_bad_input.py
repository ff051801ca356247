"""Bad input, one row a damage: what is done to a whole checkpoint, and what the one line on stderr must say.

Each row goes through the command line: exit status 2, nothing on stdout, one line `error: ` that names the file and the
field, what was expected, what was found and what to do, and no traceback. Nothing hangs: a fifo is looked at, not opened.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small import random_model, small_config

import k2
from k2.__main__ import main
from k2.checkpoint import INDEX
from k2.tokenizer import tokenizer_files, train_ranks

FIRST, LAST = "model-1-of-3.safetensors", "model-3-of-3.safetensors"
O_PROJ = "model.layers.0.self_attn.o_proj"  # in FIRST
EXPERT = "model.layers.2.mlp.experts.4.up_proj"  # in LAST


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small FP8 checkpoint in three shards, with a tokenizer."""
    ranks = train_ranks(["def read(path):\n    return open(path).read()\n" * 4], 300)
    model = random_model(small_config(vocab_size=len(ranks) + 256, max_position_embeddings=64), 0)
    directory = tmp_path_factory.mktemp("whole") / "model"
    k2.save(model, directory, format="fp8", shards=3, files=tokenizer_files(ranks))
    return directory


# ---- ways to damage it ----


def config(**changes):
    """Set keys of config.json; a value of ... takes the key away."""

    def damage(folder: Path):
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))

    return damage


def index(**changes):
    """The same for the index's weight_map, its names with dots."""

    def damage(folder: Path):
        raw = json.loads((folder / INDEX).read_text())
        raw["weight_map"] = {name: file for name, file in (raw["weight_map"] | changes).items() if file is not ...}
        (folder / INDEX).write_text(json.dumps(raw))

    return damage


def tensors(file: str, change):
    """Rewrite a shard after `change(dict of tensors)`, and the index to agree."""

    def damage(folder: Path):
        held = safetensors.torch.load_file(folder / file)
        before = set(held)
        change(held)
        safetensors.torch.save_file(held, folder / file, metadata={"format": "pt"})
        index(**{name: file for name in held.keys() - before}, **{name: ... for name in before - held.keys()})(folder)

    return damage


def tensor(file: str, name: str, change):
    """Rewrite one tensor."""
    return tensors(file, lambda held: held.__setitem__(name, change(held[name])))


def write(file: str, content: bytes):
    """Put other bytes in a file's place."""
    return lambda folder: (folder / file).write_bytes(content)


def edit(file: str, change):
    """Put a function of a file's bytes in its place."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes()))


def remove(file: str):
    return lambda folder: (folder / file).unlink()


def directory(file: str):
    """A folder where a file should be."""
    return lambda folder: ((folder / file).unlink(), (folder / file).mkdir())


def fifo(file: str):
    """A fifo where a file should be: opening it would wait for ever."""
    return lambda folder: ((folder / file).unlink(), os.mkfifo(folder / file))


def with_header(change):
    """The first shard with another header, its length field adjusted; `change` works on the parsed header."""

    def damage(folder: Path):
        raw = (folder / FIRST).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / FIRST).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return damage


def nan(t):
    """One NaN, in whatever dtype."""
    t = t.clone()
    t.view(-1)[0] = torch.nan
    return t


def fp8_nan(t):
    codes = t.view(torch.uint8).clone()
    codes.view(-1)[3] = 0x7F
    return codes.view(torch.float8_e4m3fn)


def overlap(header):
    header[f"{O_PROJ}.weight_scale_inv"]["data_offsets"] = [0, 4]


def beyond(header):
    begin, end = header[f"{O_PROJ}.weight"]["data_offsets"]
    header[f"{O_PROJ}.weight"]["data_offsets"] = [begin + 10**9, end + 10**9]


DAMAGES = {
    # ---- shards ----
    "a missing shard": (remove(LAST), [LAST, "expected a shard", "no file", "Fetch"]),
    "a cut shard": (edit(LAST, lambda raw: raw[:-100]), [LAST, "expected", "bytes by its header", "cut", "fetch it again"]),
    "a shard cut inside its header": (edit(LAST, lambda raw: raw[:50]), [LAST, "header", "found a file of 50"]),
    "a shard of a few bytes": (write(LAST, b"abc"), [LAST, "header"]),
    "an empty shard": (write(LAST, b""), [LAST, "header"]),
    "a shard with bytes too many": (edit(LAST, lambda raw: raw + b"\0"), [LAST, "too long"]),
    "an HTML page for a shard": (write(LAST, b"<html>" * 100), [LAST, "header"]),
    "a header length past the file": (edit(FIRST, lambda raw: (2**40).to_bytes(8, "little") + raw[8:]), [FIRST, "header"]),
    "a header that is no JSON": (edit(FIRST, lambda raw: raw[:8] + b"x" + raw[9:]), [FIRST, "JSON header"]),
    "tensors that overlap": (with_header(overlap), [FIRST]),
    "a tensor past the end": (with_header(beyond), [FIRST]),
    "a folder for a shard": (directory(LAST), [LAST, "no regular file"]),
    # ---- index ----
    "an index naming a file that is not there": (index(**{"lm_head.weight": "model-9-of-3.safetensors"}), ["model-9-of-3.safetensors", "no file"]),
    "an index naming a file outside": (index(**{"lm_head.weight": "../other.safetensors"}), [INDEX, "lm_head.weight", "in this folder"]),
    "an index that places a tensor elsewhere": (index(**{"lm_head.weight": FIRST}), [FIRST, "lm_head.weight", "header lacks it"]),
    "an index that forgets a tensor": (index(**{"lm_head.weight": ...}), [LAST, "lm_head.weight", "in no file"]),
    "an index that is no JSON": (write(INDEX, b"{"), [INDEX, "expected JSON"]),
    "an index without a map": (write(INDEX, b"{}"), [INDEX, "weight_map"]),
    "a missing index": (remove(INDEX), [INDEX, "nothing"]),
    "a folder for an index": (directory(INDEX), [INDEX, "regular file"]),
    # ---- tensors ----
    "a tensor of the wrong shape": (tensor(FIRST, f"{O_PROJ}.weight", lambda t: t[:-1].contiguous()), [FIRST, O_PROJ, "shape [47, 42]", "expected [48, 42]"]),
    "a tensor of the wrong dtype": (tensor(LAST, "lm_head.weight", torch.Tensor.half), [LAST, "lm_head.weight", "dtype F16", "expected BF16"]),
    "a scale missing": (tensors(FIRST, lambda held: held.pop(f"{O_PROJ}.weight_scale_inv")), [f"{O_PROJ}.weight_scale_inv", "missing"]),
    "a tensor that nobody knows": (tensors(FIRST, lambda held: held.__setitem__("model.layers.0.extra.weight", torch.zeros(3))), [FIRST, "unknown tensor model.layers.0.extra.weight"]),
    "NaN in the head": (tensor(LAST, "lm_head.weight", nan), [LAST, "lm_head.weight", "NaN"]),
    "NaN in an attention matrix": (tensor(FIRST, f"{O_PROJ}.weight", fp8_nan), [FIRST, f"{O_PROJ}.weight", "NaN"]),
    "NaN in a scale": (tensor(FIRST, f"{O_PROJ}.weight_scale_inv", nan), [f"{O_PROJ}.weight_scale_inv", "NaN"]),
    "a scale of absurd size": (tensor(FIRST, f"{O_PROJ}.weight_scale_inv", lambda t: t + 1e6), [f"{O_PROJ}.weight_scale_inv", "expected below 128"]),
    "NaN in the router's bias": (tensor(LAST, "model.layers.2.mlp.gate.e_score_correction_bias", nan), [LAST, "e_score_correction_bias", "NaN"]),
    "NaN in an expert's scale": (tensor(LAST, f"{EXPERT}.weight_scale_inv", nan), [f"{EXPERT}.weight_scale_inv", "NaN"]),
    "NaN in every expert of a layer": (
        tensors(LAST, lambda held: held.update({name: fp8_nan(t) for name, t in held.items() if ".experts." in name and t.dtype == torch.float8_e4m3fn})),
        ["layer 2, expert ", "NaN", "check this expert's tensors"],
    ),
    # ---- config ----
    "an unknown config key": (config(sliding_window=4096), ["config.json", "unknown key sliding_window = 4096"]),
    "an unknown config value": (config(scoring_func="softmax"), ["config.json", "scoring_func is 'softmax'", "only 'sigmoid'"]),
    "a config value missing": (config(routed_scaling_factor=...), ["config.json", "routed_scaling_factor is missing"]),
    "a config of another size": (config(n_routed_experts=12), ["gate.weight", "[11, 48]", "[12, 48]", "config.json"]),
    "a config that is no JSON": (write("config.json", b"not json"), ["config.json", "expected JSON"]),
    "a config that is a list": (write("config.json", b"[]"), ["config.json", "list"]),
    "a missing config": (remove("config.json"), ["config.json", "nothing"]),
    "a folder for a config": (directory("config.json"), ["config.json", "regular file"]),
    # ---- tokenizer ----
    "a tokenizer without its file": (remove("tiktoken.model"), ["tiktoken.model", "found none"]),
    "a folder for the tokenizer": (directory("tiktoken.model"), ["tiktoken.model", "regular file"]),
    "a line of the tokenizer damaged": (edit("tiktoken.model", lambda raw: raw.replace(b" 17\n", b" 71\n")), ["tiktoken.model", "line 18", "rank 17"]),
    "tokenizer_config.json missing": (remove("tokenizer_config.json"), ["tokenizer_config.json"]),
}
if hasattr(os, "mkfifo"):
    for name in ("config.json", INDEX, FIRST, "tiktoken.model", "tokenizer_config.json"):
        DAMAGES[f"a fifo for {name}"] = (fifo(name), [name, "regular file"])


@contextmanager
def at_most(seconds: int):
    """Turns a hang into a failure, where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def late(*_):
        raise AssertionError(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def one_line(capfd, arguments: list[str]) -> str:
    """The only `error: ` line of a command that ends with status 2."""
    with at_most(60):
        status = main(arguments)
    out, err = capfd.readouterr()
    lines = err.strip().splitlines()
    assert status == 2 and out.strip() == "" and "Traceback" not in err, f"status {status}, stdout {out!r}, stderr:\n{err}"
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1, err
    return lines[-1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_line_that_says_what_to_do(whole, tmp_path, capfd, damage):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    hurt, words = DAMAGES[damage]
    hurt(folder)
    line = one_line(capfd, ["generate", "def read", "--model", str(folder), "--max-new-tokens", "4", "--device", "cpu"])
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"
    assert len(line) > 60 and line.rstrip().endswith((".", "?")), f"says too little: {line}"


def test_the_undamaged_checkpoint_is_fine(whole, capfd):
    assert main(["generate", "def read", "--model", str(whole), "--max-new-tokens", "4", "--device", "cpu"]) == 0


@pytest.mark.parametrize("dtype", ["stored", "float32"])
@pytest.mark.parametrize("budget", [[], ["--ram", "300KB"]])
def test_nan_in_an_expert_is_named_by_layer_and_expert_however_it_is_held(whole, tmp_path, capfd, dtype, budget):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    DAMAGES["NaN in every expert of a layer"][0](folder)
    line = one_line(capfd, ["generate", "def read", "--model", str(folder), "--device", "cpu", "--dtype", dtype, *budget])
    assert "layer 2, expert " in line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["def " * 80], ["prompt", "expected at most 64", "Shorten"]),
        ([""], ["prompt", "at least one token"]),
        (["x", "--ram", "many"], ["'many'", "3GB"]),
        (["x", "--ram", "1KB"], ["1,000 given", "--ram"]),
        (["x", "--gpu-memory", "1GB"], ["--gpu-memory", "--device cuda"]),
        (["x", "--top-p", "1.5"], ["top_p", "1.5"]),
    ],
)
def test_arguments_that_cannot_be_met_are_one_line(whole, capfd, arguments, words):
    line = one_line(capfd, ["generate", "--model", str(whole), "--device", "cpu", *arguments])
    assert all(word in line for word in words), line


def test_cuda_where_there_is_none_is_one_line(whole, capfd, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in one_line(capfd, ["generate", "x", "--model", str(whole), "--device", "cuda"])


@pytest.mark.parametrize("name", ["config.json", FIRST])
def test_a_model_that_is_a_file_is_one_line(whole, capfd, name):
    line = one_line(capfd, ["generate", "x", "--model", str(whole / name), "--device", "cpu"])
    assert name in line


@pytest.mark.skipif(sys.platform == "win32" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root reads everything")
def test_a_shard_that_may_not_be_read_is_one_line(whole, tmp_path, capfd):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / FIRST).chmod(0)
    assert FIRST in one_line(capfd, ["generate", "x", "--model", str(folder), "--device", "cpu"])


@pytest.mark.parametrize("bad", [-1, 10**6, 2**62])
def test_ids_out_of_range_are_refused_with_the_range(whole, bad):
    model = k2.load(whole)
    with pytest.raises(k2.K2Error, match=rf"ids: found {bad}; expected 0 to {model.config.vocab_size - 1}"):
        model(torch.tensor([1, bad]))
