"""The page of a trace: its numbers are the trace's, it asks for nothing, its tokens stay text; and a browser can use it."""

import base64
import html.parser
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from small import assert_close, random_model, small_config

import k2
from k2 import trace, trace_page
from k2.__main__ import MINI, main

HOSTILE = ["</script><script>document.title='broken'</script>", "<img src=x onerror=\"document.title='broken'\">", "<!--", "&lt;b&gt;", "\u2028", "{{DATA}}", "https://example.org/x.png", "x" * 300]
PROMPT = "import os\n\ndef read(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Names:
    """A tokenizer whose first tokens are hostile."""

    def token_bytes(self, i: int) -> bytes:
        return HOSTILE[i].encode() if i < len(HOSTILE) else b"t%d" % i


@pytest.fixture(scope="module")
def small():
    """A trace of a small model whose prompt begins with the hostile tokens."""
    model = random_model(small_config(), 0)
    return trace.trace(model, Names(), [*range(len(HOSTILE)), 50, 51, 52], None, "<b>{{DATA}}")


@pytest.fixture(scope="module")
def mini():
    model, tokenizer = k2.load(MINI, dtype=torch.float32), k2.Tokenizer.from_directory(MINI)
    return trace.trace(model, tokenizer, tokenizer.encode(PROMPT), None, "mini")


def in_page(text: str) -> dict:
    """The data element's content, read as a browser would: up to the first end tag."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.DOTALL)[1])


def unpacked(packed: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["numbers"]), {"u16": "<u2", "p16": "<u2", "u32": "<u4", "f32": "<f4"}[packed["kind"]]).reshape(-1, packed["width"])
    return values / 65535 if packed["kind"] == "p16" else values


@pytest.mark.parametrize("which", ["small", "mini"])
def test_the_pages_numbers_are_the_traces(which, request):
    found = request.getfixturevalue(which)
    data = in_page(trace_page.page(found))
    assert [data["names"][n] for n in unpacked(data["ids"])[:, 0]] == [found.names[i] for i in found.ids]
    for layer, right in zip(data["layers"], found.layers, strict=True):
        assert_close(unpacked(layer["rms"]), right.rms, 1e-6)
        for name in ("shares", "top_shares"):
            assert np.abs(unpacked(layer[name]) - getattr(right, name).double().numpy()).max() < 1e-5
        assert np.array_equal(unpacked(layer["keys"]), right.keys)
        assert [[data["names"][n] for n in row] for row in unpacked(layer["top_ids"])] == [[found.names[i] for i in row] for row in right.top_ids.tolist()]
        assert (layer["weights"] is None) == (right.weights is None)
        if right.weights is not None:
            assert np.array_equal(unpacked(layer["expert_ids"]), right.expert_ids)
            assert_close(unpacked(layer["weights"]), right.weights, 1e-6)


def test_numbers_that_need_more_than_16_bits_get_them():
    assert trace_page.packed(torch.tensor([[65535]]), "keys")["kind"] == "u16"
    packed = trace_page.packed(torch.tensor([[65536, 1]]), "keys")
    assert packed["kind"] == "u32" and unpacked(packed).tolist() == [[65536, 1]]


def test_nothing_is_fetched(mini):
    text = trace_page.page(mini)
    frame = re.sub(r'id="data">.*?</script', "", text, flags=re.DOTALL)  # base64 has // too
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bsrc=|\bhref=|<link|\bfetch\(|XMLHttp|import\(", frame), "the page names something outside"
    assert "default-src 'none'" in text


class Elements(html.parser.HTMLParser):
    """The elements of a page, as a browser's parser sees them."""

    def __init__(self):
        super().__init__()
        self.tags = []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)


def test_hostile_tokens_stay_text(small, mini):
    text, plain = trace_page.page(small), trace_page.page(mini)
    tags = []
    for page in (text, plain):
        parser = Elements()
        parser.feed(page)
        tags.append(parser.tags)
    assert tags[0] == tags[1] and tags[0].count("script") == 2 and "img" not in tags[0]
    assert {trace.visible(c) if len(c) == 1 else c for c in HOSTILE} <= set(in_page(text)["names"])
    assert "<title>&lt;b&gt;{{DATA}}: a trace of 11 tokens</title>" in text


def test_the_policy_knows_the_one_script(mini):
    import hashlib

    text = trace_page.page(mini)
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in text


def test_the_command_writes_it(tmp_path, capfd):
    assert main(["trace", PROMPT, "--html", str(tmp_path / "t.html"), "--dtype", "float32"]) == 0
    assert len(in_page((tmp_path / "t.html").read_text(encoding="utf-8"))["layers"]) == 4


