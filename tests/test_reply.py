"""The reply parser: a table of replies, right and wrong ones, each as a whole, cut at every place, and cut at random."""

import itertools
import json
import random
import time

import pytest
from conversations import NAMES, TEXTS, random_call
from test_chat import tokenizer

from k2 import K2Error, ReplyStream, encode_chat, parse_reply, render_chat
from k2.chat import Marker, decode_parts
from k2.reply import MARKERS, merged

B, E = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
B1, E1 = "<|tool_call_section_begin|>", "<|tool_call_section_end|>"
C, A, X, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>", "<|im_end|>"
ALL_MARKERS = (B, E, B1, E1, C, A, X, END, "<think>", "</think>")


def tool(name: str, **properties) -> dict:
    """A declared tool; each property is required but those given as None."""
    required = [key for key, kind in properties.items() if kind]
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {key: {"type": kind or "string"} for key, kind in properties.items()}, "required": required}}}


TOOLS = [tool("add", a="number"), tool("get-weather", city="string", unit=None), tool("fs.read_file", path="string"), tool("now")]


def one(i="functions.add:0", given='{"a": 1}') -> str:
    return f"{C}{i}{A}{given}{X}"


ADD = ("functions.add:0", "add", '{"a": 1}')
WEATHER = ("functions.get-weather:1", "get-weather", '{"city": "Rome"}')
# text, tools, and what it means: content, calls as (id, name, arguments), words that stand in the problems, reasoning
CASES = {
    # ---- text ----
    "empty": ("", None, "", [], [], None),
    "text": ("Hello.", None, "Hello.", [], [], None),
    "blanks": (" \n ", None, " \n ", [], [], None),
    "leading blanks stay": ("\n  Hi", None, "\n  Hi", [], [], None),
    "other scripts": ("世界 😀 é", None, "世界 😀 é", [], [], None),
    "angle brackets": ("a < b <| c <|tool_call", None, "a < b <| c <|tool_call", [], [], None),
    "half a marker at the end": ("see <|tool_calls_section_be", None, "see <|tool_calls_section_be", [], [], None),
    "half a marker inside": ("see <|tool_calls_section_be|> it", None, "see <|tool_calls_section_be|> it", [], [], None),
    "doubled bracket": (f"<<{C[1:]}", None, "<" + "", [], ["left unfinished"], None),
    "an unknown marker is text": ("<|tool_outputs|>x", None, "<|tool_outputs|>x", [], [], None),
    "end of turn": (f"Hi{END}", None, "Hi", [], [], None),
    "behind the end of turn": (f"Hi{END}more{B}{one()}", None, "Hi", [], [], None),
    "media markers are text": ("<|media_start|>", None, "<|media_start|>", [], [], None),
    "json is text": ('{"name": "add", "arguments": {}}', TOOLS, '{"name": "add", "arguments": {}}', [], [], None),
    "xml call of another model is text": ("<tool_call>{}</tool_call>", TOOLS, "<tool_call>{}</tool_call>", [], [], None),
    # ---- one call ----
    "call": (f"{B}{one()}{E}", TOOLS, "", [ADD], [], None),
    "call without tools given": (f"{B}{one()}{E}", None, "", [ADD], [], None),
    "call and end of turn": (f"{B}{one()}{E}{END}", TOOLS, "", [ADD], [], None),
    "text before": (f"I add.\n{B}{one()}{E}", TOOLS, "I add.\n", [ADD], [], None),
    "text after": (f"{B}{one()}{E}\nDone.", TOOLS, "\nDone.", [ADD], [], None),
    "text on both sides": (f"a {B}{one()}{E} b", TOOLS, "a  b", [ADD], [], None),
    "no gap": (f"a{B}{one()}{E}b", TOOLS, "ab", [ADD], [], None),
    "spaces around id and arguments": (f"{B} {C} functions.add:0 {A} {{\"a\": 1}} {X} {E}", TOOLS, "", [ADD], [], None),
    "line feeds around id and arguments": (f"{B}\n{C}\nfunctions.add:0\n{A}\n{{\"a\": 1}}\n{X}\n{E}", TOOLS, "", [ADD], [], None),
    "no arguments": (B + one('functions.now:0', '{}') + E, TOOLS, "", [("functions.now:0", "now", "{}")], [], None),
    "empty arguments": (B + one('functions.now:0', '') + E, TOOLS, "", [("functions.now:0", "now", "")], ["call 0: its arguments are no JSON object"], None),
    "large number": (B + one('functions.add:1234567') + E, TOOLS, "", [("functions.add:1234567", "add", '{"a": 1}')], [], None),
    "counter goes on": (B + one('functions.add:7') + E, TOOLS, "", [("functions.add:7", "add", '{"a": 1}')], [], None),
    # ---- several ----
    "two calls": (f"{B}{one()}{one(WEATHER[0], WEATHER[2])}{E}", TOOLS, "", [ADD, WEATHER], [], None),
    "two calls, line feed between": (f"{B}{one()}\n{one(WEATHER[0], WEATHER[2])}{E}", TOOLS, "", [ADD, WEATHER], [], None),
    "two sections": (f"x{B}{one()}{E}y{B}{one(WEATHER[0], WEATHER[2])}{E}z", TOOLS, "xyz", [ADD, WEATHER], [], None),
    "one tool twice": (f"{B}{one()}{one('functions.add:1', '{}')}{E}", TOOLS, "", [ADD, ("functions.add:1", "add", "{}")], [], None),
    "one id twice": (f"{B}{one()}{one()}{E}", TOOLS, "", [ADD, ADD], ["call 1: its id functions.add:0 was used before"], None),
    "text between calls is kept": (f"{B}{one()} and {one(WEATHER[0], WEATHER[2])}{E}", TOOLS, " and", [ADD, WEATHER], [], None),
    "text in an empty section is kept": (f"{B}I would call{E}", TOOLS, "I would call", [], [], None),
    "empty section": (f"a{B}{E}b", TOOLS, "ab", [], [], None),
    # ---- names ----
    "hyphen": (B + one('functions.get-weather:0', '{}') + E, TOOLS, "", [("functions.get-weather:0", "get-weather", "{}")], [], None),
    "dot": (B + one('functions.fs.read_file:0', '{}') + E, TOOLS, "", [("functions.fs.read_file:0", "fs.read_file", "{}")], [], None),
    "dot, no tools given": (B + one('functions.fs.read_file:0', '{}') + E, None, "", [("functions.fs.read_file:0", "fs.read_file", "{}")], [], None),
    "another namespace": (B + one('tools.add:0') + E, TOOLS, "", [("tools.add:0", "add", '{"a": 1}')], [], None),
    "namespace twice": (B + one('functions.functions.add:0') + E, TOOLS, "", [("functions.functions.add:0", "add", '{"a": 1}')], [], None),
    "no namespace": (B + one('add:0') + E, TOOLS, "", [("add:0", "add", '{"a": 1}')], [], None),
    "dollar": (B + one('functions.$web_search:0', '{}') + E, None, "", [("functions.$web_search:0", "$web_search", "{}")], [], None),
    "another script": (B + one('functions.搜索:0', '{}') + E, None, "", [("functions.搜索:0", "搜索", "{}")], [], None),
    "colon in the name": (B + one('functions.a:b:2', '{}') + E, None, "", [("functions.a:b:2", "a:b", "{}")], [], None),
    "digits in the name": (B + one('functions.f1_2:3', '{}') + E, None, "", [("functions.f1_2:3", "f1_2", "{}")], [], None),
    "undeclared": (B + one('functions.rm:0', '{}') + E, TOOLS, "", [("functions.rm:0", "rm", "{}")], ["call 0: rm is not declared in this request"], None),
    "undeclared, none declared": (f"{B}{one()}{E}", [], "", [ADD], ["add is not declared"], None),
    # ---- bad ids ----
    "bare number": (B + one('3') + E, TOOLS, "", [("functions.add:3", "add", '{"a": 1}')], [], None),
    "colon and number": (B + one(':3') + E, TOOLS, "", [("functions.add:3", "add", '{"a": 1}')], [], None),
    "namespace and number": (B + one('functions.:3') + E, TOOLS, "", [("functions.add:3", "add", '{"a": 1}')], [], None),
    "bare number, optional key": (B + one('0', WEATHER[2]) + E, TOOLS, "", [("functions.get-weather:0", "get-weather", WEATHER[2])], [], None),
    "bare number, no tool fits": (B + one('3', '{"zz": 1}') + E, TOOLS, "", [], ["id '3' was left out: it names no tool"], None),
    "bare number, two tools fit": (B + one('3', '{}') + E, [tool("a"), tool("b")], "", [], ["it names no tool"], None),
    "bare number, no JSON": (B + one('3', 'zz') + E, TOOLS, "", [], ["it names no tool"], None),
    "bare number, no tools given": (B + one('3') + E, None, "", [], ["it names no tool"], None),
    "dot for colon": (f"a{B}{one('functions.x.0')}{E}b", TOOLS, "ab", [], ["id 'functions.x.0' was left out"], None),
    "no number, declared": (B + one('functions.add') + E, TOOLS, "", [ADD], [], None),
    "no number, undeclared": (B + one('functions.rm') + E, TOOLS, "", [], ["left out"], None),
    "empty id": (B + one('') + E, TOOLS, "", [], ["id '' was left out"], None),
    "a bad call between good ones": (f"{B}{one()}{one('bad id')}{one(WEATHER[0], WEATHER[2])}{E}", TOOLS, "", [ADD, WEATHER], ["'bad id' was left out"], None),
    "other digits": (B + one('functions.add:٣') + E, TOOLS, "", [], ["left out"], None),
    "foreign id": (B + one('call_abc') + E, TOOLS, "", [], ["'call_abc' was left out"], None),
    # ---- arguments ----
    "angle brackets in arguments": (B + one(given='{"a": "<b> <|x|> <"}') + E, TOOLS, "", [(*ADD[:2], '{"a": "<b> <|x|> <"}')], [], None),
    "line feeds in arguments": (B + one(given='{\n "a": 1\n}') + E, TOOLS, "", [(*ADD[:2], '{\n "a": 1\n}')], [], None),
    "escapes in arguments": (B + one(given=r'{"a": "\n\"\u4e16"}') + E, TOOLS, "", [(*ADD[:2], r'{"a": "\n\"\u4e16"}')], [], None),
    "nested arguments": (B + one(given='{"a": {"b": [1, {}]}}') + E, TOOLS, "", [(*ADD[:2], '{"a": {"b": [1, {}]}}')], [], None),
    "invalid JSON is passed on": (B + one(given='{"a": }') + E, TOOLS, "", [(*ADD[:2], '{"a": }')], ["call 0: its arguments are no JSON object"], None),
    "open string is passed on": (B + one(given='{"a": "x') + E, TOOLS, "", [(*ADD[:2], '{"a": "x')], ["no JSON object"], None),
    "a JSON list": (B + one(given='[1]') + E, TOOLS, "", [(*ADD[:2], "[1]")], ["no JSON object"], None),
    "NaN": (B + one(given='{"a": NaN}') + E, TOOLS, "", [(*ADD[:2], '{"a": NaN}')], ["no JSON object"], None),
    "a huge number": (B + one(given='{"a": ' + '9' * 5000 + '}') + E, TOOLS, "", [(*ADD[:2], '{"a": ' + "9" * 5000 + "}")], [], None),
    "deep nesting": (B + one(given='[' * 9000) + E, TOOLS, "", [(*ADD[:2], "[" * 9000)], ["no JSON object"], None),
    "long arguments": (B + one(given='{"a": "' + 'x' * 9000 + '"}') + E, TOOLS, "", [(*ADD[:2], '{"a": "' + "x" * 9000 + '"}')], [], None),
    "a tool call in the arguments' words": (B + one(given='{"a": "functions.add:1"}') + E, TOOLS, "", [(*ADD[:2], '{"a": "functions.add:1"}')], [], None),
    # ---- markers that are wrong, or not there ----
    "singular section": (f"{B1}{one()}{E1}", TOOLS, "", [ADD], [], None),
    "singular begin, plural end": (f"{B1}{one()}{E}z", TOOLS, "z", [ADD], [], None),
    "no section end": (f"{B}{one()}", TOOLS, "", [ADD], [], None),
    "no section end, end of turn": (f"{B}{one()}{END}", TOOLS, "", [ADD], [], None),
    "no section end, text": (f"{B}{one()} Done.", TOOLS, " Done.", [ADD], [], None),
    "no section begin": (f"x{one()}{E}", TOOLS, "x", [ADD], [], None),
    "no section at all": (f"x{one()}y", TOOLS, "xy", [ADD], [], None),
    "no call end before the next call": (f"{B}{C}functions.add:0{A}{{\"a\": 1}}{one(WEATHER[0], WEATHER[2])}{E}", TOOLS, "", [ADD, WEATHER], [], None),
    "no call end before the section end": (f"{B}{C}functions.add:0{A}{{\"a\": 1}}{E}z", TOOLS, "z", [ADD], [], None),
    "no call end before the end of turn": (f"{B}{C}functions.add:0{A}{{\"a\": 1}}{END}", TOOLS, "", [ADD], [], None),
    "no marker between id and arguments": (f"{B}{C}functions.add:0 {{\"a\": 1}} {X}{E}", TOOLS, "", [ADD], [], None),
    "no marker and no arguments": (f"{B}{C}functions.now:0{X}{E}", TOOLS, "", [("functions.now:0", "now", "")], ["no JSON object"], None),
    "section begins twice": (f"{B}{B}{one()}{E}", TOOLS, "", [ADD], [], None),
    "section begins inside a call": (f"{C}functions.add:0{A}{{\"a\": 1}}{B}{one(WEATHER[0], WEATHER[2])}{E}", TOOLS, "", [ADD, WEATHER], [], None),
    "call begins twice": (f"{B}{C}{one()}{E}", TOOLS, "", [ADD], ["id '' was left out"], None),
    "call ends twice": (f"{B}{one()}{X}{E}", TOOLS, "", [ADD], [f"a stray {X} was left out"], None),
    "arguments begin twice": (f"{B}{C}functions.add:0{A}{A}{{\"a\": 1}}{X}{E}", TOOLS, "", [ADD], [f"a stray {A} was left out"], None),
    "stray ends in text": (f"a{X}b{E}c{A}d", TOOLS, "abcd", [], [f"a stray {X}", f"a stray {E}", f"a stray {A}"], None),
    "section ends twice": (f"{B}{one()}{E}{E}z", TOOLS, "z", [ADD], [f"a stray {E}"], None),
    "half an end marker in the arguments": (B + one(given='{"a": "<|tool_call_e"}') + E, TOOLS, "", [(*ADD[:2], '{"a": "<|tool_call_e"}')], [], None),
    "a marker broken by a letter": (f"{B}{one().replace('<|tool_call_end|>', '<|tool_call_ennd|>')}", TOOLS, "", [(*ADD[:2], '{"a": 1}<|tool_call_ennd|>')], ["left unfinished"], None),
    # ---- cut by the limit ----
    "cut in the section": (f"x{B}", TOOLS, "x", [], [], None),
    "cut in the id": (f"x{B}{C}functions.ad", TOOLS, "x", [], ["call 0: left unfinished"], None),
    "cut behind the id": (f"x{B}{C}functions.add:0{A}", TOOLS, "x", [(*ADD[:2], "")], ["call 0: left unfinished"], None),
    "cut in the arguments": (f"x{B}{C}functions.add:0{A}{{\"a\":", TOOLS, "x", [(*ADD[:2], '{"a":')], ["call 0: left unfinished"], None),
    "cut in the end marker": (f"x{B}{C}functions.add:0{A}{{\"a\": 1}}<|tool_ca", TOOLS, "x", [(*ADD[:2], '{"a": 1}<|tool_ca')], ["call 0: left unfinished"], None),
    "cut in the second call": (f"{B}{one()}{C}functions.get-weather:1{A}{{", TOOLS, "", [ADD, (*WEATHER[:2], "{")], ["call 1: left unfinished"], None),
    "cut in a bare call": (f"{B}{C}3{A}{{\"a\": 1}}", TOOLS, "", [], ["call 0: left unfinished"], None),
    # ---- reasoning ----
    "thought": ("<think>hm</think>Yes.", None, "Yes.", [], [], "hm"),
    "blanks before a thought": ("\n <think>hm</think>Yes.", None, "Yes.", [], [], "hm"),
    "blanks in a thought": ("<think>\nhm\n</think>\n\nYes.", None, "\n\nYes.", [], [], "\nhm\n"),
    "empty thought": ("<think></think>Yes.", None, "Yes.", [], [], None),
    "thought and call": (f"<think>hm</think>{B}{one()}{E}", TOOLS, "", [ADD], [], "hm"),
    "call in an open thought": (f"<think>hm {B}{one()}{E}", TOOLS, "", [ADD], [], "hm "),
    "call without a section in an open thought": (f"<think>hm{one()}", TOOLS, "", [ADD], [], "hm"),
    "unfinished thought": ("<think>hm", None, "", [], [], "hm"),
    "thought cut in its end": ("<think>hm</thi", None, "", [], [], "hm</thi"),
    "half a thought is text": ("<thin", None, "<thin", [], [], None),
    "half a thought and more is text": ("<thinking>", None, "<thinking>", [], [], None),
    "think later on is text": ("See <think>x</think>", None, "See <think>x</think>", [], [], None),
    "a second thought is text": ("<think>a</think>b<think>c</think>", None, "b<think>c</think>", [], [], "a"),
    "think inside a thought": ("<think>a<think>b</think>c", None, "c", [], [], "a<think>b"),
    "angle brackets in a thought": ("<think>a < b </ c</think>", None, "", [], [], "a < b </ c"),
    "stray end in a thought": (f"<think>a{X}b</think>c", None, "c", [], [f"a stray {X}"], "ab"),
    "end of turn in a thought": (f"<think>a{END}b", None, "", [], [], "a"),
}  # fmt: skip


