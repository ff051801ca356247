"""Recorded routing is the model's own, and replaying it counts what a store would have held."""

import pytest
import torch
from small import random_ids, random_model, recorded_choices, small_config

from k2.checkpoint import Checkpoint, filled_model, save
from k2.offload import ExpertStore
from k2.routes import Routes, precision, record, replay, table
from k2.slots import kernel_bytes, room_size

MODEL = random_model(small_config())
IDS = random_ids(MODEL.config, 40, seed=2)


def test_what_is_recorded_is_what_the_routers_chose():
    routes = record(MODEL, IDS.tolist(), window=100)
    with recorded_choices(MODEL) as choices:
        MODEL(IDS)
    for layer in (1, 2):
        assert [token[layer - 1] for token in routes.chosen] == choices[f"model.layers.{layer}.mlp"].tolist()
    assert len(routes.guessed) == len(routes.earlier) == 40 and routes.experts == 11
    assert {len(token) for token in routes.guessed} == {2} and {len(token) for token in routes.earlier} == {len(token) for token in routes.first} == {1}
    first = MODEL.model.layers[1]
    with torch.inference_mode():
        before = first.mlp.gate(first.post_attention_layernorm(MODEL.model.embed_tokens(IDS)))[0]
    assert [token[0] for token in routes.first] == before.tolist()
    assert routes.guessed != routes.chosen and [token[1:] for token in routes.guessed] != routes.earlier


def test_replayed_hits_are_those_of_the_store(tmp_path):
    save(random_model(small_config(hidden_size=64, moe_intermediate_size=32)), tmp_path / "model", format="fp8")
    opened = Checkpoint(tmp_path / "model")
    size = room_size(opened) + kernel_bytes(opened, None, torch.device("cpu"))
    store = ExpertStore(opened, 9 * size)
    model, ids = filled_model(opened, torch.device("cpu"), None, store.layer), IDS.tolist()
    routes = Routes([], [], [], [], 11)
    for i in ids:  # a token a call, as in decoding; the order of ids within a layer is the store's
        token = record(model, [i]).chosen[0]
        routes.chosen.append([sorted(ids) for ids in token])
    hits, asked = store.statistics.hits, store.statistics.hits + store.statistics.misses
    assert asked == 40 * 2 * 4 and replay(routes, 9, "lru") == pytest.approx(hits / asked, abs=0.03)


def test_policies_on_a_sequence_that_tells_them_apart():
    often, once = [[[0]]] * 6, [[[e]] for e in range(1, 5)]
    routes = Routes(often + once + [[[0]]], [], [], [], 8)
    assert replay(routes, 3, "lru") == pytest.approx(5 / 11)  # four others came since
    assert replay(routes, 3, "ageing") == pytest.approx(6 / 11)  # it was used more than they
    assert replay(routes, 8, "lru") == replay(routes, 8, "ageing") == pytest.approx(6 / 11)


def test_precision_is_by_rank():
    assert precision(Routes([[[1, 2]], [[3, 4]]], [[[2, 7]], [[3, 4]]], [], [], 8)) == [1.0, 0.5]
    assert precision(Routes([[[9, 9], [1, 2]], [[9, 9], [3, 4]]], [], [[[2, 7]], [[3, 4]]], [], 8), "earlier") == [1.0, 0.5]
    assert precision(Routes([[[1, 2], [9, 9]], [[3, 4], [9, 9]]], [], [], [[[2, 7]], [[3, 4]]], 8), "first") == [1.0, 0.5]
    assert precision(Routes([[[1, 2]]], [], [], [], 8), "first") == []


def test_the_table_has_a_line_for_each_text_and_policy():
    text = table({"code": record(MODEL, IDS.tolist())})
    assert "code, lru" in text and "code, ageing" in text and "by rank" in text


def test_a_model_without_a_dense_layer_or_without_experts_is_recorded_too():
    bare = record(random_model(small_config(first_k_dense_replace=0, num_hidden_layers=1)), IDS.tolist())
    assert len(bare.guessed) == 40 and not bare.first and not bare.earlier
    assert "before attention" in table({"code": bare}) and "dense" not in table({"code": bare})
    assert record(random_model(small_config(first_k_dense_replace=2, num_hidden_layers=2)), IDS.tolist()).chosen == []
