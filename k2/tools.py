"""Tools for a chat: Python functions as OpenAI's tool declarations, and a search that needs no network.

    def add(a: int, b: int = 0) -> int:      {"type": "function", "function": {"name": "add",
        "Add two numbers."                     "description": "Add two numbers.", "parameters": {"type": "object",
        return a + b                           "properties": {"a": {"type": "integer"}, "b": ...}, "required": ["a"]}}}

Type hints become a schema that k2/grammar.py can enforce: str, int, float, bool, None, list, dict, Literal, and unions.
"""

import importlib.util
import inspect
import json
import math
import re
import types
import typing
from pathlib import Path

from .config import K2Error

ROOT = Path(__file__).resolve().parent.parent
WEB_SEARCH = {"type": "builtin_function", "function": {"name": "$web_search"}}  # as Moonshot's API declares it
SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def declaration(function) -> dict:
    """A function as a tool. Raises K2Error for a parameter without a type hint, or of a type that has no schema."""
    try:
        hints, properties, required = typing.get_type_hints(function), {}, []
    except (Exception, SystemExit) as error:  # a hint in quotation marks is a program, too
        raise K2Error(f"tool {function.__name__}: its type hints cannot be read: {type(error).__name__}: {error}. Mend them.") from None
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY) or name not in hints:
            raise K2Error(f"tool {function.__name__}: parameter {name} has no type hint or cannot be named. Write it as {name}: str.")
        properties[name] = schema_of(hints[name], f"tool {function.__name__}: parameter {name}")
        required += [name] if parameter.default is parameter.empty else []
    described = {"description": inspect.getdoc(function)} if inspect.getdoc(function) else {}
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": function.__name__, **described, "parameters": parameters}}


def schema_of(hint, where: str) -> dict:
    """The JSON Schema of a type hint."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if isinstance(origin, type) and origin in SIMPLE:
        return {"type": SIMPLE[origin]}
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [schema_of(part, where) for part in inner]}
    if origin is list and len(inner) == 1:
        return {"type": "array", "items": schema_of(inner[0], where)}
    if origin is dict and len(inner) == 2 and inner[0] is str:
        return {"type": "object", "additionalProperties": schema_of(inner[1], where)}
    if origin in (list, dict) and not inner:
        return {"type": "array" if origin is list else "object"}
    raise K2Error(f"{where}: found {hint}; expected str, int, float, bool, None, list[...], dict[str, ...], Literal[...], or a union of these.")


def functions_of(path: str) -> dict[str, typing.Callable]:
    """The public functions that a Python file defines, by name. The file is run."""
    if not Path(path).is_file():
        raise K2Error(f"{path}: expected a Python file, found {'something else' if Path(path).exists() else 'nothing'}. Give a file of functions with type hints.")
    spec = importlib.util.spec_from_file_location("chat_tools", path)
    if spec is None:
        raise K2Error(f"{path}: expected a Python file, whose name ends in .py. Rename it.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may fail in any way, and must not end the chat
        raise K2Error(f"{path}: {type(error).__name__}: {error}. Mend the file; it is run to find its functions.") from None
    found = {name: f for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == "chat_tools" and not name.startswith("_")}
    if not found:
        raise K2Error(f"{path}: expected functions whose names do not begin with _, found none. Define one with type hints.")
    return found


def called(function, arguments: str) -> str:
    """What a function gives for a call's arguments, as the text that the model is told; a failure is told as well."""
    try:
        result = function(**json.loads(arguments))
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except (Exception, SystemExit) as error:  # whatever went wrong, the model may try again
        return f"{type(error).__name__}: {error}"


# ---- a search without a network ----


def search_repository(query: str, most: int = 5) -> str:
    """The paragraphs of this repository's lessons and code that have most of a query's words, the rare ones first."""
    found = paragraphs()
    words = set(re.findall(r"\w+", query.lower()))
    holding = {word: sum(word in text.lower() for _, text in found) for word in words}
    weight = {word: math.log(len(found) / n) for word, n in holding.items() if n}
    scored = sorted(((sum(w for word, w in weight.items() if word in text.lower()), where, text) for where, text in found), key=lambda hit: -hit[0])
    hits = [f"{where}\n{text[:500]}" for score, where, text in scored[:most] if score > 0]
    return "Offline: a search of this repository's lessons and code, not of the web.\n\n" + ("\n\n".join(hits) or "Nothing found.")


def paragraphs() -> list[tuple[str, str]]:
    """(file:line, text) of every stretch without a blank line."""
    found = []
    for path in sorted([*ROOT.glob("lessons/*.md"), *ROOT.glob("k2/*.py"), *ROOT.glob("README.md")]):
        line = 1
        for text in path.read_text(encoding="utf-8").split("\n\n"):
            found += [(f"{path.relative_to(ROOT).as_posix()}:{line}", text.strip("\n"))] if text.strip() else []
            line += text.count("\n") + 2
    return found


def searched(arguments: str, search) -> str:
    """The answer to a call of $web_search: its query, or whatever else it says, through a search function."""
    try:
        query = json.loads(arguments).get("query", arguments)
    except (ValueError, AttributeError):
        query = arguments
    return search(str(query))
