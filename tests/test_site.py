"""The site that `course.py docs` builds, in a real Chromium.

Search, static pages, phone, dark mode; nothing is asked of another host. A warning or a broken link
fails the build itself.
"""

import functools
import http.server
import importlib
import re
import sys
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
bs4 = pytest.importorskip("bs4", reason="no docs packages: pip install -e .[docs]")
from test_browser import browser  # noqa: E402, F401

from workshop import api, books, pages, site_chapters  # noqa: E402

STEMS = [p.stem for p in pages.chapters()]


@pytest.fixture(scope="module")
def site():
    "What the last `course.py docs` built (.ci/run calls it before the tests)."
    if not (pages.SITE / "index.html").exists():
        pytest.skip("no site in out/docs/html: python course.py docs")
    return pages.SITE


@pytest.fixture(scope="module")
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture
def open_page(served, browser):  # noqa: F811
    "Opens a page; at the end, no other host may have been asked and no script may have failed."
    asked, complaints, opened = [], [], []

    def go(where, **settings):
        page = browser.new_page(**settings)
        page.on("request", lambda r: asked.append(r.url))
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(served + where)
        opened.append(page)
        return page

    yield go
    for page in opened:
        page.close()
    assert [u for u in asked if not u.startswith((served, "data:", "blob:"))] == []
    assert complaints == []


def soup(path):
    return bs4.BeautifulSoup(path.read_bytes(), "html.parser")


@pytest.mark.parametrize("stem", STEMS)
def test_a_chapters_page(site, stem):
    "Figures with alt text, no directives, stubs with folded solutions, the learner's copy."
    s = soup(site / f"{stem}.html")
    figures = s.select("img.figure")
    assert figures and all(len(i["alt"]) > 40 and (site / i["src"]).exists() for i in figures)
    text = s.select_one("article").get_text()
    assert not re.search(
        r"#\| ?(export|exercise|colab|default_exp)|google\.colab|### (BEGIN|END) SOLUTION", text
    )
    assert 4 <= text.count("your code here") <= 8
    whole = re.sub(r"\s+", "", s.get_text())
    for cell in books.read_book(ROOT / "nbs" / f"{stem}.ipynb").cells:  # nothing else is left out
        if cell.cell_type == "code" and not {"colab", "exercise"} & set(books.directives(cell)):
            code = re.sub(r"\s+", "", site_chapters.bare(cell.source))
            assert code in whole, cell.source[:200]
    folded = [d for d in s.find_all("details") if d.summary]
    solutions = [d for d in folded if d.summary.get_text() == "Solution"]
    assert len(solutions) == text.count("your code here")
    assert all("def " in d.get_text() for d in solutions)
    assert s.select("article a[href^='api/']")
    assert "BEGIN SOLUTION" not in (site / "learner" / f"{stem}.ipynb").read_text()
    assert any("colab.research.google.com" in a["href"] for a in s.find_all("a", href=True))


def test_formulas_are_mathml_and_nothing_is_left_of_tex(site):
    assert len(soup(site / "01_fsm.html").find_all("math")) >= 2
    assert soup(site / "02_codebook.html").find("math")
    for stem in STEMS:
        text = soup(site / f"{stem}.html").select_one("article").get_text()
        assert not re.search(r"\\(pi|ln|lVert|text)\b", text), stem


def test_every_public_name_has_its_entry_and_a_way_back(site):
    mods, seen = api.modules(), 0
    for module, (home, names) in mods.items():
        public = importlib.import_module(f"codebook_tutorial.{module}").__all__
        assert {name for name, *_ in names} == set(public), module
        s = soup(site / "api" / f"{module}.html")
        for name, kind, *_ in names:
            assert s.find(id=api.label(module, name, kind)) is not None, (module, name)
            made = [
                p for p in s.select("p.taught") if p.find_previous("h2").get_text()[:-1] == name
            ]
            back = f"nbs/{home}.ipynb" if "/" in home else f"../{home}.html#lib-{name}"
            assert len(made) == 1 and back in str(made[0]), (module, name)
            seen += 1
    text = soup(site / "api" / "model.sites.html").get_text()
    assert seen > 300 and "[batch, seq" in text and "@contextmanager" in text
    used = soup(site / "api" / "model.sites.html").select_one("#api-model-sites-capture-function")
    assert used.find("a", href=re.compile("#lib-capture$")) and used.find(
        "a", href="../07_sae.html"
    )
    index = soup(site / "api" / "feature.index.html").get_text()
    assert "open_index" in index and "Index.active" in index
    text = soup(site / "api" / "dictionary.bottleneck.html").get_text()
    assert "CodebookModel.from_pretrained" in text


