"""jsonschema, which knows nothing of how a document was made, finds each one valid; and what we take, it takes."""

import json
import random

import pytest
from conversations import random_json
from test_chat import tokenizer
from test_constraint import SCHEMAS, grammar, sampled, vocabulary, written
from test_grammar import accepts
from test_reply import TOOLS

from k2 import parse_reply
from k2.chat import CALLS, decode_parts
from k2.constraint import CallConstraint
from k2.grammar import compiled

jsonschema = pytest.importorskip("jsonschema", reason="the oracle tests need tests/requirements-oracles.txt")
pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hundred_documents_of_each_schema_validate(name):
    rng = random.Random(5)
    validator = jsonschema.Draft202012Validator({"type": "object"} if SCHEMAS[name] is None else SCHEMAS[name])
    for n in range(100):
        constraint = grammar(name).start()
        text = written(sampled(constraint, constraint.shortest + n % 50, rng))
        validator.validate(json.loads(text))


def test_arguments_of_constrained_calls_validate():
    rng = random.Random(6)
    for n in range(60):
        constraint = CallConstraint(vocabulary(), TOOLS)
        constraint.accept(vocabulary().special[CALLS])
        reply = parse_reply(CALLS + "".join(decode_parts(tokenizer(), sampled(constraint, 80 + n, rng))), TOOLS)
        for call in reply["tool_calls"]:
            schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call["function"]["name"])
            jsonschema.validate(json.loads(call["function"]["arguments"]), schema)


def random_schema(rng: random.Random, depth: int = 2) -> dict:
    """Some schema of the part that is enforced."""
    kind = rng.choice(("string", "integer", "number", "boolean", "null", "enum", *(("array", "object", "anyOf") if depth else ())))
    low, high = sorted(rng.choices(range(-20, 40), k=2))
    if kind == "string":
        return {"type": "string", "minLength": rng.randrange(3), "maxLength": rng.randrange(3, 9)}
    if kind in ("integer", "number"):
        return {"type": kind, **rng.choice(({}, {"minimum": low}, {"minimum": low, "maximum": high}, {"exclusiveMinimum": low / 4, "exclusiveMaximum": high / 4 + 3}))}
    if kind == "array":
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": rng.randrange(2), "maxItems": rng.randrange(2, 5)}
    if kind == "object":
        names = rng.sample("abcd", rng.randrange(4))
        return {"type": "object", "properties": {name: random_schema(rng, depth - 1) for name in names}, "required": [n for n in names if rng.random() < 0.5]}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
    return {"enum": [random_json(rng) for _ in range(rng.randint(1, 4))]} if kind == "enum" else {"type": kind}


def test_whatever_a_random_schema_takes_jsonschema_takes():
    rng, taken = random.Random(7), 0
    for _ in range(400):
        schema = random_schema(rng)
        node, validator = compiled(schema), jsonschema.Draft202012Validator(schema)
        assert validator.is_valid(json.loads(node.shortest)), (schema, node.shortest)
        for _ in range(10):
            value = random_json(rng, 3)
            if accepts(node, json.dumps(value)):
                assert validator.is_valid(value), (schema, value)
                taken += 1
    assert taken > 200
