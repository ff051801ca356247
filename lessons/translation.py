"""The lessons in Chinese stay the lessons: what may be compared is compared, and the rest is signed.

Fences, checks, sources and headings of a Chinese page equal those of the English one. Sentences cannot be compared by a
program, so `lessons/zh/agreed.txt` keeps, for each pair, a hash of both texts as they stood when somebody last read them
side by side: a change to either turns the tests red until `python -m lessons agree NN` says that this was done again.
"""

import hashlib
import re
from pathlib import Path

from . import practice
from .checker import CHECK, HERE, ROOT, lessons, name_problems, number_problems, read_text, split_lesson

ZH = HERE / "zh"
AGREED = ZH / "agreed.txt"
SOURCE = re.compile(r"source: [^)）]*")
HAN = re.compile(r"[\u4e00-\u9fff]")
NAMED = {ROOT / "README.md": ZH / "README.md", HERE / "README.md": ZH / "map.md", practice.EXERCISES: ZH / "exercises.md"}


def chinese_of(path: Path) -> Path:
    """Where the Chinese of an English page belongs."""
    return NAMED.get(path, ZH / path.name)


def english_of(path: Path) -> Path:
    """Which English page a Chinese one translates."""
    return next((english for english, chinese in NAMED.items() if chinese == path), HERE / path.name)


def pages() -> list[Path]:
    """Every English page that is also there in Chinese: the README, the map, the lessons and the exam. The exercises have
    one Chinese page, of what they ask and hint."""
    return [ROOT / "README.md", HERE / "README.md", *lessons(), HERE / "exam.md"]


def alone() -> list[Path]:
    """Chinese pages without an English one of their own: the glossary, and the exercises."""
    return [ZH / "glossary.md", ZH / "exercises.md"]


def pairs() -> list[Path]:
    """Everything that is there in both languages."""
    return [*pages(), practice.EXERCISES]


def problems(english: Path) -> list[str]:
    """Where a page's Chinese differs from it in what a program can compare. [] where nothing does."""
    chinese = chinese_of(english)
    if not chinese.is_file():
        return [f"{chinese.relative_to(ROOT)}: no such file"]
    if english == practice.EXERCISES:
        return [problem for path in practice.exercises() for problem in exercise_problems(path)]
    blocks, prose = split_lesson(read_text(chinese))
    said = [f"line {line}: {what}" for line, what in name_problems(prose, chinese, read_text)]
    if english in lessons():
        said += [f"line {line}: {what}" for line, what in number_problems(blocks, prose)]
    expected = comparable(english)
    for what, found in comparable(chinese).items():
        if found != expected[what]:
            said.append(f"expected {what} as in {english.relative_to(ROOT)}, found {difference(found, expected[what])}")
    said += [f"line {n}: no Chinese in {line[:60]!r}" for n, line in enumerate(prose, 1) if untranslated(line)]
    return [f"{chinese.relative_to(ROOT)}: {what}" for what in said]


def comparable(path: Path) -> dict[str, list]:
    """What a page has that does not depend on its language."""
    blocks, prose = split_lesson(read_text(path))
    text = "\n".join(prose)
    return {
        "fences": [(b.info, b.text) for b in blocks],
        "checks": CHECK.findall(text),
        "sources": SOURCE.findall(" ".join(prose)),
        "levels of headings": re.findall(r"^#+(?= )", text, re.MULTILINE),
        "rows of tables": re.findall(r"^\|", text, re.MULTILINE),
        "pictures": re.findall(r"!\[", text),
        "questions": re.findall(r"^(?:\d+\.|\*\*\d+\.\*\*)(?= )", text, re.MULTILINE),
    }


def exercise(path: Path) -> tuple[str, str] | None:
    """(task, hint) of an exercise in Chinese, None where one is missing: `## NN title` and a ```text fence; under `## 提示`, at
    the end where nobody reads it by accident, a paragraph that begins with **NN**."""
    number, (tasks, _, hints) = path.stem[:2], read_text(chinese_of(practice.EXERCISES)).partition("\n## 提示\n")
    task = re.search(rf"^## {number} .*\n\n```text\n((?:.*\n)*?)```$", tasks, re.MULTILINE)
    hint = re.search(rf"^\*\*{number}\*\* ((?:.+\n?)+)", hints, re.MULTILINE)
    return (task[1].strip(), hint[1].strip()) if task and hint else None


