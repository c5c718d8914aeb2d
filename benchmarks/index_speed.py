"""How long the code browser's steps take, and how much memory building holds: synthetic features on stories told over and over.

    python benchmarks/index_speed.py build 1000000 4 /tmp/ix1m        # tokens, codes a token at each of 12 sites
    python benchmarks/index_speed.py query /tmp/ix1m
    python benchmarks/index_speed.py neurons                          # 526 concepts, 1152 units, 50,000 tokens"""
import contextlib, io, re, shutil, statistics, sys, tempfile, threading, time
from pathlib import Path
import numpy as np, torch
from codebook_tutorial import codes, index as store, units
from codebook_tutorial.concepts import story_text
from codebook_tutorial.models import Text
from codebook_tutorial.stories import make_tokenizer

torch.set_num_threads(1)
SITES, N_FEATS = {f"{kind}.{i}": 4096 for kind in ("heads", "mlp") for i in range(6)}, 4096

def watch():
    "Highest memory of this process from now on, in MB: all of it, and what does not belong to files."
    high, stop = dict(rss=0, anon=0), threading.Event()
    def look():
        while not stop.wait(.02):
            now = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(("VmRSS", "RssAnon"))}
            high.update(rss=max(high["rss"], now["VmRSS"]), anon=max(high["anon"], now["RssAnon"]))
    threading.Thread(target=look, daemon=True).start()
    return high, stop

def stream(text, n_tokens, k, rng):
    "The same stories again and again; a token's codes are its word's in half of the cases, else drawn, few of them often."
    done, words = 0, rng.integers(N_FEATS, size=(2500, k))
    while done < n_tokens:
        rows = text[torch.from_numpy(rng.permutation(len(text))[:64])]
        drawn = (N_FEATS * rng.random((12, *rows.ids.shape, k)) ** 3).astype(np.int64)
        own = words[rows.ids.numpy()]
        yield rows, {site: ((f := torch.from_numpy(np.where(rng.random(own.shape) < .5, (own + 7 * i) % N_FEATS, drawn[i]))), torch.ones(f.shape)) for i, site in enumerate(SITES)}
        done += rows.n_tokens

def build(n_tokens, k, folder):
    rng, (text, _) = np.random.default_rng(0), story_text(60_000)
    part = Path(folder); shutil.rmtree(part, ignore_errors=True); part.mkdir()
    time.sleep(.1); high, stop = watch(); time.sleep(.1); begin = dict(high)
    t, drawn = time.time(), 0.
    def timed():
        nonlocal drawn
        it = iter(stream(text, n_tokens, k, rng))
        while True:
            t = time.time()
            try: item = next(it)
            except StopIteration: return
            drawn += time.time() - t
            yield item
    tok = make_tokenizer(); tok.name_or_path = "stories"
    info = dict(format=1, model="synthetic", tokenizer=store._tokenizer_mark(tok), text=dict(length=256, bos=text.bos, pad=text.pad),
                sites={s: dict(kind="Codebook", n_feats=n, groups=1, config={}) for s, n in SITES.items()})
    seen = store._write(part, timed(), SITES)
    wrote = time.time() - t
    store._finish(part, info, *seen)
    stop.set()
    size = sum(f.stat().st_size for f in part.iterdir()) / 1e6
    print(f"build {n_tokens:,} x {len(SITES)} sites x {k}: {time.time() - t - drawn:.1f} s (first pass {wrote - drawn:.1f}, sorting {time.time() - t - wrote:.1f}; drawing took {drawn:.1f} more), "
          f"{size:,.0f} MB on disk; memory before {begin['rss']:.0f}, peak {high['rss']:.0f} MB, without mapped files {begin['anon']:.0f} -> {high['anon']:.0f}")

def query(folder):
    t = time.time(); index = store.open_index(folder, make_tokenizer()); print(f"open {time.time() - t:.2f} s: {index}")
    for pattern in (r"\b(dragon)s?\b", r"\b(the)\b", r"(\w+)", r"\. “(\w+)", lambda words: ["a" in w for w in words]):
        times = []
        for _ in range(3): t = time.time(); mask = index.mark(pattern); m = time.time() - t; found = index.search(pattern); times.append((time.time() - t - m, m))
        print(f"{pattern if isinstance(pattern, str) else 'a function'}: {int(mask.sum()):,} tokens marked, {len(found)} features found; search {min(times)[0]:.2f} s, of which marking {min(m for _, m in times):.2f} s")
    t = time.time(); index.best(r"\b(dragon)s?\b"); print(f"best {time.time() - t:.2f} s")
    f = index.active("mlp.1").argmax()
    t = time.time(); index.contexts("mlp.1", int(f)); print(f"contexts of a feature active at {index.active('mlp.1')[f]:,} tokens: {time.time() - t:.3f} s")
    t = time.time(); codes.shared(index, "mlp.0", "mlp.1", rows=4000); print(f"shared, 4000 rows: {time.time() - t:.2f} s")

def neurons():
    from codebook_tutorial.codebook import add_codebooks
    from codebook_tutorial.concepts import atoms
    from codebook_tutorial.models import load_lm
    (model, tok), (text, facts) = load_lm("stories"), story_text(60_000)
    text, truth = text[:242], atoms(facts[:242])
    t = time.time(); acts = units.neuron_acts(model, text); print(f"neuron_acts: {list(acts.shape)} in {time.time() - t:.1f} s")
    truth = truth[text.mask].numpy()
    t = time.time(); units.unit_scores(acts, truth, np.full(truth.shape[1], .3), len(truth) // 2); print(f"unit_scores: {truth.shape[1]} concepts, {2 * acts.shape[1]} signed units in {time.time() - t:.1f} s")
    book = add_codebooks(model, ["mlp.*", "heads.*"], n_codes=512, k=2).eval().init_from_data(text[:40].ids)
    index = store.build_index(book, tok, text, "/tmp/bench_neurons", overwrite=True)
    t = time.time(); units.against_neurons(index, acts, atoms(facts[:242])); print(f"against_neurons, 3 x 512 and 12 x 512 codes: {time.time() - t:.1f} s")
    shutil.rmtree("/tmp/bench_neurons")

def measure(tokens=200_000, k=4):
    "Rows: building an index of synthetic features and asking it, in seconds."
    folder, rows = tempfile.mkdtemp(), []
    said = io.StringIO()
    with contextlib.redirect_stdout(said): build(tokens, k, folder)
    build_s, peak = re.search(rf"x {k}: ([\d.]+) s", said.getvalue())[1], re.search(r"peak (\d+) MB", said.getvalue())[1]
    rows.append(dict(who=f"build, {tokens:,} tokens x {len(SITES)} sites x {k}", seconds=float(build_s), peak_mb=int(peak), tokens_per_second=tokens / float(build_s)))
    t = time.time(); index = store.open_index(folder, make_tokenizer()); rows.append(dict(who="open", seconds=time.time() - t))
    for pattern in (r"\b(dragon)s?\b", r"\b(the)\b", r"(\w+)"):
        times = []
        for _ in range(5): t = time.time(); index.search(pattern); times.append(time.time() - t)
        rows.append(dict(who=f"search {pattern}", seconds=statistics.median(times), low=min(times), high=max(times)))
    shutil.rmtree(folder)
    return rows


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    build(int(rest[0]), int(rest[1]), rest[2]) if what == "build" else query(*rest) if what == "query" else neurons()