def read(pieces, tools, **more) -> dict:
    """A stream's outcome as parse_reply gives it; each delta is looked at."""
    stream = ReplyStream(tools, **more)
    deltas = [delta for piece in pieces for delta in stream.feed(piece)] + stream.close()
    for delta in deltas:
        assert len(delta) == 1 and all(delta.values()), f"{delta}: expected one thing a delta, and something in it"
    return {**merged(deltas), "finish_reason": stream.finish_reason, "problems": stream.problems}


@pytest.mark.parametrize("name", CASES)
def test_a_reply_is_read_as_it_was_meant(name):
    text, tools, content, calls, problems, reasoning = CASES[name]
    reply = parse_reply(text, tools)
    assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in reply["tool_calls"]] == calls
    assert (reply["content"], reply["reasoning_content"]) == (content, reasoning)
    assert len(reply["problems"]) == len(problems) and all(words in said for words, said in zip(problems, reply["problems"])), reply["problems"]
    assert reply["finish_reason"] == ("tool_calls" if calls else "stop") and all(c["type"] == "function" for c in reply["tool_calls"])


def cuts(text: str):
    """The text in two at every place; in single characters; and in random pieces, empty ones among them."""
    yield from ((text[:n], text[n:]) for n in range(len(text) + 1))
    yield list(text)
    rng = random.Random(len(text))
    for _ in range(40):
        places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 12)))
        yield [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name][0]) < 2000])
