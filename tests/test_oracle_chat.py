"""transformers renders the same Jinja templates to the same strings: a stranger's environment, on the same conversations."""

import functools

import pytest
from conversations import INSTRUCT_JINJA, THINKING_JINJA, random_conversation
from test_tokenizer import TEXTS, small_ranks

from k2 import K2Error, render_chat
from k2.chat import Template
from k2.tokenizer import build_bpe

transformers = pytest.importorskip("transformers", reason="the oracle tests need tests/requirements-oracles.txt")
pytestmark = pytest.mark.oracle


@functools.cache
def stranger():
    """transformers' tokenizer around our BPE; only its template engine is asked."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=build_bpe(list(small_ranks())))


@pytest.mark.parametrize(("style", "source"), [("instruct", INSTRUCT_JINJA), ("thinking", THINKING_JINJA)])
def test_transformers_renders_600_conversations_to_the_same_strings(style, source):
    for seed in range(600):
        conversation = random_conversation(seed)
        if style == "thinking" and conversation["tools"]:
            # Its engine does not sort: K2-Thinking's tokenizer class does so before it. Sorted ones must be left alone.
            conversation["tools"] = [in_order(tool) for tool in conversation["tools"]]
        theirs = stranger().apply_chat_template(conversation["messages"], tools=conversation["tools"], chat_template=source,
                                                add_generation_prompt=conversation["add_generation_prompt"], tokenize=False)  # fmt: skip
        assert render_chat(**conversation, style=style) == theirs, f"conversation {seed}"
        assert render_chat(**conversation, style=Template(source)) == theirs, f"conversation {seed}"


def in_order(value):
    """Keys sorted at every level."""
    if isinstance(value, dict):
        return {key: in_order(value[key]) for key in sorted(value)}
    return value


@pytest.mark.parametrize("source", [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n    U {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n",
    "  {%- set x = 'a' -%}  {{ x }}  \n\n{# c #}\n b{%+ if true %} c{% endif %}\n",
    "{{ {'é': '<&\\'>', 'a': [1, 2.0, none, true]} | tojson }}{{ [1] | tojson(indent=2) }}{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m['content'] | trim }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ missing }}{% if missing is defined %}x{% endif %}",
])  # fmt: skip
def test_the_engines_settings_are_transformers(source):
    messages = [{"role": "user", "content": f"  {text}\n"} for text in TEXTS]
    theirs = stranger().apply_chat_template(messages, chat_template=source, add_generation_prompt=True, tokenize=False)
    assert render_chat(messages, style=Template(source)) == theirs


def test_a_template_that_refuses_messages_refuses_them_in_both():
    source = "{{ raise_exception('no system message') }}"
    with pytest.raises(Exception, match="no system message"):
        stranger().apply_chat_template([{"role": "user", "content": "x"}], chat_template=source, tokenize=False)
    with pytest.raises(K2Error, match="no system message"):
        render_chat([{"role": "user", "content": "x"}], style=Template(source))
