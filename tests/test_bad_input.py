"""Bad input, one row a damage: what is done to a whole checkpoint, and what the one line on stderr must say.

Each row goes through the command line: exit status 2, nothing on stdout, one line `error: ` that names the file and the
field, what was expected, what was found and what to do, and no traceback. Nothing hangs: a fifo is looked at, not opened.
"""

import base64
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small import random_model, small_config

import k2
from k2.__main__ import main
from k2.checkpoint import INDEX
from k2.tokenizer import tokenizer_files, train_ranks
from k2.training import recipe

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


def offsets(value):
    """Other data_offsets for one tensor of the first shard."""
    return with_header(lambda header: header[f"{O_PROJ}.weight"].__setitem__("data_offsets", value))


def header_text(raw: bytes):
    """A first shard that is nothing but a header."""
    return write(FIRST, len(raw).to_bytes(8, "little") + raw)


def sparse(file: str, length: int):
    """A shard that says, and has, so long a header; a hole on the disk."""

    def damage(folder: Path):
        with open(folder / file, "wb") as shard:
            shard.write(length.to_bytes(8, "little"))
            shard.truncate(8 + length)

    return damage


def in_two_shards(folder: Path):
    """The first shard holds the head as well; the index does not change."""
    head = safetensors.torch.load_file(folder / LAST)["lm_head.weight"]
    safetensors.torch.save_file(safetensors.torch.load_file(folder / FIRST) | {"lm_head.weight": head}, folder / FIRST)


def special_token(content):
    """Another content for the first special token of tokenizer_config.json."""

    def damage(folder: Path):
        raw = json.loads((folder / "tokenizer_config.json").read_text())
        first = min(raw["added_tokens_decoder"], key=int)
        raw["added_tokens_decoder"][first] = {"content": content}
        (folder / "tokenizer_config.json").write_text(json.dumps(raw))

    return damage


