"""Byte-pair encoding of one piece.

Complete `answer(piece, rank_of)`: cut `piece` (bytes) into tokens as K2 does, and return them as a list of bytes.

    1. start from single bytes
    2. of all neighbouring pairs whose union is a key of rank_of, join the one with the lowest rank (the leftmost, if it
       stands there twice)
    3. again, until no neighbouring pair's union is in rank_of
"""


def stub(piece, rank_of):
    """A list of bytes that join up to `piece`; rank_of maps bytes to their rank."""
    raise NotImplementedError


def check(answer):
    from pathlib import Path

    from k2.tokenizer import read_ranks
    from lessons import lab
    from lessons.checker import ROOT

    toy = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"bc", b"ab", b"abc", b"abcab"])}
    found = answer(b"abc", toy)
    assert b"".join(found) == b"abc", f"the tokens of b'abc' must join up to it; found {found}"
    assert found == [b"abc"], f"b'abc': found {found}, expected [b'abc']: after b+c, the pair a+bc is in the list too. Go on until nothing joins"
    found = answer(b"abcab", toy)
    assert found == [b"abcab"] or found != [b"abc", b"a", b"b"], "b'abcab': a+b at the end was never joined; look at all pairs again after each join"
    assert found == [b"abcab"], f"b'abcab': found {found}, expected [b'abcab']"
    toy = {token: rank for rank, token in enumerate([b"a", b"b", b"c", b"d", b"bc", b"ab", b"abd", b"cd"])}
    found = answer(b"abcd", toy)
    assert found == [b"a", b"bc", b"d"], f"b'abcd' with ranks a b c d bc ab abd cd: found {found}, expected [b'a', b'bc', b'd']: the lowest rank joins first, even where a longer token begins earlier"
    ranks = {token: rank for rank, token in enumerate(read_ranks(Path(ROOT / "k2" / "mini" / "tiktoken.model")))}
    for word in (" return", " lighthouse", "HTTPServer", " unbelievably", "世界"):
        expected = [lab.tokenizer().token_bytes(i) for i in lab.tokenizer().encode(word)]
        found = answer(word.encode(), ranks)
        assert found == expected, f"{word!r} with K2-mini's ranks: found {found}, expected {expected}"


HINT = """Keep a list of parts, at first single bytes: [piece[i:i+1] for i in range(len(piece))]. In a loop, make a list of
(rank, i) for every neighbouring pair that is in rank_of; stop if it is empty; otherwise min() of it is the pair to join."""


def solution(piece, rank_of):
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(rank_of[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank_of]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def leftmost_first(piece, rank_of):
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        i = next((i for i in range(len(parts) - 1) if parts[i] + parts[i + 1] in rank_of), None)
        if i is None:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def one_join(piece, rank_of):
    parts = [piece[i : i + 1] for i in range(len(piece))]
    pairs = [(rank_of[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in rank_of]
    if pairs:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def longest_first(piece, rank_of):
    parts = []
    while piece:
        length = next(n for n in range(len(piece), 0, -1) if piece[:n] in rank_of)
        parts.append(piece[:length])
        piece = piece[length:]
    return parts


def whole_piece_or_bytes(piece, rank_of):
    return [piece] if piece in rank_of else [piece[i : i + 1] for i in range(len(piece))]


WRONG = {
    "joins from left to right": (leftmost_first, "lowest rank joins first"),
    "one join only": (one_join, "until nothing joins"),
    "the longest token first": (longest_first, "lowest rank joins first"),
    "never joins inside a piece": (whole_piece_or_bytes, "lowest rank joins first"),
}
