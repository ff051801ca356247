"""Pack texts into windows.

Complete `answer(texts, encode, end, length)`: a list of windows, each a list of length + 1 ids, for

    texts     a list of strings
    encode    a function from a text to a list of ids
    end       the id that closes a text
    length    how many predictions a window has

A text that is empty or only white space is left out, and so is a copy of one before. The others stand one behind the other
in their order, each closed by `end`. Window n begins at id n * length, so that its last id is the next one's first: that id
is predicted in one window and read in the next. What is left at the end and does not fill a window is dropped.
"""


def stub(texts, encode, end, length):
    """A list of lists of ids."""
    raise NotImplementedError


TEXTS = ["import os\n", "", "x = 1\n", "import os\n", "  \n", "def f(x):\n    return x\n"]
END = 0


def encode(text):
    """Bytes, from 1 to 255."""
    return list(text.encode())


def check(answer):
    length = 7
    found = answer(list(TEXTS), encode, END, length)
    assert isinstance(found, list) and found, "expected a list of windows, not an empty one"
    assert all(len(window) == length + 1 for window in found), f"every window has length + 1 = {length + 1} ids: the targets are the inputs moved by one; found lengths {sorted({len(w) for w in found})}"
    row = found[0] + [i for window in found[1:] for i in window[1:]]
    assert all(a[-1] == b[0] for a, b in zip(found, found[1:])), "a window's last id must be the next one's first: as it is, that id is read nowhere, or the next one's first is never predicted"
    ended = row.count(END)
    assert ended, "no text is closed by `end`: the model could not tell where one stops"
    right = []
    for text in dict.fromkeys(t for t in TEXTS if t.strip()):
        right += encode(text) + [END]
    copies = bytes(i for i in row if i != END).decode().count("import os")
    assert copies == 1, f"a text that stands {TEXTS.count('import os' + chr(10))} times in the list is read {copies} times: a copy is left out"
    assert bytes(row).count(b"\0\0") == 0 and b"\0  \n\0" not in bytes(row), "a text that is empty or only white space is left out, and nothing is padded"
    assert row == right[: len(row)], f"the ids are not those of the texts one behind the other: {row} should begin {right[: len(row)]}"
    assert len(found) == (len(right) - 1) // length, f"found {len(found)} windows, expected {(len(right) - 1) // length}: the last may begin only where length + 1 ids are left"
    short = answer(["ab"], encode, END, length)
    assert short == [], f"a text shorter than a window makes no window, found {short}"


HINT = """kept = dict.fromkeys(t for t in texts if t.strip()) has each text once, in order. Join encode(t) + [end] into one row; the
windows are row[n : n + length + 1] for n in range(0, len(row) - length, length)."""


def row_of(texts, encode, end):
    return [i for text in dict.fromkeys(t for t in texts if t.strip()) for i in encode(text) + end]


def solution(texts, encode, end, length):
    row = row_of(texts, encode, [end])
    return [row[n : n + length + 1] for n in range(0, len(row) - length, length)]


def copies_kept(texts, encode, end, length):
    row = [i for text in texts if text.strip() for i in encode(text) + [end]]
    return [row[n : n + length + 1] for n in range(0, len(row) - length, length)]


def not_closed(texts, encode, end, length):
    row = row_of(texts, encode, [])
    return [row[n : n + length + 1] for n in range(0, len(row) - length, length)]


def side_by_side(texts, encode, end, length):
    row = row_of(texts, encode, [end])
    return [row[n : n + length + 1] for n in range(0, len(row) - length, length + 1)]


def padded(texts, encode, end, length):
    row = row_of(texts, encode, [end])
    row += [end] * (-(len(row) - 1) % length)
    return [row[n : n + length + 1] for n in range(0, len(row) - length, length)]


def without_targets(texts, encode, end, length):
    row = row_of(texts, encode, [end])
    return [row[n : n + length] for n in range(0, len(row) - length + 1, length)]


WRONG = {
    "copies kept": (copies_kept, "a copy is left out"),
    "texts not closed": (not_closed, "closed by `end`"),
    "windows side by side": (side_by_side, "the next one's first"),
    "the last window padded": (padded, "nothing is padded"),
    "no room for the last target": (without_targets, "the targets are the inputs moved by one"),
}
