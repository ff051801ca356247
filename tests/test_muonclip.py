"""The optimizer does what the report says: checked against an SVD, a plain AdamW, and logits computed anew."""

import pytest
import torch
from small import random_model, small_config

from k2.training.muonclip import CUBIC, QUINTIC, RMS_MATCH, MuonClip, largest_logits, orthogonalized, parameter_groups

TAU = 100.0


def matrix_with_singular_values(values, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64, generator=generator))[0]
    return left, right, left @ torch.diag(values) @ right.T


@pytest.mark.parametrize("rows, columns", [(12, 30), (30, 12), (16, 16)])
def test_newton_schulz_keeps_the_singular_vectors_and_maps_each_value_by_the_quintic(rows, columns):
    values = torch.linspace(0.02, 1.0, min(rows, columns), dtype=torch.float64)
    left, right, matrix = matrix_with_singular_values(values, rows, columns)
    mapped, (a, b, c) = values / values.norm(), QUINTIC
    for _ in range(5):
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    expected = left @ torch.diag(mapped) @ right.T
    error = (orthogonalized(matrix) - expected).abs().max()
    assert error < 1e-6, f"largest error {error:.2e}"  # 1e-7 stands beside the norm in the first division


def test_newton_schulz_brings_values_from_a_hundredth_on_near_one():
    values = torch.logspace(-1.6, 0, 64, dtype=torch.float64)
    values = (values / values.norm()).clamp_min(0.0101)
    found = torch.linalg.svdvals(orthogonalized(matrix_with_singular_values(values, 64, 256)[2]))
    assert 0.68 < found.min() and found.max() < 1.135, f"found {found.min():.3f} to {found.max():.3f}"


def test_a_stack_is_orthogonalised_matrix_by_matrix():
    stack = torch.randn(5, 9, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    one_by_one = torch.stack([orthogonalized(m) for m in stack])
    error = (orthogonalized(stack) - one_by_one).abs().max()
    assert error < 1e-12, f"largest error {error:.2e}"


def test_orthogonalisation_turns_with_its_input_and_ignores_its_size():
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(10, 18, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64, generator=generator))[0]
    assert (orthogonalized(turn @ matrix) - turn @ orthogonalized(matrix)).abs().max() < 1e-10
    assert (orthogonalized(1000 * matrix) - orthogonalized(matrix)).abs().max() < 1e-6


def test_muon_takes_every_matrix_but_the_two_tables():
    model = random_model(small_config(), 0, torch.float32)
    matrices, others = parameter_groups(model)
    names = {p: name for name, p in model.named_parameters()}
    assert {names[p] for p in others} == {"model.embed_tokens.weight", "lm_head.weight"} | {n for n in names.values() if n.endswith("norm.weight")}
    assert len(matrices) + len(others) == len(names)


def give_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


def test_the_first_muon_step_is_the_formula():
    model = random_model(small_config(), 0, torch.float32)
    optimizer = MuonClip(model, lr=0.01, adamw_lr=0.0, momentum=0.9, weight_decay=0.1)
    weight = model.model.layers[1].self_attn.q_a_proj.weight
    before = weight.detach().clone()
    give_gradients(model, 1)
    nesterov = weight.grad * (1 + 0.9)  # gradient + momentum x (the momentum, which is the gradient in the first step)
    expected = before * (1 - 0.01 * 0.1) - 0.01 * RMS_MATCH * max(weight.shape) ** 0.5 * orthogonalized(nesterov)
    optimizer.step()
    error = (weight - expected).abs().max()
    assert error < 1e-7, f"largest error {error:.2e}"


def test_an_update_has_the_rms_of_adamw():
    square = orthogonalized(torch.randn(96, 256, generator=torch.Generator().manual_seed(0))) * RMS_MATCH * 256**0.5
    rms = square.square().mean().sqrt()
    assert 0.13 < rms < 0.22, f"rms {rms:.3f}"  # 0.2 for singular values of exactly 1; the quintic leaves 0.7 to 1.13


