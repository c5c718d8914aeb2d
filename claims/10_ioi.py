"""Chapter 10: how few features carry "who gets the gift", for every method, at every layer, three
seeds.

One set for all prompts is chosen on 32 pairs and measured on 32 others; sets per prompt are chosen
and measured on the first 32 of those.
"""

import random
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import normalize

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.baselines import Affine, ica, pca
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import basis, random_directions
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.model.text import load_text
from codebook_tutorial.world.tasks import task_pairs
from codebook_tutorial.feature.orders import ORDERS, nested_sets
from codebook_tutorial.feature.patch import Patch
from codebook_tutorial.dictionary.train import refit, train_sae
from codebook_tutorial.world.grammar import NAMES
from grid import Grid, keep_last, language

MAIN = ["sae_tied_0.75", "sae_topk", "sae_alpha0", "codebook", "pca", "ica", "basis", "random"]
CODED = ["codebook_single", "codebook_top8", "codebook_residual"]  # finetuned models of chapter 05
TIED = ["sae_tied_0.25", "sae_tied_1.5", "sae_tied_raw"]
SITES = {site: MAIN + TIED for site in ("resid.1", "mlp.0", "resid.0", "resid.2")}
SITES["mlp.0"] += CODED
SITES |= {f"neurons.{i}": ["neurons"] for i in range(3)}
POOLED, ORDERED = ("sae_tied_0.75", "pca", "ica", "random"), ("sae_tied_0.75", "pca")


class Settings(NamedTuple):
    version: int = 2  # raise when what a row means changes
    prompts: int = 32
    most: int = 40  # features in one set
    steps: int = 2000
    n_feats: int = 384
    k: int = 12
    pools: tuple = (4, 8, 16, 32, 64, 128)
    alphas: tuple = (0.25, 0.75, 1.5)
    tokens: int = 300_000
    seeds: int = 3


class Job(NamedTuple):
    site: str
    method: str
    seed: int


class Asked(NamedTuple):
    "A dictionary at its site, and what it is asked."

    model: torch.nn.Module
    site: str
    dictionary: torch.nn.Module
    n: int  # prompts of each half
    control: int | None  # seed of edits in random directions


def jobs(s):
    "Every site, method and seed."
    return [
        Job(site, m, i) for site, methods in SITES.items() for m in methods for i in range(s.seeds)
    ]


@cache
def finetuned(name):
    "A model of chapter 05."
    return CodebookModel.from_pretrained(data_path(f"codes/{name}")).eval()


@keep_last
def states_at(site, tokens):
    "States that dictionaries are made from."
    model, tok = language()
    text = load_text(tok, n_tokens=tokens, length=256, split="train", seed=7)
    with tempfile.TemporaryDirectory() as folder:
        return harvest(model, text, site, folder=Path(folder) / site, verbose=False).load(site)


def build(method, seed, x, *, s):
    "A method's dictionary for the training states x."
    d, settings = x.shape[1], dict(steps=s.steps, seed=seed)
    if method.startswith("sae_tied"):
        raw = method.endswith("raw")
        alpha = 0.75 if raw else float(method.split("_")[-1])
        one = train_sae(x, s.n_feats, "tied", alpha=alpha, **settings)
        return one if raw else refit(one, x[:200_000])
    if method == "sae_alpha0":
        return train_sae(x, s.n_feats, "tied", alpha=0.0, resample=(), **settings)
    if method == "sae_topk":
        return train_sae(x, s.n_feats, "topk", k=s.k, **settings)
    if method == "codebook":
        few = x[torch.randperm(len(x), generator=seeded(seed))[:40_000]]
        book = Codebook(d, s.n_feats, s.k, select="residual")
        return book.init_from(few, generator=seeded(seed)).eval()
    if method == "random":
        directions = random_directions(s.n_feats, d, seed=seed + 100).directions
        return Affine(
            directions, torch.linalg.pinv(directions).T.contiguous()
        )  # together they give x
    if method == "ica":
        return ica(x, seed=seed)
    return pca(x) if method == "pca" else basis(d)


def rounded(curve):
    "Means over prompts of curves [k + 1, n]."
    return {key: [round(v, 4) for v in value.mean(1).tolist()] for key, value in curve.items()}


def boot(kl, seed=0):
    "95 % interval of the mean KL [k + 1, n] with 5 features: prompts drawn again."
    at = kl[min(5, len(kl) - 1)]
    means = at[torch.randint(len(at), (1000, len(at)), generator=seeded(seed))].mean(1)
    return [round(v, 4) for v in means.quantile(torch.tensor([0.025, 0.975])).tolist()]


@torch.no_grad()
def random_edits(patch, sets, seed):
    "KL where every edit keeps its length and gets a random direction."
    draw, kl = seeded(seed), []
    for some in sets.expand(-1, len(patch.pairs), -1).split(2):
        edits = patch.writes.edit(some)
        turned = normalize(torch.randn(edits.shape, generator=draw), dim=-1)
        kl.append(patch.kl(patch.run(turned * edits.norm(dim=-1, keepdim=True))))
    return torch.cat(kl)


def measured(patch, sets, n_feats, *, passes):
    "What both protocols report."
    curve, floor = patch.measure(sets), patch.measure(~patch.none)
    return dict(
        **rounded(curve),
        interval=boot(curve["kl"]),
        floor=floor["kl"].mean().item(),
        floor_edit=floor["edit"].mean().item(),
        n_feats=n_feats,
        passes=passes,
    )


