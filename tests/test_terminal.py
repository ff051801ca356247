"""The chat in the terminal, with a model that says what a script tells it to, and once with K2-mini in a process of its own."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conversations import INSTRUCT_JINJA
from small import small_config
from test_chat import tokenizer
from test_command_line import ROOT
from test_reply import A, B, C, E, X

from k2 import K2Error, render_chat
from k2.__main__ import main
from k2.chat import Marker, Template, encode_parts
from k2.reply import IN_TEXT
from k2.terminal import Chat, harmless, read_line, show, style_of

STOP = Marker("<|im_end|>")


class Scripted:
    """A model whose every call gives the next id of the script all the weight; `read` holds the ids it was given."""

    def __init__(self, *replies: str, ending=True):
        self.config = small_config(vocab_size=tokenizer().vocab_size, max_position_embeddings=4096)
        self.script, self.read, self.interrupt_at = [], [], None
        for reply in replies:
            markers = [Marker(m) for m in IN_TEXT.findall(reply)]
            parts = [p for pair in zip(IN_TEXT.split(reply), [*markers, ""]) for p in pair]
            self.script += encode_parts(tokenizer(), [*parts, *([STOP] if ending else [])])

    def __call__(self, ids_T, cache, positions=None):
        self.read += [cache.length, ids_T.tolist()]
        cache.advance(len(ids_T))
        if len(ids_T) > 1 and self.script[:1] == [tokenizer().special[STOP]]:
            del self.script[0]  # of a reply that its constraint ended
        if self.interrupt_at == len(self.script):
            self.interrupt_at = None
            signal.raise_signal(signal.SIGINT)
        logits_TW = torch.zeros(1, self.config.vocab_size)
        logits_TW[0, self.script.pop(0) if self.script else tokenizer().special[STOP]] = 50.0
        return logits_TW


def chat_of(model, *lines: str, **options) -> Chat:
    """A chat that reads these lines."""
    given = iter(lines)

    def ask(prompt):
        line = next(given, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return Chat(model, tokenizer(), ask=ask, temperature=0.0, **options)


def talk(model, *lines: str, **options) -> list[dict]:
    """The messages after a whole chat."""
    chat = chat_of(model, *lines, **options)
    chat.run()
    return chat.messages


# ---- answers ----


def test_an_answer_is_on_stdout_and_the_dialog_is_kept(capfd):
    model = Scripted("Hello.", "Again.")
    messages = talk(model, "Hi", "", "You?")
    assert capfd.readouterr() == ("Hello.\nAgain.\n", "")
    assert messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "You?"}, {"role": "assistant", "content": "Again."}]


def test_the_model_reads_the_template_and_of_a_later_prompt_only_what_is_new():
    model = Scripted("Hello.", "Again.")
    messages = talk(model, "Hi", "You?")
    first, again = [n for n in range(0, len(model.read), 2) if len(model.read[n + 1]) > 1]
    assert tokenizer().decode(model.read[first + 1]) == render_chat(messages[:1])
    held = model.read[again]
    assert held > 0 and tokenizer().decode(model.read[again + 1]) == render_chat(messages[:3])[len(render_chat(messages[:1]) + "Hello.") :]


def test_reset_forgets_all_but_the_system_message_and_a_new_one_replaces_it(capfd):
    model = Scripted("one", "two")
    assert talk(model, "/system be brief", "a", "/system be long", "/reset", "b") == [
        {"role": "system", "content": "be long"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "two"}]  # fmt: skip
    assert "(the dialog begins anew)" in capfd.readouterr().err


def test_ctrl_c_stops_the_answer_and_not_the_program(capfd):
    model = Scripted("a b c d e f", "next")
    model.interrupt_at = len(tokenizer().encode("e f")) + len(model.script) - len(tokenizer().encode("a b c d e f"))
    messages = talk(model, "Hi", "^C", "go")
    out, err = capfd.readouterr()
    assert "(stopped; /continue goes on)" in err and "(Ctrl-D or /exit ends)" in err
    assert messages[1]["content"] and "a b c d e f".startswith(messages[1]["content"]) and "partial" not in messages[1]
    assert len(messages) == 4 and messages[2]["content"] == "go"


def test_an_answer_that_the_limit_cuts_is_said_and_gone_on_with(capfd):
    text = "return width * height"
    model = Scripted(text)
    messages = talk(model, "Hi", "/continue", "/continue", "/continue", max_new_tokens=3)
    assert messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
    out, err = capfd.readouterr()
    assert out.replace("\n", "") == text and err.count("(cut at 3 tokens; /continue goes on)") >= 1 and "the last answer is complete" in err


def test_the_end_of_the_context_cuts_too(capfd):
    model = Scripted("word " * 50)
    model.config = small_config(vocab_size=tokenizer().vocab_size, max_position_embeddings=80)
    assert talk(model, "Hi")[-1]["partial"] and "(cut at " in capfd.readouterr().err
    messages = talk(Scripted("x"), "/system " + "long " * 4096, "Hi")
    assert [m["role"] for m in messages] == ["system"], "what could not be answered was not said"
    assert "error: prompt: " in capfd.readouterr().err


def test_control_characters_of_an_answer_do_not_reach_the_terminal(capfd):
    talk(Scripted("\x1b[2Ja\x07\tb\n\u200d世"), "Hi")
    assert capfd.readouterr().out == "\ufffd[2Ja\ufffd\tb\n\u200d世\n" and harmless("\x85\x7f") == "\ufffd\ufffd"


def test_a_thought_goes_to_stderr_and_into_the_dialog(capfd):
    chat = chat_of(Scripted("<think>hm</think>Yes."), "Hi", style="thinking")
    ids = [tokenizer().special["<think>"], *tokenizer().encode("hm"), tokenizer().special["</think>"], *tokenizer().encode("Yes."), tokenizer().special[STOP]]
    chat.model.script = ids
    chat.run()
    assert capfd.readouterr() == ("Yes.\n", "hm")
    assert chat.messages[-1] == {"role": "assistant", "content": "Yes.", "reasoning_content": "hm"}


def test_at_a_terminal_a_thought_is_dimmed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert show([{"reasoning_content": "hm"}, {"content": "Yes."}]) == [{"reasoning_content": "hm"}, {"content": "Yes."}]
    assert capsys.readouterr() == ("Yes.", "\x1b[2mhm\x1b[0m")


# ---- tools ----

TOOLS_FILE = '''def add(a: float, b: float = 0) -> float:
    """Add two numbers."""
    return a + b
'''


@pytest.fixture
def tools_file(tmp_path):
    (tmp_path / "my_tools.py").write_text(TOOLS_FILE)
    return str(tmp_path / "my_tools.py")


def test_a_call_is_run_after_a_yes_and_its_result_answered(capfd, tools_file):
    model = Scripted("I add." + B + C + "functions.add:0" + A + '{"a": 1, "b": 2}' + X + E, "It is 3.")
    messages = talk(model, f"/tools {tools_file}", "1 + 2?", "y")
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"][0]["id"] == "functions.add:0" and messages[2] == {"role": "tool", "tool_call_id": "functions.add:0", "name": "add", "content": "3"}
    out, err = capfd.readouterr()
    assert out == "I add.\nIt is 3.\n" and "(offered: add)" in err and 'call add {"a": 1, "b": 2}' in err and "= 3" in err


def test_a_call_is_not_run_after_anything_but_a_yes(tools_file):
    for answer in ("n", "", "yes please", "^C"):
        model = Scripted(B + C + "functions.add:0" + A + '{"a": 1}' + X + E, "Well.")
        assert talk(model, f"/tools {tools_file}", "add", answer)[2]["content"] == "The user did not allow this call."


def test_the_next_calls_number_goes_on_through_the_dialog(tools_file):
    model = Scripted(B + C + "functions.add:0" + A + '{"a": 1}' + X + E, "one", B + C + "functions.add:1" + A + '{"a": 2}' + X + E, "two")
    messages = talk(model, f"/tools {tools_file}", "add", "y", "more", "y")
    assert [c["id"] for m in messages for c in m.get("tool_calls", ())] == ["functions.add:0", "functions.add:1"] and messages[-1]["content"] == "two"


def test_calls_are_held_to_the_schema_whatever_the_model_wants(tools_file):
    # The script would name another tool and other arguments; the constraint lets through what is in form.
    model = Scripted(B + C + "functions.rm:7" + A + '{"path": 1}' + X + E, "ok")
    chat = chat_of(model, "y", max_new_tokens=80)
    chat.offer(tools_file)
    chat.messages = [{"role": "user", "content": "x"}]
    message = chat.answer()
    (call,) = message["tool_calls"][:1]
    assert call["function"]["name"] == "add" and set(json.loads(call["function"]["arguments"])) <= {"a", "b"}


def test_a_call_cut_by_the_limit_is_not_run_and_can_be_gone_on_with(capfd):
    # No tools are declared here, so that no constraint keeps the call from beginning too late.
    arguments = '{"a": 1, "b": 2}'
    model = Scripted(B + C + "functions.add:0" + A + arguments + X + E, "no such tool")
    length = len(tokenizer().encode("functions.add:0")) + 6
    chat = chat_of(model, "go", max_new_tokens=length)
    chat.run()
    assert chat.messages[-1]["partial"] and "inside a call, which is not run" in capfd.readouterr().err
    assert arguments.startswith(chat.messages[-1]["tool_calls"][0]["function"]["arguments"])
    chat.max_new_tokens = 50
    chat.go_on()
    assert chat.messages[1]["tool_calls"][0]["function"]["arguments"] == arguments and "partial" not in chat.messages[1]
    assert chat.messages[2] == {"role": "tool", "tool_call_id": "functions.add:0", "name": "add", "content": "There is no tool add."}


def test_a_cut_call_is_dropped_when_the_user_says_something_else():
    model = Scripted("Wait." + B + C + "functions.add:0" + A + '{"a": 1, "b": 2}' + X + E)
    chat = chat_of(model, max_new_tokens=len(tokenizer().encode("Wait.functions.add:0")) + 6)
    chat.say("go")
    assert chat.messages[-1]["partial"]
    chat.model.script = [*tokenizer().encode("Fine."), tokenizer().special[STOP]]
    chat.say("never mind")
    assert chat.messages[1] == {"role": "assistant", "content": "Wait."} and chat.messages[-1]["content"] == "Fine."


def test_web_search_is_answered_by_the_search_function(capfd):
    asked = []
    model = Scripted(B + C + "functions.$web_search:0" + A + '{"query": "moon"}' + X + E, "Found.")
    messages = talk(model, "find", web_search=True, search=lambda query: asked.append(query) or "Offline: nothing\nat all")
    assert asked == ["moon"] and messages[2]["content"] == "Offline: nothing\nat all" and messages[3]["content"] == "Found."
    assert '$web_search({"query": "moon"}): Offline: nothing' in capfd.readouterr().err


def test_calls_without_end_are_stopped(capfd):
    model = Scripted(*[B + C + f"functions.none:{n}" + A + "{}" + X + E for n in range(20)])
    messages = talk(model, "go")
    assert len([m for m in messages if m["role"] == "tool"]) == 8 and "(stopped after 8 rounds of calls)" in capfd.readouterr().err


# ---- JSON ----


def test_json_and_schema_hold_every_answer(capfd):
    model = Scripted("no JSON at all", "nor here")
    messages = talk(model, "a", "b", schema=True, max_new_tokens=30)
    assert all(isinstance(json.loads(m["content"]), dict) for m in messages if m["role"] == "assistant")
    messages = talk(Scripted("x"), "a", schema={"enum": ["red", "blue"]})
    assert messages[-1]["content"] in ('"red"', '"blue"') and "partial" not in messages[-1]
    assert "/continue" not in capfd.readouterr().err


def test_a_limit_that_no_document_fits_into_is_said_and_the_dialog_goes_on(capfd):
    messages = talk(Scripted("x"), "a", schema={"const": "a long text that needs many tokens"}, max_new_tokens=3)
    assert messages == [] and "error: max_new_tokens: found 3; expected at least" in capfd.readouterr().err


def test_json_and_tools_together_are_refused(tools_file):
    with pytest.raises(K2Error, match="a JSON reply calls nothing"):
        chat_of(Scripted(), schema=True).offer(tools_file)
    with pytest.raises(K2Error, match="expected one of them"):
        chat_of(Scripted(), schema=True, web_search=True)


@pytest.mark.parametrize(("limit", "document"), [(200, {"a": 1}), (6, {})])
def test_a_thinking_model_may_think_before_its_document_which_the_limit_closes(capfd, limit, document):
    model, special = Scripted(), tokenizer().special
    model.script = [special["<think>"], *tokenizer().encode("so it goes"), special["</think>"], *tokenizer().encode('{"a": 1}')]
    messages = talk(model, "a", style="thinking", schema=True, max_new_tokens=limit)
    assert json.loads(messages[-1]["content"]) == document and "so it goes".startswith(messages[-1]["reasoning_content"]) and "partial" not in messages[-1]


def test_a_thought_that_was_stopped_is_gone_on_with_and_its_document_follows():
    model, special = Scripted(), tokenizer().special
    model.script = [*tokenizer().encode(" goes"), special["</think>"], *tokenizer().encode('{"a": 1}')]
    chat = chat_of(model, style="thinking", schema=True, max_new_tokens=200)
    chat.messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning_content": "so it", "partial": True}]
    chat.go_on()
    assert chat.messages[-1] == {"role": "assistant", "content": '{"a": 1}', "reasoning_content": "so it goes"}


# ---- transcripts and commands ----


def test_a_dialog_is_saved_and_taken_up_again(tmp_path, capfd):
    path = tmp_path / "dialog.json"
    messages = talk(Scripted("Hello 世界."), "/system s", "Hi", f"/save {path}")
    assert json.loads(path.read_text(encoding="utf-8")) == {"messages": messages}
    assert talk(Scripted("Bye."), f"/load {path}", "Bye") == [*messages, {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "Bye."}]
    assert f"(3 messages in {path})" in capfd.readouterr().err


def test_a_cut_answer_can_be_gone_on_with_after_it_was_saved(tmp_path, capfd):
    path, text = tmp_path / "dialog.json", "return width * height"
    model = Scripted(text)
    talk(model, "Hi", f"/save {path}", max_new_tokens=4)
    assert talk(model, f"/load {path}", "/continue")[-1] == {"role": "assistant", "content": text}
    assert "/continue goes on with the last" in capfd.readouterr().err


@pytest.mark.parametrize(("line", "words"), [
    ("/nope", "/nope: no such command. See /help"),
    ("/tools", "/tools: expected something behind it"),
    ("/tools none.py", "none.py: expected a Python file, found nothing"),
    ("/load none.json", "none.json: expected a JSON file, found nothing"),
    ("/load README.md", "README.md: expected JSON, found"),
    ("/save no/such/folder/x", "could not be written"),
    ("/continue", "/continue: the last answer is complete"),
])  # fmt: skip
def test_what_the_user_can_mend_is_one_line_and_the_chat_goes_on(capfd, monkeypatch, line, words):
    monkeypatch.chdir(ROOT)
    assert talk(Scripted("Hello."), line, "Hi")[-1]["content"] == "Hello."
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1 and err[0].startswith("error: ") and words in err[0]


def test_a_blank_keeps_a_slash_from_being_a_command_and_help_names_them_all(capfd):
    assert talk(Scripted("Yes."), " /reset is a command?", "/help")[0]["content"] == " /reset is a command?"
    err = capfd.readouterr().err
    assert all(command in err for command in ("/reset", "/system", "/tools", "/save", "/load", "/continue", "/exit", "Ctrl-C"))


def test_exit_ends():
    assert talk(Scripted("one", "two"), "a", "/exit", "b")[-1]["content"] == "one"


def test_a_checkpoints_own_template_comes_first(tmp_path):
    assert style_of(tmp_path, tokenizer()) == "thinking", "its tokenizer has <think>"
    (tmp_path / "chat_template.jinja").write_text(INSTRUCT_JINJA)
    assert isinstance(style_of(tmp_path, tokenizer()), Template)
    assert talk(Scripted("Hello."), "Hi", style=style_of(tmp_path, tokenizer()))[-1]["content"] == "Hello."


def test_lines_from_a_pipe_end_at_its_end(monkeypatch, tmp_path):
    (tmp_path / "lines").write_text("a\n\nb")
    with open(tmp_path / "lines") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert [read_line("> ") for _ in range(3)] == ["a", "", "b"]
        with pytest.raises(EOFError):
            read_line("> ")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(EOFError):
        read_line("> ")


# ---- the command ----


def test_the_command_answers_lines_from_a_pipe(tmp_path):
    (tmp_path / "schema.json").write_text('{"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}')
    command = [sys.executable, "-m", "k2", "chat", "--schema", str(tmp_path / "schema.json"), "--max-new-tokens", "40", "--seed", "0", "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, input=b"A number\nAnother\n", capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.decode().split("}")) == 3 and all(1 <= json.loads(text + "}")["n"] <= 9 for text in done.stdout.decode().split("}")[:2])
    assert "never taught to chat" in done.stderr.decode() and "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize(("arguments", "words"), [
    (["--schema", "none.json"], "none.json: expected a JSON file, found nothing"),
    (["--max-new-tokens", "0"], "--max-new-tokens: found 0; expected 1 or more"),
    (["--temperature", "nan", "--model", "none"], "temperature: found nan"), (["--top-p", "1.5", "--model", "none"], "top_p: found 1.5"),
    (["--seed", "-1", "--model", "none"], "seed: found -1"),
    (["--json", "--web-search"], "expected one of them"),
    (["--tools", "none.py"], "none.py: expected a Python file"),
    (["--load", "none.json"], "none.json: expected a JSON file"),
    (["--style", "llama"], "invalid choice: 'llama'"),
    (["--model", "no/such/model"], "no/such/model"),
])  # fmt: skip
def test_flags_that_cannot_be_met_are_one_line_and_status_2(capfd, arguments, words):
    assert main(["chat", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.splitlines()[-1].startswith("error: ") and words in err and "Traceback" not in err


def test_a_dialog_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path):
    keep, chat = tmp_path / "keep.json", chat_of(Scripted())
    keep.write_text("before")
    chat.messages = [{"role": "user", "content": "\ud800"}]
    with pytest.raises(K2Error, match="could not be written"):
        chat.save(str(keep))
    chat.messages = [{"role": "user", "content": "Hi"}]
    with pytest.raises(K2Error, match="could not be written"):
        chat.save(f"{keep}\0x")
    assert keep.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["keep.json"]
    link = tmp_path / "link.json"
    link.symlink_to(keep)
    keep.chmod(0o640)
    chat.save(str(link))
    assert link.is_symlink() and json.loads(keep.read_text()) == {"messages": chat.messages} and keep.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_device_is_said_and_stays_a_device():
    chat = chat_of(Scripted())
    with pytest.raises(K2Error, match="/dev/full: could not be written: No space left"):
        chat.save("/dev/full")
    assert not Path("/dev/full").is_file()


@pytest.mark.parametrize(("saved", "words"), [
    ({"messages": [{"role": "user", "content": "\ud800"}]}, r"messages\[0\].content: found half of a surrogate pair"),
    ({"messages": [{"role": ["a"], "content": "hi"}]}, r"messages\[0\].role: found \['a'\]"),
    ({"messages": [{"role": "tool", "tool_call_id": "nobody", "content": "hi"}]}, "found 'nobody', which no call before it has"),
    ([{"role": "user", "content": "Hi"}], 'found list; expected an object with "messages"'),
    ({"messages": []}, "expected a list of at least one message"),
])  # fmt: skip
def test_a_damaged_transcript_is_refused_under_its_name(tmp_path, saved, words):
    path, chat = tmp_path / "dialog.json", chat_of(Scripted())
    path.write_text(json.dumps(saved))
    with pytest.raises(K2Error, match=f"dialog.json: .*{words}"):
        chat.load(str(path))
    with pytest.raises(K2Error, match="expected"):
        chat.load(f"{path}\0")
    assert chat.messages == []
