#!/usr/bin/env python3
"""One door to the course: `python course.py run` executes every chapter, `python course.py test` runs the tests.

Standard library only. The first call makes `.venv` and installs the pinned packages into it; later calls re-use it.
"""
import sys

if sys.version_info < (3, 11):
    sys.exit(f"course.py needs Python 3.11 or newer; this is Python {sys.version.split()[0]}.\n"
             "Install a newer one (https://www.python.org/downloads) and call it by name, e.g. `python3.12 course.py run`.")

import argparse, hashlib, os, shutil, subprocess, venv  # noqa: E402 (the version is checked before anything newer is used)
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP, MAKING = VENV / ".course-stamp", VENV / ".course-making"   # finished (hash of its inputs), begun
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint():
    "Hash of what decides the environment: pins, metadata, Python version and where the checkout lies."
    h = hashlib.sha256(f"{sys.version_info[:2]} {ROOT}".encode())
    for name in ("constraints.txt", "pyproject.toml"): h.update((ROOT / name).read_bytes())
    return h.hexdigest()


def pip_find_links():
    "Folders of local wheels from pip's own configuration, which uv does not read."
    got = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    lines = [line.split("=", 1)[1].strip("'\" ") for line in got.splitlines() if "find-links=" in line]
    return [arg for link in dict.fromkeys(" ".join(lines).split()) for arg in ("--find-links", link)]


def install():
    "Install the pinned packages with uv (fast), or with pip where uv cannot; compiled at once, or the first kernels would each wait for it."
    what = ["-c", "constraints.txt", "-e", ".[dev,docs]"]
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    got = subprocess.run([PYTHON, "-m", "pip", "install", "-q", "-c", "constraints.txt", "uv"], **quiet)
    if got.returncode == 0:
        got = subprocess.run([PYTHON, "-m", "uv", "pip", "install", "-q", "--python", PYTHON, "--compile-bytecode", *pip_find_links(), *what], **quiet)
    if got.returncode:
        print("  uv could not install; trying pip", flush=True)
        got = subprocess.run([PYTHON, "-m", "pip", "install", "-q", *what], **quiet)
    if got.returncode:
        sys.exit(f"{got.stderr.strip()[-2000:]}\n\nThe packages could not be installed (pip's words above). Without a network, or behind a "
                 "proxy,\nset PIP_INDEX_URL or PIP_FIND_LINKS to where packages are and call the same command again: it starts afresh.")


def set_aside():
    "Move an old `.venv` away whole, then delete it: one that is in use is left as it is."
    old = VENV.with_name(".venv.old")
    shutil.rmtree(old, ignore_errors=True)
    try: VENV.rename(old)
    except OSError as e: sys.exit(f"{VENV} cannot be replaced ({e}).\nClose JupyterLab and whatever else runs from it, then call this command again.")
    shutil.rmtree(old, ignore_errors=True)


def ensure_env():
    "Make `.venv` when it is missing, half made or out of date."
    stamp = fingerprint()
    if PYTHON.exists() and STAMP.exists() and STAMP.read_text() == stamp: return
    if VENV.exists() and not STAMP.exists() and not MAKING.exists():
        sys.exit(f"{VENV} exists but was not made by course.py, so it is left alone.\nRename or delete it, then call this command again.")
    why = "half made" if MAKING.exists() else "out of date" if STAMP.exists() else "missing"
    print(f".venv is {why}: making it (once; about 2 GB, a minute or so) ...", flush=True)
    if VENV.exists(): set_aside()
    VENV.mkdir(); MAKING.touch()
    try: venv.EnvBuilder(with_pip=True).create(VENV)
    except subprocess.CalledProcessError as e:
        sys.exit(f"This Python cannot make a virtual environment with pip ({e}).\nOn Debian or Ubuntu: apt install python3-venv, then again.")
    install()
    STAMP.write_text(stamp); MAKING.unlink()
    print(f".venv is ready ({PYTHON})", flush=True)


def own_paths():
    "The environment, with the reader's model and text named from the root of the disk: chapters run in folders of their own."
    return os.environ | {name: os.path.abspath(path) for name in ("COURSE_MODEL", "COURSE_TEXT") if os.path.exists(path := os.path.expanduser(os.environ.get(name, "")))}


