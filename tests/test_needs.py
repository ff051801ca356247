"""K2's facts, from the config alone. Which configs were read and which are derived, each config says in _provenance."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from small import random_model, small_config

import k2
from k2.checkpoint import FORMATS
from k2.needs import FAMILY, family_config, formats_in_memory, in_format, needs, own_format, stale_buffers
from k2.offload import SMALL, ExpertStore, weight_bytes

INSTRUCT = needs(family_config("instruct"), "fp8")  # read: the copy of moonshotai's own config.json


def test_the_released_file_has_139644_tensors_of_1029173256720_bytes():
    stale, size = stale_buffers(family_config("instruct"))
    assert (INSTRUCT.tensors + stale, INSTRUCT.disk + size) == (139_644, 1_029_173_256_720)


def test_a_token_of_context_takes_70272_bytes():
    assert INSTRUCT.cache_per_token == 70_272
    assert {needs(family_config(name), "bf16").cache_per_token for name in FAMILY if name not in ("moonlight", "mini")} == {70_272}


def test_there_are_23040_experts_of_44040192_weights_and_a_token_asks_for_480():
    assert INSTRUCT.experts == 23_040 and needs(family_config("instruct"), "bf16").expert == 2 * 44_040_192
    assert needs(family_config("instruct"), "bf16").routed == 480 * 2 * 44_040_192


def test_routed_experts_are_21_14_gigabytes_a_token_in_fp8_and_11_89_in_int4():
    assert INSTRUCT.routed == 480 * 44_050_944 and round(INSTRUCT.routed / 1e9, 2) == 21.14
    # Thinking's config is derived: its INT4 is K2.5's, which was read.
    assert round(needs(family_config("thinking"), "int4").routed / 1e9, 2) == round(needs(family_config("k2.5"), "int4").routed / 1e9, 2) == 11.89


def test_thinking_takes_594_2_gigabytes():
    found = needs(family_config("thinking"), "int4")  # derived; the advertised size agrees
    assert found.disk == 594_205_904_896 and found.tensors == 208_215


def test_total_and_active_weights_are_told_apart():
    assert (INSTRUCT.weights, INSTRUCT.active) == (1_026_408_232_448, 32_861_500_928)
    bf16 = needs(family_config("instruct"), "bf16")
    assert (bf16.weights, bf16.active, bf16.disk, bf16.tensors) == (1_026_408_232_448, 32_861_500_928, 2_052_816_510_976, 69_975)


def test_the_components_are_the_specs():
    assert INSTRUCT.embedding == 2_348_810_240 and INSTRUCT.rest["head"] == 2_348_810_240 + 14_336
    assert INSTRUCT.rest["dense"] == 396_458_496 and INSTRUCT.rest["shared-expert"] == 2_643_056_640
    assert INSTRUCT.rest["router"] == 330_301_440 + 92_160
    assert INSTRUCT.rest["attention"] + INSTRUCT.rest["norm"] == 6_169_957_728 + 1_998_848


def test_base_and_0905_are_instruct_but_for_the_context():
    # both derived
    for name in ("base", "instruct-0905"):
        assert needs(family_config(name), "fp8") == INSTRUCT
        assert stale_buffers(family_config(name)) == (61, 6832)


@pytest.mark.parametrize("name", [name for name in FAMILY if FAMILY[name][0]])
def test_a_derived_config_says_so(name):
    path = Path(k2.__file__).parent / "configs" / f"{FAMILY[name][0]}.json"
    provenance = json.loads(path.read_text())["_provenance"]
    assert ("DERIVED" in provenance) == (name in ("base", "instruct-0905", "thinking")), provenance


def test_moonlight_is_31_9_gigabytes_and_mini_is_what_lies_there():
    assert needs(family_config("moonlight"), "bf16").disk == 31_920_223_744
    held = k2.Checkpoint(Path(k2.__file__).parent / "mini")
    found = needs(held.config, "fp8")
    assert found.disk == sum(entry["data_offsets"][1] - entry["data_offsets"][0] for header in held.headers.values() for entry in header.values())
    assert found.tensors == len(held.weight_map)


@pytest.mark.parametrize("format", ["fp8", "int4", "bf16", "fp32"])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_shared_experts": 2}, {"first_k_dense_replace": 2, "num_hidden_layers": 5}])
def test_what_is_needed_is_what_a_saved_checkpoint_takes(tmp_path, format, changes):
    model = random_model(small_config(hidden_size=160, moe_intermediate_size=32, n_routed_experts=5, num_experts_per_tok=2, **changes))
    k2.save(model, tmp_path / "c", format=format)
    held = k2.Checkpoint(tmp_path / "c")
    found, (routed, rest) = needs(held.config, format), weight_bytes(held, None)
    small = sum(end - begin for header in held.headers.values() for name, entry in header.items() if ".mlp.experts." in name and name.endswith(SMALL) for begin, end in [entry["data_offsets"]])
    assert found.tensors == len(held.weight_map)
    assert (found.expert * found.experts, sum(found.rest.values())) == (routed + small, rest - small), "the store keeps the experts' scales for good, and counts them with the rest"
    assert found.disk == routed + rest + found.embedding and found.routed * 5 == (routed + small) * 2
    assert found.weights == sum(t.numel() for t in model.state_dict().values())


def test_an_expert_takes_a_slot_of_its_weights_and_a_little_more(tmp_path):
    k2.save(random_model(small_config()), tmp_path / "c", format="fp8")
    held = k2.Checkpoint(tmp_path / "c")
    store = ExpertStore(held, 10**6)
    assert 0 < store.ram.rooms[0].numel() - needs(held.config, "fp8").expert < 3 * 2 * 4096
    store.shards.close()


def test_small_models_are_widened_on_a_cpu_and_large_ones_stay_as_stored():
    assert [formats_in_memory(family_config(name)) for name in ("mini", "instruct", "thinking", "moonlight")] == [(f, f) for f in ("fp32", "fp8", "int4", "bf16")]
    mixed = needs(family_config("instruct"), "fp8", "bf16")
    assert mixed.rest == needs(family_config("instruct"), "bf16").rest and (mixed.routed, mixed.expert) == (INSTRUCT.routed, INSTRUCT.expert)
    assert own_format(replace(family_config("moonlight"), torch_dtype="float32")) == "fp32"


def test_a_format_that_does_not_divide_and_a_name_of_nobody_are_refused(tmp_path):
    with pytest.raises(k2.K2Error, match="int4: packs groups of 32"):
        needs(small_config(), "int4")
    with pytest.raises(k2.K2Error, match="kimi: expected one of instruct, instruct-0905"):
        family_config("kimi")
    (tmp_path / "config.json").write_text(json.dumps(small_config().to_dict()))
    assert family_config(str(tmp_path)) == family_config(str(tmp_path / "config.json")) == small_config()


def test_every_format_is_one_that_save_writes():
    assert {own_format(in_format(family_config("moonlight"), format)) for format in FORMATS} == set(FORMATS)

