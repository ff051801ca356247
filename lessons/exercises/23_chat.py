"""The id of a tool call.

Complete `answer(text, declared)`: read an id as a model writes it, and return (name, number), or None where it names no call.

    functions.NAME:N      N is digits; the NAME may have hyphens, dots, and colons in it
    NAME:N                the same; models leave the prefix out
    blanks around it      do not count
    another prefix        tools.NAME:N: if the whole is not in `declared`, but what stands behind its last dot is, that is the name
    anything else         None: no number, no name, digits of another script
"""


def stub(text, declared):
    """(name, number) of an id such as "functions.get-weather:3", or None; declared is a set of names."""
    raise NotImplementedError


def check(answer):
    declared = {"add", "get-weather", "fs.read_file"}
    for text, expected, why in (
        ("functions.add:0", ("add", 0), "the ordinary form"),
        ("functions.get-weather:12", ("get-weather", 12), "a name may have a hyphen"),
        ("functions.fs.read_file:1", ("fs.read_file", 1), "a name may have a dot, so it does not end at one"),
        ("add:3", ("add", 3), "the prefix may be missing"),
        (" \nfunctions.add:3 ", ("add", 3), "blanks around it do not count"),
        ("functions.a:b:2", ("a:b", 2), "the number stands behind the last colon"),
        ("tools.add:4", ("add", 4), "another prefix, and the last part is declared"),
        ("functions.rm:0", ("rm", 0), "an undeclared name is read as it stands; somebody else will complain"),
        ("functions.x.0", None, "without a colon there is no number"),
        ("functions.add:", None, "no number"),
        (":3", None, "no name"),
        ("functions.:3", None, "no name"),
        ("functions.add:٣", None, "digits of another script are none"),
        ("call_abc", None, "a foreign id"),
    ):
        found = answer(text, declared)
        assert found == expected, f"{text!r}: found {found!r}, expected {expected!r}: {why}"


HINT = """Strip, then text.rpartition(":"). The number must be ascii and digits. Then removeprefix("functions."), and only if
that is not declared look at what stands behind its last dot."""


def solution(text, declared):
    head, _, number = text.strip().rpartition(":")
    name = head.removeprefix("functions.")
    if not name or not (number.isascii() and number.isdigit()):
        return None
    last = name.rpartition(".")[2]
    return (last if name not in declared and last in declared else name), int(number)


def official_sample(text, declared):
    import re

    found = re.fullmatch(r"functions\.([\w\.]+):(\d+)", text)
    return (found[1], int(found[2])) if found else None


def second_part(text, declared):
    head, _, number = text.strip().rpartition(":")
    name = head.split(".")[1] if "." in head else head
    return (name, int(number)) if name and number.isascii() and number.isdigit() else None


def first_colon(text, declared):
    head, _, number = text.strip().partition(":")
    name = head.removeprefix("functions.")
    return (name, int(number)) if name and number.isascii() and number.isdigit() else None


def any_digits(text, declared):
    head, _, number = text.strip().rpartition(":")
    name = head.removeprefix("functions.")
    last = name.rpartition(".")[2]
    return ((last if name not in declared and last in declared else name), int(number)) if name and number.isdigit() else None


WRONG = {
    "Moonshot's sample code": (official_sample, "a name may have a hyphen"),
    "the part behind the first dot": (second_part, "it does not end at one"),
    "the first colon": (first_colon, "behind the last colon"),
    "any digits": (any_digits, "another script"),
}
