"""Parts of the course, each beside its floor; `course.py bench` runs each in a process.

python benchmarks/parts.py steering         prints its rows; with --quick: small sizes
"""

import json
import os
import resource
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.feature.explain.protocol import fragments, make_cases, pieces, some_features
from codebook_tutorial.feature.explain.scores import interpret
from codebook_tutorial.dictionary.baselines import Affine, ica, pca
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.feature.search import shared
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.world.prompts import prompts
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.model.generate import generate
from codebook_tutorial.score.effects import topic_words
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.feature.index import open_index
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.world.tasks import task_pairs
from codebook_tutorial.feature.patch import Patch
from codebook_tutorial.feature.orders import acdc_order, attribution_order, greedy_order
from codebook_tutorial.feature.explain.rules import PredicateExplainer, story_words
from codebook_tutorial.dictionary.train import train_sae
from codebook_tutorial.model.sites import intervene
from codebook_tutorial.feature.steer import add_vector, find_switches, steer
from codebook_tutorial.feature.choices import find_choices, split_words
from codebook_tutorial.feature.neurons import against_neurons, neuron_acts, unit_scores


def timed(fn, clock=time.perf_counter):
    "Seconds of one call."
    start = clock()
    fn()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def interleaved(ways, repeats, clock=time.perf_counter):
    "name -> seconds of each round, after one to warm up."
    rounds = [{name: timed(fn, clock) for name, fn in ways.items()} for _ in range(repeats + 1)]
    return {name: [times[name] for times in rounds[1:]] for name in ways}


def row(who, seconds):
    "Median, lowest and highest."
    return dict(who=who, seconds=median(seconds), low=min(seconds), high=max(seconds))


@torch.no_grad()
def forward(model, text, batch=16):
    "The model over a text."
    device = next(model.parameters()).device
    for i in range(0, len(text), batch):
        model(input_ids=text[i : i + batch].ids.to(device), use_cache=False)


def harvest_speed(tokens=100_000, repeats=5):
    "Harvesting one to four sites beside the bare model, whole and without its head."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=tokens, length=256)
    middle = model.config.num_hidden_layers // 2
    every = [f"{kind}.{middle}" for kind in ("resid", "mlp", "attn", "neurons")]

    def once(k):
        with tempfile.TemporaryDirectory() as folder:
            harvest(model, text, every[:k], folder=Path(folder) / "acts", verbose=False)

    ways = {"whole model": partial(forward, model, text)}
    ways["without its head"] = partial(forward, model.base_model, text)
    ways |= {f"harvest, {k} site{'s' * (k > 1)}": partial(once, k) for k in range(1, 5)}
    rows = [row(*one) for one in interleaved(ways, repeats).items()]
    for one in rows:
        one["tokens_per_second"] = text.n_tokens / one["seconds"]
        one["of_whole_model"] = rows[0]["seconds"] / one["seconds"]
    return rows


def patching_speed(n_prompts=32, n_feats=32, repeats=3):
    "Ordering features beside the naive way: every feature at every step, whole model, one set."
    model, tok = load_lm("stories")
    layers, pairs = model.config.num_hidden_layers, task_pairs(tok, "ioi", n_prompts)
    sae, where = load_sae(data_path("sae/tied")), next(model.parameters()).device
    sae, ids, fixed = sae.to(where), pairs.base.to(where), dict(site="resid.1", n_feats=384)
    with torch.no_grad():
        bare = median(timed(partial(model, input_ids=ids, use_cache=False)) for _ in range(20))
    naive = sum(384 - i for i in range(n_feats))
    rows = [dict(who="naive greedy, computed", seconds=naive * bare, passes=naive)]
    rows[0] |= dict(layers=naive * layers, fewer_layers=1.0, **fixed)
    ways = dict(
        attribution=partial(attribution_order, n_feats=n_feats),
        attribution_3=partial(attribution_order, n_feats=n_feats, points=3),
        greedy=partial(greedy_order, n_feats=n_feats),
        greedy_each_prompt=partial(greedy_order, n_feats=n_feats, per_prompt=True),
        greedy_all=partial(greedy_order, n_feats=n_feats, width=None),
        acdc=acdc_order,
    )
    for who, way in ways.items():
        times = []
        for _ in range(1 if who == "greedy_all" else repeats):
            start, patch = time.perf_counter(), Patch(model, "resid.1", sae, pairs=pairs)
            way(patch)
            times.append(time.perf_counter() - start)
        run = patch.passes * patch.tail.n_layers
        few = dict(passes=patch.passes, layers=run, fewer_layers=naive * layers / run)
        rows.append(dict(who=who, seconds=median(times), **few, **fixed))
    return rows


