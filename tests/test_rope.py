"""Frequencies against published values, rotation against the reference and against what a rotation is."""

from dataclasses import replace

import numpy as np
import torch
from small import YARN, as_float64, assert_close, assert_same, numbers, random_config, random_model, rotary_tables, small_config

from k2 import reference
from k2.rope import rope_angles, rope_frequencies, rotate

# K2's frequencies, worked out once from the formula in 30 digits: theta 50000, 64 rotary coordinates, a window of 4096.
PLAIN = """1 0.7131111 0.5085274 0.3626365 0.2586001 0.1844106 0.1315053 0.09377786 0.06687403 0.04768861 0.03400728 0.02425097
0.01729363 0.01233228 0.008794287 0.006271303 0.004472136 0.003189130 0.002274204 0.001621760""".split()
SLOWED_32 = """3.614047e-5 2.577217e-5 1.837842e-5 1.310585e-5 9.345930e-6 6.664686e-6 4.752662e-6 3.389176e-6 2.416859e-6
1.723489e-6 1.229039e-6 8.764413e-7""".split()
SLOWED_64 = """1.807023e-5 1.288608e-5 9.189209e-6 6.552927e-6 4.672965e-6 3.332343e-6 2.376331e-6 1.694588e-6 1.208429e-6
8.617444e-7 6.145195e-7 4.382206e-7""".split()
BLENDED = """0.04377666 0.02842796 0.01828296 0.01161916 0.007274119 0.004465849 0.002670203 0.001537297 8.346550e-4 4.086460e-4
1.583750e-4""".split()  # K2.5's pairs 9 to 19, with beta_fast 32


def k2_frequencies(factor: float, beta_fast: float):
    yarn = replace(YARN, factor=factor, original_max_position_embeddings=4096, beta_fast=beta_fast)
    return rope_frequencies(small_config(qk_rope_head_dim=64, rope_theta=50000.0, rope_scaling=yarn))


def assert_frequencies(found_P, expected: list[str]):
    expected_P = np.array(expected, dtype=np.float64)
    assert_close(found_P[:, None], expected_P[:, None], 5e-7)  # a pair a row; seven digits are given


def test_frequencies_are_those_of_k2_instruct():
    assert_frequencies(k2_frequencies(32.0, 1.0), PLAIN + SLOWED_32)


def test_frequencies_are_those_of_k2_instruct_0905_and_thinking():
    assert_frequencies(k2_frequencies(64.0, 1.0), PLAIN + SLOWED_64)


def test_frequencies_are_those_of_k2_5():
    assert_frequencies(k2_frequencies(64.0, 32.0), PLAIN[:9] + BLENDED + SLOWED_64)


def test_yarn_slows_some_pairs_of_the_small_config_and_not_all():
    yarn_P, plain_P = (rope_frequencies(c) for c in (small_config(), small_config(rope_scaling=None)))
    assert (plain_P / yarn_P).tolist() == [1, 1, 32, 32, 32, 32]


def test_frequencies_equal_the_reference():
    for seed in range(40):
        found_P, expected_P = rope_frequencies(random_config(seed)), reference.rope_frequencies(random_config(seed))
        assert found_P.dtype == torch.float64
        assert_close(found_P[:, None], expected_P[:, None], 1e-14, f"seed {seed}")


def assert_rotation_equals_reference(dtype, limit: float):
    for seed in range(20):
        config = random_config(seed)
        x_HTR = numbers(3, 7, config.qk_rope_head_dim, seed=seed, dtype=dtype)
        angle_TP = (seed + np.arange(7))[:, None] * reference.rope_frequencies(config)
        found_HTR = rotate(x_HTR, *rotary_tables(config, seed, 7, dtype))
        assert found_HTR.dtype == dtype
        assert_close(found_HTR, reference.rotate(as_float64(x_HTR), angle_TP), limit, f"seed {seed}")


def test_rotation_equals_the_reference_in_float64():
    assert_rotation_equals_reference(torch.float64, 1e-10)


def test_rotation_equals_the_reference_in_float32():
    assert_rotation_equals_reference(torch.float32, 1e-5)


def test_rotation_of_bfloat16_rounds_once():
    assert_rotation_equals_reference(torch.bfloat16, 2**-8 + 1e-6)  # one rounding to 8 bits, and the float32 product


def test_neighbours_are_a_pair():
    quarter = torch.zeros(1, 2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)  # cos and sin of 90 degrees
    found_TR = rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64), *quarter)
    assert found_TR.tolist() == [[-2.0, 1.0, -4.0, 3.0]]


def test_rotation_keeps_the_length_of_every_pair():
    config = small_config()
    x_TR = numbers(9, config.qk_rope_head_dim)
    turned_TR = rotate(x_TR, *rotary_tables(config, 100, 9, torch.float64))
    assert_close(turned_TR.unflatten(-1, (-1, 2)).norm(dim=-1), x_TR.unflatten(-1, (-1, 2)).norm(dim=-1), 1e-14)


def test_position_zero_turns_nothing():
    config, x_TR = small_config(), numbers(1, 12)
    assert_same(rotate(x_TR, *rotary_tables(config, 0, 1, torch.float64)), x_TR)


def test_a_rotated_product_depends_on_the_difference_of_positions_only():
    config = small_config()
    q_TR, k_TR = numbers(1, 12, seed=1), numbers(1, 12, seed=2)

    def product(at_q: int, at_k: int):
        tables = (rotary_tables(config, at, 1, torch.float64) for at in (at_q, at_k))
        turned_q_TR, turned_k_TR = (rotate(x_TR, *table) for x_TR, table in zip((q_TR, k_TR), tables))
        return turned_q_TR @ turned_k_TR.T

    for shift in (1, 10, 1000, 131000):
        assert_close(product(5 + shift, 2 + shift), product(5, 2), 1e-9 if shift > 1000 else 1e-12, f"shift {shift}")
    assert abs(float(product(5, 2) - product(5, 3))) > 1e-2  # and it does depend on it


def test_angles_at_the_end_of_the_context_are_good_to_1e_minus_10():
    frequencies_P = k2_frequencies(32.0, 1.0)
    exact_P = np.longdouble(131071) * frequencies_P.numpy().astype(np.longdouble)
    for found_TP, exact in zip(rope_angles(frequencies_P, 131071, 1), (np.cos(exact_P), np.sin(exact_P))):
        assert found_TP.dtype == torch.float64
        largest = float(np.max(np.abs(found_TP[0].numpy() - exact)))
        assert largest <= 1e-10, f"largest absolute error {largest:.3g}; float64 angles of 131071 radians are good to 1.5e-11"


def test_tables_of_a_chunk_are_rows_of_the_whole_table():
    frequencies_P = rope_frequencies(small_config())
    for whole_TP, chunk_TP in zip(rope_angles(frequencies_P, 0, 20), rope_angles(frequencies_P, 7, 5)):
        assert_same(chunk_TP, whole_TP[7:12])


def test_frequencies_survive_the_meta_device_and_any_dtype():
    config = small_config()
    with torch.device("meta"):
        assert_same(rope_frequencies(config), rope_frequencies(config).cpu())
        frequencies_P = rope_frequencies(config)
    assert_same(frequencies_P, rope_frequencies(config))
    assert_same(random_model(config, 0, torch.bfloat16).model.frequencies_P, rope_frequencies(config))
