"""python -m lessons COMMAND: the exercises, and the upkeep of the lessons.

    status         which exercises are done
    check 07       judge lessons/work/07_*.py; the first call puts it there
    hint 07        a word of help, the same each time
    solution 07    the answer
    hunt 1         what is known of the first broken model; with a module and a cause, judge them
    exam           judge lessons/work/exam.txt, the sheet of lessons/exam.md; the first call puts it there
    table          write the tables of the two maps again
    agree [07]     record that a page, or each, was read beside its Chinese (07, exam, exercises, map, README)
    draw [NAME]    draw the figures again
    verify [07]    check a lesson, or all, as the tests do
    build [DIR]    the lessons as pages (runs/site), code beside them
    serve [PORT]   build, and show them on 127.0.0.1
"""

import sys

from . import checker, practice


def main(arguments: list[str]) -> int:
    """Run one command; 0, or 1 where an answer or a lesson is wrong, or 2 for a command that does not exist."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in COMMANDS:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        return COMMANDS[command](*rest) or 0
    except UnicodeDecodeError as error:
        print(f"error: a page is not UTF-8 text: {error}. Mend or fetch it again.", file=sys.stderr)
        return 2
    except LookupError as error:  # it names what there is
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}. Fetch the file again, or see that it can be read and written.", file=sys.stderr)
        return 2
    except TypeError as error:
        print(f"error: {error}\n\n{__doc__.strip()}", file=sys.stderr)
        return 2


def run_status():
    """One line an exercise."""
    print("\n".join(practice.status()))


def run_check(number: str) -> int:
    """Judge the reader's copy."""
    path = practice.find(number)
    copy = practice.copy_of(path)
    said = practice.verdict_of_copy(path)
    print(f"{copy.relative_to(checker.ROOT)}: {f'not yet: {said}' if said else 'right'}")
    return int(bool(said))


def run_hint(number: str):
    """A word of help."""
    print(practice.module_from(practice.find(number)).HINT)


def run_solution(number: str):
    """The answer."""
    print(practice.solution(practice.find(number)), end="")


def run_hunt(number: str, module: str = "", cause: str = "") -> int:
    """What is known of a broken model, or what is said of an answer."""
    from . import hunt

    if not module:
        hunt.case(number)
        print(hunt.symptoms(number))
        print("\nAnswer: python -m lessons hunt %s MODULE CAUSE. Causes:" % number)
        print("\n".join(f"  {name:10} {what}" for name, what in hunt.CAUSES.items()))
        return 0
    said = hunt.judged(number, module, cause)
    print(said)
    return int(not said.startswith("right"))


def run_exam():
    """Judge the reader's sheet."""
    from . import exam_answers

    print("\n".join(exam_answers.sheet(exam_answers.SHEET)))


def run_table():
    """Write the tables again."""
    for path, text in [(path, checker.with_table(path)) for path in checker.MAPS]:
        path.write_text(text, encoding="utf-8")


def run_agree(name: str = ""):
    """Record that both languages say the same."""
    from . import translation

    translation.agree(name)


def run_draw(name: str = ""):
    """Draw one figure or all again."""
    from .figures import draw

    for script in sorted((checker.HERE / "figures").glob("[a-z]*.py")):
        if script.stem == name or not name:
            draw(checker.figure_script(script.stem), script.with_suffix(".png"))
            print(script.with_suffix(".png").relative_to(checker.ROOT))


def run_verify(number: str = "") -> int:
    """What the tests check, for one lesson or all."""
    chosen = [path for path in checker.lessons() if not number or path.stem[:2] == number.zfill(2)]
    problems = [p for path in chosen for p in checker.check(path)] + ([] if number else checker.map_problems())
    print("\n".join(problems) or f"{len(chosen)} lessons hold")
    return int(bool(problems))


def run_build(out: str = "") -> int:
    """Write the pages."""
    from pathlib import Path

    from . import site

    folder = Path(out) if out else site.OUT
    try:
        pages = site.build(folder)
    except ImportError as error:
        print(f"error: {error.name}: expected it to be installed, found none. Run: pip install -r lessons/requirements-build.txt", file=sys.stderr)
        return 2
    except site.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename or folder}: {error.strerror}. Choose another folder, or fetch a missing page again.", file=sys.stderr)
        return 2
    print(f"{len(pages)} pages; open {folder / 'index.html'}")
    return 0


def run_serve(port: str = "8000") -> int:
    """Build, then show."""
    from . import site

    if not port.isdigit() or int(port) > 65535:
        raise LookupError(f"serve: expected a port from 0 to 65535, found {port!r}")
    if status := run_build():
        return status
    try:
        site.serve(port=int(port))
    except KeyboardInterrupt:
        print()
    except OSError as error:
        print(f"error: port {port}: {error.strerror}. Name another: python -m lessons serve 8001", file=sys.stderr)
        return 2
    return 0


COMMANDS = {"status": run_status, "check": run_check, "hint": run_hint, "solution": run_solution, "hunt": run_hunt, "exam": run_exam, "table": run_table, "agree": run_agree, "draw": run_draw, "verify": run_verify, "build": run_build, "serve": run_serve}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
