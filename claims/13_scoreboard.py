"""Chapter 13: every method at two sites of the stories' model, and on the machine with a hundred
states; three seeds.

A seed means: the text that the dictionary is made from and the unseen text that scores it, the
method's own randomness, the names of the prompts, the words, prompts and sampling of steering, the
features drawn for explanations.
"""

import time
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from codebook_tutorial.score.answers import known_answers
from codebook_tutorial.model.run import states_of
from codebook_tutorial.dictionary.baselines import Affine
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import Directions
from codebook_tutorial.dictionary.finetune import finetune
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.world.fsm import TokFSM
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.score.methods import METHODS, fsm_states, make_dictionary, sums_of
from codebook_tutorial.score.concepts import concept_board
from codebook_tutorial.score.scoreboard import scoreboard, stability
from grid import Grid, language

LATE = ("sae_untied", "sae_gated", "sae_jumprelu", "sae_matryoshka")  # computed after all others
EARLY = [m for m in [*METHODS, "codebook_tuned", "neurons"] if m not in LATE]
NO_SEED = ("basis", "neurons", "shipped")
FEW = 128  # sums again with about as many features as there are states
ASKED = ["kept", "concepts", "explained"]


class Settings(NamedTuple):
    version: int = 2  # raise when what a row means changes
    tokens: int = 300_000
    steps: int = 2000
    tuning_steps: int = 200
    walks: int = 2000
    # site -> features, active ones, what is asked there, penalties for kinds that have one
    sites: dict = {
        "resid.1": dict(
            n_feats=384,
            k=11,
            parts=[*ASKED, "patched"],
            penalties=dict(
                sae_tied=[0.88], sae_untied=[0.75], sae_gated=[1.4], sae_jumprelu=[0.16]
            ),
        ),
        "resid.2": dict(
            n_feats=384,
            k=11,
            parts=[*ASKED, "steered"],
            penalties=dict(sae_tied=[0.6], sae_untied=[0.52], sae_gated=[0.85], sae_jumprelu=[0.1]),
        ),
        "fsm mlp.1": dict(
            n_feats=512,
            k=4,
            parts=ASKED[:2],
            penalties=dict(sae_tied=[0.4], sae_untied=[0.6], sae_gated=[1.0], sae_jumprelu=[0.3]),
        ),
    }
    # states of the machine, added up
    sums: dict = dict(
        site="mlp.1",
        n_feats=512,
        steps=2000,
        walks=1500,
        at_once=[1, 2, 3],
        methods=["sae_tied", "sae_topk", "codebook", "kmeans", "ica", "pca", "random"],
        penalty=[0.4, 0.8],
    )


SEEDS = range(3)


class Job(NamedTuple):
    site: str
    method: str
    seed: int


def jobs(s):
    "Sites and sums, in the order of the file."
    sums = [f"sum {n}" for n in s.sums["at_once"]]
    few = [f"{m}_{FEW}" for m in ("kmeans", "random")]
    found = [Job("resid.1", "shipped", 0)]
    found += [Job(site, m, seed) for seed in SEEDS for site in s.sites for m in EARLY]
    found += [Job(site, m, seed) for seed in SEEDS for site in sums for m in s.sums["methods"]]
    found += [Job(site, m, seed) for m in LATE for seed in SEEDS for site in s.sites]
    found += [Job(site, m, seed) for m in few for seed in SEEDS for site in sums]
    return [job for job in found if not (job.site[:3] == "fsm" and job.method == "codebook_tuned")]


def neurons_of(site):
    "The MLP's neurons in the same block."
    return "neurons." + site.rpartition(".")[2]


def every_neuron(n):
    "Neurons as a dictionary."
    return Affine(torch.eye(n))


@lru_cache(2)  # texts and states are large
def text_of(seed, tokens):
    "The text that a seed's dictionaries are made from."
    return load_text(
        language()[1], "stories", n_tokens=tokens, length=256, split="train", seed=7 + seed
    )


@lru_cache(2)
def story_states(site, seed, tokens):
    "States of that text."
    return states_of(language()[0], text_of(seed, tokens), site)


@lru_cache(4)
def answers_at(site, seed):
    "What is asked at a site, and the answers."
    return known_answers(*language(), site, seed=seed)


def tuned(job, s, *, n_feats, k):
    "A copy of the model, finetuned with one codebook at the site."
    model, text = load_lm("stories")[0], text_of(job.seed, s.tokens)
    start, settings = time.process_time(), dict(select="residual", learn="ema", commitment=0.25)
    cb = add_codebooks(model, [job.site], n_codes=n_feats, k=k, **settings)
    cb.init_from_data(text.ids[:200], generator=seeded(job.seed), pad=text.pad)
    finetune(cb, text[200:], s.tuning_steps, seed=job.seed)
    return cb.eval(), time.process_time() - start


