"""The lessons hold: what they quote, run, count, link and draw is what the program is and does; and the checker can say no."""

import json
import math
import re

import pytest

from k2.checkpoint import expected_tensors
from lessons import checker, counts, practice
from lessons.checker import Block
from lessons.figures import drawn_from
from lessons.translation import chinese_of

LESSONS = checker.lessons()
QUOTES = [(path, block) for path in LESSONS for block in checker.split_lesson(checker.read_text(path))[0] if checker.kind(block) == "quote"]
FIGURES = sorted((checker.HERE / "figures").glob("[a-z]*.py"))


# ---- the lessons ----


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_the_lesson_holds(path):
    problems = checker.check(path)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("path", [*LESSONS, *map(chinese_of, LESSONS)], ids=lambda path: f"{path.parent.stem}-{path.stem}")
def test_each_question_is_named_where_it_is_answered(path):
    """`question 2`, `questions 1 to 3`, 问题 2, 问题 1 到 3, behind the section that asks."""
    asked, _, rest = re.split(r"^## (?:Predict|先猜一猜)$", checker.read_text(path), maxsplit=1, flags=re.MULTILINE)[1].partition("\n## ")
    numbers = {int(n) for n in re.findall(r"^(\d)\. ", asked, re.MULTILINE)}
    named = re.findall(r"(?:[Qq]uestions?|问题) (\d)(?: (?:to|and|到|和) (\d))?", rest)
    missing = numbers - {n for first, last in named for n in range(int(first), int(last or first) + 1)}
    assert numbers and not missing, f"{path.name}: questions {sorted(missing)} are answered nowhere by number"


def test_the_maps_table_and_links_are_todays():
    problems = checker.map_problems()
    assert not problems, "\n".join(problems)


def test_every_public_symbol_of_the_model_path_is_quoted_in_some_lesson():
    assert not checker.unquoted()


@pytest.mark.parametrize(("path", "block"), QUOTES, ids=lambda value: value.stem if hasattr(value, "stem") else value.info.split("::")[1])
def test_a_change_in_a_quoted_symbol_turns_the_lesson_red(path, block):
    file, symbol = block.info.removeprefix("python ").split("::")
    shown = [line for line in block.text.split("\n") if line.strip() and line.strip() != "# ..."]
    source = checker.symbol_source(checker.read_text(checker.ROOT / file), symbol)
    indent = re.search(rf"^( *){re.escape(shown[0])}$", checker.read_text(checker.ROOT / file), re.MULTILINE)[1]

    def drifted(other):
        text = checker.read_text(other)
        if other != checker.ROOT / file:
            return text
        original = "\n".join(indent + line if line else line for line in source.split("\n"))
        assert text.count(original) == 1
        return text.replace(original, original.replace(indent + shown[-1], indent + shown[-1] + "  # drifted"))

    assert checker.quote_problems(block, checker.read_text) == []
    assert "# drifted" in "\n".join(problem for _, problem in checker.quote_problems(block, drifted))


# ---- the exercises ----


@pytest.mark.parametrize("path", practice.exercises(), ids=lambda path: path.stem)
class TestExercise:
    def test_it_belongs_to_a_lesson_and_has_all_its_parts(self, path):
        module = checker.module_from(path)
        assert (checker.HERE / f"{path.stem}.md").is_file()
        assert len(module.__doc__) > 150 and len(module.HINT) > 40 and len(module.WRONG) >= 3

    def test_the_stub_fails_as_unfinished_and_so_does_a_fresh_copy(self, path, tmp_path, monkeypatch):
        assert "nothing is filled in yet" in practice.verdict(path, checker.module_from(path).stub)
        monkeypatch.setattr(practice, "WORK", tmp_path / "work")
        assert "nothing is filled in yet" in practice.verdict_of_copy(path)

    def test_the_solution_passes(self, path):
        assert practice.verdict(path, checker.module_from(path).solution) == ""

    def test_plausible_wrong_answers_fail_with_a_message_that_helps(self, path):
        for name, (answer, words) in checker.module_from(path).WRONG.items():
            said = practice.verdict(path, answer)
            assert said, f"{name}: passes"
            assert words in said and "raised" not in said, f"{name}: the message is {said!r}, without {words!r}"


