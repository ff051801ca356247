"""The tokenizer on a vocabulary that the test trains itself, and K2's real frame of ids on a made one."""

import base64
import codecs
import functools
import itertools
import random

import pytest

from k2 import K2Error, Tokenizer
from k2.tokenizer import LONGEST_RUN, LONGEST_TEXT, RESERVED, SPECIAL_NAMES, byte_alphabet, cut_long_runs, merge_of, split_and_spell, tokenizer_files, train_ranks

TEXTS = (
    "def area(width, height):\n    return width * height\n\n\nclass Box:\n    def __init__(self, side):\n        self.side = side\n" * 3,
    "The quick brown fox jumps over the lazy dog. I'm sure they'll say it's what we've wanted, and you're right.\n" * 3,
    "世界很大，我想去看看。世界和平。 Привет, мир! Γειά σου Κόσμε. नमस्ते दुनिया 안녕 세상 שלום עולם\n" * 3,
)
# What random strings are made of: several scripts, combining marks, emoji that need four bytes, joiners, controls, marker parts.
ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCXYZ", "0123456789٣५", " \t\n\r\u00a0\u3000", "'.,;:!?/\\()[]{}<>|_-#$%&*", "世界和平很大想去看々〇", "éàüßñøıſ", "приветЖЩ", "नमस्ते",
    "안녕세상", "שלום", "e\u0301a\u0308\u200d\u200b\ufeff", "😀👩\u200d👩\u200d👧🇩🇪🏳️\u200d🌈𝔘𐍈", "\x00\x01\x07\x1b\x7f\x85\u2028", "'s'LL'Ve'd",
)  # fmt: skip


@functools.cache
def small_ranks() -> tuple[bytes, ...]:
    """450 tokens learnt from the texts above."""
    return tuple(train_ranks(TEXTS, 450))


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A tokenizer of 450 ranks with K2's 17 special names behind them."""
    ranks = list(small_ranks())
    return Tokenizer(ranks, {len(ranks) + offset: name for offset, name in SPECIAL_NAMES.items()})


def random_text(rng: random.Random, longest: int = 40) -> str:
    """Runs of characters from several alphabets; now and then bytes read as latin-1, or any code point that is no surrogate."""
    text = ""
    while len(text) < rng.randint(1, longest):
        kind = rng.randrange(len(ALPHABETS) + 2)
        if kind < len(ALPHABETS):
            text += "".join(rng.choices(ALPHABETS[kind], k=rng.randint(1, 6)))
        elif kind == len(ALPHABETS):
            text += rng.randbytes(rng.randint(1, 6)).decode("latin-1")
        else:
            text += chr(rng.choice((rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))
    return text


@functools.cache
def splitter():
    """K2's pattern, compiled once."""
    return split_and_spell()


def split(text: str) -> list[str]:
    """The pieces that K2's pattern cuts a text into."""
    byte_of = {letter: byte for byte, letter in byte_alphabet().items()}
    pieces = splitter().pre_tokenize_str(text)
    return [bytes(byte_of[letter] for letter in spelled).decode() for spelled, _ in pieces]


# ---- there and back ----


def test_random_strings_come_back_character_for_character():
    tokenizer, rng = small_tokenizer(), random.Random(0)
    for _ in range(4000):
        text = random_text(rng)
        found = tokenizer.decode(tokenizer.encode(text))
        assert found == text, f"{text!r} came back as {found!r}"


def test_every_character_of_the_basic_plane_and_many_beyond_come_back():
    tokenizer = small_tokenizer()
    for start in range(0, 0x110000, 0x800):
        if start != 0xD800:  # the surrogates, which are no characters
            text = "".join(map(chr, range(start, start + 0x800, 1 if start < 0x10000 else 16)))
            assert tokenizer.decode(tokenizer.encode(text)) == text, f"code points {start:#x} to {start + 0x7FF:#x} changed"


def test_the_tokens_bytes_joined_are_the_texts_bytes():
    tokenizer, rng = small_tokenizer(), random.Random(1)
    for _ in range(500):
        text = random_text(rng)
        assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)) == text.encode(), repr(text)