def first_sentence(story):
    "Where a story's first sentence ends."
    return np.searchsorted(story.sentences, [1]) if story.document == "story" else []


def steering_speed(n_prompts=80, tokens=64, repeats=5):
    "Generation under steering beside plain generation of the same model."
    (model, tok), sae = load_lm("stories"), load_sae(data_path("sae/last"))
    coded = CodebookModel.from_pretrained(data_path("codes/single"))
    text = load_text(tok, "stories", n_tokens=60_000, length=256, split="train", seed=3)
    (choose, hidden), part = split_words(topic_words()), text[:150]
    choices, few = find_choices(text, choose, hidden), find_choices(part, choose, hidden)
    switches = find_switches(model, {"resid.2": sae}, text, choices=choices)
    books = {site: coded.codebooks[site] for site in ("heads.2", "mlp.2")}
    tables = find_switches(coded, books, part, choices=few)
    start = [p.ids for p in prompts(n_prompts, first_sentence, seed=0, each=1)][:n_prompts]
    target = torch.arange(len(start)) % len(choices.names)
    vector = add_vector(sae.directions[0])
    ways = {
        "plain": (model, None),
        "a vector added": (model, lambda rows: intervene(model, {"resid.2": vector})),
        "switch of features": (model, lambda rows: steer(model, switches, target[rows])),
        "codes, plain": (coded, None),
        "switch of codes": (coded, lambda rows: steer(coded, tables, target[rows])),
    }
    calls = {
        name: partial(generate, of, tok, start, tokens, steer=way, progress=False)
        for name, (of, way) in ways.items()
    }
    times = interleaved(calls, repeats, time.process_time)
    rows = [row(*one) for one in times.items()]
    for one in rows:
        plain = rows[3 if "codes" in one["who"] else 0]
        one["x_plain"] = one["seconds"] / plain["seconds"]
    return rows