def story_row(job, s):
    "Scores of a method at a site of the stories' model, and its directions."
    site, method, seed = job
    asked, base = s.sites[site], language()[0]
    n_feats, k, parts = asked["n_feats"], asked["k"], tuple(asked["parts"])
    if method == "codebook_tuned":
        model, made = tuned(job, s, n_feats=n_feats, k=k)
        d, answers = (
            model.codebooks[site],
            known_answers(model, language()[1], site, judge=base, seed=seed),
        )
    else:
        x = None if method in ("neurons", "shipped") else story_states(site, seed, s.tokens)
        start = time.process_time()
        if method == "neurons":
            d = every_neuron(base.config.intermediate_size)
        elif method == "shipped":
            d = load_sae(data_path("sae/tied"))
        else:
            d = make_dictionary(
                method,
                x,
                n_feats,
                k=k,
                seed=seed,
                alpha=asked["penalties"].get(method),
                steps=s.steps,
            )
        made = time.process_time() - start
        answers = answers_at(neurons_of(site) if method == "neurons" else site, seed)
    return dict(made_seconds=made) | scoreboard(d, answers, parts, seed=seed), d


def fsm_board(d, y, truth):
    "What is measured on the machine's states."
    m = measure(d, y)
    with torch.no_grad():
        f = d.encode(y).numpy()
    return dict(n_feats=len(d.directions), l0=m["l0"], fvu=m["fvu"]), m, concept_board(f, truth)


def machine(seed):
    "A model of the machine, and the machine."
    return AutoModelForCausalLM.from_pretrained(data_path(f"fsm_{seed}")).eval(), TokFSM()


def fsm_row(job, s):
    "Scores of a method on the machine with a hundred states, one model per seed."
    site, method, seed = job
    asked, at = s.sites[site], site.removeprefix("fsm ")
    at = neurons_of(at) if method == "neurons" else at
    x, _ = fsm_states(*machine(seed), at, n=s.walks, seed=100 + seed)
    y, truth = fsm_states(*machine(seed), at, n=700, seed=200 + seed)
    start, penalty = time.process_time(), asked["penalties"].get(method)
    if method == "neurons":
        d = every_neuron(x.shape[1])
    else:
        d = make_dictionary(
            method, x, asked["n_feats"], k=asked["k"], seed=seed, alpha=penalty, steps=s.steps
        )
    made = time.process_time() - start
    few, m, board = fsm_board(d, y, truth)
    return dict(made_seconds=made) | few | dict(dead=m["dead_share"]) | board, d


def sum_row(job, s):
    "Complete states alone, n of independent walks added up; as many features active for each."
    n, method, few = int(job.site[4:]), job.method.removesuffix(f"_{FEW}"), str(FEW) in job.method
    x, (y, truth) = (
        sums_of(
            *fsm_states(
                *machine(job.seed), s.sums["site"], n=walks, seed=base + job.seed, complete=True
            ),
            n,
            seed=job.seed,
        )
        for walks, base in ((s.sums["walks"], 300), (500, 400))
    )
    start, penalty = time.process_time(), s.sums["penalty"] if method == "sae_tied" else None
    n_feats = FEW if few else s.sums["n_feats"]
    d = make_dictionary(
        method, x[0], n_feats, k=2 * n, seed=job.seed, alpha=penalty, steps=s.sums["steps"]
    )
    made = time.process_time() - start
    row, _, board = fsm_board(d, y, truth)
    return dict(made_seconds=made) | row | board, d


def run_one(job, s):
    "A row and the directions of its dictionary."
    row_of = {"sum": sum_row, "fsm": fsm_row}.get(job.site[:3], story_row)
    row, d = row_of(job, s)
    return job._asdict() | row, dict(directions=d.directions.detach().half().contiguous())


def stable(grid, site, method):
    "Agreement of the seeds' directions; controls: random ones, and states as the method reads."
    each = [grid.tensors(Job(site, method, seed)).get("directions") for seed in SEEDS]
    if any(d is None for d in each):  # rows that came from the claims
        old = grid.committed().get("stability", [])
        return next(one for one in old if (one["site"], one["method"]) == (site, method))
    x = story_states(site, 0, grid.settings.tokens)
    raw = method in ("codebook", "kmeans", "codebook_tuned")
    found = stability([Directions(d.float()) for d in each], x if raw else x - x.mean(0))
    return dict(site=site, method=method, **found)


def finish(grid):
    "What the file holds after its header."
    s = grid.settings
    language_sites = [site for site in s.sites if not site.startswith("fsm")]
    fitted = [
        (site, m)
        for site in language_sites
        for m in dict.fromkeys(job.method for job in jobs(s) if job.site == site)
        if m not in NO_SEED
    ]
    return dict(
        tokens=s.tokens,
        steps=s.steps,
        tuning_steps=s.tuning_steps,
        walks=s.walks,
        sites=s.sites,
        sums=s.sums,
        seeds="text of the dictionary, unseen text that scores it, the method's own randomness,"
        " names of the prompts, words, prompts and sampling of steering, features drawn for"
        " explanations; of the machine: the model",
        rows=grid.rows(),
        stability=[stable(grid, site, m) for site, m in fitted],
    )


INPUTS = (
    "stories/model.safetensors",
    "sae/tied/sae_state.safetensors",
    *(f"fsm_{i}/model.safetensors" for i in range(3)),
)
GRID = Grid(
    __file__,
    Settings(),
    jobs,
    run_one=run_one,
    finish=finish,
    inputs=INPUTS,
    lines=("rows", "stability"),
    take_up=True,
)

if __name__ == "__main__":
    GRID.main()
