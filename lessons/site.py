"""The lessons as pages: `python -m lessons build` writes them, `python -m lessons serve` shows them on 127.0.0.1.

A page has the lesson on the left and, where the window is wide enough, the file that it speaks of on the right, at the
quoted lines, following as one scrolls. Pages load nothing from a network, and read without a script as well. Markdown is
rendered by markdown-it-py and code is coloured by Pygments: `pip install -r lessons/requirements-build.txt`.
"""

import functools
import html
import http.server
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from . import practice, translation
from .checker import HERE, ROOT, kind, lessons, read_text, split_lesson, symbol_lines, title_of
from .translation import ZH, chinese_of, english_of, pages

OUT = ROOT / "runs" / "site"
WIDE = re.compile("[\u2018-\u201d\u2026\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")  # Chinese characters and punctuation
MARKER = ".k2-lessons"  # in a folder that this program made, and may therefore replace
NAMES = {"README.md": "readme.html", "lessons/zh/README.md": "zh/readme.html", "lessons/zh/map.md": "zh/index.html"}
WORDS = {
    "en": {"map": "The map", "project": "The project", "contents": "All lessons", "search": "Search the lessons", "theme": "Dark or light", "skip": "To the lesson", "other": "中文", "code": "The code that the lesson speaks of",
           "task": "The task", "hint": "A hint", "solution": "The solution", "lines": "lines", "next": "Next", "before": "Before", "none": "nothing found"},
    "zh": {"map": "地图", "project": "项目", "contents": "所有课程", "search": "搜索课程", "theme": "深色或浅色", "skip": "跳到课文", "other": "English", "code": "本课所讲的代码",
           "task": "任务", "hint": "提示", "solution": "答案", "lines": "行", "next": "下一课", "before": "上一课", "none": "没有找到"},
}  # fmt: skip


class BuildError(Exception):
    """Something that the user can mend, in one line."""


