"""SwiGLU at its three widths."""

import torch
from small import as_float64, assert_close, assert_gradients_are_right, assert_same, numbers, numpy_weights, random_config, random_model, randomised, small_config

from k2 import reference
from k2.expert import Expert


def assert_equals_reference(dtype, limit: float):
    for seed in range(20):
        config = random_config(seed)
        x_MD = numbers(5, config.hidden_size, seed=seed, dtype=dtype)
        for width in (config.intermediate_size, config.moe_intermediate_size, 1):
            expert = randomised(Expert(config.hidden_size, width), seed, dtype)
            assert_close(expert(x_MD), reference.swiglu(numpy_weights(expert, "mlp."), "mlp", as_float64(x_MD)), limit, f"seed {seed}, width {width}")


def test_expert_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_expert_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


def test_one_class_serves_at_three_widths():
    widths = {name: expert.gate_proj.out_features for name, expert in random_model(small_config(n_shared_experts=2)).named_modules() if isinstance(expert, Expert)}
    assert widths["model.layers.0.mlp"] == 72
    assert widths["model.layers.1.mlp.shared_experts"] == 2 * 26
    assert widths["model.layers.1.mlp.experts.10"] == 26
    assert len(widths) == 1 + 2 * (1 + 11)


def test_the_gate_passes_through_silu_and_the_up_projection_does_not():
    expert = Expert(1, 1).double()
    for projection, weight in ((expert.gate_proj, 2.0), (expert.up_proj, 3.0), (expert.down_proj, 5.0)):
        projection.weight.data = torch.tensor([[weight]], dtype=torch.float64)
    found_MD = expert(torch.tensor([[1.0]], dtype=torch.float64))
    assert_close(found_MD, [[5 * (2 / (1 + 2.718281828459045**-2)) * 3]], 1e-14)


@torch.no_grad()
def test_a_power_of_two_moved_from_down_to_up_changes_no_bit():
    expert, x_MD = randomised(Expert(48, 72)), numbers(5, 48, dtype=torch.float32)
    expected_MD = expert(x_MD)
    expert.up_proj.weight.data *= 4
    expert.down_proj.weight.data /= 4
    assert_same(expert(x_MD), expected_MD)


def test_leading_axes_are_rows():
    expert, x_MD = randomised(Expert(48, 72), 0, torch.float64), numbers(2, 3, 5, 48)
    assert_close(expert(x_MD), expert(x_MD.flatten(0, 2)).unflatten(0, (2, 3, 5)), 1e-14)


def test_gradients_of_expert():
    expert = randomised(Expert(5, 7), 0, torch.float64)
    assert_gradients_are_right(expert, numbers(4, 5))
