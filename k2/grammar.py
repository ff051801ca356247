"""JSON, byte by byte: a schema becomes nodes, a place in a document becomes a stack of frames, and a frame knows its moves.

    node     what a value may be: Literals, String, Number, Range, Array, Object, AnyOf
    frame    what is still open: inside a string, behind a member, before a colon, ...
    stack    (innermost frame, (next frame, (... ()))); the empty stack is a finished document
    moves    (bytes that may come next, the stack behind them), in every frame
    closing  the fewest bytes that finish a frame

Everything is finite on purpose: depth, digits and the blanks in a gap are bounded, so that text which is sampled ends.
Inside strings only well-formed UTF-8 passes, and \\u escapes of surrogates only in pairs.

The part of JSON Schema that can be enforced while text is being written: type, enum, const, anyOf, $ref (not to itself),
properties, required, additionalProperties, items, minItems, maxItems, minLength, maxLength, minimum, maximum and the
exclusive two. Titles, descriptions, defaults and examples are read over; anything else is refused by name. Of an object
with properties only these are written. They come in any order, and a name in its plain spelling.
"""

import functools
import json
from dataclasses import dataclass, replace
from fractions import Fraction

from .config import K2Error

DEPTH = 12  # how deep free JSON may nest
GAP = 24  # blanks between two things
DIGITS = 15  # of a number, so that a double keeps them apart
EXPONENT = 2  # digits: 1e99 is finite wherever it is read
MOST_BYTES = 100_000  # of the shortest document: longer ones take more memory and time than any limit of tokens allows

BLANKS, DIGIT, HEX = b" \n\t\r", b"0123456789", b"0123456789abcdefABCDEF"


def span(first: int, last: int) -> bytes:
    """The bytes from first to last."""
    return bytes(range(first, last + 1))


# Inside a string: where in a character we are -> (bytes, where then). "" is between characters. RFC 3629's table: no
# overlong forms, no surrogates, nothing above U+10FFFF.
CHARACTER = {
    "": [(bytes(b for b in range(0x20, 0x80) if b not in b'"\\'), ""), (b"\\", "escape"), (span(0xC2, 0xDF), "1 more"),
         (b"\xe0", "e0"), (span(0xE1, 0xEC) + b"\xee\xef", "2 more"), (b"\xed", "ed"), (b"\xf0", "f0"), (span(0xF1, 0xF3), "3 more"), (b"\xf4", "f4")],
    "1 more": [(span(0x80, 0xBF), "")], "2 more": [(span(0x80, 0xBF), "1 more")], "3 more": [(span(0x80, 0xBF), "2 more")],
    "e0": [(span(0xA0, 0xBF), "1 more")], "ed": [(span(0x80, 0x9F), "1 more")], "f0": [(span(0x90, 0xBF), "2 more")], "f4": [(span(0x80, 0x8F), "2 more")],
    "escape": [(b'"\\/bfnrt', ""), (b"u", "u")],
    "u": [(b"0123456789abcABCefEF", "3 hex"), (b"dD", "ud")], "ud": [(b"01234567", "2 hex"), (b"89abAB", "high 2")],
    "3 hex": [(HEX, "2 hex")], "2 hex": [(HEX, "1 hex")], "1 hex": [(HEX, "")],
    "high 2": [(HEX, "high 1")], "high 1": [(HEX, "low")], "low": [(b"\\", "low \\")], "low \\": [(b"u", "low u")],
    "low u": [(b"dD", "low d")], "low d": [(b"cdefCDEF", "2 hex")],
}  # fmt: skip


def rest_of_character(where: str) -> bytes:
    """The fewest bytes back to between characters."""
    return min((bytes([choice[0]]) + rest_of_character(then) for choice, then in CHARACTER[where]), key=len) if where else b""


REST = {where: rest_of_character(where) for where in CHARACTER}

