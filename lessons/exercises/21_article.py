"""A judge of claims.

Complete `answer(what, said, c)`: True where a claim about a model holds, False where it is wrong, for

    what    "total", "active", "vocabulary", "context", "experts" or "chosen"
    said    what a text says of it: "1T", "1.03T", "32B", "160K", "384"; a number, then perhaps K, M, B or T
    c       the model's K2Config

A claim holds if the true number, in the claim's unit and rounded to as many decimals as the claim has, is the claim's
number. M, B and T are a million, 10^9 and 10^12; K may be 1,000 or 1,024, whichever makes the claim hold. "active" are
the weights that one token meets, without the embedding's table. lessons/counts.py has total(c), active(c), which counts
that table, and table(c).
"""

from lessons import counts


def stub(what, said, c):
    """True or False"""
    raise NotImplementedError


CLAIMS = (
    # (what, said, which model, does it hold, what to say to a wrong answer)
    ("experts", "384", "kimi-k2-instruct", True, "384 experts is what the config says: n_routed_experts"),
    ("chosen", "8", "kimi-k2-instruct", True, "eight chosen experts is what the config says: num_experts_per_tok"),
    ("chosen", "9", "kimi-k2-instruct", False, "the shared expert is not chosen: 9 is wrong"),
    ("context", "128K", "kimi-k2-instruct", True, "131,072 is 128 times 1,024: K may be 1,024"),
    ("context", "131K", "kimi-k2-instruct", True, "131,072 is 131 thousand, rounded: K may be 1,000"),
    ("context", "128K", "kimi-k2-instruct-0905", False, "the release of September reads twice as much: use the config that you are given"),
    ("vocabulary", "16K", "kimi-k2-instruct", False, "163,840 rows are ten times 16K"),
    ("vocabulary", "160K", "kimi-k2-instruct", True, "163,840 is 160 times 1,024"),
    ("vocabulary", "164K", "kimi-k2-instruct", True, "163,840 is 164 thousand when it is rounded; it must not be cut"),
    ("total", "1T", "kimi-k2-instruct", True, "1,026 billion is 1 trillion, rounded to no decimals"),
    ("total", "1.03T", "kimi-k2-instruct", True, "1,026 billion is 1.03 trillion, rounded to the claim's two decimals"),
    ("total", "1.04T", "kimi-k2-instruct", False, "the files hold 1.03 trillion: a claim of two decimals is judged with two"),
    ("active", "32B", "kimi-k2-instruct", True, "without the embedding's table 31.7 billion weights are active: counts.active counts the table"),
    ("active", "33B", "kimi-k2-instruct", False, "33 billion are active only with the embedding's table, of which a token reads one row"),
    ("total", "16B", "moonlight-16b-a3b-instruct", True, "Moonlight has 16 billion weights: use the config that you are given"),
    ("total", "14M", "mini", True, "K2-mini has 14 million weights"),
)


def check(answer):
    for what, said, name, holds, words in CLAIMS:
        found = answer(what, said, counts.config(name))
        assert isinstance(found, bool), f"expected True or False for {(what, said)}, found {found!r}"
        assert found == holds, f"{what} {said!r} of {name}: {words}"


HINT = """number = said.rstrip("KMBT"); decimals = len(number.partition(".")[2]). The units to try are (1,) for no letter,
(1000, 1024) for K, and one for each other letter. round(value / unit, decimals) == float(number)."""


def value(what, c):
    return {
        "total": counts.total(c), "active": counts.active(c) - counts.table(c), "vocabulary": c.vocab_size,
        "context": c.max_position_embeddings, "experts": c.n_routed_experts, "chosen": c.num_experts_per_tok,
    }[what]  # fmt: skip


UNITS = {"K": (1000, 1024), "M": (10**6,), "B": (10**9,), "T": (10**12,)}


def judged(number, units, true):
    decimals = len(number.partition(".")[2])
    return any(round(true / unit, decimals) == float(number) for unit in units)


def solution(what, said, c):
    return judged(said.rstrip("KMBT"), UNITS.get(said[-1], (1,)), value(what, c))


def only_thousands(what, said, c):
    return judged(said.rstrip("KMBT"), UNITS.get(said[-1], (1,))[:1], value(what, c))


def only_1024(what, said, c):
    return judged(said.rstrip("KMBT"), UNITS.get(said[-1], (1,))[-1:], value(what, c))


def cut_off(what, said, c):
    number = said.rstrip("KMBT")
    return any(int(value(what, c) / unit) == int(float(number)) for unit in UNITS.get(said[-1], (1,)))


def with_the_table(what, said, c):
    return judged(said.rstrip("KMBT"), UNITS.get(said[-1], (1,)), counts.active(c) if what == "active" else value(what, c))


def within_a_tenth(what, said, c):
    number = float(said.rstrip("KMBT"))
    return any(abs(value(what, c) / unit / number - 1) < 0.1 for unit in UNITS.get(said[-1], (1,)))


WRONG = {
    "K is always 1,000": (only_thousands, "K may be 1,024"),
    "K is always 1,024": (only_1024, "K may be 1,000"),
    "cut off in place of rounded": (cut_off, "must not be cut"),
    "the embedding's table counted as active": (with_the_table, "counts.active counts the table"),
    "within a tenth": (within_a_tenth, "a claim of two decimals"),
}
