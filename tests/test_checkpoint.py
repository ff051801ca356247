"""Checkpoints: what is saved is what is loaded, bit for bit where the format keeps bits, and a failed save leaves nothing."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small import assert_close, assert_same, random_ids, random_model, recorded_choices, reference_logits, small_config

import k2
from k2 import checkpoint
from k2.quantization import FP8Linear, INT4Linear, fp8_dequantize, fp8_quantize, int4_dequantize, int4_quantize

FORMATS = ["fp32", "bf16", "fp8", "int4"]


def storable_config(**changes):
    """Sizes that every format can hold: hidden 160 is five groups of 32, and a whole and a ragged block of 128."""
    return small_config(hidden_size=160, moe_intermediate_size=32, n_routed_experts=5, num_experts_per_tok=2, **changes)


MODEL = random_model(storable_config())
IDS = random_ids(MODEL.config, 9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of MODEL in a format, written once."""
    folder = tmp_path_factory.mktemp("saved")
    for name in FORMATS:
        k2.save(MODEL, folder / name, format=name)
    return folder.joinpath


def read_shards(folder) -> dict[str, dict[str, torch.Tensor]]:
    """{file: {name: tensor}}, in memory and apart from the files."""
    return {path.name: {name: t.clone() for name, t in safetensors.torch.load_file(path).items()} for path in sorted(Path(folder).glob("*.safetensors"))}


def write_shards(folder, shards, config: dict | None = None):
    """A checkpoint of the given tensors, with an index that agrees; `config` is config.json's content."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    for file, tensors in shards.items():
        safetensors.torch.save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def same_shards(found, expected):
    assert found.keys() == expected.keys()
    for file in expected:
        assert found[file].keys() == expected[file].keys()
        for name, tensor in expected[file].items():
            as_bits = (lambda t: t.view(torch.uint8)) if tensor.dtype == torch.float8_e4m3fn else (lambda t: t)
            assert found[file][name].dtype == tensor.dtype, name
            assert_same(as_bits(found[file][name]), as_bits(tensor), f"{file} {name}")


def same_weights(found: k2.K2, expected: k2.K2):
    """Bit for bit. Logits need not be: a matrix product's last bits depend on where in memory its operands lie."""
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert_same(found.state_dict()[name], tensor, name)


def as_stored(name: str, weight: torch.Tensor, format: str) -> torch.Tensor:
    """What a weight of MODEL is after a trip through a format, in float32; written from the formats' definitions."""
    if format == "fp32" or name.endswith("e_score_correction_bias"):
        return weight
    if format == "int4" and ".experts." in name:
        return int4_dequantize(*int4_quantize(weight))
    if format == "fp8" and name.endswith("_proj.weight") or format == "fp8" and "with_mqa" in name:
        return fp8_dequantize(*fp8_quantize(weight))
    return weight.bfloat16().float()


# ---- save, then load ----


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_weight_is_the_saved_one_as_its_format_rounds_it(saved, format):
    loaded = k2.load(saved(format), dtype=torch.float32).state_dict()
    assert loaded.keys() == MODEL.state_dict().keys()
    for name, weight in MODEL.state_dict().items():
        assert_same(loaded[name], as_stored(name, weight, format), f"{format} {name}")


def test_float32_goes_out_and_in_without_a_bit_changed(saved):
    same_weights(k2.load(saved("fp32")), MODEL)
    assert_close(k2.load(saved("fp32"))(IDS), MODEL(IDS), 5e-6 * 3**0.5, "logits")


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_the_number_of_shards_changes_no_bit(saved, format, shards, tmp_path):
    k2.save(MODEL, tmp_path / "c", format=format, shards=shards)
    assert sorted(path.name for path in (tmp_path / "c").glob("*.safetensors")) == [f"model-{i}-of-{shards}.safetensors" for i in range(1, shards + 1)]
    found, expected = read_shards(tmp_path / "c"), read_shards(saved(format))
    same_shards({"all": merged(found)}, {"all": merged(expected)})
    weight_map = json.loads((tmp_path / "c" / checkpoint.INDEX).read_text())["weight_map"]
    assert weight_map == {name: file for file, tensors in found.items() for name in tensors}


def merged(shards) -> dict[str, torch.Tensor]:
    return {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}