# ---- in a browser ----


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def page_of_mini(mini, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "mini.html"
    path.write_text(trace_page.page(mini), encoding="utf-8")
    return path


def assert_quiet(browser, path: Path):
    """No script failed, and nothing but the file was asked for."""
    assert not browser.errors and set(browser.requests) == {path.resolve().as_uri()}, (browser.errors, browser.requests)


def opened(browser, path: Path, **options):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(path, **options)
    assert_quiet(browser, path)


SELECTED = "[...document.querySelectorAll('#tokens button')].map((b, n) => b.getAttribute('aria-pressed') === 'true' ? n : -1).filter((n) => n >= 0).join()"


@needs_browser
def test_the_keyboard_alone_reaches_tokens_layers_attention_and_experts(browser, page_of_mini, mini):
    opened(browser, page_of_mini)
    T = len(mini.ids)
    assert browser.run(SELECTED) == str(T - 1)
    browser.press("Tab")
    assert browser.run("document.activeElement.parentElement.id") == "tokens"
    for key, expected in (("ArrowLeft", T - 2), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("ArrowDown", 2), ("End", T - 1), ("ArrowRight", T - 1), ("ArrowUp", T - 2)):
        browser.press(key)
        assert browser.run(SELECTED) == str(expected) and browser.run("document.activeElement.getAttribute('aria-pressed')") == "true", key
    stops = []
    for _ in range(14):
        browser.press("Tab")
        stops.append(browser.run("((e) => e.id || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.tagName)(document.activeElement)"))
    for wanted in ("layers-title", "layer 0", "layer 3", "attention-title", "one", "heat", "routing-title"):
        assert wanted in stops, (wanted, stops)
    browser.run("document.querySelector('#layers button').focus()")
    browser.press("Enter")
    assert "in layer 0" in browser.run("document.getElementById('attention-of').textContent")
    assert browser.run("document.activeElement.getAttribute('aria-label')") == "layer 0", "the focus stays where it was"
    browser.run("document.getElementById('heat').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowRight")
    assert browser.run("document.getElementById('cell').textContent").startswith("layer 2, expert 1: ")
    browser.run("document.getElementById('one').focus()")
    browser.press("ArrowRight")
    assert browser.run("document.getElementById('every').checked") and "tokens chose each expert" in browser.run("document.getElementById('experts').textContent")
    assert_quiet(browser, page_of_mini)


@needs_browser
def test_the_page_opens_with_the_token_that_was_asked_for(browser, tmp_path, capfd):
    assert main(["trace", PROMPT, "--html", str(tmp_path / "t.html"), "--dtype", "float32", "--token", "4"]) == 0
    opened(browser, tmp_path / "t.html")
    assert browser.run(SELECTED) == "4" and browser.run("document.getElementById('chosen').textContent") == "token 4 of 0 to 25:  read"


@needs_browser
@pytest.mark.parametrize("token", [0, 5])
def test_the_tables_show_the_traces_numbers(browser, page_of_mini, mini, token):
    opened(browser, page_of_mini)
    browser.run(f"document.querySelectorAll('#tokens button')[{token}].click()")
    layers = browser.run("document.getElementById('layers').textContent")
    attention = browser.run("[...document.querySelectorAll('#attention tbody tr')].map((r) => r.cells[0].textContent + ' ' + r.cells[2].textContent)")
    experts = browser.run("[...document.querySelectorAll('#experts tbody tr')].map((r) => r.cells[1].textContent)")
    for layer in mini.layers:
        assert all(f"{float(f'{value:.3g}'):g}" in layers for value in layer.rms[token].tolist())
        assert f"{100 * layer.top_shares[token, 0]:.1f}%" in layers
    last = mini.layers[-1]
    shapes = browser.run("document.getElementById('shapes').textContent")
    assert all(f"{what} {' × '.join(map(str, sizes))}" in shapes for what, sizes in last.shapes.items()) and len(last.shapes) == 5
    expected = [(key, share) for key, share in zip(last.keys[token].tolist(), last.shares[token].tolist()) if round(share * 65535)]
    assert [row.split()[0] for row in attention] == [str(key) for key, _ in expected]
    assert all(abs(float(row.split()[1].rstrip("%")) - 100 * share) < 0.051 for row, (_, share) in zip(attention, expected))
    for row, layer in zip(experts, mini.layers[1:], strict=True):
        pairs = {int(e): float(w) for e, w in re.findall(r"(\d+) \(([\d.]+)\)", row)}
        assert all(abs(pairs.pop(e) - w) < 5.1e-4 for e, w in zip(layer.expert_ids[token].tolist(), layer.weights[token].tolist())) and not pairs


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1000])
def test_both_themes_and_a_phones_width(browser, page_of_mini, width, dark):
    opened(browser, page_of_mini, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    ink, page = (tuple(map(int, re.findall(r"\d+", browser.run(f"getComputedStyle(document.body).{part}"))[:3])) for part in ("color", "backgroundColor"))
    assert (sum(page) < 200) == dark and contrast(ink, page) > 7
    soft = tuple(map(int, re.findall(r"\d+", browser.run("getComputedStyle(document.querySelector('.soft')).color"))[:3]))
    assert contrast(soft, page) > 4.5
    panel, tint, ink = (tuple(map(int, re.findall(r"\d+", browser.run(script))[:3])) for script in (
        "getComputedStyle(document.getElementById('tokens')).backgroundColor", "getComputedStyle(document.documentElement).getPropertyValue('--tint')", "getComputedStyle(document.body).color"))  # fmt: skip
    shares = [float(share) for share in browser.run("[...document.querySelectorAll('#tokens button')].map((b) => b.style.getPropertyValue('--share'))") if share]
    assert len(shares) == trace.KEYS and max(shares) > 0.2
    assert all(contrast(ink, tuple(p + share * (t - p) for p, t in zip(panel, tint))) > 4.5 for share in (*shares, 0.45))
    drawn = "(() => { const c = document.getElementById('heat'); return new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size })()"
    assert browser.run(drawn) > 5, "the heat map is empty"
    if width == 360:  # nothing of a table is behind its edge
        assert browser.run("[...document.querySelectorAll('.scroll')].every((s) => s.scrollWidth <= s.clientWidth)")


def contrast(a, b) -> float:
    """WCAG's ratio of two colours."""
    light = sorted(sum(f * (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for f, c in zip((0.2126, 0.7152, 0.0722), colour)) for colour in (a, b))
    return (light[1] + 0.05) / (light[0] + 0.05)


@needs_browser
@pytest.mark.parametrize("ids, changes", [([5], {}), ([5, 6, 7], {"first_k_dense_replace": 3})])
def test_one_token_or_no_experts_are_a_page_too(browser, tmp_path, ids, changes):
    found = trace.trace(random_model(small_config(**changes), 0), Names(), ids)
    (tmp_path / "t.html").write_text(trace_page.page(found), encoding="utf-8")
    opened(browser, tmp_path / "t.html")
    assert browser.run("document.querySelectorAll('#layers tbody tr').length") == 3
    assert browser.run("document.getElementById('routing').hidden") == bool(changes)


@needs_browser
def test_hostile_tokens_run_nothing(browser, small, tmp_path):
    path = tmp_path / "hostile.html"
    path.write_text(trace_page.page(small), encoding="utf-8")
    opened(browser, path, width=360)
    for n in range(len(HOSTILE)):
        browser.run(f"document.querySelectorAll('#tokens button')[{n}].click()")
    shown = browser.run("[...document.querySelectorAll('#tokens button')].map((b) => b.textContent)")
    assert browser.run("document.documentElement.scrollWidth") <= 360 and browser.run("[...document.querySelectorAll('.scroll')].every((s) => s.scrollWidth <= s.clientWidth)")
    assert shown[:4] == HOSTILE[:4] and shown[6] == HOSTILE[6] and browser.run("document.title") == "<b>{{DATA}}: a trace of 11 tokens"
    assert browser.run("document.querySelectorAll('img, script:not(#data)').length") == 1
    assert_quiet(browser, path)


@needs_browser
def test_the_policy_stops_a_foreign_script(browser, mini, tmp_path):
    """The line of defence behind the first: were a token ever markup, its script would still not run."""
    path = tmp_path / "foreign.html"
    path.write_text(trace_page.page(mini).replace("</main>", "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"></main>"), encoding="utf-8")
    browser.open(path)
    assert browser.run("document.title") != "broken" and browser.run(SELECTED) == str(len(mini.ids) - 1)


@needs_browser
def test_a_prompt_of_two_thousand_tokens_stays_usable(browser, tmp_path):
    model, tokenizer = k2.load(MINI, dtype=torch.float32), k2.Tokenizer.from_directory(MINI)
    long = k2.K2(replace(model.config, max_position_embeddings=2048)).eval().requires_grad_(False)
    long.load_state_dict(model.state_dict())
    ids = (tokenizer.encode((Path(k2.__file__).parent / "chat.py").read_text()) * 2)[:2000]
    path = tmp_path / "long.html"
    path.write_text(trace_page.page(trace.trace(long, tokenizer, ids)), encoding="utf-8")
    assert path.stat().st_size < 2_000_000
    opened(browser, path)
    milliseconds = browser.run("(() => { const b = document.querySelectorAll('#tokens button'), t = performance.now(); for (let n = 0; n < 50; n++) b[n * 37].click(); return (performance.now() - t) / 50 })()")
    print(f"{path.stat().st_size:,} bytes, {milliseconds:.1f} ms a token")
    assert milliseconds < 100 and browser.run("document.querySelectorAll('#tokens button').length") == 2000
