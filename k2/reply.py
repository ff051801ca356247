"""What the model wrote, as OpenAI's message: text, reasoning and tool calls, from the whole text or piece by piece.

    START   nothing but blanks      <think> opens a thought, anything else is text
    THINK   until </think>          or until a call begins: models forget to close their thoughts
    TEXT    until a call begins
    CALLS   between calls           blanks are layout, any other text is kept as content
    ID      functions.NAME:N        until <|tool_call_argument_begin|>
    JSON    the arguments           until <|tool_call_end|>, or whatever else shows that they are over
    DONE    behind <|im_end|>

One machine reads the whole and the stream, and what could be the beginning of a marker is held back until it is one or is
not; so a reply means the same however it is cut. Each character is looked at a bounded number of times.

The model's slips are read as they were meant, and told in `problems`: markers in the singular or missing, ids such as `3`,
names with dots and hyphens, arguments that are no JSON (passed on as text), tools that this request did not declare.
"""

import json
import re

from .chat import ARGUMENTS, CALL, CALL_END, CALLS, CALLS_END, END, THINK, THINK_END, Marker
from .config import K2Error

SINGULAR = {CALLS.replace("calls", "call"): CALLS, CALLS_END.replace("calls", "call"): CALLS_END}
MARKERS = (CALLS, CALLS_END, *SINGULAR, CALL, ARGUMENTS, CALL_END, END)
IN_TEXT = re.compile("|".join(map(re.escape, MARKERS)))
IN_THOUGHT = re.compile("|".join(map(re.escape, (*MARKERS, THINK_END))))
LONGEST = max(map(len, MARKERS))
BLANKS = " \t\r\n"
SPELLED = chr(0x10FFFE)  # stands for < where a marker is merely spelled; no character, so that no text has it
AFTER = {CALLS: "CALLS", CALL: "ID", ARGUMENTS: "JSON", CALL_END: "CALLS", CALLS_END: "TEXT", THINK_END: "TEXT", END: "DONE"}
STRAY = {"THINK": (CALLS_END, CALL_END, ARGUMENTS), "TEXT": (CALLS_END, CALL_END, ARGUMENTS), "CALLS": (CALL_END, ARGUMENTS), "ID": (), "JSON": (ARGUMENTS,)}


def parse_reply(text: str, tools: list | None = None, thinking: bool = False) -> dict:
    """A whole reply: content (str), reasoning_content (str or None), tool_calls (a list, OpenAI's shape), finish_reason
    ("tool_calls" or "stop"), problems (a list of str). `tools` are those that this request declared; `thinking` says that
    the prompt ended in an open <think>, as K2.5's does. No text raises."""
    if not isinstance(text, str):
        raise K2Error(f"reply: found {type(text).__name__}; expected the text that the model wrote. Decode its ids first.")
    stream = ReplyStream(tools, thinking)
    return {**merged(stream.feed(text) + stream.close()), "finish_reason": stream.finish_reason, "problems": stream.problems}


def merged(deltas: list[dict]) -> dict:
    """The message that a stream's deltas add up to."""
    thoughts = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
    calls, arguments = [], []
    for part in (part for delta in deltas for part in delta.get("tool_calls", ())):
        if "id" in part:
            calls.append(part)
            arguments.append([])
        arguments[part["index"]].append(part["function"]["arguments"])
    calls = [{"id": c["id"], "type": "function", "function": {"name": c["function"]["name"], "arguments": "".join(a)}} for c, a in zip(calls, arguments)]
    return {"content": "".join(d.get("content", "") for d in deltas), "reasoning_content": "".join(thoughts) if thoughts else None, "tool_calls": calls}


