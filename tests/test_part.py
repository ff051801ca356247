"""Choosing a part of a checkpoint by names alone: K2-Instruct's, whose sums are known."""

import functools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

import k2
from k2.checkpoint import expected_tensors
from k2.part import KINDS, RECORD, Layout, Part, differences, parse_experts, parse_numbers, parse_part, part_of, place_of, spelled

CONFIGS = Path(k2.__file__).parent / "configs"
SIZES = {"F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4}


@functools.cache
def specs(name: str = "kimi-k2-instruct", layers: int = 4):
    """The names of the first layers: the others repeat them."""
    return expected_tensors(replace(k2.K2Config.from_json(CONFIGS / f"{name}.json"), num_hidden_layers=layers))


def chosen(layers=None, experts=None, kinds=None, name="kimi-k2-instruct") -> list[str]:
    part = parse_part(layers, experts, kinds)
    return [tensor for tensor in specs(name) if part.takes(tensor)]


def size(names, name="kimi-k2-instruct") -> int:
    return sum(math.prod(specs(name)[tensor].shape) * SIZES[specs(name)[tensor].dtypes[0]] for tensor in names)


def test_one_attention_block_is_101_million_bytes_and_one_layer_17_billion():
    block = chosen("1", None, ["attention"])
    assert len(block) == 13 and size(block) == 101_122_048 + 4 * 6_200 + 2 * (7168 + 1536 + 512)
    layer = chosen("1")
    assert len(layer) == 2326 and size(layer) == 101_122_048 + 4 * 6_200 + 2 * 16_384 + 2 * 2_752_512 + 4 * 384 + 385 * 44_050_944 == 17_066_299_616
    assert all(name.startswith("model.layers.1.") for name in block + layer)


def test_layers_from_the_first_on_bring_embedding_norm_and_head_and_others_do_not():
    tables = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert tables <= set(chosen("0-3")) and not tables & set(chosen("1-3")) and not tables & set(chosen("0-3", None, ["attention"]))
    assert parse_part("0-3", None, None).runs() and not parse_part("1-3", None, None).runs() and not parse_part("0-3", ["1:5"], None).runs()


def test_experts_alone_are_nothing_but_those_and_beside_layers_they_restrict():
    alone = chosen(None, ["1:17,203"])
    assert len(alone) == 12 and size(alone) == 2 * 44_050_944 and {place_of(name).expert for name in alone} == {17, 203}
    beside = chosen("1", ["1:17,203"])
    assert set(alone) < set(beside) and {place_of(name).kind for name in beside} == {"attention", "norm", "router", "shared-expert", "expert"}
    with_router = chosen(None, ["1:17"], ["router"])
    assert {place_of(name).kind for name in with_router} == {"router", "expert"} and {place_of(name).layer for name in with_router} == {1}


def test_no_flag_is_all_and_the_tokenizer_is_no_tensor():
    assert chosen() == list(specs()) and parse_part(None, None, None).whole()
    assert chosen(None, None, ["tokenizer"]) == []


@pytest.mark.parametrize("name", ["kimi-k2-instruct", "kimi-k2-thinking", "kimi-k2.5", "moonlight-16b-a3b-instruct"])
def test_every_tensor_of_the_family_is_of_exactly_one_kind(name):
    for tensor in specs(name):
        rest = re.sub(r"^(language_model\.)?(model\.layers\.\d+\.)?", "", tensor)
        assert [kind for kind, pattern in KINDS.items() if re.match(pattern, rest)] == [place_of(tensor).kind], tensor
    assert {place_of(tensor).kind for tensor in specs(name)} == set(KINDS)


def test_the_kinds_together_are_the_whole():
    assert sorted(name for kind in KINDS for name in chosen(None, None, [kind])) == sorted(specs())


def test_a_stale_buffer_comes_with_the_whole_only():
    stale = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert Part().takes(stale) and not parse_part("0", None, None).takes(stale) and not parse_part(None, None, ["attention"]).takes(stale)


@pytest.mark.parametrize("part", [Part(), Part((0, 1, 2)), Part(None, {1: (17, 203), 5: (0,)}), Part((1,), {1: (2,)}, ("attention", "router"))])
def test_a_part_goes_through_json_and_through_its_flags(part):
    assert Part.from_dict(json.loads(json.dumps(part.to_dict()))) == part
    words = part.flags().split()
    flags = {flag: [words[i + 1] for i, word in enumerate(words) if word == flag] for flag in ("--layers", "--experts", "--part")}
    assert parse_part(next(iter(flags["--layers"]), None), flags["--experts"], flags["--part"]) == part


def test_numbers_are_spelled_as_they_are_parsed():
    assert parse_numbers("7,0-3, 2", "--layers") == (0, 1, 2, 3, 7) and spelled((0, 1, 2, 3, 7)) == "0-3,7" and spelled((5,)) == "5"
    assert parse_experts(["1:17,203", "2:0;3:4"]) == {1: (17, 203), 2: (0,), 3: (4,)}


@pytest.mark.parametrize("text", ["", "a", "3-1", "-1", "1-", "1,,2", "1.5", "9999999"])
def test_what_is_no_number_is_refused_by_flag(text):
    with pytest.raises(k2.K2Error, match="--layers .*: expected numbers and ranges such as 0-3,7"):
        parse_part(text, None, None)


@pytest.mark.parametrize("text", ["17", "a:17", "1:17;1:18", "1:", ":3", "²:3"])
def test_what_names_no_expert_is_refused(text):
    with pytest.raises(k2.K2Error, match="--experts"):
        parse_part(None, [text], None)


def test_a_part_that_the_model_does_not_have_is_refused():
    config = k2.K2Config.from_json(CONFIGS / "kimi-k2-instruct.json")
    for flags, words in ((("61", None, None), "found layer 61; expected 0 to 60"), ((None, ["0:1"], None), "layer 0 has no routed experts"), ((None, ["1:384"], None), "experts 0 to 383")):
        with pytest.raises(k2.K2Error, match=words):
            parse_part(*flags).check(config)
    with pytest.raises(k2.K2Error, match="--part attn: expected one of embedding, attention"):
        parse_part(None, None, ["attn"])
    parse_part("0-60", ["60:383"], ["attention"]).check(config)


@pytest.mark.parametrize("raw", [1, {}, {"layers": 3, "experts": None, "kinds": None}, {"layers": None, "experts": [1], "kinds": None}])
def test_a_record_that_was_written_by_nobody_is_refused(tmp_path, raw):
    assert part_of(tmp_path) == Part()
    (tmp_path / RECORD).write_text(json.dumps({"part": raw}))
    with pytest.raises(k2.K2Error, match="Run the download again"):
        part_of(tmp_path)


# ---- what differs ----


def layout() -> Layout:
    """Moonlight's first four layers on paper, in one shard."""
    expected = specs("moonlight-16b-a3b-instruct")
    header = {name: {"dtype": spec.dtypes[0], "shape": list(spec.shape), "data_offsets": [0, 0]} for name, spec in expected.items()}
    return Layout(replace(k2.K2Config.from_json(CONFIGS / "moonlight-16b-a3b-instruct.json"), num_hidden_layers=4), dict.fromkeys(expected, "s"), {"s": header})


def test_a_layout_that_is_as_the_config_implies_has_no_differences():
    assert differences(layout(), Part()) == []


NORM = "model.layers.3.input_layernorm.weight"
CHANGES = {
    "missing": (lambda m, h: (m.pop(NORM), h.pop(NORM)), f"{NORM} is missing"),
    "unknown": (lambda m, h: (m.update(new="s"), h.update(new=h[NORM])), "unknown tensor new"),
    "of another shape": (lambda m, h: h.update({NORM: h[NORM] | {"shape": [5]}}), f"{NORM} is BF16 \\[5\\]; expected BF16 \\[2048\\]"),
    "of another dtype": (lambda m, h: h.update({NORM: h[NORM] | {"dtype": "F32"}}), f"{NORM} is F32 \\[2048\\]; expected BF16"),
    "not in its shard": (lambda m, h: h.pop(NORM), f"s: expected {NORM}, which the index places here"),
    "not in the index": (lambda m, h: m.pop(NORM), f"s: holds {NORM}, which the index places in no file"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_difference_is_a_line(change):
    changed, (do, words) = layout(), CHANGES[change]
    do(changed.weight_map, changed.headers["s"])
    found = differences(changed, Part())
    assert re.search(words, found[0]) and len(found) <= 2, found


def test_what_a_part_leaves_out_is_no_difference():
    part, small = parse_part("3", None, ["attention"]), layout()
    for name in list(small.weight_map):
        if not part.takes(name):
            del small.weight_map[name], small.headers["s"][name]
    assert differences(small, part) == [] and len(differences(small, Part())) > 500
