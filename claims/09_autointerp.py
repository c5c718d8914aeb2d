"""Chapter 09: every method explained by the predicate explainer and scored, at every layer, three
seeds.

L1 autoencoders are trained as a stack of penalties; the one whose L0 on the training states is
nearest to that of the shipped one is scored.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.feature.explain.concepts import concept_fit, feature_concepts
from codebook_tutorial.feature.explain.protocol import fragments, make_cases, pieces, some_features
from codebook_tutorial.feature.explain.scores import interpret, moments, summary
from codebook_tutorial.dictionary.baselines import Affine, ica, pca
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.world.concepts import CONCEPTS, atoms, story_text
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import Dictionary, random_directions
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.feature.explain.rules import PredicateExplainer, story_words
from codebook_tutorial.dictionary.train import refit, train_sae
from grid import Grid, keep_last, language

METHODS = ("sae_tied", "sae_topk", "sae_alpha0", "codebook", "codebook_tuned")
METHODS += ("ica", "ica_relu", "ica_topk", "pca", "pca_relu", "pca_topk")
METHODS += ("neurons", "basis", "random")
# predicates that say what a concept says
OVERLAP = ("class", "previous class", "topic", "previous topic", "position", "inside")
N_FEATS = 384


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    k: int = 12
    steps: int = 2000
    penalties: tuple = (0.5, 0.75, 1.0)
    fragments: int = 50_000  # as in the paper
    n: int = 150  # features that are explained
    tokens: int = 300_000
    seeds: int = 3


class Job(NamedTuple):
    layer: int
    method: str
    seed: int


class World(NamedTuple):
    train: Text
    long: Text  # fragments
    test: Text
    words: list  # of each fragment
    truth: dict  # concepts at the test's tokens: all, context, words


def jobs(s):
    "Every layer, method and seed."
    return [Job(i, method, j) for i in range(3) for method in METHODS for j in range(s.seeds)]


class Ids(Dictionary):
    "Codes of a finetuned network as features: its input holds their numbers."

    def __init__(self, n):
        super().__init__()
        self.directions = torch.zeros(n, 1)

    def encode(self, x):
        "One where the number is given."
        return torch.zeros(len(x), len(self.directions)).scatter(1, x.long(), 1.0)


@cache
def world(tokens, n_fragments):
    "Texts, and what is true at each token of the test."
    _, tok = language()
    train = load_text(tok, n_tokens=tokens, length=256, split="train", seed=7)
    test, facts = story_text(40_000, split="test")
    long = load_text(tok, n_tokens=100 * n_fragments, length=256, split="train", seed=11)
    long = fragments(long)[:n_fragments]
    if len(long) < n_fragments:
        raise SystemExit(f"only {len(long)} fragments")
    everything = atoms(facts)[test.mask].numpy()
    context = np.array([c.kind != "token" for c in CONCEPTS.values() for _ in c.values])
    is_word = test.ids[test.mask].numpy()[:, None] == np.arange(len(tok))
    words = np.concatenate([everything, is_word], 1)
    truth = dict(all=everything, context=everything[:, context], words=words)
    return World(train, long, test, pieces(long, tok), truth)


@torch.no_grad()
def codes_of(cb_model, text, site, *, batch=64):
    "Feature numbers [tokens, groups * k]."
    book, found = cb_model.codebooks[site], []
    first = book.weight.shape[1] * torch.arange(book.weight.shape[0])[:, None]
    for i in range(0, len(text), batch):
        some = text[i : i + batch]
        cb_model(input_ids=some.ids)
        found.append((cb_model.ids[site] + first).flatten(2)[some.mask].int())
    return torch.cat(found)


@cache
def scratch():
    "A folder for states, which are read again when a layer's next method wants them."
    return tempfile.TemporaryDirectory()


@keep_last
def states_of(layer, kind, sizes):
    "States of train, fragments and test; `kind`: resid, neurons or codebook_tuned."
    texts = world(*sizes)[:3]
    if kind == "codebook_tuned":
        cb_model = CodebookModel.from_pretrained(data_path("codes/single")).eval()
        return [codes_of(cb_model, text, f"mlp.{layer}") for text in texts]
    model, site = language()[0], f"{kind}.{layer}"
    places = [Path(scratch().name) / f"{site}-{i}" for i in range(len(texts))]
    return [
        harvest(model, text, site, folder=place, verbose=False).load(site)
        for text, place in zip(texts, places)
    ]


def build(method, seed, x, *, s):
    "A method's dictionary for the training states x."
    d, settings = x.shape[1], dict(steps=s.steps, seed=seed)
    if method == "sae_tied":
        trained = train_sae(x, N_FEATS, "tied", alpha=list(s.penalties), **settings)
        best = min(trained, key=lambda one: abs(measure(one, x[:50_000])["l0"] - s.k))
        return refit(best, x[:200_000])
    if method == "sae_alpha0":
        return train_sae(x, N_FEATS, "tied", alpha=0.0, resample=(), **settings)
    if method == "sae_topk":
        return train_sae(x, N_FEATS, "topk", k=s.k, **settings)
    if method == "codebook":
        few = x[torch.randperm(len(x), generator=seeded(seed))[:40_000]]
        book = Codebook(d, N_FEATS, s.k, select="residual")
        return book.init_from(few, generator=seeded(seed)).eval()
    if method.startswith(("ica", "pca")):
        fitted = ica(x, seed=seed) if method.startswith("ica") else pca(x)
        k = s.k if method.endswith("topk") else None
        return fitted.at(relu=method.endswith("relu"), k=k)
    if method == "random":
        directions = random_directions(N_FEATS, d, seed=seed + 100).directions
    else:
        directions = torch.eye(d)
    return Affine(directions, mean=None if method == "neurons" else x.mean(0), relu=True)


def rank_correlation(a, b):
    "Spearman's; None where one side does not vary."
    if len(a) > 3 and np.ptp(a) > 0 and np.ptp(b) > 0:
        return float(spearmanr(a, b).statistic)
    return None


def agreement(
    r,  # scores, None where there is none
    concepts,  # how well the best concept fits
    density,
    *,
    draw,
):
    "Rank correlation of scores and concepts; shuffled (95 %); of density; at equal density."
    there = np.array([v is not None for v in r])
    score, fit = np.array([v for v in r if v is not None]), concepts[there]
    own, a, b = (
        rank_correlation(*pair)
        for pair in ((score, fit), (score, density[there]), (fit, density[there]))
    )
    if None in (own, a, b):
        return dict(rho=own, shuffled=None, density=a, partial=None)
    chance = [abs(rank_correlation(score, draw.permutation(fit))) for _ in range(200)]
    partial = (own - a * b) / max(((1 - a * a) * (1 - b * b)) ** 0.5, 1e-9)
    return dict(rho=own, shuffled=float(np.quantile(chance, 0.95)), density=a, partial=partial)


def judges_of(g, truth):
    "Of every feature the fit to its best concept, chosen and counted in several ways."
    concepts = feature_concepts(g, truth["all"])
    judges = {key: concepts[key] for key in ("precision", "recall", "f1", "gain")}
    for name, kind in (
        ("told", "all"),
        ("told by context concepts", "context"),
        ("told, words as well", "words"),
    ):
        judges[name] = np.nan_to_num(concept_fit(g, truth[kind])[0])
    return judges


def correlation(scores, values):
    "Pearson's, over features that have a score."
    pairs = [(r, v) for r, v in zip(scores, values) if r is not None]
    return float(np.corrcoef(*zip(*pairs))[0, 1])


def run_one(job, s):
    "Explain one dictionary's features, score the explanations, and compare with the truth."
    layer, method, seed = job
    draw, w = np.random.default_rng(seed), world(s.tokens, s.fragments)
    kind = method if method in ("neurons", "codebook_tuned") else "resid"
    states = train, long, test = states_of(layer, kind, (s.tokens, s.fragments))
    if method == "codebook_tuned":
        dictionary = Ids(int(max(x.max() for x in states)) + 1)
        few = dict(l0=float(train.shape[1]), fvu=None)
    else:
        dictionary = build(method, seed, train, s=s)
        few = measure(dictionary, train[:50_000])
    f, ids = some_features(dictionary, long, s.n, seed=seed)
    cases = make_cases(f, w.words, ids, seed=seed)
    g = some_features(dictionary, test, s.n, seed=seed)[0]
    rows = interpret(cases, PredicateExplainer(**story_words()))
    bare = interpret(cases, PredicateExplainer(without=OVERLAP))
    kept = [i for i, c in enumerate(cases) if c]
    stats = moments(f[::10])
    return dict(
        method=method,
        layer=layer,
        seed=seed,
        n_feats=len(dictionary.directions),
        tried=len(ids),
        skipped=len(ids) - len(kept),
        l0=few["l0"],
        fvu=few["fvu"],
        **scored(rows, bare, kept=kept, stats=stats),
        **compared(rows, bare, kept=kept, g=g, f=f, truth=w.truth, draw=draw),
        scores=[None if (r := rows[i]["r"]) is None else round(float(r), 3) for i in kept],
        features=[ids[i] for i in kept],
    )


def scored(rows, bare, *, kept, stats):
    "Summaries of the scores, and their correlation with moments of the activations."
    r = [rows[i]["r"] for i in kept]
    return dict(
        **{key: summary([rows[i][key] for i in kept]) for key in ("r", "r_top", "r_random")},
        plain=summary([bare[i]["r"] for i in kept]),
        table2={key: correlation(r, [v[i] for i in kept]) for key, v in stats.items()},
    )


def compared(rows, bare, *, kept, g, f, truth, draw):
    "Scores beside the fit to known concepts."
    judges, density = judges_of(g, truth), (f > 0).mean(0)
    agree = {
        f"{name}{what}": agreement(
            [some[i]["r"] for i in kept], fit[kept], density[kept], draw=draw
        )
        for what, some in (("", rows), (", without overlap", bare))
        for name, fit in judges.items()
    }
    fits = judges | dict(density=density)
    return dict(
        agreement=agree, judged={name: float(fit[kept].mean()) for name, fit in fits.items()}
    )


def finish(grid):
    "What the file holds after its header."
    s = grid.settings
    return dict(
        k=s.k,
        steps=s.steps,
        penalties=s.penalties,
        fragments=s.fragments,
        seeds="the dictionary's own (start and order of an autoencoder, rows seen by ICA and"
        " k-means, random directions), which features are drawn, which random fragments",
        rows=grid.rows(),
    )


INPUTS = ("stories/model.safetensors", "sae/tied/sae_state.safetensors")
INPUTS += ("codes/single/model.safetensors",)
GRID = Grid(
    __file__, Settings(), jobs, run_one=run_one, finish=finish, inputs=INPUTS, lines=("rows",)
)

if __name__ == "__main__":
    GRID.main()
