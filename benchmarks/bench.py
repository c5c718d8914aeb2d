"""The course beside its peers and beside bare floors: every contestant in a process (and a peer in an environment) of its own, in turn, round by round, in several processes; medians and ranges.

    python course.py bench [--only codebook sae ...] [--rounds 3] [--processes 3] [--quick] [--no-peers] [--device cuda]

Writes benchmarks/results/<device>.json. Peers live in out/bench/<peer>, never in the course's environment."""
import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile
from pathlib import Path
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import course  # noqa: E402

HERE, ENVS = Path(__file__).resolve().parent, ROOT / "out" / "bench"
RESULTS = HERE / "results"
# peer: what is installed, each with the course's torch; torchvision is kept out (its builds do not fit the CPU's torch)
PEERS = {"sae-lens": ["sae-lens==6.54.12"], "dictionary-learning": ["dictionary-learning==0.1.0"], "eai-sparsify": ["eai-sparsify==1.3.3"], "vector-quantize-pytorch": ["vector-quantize-pytorch==1.32.0"],
         "faiss": ["faiss-cpu==1.15.1", "numpy"], "authors": ["codebook-features==0.1.2", "transformers<4.40", "numpy<2", "pyarrow<20", "setuptools<80", "typeguard<4"]}


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


# glibc keeps what is freed: else it is luck, from process to process, whether each step asks the system for its pages again (up to a third of a short step)
KEEPS = {"MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_MMAP_THRESHOLD_": str(2**25)}


