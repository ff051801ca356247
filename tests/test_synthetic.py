"""A synthetic checkpoint is a checkpoint: it opens, its sizes are the presets', its experts lie as in released files."""

import pytest
import torch
from small import small_config

import k2
from k2 import K2Error, synthetic
from k2.checkpoint import Checkpoint, expected_tensors
from k2.config import K2Config
from k2.reading import data_start, expert_record

CONFIG = small_config(hidden_size=128, moe_intermediate_size=64)


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_it_loads_and_computes_finite_numbers_of_ordinary_size(format, tmp_path):
    synthetic.write(CONFIG, format, tmp_path / "model")
    logits = k2.load(tmp_path / "model", dtype=torch.float32)(torch.arange(20))
    assert logits.isfinite().all() and 0.3 < float(logits.std()) < 3, f"spread {float(logits.std()):.2f}"


def test_one_seed_gives_one_file(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write(CONFIG, "fp8", tmp_path / name, seed)
    first, again, other = ((tmp_path / name / "model-2-of-3.safetensors").read_bytes() for name in "abc")
    assert first == again != other


def test_an_fp8_experts_matrices_are_neighbours_as_in_released_files(tmp_path):
    synthetic.write(CONFIG, "fp8", tmp_path / "model")
    opened = Checkpoint(tmp_path / "model")
    record = expert_record(opened, {file: data_start(opened.directory / file) for file in opened.headers}, (1, 3))
    assert len(record.spans) == 1 and record.size <= 3 * 128 * 64 + 2 * 4096


def test_the_presets_have_the_sizes_that_they_say():
    instruct = K2Config.from_json("k2/configs/kimi-k2-instruct.json")
    counts = {name: sum(torch.Size(spec.shape).numel() for spec in expected_tensors(synthetic.preset(name, instruct)).values() if spec.dtypes[0] != "F32") for name in synthetic.WIDTHS}
    assert 2.1e9 < counts["mid"] < 2.3e9 and 6.2e9 < counts["big"] < 6.4e9
    assert synthetic.preset("slice", instruct, 5).num_hidden_layers == 5 and synthetic.preset("slice", instruct).moe_intermediate_size == 2048


def test_a_folder_with_content_a_full_disk_and_an_unknown_preset_are_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(K2Error, match="expected a new or empty folder"):
        synthetic.write(CONFIG, "fp8", tmp_path)
    monkeypatch.setattr(synthetic, "size_of", lambda spec: 10**15)
    with pytest.raises(K2Error, match="bytes are needed; found"):
        synthetic.write(CONFIG, "fp8", tmp_path / "new")
    with pytest.raises(K2Error, match="expected one of mid, big, slice"):
        synthetic.preset("huge", CONFIG)
