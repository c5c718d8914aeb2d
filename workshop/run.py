"""`course.py run`: the chapters executed into out/; the work tree stays as it was."""

import asyncio, time

from .books import OUT, chapters, execute_all, normalise, read_book, write_book
from .claims import compare_claims
from .figures import save_figures


def other_outputs(path, nb):
    "Cells whose committed outputs differ from a fresh run's: older code, or another machine."
    kept = {c.id: c.outputs for c in read_book(path).cells if c.cell_type == "code"}
    cells = [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code"]
    return [i for i, c in cells if kept.get(c.id) != c.outputs]


def report_line(path, state, outcome):
    "One chapter's line: time, slowest cell, memory and how it ended."
    slow = max(outcome.seconds, default=(0, 0))
    total = sum(s for s, _ in outcome.seconds)
    slowest = f"slowest cell {slow[1]:3}: {slow[0]:5.1f} s"
    return f"{path.stem:<16} {total:6.1f} s   {slowest}   {outcome.memory:5} MB   {state}"


def run(args):
    "Execute the chapters; 1 if a cell fails or a claim differs."
    books, failed, start = chapters(args.only), [], time.time()

    def done(path, outcome):
        nb, failure = normalise(outcome.nb), outcome.failure
        write_book(OUT / "nbs" / path.name, nb)
        save_figures(nb, path.stem)
        problems = [f"claim {line}" for line in compare_claims(path.name[:2])]
        state = "FAILED: claims differ" if problems else "passed"
        if failure:
            problems, state = [failure], f"FAILED at {failure.split(':')[0]}"
        if problems:
            failed.append((path, problems))
        other = other_outputs(path, nb) if args.outputs and not failure else []
        if other:
            state += f"; committed outputs differ in cells {', '.join(map(str, other))}"
        print(report_line(path, state, outcome), flush=True)

    asyncio.run(execute_all(books, max(1, args.jobs), done))
    for path, problems in failed:
        print(f"\n{path.stem}:", *problems, sep="\n  ")
    passed = f"{len(books) - len(failed)} of {len(books)} chapters passed"
    print(
        f"\n{passed} in {time.time() - start:.0f} s. Executed copies: out/nbs, "
        "figures: out/figures, claims: out/claims.\nNext: `python course.py lab` opens the "
        "chapters; `python course.py learner FOLDER` writes copies to solve."
    )
    return 1 if failed else 0
