"""The one command, as people use it and as it fails: subprocesses on small stand-in chapters."""

import argparse
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workshop import author, books, doctor, door, env, learner  # noqa: E402

VERBS = "run test lab author check learner progress figures docs doctor bench versions".split()
# a verb on stand-in chapters in another folder
INSIDE = """
import pathlib, sys
sys.path.insert(0, {here!r})
from workshop import env
env.ROOT = pathlib.Path({root!r})
from workshop import door
sys.exit(door.inside({words!r}))
"""


def course(*args, **kw):
    command = [sys.executable, ROOT / "course.py", *args]
    kw = dict(cwd=ROOT, timeout=300) | kw
    return subprocess.run(command, capture_output=True, text=True, **kw)


def book(*cells):
    "A notebook of code cells (strings) and markdown cells (strings that begin with #  )."
    v4, made = nbformat.v4, []
    for cell in cells:
        new = v4.new_markdown_cell if cell.startswith("# ") else v4.new_code_cell
        made.append(new(cell))
    return v4.new_notebook(cells=made)


@pytest.fixture
def school(tmp_path):
    "A folder with stand-in chapters, and a command line that runs a verb on it."
    for name in ("nbs", "claims"):
        (tmp_path / name).mkdir()

    def write(name, *cells):
        books.write_book(tmp_path / "nbs" / name, book(*cells))

    def command(*args):
        code = INSIDE.format(here=str(ROOT), root=str(tmp_path), words=list(args))
        return [sys.executable, "-c", code]

    return tmp_path, write, command


def call(command, **kw):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **kw)


CLAIM = "from codebook_tutorial.claims import claim\nclaim('a.b', {}, unit='nats')"


def test_help_names_every_verb():
    out = course("--help")
    assert out.returncode == 0
    assert re.findall(r"^ {4}(\w+)", out.stdout, re.M) == VERBS
    assert "--only" in course("run", "--help").stdout
    assert "--text" in course("author", "--help").stdout


def test_every_verb_leads_to_a_function():
    import importlib

    for words in (["x"], ["x", "0", "y"], ["oldest"], []):
        for verb in [*VERBS, "judge"]:
            try:
                args = door.parse([verb, *words])
            except SystemExit:
                continue
            if args.to:
                module, name = args.to.split(".")
                assert callable(getattr(importlib.import_module(f"workshop.{module}"), name))


def test_there_is_one_parser_and_the_door_needs_no_packages():
    parsers = []
    for path in [ROOT / "course.py", *(ROOT / "workshop").glob("*.py")]:
        parsers += [path.name] * path.read_text().count("ArgumentParser(")
    assert parsers == ["door.py"]
    assert len((ROOT / "course.py").read_text().splitlines()) <= 40
    for name in ("course", "workshop/door", "workshop/env", "workshop/doctor"):
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in (n.split(".")[0] for n in names):
                assert top in sys.stdlib_module_names or top == "workshop", (name, top)


def test_bench_tells_its_parts_and_refuses_others():
    assert "codebook" in course("bench", "--help").stdout
    out = course("bench", "--only", "nothing")
    assert out.returncode == 2 and "invalid choice: 'nothing'" in out.stderr


def test_wrong_words_are_refused():
    for words in (["walk"], ["run", "--onyl", "01"], []):
        assert course(*words).returncode == 2
    out = course("run", "--only", "77")
    assert out.returncode != 0 and "no chapter 77; there are 00" in out.stderr


def test_too_old_a_python_is_told_which_one_it_needs():
    code = "import sys, runpy; sys.version_info = (3, 9, 1); runpy.run_path('course.py')"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 1 and "Traceback" not in out.stderr
    assert "needs Python 3.11 or newer" in out.stderr


