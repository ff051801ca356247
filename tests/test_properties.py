"""What must hold for every shape and every input, on examples that hypothesis searches for and shrinks when one fails.

The other tests look at a few dozen seeds of a few sizes. Here sizes, switches, batch axes and lengths are drawn, with the
axes of one model pairwise distinct where their ranges allow it. The draws are the same in every run.
"""

import contextlib
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

hypothesis = pytest.importorskip("hypothesis", reason="the properties need tests/requirements-oracles.txt")
from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from small import (  # noqa: E402
    YARN, as_float64, assert_close, assert_same, numbers, numpy_weights, random_ids, random_model, randomised, recorded_choices,
    reference_logits, relative_error, rotary_tables, small_config,
)  # fmt: skip
from test_tokenizer import small_ranks, small_tokenizer  # noqa: E402

from k2 import reference  # noqa: E402
from k2.config import K2Config  # noqa: E402
from k2.decoder import DecoderLayer  # noqa: E402
from k2.expert import Expert  # noqa: E402
from k2.kv_cache import LatentCache, LayerCache  # noqa: E402
from k2.moe import Experts, MoE  # noqa: E402
from k2.norm import RMSNorm  # noqa: E402
from k2.quantization import fp8_dequantize, fp8_quantize, int4_dequantize, int4_quantize  # noqa: E402
from k2.rope import rope_angles, rope_frequencies, rotate  # noqa: E402
from k2.router import Router  # noqa: E402
from k2.sampling import Sampler  # noqa: E402

pytestmark = pytest.mark.oracle

# No deadline and no check of speed: a slow machine is no failure. No database: every run draws the same examples.
COMMON = settings(derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])
MANY, SOME, FEW = (settings(COMMON, max_examples=count) for count in (60, 30, 20))
PRECISIONS = pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
SEEDS, LENGTHS = st.integers(0, 10_000), st.integers(1, 9)
BATCHES = st.sampled_from([(), (1,), (3,), (2, 1), (2, 3)])
NAME = "model.layers.0"


@st.composite
def configs(draw, layers: int | None = None) -> K2Config:
    """Sizes distinct from each other, every switch of the family either way."""
    taken = set()

    def size(low: int, high: int) -> int:
        found = draw(st.sampled_from([n for n in range(low, high + 1) if n not in taken]))
        taken.add(found)
        return found

    H, P, K = size(1, 4), size(1, 8), size(1, 6)
    taken.add(2 * P)
    E = K if draw(st.integers(0, 7)) == 7 else size(K + 1, 14)  # now and then every expert is chosen
    N, V, C, D = size(2, 24), size(3, 24), size(4, 32), size(8, 48)
    V = min(V, N + 2 * P)  # the fused kernels want values no wider than keys
    factor = draw(st.sampled_from([None, 1.0, 32.0, 64.0]))
    yarn = YARN if factor is None else replace(
        YARN, factor=factor, original_max_position_embeddings=draw(st.integers(8, 64)), beta_fast=draw(st.sampled_from([1.0, 32.0])),
        mscale_all_dim=(mscale := draw(st.sampled_from([1.0, 0.7]))), mscale=mscale,
    )  # fmt: skip
    depth = layers or draw(st.integers(1, 3))
    return small_config(
        vocab_size=size(20, 120), hidden_size=D, intermediate_size=size(5, 70), moe_intermediate_size=size(3, 40),
        num_hidden_layers=depth, first_k_dense_replace=draw(st.integers(0, depth)), num_attention_heads=H,
        q_lora_rank=size(4, 32) if draw(st.booleans()) else None, kv_lora_rank=C, qk_nope_head_dim=N, qk_rope_head_dim=2 * P, v_head_dim=V,
        n_routed_experts=E, n_shared_experts=draw(st.integers(1, 2)), num_experts_per_tok=K,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.446, 2.827])), rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0, 50000.0])), rope_scaling=None if factor is None else yarn,
    )  # fmt: skip


@contextlib.contextmanager
def reference_margins():
    """Yields a list that fills with each routed token's margin, between its worst chosen and its best other expert, as
    k2.reference computes it. Where one is tiny, float32 may rightly choose another expert."""
    plain, margins = reference.route, []

    def look(config, weights, name, x_TD):
        scores_TE = reference.sigmoid(x_TD @ weights[f"{name}.gate.weight"].T) + weights[f"{name}.gate.e_score_correction_bias"]
        margins.extend(margins_of(scores_TE, config.num_experts_per_tok))
        return plain(config, weights, name, x_TD)

    reference.route = look
    try:
        yield margins
    finally:
        reference.route = plain


