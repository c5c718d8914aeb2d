"""The tests with the oldest versions that the requirements allow, or with the newest there are, in an environment of its own (out/versions).

    python scripts/try_versions.py oldest                          # everything at its lower bound
    python scripts/try_versions.py newest -k codebook              # further arguments go to pytest
    python scripts/try_versions.py oldest --torch 2.13.0           # where only one build of torch is at hand

Run by the nightly workflow. What needs the course's own pinned environment (its command, the wheel, the site) is left out."""
import argparse, os, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import course  # noqa: E402

PINNED = ("test_course.py", "test_wheel.py", "test_site.py")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("which", choices=["oldest", "newest"]); p.add_argument("--torch", help="this version of torch, whatever the bounds say")
    args, rest = p.parse_known_args()
    course.ensure_env()                                        # it has uv
    folder, uv = ROOT / "out" / "versions" / args.which, [course.PYTHON, "-m", "uv"]
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([*uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
    subprocess.run([*uv, "pip", "install", "-q", "--python", python, "--compile-bytecode", *course.pip_find_links(), "--resolution", "lowest-direct" if args.which == "oldest" else "highest",
                    *([f"torch=={args.torch}"] if args.torch else []), "-e", f"{ROOT}[dev,docs]"], check=True)
    left_out = [arg for name in PINNED for arg in ("--ignore", f"tests/{name}")]
    return subprocess.run([python, "-m", "pytest", *left_out, "-n", "2", "--dist", "worksteal", *rest], cwd=ROOT).returncode


if __name__ == "__main__": sys.exit(main())
