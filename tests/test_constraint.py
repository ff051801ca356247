"""Masks against the plainest search, documents that always end in time, and calls that are always in form."""

import functools
import json
import random

import pytest
import torch
from small import random_model, small_config
from test_chat import tokenizer
from test_grammar import accepts, step
from test_reply import TOOLS

import k2
from k2 import K2Error, generate, parse_reply
from k2.__main__ import MINI
from k2.chat import CALLS, CALLS_END, decode_parts
from k2.constraint import CallConstraint, Constraint, Grammar, ThoughtFirst, Vocabulary, fewest_tokens, trie_levels
from k2.grammar import any_object, closing, compiled
from k2.tokenizer import RESERVED

SCHEMAS = {
    "json mode": None,
    "any value": {},
    "person": {"type": "object", "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 12}, "age": {"type": "integer", "minimum": 18, "maximum": 120},
               "tags": {"type": "array", "items": {"enum": ["red", "redder", "blue"]}, "minItems": 1, "maxItems": 3}}, "required": ["age", "name"]},
    "either": {"anyOf": [{"type": "number", "minimum": -1, "maximum": 1.5}, {"type": "array", "items": {"type": ["boolean", "null"]}}, {"const": {"deep": ["er"]}}]},
    "map": {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "integer"}, "minItems": 2}},
    "text": {"type": "string", "maxLength": 300},
    "number": {"type": "number"},
    "two alike": {"anyOf": [{"properties": {"kind": {"const": "circle"}, "radius": {"type": "number"}}, "required": ["kind", "radius"]},
                            {"properties": {"kind": {"const": "corner"}}, "required": ["kind"]}]},
    "references": {"$defs": {"point": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}, "required": ["x", "y"]}},
                   "type": "array", "items": {"$ref": "#/$defs/point"}, "minItems": 1},
}  # fmt: skip


@functools.cache
def vocabulary() -> Vocabulary:
    """450 learnt tokens, with the control tokens behind them."""
    return Vocabulary(tokenizer())


@functools.cache
def grammar(name: str) -> Grammar:
    """One of the schemas, ready."""
    return Grammar(vocabulary(), SCHEMAS[name])


def node(name: str):
    return any_object() if SCHEMAS[name] is None else compiled(SCHEMAS[name])


def sampled(constraint, limit: int, rng: random.Random, choose=None) -> list[int]:
    """Ids drawn evenly from the masks, as `generate` would take them; every id counts against the limit."""
    constraint.check(limit, vocabulary().width)
    ids = []
    for left in range(limit, 0, -1):
        allowed = constraint.mask(left).nonzero().flatten().tolist()
        assert allowed, f"a dead end behind {ids}"
        i = (choose or rng.choice)(allowed)
        if i in constraint.stop_ids:
            break
        constraint.accept(i)
        ids.append(i)
        if constraint.done:
            break
    return ids


def written(ids: list[int]) -> bytes:
    return b"".join(tokenizer().token_bytes(i) for i in ids)


# ---- the trie ----


def test_the_trie_holds_every_token_at_its_bytes():
    tokens = vocabulary().tokens
    paths, found = [b""], {}
    for parents, bytes_, ids, nodes in trie_levels(tokens):
        paths = [paths[parent] + bytes([byte]) for parent, byte in zip(parents, bytes_)]
        assert len(set(paths)) == len(paths), "two nodes for one prefix"
        found |= {int(i): paths[n] for i, n in zip(ids, nodes)}
    assert found == dict(enumerate(tokens)) and len(tokens) == tokenizer().vocab_size - RESERVED


# ---- masks ----


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_mask_is_what_trying_every_token_gives(name):
    # The plainest search: each token's bytes one by one, through the moves alone, without tables, tries or numbers.
    rng, seen = random.Random(0), 0
    for _ in range(12):
        constraint = grammar(name).start()
        for left in range(60, 0, -1):
            if rng.random() < 0.1:
                mask_W, _ = grammar(name).mask(constraint.stacks)
                for i, token in enumerate(vocabulary().tokens):
                    stacks = list(constraint.stacks)
                    for byte in token:
                        stacks = step(stacks, byte) if stacks else []
                    assert bool(mask_W[i]) == bool(stacks), (name, token)
                assert {i for i in range(len(vocabulary().tokens), vocabulary().width) if mask_W[i]} == (vocabulary().stop_ids if constraint.complete else set())
                seen += 1
            i = rng.choice(constraint.mask(left).nonzero().flatten().tolist())
            if i in constraint.stop_ids or constraint.done:
                break
            constraint.accept(i)
            if constraint.done:
                break
    assert seen > 3