def margins_of(scores_TE, K: int) -> list[float]:
    """Each row's K-th largest score less the next; nothing where all experts are chosen."""
    ordered_TE = -np.sort(-scores_TE, axis=-1)
    return (ordered_TE[:, K - 1] - ordered_TE[:, K]).tolist() if K < scores_TE.shape[-1] else []


def attention_of(config: K2Config, seed: int, dtype=torch.float64):
    """(the attention of layer 0, its weights for the reference)."""
    attention = randomised(DecoderLayer(replace(config, first_k_dense_replace=1), 0).self_attn, seed, dtype)
    return attention, numpy_weights(attention, f"{NAME}.self_attn.")


# ---- torch is the reference, layer by layer ----


@PRECISIONS
@MANY
@given(width=st.integers(1, 60), eps=st.sampled_from([1e-6, 1e-5, 1e-3]), size=st.sampled_from([1e-4, 1.0, 1e4]), batch=BATCHES, seed=SEEDS)
def test_norm_is_the_reference(dtype, limit, width, eps, size, batch, seed):
    norm = randomised(RMSNorm(width, eps), seed, dtype)
    x_TI = size * numbers(*batch, 3, width, seed=seed, dtype=dtype)
    assert_close(norm(x_TI), reference.rms_norm(as_float64(x_TI), as_float64(norm.weight), eps), limit)


@PRECISIONS
@MANY
@given(config=configs(layers=1), start=st.integers(0, 200_000), batch=BATCHES, T=LENGTHS, seed=SEEDS)
def test_rotation_is_the_reference(dtype, limit, config, start, batch, T, seed):
    frequencies_P = rope_frequencies(config)
    expected_P = reference.rope_frequencies(config)
    assert_close(frequencies_P[:, None], expected_P[:, None], 1e-14, "frequencies")
    x_TR = numbers(*batch, T, config.qk_rope_head_dim, seed=seed, dtype=dtype)
    tables = (table_TP.to(dtype) for table_TP in rope_angles(frequencies_P, start, T))
    assert_close(rotate(x_TR, *tables), reference.rotate(as_float64(x_TR), (start + np.arange(T))[:, None] * expected_P), limit)


