"""`course.py docs`: the site's sources put together, then Sphinx."""

import argparse, re, shutil, subprocess, sys

from . import run
from .api import SRC, api, modules
from .books import NBS, OUT, chapters, directives, read_book, write_book, write_text
from .env import ROOT
from .learner import learner_copy
from .site_chapters import links, page, solution

DOCS, SITE = ROOT / "docs", OUT / "docs" / "html"
# chapter -> the page that it writes as it runs
STATIC = {"06": "codes.html", "09": "features.html", "12": "steering.html"}
TOO_COMMON = ("generate",)  # mostly the models' own method is meant
LINKS = (("a", "href"), ("img", "src"), ("script", "src"), ("link", "href"))


def findings():
    "README's whole table of findings."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.split("<!-- claims: begin -->")[1].split("<!-- claims: end -->")[0].strip()


def minutes():
    "One row per chapter: what it needs, minutes to run, to read and of its exercises."
    for path in chapters():
        cells = read_book(path).cells
        text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        code = [c for c in cells if c.cell_type == "code"]
        shown = [c for c in code if not directives(c).get("export", "").startswith("checks.")]
        lines = sum(len(c.source.splitlines()) for c in shown)
        needs = re.search(r"needs: ([^|]+?) \|", text)[1]
        cpu = re.search(r"about ([^|]+?) CPU minutes?", text)[1]
        reading = len(text.split()) / 150 + lines / 12 / 2  # half of the code is skimmed
        own = sum(map(int, re.findall(r"difficulty [0-9], ([0-9]+) minutes", text)))
        title = path.stem.replace("_", " ")
        yield f"| [{title}]({path.name}) | {needs} | {cpu} | {reading:.0f} | {own} |"


def answer_key():
    "Every exercise's solution."
    lead = "For teachers: each exercise with its solution. Other answers pass the checks as well."
    page = ["# Answer key", lead]
    for path in chapters():
        cells = read_book(path).cells
        page.append(f"## {path.stem.replace('_', ' ')}")
        for before, cell in zip(cells, cells[1:]):
            if "exercise" not in directives(cell):
                continue
            title = (re.findall(r"### (Exercise [^\n]+)", before.source) or ["Exercise"])[-1]
            page.append(f"**{title}**\n\n```python\n{solution(cell)}\n```")
    return "\n\n".join(page) + "\n"


def fresh_page(number):
    "The page that a chapter's last run wrote, if it is newer than the chapter; or None."
    changed = chapters([number])[0].stat().st_mtime
    found = (OUT / "run" / number).rglob(STATIC[number])
    return next((p for p in found if p.stat().st_mtime >= changed), None)


def statics():
    "Copy the pages that chapters write as they run; chapters without a fresh one are run now."
    missing = [n for n in STATIC if not fresh_page(n)]
    if missing:
        names = ", ".join(missing)
        print(f"docs: running chapter {names}: the site shows the pages they write", flush=True)
        if run.run(argparse.Namespace(only=missing, jobs=2, outputs=False)):
            sys.exit("docs: a chapter failed, so its page is missing")
    for n, name in STATIC.items():
        shutil.copy(fresh_page(n), SRC / "_extra" / name)


def name_index(mods):
    "Public name -> [(module, kind, notebook)] of those that prose is linked to."
    index = {}
    for module, (home, names) in mods.items():
        for name, kind, *_ in names:
            if len(name) > 2 and name not in TOO_COMMON:
                index.setdefault(name, []).append((module, kind, home))
    return index


def sources():
    "Write everything that Sphinx reads into out/docs/src."
    shutil.rmtree(SRC, ignore_errors=True)
    shutil.copytree(DOCS, SRC)
    (SRC / "_extra").mkdir(exist_ok=True)
    shutil.copytree(NBS / "images", SRC / "images")
    mods, used = modules(), {}
    index = name_index(mods)
    for path in chapters():
        write_book(SRC / path.name, page(path, index, used))
        write_book(SRC / "_extra" / "learner" / path.name, learner_copy(read_book(path)))
    api(mods, used)
    write_text(SRC / "answer_key.md", answer_key())
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py", SRC], check=True)
    rows = "\n".join(minutes())
    for path in SRC.glob("*.md"):
        text = path.read_text(encoding="utf-8").replace("<!-- findings -->", findings())
        text = text.replace("<!-- minutes -->", rows)
        write_text(path, links(text, path.stem, index, used={}))
    shutil.copy(ROOT / "CHANGELOG.md", SRC / "changes.md")
    statics()


def anchors(soup):
    "What a link into a page can point at."
    named = soup.find_all("a", attrs={"name": True})
    return {t["id"] for t in soup.find_all(id=True)} | {t["name"] for t in named}


def broken(site):
    "Links of the built pages that lead nowhere: (page, link)."
    from bs4 import BeautifulSoup

    large = set(STATIC.values())  # no links in those
    pages = [p for p in site.rglob("*.html") if "_static" not in p.parts and p.name not in large]
    soups = {p.resolve(): BeautifulSoup(p.read_bytes(), "html.parser") for p in pages}
    there = {p: anchors(soup) for p, soup in soups.items()}
    for p, soup in soups.items():
        every = {t[key] for tag, key in LINKS for t in soup.find_all(tag, attrs={key: True})}
        for link in every:
            if re.match(r"[a-z]+:|//|#?$", link):
                continue
            where, _, anchor = link.partition("#")
            target = (p.parent / where.partition("?")[0]).resolve() if where else p
            if target.is_dir():
                target /= "index.html"
            if not target.exists() or anchor and anchor not in there.get(target, {anchor}):
                yield p.relative_to(site), link


def docs(args):
    "Build the site into out/docs/html; a warning or a broken link is an error."
    sources()
    new = SITE.with_name("html.new")
    shutil.rmtree(new, ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-b", "html", "-d", OUT / "docs" / "doctrees"]
    got = subprocess.run([sys.executable, "-m", "sphinx", *options, SRC, new], cwd=ROOT)
    bad = sorted(broken(new)) if not got.returncode else []
    for where, link in bad:
        print(f"docs: broken link in {where}: {link}")
    if got.returncode or bad:
        print(f"docs: FAILED; {SITE.relative_to(ROOT)} is as it was")
        return 1
    shutil.rmtree(SITE, ignore_errors=True)
    new.rename(SITE)
    total = len(list(SITE.rglob("*.html")))
    print(f"docs: {total} pages in {SITE.relative_to(ROOT)}; open {SITE / 'index.html'}")
    return 0
