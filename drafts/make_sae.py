"""Train the autoencoder that the course ships, the paper's tied form with a refitted decoder -> data/sae/tied: some minutes on one CPU core.

usage: python scripts/make_sae.py [--alphas .6 .8 1.] [--ratio 4] [--steps 8000] [--out data/sae/tied]

Several penalties are trained together; of those with at most 12 active features on the validation text the one with the least unexplained variance is kept. The test text of the chapter takes no part.
"""
import argparse, hashlib, json, shutil, tempfile, time
from pathlib import Path
import torch
from codebook_tutorial.activations import harvest
from codebook_tutorial.formats import save_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import loss_recovered, measure, refit, train_sae

ROOT = Path(__file__).resolve().parents[1]
SITE, MOST = "resid.1", 12


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--alphas", type=float, nargs="+", default=[.6, .8, 1., 1.3]); p.add_argument("--ratio", type=int, default=4, help="features a dimension")
    p.add_argument("--steps", type=int, default=8000); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", type=Path, default=ROOT / "data" / "sae" / "tied")
    args = p.parse_args()
    torch.set_num_threads(1)
    start, (model, tok) = time.process_time(), load_lm("stories")
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(model, load_text(tok, "stories", n_tokens=1_000_000, length=256, split="train", seed=11), SITE, Path(folder) / "acts")
        x, valid = store.load(SITE), load_text(tok, "stories", n_tokens=50_000, length=256, split="train", seed=12)
        y = harvest(model, valid, SITE, Path(folder) / "valid", verbose=False).load(SITE)
    saes = [refit(sae, x[:400_000]) for sae in train_sae(x, args.ratio * x.shape[1], alpha=args.alphas, steps=args.steps, seed=args.seed)]
    found = [{k: v for k, v in measure(sae, y).items() if k != "density"} | dict(alpha=a, **loss_recovered(model, valid, SITE, sae)) for a, sae in zip(args.alphas, saes)]
    for row in found: print(json.dumps(row), flush=True)
    fit = [i for i, row in enumerate(found) if row["l0"] <= MOST]
    if not fit: raise SystemExit(f"none has at most {MOST} active features; try larger --alphas")
    best = min(fit, key=lambda i: found[i]["fvu"])
    shutil.rmtree(args.out, ignore_errors=True)
    save_sae(saes[best], args.out, site=SITE, command=f"python scripts/make_sae.py --alphas {' '.join(map(str, args.alphas))} --ratio {args.ratio} --steps {args.steps} --seed {args.seed}", on_validation_text=found[best],
             all_alphas=found, text="stories, train, 1,000,000 tokens, seed 11; validation seed 12", cpu_hours=(time.process_time() - start) / 3600, refitted=True)
    print("kept alpha", args.alphas[best], {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(args.out.iterdir())})


if __name__ == "__main__": main()
