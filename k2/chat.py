"""Messages to K2's prompt: the chat template in plain Python, and a checkpoint's own Jinja template in its place.

    message      START name <|im_middle|> body <|im_end|>      START by role; no blank or line feed between messages
    tools        a message of the name tool_declare, first of all, whose body is JSON
    body         the text; behind an assistant's stand its calls, before a tool's "## Return of ID" and a line feed
    calls        <|tool_calls_section_begin|> CALL ... <|tool_calls_section_end|>
    CALL         <|tool_call_begin|> functions.NAME:N <|tool_call_argument_begin|> JSON <|tool_call_end|>
    the tail     <|im_assistant|>assistant<|im_middle|>, from where the model goes on

A prompt is first a list of parts: a Marker becomes a control token's id, any other string is encoded as text. So whoever
types <|im_end|>, as a user, as a tool or inside a JSON string, has typed ten characters.

Two styles of the family: "instruct" (K2-Instruct since August 2025, and 0905) and "thinking" (K2-Thinking, which keeps its
reasoning while tools are being called). K2.5 declares tools as TypeScript, which is not implemented here.
"""

import datetime
import itertools
import json
import re
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

from .config import K2Error, read_json_object
from .tokenizer import Tokenizer


class Marker(str):
    """The string of a control token, written by this program. Any other string, however spelled, is text."""


USER, ASSISTANT, SYSTEM = Marker("<|im_user|>"), Marker("<|im_assistant|>"), Marker("<|im_system|>")
MIDDLE, END, THINK, THINK_END = Marker("<|im_middle|>"), Marker("<|im_end|>"), Marker("<think>"), Marker("</think>")
CALLS, CALLS_END = Marker("<|tool_calls_section_begin|>"), Marker("<|tool_calls_section_end|>")
CALL, ARGUMENTS, CALL_END = Marker("<|tool_call_begin|>"), Marker("<|tool_call_argument_begin|>"), Marker("<|tool_call_end|>")

START = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": SYSTEM}
DEFAULT_SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."
IMAGE = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"  # as the template has it; to Instruct, ordinary text
STYLES = ("instruct", "thinking")


# ---- the template ----


def chat_parts(messages: list[dict], tools: list | None, add_generation_prompt: bool, style: str) -> list[str]:
    """The prompt as markers and texts. `messages` have passed `checked_messages`."""
    thinking, parts = style == "thinking", []
    if tools:
        parts += turn("system", "tool_declare", [as_json(tools, separators=(",", ":"), sort_keys=thinking)])
    if messages[0]["role"] != "system":
        # Instruct's line feed is a slip of its template's indentation that the model was served with; Thinking has none.
        parts += [*turn("system", "system", [DEFAULT_SYSTEM]), "" if thinking else "\n"]
    answered = max((n for n, m in enumerate(messages) if is_answer(m)), default=-1)
    for n, message in enumerate(messages):
        # A thought is kept while tools are being called for it, and dropped once an answer was given.
        thought = thought_parts(message, kept=n > answered) if thinking and message["role"] == "assistant" else []
        parts += turn(message["role"], message.get("name") or message["role"], [*thought, *body_parts(message)])
    if is_open(messages[-1]):
        return parts[:-1]
    return [*parts, ASSISTANT, "assistant", MIDDLE] if add_generation_prompt else parts


def turn(role: str, name: str, body: list[str]) -> list[str]:
    """One message."""
    return [START[role], name, MIDDLE, *body, END]


def body_parts(message: dict) -> list[str]:
    """A message's text, with what its role puts before or behind it."""
    text = content_text(message.get("content"))
    if message["role"] == "tool":
        return [f"## Return of {message['tool_call_id']}\n{text}"]
    calling = message["role"] == "assistant" and message.get("tool_calls")
    return [text, *call_parts(message["tool_calls"], is_open(message))] if calling else [text]


def thought_parts(message: dict, kept: bool) -> list[str]:
    """The reasoning in front of an assistant's text. An open message without text is one that is still thinking."""
    thought = message.get("reasoning_content") or ""
    still = is_open(message) and thought and not message.get("content") and not message.get("tool_calls")
    return [THINK, thought if kept else "", *([] if still else [THINK_END])]


def call_parts(calls: list[dict], left_open: bool) -> list[str]:
    """The section of calls. Arguments that are a string stand as they are: encoded once more they would be quoted twice."""
    parts = [CALLS]
    for call in calls:
        given = call["function"].get("arguments", "{}")
        parts += [CALL, call["id"], ARGUMENTS, given if isinstance(given, str) else as_json(given), CALL_END]
    return parts[:-1] if left_open else [*parts, CALLS_END]


