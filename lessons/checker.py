"""Keeps the lessons true. What a lesson quotes, runs, counts, links and draws is compared with the program, line by line.

    ```python k2/router.py::Router.forward   equals that symbol's source, dedented; a line `# ...` stands for lines left out
    ```python run                            doctest lines, one namespace a lesson
    ```console run                           each `$` line runs again; `...` stands for what may differ
    ```text                                  a drawing; nothing in it is checked
    <!-- check: EXPR == NUMBER -->           the number is right, and stands in this paragraph
    a number of four digits, or with a point in the prose must be in such a check, in a block, or beside a `(source: ...)`
    ![alt](figures/NAME.png)                 drawn by figures/NAME.py, from the data that the script computes today

Every function here returns a list of problems, "lesson:line: what is wrong", empty where all is well.
"""

import ast
import contextlib
import doctest
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "lessons"
SECONDS = 20  # the longest a terminal block may take

# The files whose every public function and method some lesson must show.
MODEL_PATH = "quantization norm rope embedding kv_cache attention router expert moe decoder model sampling generation".split()


def lessons() -> list[Path]:
    """All lessons in reading order."""
    return sorted(HERE.glob("[0-9][0-9]_*.md"))


def read_text(path: Path) -> str:
    """A file's text. The checks take another reader where a test wants to show them changed code."""
    return path.read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fence: what stands behind its three backticks, the line of its first content, and the content."""

    info: str
    line: int
    text: str


def split_lesson(text: str) -> tuple[list[Block], list[str]]:
    """(fences, the lines outside of them with fences blanked, so that line numbers stay)."""
    blocks, prose, inside, start = [], [], None, 0
    for number, line in enumerate(text.split("\n"), 1):
        if line.startswith("```") and inside is None:
            inside, start, info = [], number + 1, line[3:].strip()
            prose.append("")
        elif line.startswith("```"):
            blocks.append(Block(info, start, "\n".join(inside)))
            inside = None
            prose.append("")
        elif inside is not None:
            inside.append(line)
            prose.append("")
        else:
            prose.append(line)
    if inside is not None:
        blocks.append(Block("unclosed", start, "\n".join(inside)))
    return blocks, prose


def check(path: Path, read=read_text) -> list[str]:
    """All that is wrong with one lesson."""
    blocks, prose = split_lesson(read_text(path))
    found = [(b.line, f"```{b.info}: no such kind of block") for b in blocks if kind(b) is None]
    for block in blocks:
        if kind(block) == "quote":
            found += quote_problems(block, read)
        elif kind(block) == "console":
            found += console_problems(block)
    found += run_problems(blocks, path.name) + number_problems(blocks, prose) + name_problems(prose, path, read) + figure_problems(prose, path)
    found += shape_problems(path, blocks, prose)
    return [f"{path.name}:{line}: {what}" for line, what in sorted(found)]


def kind(block: Block) -> str | None:
    """Which of the four kinds of block this is."""
    if block.info in ("python run", "console run", "text"):
        return {"python run": "run", "console run": "console", "text": "text"}[block.info]
    return "quote" if re.fullmatch(r"python [\w/]+\.py::[\w.]+", block.info) else None


# ---- quotes ----


def symbol_source(text: str, symbol: str) -> str | None:
    """The dedented source of a top-level name or a method, its decorators and the comment lines inside included."""
    lines = symbol_lines(text, symbol)
    return textwrap.dedent("\n".join(text.split("\n")[lines[0] - 1 : lines[1]])) if lines else None


def symbol_lines(text: str, symbol: str) -> tuple[int, int] | None:
    """The first and the last line of a top-level name or a method, counted from 1; None where there is none."""
    scope, node = ast.parse(text).body, None
    for part in symbol.split("."):
        node = next((n for n in scope if part in defined_names(n)), None)
        if node is None:
            return None
        scope = getattr(node, "body", [])
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]), node.end_lineno


def defined_names(node) -> list[str]:
    """The names that a statement binds: a definition's, or an assignment's."""
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [node.name] if hasattr(node, "name") else [t.id for t in targets if isinstance(t, ast.Name)]


def quote_problems(block: Block, read) -> list[tuple[int, str]]:
    """The quoted lines are the symbol's: from its first to its last, in order, gaps only at `# ...`."""
    file, symbol = block.info.removeprefix("python ").split("::")
    if not (ROOT / file).is_file():
        return [(block.line, f"{file}: no such file")]
    source = symbol_source(read(ROOT / file), symbol)
    if source is None:
        return [(block.line, f"{file} has no {symbol}")]
    lines, at, gap = source.split("\n"), 0, False
    for offset, line in enumerate(block.text.split("\n")):
        if line.strip() == "# ...":
            gap = True
            continue
        skipped = at
        while gap and skipped < len(lines) and lines[skipped] != line:
            skipped += 1
        if skipped >= len(lines) or lines[skipped] != line:
            expected = lines[at] if at < len(lines) else "the end"
            return [(block.line + offset, f"{file}::{symbol} reads\n    {expected}\nwhere the lesson has\n    {line}")]
        at, gap = skipped + 1, False
    return [] if gap or at == len(lines) else [(block.line, f"{file}::{symbol} goes on with\n    {lines[at]}\nwhere the lesson ends")]