def test_tables_and_vectors_move_as_under_torchs_adamw():
    model, twin = random_model(small_config(), 0, torch.float32), random_model(small_config(), 0, torch.float32)
    optimizer = MuonClip(model, lr=0.0, adamw_lr=0.01, weight_decay=0.1)
    others = parameter_groups(twin)[1]
    groups = [{"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1}, {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(4):
        give_gradients(model, step)
        give_gradients(twin, step)
        optimizer.step()
        oracle.step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        error = (mine - theirs).abs().max()
        assert error < 2e-6, f"{name}: largest error {error:.2e}"


def test_largest_logits_are_those_of_the_full_causal_square():
    generator = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 3, 70, 8, generator=generator), torch.randn(2, 3, 90, 8, generator=generator)
    full = (q @ k.mT) * 0.5
    full = full.masked_fill(~torch.ones(70, 90, dtype=torch.bool).tril(20), -torch.inf)
    assert torch.allclose(largest_logits(q, k, 0.5, rows=16), full.amax(dim=(0, 2, 3)), rtol=1e-6, atol=0)
    assert torch.allclose(largest_logits(q[0], k[0], 0.5, rows=16), full[0].amax(dim=(1, 2)), rtol=1e-6, atol=0)


def attention_logits(layer, x, cos_sin):
    """Each head's largest logit, from the layer's own queries and keys, by the expanded formula."""
    q_nope, q_rope = layer.queries(x, *cos_sin)
    c_kv, k_rope = layer.latents(x, *cos_sin)
    key, _ = layer.up_projections()
    scores = (q_nope @ key @ c_kv.mT + q_rope @ k_rope.mT) * layer.config.softmax_scale
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf).amax(dim=(-2, -1))


@pytest.mark.parametrize("q_lora_rank", [28, None])
def test_a_clipped_heads_logit_is_tau_afterwards_and_other_heads_keep_their_bits(q_lora_rank):
    from k2.rope import rope_angles, rope_frequencies

    config = small_config(q_lora_rank=q_lora_rank)
    model = random_model(config, 0, torch.float32).train()
    layer = model.model.layers[1].self_attn
    x = torch.randn(1, 40, config.hidden_size, generator=torch.Generator().manual_seed(2))
    cos_sin = [table_TP.float() for table_TP in rope_angles(rope_frequencies(config), 0, 40)]
    with torch.no_grad():
        before = attention_logits(layer, x, cos_sin)[0]
        tau = float(before.sort().values[0:2].mean())  # between the calmest head and the others
        optimizer = MuonClip(model, lr=0.0, adamw_lr=0.0, tau=tau)
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        layer(x, *cos_sin)
        optimizer.step()
        after = attention_logits(layer, x, cos_sin)[0]
    calm = int(before.argmin())
    for head in range(config.num_attention_heads):
        if head == calm:
            assert after[head] == before[head]
        else:
            assert abs(float(after[head]) / tau - 1) < 1e-5, f"head {head}: {after[head]:.6f}, tau {tau:.6f}"
    assert_only_these_rows_moved(model, weights, layer, calm)


def assert_only_these_rows_moved(model, weights, layer, calm):
    """The shared rotary key, the values, the calm head and every other layer keep their bits."""
    c = layer.config
    query = layer.q_b_proj if c.q_lora_rank else layer.q_proj
    allowed = {query.weight: c.qk_head_dim, layer.kv_b_proj.weight: c.qk_nope_head_dim}
    for name, p in model.named_parameters():
        if p not in allowed:
            assert torch.equal(p, weights[name]), f"{name} moved"
            continue
        moved = (p != weights[name]).any(dim=1).unflatten(0, (c.num_attention_heads, -1))
        assert not moved[calm].any(), f"{name}: the unclipped head moved"
        assert not moved[:, allowed[p] :].any(), f"{name}: value rows moved"
        assert moved.any(), f"{name}: nothing moved"


def test_a_saved_state_goes_on_with_the_same_bits():
    first, second = random_model(small_config(), 0, torch.float32), random_model(small_config(), 1, torch.float32)
    one = MuonClip(first, 0.01, 0.01)
    give_gradients(first, 0)
    one.step()
    two = MuonClip(second, 0.01, 0.01)
    two.load_state(one.state())
    for model, optimizer in ((first, one), (second, two)):
        give_gradients(model, 1)
        optimizer.step()
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        assert torch.equal(a, b), name


def test_later_muon_steps_follow_nesterovs_momentum():
    """The first step cannot tell: Newton-Schulz ignores the size of its input, and then all of it is one gradient."""
    model = random_model(small_config(), 0, torch.float32)
    optimizer = MuonClip(model, lr=0.01, adamw_lr=0.0, momentum=0.9, weight_decay=0.1)
    weight = model.model.layers[1].self_attn.q_a_proj.weight
    momentum = torch.zeros_like(weight)
    for step in range(3):
        give_gradients(model, step)
        before, gradient = weight.detach().clone(), weight.grad.clone()
        momentum = 0.9 * momentum + gradient
        expected = before * (1 - 0.01 * 0.1) - 0.01 * RMS_MATCH * max(weight.shape) ** 0.5 * orthogonalized(gradient + 0.9 * momentum)
        optimizer.step()
        error = (weight - expected).abs().max()
        assert error < 1e-7, f"step {step}: largest error {error:.2e}"