def content_text(content) -> str:
    """A content as text: a string, nothing, or a list of parts."""
    if isinstance(content, list):
        return "".join(IMAGE if part.get("type") in ("image", "image_url") else part["text"] for part in content)
    return content or ""


def is_answer(message: dict) -> bool:
    """An assistant's finished message that calls nothing."""
    return message["role"] == "assistant" and not message.get("tool_calls") and not is_open(message)


def is_open(message: dict) -> bool:
    """Partial Mode: a message that the model is to go on with, so that it gets no <|im_end|>."""
    return bool(message.get("partial"))


def as_json(value, separators=None, sort_keys: bool = False) -> str:
    """JSON as the template writes it, characters beyond ASCII as they are."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=separators, sort_keys=sort_keys)
    except (TypeError, ValueError, RecursionError) as error:
        raise K2Error(f"chat: tools or arguments are no JSON: {error}. Use dicts, lists, strings, numbers, booleans and None.") from None


# ---- the public face ----


def render_chat(messages: list[dict], tools: list | None = None, add_generation_prompt: bool = True, style="instruct") -> str:
    """The prompt as one string, to be read. For the model use `encode_chat`: this string no longer knows what was typed.

    messages are OpenAI's: role, content, and name, tool_calls, tool_call_id, reasoning_content, or partial on the last.
    style is "instruct", "thinking" or a checkpoint's Template. Raises K2Error for what is no such message.
    """
    messages, tools = checked(messages, tools)
    if isinstance(style, Template):
        return style.render(messages, tools, add_generation_prompt)
    return "".join(chat_parts(messages, tools, add_generation_prompt, checked_style(style)))


def encode_chat(tokenizer: Tokenizer, messages: list[dict], tools: list | None = None, add_generation_prompt: bool = True, style="instruct") -> list[int]:
    """The prompt's ids; its control tokens are the template's, and no text makes one. Arguments as for `render_chat`."""
    messages, tools = checked(messages, tools)
    if isinstance(style, Template):
        return encode_parts(tokenizer, style.parts(tokenizer, messages, tools, add_generation_prompt))
    return encode_parts(tokenizer, chat_parts(messages, tools, add_generation_prompt, checked_style(style)))


def encode_parts(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    """Markers to their ids, and the text between two markers as one piece."""
    ids = []
    for is_marker, run in itertools.groupby(parts, lambda part: isinstance(part, Marker)):
        for part in run if is_marker else ["".join(run)]:
            if is_marker and part not in tokenizer.special:
                raise K2Error(f"tokenizer: expected a special token {part}, found none. This checkpoint's tokenizer is not made for this chat style.")
            ids += [tokenizer.special[part]] if is_marker else tokenizer.encode(part)
    return ids


def decode_parts(tokenizer: Tokenizer, ids):
    """The inverse, as ids come: control tokens as Markers, all else as text, with characters that span tokens whole."""
    decoder, first = tokenizer.stream(), tokenizer.vocab_size - len(tokenizer.special)
    for i in ids:
        if i >= first:
            yield decoder.finish()
        yield Marker(decoder.push(i)) if i >= first else decoder.push(i)
    yield decoder.finish()


def checked_style(style: str) -> str:
    """The style, if there is such a one."""
    if style not in STYLES:
        raise K2Error(f"style: found {style!r}; expected instruct or thinking, or the checkpoint's own k2.chat.Template (K2.5 needs its own).")
    return style


def checked(messages, tools) -> tuple[list[dict], list | None]:
    """The messages under ids of K2's form, and the tools; K2Error for what is neither."""
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise K2Error(f"tools: found {type(tools).__name__}; expected a list of objects, as in OpenAI's requests.")
    return rewrite_ids(checked_messages(messages))[0], tools


def checked_messages(messages) -> list[dict]:
    """The messages; K2Error names the first that is none, and what it lacks."""
    if not isinstance(messages, list) or not messages:
        raise K2Error("messages: expected a list of at least one message, found none. Write [{'role': 'user', 'content': 'Hi'}].")
    for n, message in enumerate(messages):
        problem = message_problem(message)
        if not problem and is_open(message) and (n + 1 < len(messages) or message["role"] != "assistant"):
            problem = "partial: expected on the last message only, and that an assistant's"
        if problem:
            raise K2Error(f"messages[{n}].{problem}. See OpenAI's chat messages.")
    return messages