def dangling(file: str):
    """A link to nothing, as a cleaned download cache leaves it."""
    return lambda folder: ((folder / file).unlink(), (folder / file).symlink_to("nowhere"))


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
    "tensors that overlap": (with_header(overlap), [FIRST, f"{O_PROJ}.weight_scale_inv", "where the tensor before ends"]),
    "a tensor past the end": (with_header(beyond), [FIRST, "where the tensor before ends"]),
    "a tensor twice in a header": (header_text(b'{"a": 1, "a": 2}'), [FIRST, "JSON header", "the key a twice"]),
    "a tensor's name that would write to the terminal": (with_header(lambda header: header.__setitem__("a\n\x1b[2J", 1)), [FIRST, "a\\n\\x1b[2J", "whole numbers"]),
    "a header nested without end": (header_text(b"[" * 200_000), [FIRST, "JSON header"]),
    "a header that is a list": (header_text(b"[1]"), [FIRST, "JSON header"]),
    "a header that is no UTF-8": (header_text(b"\xff\xfe{}"), [FIRST, "JSON header"]),
    "an offset that is text": (offsets([0, "2016"]), [FIRST, O_PROJ, "whole numbers", "'2016'"]),
    "an offset of no number": (offsets([]), [FIRST, O_PROJ, "two data_offsets"]),
    "an offset below zero": (offsets([-5, 2011]), [FIRST, O_PROJ, "whole numbers from 0", "-5"]),
    "offsets that run backwards": (offsets([2016, 0]), [FIRST, O_PROJ, "expected 2016 bytes by its dtype and shape", "[2016, 0]"]),
    "an offset of forty digits": (offsets([0, 10**40]), [FIRST, O_PROJ, "whole numbers", "0" * 40]),
    "a header longer than any": (sparse(FIRST, 2**31), [FIRST, "at most 100000000 bytes", "2147483648"]),
    "a shard that is a dangling link": (dangling(LAST), [LAST, "no file", "Fetch"]),
    "two shards that hold one tensor": (in_two_shards, [FIRST, "holds lm_head.weight", f"places in {LAST}"]),
    "a folder for a shard": (directory(LAST), [LAST, "no regular file"]),
    # ---- index ----
    "an index naming a file that is not there": (index(**{"lm_head.weight": "model-9-of-3.safetensors"}), ["model-9-of-3.safetensors", "no file"]),
    "an index naming a file outside": (index(**{"lm_head.weight": "../other.safetensors"}), [INDEX, "lm_head.weight", "in this folder"]),
    "an index naming a file by 300 letters": (index(**{"lm_head.weight": "a" * 300 + ".safetensors"}), ["aaa.safetensors", "no file"]),
    "an index naming a number": (index(**{"lm_head.weight": 3}), [INDEX, "weight_map[lm_head.weight] is 3"]),
    "an index that places a tensor elsewhere": (index(**{"lm_head.weight": FIRST}), [FIRST, "lm_head.weight", "header lacks it"]),
    "an index that forgets a tensor": (index(**{"lm_head.weight": ...}), [LAST, "lm_head.weight", "in no file"]),
    "an index that is no JSON": (write(INDEX, b"{"), [INDEX, "expected JSON"]),
    "an index nested without end": (write(INDEX, b"[" * 200_000), [INDEX, "expected JSON"]),
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
    "NaN in one expert": (tensor(LAST, f"{EXPERT}.weight", fp8_nan), ["layer 2, expert 4:", "NaN", "check this expert's tensors"]),
    "NaN in the embedding": (tensor(FIRST, "model.embed_tokens.weight", nan), [FIRST, "model.embed_tokens.weight", "NaN"]),
    "infinity in a norm": (tensor(LAST, "model.norm.weight", lambda t: t / 0), [LAST, "model.norm.weight", "infinity"]),
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
    "a config with a byte order mark": (edit("config.json", lambda raw: b"\xef\xbb\xbf" + raw), ["config.json", "BOM"]),
    "a config key twice": (write("config.json", b'{"a": 1, "a": 2}'), ["config.json", "key a twice"]),
    "a config that is a list": (write("config.json", b"[]"), ["config.json", "list"]),
    "a missing config": (remove("config.json"), ["config.json", "nothing"]),
    "a folder for a config": (directory("config.json"), ["config.json", "regular file"]),
    # ---- tokenizer ----
    "a tokenizer without its file": (remove("tiktoken.model"), ["tiktoken.model", "found none"]),
    "a folder for the tokenizer": (directory("tiktoken.model"), ["tiktoken.model", "regular file"]),
    "an empty tokenizer": (write("tiktoken.model", b""), ["tiktoken.model", "every single byte"]),
    "an HTML page for the tokenizer": (write("tiktoken.model", b"<html>\n<body>"), ["tiktoken.model", "line 1", "rank 0"]),
    "a token that no two others make": (
        edit("tiktoken.model", lambda raw: raw[: raw.rindex(b"\n", 0, -1) + 1] + base64.b64encode(b"qzxjv") + b" %d\n" % (raw.count(b"\n") - 1)),
        ["tiktoken.model", "qzxjv", "two lower ranks"],
    ),
    "a special token that is a number": (special_token(5), ["tokenizer_config.json", "added_tokens_decoder"]),
    "a special token that is no UTF-8": (special_token("\ud800"), ["tokenizer_config.json", "added_tokens_decoder"]),
    "a special token without a name": (special_token(""), ["tokenizer_config.json", "empty"]),
    "a special token's name twice": (special_token("[EOS]"), ["tokenizer_config.json", "repeated"]),
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
@pytest.mark.parametrize("budget", [[], ["--ram", "330KB"]])
def test_nan_in_an_expert_is_named_by_layer_and_expert_however_it_is_held(whole, tmp_path, capfd, dtype, budget):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    DAMAGES["NaN in every expert of a layer"][0](folder)
    line = one_line(capfd, ["generate", "def read", "--model", str(folder), "--device", "cpu", "--dtype", dtype, *budget])
    assert re.search(r"layer 2, expert \d|layers\.2\.mlp\.experts\.\d", line), line


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["def " * 80], ["prompt", "expected at most 64", "Shorten"]),
        ([""], ["prompt", "at least one token"]),
        (["x", "--ram", "many"], ["'many'", "3GB"]),
        (["x", "--ram", "1KB"], ["1,000 given", "--ram"]),
        (["x", "--gpu-memory", "1GB"], ["--gpu-memory", "--device cuda"]),
        (["x", "--top-p", "1.5"], ["top_p", "1.5"]),
        (["x", "--temperature", "1", "--seed", str(2**64)], ["seed: found 18446744073709551616", "2^64 - 1"]),
        (["--prompt-file", "a" * 300], ["aaa: expected a text file", "found nothing"]),
        (["x", "--model", "a" * 300], ["aaa", "expected a", "found nothing"]),
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


# ---- what may not be read, and a disk that is full ----