class ReplyStream:
    """Reads a reply as it comes. `feed` and `close` return deltas in OpenAI's shape: {"content": ...},
    {"reasoning_content": ...}, or {"tool_calls": [...]} with index, id and name first and arguments behind.

    With `exact`, markers come as pieces of class Marker (`chat.decode_parts` makes them), and what merely spells one is
    text: a model may write about <|im_end|>. Without, the text is all there is, and its markers are taken for real."""

    def __init__(self, tools: list | None = None, thinking: bool = False, exact: bool = False):
        self.exact, self.unfinished = exact, False  # unfinished: at the end, whether it came inside a call or a thought
        self.declared = None if tools is None else declared_tools(tools)
        self.problems = []  # one line each, in the order in which they were met
        self.calls, self._ids = 0, set()  # given out so far
        self._state, self._held, self._blank, self._deltas = "THINK" if thinking else "START", "", [], []
        self._id, self._arguments, self._named = [], [], False  # of the call at hand; named: it was given out

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for why a reply ended, as far as its text can tell."""
        return "tool_calls" if self.calls else "stop"

    def feed(self, piece: str) -> list[dict]:
        """The deltas that a further piece of text makes certain."""
        text = self._held + (piece.replace("<", SPELLED) if self.exact and not isinstance(piece, Marker) else piece)
        at = self._start(text) if self._state == "START" else 0
        while self._state not in ("START", "DONE") and (found := self._watched().search(text, at)):
            self._text(text[at : found.start()])
            self._marker(SINGULAR.get(found.group(), found.group()))
            at = found.end()
        end = at
        if self._state not in ("START", "DONE"):
            end = len(text) - possible_marker(text, at, self._state)
            self._text(text[at:end])
        self._held = text[end:] if self._state != "DONE" else ""
        return self._taken()

    def close(self) -> list[dict]:
        """What was held back, now that nothing follows."""
        if self._state == "START":
            self._state = "TEXT"
            self._text("".join(self._blank))
        if self._state != "DONE":
            self._text(self._held)
        if self._state in ("ID", "JSON"):
            self._end_call(cut=True)
        self.unfinished, self._state, self._held = self._state in ("ID", "JSON", "THINK"), "DONE", ""
        return self._taken()

    # ---- the machine ----

    def _watched(self) -> re.Pattern:
        """The markers that mean something here."""
        return IN_THOUGHT if self._state == "THINK" else IN_TEXT

    def _start(self, text: str) -> int:
        """Whether the reply begins with a thought, once that is certain; where to go on."""
        said = text.lstrip(BLANKS)
        self._blank.append(text[: len(text) - len(said)])
        if said.startswith(THINK):
            self._state, self._blank = "THINK", []
            return len(text) - len(said) + len(THINK)
        if not THINK.startswith(said):
            blank, self._state, self._blank = "".join(self._blank), "TEXT", []
            self._text(blank)
        return len(text) - len(said)

    def _text(self, text: str):
        """A stretch without markers."""
        if self._state == "ID":
            self._id.append(text)
        elif self._state == "JSON":
            self._add_arguments(self._within(text))
        else:
            text = self._within(text) if self._state == "CALLS" else text
            if text:
                self._deltas.append({"reasoning_content" if self._state == "THINK" else "content": text})

    def _within(self, text: str) -> str:
        """The text but for blanks at its end: those wait until something other than a marker follows."""
        solid = text.rstrip(BLANKS)
        if not solid:
            self._blank.append(text)
            return ""
        before, self._blank = "".join(self._blank), [text[len(solid) :]]
        return before + solid

    def _marker(self, marker: str):
        """A marker, in whatever state it comes."""
        if marker in STRAY[self._state]:
            self._tell(f"a stray {marker} was left out")
            return
        if self._state == "ID" and marker == ARGUMENTS:
            self._begin_call("".join(self._id))
        elif self._state in ("ID", "JSON"):
            self._end_call()
        self._state, self._blank = AFTER[marker], []
        if marker == CALL:
            self._id, self._arguments, self._named = [], [], False

    # ---- calls ----

    def _begin_call(self, text: str):
        """The id is whole. A name in it is given out at once; a bare number must wait for the arguments."""
        name, i = self._read_id(text.strip(BLANKS))
        if name:
            self._give_out(name, i)

    def _read_id(self, text: str) -> tuple[str, str]:
        """(name, id); no name where the text has none, no id where it cannot be one."""
        head, _, number = (part.strip(BLANKS) for part in text.rpartition(":"))
        text = f"{head}:{number}" if number.isdigit() else text
        if not (number.isascii() and number.isdigit()):
            name = text.removeprefix("functions.")
            return (name, f"functions.{name}:{self.calls}") if name in (self.declared or ()) else ("", "")
        name = head.removeprefix("functions.").strip(BLANKS)
        last = name.rpartition(".")[2]
        return (last if last in (self.declared or ()) and name not in self.declared else name), text

    def _give_out(self, name: str, i: str, arguments: str = ""):
        """A call's first delta."""
        if self.declared is not None and name not in self.declared:
            self._tell(f"call {self.calls}: {name} is not declared in this request")
        if i in self._ids:
            self._tell(f"call {self.calls}: its id {i} was used before in this reply")
        self._ids.add(i)
        self._deltas.append({"tool_calls": [{"index": self.calls, "id": i, "type": "function", "function": {"name": name, "arguments": arguments}}]})
        self.calls, self._named = self.calls + 1, True

    def _add_arguments(self, text: str):
        """Further arguments; the first of them without the blanks in front."""
        text = text if self._arguments else text.lstrip(BLANKS)
        if text:
            self._arguments.append(text)
            if self._named:
                self._deltas.append({"tool_calls": [{"index": self.calls - 1, "function": {"arguments": text}}]})

    def _end_call(self, cut: bool = False):
        """The call is over, or (cut) the reply is over before it."""
        text = "".join(self._id)
        if self._state == "ID":  # without the marker between id and arguments
            brace = text.find("{")
            text, rest = (text[:brace], text[brace:]) if brace >= 0 else (text, "")
            if not cut or rest:
                self._begin_call(text)
                self._add_arguments(rest.rstrip(BLANKS))
        arguments = "".join(self._arguments)
        if not self._named and not cut:
            name, i = self._name_by_arguments(arguments), self._read_id(text.strip(BLANKS))[1]
            if not name or not i:
                self._tell(f"a call of id {respelled(text[:40])!r} was left out: it names no tool")
                return
            self._give_out(name, f"functions.{name}:{i.rpartition(':')[2]}", arguments)
        if cut:
            self._tell(f"call {self.calls - self._named}: left unfinished")
        elif not is_json_object(arguments):
            self._tell(f"call {self.calls - 1}: its arguments are no JSON object")

    def _name_by_arguments(self, arguments: str) -> str:
        """The one declared tool whose parameters fit, or ""."""
        fitting = [name for name, schema in (self.declared or {}).items() if fits(arguments, schema)]
        return fitting[0] if len(fitting) == 1 else ""

    def _tell(self, problem: str):
        """Note what was wrong."""
        self.problems.append(problem.replace(SPELLED, "<"))

    def _taken(self) -> list[dict]:
        """The deltas since the last call."""
        deltas, self._deltas = self._deltas, []
        return respelled(deltas) if self.exact else deltas


