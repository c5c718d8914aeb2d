"""Chapter 12: every way to steer at every strength, ten topics, three seeds.

A seed means: which words choose and which count, the prompts, the autoencoder (seed 0: the shipped
one; others trained by its recipe), the sampling, the random controls. The codebook model is one.
Words and prompts are others than those the methods were developed on.
"""

import json
from typing import NamedTuple

import numpy as np

from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.core import data_path
from codebook_tutorial.score.effects import count_words, effect_and_price, topic_words
from codebook_tutorial.model.text import load_text
from codebook_tutorial.model.sites import intervene
from codebook_tutorial.feature.steer import add_vector, mean_difference
from codebook_tutorial.feature.choices import find_choices, split_words
from codebook_tutorial.world.grammar import TOPICS
from grid import Grid, keep_last, language
from steering_ways import LAST, Setting, asked, every_topic, forced, way_of


def vectors(**strengths):
    "Strengths of vectors by where they are taken and added."
    return [f"{name} x {x}" for name, some in strengths.items() for x in some]


class Settings(NamedTuple):
    version: int = 3  # raise when what a row means changes
    tokens: int = 300_000
    n: int = 40  # texts per topic
    precision: float = 0.3
    steps: int = 8000
    tune: int = 600
    # method -> strengths; what is pushed everywhere is tried on both sides of the budget
    ways: dict = dict(
        unsteered=[0],
        codebook_unsteered=[0],
        sae_tied=[1.0, 2.0, 3.0, 4.0],
        sae_tied_start=[2.0, 3.0, 4.0],
        sae_tied_swap=[1.0, 2.0, 3.0],
        sae_tied_added=[0.2, 0.3, 0.4, 0.5, 0.6, 0.8],
        random=[1.0, 2.0, 3.0, 4.0],
        codebook=["mlp.2", "heads.2", "both"],
        codebook_start=["mlp.2", "both"],
        codebook_swap=["mlp.2", "both"],
        random_codes=["mlp.2", "heads.2", "both"],
        codebook_forced=[1, 2, 4],
        mean_difference=vectors(
            **{
                "next": (0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 1.0),
                "about": (10.0, 12.0, 14.0),
                "about, resid.1": (12.0, 16.0),
                "about, resid.0": (8.0, 12.0),
            }
        ),
        mean_difference_at_places=[1.0, 2.0, 3.0, 4.0, 6.0],
        mean_difference_at_words=[1.0, 2.0, 3.0, 4.0, 6.0],
    )


class Job(NamedTuple):
    seed: int
    method: str
    strength: object


EXTRA = [("table_3", "0, 1, 8 codes"), ("again", "next x 0.6, 8 texts a topic")]


def jobs(s):
    "Every seed, method and strength; the paper's Table 3; a row that the chapter computes again."
    ways = [(m, x) for m, some in s.ways.items() for x in some]
    return [Job(seed, *way) for seed in range(3) for way in ways + EXTRA]


@keep_last
def setting(seed, settings):
    "A seed's setting; `settings` as JSON."
    return Setting(seed, Settings(**json.loads(settings)))


def _other(feature, g):
    "A code of the same group, drawn at random."
    return feature._replace(id=int(g.integers(1024)) + feature.id // 1024 * 1024)


def table_3(its, data="codes/top8"):
    "The paper's: 4 prompts x 10 samples; no code forced, one, eight, eight random ones."
    cb, found = CodebookModel.from_pretrained(data_path(data)).to(its.model.device), []
    ranked, g = its.rank(cb), np.random.default_rng(100 + its.seed)
    starts = [its.prompts[i] for _ in TOPICS for i in range(4) for _ in range(10)]
    drawn = {
        name: [r | dict(feature=_other(r["feature"], g)) for r in ranked[name]] for name in ranked
    }
    ways = {0: None, "8 random": forced(cb, drawn, 8, target=its.target)}
    ways |= {n: forced(cb, ranked, n, target=its.target) for n in (1, 8)}
    for n in (0, 1, 8, "8 random"):
        e = its.effect(cb, starts, ways[n])
        by_target = e.mention.view(len(TOPICS), its.n).float().mean(1).tolist()
        row = dict(method="table_3", strength=n, seed=its.seed, mentions=e.mentions)
        row |= dict(mentions_by_target=by_target)
        found.append(row | {key: getattr(e, key) for key in ("rate", "loss", "distinct")})
    return found


def again(job):
    "What the chapter computes again live: its words and prompts; only sampling differs by seed."
    (model, tok), target, some = language(), every_topic(8), asked(0)
    choose, count = split_words(topic_words())
    text = load_text(tok, n_tokens=120_000, length=256, split="train", seed=3)
    v = mean_difference(model, LAST, text, choices=find_choices(text, choose, count))
    e = effect_and_price(
        model,
        tok,
        [some[i].ids for _ in TOPICS for i in range(8)],
        target=target,
        words=count,
        judge=model,
        steer=lambda rows: intervene(model, {LAST: add_vector(0.6 * v[target[rows]])}),
        seed=job.seed,
        progress=False,
    )
    return dict(method="again", strength=job.strength, seed=job.seed, rate=e.rate, loss=e.loss)


def run_one(job, s):
    "One way at one strength: rate, price and variety; of each half of the texts; per topic."
    if job.method == "again":
        return again(job)
    its = setting(job.seed, json.dumps(s._asdict()))
    if job.method == "table_3":
        return table_3(its)
    model, way = way_of(its, job.method, job.strength)
    e = its.effect(model, its.prompts, way)
    right, nats, tokens = (
        x.float().view(len(TOPICS), s.n).sum(1) for x in (e.right, e.nats, e.tokens)
    )
    topics = (count_words(e.samples, its.count) > 0).float().sum(1)
    row = dict(method=job.method, strength=job.strength, seed=job.seed)
    for name, part in (("all", e), ("even", e[::2]), ("odd", e[1::2])):
        keys = ("rate", "mentions", "loss", "distinct")
        row[name] = {key: getattr(part, key) for key in keys}
    row |= dict(by_target=(right / s.n).tolist(), loss_by_target=(nats / tokens).tolist())
    others = (topics - e.mention.float() > 0).float().mean().item()
    return row | dict(other_topics=others, recogniser=its.recogniser)


def finish(grid):
    "What the file holds after its header."
    s = grid.settings
    rows, extra = grid.rows(seconds=False), [name for name, _ in EXTRA]
    return dict(
        tokens=s.tokens,
        texts_a_topic=s.n,
        precision=s.precision,
        seeds="words that choose and count, prompts, autoencoder (0: shipped), sampling, random"
        " controls; one codebook model",
        rows=[row for row in rows if row["method"] not in extra],
        **{name: [row for row in rows if row["method"] == name] for name in extra},
    )


CODES = [
    f"codes/{name}/{file}.safetensors"
    for name in ("single", "top8")
    for file in ("codebooks", "model")
]
INPUTS = ("stories/model.safetensors", "sae/last/sae_state.safetensors", *CODES)
GRID = Grid(
    __file__,
    Settings(),
    jobs,
    run_one=run_one,
    finish=finish,
    inputs=INPUTS,
    lines=("rows", *(name for name, _ in EXTRA)),
    hardware="one CPU core",
)

if __name__ == "__main__":
    GRID.main()
