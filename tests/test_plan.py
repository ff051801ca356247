"""The planner's formula on numbers that can be checked by hand, and its words. What it measures, test_machine looks at."""

import json
import re
from pathlib import Path

import pytest
import torch
from small import random_model, small_config

import k2
from k2 import machine, plan
from k2.__main__ import main
from k2.machine import Machine, Speeds
from k2.needs import FAMILY, family_config, needs
from k2.plan import Plan, best, next_command, seconds_per_token, shares

INSTRUCT, THINKING = needs(family_config("instruct"), "fp8"), needs(family_config("thinking"), "int4")
KINDS = ("attention", "norm", "dense", "router", "shared-expert", "expert", "head")
DESKTOP = Machine(ram=128 * 10**9, gpu_memory=0, disk=2 * 10**12, ram_bandwidth=50e9, disk_bandwidth=7e9)
WITH_GPU = Machine(ram=115 * 10**9, gpu_memory=int(24e9), disk=2 * 10**12, ram_bandwidth=50e9, disk_bandwidth=7e9, bus_bandwidth=25e9, gpu_bandwidth=1e12)


def speeds(rate=10e9, layer=1e-3) -> Speeds:
    return Speeds(dict.fromkeys(KINDS, rate), layer)


def close(found, expected):
    return found == pytest.approx(expected, rel=1e-12)


# ---- the formula ----


def test_experts_on_disk_cost_what_the_missing_share_weighs():
    found = seconds_per_token(INSTRUCT, DESKTOP, speeds())
    rest, everything = sum(INSTRUCT.rest.values()), 23_040 * 44_050_944
    share = (128e9 - rest) / everything
    assert (found.gpu_share, found.bus) == (0, 0) and close(found.ram_share, share)
    assert close(found.rest, rest / 10e9) and close(found.routed, INSTRUCT.routed / 10e9)
    assert close(found.disk, (1 - share) * INSTRUCT.routed / 7e9) and close(found.fixed, 0.061)
    assert close(found.last, found.routed / 8) and close(found.planned, found.rest + found.disk + found.last + found.fixed)
    assert close(found.limit, found.disk)


def test_what_all_fits_into_ram_waits_for_no_disk():
    roomy = Machine(**{**vars(DESKTOP), "ram": 10**13})
    found = seconds_per_token(THINKING, roomy, speeds())
    assert found.ram_share == 1 and found.disk == found.last == 0 and close(found.planned, found.rest + found.routed + found.fixed)
    assert close(found.limit, (sum(THINKING.rest.values()) + THINKING.routed) / 50e9)


def test_with_a_gpu_the_rest_lies_there_and_experts_cross_the_bus():
    found = seconds_per_token(INSTRUCT, WITH_GPU, speeds())
    everything, rest = 23_040 * 44_050_944, sum(INSTRUCT.rest.values())
    assert close(found.gpu_share, (24e9 - rest) / everything) and close(found.ram_share, 115e9 / everything)
    assert close(found.bus, (1 - found.gpu_share) * INSTRUCT.routed / 25e9)
    assert close(found.disk, (1 - found.gpu_share - found.ram_share) * INSTRUCT.routed / 7e9)
    away = (1 - found.gpu_share) * INSTRUCT.routed
    assert close(found.limit, max(away / 50e9, found.disk)) and found.planned > found.limit
    quick_disk = Machine(**{**vars(WITH_GPU), "disk_bandwidth": 1e12})
    assert close(seconds_per_token(INSTRUCT, quick_disk, None).limit, away / 50e9), "RAM of 50 GB/s feeds its CPU faster than the bus of 25"
    assert close(seconds_per_token(INSTRUCT, Machine(**{**vars(quick_disk), "bus_bandwidth": 60e9}), None).limit, away / 60e9)


def test_a_known_share_of_hits_takes_the_place_of_even_routing():
    found = seconds_per_token(INSTRUCT, DESKTOP, speeds(), hits=0.6)
    assert close(found.disk, 0.4 * INSTRUCT.routed / 7e9)
    assert seconds_per_token(INSTRUCT, DESKTOP, speeds(), hits=1.0).disk == 0
    assert close(seconds_per_token(INSTRUCT, WITH_GPU, speeds(), hits=0.0).bus, INSTRUCT.routed / 25e9)