def call(*args):
    "Run the environment's Python at the root; its exit status is ours."
    ensure_env()
    child = subprocess.Popen([PYTHON, *map(str, args)], cwd=ROOT, env=own_paths())
    while True:
        try: return child.wait()
        except KeyboardInterrupt: pass      # Ctrl-C reaches the child too: let it close its kernels and report


def parser():
    p = argparse.ArgumentParser(prog="course.py", description="The course's one command. The first call sets up .venv by itself.")
    sub = p.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = sub.add_parser("run", help="execute the chapters; results go to out/, the work tree stays as it was")
    run.add_argument("--only", nargs="+", metavar="NN", default=[], help="these chapters alone, e.g. --only 02")
    run.add_argument("--outputs", action="store_true", help="for authors: name the cells whose committed outputs this run does not give again to the letter (another machine draws and rounds otherwise)")
    run.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="chapters at a time (default %(default)s)")
    sub.add_parser("test", help="run the tests; further arguments go to pytest, e.g. test -k codebook")
    sub.add_parser("lab", help="open the chapters in JupyterLab; further arguments go to it")
    author = sub.add_parser("author", help="for authors: text -> notebook, execute, normalise, clean, export, put claims in place")
    author.add_argument("only", nargs="*", metavar="NN", help="chapters (default: all)")
    author.add_argument("--text", action="store_true", help="only write the chapters as text to out/text/, to be edited there")
    sub.add_parser("check", help="export, clean, make README's tables, then fail on any change there that is not committed")
    learner = sub.add_parser("learner", help="write the learner's copies: exercises as stubs, no solutions")
    learner.add_argument("folder", metavar="FOLDER")
    learner.add_argument("--force", action="store_true", help="overwrite notebooks that are already there")
    progress = sub.add_parser("progress", help="which checks pass in a folder of learner's copies (runs their code)")
    progress.add_argument("folder", metavar="FOLDER")
    progress.add_argument("--limit", type=int, default=60, metavar="SECONDS", help="for each exercise (default %(default)s)")
    figures = sub.add_parser("figures", help="write every chapter's figures with their alt text, for slides")
    figures.add_argument("folder", metavar="FOLDER")
    figures.add_argument("--dpi", type=int, help="run the chapters anew and draw larger, e.g. 200; without it, the committed pictures")
    figures.add_argument("--only", nargs="+", metavar="NN", default=[], help="these chapters alone")
    sub.add_parser("docs", help="build the documentation site into out/docs/html, offline")
    doctor = sub.add_parser("doctor", help="is this machine ready? Python, disk, memory, environment, GPU, network; installs nothing")
    doctor.add_argument("--offline", action="store_true", help="do not ask the network")
    sub.add_parser("bench", add_help=False, help="measure speed and memory beside other libraries, each in an environment of its own; `bench --help` for its parts")
    return p


def main(argv):
    args, rest = parser().parse_known_args(argv)
    if rest and args.verb not in ("test", "lab", "bench"): parser().error(f"unknown arguments: {' '.join(rest)}")
    if args.verb == "doctor":
        sys.path.insert(0, str(ROOT / "tools"))
        import doctor
        return doctor.main(sys.modules[__name__], online=not args.offline)
    if args.verb == "test": return call("-m", "pytest", *rest)
    if args.verb == "bench": return call("benchmarks/bench.py", *rest)
    if args.verb == "lab":
        elsewhere = any(a.startswith("--notebook-dir") or "root_dir" in a for a in rest)
        return call("-m", "jupyter", "lab", *([] if elsewhere else ["--notebook-dir", "nbs"]), *rest)
    folder = os.path.abspath(os.path.expanduser(getattr(args, "folder", ".")))             # the tools run at the root
    if args.verb == "progress": return call("tools/progress.py", folder, "--limit", args.limit)
    if args.verb == "learner": argv = ["learner", folder, *["--force"] * args.force]
    if args.verb == "figures": argv = ["figures", folder, *(["--dpi", args.dpi] if args.dpi is not None else []), *(["--only", *args.only] if args.only else [])]
    if args.verb == "docs": return call("tools/pages.py")
    return call("tools/books.py", *argv)


if __name__ == "__main__":
    try: sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt: sys.exit("\nstopped; call the same command again to go on")