def test_learnt_words_are_one_token_and_the_empty_text_is_none():
    tokenizer = small_tokenizer()
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert [len(tokenizer.encode(word)) for word in (" width", "    ", "def")] == [1, 1, 1]
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bytes_that_are_no_utf8_decode_to_replacement_characters():
    tokenizer = small_tokenizer()
    half = tokenizer.encode("😀")[:-1]
    assert tokenizer.decode(half) == "\ufffd"
    assert tokenizer.decode([*half, *tokenizer.encode("a")]) == "\ufffda"


# ---- streams ----


def test_a_stream_equals_decode_at_every_split_and_holds_back_broken_characters():
    tokenizer, rng = small_tokenizer(), random.Random(2)
    for _ in range(300):
        text = random_text(rng).replace("\ufffd", "")
        ids, stream, out = tokenizer.encode(text), tokenizer.stream(), ""
        for n, i in enumerate(ids, 1):
            piece = stream.push(i)
            out += piece
            assert "\ufffd" not in piece and text.startswith(out), f"{text!r}: token {n} gave {piece!r}"
            cut_here = tokenizer.stream()
            pushed = "".join(map(cut_here.push, ids[:n]))
            assert pushed + cut_here.finish() == tokenizer.decode(ids[:n]), f"{text!r} cut behind token {n}"
        assert out + stream.finish() == text


def test_an_emoji_across_tokens_is_emitted_once_and_whole():
    tokenizer = small_tokenizer()
    ids, stream = tokenizer.encode("😀"), tokenizer.stream()
    assert len(ids) == 4, "the small vocabulary has learnt no emoji, so its four bytes are four tokens"
    assert [stream.push(i) for i in ids] == ["", "", "", "😀"]
    assert stream.finish() == ""


def test_a_character_that_never_becomes_whole_is_one_replacement_at_the_end():
    tokenizer = small_tokenizer()
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("a😀")[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


# ---- special ids ----


def test_all_256_reserved_ids_exist_and_are_named():
    tokenizer = small_tokenizer()
    assert sorted(tokenizer.special.values()) == list(range(450, 450 + RESERVED)) and tokenizer.vocab_size == 706
    assert tokenizer.special["<|im_end|>"] == 452 and tokenizer.special["[PAD]"] == 705
    assert tokenizer.special["<|reserved_token_455|>"] == 455, "an id without a name of its own gets K2's placeholder"
    assert tokenizer.decode([452, 455]) == "<|im_end|><|reserved_token_455|>"
    assert tokenizer.stop_ids == {451, 452, 459}


def test_special_strings_in_ordinary_text_never_become_control_ids():
    tokenizer = small_tokenizer()
    for name in tokenizer.special:
        for text in (name, f"a{name}b", name * 2, f" {name}\n"):
            ids = tokenizer.encode(text)
            assert max(ids) < 450 and tokenizer.decode(ids) == text, f"{text!r} became {ids}"


def test_a_marker_splits_the_text_and_becomes_its_id_when_allowed():
    tokenizer, rng = small_tokenizer(), random.Random(3)
    for name, i in tokenizer.special.items():
        a, b = random_text(rng), random_text(rng)
        found = tokenizer.encode(a + name + b, allow_special=True)
        assert found == tokenizer.encode(a) + [i] + tokenizer.encode(b), f"{a!r} {name} {b!r}: {found}"


def test_allowing_specials_changes_nothing_in_a_text_without_them():
    tokenizer, rng = small_tokenizer(), random.Random(4)
    for text in (*(random_text(rng) for _ in range(200)), "<|im_end", "|>", "[EOS", "<|reserved_token_9|>", "<|im_end |>"):
        assert tokenizer.encode(text, allow_special=True) == tokenizer.encode(text), repr(text)


def test_k2s_real_frame_of_ids():
    # 163,584 made ranks: all bytes, all pairs of bytes, and the first triples. Each is the union of two lower ones.
    single = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in single for b in single]
    triples = (pair + b for pair in pairs for b in single)
    ranks = [*single, *pairs, *itertools.islice(triples, 163_584 - 256 - 65_536)]
    tokenizer = Tokenizer(ranks, {163_584 + offset: name for offset, name in SPECIAL_NAMES.items()})
    named = {"[BOS]": 163584, "[EOS]": 163585, "<|im_end|>": 163586, "<|im_user|>": 163587, "<|im_assistant|>": 163588, "<|start_header_id|>": 163590,
             "<|end_header_id|>": 163591, "[EOT]": 163593, "<|im_system|>": 163594, "<|tool_calls_section_begin|>": 163595,
             "<|tool_calls_section_end|>": 163596, "<|tool_call_begin|>": 163597, "<|tool_call_argument_begin|>": 163598,
             "<|tool_call_end|>": 163599, "<|im_middle|>": 163601, "[UNK]": 163838, "[PAD]": 163839}  # fmt: skip
    assert {name: i for name, i in tokenizer.special.items() if not name.startswith("<|reserved")} == named
    assert tokenizer.vocab_size == 163_840 and tokenizer.stop_ids == {163585, 163586, 163593}
    assert tokenizer.special["<|reserved_token_163589|>"] == 163589
    assert tokenizer.decode(tokenizer.encode("def 世界 😀")) == "def 世界 😀"


