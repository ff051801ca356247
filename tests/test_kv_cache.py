"""The latent cache: what it keeps, how it grows, and that a call cut short leaves no trace in it."""

import pytest
import torch
from small import assert_close, assert_same, numbers, random_ids, random_model, small_config

from k2.config import K2Error
from k2.kv_cache import LatentCache, LayerCache


def test_appended_tokens_come_back_behind_the_past_through_every_doubling():
    cache, config = LayerCache(), small_config()
    c_kv, k_rope = numbers(2, 300, config.kv_lora_rank, seed=1), numbers(2, 300, config.qk_rope_head_dim, seed=2)
    start = 0
    for tokens in (1, 60, 3, 1, 64, 128, 1, 42):  # 64, 65, 129, 257 and 300 rows among others
        end = start + tokens
        found_c_kv, found_k_rope = cache.append(c_kv[:, start:end], k_rope[:, start:end])
        assert_same(found_c_kv, c_kv[:, :end], f"latents up to {end}")
        assert_same(found_k_rope, k_rope[:, :end], f"rotary keys up to {end}")
        cache.length = start = end


def test_appending_a_token_rarely_copies():
    cache, places = LayerCache(), set()
    for _ in range(512):
        cache.append(numbers(1, 20), numbers(1, 12))
        places.add(cache.c_kv_MC.data_ptr())
        cache.length += 1
    assert cache.c_kv_MC.shape[-2] == 512
    assert len(places) <= 4  # 64, 128, 256 and 512 rows


def test_a_token_costs_one_latent_and_one_rotary_key_a_layer():
    config = small_config()
    model, cache = random_model(config), LatentCache(config)
    with torch.no_grad():
        model(random_ids(config, 64), cache)
    held = sum(layer.c_kv_MC.numel() + layer.k_rope_MR.numel() for layer in cache.layers)
    assert held == 64 * config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def test_a_batch_of_another_shape_is_refused():
    config = small_config()
    model, cache = random_model(config), LatentCache(config)
    model(random_ids(config, 2, 5), cache)
    for shape in ((5,), (3, 5), (1, 2, 5)):
        with pytest.raises(K2Error, match=r"\(2,\)") as error:
            model(random_ids(config, *shape), cache)
        assert "\n" not in str(error.value)
    assert cache.length == 5


def interrupt(model, ids, cache, layer: int, error):
    """Run the model, cut short by `error` at the door of a layer."""

    def stop(*_):
        raise error

    handle = model.model.layers[layer].register_forward_pre_hook(stop)
    with pytest.raises(type(error)):
        model(ids, cache)
    handle.remove()


@torch.no_grad()
def test_an_interrupted_call_leaves_the_cache_as_it_was():
    config = small_config()
    model, ids = random_model(config), random_ids(config, 90)
    expected, expected_next = model(ids[:40], plain := LatentCache(config)), model(ids[40:90], plain)
    for layer in range(config.num_hidden_layers):
        for error in (KeyboardInterrupt(), RuntimeError("cut")):
            cache = LatentCache(config)
            interrupt(model, ids[10:80], cache, layer, error)  # longer than the call that follows, and other tokens
            assert cache.length == 0
            assert_same(model(ids[:40], cache), expected, f"first call after a cut in layer {layer}")
            interrupt(model, ids[:80], cache, layer, error)  # passes 64 rows: some layers have grown, others not
            assert [held.length for held in cache.layers] == [40] * config.num_hidden_layers
            assert_same(model(ids[40:90], cache), expected_next, f"next call after a cut in layer {layer}")


@torch.no_grad()
def test_two_caches_do_not_share_rows():
    config = small_config()
    model, ids = random_model(config, 0, torch.float64), random_ids(config, 12)
    one, two = LatentCache(config), LatentCache(config)
    model(ids[:5], one)
    model(ids[6:11], two)
    alone = model(ids[:6])[-1:]
    assert_close(model(ids[5:6], one), alone, 1e-10)
