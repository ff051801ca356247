"""The figures of the model card: that each token is predicted once, from as much context as there is."""

import lzma
import math
import random

import numpy as np
import pytest
import torch
from small import random_ids, random_model, small_config

import k2
from k2.__main__ import MINI
from k2.training import evaluation
from k2.training.evaluation import bits_per_byte, expert_shares, needle_accuracy, seen_share, xz_bits_per_byte


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


def witten_bell(training, context, word, vocabulary):
    """The formula by counting, one order at a time."""
    probability = 1 / vocabulary
    for n in range(len(context) + 1):
        last = tuple(context[len(context) - n :])
        followers = [training[i + n] for i in range(len(training) - n) if tuple(training[i : i + n]) == last]
        if followers:
            probability = (followers.count(word) + len(set(followers)) * probability) / (len(followers) + len(set(followers)))
    return probability


def test_the_n_gram_model_is_witten_and_bells():
    rng = random.Random(1)
    training, ids = [rng.randrange(5) for _ in range(200)], [rng.randrange(6) for _ in range(30)]
    expected = -sum(math.log2(witten_bell(training, ids[max(0, i - 2) : i], ids[i], 6)) for i in range(1, 30)) / 10
    found = evaluation.ngram_bits_per_byte(np.array(training, dtype=np.uint16), ids, 10, 6, order=3)
    assert abs(found / expected - 1) < 1e-12, f"{found} bits, expected {expected}"
    assert sum(witten_bell(training, ids[5:7], w, 6) for w in range(6)) == pytest.approx(1)


def test_a_needle_is_asked_for_at_the_right_place_and_found_by_a_model_that_looks(monkeypatch):
    tokenizer = k2.Tokenizer.from_directory(MINI)
    monkeypatch.setattr(evaluation, "held_out_text", lambda: "def f(x):\n    return x + 1\n" * 400)
    lengths, places = set(), {0.0: [], 0.9: []}

    def looks(ids, positions):
        text = tokenizer.decode(ids.tolist())
        assert text.endswith('_NAME = "') and text.count("_NAME = ") == 2
        lengths.add(len(ids))
        word = text.split('_NAME = "')[1].split('"')[0]
        places[depth].append(text.index("_NAME") / len(text))
        return torch.nn.functional.one_hot(torch.tensor([tokenizer.encode(word)[0]]), 4096).float()

    for depth in places:
        assert needle_accuracy(looks, tokenizer, 128, depth, trials=5) == 1.0
    assert lengths == {128} and max(places[0.0]) < 0.1 and min(places[0.9]) > 0.7
    depth = 0.0
    blind = needle_accuracy(lambda ids, positions: torch.arange(4096.0)[None], tokenizer, 128, depth, trials=200)
    assert 0.03 < blind < 0.3, blind


def test_seen_lines_are_counted_by_their_bytes():
    text = "a line of more than thirty characters\nshort\n    another line of more than thirty letters\n"
    assert seen_share(text, "x\n another line of more than thirty letters") == pytest.approx(41 / 78, abs=0.02)
    assert seen_share(text, "") == 0 and seen_share("short\n", "short") == 0
