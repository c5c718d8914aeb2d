"""The rules of form, measured on formatted code: `course.py check`, `course.py check --report`."""

import re, statistics, subprocess, sys, tempfile
from dataclasses import dataclass, field
from pathlib import Path

from .books import read_book
from .env import ROOT
from .measure import measure

# area -> where its files are (`!` leaves out)
AREAS = {
    "library": ["codebook_tutorial/**/*.py", "!codebook_tutorial/checks/*", "!**/_modidx.py"],
    "checks": ["codebook_tutorial/checks/**/*.py"],
    "scripts": [f"{folder}/**/*.py" for folder in ("data", "claims", "benchmarks", "scripts")],
    "workshop": ["workshop/**/*.py", "course.py", "docs/conf.py"],
    "tests": ["tests/**/*.py"],
    "chapters": ["nbs/[0-9][0-9]_*.ipynb"],
    "notebooks": ["nbs/lib/**/*.ipynb"],  # the library's own; exported, so measured there too
}
LIMITS = {
    "width": 100,  # columns
    "function": 40,  # lines, signature and docstring included
    "module": 300,  # lines that are not blank
    "positional": 3,  # parameters that can be passed by position
    "docstring": 100,  # characters of its first line
    "nesting": 1,  # a comprehension may contain one that contains none
}
OTHER_LIMITS = {
    "chapters": {"width": 88},  # what a notebook shows on a laptop
}
RULES = (
    "wide lines",
    "long functions",
    "long modules",
    "semicolons",
    "many positional",
    "no docstring",
    "long docstrings",
    "nested comprehensions",
    "named lambdas",
    "private imports",
    "rooms",
    "unreadable",
    "ruff format",
    "ruff check",
)
# rules that fail `check`, area by area; RULES turns all of them on
GATES = {
    "library": RULES,
    "checks": RULES,
    "scripts": RULES,
    "workshop": RULES,
    "tests": RULES,
    "chapters": RULES,
    "notebooks": RULES,
}
# (area or file, rule) -> why the rule does not apply there
EXEMPT = {
    ("library", "ruff format"): "exported: its notebooks are what is formatted",
    ("library", "ruff check"): "exported: its notebooks are what is linted",
    ("codebook_tutorial/model/sites.py", "many positional"): "hooks: torch calls them",
    ("codebook_tutorial/score/scale.py", "many positional"): "torch calls __torch_dispatch__",
    ("nbs/lib/score_scale.ipynb", "many positional"): "torch calls __torch_dispatch__",
    ("tests", "many positional"): "pytest passes fixtures and parameters by name",
    ("tests", "long modules"): "a module per subject; splitting it would not make it clearer",
    ("tests", "no docstring"): "a test's name says what it tests",
    ("tests", "private imports"): "tests look inside",
    ("chapters", "many positional"): "exercises: the checks call them by position",
    ("chapters", "long modules"): "a chapter is as long as its lesson",
    ("chapters", "no docstring"): "what a chapter exports is measured in the library",
    ("notebooks", "long modules"): "the module it makes is measured in the library",
}


@dataclass
class Area:
    "What was measured in one area."

    name: str
    files: list = field(default_factory=list)  # [Measured]
    broken: dict = field(default_factory=dict)  # rule -> ["path:line what"]


def area_files(patterns):
    "Files of an area, sorted."
    found = set()
    for pattern in patterns:
        if pattern.startswith("!"):
            found = {p for p in found if not p.relative_to(ROOT).match(pattern[1:])}
        else:
            found |= {p for p in ROOT.glob(pattern) if "__pycache__" not in p.parts}
    return sorted(found)


def source(path):
    "A file's Python: of a notebook its code cells, with marks between them."
    if path.suffix == ".py":
        return path.read_text(encoding="utf-8")
    cells, texts = read_book(path).cells, []
    for i, cell in enumerate(cells):
        if cell.cell_type == "code":
            code = re.sub(r"^(\s*)[%!].*", r"\1pass", cell.source, flags=re.M)  # IPython's own
            texts.append(f"# %% cell {i}\n{code}\n")
    return "\n".join(texts)


def ruff(*args):
    "What ruff prints, by line."
    command = [sys.executable, "-m", "ruff", *map(str, args)]
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if got.returncode == 2 and "rror" in got.stderr and not got.stdout:
        sys.exit(f"form: ruff failed:\n{got.stderr.strip()[-1000:]}")
    return got.stdout.splitlines()


