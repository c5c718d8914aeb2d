"""Chapter 08: every method on known concepts and on error at equal sparsity, three seeds.

L1 kinds are trained as a stack of penalties; the one whose L0 on the training states is nearest to
that of the shipped autoencoder is scored.
"""

import functools
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.baselines import Affine, ica, keep_largest, pca, pursue
from codebook_tutorial.feature.detect import concept_scores
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import fvu, random_directions
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.dictionary.train import refit, train_sae
from grid import Grid

SITE, HIDDEN = "resid.1", "neurons.1"
SAES = ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "alpha0")
DRAWN = [*(f"sae_{kind}" for kind in SAES), "codebook", "kmeans", "ica", "ica_relu"]
WITHOUT_SEED = ("pca", "pca_relu", "basis", "neurons")
METHODS = [*DRAWN, *WITHOUT_SEED, "random"]


class Settings(NamedTuple):
    version: int = 1
    tokens: int = 300_000
    steps: int = 2000
    seeds: int = 3
    penalties: dict = dict(
        tied=(0.75, 0.88, 1.0),
        untied=(0.55, 0.75, 1.0),
        gated=(1.3, 1.6, 2.0),
        jumprelu=(0.12, 0.15, 0.2),
    )


class Job(NamedTuple):
    method: str
    seed: int


class World(NamedTuple):
    x: torch.Tensor  # states that dictionaries are made from
    y: torch.Tensor  # states that score them
    hidden: torch.Tensor  # the MLP's neurons at the same tokens
    truth: np.ndarray  # [tokens, concepts]
    n_feats: int
    k: int  # active features of the shipped autoencoder


def jobs(s):
    "Methods without a seed once."
    return [
        Job(method, seed)
        for seed in range(s.seeds)
        for method in METHODS
        if seed == 0 or method not in WITHOUT_SEED
    ]


@functools.cache
def world(tokens):
    "States, neurons and truth."
    model, tok = load_lm("stories")
    text = load_text(tok, n_tokens=tokens, length=256, split="train", seed=7)
    test, facts = story_text(40_000, split="test")
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, SITE, folder=Path(folder) / "train", verbose=False).load(SITE)
        store = harvest(model, test, [SITE, HIDDEN], folder=Path(folder) / "test", verbose=False)
        y, hidden = store.load(SITE), store.load(HIDDEN)
    shipped = load_sae(data_path("sae/tied"))
    k = round(measure(shipped, y)["l0"])
    return World(x, y, hidden, atoms(facts)[test.mask].numpy(), len(shipped.directions), k)


def penalised(kind, seed, w, *, s):
    "Of a stack of penalties the one nearest in L0, and its penalty."
    alphas = s.penalties[kind]
    trained = train_sae(w.x, w.n_feats, kind, alpha=list(alphas), steps=s.steps, seed=seed)
    off = [abs(measure(one, w.x[:50_000])["l0"] - w.k) for one in trained]
    alpha, best = alphas[off.index(min(off))], trained[off.index(min(off))]
    return refit(best, w.x[:200_000]) if kind == "tied" else best, alpha


def build(method, seed, w, *, s):
    "A method's dictionary, and its penalty where it has one."
    x, kind = w.x, method.removeprefix("sae_")
    d, settings = x.shape[1], dict(steps=s.steps, seed=seed)
    few = x[torch.randperm(len(x), generator=seeded(seed))[:40_000]]
    if kind in s.penalties:
        return penalised(kind, seed, w, s=s)
    if kind == "alpha0":
        return train_sae(x, w.n_feats, "tied", alpha=0.0, resample=(), **settings), 0.0
    if method.startswith("sae_"):
        return train_sae(x, w.n_feats, kind, k=w.k, **settings), None
    if method in ("codebook", "kmeans"):
        k, select = (w.k, "residual") if method == "codebook" else (1, "euclidean")
        book = Codebook(d, w.n_feats, k, select=select)
        return book.init_from(few, generator=seeded(seed)).eval(), None
    if method.startswith(("ica", "pca")):
        fitted = ica(x, seed=seed) if method.startswith("ica") else pca(x)
        return fitted.at(relu=method.endswith("_relu")), None
    drawn = random_directions(w.n_feats, d, seed=seed + 100).directions
    return Affine(torch.eye(d) if method == "basis" else drawn, mean=x.mean(0)), None


def judged(f, truth):
    "How well features fit the concepts."
    score = concept_scores(f, truth)
    means = {key: float(np.nanmean(score[key])) for key in ("f1", "auroc", "chosen_f1")}
    known = int((~np.isnan(score["f1"])).sum())
    return means | dict(concepts=known, skipped=int(score["skipped"]))


@functools.cache
def chance(n, seed, tokens):
    "As many random directions."
    w = world(tokens)
    random = random_directions(n, w.x.shape[1], seed=seed + 10)
    found = judged(random.encode(w.y).numpy(), w.truth)
    return dict(f1_random=found["f1"], auroc_random=found["auroc"])


def errors(one, alpha, w):
    "Sparsity and error: as it is, with its k largest features, and with the k best by pursuit."
    with torch.no_grad():
        f, found = one.encode(w.y), measure(one, w.y)
    directions, centred = normalize(one.directions.detach(), dim=-1), w.y - w.x.mean(0)
    own = one.decode(keep_largest(f, min(w.k, len(directions)))).detach()
    pursuit = pursue(centred, directions, w.k) @ directions
    row = dict(l0=found["l0"], fvu=found["fvu"], fvu_own=fvu(w.y, own))
    return f.numpy(), row | dict(fvu_pursuit=fvu(centred, pursuit), alpha=alpha)


def run_one(job, s):
    "Make one dictionary and score it."
    w = world(s.tokens)
    if job.method == "neurons":
        f, row = w.hidden.numpy(), dict.fromkeys(("l0", "fvu", "fvu_own", "fvu_pursuit", "alpha"))
    else:
        f, row = errors(*build(job.method, job.seed, w, s=s), w)
    n, known = f.shape[1], judged(f, w.truth)
    return dict(**job._asdict(), n_feats=n, **row, **known, **chance(n, job.seed, s.tokens))


def finish(grid):
    "What the file holds after its header."
    return dict(
        k=world(grid.settings.tokens).k,
        steps=grid.settings.steps,
        penalties=grid.settings.penalties,
        seeds="start and order of an autoencoder, rows seen by ICA and k-means, random directions;"
        " methods without one are there once",
        rows=grid.rows(),
    )


INPUTS = ("stories/model.safetensors", "sae/tied/sae_state.safetensors")
GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish, inputs=INPUTS)

if __name__ == "__main__":
    GRID.main()