def message_problem(message) -> str:
    """What is wrong with one message, or ""."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in START:
        return f"role: found {message.get('role') if isinstance(message, dict) else message!r}; expected system, user, assistant or tool"
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and (p.get("type") in ("image", "image_url") or isinstance(p.get("text"), str)) for p in content):
            return "content: expected parts with a text, or images"
    elif not isinstance(content, str) and not (content is None and message["role"] == "assistant"):
        return f"content: found {type(content).__name__}; expected a string or a list of parts"
    for name in ("name", "reasoning_content"):
        if not isinstance(message.get(name), str | None):
            return f"{name}: found {type(message[name]).__name__}; expected a string"
    if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
        return "tool_call_id: expected the id of the call that this answers, found none"
    if has_lone_surrogate(message):
        return "content: found half of a surrogate pair, which is no character; expected Unicode text"
    return calls_problem(calls) if calls else ""


def has_lone_surrogate(value) -> bool:
    """Whether some string in a JSON value cannot be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (TypeError, ValueError, RecursionError):  # no JSON: said where it is rendered
        pass
    return False


def calls_problem(calls) -> str:
    """What is wrong with a message's tool calls, or ""."""
    for n, call in enumerate(calls if isinstance(calls, list) else [None]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not isinstance(call.get("id"), str):
            return f"tool_calls[{n}]: expected an object with an id and a function that has a name"
    return ""


# ---- ids of tool calls ----


def rewrite_ids(messages: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """(messages whose calls all bear ids of K2's form, {such an id: what the caller called it}).

    A client's `call_abc` confuses a model that has only seen functions.NAME:N; the paper's N counts through the whole
    conversation. Ids of that form stay. A client may use one id twice: results go in order to the calls of their id in the
    latest message that has one, and those beyond to the last of them.
    """
    taken = {call["id"] for m in messages for call in m.get("tool_calls") or () if is_own_id(call)}
    current, original, rewritten, count = {}, {}, [], itertools.count()  # current: the calls of a client's id that wait for a result
    for n, message in enumerate(messages):
        calls, fresh = [], {}
        for call, place in zip(message.get("tool_calls") or (), count):
            own = call["id"] if is_own_id(call) and call["id"] not in fresh else free_id(call["function"]["name"], place, taken)
            taken.add(own)
            original[own] = call["id"]
            fresh.setdefault(call["id"], []).append(own)
            calls.append({**call, "id": own})
        current.update(fresh)
        answers = message.get("tool_call_id") if message["role"] == "tool" else None
        if answers is not None and answers not in current and not re.fullmatch(r"functions\..+:\d+", answers, re.DOTALL):
            raise K2Error(f"messages[{n}].tool_call_id: found {answers!r}, which no call before it has. Send the assistant's message with that call too.")
        waiting = current.get(answers, [answers])
        answered = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        rewritten.append({**message, **({"tool_calls": calls} if calls else {}), **({"tool_call_id": answered} if answers is not None else {})})
    return rewritten, original


def is_own_id(call: dict) -> bool:
    """Whether a call's id is functions.NAME:N of its own name; a model may have put a namespace before it, as ns.NAME."""
    return re.fullmatch(r"functions\.(?:[\w.-]+\.)?" + re.escape(call["function"]["name"]) + r":\d+", call["id"]) is not None


def free_id(name: str, n: int, taken: set[str]) -> str:
    """functions.NAME:N with the first N from n on that no other call has."""
    return next(i for i in (f"functions.{name}:{k}" for k in itertools.count(n)) if i not in taken)


def restore_ids(messages: list[dict], original: dict[str, str]) -> list[dict]:
    """The inverse of `rewrite_ids`: messages under the ids that the caller knows."""
    restored = []
    for message in messages:
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [{**call, "id": original.get(call["id"], call["id"])} for call in message["tool_calls"]]
        if message.get("tool_call_id"):
            message["tool_call_id"] = original.get(message["tool_call_id"], message["tool_call_id"])
        restored.append(message)
    return restored


# ---- a checkpoint's own template ----


class Template:
    """A checkpoint's chat_template.jinja, under transformers' settings, in Jinja's sandbox: it is somebody's program.

    The sandbox keeps it from files and from Python. It does not bound time or memory: nested loops, or a format of a
    great width, can take all of both. `parts` guards against text that spells a control token; a template that makes
    one on purpose, such as by `replace` of a word in what was typed, can. Take templates from whom you trust.
    """

    def __init__(self, source: str, where: str = "chat_template.jinja", variables: dict[str, str] | None = None):
        sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        sandbox.filters["tojson"] = template_json
        sandbox.globals.update(raise_exception=raise_exception, strftime_now=lambda form: datetime.datetime.now().strftime(form))
        self.source, self.where, self.variables = source, where, variables or {}
        try:
            self._compiled = sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise K2Error(f"{where}: line {error.lineno} is no Jinja: {error.message}. Fetch the file again.") from None

    @classmethod
    def from_directory(cls, directory) -> "Template | None":
        """chat_template.jinja, or the chat_template in tokenizer_config.json (July 2025), or None where there is neither."""
        path, config_path = Path(directory) / "chat_template.jinja", Path(directory) / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        variables = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if isinstance(config.get(key), str)}
        if not path.exists():
            source = config.get("chat_template")
            return cls(source, f"{config_path}: chat_template", variables) if isinstance(source, str) else None
        if not path.is_file():
            raise K2Error(f"{path}: expected a text file, found something else. Fetch it again.")
        try:
            return cls(path.read_text(encoding="utf-8"), str(path), variables)
        except (OSError, UnicodeDecodeError) as error:
            raise K2Error(f"{path}: expected a UTF-8 text file, could not read it: {error}. Fetch it again.") from None

    @property
    def thinking(self) -> bool:
        """Whether this is a template of a model that reasons."""
        return THINK in self.source

    def render(self, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> str:
        """The prompt as one string."""
        return self._open_or_whole(messages, self._in_order(tools), add_generation_prompt)

    def _in_order(self, tools: list | None):
        """The tools as the template gets them: Thinking's tokenizer sorts all keys first."""
        return json.loads(as_json(tools, sort_keys=True)) if self.thinking and tools else tools

    def _open_or_whole(self, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> str:
        """The prompt. A message left open is cut where its text ends, as the template knows no such thing."""
        if not is_open(messages[-1]):
            return self._run(messages, tools, add_generation_prompt)
        *before, last = messages
        thought = "".join(thought_parts(last, kept=True)) if self.thinking else ""
        text = content_text(last.get("content"))
        calls = "".join(call_parts(last["tool_calls"], True)) if last.get("tool_calls") else ""
        if before and not last.get("name"):  # the prompt that the model had, and what it has said since
            return self._run(before, tools, True) + thought + text + calls
        cut = unused_characters(1, messages, tools, self.source)[0]
        closed = {key: value for key, value in last.items() if key not in ("partial", "tool_calls")}
        whole = self._run([*before, {**closed, "content": text + cut}], tools, False)
        if cut not in whole:
            raise K2Error(f"{self.where}: the text of the message to go on with does not come out of it. Leave partial away.")
        return whole[: whole.rindex(cut)] + calls

    def parts(self, tokenizer: Tokenizer, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> list[str]:
        """The prompt as markers and texts.

        The first and last characters of control tokens' strings are exchanged for unused ones in everything that came
        from outside, so that no marker in the output begins or ends there; afterwards they are put back.
        """
        edges = sorted({edge for name in tokenizer.special for edge in (name[0], name[-1])})
        hide = dict(zip(map(ord, edges), unused_characters(len(edges), messages, tools, self.source)))
        show = {ord(stand_in): chr(edge) for edge, stand_in in hide.items()}
        hidden = [{**translated(message, hide), "role": message["role"]} for message in messages]  # a role is nobody's text
        text = self._open_or_whole(hidden, translated(self._in_order(tools), hide), add_generation_prompt)
        if text.translate(show) != self.render(messages, tools, add_generation_prompt):
            raise K2Error(f"{self.where}: looks into texts for brackets, so that they cannot be kept apart from control tokens. Use style='instruct'.")
        names = "|".join(re.escape(name) for name in sorted(tokenizer.special, key=len, reverse=True))
        pieces = [Marker(piece) if n % 2 else piece.translate(show) for n, piece in enumerate(re.split(f"({names})", text))]
        written = [self.source, *self.variables.values(), *(CALLS, CALL, ARGUMENTS, CALL_END, THINK, THINK_END)]
        built = next((p for p in pieces if isinstance(p, Marker) and not any(p in text for text in written)), None)
        if built:
            raise K2Error(f"{self.where}: puts {built} together from pieces, so that a text could do it too. Use style='instruct'.")
        return pieces

    def _run(self, messages: list[dict], tools: list | None, add_generation_prompt: bool) -> str:
        """Jinja itself. A template is a program and may fail in any way."""
        try:
            return self._compiled.render(messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt, **self.variables)
        except Exception as error:
            raise K2Error(f"{self.where}: {type(error).__name__}: {' '.join(str(error).split())}. It does not take these messages.") from None


def raise_exception(message):
    """A template's way to refuse messages."""
    raise jinja2.TemplateError(message)


def template_json(value, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False) -> str:
    """tojson as transformers has it: Jinja's own would write < as an escape, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def unused_characters(count: int, *texts) -> list[str]:
    """Private characters that occur nowhere in the given values."""
    used = set(json.dumps(texts, ensure_ascii=False, default=str))
    return list(itertools.islice((c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in used), count))


def translated(value, table: dict):
    """A JSON value with every string in it translated, keys too."""
    if isinstance(value, dict):
        return {translated(k, table): translated(v, table) for k, v in value.items()}
    if isinstance(value, list):
        return [translated(v, table) for v in value]
    return value.translate(table) if isinstance(value, str) else value