def test_near_the_limit_a_mask_has_just_the_tokens_behind_which_the_document_can_end_in_time():
    rng, checked = random.Random(1), 0
    for name in ("person", "two alike", "json mode"):
        for _ in range(15):
            constraint = grammar(name).start()
            for left in range(rng.randint(constraint.shortest, 30), 0, -1):
                allowed = set(constraint.mask(left).nonzero().flatten().tolist())
                for i in rng.sample(range(len(vocabulary().tokens)), 40):
                    after = grammar(name).after(constraint.stacks, vocabulary().tokens[i])
                    if after and len(grammar(name).ending(after)) <= left - 1:
                        assert i in allowed or left <= constraint.shortest, (name, left, i)
                    checked += bool(after)
                i = rng.choice(sorted(allowed))
                if i in constraint.stop_ids:
                    break
                constraint.accept(i)
                if constraint.done:
                    break
    assert checked > 300


def test_masks_are_kept_and_shared_by_strings_with_room_enough():
    made = Grammar(vocabulary(), {"type": "string", "maxLength": 5000})
    constraint, walks, plain = made.start(), [], made.walk
    made.walk = lambda s: walks.append(s) or plain(s)
    letters = [vocabulary().id_of[b'"'], *[vocabulary().id_of[b"w"]] * 60]
    for i in letters:
        assert constraint.mask(100_000)[i]
        constraint.accept(i)
    assert len(walks) == 2, "before the quotation mark, and one for all places inside"


def test_a_grammar_that_has_seen_too_much_starts_its_tables_anew(monkeypatch):
    monkeypatch.setattr("k2.constraint.MOST_STATES", 30)
    made, rng = Grammar(vocabulary()), random.Random(2)
    for _ in range(40):
        json.loads(written(sampled(made.start(), 40, rng)))
    assert len(made.states) < 400


# ---- documents ----


@pytest.mark.parametrize("name", SCHEMAS)
def test_sampled_documents_always_parse_and_end_within_every_limit(name):
    rng, g, distinct = random.Random(3), grammar(name), set()
    shortest = g.start().shortest
    for n in range(60):
        limit = shortest + (n % 30)
        constraint = g.start()
        ids = sampled(constraint, limit, rng)
        assert len(ids) <= limit and constraint.complete, (name, limit, written(ids))
        json.loads(written(ids))
        assert accepts(node(name), written(ids))
        distinct.add(written(ids))
    assert len(distinct) > 20


def test_the_longest_choice_at_every_step_still_ends_in_time():
    # A model that opens whatever it can: always the token that leaves the most to be written.
    for name in SCHEMAS:
        for extra in (0, 1, 5, 25):
            g = grammar(name)
            constraint = g.start()

            def worst(allowed, g=g, constraint=constraint):
                return max(allowed, key=lambda i: -1 if i in constraint.stop_ids else len(g.ending(g.after(constraint.stacks, vocabulary().tokens[i]))))

            ids = sampled(constraint, constraint.shortest + extra, random.Random(0), worst)
            assert constraint.complete and accepts(node(name), written(ids)), (name, extra, written(ids))


def test_the_shortest_limit_is_enough_and_below_it_is_refused_before_any_work():
    constraint = grammar("person").start()
    ids = sampled(constraint, constraint.shortest, random.Random(0))
    assert set(json.loads(written(ids))) == {"age", "name"} and len(ids) == grammar("person").start().shortest
    with pytest.raises(K2Error, match=f"max_new_tokens: found {len(ids) - 1}; expected at least {len(ids)}"):
        grammar("person").start().check(len(ids) - 1, vocabulary().width)


