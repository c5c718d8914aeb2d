"""Train an autoencoder that the course ships -> data/sae/tied: about ten minutes on one CPU core.

The paper's tied form; then, with its features held as they are, a decoder refitted by least squares and tuned on what the model does with decoded states.

usage: python scripts/make_sae.py [--site resid.1] [--alphas .65 .75 .85 1.] [--ratio 4] [--most 11.5] [--steps 8000] [--tune 600] [--out data/sae/tied]
the other one that is shipped: python scripts/make_sae.py --site resid.2 --alphas .3 .4 .5 .6 --ratio 8 --most 25 --out data/sae/last

Several penalties are trained together; of those with at most `--most` active features on the validation text the one with the least unexplained variance is kept. The test text of the chapter takes no part.
"""
import argparse, hashlib, json, shutil, tempfile, time
from pathlib import Path
import torch
from codebook_tutorial.activations import harvest
from codebook_tutorial.formats import save_sae
from codebook_tutorial.metrics import loss_recovered, measure
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae, tune_decoder

ROOT = Path(__file__).resolve().parents[1]

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--site", default="resid.1"); p.add_argument("--most", type=float, default=11.5, help="active features, on validation text")
    p.add_argument("--alphas", type=float, nargs="+", default=[.65, .75, .85, 1.]); p.add_argument("--ratio", type=int, default=4, help="features a dimension")
    p.add_argument("--steps", type=int, default=8000); p.add_argument("--tune", type=int, default=600, help="steps of 8 rows for the decoder alone"); p.add_argument("--seed", type=int, default=0); p.add_argument("--out", type=Path, default=ROOT / "data" / "sae" / "tied")
    args = p.parse_args()
    torch.set_num_threads(1)
    start, (model, tok) = time.process_time(), load_lm("stories")
    text = load_text(tok, "stories", n_tokens=1_000_000, length=256, split="train", seed=11)
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, args.site, Path(folder) / "acts").load(args.site)
        valid = load_text(tok, "stories", n_tokens=50_000, length=256, split="train", seed=12)
        y = harvest(model, valid, args.site, Path(folder) / "valid", verbose=False).load(args.site)
    def judged(sae): return {k: v for k, v in measure(sae, y).items() if k != "density"} | loss_recovered(model, valid, args.site, sae)
    trained = train_sae(x, args.ratio * x.shape[1], alpha=args.alphas, steps=args.steps, seed=args.seed)
    refitted = [refit(sae, x[:400_000]) for sae in trained]
    found = [dict(alpha=a, trained=judged(one), refitted=judged(two)) for a, one, two in zip(args.alphas, trained, refitted)]
    for row in found: print(json.dumps(row), flush=True)
    fit = [i for i, row in enumerate(found) if row["trained"]["l0"] <= args.most]
    if not fit: raise SystemExit(f"none has at most {args.most} active features; try larger --alphas")
    best = min(fit, key=lambda i: found[i]["refitted"]["fvu"])
    tuned = tune_decoder(refitted[best], model, text, args.site, steps=args.tune, seed=args.seed)
    shutil.rmtree(args.out, ignore_errors=True)
    save_sae(tuned, args.out, site=args.site, command=f"python scripts/make_sae.py --site {args.site} --most {args.most} --alphas {' '.join(map(str, args.alphas))} --ratio {args.ratio} --steps {args.steps} --tune {args.tune} --seed {args.seed}",
             alpha=args.alphas[best], on_validation_text=found[best] | dict(tuned=judged(tuned)), all_alphas=found, text="stories, train, 1,000,000 tokens, seed 11; validation seed 12", cpu_hours=(time.process_time() - start) / 3600)
    print("kept alpha", args.alphas[best], json.dumps(judged(tuned)), {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(args.out.iterdir())})


if __name__ == "__main__": main()
