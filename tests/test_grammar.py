"""The grammar against Python's own JSON and UTF-8, on all short texts; its bounds against counting; what it refuses, by name."""

import itertools
import json
import random
import re

import pytest

from k2 import K2Error
from k2.grammar import DEPTH, DIGITS, GAP, Value, any_object, any_value, closing, compiled, moves


def read(node, text: bytes) -> list[tuple]:
    """The stacks behind a text, the plainest way: a set of stacks, byte by byte."""
    stacks = [(Value(node, 0), ())]
    for byte in text:
        stacks = step(stacks, byte)
    return stacks


def step(stacks: list[tuple], byte: int) -> list[tuple]:
    """The stacks behind one more byte."""
    return list(dict.fromkeys(then for stack in stacks for choice, then in moves(stack) if byte in choice))


def documents(node, letters, longest: int):
    """Every document of at most so many of these letters."""
    places = {"": [(Value(node, 0), ())]}
    for _ in range(longest):
        places = {text + letter: then for text, stacks in places.items() for letter in letters if (then := step(stacks, ord(letter)))}
        yield from (text for text, stacks in places.items() if any(not closing(stack) for stack in stacks))


def accepts(node, text: str | bytes) -> bool:
    """Whether a text is a whole document."""
    return any(not closing(stack) for stack in read(node, text if isinstance(text, bytes) else text.encode()))


def fits(schema, value, **style) -> bool:
    """Whether a value's JSON is a document of a schema."""
    return accepts(compiled(schema), json.dumps(value, **style))


def is_json(text: str) -> bool:
    """Python's verdict, by RFC 8259: no NaN, no lone surrogates, and no blanks around a document, which we never write."""
    try:
        value = json.loads(text, parse_constant=lambda word: 1 / 0)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, ZeroDivisionError):
        return False
    return text == text.strip(" \n\t\r")


# ---- JSON itself ----


@pytest.mark.parametrize(("alphabet", "longest"), [("01-+.eE", 6), ('[]{},:"1 ', 5), ('"\\ux/n\n', 5), ("truefalsn", 5), ("[1, ]", 6), ('{"a":1,}', 5)])
def test_all_short_texts_are_documents_just_when_python_says_so(alphabet, longest):
    letters = sorted(set(alphabet))
    texts = ("".join(chosen) for length in range(1, longest + 1) for chosen in itertools.product(letters, repeat=length))
    assert set(documents(any_value(), letters, longest)) == {text for text in texts if is_json(text) and not re.search(r"[eE][+-]?\d{3}", text)}


@pytest.mark.parametrize("schema", [True, {"type": "object", "properties": {"ab": {"type": "integer", "minimum": 7, "maximum": 23}, "a": {"enum": ["x", "xy", 1, 12]}}, "required": ["ab"]},
                                    {"type": "array", "items": {"type": "string", "minLength": 2, "maxLength": 3}, "minItems": 1, "maxItems": 3}])  # fmt: skip
def test_from_every_place_there_is_a_way_to_the_end_and_closing_is_one(schema):
    node, rng = compiled(schema), random.Random(0)
    for _ in range(300):
        stack, text = (Value(node, 0), ()), b""
        for _ in range(rng.randrange(40)):
            assert accepts(node, text + closing(stack)), (text, closing(stack))
            ways = [(choice, then) for choice, then in moves(stack)]
            if not ways:
                break
            choice, stack = rng.choice(ways)
            text += bytes([rng.choice(choice)])


def test_every_byte_sequence_in_a_string_passes_just_when_it_is_utf8():
    node, rng = any_value(), random.Random(1)
    sequences = [bytes([a]) for a in range(0x80, 256)] + [bytes([a, b]) for a in range(0x80, 256) for b in range(0x70, 256, 3)]
    edges = (0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0)
    sequences += [bytes([a, *more]) for a in range(0xE0, 0x100) for more in itertools.product(edges, repeat=2)]
    sequences += [bytes([a, *more]) for a in range(0xEF, 0x100) for more in itertools.product(edges, repeat=3)]
    sequences += [rng.randbytes(rng.randint(1, 8)).translate(None, bytes(range(0x20)) + b'"\\') for _ in range(3000)]
    for raw in sequences:
        assert accepts(node, b'"' + raw + b'"') == is_utf8(raw), raw


def is_utf8(raw: bytes) -> bool:
    try:
        raw.decode("utf-8")
        return True
    except UnicodeDecodeError:
        return False


