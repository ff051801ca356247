"""The table of budgets: what is printed is what was measured, beside ceilings of the same run."""

import json

import pytest
from small import random_model, small_config

import k2
from k2 import K2Error, bench
from k2.__main__ import MINI, main
from k2.checkpoint import save

SETTINGS = {"device": "cpu", "dtype": "stored", "gpu_memory": None, "prompt": 20, "new": 3, "compiled": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A small FP8 checkpoint."""
    directory = tmp_path_factory.mktemp("bench") / "model"
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), directory, format="fp8", shards=2)
    return directory


def test_a_measurement_counts_what_moved(directory, monkeypatch):
    free = bench.alone(directory, {**SETTINGS, "ram": None})
    assert free["hits"] == 1.0 and free["disk_per_token"] == 0 and free["slots"] == 0
    looks = iter([2.0, 3.0])
    monkeypatch.setattr(bench, "disk_busy", lambda path: next(looks))
    tight = bench.alone(directory, {**SETTINGS, "ram": 200_000})
    assert 0 < tight["slots"] < 22 and tight["hits"] < 1 and tight["disk_per_token"] > 0
    assert tight["busy"] == pytest.approx(tight["decode"] / SETTINGS["new"]), "one second, as a share of all"
    assert tight["last_id"] == free["last_id"], "another budget, another token"
    assert all(found[key] > 0 for found in (free, tight) for key in ("load", "first", "prefill", "decode", "compute", "peak", "active_bytes"))


def test_active_bytes_are_all_but_the_experts_that_are_not_asked(directory):
    from k2.checkpoint import Checkpoint
    from k2.offload import weight_bytes

    routed, rest = weight_bytes(Checkpoint(directory), None)
    assert bench.active_bytes(directory, SETTINGS) == pytest.approx(rest + routed * 4 / 11)


def test_shares_are_of_the_ceilings_of_the_run(monkeypatch, directory, capsys):
    run = {"ram": 2_000_000_000, "load": 1.0, "first": 2.0, "prefill": 100.0, "prefill_disk_rate": 0.5e9, "decode": 4.0, "hits": 0.25, "disk_per_token": 0.2, "busy": 0.9, "wait": 0.1,
           "compute": 0.15, "active_bytes": 2.5e9, "peak": 1000.0}  # fmt: skip
    monkeypatch.setattr(bench, "run_child", lambda *_: dict(run))
    rates = iter([{"ram": 10e9, "disk": 2e9}, {"ram": 20e9, "disk": 1e9}, {"ram": 5e9, "disk": 1e9}])
    monkeypatch.setattr(bench, "measured_ceilings", lambda *_: next(rates))
    assert main(["bench", str(directory), "--ram", "2GB", "--rounds", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ceilings"] == {"ram": [5e9, 10e9, 20e9], "disk": [1e9, 1e9, 2e9]}
    [row] = found["runs"]
    assert row["disk_share_range"] == pytest.approx([0.4, 0.8]), "each run beside the better of the ceilings before and after it"
    assert (row["ram_share"], row["disk_share"], row["prefill_disk_share"]) == (pytest.approx(0.5), pytest.approx(0.6), pytest.approx(0.375))
    assert "2 GB" in bench.table(found) and "60%" in bench.table(found) and "90%" in bench.table(found) and "disk 1.0 to 2.0 GB/s" in bench.table(found)


def test_a_child_that_fails_is_quoted(tmp_path):
    with pytest.raises(K2Error, match="bench: .*expected a checkpoint directory"):
        bench.run_child(tmp_path / "nothing", {**SETTINGS, "ram": None})


@pytest.mark.parametrize("ram", [[], ["--ram", "200KB"]])
def test_a_profile_shows_where_a_tokens_time_goes(directory, capfd, ram):
    asked = ["bench", str(directory), "--profile", "--dtype", "stored", "--prompt", "20", "--new", "3", *ram]
    assert main([*asked, "--json"]) == 0
    said, errors = capfd.readouterr()
    found = json.loads(said)
    assert errors == "", "torch's profiler speaks"
    calls = {row["name"]: row["calls"] for row in found["rows"]}
    assert calls["mm"] > 3 * 10 and calls["topk"] >= 2 and calls["silu"] == 1 + 2 * (1 + 4), "one dense layer, two of a shared and four chosen experts"
    assert 0 < found["operations"] + found["waited"] < found["seconds"] and (found["waited"] > 0) == bool(ram)
    assert found["rows"] == sorted(found["rows"], key=lambda row: -row["seconds"])
    assert main(asked) == 0
    said = capfd.readouterr().out
    assert said.startswith("a decoded token: ") and "waiting for the disk" in said and len(said.splitlines()) == 2 + 12


@pytest.mark.parametrize("asked", [[], ["DIR", "--ram", "1GB", "2GB"]])
def test_a_profile_is_of_one_checkpoint_at_one_budget(directory, capsys, asked):
    assert main(["bench", "--profile", *[str(directory) if word == "DIR" else word for word in asked]]) == 2
    assert "expected one checkpoint and one size at most" in capsys.readouterr().err
    assert main(["bench", str(directory), "--profile", "--device", "cuda"]) == 2
    assert "--device cuda; expected cpu" in capsys.readouterr().err


def test_numbers_below_one_and_unknown_presets_are_refused(directory, tmp_path, capsys):
    assert main(["bench", str(directory), "--new", "0"]) == 2
    assert main(["bench", str(tmp_path / "new"), "--write", "huge"]) == 2
    assert "expected one of mid, big, slice" in capsys.readouterr().err
    assert main(["bench", str(tmp_path / "new"), "--write", "mid", "--layers", "0"]) == 2 and not (tmp_path / "new").exists()
    assert main(["bench", str(directory), "--context", "-1"]) == 2
    capsys.readouterr()
    assert main(["bench", str(tmp_path / "nothing")]) == 2
    assert "nothing: expected a checkpoint directory, found nothing" in capsys.readouterr().err


def test_a_small_checkpoint_is_measured_too(capsys):
    assert main(["bench", str(MINI), "--ram", "20MB", "--rounds", "1", "--new", "1", "--prompt", "8"]) == 0
    assert "ceilings measured" in capsys.readouterr().out


def test_the_cost_of_a_long_context_is_measured_behind_so_many_tokens(directory, capsys):
    assert main(["bench", str(directory), "--context", "600", "40", "--dtype", "stored"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [int(row.split()[0]) for row in rows[1:]] == [40, 600], "in order, past the model's own window of 512 too"
    model = k2.load(directory, dtype=None)
    cache = bench.filled_cache(model, 40)
    assert cache.length == 40 and bench.trimmed(cache, 12).length == 12