def test_no_product_is_faster_than_the_memory_it_reads():
    fast, exact = (seconds_per_token(INSTRUCT, DESKTOP, given) for given in (speeds(1e15, 0.0), None))
    assert fast == exact and close(exact.rest, sum(INSTRUCT.rest.values()) / 50e9)


def test_each_kind_of_tensor_is_read_at_its_own_rate():
    given = speeds()
    given.rates["head"] = 5e9
    assert close(seconds_per_token(INSTRUCT, DESKTOP, given).rest - seconds_per_token(INSTRUCT, DESKTOP, speeds()).rest, INSTRUCT.rest["head"] / 10e9)


def test_context_takes_room_and_is_read():
    without, full = (seconds_per_token(INSTRUCT, DESKTOP, None, context) for context in (0, 131_072))
    assert close(full.rest - without.rest, 70_272 * 131_072 / 50e9)
    assert close((without.ram_share - full.ram_share) * 23_040 * 44_050_944, 70_272 * 131_072)


def test_what_every_token_reads_must_fit():
    small = Machine(**{**vars(DESKTOP), "ram": sum(INSTRUCT.rest.values()) + INSTRUCT.expert})
    assert shares(INSTRUCT, small, 0)[1] > 0
    with pytest.raises(k2.K2Error, match="memory: .* bytes are free for what every token reads; expected .* 70,272 of cache"):
        shares(INSTRUCT, small, 1)


def test_the_limits_of_performance_notes_come_out():
    # 4090 with 24 GB and 128 GB of RAM, a Gen4 disk: 0.38 tokens/s in FP8, 0.75 in INT4, published in two digits and with 9 GB left for experts.
    card = Machine(ram=115 * 10**9, gpu_memory=0, disk=2**41, ram_bandwidth=1e15, disk_bandwidth=7e9)
    for found, expected in ((INSTRUCT, 0.38), (THINKING, 0.75)):
        roomy = Machine(**{**vars(card), "ram": 124 * 10**9 + sum(found.rest.values())})
        assert round(1 / seconds_per_token(found, roomy, None).limit, 2) == pytest.approx(expected, abs=0.015)


# ---- which member, and what to type ----


def planned(name, rate, obstacle="", fits=True) -> Plan:
    config = family_config(name)
    seconds = seconds_per_token(needs(config, "bf16"), Machine(**{**vars(DESKTOP), "ram": 10**14}), Speeds(dict.fromkeys(KINDS, 1e15), 0.0))
    seconds = type(seconds)(1.0, 0.0, 1 / rate, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0) if fits else None
    return Plan(name, config, needs(config, "bf16"), seconds, obstacle, None)


def test_the_largest_that_fits_and_runs_well_is_named():
    mini, moonlight = planned("mini", 100), planned("moonlight", 5)
    assert best([planned("instruct", 0.1), moonlight, mini]).name == "moonlight"
    assert best([planned("instruct", 2), moonlight, mini]).name == "instruct"
    assert best([planned("instruct", 2, "disk: too small"), planned("moonlight", 0.2), mini]).name == "mini"
    assert best([planned("instruct", 1, "memory", fits=False), planned("moonlight", 0.9), planned("mini", 0.5)]).name == "mini"


def test_the_next_command_downloads_runs_or_takes_one_block():
    assert next_command(planned("mini", 1)) == 'python -m k2 generate "def "'
    assert next_command(planned("moonlight", 1)) == "python download_weights.py moonshotai/Moonlight-16B-A3B-Instruct --local-dir weights/moonlight"
    assert next_command(planned("instruct", 1, "disk")).endswith("moonshotai/Kimi-K2-Instruct --local-dir weights/instruct --layers 1 --part attention")


# ---- the command ----

FLAGS = ["--ram", "128GB", "--gpu-memory", "0", "--disk", "2TB", "--ram-bandwidth", "50GB", "--disk-bandwidth", "7GB"]


@pytest.fixture
def fixed_speeds(monkeypatch):
    """Nothing is measured: every product takes 10 GB/s, every layer 1 ms. Yields what was asked for."""
    asked = []
    monkeypatch.setattr(plan, "measured_speeds", lambda config, format, rest, resident, device: asked.append((format, resident, device.type)) or speeds())
    for name in ("ram_bandwidth", "disk_bandwidth", "bus_bandwidth", "device_bandwidth"):
        monkeypatch.setattr(machine.ceilings, name, None)
    return asked