def test_escapes_of_surrogates_come_in_pairs():
    node = any_value()
    for code in range(0, 0x10000, 7):
        assert accepts(node, f'"\\u{code:04x}"') == (not 0xD800 <= code < 0xE000), hex(code)
    for high, low in itertools.product((0xD7FF, 0xD800, 0xDBFF, 0xDC00), (0xDBFF, 0xDC00, 0xDFFF, 0xE000)):
        good = is_json(f'"\\u{high:04X}\\u{low:04X}"')
        assert accepts(node, f'"\\u{high:04X}\\u{low:04X}"') == good, (hex(high), hex(low))
    assert not accepts(node, '"\\ud83d"') and not accepts(node, '"\\ud83d\\n"') and accepts(node, '"\\ud83d\\ude00"')


def test_whatever_a_generator_writes_is_a_document():
    from conversations import random_json

    node, rng = any_value(), random.Random(2)
    for _ in range(400):
        value = random_json(rng, 3)
        for style in ({}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}):
            assert accepts(node, json.dumps(value, **style)), value


def test_json_mode_is_an_object():
    assert accepts(any_object(), '{"a": [1, {"b": null}]}') and accepts(any_object(), "{}")
    assert not any(accepts(any_object(), text) for text in ("[]", "1", '"a"', "null", '{"a":1,}', "{,}", '{"a"}', '{"a":}', "{1:1}"))


def test_depth_digits_and_blanks_are_bounded():
    node = any_value()
    assert accepts(node, "[" * DEPTH + "1" + "]" * DEPTH) and not accepts(node, "[" * (DEPTH + 1) + "]" * (DEPTH + 1))
    assert accepts(node, "9" * DIGITS) and not read(node, b"9" * (DIGITS + 1)) and not read(node, b"0." + b"9" * (DIGITS + 1)) and not read(node, b"1e100")
    assert accepts(node, "[" + " " * GAP + "]") and not read(node, b"[" + b" " * (GAP + 1))
    assert not read(node, b" ") and not read(node, b"{} ")


# ---- bounds ----


def test_integers_within_bounds_are_exactly_those_that_counting_gives():
    rng = random.Random(3)
    pairs = [(0, 0), (-3, -1), (-5, 5), (0, 9), (9, 10), (99, 101), (1, 1000), (-1000, 7), (-12, -12), *(sorted(rng.choices(range(-1500, 1500), k=2)) for _ in range(8))]
    for low, high in pairs:
        node = compiled({"type": "integer", "minimum": low, "maximum": high})
        assert sorted(documents(node, "-0123456789", 6), key=int) == [str(n) for n in range(low, high + 1)], (low, high)
        assert low <= int(node.shortest) <= high and len(node.shortest) == min(len(str(n)) for n in range(low, high + 1))
        assert not accepts(node, f"{high}.0")


@pytest.mark.parametrize(("bounds", "test"), [
    ({"minimum": 0.25, "maximum": 1.5}, lambda x: 0.25 <= x <= 1.5),
    ({"exclusiveMinimum": 0.25, "exclusiveMaximum": 1.5}, lambda x: 0.25 < x < 1.5),
    ({"exclusiveMinimum": 0}, lambda x: x > 0),
    ({"maximum": -0.1}, lambda x: x <= -0.1),
    ({"minimum": -0.3, "exclusiveMaximum": 0.2}, lambda x: -0.3 <= x < 0.2),
    ({"minimum": 0.1}, lambda x: x >= 0.1),
])  # fmt: skip
def test_numbers_within_bounds_are_exactly_those_that_comparing_gives(bounds, test):
    node = compiled({"type": "number", **bounds})
    for hundredths in range(-250, 250):
        for text in {f"{hundredths / 100:.2f}", f"{hundredths / 100:g}"} - {"-0", "-0.00"}:
            assert accepts(node, text) == test(float(text)), text
    assert test(float(node.shortest))


def test_the_last_digits_of_a_bounded_number_never_lead_into_a_dead_end():
    node = compiled({"type": "number", "exclusiveMinimum": 0, "maximum": 0.000002})
    assert accepts(node, "0.000001") and accepts(node, "0.000002") and not read(node, b"0.00001") and not read(node, b"0.000000")
    assert float(node.shortest) in (0.000001, 0.000002)
    for kind in ("integer", "number"):
        exact = compiled({"type": kind, "minimum": 123456, "maximum": 123456})
        assert exact.shortest == b"123456"


def test_lengths_count_characters_and_elements():
    node = compiled({"type": "string", "minLength": 2, "maxLength": 3})
    for text in ("", "a", "ab", "abc", "abcd", "é", "éé", "世界和平", "😀😀", "😀", "\n\n", '"\\'):
        for ascii in (True, False):
            assert accepts(node, json.dumps(text, ensure_ascii=ascii)) == (2 <= len(text) <= 3), text
    node = compiled({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 2})
    assert [n for n in range(5) if accepts(node, json.dumps([None] * n))] == [1, 2]
    assert [n for n in range(3) if accepts(compiled({"type": "array", "maxItems": 0}), json.dumps([1] * n))] == [0]