# ---- refusals ----


@pytest.mark.parametrize("bad", [-1, 706, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(bad):
    for call in (lambda: small_tokenizer().decode([bad]), lambda: small_tokenizer().stream().push(bad)):
        with pytest.raises(K2Error, match=f"found {bad}; expected 0 to 705") as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text, at", [("\ud800", 0), ("ab\udfff", 2), ("\ude00\ud83d", 0)])
def test_a_lone_surrogate_is_refused(text, at):
    for allow_special in (False, True):
        with pytest.raises(K2Error, match=f"character {at} is a lone surrogate"):
            small_tokenizer().encode(text, allow_special)


def test_a_special_id_outside_the_reserved_256_is_refused():
    for wrong in (449, 706):
        with pytest.raises(K2Error, match=f"id {wrong}; expected 450 to 705"):
            Tokenizer(list(small_ranks()), {wrong: "<|im_end|>"})


def test_a_token_that_is_no_union_of_lower_ranks_is_refused():
    with pytest.raises(K2Error, match="not the union"):
        Tokenizer([*(bytes([b]) for b in range(256)), b"xyz"], {})


# ---- files ----


def write_files(directory, ranks):
    """tiktoken.model and tokenizer_config.json for these ranks."""
    for name, content in tokenizer_files(ranks).items():
        (directory / name).write_text(content)


def test_written_files_give_the_same_tokenizer(tmp_path):
    write_files(tmp_path, list(small_ranks()))
    found, expected = Tokenizer.from_directory(tmp_path), small_tokenizer()
    assert found.bytes_of == expected.bytes_of and found.special == expected.special
    assert found.encode(TEXTS[2]) == expected.encode(TEXTS[2])


def line(token: bytes, rank: int) -> str:
    """One line of tiktoken.model."""
    return f"{base64.b64encode(token).decode()} {rank}\n"


@pytest.mark.parametrize(
    "content, complaint",
    [
        ("".join(line(bytes([b]), b) for b in range(255)), "every single byte"),
        ("".join(line(bytes([b]), b) for b in range(256)) + line(b"a", 256), "no token twice"),
        ("".join(line(bytes([b]), b) for b in range(256)) + line(b"ab", 257), "line 257 .*expected base64 and rank 256"),
        ("".join(line(bytes([b]), b) for b in range(256)) + "??? 256\n", "line 257"),
        ("".join(line(bytes([b]), b) for b in range(256)) + "YWI=\n", "line 257"),
        ("".join(line(bytes([b]), b) for b in range(256)) + "YWI= 256 x\n", "line 257"),
    ],
)
def test_a_damaged_rank_file_is_refused_by_line(tmp_path, content, complaint):
    write_files(tmp_path, list(small_ranks()))
    (tmp_path / "tiktoken.model").write_text(content)
    with pytest.raises(K2Error, match=complaint) as raised:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["tiktoken.model", "tokenizer_config.json"])
def test_a_missing_file_is_refused_by_name(tmp_path, name):
    write_files(tmp_path, list(small_ranks()))
    (tmp_path / name).unlink()
    with pytest.raises(K2Error, match=name.replace(".", r"\.")):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ['{"added_tokens_decoder": []}', "{}", '{"added_tokens_decoder": {"450": "x"}}', '{"added_tokens_decoder": {"x": {"content": "y"}}}'])
