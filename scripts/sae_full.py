"""The long run of chapter 07: sparsity, width, length of training, sites and kinds of autoencoders, three seeds each -> claims/07.full.json; see `hours` there.

usage: python scripts/sae_full.py [--part 0/2]

Every finished row is kept, in claims/07.full.json at the end and in out/sae_rows/ meanwhile, so that a stopped run goes on where it was. Stacks of penalties are trained together: one job, several rows.
"""
import argparse, hashlib, json, math, platform, subprocess, tempfile, time
from pathlib import Path
import torch
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.formats import load_sae
from codebook_tutorial.metrics import loss_recovered, measure, replaced_loss
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import TopK, refit, train_sae, tune_decoder

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "sae_rows", ROOT / "claims" / "07.full.json"
ALPHAS, FEW, SITES = [.2, .4, .8, 1.6, 3.2], [.4, .8, 1.6], ["resid.0", "resid.1", "resid.2", "mlp.0", "mlp.1", "mlp.2"]
BASE = dict(site="resid.1", ratio=2, kind="tied", alpha=ALPHAS, steps=1500)           # as in the chapter, which trains the first job again


def jobs():
    "name -> what differs from BASE."
    found = {"sweep": {}}
    for steps in (300, 6000): found[f"{steps} steps"] = dict(steps=steps)                                # the paper's Figs. 6 and 7
    for ratio in (.5, 1, 4, 8): found[f"R={ratio}"] = dict(ratio=ratio, alpha=FEW)                                  # Fig. 16
    for site in SITES:
        if site != BASE["site"]: found[site] = dict(site=site, alpha=FEW)
    for kind in ("untied", "gated"): found[kind] = dict(kind=kind)
    found["jumprelu"] = dict(kind="jumprelu", alpha=[.05, .1, .2, .4, .8])
    for kind in ("topk", "batchtopk", "matryoshka"):
        for k in (4, 8, 16, 32): found[f"{kind} k={k}"] = dict(kind=kind, k=k, alpha=None)
    found["alpha=0"] = dict(alpha=[0.])
    found["scrambled"] = dict(site="scrambled")                                      # control: every coordinate shuffled over the tokens by itself
    for name, r in (("left alone", ()), ("begun anew late", (.5, .6, .7, .8))): found[f"R=4, {name}"] = dict(ratio=4, alpha=FEW, resample=r)        # dead features
    for name, alpha in (("no auxiliary", 0.), ("auxiliary", 1 / 32), ("auxiliary 1/8", 1 / 8)): found[f"R=4, topk k=4, {name}"] = dict(ratio=4, kind="topk", k=4, alpha=[alpha])
    return found


def rows_of(name, differs, seed, states, losses):
    "Train one job and measure each of its autoencoders, as it is and with its decoder refitted."
    s, start = BASE | differs, time.process_time()
    x, y = states[s["site"]]
    alpha = s["alpha"][0] if s["alpha"] and "k" in s else s["alpha"]                # the TopK kinds take one
    trained = train_sae(x, round(s["ratio"] * x.shape[1]), s["kind"], alpha=alpha, steps=s["steps"], seed=seed, **{key: s[key] for key in ("k", "resample") if key in s})
    trained = trained if isinstance(trained, list) else [trained]
    seconds, found = time.process_time() - start, []
    for alpha, sae in zip(s["alpha"] or [None], trained):
        for refitted in (False, True):
            one = refit(sae, x[:200_000]) if refitted else sae
            found.append(dict(name=name, seed=seed, **s | dict(alpha=alpha), refitted=refitted, n_feats=len(one.directions), **{k: v for k, v in measure(one, y).items() if k != "density"}, **(losses(s["site"], one) if s["site"] in SITES else {}), train_cpu_seconds=seconds / len(trained)))
    return found


def losses_of(model, text):
    "fn(site, dictionary) -> what loss_recovered gives; a site's losses without the dictionary are counted once."
    known = {}
    def losses(site, dictionary):
        if site not in known: known[site] = loss_recovered(model, text, site, dictionary)
        k = known[site]
        nats = replaced_loss(model, text, site, lambda x: dictionary.decode(dictionary.encode(x)))
        return dict(clean=k["clean"], decoded=nats, zero=k["zero"], mean=k["mean"], recovered_zero=(k["zero"] - nats) / (k["zero"] - k["clean"]), recovered_mean=(k["mean"] - nats) / (k["mean"] - k["clean"]), perplexity_ratio=math.exp(nats - k["clean"]))
    return losses


