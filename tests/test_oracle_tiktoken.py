"""The engine that K2's tokenizer was released with, given the same pattern and ranks, yields the same ids."""

import functools
import random
from pathlib import Path

import pytest

from k2 import Tokenizer
from k2.tokenizer import LONGEST_RUN, PATTERN, SPECIAL_NAMES, train_ranks

tiktoken = pytest.importorskip("tiktoken", reason="the oracle tests need tests/requirements-oracles.txt")
from test_tokenizer import TEXTS, random_text  # noqa: E402

pytestmark = pytest.mark.oracle
ROOT = Path(__file__).parents[1]


def own_sources() -> list[Path]:
    """This repository's Python files, and its Markdown where there is some."""
    return sorted([*ROOT.glob("k2/**/*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("lessons/*.md"), *ROOT.glob("*.md")])


@functools.cache
def ours_and_theirs() -> tuple[Tokenizer, "tiktoken.Encoding"]:
    """Both engines on 2,000 ranks learnt from the sources and from several languages."""
    ranks = train_ranks([*TEXTS, *(path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("k2/*.py")))], 2000)
    special = {len(ranks) + offset: name for offset, name in SPECIAL_NAMES.items()}
    ours = Tokenizer(ranks, special)
    theirs = tiktoken.Encoding("k2", pat_str=PATTERN, mergeable_ranks={token: rank for rank, token in enumerate(ranks)}, special_tokens=ours.special)
    assert len(ranks) == 2000 and theirs.n_vocab == ours.vocab_size == 2256
    return ours, theirs


def assert_same_ids(text: str):
    """Equal ids, or the first place where they part."""
    ours, theirs = ours_and_theirs()
    found, expected = ours.encode(text), theirs.encode_ordinary(text)
    first = next((n for n, pair in enumerate(zip(found, expected)) if pair[0] != pair[1]), min(len(found), len(expected)))
    assert found == expected, f"{text[:80]!r}: ids part at {first}: ours {found[first : first + 5]}, tiktoken's {expected[first : first + 5]}"


def test_4000_random_multilingual_strings_have_tiktokens_ids():
    rng = random.Random(10)
    for _ in range(4000):
        assert_same_ids(random_text(rng, 60))


def test_every_code_point_in_context_has_tiktokens_ids():
    rng = random.Random(11)
    for start in range(0, 0x110000, 64):
        if not 0xD800 <= start < 0xE000:
            assert_same_ids("".join(rng.choice(("", " ", "a", "A", "世", "\n", "'s", "1")) + chr(point) for point in range(start, start + 64)))


def test_the_repositorys_own_sources_have_tiktokens_ids():
    for path in own_sources():
        assert_same_ids(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("unit", ["a", " ", "1", "\n", "世", "!", "\t ", "aA", "\u0301", "😀", "self.", "    ", "'s", "\r\n", " \n"])
@pytest.mark.parametrize("length", [100, 1000, LONGEST_RUN])
def test_pathological_runs_have_tiktokens_ids(unit, length):
    assert_same_ids((unit * length)[:length])


def test_special_strings_have_tiktokens_ids_when_allowed_and_are_text_otherwise():
    (ours, theirs), rng = ours_and_theirs(), random.Random(12)
    for name in ours.special:
        text = random_text(rng) + name + random_text(rng) + name
        assert ours.encode(text, allow_special=True) == theirs.encode(text, allowed_special="all"), repr(text)
        assert_same_ids(text)


def test_bytes_decode_as_tiktoken_decodes_them():
    (ours, theirs), rng = ours_and_theirs(), random.Random(13)
    for _ in range(500):
        ids = rng.choices(range(ours.vocab_size), k=rng.randint(1, 12))
        assert ours.decode(ids) == theirs.decode(ids), ids
