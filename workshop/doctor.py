"""`course.py doctor`: is this machine ready? Standard library only: it speaks before installing."""

import os, platform, shutil, subprocess, urllib.error, urllib.request

from . import env

DISK_GB = 4  # the environment takes about 2 GB
MEMORY_GB = 4  # a chapter takes at most 1.5 GB, and two run at a time
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "jupyterlab", "nbdev")
VERSIONS = """
from importlib.metadata import version, PackageNotFoundError
for p in {packages}:
    try: print(p, version(p))
    except PackageNotFoundError: print(p, '-')
"""
GPU = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def memory_gb():
    "Memory of the machine, or None where it cannot be found out."
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):
        return None


def reachable(url, seconds=4):
    "None if a server answers there (with anything), else why not."
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=seconds)
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as e:
        return str(getattr(e, "reason", e))


def in_env(code):
    "What a piece of Python prints in the course's environment, or None."
    try:
        command = [env.PYTHON, "-c", code]
        got = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return got.stdout.strip() if got.returncode == 0 else None


def machine():
    "(state, what, found) of what must be there: ok, or a failure that says what to do."
    yield True, "Python", platform.python_version()  # course.py itself refuses older ones
    free, memory = shutil.disk_usage(env.ROOT).free / 1e9, memory_gb()
    need = f"; {DISK_GB} GB are needed for the environment and what chapters write to out/"
    yield free >= DISK_GB, "disk", f"{free:.0f} GB free" + ("" if free >= DISK_GB else need)
    if memory is not None:
        enough = memory >= MEMORY_GB
        need = f"; below {MEMORY_GB} GB run one chapter at a time: course.py run --jobs 1"
        yield enough, "memory", f"{memory:.0f} GB" + ("" if enough else need)
    writable = os.access(env.ROOT, os.W_OK)
    need = f"{env.ROOT} cannot be written: copy the course to a folder of your own"
    yield writable, "this folder", "can be written" if writable else need


def pins():
    "Package -> pinned version."
    lines = (env.ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.strip().split("==") for line in lines if "==" in line and line[0] != "#")


def environment():
    "The course's own environment, and what is in it."
    if not env.PYTHON.exists():
        yield None, "environment", "not made yet: `python course.py run` makes it"
        return
    current = env.STAMP.exists() and env.STAMP.read_text() == env.fingerprint()
    state = (
        "is up to date" if current else "is unfinished or out of date: the next command makes it"
    )
    yield current or None, "environment", f"{env.VENV.name} {state}"
    pinned = pins()
    for line in (in_env(VERSIONS.format(packages=PACKAGES)) or "").splitlines():
        name, found = line.rsplit(" ", 1)
        same = found.split("+")[0] == pinned.get(name, found).split("+")[0]
        found = "missing" if found == "-" else found
        yield same or None, name, found if same else f"{found}, pinned {pinned[name]}"
    gpu = in_env(GPU)
    yield bool(gpu) or None, "GPU", gpu or "none: every chapter runs without one"


def network():
    "Needed to install, and to fetch models from the Hub; never afterwards."
    packages = os.environ.get("PIP_INDEX_URL") or "https://pypi.org/simple/"
    hub = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    for what, url, why in (
        ("packages", packages, "needed once, to make the environment"),
        ("Hub", hub, "needed only for models of your own choice"),
    ):
        wrong = reachable(url)
        found = "reachable" if wrong is None else f"not reachable ({wrong}); {why}"
        yield wrong is None or None, f"network: {what}", found


def doctor(args):
    "One line per finding: `ok`, `--` (worth knowing) or `!!` (needed, and makes the status 1)."
    failed = False
    for part in (machine(), environment(), () if args.offline else network()):
        for state, what, found in part:
            failed |= state is False
            mark = "ok" if state else "--" if state is None else "!!"
            print(f"{mark}  {what:<18} {found}", flush=True)
    if failed:
        print("\nNot ready: see the lines with !!.")
    else:
        print("\nReady: `python course.py run` executes every chapter, `lab` opens them.")
    return int(failed)
