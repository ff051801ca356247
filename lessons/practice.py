"""Exercises. One file each in lessons/exercises, NN_stem.py: the docstring is the task, and below it stand

    stub(...)        what the reader completes; as it is, it fails the check
    check(answer)    asserts that a function does what the task asks; its messages help
    HINT             a word of help, without the answer
    solution(...)    passes the check
    WRONG            {what went wrong: (a plausible wrong answer, words that the check's message must have)}

Readers edit a copy in lessons/work, in which the stub is called `answer`.
"""

import inspect
import re
from pathlib import Path

from .checker import HERE, module_from

EXERCISES, WORK = HERE / "exercises", HERE / "work"


def exercises() -> list[Path]:
    """All exercises in reading order."""
    return sorted(EXERCISES.glob("[0-9][0-9]_*.py"))


def find(number: str) -> Path:
    """The exercise of a lesson's number, "7" or "07"; LookupError names what there is."""
    wanted = number.zfill(2)
    found = next((path for path in exercises() if path.stem[:2] == wanted), None)
    if found is None:
        raise LookupError(f"no exercise {wanted}; there are {', '.join(path.stem[:2] for path in exercises())}")
    return found


def task(path: Path) -> str:
    """What the reader's copy begins as: the task, the imports, and the stub under the name `answer`."""
    text = path.read_text(encoding="utf-8")
    above = text[: text.index("def stub(")]
    return above.rstrip() + "\n\n\n" + re.sub(r"\bstub\b", "answer", inspect.getsource(module_from(path).stub), count=1)


def copy_of(path: Path) -> Path:
    """The reader's copy, made if it is not there."""
    copy = WORK / path.name
    if not copy.exists():
        WORK.mkdir(exist_ok=True)
        copy.write_text(task(path), encoding="utf-8")
    return copy


def verdict(path: Path, answer) -> str:
    """What the exercise's check says of an answer: "" where it passes. Never raises for what an answer does."""
    try:
        module_from(path).check(answer)
    except NotImplementedError:
        return "nothing is filled in yet: complete the function `answer`"
    except AssertionError as error:
        return str(error) or "an assertion failed without a word"
    except Exception as error:  # an answer may raise anything
        return f"your function raised {type(error).__name__}: {error}"
    return ""


def verdict_of_copy(path: Path) -> str:
    """The same for the reader's copy."""
    try:
        answer = module_from(copy_of(path)).answer
    except Exception as error:  # a file in the middle of being written
        return f"{copy_of(path).name} cannot be read: {type(error).__name__}: {error}"
    return verdict(path, answer)


def solution(path: Path) -> str:
    """The solution's text."""
    return inspect.getsource(module_from(path).solution)


def status() -> list[str]:
    """One line an exercise: not begun, not yet, or right."""
    lines = []
    for path in exercises():
        begun = (WORK / path.name).exists()
        said = ("right" if not verdict_of_copy(path) else "not yet") if begun else "not begun"
        lines.append(f"{path.stem[:2]}  {said:9}  {path.stem[3:].replace('_', ' ')}")
    return lines
