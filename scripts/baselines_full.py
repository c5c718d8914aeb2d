"""The long run of chapter 08: every method on known concepts and on error at equal sparsity, three seeds -> claims/08.full.json; see `hours` there.

usage: python scripts/baselines_full.py [--part 0/2]

Every finished (method, seed) is kept in out/baseline_rows/, so that a stopped run goes on where it was. L1 kinds are trained as a stack of penalties, and of these the one is scored whose L0 on the training states is nearest to that of the shipped autoencoder.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import numpy as np, torch
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.baselines import Affine, concept_scores, ica, keep_largest, pca, pursue
from codebook_tutorial.codebook import Codebook
from codebook_tutorial.concepts import atoms, story_text
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import fvu, random_directions
from codebook_tutorial.formats import load_sae
from codebook_tutorial.metrics import measure
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "baseline_rows", ROOT / "claims" / "08.full.json"
SITE, HIDDEN, STEPS = "resid.1", "neurons.1", 2000
PENALTIES = dict(tied=(.75, .88, 1.), untied=(.55, .75, 1.), gated=(1.3, 1.6, 2.), jumprelu=(.12, .15, .2))
SLUGS = [f"sae_{k}" for k in ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "alpha0")] + ["codebook", "kmeans", "ica", "ica_relu", "pca", "pca_relu", "basis", "neurons", "random"]
WITHOUT_SEED = ("pca", "pca_relu", "basis", "neurons")


def build(slug, seed, x, n_feats, k):
    "A method's dictionary and what its penalty was, where it has one."
    d, kind, few = x.shape[1], slug.removeprefix("sae_"), x[torch.randperm(len(x), generator=seeded(seed))[:40_000]]
    if kind in PENALTIES:
        trained = train_sae(x, n_feats, kind, alpha=list(PENALTIES[kind]), steps=STEPS, seed=seed)
        alpha, best = min(zip(PENALTIES[kind], trained), key=lambda pair: abs(measure(pair[1], x[:50_000])["l0"] - k))
        return refit(best, x[:200_000]) if kind == "tied" else best, alpha
    if kind == "alpha0": return train_sae(x, n_feats, "tied", alpha=0., steps=STEPS, seed=seed, resample=()), 0.
    if slug.startswith("sae_"): return train_sae(x, n_feats, kind, k=k, steps=STEPS, seed=seed), None
    if slug == "codebook": return Codebook(d, n_feats, k, select="residual").init_from(few, generator=seeded(seed)).eval(), None
    if slug == "kmeans": return Codebook(d, n_feats, 1, select="euclidean").init_from(few, generator=seeded(seed)).eval(), None
    if slug.startswith("ica"): return ica(x, seed=seed).at(relu=slug == "ica_relu"), None
    if slug.startswith("pca"): return pca(x).at(relu=slug == "pca_relu"), None
    return Affine(torch.eye(d) if slug == "basis" else random_directions(n_feats, d, seed=seed + 100).directions, mean=x.mean(0)), None


def judged(f, truth):
    s = concept_scores(f, truth)
    return dict(f1=float(np.nanmean(s["f1"])), auroc=float(np.nanmean(s["auroc"])), chosen_f1=float(np.nanmean(s["chosen_f1"])), concepts=int((~np.isnan(s["f1"])).sum()), skipped=int(s["skipped"]))


def row_of(slug, seed, x, y, hidden, truth, n_feats, k, chance):
    start, mean = time.process_time(), x.mean(0)
    if slug == "neurons": row, f, n = dict(l0=None, fvu=None, fvu_own=None, fvu_pursuit=None, alpha=None), hidden.numpy(), hidden.shape[1]
    else:
        one, alpha = build(slug, seed, x, n_feats, k)
        with torch.no_grad(): f, n, found = one.encode(y), len(one.directions), measure(one, y)
        D = torch.nn.functional.normalize(one.directions.detach(), dim=-1)
        row = dict(l0=found["l0"], fvu=found["fvu"], fvu_own=fvu(y, one.decode(keep_largest(f, min(k, n))).detach()), fvu_pursuit=fvu(y - mean, pursue(y - mean, D, k) @ D), alpha=alpha)
        f = f.numpy()
    return dict(method=slug, seed=seed, n_feats=n, **row, **judged(f, truth), **{f"{key}_random": v for key, v in chance(n, seed).items() if key in ("f1", "auroc")}, cpu_seconds=time.process_time() - start)


def write(rows, k):
    sha = {f"data/{name}": hashlib.sha256((data_path(name.split('/')[0]) / name.partition('/')[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors", "sae/tied/sae_state.safetensors")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/baselines_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows) / 3600, inputs_sha256=sha, k=k, steps=STEPS,
               penalties=PENALTIES, seeds="start and order of an autoencoder, rows seen by ICA and k-means, random directions; methods without one stand once", rows=rows)
    CLAIMS.with_suffix(".part").write_text(json.dumps(out, indent=1) + "\n"); CLAIMS.with_suffix(".part").replace(CLAIMS)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    part, parts = map(int, p.parse_args().part.split("/"))
    torch.set_num_threads(1); ROWS.mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    text, (test, facts) = load_text(tok, n_tokens=300_000, length=256, split="train", seed=7), story_text(40_000, split="test")
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, SITE, Path(folder) / "train", verbose=False).load(SITE)
        store = harvest(model, test, [SITE, HIDDEN], Path(folder) / "test", verbose=False)
        y, hidden, truth = store.load(SITE), store.load(HIDDEN), atoms(facts)[test.mask].numpy()
    shipped, known = load_sae(data_path("sae/tied")), {}
    n_feats, k = len(shipped.directions), round(measure(shipped, y)["l0"])
    def chance(n, seed):
        if (n, seed) not in known: known[n, seed] = judged(random_directions(n, x.shape[1], seed=seed + 10).encode(y).numpy(), truth)
        return known[n, seed]
    work = [(slug, seed) for seed in range(3) for slug in SLUGS if seed == 0 or slug not in WITHOUT_SEED]
    for i, (slug, seed) in enumerate(tqdm(work, desc="baselines_full")):
        file = ROWS / f"{slug}_{seed}.json"
        if i % parts != part or file.exists(): continue
        file.with_suffix(".part").write_text(json.dumps(row_of(slug, seed, x, y, hidden, truth, n_feats, k, chance))); file.with_suffix(".part").replace(file)
    done = [ROWS / f"{slug}_{seed}.json" for slug, seed in work]
    if all(f.exists() for f in done): write([json.loads(f.read_text()) for f in done], k)


if __name__ == "__main__": main()
