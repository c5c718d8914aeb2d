"""The package alone: a wheel in a fresh environment, without the repository.

Chapters copied into an empty folder run there, on every Python at hand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workshop import env as course_env  # noqa: E402


def pythons():
    """This Python, and the newest other one at hand that answers (a pyenv shim without its version
    does not)."""
    found = [
        p
        for v in range(12, 20)
        for p in (
            shutil.which(f"python3.{v}"),
            *map(str, Path.home().glob(f".pyenv/versions/3.{v}.*/bin/python")),
        )
        if p and not subprocess.run([p, "-c", ""], capture_output=True).returncode
    ]
    return [sys.executable, *found[-1:]]


RUN = """
import re, sys, nbformat
from nbclient import NotebookClient
nb, colab = nbformat.read(sys.argv[1], 4), sys.argv[2:]
for cell in nb.cells:
    if cell.cell_type == "code" and cell.source.startswith("#| colab"):
        # the set-up cell, twice; as on Colab, with the wheel for the released version
        cell.source = 2 * (re.sub(r"git\\+\\S+", colab[0] if colab else "", cell.source) + "\\n")
        if colab:
            module = "sys.modules['google.colab']"
            before = f"import sys, types; {module} = types.ModuleType('google.colab')\\n"
            cell.source = before + cell.source + f"del {module}"
NotebookClient(nb, timeout=600, kernel_name="python3").execute()
"""


def run(*args, **kw):
    return subprocess.run(list(map(str, args)), capture_output=True, text=True, **kw)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from what git would hand out, so that nothing ignored can slip in."
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    got = run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        folder,
        source,
    )
    assert got.returncode == 0, got.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_library_data_and_claims_and_no_more(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    assert {
        "codebook_tutorial/model/sites.py",
        "codebook_tutorial/checks/fsm.py",
        "codebook_tutorial/data/stories/model.safetensors",
        "codebook_tutorial/recorded/13.full.json",
    } <= set(names)
    assert {n.split("/")[0] for n in names} == {
        "codebook_tutorial",
        next(n for n in names if ".dist-info" in n).split("/")[0],
    } and not any(n.endswith((".ipynb", ".bin", ".pkl", ".pt")) for n in names)
    # what made them stays in the repository
    made = [n for n in names if re.match(r"codebook_tutorial/(data|recorded)/.*\.py$", n)]
    assert all(n.endswith("/__init__.py") for n in made) and len(made) == 2
    assert wheel.stat().st_size < 40e6


INSTALL = [sys.executable, *"-m uv pip install -q --python".split()]


def fresh(folder, python, env, *what):
    "An environment with these packages; gives its Python."
    inside = folder / "bin" / "python"
    got = run(
        sys.executable, "-m", "uv", "venv", "-q", "--seed", "--python", python, folder, env=env
    )
    assert got.returncode == 0, got.stderr
    got = run(
        *INSTALL,
        inside,
        *course_env.pip_find_links(),
        "-c",
        ROOT / "constraints.txt",
        *what,
        "ipykernel",
        "nbclient",
        env=env,
    )
    if got.returncode and re.search(
        r"dns error|error sending request|failed to connect|connection refused", got.stderr, re.I
    ):
        pytest.skip("no package registry can be reached")
    assert got.returncode == 0, got.stderr[-2000:]
    return inside


def clean(pins):
    "An environment without this checkout's variables."
    return {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTHON", "COURSE_", "VIRTUAL_ENV"))
    } | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "PIP_CONSTRAINT": str(pins),
    }


def packages(folder):
    "Of an environment: who installed what, and in which version."
    return {
        d.name.split("-")[0].lower(): ((d / "INSTALLER").read_text().strip(), d.name)
        for d in next((folder / "lib").glob("python3*")).glob("site-packages/*.dist-info")
    }


@pytest.mark.parametrize(
    "python, way",
    [
        pytest.param(pythons()[0], "installed", id="installed"),
        pytest.param(
            (pythons() * 2)[1], "colab", marks=pytest.mark.nightly, id="colab, newest Python"
        ),
    ],
)
def test_chapters_run_from_the_wheel_alone(wheel, tmp_path, python, way):
    """Installed beforehand; or by the set-up cell, as on Colab,
    where torch and numpy are there already and stay what they are."""
    env = clean(tmp_path / "pins.txt")
    pins = (ROOT / "constraints.txt").read_text()
    (tmp_path / "pins.txt").write_text(
        re.sub(r"^numpy==.*$", "", pins, flags=re.M)
    )  # Colab's numpy is seldom the newest
    inside = (
        fresh(tmp_path / "env", python, env, wheel)
        if way == "installed"
        else fresh(tmp_path / "env", python, env, "torch")
    )
    if way == "colab":
        got = run(*INSTALL, inside, "numpy<2.4", env=env)
        assert got.returncode == 0, got.stderr

    before = packages(tmp_path / "env")
    empty = tmp_path / "empty"
    empty.mkdir()
    stem = "06_codes" if way == "colab" else "00_sites"  # both read shipped models
    shutil.copy(ROOT / "nbs" / f"{stem}.ipynb", empty)
    released = [wheel] if way == "colab" else []
    got = run(inside, "-c", RUN, f"{stem}.ipynb", *released, cwd=empty, env=env, timeout=900)
    assert got.returncode == 0, got.stderr[-3000:]
    after = packages(tmp_path / "env")
    assert after["codebook_tutorial"][0] == ("pip" if way == "colab" else "uv") and [
        after[name] for name in ("torch", "numpy")
    ] == [before[name] for name in ("torch", "numpy")]
    code = "import codebook_tutorial; print(codebook_tutorial.__file__)"
    where = run(inside, "-c", code, cwd=empty, env=env).stdout
    assert str(tmp_path / "env") in where  # the installed one, not the checkout


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_setup_cell_leaves_torch_and_numpy_alone_and_does_nothing_here(path):
    cells = [
        c
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code" and "".join(c["source"]).startswith("#| colab")
    ]
    assert len(cells) == 1
    source = "".join(cells[0]["source"])
    install = re.search(r"%pip install (.*)", source)[1]
    assert (
        not re.search(
            r"torch(?!_)|numpy|upgrade|-U\b|force", install.replace("codebook_tutorial", "")
        )
        and 'if "google.colab" in sys.modules' in source
    )