def test_a_broken_link_is_found(tmp_path):
    targets = ("b.html#there", "b.html#gone", "c.html", "https://x.org", "#here")
    links = "".join(f'<a href="{target}">x</a>' for target in targets)
    (tmp_path / "a.html").write_text(f'{links}<img src="i.png"><p id="here">')
    (tmp_path / "b.html").write_text('<p id="there">')
    assert sorted(link for _, link in pages.broken(tmp_path)) == ["b.html#gone", "c.html", "i.png"]


def test_findings_and_minutes_stand_on_their_pages(site):
    table = soup(site / "reproduces.html").find("table")
    assert len(table.find_all("tr")) > 50 and "<!--" not in table.get_text()
    lines = soup(site / "routes.html").find_all("table")[1].find_all("tr")[1:]
    rows = [[c.get_text() for c in tr.find_all("td")] for tr in lines]
    assert len(rows) == len(STEMS)
    assert all(5 <= int(r[3]) <= 120 and 20 <= int(r[4]) <= 120 for r in rows)


def test_every_term_of_the_glossary_occurs_where_it_says():
    text = (ROOT / "docs" / "glossary.md").read_text().split("```{glossary}")[1]
    found = re.findall(r"\n\n?(\S[^\n]*)\n  ([^\n]+(?:\n  [^\n]+)*)", text)
    assert len(found) >= 35
    for term, meaning in found:
        for stem in re.findall(r"\]\((\d\d_\w+)\.ipynb\)", meaning):
            words = [w for w in re.split(r"[^\w-]+", term.lower()) if len(w) > 1]
            chapter = (ROOT / "nbs" / f"{stem}.ipynb").read_text().lower()
            assert any(w[:5] in chapter for w in words), (term, stem)


def test_search_finds(open_page):
    page = open_page("search.html?q=superposition")
    page.wait_for_selector("ul.search li", timeout=20_000)
    assert any("hundred rooms" in t for t in page.locator("ul.search li").all_inner_texts())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_is_wider_than_a_phone(open_page, site, scheme):
    "Every page in the light, a few in the dark."
    every = sorted(
        str(p.relative_to(site))[:-5]
        for p in site.rglob("*.html")
        if p.name not in pages.STATIC.values() and p.parts[-2] in ("html", "api")
    )
    phone = dict(width=390, height=844)
    page, grounds = open_page("index.html", viewport=phone, color_scheme=scheme), set()
    for stem in every if scheme == "light" else ("index", "reproduces", "07_sae", "13_scoreboard"):
        top = page.url.rsplit("/", 1)[0].removesuffix("/api")
        page.goto(f"{top}/{stem}.html", wait_until="domcontentloaded")
        assert page.evaluate("document.scrollingElement.scrollWidth") <= 391, stem
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    red, *_ = map(int, re.findall(r"\d+", grounds.pop()))
    assert len(every) > 60 and not grounds and (red > 200) == (scheme == "light")


def test_the_static_pages_work(open_page):
    page = open_page("live.html")
    linked = {a.get_attribute("href") for a in page.locator("article a").all()}
    assert linked >= {"codes.html", "features.html", "steering.html"}
    page = open_page("codes.html")
    page.fill("input", "dragon")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=dragon", timeout=20_000)
    page = open_page("steering.html")
    before = page.inner_text("#steered")
    options = [o.get_attribute("value") for o in page.locator("#towards option").all()]
    page.select_option("#towards", options[-1])
    assert len(options) > 1 and page.inner_text("#steered") != before
    assert page.locator("#steered mark").count()
    page = open_page("features.html")
    page.locator("summary").first.click()
    assert page.locator("details").first.get_attribute("open") is not None


def test_the_luck_that_the_page_on_statistics_tells_of():
    "The best of a thousand noises, where chosen and on another half, drawn twenty times."
    import numpy as np

    told = re.search(
        r"where chosen, is near ([\d.]+), and on another half near ([\d.]+)",
        (ROOT / "docs" / "statistics.md").read_text(),
    )
    draw, found = np.random.default_rng(0), []
    for _ in range(20):
        truth, f = draw.random(400) < 0.2, draw.standard_normal((400, 1000))
        order = np.argsort(-f[:200], 0)
        scores = 2 * truth[:200][order].cumsum(0) / (np.arange(1, 201)[:, None] + truth[:200].sum())
        best = scores.max(0).argmax()
        fires = f[200:, best] >= f[order[scores[:, best].argmax(), best], best]
        f1 = 2 * (fires & truth[200:]).sum() / (fires.sum() + truth[200:].sum())
        found.append((scores.max(), f1))
    assert np.abs(np.mean(found, 0) - [float(told[1]), float(told[2])]).max() < 0.03