def test_the_readers_copy_has_the_task_and_neither_hint_nor_solution(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "WORK", tmp_path)
    for path in practice.exercises():
        text = practice.copy_of(path).read_text(encoding="utf-8")
        assert "def answer(" in text and "solution" not in text and "HINT" not in text and "WRONG" not in text


def test_a_copy_that_the_reader_has_edited_is_kept_and_judged(tmp_path, monkeypatch):
    monkeypatch.setattr(practice, "WORK", tmp_path)
    path = practice.exercises()[0]
    practice.copy_of(path).write_text("def answer(*everything):\n    return 1 / 0\n")
    assert "ZeroDivisionError" in practice.verdict_of_copy(path) and "not yet" in practice.status()[0]
    practice.copy_of(path).write_text("def answer(:")
    assert "cannot be read" in practice.verdict_of_copy(path)


@pytest.mark.parametrize("name", ["kimi-k2-instruct", "mini", "moonlight-16b-a3b-instruct"])
def test_the_weights_that_lessons_count_are_those_of_the_checkpoints_tensors(name):
    c = counts.config(name)
    assert counts.total(c) == sum(math.prod(s.shape) for tensor, s in expected_tensors(c).items() if not tensor.endswith("weight_scale_inv"))


# ---- the figures ----


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_the_script_draws_a_picture_that_carries_its_data(path, tmp_path):
    from PIL import Image

    script = checker.figure_script(path.stem)
    data = json.loads(json.dumps(script.data()))
    script.draw(data, tmp_path / "x.png")
    assert drawn_from(tmp_path / "x.png") == data
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width >= 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 20
    assert any(f"figures/{path.stem}.png" in checker.read_text(lesson) for lesson in LESSONS), "no lesson shows it"


def test_a_picture_of_other_data_is_noticed():
    assert checker.differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.001]}, "x") == []
    assert "today 2.1" in checker.differences({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}, "x")[0]
    assert checker.differences({"a": "one"}, {"a": "two"}, "x") and checker.differences({"a": 1}, {"b": 1}, "x") and checker.differences([1], [1, 2], "x")
    assert "no script" in checker.drawing_problems("no_such_figure")[0]


# ---- the checker itself ----

EXPERT = """class Expert(nn.Module):
    # ...
    def forward(self, x_MD):
        return self.down_proj(F.silu(self.gate_proj(x_MD)) * self.up_proj(x_MD))"""


@pytest.mark.parametrize(("info", "text", "said"), [
    ("python k2/expert.py::Expert", EXPERT, ""),
    ("python k2/expert.py::Expert", EXPERT.replace("silu", "gelu"), "where the lesson has"),
    ("python k2/expert.py::Expert", EXPERT.replace("    # ...\n", ""), "where the lesson has"),
    ("python k2/expert.py::Expert", "class Expert(nn.Module):", "goes on with"),
    ("python k2/expert.py::Expert", "class Expert(nn.Module):\n    # ...", ""),
    ("python k2/expert.py::Export", EXPERT, "has no Export"),
    ("python k2/export.py::Expert", EXPERT, "no such file"),
    ("python k2/expert.py::Expert.forward", "\n".join(line[4:] for line in EXPERT.split("\n")[2:]), ""),
    ("python k2/expert.py::Expert.forward", "\n".join(line[4:] for line in EXPERT.split("\n")[2:]) + "\nmore", "where the lesson has"),
])  # fmt: skip
def test_a_quote_must_be_the_symbol(info, text, said):
    found = "\n".join(problem for _, problem in checker.quote_problems(Block(info, 1, text), checker.read_text))
    assert (said in found) if said else not found


def test_a_run_block_shares_its_names_with_later_ones_and_a_wrong_output_is_shown():
    right = [Block("python run", 1, ">>> a = 2"), Block("python run", 5, ">>> a + 1\n3")]
    assert checker.run_problems(right, "x") == []
    assert "Expected" in checker.run_problems([*right, Block("python run", 9, ">>> a\n3")], "x")[0][1]
    assert "ZeroDivisionError" in checker.run_problems([Block("python run", 1, ">>> 1 / 0\n1")], "x")[0][1]
    assert "without a >>>" in checker.run_problems([Block("python run", 1, "a = 2")], "x")[0][1]


