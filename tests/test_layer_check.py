"""check-layer: right weights pass in every dtype, each mistake is told, and what is missing is left out or asked for."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from small import random_model, small_config

import k2
from k2 import layer_check
from k2.__main__ import MINI, main
from k2.checkpoint import INDEX, dense_weight, linear_from
from k2.layer_check import LIMITS, Weights, e4m3, results
from k2.part import Part

FORMATS = ["fp32", "bf16", "fp8", "int4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small checkpoint in each format."""
    folder = tmp_path_factory.mktemp("saved")
    model = random_model(small_config(hidden_size=160, moe_intermediate_size=32, n_routed_experts=11))
    for name in FORMATS:
        k2.save(model, folder / name, format=name)
    return folder.joinpath


def kept(source: Path, target: Path, part: Part, change=lambda tensors: None) -> Path:
    """The part of a checkpoint, in one shard."""
    held = {name: t.clone() for path in source.glob("*.safetensors") for name, t in safetensors.torch.load_file(path).items() if part.takes(name)}
    change(held)
    target.mkdir()
    safetensors.torch.save_file(held, target / "part.safetensors")
    (target / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(held, "part.safetensors")}))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def check(folder, layer=1, experts=None, tokens=5, seed=0):
    return list(results(k2.Checkpoint(folder, partial=True), layer, experts, tokens, seed))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_right_layer_is_within_rounding_in_every_dtype(saved, format, layer):
    found = check(saved(format), layer)
    assert all(result.error <= result.limit for result in found), found
    names = {0: {"attention", "dense feed-forward", "whole layer"}, 2: {"attention", "router", "shared expert", "expert 0", "expert 1", "whole layer"}}[layer]
    assert {result.what for result in found} == names
    assert {result.dtype for result in found if result.what == "attention"} == set(LIMITS)
    assert {result.dtype for result in found if result.what in ("router", "whole layer")} == {"float64", "float32"}


def test_moonlights_kind_of_layer_passes_too(tmp_path):
    k2.save(random_model(small_config(q_lora_rank=None, n_shared_experts=2, rope_scaling=None)), tmp_path / "c")
    assert all(result.error <= result.limit for result in check(tmp_path / "c", 2))


@pytest.mark.parametrize("format", FORMATS)
def test_the_references_weights_are_dequantised_apart_and_equal(saved, format):
    checkpoint = k2.Checkpoint(saved(format))
    weights = Weights(checkpoint)
    for name in ("model.layers.1.self_attn.kv_b_proj", "model.layers.1.mlp.experts.3.down_proj", "model.layers.0.mlp.up_proj"):
        ours = dense_weight(linear_from(checkpoint, name, torch.float64, torch.device("cpu"))).numpy()
        np.testing.assert_array_equal(weights[f"{name}.weight"], ours, name)
    assert len(weights) == len(checkpoint.weight_map) and set(weights) == set(checkpoint.weight_map)


def test_every_e4m3_code_is_the_number_that_torch_says():
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    finite = np.isfinite(expected)
    assert (~finite).sum() == 2
    np.testing.assert_array_equal(e4m3(codes)[finite], expected[finite])


# ---- what is not right ----

