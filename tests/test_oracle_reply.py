"""Calls that hypothesis makes up, written as K2 writes them and read again: the same calls."""

import json

import pytest
from test_chat import tokenizer
from test_reply import ALL_MARKERS, read

from k2 import encode_chat, parse_reply, render_chat
from k2.chat import decode_parts

hypothesis = pytest.importorskip("hypothesis", reason="the oracle tests need tests/requirements-oracles.txt")
from hypothesis import strategies as st  # noqa: E402

pytestmark = pytest.mark.oracle
USER = [{"role": "user", "content": ""}]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.lists(st.sampled_from((*ALL_MARKERS, "<", "|>", " ")), max_size=4).map("".join)
VALUES = st.recursive(TEXT | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False, allow_infinity=False),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)  # fmt: skip
NAMES = st.from_regex(r"[a-zA-Z_$][a-zA-Z0-9_.-]{0,20}", fullmatch=True).filter(lambda name: not name.startswith("functions."))
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(TEXT, VALUES, max_size=3)), min_size=1, max_size=4)


@hypothesis.settings(max_examples=1000, derandomize=True, database=None, deadline=None)
@hypothesis.given(TEXT, CALLS)
def test_calls_written_and_read_again_are_the_same_calls(content, calls):
    message = {"role": "assistant", "content": content, "tool_calls": [
        {"id": f"functions.{name}:{n}", "type": "function", "function": {"name": name, "arguments": given}} for n, (name, given) in enumerate(calls)]}  # fmt: skip
    ids = encode_chat(tokenizer(), [*USER, message], add_generation_prompt=False)[len(encode_chat(tokenizer(), USER)) :]
    replies = [read(decode_parts(tokenizer(), ids), None, exact=True)]  # token by token, control tokens told from their spelling
    if not any(marker in content + json.dumps(calls) for marker in ALL_MARKERS):
        replies.append(parse_reply(render_chat([*USER, message], add_generation_prompt=False)[len(render_chat(USER)) :]))
    for reply in replies:
        found = [(c["id"], c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reply["tool_calls"]]
        assert found == [(f"functions.{name}:{n}", name, given) for n, (name, given) in enumerate(calls)]
        assert reply["content"] == content and not reply["problems"]