def public_symbols(file: str, read=read_text) -> list[str]:
    """A file's public functions and methods (forward and __call__ among them), and its classes without any."""
    found = []
    for node in ast.parse(read(ROOT / file)).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append(node.name)
        elif isinstance(node, ast.ClassDef):
            methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef) and (n.name == "__call__" or not n.name.startswith("_"))]
            found += [f"{node.name}.{m}" for m in methods] or [node.name]
    return found


def unquoted() -> set[str]:
    """The public symbols of the model path that no lesson quotes. A class that is quoted shows the methods in the quote."""
    shown = set()
    for path in lessons():
        for block in split_lesson(read_text(path))[0]:
            if kind(block) == "quote":
                name = block.info.removeprefix("python ")
                shown |= {name, *(f"{name}.{method}" for method in re.findall(r"^    def (\w+)\(", block.text, re.MULTILINE))}
    return {name for stem in MODEL_PATH for name in (f"k2/{stem}.py::{s}" for s in public_symbols(f"k2/{stem}.py"))} - shown


# ---- what runs ----


def run_problems(blocks: list[Block], name: str) -> list[tuple[int, str]]:
    """Every doctest line gives what the lesson says, all of them in one namespace."""
    found, space = [], {}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    for block in blocks:
        if kind(block) != "run":
            continue
        test = doctest.DocTestParser().get_doctest(block.text + "\n", space, name, name, block.line - 1)
        if not test.examples:
            found.append((block.line, "a `python run` block without a >>> line"))
        test.globs, said = space, io.StringIO()
        failed = runner.run(test, out=said.write, clear_globs=False).failed
        if failed:
            found.append((block.line, said.getvalue().strip()))
    return found


def console_problems(block: Block) -> list[tuple[int, str]]:
    """Each `$` line runs again from the repository's root and prints what the lesson says; stderr too behind `2>&1`."""
    found, commands = [], []
    for offset, line in enumerate(block.text.split("\n")):
        if line.startswith("$ "):
            commands.append((block.line + offset, line[2:], []))
        elif commands:
            commands[-1][2].append(line)
    if not commands:
        return [(block.line, "a `console run` block without a $ line")]
    for line, command, expected in commands:
        words = [w for w in shlex.split(command) if w != "2>&1"]
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        stderr = subprocess.STDOUT if "2>&1" in command else subprocess.DEVNULL
        try:
            said = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, timeout=SECONDS, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"})
        except (subprocess.TimeoutExpired, FileNotFoundError) as error:
            found.append((line, f"$ {command}: {error}"))
            continue
        got, want = said.stdout.decode().rstrip() + "\n", "\n".join(expected).rstrip() + "\n"
        if not doctest.OutputChecker().check_output(want, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE):
            found.append((line, f"$ {command}\nprints\n{got}where the lesson has\n{want}"))
    return found


