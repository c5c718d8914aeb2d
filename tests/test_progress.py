"""course.py progress and figures: what passes, hangs or dies; a bad notebook costs only itself."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workshop import books, figures, learner, progress  # noqa: E402

TODO = "...  # your code here"


def exercise_cells(nb):
    return [c for c in nb.cells if "exercise" in books.directives(c)]


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    "Chapter 00 as a learner's copy with answers of every sort, and chapter 03 solved."
    folder = tmp_path_factory.mktemp("copies")
    nb = learner.learner_copy(books.read_book(ROOT / "nbs" / "00_sites.ipynb"))
    cells = exercise_cells(nb)
    cells[0].source = exercise_cells(books.read_book(ROOT / "nbs" / "00_sites.ipynb"))[0].source
    scratch = nbformat.v4.new_code_cell("1 + 1")
    nb.cells.insert(nb.cells.index(cells[1]) + 1, scratch)  # before the check
    cells[1].source = cells[1].source.replace(TODO, "raise RuntimeError('what?')")
    cells[2].source = cells[2].source.replace(TODO, "while True: print('x' * 1000)")
    cells[3].source = cells[3].source.replace(TODO, "import os; os._exit(3)")
    books.write_book(folder / "00_sites.ipynb", nb)
    solved = books.read_book(ROOT / "nbs" / "03_states.ipynb")
    solved.cells.remove(exercise_cells(solved)[-1])
    books.write_book(folder / "03_states.ipynb", solved)
    (folder / "05_finetune.ipynb").write_text("{ no notebook")
    return folder


def test_each_exercise_is_told_apart(copies):
    command = [sys.executable, ROOT / "workshop", "progress", copies, "--limit", "10"]
    got = subprocess.run(command, capture_output=True, timeout=400, encoding="utf-8")
    assert got.returncode == 1 and not got.stderr, got.stderr[-2000:]  # one could not be read
    for words in (
        "00_sites         ■□××··   1 of 6",
        "00.2 not yet: your code stopped with RuntimeError: what?",
        "00.3 stopped: took longer than 10 seconds",
        "00.4 stopped: ended the process (status 3)",
        "03_states        ■■■■■■·  6 of 7",
        "03.7 not begun: its cell, or the line #| exercise in it, was deleted",
        "05_finetune      cannot be read as a notebook",
        "7 of 13 exercises pass",
    ):
        assert words in got.stdout


def test_an_exercise_without_its_check_and_one_that_does_not_parse(tmp_path):
    state, message = progress.judge("#| exercise\ndef f(x): return x", "", {})
    assert state == "not yet" and message.startswith("its check was deleted: take the cell after")
    _, message = progress.judge("def f(x) return x", "check_f(f)", {})
    assert message.startswith("stopped with SyntaxError")
    stub, solved = f"def f():\n    {TODO}", f"def f():\n    return 1\n    {TODO}"
    assert progress.judge(stub, "check_f(f)", {}) == ("not begun", "")
    assert progress.judge(solved, "f() == 1", {}) == ("passed", "")


def course(*words, **kw):
    command = [sys.executable, ROOT / "course.py", *words]
    return subprocess.run(command, capture_output=True, text=True, **kw)


def test_a_folder_without_chapters(tmp_path):
    got = course("progress", tmp_path)
    assert got.returncode == 1 and "no chapters" in got.stderr and "course.py learner" in got.stderr


def test_figures_are_written_with_their_words(tmp_path):
    got = course("figures", "slides", "--only", "01", "13", cwd=tmp_path)
    assert got.returncode == 0, got.stderr
    slides = tmp_path / "slides"
    pictures = sorted(slides.glob("*.png"))
    words = "".join((slides / f"{stem}.md").read_text() for stem in ("01_fsm", "13_scoreboard"))
    assert len(pictures) >= 10 and all(f"]({p.name})" in words for p in pictures)
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in pictures)
    shown = figures.outputs(books.read_book(ROOT / "nbs" / "13_scoreboard.ipynb"))
    alts = [data["text/plain"] for data in shown if "image/png" in data]
    assert alts and all(alt in words for alt in alts)
    assert course("figures", tmp_path, "--dpi", "5").returncode == 1
