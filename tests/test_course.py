"""The one command, as people use it and as it fails: real subprocesses on small stand-in chapters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import books  # noqa: E402


def course(*args, **kw):
    return subprocess.run(
        [sys.executable, ROOT / "course.py", *args],
        capture_output=True,
        text=True,
        cwd=kw.pop("cwd", ROOT),
        timeout=300,
        **kw,
    )


def book(*cells):
    "A notebook of code cells (strings) and markdown cells (strings that begin with #  )."
    make = lambda s: (
        nbformat.v4.new_markdown_cell(s) if s.startswith("# ") else nbformat.v4.new_code_cell(s)
    )
    return nbformat.v4.new_notebook(cells=[make(c) for c in cells])


@pytest.fixture
def school(tmp_path):
    "A folder with stand-in chapters, and a call that runs a verb of books.py on it."
    for name in ("nbs", "claims"):
        (tmp_path / name).mkdir()

    def write(name, *cells):
        books.write_book(tmp_path / "nbs" / name, book(*cells))

    def command(*args):
        return [
            sys.executable,
            "-c",
            f"import sys, pathlib; sys.path[:0] = [{str(ROOT / 'tools')!r}]; import books; r = pathlib.Path({str(tmp_path)!r}); "
            f"books.ROOT, books.NBS, books.OUT, books.CLAIMS = r, r / 'nbs', r / 'out', r / 'claims'; sys.path[:0] = [{str(ROOT)!r}]; import course; sys.argv = ['course.py', *{list(args)!r}]; sys.exit(books.main())",
        ]

    return tmp_path, write, command


def call(command, **kw):
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **kw)


CLAIM = "from codebook_tutorial.claims import claim\nclaim('a.b', {}, unit='nats')"


def test_help_names_every_verb():
    out = course("--help")
    assert out.returncode == 0 and all(
        verb in out.stdout
        for verb in (
            "run",
            "test",
            "lab",
            "author",
            "check",
            "learner",
            "progress",
            "figures",
            "docs",
            "doctor",
            "bench",
        )
    )
    assert (
        "--only" in course("run", "--help").stdout and "--text" in course("author", "--help").stdout
    )


def test_bench_tells_its_parts_and_refuses_others():
    assert "codebook" in course("bench", "--help").stdout
    out = course("bench", "--only", "nothing")
    assert out.returncode == 2 and "invalid choice: 'nothing'" in out.stderr


def test_wrong_words_are_refused():
    assert (
        course("walk").returncode == 2
        and course("run", "--onyl", "01").returncode == 2
        and course().returncode == 2
    )
    out = course("run", "--only", "77")
    assert out.returncode != 0 and "no chapter 77; there are 00" in out.stderr


def test_too_old_a_python_is_told_which_one_it_needs():
    code = f"import sys; sys.version_info = (3, 9, 1); exec(compile(open({str(ROOT / 'course.py')!r}).read(), 'course.py', 'exec'))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        out.returncode == 1
        and "needs Python 3.11 or newer" in out.stderr
        and "Traceback" not in out.stderr
    )


@pytest.fixture
def bare(tmp_path):
    "A checkout with course.py and what decides its environment, but no .venv."
    for name in ("course.py", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def setup(folder, **env):
    return subprocess.run(
        [sys.executable, folder / "course.py", "test"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
        env={
            **os.environ,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "",
            "PIP_CONFIG_FILE": os.devnull,
            "UV_OFFLINE": "1",
            **env,
        },
    )


def test_without_a_network_the_way_out_is_told(bare):
    out = setup(bare)
    assert (
        out.returncode != 0
        and "packages could not be installed" in out.stderr
        and "PIP_INDEX_URL" in out.stderr
        and "Traceback" not in out.stderr
    )
    assert (bare / ".venv" / ".course-making").exists() and not (
        bare / ".venv" / ".course-stamp"
    ).exists()
    again = setup(bare)
    assert "half made" in again.stdout  # and a second call starts afresh


def test_somebody_elses_venv_is_left_alone(bare):
    (bare / ".venv").mkdir()
    (bare / ".venv" / "mine.txt").write_text("x")
    out = setup(bare)
    assert (
        out.returncode == 1
        and "was not made by course.py" in out.stderr
        and (bare / ".venv" / "mine.txt").exists()
    )


def test_a_finished_venv_is_used_again(bare, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import course as module

    monkeypatch.setattr(module, "VENV", bare / ".venv")
    monkeypatch.setattr(module, "STAMP", bare / ".venv" / ".course-stamp")
    monkeypatch.setattr(module, "PYTHON", bare / ".venv" / "python")
    monkeypatch.setattr(module, "install", lambda: pytest.fail("installed again"))
    (bare / ".venv").mkdir()
    module.PYTHON.touch()
    module.STAMP.write_text(module.fingerprint())
    module.ensure_env()


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
    assert (
        lines[0].split()[0] in ("01_a", "02_b")
        and " s " in lines[0]
        and "2 of 2 chapters passed" in out.stdout
        and "course.py lab" in out.stdout
    )
    assert {p: p.read_bytes() for p in (root / "nbs").iterdir()} == before
    assert list((root / "out" / "figures").glob("01_a_*.png")) and json.loads(
        (root / "out" / "claims" / "01.json").read_text()
    )["a.b"]["value"] == pytest.approx(1.05)
    assert (
        nbformat.read(root / "out" / "nbs" / "02_b.ipynb", 4).cells[0].outputs[0].data["text/plain"]
        == "2"
    )


def test_a_readers_own_files_are_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    import course as module

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").touch()
    monkeypatch.setenv("COURSE_TEXT", "mine.txt")
    monkeypatch.setenv("COURSE_MODEL", "gpt2")
    assert (
        module.own_paths()["COURSE_TEXT"] == str(tmp_path / "mine.txt")
        and module.own_paths()["COURSE_MODEL"] == "gpt2"
    )
    monkeypatch.delenv("COURSE_TEXT")
    assert "COURSE_TEXT" not in module.own_paths()


@pytest.mark.parametrize("model,offline", [("", "1"), (".", "1"), ("somebody/some-model", "None")])
def test_the_hub_is_asked_only_for_a_model_of_the_hub(school, model, offline):
    root, write, command = school
    write("01_a.ipynb", "import os; str(os.environ.get('HF_HUB_OFFLINE'))")
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"COURSE_MODEL": model}
    assert call(command("run"), env=env).returncode == 0
    assert nbformat.read(root / "out" / "nbs" / "01_a.ipynb", 4).cells[0].outputs[0].data[
        "text/plain"
    ] == repr(offline)


def test_outputs_of_older_code_are_named(school):
    root, write, command = school
    write("01_a.ipynb", "# 01 a", "6 * 7", "print('same')")
    assert (
        "passed; committed outputs differ in cells 1, 2" in call(command("run", "--outputs")).stdout
    )
    (root / "nbs" / "01_a.ipynb").write_bytes((root / "out" / "nbs" / "01_a.ipynb").read_bytes())
    assert "differ" not in call(command("run", "--outputs")).stdout
    nb = books.read_book(root / "nbs" / "01_a.ipynb")
    nb.cells[1].source = "6 * 8"
    books.write_book(root / "nbs" / "01_a.ipynb", nb)
    assert (
        call(command("run", "--outputs"))
        .stdout.splitlines()[0]
        .endswith("passed; committed outputs differ in cells 1")
    )
    assert "differ" not in call(command("run")).stdout


def test_a_failing_cell_is_shown_and_the_exit_says_so(school):
    _, write, command = school
    write("01_a.ipynb", "x = 1", "x / 0")
    write("02_b.ipynb", "1 + 1")
    out = call(command("run", "--jobs", "1"))
    assert (
        out.returncode == 1
        and "FAILED at cell 1" in out.stdout
        and "ZeroDivisionError" in out.stdout
        and "1 of 2 chapters passed" in out.stdout
    )
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
    child = subprocess.Popen(
        command("run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background would inherit that it is ignored
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
    assert (
        again.returncode != 0
        and "already holds 01_a.ipynb" in again.stderr
        and (root / "mine" / "01_a.ipynb").read_text() == "my work"
    )
    assert (
        call(command("learner", str(root / "mine"), "--force")).returncode == 0
        and (root / "mine" / "01_a.ipynb").read_text() == text
    )
    (root / "file").write_text("x")
    assert "expected a folder" in call(command("learner", str(root / "file"))).stderr


def test_no_solution_reaches_the_real_learners_copies():
    for path in books.chapters():
        nb = books.read_book(path)
        solutions = [
            s.strip()
            for c in nb.cells
            if "exercise" in books.directives(c)
            for s in books.SOLUTION.findall(c.source)
            and c.source.split("### BEGIN SOLUTION")[1].split("### END SOLUTION")[0].splitlines()
            if len(s.strip()) > 25
        ]
        copy = books.learner_copy(books.read_book(path))
        cells = [c.source for c in copy.cells if "exercise" in books.directives(c)]
        assert (
            solutions
            and not any(s in c for s in solutions for c in cells)
            and "BEGIN SOLUTION" not in nbformat.writes(copy)
        )


def test_an_exercise_without_a_solution_mark_is_an_error():
    with pytest.raises(ValueError, match="expected ### BEGIN SOLUTION"):
        books.stub("#| exercise\ndef f(): pass")


def test_normalise_drops_what_differs_between_runs():
    nb = book("1")
    nb.cells[0].outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="50%|"),
        nbformat.v4.new_output("execute_result", data={"text/plain": "1"}, execution_count=7),
    ]
    nb.cells[0].execution_count, nb.cells[0].metadata["execution"] = 7, {"iopub.status.busy": "now"}
    out = books.normalise(nb).cells[0]
    assert (
        len(out.outputs) == 1
        and out.outputs[0].execution_count is None
        and out.execution_count is None
        and not out.metadata
    )


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
    monkeypatch.syspath_prepend(str(ROOT))
    import course as module

    monkeypatch.setattr(module, "call", lambda *a: a)
    got = module.main(["lab", *words])
    assert got[-len(words) :] == tuple(words) if words else True
    assert ("nbs" in got) == (folder == "nbs") and sum(
        str(a).startswith("--notebook-dir") for a in got
    ) <= 1


def test_learner_folder_is_the_callers(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    import course as module

    monkeypatch.setattr(module, "call", lambda *a: a)
    monkeypatch.chdir(tmp_path)
    assert module.main(["learner", "mine", "--force"]) == (
        "tools/books.py",
        "learner",
        str(tmp_path / "mine"),
        "--force",
    )


def test_a_venv_in_use_is_left_whole(bare, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import course as module

    monkeypatch.setattr(module, "VENV", bare / ".venv")
    (bare / ".venv").mkdir()
    (bare / ".venv" / "python").touch()
    monkeypatch.setattr(Path, "rename", lambda *a: (_ for _ in ()).throw(PermissionError("in use")))
    with pytest.raises(SystemExit, match="cannot be replaced"):
        module.set_aside()
    assert (bare / ".venv" / "python").exists()


def test_the_doctor_says_what_is_there_and_what_is_missing(monkeypatch, capsys):
    "Standard library only; installs nothing; 1 if something that is needed is missing, with what to do."
    sys.path.insert(0, str(ROOT / "tools"))
    import doctor

    import course

    assert doctor.main(course, online=False) == 0
    said = capsys.readouterr().out
    assert (
        "ok  Python" in said
        and "memory" in said
        and "torch" in said
        and "Ready" in said
        and "!!" not in said
        and "network" not in said
    )
    monkeypatch.setattr(doctor, "DISK_GB", 10**6)
    assert doctor.main(course, online=False) == 1
    said = capsys.readouterr().out
    assert "!!  disk" in said and "are needed for the environment" in said and "Not ready" in said
    assert doctor.reachable("http://127.0.0.1:9/", seconds=1) and "refused" in doctor.reachable(
        "http://127.0.0.1:9/", seconds=1
    )


def test_the_doctor_needs_no_environment(tmp_path):
    "In a bare clone: it says that the environment is not there, and makes none."
    for name in ("course.py", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/doctor.py").write_bytes((ROOT / "tools/doctor.py").read_bytes())
    got = subprocess.run(
        [sys.executable, "-S", "course.py", "doctor", "--offline"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        got.returncode == 0 and "not made yet" in got.stdout and not (tmp_path / ".venv").exists()
    ), got.stdout + got.stderr
