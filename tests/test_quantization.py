"""FP8 and INT4, against decoders written by hand from the formats' definitions; equal means equal bit for bit."""

import math
import struct
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small import assert_close, assert_same, relative_error

from k2 import products, quantization
from k2.quantization import (
    FP8CodesLinear,
    FP8Linear,
    INT4KernelLinear,
    INT4Linear,
    fp8_cast,
    fp8_dequantize,
    fp8_halves,
    fp8_product,
    fp8_quantize,
    int4_dequantize,
    int4_kernel_order,
    int4_quantize,
    int4_unpack,
)

RAGGED = [(200, 300), (128, 128), (1, 1), (576, 130), (129, 5), (64, 257)]  # 576 rows: kv_a_proj_with_mqa's five blocks


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def e4m3(code: int) -> float:
    """float8_e4m3fn by its definition: sign, 4 bits of exponent with bias 7, 3 of fraction; no infinity, one NaN per sign."""
    sign, exponent, fraction = (-1.0 if code & 0x80 else 1.0), code >> 3 & 15, code & 7
    if exponent == 15 and fraction == 7:
        return math.nan
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10))


def codes_and_scales(rows: int, columns: int, seed=0):
    """Random codes without NaN, and a different scale for every block."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    scales = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128), generator=generator) * 1e-3 + 1e-5
    return codes.view(torch.float8_e4m3fn), scales


def written_out(codes, scales) -> torch.Tensor:
    """Dequantisation as the format's description says it: one element after the other, each product rounded to float32."""
    value, table, numbers = np.empty(codes.shape, np.float32), scales.numpy(), codes.view(torch.uint8).numpy()
    for r in range(codes.shape[0]):
        for c in range(codes.shape[1]):
            value[r, c] = np.float32(e4m3(int(numbers[r, c]))) * table[r // 128, c // 128]
    return torch.from_numpy(value)


# ---- FP8 ----


def test_all_256_codes_of_e4m3_have_the_value_that_the_format_defines():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = fp8_dequantize(codes[None], torch.ones(1, 2))[0].tolist()
    expected = [e4m3(code) for code in range(256)]
    wrong = [(hex(i), a, b) for i, (a, b) in enumerate(zip(found, expected)) if not (a == b or math.isnan(a) and math.isnan(b))]
    assert not wrong, wrong
    assert math.isnan(expected[0x7F]) and math.isnan(expected[0xFF]) and max(e for e in expected if e == e) == 448.0
    halves = (fp8_halves(codes[None])[0].double() * 2.0**8).tolist()
    assert all(a == (480 if math.isnan(b) else abs(b)) for a, b in zip(map(abs, halves), expected)), "what every way starts from, NaN not yet told apart"


def test_the_sign_of_zero_survives():
    zeros = fp8_dequantize(torch.tensor([[0x00, 0x80]], dtype=torch.uint8).view(torch.float8_e4m3fn), torch.tensor([[0.5]]))
    assert zeros.tolist() == [[0.0, 0.0]] and zeros.signbit().tolist() == [[False, True]]


def test_a_nan_code_stays_nan_and_its_neighbours_do_not():
    codes, scales = codes_and_scales(130, 140)
    codes.view(torch.uint8)[129, 7] = 0xFF
    for widened in (fp8_dequantize, fp8_cast):
        assert widened(codes, scales, torch.float32).isnan().nonzero().tolist() == [[129, 7]]


@pytest.mark.parametrize("rows, columns", RAGGED)
def test_dequantisation_is_the_plain_double_loop_bit_for_bit(rows, columns):
    codes, scales = codes_and_scales(rows, columns)
    expected = written_out(codes, scales)
    assert_same(fp8_dequantize(codes, scales), expected, "float32")
    assert_same(fp8_dequantize(codes, scales, torch.float64), expected.double(), "float64")
    assert_same(fp8_dequantize(codes, scales, torch.bfloat16), expected.bfloat16(), "bfloat16, rounded once")


@pytest.mark.parametrize("large", [2**24, 2**16, 2**14])
@pytest.mark.parametrize("rows, columns", [*RAGGED, (576, 200)])
def test_what_a_gpu_takes_gives_the_same_numbers(rows, columns, large, monkeypatch):
    monkeypatch.setattr(quantization, "LARGE_PIECE", large)  # a GPU's in one go, or smaller than some of these matrices
    codes, scales = codes_and_scales(rows, columns)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert_same(fp8_cast(codes, scales, dtype), fp8_dequantize(codes, scales, dtype), f"{dtype}")
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    for scale in (2.0**-117, 1e-4, 127.99999):
        found, expected = (widened(every, torch.tensor([[scale, scale]]), torch.float32) for widened in (fp8_cast, fp8_dequantize))
        assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9)), scale


