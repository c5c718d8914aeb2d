"""The course's `.venv`: made when it is missing or out of date. Standard library only."""

import hashlib, os, shutil, subprocess, sys, venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".course-stamp"  # the environment is finished: the hash of its inputs
MAKING = VENV / ".course-making"  # it was started by us
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint():
    "Hash of what decides the environment: pins, metadata, Python version and the checkout's path."
    h = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for name in ("constraints.txt", "pyproject.toml"):
        h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def pip_find_links():
    "Folders of local wheels from pip's own configuration, which uv does not read."
    command = [PYTHON, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    found = [line.split("=", 1)[1].strip("'\" ") for line in listed if "find-links=" in line]
    return [
        arg for link in dict.fromkeys(" ".join(found).split()) for arg in ("--find-links", link)
    ]


def install():
    "Install the pinned packages with uv, or with pip where uv fails; compiled ahead of use."
    what = ["-c", "constraints.txt", "-e", ".[dev,docs]"]

    def quiet(*args):
        command = [PYTHON, "-m", *args]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        return subprocess.run(command, cwd=ROOT, text=True, **pipes)

    got = quiet("pip", "install", "-q", "-c", "constraints.txt", "uv")
    if got.returncode == 0:
        options = ["--python", PYTHON, "--compile-bytecode", *pip_find_links()]
        got = quiet("uv", "pip", "install", "-q", *options, *what)
    if got.returncode:
        print("  uv could not install; trying pip", flush=True)
        got = quiet("pip", "install", "-q", *what)
    if got.returncode:
        sys.exit(
            f"{got.stderr.strip()[-2000:]}\n\n"
            "The packages could not be installed (pip's message is above). "
            "Without a network, or behind a proxy,\n"
            "set PIP_INDEX_URL or PIP_FIND_LINKS to where packages are "
            "and call the same command again: it starts over."
        )


def set_aside():
    "Move an old `.venv` away whole, then delete it: one that is in use is left as it is."
    old = VENV.with_name(".venv.old")
    shutil.rmtree(old, ignore_errors=True)
    try:
        VENV.rename(old)
    except OSError as e:
        sys.exit(
            f"{VENV} cannot be replaced ({e}).\n"
            "Close JupyterLab and whatever else runs from it, then call this command again."
        )
    shutil.rmtree(old, ignore_errors=True)


def ensure_env():
    "Make `.venv` when it is missing, unfinished or out of date."
    stamp = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp:
        return
    if VENV.exists() and not STAMP.exists() and not MAKING.exists():
        sys.exit(
            f"{VENV} exists but was not made by course.py, so it is left alone.\n"
            "Rename or delete it, then call this command again."
        )
    why = "the pins have changed; " if STAMP.exists() else ""
    why = "an earlier attempt was interrupted; " if MAKING.exists() else why
    print(f"Setting up .venv ({why}about 2 GB, once, a minute or so) ...", flush=True)
    if VENV.exists():
        set_aside()
    VENV.mkdir()
    MAKING.touch()
    try:
        venv.EnvBuilder(with_pip=True).create(VENV)
    except subprocess.CalledProcessError as e:
        sys.exit(
            f"This Python cannot make a virtual environment with pip ({e}).\n"
            "On Debian or Ubuntu: apt install python3-venv, then call this command again."
        )
    install()
    STAMP.write_text(stamp)
    MAKING.unlink()
    print(f".venv is ready ({PYTHON})", flush=True)


def own_paths():
    "The environment's variables, with absolute paths to the reader's own model and text."
    found = dict(os.environ)  # chapters run in folders of their own
    for name in ("COURSE_MODEL", "COURSE_TEXT"):
        path = os.path.expanduser(found.get(name, ""))
        if os.path.exists(path):
            found[name] = os.path.abspath(path)
    return found


def call(*args, cwd=None):
    "Run the environment's Python; its exit status is ours."
    ensure_env()
    child = subprocess.Popen([PYTHON, *map(str, args)], cwd=cwd, env=own_paths())
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            pass  # Ctrl-C reaches the child too: let it close its kernels and report
