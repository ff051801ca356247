"""The bug hunt can be solved, by the method that its lesson teaches, and nothing in the open says how."""

import pytest
import torch

from lessons import checker, hunt, lab
from lessons.__main__ import main

NUMBERS = list(hunt.CASES)


def one_by_one(suspect, ids):
    """A call for `recorded`: token by token behind a cache of the suspect's own."""

    def call(model):
        cache = suspect.new_cache()
        for part in ids.split(1):
            model(part, cache)

    return call


def at_once(suspect, ids):
    """All tokens in one call."""
    return lambda model: model(ids)


def culprits(suspect, way, tokens: int) -> list[str]:
    """The modules whose inputs are right and whose outputs are not, in the order in which the clean ones finish."""
    clean, ids = hunt.Clean(), lab.ids(lab.PROSE)[:tokens]
    right, found = hunt.recorded(clean.model, way(clean, ids)), hunt.recorded(suspect.model, way(suspect, ids))
    return [n for n in right if n in found and hunt.difference(found[n][0], right[n][0]) < 1e-6 and hunt.difference(found[n][1], right[n][1]) > 1e-4]


@pytest.mark.parametrize("number", NUMBERS)
def test_the_method_of_the_lesson_finds_the_place_and_one_cause_is_right(number):
    suspect = hunt.Suspect(number)
    found = culprits(suspect, at_once, 12) or culprits(suspect, one_by_one, 4)
    said = [hunt.judged(number, found[0], cause) for cause in hunt.CAUSES]
    assert sum(word.startswith("right") for word in said) == 1, said
    assert sum("is the place, but" in word for word in said) == len(hunt.CAUSES) - 1
    other = hunt.judged(number, "lm_head", "dropped")
    assert other.startswith("not yet") and "is the place" not in other


def test_the_three_differ_in_kind():
    first_token, behind_a_cache, whole_text = ([bool(culprits(hunt.Suspect(n), way, tokens)) for n in NUMBERS] for way, tokens in ((at_once, 1), (one_by_one, 3), (at_once, 12)))
    assert whole_text == [True, False, True] and behind_a_cache == [True, True, True] and first_token[0]
    with torch.inference_mode():
        logits = [hunt.Suspect(n).model(lab.ids("x")) for n in NUMBERS]
    clean = hunt.Clean().model(lab.ids("x"))
    assert [not torch.allclose(found, clean) for found in logits] == [True, False, False], "only the first may show in a first token's logits"


def test_every_hunt_is_a_mistake_that_a_test_of_this_project_notices():
    assert all(facts["mistake"] in hunt.mistakes() for facts in hunt.CASES.values())
    assert len({facts["mistake"] for facts in hunt.CASES.values()}) == len(NUMBERS) == 3


def test_the_lesson_and_its_code_name_none_of_the_mistakes():
    text = checker.read_text(checker.HERE / "22_hunt.md") + checker.read_text(checker.HERE / "hunt.py") + checker.read_text(checker.HERE / "exercises" / "22_hunt.py")
    for facts in hunt.CASES.values():
        assert hunt.mistakes()[facts["mistake"]].name not in text


def test_a_suspect_leaves_the_clean_program_as_it_was():
    before = lab.mini()(lab.ids("import os"))
    hunt.Suspect("1")
    assert torch.equal(lab.mini()(lab.ids("import os")), before)
    assert torch.equal(hunt.Suspect("1").model(lab.ids("import os")), hunt.Suspect("1").model(lab.ids("import os")))


def test_the_command_line_judges_and_says_what_it_does_not_know(capsys):
    assert main(["hunt", "1", "lm_head", "dropped"]) == 1
    assert "not the first place" in capsys.readouterr().out
    for arguments, words in ((["hunt", "4"], "no hunt 4; there are 1, 2, 3"), (["hunt", "1", "lm_head", "broken"], "no cause 'broken'"), (["hunt", "1", "head", "dropped"], "no module 'head'")):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1


def test_the_symptoms_are_printed_for_three_ways_of_reading(capsys, monkeypatch):
    monkeypatch.setattr(hunt.bits, "__defaults__", (None, "def read(path):\n    return"))
    assert main(["hunt", "1"]) == 0
    said = capsys.readouterr().out
    assert said.count("suspect") == 3 and "the first token alone" in said and "off by" in said and "swapped" in said
    assert main(["hunt", "2"]) == 0
    assert "its logits are right" in capsys.readouterr().out