@torch.no_grad()
def test_the_clip_sees_every_training_call_since_the_last_step_and_no_other():
    config = small_config()
    model = random_model(config, 0, torch.float32)
    layer, optimizer = model.model.layers[1].self_attn, MuonClip(model, 0.0, 0.0)
    assert optimizer.clip.layers == [decoder.self_attn for decoder in model.model.layers], "some layer is not watched"
    cos_sin = torch.ones(20, config.qk_rope_head_dim // 2), torch.zeros(20, config.qk_rope_head_dim // 2)
    generator = torch.Generator().manual_seed(6)
    calm, wild, middling, wildest = (size * torch.randn(20, config.hidden_size, generator=generator) for size in (1.0, 8.0, 3.0, 90.0))
    for training, x in ((False, wildest), (True, calm), (True, wild), (True, middling), (False, wildest)):
        layer.train(training)(x, *cos_sin)
    expected, found = attention_logits(layer, wild, cos_sin), optimizer.clip.max_logits[layer]
    assert (attention_logits(layer, wildest, cos_sin) > expected).all() and (expected > attention_logits(layer, middling, cos_sin)).all()
    error = (found / expected - 1).abs().max()
    assert error < 1e-5, f"largest relative error {error:.2e}: {found.tolist()}, expected {expected.tolist()}"
    optimizer.step()
    assert not optimizer.clip.max_logits, "the maxima of one step must not clip the next"


@torch.no_grad()
def test_a_head_whose_logits_are_all_negative_keeps_its_bits():
    model = random_model(small_config(), 0, torch.float32)
    optimizer = MuonClip(model, 0.0, 0.0, tau=5.0)
    weights = [p.detach().clone() for p in model.parameters()]
    for layer in optimizer.clip.layers:
        optimizer.clip.max_logits[layer] = torch.tensor([-7.0, 0.0, 4.9])
    assert optimizer.step() == 0
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), weights)), "a calm head moved"


def test_what_the_report_leaves_open_is_an_argument_that_acts():
    def moved(**changes):
        model = random_model(small_config(), 0, torch.float32)
        optimizer = MuonClip(model, 0.01, 0.01, **changes)
        for seed in range(2):
            give_gradients(model, seed)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = moved()
    assert torch.equal(plain, moved())
    for changes in ({"momentum": 0.9}, {"nesterov": False}, {"newton_schulz": CUBIC}, {"weight_decay": 0.0}, {"betas": (0.8, 0.95)}, {"eps": 1e-2}, {"muon": False}):
        assert not torch.equal(plain, moved(**changes)), changes


def test_without_muon_every_parameter_moves_as_under_torchs_adamw():
    model, twin = random_model(small_config(), 0, torch.float32), random_model(small_config(), 0, torch.float32)
    optimizer = MuonClip(model, lr=0.5, adamw_lr=0.01, muon=False)
    groups = [{"params": [p for p in twin.parameters() if p.ndim == 2], "weight_decay": 0.1}, {"params": [p for p in twin.parameters() if p.ndim == 1], "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in range(3):
        give_gradients(model, step)
        give_gradients(twin, step)
        optimizer.step()
        oracle.step()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters()):
        error = (mine - theirs).abs().max()
        assert error < 2e-6, f"{name}: largest error {error:.2e}"


def test_five_cubic_steps_leave_small_values_small():
    values = torch.logspace(-2, 0, 64, dtype=torch.float64)
    matrix = matrix_with_singular_values(values, 64, 256)[2]
    cubic, quintic = (torch.linalg.svdvals(orthogonalized(matrix, coefficients=c)).min() for c in (CUBIC, QUINTIC))
    smallest = float(values[0] / values.norm())
    assert cubic < 7.6 * smallest and quintic > 50 * smallest, f"smallest {smallest:.4f}, cubic {cubic:.4f}, quintic {quintic:.4f}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_float32_parameter_is_its_own_master_and_a_step_moves_stack_master_and_parameter_alike(dtype):
    model = random_model(small_config()).requires_grad_()
    optimizer = MuonClip(model, lr=0.01, adamw_lr=0.01)
    model.to(dtype)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for same_shape, master_JOI, momentum_JOI in optimizer.stacks:
        for p, own_OI, moved_OI in zip(same_shape, master_JOI, momentum_JOI):
            assert (p.data_ptr() == own_OI.data_ptr()) == (dtype == torch.float32)
            assert torch.equal(p, own_OI.to(dtype)) and torch.equal(optimizer.master[p], own_OI) and torch.equal(optimizer.first[p], moved_OI)
