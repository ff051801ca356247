"""The lessons as pages: every link leads somewhere, every quote is beside its lines, and a real browser finds no fault."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from lessons import checker, translation
from lessons.__main__ import main

pytest.importorskip("markdown_it", reason="pip install -r lessons/requirements-build.txt")
from lessons import site  # noqa: E402  (behind the skip)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """What a page refers to, and what its elements are called."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.links, self.ids, self.loads, self.quotes, self.pictures, self.language, self.other = path, [], [], [], [], [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.loads += [found[key] for key in ("src", "href") if key in found and tag in ("script", "img", "link")]
        self.quotes += [found] if found.get("class") == "quote" else []
        self.pictures += [found] if tag == "img" else []
        self.language = found["lang"] if tag == "html" else self.language
        self.other = found["href"] if tag == "a" and "lang" in found else self.other


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "out"
    assert main(["build", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def pages(built) -> dict[str, Page]:
    return {path.relative_to(built).as_posix(): Page(path) for path in sorted(built.rglob("*.html"))}


def test_every_lesson_of_both_languages_is_a_page(pages):
    for path in translation.pages():
        assert {site.page_of(path), site.page_of(translation.chinese_of(path))} <= set(pages)
    assert {site.page_of(path) for path in translation.alone()} | {"index.html", "readme.html", "zh/index.html", "zh/readme.html"} <= set(pages)
    assert {page.language for name, page in pages.items() if name.startswith("zh/")} == {"zh-Hans"} and pages["index.html"].language == "en"


def test_each_page_of_a_pair_leads_to_the_other(pages):
    for path in translation.pages():
        here, there = site.page_of(path), site.page_of(translation.chinese_of(path))
        for a, b in ((here, there), (there, here)):
            assert (pages[a].path.parent / pages[a].other).resolve() == pages[b].path.resolve(), f"{a}: the language switch leads to {pages[a].other!r}"


def test_every_link_leads_to_a_page_and_a_place_in_it(built, pages):
    for name, page in pages.items():
        assert len(page.ids) == len(set(page.ids)), f"{name}: an id twice"
        for link in page.links:
            if re.match(r"https?:", link):
                continue
            file, _, fragment = link.partition("#")
            goal = (page.path.parent / file).resolve() if file else page.path
            assert goal.is_file() and goal.is_relative_to(built), f"{name}: {link}"
            if fragment:
                assert unquote(fragment) in pages[goal.relative_to(built).as_posix()].ids, f"{name}: {link}"


def test_nothing_is_loaded_from_a_network_and_every_file_is_there(built, pages):
    for name, page in pages.items():
        for load in page.loads:
            assert load == "data:," or (page.path.parent / load).is_file(), f"{name}: {load}"
    assert not re.search(r"https?://|@import|url\(", (built / "site.css").read_text() + (built / "site.js").read_text())


def test_a_quote_says_the_lines_that_its_symbol_has_in_the_file_beside_it(pages):
    seen = 0
    for name, page in pages.items():
        for quote in page.quotes:
            lines = (checker.ROOT / quote["data-file"]).read_text(encoding="utf-8").split("\n")
            first, last = int(quote["data-first"]), int(quote["data-last"])
            assert 1 <= first <= last <= len(lines) and re.match(r"\s*(def|class|@|async def|[A-Za-z_]+\b.*=)", lines[first - 1]), f"{name}: {quote}"
            assert {f"{site.slug(quote['data-file'])}-{n}" for n in (first, last)} <= set(page.ids)
            seen += 1
    texts = [path for english in checker.lessons() for path in (english, translation.chinese_of(english))]
    assert seen == sum(checker.kind(block) == "quote" for path in texts for block in checker.split_lesson(checker.read_text(path))[0]) > 100


def test_every_picture_has_words_and_no_check_shows(pages):
    assert all(len(picture["alt"]) > 30 for page in pages.values() for picture in page.pictures)
    for path in checker.lessons():
        text = (pages[f"{path.stem}.html"].path).read_text(encoding="utf-8")
        assert "check:" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), path.name


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, capfd):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert main(["build", str(tmp_path / "mine")]) == 2 and "expected a new name" in capfd.readouterr().err
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


# ---- in a real browser ----


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


LIGHT_OF = """colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; }"""
FAINT = f"""() => {{
  const light = {LIGHT_OF}, faint = new Set();
  for (const element of document.querySelectorAll("main *, header *, aside *")) {{
    if (!element.checkVisibility() || ![...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())) continue;
    let behind = element;
    while (behind && getComputedStyle(behind).backgroundColor.replace(/ /g, "").endsWith(",0)")) behind = behind.parentElement;
    const [a, b] = [light(getComputedStyle(element).color), light(behind ? getComputedStyle(behind).backgroundColor : "rgb(255,255,255)")];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) faint.add(`${{element.tagName}}.${{element.className}} ${{contrast.toFixed(2)}}`);
  }}
  return [...faint];
}}"""