# Inside a number: where -> (bytes, where then). A digit counts against a limit in "whole", "places" and "power".
NUMBER = {
    "start": [(b"-", "minus"), (b"0", "zero"), (b"123456789", "whole")], "minus": [(b"0", "zero"), (b"123456789", "whole")],
    "zero": [(b".", "point"), (b"eE", "e")], "whole": [(DIGIT, "whole"), (b".", "point"), (b"eE", "e")],
    "point": [(DIGIT, "places")], "places": [(DIGIT, "places"), (b"eE", "e")],
    "e": [(b"+-", "sign"), (DIGIT, "power")], "sign": [(DIGIT, "power")], "power": [(DIGIT, "power")],
}  # fmt: skip
COMPLETE = ("zero", "whole", "places", "power")


def moves(stack: tuple):
    """(bytes, stack) of every way to go on; none behind a finished document."""
    return stack[0].moves(stack[1]) if stack else ()


def closing(stack: tuple) -> bytes:
    """The fewest bytes that finish the document."""
    parts = []
    while stack:
        frame, stack = stack
        parts.append(frame.closing())
    return b"".join(parts)


# ---- values ----


@dataclass(frozen=True, eq=False)
class Literals:
    """One of several texts."""

    texts: tuple[bytes, ...]

    def begin(self, rest):
        """The moves of a value that begins here."""
        return Spelling(self.texts).moves(rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """The fewest bytes of such a value."""
        return min(self.texts, key=len)

    @property
    def size(self) -> int:
        """How many bytes that is."""
        return len(self.shortest)


@dataclass(frozen=True)
class Spelling:
    """What may still follow of some texts; an empty one among them says that it may end here."""

    left: tuple[bytes, ...]

    def moves(self, rest):
        """By next byte; texts that begin alike stay together."""
        for byte in sorted({text[0] for text in self.left if text}):
            left = tuple(text[1:] for text in self.left if text[:1] == bytes([byte]))
            yield bytes([byte]), rest if left == (b"",) else (Spelling(left), rest)
        if b"" in self.left:
            yield from moves(rest)

    def closing(self) -> bytes:
        """The shortest of them."""
        return min(self.left, key=len)


@dataclass(frozen=True, eq=False)
class String:
    """A string of `least` to `most` characters; None is no limit."""

    least: int = 0
    most: int | None = None

    def begin(self, rest):
        """Its quotation mark."""
        yield b'"', (Text("", self.least, self.most), rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """As short as allowed."""
        return b'"' + b"a" * self.least + b'"'

    @property
    def size(self) -> int:
        """How many bytes that is."""
        return self.least + 2


@dataclass(frozen=True)
class Text:
    """Inside a string: where in a character, and how many more characters there must be, and may be."""

    where: str
    need: int
    room: int | None

    def moves(self, rest):
        """A character counts when it begins."""
        begins = self.where == ""
        if not begins or self.room != 0:
            need, room = (max(self.need - 1, 0), None if self.room is None else self.room - 1) if begins else (self.need, self.room)
            for choice, then in CHARACTER[self.where]:
                yield choice, (Text(then, need, room), rest)
        if begins and not self.need:
            yield b'"', rest

    def closing(self) -> bytes:
        """The rest of a character, those that are missing, and the quotation mark."""
        return REST[self.where] + b"a" * self.need + b'"'


@dataclass(frozen=True, eq=False)
class Number:
    """Any number that JSON can write, with a bounded number of digits."""

    def begin(self, rest):
        """Its sign or first digit."""
        return Numeral("start", 0).moves(rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """Zero."""
        return b"0"

    size = 1


@dataclass(frozen=True)
class Numeral:
    """Inside a number: where, and how many more digits this part of it may have."""

    where: str
    left: int

    def moves(self, rest):
        """Digits and signs; and since nothing marks a number's end, what may come behind it."""
        for choice, then in NUMBER[self.where]:
            left = self.left - 1 if then == self.where else (EXPONENT if then == "power" else DIGITS) - 1
            if left >= 0:
                yield choice, (Numeral(then, left), rest)
        if self.where in COMPLETE:
            yield from moves(rest)

    def closing(self) -> bytes:
        """Nothing, or one digit."""
        return b"" if self.where in COMPLETE else b"0"


# ---- numbers within bounds ----


@dataclass(frozen=True, eq=False)
class Range:
    """A number from low to high without an exponent, both in units of 10^-places: 1.5 with 2 places is 150."""

    low: int
    high: int
    places: int

    def begin(self, rest):
        """A first digit; or a minus, behind which the magnitude's bounds are the others turned round."""
        yield from first_digits(max(self.low, 0), self.high, self.places, rest)
        if self.low < 0:
            yield b"-", (Minus(max(-self.high, 1), -self.low, self.places), rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """The shortest of those that there are."""
        return shortest_digits(self.begin(()))

    @property
    def size(self) -> int:
        """How many bytes that is."""
        return len(self.shortest)


@dataclass(frozen=True)
class Minus:
    """Behind a minus: the magnitude's bounds."""

    low: int
    high: int
    places: int

    def moves(self, rest):
        """Its first digit."""
        return first_digits(self.low, self.high, self.places, rest)

    @property
    def complete(self) -> bool:
        """A digit must follow."""
        return False

    def closing(self) -> bytes:
        """The shortest magnitude."""
        return shortest_digits(self.moves(()))


@dataclass(frozen=True)
class Whole:
    """Before the point. gaps[k] says: with k more digits before the point, the value may exceed the least that these
    digits can still mean by so much, (from, to); or None where no such value is within the bounds."""

    gaps: tuple[tuple[int, int] | None, ...]
    places: int

    def moves(self, rest):
        """A further digit, the point, or the end."""
        for digit in range(10):
            gaps = up_to_the_last(within(gap, digit * 10 ** (k + self.places), 10 ** (k + self.places)) for k, gap in enumerate(self.gaps[1:]))
            if gaps:
                yield bytes([DIGIT[digit]]), (Whole(gaps, self.places), rest)
        if self.gaps[0] and self.places:
            yield b".", (Places(self.gaps[0], self.places, False), rest)
        if self.complete:
            yield from moves(rest)

    @property
    def complete(self) -> bool:
        """Whether the digits so far are a value within the bounds."""
        return bool(self.gaps[0]) and self.gaps[0][0] == 0

    def closing(self) -> bytes:
        """The fewest digits to such a value."""
        return b"" if self.complete else shortest_digits(self.moves(()))


@dataclass(frozen=True)
class Places:
    """Behind the point, with so many places left; the gap as in Whole."""

    gap: tuple[int, int]
    left: int
    begun: bool

    def moves(self, rest):
        """A further digit, or the end."""
        for digit in range(10) if self.left else ():
            gap = within(self.gap, digit * 10 ** (self.left - 1), 10 ** (self.left - 1))
            if gap:
                yield bytes([DIGIT[digit]]), (Places(gap, self.left - 1, True), rest)
        if self.complete:
            yield from moves(rest)

    @property
    def complete(self) -> bool:
        """Whether the digits so far are a value within the bounds."""
        return self.begun and self.gap[0] == 0

    def closing(self) -> bytes:
        """The fewest digits to such a value."""
        return b"" if self.complete else shortest_digits(self.moves(()))


def within(gap: tuple[int, int] | None, start: int, size: int) -> tuple[int, int] | None:
    """The part of a gap that lies in [start, start + size), counted from start."""
    if gap is None or gap[1] < start or gap[0] >= start + size:
        return None
    return max(gap[0] - start, 0), min(gap[1] - start, size - 1)


def up_to_the_last(gaps) -> tuple:
    """The gaps without those at the end that are none; empty where all are."""
    gaps = list(gaps)
    while gaps and gaps[-1] is None:
        gaps.pop()
    return tuple(gaps)


def first_digits(low: int, high: int, places: int, rest):
    """The moves of a magnitude from low to high; a zero in front stands alone."""
    for digit in range(10):
        sizes = [10 ** (k + places) for k in range(DIGITS - places if digit else 1)]
        gaps = up_to_the_last(within((low, high), digit * size, size) for size in sizes)
        if gaps:
            yield bytes([DIGIT[digit]]), (Whole(gaps, places), rest)


def shortest_digits(choices) -> bytes:
    """The fewest digits from some moves to a complete number, by breadth."""
    frontier = {stack[0]: choice[:1] for choice, stack in choices}
    while not any(frame.complete for frame in frontier):
        frontier = {stack[0]: text + choice[:1] for frame, text in frontier.items() for choice, stack in frame.moves(())}
    return next(text for frame, text in frontier.items() if frame.complete)


# ---- arrays and objects ----


class Gap:
    """A frame in front of which blanks may stand; `blanks` says how many more."""

    def moves(self, rest):
        """A blank, or what is expected."""
        if self.blanks:
            yield BLANKS, (replace(self, blanks=self.blanks - 1), rest)
        yield from self.expected(rest)


@dataclass(frozen=True)
class Value(Gap):
    """Before a value."""

    node: object
    blanks: int = GAP

    def expected(self, rest):
        """Its first byte."""
        return self.node.begin(rest)

    def closing(self) -> bytes:
        """The shortest value."""
        return self.node.shortest


@dataclass(frozen=True, eq=False)
class Array:
    """`least` to `most` values of one kind; None is no limit."""

    items: object
    least: int = 0
    most: int | None = None

    def begin(self, rest):
        """Its bracket."""
        yield b"[", (Element(self, self.least, self.most), rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """As few as allowed."""
        return b"[" + b",".join([self.items.shortest] * self.least) + b"]"

    @functools.cached_property
    def size(self) -> int:
        """How many bytes that is."""
        return max(self.least * (self.items.size + 1) - 1, 0) + 2


@dataclass(frozen=True)
class Element(Gap):
    """Behind the opening bracket. need and room count elements, as Text counts characters."""

    array: Array
    need: int
    room: int | None
    blanks: int = GAP

    def expected(self, rest):
        """An element, or the end."""
        if self.room != 0:
            yield from self.array.items.begin((behind_element(self), rest))
        if not self.need:
            yield b"]", rest

    def closing(self) -> bytes:
        """What is missing, and the bracket."""
        return self.array.shortest[1:]


@dataclass(frozen=True)
class Behind(Gap):
    """Behind an element."""

    array: Array
    need: int
    room: int | None
    blanks: int = GAP

    def expected(self, rest):
        """A comma and a further element, or the end."""
        if self.room != 0:
            yield b",", (Value(self.array.items), (behind_element(self), rest))
        if not self.need:
            yield b"]", rest

    def closing(self) -> bytes:
        """What is missing, and the bracket."""
        return (b"," + self.array.items.shortest) * self.need + b"]"


def behind_element(frame) -> Behind:
    """The frame behind one more element."""
    return Behind(frame.array, max(frame.need - 1, 0), None if frame.room is None else frame.room - 1)


@dataclass(frozen=True, eq=False)
class Object:
    """Members by name, of which some must be there; or, without names, any names with values of one kind."""

    names: tuple[bytes, ...]  # spelled with their quotation marks
    values: tuple
    required: frozenset[int]
    others: object = None

    def begin(self, rest):
        """Its brace."""
        yield b"{", (Member(self, frozenset(), True), rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """The required members."""
        return b"{" + b",".join(self.member(n) for n in sorted(self.required)) + b"}"

    @functools.cached_property
    def size(self) -> int:
        """How many bytes that is."""
        return max(sum(len(self.names[n]) + self.values[n].size + 2 for n in self.required) - 1, 0) + 2

    def member(self, n: int) -> bytes:
        """A member at its shortest."""
        return self.names[n] + b":" + self.values[n].shortest

    def left(self, seen: frozenset[int]) -> list[int]:
        """The members that may still come: a name comes once."""
        return [n for n in range(len(self.names)) if n not in seen]


@dataclass(frozen=True)
class Member(Gap):
    """Before a name: behind the opening brace (first), or behind a comma."""

    object: Object
    seen: frozenset[int]
    first: bool
    blanks: int = GAP

    def expected(self, rest):
        """A name that has not been; or the end, where nothing is missing."""
        if self.object.others:
            yield b'"', (Text("", 0, None), (Colon(self.object.others), (After(self.object, self.seen), rest)))
        yield from Name(self.object, self.seen, tuple((self.object.names[n], n) for n in self.object.left(self.seen))).moves(rest)
        if self.first and not self.object.required:
            yield b"}", rest

    def closing(self) -> bytes:
        """What is required; behind a comma at least one member, the shortest."""
        o, missing = self.object, sorted(self.object.required - self.seen)
        if missing or self.first:
            return b",".join(o.member(n) for n in missing) + b"}"
        return min([o.member(n) for n in o.left(self.seen)] + ([b'"":' + o.others.shortest] if o.others else []), key=len) + b"}"


@dataclass(frozen=True)
class Name:
    """Inside a name: what is left of each that it may become."""

    object: Object
    seen: frozenset[int]
    left: tuple[tuple[bytes, int], ...]

    def moves(self, rest):
        """By next byte; a name is whole with its closing quotation mark."""
        for byte in sorted({tail[0] for tail, _ in self.left}):
            left = tuple((tail[1:], n) for tail, n in self.left if tail[0] == byte)
            tail, n = left[0]
            behind = (After(self.object, self.seen | {n}), rest)
            yield bytes([byte]), (Name(self.object, self.seen, left), rest) if tail else (Colon(self.object.values[n]), behind)

    def closing(self) -> bytes:
        """The cheapest of these names, its value, and what else is required."""
        o = self.object
        ways = [tail + b":" + o.values[n].shortest + After(o, self.seen | {n}).closing() for tail, n in self.left]
        return min(ways, key=len)


@dataclass(frozen=True)
class Colon(Gap):
    """Behind a name."""

    node: object
    blanks: int = GAP

    def expected(self, rest):
        """The colon."""
        yield b":", (Value(self.node), rest)

    def closing(self) -> bytes:
        """The colon and the shortest value."""
        return b":" + self.node.shortest


@dataclass(frozen=True)
class After(Gap):
    """Behind a member."""

    object: Object
    seen: frozenset[int]
    blanks: int = GAP

    def expected(self, rest):
        """A comma if a name is left, or the end."""
        if self.object.others or self.object.left(self.seen):
            yield b",", (Member(self.object, self.seen, False), rest)
        if self.object.required <= self.seen:
            yield b"}", rest

    def closing(self) -> bytes:
        """What is missing, and the brace."""
        return b"".join(b"," + self.object.member(n) for n in sorted(self.object.required - self.seen)) + b"}"


@dataclass(frozen=True, eq=False)
class AnyOf:
    """One of several kinds. Where two begin alike, both stay open until the text decides."""

    nodes: tuple

    def begin(self, rest):
        """The moves of each."""
        for node in self.nodes:
            yield from node.begin(rest)

    @functools.cached_property
    def shortest(self) -> bytes:
        """The shortest of any."""
        return min(self.nodes, key=lambda node: node.size).shortest

    @functools.cached_property
    def size(self) -> int:
        """How many bytes that is."""
        return min(node.size for node in self.nodes)


# ---- schemas ----

ANNOTATIONS = frozenset("title description default examples deprecated readOnly writeOnly $schema $id $comment $defs definitions".split())
OF_TYPE = {
    "string": ("minLength", "maxLength"), "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), "array": ("items", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"), "boolean": (), "null": (),
}  # fmt: skip
KNOWN = frozenset(("type", "enum", "const", "anyOf", "$ref", *(word for words in OF_TYPE.values() for word in words)))


def any_value(depth: int = DEPTH):
    """The node of any JSON value that nests at most so deep."""
    simple = (Literals((b"true", b"false", b"null")), String(), Number())
    if not depth:
        return AnyOf(simple)
    inner = any_value(depth - 1)
    return AnyOf((*simple, Array(inner), Object((), (), frozenset(), inner)))


def any_object(depth: int = DEPTH) -> Object:
    """The node of JSON Mode: any object."""
    return Object((), (), frozenset(), any_value(depth - 1))


def compiled(schema) -> object:
    """The node of a JSON Schema. Raises K2Error with the place of what cannot be enforced."""
    try:
        return Compiler(schema).node(schema, "schema", ())
    except RecursionError:
        raise K2Error("schema: nests too deep. Make it flatter.") from None


class Compiler:
    """Turns one schema document into nodes; `root` is where its references point into."""

    def __init__(self, root):
        self.root, self.pointed = root, {}  # pointed: the node of each reference, compiled once however often it is used

    def node(self, schema, where: str, following: tuple[str, ...]):
        """The node of a part; `following` are the references on the way to it. Nodes are made from the leaves up, and
        one whose shortest document is too long is refused before its bytes are put together."""
        made = self.unchecked(schema, where, following)
        if made.size > MOST_BYTES:
            raise K2Error(f"{where}: its shortest document takes more than {MOST_BYTES:,} bytes; expected no more. Ask for fewer characters or elements.")
        return made

    def unchecked(self, schema, where: str, following: tuple[str, ...]):
        """The node of a part, of any size."""
        if schema is True or schema == {}:
            return any_value()
        if not isinstance(schema, dict):
            raise K2Error(f"{where}: found {schema!r}; expected an object. No value can be written for anything else.")
        for word in schema:
            if word not in KNOWN | ANNOTATIONS:
                raise K2Error(f"{where}: {word!r} cannot be enforced while text is being written. Take it out, and check the finished document for it.")
        words = sorted(set(schema) - ANNOTATIONS)
        for alone in ("$ref", "anyOf"):
            if alone in schema:
                if words != [alone]:
                    raise K2Error(f"{where}: found {', '.join(words)}; expected {alone} alone. Move the others into it.")
                return self.reference(schema[alone], where, following) if alone == "$ref" else self.any_of(schema[alone], where, following)
        if "enum" in schema or "const" in schema:
            return self.literals(schema, where)
        return self.typed(schema, where, following)

    def reference(self, pointer, where: str, following: tuple[str, ...]):
        """The node that "#/a/b" points to."""
        if pointer in following:
            raise K2Error(f"{where}: $ref {pointer!r} leads back to itself, and such a document has no end. Write out as many levels as you need.")
        target = self.root
        for key in str(pointer).removeprefix("#").split("/")[1:]:
            target = target.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        if not str(pointer).startswith("#") or target is None:
            raise K2Error(f"{where}: $ref {pointer!r}; expected a place in this schema, such as '#/$defs/name'.")
        if pointer not in self.pointed:
            self.pointed[pointer] = self.node(target, f"{where}({pointer})", (*following, pointer))
        return self.pointed[pointer]

    def any_of(self, schemas, where: str, following: tuple[str, ...]):
        """The node of alternatives."""
        if not isinstance(schemas, list) or not schemas:
            raise K2Error(f"{where}.anyOf: expected a list of at least one schema.")
        return either([self.node(schema, f"{where}.anyOf[{n}]", following) for n, schema in enumerate(schemas)])

    def literals(self, schema: dict, where: str):
        """The node of enum or const: those of its values that the type allows."""
        others = sorted(set(schema) - ANNOTATIONS - {"enum", "const", "type"})
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if others or not isinstance(values, list) or {"enum", "const"} <= set(schema):
            raise K2Error(f"{where}: found {', '.join(sorted(set(schema) - ANNOTATIONS))}; expected a list as enum, or a const, with at most a type beside it.")
        kinds = types_of(schema, where)
        texts = tuple(dict.fromkeys(spelled(value, where) for value in values if any(is_of_type(value, kind) for kind in kinds)))
        if not texts:
            raise K2Error(f"{where}: no value of enum or const is of its type. Compare the two.")
        return Literals(texts)

    def typed(self, schema: dict, where: str, following: tuple[str, ...]):
        """The node of one or several types."""
        return either([self.of_type(kind, schema, where, following) for kind in types_of(schema, where)])

    def of_type(self, kind: str, schema: dict, where: str, following: tuple[str, ...]):
        """The node of one type with the words that belong to it."""
        if kind in ("boolean", "null"):
            return Literals((b"true", b"false") if kind == "boolean" else (b"null",))
        if kind == "string":
            return String(*counts(schema, where, "minLength", "maxLength"))
        if kind == "array":
            items = self.node(schema.get("items", True), f"{where}.items", following)
            return Array(items, *counts(schema, where, "minItems", "maxItems"))
        return self.object(schema, where, following) if kind == "object" else number(kind, schema, where)

    def object(self, schema: dict, where: str, following: tuple[str, ...]):
        """The node of an object."""
        properties, required, others = schema.get("properties", {}), schema.get("required", []), schema.get("additionalProperties", True)
        if not isinstance(properties, dict) or not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise K2Error(f"{where}: expected properties to be an object and required a list of names.")
        unknown = [name for name in required if name not in properties]
        if unknown and others is False:
            raise K2Error(f"{where}: {unknown[0]!r} is required, but not among the properties, and others are forbidden. Add it to one of them.")
        properties = {**properties, **{name: others for name in unknown}}
        nodes = [self.node(part, f"{where}.properties.{name}", following) for name, part in properties.items()]
        names = tuple(spelled(name, where) for name in properties)
        free = None if properties or others is False else self.node(others, f"{where}.additionalProperties", following)
        return Object(names, tuple(nodes), frozenset(list(properties).index(name) for name in required), free)


def either(nodes: list):
    """One of some nodes, each once, and those of an AnyOf among them: nested and repeated, they would double at each level."""
    flat = tuple(dict.fromkeys(one for node in nodes for one in (node.nodes if isinstance(node, AnyOf) else (node,))))
    return flat[0] if len(flat) == 1 else AnyOf(flat)


def types_of(schema: dict, where: str) -> list[str]:
    """The types a schema allows: those it names, or those that its words speak of, or all."""
    named = schema.get("type", [kind for kind, words in OF_TYPE.items() if any(word in schema for word in words)] or list(OF_TYPE))
    kinds = named if isinstance(named, list) else [named]
    unknown = [kind for kind in kinds if not isinstance(kind, str) or kind not in OF_TYPE]
    if unknown or not kinds:
        raise K2Error(f"{where}.type: found {unknown[0] if unknown else kinds!r}; expected one of {', '.join(OF_TYPE)}.")
    return [kind for kind in kinds if not (kind == "integer" and "number" in kinds)]


def is_of_type(value, kind: str) -> bool:
    """Whether a JSON value is of a schema's type; a boolean is no number."""
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # JSON Schema: 1.0 is an integer
    python = {"string": str, "number": (int, float), "integer": int, "array": list, "object": dict, "boolean": bool, "null": type(None)}[kind]
    return isinstance(value, python) and (kind == "boolean" or not isinstance(value, bool))


def spelled(value, where: str) -> bytes:
    """The one way in which a given value is written."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise K2Error(f"{where}: {value!r} is no JSON value: {error}.") from None


def counts(schema: dict, where: str, least: str, most: str) -> tuple[int, int | None]:
    """A least and a most number of characters or elements."""
    low, high = schema.get(least, 0), schema.get(most)
    for word in (word for word in (least, most) if word in schema):
        value = schema[word]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise K2Error(f"{where}.{word}: found {value!r}; expected 0 or more, as a whole number without a point.")
    if high is not None and high < low:
        raise K2Error(f"{where}: {least} is {low} and {most} {high}; expected no more than that.")
    return low, high


def number(kind: str, schema: dict, where: str):
    """A number without bounds, or a Range on the grid of decimals that a double keeps apart."""
    given = {word: schema[word] for word in OF_TYPE["number"] if word in schema}
    for word, value in given.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 10**DIGITS:
            raise K2Error(f"{where}.{word}: found {value!r}; expected a number below 10^{DIGITS}.")
    if kind == "number" and not given:
        return Number()
    exact = {word: Fraction(repr(value)) for word, value in given.items()}  # 0.1 as it is written, not as a double has it
    places = 0 if kind == "integer" else max(0, min(6, DIGITS - max([9, *(len(str(abs(int(value)))) for value in exact.values())])))
    unit, furthest = 10**places, 10 ** (DIGITS - places) - 1
    low = max(-(-exact.get("minimum", -furthest) * unit // 1), exact.get("exclusiveMinimum", -furthest - 1) * unit // 1 + 1)
    high = min(exact.get("maximum", furthest) * unit // 1, -(-exact.get("exclusiveMaximum", furthest + 1) * unit // 1) - 1)
    if low > high:
        raise K2Error(f"{where}: no {kind} with {places} decimals lies within its bounds. Widen them.")
    return Range(int(low), int(high), places)