def kl_random_edit(patch, sets, seed):
    "The control, where it is asked for."
    if seed is None:
        return {}
    return dict(kl_random_edit=rounded(dict(kl=random_edits(patch, sets, seed)))["kl"])


def one_set(asked, pairs, n_feats, *, order="greedy", **kw):
    "Chosen on the first half, measured on the second."
    first, second = (Patch(*asked[:3], pairs=some) for some in (pairs[: asked.n], pairs[asked.n :]))
    features = first.features[ORDERS[order](first, n_feats, **kw)]
    sets = torch.cat([second.chosen(features[:k]) for k in range(len(features) + 1)])
    found = measured(second, sets, len(first.features), passes=first.passes)
    return found | dict(features=features.tolist()) | kl_random_edit(second, sets, asked.control)


def each_prompt(asked, pairs, n_feats):
    "Chosen and measured for every prompt by itself."
    patch = Patch(*asked[:3], pairs=pairs[: asked.n])
    sets = nested_sets(patch, ORDERS["greedy"](patch, n_feats, per_prompt=True))
    n = patch.active.sum(1).float().mean().item()
    found = measured(patch, sets, n, passes=patch.passes)
    drawn = torch.rand(sets.shape[1:], generator=seeded(0)).masked_fill(~patch.active, -1.0)
    rank = drawn.argsort(1, descending=True).argsort(1)
    chance = rank < sets.sum(2)[..., None]  # as many that differ, drawn at random
    found["kl_random_features"] = rounded(dict(kl=patch.measure(chance)["kl"]))["kl"]
    return found | kl_random_edit(patch, sets, asked.control)


def pooled(asked, seed, s):
    "By how many names the prompts draw from."
    found = {}
    for pool in s.pools:
        pairs = task_pairs(language()[1], "ioi", 2 * s.prompts, seed=seed, pool=pool)
        found[pool] = dict(
            one_set=one_set(asked, pairs, s.most), per_prompt=each_prompt(asked, pairs, 16)
        )
    return found


def ordered(asked, kinds, s):
    "By the way in which features are ordered."
    ways = dict(
        attribution=dict(order="attribution"),
        attribution_3=dict(order="attribution", points=3),
        greedy_all=dict(order="greedy", width=None),
    )
    ways |= {f"acdc_{seed}": dict(order="acdc", seed=seed) for seed in range(3)}
    most = {name: 16 if name == "greedy_all" else s.most for name in ways}
    return {
        name: {kind: one_set(asked, pairs, most[name], **way) for kind, pairs in kinds.items()}
        for name, way in ways.items()
    }


def run_one(job, s):
    "One dictionary: one set for random and for fixed receivers, sets per prompt, pools, orders."
    site, method, seed = job
    (model, tok), few = language(), dict(l0=None, fvu=None)
    if method.startswith("codebook_"):
        model = finetuned(method.removeprefix("codebook_"))
        dictionary = model.codebooks[site]
    else:
        x = states_at(site, s.tokens)
        dictionary = build(method, seed, x, s=s)
        if method != "codebook":
            few = {key: measure(dictionary, x[:50_000])[key] for key in ("l0", "fvu")}
    control = seed if method == "sae_tied_0.75" else None
    asked = Asked(model, site, dictionary, s.prompts, control)
    many, draw = task_pairs(tok, "ioi", 2 * s.prompts, seed=seed), random.Random(seed)
    fixed = []
    for names in [draw.sample(NAMES, 2) for _ in range(3)]:
        fixed.append((names, task_pairs(tok, "ioi", 2 * s.prompts, seed=seed, receivers=names)))
    row = dict(
        **job._asdict(),
        **few,
        random=one_set(asked, many, s.most),
        per_prompt=each_prompt(asked, many, 16),
        fixed=[dict(receivers=names, **one_set(asked, pairs, 16)) for names, pairs in fixed],
    )
    plain = asked._replace(control=None)
    if site == "resid.1" and method in POOLED:
        row["pools"] = pooled(plain, seed, s)
    if site == "resid.1" and method in ORDERED:
        row["orders"] = ordered(plain, dict(random=many, fixed=fixed[0][1]), s)
    return row


def slim(row):
    "Without what the chapter does not read; the row's file in out/ has it all."
    if isinstance(row, list):
        return [slim(v) for v in row]
    if not isinstance(row, dict):
        return row
    return {k: slim(v) for k, v in row.items() if k not in ("features", "logit_diff")}


def finish(grid):
    "What the file holds after its header."
    return dict(
        steps=grid.settings.steps,
        prompts=grid.settings.prompts,
        alphas=grid.settings.alphas,
        seeds="the dictionary's own (start and order of an autoencoder, rows seen by ICA and"
        " k-means, random directions; PCA, coordinates and finetuned codes have none), the"
        " prompts, and which three pairs of receivers are fixed",
        rows=slim(grid.rows()),
    )


CODES = [f"codes/{name}/model.safetensors" for name in ("single", "top8", "residual")]
INPUTS = ("stories/model.safetensors", *CODES)
GRID = Grid(
    __file__, Settings(), jobs, run_one=run_one, finish=finish, inputs=INPUTS, lines=("rows",)
)

if __name__ == "__main__":
    GRID.main()
