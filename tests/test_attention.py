"""Multi-head latent attention: both forms against the reference and against each other."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import YARN, as_float64, assert_close, assert_gradients_are_right, assert_same, numbers, numpy_weights, random_config, randomised, rotary_tables, small_config

from k2 import reference
from k2.attention import DirectQueryAttention, MultiHeadLatentAttention, ScaledDotProduct, causal_mask
from k2.config import K2Config
from k2.decoder import DecoderLayer
from k2.kv_cache import NO_CACHE, LayerCache

NAME = "model.layers.0.self_attn"


def one_layer(config: K2Config, seed: int = 0, dtype=torch.float64):
    """(the attention of a dense layer 0, its weights for the reference)."""
    attention = randomised(DecoderLayer(replace(config, first_k_dense_replace=1), 0).self_attn, seed, dtype)
    return attention, numpy_weights(attention, f"{NAME}.")


def call(attention, x_TD, start: int = 0, cache=NO_CACHE):
    with torch.no_grad():
        return attention(x_TD, *rotary_tables(attention.config, start, x_TD.shape[-2], x_TD.dtype), cache)


def assert_equals_reference(dtype, limit: float):
    for seed in range(24):
        config, T = random_config(seed), 1 + seed % 11
        attention, weights = one_layer(config, seed, dtype)
        assert isinstance(attention, DirectQueryAttention) == (config.q_lora_rank is None)
        x_TD = numbers(T, config.hidden_size, seed=seed, dtype=dtype)
        assert_close(call(attention, x_TD), reference.attention(config, weights, NAME, as_float64(x_TD)), limit, f"seed {seed}, {T} tokens")


def test_attention_equals_the_reference_in_float64():
    assert_equals_reference(torch.float64, 1e-10)


def test_attention_equals_the_reference_in_float32():
    assert_equals_reference(torch.float32, 1e-5)


def parts(attention, x_TD, start: int = 0):
    """What both forms take: the queries' two parts, and the latents' two."""
    tables = rotary_tables(attention.config, start, x_TD.shape[-2], x_TD.dtype)
    return *attention.queries(x_TD, *tables), *attention.latents(x_TD, *tables)


@torch.no_grad()
def test_the_absorbed_form_equals_the_expanded_form():
    for seed in range(24):
        config = random_config(seed)
        attention, _ = one_layer(config, seed)
        for past, T in ((0, 1), (0, 6), (5, 1), (9, 4)):
            x_TD = numbers(2, past + T, config.hidden_size, seed=seed)
            q_nope, q_rope, c_kv, k_rope = parts(attention, x_TD)
            queries = q_nope[..., past:, :], q_rope[..., past:, :]
            assert_close(attention.absorbed(*queries, c_kv, k_rope), attention.expanded(*queries, c_kv, k_rope), 1e-12, f"seed {seed}, {T} tokens after {past}")


@torch.no_grad()
def test_heads_done_one_after_the_other_give_what_all_give_at_once(monkeypatch):
    for seed in range(12):
        config = random_config(seed)
        attention, _ = one_layer(config, seed)
        queries_and_latents = parts(attention, numbers(2, 9, config.hidden_size, seed=seed))
        whole = attention.eval().expanded(*queries_and_latents)
        for some in range(1, config.num_attention_heads + 1):
            monkeypatch.setattr("k2.attention.EXPANDED", some * 9 * (config.qk_nope_head_dim + config.v_head_dim))
            assert attention.heads_at_once(9) == some
            calls = []
            hook = attention.dot_product.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0].shape[-3]))
            assert_close(attention.expanded(*queries_and_latents), whole, 1e-13, f"seed {seed}, {some} heads at once")
            hook.remove()
            assert sum(calls) == config.num_attention_heads and max(calls) == some
        assert attention.train().heads_at_once(9) == config.num_attention_heads


def test_k2s_heads_are_done_together_up_to_16384_tokens_and_by_eight_at_131072():
    with torch.device("meta"):
        attention = MultiHeadLatentAttention(K2Config.from_json(Path(reference.__file__).parent / "configs" / "kimi-k2-instruct.json")).eval()
    assert [attention.heads_at_once(S) for S in (1, 16_384, 16_385, 131_072, 2**30)] == [64, 64, 63, 8, 1]


def test_each_call_takes_the_form_that_is_cheaper_for_it():
    attention, _ = one_layer(small_config())
    taken = []
    for form in ("absorbed", "expanded"):
        plain = getattr(attention, form)
        setattr(attention, form, lambda *parts, form=form, plain=plain: (taken.append(form), plain(*parts))[1])
    call(attention, numbers(1, 48))
    call(attention, numbers(2, 48))
    assert taken == ["absorbed", "expanded"]


def test_attention_behind_a_cache_equals_attention_over_the_whole():
    for seed in range(12):
        config, cache, x_TD = random_config(seed), LayerCache(), numbers(17, random_config(seed).hidden_size, seed=seed)
        attention, _ = one_layer(config, seed)
        whole_TD, start = call(attention, x_TD), 0
        for T in (5, 1, 7, 1, 3):
            found_TD = call(attention, x_TD[start : start + T], start, cache)
            assert_close(found_TD, whole_TD[start : start + T], 1e-12, f"seed {seed}, {T} tokens after {start}")
            start = cache.length = start + T


def test_a_later_token_moves_no_earlier_output():
    attention, _ = one_layer(small_config())
    x_TD = numbers(9, 48)
    for t in range(8):
        changed_TD = x_TD.clone()
        changed_TD[t + 1 :] = numbers(8 - t, 48, seed=1)
        assert_same(call(attention, changed_TD)[: t + 1], call(attention, x_TD)[: t + 1], f"token {t}")
        assert not torch.equal(call(attention, changed_TD)[t + 1 :], call(attention, x_TD)[t + 1 :])


def test_the_mask_is_the_last_rows_of_a_lower_triangle():
    for T, S in ((1, 1), (4, 4), (1, 9), (4, 9)):
        assert_same(causal_mask(T, S, "cpu"), torch.from_numpy(np.tri(S, dtype=bool)[S - T :]), f"{T} of {S}")


def test_sequences_of_a_batch_do_not_meet():
    for config in (small_config(), small_config(q_lora_rank=None)):
        attention, _ = one_layer(config)
        for T in (1, 5):
            x_TD = numbers(2, 3, T, 48)
            alone_TD = torch.stack([call(attention, sequence) for sequence in x_TD.flatten(0, 1)]).unflatten(0, (2, 3))
            assert_close(call(attention, x_TD), alone_TD, 1e-12, f"{T} tokens")


def k2_scale(factor: float | None) -> float:
    scaling = None if factor is None else replace(YARN, factor=factor)
    return small_config(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_scaling=scaling).softmax_scale


def test_softmax_scales_are_those_of_the_family():
    for factor, expected in ((None, 0.0721688), (1.0, 0.0721688), (32.0, 0.13086080), (64.0, 0.14467963)):
        assert abs(k2_scale(factor) / expected - 1) < 5e-7, f"factor {factor}: {k2_scale(factor)}, expected {expected}"


def test_the_scale_multiplies_every_score_in_both_forms():
    """From outside: with the queries scaled up by the missing factor, a model without YaRN gives the same output."""
    plain_config = small_config(rope_scaling=None)
    expected_scale = (10 + 12) ** -0.5 * (0.1 * np.log(32) + 1) ** 2
    attention, _ = one_layer(plain_config)
    scaled, _ = one_layer(plain_config)
    scaled.config = small_config()  # absorbed() reads the scale there; the angles come as tables
    scaled.dot_product = ScaledDotProduct(small_config().softmax_scale)
    attention.q_b_proj.weight.data *= expected_scale * 22**0.5
    q_nope, q_rope, c_kv, k_rope = parts(attention, numbers(6, 48))
    unscaled = (q_nope / (expected_scale * 22**0.5), q_rope / (expected_scale * 22**0.5))
    for form in ("absorbed", "expanded"):
        assert_close(getattr(scaled, form)(*unscaled, c_kv, k_rope), getattr(attention, form)(q_nope, q_rope, c_kv, k_rope), 1e-12, form)


@torch.no_grad()
def test_latent_norms_have_an_eps_of_their_own():
    config = small_config(rms_norm_eps=1e-3)
    attention, _ = one_layer(config)
    attention.q_a_proj.weight *= 1e-3
    attention.kv_a_proj_with_mqa.weight *= 1e-3  # latents as small as sqrt(eps): another eps would change them much
    x_TD = numbers(5, 48)
    expected_TC = x_TD @ attention.kv_a_proj_with_mqa.weight[:20].T
    expected_TC = expected_TC / (expected_TC.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.kv_a_layernorm.weight
    assert_close(parts(attention, x_TD)[2], expected_TC, 1e-12)
    assert_close(call(attention, x_TD), reference.attention(config, numpy_weights(attention, f"{NAME}."), NAME, x_TD.numpy()), 1e-10)


def test_equal_keys_share_attention_equally():
    attention, v_HSV = ScaledDotProduct(0.3), numbers(3, 6, 14)
    found_HTV = attention(numbers(3, 6, 22), numbers(3, 1, 22).expand(3, 6, 22), v_HSV)
    means_HTV = v_HSV.cumsum(-2) / torch.arange(1, 7, dtype=torch.float64)[:, None]
    assert_close(found_HTV, means_HTV, 1e-12)


def tiny(**changes) -> K2Config:
    sizes = dict(hidden_size=8, num_attention_heads=2, q_lora_rank=5, kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4)
    return small_config(**{**sizes, **changes})


def test_gradients_of_attention():
    for T, config in ((5, tiny()), (1, tiny()), (5, tiny(q_lora_rank=None))):  # one token takes the absorbed form
        attention, _ = one_layer(config)
        assert_gradients_are_right(attention, numbers(T, 8), constants=rotary_tables(config, 0, T, torch.float64))


def test_gradients_of_both_forms_are_the_same():
    attention, _ = one_layer(tiny())
    x_TD = numbers(5, 8).requires_grad_()
    found = [torch.autograd.grad(form(*parts(attention, x_TD)).square().sum(), (x_TD, attention.kv_b_proj.weight)) for form in (attention.absorbed, attention.expanded)]
    for absorbed, expanded in zip(*found):
        assert_close(absorbed, expanded, 1e-12)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
@pytest.mark.parametrize("T, S", [(5, 5), (5, 9)])
def test_the_fused_kernel_takes_every_call(leading, T, S):
    """Where it cannot be used, torch builds all H x T x S scores without a word: 17 GB a layer for K2 at 128K tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q_HTA, k_HSA, v_HSV = numbers(*leading, 3, T, 22), numbers(*leading, 3, S, 22), numbers(*leading, 3, S, 14)
    product = ScaledDotProduct(0.3)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # raises where this kernel does not fit
        fused_HTV = product(q_HTA, k_HSA, v_HSV)
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(fused_HTV, product(q_HTA, k_HSA, v_HSV), 1e-13)