def before_next(out: str) -> str:
    """The last line before the next command."""
    assert out.splitlines()[-2] == "next:"
    return out.splitlines()[-3]


def run(capfd, *arguments) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    return status, *capfd.readouterr()


def test_one_model_is_the_formula_with_its_numbers(capfd, fixed_speeds):
    status, out, err = run(capfd, "instruct", *FLAGS)
    assert status == 0 and err == "" and fixed_speeds == [("fp8", False, "cpu")]
    for words in ("1,026.408 billion in all", "32.862 billion active", "70,272 bytes a token of context", "139,644 and 1,029,173,256,720", "23,040 of 44.05 MB", "88.6% stay on disk",
                  "fp8 (released)      1,029.17", "int4                  594.21", "11.89 GB at 50.00 GB/s", "21.14 GB at 50.00 GB/s", "rest and routed at the bandwidth given by a flag", "at 7.00 GB/s", "61 layers x 1.00 ms"):  # fmt: skip
        assert words in out, (words, out)
    found = seconds_per_token(INSTRUCT, DESKTOP, speeds(1e15))
    assert f"planned: {found.planned:.4g} s a token, {1 / found.planned:.4g} tokens/s" in out and f"{1 / found.limit:.4g} tokens/s\n" in out
    line = next(line for line in out.splitlines() if line.startswith("prompt: "))
    size, seconds = re.fullmatch(r"prompt: nearly all experts on the disk are read for each 1,536 tokens: (\S+) GB, at least (\S+) s", line).groups()
    assert float(size) == pytest.approx((1 - found.ram_share) * 23_040 * 44_054_016 / 1e9, rel=2e-3) and float(seconds) == pytest.approx(float(size) / 7, rel=1e-2)
    assert out.splitlines()[-1] == "    python download_weights.py moonshotai/Kimi-K2-Instruct --local-dir weights/instruct"


def test_of_a_prompt_nothing_is_said_where_no_expert_stays_on_the_disk(capfd, fixed_speeds):
    _, out, _ = run(capfd, "mini", *FLAGS)
    assert "planned: " in out and "prompt: " not in out


def test_a_rate_measured_here_says_so(capfd, fixed_speeds, monkeypatch):
    monkeypatch.setattr(machine.ceilings, "ram_bandwidth", lambda: 50e9)
    _, out, _ = run(capfd, "instruct", *FLAGS[:6], *FLAGS[8:])
    assert "11.89 GB at 10.00 GB/s" in out and "rest and routed at what the products take a second, measured on this machine" in out


def test_the_cache_is_in_the_formula_and_nothing_small_prints_as_nothing(capfd, fixed_speeds):
    _, out, _ = run(capfd, "mini", *FLAGS, "--context", "100")
    assert "of it cache " in out and " 0.00 " not in "".join(line.split(" = ")[0] for line in out.splitlines() if line.startswith(("  rest", "  routed", "cache:")))


def test_a_machine_for_no_member_says_so_and_names_one_block(capfd, fixed_speeds):
    status, out, _ = run(capfd, "--ram", "1MB", *FLAGS[2:])
    assert status == 0 and "no model of the family fits this machine" in out and "runs" not in out.splitlines()[-2]
    assert out.splitlines()[-1] == "    python download_weights.py moonshotai/Kimi-K2-Instruct --local-dir weights/instruct --layers 1 --part attention"


@pytest.mark.parametrize("flag", ["--ram-bandwidth", "--disk-bandwidth", "--bus-bandwidth", "--gpu-bandwidth"])
def test_a_bandwidth_of_nothing_is_one_line(capfd, fixed_speeds, flag):
    status, out, err = run(capfd, "mini", *FLAGS, flag, "0")
    assert status == 2 and f"{flag}: found 0; expected bytes a second" in err and len(err.splitlines()) == 1


def test_the_family_is_a_table_and_the_next_command(capfd, fixed_speeds):
    status, out, _ = run(capfd, *FLAGS)
    rows = {line.split()[0]: line for line in out.splitlines()}
    assert status == 0 and set(FAMILY) < set(rows) and len(fixed_speeds) == 4, "twins are measured once"
    assert "1,026B" in rows["instruct"] and "32.9B" in rows["instruct"] and "594.21" in rows["thinking"]
    assert "this machine runs moonlight well" in out and out.splitlines()[-1] == "    python download_weights.py moonshotai/Moonlight-16B-A3B-Instruct --local-dir weights/moonlight"