def formatted(texts, width):
    "Sources as ruff formats them; one that is no Python stays as it is."
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{i}.py" for i in range(len(texts))]
        for path, text in zip(paths, texts):
            path.write_text(text, encoding="utf-8")
        options = ["--isolated", "--no-cache", "--target-version", "py311", "--quiet"]
        ruff("format", *options, "--line-length", width, folder)
        return [path.read_text(encoding="utf-8") for path in paths]


def place(path, text, line):
    "Where a line is: path and number, or the cell of a notebook."
    if path.suffix == ".py":
        return f"{path.relative_to(ROOT)}:{line}"
    marks = re.findall(r"^# %% cell (\d+)$", "\n".join(text.splitlines()[:line]), re.M)
    return f"{path.relative_to(ROOT)} cell {marks[-1] if marks else 0}"


def exempt(area, path, rule):
    "Whether a rule does not apply to an area or a file."
    name = path.relative_to(ROOT).as_posix() if path else ""
    return (area, rule) in EXEMPT or (name, rule) in EXEMPT


def ruff_findings(paths):
    "rule -> lines: files that ruff would format, and what its linter finds."
    if not paths:
        return {}
    by_hand = [p for p in paths if "AUTOGENERATED! DO NOT EDIT!" not in p.read_text("utf-8")]
    options = ["--output-format", "concise", "--no-cache"]
    would = ruff("format", "--check", *options, *by_hand) if by_hand else []
    lint = ruff("check", *options, *paths)
    found = [line for line in lint if re.match(r"\S+?:(cell )?\d+:", line)]
    return {"ruff format": [w for w in would if ": unformatted:" in w], "ruff check": found}


def measure_area(name):
    "Measure the files of one area."
    area, paths = Area(name), area_files(AREAS[name])
    limits = LIMITS | OTHER_LIMITS.get(name, {})
    raw = [source(p) for p in paths]
    for path, text, tidy in zip(paths, raw, formatted(raw, limits["width"])):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        module = module if path.suffix == ".py" else ""
        label = str(path.relative_to(ROOT))
        found = measure(label, text, tidy, limits=limits, module=module)
        area.files.append(found)
        for rule, lines in found.broken.items():
            if not exempt(name, path, rule):
                told = text if rule == "semicolons" else tidy
                area.broken.setdefault(rule, []).extend(
                    f"{place(path, told, line)} {what}" for line, what in lines
                )
    for rule, lines in ruff_findings(paths).items():
        if not exempt(name, None, rule):
            area.broken[rule] = lines
    return area


def spread(values):
    "Median / 90th percentile / maximum, as text."
    if not values:
        return "–"
    top = sorted(values)[int(0.9 * (len(values) - 1))]
    return f"{statistics.median(values):.0f} / {top} / {max(values)}"


def column(area):
    "One area's column of the table."
    widths = [w for f in area.files for w in f.widths]
    functions = [n for f in area.files for n in f.functions]
    found = [len(area.files), len(widths), spread(widths), spread(functions)]
    for rule in RULES:
        count = "–" if exempt(area.name, None, rule) else len(area.broken.get(rule, []))
        found.append(f"{count} !" if rule in GATES[area.name] and count != "–" else count)
    return [str(cell) for cell in found]


def table(areas):
    "The measures as a Markdown table: one row each, one column per area."
    heads = ["files", "lines", "line length", "function lines", *RULES]
    columns = [["", *heads], *([area.name, *column(area)] for area in areas)]
    columns = [[cells[0], "---", *cells[1:]] for cells in columns]
    wide = [max(map(len, cells)) for cells in columns]
    rows = []
    for cells in zip(*columns):
        padded = [cell.ljust(w, "-" if cell == "---" else " ") for cell, w in zip(cells, wide)]
        rows.append(f"| {' | '.join(padded)} |")
    notes = [f"{where}, {rule}: {why}" for (where, rule), why in EXEMPT.items()]
    return "\n".join(
        [
            *rows,
            "\nlengths: median / 90th percentile / maximum, of formatted code;"
            " `!`: fails `check`; `–`: does not apply:",
            *notes,
        ]
    )


def check_form(table_too=False):
    "Measure every area (the gated ones, without the table); 1 if a gated rule is broken."
    areas = [measure_area(name) for name in AREAS if table_too or GATES[name]]
    if table_too:
        print(table(areas))
    failed = 0
    for area in areas:
        for rule in GATES[area.name]:
            for line in area.broken.get(rule, []):
                failed += 1
                print(f"form: {area.name}, {rule}: {line}")
    print(f"form: FAILED: {failed} places break a rule" if failed else "form: every gate holds")
    return int(failed > 0)
