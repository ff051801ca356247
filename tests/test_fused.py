"""What training computes in fewer passes has the values and the gradients of the layer files."""

import copy

import pytest
import torch
from small import numbers, random_ids, random_model, small_config

from k2 import K2Error
from k2.norm import RMSNorm
from k2.training.fused import Normalised, can_be_grouped, fuse, lay_together, matrices
from k2.training.muonclip import MuonClip, together

ODD = {"moe_intermediate_size": 13}


def model_of(**changes):
    config = small_config(**({"moe_intermediate_size": 16} | changes))
    return random_model(config, 3, torch.float32).train().requires_grad_()


def gradients(model, ids, dtype=torch.float32):
    model.to(dtype)
    model.zero_grad()
    logits = model(ids)
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).mean().backward()
    return logits.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def error(found, expected):
    """The largest difference over the largest value."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("tokens", [40, 2])  # of two tokens, most experts get none
@pytest.mark.parametrize("changes", [{}, {"first_k_dense_replace": 0}, {"q_lora_rank": None}])
def test_values_and_gradients_of_a_fused_model_are_those_of_the_layers(tokens, changes):
    plain = model_of(**changes)
    fused = copy.deepcopy(plain)
    fuse(fused)
    ids = random_ids(plain.config, 3, tokens)
    logits, grads = gradients(plain, ids)
    fused_logits, fused_grads = gradients(fused, ids)
    assert error(fused_logits, logits) < 1e-5
    assert list(fused_grads) == list(grads)
    worst = max((error(fused_grads[name], grads[name]), name) for name in grads if grads[name].any())
    assert worst[0] < 2e-5, worst
    assert not any(fused_grads[name].any() for name in grads if not grads[name].any())


def test_in_bfloat16_a_fused_model_is_as_near_the_exact_gradients_as_the_layers_are():
    plain = model_of()
    fused = copy.deepcopy(plain).bfloat16()
    fuse(fused)
    ids = random_ids(plain.config, 3, 40)
    _, exact = gradients(copy.deepcopy(plain).bfloat16(), ids, torch.float64)
    of_layers, of_fused = (torch.stack([(found[name].double() - exact[name]).norm() / exact[name].norm() for name in exact if exact[name].any()])
                           for found in (gradients(plain, ids, torch.bfloat16)[1], gradients(fused, ids, torch.bfloat16)[1]))  # fmt: skip
    assert of_fused.mean() < 1.2 * of_layers.mean(), (of_fused.mean(), of_layers.mean())


def test_the_norms_gradient_is_that_of_its_values():
    x, weight = numbers(2, 5, 7).requires_grad_(), numbers(7, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: Normalised.apply(x, weight, 1e-2), (x, weight), raise_exception=False)
    norm = RMSNorm(7, 1e-2).double()
    norm.weight.data.copy_(weight.detach())
    assert error(Normalised.apply(x, weight, 1e-2).detach(), norm(x).detach()) < 1e-15


def test_tensors_side_by_side_are_joined_without_a_copy_and_others_with_one():
    whole = torch.arange(24.0).reshape(4, 3, 2)
    view = together(list(whole))
    assert torch.equal(view, whole) and view.data_ptr() == whole.data_ptr()
    assert together(list(whole[1:3])).data_ptr() == whole[1].data_ptr()
    for apart in (list(whole.flip(0)), [whole[0], whole[2]], [t.clone() for t in whole], list(whole.mT), [whole[0], whole[1].mT.contiguous().mT]):
        joined = together(apart)
        assert torch.equal(joined, torch.stack(apart)) and joined.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()


def test_weights_and_gradients_of_a_layers_experts_lie_side_by_side_for_the_optimizer():
    model = model_of()
    lay_together(model)
    optimizer = MuonClip(model, lr=0.01, adamw_lr=0.01)
    fuse(model)
    gradients(model, torch.arange(60).reshape(3, 20))
    for layer in model.model.layers[1:]:
        for parameters in matrices(layer.mlp.experts):
            for lying in ([p.data for p in parameters], [p.grad for p in parameters]):
                assert together(lying).data_ptr() == lying[0].data_ptr()
    optimizer.step()
    for same_shape, master_JOI, _ in optimizer.stacks:
        assert all(torch.equal(p, own_OI) and p.data_ptr() == own_OI.data_ptr() for p, own_OI in zip(same_shape, master_JOI))


def test_shapes_and_dtypes_that_the_grouped_product_does_not_take_stay_with_the_layers():
    assert can_be_grouped(torch.empty(16, 48)) and can_be_grouped(torch.empty(8, 16, dtype=torch.bfloat16))
    assert not can_be_grouped(torch.empty(13, 48)) and not can_be_grouped(torch.empty(16, 18)) and not can_be_grouped(torch.empty(4, 16, dtype=torch.bfloat16))
    assert not can_be_grouped(torch.empty(16, 48, dtype=torch.float64))
    odd, even = model_of(**ODD), model_of()
    fuse(odd), fuse(even)
    assert ["ask" in layer.mlp.__dict__ for layer in (odd.model.layers[1], even.model.layers[1])] == [False, True]
    gradients(odd, torch.arange(60).reshape(3, 20))


def test_a_damaged_expert_is_named_as_the_layers_name_it():
    model = model_of()
    fuse(model)
    with torch.no_grad():
        model.model.layers[2].mlp.experts[5].down_proj.weight[0, 0] = torch.nan
    with pytest.raises(K2Error, match="layer 2, expert 5"):
        model(torch.arange(90).reshape(3, 30))
