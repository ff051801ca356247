"""The exam can be passed: every question has one answer, that code computes where it can, and a place that exists."""

import re

import pytest

from lessons import checker, exam_answers
from lessons.__main__ import main

PAGE = checker.read_text(checker.HERE / "exam.md")


def question(number: int) -> str:
    """The text of one question."""
    return re.search(rf"^\*\*{number}\.\*\*(.*?)(?=^\*\*|^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)[1]


def test_there_are_forty_questions_in_order_and_an_answer_to_each():
    assert exam_answers.questions() == list(range(1, 41)) == list(exam_answers.ANSWERS)


@pytest.mark.parametrize("number", list(exam_answers.ANSWERS))
def test_the_answer_is_accepted_its_place_exists_and_it_is_computed_where_it_is_a_number(number):
    answer = exam_answers.ANSWERS[number]
    assert exam_answers.place_exists(answer.place), answer.place
    assert answer.accepts(answer.text()) and not answer.accepts("") and not answer.accepts("z")
    letters = re.findall(r"\(([a-d])\)", question(number))
    if letters:
        assert answer.right in letters and letters == sorted(set(letters))
        assert not any(answer.accepts(letter) for letter in letters if letter != answer.right)
    elif isinstance(answer.right, str):
        assert number == 26, "a number must be computed"
    else:
        assert not answer.accepts(str(answer.right() * 1.3 + 1)), "any number would do"


def test_the_numbers_are_those_that_other_tests_and_the_lessons_know():
    right = {n: a.text() for n, a in exam_answers.ANSWERS.items() if not isinstance(a.right, str)}
    assert {n: right[n] for n in (1, 3, 4, 8, 9, 10, 18, 25, 27, 28, 31, 34, 35, 37)} == {
        1: "1,026.4", 3: "31.7", 4: "60", 8: "20", 9: "0.1309", 10: "576", 18: "44,040,192", 25: "139,583", 27: "280", 28: "-2.5",
        31: "70,272", 34: "2", 35: "485", 37: "0.25",
    }  # fmt: skip


def test_the_facts_that_questions_state_hold_and_names_exist():
    checks = checker.CHECK.findall(PAGE)
    assert len(checks) == 4 and not any(checker.check_problem(expression)[0] for expression in checks)
    assert not checker.name_problems(PAGE.split("\n"), checker.HERE / "exam.md", checker.read_text)


def test_a_sheet_is_made_and_judged(tmp_path, monkeypatch, capsys):
    path = tmp_path / "work" / "exam.txt"
    assert exam_answers.sheet(path) == ["0 of 40 right, 0 not yet, 40 open"]
    assert path.read_text().startswith("1: \n2: \n")
    path.write_text("".join(f"{n}: {a.text()}\n" for n, a in exam_answers.ANSWERS.items()))
    assert exam_answers.sheet(path) == ["40 of 40 right, 0 not yet, 0 open"]
    path.write_text("4: 61\n5: (B)\n7:\n18: 44040192\n99: 1\n")
    assert exam_answers.sheet(path) == ["4: not yet (61). Read k2/decoder.py::DecoderLayer", "2 of 40 right, 1 not yet, 37 open"]
    monkeypatch.setattr(exam_answers, "SHEET", path)
    assert main(["exam"]) == 0
    assert "2 of 40 right" in capsys.readouterr().out
