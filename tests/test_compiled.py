"""torch.compile is an option: the same tokens, and everything it does not take goes the plain way."""

import copy

import pytest
import torch
from small import assert_close, assert_same, numbers, random_ids, random_model, small_config
from torch import nn

import k2
from k2 import compiled, products, quantization
from k2.checkpoint import Checkpoint, save
from k2.compiled import PART, Compiled, CompiledCodes, Compiler, fp8_bfloat16_weights, fp8_row, fp8_row_expert, fp8_weights, fp8_widened, row_expert, row_product, with_compiled_products
from k2.expert import Expert
from k2.offload import store_of, weight_bytes
from k2.quantization import FP8CodesLinear, fp8_dequantize, fp8_quantize


@pytest.mark.parametrize("D, width", [(40, 24), (2 * PART, PART)])
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_the_written_out_products_are_the_modules(dtype, limit, D, width):
    torch.manual_seed(0)
    expert, linear = Expert(D, width).to(dtype), nn.Linear(D, width, bias=False).to(dtype)
    x = numbers(1, D).to(dtype)
    assert_close(row_product(x, linear.weight), linear(x), limit, "product")
    assert_close(row_expert(x, expert.gate_proj.weight, expert.up_proj.weight, expert.down_proj.weight), expert(x), limit, "expert")


