"""What is recorded is what was computed: against plain calls of the parts, and without a trace in the model."""

import sys

import numpy as np
import pytest
import torch
from small import assert_close, numpy_weights, random_ids, random_model, recorded_choices, reference_logits, small_config

import k2
from k2 import reference
from k2.offload import load
from k2.recording import DECODED, LAYER, Tape, calls, layer_and_part, numpy_recording, place, torch_recording

TOKENS = 20


@pytest.fixture(scope="module")
def model():
    return random_model(small_config(), 0, torch.float64)


@pytest.fixture(scope="module")
def ids():
    return random_ids(small_config(), TOKENS, seed=1)


@pytest.fixture(scope="module")
def ours(model, ids):
    return torch_recording("torch", model, k2.LatentCache(model.config), ids.tolist())


def test_every_tensor_of_a_token_has_a_row_in_order_and_logits_are_the_models(model, ids, ours):
    with torch.inference_mode():
        assert_close(ours.tensors["lm_head"].values, model(ids), 1e-10)
    expected = {"model.embed_tokens", "model.norm", "lm_head"} | {f"model.layers.{i}.{part}".rstrip(".") for i in range(3) for part in LAYER if part not in ("mlp.experts", "self_attn.q_proj")}
    expected -= {f"model.layers.0.{part}" for part in LAYER if part.startswith("mlp.")}
    found = {name for name in ours.tensors if layer_and_part(name)[2] < 0}
    assert found == expected
    assert all(ours.tensors[name].tokens.tolist() == list(range(TOKENS)) for name in found)


def test_an_experts_rows_are_those_of_the_tokens_that_chose_it(model, ids, ours):
    with recorded_choices(model) as choices, torch.inference_mode():
        model(ids)
    for layer in (1, 2):
        for e in range(11):
            tokens = np.flatnonzero((choices[f"model.layers.{layer}.mlp"] == e).any(-1))
            rows = ours.tensors.get(f"model.layers.{layer}.mlp.experts.{e}")
            assert (rows.tokens.tolist() if rows else []) == tokens.tolist()
            if rows:
                x_TD = torch.from_numpy(ours.tensors[f"model.layers.{layer}.post_attention_layernorm"].values[tokens])
                with torch.inference_mode():
                    assert_close(rows.values, model.model.layers[layer].mlp.experts[e](x_TD), 1e-10)


def test_numpy_records_the_same_names_and_its_own_numbers(model, ids, ours):
    weights, config = numpy_weights(model), model.config
    theirs = numpy_recording("numpy", config, weights, ids.tolist())
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert np.array_equal(theirs.tensors["lm_head"].values, reference_logits(model, ids))
    x_TD = weights["model.embed_tokens.weight"][ids]
    normed_TD = reference.rms_norm(x_TD, weights["model.layers.0.input_layernorm.weight"], config.rms_norm_eps)
    attended_TD = reference.attention(config, weights, "model.layers.0.self_attn", normed_TD)
    second_TD = reference.rms_norm(x_TD + attended_TD, weights["model.layers.0.post_attention_layernorm.weight"], config.rms_norm_eps)
    by_hand = {
        "model.embed_tokens": x_TD,
        "model.layers.0.input_layernorm": normed_TD,
        "model.layers.0.self_attn.q_a_proj": normed_TD @ weights["model.layers.0.self_attn.q_a_proj.weight"].T,
        "model.layers.0.self_attn.q_b_proj": reference.queries(config, weights, "model.layers.0.self_attn", normed_TD),
        "model.layers.0.self_attn.o_proj": attended_TD,
        "model.layers.0.post_attention_layernorm": second_TD,
        "model.layers.0.mlp": reference.swiglu(weights, "model.layers.0.mlp", second_TD),
        "model.layers.0": reference.decoder_layer(config, weights, 0, x_TD),
    }
    for name, values in by_hand.items():
        assert np.array_equal(theirs.tensors[name].values, values), name


@pytest.mark.parametrize("changes", [{"q_lora_rank": None, "rope_scaling": None}, {"n_shared_experts": 2}, {"first_k_dense_replace": 0}])
def test_other_members_of_the_family_are_recorded_alike(changes):
    model = random_model(small_config(**changes), 2, torch.float64)
    ids = random_ids(model.config, TOKENS, seed=2).tolist()
    ours = torch_recording("torch", model, k2.LatentCache(model.config), ids)
    theirs = numpy_recording("numpy", model.config, numpy_weights(model), ids)
    assert ours.tensors.keys() == theirs.tensors.keys() and ("model.layers.0.self_attn.q_proj" in ours.tensors) == ("q_lora_rank" in changes)
    for name, rows in theirs.tensors.items():
        assert_close(ours.tensors[name].values, rows.values, 1e-10, name)


def test_heads_lie_side_by_side(model, ids):
    tape = Tape()
    tape.keep_heads("x", torch.arange(24).reshape(2, 3, 4))  # two heads, three tokens, four numbers
    tape.end_call(5)
    rows = tape.tensors()["x"]
    assert rows.tokens.tolist() == [5, 6, 7] and rows.values.tolist()[0] == [0, 1, 2, 3, 12, 13, 14, 15]


def test_nothing_is_left_behind(model, ids, ours):
    profile = sys.getprofile()
    torch_recording("torch", model, k2.LatentCache(model.config), ids.tolist())
    numpy_recording("numpy", model.config, numpy_weights(model), ids.tolist())
    assert sys.getprofile() is profile
    for module in model.modules():
        assert not module._forward_hooks and "fetch" not in vars(module)
    with pytest.raises(k2.K2Error):
        torch_recording("torch", model, k2.LatentCache(model.config), [10**6] * TOKENS)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_store_that_guesses_is_recorded_as_if_all_experts_were_resident(tmp_path, ids, model, ours):
    k2.save(model, tmp_path / "c", format="fp32")
    stored = load(tmp_path / "c", dtype=torch.float32, ram=330_000)
    resident = load(tmp_path / "c", dtype=torch.float32)
    found, expected = (torch_recording("torch", m, k2.LatentCache(m.config), ids.tolist()) for m in (stored, resident))
    assert found.tensors.keys() == expected.tensors.keys() and stored.model.layers[1].mlp.experts.store.statistics.misses > 0
    for name, rows in expected.tensors.items():
        assert np.array_equal(found.tensors[name].values, rows.values), name


def test_the_calls_are_two_chunks_and_single_tokens():
    for tokens in (7, 8, 20, 101):
        read = calls(tokens)
        assert [t for part in read for t in range(tokens)[part]] == list(range(tokens))
        assert len(read) == 2 + DECODED and min(part.stop - part.start for part in read[:2]) >= 2


def test_names_sort_as_a_token_meets_them():
    names = ["lm_head", "model.norm", "model.layers.10", "model.layers.2.mlp", "model.layers.2.mlp.experts.10", "model.layers.2.mlp.experts.9",
             "model.layers.2.mlp.gate.ids", "model.layers.2.self_attn.q_a_proj", "model.layers.2.input_layernorm", "model.embed_tokens"]  # fmt: skip
    assert sorted(names, key=place) == names[2:][::-1] + ["model.norm", "lm_head"]
