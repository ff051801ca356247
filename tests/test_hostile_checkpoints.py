"""Headers and indexes that someone made to hurt: every one ends in one line, at once, and nothing outside the folder is read.

The verdicts on whole files are compared with the safetensors library's, which many eyes have looked at: what it refuses
we refuse, and what we refuse beyond that stands in a list with a reason.
"""

import json
import random
import re
import shutil
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from small import random_model, small_config

import k2
from k2.checkpoint import DTYPE_BITS, INDEX, read_header


def shard(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A shard's bytes; `header` is an object or raw text, `length` a lie about how long it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(begin=0, end=4, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


FOUR = bytes(4)
WHOLE = {  # what both must read
    "one number": shard({"a": entry()}, FOUR),
    "nothing": shard({}),
    "a scalar": shard({"a": entry(shape=())}, FOUR),
    "an empty tensor": shard({"a": entry(0, 0, shape=(0, 3))}),
    "two, the second first": shard({"b": entry(4, 8), "a": entry()}, FOUR * 2),
    "an empty one between two": shard({"a": entry(), "b": entry(4, 4, shape=(0,)), "c": entry(4, 8)}, FOUR * 2),
    "spaces behind the header": shard(json.dumps({"a": entry()}).encode() + b"   ", FOUR),
    "notes": shard({"__metadata__": {"format": "pt"}, "a": entry()}, FOUR),
    "not a number": shard({"a": entry()}, b"\xff\xff\xff\xff"),
    "a name that is no word": shard({"../../etc/passwd": entry()}, FOUR),
    "a key more in an entry": shard({"a": entry() | {"more": 1}}, FOUR),
    **{f"a {dtype}": shard({"a": entry(0, bits, (8,), dtype)}, bytes(bits)) for dtype, bits in DTYPE_BITS.items()},
}
DAMAGED = {  # what both must refuse
    "no byte": b"",
    "seven bytes": b"1234567",
    "a length alone": shard(b""),
    "a length past the file": shard({"a": entry()}, FOUR, length=10**6),
    "a length of 2 GB": shard({"a": entry()}, FOUR, length=2**31),
    "the largest length": shard({"a": entry()}, FOUR, length=2**64 - 1),
    "a length one short": shard({"a": entry()}, FOUR, length=len(json.dumps({"a": entry()})) - 1),
    "a length one long": shard({"a": entry()}, FOUR, length=len(json.dumps({"a": entry()})) + 1),
    "no JSON": shard(b"{nonsense}", FOUR),
    "no UTF-8": shard(b'{"\xff": 1}', FOUR),
    "a list": shard(b"[]"),
    "a number": shard(b"5"),
    "half a character in a name": shard(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", FOUR),
    "a nest without end": shard(b'{"a":' * 5000),
    "an entry that is null": shard({"a": None}),
    "an entry without a shape": shard({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, FOUR),
    "an entry without a dtype": shard({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "an entry without offsets": shard({"a": {"dtype": "F32", "shape": [1]}}, FOUR),
    "a dtype of nobody": shard({"a": entry(dtype="F31")}, FOUR),
    "a dtype that is a list": shard({"a": entry(dtype=["F32"])}, FOUR),
    "a shape below zero": shard({"a": entry(shape=(-1,))}, FOUR),
    "a shape and offsets below zero": shard({"a": entry(0, -4, shape=(-1,))}, FOUR),
    "a shape of half a row": shard({"a": entry(shape=(0.5,))}, FOUR),
    "a shape past 64 bits": shard({"a": entry(shape=(2**64,))}, FOUR),
    "a shape whose product wraps to one": shard({"a": entry(shape=(2**63, 2, 1))}, FOUR),
    "a shape whose bytes wrap to nothing": shard({"a": entry(0, 0, shape=(2**62,))}),
    "offsets that are text": shard({"a": entry("0", "4")}, FOUR),
    "an offset below zero": shard({"a": entry(-4, 0)}, FOUR),
    "offsets that run backwards": shard({"a": entry(4, 0)}, FOUR),
    "three offsets": shard({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, FOUR * 2),
    "an offset past 64 bits": shard({"a": entry(0, 2**64 + 4)}, FOUR),
    "an offset past the file": shard({"a": entry(0, 8, shape=(2,))}, FOUR),
    "two over the same bytes": shard({"a": entry(), "b": entry()}, FOUR),
    "two that overlap by half": shard({"a": entry(0, 8, shape=(2,)), "b": entry(4, 12, shape=(2,))}, FOUR * 3),
    "a hole before": shard({"a": entry(4, 8)}, FOUR * 2),
    "a hole between": shard({"a": entry(), "b": entry(8, 12)}, FOUR * 3),
    "a byte behind": shard({"a": entry()}, FOUR + b"x"),
    "a zip file behind": shard({"a": entry()}, FOUR + b"PK\x03\x04"),
    "fewer bytes than the shape says": shard({"a": entry(shape=(2,))}, FOUR),
    "notes that are a number": shard({"__metadata__": 1, "a": entry()}, FOUR),
    "notes that nest": shard({"__metadata__": {"a": {}}, "a": entry()}, FOUR),
    "half a byte": shard({"a": entry(0, 1, shape=(1,), dtype="F4")}, b"x"),
}
STRICTER = {  # what the library reads and we do not, and why
    "a name twice": (shard(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", FOUR), "readers differ about which one counts"),
    "a space before the header": (shard(b" " + json.dumps({"a": entry()}).encode(), FOUR), "the format's own text wants the brace first"),
    "a character written as two halves": (shard(b'{"\\ud83d\\ude00":' + json.dumps(entry()).encode() + b"}", FOUR), "no writer does it, and one half alone would pass"),
    "a name of a thousand letters": (shard({"a" * 1000: entry()}, FOUR), "it would fill the screen, and no tensor of the family has one"),
    "more tensors than any model": (shard(b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(500_001)) + b"}"), "memory"),
}


def ours(path: Path) -> str:
    """What we say of a file: nothing, or the one line."""
    try:
        read_header(path)
    except k2.K2Error as error:
        assert str(path) in str(error) and len(str(error)) < 1500
        return str(error)
    return ""


def theirs(raw: bytes) -> str:
    """What the library says of its bytes."""
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_whole_is_read_here_as_by_the_library(name, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(WHOLE[name])
    assert (ours(tmp_path / "s.safetensors"), theirs(WHOLE[name])) == ("", "")


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused_here_as_by_the_library(name, tmp_path):
    (tmp_path / "s.safetensors").write_bytes(DAMAGED[name])
    assert ours(tmp_path / "s.safetensors") and theirs(DAMAGED[name])


@pytest.mark.parametrize("name", STRICTER)
def test_what_only_we_refuse_is_a_short_list(name, tmp_path):
    raw, reason = STRICTER[name]
    (tmp_path / "s.safetensors").write_bytes(raw)
    assert ours(tmp_path / "s.safetensors") and not theirs(raw) and reason


# ---- by seed ----


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A shard with one to four of its header's bytes, numbers or words changed, and its length field mostly right."""
    length = int.from_bytes(raw[:8], "little")
    header, data = bytearray(raw[8 : 8 + length]), raw[8 + length :]
    for _ in range(rng.randint(1, 4)):
        at, numbers = rng.randrange(len(header)), list(re.finditer(rb"\d+", bytes(header)))
        kind = rng.randrange(6)
        if kind == 0:
            header[at] = rng.randrange(256)
        elif kind == 1:
            del header[at : at + rng.randint(1, 9)]
        elif kind == 2:
            header[at:at] = header[rng.randrange(len(header)) :][: rng.randint(1, 60)]
        elif kind == 3 and numbers:
            found = rng.choice(numbers)
            header[found.start() : found.end()] = rng.choice([b"0", b"-1", b"1e9", b"18446744073709551616", b"1.5", b"null", b"true", b"NaN", b"[]", b'"1"', b"99999999999"])
        elif kind == 4:
            header[at:at] = rng.choice([b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\x00", b"\xff", b"../", b"\\ud800"])
        elif header:
            header = bytearray(bytes(header).replace(*rng.choice([(b"F32", b"F16"), (b"BF16", b"I64"), (b"shape", b"shapes"), (b"dtype", b"shape"), (b"weight", b"bias")])))
        header = header or bytearray(b"{")
    said = len(header) if rng.random() < 0.9 else rng.choice([0, 1, length, 2**20, 2**31, 2**63, 2**64 - 1])
    return shard(bytes(header), data if rng.random() < 0.9 else data[: rng.randrange(len(data))], said)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small checkpoint in one shard."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    k2.save(random_model(small_config(num_hidden_layers=2, n_routed_experts=4, vocab_size=20)), directory, format="fp8", shards=1)
    return directory


@pytest.fixture
def opened(tmp_path):
    """The files that were opened while the test ran, by the interpreter's own record; the hook sleeps afterwards."""
    found, awake = [], [True]
    sys.addaudithook(lambda event, arguments: found.append(arguments[0]) if awake[0] and event == "open" else None)
    yield found
    awake[0] = False


def test_2500_mutated_headers_end_in_one_line_or_are_what_the_library_reads_too(whole, tmp_path, opened):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    raw, rng, read, slowest = (whole / "model-1-of-1.safetensors").read_bytes(), random.Random(2), 0, 0.0
    before = len(opened)
    for _ in range(2500):
        damaged = mutated(raw, rng)
        (folder / "model-1-of-1.safetensors").write_bytes(damaged)
        started = time.perf_counter()
        try:
            k2.Checkpoint(folder)
        except k2.K2Error as error:
            assert str(folder) in str(error), error
        else:
            read += 1
        slowest = max(slowest, time.perf_counter() - started)
        if not ours(folder / "model-1-of-1.safetensors"):
            assert not theirs(damaged), damaged[:300]
    outside = {str(path) for path in opened[before:] if isinstance(path, (str, Path)) and folder not in Path(path).parents}
    assert not outside and slowest < 5, (outside, slowest)
    assert read < 250, "the mutations do too little"


def test_the_undamaged_shard_passes_where_its_mutants_do_not(whole):
    assert k2.Checkpoint(whole).weight_map and not ours(whole / "model-1-of-1.safetensors")


# ---- an index that points elsewhere, and what would eat memory ----

OUTSIDE = ["../../etc/passwd", "/etc/passwd", "../secret.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "..\\secret.safetensors", "C:secret.safetensors", "~/x.safetensors",
           "secret.safetensors\x00", "secret.safetensors\n", "", ".", "..", None, 3, ["model-1-of-1.safetensors"]]  # fmt: skip


@pytest.mark.parametrize("file", OUTSIDE, ids=repr)
def test_an_index_that_names_what_is_no_shard_of_this_folder_is_refused_before_anything_is_opened(whole, tmp_path, opened, file):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    safetensors.torch.save_file({"lm_head.weight": torch.zeros(3)}, tmp_path / "secret.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    before = len(opened)
    with pytest.raises(k2.K2Error, match=re.escape(f"weight_map[lm_head.weight] is {file!r}")):
        k2.Checkpoint(folder)
    touched = {Path(path).name for path in opened[before:] if isinstance(path, (str, Path))}
    assert touched <= {"config.json", INDEX}, touched


@pytest.mark.parametrize("name", ["a million tiny tensors", "a million lists", "a name of ninety million letters"])
def test_a_header_made_to_eat_memory_is_refused_in_less_than_it_takes_on_the_disk_twice(tmp_path, name):
    made = {
        "a million tiny tensors": lambda: shard(b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}"),
        "a million lists": lambda: shard(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"),
        "a name of ninety million letters": lambda: shard(b'{"' + b"a" * 90_000_000 + b'":1}'),
    }[name]()
    (tmp_path / "s.safetensors").write_bytes(made)
    tracemalloc.start()
    try:
        assert "expected" in ours(tmp_path / "s.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 5 * len(made), "peak of Python's memory"
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("changes", [{"n_routed_experts": 100_000, "num_hidden_layers": 1000}, {"n_routed_experts": 10**11}, {"num_hidden_layers": 10**9}])
def test_a_config_that_implies_more_names_than_memory_is_refused(whole, tmp_path, changes):
    config = json.loads((whole / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(k2.K2Error, match="at most"):
        k2.Checkpoint(tmp_path)


def test_an_index_longer_than_any_is_not_read(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "model")
    with open(tmp_path / "model" / INDEX, "wb") as index:
        index.truncate(2**31)
    with pytest.raises(k2.K2Error, match="JSON of at most 100000000 bytes, found 2147483648"):
        k2.Checkpoint(tmp_path / "model")


def test_nothing_here_unpickles_or_runs_what_a_checkpoint_brings():
    for path in [*(Path(k2.__file__).parent).rglob("*.py"), Path(k2.__file__).parent.parent / "download_weights.py"]:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if path.name == "tools.py":  # runs the file that --tools names: the user's own, and no checkpoint's
            continue
        if path.name == "compare.py":  # loads tests/mutants.py, this repository's own, when it is asked to break the model
            text = text.replace("importlib", "")
        assert not re.search(r"^\s*(import|from) (pickle|shelve|marshal|dill|joblib)\b|trust_remote_code|(?<!\.)\b(eval|exec)\(|importlib", text, re.MULTILINE), path
        assert all("weights_only=True" in call for call in re.findall(r"torch\.load\([^\n]*", text)), path
