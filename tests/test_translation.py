"""The Chinese pages say what the English ones say, as far as a program can tell, and a change to either is noticed."""

import re

import pytest

from lessons import checker, practice, translation
from lessons.__main__ import main


@pytest.mark.parametrize("english", translation.pairs(), ids=translation.name_of)
def test_the_chinese_page_is_there_and_equal_in_all_that_can_be_compared(english):
    problems = translation.problems(english)
    assert not problems, "\n".join(problems)


def test_neither_language_was_left_behind():
    problems = translation.left_behind()
    assert not problems, "\n".join(problems)


def test_there_is_nothing_in_chinese_that_has_no_english():
    known = {translation.chinese_of(path) for path in translation.pairs()} | set(translation.alone())
    assert set(translation.ZH.glob("*.md")) == known


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Lesson 8 and its Chinese in a folder of their own, where they may be changed."""
    english, chinese = checker.HERE / "08_expert.md", translation.ZH / "08_expert.md"
    pair = {}
    for path, folder in ((english, tmp_path), (chinese, tmp_path / "zh")):
        folder.mkdir(exist_ok=True)
        pair[path] = folder / path.name
        pair[path].write_text(checker.read_text(path), encoding="utf-8")
    read = checker.read_text
    monkeypatch.setattr(translation, "read_text", lambda path: read(pair.get(path, path)))
    return english, pair[english], pair[chinese]


@pytest.mark.parametrize(("which", "old", "new", "said"), [
    ("zh", ">>> bits(right)", ">>> bits(wrong)", "fences"),
    ("zh", "== 99.2 -->", "== 99.3 -->", "checks"),
    ("zh", "## 练习\n", "练习\n", "headings"),
    ("zh", "(source: report, Table 2)", "(source: report)", "sources"),
    ("zh", "\n4. ", "\n5. ", "questions"),
    ("zh", "99.2%", "98.2%", "not in the paragraph"),
    ("zh", "tests/test_expert.py", "tests/test_experts.py", "no such file"),
    ("zh", "## 练习\n", "## 练习\n\nThis was left in English by somebody who meant to come back.\n", "no Chinese"),
    ("en", "## Exercise\n", "## Exercise\n\nSee `k2/moe.py`. (source: report)\n", "sources"),
])  # fmt: skip
def test_a_page_that_differs_is_named(copied, which, old, new, said):
    english, *files = copied
    assert translation.problems(english) == []
    path = files[which == "zh"]
    text = path.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert said in "\n".join(translation.problems(english))


@pytest.mark.parametrize(("which", "old", "new"), [("en", "Ruined?", "Spoilt?"), ("zh", "。", "！")])
def test_a_sentence_changed_in_one_language_is_noticed_until_both_were_read_again(copied, tmp_path, monkeypatch, which, old, new):
    english, *files = copied
    monkeypatch.setattr(translation, "AGREED", tmp_path / "agreed.txt")
    assert main(["agree"]) == 0 and translation.left_behind() == []
    path = files[which == "zh"]
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    assert len(translation.left_behind()) == 1 and "agree 08" in translation.left_behind()[0] and translation.problems(english) == []
    assert main(["agree", "08"]) == 0 and translation.left_behind() == []


def test_a_name_that_is_no_page_is_refused(capfd):
    assert main(["agree", "99"]) == 2 and "expected one of README map 01" in capfd.readouterr().err


@pytest.mark.parametrize("change", [lambda t: t.replace("## 07 ", "## 7 "), lambda t: t.replace("\n## 提示\n", "\n## Hints\n"), lambda t: t.replace("**07** ", "**7** "), lambda t: t.replace("answer(", "reply(")])
def test_an_exercise_without_its_chinese_is_named(monkeypatch, change):
    whole = checker.read_text(translation.ZH / "exercises.md")
    assert translation.problems(practice.EXERCISES) == []
    monkeypatch.setattr(translation, "read_text", lambda path: change(whole) if path.name == "exercises.md" else checker.read_text(path))
    assert translation.problems(practice.EXERCISES)


ROW = re.compile(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \| \[(\d\d)\]\((\d\d_\w+\.md)\) \|$", re.MULTILINE)


def test_the_glossary_has_each_term_once_and_the_lesson_that_it_names_uses_it():
    rows = ROW.findall(checker.read_text(translation.ZH / "glossary.md"))
    assert len(rows) > 80 and len({english for english, *_ in rows}) == len(rows)
    for english, chinese, number, file in rows:
        assert file.startswith(number), english
        text = checker.read_text(translation.ZH / file)
        assert any(term in text for term in chinese.split("、")), f"{file} does not use {chinese} ({english})"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The Chinese pages in a folder of their own, where they may be broken."""
    import shutil

    copy = shutil.copytree(checker.HERE, tmp_path / "lessons", ignore=shutil.ignore_patterns("work", "figures", "__pycache__"))
    english = {path: copy / path.relative_to(checker.HERE) for path in checker.HERE.rglob("*.md")}
    monkeypatch.setattr(checker, "HERE", copy)
    monkeypatch.setattr(checker, "ROOT", tmp_path)
    monkeypatch.setattr(checker, "MAPS", {english[path]: head for path, head in checker.MAPS.items()})
    monkeypatch.setattr(translation, "AGREED", copy / "zh" / "agreed.txt")
    return copy


@pytest.mark.parametrize(("file", "change", "said"), [
    ("zh/map.md", lambda text: text.replace(checker.END, ""), "once each, found 1 and 0"),
    ("README.md", lambda text: text.replace(checker.BEGIN, ""), "once each, found 0 and 1"),
    ("zh/07_kv_cache.md", lambda text: text.replace("# ", "", 1), "expected a line `# title`"),
    ("zh/07_kv_cache.md", lambda text: None, "No such file"),
    ("zh/07_kv_cache.md", lambda text: b"\xff\xfe", "not UTF-8"),
])  # fmt: skip
def test_a_table_that_cannot_be_made_changes_no_map(folder, capfd, file, change, said):
    path, maps = folder / file, [folder / "README.md", folder / "zh" / "map.md"]
    text = change(path.read_text(encoding="utf-8"))
    path.unlink() if text is None else path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text, encoding="utf-8")
    before = [each.read_bytes() for each in maps]
    assert main(["table"]) == 2
    error = capfd.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert [each.read_bytes() for each in maps] == before


def test_a_broken_record_is_one_line_and_is_kept(folder, capfd):
    translation.AGREED.write_text("one two three\n")
    assert main(["agree", "08"]) == 2 and "expected lines of a name and a hash" in capfd.readouterr().err
    assert translation.AGREED.read_text() == "one two three\n"
