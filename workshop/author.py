"""`course.py author`: text -> notebook -> export -> execute -> normalise -> clean -> claims."""

import asyncio, configparser, os, re, subprocess, sys

from .books import CLAIMS, NBS, OUT, chapters, directives, execute_all, library_books, normalise
from .books import read_book, write_book, write_text
from .claims import readme
from .env import ROOT
from .figures import save_figures

BADGE = r"https://colab\.research\.google\.com/github/[^)\s]+"
COLAB = '#| colab\nimport sys\n\nif "google.colab" in sys.modules:\n    %pip install -q {install}'


def settings():
    "settings.ini with {names} filled in."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    found = dict(ini["DEFAULT"])
    return {k: v.format(**found) if k == "install" else v for k, v in found.items()}


def apply_settings(nb, name):
    "Write the Colab badge's address and the Colab cell's install source from settings.ini."
    s = settings()
    home = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}"
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(BADGE, f"{home}/nbs/{name}", cell.source)
        elif "colab" in directives(cell):
            cell.source = COLAB.format(install=s["install"])
    return nb


def stable_ids(book):
    "Cell ids that stay the same: chapter (or notebook) and a running number; kept where there."
    prefix = f"c{book.name[:2]}" if book.parent == NBS else book.stem
    nb = apply_settings(read_book(book), book.relative_to(NBS).as_posix())
    taken = {c.id for c in nb.cells if re.fullmatch(r"[a-z]\w*-\d+", c.id)}
    n = max([int(i.split("-")[1]) for i in taken], default=0)
    seen = set()
    for c in nb.cells:
        if c.id not in taken or c.id in seen:
            n += 1
            c.id = f"{prefix}-{n}"
        seen.add(c.id)
    write_book(book, nb)


def jupytext(*args):
    "Call jupytext; its failure is ours."
    subprocess.run([sys.executable, "-m", "jupytext", "--quiet", *args], check=True)


def to_text(books):
    "Write notebooks as text to out/text/, to be edited there."
    for book in books:
        path = (OUT / "text" / book.relative_to(NBS)).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        jupytext("--to", "py:percent", "--output", path, book)
        print(path.relative_to(ROOT))


def from_text():
    "Bring notebooks edited (or started) in out/text/ back; unchanged cells keep ids and outputs."
    texts = [*(OUT / "text").glob("[0-9][0-9]_*.py"), *(OUT / "text" / "lib").rglob("*.py")]
    for text in sorted(texts):
        book = (NBS / text.relative_to(OUT / "text")).with_suffix(".ipynb")
        if book.exists() and book.stat().st_mtime >= text.stat().st_mtime:
            continue
        book.parent.mkdir(parents=True, exist_ok=True)
        mode = ["--update"] if book.exists() else []
        jupytext("--to", "ipynb", *mode, "--output", book, text)
        stable_ids(book)


def exported(book):
    "(the notebook's own module or None, the other modules that its cells name)."
    words = [directives(cell) for cell in read_book(book).cells]
    own = next((d["default_exp"] for d in words if "default_exp" in d), None)
    named = {d[kind] for d in words for kind in ("export", "exporti", "exports") if d.get(kind)}
    return own, named


def export():
    "Export the library with plain nbdev: one notebook, one module."
    from nbdev import doclinks

    os.chdir(ROOT)
    for book in [*chapters(), *library_books()]:
        if named := exported(book)[1]:
            sys.exit(
                f"{book.relative_to(ROOT)}: cells export to {', '.join(sorted(named))}; "
                "expected one module per notebook, named by `#| default_exp`"
            )
    doclinks.nbdev_export()


def clean():
    "Remove from all notebooks what does not belong in git (nbdev's own cleaning)."
    from nbdev.clean import nbdev_clean

    os.chdir(ROOT)
    nbdev_clean.__wrapped__()


def chosen(only):
    "(chapters, library notebooks) named on the command line; all chapters if none is."
    library = [name for name in only if name.startswith("lib/")]
    numbers = [name for name in only if name not in library]
    books = chapters(numbers) if numbers or not only else []
    return books, library_books(library) if library else []


def commit_run(book, outcome):
    "Put an executed chapter, its figures and its claims in place."
    nb = normalise(outcome.nb)
    write_book(book, nb)
    save_figures(nb, book.stem)
    fresh = OUT / "claims" / f"{book.name[:2]}.json"
    if fresh.exists():
        write_text(CLAIMS / fresh.name, fresh.read_text())
    else:
        (CLAIMS / fresh.name).unlink(missing_ok=True)
    top = ", ".join(f"cell {i} {s} s" for s, i in sorted(outcome.seconds, reverse=True)[:3])
    total = sum(s for s, _ in outcome.seconds)
    told = f"executed in {total:.0f} s, {outcome.memory} MB; slowest {top}"
    print(f"{book.stem}: {told}", flush=True)


def author(args):
    "Bring text, notebooks, library, outputs, claims and README together; 1 if a chapter fails."
    if args.text:
        to_text(sum(chosen(args.only), []))
        return 0
    from_text()
    books, failed = chosen(args.only)[0], []
    export()  # first, so that chapters import what they are about to show

    def done(path, outcome):
        if not outcome.failure:
            commit_run(path, outcome)
            return
        failed.append(path)
        write_book(OUT / "nbs" / path.name, outcome.nb)
        print(f"{path.stem}: FAILED {outcome.failure}", flush=True)
        print("(the notebook is left as it was; the failed run is in out/nbs)", flush=True)

    for path in books:
        asyncio.run(execute_all([path], 1, done))
    clean()
    export()
    readme()
    return 1 if failed else 0
