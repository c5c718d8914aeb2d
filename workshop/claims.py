"""Claims of a run beside the committed ones, and README's tables made from them."""

import base64, json, os

from . import books
from .books import CLAIMS, NBS, OUT, read_book, write_text
from .env import ROOT
from .figures import outputs

FIRST = ROOT / "docs" / "_static" / "first.png"  # the picture of README and of the site's index
SHORT = "| finding | ours | control | paper |\n|---|---|---|---|"
LONG = "| finding | ours (seeds) | control | paper | setting |\n|---|---|---|---|---|"


def differs(old, new):
    "Whether two records of a claim disagree: one has no value, or they are too far apart."
    if old["value"] is None or new["value"] is None:
        return old["value"] is not new["value"]
    return abs(old["value"] - new["value"]) > max(old["tolerance"], new["tolerance"])


def compare_claims(number):
    "Lines on what a fresh run's claims and the committed ones disagree about."
    paths = [folder / f"{number}.json" for folder in (OUT / "claims", CLAIMS)]
    fresh, kept = (json.loads(p.read_text()) if p.exists() else {} for p in paths)
    if os.environ.get("COURSE_MODEL") or books.CELL_LIMIT is None:
        return []  # other models and FULL runs: other numbers
    missing = kept.keys() - fresh.keys()
    lines = [f"{k}: committed, but this run did not record it" for k in missing]
    for k, new in fresh.items():
        old = kept.get(k)
        if old is None:
            lines.append(f"{k}: new; `course.py author {number}` commits it")
        elif differs(old, new):
            there = f"{old['value']} committed, tolerance {old['tolerance']}"
            lines.append(f"{k}: {new['value']} here, {there}")
    return sorted(lines)


def number_text(value):
    "A claim's number as the tables show it."
    if value is None:
        return "–"
    return f"{value:.3g}" if value < 10 else f"{value:.0f}"


def recorded():
    "Every claim that has a title: chapter by chapter, what is `the same` after what it repeats."
    for path in sorted(CLAIMS.glob("[0-9][0-9].json")):
        claims = json.loads(path.read_text())
        told = {name: c for name, c in claims.items() if c.get("title")}
        groups = list(dict.fromkeys(name.split(".")[1] for name in told))

        def place(name):
            return groups.index(name.split(".")[1]), told[name]["title"].startswith("The same")

        for name in sorted(told, key=place):
            yield told[name]


def findings(headlines):
    "The table of what reproduces, from claims/: its headlines, or all of it with seeds."
    lines = [SHORT if headlines else LONG]
    for c in recorded():
        if headlines and not c.get("headline"):
            continue
        several = len(c["values"]) > 1 and not headlines
        seeds = f" ({', '.join(map(number_text, c['values']))})" if several else ""
        ours, control = number_text(c["value"]) + seeds, number_text(c["control"])
        row = f"| {c['title']} | {ours} | {control} | {c['paper_said']} |"
        lines.append(row if headlines else f"{row} {c['setting']} |")
    return "\n".join(lines)


def replaced(text, part, table):
    "A page's text with another table between the marks of `part`."
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    before, rest = text.split(begin)
    return f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"


def readme():
    "Write README.md's tables of findings from claims/, and its picture from chapter 07."
    drawn = [data for data in outputs(read_book(NBS / "07_sae.ipynb")) if "image/png" in data]
    picture = base64.b64decode(drawn[0]["image/png"])
    if not FIRST.exists() or FIRST.read_bytes() != picture:
        FIRST.write_bytes(picture)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for part in ("headlines", "claims"):
        text = replaced(text, part, findings(part == "headlines"))
    write_text(path, text)
