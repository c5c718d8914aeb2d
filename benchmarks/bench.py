"""The course beside its peers and beside bare floors.

Every contestant runs in a process (a peer in an environment) of its own, in turn, round by round,
in several processes; medians and ranges. Writes benchmarks/results/<device>.json. Peers live in
out/bench/<peer>, never in the course's environment.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from workshop.env import pip_find_links  # noqa: E402
from races import COURSE, RACES  # noqa: E402

HERE, ENVS = ROOT / "benchmarks", ROOT / "out" / "bench"
# peer -> what is installed beside the course's torch
PEERS = {
    "sae-lens": ["sae-lens==6.54.12"],
    "dictionary-learning": ["dictionary-learning==0.1.0"],
    "eai-sparsify": ["eai-sparsify==1.3.3"],
    "vector-quantize-pytorch": ["vector-quantize-pytorch==1.32.0"],
    "faiss": ["faiss-cpu==1.15.1", "numpy"],
    "authors": [
        "codebook-features==0.1.2",
        "transformers<4.40",
        "numpy<2",
        "pyarrow<20",
        "setuptools<80",
        "typeguard<4",
    ],
}
PARTS = ("harvest", "patching", "steering", "index", "neurons", "autointerp")  # of parts.py
# glibc keeps what is freed: else it is luck, from process to process, whether each step asks the
# system for its pages again (up to a third of a short step)
KEEPS = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


def surroundings(threads):
    "Environment variables of a process that is timed."
    n = str(threads)
    return os.environ | dict(OMP_NUM_THREADS=n, MKL_NUM_THREADS=n, TQDM_DISABLE="1")


def environment(peer):
    "The Python of a peer's environment, made if it is missing; None (and why) if that fails."
    folder, what = ENVS / peer, "\n".join(PEERS[peer])
    python, stamp = folder / "bin" / "python", folder / ".made"
    if stamp.exists() and stamp.read_text() == what:
        return python
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    torch = next(line for line in pins if line.startswith("torch=="))
    ENVS.mkdir(parents=True, exist_ok=True)
    without = ENVS / "without.txt"  # torchvision's builds do not fit the CPU's torch
    without.write_text("torchvision; sys_platform == 'never'\n")
    uv, options = [sys.executable, "-m", "uv"], [*pip_find_links(), "--override", without]
    for command in (
        [*uv, "venv", "-q", "--clear", "--python", sys.executable, folder],
        [*uv, "pip", "install", "-q", "--python", python, *options, torch, *PEERS[peer]],
    ):
        got = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if got.returncode:
            why = got.stderr.strip()[-600:]
            print(f"{peer}: no environment, so it is left out: {why}", flush=True)
            return None
    stamp.write_text(what)
    return python


class Contestant:
    "A process that runs steps when asked."

    def __init__(self, python, settings, threads=1):
        self.settings, self.seconds, self.peak, self.said = settings, [], 0, ""
        self.errors = tempfile.TemporaryFile("w+")  # not a pipe: one that is not read would stop it
        self.process = subprocess.Popen(
            [str(python), str(HERE / "contestants.py"), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=surroundings(threads) | KEEPS,
            cwd=HERE,
        )

    def ready(self):
        "Wait until it has imported and prepared everything."
        self.alive = self._line() == "ready"

    def _line(self):
        line = self.process.stdout.readline().strip()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            self.said = self.errors.read().strip()[-400:]
        return line

    def run(self, n):
        "n steps; notes the seconds of one."
        if not self.alive:
            return
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        line = self._line()
        self.alive = bool(line)
        if line:
            got = json.loads(line)
            self.seconds.append(got["seconds"])
            self.peak = got["peak_mb"]

    def end(self):
        "Let it go."
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def turns(contestants, rounds, least, *, threads):
    "Fresh processes in turn, after one step to warm up; a turn takes `least` seconds or one step."
    some = [Contestant(python, settings, threads) for python, settings in contestants]
    for c in some:
        c.ready()  # all import at once
    for c in some:
        c.run(1)
    steps = {c: max(1, round(least / max(c.seconds[0], 1e-6))) for c in some if c.alive}
    for c in some:
        c.seconds = []
    for _ in range(rounds):
        for c in some:
            c.run(min(steps.get(c, 1), 200))
    for c in some:
        c.end()
    return some


def race(contestants, rounds, processes=1, *, least=1.0, threads=1):
    "Rows with medians, ranges and ratios to the first, the floor; several processes in succession."
    # one process is a tenth faster than the next for no visible cause
    times = [turns(contestants, rounds, least, threads=threads) for _ in range(processes)]
    rows = []
    for same in zip(*times):
        taken, row = [s for c in same for s in c.seconds], dict(same[0].settings)
        if not taken:
            rows.append(row | dict(failed=same[0].said or "no answer"))
            continue
        row |= dict(seconds=statistics.median(taken), low=min(taken), high=max(taken))
        rows.append(row | dict(peak_mb=max(c.peak for c in same)))
    floor = rows[0].get("seconds")
    for row in rows:
        if floor and "seconds" in row:
            row["x_floor"] = row["seconds"] / floor
    return rows


def part(name, quick, threads):
    "Rows of one part of the course, measured in a process of its own."
    command = [sys.executable, "parts.py", name, *(["--quick"] if quick else [])]
    env = surroundings(threads)
    got = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env=env)
    if got.returncode:
        return [dict(who=name, failed=got.stderr.strip()[-400:])]
    return [json.loads(line[2:]) for line in got.stdout.splitlines() if line.startswith("@@")]


def chapters(quick):
    "Every chapter by `course.py run`, two at a time, as its log says."
    command = [sys.executable, "course.py", "run", *(["--only", "00"] if quick else [])]
    env = os.environ | {"TQDM_DISABLE": "1"}
    got = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    found = re.findall(r"^(\d\d_\w+) +([\d.]+) s .* (\d+) MB", got.stdout, re.M)
    rows = [dict(who=stem, seconds=float(s), peak_mb=int(mb)) for stem, s, mb in found]
    rows.sort(key=lambda row: row["who"])
    whole = re.search(r"chapters passed in (\d+) s", got.stdout)
    if not whole:
        return rows + [dict(who="all", failed=got.stdout[-400:])]
    return rows + [dict(who="all, two at a time", seconds=float(whole[1]))]


def machine(threads):
    "What the figures were measured on; nothing that tells whose machine it is."
    import torch

    cpu, told = platform.processor(), Path("/proc/cpuinfo")
    if told.exists():
        names = [s for s in told.read_text().splitlines() if s.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        cpu=cpu,
        cores=os.cpu_count(),
        threads=threads,
        gpu=gpu,
        python=platform.python_version(),
        torch=torch.__version__,
        peers={name: what[0] for name, what in PEERS.items()},
    )


def show_rows(rows):
    "One line per row."
    for row in rows:
        told = {k: v for k, v in row.items() if k not in ("device", "low", "high")}
        words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in told.items()]
        tqdm.write("  ".join(words))


def options():
    "What the command line asks for."
    form, every = argparse.RawDescriptionHelpFormatter, [*RACES, *PARTS, "chapters"]
    p = argparse.ArgumentParser(prog="course.py bench", description=__doc__, formatter_class=form)
    add, told = p.add_argument, ", ".join(every)
    add("--only", nargs="+", choices=every, default=every, metavar="PART", help=told)
    add("--rounds", type=int, default=3, help="turns of each contestant in one process (3)")
    add("--processes", type=int, default=3, help="processes of each, one after the other (3)")
    add("--threads", type=int, default=1)
    add("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing")
    add("--no-peers", action="store_true")
    add("--device", default="cpu")
    add("--note", default="", help="what a reader must know, e.g. that the machine was not quiet")
    return p.parse_args()


def run_races(name, args, pythons):
    "Rows of every race of this name."
    rounds = (2, 1) if args.quick else (args.rounds, args.processes)
    for entries in tqdm(list(RACES[name](args.quick)), desc=name, unit="race"):
        contestants = [
            (pythons[entry.where], dict(who=entry.who, device=args.device, **entry.size))
            for entry in entries
            if pythons.get(entry.where)
        ]
        rows = race(contestants, *rounds, threads=args.threads)
        show_rows(rows)
        yield rows


def keep(path, name, rows, *, args):
    "Write a part's rows as soon as they are there."
    found = json.loads(path.read_text()) if path.exists() else {}
    note = args.note or found.get("machine", {}).get("note", "")
    found.update({name: rows, "machine": machine(args.threads) | {"note": note}})
    path.parent.mkdir(exist_ok=True)
    half = path.with_suffix(".part")
    half.write_text(json.dumps(found, indent=1) + "\n")
    half.replace(path)


def main():
    "Run what is asked for."
    args = options()
    os.environ["COURSE_DEVICE"] = args.device  # for the parts that load models
    path = HERE / "results" / f"{args.device}.json"
    races = [one for name in args.only if name in RACES for one in RACES[name](args.quick)]
    peers = {entry.where for one in races for entry in one} - {COURSE}
    pythons = {COURSE: sys.executable}
    pythons |= {} if args.no_peers else {peer: environment(peer) for peer in sorted(peers)}
    for name in args.only:
        if name in RACES:
            rows = list(run_races(name, args, pythons))
        else:
            rows = (
                chapters(args.quick) if name == "chapters" else part(name, args.quick, args.threads)
            )
            show_rows(rows)
        if not args.quick:
            keep(path, name, rows, args=args)
    if not args.quick:
        print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
