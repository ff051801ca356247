"""One decoder layer: two norms, two residuals, and which of them holds experts."""

import pytest
import torch
from small import as_float64, assert_close, assert_same, numbers, numpy_weights, random_config, random_model, randomised, rotary_tables, small_config

from k2 import reference
from k2.decoder import DecoderLayer
from k2.expert import Expert
from k2.moe import MoE


@torch.no_grad()
def assert_equals_reference(dtype, limit: float):
    for seed in range(20):
        config = random_config(seed)
        x_TD, tables = numbers(7, config.hidden_size, seed=seed, dtype=dtype), rotary_tables(config, 0, 7, dtype)
        for i in (0, 2):  # layer 0 is dense in two of three configs, layer 2 never
            layer = randomised(DecoderLayer(config, i), seed, dtype)
            expected_TD = reference.decoder_layer(config, numpy_weights(layer, f"model.layers.{i}."), i, as_float64(x_TD))
            assert_close(layer(x_TD, *tables), expected_TD, limit, f"seed {seed}, layer {i}")


def test_decoder_layer_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_decoder_layer_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


@pytest.mark.parametrize("dense", [0, 1, 2, 3])
def test_the_first_layers_are_dense_and_all_others_hold_experts(dense):
    layers = random_model(small_config(first_k_dense_replace=dense)).model.layers
    assert [type(layer.mlp) for layer in layers] == [Expert] * dense + [MoE] * (3 - dense)


@torch.no_grad()
def test_halves_that_say_nothing_leave_the_residual_stream_alone():
    model = random_model(small_config())
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    x_TD, tables = numbers(2, 5, 48, dtype=torch.float32), rotary_tables(small_config(), 0, 5, torch.float32)
    for layer in model.model.layers:
        assert_same(layer(x_TD, *tables), x_TD)


@torch.no_grad()
def test_batch_axes_change_nothing():
    layer = random_model(small_config(), 0, torch.float64).model.layers[1]
    x_TD, tables = numbers(2, 3, 5, 48), rotary_tables(small_config(), 0, 5, torch.float64)
    alone_TD = torch.stack([layer(sequence, *tables) for sequence in x_TD.flatten(0, 1)]).unflatten(0, (2, 3))
    assert_close(layer(x_TD, *tables), alone_TD, 1e-12)