def possible_marker(text: str, start: int, state: str) -> int:
    """How many characters at the end of text may be the beginning of a marker. Markers have one <, their first."""
    at = text.rfind("<", max(start, len(text) - LONGEST))
    watched = (*MARKERS, THINK_END) if state == "THINK" else MARKERS
    return len(text) - at if at >= 0 and any(marker.startswith(text[at:]) for marker in watched) else 0


def respelled(value):
    """Deltas with < where its stand-in was."""
    if isinstance(value, dict):
        return {key: respelled(v) for key, v in value.items()}
    if isinstance(value, list):
        return [respelled(v) for v in value]
    return value.replace(SPELLED, "<") if isinstance(value, str) else value


def declared_tools(tools: list) -> dict[str, dict]:
    """{name: JSON Schema of its parameters} of a request's tools."""
    try:
        declared = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        if all(isinstance(name, str) and isinstance(schema, dict) and has_names(schema) for name, schema in declared.items()):
            return declared
    except (TypeError, KeyError, AttributeError):
        pass
    raise K2Error("tools: expected a list of {'type': 'function', 'function': {'name': ..., 'parameters': {...}}}, properties an object and required a list of names. See OpenAI's tools.")


def has_names(schema: dict) -> bool:
    """Whether properties and required, where there are any, are an object and a list of names."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    return isinstance(properties, dict) and isinstance(required, list) and all(isinstance(name, str) for name in required)


def fits(arguments: str, schema: dict) -> bool:
    """Whether arguments have the keys that a tool's schema asks for, and no other."""
    keys, known = set(json.loads(arguments)) if is_json_object(arguments) else None, set(schema.get("properties", ()))
    return keys is not None and set(schema.get("required", ())) <= keys <= known


def is_json_object(text: str) -> bool:
    """Whether a text is one JSON object. Numbers are not converted: Python would refuse very long ones."""
    try:
        return isinstance(json.loads(text, parse_int=str, parse_float=str, parse_constant=no_json), dict)
    except (ValueError, RecursionError):
        return False


def no_json(word: str):
    """Python's json takes NaN and Infinity; JSON does not."""
    raise ValueError(word)