def test_json_has_the_same_numbers(capfd, fixed_speeds):
    status, out, _ = run(capfd, "thinking", *FLAGS, "--json")
    found = json.loads(out)["models"]["thinking"]
    assert status == 0 and found["needs"]["disk"] == 594_205_904_896 and found["needs"]["routed"] == 11_890_863_360
    assert found["seconds"]["planned"] == seconds_per_token(THINKING, DESKTOP, speeds(1e15)).planned and found["formats"]["bf16"]["disk"] == 2_052_816_510_976


def test_a_disk_too_small_and_a_memory_too_small_are_said_and_not_hidden(capfd, fixed_speeds):
    _, out, _ = run(capfd, "instruct", *FLAGS[:4], "--disk", "1TB", *FLAGS[6:])
    assert before_next(out) == "but: disk: 1,000,000,000,000 bytes are free; expected 1,029,173,249,888"
    _, out, _ = run(capfd, "instruct", "--ram", "8GB", *FLAGS[2:])
    assert before_next(out).startswith("does not fit: memory: 8,000,000,000 bytes are free for what every token reads; expected 11,934,")


def test_a_machine_with_a_gpu_shows_its_bus(capfd, fixed_speeds):
    _, out, _ = run(capfd, "instruct", "--ram", "115GB", "--gpu-memory", "24GB", "--bus-bandwidth", "25GB", "--gpu-bandwidth", "1TB", *FLAGS[4:])
    assert "GPU 24.0 GB at 1,000.0 GB/s, behind a bus of 25.0 GB/s" in out and "at 25.00 GB/s" in out


@pytest.mark.parametrize("ram", [[], ["--ram", "300KB"]])
def test_a_checkpoint_is_decoded_and_measured_stands_beside_planned(capfd, fixed_speeds, tmp_path, ram):
    k2.save(random_model(small_config(torch_dtype="bfloat16")), tmp_path / "c", format="fp32")
    flags = FLAGS if not ram else [*ram, *FLAGS[2:]]
    status, out, _ = run(capfd, str(tmp_path / "c"), *flags[(0 if ram else 2) :], *([] if ram else ["--ram", "1GB"]), "--decode", "3")
    found = re.fullmatch(r"measured: (\S+) s a token, \S+ tokens/s; planned over measured, of 3 rounds: ([+-]\d+)% \(([+-]\d+)% to ([+-]\d+)%\)", before_next(out))
    planned = float(re.search(r"planned: (\S+) s a token", out)[1])
    middle, low, high = map(float, found.groups()[1:])
    assert status == 0 and low <= middle <= high
    assert abs(100 * (planned / float(found[1]) - 1) - middle) < 1, "the speeds of a plan are fixed in this test, so the medians belong together"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["instruct", "--decode", "3"], "--decode: found 3 for instruct; expected a number of tokens and a checkpoint's folder"),
        (["nobody"], "nobody: expected one of instruct"),
        (["instruct", "--ram", "much"], "'much'"),
        (["instruct", "--context", "-1"], "--context, --hits: found -1"),
        (["instruct", "--hits", "1.5"], "1.5; expected tokens from 0 and a share from 0 to 1"),
        (["instruct", "--gpu-memory", "24GB", *FLAGS[:2], *FLAGS[4:]], "--gpu-memory: found without a bandwidth"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capfd, fixed_speeds, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capfd, *arguments)
    assert status == 2 and out == "" and words in err and len(err.splitlines()) == 1


def test_a_path_is_planned_as_a_name_is(capfd, fixed_speeds, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config(torch_dtype="bfloat16").to_dict()))
    status, out, _ = run(capfd, str(tmp_path), *FLAGS)
    assert status == 0 and "bf16 (released)" in out and fixed_speeds == [("fp32", True, "cpu")]


def test_memory_is_planned_as_it_is_taken(monkeypatch):
    from k2 import machine, offload

    monkeypatch.setattr(machine, "free_memory", lambda: 10**9)
    found = machine.this_machine(Path("."), {"ram": None, "gpu_memory": 0, "disk": 1, "ram_bandwidth": 1.0, "disk_bandwidth": 1.0, "bus_bandwidth": None, "gpu_bandwidth": None})
    assert found.ram == int(10**9 * offload.TAKEN) and offload.TAKEN < 1


