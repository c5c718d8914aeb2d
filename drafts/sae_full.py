"""The long run of chapter 07: sparsity, width, length of training, sites and kinds of autoencoders, three seeds each -> claims/07.full.json; see `hours` there.

usage: python scripts/sae_full.py [--part 0/2]

Every finished row is kept, in claims/07.full.json at the end and in out/sae_rows/ meanwhile, so that a stopped run goes on where it was. Stacks of penalties are trained together: one job, several rows.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import torch
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.core import data_path
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import loss_recovered, measure, refit, train_sae

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "sae_rows", ROOT / "claims" / "07.full.json"
ALPHAS, SITES = [.2, .4, .8, 1.6, 3.2], ["resid.0", "resid.1", "resid.2", "mlp.0", "mlp.1", "mlp.2"]
BASE = dict(site="resid.1", ratio=2, kind="tied", alpha=ALPHAS, steps=2000)


def jobs():
    "name -> what differs from BASE."
    found = {"sweep": {}}
    for steps in (500, 8000): found[f"{steps} steps"] = dict(steps=steps)                                # the paper's Figs. 6 and 7
    for ratio in (.5, 1, 4, 8): found[f"R={ratio}"] = dict(ratio=ratio)                                  # Fig. 16
    for site in SITES:
        if site != BASE["site"]: found[site] = dict(site=site)
    for kind in ("untied", "gated"): found[kind] = dict(kind=kind)
    found["jumprelu"] = dict(kind="jumprelu", alpha=[.05, .1, .2, .4, .8])
    for kind in ("topk", "batchtopk", "matryoshka"):
        for k in (4, 8, 16, 32): found[f"{kind} k={k}"] = dict(kind=kind, k=k, alpha=None)
    found["alpha=0"] = dict(alpha=[0.])
    return found


def rows_of(name, differs, seed, states, model, valid):
    "Train one job and measure each of its autoencoders, as it is and (L1) with its decoder refitted."
    s, start = BASE | differs, time.process_time()
    x, y = states[s["site"]]
    trained = train_sae(x, round(s["ratio"] * x.shape[1]), s["kind"], alpha=s["alpha"], steps=s["steps"], seed=seed, **({"k": s["k"]} if "k" in s else {}))
    trained = trained if isinstance(trained, list) else [trained]
    seconds, found = time.process_time() - start, []
    for alpha, sae in zip(s["alpha"] or [None], trained):
        for refitted in (False, True):
            one = refit(sae, x[:200_000]) if refitted else sae
            found.append(dict(name=name, seed=seed, **s | dict(alpha=alpha), refitted=refitted, **{k: v for k, v in measure(one, y).items() if k != "density"}, **loss_recovered(model, valid, s["site"], one), train_cpu_seconds=seconds / len(trained)))
    return found


def write(rows):
    sha = hashlib.sha256((data_path("stories") / "model.safetensors").read_bytes()).hexdigest()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/sae_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["train_cpu_seconds"] for r in rows if not r["refitted"]) / 3600,
               inputs_sha256={"data/stories/model.safetensors": sha}, seeds="start of the autoencoder and order of the states", units="fvu: fraction of variance; clean, decoded, zero, mean: nats a token", rows=rows)
    CLAIMS.with_suffix(".part").write_text(json.dumps(out, indent=1) + "\n"); CLAIMS.with_suffix(".part").replace(CLAIMS)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    part, parts = map(int, p.parse_args().part.split("/"))
    torch.set_num_threads(1); ROWS.mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    text, valid = load_text(tok, "stories", n_tokens=400_000, length=256, split="train", seed=7), load_text(tok, "stories", n_tokens=25_000, length=256)
    with tempfile.TemporaryDirectory() as folder:
        stores = [harvest(model, t, SITES, Path(folder) / str(i)) for i, t in enumerate((text, valid))]
        states = {site: tuple(store.load(site) for store in stores) for site in SITES}
    for i, (name, seed) in enumerate(tqdm([(name, seed) for seed in range(3) for name in jobs()], desc="sae_full")):
        file = ROWS / f"{name.replace(' ', '_')}_{seed}.json"
        if i % parts != part or file.exists(): continue
        found = rows_of(name, jobs()[name], seed, states, model, valid)
        file.with_suffix(".part").write_text(json.dumps(found)); file.with_suffix(".part").replace(file)
    done = [ROWS / f"{name.replace(' ', '_')}_{seed}.json" for name in jobs() for seed in range(3)]
    if all(f.exists() for f in done): write([row for f in done for row in json.loads(f.read_text())])


if __name__ == "__main__": main()