def test_a_text_is_cut_into_as_few_tokens_as_possible():
    for text in (b"", b"{", b"return width", b'{"name":"a"}', "世界".encode(), b"\x00\xff"):
        ids = fewest_tokens(text, vocabulary())
        assert written(ids) == text and len(ids) <= len(tokenizer().encode(text.decode("utf-8", "replace"))) + text.count(b"\xff")
    best = {b"": 0}
    text = b"def area(width, height)"
    for n in range(1, len(text) + 1):
        best[text[:n]] = 1 + min(best[text[:k]] for k in range(n) if text[k:n] in vocabulary().id_of)
    assert len(fewest_tokens(text, vocabulary())) == best[text]


def test_a_stop_id_is_allowed_just_where_the_document_is_complete():
    constraint = grammar("number").start()
    stops = vocabulary().stop_ids
    for letter, complete in ((b"-", False), (b"1", True), (b".", False), (b"5", True), (b"e", False), (b"0", True)):
        constraint.accept(vocabulary().id_of[letter])
        assert constraint.complete is complete and not constraint.done
        assert {bool(constraint.mask(50)[i]) for i in stops} == {complete}
    constraint = grammar("json mode").start()
    for letter in b"{}":
        assert not constraint.done
        constraint.accept(vocabulary().id_of[bytes([letter])])
    assert constraint.done and constraint.complete and set(constraint.mask(5).nonzero().flatten().tolist()) == stops


def test_control_tokens_and_reserved_ids_are_never_allowed_and_their_spelling_is_in_strings():
    constraint = grammar("text").start()
    constraint.accept(vocabulary().id_of[b'"'])
    assert not constraint.mask(99)[len(vocabulary().tokens) :].any()
    for letter in b"<|im_end|>":
        constraint.accept(vocabulary().id_of[bytes([letter])])
    constraint.accept(vocabulary().id_of[b'"'])
    assert constraint.done


def test_an_id_that_does_not_fit_is_refused():
    for i in (vocabulary().id_of[b"x"], vocabulary().special[CALLS], vocabulary().width - 1):
        with pytest.raises(K2Error, match=f"id {i} does not continue the document"):
            grammar("json mode").start().accept(i)


# ---- with a model ----


@functools.cache
def mini():
    """K2-mini, its tokenizer, and its vocabulary."""
    tokenizer = k2.Tokenizer.from_directory(MINI)
    return k2.load(MINI, dtype=torch.float32), tokenizer, Vocabulary(tokenizer)


def documents_of_mini(count: int, longest: int):
    """(schema's name, text) of so many samples at temperature 1.5."""
    model, tokenizer, vocabulary = mini()
    grammars = {name: Grammar(vocabulary, schema) for name, schema in SCHEMAS.items()}
    for seed in range(count):
        name = list(SCHEMAS)[seed % len(SCHEMAS)]
        constraint = grammars[name].start()
        limit = max(constraint.shortest, 4 + seed % longest)
        ids = list(generate(model, tokenizer.encode("x = "), limit, temperature=1.5, seed=seed, constraint=constraint))
        assert len(ids) <= limit and constraint.complete
        yield name, tokenizer.decode(ids)


def test_what_k2_mini_writes_at_temperature_1_5_parses_and_fits():
    for name, text in documents_of_mini(18, 16):
        json.loads(text)
        assert accepts(node(name), text), (name, text)


@pytest.mark.slow
def test_a_thousand_samples_of_k2_mini_parse_and_fit():
    jsonschema = pytest.importorskip("jsonschema")
    lengths = []
    for name, text in documents_of_mini(1000, 40):
        jsonschema.validate(json.loads(text), SCHEMAS[name] or {})
        lengths.append(len(text))
    assert len(lengths) == 1000
    print(f"1,000 documents of {min(lengths)} to {max(lengths)} characters")