def test_scales_from_the_smallest_to_the_limit_are_exact():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    for scale in (2.0**-117, 2.0**-60, 1e-4, 1.0, 127.99999):
        found = fp8_dequantize(codes, torch.tensor([[scale, scale]]))
        expected = torch.tensor([[e4m3(c) for c in range(256)]], dtype=torch.float32) * torch.tensor(scale)
        assert torch.equal(found.nan_to_num(9e9), expected.nan_to_num(9e9)), scale


def test_a_scale_touches_its_own_block_and_no_other():
    codes, scales = codes_and_scales(200, 300)
    before = fp8_dequantize(codes, scales)
    for b in range(scales.shape[0]):
        for g in range(scales.shape[1]):
            doubled = scales.clone()
            doubled[b, g] *= 2
            expected = before.clone()
            expected[b * 128 : (b + 1) * 128, g * 128 : (g + 1) * 128] *= 2
            assert_same(fp8_dequantize(codes, doubled), expected, f"block {b}, {g}")


@pytest.mark.parametrize("rows, columns", RAGGED)
def test_quantising_what_was_dequantised_gives_the_same_bits(rows, columns):
    codes, scales = fp8_quantize(normal(rows, columns))
    again, scales_again = fp8_quantize(fp8_dequantize(codes, scales))
    assert_same(again.view(torch.uint8), codes.view(torch.uint8), "codes")
    assert_same(scales_again, scales, "scales")


def test_quantisation_takes_the_nearest_code_and_maps_each_blocks_largest_to_448():
    weight = normal(200, 300)
    codes, scales = fp8_quantize(weight)
    assert codes.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32 and scales.shape == (2, 3)
    finite = torch.tensor([e4m3(code) for code in range(256) if code & 0x7F != 0x7F])
    for b in range(2):
        for g in range(3):
            block = (slice(b * 128, (b + 1) * 128), slice(g * 128, (g + 1) * 128))
            assert codes[block].float().abs().max() == 448
            wanted = weight[block] / scales[b, g]
            nearest = (wanted.unsqueeze(-1) - finite).abs().amin(-1)
            assert_same((wanted - codes[block].float()).abs(), nearest, f"block {b}, {g}: distance to the nearest code")


def test_a_block_of_zeros_stays_zero_and_disturbs_nobody():
    weight = normal(256, 256)
    weight[128:, :128] = 0
    codes, scales = fp8_quantize(weight)
    restored = fp8_dequantize(codes, scales)
    assert restored.isfinite().all() and not restored[128:, :128].any()
    assert restored[:128].any() and restored[128:, 128:].any()


def test_fp8_costs_normal_weights_2_6_percent():
    weight = normal(512, 512)
    error = float((fp8_dequantize(*fp8_quantize(weight)) - weight).norm() / weight.norm())
    assert 0.025 < error < 0.028, f"relative error {error:.4f}"


# ---- INT4 ----


def hand_packed(values) -> int:
    """Eight integers -8 ... 7 as one signed 32-bit word: value + 8 in a nibble, the first in the lowest bits."""
    word = sum(value + 8 << 4 * k for k, value in enumerate(values))
    return struct.unpack("<i", struct.pack("<I", word))[0]


