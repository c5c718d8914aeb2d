"""course.py progress and figures: what passes, what is not begun, what hangs or ends the process; nothing is lost by one bad notebook."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import books  # noqa: E402
import progress


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    "Chapter 00 as a learner's copy with answers of every sort, and chapter 03 solved."
    folder = tmp_path_factory.mktemp("copies")
    nb = books.learner_copy(books.read_book(ROOT / "nbs" / "00_sites.ipynb"))
    cells = [c for c in nb.cells if "exercise" in books.directives(c)]
    whole = [
        c.source
        for c in books.read_book(ROOT / "nbs" / "00_sites.ipynb").cells
        if "exercise" in books.directives(c)
    ]
    cells[0].source = whole[0]  # solved
    cells[1].source = cells[1].source.replace(
        "...  # your code here", "raise RuntimeError('what?')"
    )
    nb.cells.insert(
        nb.cells.index(cells[1]) + 1, nbformat.v4.new_code_cell("1 + 1")
    )  # a scratch cell before the check
    cells[2].source = cells[2].source.replace(
        "...  # your code here", "while True: print('x' * 1000)"
    )
    cells[3].source = cells[3].source.replace("...  # your code here", "import os; os._exit(3)")
    books.write_book(folder / "00_sites.ipynb", nb)
    solved = books.read_book(ROOT / "nbs" / "03_states.ipynb")
    solved.cells.remove([c for c in solved.cells if "exercise" in books.directives(c)][-1])
    books.write_book(folder / "03_states.ipynb", solved)
    (folder / "05_finetune.ipynb").write_text("{ no notebook")
    return folder


def test_each_exercise_is_told_apart(copies):
    got = subprocess.run(
        [sys.executable, ROOT / "tools" / "progress.py", copies, "--limit", "10"],
        capture_output=True,
        text=True,
        timeout=400,
        encoding="utf-8",
    )
    assert got.returncode == 1 and not got.stderr, got.stderr[-2000:]  # one could not be read
    assert (
        "00_sites         ■□××··   1 of 6" in got.stdout
        and "00.2 not yet: your code stopped with RuntimeError: what?" in got.stdout
    )
    assert (
        "00.3 stopped: took longer than 10 seconds" in got.stdout
        and "00.4 stopped: ended the process (status 3)" in got.stdout
    )
    assert (
        "03_states        ■■■■■■·  6 of 7" in got.stdout
        and "03.7 not begun: its cell, or the line #| exercise in it, was deleted" in got.stdout
        and "05_finetune      cannot be read as a notebook" in got.stdout
        and "7 of 13 exercises pass" in got.stdout
    )


def test_an_exercise_without_its_check_and_one_that_does_not_parse(tmp_path):
    assert progress.judge("#| exercise\ndef f(x): return x", "", {}) == (
        "not yet",
        "its check was deleted: take the cell after it from a fresh copy",
    )
    assert progress.judge("def f(x) return x", "check_f(f)", {})[1].startswith(
        "stopped with SyntaxError"
    )
    assert progress.judge("def f():\n    ...  # your code here", "check_f(f)", {}) == (
        "not begun",
        "",
    )
    assert progress.judge("def f():\n    return 1\n    ...  # your code here", "f() == 1", {}) == (
        "passed",
        "",
    )


def test_a_folder_without_chapters(tmp_path):
    got = subprocess.run(
        [sys.executable, ROOT / "course.py", "progress", tmp_path], capture_output=True, text=True
    )
    assert got.returncode == 1 and "no chapters" in got.stderr and "course.py learner" in got.stderr


def test_figures_are_written_with_their_words(tmp_path):
    got = subprocess.run(
        [sys.executable, ROOT / "course.py", "figures", "slides", "--only", "01", "13"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert got.returncode == 0, got.stderr
    pictures = sorted((tmp_path / "slides").glob("*.png"))
    words = "".join(
        (tmp_path / "slides" / f"{stem}.md").read_text() for stem in ("01_fsm", "13_scoreboard")
    )
    assert len(pictures) >= 10 and all(
        p.read_bytes()[:4] == b"\x89PNG" and f"]({p.name})" in words for p in pictures
    )
    outputs = [
        o.data["text/plain"]
        for c in nbformat.read(ROOT / "nbs" / "13_scoreboard.ipynb", 4).cells
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert outputs and all(alt in words for alt in outputs)
    assert (
        subprocess.run(
            [sys.executable, ROOT / "course.py", "figures", tmp_path, "--dpi", "5"],
            capture_output=True,
            text=True,
        ).returncode
        == 1
    )
