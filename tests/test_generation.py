"""The generation loop against the plainest one: all tokens anew for every new token, and argmax."""

import functools
import itertools

import pytest
import torch
from small import random_model, small_config

import k2.generation
from k2 import K2Error, LatentCache, generate

PROMPT = [5, 17, 3, 88, 41, 2, 60, 9, 9, 33, 71]


def model_and_reference(seed: int = 0, **changes):
    """A small model, made anew for its hooks' sake, and 24 tokens that continue PROMPT."""
    return random_model(small_config(**changes), seed), list(reference_continuation(small_config(**changes), seed))


@functools.cache
def reference_continuation(config, seed: int) -> tuple[int, ...]:
    """The greedy continuation of PROMPT without cache or chunks."""
    model, ids = random_model(config, seed), list(PROMPT)
    with torch.inference_mode():
        for _ in range(24):
            ids.append(int(model(torch.tensor(ids))[-1].argmax()))
    return tuple(ids[len(PROMPT) :])


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"rope_scaling": None}])
def test_generate_equals_recomputing_everything_for_each_token(changes):
    for seed in range(3):
        model, expected = model_and_reference(seed, **changes)
        assert list(generate(model, PROMPT, 24)) == expected
        assert len(set(expected)) > 4, "a continuation that repeats one id would prove little"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 10, 11, 12])
def test_a_prompt_read_in_chunks_gives_the_same_ids(monkeypatch, chunk):
    model, expected = model_and_reference()
    sizes = spy_on_tokens(model)
    monkeypatch.setattr(k2.generation, "chunk_size", lambda config: chunk)
    assert list(generate(model, PROMPT, 24)) == expected
    whole, rest = divmod(len(PROMPT), chunk)
    assert sizes == [chunk] * whole + [rest] * (rest > 0) + [1] * 23


@pytest.mark.parametrize(("experts", "chosen", "tokens"), [(384, 8, 1536), (64, 8, 512), (48, 4, 512), (1024, 8, 4096)])
def test_a_chunk_is_as_long_as_the_models_experts_ask_for(experts, chosen, tokens):
    assert k2.generation.chunk_size(small_config(n_routed_experts=experts, num_experts_per_tok=chosen)) == tokens


def test_a_long_prompt_of_a_model_with_many_experts_asks_for_each_less_often():
    model = random_model(small_config(n_routed_experts=64, num_experts_per_tok=2, max_position_embeddings=1200))
    sizes, asked = spy_on_tokens(model), []
    for layer in model.model.layers[1:]:
        layer.mlp.experts.fetch = lambda ids, fetch=layer.mlp.experts.fetch: asked.append(len(ids)) or fetch(ids)
    ids = [i % 48 for i in range(1100)]
    assert len(list(generate(model, ids, 1))) == 1 and sizes == [1024, 76] and len(asked) == 2 * len(model.model.layers[1:])


def spy_on_tokens(model) -> list[int]:
    """Fills with the number of tokens of each call of the model's body."""
    sizes = []
    model.model.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-1]))
    return sizes


def test_the_head_never_sees_more_than_one_row(monkeypatch):
    model, expected = model_and_reference()
    rows = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: rows.append(tuple(inputs[0].shape)))
    monkeypatch.setattr(k2.generation, "chunk_size", lambda config: 4)
    assert list(generate(model, PROMPT, 24)) == expected
    assert rows == [(1, 48)] * (3 + 23), "three chunks of the prompt, and one row for each id but the last"


def test_a_stop_id_ends_the_text_and_is_not_yielded():
    model, expected = model_and_reference()
    for n in range(len(expected)):
        stop = expected[n]
        assert list(generate(model, PROMPT, 24, stop_ids={stop})) == list(itertools.takewhile(lambda i, stop=stop: i != stop, expected))


def test_a_stop_id_in_the_prompt_stops_nothing():
    model, expected = model_and_reference()
    absent = next(i for i in PROMPT if i not in expected)
    assert list(generate(model, PROMPT, 24, stop_ids=[absent])) == expected


@pytest.mark.parametrize("count", [0, 1, 2])
def test_no_more_than_max_new_tokens_come_and_no_more_calls_are_made(count):
    model, expected = model_and_reference()
    sizes = spy_on_tokens(model)
    assert list(generate(model, PROMPT, count)) == expected[:count]
    assert sizes == [[], [11], [11, 1]][count]


def test_nothing_runs_until_the_first_id_is_asked_for():
    model, expected = model_and_reference()
    sizes = spy_on_tokens(model)
    ids = generate(model, PROMPT, 24)
    assert sizes == []
    assert next(ids) == expected[0] and sizes == [11]
    assert next(ids) == expected[1] and sizes == [11, 1]


def test_the_context_ends_the_text():
    # A context of 16 has room for 5 ids behind 11; one more is chosen from the last position and attended to by nothing.
    model, expected = model_and_reference()
    small = random_model(small_config(max_position_embeddings=16), 0)
    assert list(generate(small, PROMPT, 24)) == expected[:6]
    assert list(generate(small, [*PROMPT, *expected[:5]], 24)) == expected[5:6], "a prompt that fills the context still gets one id"


