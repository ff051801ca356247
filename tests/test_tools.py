"""Functions as tools, their results, and the search that needs no network."""

import json
import math
import typing

import pytest

from k2 import K2Error
from k2.grammar import compiled
from k2.tools import ROOT, called, declaration, functions_of, paragraphs, search_repository, searched


def book(city: str, nights: int, price: float = 0.0, breakfast: bool = False, tags: list[str] = (), kind: typing.Literal["single", "double"] = "single",
         note: str | None = None, rooms: dict[str, int] | None = None, anything: list = ()) -> str:  # fmt: skip
    """Book a room.

    More about it."""
    return f"{city} for {nights}"


def test_a_function_becomes_a_declaration():
    assert declaration(book) == {"type": "function", "function": {"name": "book", "description": "Book a room.\n\nMore about it.", "parameters": {
        "type": "object", "required": ["city", "nights"], "properties": {
            "city": {"type": "string"}, "nights": {"type": "integer"}, "price": {"type": "number"}, "breakfast": {"type": "boolean"},
            "tags": {"type": "array", "items": {"type": "string"}}, "kind": {"enum": ["single", "double"]},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "rooms": {"anyOf": [{"type": "object", "additionalProperties": {"type": "integer"}}, {"type": "null"}]}, "anything": {"type": "array"}}}}}  # fmt: skip


def test_every_such_schema_can_be_enforced():
    assert json.loads(compiled(declaration(book)["function"]["parameters"]).shortest) == {"city": "", "nights": 0}


def no_hint(a):
    pass


def stars(*values: int):
    pass


def keywords(**values: int):
    pass


def positional(a: int, /):
    pass


def odd(a: set[int]):
    pass


def keys(a: dict[int, str]):
    pass


@pytest.mark.parametrize(("function", "words"), [(no_hint, "no_hint: parameter a has no type hint"), (stars, "cannot be named"), (keywords, "cannot be named"), (positional, "cannot be named"),
                                                 (odd, r"parameter a: found set\[int\]; expected str, int"), (keys, r"found dict\[int, str\]")])  # fmt: skip
def test_what_has_no_schema_is_refused(function, words):
    with pytest.raises(K2Error, match=words):
        declaration(function)


def test_a_call_gives_text_and_so_does_a_failure():
    assert called(book, '{"city": "Rome", "nights": 2}') == "Rome for 2"
    assert called(math.hypot, "{}") == "0.0" and called(lambda: {"é": None}, "{}") == '{"é": null}'
    assert called(book, "no JSON").startswith("JSONDecodeError") and called(book, '{"city": 1}').startswith("TypeError: ")
    assert called(lambda: 1 / 0, "{}") == "ZeroDivisionError: division by zero" and called(lambda: {1, 2}, "{}").startswith("TypeError")


def test_a_file_gives_its_own_public_functions(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text("from math import sin\nfrom textwrap import dedent\nX = 1\ndef add(a: int, b: int) -> int:\n    return a + b\ndef _hidden():\n    pass\nclass C:\n    pass\n")
    functions = functions_of(str(file))
    assert list(functions) == ["add"] and functions["add"](1, 2) == 3


@pytest.mark.parametrize(("text", "words"), [("1 / 0", "ZeroDivisionError"), ("def f(:", "SyntaxError"), ("x = 1", "found none"), ("import no_such_module", "ModuleNotFoundError")])
def test_a_file_without_functions_is_one_line(tmp_path, text, words):
    (tmp_path / "t.py").write_text(text)
    with pytest.raises(K2Error, match=words) as raised:
        functions_of(str(tmp_path / "t.py"))
    assert "\n" not in str(raised.value)


def test_what_is_no_python_file_is_refused(tmp_path):
    with pytest.raises(K2Error, match="found nothing"):
        functions_of(str(tmp_path / "none.py"))
    with pytest.raises(K2Error, match="found something else"):
        functions_of(str(tmp_path))
    (tmp_path / "tools.txt").write_text("def f(): pass")
    with pytest.raises(K2Error, match=r"ends in \.py"):
        functions_of(str(tmp_path / "tools.txt"))


# ---- search ----


def test_a_search_finds_the_paragraph_that_has_the_rare_words_and_says_that_it_is_offline():
    found = search_repository("router affinity neighbours among 384 scores bfloat16 tell apart")
    assert found.startswith("Offline: a search of this repository") and "k2/router.py:" in found and "closer together than bfloat16" in found
    assert search_repository("xyzzyplugh").endswith("Nothing found.") and search_repository("").endswith("Nothing found.")


def test_every_place_that_is_named_is_there():
    for where, text in paragraphs()[::50]:
        file, line = where.split(":")
        lines = (ROOT / file).read_text(encoding="utf-8").split("\n")
        assert text.split("\n")[0] in lines[int(line) - 1 : int(line) + 2]


@pytest.mark.parametrize(("arguments", "query"), [('{"query": "x y"}', "x y"), ('{"q": "x"}', '{"q": "x"}'), ("x", "x"), ("[1]", "[1]"), ('{"query": 3}', "3")])
def test_the_query_is_taken_from_whatever_the_model_writes(arguments, query):
    assert searched(arguments, lambda text: f"<{text}>") == f"<{query}>"


def unknown_hint(x: "Nope") -> int:  # noqa: F821
    return 1


def leaving_hint(x: "exit(3)") -> int:  # noqa: F821
    return 1


def listed_hint(x: [int]) -> int:
    return 1


@pytest.mark.parametrize(("function", "words"), [
    (unknown_hint, "tool unknown_hint: its type hints cannot be read: NameError"),
    (leaving_hint, "cannot be read"), (listed_hint, "parameter x: found"),
])  # fmt: skip
def test_hints_that_cannot_be_read_are_refused_by_name(function, words):
    with pytest.raises(K2Error, match=words):
        declaration(function)


def test_a_file_or_a_tool_that_leaves_does_not_end_the_chat(tmp_path):
    path = tmp_path / "leaves.py"
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(K2Error, match="SystemExit: 3"):
        functions_of(str(path))
    path.write_text("import sys\ndef leave() -> int:\n    sys.exit(4)\n")
    assert called(functions_of(str(path))["leave"], "{}") == "SystemExit: 4"
