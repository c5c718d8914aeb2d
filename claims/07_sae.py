"""Chapter 07: sparsity, width, length of training, sites and kinds of autoencoders, three seeds.

Stacks of penalties are trained together: one job, several rows.
"""

import json
import math
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.score.metrics import loss_recovered, measure, replaced_loss
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.dictionary.sae import TopK
from codebook_tutorial.dictionary.train import refit, train_sae, tune_decoder
from grid import Grid

ALPHAS, FEW = [0.2, 0.4, 0.8, 1.6, 3.2], [0.4, 0.8, 1.6]
SITES = ["resid.0", "resid.1", "resid.2", "mlp.0", "mlp.1", "mlp.2"]


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    # as in the chapter, which trains the first job again
    base: dict = dict(site="resid.1", ratio=2, kind="tied", alpha=ALPHAS, steps=1500)
    tokens: int = 300_000
    overlap_steps: tuple = (300, 1500, 6000)
    seeds: int = 3


class Job(NamedTuple):
    name: str
    seed: int


OVERLAPS, CONTROL = Job("overlaps", 0), Job("shipped control", 0)


@cache
def differences():
    "name -> what differs from the base."
    found = {"sweep": {}}
    found |= {
        f"{steps} steps": dict(steps=steps) for steps in (300, 6000)
    }  # the paper's Figs. 6, 7
    found |= {f"R={r}": dict(ratio=r, alpha=FEW) for r in (0.5, 1, 4, 8)}  # Fig. 16
    found |= {site: dict(site=site, alpha=FEW) for site in SITES if site != "resid.1"}
    found |= {kind: dict(kind=kind) for kind in ("untied", "gated")}
    found["jumprelu"] = dict(kind="jumprelu", alpha=[0.05, 0.1, 0.2, 0.4, 0.8])
    for kind in ("topk", "batchtopk", "matryoshka"):
        found |= {f"{kind} k={k}": dict(kind=kind, k=k, alpha=None) for k in (4, 8, 16, 32)}
    found["alpha=0"] = dict(alpha=[0.0])
    found["scrambled"] = dict(site="scrambled")  # every coordinate shuffled over the tokens
    dead = {"left alone": (), "begun anew late": (0.5, 0.6, 0.7, 0.8)}
    for name, resample in dead.items():
        found[f"R=4, {name}"] = dict(ratio=4, alpha=FEW, resample=resample)
    auxiliary = {"no auxiliary": 0.0, "auxiliary": 1 / 32, "auxiliary 1/8": 1 / 8}
    for name, alpha in auxiliary.items():
        found[f"R=4, topk k=4, {name}"] = dict(ratio=4, kind="topk", k=4, alpha=[alpha])
    return found


def jobs(s):
    "Every setting and seed; what is measured besides."
    return [Job(n, i) for n in differences() for i in range(s.seeds)] + [OVERLAPS, CONTROL]


@cache
def language(tokens):
    "The stories' model, its tokenizer, the text it is read on, unseen text."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=tokens, length=256, split="train", seed=7)
    return model, tok, text, load_text(tok, "stories", n_tokens=25_000, length=256)


@cache
def states(tokens):
    "Site -> states of text and of unseen text."
    model, _, *texts = language(tokens)
    with tempfile.TemporaryDirectory() as folder:
        stores = [
            harvest(model, t, SITES, folder=Path(folder) / str(i)) for i, t in enumerate(texts)
        ]
        found = {site: tuple(store.load(site) for store in stores) for site in SITES}
    return found | dict(scrambled=tuple(scrambled(x) for x in found["resid.1"]))


def scrambled(x):
    "Every coordinate shuffled over the tokens by itself."
    columns = [c[torch.randperm(len(c), generator=seeded(i))] for i, c in enumerate(x.T)]
    return torch.stack(columns, 1)


@cache
def without(site, tokens):
    "A site's losses that need no dictionary: clean, zero, mean."
    model, _, _, test = language(tokens)
    return loss_recovered(model, test[:50], site, dictionary=load_sae(data_path("sae/tied")))