def test_a_prompt_longer_than_the_context_is_refused_before_any_work():
    model = random_model(small_config(max_position_embeddings=10), 0)
    sizes = spy_on_tokens(model)
    with pytest.raises(K2Error, match="prompt: 11 tokens; expected at most 10") as raised:
        generate(model, PROMPT, 1)
    assert sizes == [] and "\n" not in str(raised.value)


def test_a_prompt_and_a_cache_that_pass_the_context_together_are_refused():
    model, cache = random_model(small_config(max_position_embeddings=16), 0), LatentCache(small_config())
    list(generate(model, PROMPT, 1, cache=cache))
    with pytest.raises(K2Error, match="prompt: 17 tokens; expected at most 16"):
        generate(model, [1] * 6, 1, cache=cache)
    assert cache.length == 11


def test_an_empty_prompt_is_refused():
    with pytest.raises(K2Error, match="prompt: expected at least one token"):
        generate(random_model(small_config(), 0), [], 1)


@pytest.mark.parametrize("bad", [-1, 97])
def test_an_id_without_an_embedding_row_is_refused(bad):
    with pytest.raises(K2Error, match=f"ids: found {bad}; expected 0 to 96"):
        list(generate(random_model(small_config(), 0), [1, bad, 2], 1))


@pytest.mark.parametrize("cut", [1, 5, 23])
def test_going_on_with_a_kept_cache_equals_one_call(cut):
    model, expected = model_and_reference()
    cache = LatentCache(model.config)
    first = list(generate(model, PROMPT, cut, cache=cache))
    assert cache.length == len(PROMPT) + cut - 1, "the last id is not in the cache: nothing has attended to it yet"
    assert first + list(generate(model, first[-1:], 24 - cut, cache=cache)) == expected


def test_a_second_turn_on_a_kept_cache_equals_one_long_prompt():
    model, expected = model_and_reference()
    cache, turn = LatentCache(model.config), [44, 7, 12]
    list(generate(model, PROMPT, 6, cache=cache))
    whole = [*PROMPT, *expected[:6], *turn]
    assert list(generate(model, [expected[5], *turn], 8, cache=cache)) == list(generate(model, whole, 8))


def test_two_generations_of_one_model_do_not_disturb_each_other():
    model, expected = model_and_reference()
    first, second = generate(model, PROMPT, 24), generate(model, PROMPT[::-1], 24)
    other = list(generate(model, PROMPT[::-1], 24))
    assert [pair for pair in zip(first, second)] == list(zip(expected, other))


class Interrupt:
    """Raises KeyboardInterrupt, as Ctrl-C does, in the n-th forward call of a module."""

    def __init__(self, module, n: int):
        self.left = n
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_ctrl_c_at_any_layer_leaves_a_cache_that_can_go_on(monkeypatch, layer, n):
    monkeypatch.setattr(k2.generation, "chunk_size", lambda config: 4)  # the first three calls read the prompt
    model, expected = model_and_reference()
    cache, got = LatentCache(model.config), []
    interrupt = Interrupt(model.model.layers[layer].mlp, n)  # behind attention: this layer's cache has been written, the next one's not
    with pytest.raises(KeyboardInterrupt):
        for i in generate(model, PROMPT, 24, cache=cache):
            got.append(i)
    interrupt.handle.remove()
    text = [*PROMPT, *got]
    assert cache.length == min(4 * (n - 1), 11 + max(0, n - 4)) and {c.length for c in cache.layers} == {cache.length}
    assert got + list(generate(model, text[cache.length :], 24 - len(got), cache=cache)) == expected


def test_dropping_the_iterator_leaves_a_cache_that_can_go_on():
    model, expected = model_and_reference()
    cache = LatentCache(model.config)
    ids = generate(model, PROMPT, 24, cache=cache)
    got = [next(ids) for _ in range(5)]
    ids.close()
    assert got + list(generate(model, [*PROMPT, *got][cache.length :], 19, cache=cache)) == expected


def test_a_seed_gives_one_text_and_temperature_another():
    model, expected = model_and_reference()
    drawn = [list(generate(model, PROMPT, 24, temperature=1.5, top_p=0.9, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != expected


def test_bad_sampling_parameters_are_refused_before_any_work():
    model = random_model(small_config(), 0)
    with pytest.raises(K2Error, match="temperature"):
        generate(model, PROMPT, 1, temperature=-1)
    with pytest.raises(K2Error, match="top_p"):
        generate(model, PROMPT, 1, temperature=1, top_p=0)


def test_logits_that_are_not_finite_are_refused():
    model = random_model(small_config(), 0)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(K2Error, match="logits: expected finite numbers"):
        list(generate(model, PROMPT, 3))


def test_generated_logits_carry_no_gradient_graph():
    model, cache = random_model(small_config(), 0), LatentCache(small_config())
    assert not k2.generation.prefill(model, PROMPT, cache).requires_grad
    assert not k2.generation.decode(model, 3, cache).requires_grad
