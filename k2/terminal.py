"""A chat in the terminal: what `python -m k2 chat` does after its model is loaded.

The answer goes to stdout as it comes; all else goes to stderr: what a thinking model thinks (dimmed), calls, questions,
and why an answer ended. Ctrl-C stops an answer and not the program. A line that begins with / is a command.
"""

import json
import os
import shutil
import sys
from pathlib import Path

from .chat import END, THINK, Template, checked, decode_parts, encode_chat
from .config import K2Error
from .constraint import CallConstraint, Grammar, ThoughtFirst, Vocabulary
from .generation import generate
from .kv_cache import LatentCache
from .reply import ReplyStream, merged
from .tools import WEB_SEARCH, called, declaration, functions_of, search_repository, searched

HELP = """/reset          forget the dialog       /system TEXT    say how to behave     /continue    go on with a cut answer
/tools FILE.py  offer its functions     /save FILE      keep the dialog       /load FILE   take one up again
/help           this                    /exit           or Ctrl-D: the end    Ctrl-C       stop an answer"""
MOST_ROUNDS = 8  # of calls for one question


class Chat:
    """A dialog with a model. `ask` gives a line that the user typed, for a prompt; `search` answers $web_search.

    style is as for render_chat; schema None leaves text free, True asks for a JSON object, and a dict for its documents."""

    def __init__(self, model, tokenizer, style="instruct", *, max_new_tokens: int = 512, temperature: float = 0.6, top_p: float = 1.0,
                 seed: int | None = None, schema=None, web_search: bool = False, ask=input, search=search_repository):  # fmt: skip
        self.model, self.tokenizer, self.style, self.ask, self.search = model, tokenizer, style, ask, search
        self.max_new_tokens, self.temperature, self.top_p, self.seed = max_new_tokens, temperature, top_p, seed
        self.messages, self.functions, self.tools = [], {}, [WEB_SEARCH] if web_search else []
        self.schema, self.vocabulary = schema, None
        self.grammar = None if schema is None else Grammar(self.tokens(), None if schema is True else schema)
        self.cache, self.cached = LatentCache(model.config), []
        if schema is not None and self.tools:
            raise K2Error("chat: found --json or --schema together with tools; expected one of them. A reply is a document or a call.")

    def tokens(self) -> Vocabulary:
        """The tokenizer's trie, made when it is first needed."""
        self.vocabulary = self.vocabulary or Vocabulary(self.tokenizer)
        return self.vocabulary

    # ---- lines ----

    def run(self):
        """Read lines until the end; what a user can mend is said, and the dialog goes on."""
        while True:
            try:
                line = self.ask("> ")
            except EOFError:
                return
            except KeyboardInterrupt:
                note("(Ctrl-D or /exit ends)")
                continue
            if line.strip() in ("/exit", "/quit"):
                return
            try:
                self.line(line)
            except K2Error as error:
                note(f"error: {error}")
            except KeyboardInterrupt:
                note("(stopped)")

    def line(self, line: str):
        """A command, or something to answer. A blank in front keeps a slash from being a command."""
        command, _, rest = line.strip().partition(" ")
        commands = {"/reset": self.reset, "/continue": self.go_on, "/help": lambda: note(HELP)}
        with_rest = {"/system": self.system, "/tools": self.offer, "/save": self.save, "/load": self.load}
        if not line.startswith("/"):
            return self.say(line) if line.strip() else None
        if command in commands:
            commands[command]()
        elif command in with_rest:
            if not rest.strip():
                raise K2Error(f"{command}: expected something behind it. See /help.")
            with_rest[command](rest.strip())
        else:
            raise K2Error(f"{command}: no such command. See /help, or put a blank in front to say it to the model.")

    def reset(self):
        """Forget all but the system message."""
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        note("(the dialog begins anew)")

    def system(self, text: str):
        """Set the system message."""
        self.messages = [{"role": "system", "content": text}, *(m for m in self.messages if m["role"] != "system")]

    def offer(self, path: str):
        """Offer a file's functions to the model."""
        if self.schema is not None:
            raise K2Error("/tools: a JSON reply calls nothing. Start the chat without --json and --schema.")
        functions = functions_of(path)
        declared = [declaration(f) for f in functions.values()]
        CallConstraint(self.tokens(), declared)  # refuses what could not be enforced, before it is offered
        self.functions = {**self.functions, **functions}
        self.tools = [t for t in self.tools if t["function"]["name"] not in functions] + declared
        note(f"(offered: {', '.join(functions)})")

    def save(self, path: str):
        """Write the dialog as JSON. What could not be written leaves the file as it was."""
        try:
            write_whole(path, (json.dumps({"messages": self.messages}, ensure_ascii=False, indent=1) + "\n").encode())
        except (OSError, ValueError) as error:  # a ValueError is a name with a zero byte in it, or a text that is no Unicode
            raise K2Error(f"{harmless(path)}: could not be written: {getattr(error, 'strerror', None) or error}. Give another name.") from None
        note(f"({len(self.messages)} messages in {path})")

    def load(self, path: str):
        """Take up a dialog that was saved."""
        saved = read_json(path)
        if not isinstance(saved, dict) or "messages" not in saved:
            raise K2Error(f'{path}: found {type(saved).__name__}; expected an object with "messages". Write {{"messages": [...]}}, as /save does.')
        try:
            checked(saved["messages"], None)
        except K2Error as error:
            raise K2Error(f"{path}: {error}") from None
        self.messages = saved["messages"]
        note(f"({len(self.messages)} messages from {path}{'; /continue goes on with the last' if self.messages[-1].get('partial') else ''})")

    # ---- answers ----

    def say(self, text: str):
        """Answer a message, running calls as they come, until the model has answered in words."""
        before = self.messages
        self.messages = [*closed(self.messages), {"role": "user", "content": text}]
        try:
            self.rounds()
        except (K2Error, KeyboardInterrupt):
            self.messages = before  # what was refused, or stopped while a tool ran, was not said
            raise

    def go_on(self):
        """Go on with an answer that was cut."""
        if len(self.messages) < 2 or not self.messages[-1].get("partial"):
            raise K2Error("/continue: the last answer is complete. Say something.")
        self.rounds()

    def rounds(self):
        """Answer; run what was called; answer again."""
        for _ in range(MOST_ROUNDS):
            message = self.answer()
            self.messages = [*self.messages[: -1 if self.messages[-1].get("partial") else None], message]
            if message.get("partial") or not message.get("tool_calls"):
                return
            self.messages += [self.result(call) for call in message["tool_calls"]]
        note(f"(stopped after {MOST_ROUNDS} rounds of calls)")

    def answer(self) -> dict:
        """One message of the model, printed as it comes. An open message is gone on with."""
        ids, said = encode_chat(self.tokenizer, self.messages, self.tools, style=self.style), []
        if self.messages[-1].get("partial"):
            said = ids[len(encode_chat(self.tokenizer, self.messages[:-1], self.tools, style=self.style)) :]
        begun = not said and ids[-1] == self.tokenizer.special.get(THINK)  # as K2.5's template does
        constraint, stream = self.constraint(said, begun), ReplyStream(self.tools, thinking=begun, exact=True)
        deltas = [delta for part in decode_parts(self.tokenizer, said) for delta in stream.feed(part)]
        limit = min(self.max_new_tokens, self.model.config.max_position_embeddings - len(ids) + 1)
        new, why = [], ""
        try:
            for part in decode_parts(self.tokenizer, self.new_ids(ids, new, constraint)):
                deltas += show(stream.feed(part))
            why = f"cut at {limit} tokens" if len(new) == limit and not (constraint and constraint.complete) else ""
        except KeyboardInterrupt:
            why = "stopped"
        deltas += show(([] if why else stream.feed(END)) + stream.close())
        print(flush=True)
        self.tell(stream, why)
        message = {"role": "assistant", **{key: value for key, value in merged(deltas).items() if value or key == "content"}}
        return {**message, "partial": True} if why else message

    def new_ids(self, ids: list[int], new: list[int], constraint):
        """The ids of the answer, noted in `new`. What the cache holds of the prompt from the turn before is not read again."""
        held = min(self.cache.length, len(self.cached), len(ids) - 1)
        common = next((n for n in range(held) if self.cached[n] != ids[n]), held)
        self.cache.advance(common - self.cache.length)
        self.cached = list(ids)
        for i in generate(self.model, ids[common:], self.max_new_tokens, self.temperature, self.top_p, self.seed, self.tokenizer.stop_ids, self.cache, constraint):
            new.append(i)
            self.cached.append(i)
            yield i

    def constraint(self, said: list[int], begun: bool):
        """What holds this answer in form, with what was said of it already: a document's grammar, or the declared tools."""
        number = sum(len(m.get("tool_calls") or ()) for m in self.messages if not m.get("partial"))
        constraint = self.grammar.start() if self.grammar else CallConstraint(self.tokens(), self.tools, number) if self.tools else None
        if self.grammar and THINK in self.tokenizer.special:
            constraint = ThoughtFirst(constraint, begun)
        for i in said if constraint else ():
            constraint.accept(i)
        return constraint

    def tell(self, stream: ReplyStream, why: str):
        """What was wrong with an answer, and why it ended, where it did not end by itself."""
        for problem in stream.problems:
            note(f"({problem})")
        if why:
            note(f"({why}{' inside a call, which is not run' if stream.unfinished and stream.calls else ''}; /continue goes on)")

    # ---- calls ----

    def result(self, call: dict) -> dict:
        """A call's result, after the user has agreed to it."""
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name == WEB_SEARCH["function"]["name"] and WEB_SEARCH in self.tools:
            content = searched(arguments, self.search)
            note(f"{name}({arguments}): {content.splitlines()[0]}")
        elif name not in self.functions:
            content = f"There is no tool {name}."
        else:
            content = called(self.functions[name], arguments) if self.agreed(f"run {name}({arguments})? [y/n] ") else "The user did not allow this call."
            note(f"= {content}")
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}

    def agreed(self, question: str) -> bool:
        """Whether the user says yes; anything else is no."""
        try:
            return self.ask(question).strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt):
            return False