# ---- numbers ----

CHECK = re.compile(r"<!-- check: (.*?) -->")
NUMBER = re.compile(r"(?<![\w.,-])\d[\d,]*(?:\.\d+)?(?![\w]*_)")
WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()


def paragraphs(prose: list[str]):
    """(number of the first line, the lines) of each stretch without a blank line."""
    start = None
    for number, line in enumerate([*prose, ""], 1):
        if line.strip() and start is None:
            start = number
        elif not line.strip() and start is not None:
            yield start, prose[start - 1 : number - 1]
            start = None


def spellings(value) -> set[str]:
    """How a number may stand in prose."""
    plain = {f"{value:,}", str(value)}
    return plain | ({WORDS[value], WORDS[value].capitalize()} if isinstance(value, int) and 0 <= value < len(WORDS) else set())


def number_problems(blocks: list[Block], prose: list[str]) -> list[tuple[int, str]]:
    """Checks hold and their numbers stand beside them; no long number stands alone."""
    found, known, marked = [], set(), {}
    for block in blocks:
        known |= {n.replace(",", "") for n in NUMBER.findall(block.text)} if kind(block) != "text" else set()
    for start, lines in paragraphs(prose):
        text = " ".join(lines)
        visible = CHECK.sub("", text)
        for offset, line in enumerate(lines):
            for expression in CHECK.findall(line):
                problem, values = check_problem(expression)
                found += [(start + offset, f"check: {expression}: {problem}")] if problem else []
                known |= {str(v) for v in values}
                absent = [v for v in values if not any(re.search(rf"(?<![\w.,]){re.escape(s)}(?!\w|[.,]\d)", visible) for s in spellings(v))]
                found += [(start + offset, f"check: {expression}: {absent[0]} is not in the paragraph")] if absent else []
        if "(source:" not in text:
            plain = re.sub(r"`[^`]*`|!\[[^\]]*\]|\]\([^)]*\)|arXiv [\d.]+|[Ss]ections? [\d.]+", "", visible)
            for number in NUMBER.findall(plain):
                bare = number.replace(",", "").rstrip(".")
                if len(bare) >= 4 or "." in bare:
                    marked.setdefault(bare, start)
    alone = {n: line for n, line in marked.items() if n not in known and n not in {k.rstrip("0").rstrip(".") if "." in k else k for k in known}}
    return found + [(line, f"{n} stands alone: add a check, a block that prints it, or a (source: ...)") for n, line in alone.items()]


def check_problem(expression: str) -> tuple[str, list]:
    """(what is wrong, the numbers checked) of `EXPR == NUMBER`, or several of them joined by `and`."""
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
        values = [ast.literal_eval(p.comparators[0]) for p in parts if isinstance(p, ast.Compare) and isinstance(p.ops[0], ast.Eq)]
        if len(values) != len(parts):
            return "expected EXPR == NUMBER", []
        space = check_space()
        wrong = [f"is {eval(compile(ast.Expression(p.left), 'check', 'eval'), space)!r}" for p, v in zip(parts, values) if eval(compile(ast.Expression(p.left), "check", "eval"), space) != v]
        return "; ".join(wrong), values
    except Exception as error:  # whatever an expression can raise is a problem of the lesson
        return f"{type(error).__name__}: {error}", []


def check_space() -> dict:
    """The names that a check may use: cfg (K2-Instruct), config(NAME), and all of lessons/counts.py."""
    from . import counts

    return {**{n: getattr(counts, n) for n in dir(counts) if not n.startswith("_")}, "math": math, "sum": sum, "round": round, "len": len, "range": range, "min": min, "max": max, "int": int}


# ---- names, links, figures ----