def build(out: Path = OUT) -> list[Path]:
    """Write all pages; a folder that is there is replaced whole, and only if this program made it. -> the pages."""
    if out.exists() and not (out / MARKER).exists():
        raise BuildError(f"{out}: expected a new name or a folder that an earlier build made, found something else. Choose another.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".site-") as scratch:
        made = Path(scratch) / "site"
        Site(made).write()
        if out.exists():
            shutil.rmtree(out)
        os.replace(made, out)
    return sorted(out.rglob("*.html"))


def serve(out: Path = OUT, port: int = 8000):
    """Show the pages to this machine alone, until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=out)
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_address[1]}/  Ctrl-C ends it")
        server.serve_forever()


def page_of(source: Path) -> str:
    """Where a file of the repository is on the site: lessons as pages, everything else under code/."""
    name = source.relative_to(ROOT).as_posix()
    if name in NAMES:
        return NAMES[name]
    if name.startswith("lessons/") and name.endswith(".md"):
        return re.sub(r"README$", "index", name.removeprefix("lessons/").removesuffix(".md")) + ".html"
    return f"code/{name}.html"


def highlighted(text: str, name: str, numbered: bool = False) -> str:
    """Code as HTML; `numbered` puts each line into a span with the id NAME-N."""
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonConsoleLexer, get_lexer_for_filename
    from pygments.util import ClassNotFound

    settings = {"stripnl": False, "ensurenl": False}
    try:
        lexer = PythonConsoleLexer(**settings) if name.endswith(".pycon") else get_lexer_for_filename(name, **settings)
    except ClassNotFound:
        return html.escape(text)
    coloured = highlight(text, lexer, HtmlFormatter(nowrap=True)).rstrip("\n")
    if not numbered:
        return coloured
    return "\n".join(f'<span id="{slug(name)}-{n}">{line}</span>' for n, line in enumerate(coloured.split("\n"), 1))


def slug(name: str) -> str:
    """A name that an id may have."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name)


class Site:
    """All pages of one build, and the files that they turned out to need."""

    def __init__(self, out: Path):
        self.out, self.index, self.wanted, self.done = out, [], [], set()

    def write(self):
        """Every page, then every file that a page links to."""
        for path in [*pages(), *sorted((HERE / "experiments").glob("*.md")), *map(chinese_of, pages()), *translation.alone()]:
            self.lesson(path)
        for path in self.wanted:
            self.code(path)
        for name in ("site.css", "site.js"):
            shutil.copyfile(HERE / "pages" / name, self.out / name)
        (self.out / "search.js").write_text(f"window.K2_SEARCH = {json.dumps(self.index, ensure_ascii=False)};\n", encoding="utf-8")
        (self.out / MARKER).write_text("made by python -m lessons build\n")

    # ---- one page ----

    def put(self, name: str, language: str, title: str, body: str, aside: str = "", around: str = ""):
        """A page in its frame."""
        root, words = "../" * name.count("/"), WORDS[language]
        listed = "".join(f'<li><a href="{root}{self.in_language(path, language)}">{html.escape(path.stem[:2])} {html.escape(heading(chinese_of(path) if language == "zh" else path))}</a></li>' for path in lessons())
        page = (
            f'<!doctype html>\n<html lang="{"zh-Hans" if language == "zh" else "en"}">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<title>{html.escape(title)}</title>\n<link rel="stylesheet" href="{root}site.css">\n<link rel="icon" href="data:,">\n</head>\n<body{" class=wide" if aside else ""} data-root="{root}" data-none="{words["none"]}">\n'
            f'<a class="skip" href="#lesson">{words["skip"]}</a>\n<header><nav aria-label="{words["contents"]}"><a href="{root}{self.in_language(HERE / "README.md", language)}">{words["map"]}</a><a href="{root}{self.in_language(ROOT / "README.md", language)}">{words["project"]}</a>{around}'
            f'<details class="contents"><summary>{words["contents"]}</summary><ol>{listed}</ol></details></nav>'
            f'<div class="tools"><label class="search"><span class="hidden">{words["search"]}</span><input type="search" id="search" placeholder="{words["search"]}" autocomplete="off"></label>'
            f'<button type="button" id="theme" aria-label="{words["theme"]}">◐</button></div><ul id="found" hidden></ul></header>\n'
            f'<div class="sides">\n<main id="lesson" tabindex="-1">\n{body}\n</main>\n{aside}</div>\n<script src="{root}search.js"></script>\n<script src="{root}site.js"></script>\n</body>\n</html>\n'
        )
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")

    def in_language(self, source: Path, language: str) -> str:
        """The page of a lesson in a language."""
        return page_of(chinese_of(source) if language == "zh" else source)

    def lesson(self, path: Path):
        """A Markdown file as a page, with the files that it quotes beside it."""
        name, language = page_of(path), "zh" if path.parent == ZH else "en"
        quotes = [block.info.removeprefix("python ").split("::") for block in split_lesson(read_text(path))[0] if kind(block) == "quote"]
        body = self.rendered(path, name) + (self.exercise(path, language) if path.stem[:2].isdigit() else "")
        files = "".join(f'<pre class="file" data-file="{file}" hidden tabindex="0"><code>{highlighted(read_text(ROOT / file), file, numbered=True)}</code></pre>' for file in dict.fromkeys(file for file, _ in quotes))
        aside = f'<aside aria-label="{WORDS[language]["code"]}" data-lines="{WORDS[language]["lines"]}"><p class="where" aria-live="polite"></p>{files}</aside>' if files else ""
        self.put(name, language, heading(path), body, aside, self.around(path, name, language))

    def around(self, path: Path, name: str, language: str) -> str:
        """Links to the lesson before, the one after, and the same in the other language."""
        root, links, order = "../" * name.count("/"), [], [p.name for p in lessons()]
        if path.name in order:
            at = order.index(path.name)
            for word, other in (("before", at - 1), ("next", at + 1)):
                if 0 <= other < len(order):
                    links.append(f'<a href="{root}{self.in_language(HERE / order[other], language)}">{WORDS[language][word]}</a>')
        twin = english_of(path) if language == "zh" else chinese_of(path)
        if {path, twin} & set(pages()):
            links.append(f'<a href="{root}{page_of(twin)}" lang="{"en" if language == "zh" else "zh-Hans"}">{WORDS[language]["other"]}</a>')
        return "".join(links)

    def code(self, path: Path):
        """A source file as a page."""
        name = path.relative_to(ROOT).as_posix()
        title = f"<h1>{html.escape(name)}</h1>"
        self.put(page_of(path), "en", name, f'{title}<pre class="source" tabindex="0"><code>{highlighted(read_text(path), name, numbered=True)}</code></pre>')

    def exercise(self, path: Path, language: str) -> str:
        """Task, hint and solution of a lesson's exercise, folded."""
        source = practice.EXERCISES / f"{path.stem}.py"
        if not source.exists():
            return ""
        module = practice.module_from(source)
        task, hint = translation.exercise(source) if language == "zh" else (module.__doc__.strip(), module.HINT.strip())
        parts = {"task": task, "hint": hint, "solution": practice.solution(source)}
        return "".join(f'<details class="exercise"><summary>{WORDS[language][part]}</summary><pre tabindex="0">{highlighted(text, "x.py") if part == "solution" else html.escape(text)}</pre></details>' for part, text in parts.items())

    # ---- Markdown ----

    def rendered(self, path: Path, name: str) -> str:
        """A Markdown file as HTML: headings with the forge's anchors, links to pages, fences by their kind."""
        from markdown_it import MarkdownIt

        markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
        tokens, title, seen = markdown.parse(without_comments(read_text(path))), heading(path), ""
        for token, inside in zip(tokens, [*tokens[1:], None]):
            if token.type == "heading_open":
                seen = plain_text(inside)
                token.attrSet("id", anchor(seen))
            elif token.type == "inline":
                self.index.append({"page": name, "title": title, "part": seen, "anchor": anchor(seen), "text": plain_text(token)})
                for child in token.children or []:
                    self.relink(child, path, name)
                join_chinese(token.children or [])
            elif token.type == "fence":
                token.type, token.content = "html_block", self.fence(token.info.strip(), token.content)
        out = markdown.renderer.render(tokens, markdown.options, {}).replace("<th></th>", "<td></td>")
        return out.replace("<table>", '<div class="table" tabindex="0"><table>').replace("</table>", "</table></div>")

    def relink(self, token, path: Path, name: str):
        """Point a link at its page and a picture at its copy."""
        attribute = {"link_open": "href", "image": "src"}.get(token.type)
        target, _, fragment = (token.attrGet(attribute) or "").partition("#") if attribute else ("", "", "")
        if not attribute or not target or re.match(r"[a-z]+:", target):
            return
        source = Path(os.path.normpath(path.parent / target))
        if token.type == "image":
            where = source.relative_to(HERE).as_posix()
            (self.out / where).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, self.out / where)
        else:
            source = source / "README.md" if (source / "README.md").is_file() else source
            where = page_of(source) if source.is_file() else page_of(HERE / "README.md")
            if source.is_file() and where.startswith("code/") and source not in self.done:
                self.done.add(source)
                self.wanted.append(source)
        token.attrSet(attribute, os.path.relpath(where, os.path.dirname(name) or ".") + (f"#{fragment}" if fragment else ""))

    def fence(self, info: str, text: str) -> str:
        """A block of code; one that quotes says which lines of which file it is."""
        quote = re.fullmatch(r"python ([\w/]+\.py)::([\w.]+)", info)
        if not quote:
            return f'<pre class="{"text" if info == "text" else "run"}" tabindex="0"><code>{highlighted(text, "x.pycon" if info == "python run" else "x.txt")}</code></pre>\n'
        file, symbol = quote.groups()
        first, last = symbol_lines(read_text(ROOT / file), symbol)
        lines = f'data-file="{file}" data-first="{first}" data-last="{last}"'
        return f'<figure class="quote" {lines}><figcaption>{file} · {symbol}</figcaption><pre tabindex="0"><code>{highlighted(text, "x.py")}</code></pre></figure>\n'


def without_comments(text: str) -> str:
    """Markdown without its HTML comments, as checks are, but for those inside of fences."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(rf" ?<!--.*?-->(?: (?={WIDE.pattern}))?", "", part, flags=re.DOTALL) for part in parts)


def join_chinese(tokens: list):
    """Take out the line breaks that a browser would show as spaces between two Chinese characters."""
    for before, token, after in zip(tokens, tokens[1:], tokens[2:]):
        if token.type == "softbreak" and WIDE.search(before.content[-1:]) and WIDE.search(after.content[:1]):
            token.type = "text"  # of no content


def plain_text(token) -> str:
    """What a reader sees of an inline token."""
    return "".join(" " if child.type == "softbreak" else child.content for child in token.children or [])


@functools.cache
def heading(path: Path) -> str:
    """A Markdown file's title."""
    return title_of(path)


def anchor(title: str) -> str:
    """The anchor that a forge gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