def test_a_stream_cut_anywhere_means_the_same(name):
    text, tools = CASES[name][:2]
    expected = parse_reply(text, tools)
    for pieces in cuts(text):
        assert read(pieces, tools) == expected, pieces


def test_there_are_more_than_a_hundred_cases():
    assert len(CASES) >= 110


def test_no_marker_leaks_into_what_is_given_out():
    for name, (text, tools, *_) in CASES.items():
        reply = parse_reply(text, tools)
        given = reply["content"] + "".join(c["id"] + c["function"]["name"] + c["function"]["arguments"] for c in reply["tool_calls"])
        assert not any(marker in given for marker in MARKERS), name


def test_a_prompt_that_ended_in_an_open_thought():
    assert parse_reply("hm</think>Yes.", thinking=True)["reasoning_content"] == "hm" and parse_reply("hm</think>Yes.", thinking=True)["content"] == "Yes."
    assert parse_reply("</think>Yes.", thinking=True)["reasoning_content"] is None
    assert parse_reply("hm</think>Yes.")["content"] == "hm</think>Yes.", "without that, a stream could not know"


# ---- streams ----


def test_id_and_name_come_once_the_arguments_begin_and_arguments_as_they_come():
    stream = ReplyStream(TOOLS)
    assert stream.feed(f"Hi {B}{C}functions.add:4") == [{"content": "Hi "}]
    assert stream.feed(A) == [{"tool_calls": [{"index": 0, "id": "functions.add:4", "type": "function", "function": {"name": "add", "arguments": ""}}]}]
    assert stream.feed('{"a"') == [{"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}]
    assert stream.feed(": 1}<|tool_call_") == [{"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]}]
    assert stream.feed("end|>") == [] and stream.close() == []
    assert stream.finish_reason == "tool_calls" and not stream.problems and not stream.unfinished


def test_the_index_is_the_place_in_this_reply_and_not_the_ids_number():
    deltas = ReplyStream().feed(f"{B}{one('functions.f:7', '{}')}{one('functions.f:9', '{}')}")
    assert [part["index"] for delta in deltas for part in delta["tool_calls"] if "id" in part] == [0, 1]


def test_only_what_may_begin_a_marker_is_held_back():
    stream = ReplyStream()
    assert stream.feed("a<") == [{"content": "a"}] and stream.feed("b") == [{"content": "<b"}]
    assert stream.feed("<|tool") == [] and stream.feed("s") == [{"content": "<|tools"}]
    assert stream.close() == []


@pytest.mark.parametrize(("text", "expected"), [("Hi", False), (f"{B}{one()}{E}", False), (f"{C}functions.add:0{A}{{", True), (f"{C}func", True), ("<think>hm", True), (f"{one()}", False)])
def test_an_unfinished_reply_says_so(text, expected):
    stream = ReplyStream()
    stream.feed(text)
    stream.close()
    assert stream.unfinished is expected
    assert stream.close() == [] and stream.feed("more") == [], "closed twice"


def test_with_exact_markers_what_merely_spells_one_is_text():
    # A model that writes about its own format: the call's string holds the words of an end marker, not the token.
    spelled = f'{{"a": "{X} and {B}"}}'
    expected = {"content": "about <|im_end|> ", "reasoning_content": None, "tool_calls": [{"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": spelled}}]}
    parts = ["about <|im_", "end|> ", *map(Marker, (B, C)), "functions.add:0", Marker(A), spelled, *map(Marker, (X, E, END)), "over"]
    found = read(parts, TOOLS, exact=True)
    assert found == {**expected, "finish_reason": "tool_calls", "problems": []}
    ids = [tokenizer().special[p] if isinstance(p, Marker) else i for p in parts for i in ([0] if isinstance(p, Marker) else tokenizer().encode(p))]
    assert read(decode_parts(tokenizer(), ids), TOOLS, exact=True) == found


def test_a_problem_is_told_in_the_models_own_words():
    assert read([Marker(C), "a<b", Marker(A), "{}", Marker(X)], TOOLS, exact=True)["problems"] == ["a call of id 'a<b' was left out: it names no tool"]


def test_characters_that_span_tokens_come_whole_and_broken_ones_end_at_a_control_token():
    ids = [*tokenizer().encode("世😀"), tokenizer().special[B]]
    assert "".join(decode_parts(tokenizer(), ids)) == f"世😀{B}"
    assert list(filter(None, decode_parts(tokenizer(), [*tokenizer().encode("😀")[:-1], tokenizer().special[END]]))) == ["\ufffd", END]


# ---- there and back ----


def test_calls_rendered_and_read_again_are_the_same_calls():
    for seed in range(300):
        rng = random.Random(seed)
        message = {"role": "assistant", "content": rng.choice([t for t in TEXTS if "|>" not in t]), "tool_calls": [random_call(rng, k) for k in range(rng.randint(1, 4))]}
        prompt = render_chat([{"role": "user", "content": ""}], style="instruct")
        text = render_chat([{"role": "user", "content": ""}, message], add_generation_prompt=False)[len(prompt) :]
        if any(marker in json.dumps([c["function"]["arguments"] for c in message["tool_calls"]]) for marker in ALL_MARKERS):
            ids = encode_chat(tokenizer(), [{"role": "user", "content": ""}, message], add_generation_prompt=False)
            found = read(decode_parts(tokenizer(), ids[len(encode_chat(tokenizer(), [{"role": "user", "content": ""}])) :]), None, exact=True)
        else:
            found = parse_reply(text)
        expected = [(c["id"], c["function"]["name"], as_text(c["function"]["arguments"])) for c in message["tool_calls"]]
        assert [(c["id"], c["function"]["name"], c["function"]["arguments"]) for c in found["tool_calls"]] == expected, seed
        assert found["content"] == message["content"] and not found["problems"], seed


def as_text(given) -> str:
    return given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


# ---- nothing raises, nothing hangs ----

FRAGMENTS = (*ALL_MARKERS, "functions.", "add", ":0", "3", '{"a": 1}', "{", '"', "\\", " ", "\n", "<", "|", "x", "世", "[" * 50, "\ud800", "")


def test_ten_thousand_fuzzed_replies_neither_raise_nor_depend_on_where_they_are_cut():
    rng = random.Random(0)
    for n in range(10_000):
        parts = rng.choices(FRAGMENTS, k=rng.randint(1, 30))
        if rng.random() < 0.3:  # a marker with a letter missing
            marker = rng.choice(ALL_MARKERS)
            cut = rng.randrange(len(marker))
            parts.insert(rng.randrange(len(parts)), marker[:cut] + marker[cut + 1 :])
        tools = rng.choice((None, [], TOOLS))
        assert read(parts, tools) == parse_reply("".join(parts), tools), f"input {n}: {parts}"


def test_the_cost_of_a_reply_grows_with_its_length_and_not_its_square():
    # By counting the characters that the machine is handed, which no clock of a busy machine can spoil.
    for piece in ("a", " ", "<", "\n", "<|tool_call_", f"{C}", f"{one()}"):
        looked_at = []
        for length in (2000, 4000):
            stream = counting_stream(looked := [])
            for _ in range(length):
                stream.feed(piece)
            stream.close()
            looked_at.append(sum(looked))
        assert looked_at[1] <= 2.1 * looked_at[0], f"{piece!r}: {looked_at}"


def counting_stream(looked: list) -> ReplyStream:
    """A stream that notes the length of every text that it looks at."""

    class Counting(ReplyStream):
        def _text(self, text):
            looked.append(len(text) + len(self._held) + sum(map(len, self._blank)) * bool(text.strip()))
            super()._text(text)

    return Counting()


def test_a_reply_of_ten_megabytes_is_read():
    started = time.process_time()
    reply = parse_reply("a<" * 3_000_000 + B + one(given='{"a": "' + " \\n<" * 1_000_000 + '"}') * 2 + " " * 1_000_000)
    assert [len(c["function"]["arguments"]) for c in reply["tool_calls"]] == [4_000_009] * 2 and len(reply["content"]) == 6_000_000
    print(f"{time.process_time() - started:.2f} s")


@pytest.mark.parametrize("tools", [["add"], [{"function": {}}], [{"function": {"name": 3}}], 7, [{"function": {"name": "f", "parameters": 3}}]])
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(K2Error, match="tools: expected a list of"):
        parse_reply("", tools)


def test_names_of_the_generator_are_among_the_cases():
    assert {"get-weather", "fs.read_file", "$web_search", "搜索", "add"} == set(NAMES)


@pytest.mark.parametrize("parameters", [{"properties": None}, {"required": None}, {"properties": 5}, {"required": [["a"]]}])
def test_a_tool_whose_schema_has_no_names_is_refused(parameters):
    with pytest.raises(K2Error, match="properties an object and required a list of names"):
        parse_reply(f"{B}{C}3{A}{{}}{X}{E}", [{"type": "function", "function": {"name": "add", "parameters": parameters}}])


def test_no_text_is_refused():
    with pytest.raises(K2Error, match="reply: found NoneType"):
        parse_reply(None)


def test_an_id_that_comes_twice_in_a_reply_is_told():
    reply = parse_reply(f"{B}{C}functions.now:0{A}{{}}{X}{C}functions.now:0{A}{{}}{X}{E}", TOOLS)
    assert len(reply["tool_calls"]) == 2 and reply["problems"] == ["call 1: its id functions.now:0 was used before in this reply"]


def test_a_blank_in_an_id_is_left_out():
    assert parse_reply(f"{B}{C} functions.now : 0 {A}{{}}{X}{E}", TOOLS)["tool_calls"][0]["id"] == "functions.now:0"