def closed(messages: list[dict]) -> list[dict]:
    """The messages with a cut answer left as it is: its words stay, a call that was not finished goes."""
    if not messages or not messages[-1].get("partial"):
        return messages
    return [*messages[:-1], {key: value for key, value in messages[-1].items() if key not in ("partial", "tool_calls")}]


def note(text: str):
    """A line for the user that is not the answer's."""
    print(text, file=sys.stderr, flush=True)


def show(deltas: list[dict]) -> list[dict]:
    """Print what came: words to stdout, thoughts and calls dimmed to stderr. Gives the deltas back."""
    for delta in deltas:
        if "content" in delta:
            print(harmless(delta["content"]), end="", flush=True)
            continue
        text = delta.get("reasoning_content") or "".join(
            (f"\ncall {part['function']['name']} " if "id" in part else "") + part["function"]["arguments"] for part in delta["tool_calls"])  # fmt: skip
        print(f"\x1b[2m{harmless(text)}\x1b[0m" if sys.stderr.isatty() else harmless(text), end="", file=sys.stderr, flush=True)
    return deltas


def harmless(text: str) -> str:
    """Text whose control characters, which could steer a terminal, are made visible."""
    return "".join("\ufffd" if (c < " " and c not in "\n\t") or "\x7f" <= c < "\xa0" else c for c in text)


def read_json(path: str):
    """What a JSON file holds."""
    try:
        if not Path(path).is_file():
            raise K2Error(f"{harmless(path)}: expected a JSON file, found {'something else' if Path(path).exists() else 'nothing'}. Check the name.")
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise K2Error(f"{harmless(path)}: expected JSON, found: {error}. Mend the file.") from None


def write_whole(path: str, content: bytes):
    """A file with this content, or as it was before: written beside itself first, then renamed. A device is written to."""
    target = Path(path).resolve()  # a link stays one
    if target.exists() and not target.is_file():
        target.write_bytes(content)
        return
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def read_line(prompt: str) -> str:
    """A line from the user: with a prompt and editing at a terminal, without from a pipe."""
    if sys.stdin is None:
        raise EOFError
    if sys.stdin.isatty():
        try:
            import readline  # noqa: F401  arrows and history, where the system has it
        except ImportError:
            pass
        return input(prompt)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def style_of(directory, tokenizer):
    """How a checkpoint wants its dialogs: its own template, or ours for its family."""
    return Template.from_directory(directory) or ("thinking" if THINK in tokenizer.special else "instruct")
