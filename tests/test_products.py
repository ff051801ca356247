"""On a CPU a single row of bfloat16 takes another kernel, and many rows may: the product is the same."""

import pytest
import torch
from small import assert_close, assert_same, numbers, random_ids, random_model, small_config

import k2
from k2 import products, quantization
from k2.checkpoint import Checkpoint, RowHead, load, plain_linear, save
from k2.offload import store_of, weight_bytes
from k2.products import RowLinear, has_bfloat16, many_rows_product, wants_row_kernel


@pytest.mark.parametrize("shape", [(1, 40), (40,), (1, 1, 40), (2, 40)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("unit", ["tiles", "pairs", "none", "unknown"])
@pytest.mark.parametrize("large", [1, 2**30])
def test_a_matrix_gives_the_product_whatever_kernel_takes_it(shape, dtype, unit, large, monkeypatch):
    monkeypatch.setattr(products, "bfloat16_unit", lambda: unit)
    monkeypatch.setattr(products, "MV_FROM", {**products.MV_FROM, "tiles": large, "none": large, "unknown": large})
    monkeypatch.setattr(products, "TWICE_FROM", large)
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
    monkeypatch.setattr(products, "MV_FROM", dict.fromkeys(products.MV_FROM, 1))
    monkeypatch.setattr(torch, "mv", lambda weight, x: taken.append(weight.shape) or real(weight, x))
    logits = loaded(torch.tensor([3]))
    assert tuple(loaded.lm_head.weight.shape) in map(tuple, taken) and logits.dtype == torch.float32 and len(taken) > 10
    assert_close(logits, random_model(small_config()).float()(torch.tensor([3])), 5e-2, "logits")


def marked(found):
    """What a function gave, its first result changed."""
    return (0.75 * found[0], *found[1:]) if isinstance(found, tuple) else 0.75 * found


@pytest.mark.parametrize("format", ["bf16", "fp8", "int4"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, "auto"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("arithmetic", [False, True])
def test_an_expert_from_a_disk_takes_the_kernels_of_a_resident_one(tmp_path, monkeypatch, format, dtype, compiled, arithmetic):
    """Small matrices give the same bits by any kernel. So here each kernel is made to leave its mark."""
    mv, in_float32 = torch.mv, products.panel_product
    monkeypatch.setattr(torch, "mv", lambda weight, x, **out: mv(weight, 1.25 * x, **out))
    monkeypatch.setattr(products, "has_bfloat16", lambda: arithmetic)
    for module in (products, quantization):
        monkeypatch.setattr(module, "panel_product", lambda x_MI, *given: in_float32(1.5 * x_MI, *given))
    monkeypatch.setattr(products, "SOME", 2)
    monkeypatch.setattr(products, "MV_FROM", dict.fromkeys(products.MV_FROM, 1))
    monkeypatch.setattr(quantization, "FEW", 2)
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *given: marked(function(*given)))
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
    assert wants_row_kernel(dtype, torch.device(device)) == wanted


@pytest.mark.parametrize("rows", [1, products.SOME - 1, products.SOME, products.MANY])
@pytest.mark.parametrize("panel", [1, 100, products.panel_bytes()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_are_multiplied_in_float32_where_the_processor_has_no_other_arithmetic(monkeypatch, rows, panel, dtype):
    x, weight = numbers(2, rows, 40, dtype=dtype), numbers(30, 40, seed=1, dtype=dtype)
    asked, real = [], products.F.linear
    monkeypatch.setattr(products.F, "linear", lambda x, w: asked.append((x.dtype, len(x), len(w))) or real(x, w))
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "panel_bytes", lambda: 4 * panel)
    found, step = many_rows_product(x, weight), max(1, panel // 40)
    assert found.dtype == dtype and found.shape == (2, rows, 30)
    assert_close(found, x.double() @ weight.double().T, 4e-3 if dtype == torch.bfloat16 else 1e-6, "product")
    if dtype == torch.bfloat16 and 2 * rows >= products.SOME:
        pieces, filled = [len(piece) for piece in torch.arange(30).split(step)], -(-2 * rows // products.STEP) * products.STEP
        assert asked == [(torch.float32, 2 * rows, piece) if 2 * rows >= products.MANY else (torch.float32, piece, filled) for piece in pieces]
    else:
        assert asked == [(dtype, 2, 30)]


def test_attentions_own_product_takes_the_same_way(tmp_path, monkeypatch):
    config = small_config()
    save(random_model(config).to(torch.bfloat16), tmp_path / "model")
    loaded, ids = load(tmp_path / "model", dtype=None), random_ids(config, 2 * products.SOME)
    plain, asked = loaded(ids), []
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "panel_product", lambda *given, real=products.panel_product: asked.append(given[1][-1].stop) or real(*given))
    assert_close(loaded(ids), plain, 3e-2, "logits")
    assert asked.count(config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)) >= config.num_hidden_layers


@torch.inference_mode()
def test_a_decoded_token_meets_the_latents_the_same_way(monkeypatch):
    """Three products of the absorbed form: with the latents, with the rotary keys, and with the latents lying across."""
    config = small_config(num_attention_heads=products.SOME)
    attention, taken = random_model(config).model.layers[0].self_attn.to(torch.bfloat16), []
    given = [numbers(*shape, seed=seed, dtype=torch.bfloat16) for seed, shape in enumerate([
        (products.SOME, 1, config.qk_nope_head_dim), (products.SOME, 1, config.qk_rope_head_dim), (20, config.kv_lora_rank), (20, config.qk_rope_head_dim)])]  # fmt: skip
    plain = attention.absorbed(*given)
    for name in ("panel_product", "float32_sum"):
        monkeypatch.setattr(products, name, lambda *given, name=name, real=getattr(products, name): taken.append(name) or real(*given))
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    attention.product = many_rows_product
    assert_close(attention.absorbed(*given), plain, 2e-2, "heads")
    assert taken == ["panel_product", "panel_product", "float32_sum"]


@pytest.mark.parametrize("panel", [1, 100, products.panel_bytes()])
def test_a_matrix_that_lies_across_is_summed_by_panels(monkeypatch, panel):
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "panel_bytes", lambda: panel)
    x, across = numbers(2, products.SOME, 40, dtype=torch.bfloat16), numbers(40, 30, seed=1, dtype=torch.bfloat16)
    found = many_rows_product(x, across.mT)
    assert found.dtype == torch.bfloat16 and found.shape == (2, products.SOME, 30)
    assert_close(found, x.double() @ across.double(), 4e-3, "product")


def test_a_batch_of_matrices_training_and_another_dtype_go_the_plain_way(monkeypatch):
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    monkeypatch.setattr(products, "panel_product", None)  # whoever calls it fails
    x, weight = numbers(2, products.SOME, 40, dtype=torch.bfloat16), numbers(2, 30, 40, seed=1, dtype=torch.bfloat16)
    assert_same(many_rows_product(x, weight), x @ weight.mT, "a batch")
    assert_same(many_rows_product(x.requires_grad_(), weight[0]), torch.nn.functional.linear(x, weight[0]), "training")
    with pytest.raises(RuntimeError, match="dtype"):
        many_rows_product(x.detach(), weight[0].float())


@pytest.mark.parametrize(("found", "unit"), [
    ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": True}, "tiles"), ({"architecture": "x86_64", "avx512_bf16": True}, "pairs"),
    ({"architecture": "x86_64", "avx_ne_convert": True}, "unknown"), ({"architecture": "x86_64", "avx2": True, "avx512_f": True}, "none"),
    ({"architecture": "aarch64"}, "unknown"), ({}, "unknown"),
])  # fmt: skip
def test_what_a_processor_has_for_bfloat16_is_known_by_what_torch_says_of_it(monkeypatch, found, unit):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert products.bfloat16_unit.__wrapped__() == unit and unit in products.MV_FROM
    monkeypatch.setattr(products, "bfloat16_unit", lambda: unit)
    assert has_bfloat16() == (unit != "none")


@pytest.mark.parametrize(("unit", "size", "way"), [
    ("tiles", 2**17, "mv"), ("tiles", 2**16, "once"), ("none", 2**21, "mv"), ("none", 2**20, "once"), ("unknown", 2**21, "mv"), ("unknown", 2**20, "once"),
    ("pairs", 2**22, "twice"), ("pairs", 2**20, "twice"), ("pairs", 2**19, "once"),
])  # fmt: skip
def test_the_way_of_a_single_row_depends_on_the_processor_and_the_size(monkeypatch, unit, size, way):
    monkeypatch.setattr(products, "bfloat16_unit", lambda: unit)
    linear, ways, mv, library = RowLinear(512, size // 512, bias=False).to(torch.bfloat16), [], torch.mv, products.F.linear
    monkeypatch.setattr(torch, "mv", lambda *given: ways.append("mv") or mv(*given))
    monkeypatch.setattr(products.F, "linear", lambda x, w: ways.append("twice" if x.shape == (2, 512) else "once") or library(x, w))
    x = numbers(1, 512, dtype=torch.bfloat16)
    with torch.no_grad():
        found = linear(x)
    assert ways == [way] and found.shape == (1, size // 512)
    assert_close(found, x.double() @ linear.weight.double().T, 1e-2, "product")


@pytest.mark.parametrize(("name", "mkl", "shared"), [("Intel Xeon", True, True), ("Intel Xeon", False, False), ("AMD EPYC", True, False), ("", True, False)])
def test_a_float32_column_is_taken_for_shared_only_where_mkl_meets_its_maker(monkeypatch, name, mkl, shared):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    assert products.mv_is_shared.__wrapped__() == shared


@pytest.mark.parametrize("unit", products.MV_FROM)
def test_panels_are_equal_whole_and_no_larger_than_the_processors(monkeypatch, unit):
    monkeypatch.setattr(products, "bfloat16_unit", lambda: unit)
    assert products.panel_bytes() == products.PANEL[unit] == 2**22 * (4 if unit == "tiles" else 1)
    for rows, columns in ((2048, 7168), (7168, 2048), (18432, 7168), (7168, 18432), (576, 7168), (200, 40), (1, 1)):
        found = products.panels(rows, columns, 128, torch.bfloat16)
        sizes = [piece.stop - piece.start for piece in found]
        assert sum(sizes) == rows and [piece.start for piece in found] == [sum(sizes[:n]) for n in range(len(sizes))]
        assert len(set(sizes[:-1])) <= 1 and max(sizes) == sizes[0] and all(size % 128 == 0 for size in sizes[:-1])
        assert max(sizes) <= 128 or 2 * max(sizes) * columns <= products.panel_bytes()


@pytest.mark.parametrize(("rows", "dtype", "answers"), [(64, torch.bfloat16, 1), (2, torch.bfloat16, 1), (64, torch.float32, 1), (17, torch.float32, 0)])
def test_a_single_panels_answer_is_no_copy(monkeypatch, rows, dtype, answers):
    x, weight, given = numbers(rows, 40, dtype=dtype), numbers(30, 40, seed=1, dtype=dtype), []
    library = products.F.linear
    monkeypatch.setattr(products.F, "linear", lambda *pair: given.append(library(*pair)) or given[-1])
    found = products.panel_product(x, [slice(0, 30)], lambda piece: weight[piece], dtype)
    assert [answer is found for answer in given] == [bool(answers)]
    assert_close(found, x.double() @ weight.double().T, 4e-3 if dtype == torch.bfloat16 else 2e-6, "product")