def test_a_damaged_tokenizer_config_is_refused(tmp_path, content):
    write_files(tmp_path, list(small_ranks()))
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(K2Error, match="added_tokens_decoder"):
        Tokenizer.from_directory(tmp_path)


def test_training_twice_gives_the_same_ranks_each_a_union_of_lower_ones():
    ranks = list(small_ranks())
    assert train_ranks(TEXTS, 450) == ranks
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    assert sorted(ranks[:256]) == [bytes([b]) for b in range(256)] and len(rank_of) == 450
    for token in ranks[256:]:
        a, b = merge_of(token, rank_of)
        assert a + b == token and max(rank_of[a], rank_of[b]) < rank_of[token], f"{token!r} = {a!r} + {b!r}"


# ---- K2's pattern ----


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("世界hello", ["世界", "hello"]),  # a Han run stands alone
        ("hello世界", ["hello", "世界"]),
        ("世界世世世界世界——I'm", ["世界世世世界世界", "——", "I'm"]),
        ("々〇世", ["々〇世"]),  # the iteration mark and the zero are Han by script
        ("ひらがな漢字カタカナ", ["ひらがな", "漢字", "カタカナ"]),
        (" 世界", [" ", "世界"]),  # and takes no leading space, as a word does
        ("1234567", ["123", "456", "7"]),
        ("a1 234", ["a", "1", " ", "234"]),
        ("CAN'T wait 'til", ["CAN'T", " wait", " '", "til"]),
        ("they'll I'M we've", ["they'll", " I'M", " we've"]),
        ("CamelCase HTTPServer", ["Camel", "Case", " HTTPServer"]),
        ("foo  bar", ["foo", " ", " bar"]),  # the last space goes to the word
        ("x\n    y", ["x", "\n", "   ", " y"]),  # a newline is not glued to the indentation after it
        ("x  \n\n    y", ["x", "  \n\n", "   ", " y"]),  # but to the spaces before it
        ("):\n\n    return", ["):\n\n", "   ", " return"]),  # and newlines to the punctuation before them
        ("a/b", ["a", "/b"]),  # no slash in the punctuation's tail, unlike o200k
        ("x/\n", ["x", "/\n"]),
        ("end   ", ["end", "   "]),
        (".method", [".method"]),  # one mark may lead a word
        ("..method", ["..", "method"]),  # but not the last of two
        ("e\u0301te\u0301", ["e\u0301te\u0301"]),  # marks belong to their word
    ],
)
def test_the_pattern_cuts_as_known(text, pieces):
    assert split(text) == pieces


def test_the_pattern_loses_no_character():
    rng = random.Random(5)
    for _ in range(1000):
        text = random_text(rng)
        assert "".join(split(text)) == text and all(split(text)), repr(text)


# ---- merges ----