class Contestant:
    "A process that runs steps when asked."
    def __init__(self, python, settings, threads=1):
        self.settings, self.seconds, self.peak, self.said = settings, [], 0, ""
        self.errors = tempfile.TemporaryFile("w+")                  # not a pipe: what nobody reads would stop it
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} | KEEPS
        self.process = subprocess.Popen([str(python), str(HERE / "contestants.py"), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=env, cwd=HERE)

    def ready(self): self.alive = self._line() == "ready"

    def _line(self):
        line = self.process.stdout.readline().strip()
        if not line: self.process.wait(); self.errors.seek(0); self.said = self.errors.read().strip()[-400:]
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


def turns(contestants, rounds, least, threads):
    "Contestants of one setting in fresh processes, in turn, `rounds` times after one to warm up, each turn `least` seconds or a step."
    some = [Contestant(python, settings, threads) for python, settings in contestants]
    for c in some: c.ready()                                    # all import at once
    for c in some: c.run(1)
    steps = {c: max(1, round(least / max(c.seconds[0], 1e-6))) for c in some if c.alive}
    for c in some: c.seconds = []
    for _ in range(rounds):
        for c in some: c.run(min(steps.get(c, 1), 200))
    for c in some: c.end()
    return some


def race(contestants, rounds, processes=1, least=1., threads=1):
    "Rows with medians, ranges and ratios to the first, the floor. In several fresh processes one after the other, for one process is a tenth faster than the next without a cause."
    times, rows = [turns(contestants, rounds, least, threads) for _ in range(processes)], []
    for same in zip(*times):
        taken = [s for c in same for s in c.seconds]
        if not taken: rows.append(same[0].settings | dict(failed=same[0].said or "no answer")); continue
        rows.append(same[0].settings | dict(seconds=statistics.median(taken), low=min(taken), high=max(taken), peak_mb=max(c.peak for c in same)))
    floor = rows[0].get("seconds")
    for row in rows:
        if floor and "seconds" in row: row["x_floor"] = row["seconds"] / floor
    return rows


COURSE = sys.executable
KINDS = dict(l1="tied", topk="topk", batchtopk="batchtopk")          # of the peers' kinds, ours


def codebook_races(quick):
    "Every k and C, beside the floor, the authors' layer and (one code) a library of vector quantisers."
    for C in (1000, 10_000) if quick else (1000, 10_000, 50_000):
        for k in (1, 8, 100):
            size = dict(N=1024 if quick else 4096, d=512, C=C, k=k)
            yield [(COURSE, "codebook/floor", size), (COURSE, "codebook/course", size), ("authors", "codebook/authors", size)] + [("vector-quantize-pytorch", "codebook/vector-quantize-pytorch", size)] * (k == 1)


def lookup_races(quick):
    for C in (1000, 10_000) if quick else (1000, 10_000, 50_000):
        for k in (1, 8):
            size = dict(N=4096, d=512, C=C, k=k)
            yield [("faiss", "lookup/faiss", size), (COURSE, "lookup/course", size)]


def sae_races(quick):
    "One race for all kinds: everybody takes turns with everybody."
    size = dict(N=1024 if quick else 4096, d=512, n_feats=2048)
    k = dict(k=32)
    yield [(COURSE, "sae/floor", size), *((COURSE, "sae/course", size | dict(kind=kind) | (k if "topk" in kind else {})) for kind in ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")),
           *(("sae-lens", "sae/sae-lens", size | dict(kind=kind) | (k if kind != "l1" else {})) for kind in KINDS), ("sae-lens", "sae/sae-lens", size | dict(kind="topk", use_sparse_activations=False) | k),
           *(("dictionary-learning", "sae/dictionary-learning", size | dict(kind=kind) | (k if kind != "l1" else {})) for kind in KINDS),
           *(("eai-sparsify", "sae/eai-sparsify", size | dict(kind="topk", optimizer=o) | k) for o in ("signum", "adam"))]


def slope_races(quick):
    "The course's layer and two kinds of autoencoder, one size varied at a time; who runs against whom says nothing here, how seconds grow does."
    most = 1 if quick else 2
    base, sae = dict(N=2048, d=256, C=2000, k=1), dict(N=2048, d=256, n_feats=1024)
    for varied, sizes in dict(N=(1024, 2048, 4096, 8192), C=(1000, 2000, 4000, 8000), k=(1, 8, 32, 100), d=(128, 256, 512, 1024)).items(): yield [(COURSE, "codebook/course", base | {varied: size}) for size in sizes[:2 * most]]
    for kind in ("tied", "topk"):
        for varied, sizes in dict(N=(1024, 2048, 4096, 8192), d=(128, 256, 512, 1024), n_feats=(512, 1024, 2048, 4096)).items(): yield [(COURSE, "sae/course", sae | dict(kind=kind) | ({"k": 32} if kind == "topk" else {}) | {varied: size}) for size in sizes[:2 * most]]


RACES = dict(codebook=codebook_races, lookup=lookup_races, sae=sae_races, slopes=slope_races)


def inside(script, call="measure()"):
    "What a script of this folder measures, in a process of its own."
    code = f"import json, torch, {script}; torch.set_num_threads({{threads}}); print('@@' + json.dumps({script}.{call}))"
    def run(quick, threads):
        got = subprocess.run([COURSE, "-c", code.format(threads=threads)], cwd=HERE, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": str(threads)})
        if got.returncode: return [dict(who=script, failed=got.stderr.strip()[-400:])]
        return json.loads(got.stdout.split("@@")[-1])
    return run


def chapters(quick, threads):
    "Every chapter by `course.py run`, two at a time, as its log says."
    got = subprocess.run([COURSE, "tools/books.py", "run", *(["--only", "00"] if quick else [])], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})
    rows = [dict(who=stem, seconds=float(s), peak_mb=int(mb)) for stem, s, mb in re.findall(r"^(\d\d_\w+) +([\d.]+) s .* (\d+) MB", got.stdout, re.M)]
    whole = re.search(r"chapters passed in (\d+) s", got.stdout)
    return sorted(rows, key=lambda r: r["who"]) + ([dict(who="all, two at a time", seconds=float(whole[1]))] if whole else [dict(who="all", failed=got.stdout[-400:])])


INSIDE = dict(harvest=inside("harvest_speed"), patching=inside("patching_speed"), steering=inside("steering_speed"), index=inside("index_speed"), chapters=chapters)


def machine(threads):
    "What the figures were measured on; nothing that tells whose machine it is."
    import torch
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor()) if Path("/proc/cpuinfo").exists() else platform.processor()
    return dict(cpu=cpu, cores=os.cpu_count(), threads=threads, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None, python=platform.python_version(), torch=torch.__version__, peers={name: what[0] for name, what in PEERS.items()})


def show_rows(rows):
    for row in rows: tqdm.write("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items() if k not in ("device", "low", "high")))


def main():
    p = argparse.ArgumentParser(prog="course.py bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*RACES, *INSIDE]
    p.add_argument("--only", nargs="+", choices=every, default=every, metavar="PART", help=", ".join(every)); p.add_argument("--rounds", type=int, default=3, help="turns of each contestant in one process (default %(default)s)")
    p.add_argument("--processes", type=int, default=3, help="fresh processes of each contestant, one after the other (default %(default)s)"); p.add_argument("--threads", type=int, default=1)
    p.add_argument("--quick", action="store_true", help="small sizes, to see that it runs; writes nothing"); p.add_argument("--no-peers", action="store_true"); p.add_argument("--device", default="cpu"); p.add_argument("--note", default="", help="what a reader of the results must know, e.g. that the machine was not quiet")
    args = p.parse_args()
    os.environ["COURSE_DEVICE"] = args.device                    # for the parts that load models
    races = [(part, some) for part in args.only if part in RACES for some in RACES[part](args.quick)]
    peers = {} if args.no_peers else {name: environment(name) for name in dict.fromkeys(who for _, some in races for who, *_ in some if who != COURSE)}
    path = RESULTS / f"{args.device}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    def keep(part, rows):                                        # as soon as a part is done
        if args.quick: return
        found.update({part: rows, "machine": machine(args.threads) | {"note": args.note or found.get("machine", {}).get("note", "")}})
        RESULTS.mkdir(exist_ok=True)
        half = path.with_suffix(".part"); half.write_text(json.dumps(found, indent=1) + "\n"); half.replace(path)
    with tqdm(total=len(races), desc="bench", unit="race") as bar:
        for part in args.only:
            done = []
            for some in (some for name, some in races if name == part):
                settings = [(COURSE if who == COURSE else peers.get(who), dict(who=name, device=args.device, **size)) for who, name, size in some]
                done.append(race([s for s in settings if s[0]], *((2, 1) if args.quick else (args.rounds, args.processes)), threads=args.threads))
                show_rows(done[-1]); bar.update()
            if part in INSIDE: done = INSIDE[part](args.quick, args.threads); show_rows(done)
            keep(part, done)
    if not args.quick: print(f"{path.relative_to(ROOT)} written")


if __name__ == "__main__": main()
