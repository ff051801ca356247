"""Equal to the real file on paper: the names, dtypes, shapes and shards of all tensors of Kimi-K2-Instruct, from its config.

The real checkpoint's table is not in this repository; its digest is. With K2_TENSOR_TABLE=FILE (a JSON object, gzipped or
not, {name: {"dtype", "shape", "file"}}) the two are compared line by line.
"""

import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from local_hub import REPO, LocalHub

import download_weights
from k2.__main__ import main
from k2.checkpoint import DTYPE_NAMES, IGNORED_TENSORS, expected_tensors, filled_model, shard_names
from k2.config import K2Config
from k2.hub import Hub
from k2.moe import resident_experts
from k2.quantization import FP8Linear

CONFIG = Path(__file__).parent.parent / "k2" / "configs" / "kimi-k2-instruct.json"
TENSORS, BYTES = 139_644, 1_029_173_256_720
DIGEST = "0c081ed30630d5eb3bfa9d6f404dd28da11ac07db2b47527d9e55b224ac6de82"  # of the sorted lines "name dtype shape file"
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@functools.cache
def released_tensors() -> dict[str, dict]:
    """What the config implies, and the 61 stale buffers that the real file has besides, one beside each layer."""
    config = K2Config.from_json(CONFIG)
    specs = expected_tensors(config)
    files = shard_names(config, specs, 61)
    tensors = {name: {"dtype": spec.dtypes[0], "shape": list(spec.shape), "file": files[name]} for name, spec in specs.items()}
    for i in range(61):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = {"dtype": "BF16", "shape": [56], "file": f"model-{i + 1}-of-61.safetensors"}
    return tensors


def lines(tensors: dict[str, dict]) -> list[str]:
    return sorted(f"{name} {t['dtype']} {t['shape']} {t['file']}" for name, t in tensors.items())


def tensor_bytes(t: dict) -> int:
    return math.prod(t["shape"]) * SIZES[t["dtype"]]


def test_the_configs_layout_has_the_real_files_digest_and_totals():
    tensors = released_tensors()
    assert len(tensors) == TENSORS and sum(map(tensor_bytes, tensors.values())) == BYTES
    assert hashlib.sha256("\n".join(lines(tensors)).encode()).hexdigest() == DIGEST


def test_the_digest_notices_one_changed_line():
    name = "model.layers.7.mlp.gate.e_score_correction_bias"
    tensors = released_tensors() | {name: released_tensors()[name] | {"dtype": "BF16"}}
    assert hashlib.sha256("\n".join(lines(tensors)).encode()).hexdigest() != DIGEST


@pytest.mark.oracle
def test_the_real_table_differs_in_no_line():
    path = os.environ.get("K2_TENSOR_TABLE")
    if not path:
        pytest.skip("K2_TENSOR_TABLE is not set: the digest stands for the real checkpoint's table, which is not shipped")
    raw = Path(path).read_bytes()
    real = set(lines(json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)))
    ours = set(lines(released_tensors()))
    assert hashlib.sha256("\n".join(sorted(real)).encode()).hexdigest() == DIGEST
    found = [f"only in the real file: {line}" for line in sorted(real - ours)] + [f"only in ours: {line}" for line in sorted(ours - real)]
    assert not found, f"{len(found)} lines differ:\n" + "\n".join(found[:20])


def test_every_tensor_is_used_or_ignored_by_name_with_a_reason():
    used, ignored = set(expected_tensors(K2Config.from_json(CONFIG))), {}
    for name in released_tensors().keys() - used:
        ignored[name] = [reason for pattern, reason in IGNORED_TENSORS if pattern.search(name)]
    assert len(used) == 139_583 and len(ignored) == 61 and all(len(reasons) == 1 for reasons in ignored.values())
    assert all(name.endswith("rotary_emb.inv_freq") for name in ignored)
    assert not any(pattern.search(name) for pattern, _ in IGNORED_TENSORS for name in used)


class OnPaper:
    """A checkpoint of a config in which every number is 1: each tensor has its dtype and shape, and takes no memory."""

    def __init__(self, config: K2Config):
        self.config, self.specs, self.directory = config, expected_tensors(config), Path("paper")
        self.weight_map = dict.fromkeys(self.specs, "paper")

    def tensor(self, name: str):
        spec = self.specs[name]
        return torch.ones(()).to(DTYPE_NAMES[spec.dtypes[0]]).expand(spec.shape)

    finite = scale = tensor

    def holds(self, name: str) -> bool:
        return name in self.specs

    def let_go(self, name: str):
        """There is no map."""