def scrambled(x): return torch.stack([column[torch.randperm(len(column), generator=seeded(i))] for i, column in enumerate(x.T)], 1)


def control(model, tok, x, y, test):
    "The perplexity that a decoder's training brings by itself: as many random directions as the shipped autoencoder has features, as many active, refitted and tuned as long and on the same text."
    shipped = load_sae(data_path("sae/tied"))
    told, mean = json.loads((data_path("sae/tied") / "sae.json").read_text())["meta"], x.mean(0)
    knows_nothing = TopK(x.shape[1], len(shipped.directions), k=round(told["on_validation_text"]["tuned"]["l0"]), generator=seeded(9)).eval()
    knows_nothing.fold_normalisation(mean, 1.)
    text = load_text(tok, n_tokens=1_000_000, length=256, split="train", seed=11)
    steps = int(told["command"].split("--tune ")[1].split()[0])
    tuned = tune_decoder(refit(knows_nothing, x[:200_000]), model, text, "resid.1", steps=steps)
    clean = replaced_loss(model, test, "resid.1", lambda x: x)
    return dict(features=len(tuned.directions), l0=knows_nothing.k, steps=steps, fvu=measure(tuned, y)["fvu"], perplexity_ratio=math.exp(replaced_loss(model, test, "resid.1", lambda x: tuned.decode(tuned.encode(x))) - clean))


def overlaps(x):
    "Do seeds find the same features? For every feature of one seed the largest cosine to one of another, alpha 0.8 or k = 8, by length of training."
    found = []
    for kind, settings in (("tied", dict(alpha=.8)), ("topk", dict(k=8))):
        for steps in (300, 1500, 6000):
            D = [torch.nn.functional.normalize(train_sae(x, 2 * x.shape[1], kind, steps=steps, seed=seed, **settings).directions.detach(), dim=-1) for seed in range(3)]
            for a, b in ((0, 1), (1, 2), (2, 0)):
                best = (D[a] @ D[b].T).amax(-1)
                found.append(dict(kind=kind, steps=steps, seeds=[a, b], mean=best.mean().item(), above=(best > .9).float().mean().item()))
    return found


def write(rows, overlap, random):
    sha = hashlib.sha256((data_path("stories") / "model.safetensors").read_bytes()).hexdigest()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/sae_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["train_cpu_seconds"] for r in rows if not r["refitted"]) / 3600,
               inputs_sha256={"data/stories/model.safetensors": sha}, seeds="start of the autoencoder and order of the states", units="fvu: fraction of variance; clean, decoded, zero, mean: nats a token", overlaps=overlap, shipped_control=random, rows=rows)
    CLAIMS.with_suffix(".part").write_text(json.dumps(out, indent=1) + "\n"); CLAIMS.with_suffix(".part").replace(CLAIMS)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    part, parts = map(int, p.parse_args().part.split("/"))
    torch.set_num_threads(1); ROWS.mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    text, valid = load_text(tok, "stories", n_tokens=300_000, length=256, split="train", seed=7), load_text(tok, "stories", n_tokens=25_000, length=256)
    with tempfile.TemporaryDirectory() as folder:
        stores = [harvest(model, t, SITES, Path(folder) / str(i)) for i, t in enumerate((text, valid))]
        states = {site: tuple(store.load(site) for store in stores) for site in SITES}
    states["scrambled"] = tuple(scrambled(x) for x in states["resid.1"])
    losses = losses_of(model, valid[:50])
    for i, (name, seed) in enumerate(tqdm([(name, seed) for seed in range(3) for name in jobs()], desc="sae_full")):
        file = ROWS / f"{name.replace(' ', '_').replace('/', '-')}_{seed}.json"
        if i % parts != part or file.exists(): continue
        found = rows_of(name, jobs()[name], seed, states, losses)
        file.with_suffix(".part").write_text(json.dumps(found)); file.with_suffix(".part").replace(file)
    done = [ROWS / f"{name.replace(' ', '_').replace('/', '-')}_{seed}.json" for name in jobs() for seed in range(3)]
    if not all(f.exists() for f in done): return
    for file, made in ((ROWS / "overlaps", lambda: overlaps(states["resid.1"][0])), (ROWS / "control", lambda: control(model, tok, *states["resid.1"], valid[:50]))):
        if not file.exists(): file.write_text(json.dumps(made()))
    write([row for f in done for row in json.loads(f.read_text())], *(json.loads((ROWS / name).read_text()) for name in ("overlaps", "control")))


if __name__ == "__main__": main()
