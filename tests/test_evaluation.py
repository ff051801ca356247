"""The figures of the model card: that each token is predicted once, from as much context as there is."""

import lzma
import math
import random

import pytest
import torch
from small import random_ids, random_model, small_config

from k2.training.evaluation import bits_per_byte, expert_shares, xz_bits_per_byte


@pytest.fixture(scope="module")
def model():
    return random_model(small_config())


def plain_bits(model, ids, contexts) -> float:
    """The same by definition: one call a token, with the given number of tokens before it."""
    nats = 0.0
    with torch.inference_mode():
        for t, context in contexts:
            logits_W = model(torch.tensor(ids[t - context : t]))[-1].double()
            nats -= logits_W.log_softmax(-1)[ids[t]].item()
    return nats / math.log(2)


@pytest.mark.parametrize("length", [2, 3, 9, 10, 11, 16, 17, 18, 40])
@pytest.mark.parametrize("window, stride", [(8, 4), (8, 8), (8, 3), (8, 1)])
def test_every_token_is_predicted_once_from_the_longest_context_of_its_window(model, length, window, stride):
    ids = random_ids(model.config, length, seed=length).tolist()
    contexts = []
    for t in range(1, length):
        steps = max(0, math.ceil((t - window) / stride))  # the first window that reaches t
        contexts.append((t, t - steps * stride))
    expected = plain_bits(model, ids, contexts)
    assert abs(bits_per_byte(model, ids, 1, window, stride) / expected - 1) < 1e-5, f"{length} tokens, window {window}, stride {stride}"


def test_a_window_never_passes_the_context(model):
    ids = random_ids(model.config, 700).tolist()  # the context is 512
    assert 0 < bits_per_byte(model, ids, 700) < 20


def test_bits_are_per_byte(model):
    ids = random_ids(model.config, 30).tolist()
    assert abs(bits_per_byte(model, ids, 10) / bits_per_byte(model, ids, 20) - 2) < 1e-9


def test_shares_are_each_layers_loads_over_the_mean(model):
    ids = random_ids(model.config, 512).tolist()
    shares = expert_shares(model, ids)
    assert len(shares) == 2
    for layer, (idlest, busiest) in zip(model.model.layers[1:], shares):
        counts = []
        hook = layer.mlp.gate.register_forward_hook(lambda _, __, out, counts=counts: counts.append(torch.bincount(out[0].flatten(), minlength=11)))
        with torch.inference_mode():
            model(torch.tensor(ids).reshape(2, 256))
        hook.remove()
        assert idlest == pytest.approx(counts[0].min().item() * 11 / (512 * 4)) and busiest == pytest.approx(counts[0].max().item() * 11 / (512 * 4))


def test_xz_is_xz_and_knows_what_stood_before():
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(97, 123)) for _ in range(5000))
    alone = xz_bits_per_byte(text)
    assert alone == len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) * 8 / 5000 and 4.6 < alone < 5.5
    assert xz_bits_per_byte(text, before=text) < 0.3  # all of it is a repetition
