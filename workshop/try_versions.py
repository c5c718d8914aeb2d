"""`course.py versions`: the tests with the oldest or newest versions that the requirements allow.

    python course.py versions oldest                   # everything at its lower bound
    python course.py versions newest -k codebook       # further arguments go to pytest
    python course.py versions oldest --torch 2.13.0    # where only one build of torch is at hand

In an environment of its own (out/versions); the nightly workflow runs it. Left out are the tests of
what needs the course's own pinned environment (its command, the wheel, the site).
"""

import os, subprocess, sys

from . import env

PINNED = ("test_course.py", "test_wheel.py", "test_site.py")


def versions(args):
    "Make the environment, run the tests in it; pytest's exit status."
    env.ensure_env()  # it has uv
    folder, uv = env.ROOT / "out" / "versions" / args.which, [env.PYTHON, "-m", "uv"]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    made = [*uv, "venv", "-q", "--clear", "--python", sys.executable, folder]
    subprocess.run(made, check=True)
    resolution = "lowest-direct" if args.which == "oldest" else "highest"
    options = ["--compile-bytecode", *env.pip_find_links(), "--resolution", resolution]
    torch = [f"torch=={args.torch}"] if args.torch else []
    what = [*torch, "-e", f"{env.ROOT}[dev,docs]"]
    subprocess.run([*uv, "pip", "install", "-q", "--python", python, *options, *what], check=True)
    left_out = [arg for name in PINNED for arg in ("--ignore", f"tests/{name}")]
    pytest = [python, "-m", "pytest", *left_out, "-n", "2", "--dist", "worksteal", *args.rest]
    return subprocess.run(pytest, cwd=env.ROOT).returncode
