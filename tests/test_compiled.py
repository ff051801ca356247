"""torch.compile is an option: the same tokens, and everything it does not take goes the plain way."""

import pytest
import torch
from small import assert_close, assert_same, numbers, random_ids, random_model, small_config
from torch import nn

import k2
from k2.checkpoint import save
from k2.compiled import Compiled, row_expert, row_product, with_compiled_products
from k2.expert import Expert


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_written_out_products_are_the_modules(dtype, limit):
    torch.manual_seed(0)
    expert, linear = Expert(40, 24).to(dtype), nn.Linear(40, 24, bias=False).to(dtype)
    x = numbers(1, 40).to(dtype)
    assert_close(row_product(x, linear.weight), linear(x), limit, "product")
    assert_close(row_expert(x, expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight), expert(x), limit, "expert")


@pytest.fixture
def uncompiled(monkeypatch):
    """The written out functions as they stand: what the compiler does to them is the slow test's business."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def test_a_single_row_meets_the_function_and_more_rows_the_module():
    plain = nn.Linear(8, 4, bias=False)
    module = Compiled(plain, lambda x, weight: -row_product(x, weight), [plain.weight])
    x = numbers(2, 8, dtype=torch.float32)
    assert_same(module(x), plain(x), "two rows")
    assert_close(module(x[:1]), -plain(x[:1]), 1e-6, "one row")
    assert module(x[0]).shape == (4,)


def test_a_model_of_compiled_products_is_the_same_model(uncompiled):
    plain, model = random_model(small_config()), with_compiled_products(random_model(small_config()))
    ids, caches = random_ids(plain.config, 7), [k2.LatentCache(plain.config) for _ in range(2)]
    for part in (ids, ids[:1], ids[1:2]):
        assert_close(model(part, caches[0]), plain(part, caches[1]), 1e-5, f"{len(part)} tokens")


def test_every_expert_and_every_linear_but_kv_b_is_taken_and_quantised_ones_are_left(uncompiled, tmp_path):
    model = with_compiled_products(random_model(small_config()))
    taken = {name for name, module in model.named_modules() if isinstance(module, Compiled)}
    assert {"model.layers.0.mlp", "model.layers.1.mlp.experts.3", "model.layers.2.mlp.shared_experts", "model.layers.1.self_attn.o_proj", "lm_head"} <= taken
    assert not any("kv_b_proj" in name for name in taken)
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), tmp_path / "model", format="int4")
    at_rest = with_compiled_products(k2.load(tmp_path / "model", dtype=None))
    assert not any(isinstance(module, Compiled) and ".experts." in name for name, module in at_rest.named_modules())


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own imports warn
def test_the_tokens_are_the_same():
    from k2.__main__ import MINI

    tokenizer = k2.Tokenizer.from_directory(MINI)
    texts = [list(k2.generate(k2.load(MINI, compiled=compiled), tokenizer.encode("def _get_"), 64)) for compiled in (False, True)]
    assert texts[0] == texts[1]