def test_every_page_is_without_fault_in_a_browser(browser, built, pages):
    page = browser.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    for name in pages:
        page.goto((built / name).as_uri())
        for width in (1500, 390):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0, f"{name} overflows at {width}"
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert page.evaluate(FAINT) == [], f"{name}, {scheme} at {width}"
        assert not said, f"{name}: {said}"
    page.close()


def test_an_accessibility_check_finds_no_fault(browser, built, pages):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python").Axe()
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    kinds = ["index", "readme", "exam", "06_attention", "13_quantization", "18_muonclip"]  # the others are made of the same parts
    chosen = [f"{folder}{kind}.html" for folder in ("", "zh/") for kind in kinds] + ["zh/glossary.html", "zh/exercises.html", "experiments/index.html", "code/k2/router.py.html"]
    for name in chosen:
        page.goto((built / name).as_uri())
        found = axe.run(page, options={"rules": {"color-contrast": {"enabled": False}}}).response["violations"]  # seen to above, in both themes
        assert not found, f"{name}: {[(fault['id'], fault['nodes'][0]['html'][:200]) for fault in found]}"
    page.close()


def test_chinese_lines_are_joined_without_a_space_and_stressed_without_a_slant(browser, built):
    page = browser.new_page()
    page.goto((built / "zh" / "06_attention.html").as_uri())
    assert not re.search(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef] [\u4e00-\u9fff]", "\n".join(page.locator("main p").all_inner_texts()))
    style = page.evaluate("(({fontStyle, textEmphasisStyle}) => [fontStyle, textEmphasisStyle])(getComputedStyle(document.querySelector('main em')))")
    assert style[0] == "normal" and style[1] != "none"
    page.close()


def test_the_quoted_lines_are_in_view_beside_their_sentence(browser, built, pages):
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    for name in [name for name in pages if pages[name].quotes]:
        page.goto((built / name).as_uri())
        for n, quote in enumerate(pages[name].quotes):
            page.evaluate("n => document.querySelectorAll('.quote')[n].scrollIntoView({block: 'center'})", n)
            where, first = quote["data-file"], quote["data-first"]
            page.wait_for_function("w => document.querySelector('aside .where').textContent.startsWith(w)", arg=f"{where}, ")
            line = page.wait_for_selector(f"#{site.slug(where)}-{first}.marked").bounding_box()
            assert 0 < line["y"] < 900, f"{name}: quote {n} is not in view"
    page.close()


@pytest.mark.parametrize(("name", "word", "found"), [("index.html", "softmax", "0"), ("zh/index.html", "softmax", "zh/")])
def test_a_search_stays_in_its_language(browser, built, name, word, found):
    page = browser.new_page()
    page.goto((built / name).as_uri())
    page.fill("#search", word)
    pages = {Path(link).relative_to(built).as_posix() for link in page.evaluate("[...document.querySelectorAll('#found a')].map(each => new URL(each.href).pathname)")}
    page.close()
    assert len(pages) > 3 and all(page.startswith("zh/") == (found == "zh/") for page in pages)


def test_a_focused_quote_is_the_one_that_is_shown(browser, built):
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    page.goto((built / "06_attention.html").as_uri())
    page.evaluate("document.querySelectorAll('.quote pre')[2].focus({preventScroll: true})")
    assert page.evaluate("document.querySelectorAll('.quote')[2].classList.contains('here')")
    page.close()


@pytest.mark.parametrize("name", ["09_router.html", "zh/09_router.html", "zh/index.html"])
def test_the_keyboard_alone_reaches_everything_that_can_be_used(browser, built, name):
    page = browser.new_page(viewport={"width": 1500, "height": 900})
    page.goto((built / name).as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    usable = "[...document.querySelectorAll('a[href], button, input, summary, pre, .table')].filter(each => each.checkVisibility() && (!each.matches('pre, .table') || each.scrollWidth > each.clientWidth || each.scrollHeight > each.clientHeight))"
    count = page.evaluate(f"{{ const all = {usable}; all.forEach((each, n) => each.dataset.n = n); all.length; }}")
    reached = set()
    for _ in range(page.evaluate("document.querySelectorAll('a[href], button, input, summary, [tabindex]').length") + 2):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.dataset.n"))
    page.close()
    assert count > 30 and {str(n) for n in range(count)} <= reached


def test_the_keyboard_alone_searches_opens_and_changes_the_theme(browser, built):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.goto((built / "index.html").as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("/")
    page.keyboard.type("latent cache")
    assert page.locator("#found li a").count() > 0
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    assert page.locator("#found").is_hidden()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.focus("#theme")
    page.keyboard.press("Enter")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