def index_speed(tokens=200_000, repeats=5):
    "Building an index of the shipped codes beside the model's own pass, and asking it."
    model = CodebookModel.from_pretrained(data_path("codes/top8"))
    _, tok = load_lm("stories")
    text, _ = story_text(tokens)
    with tempfile.TemporaryDirectory() as folder:
        rows = [row("the model alone", [timed(partial(forward, model, text))])]
        build = partial(build_index, model, tok, text, Path(folder) / "index")
        rows.append(row(f"build, {tokens:,} tokens x 6 sites", [timed(build)]))
        rows[-1]["tokens_per_second"] = text.n_tokens / rows[-1]["seconds"]
        rows[-1]["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        index = open_index(Path(folder) / "index", tok)
        often = int(index.active("mlp.1").argmax())
        ways = {"open": partial(open_index, Path(folder) / "index", tok)}
        for pattern in (r"\b(dragon)s?\b", r"\b(the)\b", r"(\w+)"):
            ways[f"search {pattern}"] = partial(index.search, pattern)
        ways["best dragon"] = partial(index.best, r"\b(dragon)s?\b")
        ways["contexts of the most frequent feature"] = partial(index.contexts, "mlp.1", often)
        ways["shared, 4000 rows"] = partial(shared, index, "mlp.0", "mlp.1", rows=4000)
        return rows + [row(*one) for one in interleaved(ways, repeats).items()]


def neurons_speed(tokens=60_000, repeats=3):
    "Codes beside neurons: reading these, scoring them on known concepts, comparing."
    model, tok = load_lm("stories")
    text, facts = story_text(tokens)
    acts, truth = neuron_acts(model, text), atoms(facts)
    true = truth[text.mask].numpy()
    prior, half = np.full((1, true.shape[1]), 0.3), len(true) // 2
    cb = CodebookModel.from_pretrained(data_path("codes/top8"))
    with tempfile.TemporaryDirectory() as folder:
        index = build_index(cb, tok, text, folder=Path(folder) / "index")
        ways = {
            "neuron_acts": partial(neuron_acts, model, text),
            f"unit_scores, {true.shape[1]} concepts": partial(unit_scores, acts, true, prior, half),
            "against_neurons": partial(against_neurons, index, acts, truth),
        }
        return [row(*one) for one in interleaved(ways, repeats).items()]


def dictionaries(x):
    "Eight dictionaries of one layer; training is not timed here."
    few = x[torch.randperm(len(x), generator=seeded(0))[:40_000]]
    directions = random_directions(384, 96, seed=100).directions
    book = Codebook(96, 384, 12, select="residual")
    return {
        "sae_tied": load_sae(data_path("sae/tied")),
        "sae_topk": train_sae(x, 384, "topk", k=12, steps=200),
        "sae_alpha0": train_sae(x, 384, "tied", alpha=0.0, steps=200, resample=()),
        "codebook": book.init_from(few, generator=seeded(0)).eval(),
        "random": Affine(directions, mean=x.mean(0), relu=True),
        "random, signed": Affine(directions, mean=x.mean(0)),
        "ica": ica(x),  # the last two have 96 features, all of which are taken
        "pca": pca(x),
    }


def explained(store, methods, words, *, n_feats):
    "Seconds of each step of explaining and scoring features with the predicate explainer."
    times, last = {}, time.perf_counter()

    def lap(step):
        nonlocal last
        now = time.perf_counter()
        times[step], last = times.get(step, 0.0) + now - last, now

    x = store.load("resid.1")
    lap("read states")
    explainer = PredicateExplainer(**story_words())  # a new one: it remembers nothing
    for dictionary in methods.values():
        f, ids = some_features(dictionary, x, n_feats)
        lap("encode")
        cases = make_cases(f, words, ids)
        lap("choose fragments")
        interpret(cases, explainer)
        lap("explain and score")
    return times | dict(together=sum(times.values()))


def autointerp_speed(n_fragments=5000, n_feats=150, repeats=3):
    "Explaining and scoring features of eight dictionaries, by step."
    model, tok = load_lm("stories")
    text = load_text(tok, n_tokens=100 * n_fragments, length=256, split="train", seed=11)
    text = fragments(text)[:n_fragments]
    words = pieces(text, tok)
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(model, text, "resid.1", folder=Path(folder) / "states", verbose=False)
        methods = dictionaries(store.load("resid.1"))
        runs = [explained(store, methods, words, n_feats=n_feats) for _ in range(repeats)]
    return [row(step, [times[step] for times in runs]) for step in runs[0]]


# name -> what it measures, and its small sizes
PARTS = dict(
    harvest=(harvest_speed, dict(tokens=5000, repeats=1)),
    patching=(patching_speed, dict(n_prompts=4, n_feats=4, repeats=1)),
    steering=(steering_speed, dict(n_prompts=10, tokens=4, repeats=1)),
    index=(index_speed, dict(tokens=30_000, repeats=1)),
    neurons=(neurons_speed, dict(tokens=30_000, repeats=1)),
    autointerp=(autointerp_speed, dict(n_fragments=300, n_feats=10, repeats=1)),
)
if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    measure, small = PARTS[sys.argv[1]]
    for one in measure(**small if "--quick" in sys.argv else {}):
        print("@@" + json.dumps(one))
