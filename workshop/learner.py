"""`course.py learner`: the learner's copies, with stubs for solutions."""

import re, sys
from pathlib import Path

from .books import chapters, directives, read_book, write_book

SOLUTION = re.compile(
    r"^(?P<pad>[ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION\n?", re.M | re.S
)


def stub(source):
    "An exercise cell without its solution: the marked lines become one `...  # your code here`."
    found, n = SOLUTION.subn(lambda m: f"{m['pad']}...  # your code here\n", source)
    if not n or "SOLUTION" in found:
        raise ValueError(
            f"exercise cell: expected ### BEGIN SOLUTION ... ### END SOLUTION, got:\n{source}"
        )
    return found.rstrip("\n")


def learner_copy(nb):
    "The learner's notebook: stubs for solutions, no outputs of exercises, the rest as it is."
    for cell in nb.cells:
        exercise = "exercise" in directives(cell)
        if exercise:
            cell.source = stub(cell.source)
        if exercise or "check_" in cell.source and cell.cell_type == "code":
            cell.outputs = []
    return nb


def learner(args):
    "Write the learner's copies; never over a notebook that somebody may have worked in."
    folder = Path(args.folder).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        sys.exit(f"learner: expected a folder, got the file {folder}")
    there = [p.name for p in chapters() if (folder / p.name).exists()]
    if there and not args.force:
        sys.exit(
            f"learner: {folder} already holds {', '.join(there)}; "
            "choose another folder, or --force to overwrite them"
        )
    for path in chapters():
        write_book(folder / path.name, learner_copy(read_book(path)))
    print(
        f"{len(chapters())} learner's notebooks in {folder}; "
        f"open them with: python course.py lab --notebook-dir {folder}"
    )
    return 0
