"""What a machine reaches: what is given is not measured, what is measured runs the project's own modules."""

import os
from pathlib import Path

import pytest
import torch
from small import small_config

from k2 import ceilings, machine
from k2.config import K2Error
from k2.offload import store_of
from k2.quantization import FP8Linear, INT4Linear

CPU = torch.device("cpu")
GIVEN = {"ram": 10.0, "gpu_memory": 0, "disk": 20.0, "ram_bandwidth": 3.0, "disk_bandwidth": 2.0, "bus_bandwidth": None, "gpu_bandwidth": None}


def config(**changes):
    return small_config(hidden_size=160, moe_intermediate_size=32, n_routed_experts=5, num_experts_per_tok=2, torch_dtype="bfloat16", **changes)


def test_what_is_given_is_neither_looked_up_nor_measured(tmp_path, monkeypatch):
    for name in ("ram_bandwidth", "disk_bandwidth", "bus_bandwidth", "device_bandwidth"):
        monkeypatch.setattr(ceilings, name, None)
    assert machine.this_machine(tmp_path, GIVEN) == machine.Machine(10.0, 0, 20.0, 3.0, 2.0, 0.0, 0.0)


def test_what_is_not_given_is(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "ram_bandwidth", lambda: 5.0)
    monkeypatch.setattr(machine, "measured_disk", lambda folder: 7.0)
    found = machine.this_machine(tmp_path, dict.fromkeys(GIVEN) | {"gpu_memory": 0})
    assert (found.ram_bandwidth, found.disk_bandwidth) == (5.0, 7.0) and found.ram > 0 and found.disk > 0


def test_a_gpu_that_is_not_here_wants_its_bandwidths(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(K2Error, match="--gpu-memory: found without a bandwidth"):
        machine.this_machine(tmp_path, GIVEN | {"gpu_memory": 24e9})
    found = machine.this_machine(tmp_path, GIVEN | {"gpu_memory": 24e9, "bus_bandwidth": 25e9, "gpu_bandwidth": 1e12})
    assert found.gpu_memory == 24e9 and found.bus_bandwidth == 25e9


def test_an_empty_disk_is_measured_with_a_scratch_file_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SCRATCH", 2**25)
    seen = []
    plain = ceilings.disk_bandwidth
    monkeypatch.setattr(ceilings, "disk_bandwidth", lambda path: seen.append((Path(path).parent, os.path.getsize(path))) or plain(path, size=2**24, readers=(1,)))
    assert machine.measured_disk(tmp_path) > 0 and seen == [(tmp_path, 2**25)] and not list(tmp_path.iterdir())


def test_a_disk_with_weights_is_measured_with_those(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "SCRATCH", 1)
    (tmp_path / "a.safetensors").write_bytes(bytes(ceilings.BLOCK))
    monkeypatch.setattr(ceilings, "disk_bandwidth", lambda path: (path, 1.0))
    assert machine.measured_disk(tmp_path) == (tmp_path, 1.0)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(K2Error, match="could not be measured: No such file or directory. Give --path a folder"):
        machine.measured_disk(tmp_path / "nowhere")


@pytest.mark.parametrize("kind, tensors", [("attention", "self_attn"), ("router", "mlp.gate"), ("shared-expert", "mlp.shared_experts"), ("expert", "mlp.experts.0"), ("head", "lm_head")])
@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_each_kind_is_timed_with_the_module_that_the_loader_makes(format, kind, tensors, monkeypatch):
    filled, made = machine.filled, []
    monkeypatch.setattr(machine, "filled", lambda checkpoint, prefix, *rest: made.append((prefix, filled(checkpoint, prefix, *rest))) or made[-1][1])
    monkeypatch.setattr(machine, "MOMENT", 1e-9)
    size, seconds = machine.module_seconds(machine.in_format(config(), format), kind, CPU)
    assert seconds > 0 and tensors in made[0][0] and size == sum(t.numel() * t.element_size() for t in made[0][1].state_dict().values())
    fp8, int4 = (any(isinstance(module, linear) for module in made[0][1].modules()) for linear in (FP8Linear, INT4Linear))
    assert fp8 == (format == "fp8" and kind not in ("router", "head")) and int4 == (format == "int4" and kind == "expert")


def test_copies_take_turns_until_a_moment_has_passed(monkeypatch):
    copies = []
    monkeypatch.setattr(machine.copy, "deepcopy", lambda module, *memo: copies.append(1) or module)
    monkeypatch.setattr(machine, "MOMENT", 10.0)
    machine.module_seconds(config(), "router", CPU)
    assert len(copies) == 511


@pytest.mark.parametrize("kind", ["attention", "expert"])
def test_a_wide_module_reads_more_and_takes_longer(kind):
    wide = small_config(hidden_size=2048, moe_intermediate_size=1024, kv_lora_rank=512, torch_dtype="bfloat16")
    narrow = machine.narrow_config(wide)
    assert machine.module_seconds(wide, kind, CPU)[0] > 20 * machine.module_seconds(narrow, kind, CPU)[0]


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
def test_a_layers_fixed_cost_is_that_of_a_narrow_model_through_the_loader(format, resident, monkeypatch):
    loaded = []
    plain = machine.load
    monkeypatch.setattr(machine, "load", lambda *a, **o: loaded.append(plain(*a, **o)) or loaded[-1])
    assert 0 < machine.fixed_layer_seconds(machine.narrow_config(config()), format, resident, CPU) < 1
    assert (store_of(loaded[0]) is None) == resident
    assert loaded[0].config.num_hidden_layers == 7


def test_the_made_up_checkpoint_has_every_dtype_and_finite_numbers():
    for format in ("bf16", "fp8", "int4"):
        paper = machine.OnPaper(machine.in_format(config(), format))
        for name, spec in paper.specs.items():
            values = paper.tensor(name)
            assert tuple(values.shape) == spec.shape and values.float().isfinite().all(), name
    assert paper.tensor("model.layers.1.mlp.experts.0.down_proj.weight_shape").tolist() == [160, 32]


def test_a_model_without_experts_is_refused():
    with pytest.raises(K2Error, match="expected a model with experts"):
        machine.measured_speeds(config(first_k_dense_replace=3), "bf16", "bf16", True, CPU)
