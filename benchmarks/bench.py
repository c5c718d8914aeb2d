"""The course beside its peers and beside bare floors: every contestant in a process (and a peer in an environment) of its own, in turn, round by round; medians and ranges.

    python course.py bench [--only codebook sae ...] [--rounds 5] [--quick] [--no-peers] [--device cuda]

Writes benchmarks/results/<device>.json; `course.py docs` makes the page of it. Peers live in out/bench/<peer>, never in the course's environment."""
import argparse, json, os, platform, statistics, subprocess, sys
from pathlib import Path
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import course  # noqa: E402

HERE, ENVS = Path(__file__).resolve().parent, ROOT / "out" / "bench"
RESULTS = HERE / "results"
# peer: what is installed, each with the course's torch; torchvision is kept out (its builds do not fit the CPU's torch)
PEERS = {"sae-lens": ["sae-lens==6.54.12"], "dictionary-learning": ["dictionary-learning==0.1.0"], "eai-sparsify": ["eai-sparsify==1.3.3"], "vector-quantize-pytorch": ["vector-quantize-pytorch==1.32.0"],
         "faiss": ["faiss-cpu==1.15.1", "numpy"], "authors": ["codebook-features==0.1.2", "transformers<4.40", "numpy<2", "setuptools<80"]}


def environment(peer):
    "The Python of a peer's environment, made when it is missing; None, with the reason told, when it cannot be made."
    folder, stamp = ENVS / peer, ENVS / peer / ".made"
    python, what = folder / "bin" / "python", "\n".join(PEERS[peer])
    if stamp.exists() and stamp.read_text() == what: return python
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    ENVS.mkdir(parents=True, exist_ok=True)
    (ENVS / "without.txt").write_text("torchvision; sys_platform == 'never'\n")
    uv = [sys.executable, "-m", "uv"]
    for command in ([*uv, "venv", "-q", "--clear", "--python", sys.executable, folder], [*uv, "pip", "install", "-q", "--python", python, *course.pip_find_links(), "--override", ENVS / "without.txt", torch, *PEERS[peer]]):
        got = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if got.returncode: print(f"{peer}: no environment, so it is left out: {got.stderr.strip()[-600:]}", flush=True); return None
    stamp.write_text(what)
    return python


class Contestant:
    "A process that runs steps when asked."
    def __init__(self, python, settings, threads=1):
        self.settings, self.seconds, self.peak, self.said = settings, [], 0, ""
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen([str(python), str(HERE / "contestants.py"), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=HERE)
        self.alive = self._line() == "ready"

    def _line(self):
        line = self.process.stdout.readline().strip()
        if not line: self.said = self.process.stderr.read().strip()[-400:]
        return line

    def run(self, n):
        if not self.alive: return
        self.process.stdin.write(f"{n}\n"); self.process.stdin.flush()
        line = self._line()
        self.alive = bool(line)
        if line: got = json.loads(line); self.seconds.append(got["seconds"]); self.peak = got["peak_mb"]

    def end(self):
        self.process.stdin.close()
        try: self.process.wait(20)
        except subprocess.TimeoutExpired: self.process.kill(); self.process.wait()


def race(contestants, rounds, least=.4, threads=1):
    "All contestants of one setting, in turn, `rounds` times after one to warm up; rows with medians, ranges and ratios to the first, the floor."
    some = [Contestant(python, settings, threads) for python, settings in contestants]
    for c in some: c.run(1)
    slowest = {c: max(1, round(least / max(c.seconds[0], 1e-6))) for c in some if c.alive}
    for c in some: c.seconds = []
    for _ in range(rounds):
        for c in some: c.run(min(slowest.get(c, 1), 200))
    rows = []
    for c in some:
        c.end()
        if not c.seconds: rows.append(c.settings | dict(failed=c.said or "no answer")); continue
        rows.append(c.settings | dict(seconds=statistics.median(c.seconds), low=min(c.seconds), high=max(c.seconds), peak_mb=c.peak))
    floor = rows[0].get("seconds")
    for row in rows:
        if floor and "seconds" in row: row["x_floor"] = row["seconds"] / floor
    return rows