@pytest.fixture
def uncompiled(monkeypatch):
    """The written out functions as they stand: what the compiler does to them is the slow test's business."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(products, "bfloat16_unit", lambda: "none")


def test_a_single_row_meets_the_function_and_more_rows_the_module():
    plain = nn.Linear(8, 4, bias=False)
    module = Compiled(plain, lambda x, weight: -row_product(x, weight), [plain.weight])
    x = numbers(2, 8, dtype=torch.float32)
    assert_same(module(x), plain(x), "two rows")
    assert_close(module(x[:1]), -plain(x[:1]), 1e-6, "one row")
    assert module(x[0]).shape == (4,)


def test_a_model_of_compiled_products_is_the_same_model(uncompiled):
    plain, model = random_model(small_config()), with_compiled_products(random_model(small_config()), Compiler())
    ids, caches = random_ids(plain.config, 7), [k2.LatentCache(plain.config) for _ in range(2)]
    for part in (ids, ids[:1], ids[1:2]):
        assert_close(model(part, caches[0]), plain(part, caches[1]), 1e-5, f"{len(part)} tokens")


def test_every_expert_and_every_linear_but_kv_b_is_taken_and_quantised_ones_are_left(uncompiled, tmp_path):
    model = with_compiled_products(random_model(small_config()), Compiler())
    taken = {name for name, module in model.named_modules() if isinstance(module, Compiled)}
    assert {"model.layers.0.mlp", "model.layers.1.mlp.experts.3", "model.layers.2.mlp.shared_experts", "model.layers.1.self_attn.o_proj", "lm_head"} <= taken
    assert not any("kv_b_proj" in name for name in taken)
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), tmp_path / "model", format="int4")
    at_rest = k2.load(tmp_path / "model", dtype=None, compiled=True)
    assert not any(isinstance(module, Compiled) and ".experts." in name for name, module in at_rest.named_modules())


def test_matrices_that_a_single_row_meets_in_torch_mv_are_left_to_it(uncompiled, monkeypatch):
    expert, linear = Expert(40, 24).to(torch.bfloat16), nn.Linear(40, 24, bias=False).to(torch.bfloat16)
    assert isinstance(Compiler().form_of(expert), Compiled) and isinstance(Compiler().form_of(linear), Compiled)
    for unit in ("tiles", "none"):
        monkeypatch.setattr(products, "bfloat16_unit", lambda unit=unit: unit)
        monkeypatch.setitem(products.MV_FROM, unit, 24 * 40)
        assert Compiler().form_of(expert) is expert and Compiler().form_of(linear) is linear, unit
    wide = nn.Linear(40, 24, bias=False)
    assert isinstance(Compiler().form_of(wide), Compiled), "float32 has no torch.mv"


def fp8_linear(rows: int, columns: int, seed: int) -> FP8CodesLinear:
    """A matrix of random codes."""
    return FP8CodesLinear(*fp8_quantize(numbers(rows, columns, seed=seed)))


def test_every_code_but_the_two_nans_is_widened_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    right = codes.float()
    found = fp8_widened(codes.view(torch.int8)) * 2.0**-9
    assert int(right.isnan().sum()) == 2 and found.dtype == torch.float32
    assert torch.equal(found[~right.isnan()], right[~right.isnan()])


@pytest.mark.parametrize("rows", [128, 256, 200])
def test_the_written_out_fp8_products_are_the_modules(rows):
    linear, x = fp8_linear(rows, 384, 1), numbers(1, 384, dtype=torch.float32)
    assert_close(fp8_row(x[0], linear.weight.view(torch.int8), linear.weight_scale_inv), linear(x)[0], 1e-5, "product")
    expert = Expert(384, 128)
    expert.gate_proj, expert.up_proj, expert.down_proj = fp8_linear(128, 384, 2), fp8_linear(128, 384, 3), fp8_linear(384, 128, 4)
    parts = (expert.gate_proj, expert.up_proj, expert.down_proj)
    assert_close(fp8_row_expert(x[0], *(p.weight.view(torch.int8) for p in parts), *(p.weight_scale_inv for p in parts)), expert(x)[0], 1e-5, "expert")


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_codes_take_a_row_of_any_shape_and_dtype(uncompiled, dtype, limit):
    linear = fp8_linear(256, 384, 1)
    module = Compiler().form_of(linear)
    given, function = [], module.function
    module.function = lambda x, *weights: given.append(x.dtype) or function(x, *weights)
    for shape in ((384,), (1, 384), (1, 1, 384), (3, 384)):
        x = numbers(*shape, dtype=dtype)
        found = module(x)
        assert found.dtype == dtype and found.shape == (*shape[:-1], 256)
        assert_close(found, linear(x), limit, f"{shape}")
    assert given == [torch.float32] * 3, "compiled for bfloat16 it is much slower"


def test_codes_that_were_put_in_place_of_others_are_the_ones_that_compute(uncompiled):
    first, second, x = fp8_linear(256, 384, 1), fp8_linear(256, 384, 2), numbers(1, 384, dtype=torch.float32)
    module = Compiler().form_of(first)
    twin = copy.deepcopy(module)
    for of in (module, twin):
        of.plain.weight.data = second.weight.data
        of.plain.weight_scale_inv.data = second.weight_scale_inv.data
        assert_close(of(x), second(x), 1e-5, "product")
        assert of.weight.dtype == torch.float8_e4m3fn


def test_a_nan_among_the_codes_is_kept_by_the_plain_way():
    expert = Expert(256, 128)
    expert.gate_proj, expert.up_proj, expert.down_proj = fp8_linear(128, 256, 2), fp8_linear(128, 256, 3), fp8_linear(256, 128, 4)
    expert.down_proj.weight.data.view(torch.uint8)[5, 7] = 0xFF
    found = CompiledCodes(expert, fp8_row_expert, [expert.gate_proj, expert.up_proj, expert.down_proj])(numbers(1, 256, dtype=torch.float32))
    assert found[0, 5].isnan() and int(found.isnan().sum()) == 1


@pytest.mark.parametrize("dtype, arithmetic, last", [  # twice as many weights are a panel in bfloat16
    (torch.bfloat16, True, [(256, 128)]), (torch.bfloat16, False, [(128, 128)] * 2), (torch.float32, True, [(128, 128)] * 2), (torch.float32, False, [(128, 128)] * 2),
])  # fmt: skip
def test_a_prompts_experts_are_widened_by_the_compiled_function_to_the_same_numbers(uncompiled, monkeypatch, dtype, arithmetic, last):
    expert, asked = Expert(256, 128), []
    expert.gate_proj, expert.up_proj, expert.down_proj = fp8_linear(128, 256, 2), fp8_linear(128, 256, 3), fp8_linear(256, 128, 4)
    monkeypatch.setattr(products, "has_bfloat16", lambda: arithmetic)
    monkeypatch.setattr(products, "panel_bytes", lambda: 128 * 128 * 4)
    x = numbers(quantization.FEW, 256, dtype=dtype)
    plain, compiler = expert(x), Compiler()
    half = arithmetic and dtype == torch.bfloat16
    name, function = ("fp8_bfloat16_weights", fp8_bfloat16_weights) if half else ("fp8_weights", fp8_weights)
    setattr(compiler, name, lambda *given: asked.append(given[0].shape) or function(*given))
    assert_same(compiler.form_of(expert)(x), plain, "expert")
    assert asked == [(128, 256), (128, 256), *last]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1.3 * 2.0**-117, 1.3, 1.3 * 2.0**118])
def test_the_compiled_widening_gives_the_plain_ones_numbers(uncompiled, dtype, scale):
    codes = torch.arange(128 * 128).remainder(256).to(torch.uint8).view(128, 128)
    codes = codes.where(codes & 0x7F != 0x7F, 0).view(torch.float8_e4m3fn)
    scales = torch.full((1, 1), scale)
    assert_same(Compiler().dequantize(codes, scales, dtype, True), fp8_dequantize(codes, scales, dtype), "weights")


def test_what_the_compiled_widening_does_not_take_goes_the_plain_way(uncompiled):
    compiler, ragged = Compiler(), fp8_linear(200, 256, 1)
    whole = ragged.weight[:128].clone()
    compiler.fp8_weights = compiler.fp8_bfloat16_weights = None  # whoever calls them fails
    assert_same(compiler.dequantize(ragged.weight, ragged.weight_scale_inv, torch.bfloat16, True), fp8_dequantize(ragged.weight, ragged.weight_scale_inv, torch.bfloat16), "half a block")
    whole.view(torch.uint8)[5, 7] = 0xFF
    assert compiler.dequantize(whole, ragged.weight_scale_inv[:1], torch.float32, False).isnan().nonzero().tolist() == [[5, 7]]


def test_fp8_whose_columns_are_no_whole_blocks_goes_the_plain_way(uncompiled):
    assert isinstance(Compiler().form_of(fp8_linear(128, 256, 1)), Compiled)
    assert isinstance(Compiler().form_of(fp8_linear(128, 200, 1)), FP8CodesLinear)


@pytest.mark.parametrize("format, part", [("fp8", PART), ("bf16", PART), ("bf16", 32)])
def test_experts_that_come_from_a_disk_are_compiled_too_and_every_budget_gives_the_same_bits(uncompiled, monkeypatch, tmp_path, format, part):
    monkeypatch.setattr(compiled, "PART", part)
    config = small_config(hidden_size=128, moe_intermediate_size=128, num_hidden_layers=3)
    save(random_model(config), tmp_path / "model", format=format)
    ids, plain = random_ids(config, 6), k2.load(tmp_path / "model", dtype=None)
    _, rest = weight_bytes(Checkpoint(tmp_path / "model"), None)
    answers = []
    for ram in (rest + 400_000, rest + 900_000, None):
        model = k2.load(tmp_path / "model", dtype=None, ram=ram, compiled=True)
        store = store_of(model)
        assert (store is None) == (ram is None)
        cache = k2.LatentCache(config)
        answers.append(torch.cat([model(ids[:4], cache), model(ids[4:5], cache), model(ids[5:6], cache)]))
        if store:
            assert store.upper.experts and all(isinstance(expert, Compiled) for expert in store.upper.experts.values())
    assert_same(answers[0], answers[1], "two budgets")
    assert_same(answers[0], answers[2], "resident")
    cache = k2.LatentCache(config)
    assert_close(answers[0], torch.cat([plain(ids[:4], cache), plain(ids[4:5], cache), plain(ids[5:6], cache)]), 2e-2, "beside the plain forms")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own imports warn
def test_the_tokens_from_a_disk_are_the_same(tmp_path):
    from k2.__main__ import MINI

    tokenizer = k2.Tokenizer.from_directory(MINI)
    settings = dict(dtype=None, ram=9_000_000)
    texts = [list(k2.generate(k2.load(MINI, compiled=compiled, **settings), tokenizer.encode("def _get_"), 48)) for compiled in (False, True)]
    assert texts[0] == texts[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own imports warn
@torch.inference_mode()
def test_what_the_compiler_makes_of_rows_in_parts_and_of_others_answers_as_the_modules_do():
    compiler, x = Compiler(), numbers(1, 2 * PART).to(torch.bfloat16)
    for columns in (2 * PART, PART, 300):  # the compiler leaves sizes open from the second on
        linear, expert = nn.Linear(columns, 40, bias=False).to(torch.bfloat16), Expert(columns, PART).to(torch.bfloat16)
        assert_close(compiler.product(x[:, :columns], linear.weight), linear(x[:, :columns]), 2e-2, f"{columns} columns")
        assert_close(compiler.expert(x[:, :columns], *(part.weight for part in expert.children())), expert(x[:, :columns]), 2e-2, f"expert of {columns}")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler's own imports warn
def test_the_tokens_are_the_same():
    from k2.__main__ import MINI

    tokenizer = k2.Tokenizer.from_directory(MINI)
    texts = [list(k2.generate(k2.load(MINI, compiled=compiled), tokenizer.encode("def _get_"), 64)) for compiled in (False, True)]
    assert texts[0] == texts[1]


def test_without_a_compiler_it_is_one_line(monkeypatch, capsys):
    from k2.__main__ import main

    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["generate", "x", "--compile"]) == 2
    assert capsys.readouterr().err.strip().split("\n")[-1].startswith("error: --compile: expected a C++ compiler")


def test_float64_is_left_in_float64(uncompiled):
    plain = random_model(small_config()).double()
    assert not any(isinstance(module, Compiled) for module in with_compiled_products(plain, Compiler()).modules())


def test_a_compiled_model_is_not_saved_and_leaves_nothing(uncompiled, tmp_path):
    with pytest.raises(k2.K2Error, match="cannot be saved"):
        save(with_compiled_products(random_model(small_config()), Compiler()), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
