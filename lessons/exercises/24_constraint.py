r"""Close a document that was cut.

Complete `answer(text)`: text is the beginning of a JSON document, cut somewhere between two characters. Return the shortest
text that closes what is open: the string if one is, then every bracket and brace, innermost first.

    [1, {"a": "x        gives    "}]
    {"a]": [            gives    ]}         a bracket inside a string opens and closes nothing
    ["say \            gives    \"]        behind a lone backslash something must follow before the string can end

Do not repair anything else: no missing values, no commas.
"""


def stub(text):
    """What closes `text`."""
    raise NotImplementedError


def check(answer):
    import json

    for text, expected, why in (
        ("", "", "nothing is open"),
        ("[", "]", "one bracket"),
        ('{"a": [1, {"b": [2', "]}]}", "innermost first"),
        ('[1, {"a": "x', '"}]', "the string first"),
        ('{"a]}": [', "]}", "brackets inside a string do not count"),
        (r'["say \"', '"]', "an escaped quotation mark does not end a string"),
        (r'["c:\\"', "]", "a backslash that is itself escaped escapes nothing"),
        ('["say ' + "\\", None, "a lone backslash needs one character more"),
        ('[[1], {"x": {}}, "', '"]', "what was closed is closed"),
    ):
        found = answer(text)
        if expected is None:
            assert isinstance(found, str) and len(found) == 3 and isinstance(json.loads(text + found), list), f"{text!r}: found {found!r}: {why}"
        else:
            assert found == expected, f"{text!r}: found {found!r}, expected {expected!r}: {why}"


HINT = """Keep a list of closers, and whether a string is open, and whether the last character was a backslash that escapes.
At the end: for a lone backslash another backslash, then the quotation mark, then the closers from last to first."""


def solution(text):
    closers, in_string, escaped = [], False, False
    for c in text:
        if in_string:
            if escaped:
                escaped = False
            elif c == "\\":
                escaped = True
            elif c == '"':
                in_string = False
        elif c == '"':
            in_string = True
        elif c in "[{":
            closers.append("]" if c == "[" else "}")
        elif c in "]}":
            closers.pop()
    return ("\\" if escaped else "") + ('"' if in_string else "") + "".join(reversed(closers))


def counts_brackets(text):
    return "]" * (text.count("[") - text.count("]")) + "}" * (text.count("{") - text.count("}"))


def blind_to_strings(text):
    closers = []
    for c in text:
        if c in "[{":
            closers.append("]" if c == "[" else "}")
        elif c in "]}" and closers:
            closers.pop()
    return ('"' if text.count('"') % 2 else "") + "".join(reversed(closers))


def blind_to_escapes(text):
    closers, in_string = [], False
    for c in text:
        if c == '"':
            in_string = not in_string
        elif not in_string and c in "[{":
            closers.append("]" if c == "[" else "}")
        elif not in_string and c in "]}":
            closers.pop()
    return ('"' if in_string else "") + "".join(reversed(closers))


def looks_one_back(text):
    closers, in_string = [], False
    for n, c in enumerate(text):
        if c == '"' and text[n - 1 : n] != "\\":
            in_string = not in_string
        elif not in_string and c in "[{":
            closers.append("]" if c == "[" else "}")
        elif not in_string and c in "]}":
            closers.pop()
    return ('"' if in_string else "") + "".join(reversed(closers))


WRONG = {
    "brackets counted": (counts_brackets, "innermost first"),
    "brackets inside strings": (blind_to_strings, "inside a string do not count"),
    "escapes not seen": (blind_to_escapes, "does not end a string"),
    "only one character looked back": (looks_one_back, "itself escaped"),
}