def test_a_terminal_block_runs_again():
    assert checker.console_problems(Block("console run", 1, "$ python -c 'print(1, 2)'\n1 ...")) == []
    assert "prints\n1 2" in checker.console_problems(Block("console run", 1, "$ python -c 'print(1, 2)'\n1 3"))[0][1]
    assert "No such file" in checker.console_problems(Block("console run", 1, "$ no-such-program"))[0][1]
    assert "without a $" in checker.console_problems(Block("console run", 1, "1 2"))[0][1]


def numbers(*prose, blocks=()):
    return "\n".join(problem for _, problem in checker.number_problems(list(blocks), list(prose)))


def test_a_number_is_checked_and_stands_in_its_paragraph():
    assert numbers("K2 has 61 layers. <!-- check: cfg.num_hidden_layers == 61 -->") == ""
    assert numbers("K2 has eight. <!-- check: cfg.num_experts_per_tok == 8 -->") == ""
    assert "is 61" in numbers("K2 has 62 layers. <!-- check: cfg.num_hidden_layers == 62 -->")
    assert "61 is not in the paragraph" in numbers("K2 has 610 layers. <!-- check: cfg.num_hidden_layers == 61 -->")
    assert "61 is not in the paragraph" in numbers("61", "", "layers <!-- check: cfg.num_hidden_layers == 61 -->")
    assert "expected EXPR == NUMBER" in numbers("61 <!-- check: cfg.num_hidden_layers > 60 -->")
    assert "NameError" in numbers("61 <!-- check: layers == 61 -->")
    assert numbers("20,480 and 576 <!-- check: full_cache_numbers(cfg) == 20480 and cache_numbers(cfg) == 576 -->") == ""


def test_a_long_number_must_not_stand_alone():
    assert "20480 stands alone" in numbers("20,480 numbers")
    assert "0.13 stands alone" in numbers("about 0.13 of it")
    assert numbers("20,480 numbers (source: report, section 2.3)") == ""
    assert numbers("20,480 numbers", blocks=[Block("python run", 1, ">>> n\n20480")]) == ""
    assert "20480" in numbers("20,480 numbers", blocks=[Block("text", 1, "20480")])


def test_names_and_links_must_exist():
    def said(line):
        return "\n".join(p for _, p in checker.name_problems([line], checker.HERE / "x.md", checker.read_text))

    assert said("`k2/expert.py::Expert.forward`, `tests/test_expert.py`, [map](README.md) and [out](https://example.org)") == ""
    assert "has no Expert.backward" in said("`k2/expert.py::Expert.backward`")
    assert "has no test_nothing" in said("`tests/test_expert.py::test_nothing`")
    assert "no such file" in said("`k2/experts.py`") and "no such file" in said("[x](nowhere.md)")
    assert "no such heading" in said("[x](README.md#no-heading-of-this-name)")


def test_a_lesson_must_have_its_parts_in_order(tmp_path):
    parts = "# A question?\n## Predict\n## Run\n## Look inside\n## What goes wrong\n## Exercise\n## Measured\n"
    path = tmp_path / "99_x.md"
    path.write_text(parts.replace("## Run\n", "") + "```python\nx = 1\n```\n")
    said = "\n".join(checker.check(path))
    assert "begins with 'run'" in said and "no exercise" in said and "no such kind of block" in said
    path.write_text(parts.replace("## Predict\n## Run\n", "## Run\n## Predict\n"))
    assert "begins with 'run'" in "\n".join(checker.check(path))


def test_an_alt_text_must_say_something():
    assert "says too little" in checker.figure_problems(["![a figure](x.png)"], checker.HERE / "x.md")[0][1]


def test_a_number_in_an_alt_text_is_one_of_the_pictures_data():
    picture = checker.HERE / "figures" / "parameters.png"
    assert checker.alt_problems("All weights, 1,026.4 billion", picture) == []
    assert "1,026.5" in checker.alt_problems("All weights, 1,026.5 billion", picture)[0]
