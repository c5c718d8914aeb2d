"""`course.py figures`: every figure as a picture file, with its alt text in CHAPTER.md."""

import asyncio, base64, os, sys
from pathlib import Path

from .books import OUT, chapters, execute_all, read_book, write_text


def outputs(nb):
    "The data of every output of a notebook, in order."
    return [out.get("data", {}) for cell in nb.cells for out in cell.get("outputs", [])]


def save_figures(nb, stem, folder=None):
    "Put a chapter's pictures into a folder (out/figures); their names and alt texts."
    folder, saved = folder or OUT / "figures", []
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}_[0-9][0-9].png"):
        old.unlink()
    for data in outputs(nb):
        if "image/png" not in data:
            continue
        saved.append((f"{stem}_{len(saved) + 1:02}.png", data["text/plain"]))
        (folder / saved[-1][0]).write_bytes(base64.b64decode(data["image/png"]))
    return saved


def drawn_again(books, folder, dpi):
    "Run chapters at another resolution: (their pictures by stem, stems that failed)."
    os.environ["COURSE_DPI"] = str(dpi)
    found, failed = {}, []

    def done(path, outcome):
        if outcome.failure:
            failed.append(path.stem)
            print(f"{path.stem}: FAILED {outcome.failure}", flush=True)
        else:
            found[path.stem] = save_figures(outcome.nb, path.stem, folder)
            print(f"{path.stem}: {len(found[path.stem])} figures", flush=True)

    asyncio.run(execute_all(books, min(2, os.cpu_count() or 1), done))
    return found, failed


def figures(args):
    "The committed figures; drawn again when a resolution is asked for."
    folder, failed = Path(args.folder).expanduser().absolute(), []
    if folder.exists() and not folder.is_dir():
        sys.exit(f"figures: expected a folder, got the file {folder}")
    books = chapters(args.only)
    if args.dpi is None:
        found = {path.stem: save_figures(read_book(path), path.stem, folder) for path in books}
    elif not 20 <= args.dpi <= 600:
        sys.exit(f"figures: --dpi {args.dpi}, expected 20 to 600")
    else:
        found, failed = drawn_again(books, folder, args.dpi)
    for stem, saved in found.items():
        shown = "".join(f"![{alt}]({name})\n\n{alt}\n\n" for name, alt in saved)
        write_text(folder / f"{stem}.md", f"# {stem}\n\n{shown}")
    total = sum(map(len, found.values()))
    print(f"{total} figures in {folder}; one .md per chapter beside them says what each shows")
    return len(failed) > 0
