"""Is this machine ready for the course? Standard library only, so that it can speak before anything is installed."""
import os, platform, shutil, subprocess, sys, urllib.error, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DISK_GB, MEMORY_GB = 4, 4                     # the environment takes about 2 GB; a chapter at most 1.5 GB of memory, two run at a time
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "jupyterlab", "nbdev")


def memory_gb():
    "Memory of the machine, or None where it cannot be told."
    try: return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError): return None


def reachable(url, seconds=4):
    "None if a server answers there (with anything), else why not."
    try: urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
    except urllib.error.HTTPError: return None
    except (OSError, ValueError) as e: return str(getattr(e, "reason", e))


def in_env(python, code):
    "What a line of Python prints in the course's environment, or None."
    try: got = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired): return None
    return got.stdout.strip() if got.returncode == 0 else None


def machine():
    "(state, what, found) of what must be there: ok, or a failure that says what to do."
    yield True, "Python", platform.python_version()          # course.py itself refuses older ones
    free, memory = shutil.disk_usage(ROOT).free / 1e9, memory_gb()
    yield free >= DISK_GB, "disk", f"{free:.0f} GB free" + ("" if free >= DISK_GB else f"; {DISK_GB} GB are needed for the environment and what chapters write to out/")
    if memory is not None: yield memory >= MEMORY_GB, "memory", f"{memory:.0f} GB" + ("" if memory >= MEMORY_GB else f"; below {MEMORY_GB} GB run one chapter at a time: course.py run --jobs 1")
    writable = os.access(ROOT, os.W_OK)
    yield writable, "this folder", "can be written" if writable else f"{ROOT} cannot be written: copy the course to a folder of your own"


def environment(course):
    "The course's own environment, and what is in it."
    if not course.PYTHON.exists(): yield None, "environment", "not made yet: `python course.py run` makes it"; return
    current = course.STAMP.exists() and course.STAMP.read_text() == course.fingerprint()
    yield (True if current else None), "environment", f"{course.VENV.name} " + ("is up to date" if current else "is half made or out of date: the next command makes it anew")
    code = "from importlib.metadata import version, PackageNotFoundError\nfor p in %r:\n    try: print(p, version(p))\n    except PackageNotFoundError: print(p, '-')" % (PACKAGES,)
    pins = dict(line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#"))
    for line in (in_env(course.PYTHON, code) or "").splitlines():
        name, found = line.rsplit(" ", 1)
        same = found.split("+")[0] == pins.get(name, found).split("+")[0]
        yield (True if same else None), name, "missing" if found == "-" else found + ("" if same else f", pinned {pins[name]}")
    gpu = in_env(course.PYTHON, "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    yield None if not gpu else True, "GPU", gpu or "none: every chapter runs without one"


def network():
    "Needed to install, and to fetch models from the Hub; never afterwards."
    for what, url, why in (("packages", os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple/", "needed once, to make the environment"), ("Hub", os.environ.get("HF_ENDPOINT") or "https://huggingface.co", "needed only for models of your own choice")):
        wrong = reachable(url)
        yield True if wrong is None else None, f"network: {what}", "reachable" if wrong is None else f"not reachable ({wrong}); {why}"


def main(course, online=True):
    "One line a finding; 1 if something that is needed is missing. `ok`, `--` (worth knowing), `!!` (needed)."
    failed = False
    for part in (machine(), environment(course), network() if online else ()):
        for state, what, found in part:
            failed |= state is False
            print(f"{'ok' if state else '--' if state is None else '!!'}  {what:<18} {found}", flush=True)
    print("\nNot ready: see the lines with !!." if failed else "\nReady: `python course.py run` executes every chapter, `python course.py lab` opens them.")
    return int(failed)