# ---- schemas ----

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}, "é \"q\"": {"type": "null"}}, "required": ["name"]}


@pytest.mark.parametrize(("schema", "yes", "no"), [
    (PERSON, [{"name": "x"}, {"age": 3, "name": ""}, {"name": "", "é \"q\"": None, "age": 0}], [{}, {"age": 3}, {"name": 3}, {"name": "x", "age": -1}, {"name": "x", "other": 1}, []]),
    ({"type": "object", "properties": {}}, [{}, {"a": 1}], [1]),
    ({"type": "object"}, [{}, {"a": {"b": [1]}}], ["a", 1, None]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}], [{"a": "x"}, {"a": 1, "b": None}]),
    ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": [None]}], [{}, {"b": 1}]),
    ({"properties": {"a": {"const": 1}}, "additionalProperties": {"type": "string"}, "required": ["b"]}, [{"b": "x"}, {"a": 1, "b": ""}], [{"b": 1}, {"a": 1}]),
    ({"enum": ["a", "ab", "abc", 1, 12, None, True, [1, 2], {"k": "v"}]}, ["a", "ab", "abc", 1, 12, None, True], ["abcd", 2, 123, False, "1"]),
    ({"type": "integer", "enum": [1, "a", 2.5, True, 30]}, [1, 30], ["a", 2.5, True]),
    ({"const": "<|im_end|>"}, ["<|im_end|>"], ["x"]),
    ({"type": ["string", "null"]}, ["x", None], [1, True]),
    ({"type": ["integer", "number"]}, [1, 1.5, -2e3], ["x"]),
    ({"type": "boolean"}, [True, False], [0, None, "true"]),
    ({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}, [1, [1, 2], []], [1.5, ["a"], {}]),
    ({"anyOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"a": {"type": "string"}, "b": {"type": "null"}}, "required": ["b"]}]},
     [{"a": 1}, {"a": "x", "b": None}, {"b": None}], [{"a": 1, "b": None}, {"a": "x"}, {}]),
    ({"$defs": {"p": PERSON, "list": {"type": "array", "items": {"$ref": "#/$defs/p"}}}, "$ref": "#/$defs/list"}, [[], [{"name": "x"}]], [[{}], {"name": "x"}]),
    ({"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "null"}}]}}, [[], [None, [None]], [[]]], [[[[]]], [1]]),
    ({"title": "T", "description": "d", "default": 3, "examples": [1], "$schema": "x", "minimum": 2}, [2, 3.5], [1, "x"]),
    ({"minLength": 1, "minItems": 1}, ["x", [1]], ["", [], 1, None]),
    ({}, [1, None, {"a": []}], []),
])  # fmt: skip
def test_a_schema_takes_what_it_should_and_nothing_else(schema, yes, no):
    for value in yes:
        assert fits(schema, value, ensure_ascii=False), value
        if "enum" not in schema:
            assert fits(schema, value, ensure_ascii=False, indent=1), value
    for value in no:
        assert not fits(schema, value, ensure_ascii=False), value
    assert accepts(compiled(schema), compiled(schema).shortest)


def test_members_come_in_any_order_but_only_once():
    node = compiled({"type": "object", "properties": {name: {"type": "null"} for name in "abc"}, "required": ["a", "c"]})
    for length in range(4):
        for names in itertools.product("abc", repeat=length):
            text = "{" + ", ".join(f'"{name}": null' for name in names) + "}"
            assert accepts(node, text) == (len(set(names)) == len(names) and {"a", "c"} <= set(names)), text


@pytest.mark.parametrize(("schema", "words"), [
    ({"type": "string", "pattern": "a*"}, "schema: 'pattern' cannot be enforced while text is being written"),
    ({"type": "string", "format": "date"}, "'format' cannot be enforced"),
    ({"type": "object", "properties": {"a": {"multipleOf": 3}}}, "schema.properties.a: 'multipleOf'"),
    ({"oneOf": [{}]}, "'oneOf'"), ({"allOf": [{}]}, "'allOf'"), ({"not": {}}, "'not'"), ({"if": {}}, "'if'"),
    ({"type": "array", "uniqueItems": True}, "'uniqueItems'"), ({"type": "array", "prefixItems": []}, "'prefixItems'"),
    ({"type": "object", "patternProperties": {}}, "'patternProperties'"), ({"type": "object", "minProperties": 1}, "'minProperties'"),
    ({"anyOf": [{}], "type": "string"}, "schema: found anyOf, type; expected anyOf alone"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {}}, "minLength": 1}, "expected \\$ref alone"),
    ({"$ref": "#/nowhere"}, "expected a place in this schema"), ({"$ref": "http://x/y"}, "expected a place in this schema"),
    ({"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}, "$ref": "#/$defs/tree"}, "leads back to itself"),
    ({"anyOf": []}, "schema.anyOf: expected a list"), ({"anyOf": [{}, {"type": "x"}]}, r"schema.anyOf\[1\].type: found 'x'"),
    ({"type": []}, "schema.type"), ({"type": 3}, "schema.type: found 3"),
    ({"enum": []}, "no value of enum"), ({"enum": ["a"], "type": "integer"}, "no value of enum or const is of its type"),
    ({"enum": ["a"], "minLength": 2}, "with at most a type beside it"), ({"enum": "abc"}, "expected a list as enum"), ({"enum": [1], "const": 1}, "expected a list as enum, or a const"),
    ({"const": float("nan")}, "is no JSON value"), ({"const": "\ud800"}, "is no JSON value"),
    ({"type": "string", "minLength": -1}, "schema.minLength: found -1; expected 0 or more"), ({"type": "string", "maxLength": True}, "found True"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength is 3 and maxLength 2"),
    ({"type": "array", "minItems": "1"}, "schema.minItems: found '1'"),
    ({"type": "integer", "minimum": "1"}, "schema.minimum: found '1'"), ({"type": "integer", "minimum": 1e99}, "expected a number below"),
    ({"type": "number", "exclusiveMinimum": True}, "found True"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "no integer with 0 decimals lies within its bounds"),
    ({"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "lies within its bounds"),
    ({"type": "object", "properties": []}, "expected properties to be an object"), ({"type": "object", "required": "a"}, "required a list of names"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required, but not among the properties"),
    (False, "schema: found False"), ("string", "found 'string'"), ({"type": "array", "items": False}, "schema.items: found False"),
])  # fmt: skip
def test_what_cannot_be_enforced_is_refused_by_name_and_place(schema, words):
    with pytest.raises(K2Error, match=words) as raised:
        compiled(schema)
    assert "\n" not in str(raised.value)


def test_a_schema_that_nests_too_deep_is_refused():
    schema = {"type": "null"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(K2Error, match="nests too deep"):
        compiled(schema)


def test_references_that_double_at_each_level_are_compiled_once():
    chain = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}"}, {"const": n}]} for n in range(30)}
    node = compiled({"$defs": {**chain, "d30": {"type": "null"}}, "$ref": "#/$defs/d0"})
    assert len(node.nodes) == 31 and accepts(node, "null") and accepts(node, "29") and not accepts(node, "30")


PAIRS = {**{f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}, "minItems": 2} for n in range(60)}, "d60": {}}


@pytest.mark.parametrize("schema", [
    {"type": "string", "minLength": 100_000}, {"type": "array", "items": {"type": "null"}, "minItems": 10**12}, {"$defs": PAIRS, "$ref": "#/$defs/d0"}])  # fmt: skip
def test_a_schema_whose_shortest_document_is_too_long_is_refused_before_it_is_written(schema):
    with pytest.raises(K2Error, match="its shortest document takes more than 100,000 bytes"):
        compiled(schema)


@pytest.mark.parametrize("schema", [
    {}, {"type": "object"}, {"type": "array", "minItems": 3, "items": {"type": "number", "minimum": 10}}, {"enum": ["abc", "de"]}, {"type": "string", "minLength": 4},
    {"properties": {"aé": {"type": "integer"}, "b": {"enum": [[1]]}}, "required": ["b", "aé"]}, {"anyOf": [{"const": "long"}, {"type": "null"}, {"const": 1}]},
    {"type": "array", "minItems": 1}, {"properties": {"a": {}}}])  # fmt: skip
def test_a_size_is_that_of_the_shortest_document(schema):
    assert compiled(schema).size == len(compiled(schema).shortest)


def test_one_point_nought_is_an_integer():
    assert fits({"enum": [1.0, 2.5], "type": "integer"}, 1.0) and not fits({"enum": [1.0, 2.5], "type": "integer"}, 2.5)


@pytest.mark.parametrize("schema", [{"type": "string", "maxLength": None}, {"type": "string", "minLength": 2.0}, {"type": "array", "minItems": None}])
def test_a_count_is_a_whole_number(schema):
    with pytest.raises(K2Error, match="expected 0 or more, as a whole number"):
        compiled(schema)