def exercise_problems(path: Path) -> list[str]:
    """An exercise's Chinese is there, and calls the same function with the same arguments."""
    found, name = exercise(path), f"lessons/zh/exercises.md: {path.stem[:2]}"
    if not found:
        return [f"{name}: expected a heading `## {path.stem[:2]} ...` with a ```text block, and a paragraph under `## 提示` that begins with **{path.stem[:2]}**"]
    called = re.search(r"`?answer\([^)]*\)", practice.module_from(path).__doc__)
    said = [] if called is None or called[0] in found[0] else [f"{name}: expected {called[0]} in the task, found none"]
    return said + [f"{name}: no Chinese in {what!r}" for what in found if not HAN.search(what)]


def difference(found: list, expected: list) -> str:
    """The first thing in which two lists differ."""
    at = next((n for n, (a, b) in enumerate(zip(found, expected)) if a != b), min(len(found), len(expected)))
    return f"{found[at : at + 1] or 'the end'} for {expected[at : at + 1] or 'the end'} at number {at + 1}"


def untranslated(line: str) -> bool:
    """Whether a line of prose has sentences, and not one Chinese character."""
    words = re.sub(r"<!--.*?-->|`[^`]*`|\([^()]*\)|\[[^\]]*\]", "", line)
    return not line.startswith("|") and len(re.findall(r"[A-Za-z]{3,}", words)) > 4 and not HAN.search(line)


# ---- what was read side by side ----


def signature(english: Path) -> str:
    """A hash of a page's two texts without their fences, which are compared anyway."""
    if english == practice.EXERCISES:
        modules = [practice.module_from(path) for path in practice.exercises()]
        both = ["\n".join(f"{m.__doc__}\n{m.HINT}" for m in modules), read_text(chinese_of(english))]
    else:
        both = ["\n".join(split_lesson(without_table(read_text(path)))[1]) for path in (english, chinese_of(english))]
    return hashlib.sha256("\0".join(both).encode()).hexdigest()[:16]


def without_table(text: str) -> str:
    """A page without the table that a program makes."""
    return re.sub(r"(?s)(<!-- table: ).*?(<!-- end of table -->)", r"\1\2", text)


def name_of(english: Path) -> str:
    """A page's name in AGREED and for `agree`: 07, exam, map or README."""
    if english in NAMED:
        return NAMED[english].stem
    return english.stem[:2] if english in lessons() else english.stem


def agreed() -> dict[str, str]:
    """The signatures on record."""
    lines = [line.split() for line in read_text(AGREED).splitlines()] if AGREED.exists() else []
    if any(len(line) != 2 for line in lines):
        raise LookupError(f"{AGREED}: expected lines of a name and a hash, found another. Put it back: git checkout lessons/zh/agreed.txt")
    return dict(lines)


def agree(name: str = ""):
    """Record that one page, or each, was read in both languages side by side."""
    chosen = [path for path in pairs() if name in ("", name_of(path))]
    if not chosen:
        raise LookupError(f"agree: expected one of {' '.join(map(name_of, pairs()))}, found {name!r}")
    record = agreed() | {name_of(path): signature(path) for path in chosen}
    AGREED.write_text("".join(f"{key} {value}\n" for key, value in sorted(record.items())), encoding="utf-8")


def left_behind() -> list[str]:
    """The pages of which one language was changed since somebody read both."""
    record = agreed()
    return [
        f"{path.relative_to(ROOT)} and {chinese_of(path).relative_to(ROOT)}: one was changed since both were read side by side. Bring the other along, then: python -m lessons agree {name_of(path)}"
        for path in pairs()
        if record.get(name_of(path)) != signature(path)
    ]