MISTAKES = {
    "the latent norm left out": ("k2.norm.RMSNorm.forward", lambda self, x_TI: x_TI),
    "another rotation": ("k2.attention.rotate", lambda x_TR, cos_TP, sin_TP: x_TR),
    "gate and up swapped": ("k2.layer_check.reference.swiglu", lambda weights, name, x_TD: ((u := x_TD @ weights[f"{name}.up_proj.weight"].T) * layer_check.reference.sigmoid(u) * (x_TD @ weights[f"{name}.gate_proj.weight"].T)) @ weights[f"{name}.down_proj.weight"].T),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_by_the_part_that_has_it(saved, monkeypatch, mistake):
    monkeypatch.setattr(*MISTAKES[mistake])
    wrong = {result.what for result in check(saved("fp32")) if not result.error <= result.limit}
    assert wrong and ("attention" in wrong) == (mistake != "gate and up swapped"), wrong


@pytest.mark.parametrize("tensor, what", [("self_attn.o_proj", "attention"), ("mlp.shared_experts.up_proj", "shared expert"), ("mlp.experts.1.down_proj", "expert 1")])
def test_wrong_scales_are_told_by_the_part_that_has_them(saved, monkeypatch, tensor, what):
    plain = Weights.fp8

    def wrong(self, name):
        return plain(self, name) * (1.5 if tensor in name else 1.0)

    monkeypatch.setattr(Weights, "fp8", wrong)
    wrong = {result.what for result in check(saved("fp8")) if not result.error <= result.limit}
    assert what in wrong and wrong <= {what, "whole layer"}


def test_not_a_number_is_no_small_error(saved, tmp_path):
    def hurt(tensors):
        tensors["model.layers.1.mlp.experts.0.down_proj.weight"].view(-1)[0] = torch.nan

    found = check(kept(saved("fp32"), tmp_path / "p", Part(None, {1: (0,)}), hurt))
    assert found and all(result.error == float("inf") for result in found)


def test_a_shard_of_zeros_is_no_layer(saved, tmp_path):
    def empty(tensors):
        for name, tensor in tensors.items():
            tensors[name] = torch.zeros_like(tensor)

    found = check(kept(saved("fp8"), tmp_path / "p", Part((1,), None, ("attention",)), empty))
    assert found and all(result.error == float("inf") for result in found)


# ---- a part ----


@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize("part, names", [
    (Part((1,), None, ("attention",)), {"attention"}),
    (Part(None, {1: (3, 7)}), {"expert 3", "expert 7"}),
    (Part((1,), {1: (4,)}), {"attention", "router", "shared expert", "expert 4"}),
    (Part((1,)), {"attention", "router", "shared expert", "expert 0", "expert 1", "whole layer"}),
])  # fmt: skip
def test_a_part_is_checked_as_far_as_it_goes(saved, tmp_path, format, part, names):
    found = check(kept(saved(format), tmp_path / "p", part))
    assert {result.what for result in found} == names and all(result.error <= result.limit for result in found)


def test_a_part_is_computed_as_the_whole_is(saved, tmp_path):
    part = check(kept(saved("fp8"), tmp_path / "p", Part((1,), None, ("attention",))))
    assert part == [result for result in check(saved("fp8")) if result.what == "attention"]


def test_experts_are_made_one_at_a_time(saved, monkeypatch):
    alive, most = [], []
    plain = layer_check.expert_of

    class Counted:
        def __init__(self, expert):
            self.expert = expert
            alive.append(1)
            most.append(len(alive))

        def __call__(self, x):
            return self.expert(x)

        def __del__(self):
            alive.pop()

    monkeypatch.setattr(layer_check, "expert_of", lambda *a: Counted(plain(*a)))
    assert [result.what for result in check(saved("fp8"))][-1] == "whole layer"
    assert max(most) <= 2, "the one that computes, and the one before it until it is let go"


def test_named_experts_are_checked_and_others_not(saved):
    assert {result.what for result in check(saved("fp8"), experts=(5,))} == {"attention", "router", "shared expert", "expert 5", "whole layer"}


@pytest.mark.parametrize("layer, experts, words", [(3, None, "found layer 3; expected 0 to 2"), (-1, None, "found layer -1"), (1, (11,), "expert 11 of layer 1 is not here. Fetch it"), (0, (1,), "layer 0 is dense and has no routed experts; expected a layer from 1 on")])
def test_what_is_not_there_is_refused(saved, layer, experts, words):
    with pytest.raises(k2.K2Error, match=words):
        check(saved("fp8"), layer, experts)


def test_a_layer_of_which_nothing_is_there_is_refused(saved, tmp_path):
    with pytest.raises(k2.K2Error, match="holds nothing whole of layer 2. Fetch a part of it"):
        check(kept(saved("fp8"), tmp_path / "p", Part((1,), None, ("attention",))), 2)


# ---- the command ----


def test_the_shipped_model_passes_and_the_errors_are_printed(capfd):
    assert main(["check-layer", str(MINI), "2", "--experts", "47", "--tokens", "3", "--seed", "5"]) == 0
    out, err = capfd.readouterr()
    assert err == "" and len(out.splitlines()) == 13 and all("relative error" in line and "NO" not in line for line in out.splitlines())
    assert out.splitlines()[0].startswith("attention            float64  relative error ") and out.splitlines()[0].endswith("e-16, limit 1e-10") or "e-15" in out


def test_an_infinite_norm_has_its_line_and_no_warning(saved, tmp_path, capfd, recwarn):
    def spoil(tensors):
        tensors["model.layers.1.input_layernorm.weight"][3] = torch.inf

    folder = kept(saved("fp32"), tmp_path / "p", Part((1,), None, ("attention",)), spoil)
    assert main(["check-layer", str(folder), "1"]) == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1 and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)], err


def test_the_help_says_what_it_cannot_see(capfd):
    with pytest.raises(SystemExit):
        main(["check-layer", "--help"])
    assert "wrong but finite ones pass" in " ".join(capfd.readouterr().out.split())


def test_a_wrong_layer_ends_with_status_2(capfd, monkeypatch):
    monkeypatch.setattr("k2.attention.rotate", lambda x_TR, cos_TP, sin_TP: x_TR)
    assert main(["check-layer", str(MINI), "1"]) == 2
    out, err = capfd.readouterr()
    assert "NO" in out.splitlines()[0] and "attention in float64 differs by" in err and "--verify" in err


@pytest.mark.parametrize("arguments, words", [(["1", "--tokens", "0"], "--tokens, --seed: found 0"), (["1", "--tokens", "100000000"], "expected 1 to 4096"), (["1", "--experts", "x"], "--experts x: expected numbers"), (["9"], "found layer 9"), (["one"], "invalid int value")])
def test_flags_that_make_no_sense_are_one_line(capfd, arguments, words):
    assert main(["check-layer", str(MINI), *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1
