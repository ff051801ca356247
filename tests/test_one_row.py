"""A single row of bfloat16 on a CPU takes another kernel, and gives the same product."""

import pytest
import torch
from small import assert_close, assert_same, numbers, random_ids, random_model, small_config

import k2
from k2.checkpoint import Checkpoint, load, plain_linear, save
from k2.offload import store_of, weight_bytes
from k2.one_row import RowHead, RowLinear, wants_mv


@pytest.mark.parametrize("shape", [(1, 40), (40,), (1, 1, 40), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_gives_the_product_whatever_kernel_takes_it(shape, dtype):
    linear = plain_linear(numbers(24, 40, dtype=dtype), torch.device("cpu"))
    assert isinstance(linear, RowLinear) == (dtype == torch.bfloat16)
    x, right = numbers(*shape, seed=1, dtype=dtype), numbers(24, 40, dtype=dtype).double()
    assert linear(x).shape == (*shape[:-1], 24) and linear(x).dtype == dtype
    assert_close(linear(x), x.double() @ right.T, 1e-2 if dtype == torch.bfloat16 else 1e-6, "product")


def test_a_loaded_models_matrices_and_head_take_the_cpus_kernel(tmp_path, monkeypatch):
    model = random_model(small_config()).to(torch.bfloat16)
    save(model, tmp_path / "model")
    loaded = load(tmp_path / "model", dtype=None)
    assert isinstance(loaded.lm_head, RowHead) and isinstance(loaded.model.layers[1].self_attn.o_proj, RowLinear)
    taken, real = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda weight, x: taken.append(weight.shape) or real(weight, x))
    logits = loaded(torch.tensor([3]))
    assert tuple(loaded.lm_head.weight.shape) in map(tuple, taken) and logits.dtype == torch.float32 and len(taken) > 10
    assert_close(logits, random_model(small_config()).float()(torch.tensor([3])), 5e-2, "logits")


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, "auto"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_expert_from_a_disk_takes_the_kernels_of_a_resident_one(tmp_path, monkeypatch, format, dtype, compiled):
    """Small matrices give the same bits by any kernel. So here each kernel is made to leave its mark."""
    real = torch.mv
    monkeypatch.setattr(torch, "mv", lambda weight, x: 1.25 * real(weight, x))
    monkeypatch.setattr(torch, "compile", lambda function: lambda *given: 0.75 * function(*given))
    config = small_config(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=3)
    save(random_model(config), tmp_path / "model", format=format)
    ids, (_, rest) = random_ids(config, 6), weight_bytes(Checkpoint(tmp_path / "model"), dtype)
    answers = []
    for ram in (rest + 500_000, None):
        model, cache = k2.load(tmp_path / "model", dtype=dtype, ram=ram, compiled=compiled), k2.LatentCache(config)
        assert (store_of(model) is None) == (ram is None)
        answers.append(torch.cat([model(ids[:4], cache), model(ids[4:5], cache), model(ids[5:6], cache)]))
    assert_same(*answers, "from a disk and resident")


def test_no_row_at_all_is_not_one_row():
    linear = RowLinear(40, 24, bias=False).to(torch.bfloat16)
    assert linear(torch.empty(0, 40, dtype=torch.bfloat16)).shape == (0, 24)


@pytest.mark.parametrize(("dtype", "device", "wanted"), [(torch.bfloat16, "cpu", True), (torch.float32, "cpu", False), (torch.bfloat16, "cuda", False)])
def test_only_bfloat16_on_a_cpu_wants_another_kernel(dtype, device, wanted):
    assert wants_mv(dtype, torch.device(device)) == wanted
