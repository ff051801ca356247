"""A single row of bfloat16 on a CPU takes another kernel, and gives the same product."""

import pytest
import torch
from small import assert_close, numbers, random_model, small_config

from k2.checkpoint import load, plain_linear, save
from k2.one_row import RowHead, RowLinear


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