@pytest.mark.parametrize(
    "ranks, token, parts",
    [
        ([b"a", b"b", b"ab"], b"ab", (b"a", b"b")),
        ([b"a", b"b", b"c", b"ab", b"bc", b"abc"], b"abc", (b"ab", b"c")),  # the lower rank joins first
        ([b"a", b"b", b"c", b"bc", b"ab", b"abc"], b"abc", (b"a", b"bc")),
        ([b"a", b"b", b"c", b"d", b"bc", b"abc", b"cd", b"abcd"], b"abcd", (b"abc", b"d")),
        ([b"a", b"b", b"c", b"d", b"ab", b"cd", b"bc", b"abcd"], b"abcd", (b"ab", b"cd")),
        ([b"a", b"aa", b"aaa", b"aaaa"], b"aaaa", (b"aa", b"aa")),  # equal ranks: from the left
        ([b"a", b"aa", b"aaa"], b"aaa", (b"aa", b"a")),
    ],
)
def test_a_token_is_the_union_of_what_lower_ranks_leave(ranks, token, parts):
    assert merge_of(token, {t: rank for rank, t in enumerate(ranks)}) == parts


def test_a_higher_rank_never_helps_to_make_a_lower_one():
    with pytest.raises(K2Error, match="not the union"):
        merge_of(b"abc", {b"a": 0, b"b": 1, b"c": 2, b"abc": 3, b"ab": 4})


# ---- huge inputs ----


def slow_cut(text: str) -> list[str]:
    """K2's rule character by character: a run of one kind, space or not, is cut when it would pass the limit."""
    pieces, start, run = [], 0, 0
    for n, character in enumerate(text):
        same = n > 0 and text[n - 1].isspace() == character.isspace()
        run = run + 1 if same else 1
        if run > LONGEST_RUN:
            pieces.append(text[start:n])
            start, run = n, 1
    return [*pieces, text[start:]]


@pytest.mark.parametrize(
    "text",
    [
        "a" * LONGEST_RUN,
        "a" * (LONGEST_RUN + 1),
        "a" * (3 * LONGEST_RUN + 7),
        " " * (2 * LONGEST_RUN) + "\n",
        "b " + "a" * LONGEST_RUN + "\u3000" * (LONGEST_RUN + 1) + "c",
        "\x1c" * (LONGEST_RUN + 1) + "\u200b" * (LONGEST_RUN + 1),  # a space to Python, and none
        ("a" * (LONGEST_RUN - 1) + " ") * 2,  # must not be read once from each of its characters
    ],
    ids=["at", "over", "thrice", "spaces", "both", "odd", "under"],
)
def test_runs_are_cut_at_25000(text):
    found = cut_long_runs(text)
    assert list(map(len, found)) == list(map(len, slow_cut(text))) and "".join(found) == text


def test_tokens_never_cross_the_cuts_of_huge_texts():
    tokenizer = small_tokenizer()
    text = (TEXTS[0] + TEXTS[2]) * (LONGEST_TEXT // len(TEXTS[0] + TEXTS[2]) + 1)
    assert len(text) > LONGEST_TEXT
    assert tokenizer.encode(text) == tokenizer.encode(text[:LONGEST_TEXT]) + tokenizer.encode(text[LONGEST_TEXT:])
    run = "    " * LONGEST_RUN
    cut = [i for start in range(0, len(run), LONGEST_RUN) for i in tokenizer.encode(run[start : start + LONGEST_RUN])]
    assert tokenizer.encode(run) == cut and tokenizer.decode(cut) == run


def test_a_cut_inside_a_learnt_word_is_a_token_boundary():
    tokenizer = small_tokenizer()
    text = " " * (LONGEST_TEXT - 3) + " width"
    assert tokenizer.encode(" width") == [tokenizer.bytes_of.index(b" width")]
    assert tokenizer.encode(text)[-2:] != tokenizer.encode(" width") and tokenizer.decode(tokenizer.encode(text)) == text


def test_utf8_decoding_is_pythons_own():
    # random bytes, valid or not, through the ids of single bytes
    tokenizer, rng = small_tokenizer(), random.Random(6)
    id_of = {token: i for i, token in enumerate(small_ranks())}
    for _ in range(500):
        raw = rng.randbytes(rng.randint(1, 12))
        stream = tokenizer.stream()
        pushed = "".join(stream.push(id_of[bytes([b])]) for b in raw) + stream.finish()
        assert pushed == tokenizer.decode([id_of[bytes([b])] for b in raw]) == codecs.decode(raw, "utf-8", "replace"), raw
