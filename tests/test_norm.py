"""RMSNorm against the reference, at every scale where its eps matters and where it does not."""

import numpy as np
import torch
from small import as_float64, assert_close, assert_gradients_are_right, numbers

from k2 import reference
from k2.norm import RMSNorm


def random_norm(width: int, eps: float, seed: int, dtype):
    norm = RMSNorm(width, eps)
    norm.weight.data = 1 + 0.2 * numbers(width, seed=seed)
    return norm.to(dtype)


def assert_equals_reference(dtype, limit: float):
    for seed in range(24):
        width, eps = 1 + 7 * seed, (1e-6, 1e-5)[seed % 2]
        norm = random_norm(width, eps, seed, dtype)
        # Rows from 1e-4 to 1e3: the first are about as small as sqrt(eps), so that a wrong eps shows.
        x_TI = (numbers(8, width, seed=seed) * torch.logspace(-4, 3, 8, dtype=torch.float64)[:, None]).to(dtype)
        found_TI = norm(x_TI)
        assert found_TI.dtype == dtype
        assert_close(found_TI, reference.rms_norm(as_float64(x_TI), as_float64(norm.weight), eps), limit, f"width {width}, eps {eps}")


def test_norm_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_norm_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


def test_norm_of_bfloat16_is_wrong_by_two_roundings_at_most():
    assert_equals_reference(torch.bfloat16, 2 * 2**-8)  # 8 significant bits: each rounding moves a number by 2^-8 at most


def test_leading_axes_are_normalised_row_by_row():
    norm, x_TI = random_norm(13, 1e-6, 0, torch.float64), numbers(2, 3, 5, 13)
    rows = torch.stack([norm(row[None]) for row in x_TI.reshape(-1, 13)]).reshape(2, 3, 5, 13)
    assert_close(norm(x_TI), rows, 1e-14)


def test_norm_of_a_worked_example():
    norm = RMSNorm(2, 0.0).double()
    norm.weight.data = torch.tensor([2.0, 10.0], dtype=torch.float64)
    found = norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64))  # RMS sqrt((9 + 16) / 2)
    assert_close(found, np.array([[6.0, 40.0]]) / np.sqrt(12.5), 1e-15)


def test_gradients_of_norm():
    assert_gradients_are_right(random_norm(7, 1e-6, 1, torch.float64), numbers(3, 7))