@contextmanager
def no_longer_root():
    """Root reads everything: for the time inside, the process is nobody. Other users stay who they are."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions of another kind")
@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json", "tiktoken.model", "tokenizer_config.json"])
def test_a_file_that_may_not_be_read_is_one_line(whole, capfd, name):
    arguments = ["generate", "x", "--max-new-tokens", "1", "--device", "cpu", "--model"]
    assert main([*arguments, str(whole)]) == 0  # whatever is imported late is imported as root
    capfd.readouterr()
    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders are closed to others
        os.chmod(outer, 0o755)
        folder = Path(outer) / "model"
        shutil.copytree(whole, folder)
        (folder / name).chmod(0)
        with no_longer_root():
            if not os.access(folder, os.X_OK, effective_ids=True):
                pytest.skip("the folder for temporary files is closed to other users")
            line = one_line(capfd, [*arguments, str(folder)])
    assert str(folder / name) in line and "Permission denied" in line, line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def training(whole, tmp_path, monkeypatch):
    """The folder of a run whose text is ready, and the command that trains there for two steps, saving after each."""
    monkeypatch.setattr(recipe, "corpus_probe", lambda tokenizer: None)  # what is measured beside a save is no part of the save
    out = tmp_path / "run"
    out.mkdir()
    for name in ("tiktoken.model", "tokenizer_config.json"):
        shutil.copy(whole / name, out)
    np.save(out / "tokens.npy", np.random.default_rng(0).integers(0, 256, 2000).astype(np.uint16))
    sizes = {"steps": 2, "rows": 4, "window": 16, "stretch": 1, "save-every": 1}
    return out, ["train", "--out", str(out), "--config", str(whole), *(part for name, value in sizes.items() for part in (f"--{name}", str(value)))]


@pytest.mark.parametrize("flushes, file", [(0, "state.pt"), (1, "state.pt"), (2, "checkpoint-fp8"), (4, "checkpoint-fp8"), (6, "checkpoint-fp8"), (9, "checkpoint-fp8")])
def test_a_disk_that_fills_up_leaves_nothing_half_written_and_the_same_command_goes_on(training, capfd, monkeypatch, flushes, file):
    out, command = training
    before, left, flush = set(os.listdir(out)), [flushes], os.fsync

    def full(descriptor):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = one_line(capfd, command)
    assert f"{out / file}: could not be written" in line and "No space left" in line and "make room" in line, line
    assert set(os.listdir(out)) - before - {"curve.csv", "curve.png"} == ({"state.pt"} if flushes else set())
    assert main(command) == 0
    assert all(k2.load(out / f"checkpoint-{format}") for format in ("fp8", "bf16"))


def test_a_checkpoint_that_is_there_already_stays_as_it_is(training, capfd):
    out, command = training
    assert main(command) == 0
    before = contents(out)
    capfd.readouterr()
    assert main(command) == 0
    assert contents(out) == before


def test_an_out_that_is_a_file_is_one_line(whole, capfd):
    line = one_line(capfd, ["train", "--out", str(whole / "config.json")])
    assert "config.json: expected a directory or a new name for --out, found a file" in line


def test_a_benchmark_of_no_rounds_is_one_line(capfd):
    assert "--rounds: found 0; expected 1 or more" in one_line(capfd, ["bench", "--rounds", "0"])


def test_rows_without_products_are_one_line(capfd):
    assert "--rows: goes with --products" in one_line(capfd, ["bench", "--rows", "4"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("words", [["generate", "x", "--device", "cpu", "--max-new-tokens", "2", "--model"], ["bench", "--json", "--rounds", "1", "--prompt", "4", "--new", "1"]], ids=["text", "statistics"])
def test_a_disk_that_fills_up_behind_stdout_is_one_line(whole, words):
    command = [sys.executable, "-m", "k2", *words, str(whole)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"


@pytest.mark.parametrize("bad", [-1, 10**6, 2**62])
def test_ids_out_of_range_are_refused_with_the_range(whole, bad):
    model = k2.load(whole)
    with pytest.raises(k2.K2Error, match=rf"ids: found {bad}; expected 0 to {model.config.vocab_size - 1}"):
        model(torch.tensor([1, bad]))


@pytest.mark.parametrize("arguments", [
    ["generate", "x", "--model", "a\0b"], ["generate", "--prompt-file", "a\0b"], ["chat", "--model", "a\0b"], ["chat", "--tools", "a\0b"], ["chat", "--schema", "a\0b"], ["chat", "--load", "a\0b"],
    ["train", "--out", "a\0b"], ["train", "--out", "x", "--config", "a\0b"], ["train", "--out", "x", "--init", "a\0b"], ["train", "--out", "x", "--data", "a\0b"],
    ["experiment", "clip", "--out", "a\0b"], ["evaluate", "--model", "a\0b"], ["evaluate", "--data", "a\0b"], ["bench", "a\0b"],
    ["inspect", "a\0b"], ["plan", "a\0b"], ["plan", "mini", "--path", "a\0b"], ["check-layer", "a\0b", "0"],
], ids=lambda words: " ".join(word for word in words if "\0" not in word))  # fmt: skip
def test_a_path_with_a_zero_byte_is_one_line(capfd, arguments):
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert "found a zero byte" in err and len(err.splitlines()) == 1 and "\0" not in err
