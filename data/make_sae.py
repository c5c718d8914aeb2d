r"""Train an autoencoder that the course ships -> data/sae/tied: about ten minutes on one CPU core.

The paper's tied form; then, with its features held as they are, a decoder refitted by least squares
and tuned on what the model does with decoded states.

usage: python data/make_sae.py
the other one that is shipped:
  python data/make_sae.py --site resid.2 --alphas .3 .4 .5 .6 --ratio 8 --most 25 \
    --out data/sae/last

Several penalties are trained together; of those with at most `--most` active features on the
validation text the one with the least unexplained variance is kept. The chapter's test text takes
no part.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.formats import save_sae
from codebook_tutorial.score.metrics import loss_recovered, measure
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.dictionary.train import refit, train_sae, tune_decoder

DATA = Path(__file__).resolve().parent


def options():
    "What the command line asks for."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--site", default="resid.1")
    most = "active features, on validation text"
    p.add_argument("--most", type=float, default=11.5, help=most)
    p.add_argument("--alphas", type=float, nargs="+", default=[0.65, 0.75, 0.85, 1.0])
    p.add_argument("--ratio", type=int, default=4, help="features per dimension")
    p.add_argument("--steps", type=int, default=8000)
    p.add_argument("--tune", type=int, default=600, help="steps of 8 rows for the decoder alone")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=DATA / "sae" / "tied")
    return p.parse_args()


def states(model, site, *texts):
    "States of each text."
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            harvest(model, text, site, folder=Path(folder) / str(i)) for i, text in enumerate(texts)
        ]
        return [store.load(site) for store in stores]


def command(a):
    "The command line again."
    alphas = " ".join(map(str, a.alphas))
    return (
        f"python data/make_sae.py --site {a.site} --most {a.most} --alphas {alphas}"
        f" --ratio {a.ratio} --steps {a.steps} --tune {a.tune} --seed {a.seed}"
    )


def main():
    "Train, choose, tune, save."
    args = options()
    torch.set_num_threads(1)
    start, (model, tok) = time.process_time(), load_lm("stories")
    settings = dict(length=256, split="train")
    text = load_text(tok, "stories", n_tokens=1_000_000, seed=11, **settings)
    valid = load_text(tok, "stories", n_tokens=50_000, seed=12, **settings)
    x, y = states(model, args.site, text, valid)

    def judged(sae):
        found = {k: v for k, v in measure(sae, y).items() if k != "density"}
        return found | loss_recovered(model, valid, args.site, dictionary=sae)

    n_feats, seed = args.ratio * x.shape[1], args.seed
    trained = train_sae(x, n_feats, alpha=args.alphas, steps=args.steps, seed=seed)
    refitted = [refit(sae, x[:400_000]) for sae in trained]
    found = []
    for alpha, one, two in zip(args.alphas, trained, refitted):
        found.append(dict(alpha=alpha, trained=judged(one), refitted=judged(two)))
        print(json.dumps(found[-1]), flush=True)
    fit = [i for i, row in enumerate(found) if row["trained"]["l0"] <= args.most]
    if not fit:
        raise SystemExit(f"none has at most {args.most} active features; try larger --alphas")
    best = min(fit, key=lambda i: found[i]["refitted"]["fvu"])
    tuned = tune_decoder(refitted[best], model, text, site=args.site, steps=args.tune, seed=seed)
    save(tuned, args, found, best=best, judged=judged(tuned), start=start)


def save(tuned, args, found, *, best, judged, start):
    "The chosen autoencoder, with how it was made."
    shutil.rmtree(args.out, ignore_errors=True)
    save_sae(
        tuned,
        args.out,
        site=args.site,
        command=command(args),
        alpha=args.alphas[best],
        on_validation_text=found[best] | dict(tuned=judged),
        all_alphas=found,
        text="stories, train, 1,000,000 tokens, seed 11; validation seed 12",
        cpu_hours=(time.process_time() - start) / 3600,
    )
    files = sorted(args.out.iterdir())
    sha = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    print("kept alpha", args.alphas[best], json.dumps(judged), sha)


if __name__ == "__main__":
    main()