NAMED = re.compile(r"`((?:k2|tests|lessons)/[\w./-]+\.(?:py|md|json))(?:::([\w.]+))?`")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def name_problems(prose: list[str], path: Path, read) -> list[tuple[int, str]]:
    """Every file, symbol, test and link that the prose names exists."""
    found = []
    for number, line in enumerate(prose, 1):
        for file, symbol in NAMED.findall(line):
            if not (ROOT / file).is_file() and not file.startswith("lessons/work/"):
                found.append((number, f"{file}: no such file"))
            elif symbol and symbol_source(read(ROOT / file), symbol) is None:
                found.append((number, f"{file} has no {symbol}"))
        for _, _, target in LINK.findall(line):
            file, _, anchor = target.partition("#")
            goal = (path.parent / file).resolve() if file else path
            if not target.startswith(("http:", "https:")) and not goal.exists():
                found.append((number, f"{target}: no such file"))
            elif anchor and goal.suffix == ".md" and anchor not in anchors(goal):
                found.append((number, f"{target}: no such heading"))
    return found


def anchors(path: Path) -> set[str]:
    """The anchors that a forge gives to a file's headings."""
    titles = [line.lstrip("# ") for line in split_lesson(read_text(path))[1] if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def figure_problems(prose: list[str], path: Path) -> list[tuple[int, str]]:
    """Every picture has a real alt text, lies there, and was drawn by the script of its name from the data of today."""
    found = []
    for number, line in enumerate(prose, 1):
        for bang, alt, target in LINK.findall(line):
            if not bang:
                continue
            if len(alt) < 30:
                found.append((number, f"{target}: the alt text {alt!r} says too little"))
            if target.startswith("figures/"):
                found += [(number, problem) for problem in drawing_problems(Path(target).stem) or alt_problems(alt, path.parent / target)]
    return found


def alt_problems(alt: str, picture: Path) -> list[str]:
    """Every long number of an alt text is one of the picture's data, rounded."""
    from .figures import drawn_from

    values, found = numbers_in(drawn_from(picture)), []
    for said in NUMBER.findall(alt):
        bare = said.replace(",", "")
        digits = len(bare.partition(".")[2])
        if (len(bare) >= 4 or digits) and not any(round(v, digits) == float(bare) for v in values):
            found.append(f"{picture.name}: {said} of the alt text is not among the picture's data")
    return found


def numbers_in(data) -> list[float]:
    """All numbers in a piece of JSON."""
    if isinstance(data, (dict, list)):
        return [v for part in (data.values() if isinstance(data, dict) else data) for v in numbers_in(part)]
    return [data] if isinstance(data, (int, float)) else []


def figure_script(name: str):
    """lessons/figures/NAME.py as a module."""
    return module_from(HERE / "figures" / f"{name}.py")


def module_from(path: Path):
    """A module of a file whose name is no identifier."""
    spec = importlib.util.spec_from_file_location(f"lessons.{path.parent.name}.{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawing_problems(name: str) -> list[str]:
    """The picture holds, as text in its PNG, the data it was drawn from; the script computes the same today."""
    from .figures import drawn_from

    script, picture = HERE / "figures" / f"{name}.py", HERE / "figures" / f"{name}.png"
    if not script.is_file() or not picture.is_file():
        return [f"figures/{name}: expected a script .py and its .png, found {'no script' if not script.is_file() else 'no picture'}"]
    return differences(drawn_from(picture), json.loads(json.dumps(figure_script(name).data())), f"figures/{name}.png")


def differences(old, new, where: str) -> list[str]:
    """Where two pieces of JSON differ, numbers by more than 2 %."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [p for k in new for p in differences(old[k], new[k], f"{where}: {k}")][:1]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [p for i, (a, b) in enumerate(zip(old, new)) for p in differences(a, b, f"{where}[{i}]")][:1]
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (old, new))
    same = math.isclose(old, new, rel_tol=0.02, abs_tol=1e-9) if numbers else old == new
    return [] if same else [f"{where}: drawn from {old!r}, today {new!r}. Draw it again: python -m lessons draw"]


# ---- the shape of a lesson, and the table ----

PARTS = ("predict", "run", "look inside", "what goes wrong", "exercise", "measured")


def shape_problems(path: Path, blocks: list[Block], prose: list[str]) -> list[tuple[int, str]]:
    """A lesson has all its parts, in order: a title that asks, then the headings of PARTS, and an exercise file."""
    titles = [(n, line.lstrip("# ").strip()) for n, line in enumerate(prose, 1) if line.startswith("#")]
    if not titles or not prose[titles[0][0] - 1].startswith("# "):
        return [(1, "expected a title, # ...")]
    found, at = [], 0
    for part in PARTS:
        place = next((i for i, (_, title) in enumerate(titles) if i > at and title.lower().startswith(part)), None)
        if place is None:
            found.append((titles[at][0], f"expected a heading that begins with {part!r} behind {titles[at][1]!r}"))
        else:
            at = place
    if not (HERE / "exercises" / f"{path.stem}.py").is_file():
        found.append((1, f"no exercise: expected lessons/exercises/{path.stem}.py"))
    if not any(kind(b) == "quote" for b in blocks) or not any(kind(b) == "run" for b in blocks):
        found.append((1, "expected at least one quote of the code and one block that runs"))
    return found


def counted(path: Path) -> dict:
    """A lesson's row of the table. Minutes: 160 words of prose a minute, 8 lines of code, and 6 for the exercise."""
    blocks, prose = split_lesson(read_text(path))
    words = len(re.sub(r"<!--.*?-->", "", " ".join(prose)).split())
    lines = sum(len(b.text.split("\n")) for b in blocks)
    figures = sum(bool(bang) for line in prose for bang, _, _ in LINK.findall(line))
    return {"minutes": round(words / 160 + lines / 8 + 6), "blocks": len(blocks), "exercises": int((HERE / "exercises" / f"{path.stem}.py").is_file()), "figures": figures}


BEGIN, END = "<!-- table: made by `python -m lessons table` -->", "<!-- end of table -->"


MAPS = {HERE / "README.md": "| | lesson | minutes | code blocks | exercises | figures |", HERE / "zh" / "map.md": "| | 课 | 分钟 | 代码块 | 练习 | 图 |"}


def table(path: Path) -> str:
    """The table of a map, from the lessons that stand beside it. Minutes are those of the English text in both."""
    rows = [MAPS[path], "|---|---|---|---|---|---|"]
    for lesson in lessons():
        c = counted(lesson)
        title = title_of(path.parent / lesson.name)
        rows.append(f"| {lesson.stem[:2]} | [{title}]({lesson.name}) | {c['minutes']} | {c['blocks']} | {c['exercises']} | {c['figures']} |")
    return "\n".join([BEGIN, *rows, END])


def title_of(path: Path) -> str:
    """A page's title. LookupError where it has none."""
    found = next((line for line in read_text(path).split("\n") if line.startswith("# ")), None)
    if found is None:
        raise LookupError(f"{path.relative_to(ROOT)}: expected a line `# title`, found none")
    return found.removeprefix("# ")


def with_table(path: Path) -> str:
    """A map with the table of today. LookupError where the two lines that the table stands between are not there once."""
    text = read_text(path)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise LookupError(f"{path.relative_to(ROOT)}: expected the lines {BEGIN} and {END}, once each, found {text.count(BEGIN)} and {text.count(END)}")
    return text[: text.index(BEGIN)] + table(path) + text[text.index(END) + len(END) :]


def map_problems() -> list[str]:
    """The maps' tables are today's, and what they name exists."""
    found = []
    for path in MAPS:
        text, name = read_text(path), path.relative_to(HERE)
        found += [] if with_table(path) == text else [f"{name}: the table is not today's. Write it again: python -m lessons table"]
        found += [f"{name}:{line}: {what}" for line, what in name_problems(split_lesson(text)[1], path, read_text)]
    return found


@contextlib.contextmanager
def tests_on_path():
    """While this lasts, `import mutants` and `import small` find those of tests/."""
    folder = str(ROOT / "tests")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
