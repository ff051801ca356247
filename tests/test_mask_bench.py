"""The benchmark of masks: its made vocabulary is one, and every step of its documents is timed."""

from k2 import mask_bench
from k2.constraint import Grammar, Vocabulary
from k2.tokenizer import RESERVED

TEXTS = ["def area(width, height):\n    return width * height_of(123456)\n" * 3, "世界 Привет\n"]


def test_the_made_tokens_are_distinct_hold_every_byte_and_are_as_many_as_asked_for():
    tokens = mask_bench.wide_tokens(TEXTS, 300)
    assert len(tokens) == len(set(tokens)) == 300 and {bytes([b]) for b in range(256)} <= set(tokens) and b" width" in tokens


def test_every_step_is_timed_and_every_document_ends():
    vocabulary = Vocabulary(mask_bench.stand_in(mask_bench.wide_tokens(TEXTS, 300)))
    assert vocabulary.width == 300 + RESERVED and len(vocabulary.stop_ids) == 2
    times = mask_bench.documents(Grammar(vocabulary, {"const": None}), 5, 20, 0)
    assert len(times) in range(5, 5 * 4 + 1) and all(t > 0 for t in times)


def test_the_table_has_a_row_for_each_turn(monkeypatch, capsys):
    monkeypatch.setattr(mask_bench, "training_files", lambda: [])
    monkeypatch.setattr(mask_bench, "read_texts", lambda files: TEXTS)
    mask_bench.bench(300, count=3, limit=40)
    printed = capsys.readouterr().out
    assert printed.count("JSON Mode, ") == printed.count("schema, ") == 2 and "556 ids" in printed
