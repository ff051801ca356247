"""python -m k2 inspect: what is listed is what the shards hold, and what differs from the config ends it with status 2."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from small import random_model, small_config

import k2
from k2 import inspection
from k2.__main__ import MINI, main
from k2.part import RECORD, Part
from k2.quantization import int4_unpack


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint in FP8 and in INT4, each in three shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = random_model(small_config(hidden_size=160, moe_intermediate_size=32, n_routed_experts=5, num_experts_per_tok=2))
    for name in ("fp8", "int4"):
        k2.save(model, folder / name, format=name)
    return folder.joinpath


def inspect(capfd, *arguments) -> tuple[int, str, str]:
    status = main(["inspect", *map(str, arguments)])
    return status, *capfd.readouterr()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items()}


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_json_lists_every_tensor_as_the_shards_hold_it(saved, capfd, format):
    status, out, _ = inspect(capfd, saved(format), "--json")
    listed, held = json.loads(out), stored(saved(format))
    assert status == 0 and listed["count"] == len(held) and listed["shards"] == 3
    assert listed["bytes"] == sum(t.numel() * t.element_size() for t in held.values())
    assert {name: t["shape"] for name, t in listed["tensors"].items()} == {name: list(t.shape) for name, t in held.items()}


def test_the_table_of_kinds_adds_up(capfd):
    status, out, _ = inspect(capfd, MINI)
    lines = [line.split() for line in out.splitlines()]
    counts, sizes = ([int(line[i].replace(",", "")) for line in lines[1:-2]] for i in (1, 2))
    assert status == 0 and lines[-2][0] == "all" and (sum(counts), sum(sizes)) == tuple(int(text.replace(",", "")) for text in lines[-2][1:3]) == (953, 16_214_328)
    assert out.splitlines()[-1] == "as config.json implies: 953 tensors by name, dtype and shape"


def test_a_pattern_picks_by_name(saved, capfd):
    status, out, _ = inspect(capfd, saved("fp8"), "*.layers.2.mlp.experts.?.up_proj.weight", "lm_head.*")
    names = [line.split()[0] for line in out.splitlines()]
    assert status == 0 and sorted(names) == sorted([f"model.layers.2.mlp.experts.{e}.up_proj.weight" for e in range(5)] + ["lm_head.weight"])
    assert "F8_E4M3  [32, 160]                  5,120 bytes  model-3-of-3.safetensors" in out


def test_statistics_are_those_of_the_stored_numbers(saved, capfd):
    name = "model.layers.1.mlp.gate.weight"
    status, out, _ = inspect(capfd, saved("fp8"), name, "--statistics")
    values = stored(saved("fp8"))[name].double()
    expected = f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.3g}, deviation {values.std(correction=0):.4g}, zero 0.00%, not finite 0"
    assert status == 0 and out.splitlines()[1].strip() == expected


@pytest.mark.parametrize("flag", ["--statistics", "--json"])
def test_a_flag_may_stand_before_the_patterns_or_behind(saved, capfd, flag):
    behind = inspect(capfd, saved("fp8"), "lm_head.*", "*.gate.weight", flag)
    assert behind[0] == 0
    assert behind == inspect(capfd, saved("fp8"), flag, "lm_head.*", "*.gate.weight") == inspect(capfd, flag, saved("fp8"), "lm_head.*", "*.gate.weight") == inspect(capfd, saved("fp8"), "lm_head.*", flag, "*.gate.weight")


def test_a_flag_that_is_none_is_refused_still(saved, capfd):
    for arguments in ((saved("fp8"), "--statistic-s", "lm_head.*"), (saved("fp8"), "--json", "--nothing")):
        status, out, err = inspect(capfd, *arguments)
        assert status == 2 and "unrecognized arguments: --" in err


def test_the_shipped_member_of_the_family_is_inspected_by_its_name(capfd):
    assert inspect(capfd, "mini") == inspect(capfd, MINI)
    assert inspect(capfd, "mini", "--statistics", "lm_head.*")[0] == 0


def test_statistics_of_packed_words_are_of_their_integers(saved):
    checkpoint = k2.Checkpoint(saved("int4"))
    row = next(row for row in inspection.rows(checkpoint, ["*.experts.0.up_proj.weight_packed"]))
    values = int4_unpack(checkpoint.tensor(row.name)).double()
    assert inspection.statistics(checkpoint, row).startswith(f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.3g}")


def test_statistics_go_through_a_tensor_in_pieces_and_count_what_is_no_number(saved, tmp_path, monkeypatch):
    shutil.copytree(saved("fp8"), tmp_path / "c")
    held = safetensors.torch.load_file(tmp_path / "c" / "model-3-of-3.safetensors")
    held["lm_head.weight"].view(-1)[::40] = torch.nan
    safetensors.torch.save_file(held, tmp_path / "c" / "model-3-of-3.safetensors")
    checkpoint = k2.Checkpoint(tmp_path / "c")
    row = inspection.rows(checkpoint, ["lm_head.weight"])[0]
    at_once = inspection.statistics(checkpoint, row)
    monkeypatch.setattr(inspection, "CHUNK", 1000)
    assert inspection.statistics(checkpoint, row) == at_once and at_once.endswith(f"not finite {97 * 160 // 40}")


def test_an_empty_and_a_lost_tensor_have_statistics_too(saved, monkeypatch):
    checkpoint = k2.Checkpoint(saved("fp8"))
    row = inspection.rows(checkpoint, ["lm_head.weight"])[0]
    for values, words in ((torch.zeros(0), "no numbers"), (torch.full((3,), torch.nan), "3 numbers, none of them finite")):
        monkeypatch.setattr(checkpoint, "stored", lambda name, values=values: values)
        assert inspection.statistics(checkpoint, row) == words


def test_a_config_of_another_model_is_found_by_names_and_shapes(saved, tmp_path, capfd):
    shutil.copytree(saved("fp8"), tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"n_routed_experts": 6, "kv_lora_rank": 24}))
    status, out, err = inspect(capfd, tmp_path / "c")
    assert status == 2 and out == "" and "expected" in err and "more. Expected what config.json implies" in err


def test_a_part_says_that_it_is_one(saved, tmp_path, capfd):
    part, held = Part((1,), None, ("attention",)), stored(saved("fp8"))
    kept = {name: t for name, t in held.items() if part.takes(name)}
    safetensors.torch.save_file(kept, tmp_path / "model.safetensors")
    shutil.copy(saved("fp8") / "config.json", tmp_path)
    assert inspect(capfd, tmp_path)[0] == 2
    (tmp_path / RECORD).write_text(json.dumps({"part": part.to_dict()}))
    status, out, _ = inspect(capfd, tmp_path)
    assert status == 0 and out.splitlines()[-1] == f"as config.json implies: {len(kept)} tensors by name, dtype and shape, which is a part of {len(held)}"


@pytest.mark.parametrize("arguments, words", [(["nowhere"], "nowhere: expected a checkpoint directory or a repository"), ([MINI, "nothing.*"], "found none that match"), ([MINI / "config.json"], "found a file")])
def test_what_is_not_there_is_one_line(capfd, arguments, words):
    status, out, err = inspect(capfd, *arguments)
    assert status == 2 and out == "" and words in err and len(err.splitlines()) == 1