@pytest.mark.parametrize("shards", [-1, 4])
def test_more_shards_than_layers_or_less_than_one_are_refused(shards, tmp_path):
    with pytest.raises(k2.K2Error, match="num_hidden_layers = 3"):
        k2.save(MODEL, tmp_path / "c", shards=shards)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_a_loaded_model_saves_to_the_same_bits(saved, format, tmp_path):
    k2.save(k2.load(saved(format), dtype=torch.float32), tmp_path / "again", format=format)
    same_shards(read_shards(tmp_path / "again"), read_shards(saved(format)))
    assert (tmp_path / "again" / "config.json").read_bytes() == (saved(format) / "config.json").read_bytes()


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_a_model_at_rest_saves_its_experts_to_the_same_bits(saved, format, tmp_path):
    k2.save(k2.load(saved(format), dtype=None), tmp_path / "again", format=format)
    found, expected = merged(read_shards(tmp_path / "again")), merged(read_shards(saved(format)))
    kept = [name for name in expected if "kv_b_proj" not in name]  # that one is dequantised to bfloat16 at load
    same_shards({"": {name: found[name] for name in kept}}, {"": {name: expected[name] for name in kept}})


def test_saving_writes_the_tokenizers_files_beside_the_weights(tmp_path):
    k2.save(MODEL, tmp_path / "c", files={"tiktoken.model": "IQ== 0\n"})
    assert (tmp_path / "c" / "tiktoken.model").read_text() == "IQ== 0\n"


# ---- names ----


@pytest.mark.parametrize("format", FORMATS)
def test_a_models_state_dict_has_the_checkpoints_names_without_a_rename(saved, format):
    stored = set(merged(read_shards(saved(format))))
    widened = {f"model.layers.{i}.self_attn.kv_b_proj.weight_scale_inv" for i in range(3)} & stored  # absorption reads the matrix itself
    assert stored == set(checkpoint.expected_tensors(k2.K2Config.from_json(saved(format))))
    assert set(k2.load(saved(format), dtype=None).state_dict()) == stored - widened
    assert set(MODEL.state_dict()) == set(merged(read_shards(saved("fp32"))))


def test_a_model_without_a_query_latent_goes_out_and_in(tmp_path):
    model = random_model(storable_config(q_lora_rank=None, n_shared_experts=2, rope_scaling=None))
    k2.save(model, tmp_path / "c", format="fp32")
    assert "model.layers.0.self_attn.q_proj.weight" in merged(read_shards(tmp_path / "c"))
    same_weights(k2.load(tmp_path / "c"), model)


# ---- the stored format at rest ----


@pytest.mark.parametrize("format, kind", [("fp8", FP8Linear), ("int4", INT4Linear)])
def test_dtype_none_keeps_the_stored_format_at_rest(saved, format, kind):
    model, stored = k2.load(saved(format), dtype=None), merged(read_shards(saved(format)))
    assert isinstance(model.model.layers[1].mlp.experts[4].down_proj, kind)
    for name, tensor in model.state_dict().items():
        if "kv_b_proj" not in name and not name.endswith("gate.weight"):  # absorption reads the one, and the other computes in float32
            assert tensor.dtype == stored[name].dtype, name


@pytest.mark.parametrize("format", FORMATS)
def test_weights_at_rest_compute_what_dequantised_ones_do(saved, format):
    dtype = torch.float32 if format == "fp32" else torch.bfloat16
    model, widened = k2.load(saved(format), dtype=None), k2.load(saved(format), dtype=dtype)
    if format in ("fp8", "int4"):  # few rows meet the codes themselves, and are rounded less: held to float64 with the same choices
        with recorded_choices(model) as choices:
            found = model(IDS)
        assert_close(found, reference_logits(widened, IDS, choices, tolerance=0.05), 0.06, format)
    else:
        assert_same(model(IDS), widened(IDS), format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, None])
def test_the_routers_bias_is_float32_whatever_the_weights_are(saved, dtype):
    bias = k2.load(saved("fp8"), dtype=dtype).model.layers[2].mlp.gate.e_score_correction_bias
    assert_same(bias, MODEL.model.layers[2].mlp.gate.e_score_correction_bias, str(dtype))


