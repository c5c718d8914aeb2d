"""Chapter 14: what passes and training cost beside what was predicted, and what features are worth
on changed text, under attack, after longer training and across three seeds.

Seconds are measured: run `--only cost` alone on a quiet machine.
"""

from typing import NamedTuple

import torch

from codebook_tutorial.model.run import states_of
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.base import Directions
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.score.robust import (
    one_word_attack,
    relied_on,
    stories_of,
    story_changes,
    trusted,
)
from codebook_tutorial.score.scale import (
    blank,
    count,
    measured_bytes,
    one_pass,
    seconds,
    training_bytes,
)
from codebook_tutorial.score.concepts import concept_board
from codebook_tutorial.score.methods import make_dictionary
from codebook_tutorial.score.scoreboard import stability
from codebook_tutorial.world.grammar import TOPICS
from grid import Grid, keep_last, language

SITES, SEEDS = ["heads.*", "mlp.*"], range(3)
SMALL = ((0, 1), (500, 1), (500, 8), (2000, 1), (2000, 8))  # codes, active ones
LARGE = ((0, 1), (4000, 1), (4000, 8), (10_000, 1))
AVERAGED = dict(n_codes=2000, k=4, learn="ema", select="residual")


def shapes(sizes, layers, codes, *, rows, **more):
    "Models to be timed."
    return [
        dict(d=d, layers=layers, C=C, k=k, rows=n, **more)
        for d in sizes
        for C, k in codes
        for n in rows
    ]


class Settings(NamedTuple):
    version: int = 2  # raise when what a row means changes
    site: str = "resid.1"
    n_feats: int = 384
    k: int = 11
    tokens: int = 200_000
    # method -> its penalty
    methods: dict = dict(sae_tied=[0.88], sae_topk=None, sae_jumprelu=[0.16]) | dict.fromkeys(
        ("codebook", "kmeans", "ica", "pca", "random")
    )
    longer: dict = dict(sae_tied=(250, 1000, 4000), sae_topk=(250, 1000, 4000))  # steps
    # prices are fitted to these
    costs: list = shapes((64, 128, 256), 2, SMALL, rows=(2, 8)) + shapes(
        (64, 128, 256), 2, ((0, 1), (500, 1), (2000, 8)), rows=(4,), train=True
    )
    held_out: list = shapes((512, 768), 4, LARGE, rows=(8,)) + shapes(
        (512,), 4, LARGE[:3], rows=(4,), train=True
    )
    memory: list = [
        dict(size=size, vocab=2000, codes=codes, rows=8, length=256)
        for size in ((128, 4, 4), (256, 4, 4), (512, 4, 8))
        for codes in (None, dict(n_codes=2000, k=1), AVERAGED)
    ]


class Cost(NamedTuple):
    case: int
    fitted: bool


class Memory(NamedTuple):
    case: int


class Changes(NamedTuple):
    method: str
    seed: int


class Longer(NamedTuple):
    method: str
    steps: int
    seed: int


def jobs(s):
    "Costs, memory, changed text, longer training."
    found = [Cost(i, True) for i in range(len(s.costs))]
    found += [Cost(i, False) for i in range(len(s.held_out))]
    found += [Memory(i) for i in range(len(s.memory))]
    found += [Changes(m, seed) for seed in SEEDS for m in s.methods]
    return found + [Longer(m, n, seed) for seed in SEEDS for m in s.longer for n in s.longer[m]]


