"""The exam can be passed: every question has one answer, that code computes where it can, and a place that exists."""

import math
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
    assert {n: right[n] for n in (1, 4, 11, 14, 25, 27, 28, 31, 34, 37)} == {
        1: "1,026.4", 4: "60", 11: "35.6", 14: "117", 25: "139,583", 27: "280", 28: "-2.5", 31: "70,272", 34: "2", 37: "0.25",
    }  # fmt: skip


def test_the_numbers_that_no_lesson_prints_are_right_by_hand():
    right = {n: a.right() for n, a in exam_answers.ANSWERS.items() if not isinstance(a.right, str)}
    hand = {
        2: (1026408232448 - 60 * 128 * (44040192 + 7169)) / 1e9, 3: (31687095808 + 60 * 8 * 44040192) / 1e9,
        8: math.ceil(64 * math.log(8192 / (2 * math.pi)) / (2 * math.log(50000))), 9: (0.1 * math.log(64) + 1) ** 2 / 192**0.5, 10: 2048 / 576,
        18: 60 * 384 * 7169 / 1e6, 21: 2.827 / 8, 30: 3.5 / (480 / 5 * (44040192 + 4 * 2688) / 1e9),
    }  # fmt: skip
    assert {n: right[n] for n in hand} == pytest.approx(hand, rel=1e-6)
    T = right[13]  # the formulas solved for T, a head's operations over 2, 4,096 tokens: 512 * 256 * S + 320 S T = 2 * 128 * 512 T + 1088 S T
    assert T == math.ceil(512 * 256 * 4096 / (2 * 128 * 512 + (1088 - 320) * 4096))
    assert right[35] == 7 and 1e-4 * 3.4445**6 < 0.5 < 1e-4 * 3.4445**7


@pytest.mark.parametrize(("number", "said"), [
    (1, "1026.4 billion"), (1, "1,026,408,232,448"), (1, "1.0264 trillion"), (1, "about 1026.41"), (11, "35.6x"), (11, "35.6 times"), (14, "117 times"), (14, "117 ×"), (37, "1/4"), (37, ".25"),
    (4, "sixty"), (4, "60 layers"), (31, "70 272"), (31, "70,272 bytes"), (31, "70.272 KB"), (26, "index"), (26, "`model.safetensors.index.json`"), (28, "-2.5"), (29, "86 GB"), (5, "(D)"), (5, "（d）"), (5, "d）这些字符的 token"), (4, "60 层"), (1, "1.0264 万亿"), (1, "10264.1 亿"), (1, "约 1,026.4 十亿"), (11, "35.6 倍"), (31, "70,272 字节"), (37, "0.25。"), (5, "选 D"), (5, "D、"), (28, "−2.5"), (11, "第 35.6 倍"), (25, "13.9583 万个张量"), (5, "d) the tokens"),
    (18, "165 million"), (18, "165,173,760"), (9, "0.14469"), (39, "147 456 ids"),
])  # fmt: skip
def test_a_right_answer_in_a_natural_form_is_right(number, said):
    assert exam_answers.ANSWERS[number].accepts(said), exam_answers.ANSWERS[number].text()


@pytest.mark.parametrize(("number", "said"), [(37, "10²"), (1, "①"), (4, "some"), (4, "60 or 61"), (4, "not 60"), (4, "6,1"), (4, "60 61"), (37, "sqrt(1/16)"), (5, "the tokens"), (5, "a control token"), (4, "sixty seventy")])
def test_what_cannot_be_read_is_said_to_be_so_and_sends_nobody_to_a_lesson(number, said):
    line, total = exam_answers.judged(f"{number}: {said}\n")
    assert "cannot be read" in line and "lessons/" not in line and total == "0 of 40 right, 0 not yet, 39 open, 1 not readable"


@pytest.mark.parametrize(("number", "said"), [(1, "1026.4 million"), (1, "1026"), (4, "60 thousand"), (11, "35"), (37, "4/1"), (4, "sixty-one"), (26, "index.html"), (26, "index.json")])
def test_a_wrong_answer_with_a_unit_is_wrong(number, said):
    assert "not yet" in exam_answers.judged(f"{number}: {said}\n")[0]


def test_the_letters_are_as_frequent_in_no_pattern_and_length_does_not_betray_them():
    letters, longest = {}, 0
    for number, answer in exam_answers.ANSWERS.items():
        options = re.findall(r"\(([a-d])\) (.*?)(?= \([b-d]\)|\s*$)", question(number))
        if options:
            letters[number] = answer.right
            assert [letter for letter, _ in options] == list("abcd")
            lengths = sorted((len(text) for _, text in options), reverse=True)
            longest += len(dict(options)[answer.right]) == lengths[0] > lengths[1] + 2
    order = "".join(letters.values())
    assert {letter: order.count(letter) for letter in "abcd"} == {"a": 4, "b": 3, "c": 3, "d": 4}
    assert not re.search(r"(.)\1", order) and not re.search(r"(..+)\1", order) and longest <= len(order) / 4, (order, longest)


def test_the_facts_that_questions_state_hold_and_names_exist():
    checks = checker.CHECK.findall(PAGE)
    assert len(checks) == 9 and not any(checker.check_problem(expression)[0] for expression in checks)
    assert not checker.name_problems(PAGE.split("\n"), checker.HERE / "exam.md", checker.read_text)


def test_a_sheet_is_made_and_judged(tmp_path, monkeypatch, capsys):
    path = tmp_path / "work" / "exam.txt"
    assert exam_answers.sheet(path) == ["0 of 40 right, 0 not yet, 40 open"]
    assert path.read_text().startswith("1: \n2: \n")
    path.write_text("".join(f"{n}: {a.text()}\n" for n, a in exam_answers.ANSWERS.items()))
    assert exam_answers.sheet(path) == ["40 of 40 right, 0 not yet, 0 open"]
    path.write_text("4: 61\n5: (D)\n7:\n18: 165\n99: 1\n")
    assert exam_answers.sheet(path) == ["4: not yet (61). Read lessons/01_config.md", "2 of 40 right, 1 not yet, 37 open"]
    monkeypatch.setattr(exam_answers, "SHEET", path)
    assert main(["exam"]) == 0
    assert "2 of 40 right" in capsys.readouterr().out