def test_the_model_made_from_the_real_config_has_the_real_files_names_shapes_and_dtypes():
    # The dense layer and two with experts, as the others repeat them; K2_TENSOR_TABLE asks for all 61, some 40 s.
    config = K2Config.from_json(CONFIG)
    config = config if os.environ.get("K2_TENSOR_TABLE") else replace(config, num_hidden_layers=3)
    checkpoint, started = OnPaper(config), time.perf_counter()
    model = filled_model(checkpoint, torch.device("meta"), None, resident_experts)
    seconds = time.perf_counter() - started
    at_rest = sum(isinstance(module, FP8Linear) for module in model.modules())
    print(f"{config.num_hidden_layers} layers on the meta device, {at_rest:,} FP8Linear put in place: {seconds:.1f} s")
    expected = {name: (DTYPE_NAMES[spec.dtypes[0]], spec.shape) for name, spec in checkpoint.specs.items()}
    for i in range(config.num_hidden_layers):  # widened at load, as absorption reads the matrix itself
        name = f"model.layers.{i}.self_attn.kv_b_proj.weight"
        expected[name] = (torch.bfloat16, expected[name][1])
        del expected[f"{name}_scale_inv"]
    for i in range(config.first_k_dense_replace, config.num_hidden_layers):  # the router computes in float32
        name = f"model.layers.{i}.mlp.gate.weight"
        expected[name] = (torch.float32, expected[name][1])
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    differing = [f"{name}: {found.get(name)}, expected {expected.get(name)}" for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
    assert not differing, f"{len(differing)} tensors differ:\n" + "\n".join(differing[:20])
    assert at_rest == 4 * config.num_hidden_layers + 3 + 3 * 385 * (config.num_hidden_layers - 1)


# ---- the whole checkpoint as sparse files ----


MARKED = "model.layers.30.mlp.experts.217."  # the one expert whose bytes are not zero


def write_sparse_checkpoint(folder: Path) -> int:
    """All 61 shards with their real headers and sizes and holes for weights; returns the bytes that they take on the disk."""
    by_file, tensors = {}, released_tensors()
    for name, t in tensors.items():
        by_file.setdefault(t["file"], []).append(name)
    for file, names in by_file.items():
        header, end = {}, 0
        for name in sorted(names, key=lambda name: (-SIZES[tensors[name]["dtype"]], name)):  # safetensors' own order
            begin, end = end, end + tensor_bytes(tensors[name])
            header[name] = {"dtype": tensors[name]["dtype"], "shape": tensors[name]["shape"], "data_offsets": [begin, end]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with open(folder / file, "wb") as shard:
            shard.write(len(raw).to_bytes(8, "little") + raw)
            for name in names:
                if name.startswith(MARKED):
                    begin, stop = header[name]["data_offsets"]
                    shard.seek(8 + len(raw) + begin)
                    shard.write(marked_bytes(name, stop - begin))
            shard.truncate(8 + len(raw) + end)
    index = {"metadata": {"total_size": BYTES}, "weight_map": {name: t["file"] for name, t in tensors.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(CONFIG, folder / "config.json")
    return sum(path.stat().st_blocks * 512 for path in folder.iterdir())


def marked_bytes(name: str, size: int) -> bytes:
    """For weights a pattern of codes that are no NaN, another for each matrix; for scales the float32 1/64."""
    if name.endswith("weight_scale_inv"):
        return bytes.fromhex("0000803c") * (size // 4)
    return bytes((i * 37 + len(name)) % 120 for i in range(4096)) * (size // 4096)


CHILD = """
import json, sys, time
sys.path[:0] = sys.argv[1:3]
import torch
from k2.checkpoint import Checkpoint
from k2.offload import ExpertStore
from test_released_layout import MARKED, marked_bytes

def resident(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

before, started = resident("VmRSS"), time.perf_counter()
checkpoint = Checkpoint(sys.argv[3])
opened = time.perf_counter() - started
store = ExpertStore(checkpoint, 100_000_000)
indexed = time.perf_counter() - started
same, reads = True, len(store.record((30, 217)).spans)
for e, expert in store.fetch(30, [217]):
    for part in ("gate_proj", "up_proj", "down_proj"):
        for kind in ("weight", "weight_scale_inv"):
            name = f"{MARKED}{part}.{kind}"
            mapped, fetched = checkpoint.tensor(name), getattr(getattr(expert, part), kind)
            expected = marked_bytes(name, fetched.numel() * fetched.element_size())
            same &= all(t.detach().contiguous().view(torch.uint8).numpy().tobytes() == expected for t in (mapped, fetched))
print(json.dumps({"opened": opened, "indexed": indexed, "same": bool(same), "reads": reads, "experts": store.count,
                  "slot": store.ram.rooms[0].numel(), "peak": resident("VmHWM") - before}))
"""


ONLY_LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory through /proc, and needs sparse files of 17 GB")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """The folder of the sparse checkpoint, and the bytes that it takes on the disk."""
    folder = tmp_path_factory.mktemp("sparse")
    try:
        yield folder, write_sparse_checkpoint(folder)
    except OSError as error:
        pytest.skip(f"this file system takes no sparse files of this size: {error}")
    finally:
        for path in folder.iterdir():
            path.unlink()


@ONLY_LINUX
def test_a_checkpoint_of_a_terabyte_opens_in_bounded_memory_and_gives_one_expert(sparse):
    folder, on_disk = sparse
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", CHILD, str(here), str(here.parent), str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    print(f"{BYTES:,} bytes in {on_disk:,} on the disk: opened in {found['opened']:.1f} s, the store made after {found['indexed']:.1f} s, {found['peak'] / 1e6:,.0f} MB")
    assert found["same"], "the expert's bytes are not those written"
    assert found["experts"] == 60 * 384 and found["reads"] == 1, f"{found['reads']} reads for an expert whose weights are neighbours"
    assert 44_040_192 <= found["slot"] <= 44_040_192 + 3 * 4096
    assert found["peak"] < 1.5e9, f"opening took {found['peak'] / 1e6:,.0f} MB"


@ONLY_LINUX
def test_a_checkpoint_of_a_terabyte_is_inspected(sparse, capfd):
    assert main(["inspect", str(sparse[0])]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    table = {line[0]: (int(line[1].replace(",", "")), int(line[2].replace(",", ""))) for line in lines[1:11]}
    assert table["all"] == (TENSORS, BYTES) and table["expert"] == (138_240, 1_014_933_749_760) and table["ignored"] == (61, 6832)
    assert table["attention"][1] + table["norm"][1] == 6_169_957_728 + 1_998_848 and table["head"] == (2, 2_348_810_240 + 14_336)


@ONLY_LINUX
def test_a_repository_of_a_terabyte_is_inspected_by_its_headers(sparse, capfd, monkeypatch):
    server = LocalHub(sparse[0], digests={path.name: f"{i:064x}" for i, path in enumerate(sorted(sparse[0].glob("*.safetensors")))})
    monkeypatch.setattr("k2.hub.Hub", lambda: Hub(server.endpoint))
    try:
        assert main(["inspect", REPO, "*.layers.60.mlp.gate.*"]) == 0
    finally:
        server.close()
    out, err = capfd.readouterr()
    print(f"{server.sent:,} bytes sent")
    assert len(out.splitlines()) == 2 and "model-61-of-61.safetensors" in out and f"{server.sent:,} bytes read" in err
    assert 30e6 < server.sent < 34e6


@ONLY_LINUX
def test_a_part_of_a_terabyte_is_fetched_from_a_hub_that_has_it(sparse, tmp_path, monkeypatch, capfd):
    # The hashes of 17 GB of holes are made up: of a part nobody can check them. 101 MB and one expert cross the network.
    server = LocalHub(sparse[0], digests={path.name: f"{i:064x}" for i, path in enumerate(sorted(sparse[0].glob("*.safetensors")))})
    monkeypatch.setattr(download_weights, "Hub", lambda: Hub(server.endpoint))
    try:
        flags = ["--layers", "1", "--part", "attention", "--experts", "30:217"]
        assert download_weights.main([REPO, "--local-dir", str(tmp_path), *flags]) == 0
        err = capfd.readouterr().err
    finally:
        server.close()
    held = {name: t for path in tmp_path.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}
    sizes = [tensor_bytes(released_tensors()[name]) for name in held]
    assert len(held) == 13 + 6 and sum(sizes) == 101_165_280 + 44_050_944
    for name in held:
        if name.startswith(MARKED):
            assert held[name].view(torch.uint8).numpy().tobytes() == marked_bytes(name, tensor_bytes(released_tensors()[name])), name
    overhead = server.sent - sum(sizes) - (sparse[0] / "config.json").stat().st_size * 2
    print(f"{server.sent:,} bytes sent for {sum(sizes):,} of tensors; {err.splitlines()[-1]}")
    index = (sparse[0] / "model.safetensors.index.json").stat().st_size
    assert 0 < overhead - index < 1_000_000, "besides the tensors only config, index and two headers"
    assert main(["check-layer", str(tmp_path), "30", "--experts", "217", "--tokens", "1"]) == 0


@ONLY_LINUX
def test_a_checkpoint_of_a_terabyte_is_planned(sparse, capfd, monkeypatch):
    monkeypatch.setattr("k2.plan.measured_speeds", lambda *_: None)
    assert main(["plan", str(sparse[0]), "--ram", "64GB", "--gpu-memory", "0", "--ram-bandwidth", "50GB", "--disk-bandwidth", "5GB"]) == 0
    assert f"with 61 stale buffers of the released file {TENSORS:,} and {BYTES:,}" in capfd.readouterr().out