def test_a_gpu_without_room_leaves_the_cpu(capfd, fixed_speeds):
    card = ["--gpu-memory", "8GB", "--bus-bandwidth", "25GB", "--gpu-bandwidth", "1TB"]
    status, out, _ = run(capfd, "instruct", "--ram", "2TB", *card, *FLAGS[4:])
    assert status == 0 and "planned for the CPU alone, --device cpu" in out and "does not fit" not in out
    _, alone, _ = run(capfd, "instruct", "--ram", "2TB", *FLAGS[2:])
    assert before_next(out).split(";")[0].split(",")[0].split()[1] == before_next(alone).split(";")[0].split(",")[0].split()[1]
    assert next_command(plan.plan("mini", family_config("mini"), Machine(**{**vars(DESKTOP), "gpu_memory": 1, "bus_bandwidth": 1.0, "gpu_bandwidth": 1.0}), measure=False)).endswith("--device cpu")


def test_weights_that_are_there_need_no_more_disk_and_a_config_alone_cannot_generate(tmp_path):
    full = Machine(**{**vars(DESKTOP), "disk": 1})
    k2.save(random_model(small_config(torch_dtype="bfloat16")), tmp_path / "c", format="fp32")
    assert plan.plan("mini", family_config("mini"), full, measure=False).obstacle == ""
    whole = plan.plan(str(tmp_path / "c"), family_config(str(tmp_path / "c")), full, measure=False)
    assert whole.obstacle == "" and next_command(whole) == f'python -m k2 generate "def " --model {tmp_path / "c"}'
    by_file = plan.plan(str(tmp_path / "c" / "config.json"), whole.config, DESKTOP, measure=False)
    assert next_command(by_file) == f'python -m k2 generate "def " --model {tmp_path / "c"}'
    for shard in (tmp_path / "c").glob("*.safetensors"):
        shard.unlink()
    assert plan.plan(str(tmp_path / "c"), whole.config, full, measure=False).obstacle.startswith("disk: 1 bytes are free")
    assert next_command(plan.plan(str(tmp_path / "c"), whole.config, DESKTOP, measure=False)) == f"python -m k2 inspect {tmp_path / 'c'}"


def test_a_context_longer_than_the_models_is_an_obstacle_and_the_cache_counts_in_the_family(capfd, fixed_speeds):
    _, out, _ = run(capfd, "instruct", "--context", "10000000", "--ram", "10TB", *FLAGS[2:])
    assert before_next(out) == "but: context: 10,000,000 tokens; expected at most 131,072"
    _, plain, _ = run(capfd, *FLAGS)
    _, longer, _ = run(capfd, "--context", "131072", *FLAGS)
    least = [next(float(line.split()[5]) for line in text.splitlines() if line.startswith("instruct ")) for text in (plain, longer)]
    assert least[1] - least[0] == pytest.approx(131072 * INSTRUCT.cache_per_token / 1e9, abs=0.02)


def test_a_model_without_experts_is_not_planned_and_not_said_to_be_too_large(capfd, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(small_config(torch_dtype="bfloat16", first_k_dense_replace=2, num_hidden_layers=2).to_dict()))
    status, out, _ = run(capfd, str(tmp_path), *FLAGS)
    assert status == 0 and "not planned: plan: expected a model with experts" in out and "does not fit" not in out


def test_without_room_on_the_gpu_its_bandwidth_says_nothing_of_the_cpus_products(capfd, fixed_speeds, monkeypatch):
    monkeypatch.setattr(machine.ceilings, "ram_bandwidth", lambda: 50e9)
    card = ["--gpu-memory", "8GB", "--bus-bandwidth", "25GB", "--gpu-bandwidth", "1TB", "--disk", "2TB", "--disk-bandwidth", "7GB"]
    _, out, _ = run(capfd, "instruct", "--ram", "2TB", *card)
    assert "at what the products take a second, measured on this machine" in out
    _, out, _ = run(capfd, "instruct", "--ram", "2TB", *card, "--json")
    assert json.loads(out)["models"]["instruct"]["device"] == "cpu"