def test_a_word_packed_by_hand_comes_apart_in_order():
    # the nibbles 0x0 0x1 0x7 0x8 0x9 0xA 0xC 0xF from the lowest: as bytes 10 87 a9 fc
    word = struct.unpack("<i", bytes.fromhex("1087a9fc"))[0]
    assert word < 0, "the last nibble sets the sign of the word, and must not leak into the value"
    assert int4_unpack(torch.tensor([[word]], dtype=torch.int32)).tolist() == [[-8, -7, -1, 0, 1, 2, 4, 7]]


def test_the_nibble_is_offset_binary_and_not_twos_complement():
    words = torch.tensor([[hand_packed([0] * 8)], [0], [-1]], dtype=torch.int32)
    assert words[0, 0] == struct.unpack("<i", bytes.fromhex("88888888"))[0]
    assert int4_unpack(words).tolist() == [[0] * 8, [-8] * 8, [7] * 8]


def random_int4(rows: int, columns: int, seed=0):
    """Integers -8 ... 7, their words packed by hand, and a bfloat16 scale for each 32 of a row."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, columns), generator=generator)
    words = [[hand_packed(row[i : i + 8]) for i in range(0, columns, 8)] for row in values.tolist()]
    scales = (torch.rand(rows, columns // 32, generator=generator) * 1e-2 + 1e-3).bfloat16()
    return values, torch.tensor(words, dtype=torch.int32), scales


def test_every_number_of_a_matrix_gets_the_scale_of_its_own_32_inputs():
    values, words, scales = random_int4(5, 160)
    expected = torch.empty(5, 160)
    for r in range(5):
        for c in range(160):
            expected[r, c] = values[r, c].float() * scales[r, c // 32].float()
    assert_same(int4_dequantize(words, scales), expected, "float32")
    assert_same(int4_dequantize(words, scales, torch.bfloat16), expected.bfloat16(), "bfloat16, rounded once")


def test_int4_quantisation_rounds_to_nearest_and_maps_each_groups_largest_to_7():
    weight = normal(6, 96)
    words, scales = int4_quantize(weight)
    assert words.dtype == torch.int32 and words.shape == (6, 12) and scales.dtype == torch.bfloat16 and scales.shape == (6, 3)
    values, groups = int4_unpack(words).unflatten(-1, (-1, 32)), weight.unflatten(-1, (-1, 32))
    assert_same(values.abs().amax(-1), torch.full((6, 3), 7, dtype=torch.int8), "largest")
    assert_same(scales, (groups.abs().amax(-1) / 7).bfloat16(), "scales")
    off = float((values - groups / scales.float().unsqueeze(-1)).abs().max())
    assert off <= 0.5, f"a value was rounded by {off}"


def test_packing_what_was_unpacked_gives_the_same_bits():
    words, scales = int4_quantize(normal(7, 256))
    again, scales_again = int4_quantize(int4_dequantize(words, scales))
    assert_same(again, words, "words")
    assert_same(scales_again, scales, "scales")
    values, _, _ = random_int4(3, 64)
    values[:, ::32] = 7  # a group without its 7 would get another scale
    values.clamp_(-7, 7)
    words, _ = int4_quantize(values.float())
    assert_same(int4_unpack(words), values.to(torch.int8), "integers with scale 1")


def test_a_group_of_zeros_stays_zero():
    weight = normal(2, 64)
    weight[0, :32] = 0
    restored = int4_dequantize(*int4_quantize(weight))
    assert restored.isfinite().all() and not restored[0, :32].any() and restored[0, 32:].any()


def test_int4_costs_normal_weights_9_4_percent():
    weight = normal(512, 512)
    error = float((int4_dequantize(*int4_quantize(weight)) - weight).norm() / weight.norm())
    assert 0.088 < error < 0.1, f"relative error {error:.4f}"


# ---- the Linears ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_fp8_linear_is_f_linear_with_the_dequantised_matrix(dtype):
    codes, scales = codes_and_scales(140, 200)
    x = normal(2, 3, 200).to(dtype)
    assert_same(FP8Linear(codes, scales)(x), F.linear(x, written_out(codes, scales).to(dtype)), str(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_int4_linear_is_f_linear_with_the_dequantised_matrix(dtype):
    values, words, scales = random_int4(9, 64)
    x = normal(2, 3, 64).to(dtype)
    expected = (values.float().unflatten(-1, (-1, 32)) * scales.float().unsqueeze(-1)).flatten(-2).to(dtype)
    linear = INT4Linear(words, scales, torch.tensor([9, 64], dtype=torch.int32))
    assert_same(linear(x), F.linear(x, expected), str(dtype))


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 2e-6), (torch.float64, 1e-12), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows, columns", RAGGED)
def test_few_rows_meet_the_codes_and_get_the_dequantised_product(rows, columns, dtype, limit):
    codes, scales = codes_and_scales(rows, columns)
    exact = codes.double() * scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    for piece in (1, 50 * columns, 2 * 128 * columns, quantization.PIECE):  # a row at a time, a part of a block, two blocks, all of them
        for count in (1, 3, quantization.FEW - 1):
            x = normal(count, columns, seed=count).to(dtype)
            with mock.patch.object(quantization, "PIECE", piece):
                found = FP8CodesLinear(codes, scales)(x)
            assert_close(found, x.double() @ exact.T, limit, f"{count} rows, pieces of {piece}")
    many = normal(2, quantization.FEW, columns).to(dtype)
    with mock.patch.object(products, "has_bfloat16", lambda: True):
        assert_same(FP8CodesLinear(codes, scales)(many), FP8Linear(codes, scales)(many), "many rows")


def by_float64(x, codes, scales):
    """W x, float64, straight from the definition."""
    rows, columns = codes.shape
    return (codes.double() * scales.double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]) @ x.double()


def one_row(x, codes, scales):
    """fp8_product for a vector, and codes of which none is NaN."""
    return fp8_product(x[None], codes, scales, finite=True)[0]


def assert_each_block_close(found, x, codes, scales, what):
    """A block of rows that came out as zeros would not show in the size of the whole."""
    for block, right in zip(found.split(128), by_float64(x, codes, scales).split(128)):
        assert_close(block, right, 4e-3, what)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize("rows, columns", [*RAGGED, (130, 18432)])
@pytest.mark.parametrize("piece", [1, quantization.PIECE])
def test_one_row_is_as_exact_at_any_size_of_x(rows, columns, size, piece, monkeypatch):
    monkeypatch.setattr(quantization, "PIECE", piece)
    codes, scales = codes_and_scales(rows, columns)
    x = (normal(columns) * size).to(torch.bfloat16)
    found = one_row(x, codes, scales)
    assert found.dtype == torch.bfloat16
    assert_each_block_close(found, x, codes, scales, f"{size}")


@pytest.mark.parametrize("rows, columns", [(300, 7), (128, 7168), (1, 1), (576, 7168), (7168, 2048)])
@pytest.mark.parametrize("most", [1, 7 * 50, 2**19, 2**24])
def test_pieces_are_all_rows_once_and_whole_blocks_or_parts_of_one(rows, columns, most):
    found = quantization.pieces(rows, columns, most)
    assert [r for some in found for r in range(some.start, some.stop)] == list(range(rows))
    for some in found:
        of_one = some.start // 128 == (some.stop - 1) // 128
        assert of_one or some.start % 128 == some.stop % 128 == 0, some
        assert (some.stop - some.start) * columns <= max(most, columns)
    if most < 128 * columns and rows >= 128:
        sizes = [some.stop - some.start for some in found if some.start < 128]
        assert len(set(sizes[:-1])) <= 1 and sizes[-1] <= sizes[0] and (len(sizes) == 128 or sizes[-1] > sizes[0] // 2), "parts of one size, or nearly"


@pytest.mark.parametrize("piece", [1, 130 * 50, 130 * 128, 130 * 256, 2**24])
def test_dequantisation_in_pieces_of_any_size_is_the_same(piece, monkeypatch):
    codes, scales = codes_and_scales(300, 130)
    monkeypatch.setattr(quantization, "PIECE", piece)
    widened, real = [], fp8_halves
    monkeypatch.setattr(quantization, "fp8_halves", lambda code: widened.append(code.numel()) or real(code))
    assert_same(fp8_dequantize(codes, scales), written_out(codes, scales), f"pieces of {piece}")
    fp8_product(normal(1, 130), codes, scales)
    assert max(widened) <= max(piece, 130) and sum(widened) == 2 * codes.numel()


@pytest.mark.parametrize("count", [1, 3, 9, quantization.FEW])
def test_an_answer_lies_as_a_matrix_does_and_depends_on_no_layout_of_x(count):
    linear, x = FP8CodesLinear(*codes_and_scales(200, 130)), normal(count, 130)
    across = x.mT.contiguous().mT
    assert linear(x).is_contiguous() and linear(x[None]).view(-1).shape == (200 * count,)
    assert_same(linear(across), linear(x), "x lying across")


def test_no_row_gives_no_row():
    assert FP8CodesLinear(*codes_and_scales(200, 130))(torch.empty(2, 0, 130)).shape == (2, 0, 200)


def test_a_batch_counts_with_all_its_rows_and_codes_are_looked_at_once(monkeypatch):
    linear, taken, looks = FP8CodesLinear(*codes_and_scales(200, 130)), [], []
    for name in ("fp8_product", "fp8_many_rows_product"):
        monkeypatch.setattr(quantization, name, lambda *given, name=name, real=getattr(quantization, name): taken.append(name) or real(*given))
    monkeypatch.setattr(quantization, "fp8_has_nan", lambda code, real=quantization.fp8_has_nan: looks.append(1) or real(code))
    for shape in ((3, 5), (2, 8), (16,)):
        assert linear(normal(*shape, 130)).shape == (*shape, 200)
    assert taken == ["fp8_product", "fp8_many_rows_product", "fp8_many_rows_product"] and len(looks) == 1


@pytest.mark.parametrize("arithmetic, blocks", [(True, 2), (False, 1)])
def test_a_panel_holds_as_many_blocks_as_its_dtype_lets_it(arithmetic, blocks, monkeypatch):
    codes, scales = codes_and_scales(500, 130)
    monkeypatch.setattr(products, "has_bfloat16", lambda: arithmetic)
    monkeypatch.setattr(products, "panel_bytes", lambda: 4 * 128 * 130)
    asked, x = [], normal(quantization.FEW, 130).to(torch.bfloat16)
    found = quantization.fp8_many_rows_product(x, codes, scales, True, lambda code, *given: asked.append(len(code)) or fp8_dequantize(code, *given))
    assert asked[0] == 128 * blocks and sum(asked) == 500
    assert_close(found, x.double() @ fp8_dequantize(codes, scales, torch.float64).T, 4e-3, "product")


def test_a_row_alone_and_an_odd_number_of_rows_are_filled_up():
    codes, scales = codes_and_scales(200, 130)
    for threads, shared, one in ((1, False, 1), (2, False, 2), (2, True, 1)):
        shapes, real = [], torch.Tensor.__matmul__
        with mock.patch.object(torch, "get_num_threads", lambda threads=threads: threads), mock.patch.object(quantization, "mv_is_shared", lambda shared=shared: shared):
            assert [quantization.columns_for(rows) for rows in (1, 2, 3, 8, 9, 15, 16, 17)] == [one, 2, 3, 8, 16, 16, 16, 32]
            with mock.patch.object(torch.Tensor, "__matmul__", lambda a, b: shapes.append(tuple(b.shape)) or real(a, b)):
                found = fp8_product(normal(1, 130), codes, scales)
        assert set(shapes) == {(130, one)}
        assert_close(found, normal(1, 130).double() @ fp8_dequantize(codes, scales, torch.float64).T, 2e-6, f"{threads} threads")


@pytest.mark.parametrize("powers", [8, 12, 24, 40])
def test_one_row_is_as_exact_whatever_its_scales(powers):
    codes, scales = codes_and_scales(576, 7168)
    by_row = scales * 2.0 ** -torch.tensor([powers, 0, powers / 2, 0, powers])[:, None]
    x = normal(7168).to(torch.bfloat16)
    assert_each_block_close(one_row(x, codes, by_row), x, codes, by_row, "blocks of rows of different sizes")
    tilt = 2.0 ** torch.linspace(-powers, powers, 56).round()
    balanced = (normal(7168) * tilt.repeat_interleave(128)).to(torch.bfloat16)  # large where the scales are small
    assert_each_block_close(one_row(balanced, codes, scales / tilt), balanced, codes, scales / tilt, "columns of different sizes")


@pytest.mark.parametrize("outlier", [2.0**10, 2.0**13, 2.0**16, 2.0**100])
def test_a_number_far_above_all_others_does_not_cost_them_their_bits(outlier):
    """It may meet a code of zero, and the others are then all there is."""
    codes, scales = codes_and_scales(256, 7168)
    codes = codes.clone()
    codes.view(torch.uint8)[:, 77] = 0
    x = normal(7168).to(torch.bfloat16)
    x[77] = outlier
    assert_each_block_close(FP8CodesLinear(codes, scales)(x[None])[0], x, codes, scales, f"{outlier}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("count", [1, 2, quantization.FEW])
def test_a_nan_among_the_codes_is_nan_in_its_own_row_and_a_gradient_passes(dtype, count):
    codes, scales = codes_and_scales(200, 130)
    x = normal(count, 130).to(dtype)
    linear = FP8CodesLinear(codes, scales)
    assert linear(x).shape == (count, 200) and linear(x[None]).shape == (1, count, 200) and linear(x).dtype == dtype
    bad = codes.clone()
    bad.view(torch.uint8)[150, 7] = 0x7F
    found = FP8CodesLinear(bad, scales)(x)
    assert found[:, 150].isnan().all() and int(found.isnan().sum()) == count
    leaf = x.clone().requires_grad_()
    linear(leaf).sum().backward()
    limit = {torch.float64: 1e-6, torch.float32: 1e-5}.get(dtype, 1e-2)  # float64 in many rows: weights are rounded to float32
    assert_close(leaf.grad, fp8_dequantize(codes, scales, torch.float64).sum(0).expand(count, -1), limit, "gradient")


def test_one_row_of_the_largest_codes_does_not_overflow():
    codes, x = torch.full((1, 18432), 448.0).to(torch.float8_e4m3fn), torch.ones(18432, dtype=torch.bfloat16)  # K2's widest matrix
    assert_close(one_row(x, codes, torch.ones(1, 144)), torch.tensor([18432 * 448.0], dtype=torch.float64), 4e-3, "sum")


def test_one_row_of_zeros_is_zero_and_what_is_not_finite_stays_it():
    codes, scales = codes_and_scales(140, 200)
    linear = FP8CodesLinear(codes, scales)
    assert_same(linear(torch.zeros(1, 200, dtype=torch.bfloat16)), torch.zeros(1, 140, dtype=torch.bfloat16), "zeros")
    for bad in (math.nan, math.inf, -math.inf):
        x = normal(200).to(torch.bfloat16)
        x[7] = bad
        assert not linear(x[None]).isfinite().any(), bad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_rows_meet_widened_codes_where_the_processor_has_no_bfloat16(monkeypatch, dtype):
    monkeypatch.setattr(products, "has_bfloat16", lambda: False)
    for rows, columns in RAGGED:
        codes, scales = codes_and_scales(rows, columns)
        exact = fp8_dequantize(codes, scales, torch.float64)
        x = normal(2, quantization.FEW, columns).to(dtype)
        for panel in (1, products.panel_bytes()):
            monkeypatch.setattr(products, "panel_bytes", lambda panel=panel: panel)
            found = FP8CodesLinear(codes, scales)(x)
            assert found.shape == (2, quantization.FEW, rows) and found.dtype == dtype
            assert_close(found, x.double() @ exact.T, 4e-3 if dtype == torch.bfloat16 else 2e-6, f"{rows} x {columns}, panels of {panel}")


def test_the_smallest_codes_count_in_a_product_of_few_rows():
    codes = torch.tensor([[1, 0x81, 7, 0]], dtype=torch.uint8).view(torch.float8_e4m3fn)  # below the smallest normal number
    found = FP8CodesLinear(codes, torch.full((1, 1), 3.0))(torch.tensor([[1.0, 10.0, 100.0, 1.0]]))
    assert float(found) == 3 * (1 - 10 + 700) * 2.0**-9


def test_a_nan_code_is_nan_in_a_product_of_few_rows_too():
    codes, scales = codes_and_scales(200, 130)
    codes = codes.clone()
    codes.view(torch.uint8)[150, 7] = 0xFF
    found = FP8CodesLinear(codes, scales)(normal(2, 130))
    assert found[:, 150].isnan().all() and int(found.isnan().sum()) == 2


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows, columns", [(64, 64), (192, 96), (48, 32)])  # 48: not a multiple of the kernel's 64
@pytest.mark.parametrize("in_place", [False, True])
def test_torchs_int4_kernel_gives_the_dequantised_product(rows, columns, dtype, limit, in_place):
    _, words, scales = random_int4(rows, columns)
    exact = int4_dequantize(words, scales, torch.float64)
    linear = INT4KernelLinear(words.clone(), scales, torch.tensor([rows, columns], dtype=torch.int32), in_place)
    for x in (normal(1, columns), normal(2, 9, columns)):
        x = x.to(dtype)
        assert_close(linear(x), x.double() @ exact.T, limit, f"{tuple(x.shape)}")
    assert torch.equal(linear.weight_packed, words) != (in_place and rows * columns > 0), "the stored words are kept unless the memory is its own"


def test_the_kernels_order_is_torchs_own():
    _, words, _ = random_int4(128, 64)
    theirs = torch._convert_weight_to_int4pack_for_cpu(int4_unpack(words).int() + 8, 1)
    assert_same(int4_kernel_order(words), theirs, "by whichever way this machine takes")


def test_the_linears_keep_their_weights_at_rest_under_the_checkpoints_names():
    fp8 = FP8Linear(*codes_and_scales(130, 130))
    int4 = INT4Linear(*random_int4(4, 32)[1:], torch.tensor([4, 32], dtype=torch.int32))
    dtypes = {name: tensor.dtype for module in (fp8, int4) for name, tensor in module.state_dict().items()}
    assert dtypes == {
        "weight": torch.float8_e4m3fn, "weight_scale_inv": torch.float32,
        "weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int32,
    }  # fmt: skip
    assert not any(parameter.requires_grad for module in (fp8, int4) for parameter in module.parameters())


def test_products_with_quantised_weights_differ_from_the_originals_by_the_weights_own_error():
    weight, x = normal(256, 256), normal(16, 256, seed=1)
    expected = F.linear(x, weight)
    for linear, low, high in ((FP8Linear(*fp8_quantize(weight)), 0.02, 0.035), (INT4Linear(*int4_quantize(weight), torch.tensor([256, 256])), 0.07, 0.13)):
        error = relative_error(linear(x), expected)
        assert low < error < high, f"{type(linear).__name__}: relative error {error:.4f}"


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_one_row_depends_on_no_default_dtype(default):
    codes, scales = codes_and_scales(200, 130)
    linear, x = FP8CodesLinear(codes, scales), normal(1, 130)
    right = linear(x)
    torch.set_default_dtype(default)
    try:
        assert_same(linear(x), right, str(default))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("count", [1, quantization.FEW])
def test_scales_that_want_a_gradient_get_it(count):
    codes, scales = codes_and_scales(200, 130)
    linear, x = FP8CodesLinear(codes, scales), normal(count, 130)
    linear.weight_scale_inv.requires_grad_(True)
    linear(x).sum().backward()
    value = codes.double() * x.double().sum(0)  # of each weight, the sum over all rows of x
    right = F.pad(value, (0, 126, 0, 56)).unflatten(0, (2, 128)).unflatten(2, (2, 128)).sum((1, 3))
    assert_close(linear.weight_scale_inv.grad, right, 1e-4, "gradient")