@pytest.fixture
def bare(tmp_path):
    "A checkout with course.py and what decides its environment, but no .venv."
    for name in ("course.py", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    shutil.copytree(ROOT / "workshop", tmp_path / "workshop")
    return tmp_path


def setup(folder):
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    return course_in(folder, "test", env=os.environ | offline | {"UV_OFFLINE": "1"})


def course_in(folder, *args, **kw):
    command = [sys.executable, "course.py", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, **kw)


def test_without_a_network_the_way_out_is_told(bare):
    out = setup(bare)
    assert out.returncode != 0 and "Traceback" not in out.stderr
    assert "packages could not be installed" in out.stderr and "PIP_INDEX_URL" in out.stderr
    assert (bare / ".venv" / ".course-making").exists()
    assert not (bare / ".venv" / ".course-stamp").exists()
    again = setup(bare)
    assert "an earlier attempt was interrupted" in again.stdout  # a second call starts over


def test_somebody_elses_venv_is_left_alone(bare):
    (bare / ".venv").mkdir()
    (bare / ".venv" / "mine.txt").write_text("x")
    out = setup(bare)
    assert out.returncode == 1 and "was not made by course.py" in out.stderr
    assert (bare / ".venv" / "mine.txt").exists()


def test_a_finished_venv_is_used_again(bare, monkeypatch):
    for name, there in (("VENV", ""), ("STAMP", ".course-stamp"), ("PYTHON", "python")):
        monkeypatch.setattr(env, name, bare / ".venv" / there)
    monkeypatch.setattr(env, "install", lambda: pytest.fail("installed again"))
    (bare / ".venv").mkdir()
    env.PYTHON.touch()
    env.STAMP.write_text(env.fingerprint())
    env.ensure_env()


def test_run_executes_into_out_and_leaves_the_tree(school):
    root, write, command = school
    write(
        "01_a.ipynb",
        "# 01 a",
        "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])",
        "#| eval: false\nraise SystemExit",
        CLAIM.format("[1.0, 1.1]"),
    )
    write("02_b.ipynb", "1 + 1")
    before = {p: p.read_bytes() for p in (root / "nbs").iterdir()}
    (root / "claims" / "01.json").write_text(json.dumps({"a.b": {"value": 1.06, "tolerance": 0.1}}))
    out = call(command("run"))
    assert out.returncode == 0, out.stdout + out.stderr
    lines = [line for line in out.stdout.splitlines() if "passed" in line]
    assert lines[0].split()[0] in ("01_a", "02_b") and " s " in lines[0]
    assert "2 of 2 chapters passed" in out.stdout and "course.py lab" in out.stdout
    assert {p: p.read_bytes() for p in (root / "nbs").iterdir()} == before
    assert list((root / "out" / "figures").glob("01_a_*.png"))
    found = json.loads((root / "out" / "claims" / "01.json").read_text())
    assert found["a.b"]["value"] == pytest.approx(1.05)
    assert printed(root, "02_b") == "2"


def printed(root, stem):
    "The first cell's value in an executed stand-in chapter."
    nb = nbformat.read(root / "out" / "nbs" / f"{stem}.ipynb", 4)
    return nb.cells[0].outputs[0].data["text/plain"]


def test_a_readers_own_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    monkeypatch.setenv("COURSE_TEXT", "mine.txt")
    monkeypatch.setenv("COURSE_MODEL", "gpt2")
    assert env.own_paths()["COURSE_TEXT"] == str(tmp_path / "mine.txt")
    assert env.own_paths()["COURSE_MODEL"] == "gpt2"
    monkeypatch.delenv("COURSE_TEXT")
    assert "COURSE_TEXT" not in env.own_paths()


@pytest.mark.parametrize("model,offline", [("", "1"), (".", "1"), ("somebody/some-model", "None")])
def test_the_hub_is_asked_only_for_a_model_of_the_hub(school, model, offline):
    root, write, command = school
    write("01_a.ipynb", "import os; str(os.environ.get('HF_HUB_OFFLINE'))")
    variables = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    assert call(command("run"), env=variables | {"COURSE_MODEL": model}).returncode == 0
    assert printed(root, "01_a") == repr(offline)


def test_outputs_of_older_code_are_named(school):
    root, write, command = school
    write("01_a.ipynb", "# 01 a", "6 * 7", "print('same')")
    said = call(command("run", "--outputs")).stdout
    assert "passed; committed outputs differ in cells 1, 2" in said
    (root / "nbs" / "01_a.ipynb").write_bytes((root / "out" / "nbs" / "01_a.ipynb").read_bytes())
    assert "differ" not in call(command("run", "--outputs")).stdout
    nb = books.read_book(root / "nbs" / "01_a.ipynb")
    nb.cells[1].source = "6 * 8"
    books.write_book(root / "nbs" / "01_a.ipynb", nb)
    said = call(command("run", "--outputs")).stdout.splitlines()[0]
    assert said.endswith("passed; committed outputs differ in cells 1")
    assert "differ" not in call(command("run")).stdout


def test_a_failing_cell_is_shown_and_the_exit_says_so(school):
    _, write, command = school
    write("01_a.ipynb", "x = 1", "x / 0")
    write("02_b.ipynb", "1 + 1")
    out = call(command("run", "--jobs", "1"))
    assert out.returncode == 1
    for words in ("FAILED at cell 1", "ZeroDivisionError", "1 of 2 chapters passed"):
        assert words in out.stdout
    assert call(command("run", "--only", "02")).returncode == 0


@pytest.mark.parametrize(
    "kept,says",
    [
        ({"a.b": {"value": 5.0, "tolerance": 0.5}}, "a.b: 1.0 here, 5.0 committed"),
        (
            {"a.b": {"value": 1.0, "tolerance": 0.5}, "a.c": {"value": 1.0, "tolerance": 0}},
            "a.c: committed, but this run did not record it",
        ),
        ({}, "a.b: new"),
    ],
)
def test_claims_that_differ_fail_the_run(school, kept, says):
    root, write, command = school
    write("01_a.ipynb", CLAIM.format("1.0"))
    (root / "claims" / "01.json").write_text(json.dumps(kept))
    out = call(command("run"))
    assert out.returncode == 1 and says in out.stdout


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_stops_cleanly_and_takes_the_kernel_along(school):
    root, write, command = school
    write(
        "01_a.ipynb",
        "import os, pathlib; pathlib.Path('pid').write_text(str(os.getpid()))",
        "import time; time.sleep(100)",
    )

    def heed():  # a job in the background would inherit that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = dict(text=True, start_new_session=True, preexec_fn=heed)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    child = subprocess.Popen(command("run"), **pipes, **options)
    pid = root / "out" / "run" / "01" / "pid"
    for _ in range(300):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 130 and "stopped" in out and "Traceback" not in err, (out, err)
    for _ in range(50):
        if not Path(f"/proc/{pid.read_text()}").exists():
            break
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


SOLVED = "#| exercise\ndef f(x):\n    ### BEGIN SOLUTION\n    return 41 + 1\n    ### END SOLUTION"


def test_learner_copies_have_stubs_and_no_solutions(school):
    root, write, command = school
    write("01_a.ipynb", "# 01 a", SOLVED, "check_f(f)")
    out = call(command("learner", str(root / "mine")))
    assert out.returncode == 0
    text = (root / "mine" / "01_a.ipynb").read_text()
    assert "SOLUTION" not in text and "41 + 1" not in text and "your code here" in text
    (root / "mine" / "01_a.ipynb").write_text("my work")
    again = call(command("learner", str(root / "mine")))
    assert again.returncode != 0 and "already holds 01_a.ipynb" in again.stderr
    assert (root / "mine" / "01_a.ipynb").read_text() == "my work"
    assert call(command("learner", str(root / "mine"), "--force")).returncode == 0
    assert (root / "mine" / "01_a.ipynb").read_text() == text
    (root / "file").write_text("x")
    assert "expected a folder" in call(command("learner", str(root / "file"))).stderr


def test_no_solution_reaches_the_real_learners_copies():
    for path in books.chapters():
        nb, copy = books.read_book(path), learner.learner_copy(books.read_book(path))
        sources = [c.source for c in nb.cells if "exercise" in books.directives(c)]
        inside = [s.split("### BEGIN SOLUTION")[1].split("### END")[0] for s in sources]
        lines = [line.strip() for solution in inside for line in solution.splitlines()]
        long = [line for line in lines if len(line) > 25]
        stubs = "\n".join(c.source for c in copy.cells if "exercise" in books.directives(c))
        assert long and not any(line in stubs for line in long)
        assert "BEGIN SOLUTION" not in nbformat.writes(copy)


def test_an_exercise_without_a_solution_mark_is_an_error():
    with pytest.raises(ValueError, match="expected ### BEGIN SOLUTION"):
        learner.stub("#| exercise\ndef f(): pass")


def test_normalise_drops_what_differs_between_runs():
    nb = book("1")
    nb.cells[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="50%|"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    nb.cells[0].execution_count, nb.cells[0].metadata["execution"] = 7, {"iopub.status.busy": "now"}
    out = books.normalise(nb).cells[0]
    assert len(out.outputs) == 1 and out.outputs[0].execution_count is None
    assert out.execution_count is None and not out.metadata


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    books.write_text(target, "old")
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        books.write_text(target, "new")
    assert target.read_text() == "old"


@pytest.mark.parametrize(
    "words,folder",
    [
        ([], "nbs"),
        (["--notebook-dir", "mine"], None),
        (["--ServerApp.root_dir=mine"], None),
        (["--no-browser"], "nbs"),
    ],
)
def test_lab_opens_one_folder(words, folder, monkeypatch):
    monkeypatch.setattr(env, "call", lambda *a, cwd: a)
    got = door.main(["lab", *words])
    assert got[-len(words) :] == tuple(words) if words else True
    assert ("nbs" in got) == (folder == "nbs")
    assert sum(str(a).startswith("--notebook-dir") for a in got) <= 1


def test_the_command_line_is_handed_on_as_it_is(monkeypatch):
    monkeypatch.setattr(env, "call", lambda *a: a)
    words = ["learner", "mine", "--force"]
    assert door.main(words) == (ROOT / "workshop", *words)


def test_learner_folder_is_the_callers(tmp_path):
    command = [sys.executable, ROOT / "workshop", "learner", "mine"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert len(list((tmp_path / "mine").glob("*.ipynb"))) == len(books.chapters())


LIBRARY_BOOK = "#| default_exp search\n", "#| export\ndef f():\n    return 1", "1 + 1"


def test_library_notebooks_go_to_text_and_back(school):
    root, write, command = school
    write("01_a.ipynb", "# 01 a", "1 + 1")
    (root / "settings.ini").write_bytes((ROOT / "settings.ini").read_bytes())
    books.write_book(root / "nbs" / "lib" / "search.ipynb", book(*LIBRARY_BOOK))
    out = call(command("author", "--text", "lib/search"))
    text = root / "out" / "text" / "lib" / "search.py"
    assert out.stdout == "out/text/lib/search.py\n", out.stderr
    text.write_text(text.read_text().replace("return 1", "return 2"))
    os.utime(text, (time.time() + 5,) * 2)
    words = dict(here=str(ROOT), root=str(root), words=[])
    code = INSIDE.format(**words).replace("door.inside([])", "author.from_text()")
    code = code.replace("import door", "import author")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    nb = books.read_book(root / "nbs" / "lib" / "search.ipynb")
    assert "return 2" in nb.cells[1].source and nb.cells[1].id == "search-2"
    assert "no notebook lib/x; there are lib/search" in call(command("author", "lib/x")).stderr


@pytest.mark.parametrize(
    "marks,own,named",
    [
        (["#| default_exp a.b", "#| export"], "a.b", set()),
        (["#| default_exp a", "#| export\n", "#| export b"], "a", {"b"}),
        (["1 + 1"], None, set()),
    ],
)
def test_what_a_notebook_exports(tmp_path, marks, own, named):
    "Plain nbdev is enough where no cell names another module."
    books.write_book(tmp_path / "a.ipynb", book(*(f"{mark}\nx = 1" for mark in marks)))
    assert author.exported(tmp_path / "a.ipynb") == (own, named)


@pytest.mark.parametrize("scattered", [False, True])
def test_export_is_plain_nbdev_with_one_module_per_notebook(monkeypatch, tmp_path, scattered):
    from nbdev import doclinks

    done = []
    monkeypatch.setattr(doclinks, "nbdev_export", lambda: done.append("plain"))
    path = tmp_path / "01_a.ipynb"
    books.write_book(path, book("#| default_exp a", "#| export b" if scattered else "#| export"))
    monkeypatch.setattr(author, "chapters", lambda: [path])
    monkeypatch.setattr(author, "library_books", lambda: [])
    monkeypatch.setattr(author, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    if scattered:
        with pytest.raises(SystemExit, match="cells export to b; expected one module per notebook"):
            author.export()
    else:
        author.export()
    assert done == [] if scattered else ["plain"]


def test_a_venv_in_use_is_left_whole(bare, monkeypatch):
    monkeypatch.setattr(env, "VENV", bare / ".venv")
    (bare / ".venv").mkdir()
    (bare / ".venv" / "python").touch()
    monkeypatch.setattr(Path, "rename", lambda *a: (_ for _ in ()).throw(PermissionError("in use")))
    with pytest.raises(SystemExit, match="cannot be replaced"):
        env.set_aside()
    assert (bare / ".venv" / "python").exists()


def test_the_doctor_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    "Installs nothing; 1 if something that is needed is missing, with what to do."
    offline = argparse.Namespace(offline=True)
    assert doctor.doctor(offline) == 0
    said = capsys.readouterr().out
    for word in ("ok  Python", "memory", "torch", "Ready"):
        assert word in said
    assert "!!" not in said and "network" not in said
    monkeypatch.setattr(doctor, "DISK_GB", 10**6)
    assert doctor.doctor(offline) == 1
    said = capsys.readouterr().out
    assert "!!  disk" in said and "are needed for the environment" in said and "Not ready" in said
    assert "refused" in doctor.reachable("http://127.0.0.1:9/", seconds=1)


def test_the_doctor_needs_no_environment(bare):
    "In a bare clone: it says that the environment is not there, and makes none."
    command = [sys.executable, "-S", "course.py", "doctor", "--offline"]
    got = subprocess.run(command, cwd=bare, capture_output=True, text=True)
    assert got.returncode == 0 and "not made yet" in got.stdout, got.stdout + got.stderr
    assert not (bare / ".venv").exists()