def test_greedy_takes_the_best_of_what_is_allowed():
    model, tokenizer, vocabulary = mini()
    prompt = tokenizer.encode("config = ")
    constraint = Grammar(vocabulary, {"enum": ["None", "x"]}).start()
    (i, *_) = generate(model, prompt, 8, constraint=constraint)
    with torch.inference_mode():
        logits = model(torch.tensor(prompt))[-1]
    allowed = [j for j, token in enumerate(vocabulary.tokens) if b'"None"'.startswith(token) or b'"x"'.startswith(token)]
    assert i == max(allowed, key=lambda j: logits[j]) != int(logits.argmax())


def test_generation_ends_with_the_document_and_asks_the_model_no_more():
    model = random_model(small_config(vocab_size=vocabulary().width), 0)
    calls = []
    model.model.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[0].shape[-1]))
    ids = list(generate(model, [1, 2, 3], 50, constraint=Grammar(vocabulary(), {"const": True}).start()))
    assert written(ids) == b"true" and calls == [3] + [1] * (len(ids) - 1)


def test_the_constraints_stop_ids_hold_even_where_the_caller_gives_none():
    model = random_model(small_config(vocab_size=vocabulary().width), 0)
    for seed in range(20):
        ids = list(generate(model, [1], 12, temperature=2.0, seed=seed, constraint=grammar("number").start()))
        assert all(i < len(vocabulary().tokens) for i in ids) and json.loads(written(ids)) is not None


def test_a_limit_too_small_and_a_model_of_another_vocabulary_are_refused_before_any_work():
    model = random_model(small_config(vocab_size=vocabulary().width), 0)
    with pytest.raises(K2Error, match="max_new_tokens: found 3; expected at least"):
        generate(model, [1], 3, constraint=grammar("person").start())
    with pytest.raises(K2Error, match="the model has 97. Use the checkpoint's own tokenizer"):
        generate(random_model(small_config(), 0), [1], 50, constraint=grammar("person").start())
    with pytest.raises(K2Error, match="the model has 97"):
        generate(random_model(small_config(), 0), [1], 50, constraint=CallConstraint(vocabulary(), TOOLS))


def test_any_object_that_keeps_the_contract_is_a_constraint():
    class Even(k2.generation.Unconstrained):
        """Only even ids, at most five of them."""

        taken = 0
        done = property(lambda self: self.taken == 5)

        def mask(self, left):
            return torch.arange(97) % 2 == 0

        def accept(self, i):
            self.taken += 1

    ids = list(generate(random_model(small_config(), 0), [1, 2], 20, constraint=Even()))
    assert len(ids) == 5 and all(i % 2 == 0 for i in ids)


# ---- a thought before the document ----


@pytest.mark.parametrize("begun", [False, True])
def test_a_thought_comes_first_or_not_at_all_and_leaves_room_for_the_document(begun):
    rng, thoughts = random.Random(5), 0
    for n in range(60):
        constraint = ThoughtFirst(grammar("person").start(), begun)
        limit = grammar("person").start().shortest + n % 20 + begun
        ids = sampled(constraint, limit, rng)
        assert len(ids) <= limit and constraint.complete
        reply = parse_reply("".join(decode_parts(tokenizer(), ids)), thinking=begun)
        assert accepts(node("person"), reply["content"]), reply
        thoughts += reply["reasoning_content"] is not None
    assert thoughts > 5
    with pytest.raises(K2Error, match="expected at least"):
        ThoughtFirst(grammar("person").start(), begun).check(grammar("person").start().shortest - 1 + begun, vocabulary().width)


def test_a_thought_is_free_text_without_control_tokens_and_cannot_stop():
    constraint = ThoughtFirst(grammar("json mode").start())
    constraint.accept(tokenizer().special["<think>"])
    allowed = set(constraint.mask(99).nonzero().flatten().tolist())
    assert allowed == {*range(len(vocabulary().tokens)), tokenizer().special["</think>"]}


def test_a_tokenizer_without_thoughts_has_none_to_wait_for():
    with pytest.raises(K2Error, match="the tokenizer has no <think>"):
        ThoughtFirst(Grammar(mini()[2]).start())


# ---- calls ----