@PRECISIONS
@SOME
@given(config=configs(layers=1), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_attention_is_the_reference(dtype, limit, config, T, seed):
    attention, weights = attention_of(config, seed, dtype)
    x_TD = numbers(T, config.hidden_size, seed=seed, dtype=dtype)
    found_TD = attention(x_TD, *rotary_tables(config, 0, T, dtype))
    assert_close(found_TD, reference.attention(config, weights, f"{NAME}.self_attn", as_float64(x_TD)), limit)


@PRECISIONS
@MANY
@given(config=configs(layers=1), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_router_is_the_reference(dtype, limit, config, T, seed):
    router = randomised(Router(config), seed, dtype)
    weights, x_TD = numpy_weights(router, f"{NAME}.mlp.gate."), numbers(T, config.hidden_size, seed=seed, dtype=dtype)
    scores_TE = reference.sigmoid(as_float64(x_TD) @ weights[f"{NAME}.mlp.gate.weight"].T) + weights[f"{NAME}.mlp.gate.e_score_correction_bias"]
    # the order among the chosen is compared as well, so every gap down to the first idle expert has to be clear
    assume(all(gap > 1e-5 for k in range(1, config.num_experts_per_tok + 1) for gap in margins_of(scores_TE, k)))
    ids_TK, weights_TK = router(x_TD)
    expected_ids_TK, expected_TK = reference.route(config, weights, f"{NAME}.mlp", as_float64(x_TD))
    assert_same(ids_TK, torch.from_numpy(expected_ids_TK))
    assert_close(weights_TK, expected_TK, limit)


@PRECISIONS
@MANY
@given(D=st.integers(1, 50), F=st.integers(1, 70), batch=BATCHES, T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_expert_is_the_reference(dtype, limit, D, F, batch, T, seed):
    expert = randomised(Expert(D, F), seed, dtype)
    x_MD = numbers(*batch, T, D, seed=seed, dtype=dtype)
    assert_close(expert(x_MD), reference.swiglu(numpy_weights(expert, "mlp."), "mlp", as_float64(x_MD)), limit)


@PRECISIONS
@SOME
@given(config=configs(layers=1), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_moe_is_the_reference(dtype, limit, config, T, seed):
    moe = randomised(MoE(config, 0), seed, dtype)
    x_TD = numbers(T, config.hidden_size, seed=seed, dtype=dtype)
    with reference_margins() as margins:
        expected_TD = reference.moe(config, numpy_weights(moe, f"{NAME}.mlp."), f"{NAME}.mlp", as_float64(x_TD))
    assume(min(margins, default=1) > 1e-5)
    assert_close(moe(x_TD), expected_TD, limit)


@PRECISIONS
@SOME
@given(config=configs(layers=2), layer=st.integers(0, 1), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_decoder_layer_is_the_reference(dtype, limit, config, layer, T, seed):
    decoder = randomised(DecoderLayer(config, layer), seed, dtype)
    x_TD = numbers(T, config.hidden_size, seed=seed, dtype=dtype)
    with reference_margins() as margins:
        expected_TD = reference.decoder_layer(config, numpy_weights(decoder, f"model.layers.{layer}."), layer, as_float64(x_TD))
    assume(min(margins, default=1) > 1e-5)
    assert_close(decoder(x_TD, *rotary_tables(config, 0, T, dtype)), expected_TD, limit)


@PRECISIONS
@FEW
@given(config=configs(), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_model_is_the_reference(dtype, limit, config, T, seed):
    model, ids = random_model(config, seed, dtype), random_ids(config, T, seed=seed)
    with recorded_choices(model) as choices:
        found_TW = model(ids)
    whole = limit if dtype == torch.float64 else 5e-6 * math.sqrt(config.num_hidden_layers)
    assert_close(found_TW, reference_logits(model, ids, choices, tolerance=1e-5), whole)


# ---- forms that must agree ----


@SOME
@given(config=configs(layers=1), batch=BATCHES, past=st.integers(0, 8), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_the_absorbed_form_is_the_expanded_form(config, batch, past, T, seed):
    attention, _ = attention_of(config, seed)
    x_TD = numbers(*batch, past + T, config.hidden_size, seed=seed)
    tables = rotary_tables(config, 0, past + T, torch.float64)
    q_nope, q_rope = (q[..., past:, :] for q in attention.queries(x_TD, *tables))
    keys = attention.latents(x_TD, *tables)
    assert_close(attention.absorbed(q_nope, q_rope, *keys), attention.expanded(q_nope, q_rope, *keys), 1e-11)


def pieces(data, total: int) -> list[int]:
    """Sizes of at least 1 that add up to `total`."""
    cuts = sorted(data.draw(st.sets(st.integers(1, total - 1)), label="cuts")) if total > 1 else []
    return [b - a for a, b in zip([0, *cuts], [*cuts, total])]


@FEW
@given(config=configs(), batch=BATCHES, T=st.integers(1, 12), seed=SEEDS, data=st.data())
@torch.no_grad()
def test_prefill_whole_is_chunks_is_token_by_token(config, batch, T, seed, data):
    model, ids = random_model(config, seed, torch.float64), random_ids(config, *batch, T, seed=seed)
    whole = model(ids)
    for sizes in (pieces(data, T), [1] * T):
        cache = LatentCache(config)
        found = torch.cat([model(chunk, cache) for chunk in ids.split(sizes, dim=-1)], dim=-2)
        assert cache.length == T
        assert_close(found, whole, 1e-10, f"chunks {sizes}")


@FEW
@given(config=configs(), batch=st.sampled_from([(1,), (3,), (2, 1), (2, 3)]), T=LENGTHS, seed=SEEDS)
@torch.no_grad()
def test_each_sequence_of_a_batch_gets_what_it_gets_alone(config, batch, T, seed):
    model, ids = random_model(config, seed, torch.float64), random_ids(config, *batch, T, seed=seed)
    alone = torch.stack([model(sequence) for sequence in ids.reshape(-1, T)]).reshape(*batch, T, -1)
    assert_close(model(ids), alone, 1e-11)


@SOME
@given(sizes=st.lists(st.integers(1, 90), min_size=1, max_size=6), batch=BATCHES, C=st.integers(1, 8), R=st.integers(1, 8), seed=SEEDS)
def test_a_cache_gives_back_what_was_put_in(sizes, batch, C, R, seed):
    cache, c_kv, k_rope = LayerCache(), numbers(*batch, sum(sizes), C, seed=seed), numbers(*batch, sum(sizes), R, seed=seed + 1)
    for tokens in sizes:
        end = cache.length + tokens
        found = cache.append(c_kv[..., cache.length : end, :], k_rope[..., cache.length : end, :])
        assert_same(found[0], c_kv[..., :end, :], f"latents up to {end}")
        assert_same(found[1], k_rope[..., :end, :], f"rotary keys up to {end}")
        cache.length = end


# ---- what may change nothing ----


@FEW
@given(config=configs(), T=st.integers(2, 10), seed=SEEDS, data=st.data())
@torch.no_grad()
def test_a_later_token_moves_no_earlier_logits(config, T, seed, data):
    model, ids = random_model(config, seed, torch.float64), random_ids(config, T, seed=seed)
    t = data.draw(st.integers(0, T - 2), label="t")
    changed = torch.cat((ids[: t + 1], (ids[t + 1 :] + 1) % config.vocab_size))
    found_TW, expected_TW = model(changed), model(ids)
    assert_close(found_TW[: t + 1], expected_TW[: t + 1], 1e-12, f"up to token {t}")
    assert relative_error(found_TW[t + 1 :], expected_TW[t + 1 :]) > 1e-6, "the changed tokens themselves must count"


@SOME
@given(config=configs(layers=1), T=LENGTHS, seed=SEEDS, data=st.data())
@torch.no_grad()
def test_permuting_experts_permutes_ids_and_nothing_else(config, T, seed, data):
    moe, permuted = (randomised(MoE(config, 0), seed, torch.float64) for _ in range(2))
    place_E = torch.tensor(data.draw(st.permutations(range(config.n_routed_experts)), label="new place e holds old expert"))
    permuted.gate.weight.data = moe.gate.weight.data[place_E]
    permuted.gate.e_score_correction_bias.copy_(moe.gate.e_score_correction_bias[place_E])
    permuted.experts = Experts(moe.experts[e] for e in place_E.tolist())
    x_TD = numbers(T, config.hidden_size, seed=seed)
    (ids_TK, weights_TK), (permuted_ids_TK, permuted_TK) = moe.gate(x_TD), permuted.gate(x_TD)
    assert_same(place_E[permuted_ids_TK], ids_TK)
    assert_close(permuted_TK, weights_TK, 1e-13)
    assert_close(permuted(x_TD), moe(x_TD), 1e-12)


@MANY
@given(config=configs(layers=1), T=LENGTHS, constant=st.floats(-8, 8, width=32), seed=SEEDS)
@torch.no_grad()
def test_a_constant_added_to_every_bias_changes_nothing(config, T, constant, seed):
    router, shifted = (randomised(Router(config), seed, torch.float64) for _ in range(2))
    x_TD = numbers(T, config.hidden_size, seed=seed)
    biased_TE = as_float64(router.scores(x_TD) + router.e_score_correction_bias)
    assume(all(gap > 1e-5 for k in range(1, config.num_experts_per_tok + 1) for gap in margins_of(biased_TE, k)))
    shifted.e_score_correction_bias += constant  # float32, so a bias moves by up to 5e-7 against the others
    for found, expected in zip(shifted(x_TD), router(x_TD)):
        assert_same(found, expected)


# ---- stored formats ----


@st.composite
def matrices(draw, columns=st.integers(1, 300)):
    """float32 (O, I): normal numbers, each row and the whole at sizes of its own, and some zeros."""
    O, I, seed = draw(st.integers(1, 300)), draw(columns), draw(SEEDS)
    weight_OI = numbers(O, I, seed=seed) * 10 ** (2 * numbers(O, 1, seed=seed + 1).clamp(-2, 1)) * 10.0 ** draw(st.integers(-6, 1))
    weight_OI[numbers(O, I, seed=seed + 2) < draw(st.sampled_from([-9.0, 0.0, 9.0]))] = 0  # none, half, all
    return weight_OI.float()


@SOME
@given(weight_OI=matrices())
def test_fp8_keeps_every_number_within_half_a_step_and_its_own_values_exactly(weight_OI):
    code_OI, scale_BG = fp8_quantize(weight_OI)
    O, I = weight_OI.shape
    assert code_OI.shape == (O, I) and scale_BG.shape == (-(-O // 128), -(-I // 128))
    restored_OI = fp8_dequantize(code_OI, scale_BG)
    scale_OI = scale_BG.repeat_interleave(128, 0)[:O].repeat_interleave(128, 1)[:, :I]
    # Three bits of fraction: half a step is 1/16 of a number at most, and 2^-10 scales among the smallest, subnormal codes.
    step_OI = torch.maximum(weight_OI.abs() / 16, scale_OI * 2**-10) * (1 + 1e-6)
    worst = float(((restored_OI - weight_OI).abs() / step_OI).max())
    assert worst <= 1, f"a number of the {O} x {I} matrix is off by {worst:.3f} times half a step"
    assert_same(fp8_dequantize(*fp8_quantize(restored_OI)), restored_OI, "quantised again")


@SOME
@given(weight_OI=matrices(columns=st.integers(1, 9).map(lambda groups: 32 * groups)))
def test_int4_keeps_every_number_within_half_a_step_and_its_own_values_exactly(weight_OI):
    packed_OU, scale_OG = int4_quantize(weight_OI)
    O, I = weight_OI.shape
    assert packed_OU.shape == (O, I // 8) and scale_OG.shape == (O, I // 32)
    restored_OI = int4_dequantize(packed_OU, scale_OG)
    worst = float(((restored_OI - weight_OI).abs() / scale_OG.float().repeat_interleave(32, 1)).max())
    assert worst <= 0.5 + 1e-6, f"a number of the {O} x {I} matrix is off by {worst:.3f} steps"
    assert_same(int4_dequantize(*int4_quantize(restored_OI)), restored_OI, "quantised again")


# ---- text ----

CHARACTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MARKERS = st.sampled_from(["<|im_end|>", "[EOS]", "<|tool_call_begin|>", "<|reserved_token_455|>", "<|im_", "end|>", "[", "<|"])
WORDS = st.sampled_from(["class", " return", "the quick", "世界", "\r\n", "  ", "'ll", "1234567", "👩\u200d👧", "e\u0301", "नमस्ते"])
TEXTS = st.lists(CHARACTERS | MARKERS | WORDS, max_size=8).map("".join)


@MANY
@given(text=TEXTS)
def test_any_text_comes_back_and_never_through_a_control_id(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    assert max(ids, default=0) < len(small_ranks()), f"{text!r} became {ids}"
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()
    with_control = tokenizer.encode(text, allow_special=True)
    assert tokenizer.decode(with_control) == text
    assert any(i >= len(small_ranks()) for i in with_control) == any(name in text for name in tokenizer.special)


@MANY
@given(ids=st.lists(st.integers(0, 705), max_size=30) | TEXTS.map(lambda text: small_tokenizer().encode(text)))
def test_a_stream_shows_a_growing_beginning_of_the_whole_decode(ids):
    """Ids in any order, so that characters break off and never become whole as well."""
    tokenizer = small_tokenizer()
    decoder, shown, whole = tokenizer.stream(), "", tokenizer.decode(ids)
    for count, i in enumerate(ids, 1):
        shown += decoder.push(i)
        assert whole.startswith(shown), f"{shown!r} was shown after {count} ids of {ids}, which are {whole!r}"
    assert shown + decoder.finish() == whole


# ---- sampling ----

# Multiples of 1/1024 up to 32, since float64 cannot tell the probabilities of 0 and 1e-38 apart; ties are drawn as well.
LOGITS = st.lists(st.integers(-(2**15), 2**15), min_size=1, max_size=12).map(lambda steps: torch.tensor(steps) / 1024)


@MANY
@given(logits_W=LOGITS, temperature=st.floats(0.05, 4), top_p=st.floats(0.01, 1), seed=SEEDS)
def test_a_draw_is_from_the_smallest_set_that_holds_top_p(logits_W, temperature, top_p, seed):
    i = Sampler(temperature, top_p, seed)(logits_W)
    probability = np.exp((as_float64(logits_W) - float(logits_W.max())) / temperature)
    probability /= probability.sum()
    likelier = math.fsum(p for p in probability if p > probability[i])
    assert likelier < top_p + 1e-12, f"id {i} was drawn behind likelier ids of mass {likelier:.6f}, top_p {top_p:.6f}"
    assert Sampler(temperature, top_p, seed)(logits_W) == i
    assert Sampler(0.0, top_p, seed)(logits_W) == int(logits_W.argmax()) == Sampler(temperature, 1e-9, seed)(logits_W)


@MANY
@given(logits_W=LOGITS, temperature=st.floats(0.05, 4), top_p=st.floats(0.01, 1), power=st.integers(-3, 3), constant=st.integers(-1000, 1000), seed=SEEDS)
def test_a_draw_ignores_the_logits_common_size_and_unit(logits_W, temperature, top_p, power, constant, seed):
    """logits + constant is the same distribution, and so is temperature x 2^n for logits x 2^n; both exact in float64."""
    logits_W = logits_W.double()
    i = Sampler(temperature, top_p, seed)(logits_W)
    assert Sampler(temperature, top_p, seed)(logits_W + constant) == i
    assert Sampler(temperature * 2.0**power, top_p, seed)(logits_W * 2.0**power) == i
