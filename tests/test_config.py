"""config.json: the family's files say what the released models are, and whatever is not certain is refused by name."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import k2
from k2.checkpoint import expected_tensors
from k2.config import FP8_CONFIG, IMPLEMENTED, INT4_CONFIG

CONFIGS = Path(k2.__file__).parent / "configs"
FAMILY = sorted(path.name for path in CONFIGS.glob("*.json"))
K2_FILES = [name for name in FAMILY if name.startswith("kimi-k2")]
DISTINCT = ["kimi-k2-instruct.json", "kimi-k2-thinking.json", "kimi-k2.5.json"]  # Base and 0905 have Instruct's tensors


def raw(name="kimi-k2-instruct.json") -> dict:
    return json.loads((CONFIGS / name).read_text())


def changed(key: str, value, name="kimi-k2-instruct.json") -> dict:
    """The raw config with one value replaced; a dotted key reaches into a nested object."""
    config = raw(name)
    *parents, last = key.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    place[last] = value
    return config


def refusal(config: dict) -> str:
    with pytest.raises(k2.K2Error) as caught:
        k2.K2Config.from_dict(config, "config.json")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def member(name: str) -> k2.K2Config:
    return k2.K2Config.from_json(CONFIGS / name)


@functools.cache
def tensors(name: str) -> dict:
    """What a family file implies; 140,000 entries are made once."""
    return expected_tensors(member(name))


@functools.cache
def weights(name: str) -> dict[str, int]:
    """{tensor: how many weights it holds}: scales and shapes hold none, a packed word holds eight."""
    return {
        tensor: math.prod(spec.shape) * (8 if tensor.endswith("weight_packed") else 1)
        for tensor, spec in tensors(name).items()
        if not tensor.endswith(("weight_scale_inv", "weight_scale", "weight_shape"))
    }


def active_weights(name: str) -> int:
    """The weights that one token meets: of the routed experts, K per layer."""
    config, counts = member(name), weights(name)
    routed = sum(count for tensor, count in counts.items() if ".experts." in tensor)
    return sum(counts.values()) - routed + routed // config.n_routed_experts * config.num_experts_per_tok


# ---- the family's files ----


def test_the_family_is_these_six_files():
    assert FAMILY == [
        "kimi-k2-base.json", "kimi-k2-instruct-0905.json", "kimi-k2-instruct.json", "kimi-k2-thinking.json", "kimi-k2.5.json", "moonlight-16b-a3b-instruct.json",
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_file_loads_and_says_first_where_it_is_from(name):
    first = next(iter(raw(name)))
    assert first == "_provenance" and len(raw(name)[first]) > 100
    config = member(name)
    assert config.vocab_size == 163840 and config.bos_token_id == 163584


@pytest.mark.parametrize("name", ["kimi-k2-base.json", "kimi-k2-instruct-0905.json", "kimi-k2-thinking.json"])
def test_a_file_that_was_not_read_says_what_is_unconfirmed(name):
    provenance = raw(name)["_provenance"]
    assert "UNCONFIRMED" in provenance and "DERIVED" in provenance and "rms_norm_eps" in provenance


@pytest.mark.parametrize(
    "name, positions, factor, beta_fast, eps, eos, pad, stored",
    [
        ("kimi-k2-base.json", 131072, 32, 1, 1e-6, 163585, None, "fp8"),
        ("kimi-k2-instruct.json", 131072, 32, 1, 1e-6, 163585, None, "fp8"),
        ("kimi-k2-instruct-0905.json", 262144, 64, 1, 1e-6, 163585, None, "fp8"),
        ("kimi-k2-thinking.json", 262144, 64, 1, 1e-5, 163586, 163839, "int4"),
        ("kimi-k2.5.json", 262144, 64, 32, 1e-5, 163585, 163839, "int4"),
    ],
)
def test_the_members_of_k2_differ_in_these_facts(name, positions, factor, beta_fast, eps, eos, pad, stored):
    c = member(name)
    yarn = c.rope_scaling
    assert (c.max_position_embeddings, yarn.factor, yarn.beta_fast, c.rms_norm_eps) == (positions, factor, beta_fast, eps)
    assert (c.eos_token_id, c.pad_token_id, c.weight_format) == (eos, pad, stored)


@pytest.mark.parametrize("name", DISTINCT)
def test_every_k2_has_1026_billion_weights_of_which_a_token_meets_33(name):
    counts = weights(name)
    assert len(tensors(name)) == {"kimi-k2-instruct.json": 139_583}.get(name, 208_215)
    assert sum(counts.values()) == 1_026_408_232_448
    assert active_weights(name) == 32_861_500_928
    ends = sum(count for tensor, count in counts.items() if "embed_tokens" in tensor or "lm_head" in tensor)
    assert active_weights(name) - ends == 30_512_690_688


def test_base_and_0905_are_instruct_but_for_the_context():
    base, instruct, later = (member(f"kimi-k2-{name}.json") for name in ("base", "instruct", "instruct-0905"))
    assert base == instruct
    assert later == replace(instruct, max_position_embeddings=262144, rope_scaling=replace(instruct.rope_scaling, factor=64.0))


def test_the_weights_of_k2_lie_where_the_specification_counts_them():
    counts = weights("kimi-k2-instruct.json")

    def total(part):
        return sum(count for tensor, count in counts.items() if part in tensor)

    assert total(".experts.") == 1_014_686_023_680
    assert total("shared_experts.") == 2_642_411_520
    assert total(".self_attn.") - total(".self_attn.q_a_layernorm") - total(".self_attn.kv_a_layernorm") == 6_168_444_928
    assert total("layers.0.mlp.") == 396_361_728
    assert total("mlp.gate.weight") == 165_150_720
    assert total("e_score_correction_bias") == 23_040
    assert total("layernorm") == 999_424
    assert total("embed_tokens") == total("lm_head") == 1_174_405_120


def test_moonlight_has_16_billion_weights_plain_rope_and_no_query_rank():
    name = "moonlight-16b-a3b-instruct.json"
    config, expected = member(name), tensors(name)
    assert sum(weights(name).values()) == 15_960_110_208
    assert len(expected) == 5_317
    assert (config.q_lora_rank, config.rope_scaling, config.pad_token_id, config.quantization_config) == (None, None, None, None)
    assert config.softmax_scale == 192**-0.5
    # two independent reports: the released router biases are BF16
    assert "BF16" in expected["model.layers.1.mlp.gate.e_score_correction_bias"].dtypes


def test_only_moonlights_kind_of_file_may_leave_rope_scaling_out():
    config = raw()
    del config["rope_scaling"]
    assert "rope_scaling is missing" in refusal(config)


@pytest.mark.parametrize("name", K2_FILES)
def test_a_token_costs_70272_bytes_of_cache_in_bfloat16(name):
    c = member(name)
    latent = c.kv_lora_rank + c.qk_rope_head_dim
    full = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    assert (latent, full, round(full / latent, 1)) == (576, 20_480, 35.6)
    assert latent * c.num_hidden_layers * 2 == 70_272
    context = {131_072: 8.58, 262_144: 17.16}[c.max_position_embeddings]
    assert round(latent * c.num_hidden_layers * 2 * c.max_position_embeddings / 2**30, 2) == context


def test_the_softmax_scale_of_k2_carries_yarns_mscale_squared():
    scale = member("kimi-k2-instruct.json").softmax_scale
    assert scale == pytest.approx(192**-0.5 * (0.1 * math.log(32) + 1) ** 2, rel=1e-15)
    assert round(scale, 5) == 0.13086


# ---- what is refused ----

WRONG = [
    ("vocab_size", 0), ("vocab_size", -163840), ("vocab_size", 163840.5), ("vocab_size", "163840"), ("vocab_size", True), ("vocab_size", None),
    ("hidden_size", 0), ("hidden_size", [7168]), ("intermediate_size", -1), ("moe_intermediate_size", 0), ("num_hidden_layers", 0),
    ("num_hidden_layers", 10**9), ("first_k_dense_replace", -1), ("first_k_dense_replace", 62), ("num_attention_heads", 0),
    ("num_key_value_heads", 8), ("q_lora_rank", 0), ("q_lora_rank", "1536"), ("q_lora_rank", {}), ("kv_lora_rank", 0), ("qk_nope_head_dim", 0),
    ("qk_rope_head_dim", 63), ("v_head_dim", -128), ("n_routed_experts", 0), ("n_routed_experts", 10**9), ("n_shared_experts", 0),
    ("num_experts_per_tok", 0), ("num_experts_per_tok", 385), ("routed_scaling_factor", 0), ("routed_scaling_factor", math.nan), ("rms_norm_eps", 0),
    ("rms_norm_eps", 1.0), ("rms_norm_eps", math.inf), ("rope_theta", 1), ("rope_theta", 10**400), ("max_position_embeddings", 0),
    ("bos_token_id", 163840), ("eos_token_id", -1), ("eos_token_id", [163585, 163586]), ("pad_token_id", 163840), ("pad_token_id", {}),
    ("torch_dtype", "int8"), ("torch_dtype", 16),
    # another architecture
    ("hidden_act", "gelu"), ("attention_bias", True), ("attention_bias", 0), ("tie_word_embeddings", True), ("scoring_func", "softmax"),
    ("topk_method", "greedy"), ("norm_topk_prob", False), ("n_group", 8), ("topk_group", 4), ("moe_layer_freq", 2), ("num_nextn_predict_layers", 1),
    ("model_type", "llama"), ("model_type", None), ("model_type", ["kimi_k2"]),
    # another position scheme
    ("rope_scaling", "yarn"), ("rope_scaling", 32), ("rope_scaling", []), ("rope_scaling.type", "linear"), ("rope_scaling.type", "dynamic"),
    ("rope_scaling.factor", 0.5), ("rope_scaling.factor", "32"), ("rope_scaling.factor", math.nan), ("rope_scaling.mscale", 0.707),
    ("rope_scaling.original_max_position_embeddings", 0), ("rope_scaling.beta_fast", 0.5), ("rope_scaling.beta_slow", 0),
    ("rope_scaling.attention_factor", 1.0),
    # another weight format
    ("quantization_config", "fp8"), ("quantization_config", []), ("quantization_config.quant_method", "gptq"), ("quantization_config.fmt", "e5m2"),
    ("quantization_config.weight_block_size", [64, 64]), ("quantization_config.weight_block_size", None),
]  # fmt: skip


@pytest.mark.parametrize("key, value", WRONG, ids=lambda value: str(value)[:40])
def test_an_impossible_value_is_refused_and_its_key_named(key, value):
    message = refusal(changed(key, value))
    assert message.startswith("config.json: ") and all(part in message for part in key.split("."))


WEIGHTS = "quantization_config.config_groups.group_0.weights"


@pytest.mark.parametrize(
    "key, value, named",
    [
        (f"{WEIGHTS}.num_bits", 8, "num_bits"), (f"{WEIGHTS}.group_size", 128, "group_size"), (f"{WEIGHTS}.symmetric", False, "symmetric"),
        (f"{WEIGHTS}.strategy", "channel", "strategy"), (f"{WEIGHTS}.type", "float", "type"), ("quantization_config.format", "marlin", "format"),
        ("quantization_config.config_groups", {}, "quantization_config"), ("quantization_config.config_groups", [], "quantization_config"),
        ("quantization_config.config_groups", [1], "quantization_config"), ("quantization_config.config_groups.group_0", 4, "quantization_config"),
        (WEIGHTS, [4], "quantization_config"),
    ],
)  # fmt: skip
def test_an_int4_of_another_kind_is_refused_and_named(key, value, named):
    assert named in refusal(changed(key, value, "kimi-k2-thinking.json"))


@pytest.mark.parametrize("key", sorted(set(raw()) & (set(IMPLEMENTED) | set(k2.K2Config.__dataclass_fields__)) - {"quantization_config"}))
def test_no_key_that_decides_the_result_has_a_default(key):
    config = raw()
    del config[key]
    message = refusal(config)
    assert f"{key} is missing" in message


@pytest.mark.parametrize("key", ["type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"])
def test_no_key_of_rope_scaling_has_a_default(key):
    config = raw()
    del config["rope_scaling"][key]
    assert key in refusal(config)


@pytest.mark.parametrize("key", ["qk_layernorm", "sliding_window", "tensor_prefix", "Hidden_size", "_attn_implementation"])
def test_an_unknown_key_is_refused_and_named(key):
    assert f"unknown key {key}" in refusal(raw() | {key: 1})


def test_a_config_made_in_python_passes_the_same_gate():
    config = k2.K2Config.from_dict(raw())
    with pytest.raises(k2.K2Error, match="num_experts_per_tok is 385"):
        replace(config, num_experts_per_tok=385)


# ---- other spellings of the same model ----


@pytest.mark.parametrize("name", FAMILY)
def test_what_to_dict_writes_from_dict_reads_back_equal(name):
    config = member(name)
    written = json.loads(json.dumps(config.to_dict()))
    assert k2.K2Config.from_dict(written) == replace(config, tensor_prefix="")


@pytest.mark.parametrize("quantization", [None, FP8_CONFIG, INT4_CONFIG])
def test_the_formats_that_save_writes_are_formats_that_are_read(quantization):
    config = replace(k2.K2Config.from_dict(raw()), quantization_config=quantization)
    assert k2.K2Config.from_dict(config.to_dict()) == config


def test_k25s_text_part_is_read_from_text_config_and_every_name_gets_its_prefix():
    config, expected = member("kimi-k2.5.json"), tensors("kimi-k2.5.json")
    assert config.tensor_prefix == "language_model."
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.")) for name in expected)
    assert "language_model.model.layers.60.mlp.experts.383.down_proj.weight_packed" in expected


def test_k25_without_its_text_part_is_refused():
    config = raw("kimi-k2.5.json")
    del config["text_config"]
    assert "text_config" in refusal(config)


def test_a_text_part_that_is_no_k2_is_refused():
    assert "model_type" in refusal(changed("text_config.model_type", "llama", "kimi-k2.5.json"))


def test_the_provenance_may_stand_beside_text_config_or_in_it():
    config = raw("kimi-k2.5.json")
    config["text_config"]["_provenance"] = config.pop("_provenance")
    assert k2.K2Config.from_dict(config) == member("kimi-k2.5.json")


def in_transformers_5s_words(config: dict) -> dict:
    """What transformers 5 writes for the same model."""
    config = {key: value for key, value in config.items() if key not in ("scoring_func", "topk_method", "moe_layer_freq", "auto_map")}
    yarn = dict(config.pop("rope_scaling", None) or {"type": "default"})
    config["rope_parameters"] = {**yarn, "rope_type": yarn.pop("type"), "rope_theta": config.pop("rope_theta")}
    config["rope_parameters"].pop("type", None)
    config["dtype"] = config.pop("torch_dtype")
    return config | {"model_type": "deepseek_v3", "transformers_version": "5.23.0", "head_dim": 64, "rope_interleave": True}


@pytest.mark.parametrize("name", ["kimi-k2-instruct.json", "kimi-k2-thinking.json", "moonlight-16b-a3b-instruct.json"])
def test_transformers_5_and_the_released_file_say_the_same(name):
    assert k2.K2Config.from_dict(in_transformers_5s_words(raw(name))) == member(name)


def test_transformers_5s_words_open_no_door():
    config = in_transformers_5s_words(raw())
    assert "scoring_func" in refusal(config | {"scoring_func": "softmax"})
    assert "linear" in refusal(config | {"rope_parameters": {**config["rope_parameters"], "rope_type": "linear"}})
    assert "rope_theta" in refusal(config | {"rope_parameters": {**config["rope_parameters"], "rope_theta": None}})


# ---- the file itself ----


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"a": NaN', "\ufeff{}", "[" * 100_000], ids=range(7))
def test_a_file_that_is_no_json_object_is_refused_and_named(content, tmp_path):
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(k2.K2Error) as caught:
        k2.K2Config.from_json(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "expected" in str(caught.value)


def test_bytes_that_are_no_utf8_are_refused_and_the_file_named(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(k2.K2Error, match="config.json"):
        k2.K2Config.from_json(tmp_path)
