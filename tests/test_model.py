"""The whole model against the reference, and what must hold of it whatever its weights."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small import as_float64, assert_close, assert_same, random_config, random_ids, random_model, recorded_choices, reference_logits, relative_error, small_config

import k2
from k2.config import K2Error
from k2.kv_cache import LatentCache


@torch.no_grad()
def assert_equals_reference(dtype, limit: float):
    for seed in range(24):
        config = random_config(seed)
        model, ids = random_model(config, seed, dtype), random_ids(config, 9, seed=seed)
        with recorded_choices(model) as choices:
            found_TW = model(ids)
        assert_close(found_TW, reference_logits(model, ids, choices, tolerance=1e-5), limit, f"seed {seed}")


def test_model_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_model_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 5e-6 * math.sqrt(3))


@torch.no_grad()
def test_model_in_bfloat16_stays_within_its_budget():
    config = small_config()
    model, ids = random_model(config, 0, torch.bfloat16), random_ids(config, 40)
    with recorded_choices(model) as choices:
        found_TW = model(ids)
    # At four layers choices fall short by 0.02 at most; the logits err by 1.4e-2, growing as the square root of depth.
    expected_TW = reference_logits(model, ids, choices, tolerance=0.02)
    rows = [relative_error(found_TW[t : t + 1], expected_TW[t : t + 1]) for t in range(40)]
    assert np.median(rows) <= 1.2e-2 * math.sqrt(3), f"median row {np.median(rows):.3g}"
    assert np.max(rows) <= 4e-2 * math.sqrt(3), f"worst row {np.max(rows):.3g}"


@torch.no_grad()
def test_each_sequence_of_a_batch_gets_the_logits_that_it_gets_alone():
    for config in (small_config(), small_config(q_lora_rank=None, rope_scaling=None)):
        model = random_model(config, 0, torch.float64)
        for batch in ((2,), (2, 3)):
            ids = random_ids(config, *batch, 7)
            alone = torch.stack([model(sequence) for sequence in ids.reshape(-1, 7)]).reshape(*batch, 7, -1)
            assert_close(model(ids), alone, 1e-12, f"batch {batch}")


@torch.no_grad()
def test_a_batch_decodes_behind_one_cache():
    config = small_config()
    model, ids, cache = random_model(config, 0, torch.float64), random_ids(config, 2, 3, 8), LatentCache(config)
    found = torch.cat([model(ids[..., start:end], cache) for start, end in ((0, 4), (4, 5), (5, 8))], dim=-2)
    assert_close(found, model(ids), 1e-10)


@torch.no_grad()
def test_prefill_at_once_and_in_chunks_and_token_by_token_are_the_same():
    for seed in range(6):
        config = random_config(seed)
        model, ids = random_model(config, seed, torch.float64), random_ids(config, 12, seed=seed)
        whole_TW = model(ids)
        for sizes in ([12], [5, 5, 2], [1] * 12, [1, 10, 1], [7, 1, 1, 3]):
            cache, chunks = LatentCache(config), ids.split(sizes)
            found_TW = torch.cat([model(chunk, cache) for chunk in chunks])
            assert cache.length == 12
            assert_close(found_TW, whole_TW, 1e-10, f"seed {seed}, chunks {sizes}")


@torch.no_grad()
def test_a_later_token_moves_no_earlier_logits():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 10)
    whole_TW = model(ids)
    for t in range(9):
        changed = torch.cat((ids[: t + 1], (ids[t + 1 :] + 1) % config.vocab_size))
        found_TW = model(changed)
        assert_close(found_TW[: t + 1], whole_TW[: t + 1], 1e-12, f"token {t}")
        assert relative_error(found_TW[t + 1 :], whole_TW[t + 1 :]) > 1e-3


@torch.no_grad()
def test_only_the_positions_asked_for_get_logits():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 2, 7)
    whole = model(ids)
    assert_close(model(ids, positions=slice(-1, None)), whole[:, -1:], 1e-12)
    assert_close(model(ids, positions=[0, 3]), whole[:, [0, 3]], 1e-12)


@torch.no_grad()
def test_two_runs_give_the_same_bits():
    config = small_config()
    ids = random_ids(config, 2, 9)
    assert_same(random_model(config)(ids), random_model(config)(ids))


@torch.no_grad()
def test_permuting_the_vocabulary_permutes_the_logits():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 9)
    expected_TW = model(ids)
    place_W = torch.randperm(97, generator=torch.Generator().manual_seed(3))  # new row i is old row place[i]
    for table in (model.model.embed_tokens, model.lm_head):
        table.weight.copy_(table.weight[place_W].clone())
    assert_close(model(place_W.argsort()[ids]), expected_TW[:, place_W], 1e-12)


@torch.no_grad()
def test_silent_layers_leave_the_normalised_embedding():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 9)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    assert_close(model(ids), model.lm_head(model.model.norm(model.model.embed_tokens(ids))), 1e-14)


@torch.no_grad()
def test_damage_is_reported_from_the_whole_model():
    config = small_config()
    model, ids = random_model(config), random_ids(config, 5)
    with recorded_choices(model) as choices:
        model(ids)
    expert = int(choices["model.layers.1.mlp"][2, 1])
    model.model.layers[1].mlp.experts[expert].up_proj.weight[3, 3] = torch.nan
    with pytest.raises(K2Error, match=rf"layer 1, expert {expert}\b"):
        model(ids)


@torch.no_grad()
def test_conversions_keep_the_router_bias_float32_and_the_model_running():
    config = small_config()
    kept = {name: buffer.clone() for name, buffer in random_model(config).named_buffers()}
    assert len(kept) == 2
    for dtype in (torch.bfloat16, torch.float16):
        model = random_model(config).to(dtype)
        for name, buffer in model.named_buffers():
            assert_same(buffer, kept[name], name)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model(random_ids(config, 3)).dtype == torch.float32


BAD_IDS = {
    "an id below zero": (torch.tensor([3, -1]), "-1"),
    "an id above the vocabulary": (torch.tensor([3, 97]), "97"),
    "no ids": (torch.zeros(0, dtype=torch.int64), "at least one"),
    "no ids in a batch": (torch.zeros(2, 0, dtype=torch.int64), "at least one"),
    "ids of a narrow dtype": (torch.tensor([3], dtype=torch.int32), "int64"),
    "ids that are not integers": (torch.tensor([3.0]), "int64"),
    "sequences of unequal lengths": ([[1, 2, 3], [4, 5]], "unequal lengths"),
    "sequences of unequal lengths, as tensors": ([torch.tensor([1, 2, 3]), torch.tensor([4, 5])], "unequal lengths"),
    "one bare id": (torch.tensor(3), "int64 tensor"),
    "a sequence longer than the context": (torch.zeros(513, dtype=torch.int64), "512"),
}


@pytest.mark.parametrize("case", BAD_IDS)
def test_bad_ids_are_refused(case):
    ids, said = BAD_IDS[case]
    cache = LatentCache(small_config())
    with pytest.raises(K2Error, match=said) as error:
        random_model(small_config())(ids, cache)
    assert "\n" not in str(error.value)
    assert cache.length == 0


@torch.no_grad()
def test_the_context_counts_the_cache():
    config = small_config(max_position_embeddings=20)
    model, cache = random_model(config), LatentCache(config)
    model(random_ids(config, 19), cache)
    with pytest.raises(K2Error, match="21 tokens"):
        model(random_ids(config, 2), cache)
    assert model(random_ids(config, 1), cache).shape == (1, 97)
    with pytest.raises(K2Error, match="21 tokens"):
        model(random_ids(config, 1), cache)


def run_in_k2(body: str, **names):
    """Run a function body as if it stood in a file of k2/."""
    source = f"def wrong({', '.join(names)}):\n    {body}\n"
    scope = {}
    exec(compile(source, str(Path(k2.__file__).parent / "wrong.py"), "exec"), scope)
    scope["wrong"](**names)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("y_TD = x_TD.T", "y_TD has shape (48, 5)"),  # swapped axes: T is 5 already, D is the config's 48
        ("y_TF = x_TD[:2]", "y_TF has shape (2, 48), but T = 5 in x_TD"),
        ("y_HTD = x_TD", "y_HTD has shape (5, 48)"),
        ("y_TV = x_TD", "y_TV has shape (5, 48), but V = 14 in the config"),
        ("y_TX = x_TD", "y_TX uses X"),
    ],
)
def test_a_name_that_tells_the_wrong_shape_is_found(shape_checker, body, said):
    config = small_config()
    assert config.hidden_size == 48  # and the checker finds the config here, in the caller
    for values in (torch.zeros(5, 48), np.zeros((5, 48))):
        with shape_checker() as found:
            run_in_k2(body, x_TD=values)
        assert any(said in line for line in found), f"found {found}"


def test_names_that_tell_the_right_shape_pass_the_checker(shape_checker):
    config = small_config()
    with shape_checker() as found:
        run_in_k2("y_TD, z_DT, turned_TP2, plain = x_TD + 1, x_TD.mT, x_TD[:, :3], x_TD[:1]", x_TD=torch.zeros(2, 5, config.hidden_size))
    assert not found


def test_sizes_of_the_small_config_are_pairwise_distinct():
    c = small_config()
    sizes = [c.vocab_size, c.hidden_size, c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.qk_head_dim, c.v_head_dim, c.q_lora_rank]
    sizes += [c.kv_lora_rank, c.n_routed_experts, c.num_experts_per_tok, c.qk_rope_head_dim // 2, c.intermediate_size, c.moe_intermediate_size]
    assert len(set(sizes)) == len(sizes) == 14
    assert all(as_float64(weight).std() > 0 for weight in random_model(c).state_dict().values())  # no fresh ones or zeros