def cost(job, s):
    "A pass counted without computing, and timed."
    case, passes = dict((s.costs if job.fitted else s.held_out)[job.case]), {}
    d, C = case["d"], case["C"]
    for where in ("meta", "cpu"):
        model = blank((d, case["layers"], max(1, d // 64)), vocab=2000, where=where)
        model = add_codebooks(model, SITES, C, k=case["k"]) if C else model
        passes[where] = one_pass(model, case["rows"], 128, train=case.get("train", False))
    found = count(passes["meta"]) | dict(seconds=seconds(passes["cpu"]))
    return case | dict(fitted=job.fitted) | found


def memory(job, s):
    "Bytes of training, counted and measured."
    case = s.memory[job.case]
    model = blank(case["size"], case["vocab"])
    model = add_codebooks(model, SITES, **case["codes"]) if case["codes"] else model
    counted = training_bytes(model, case["rows"], case["length"])
    return case | dict(counted=counted, measured=measured_bytes(**case))


class World(NamedTuple):
    chosen: object  # text that chooses features
    changes: dict  # name -> changed text
    states: dict  # of these, and of the text that dictionaries are made from


@keep_last
def world(seed, site, tokens):
    "A seed's texts and states."
    chosen = stories_of(TOPICS[: len(TOPICS) // 2], 60_000, 7 + seed, split="train")
    whole, changes = (
        stories_of(TOPICS, tokens, 70 + seed, split="train"),
        story_changes(40_000, seed),
    )
    texts = {"chosen": chosen, "whole": whole, **changes}
    states = {name: states_of(language()[0], c.text, site) for name, c in texts.items()}
    return World(chosen, changes, states)


def encode(d, x):
    "Features as an array."
    with torch.no_grad():
        return d.encode(x).cpu().numpy()


def truth_of(told):
    "What is true at each token."
    return told.truth[told.text.mask].numpy()


def made(job, w, s, **more):
    "A method's dictionary."
    penalty = s.methods[job.method]
    whole = w.states["whole"]
    return make_dictionary(
        job.method, whole, s.n_feats, k=s.k, seed=job.seed, alpha=penalty, **more
    )


def changed(job, s):
    "Features that are relied on, on changed text and under attack."
    w, on = world(job.seed, s.site, s.tokens), {}
    d = made(job, w, s)
    best = trusted(encode(d, w.states["chosen"]), truth_of(w.chosen))
    plain = w.changes["as it is"]
    with torch.no_grad():
        own = d.encode(w.states["as it is"])
    for name, c in w.changes.items():
        with torch.no_grad():
            f = d.encode(w.states[name])
        (now, true), (was, before) = c.of(f), plain.of(own)
        m = measure(d, w.states[name])
        on[name] = dict(
            now=relied_on(best, now.cpu().numpy(), true, asked=c.asked),
            was=relied_on(best, was.cpu().numpy(), before, asked=c.asked),
            fvu=m["fvu"],
            l0=m["l0"],
        )
    asked = {job.method: (d, best)}
    attack = one_word_attack(
        language()[0],
        s.site,
        plain.text,
        truth=plain.truth,
        dictionaries=asked,
        n=60,
        seed=job.seed,
    )
    return dict(good=int(best["good"].sum()), on=on, attack=attack[job.method]), d


def longer(job, s):
    "What more steps bring."
    w = world(job.seed, s.site, s.tokens)
    d, y = made(job, w, s, steps=job.steps), w.states["as it is"]
    board, m = concept_board(encode(d, y), truth_of(w.changes["as it is"])), measure(d, y)
    row = {key: board[key] for key in ("f1", "precise")}
    return row | {key: v for key, v in m.items() if key in ("fvu", "l0", "dead_share")}, d


def run_one(job, s):
    "A row; of dictionaries their directions besides."
    if isinstance(job, Cost | Memory):
        return cost(job, s) if isinstance(job, Cost) else memory(job, s)
    row, d = changed(job, s) if isinstance(job, Changes) else longer(job, s)
    return row, dict(directions=d.directions.detach().contiguous().cpu())


def alike(grid, same_but_seed):
    "Agreement of the seeds' directions."
    each = [grid.tensors(same_but_seed(seed))["directions"] for seed in SEEDS]
    return stability([Directions(d) for d in each])


def finish(grid):
    "What the file holds after its header."
    s = grid.settings
    found = {f"changes_{m}": alike(grid, lambda i, m=m: Changes(m, i)) for m in s.methods}
    for m in s.longer:
        for n in s.longer[m]:
            found[f"longer_{m}_{n}"] = alike(grid, lambda i, m=m, n=n: Longer(m, n, i))
    return dict(
        site=s.site,
        n_feats=s.n_feats,
        k=s.k,
        tokens=s.tokens,
        seeds="text of the dictionary, text that chooses features, text that is changed, the"
        " change's and the method's own randomness",
        rows={grid.name(job): grid.rows([job])[0] for job in jobs(s)},
        stability=found,
    )


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish)

if __name__ == "__main__":
    GRID.main()
