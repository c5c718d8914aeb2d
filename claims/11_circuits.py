"""Chapter 11: what three features of the last layer rest on, checked, three seeds.

Every seed trains the autoencoders of the first and the last layer (the middle one is the shipped
one), draws other contexts, and chooses the roots again.
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.feature.trace import causal_tree
from codebook_tutorial.feature.ablate import check_tree
from codebook_tutorial.core import data_path
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.model.text import load_text
from codebook_tutorial.feature.read import best_features, strong_contexts
from codebook_tutorial.dictionary.train import refit, train_sae
from codebook_tutorial.world.grammar import ID
from grid import Grid, language


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    tokens: int = 180_000
    steps: int = 800
    alpha: float = 0.75
    n_tree: int = 20  # contexts that a tree is found on
    n_test: int = 24  # contexts that it is checked on
    draws: int = 20
    seeds: int = 3


class Job(NamedTuple):
    seed: int


def jobs(s):
    "One per seed."
    return [Job(seed) for seed in range(s.seeds)]


def dictionaries(model, text, seed, *, s):
    "Autoencoders of the three layers' outputs."
    made, sites = {}, ["resid.0", "resid.2"]
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(model, text, sites, folder=Path(folder) / "acts", verbose=False)
        for site in sites:
            x = store.load(site)
            sae = train_sae(x, 384, "tied", alpha=s.alpha, steps=s.steps, seed=seed)
            made[site] = refit(sae, x)
    made["resid.1"] = load_sae(data_path("sae/tied"))
    return {site: made[site].to(model.device) for site in sorted(made)}


def run_one(job, s):
    "A tree per root."
    (model, tok), seed = language(), job.seed
    text = load_text(tok, n_tokens=s.tokens, length=256, split="train", seed=3)
    first, second = text.split(0.5)
    half, follows, out = len(first), text.ids.roll(-1, 1), []
    follows[:, -1] = text.pad
    truths = {
        "before )": follows == ID[")"],
        "before 's": follows == ID["'s"],
        "at 's": text.ids == ID["'s"],
    }
    dicts = dictionaries(model, first, seed, s=s)
    for words, best in best_features(
        model, "resid.2", dicts["resid.2"], text=text, truths=truths
    ).items():
        f, true = best.acts, truths[words]
        contexts = strong_contexts(
            first, f[:half], s.n_tree, at_least=12, where=true[:half], seed=2 * seed
        )
        test = strong_contexts(
            second, f[half:], s.n_test, at_least=12, where=true[half:], seed=2 * seed + 1
        )
        tree = causal_tree(model, dicts, ("resid.2", best.feature), contexts=contexts)
        found = check_tree(model, dicts, tree, contexts=test, draws=s.draws, seed=seed)
        row = dict(words=words, seed=seed, root=list(tree.root), f1=[best.f1, best.f1_held_out])
        row |= dict(nodes=tree.nodes, edges=tree.edges, runs=tree.runs)
        row |= dict(clean=found["clean"], root_alone=found["root"])
        out.append(row | {key: found[key] for key in ("below", "others", "random")})
    return out


def finish(grid):
    "What the file holds after its header."
    return dict(
        tokens=grid.settings.tokens,
        steps=grid.settings.steps,
        alpha=grid.settings.alpha,
        seeds="start and order of the autoencoders of resid.0 and resid.2, the contexts of tree and"
        " test, the draws of the control",
        rows=grid.rows(seconds=False),
    )


INPUTS = ("stories/model.safetensors", "sae/tied/sae_state.safetensors")
GRID = Grid(
    __file__, Settings(), jobs, run_one=run_one, finish=finish, inputs=INPUTS, lines=("rows",)
)

if __name__ == "__main__":
    GRID.main()