def test_moonlights_bfloat16_bias_is_widened_without_loss(saved, tmp_path):
    shards = read_shards(saved("bf16"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = shards["model-2-of-3.safetensors"][name].bfloat16()
    shards["model-2-of-3.safetensors"][name] = bias
    write_shards(tmp_path, shards, json.loads((saved("bf16") / "config.json").read_text()))
    assert_same(k2.load(tmp_path).model.layers[1].mlp.gate.e_score_correction_bias, bias.float(), name)


def test_auto_is_float32_for_a_small_model_and_the_stored_format_for_k2(saved):
    config = k2.K2Config.from_json(Path(k2.__file__).parent / "configs" / "kimi-k2-instruct.json")
    assert checkpoint.resolved_dtypes(config, "auto", torch.device("cpu")) == (None, None)
    assert {p.dtype for p in k2.load(saved("fp8")).parameters()} == {torch.float32}


def test_a_loaded_model_is_ready_to_run_and_asks_for_no_gradients(saved):
    model = k2.load(saved("fp8"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


# ---- the memory map ----


def test_a_tensor_is_a_view_into_the_map_and_not_a_copy(saved):
    opened = k2.Checkpoint(saved("fp8"))
    for name in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.embed_tokens.weight", "model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"):
        assert opened.tensor(name).data_ptr() == opened.tensor(name).data_ptr()
    near, far = opened.tensor("model.embed_tokens.weight"), opened.tensor("model.layers.0.self_attn.o_proj.weight")
    size = (saved("fp8") / "model-1-of-3.safetensors").stat().st_size
    assert abs(near.data_ptr() - far.data_ptr()) < size, "two tensors of one shard lie in one map"


def test_routed_experts_that_need_no_cast_stay_in_the_map(saved):
    model = k2.load(saved("fp8"), dtype=None)
    first, second = (model.model.layers[1].mlp.experts[e].gate_proj.weight for e in (0, 4))
    size = (saved("fp8") / "model-2-of-3.safetensors").stat().st_size
    assert abs(first.data_ptr() - second.data_ptr()) < size


# ---- layouts that occur ----


def test_a_single_file_without_an_index_loads(saved, tmp_path):
    k2.save(MODEL, tmp_path / "c", format="fp32", shards=1)
    os.rename(tmp_path / "c" / "model-1-of-1.safetensors", tmp_path / "c" / "model.safetensors")
    os.remove(tmp_path / "c" / checkpoint.INDEX)
    same_weights(k2.load(tmp_path / "c"), MODEL)


def test_a_scale_may_lie_in_another_shard_than_its_weight(saved, tmp_path):
    shards = read_shards(saved("fp8"))
    apart = {name: tensor for name, tensor in merged(shards).items() if name.endswith("weight_scale_inv")}
    shards = {file: {name: t for name, t in tensors.items() if name not in apart} for file, tensors in shards.items()}
    write_shards(tmp_path, shards | {"scales.safetensors": apart}, json.loads((saved("fp8") / "config.json").read_text()))
    same_weights(k2.load(tmp_path), k2.load(saved("fp8")))


def test_a_stale_inv_freq_is_ignored_by_name_and_with_a_reason(saved, tmp_path):
    shards = read_shards(saved("fp32"))
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    shards["model-1-of-3.safetensors"][stale] = torch.full((56,), torch.nan, dtype=torch.bfloat16)
    write_shards(tmp_path, shards, json.loads((saved("fp32") / "config.json").read_text()))
    assert list(k2.Checkpoint(tmp_path).ignored) == [stale] and "stale" in k2.Checkpoint(tmp_path).ignored[stale]
    same_weights(k2.load(tmp_path), MODEL)


def test_k25s_prefix_is_taken_off_and_its_vision_part_ignored_with_a_reason(saved, tmp_path):
    shards = {file: {f"language_model.{name}": t for name, t in tensors.items()} for file, tensors in read_shards(saved("int4")).items()}
    vision = {"vision_tower.patch_embed.proj.weight": torch.zeros(3), "mm_projector.proj.0.weight": torch.zeros(2)}
    text = json.loads((saved("int4") / "config.json").read_text())
    outer = {"model_type": "kimi_k25", "text_config": text, "vision_config": {"vt_num_hidden_layers": 27}}
    write_shards(tmp_path, shards | {"vision.safetensors": vision}, outer)
    ignored = k2.Checkpoint(tmp_path).ignored
    assert set(ignored) == set(vision) and all("vision" in reason for reason in ignored.values())
    model = k2.load(tmp_path)
    same_weights(model, k2.load(saved("int4")))


def test_int64_shapes_of_int4_matrices_are_read_too(saved, tmp_path):
    shards = read_shards(saved("int4"))
    wide = {file: {name: t.long() if name.endswith("weight_shape") else t for name, t in tensors.items()} for file, tensors in shards.items()}
    write_shards(tmp_path, wide, json.loads((saved("int4") / "config.json").read_text()))
    same_weights(k2.load(tmp_path), k2.load(saved("int4")))


# ---- a part of a checkpoint ----


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_first_layers_are_the_whole_models_and_no_later_shard_is_needed(saved, tmp_path, layers):
    shutil.copytree(saved("fp8"), tmp_path / "c")
    for i in range(layers, 2):  # the third shard also holds the last norm and the head
        os.remove(tmp_path / "c" / f"model-{i + 1}-of-3.safetensors")
    found, whole = checkpoint.load(tmp_path / "c", layers=layers).state_dict(), k2.load(saved("fp8")).state_dict()
    assert found.keys() == {name for name in whole if not any(f"layers.{i}." in name for i in range(layers, 3))}
    for name in found:
        assert_same(found[name], whole[name], name)


def test_the_first_layers_compute_what_they_do_inside_the_whole_model(saved):
    two, whole = checkpoint.load(saved("fp32"), layers=2), k2.load(saved("fp32"))
    states = []
    handle = whole.model.layers[1].register_forward_hook(lambda module, given, result: states.append(result))
    whole(IDS)
    handle.remove()
    assert_same(two(IDS), whole.lm_head(whole.model.norm(states[0])), "logits after two layers")


@pytest.mark.parametrize("ram", [None, 1_000_000])
def test_fewer_layers_than_are_dense_are_a_model_too(tmp_path, ram):
    model = random_model(small_config(first_k_dense_replace=2, num_hidden_layers=3))
    checkpoint.save(model, tmp_path / "c", format="fp32")
    first, states = k2.load(tmp_path / "c", layers=1, ram=ram), []
    model.model.layers[0].register_forward_hook(lambda module, given, result: states.append(result))
    model(IDS)
    assert_same(first(IDS), model.lm_head(model.model.norm(states[0])), "logits after one layer")


@pytest.mark.parametrize("layers", [0, -1, 4])
def test_layers_that_the_model_has_not_are_refused(saved, layers):
    with pytest.raises(k2.K2Error, match=f"expected 1 to 3 of them, found {layers}"):
        k2.Checkpoint(saved("fp8"), layers=layers)


def test_a_partial_checkpoint_opens_as_one_and_what_it_holds_is_checked_all_the_same(saved, tmp_path):
    shards = read_shards(saved("fp8"))
    held = {name: t for name, t in shards["model-2-of-3.safetensors"].items() if "self_attn" in name}
    config = json.loads((saved("fp8") / "config.json").read_text())
    write_shards(tmp_path, {"part-model-2-of-3.safetensors": held}, config)
    assert set(k2.Checkpoint(tmp_path, partial=True).weight_map) == set(held)
    with pytest.raises(k2.K2Error, match="is missing; config.json implies it"):
        k2.Checkpoint(tmp_path)
    write_shards(tmp_path, {"part-model-2-of-3.safetensors": held}, config | {"kv_lora_rank": 24})
    with pytest.raises(k2.K2Error, match="kv_a_layernorm.weight has shape"):
        k2.Checkpoint(tmp_path, partial=True)


# ---- a save that fails ----


def test_save_refuses_a_folder_with_content_and_touches_nothing(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(k2.K2Error, match="nothing was overwritten"):
        k2.save(MODEL, tmp_path / "c")
    assert [path.name for path in tmp_path.rglob("*")] == ["c", "mine.txt"]


def test_save_refuses_a_file_in_its_place(tmp_path):
    (tmp_path / "c").write_text("mine")
    with pytest.raises(k2.K2Error, match="/c: "):
        k2.save(MODEL, tmp_path / "c")
    assert (tmp_path / "c").read_text() == "mine"


def test_save_takes_an_empty_folder_and_makes_missing_parents(tmp_path):
    (tmp_path / "empty").mkdir()
    k2.save(MODEL, tmp_path / "empty")
    k2.save(MODEL, tmp_path / "a" / "b" / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]
    assert (tmp_path / "empty" / "config.json").exists() and [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]


def test_a_format_that_does_not_exist_or_does_not_divide_is_refused(tmp_path):
    with pytest.raises(k2.K2Error, match="int4, *|expected one of"):
        k2.save(MODEL, tmp_path / "c", format="int8")
    with pytest.raises(k2.K2Error, match="hidden_size 48"):
        k2.save(random_model(small_config()), tmp_path / "c", format="int4")
    assert not list(tmp_path.iterdir())


def fails_with(error):
    def fail(*arguments, **options):
        raise error

    return fail


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "owner, function",
    [(os, "rename"), (os, "fsync"), (checkpoint.safetensors.torch, "save_file"), (checkpoint, "write_through"), (checkpoint.Path, "mkdir")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(owner, function, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fails_with(DISK_FULL))
        with pytest.raises(k2.K2Error) as caught:
            k2.save(MODEL, tmp_path / "c")
    assert "No space left" in str(caught.value) and str(tmp_path / "c") in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir()), "the target, or a temporary folder, was left"


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fails_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        k2.save(MODEL, tmp_path / "c")
    assert not list(tmp_path.iterdir())


# ---- one process that saves, loads, runs out of disk and is killed; each test below reads what it left ----

CHILD = """
import json, os, resource, signal, sys
from pathlib import Path
import torch
import k2
from small import random_model, small_config

folder = Path(sys.argv[1])
k2.checkpoint.keep_freed_memory = lambda: None  # what malloc keeps for the next allocation is not what an action holds

def resident(field):
    return int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0]) * 1024

def growth(action):  # bytes of memory at the worst moment of an action, above what was there before
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    kept = action()
    return resident("VmHWM") - before

def private_growth(action):  # without the pages of maps, which belong to the file and of which the kernel may bring many at once
    before = resident("RssAnon")
    kept = action()
    return resident("RssAnon") - before

k2.save(random_model(small_config()), folder / "warm", format="fp8")  # the first use of the meta device imports 50 MB of torch
k2.load(folder / "warm")
model = random_model(small_config(hidden_size=256, moe_intermediate_size=256, num_hidden_layers=8, n_routed_experts=16))
figures = {"model": sum(p.numel() for p in model.parameters()) * 4}
figures["save"] = growth(lambda: k2.save(model, folder / "big", format="fp8"))
figures["float32"] = growth(lambda: k2.load(folder / "big", dtype=torch.float32))
figures["at rest"] = private_growth(lambda: k2.load(folder / "big", dtype=None))

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write past the limit then fails like one on a full disk
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    k2.save(model, folder / "full", format="fp8")
except k2.K2Error as error:
    figures["full disk"] = str(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
figures["after full disk"] = sorted(os.listdir(folder))
print(json.dumps(figures), flush=True)
os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
k2.save(model, folder / "killed", format="fp8")
"""


@pytest.fixture(scope="module")
def child(tmp_path_factory):
    """The figures that CHILD printed, its exit status and its folder. The threshold makes malloc give freed matrices back."""
    folder, here = tmp_path_factory.mktemp("child"), Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return json.loads(done.stdout), done.returncode, folder


def test_a_save_holds_a_shard_and_never_a_second_model(child):
    figures, _, _ = child
    assert figures["save"] < figures["model"] / 2, figures


def test_a_load_makes_one_float_copy_and_no_second(child):
    figures, _, _ = child
    # the model itself, and a quarter of it for the pages of the FP8 map that were read on the way
    assert figures["float32"] < 1.5 * figures["model"], figures


def test_a_load_at_rest_leaves_the_experts_in_the_map(child):
    figures, _, folder = child
    on_disk = sum(path.stat().st_size for path in (folder / "big").glob("*.safetensors"))
    assert figures["at rest"] < on_disk / 10, (figures, on_disk)


def test_a_save_past_the_file_size_limit_is_one_line_and_leaves_nothing(child):
    figures, _, folder = child
    assert str(folder / "full") in figures["full disk"] and "File too large" in figures["full disk"] and "\n" not in figures["full disk"]
    assert figures["after full disk"] == ["big", "warm"]


def test_a_killed_save_puts_nothing_in_the_targets_place_and_the_next_save_works(child):
    _, status, folder = child
    assert status == -9 and not (folder / "killed").exists()
    k2.save(MODEL, folder / "killed", format="fp32")
    same_weights(k2.load(folder / "killed"), MODEL)