@pytest.mark.parametrize("number", [0, 41])
def test_constrained_calls_are_in_form_of_declared_tools_and_fit_their_schemas(number):
    rng, names, several = random.Random(4), set(), 0
    for n in range(40):
        constraint = CallConstraint(vocabulary(), TOOLS, number)
        limit = 75 + n
        assert constraint.mask(limit)[vocabulary().special[CALLS]]
        constraint.accept(vocabulary().special[CALLS])
        ids = sampled(constraint, limit - 1, rng)
        assert constraint.done and ids[-1] == vocabulary().special[CALLS_END]
        reply = parse_reply(CALLS + "".join(decode_parts(tokenizer(), ids)), TOOLS)
        assert not reply["problems"] and reply["content"] == ""
        for place, call in enumerate(reply["tool_calls"]):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            assert call["id"] == f"functions.{name}:{number + place}"
            schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name)
            assert accepts(compiled(schema), arguments) and set(schema["required"]) <= set(json.loads(arguments))
            names.add(name)
        several += len(reply["tool_calls"]) > 1
    assert names == {t["function"]["name"] for t in TOOLS} and several


def test_text_is_free_until_a_call_begins_and_no_call_begins_that_could_not_end():
    constraint = CallConstraint(vocabulary(), TOOLS)
    free = constraint.mask(500)
    assert free[: len(vocabulary().tokens)].all() and all(free[i] for i in vocabulary().stop_ids)
    control = {i for i in range(len(vocabulary().tokens), vocabulary().width) if free[i]} - vocabulary().stop_ids
    assert control == {tokenizer().special[name] for name in (CALLS, "<think>", "</think>")}, "no other control token"
    fitting = [left for left in range(120) if constraint.mask(left)[tokenizer().special[CALLS]]]
    for seed in range(30):
        constraint = CallConstraint(vocabulary(), TOOLS)
        constraint.accept(tokenizer().special[CALLS])
        sampled(constraint, fitting[0] - 1, random.Random(seed))
        assert constraint.done, "begun with as few tokens as it may be begun with, and ended"


def test_a_tool_without_parameters_gets_an_object():
    tool = {"type": "function", "function": {"name": "now"}}
    constraint = CallConstraint(vocabulary(), [tool])
    constraint.accept(tokenizer().special[CALLS])
    ids = sampled(constraint, 40, random.Random(0))
    (call,) = parse_reply(CALLS + "".join(decode_parts(tokenizer(), ids)), [tool])["tool_calls"]
    assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_schema_that_cannot_be_enforced_is_refused_with_the_tool_and_no_tools_too():
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"pattern": "x"}}}}}
    with pytest.raises(K2Error, match="properties.a: 'pattern' cannot be enforced"):
        CallConstraint(vocabulary(), [bad])
    with pytest.raises(K2Error, match="no tools are declared"):
        CallConstraint(vocabulary(), [])


def test_a_constraint_can_be_asked_what_is_left():
    constraint = grammar("json mode").start()
    assert isinstance(constraint, Constraint) and constraint.shortest == len(fewest_tokens(b"{}", vocabulary()))
    assert closing(constraint.stacks[0]) == b"{}"


def test_many_characters_that_must_come_share_a_mask_and_the_limit_still_holds():
    long = Grammar(vocabulary(), {"type": "string", "minLength": 400})
    rng = random.Random(0)
    ids = sampled(long.start(), 4000, rng, lambda allowed: rng.choice([i for i in allowed if vocabulary().tokens[i].isalpha()] or allowed) if rng.random() < 0.9 else allowed[0])
    assert len(json.loads(b"".join(vocabulary().tokens[i] for i in ids if i < len(vocabulary().tokens)))) >= 400
    assert long.walks < len(ids) / 2
    for limit in (long.start().shortest, long.start().shortest + 7, 405):
        ids = sampled(long.start(), limit, rng)
        assert len(json.loads(b"".join(vocabulary().tokens[i] for i in ids if i < len(vocabulary().tokens)))) >= 400


def test_a_long_text_is_cut_into_tokens_in_time_that_grows_with_its_length():
    assert b"".join(vocabulary().tokens[i] for i in fewest_tokens(b"ab" * 30_000, vocabulary())) == b"ab" * 30_000