def losses(site, dictionary, tokens):
    "What loss_recovered gives."
    model, _, _, test = language(tokens)
    decoded = replaced_loss(
        model, test[:50], site, fn=lambda x: dictionary.decode(dictionary.encode(x))
    )
    clean, zero, mean = (without(site, tokens)[key] for key in ("clean", "zero", "mean"))
    return dict(
        clean=clean,
        decoded=decoded,
        zero=zero,
        mean=mean,
        recovered_zero=(zero - decoded) / (zero - clean),
        recovered_mean=(mean - decoded) / (mean - clean),
        perplexity_ratio=math.exp(decoded - clean),
    )


def run_one(job, s):
    "Train one job; measure each of its autoencoders as it is and with its decoder refitted."
    if job == OVERLAPS:
        return overlaps(s)
    if job == CONTROL:
        return shipped_control(s)
    one = s.base | differences()[job.name]
    x, y = states(s.tokens)[one["site"]]
    alpha = one["alpha"][0] if one["alpha"] and "k" in one else one["alpha"]  # TopK kinds take one
    more = {key: one[key] for key in ("k", "resample") if key in one}
    settings = dict(alpha=alpha, steps=one["steps"], seed=job.seed) | more
    start = time.process_time()
    trained = train_sae(x, round(one["ratio"] * x.shape[1]), one["kind"], **settings)
    trained = trained if isinstance(trained, list) else [trained]
    seconds, found = (time.process_time() - start) / len(trained), []
    for alpha, sae in zip(one["alpha"] or [None], trained):
        for refitted in (False, True):
            d = refit(sae, x[:200_000]) if refitted else sae
            row = job._asdict() | one | dict(alpha=alpha, refitted=refitted)
            row |= dict(n_feats=len(d.directions)) | measure(d, y)
            del row["density"]
            row |= losses(one["site"], d, s.tokens) if one["site"] in SITES else {}
            found.append(row | dict(train_cpu_seconds=seconds))
    return found


def shipped_control(s):
    """The perplexity that a decoder's training brings by itself.

    As many random directions as the shipped autoencoder has features, as many active, refitted and
    tuned as long and on the same text."""
    model, tok, _, test = language(s.tokens)
    x, y = states(s.tokens)["resid.1"]
    n_feats = len(load_sae(data_path("sae/tied")).directions)
    told = json.loads((data_path("sae/tied") / "sae.json").read_text())["meta"]
    k = round(told["on_validation_text"]["tuned"]["l0"])
    random = TopK(x.shape[1], n_feats, k=k, generator=seeded(9)).eval()
    random.fold_normalisation(x.mean(0), 1.0)
    text = load_text(tok, n_tokens=1_000_000, length=256, split="train", seed=11)
    steps = int(told["command"].split("--tune ")[1].split()[0])
    tuned = tune_decoder(refit(random, x[:200_000]), model, text, site="resid.1", steps=steps)
    clean, decoded = (
        replaced_loss(model, test[:50], "resid.1", fn=fn)
        for fn in (lambda x: x, lambda x: tuned.decode(tuned.encode(x)))
    )
    row = dict(features=n_feats, l0=k, steps=steps, fvu=measure(tuned, y)["fvu"])
    return row | dict(perplexity_ratio=math.exp(decoded - clean))


def overlaps(s):
    "Of every feature of one seed the largest cosine to one of another, by length of training."
    x, found = states(s.tokens)["resid.1"][0], []
    for kind, settings in (("tied", dict(alpha=0.8)), ("topk", dict(k=8))):
        for steps in s.overlap_steps:
            D = []
            for seed in range(3):
                sae = train_sae(x, 2 * x.shape[1], kind, steps=steps, seed=seed, **settings)
                D.append(normalize(sae.directions.detach(), dim=-1))
            for a, b in ((0, 1), (1, 2), (2, 0)):
                best = (D[a] @ D[b].T).amax(-1)
                above = (best > 0.9).float().mean().item()
                row = dict(kind=kind, steps=steps, seeds=[a, b], mean=best.mean().item())
                found.append(row | dict(above=above))
    return found


def finish(grid):
    "What the file holds after its header."
    return dict(
        seeds="start of the autoencoder and order of the states",
        units="fvu: fraction of variance; clean, decoded, zero, mean: nats a token",
        overlaps=grid.rows([OVERLAPS], seconds=False),
        shipped_control=grid.rows([CONTROL], seconds=False)[0],
        rows=grid.rows(jobs(grid.settings)[:-2], seconds=False),
    )


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish)

if __name__ == "__main__":
    GRID.main()
