"""Chapter 05: what every choice of codes costs, three seeds; about four hours on one core."""

import itertools
import time
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, normalize
from transformers import logging

from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.finetune import bits_per_activation, finetune
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.model.run import lm_loss, next_probs
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.sites import match_sites, site_dims
from codebook_tutorial.feature.states import feature_numbers, record_codes
from codebook_tutorial.world.prompts import gift_prompts
from grid import Grid


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    recipe: dict = dict(steps=200, lr=5e-4, batch=8, codes_lr=0.01)
    start_rows: int = 200  # rows of text from which codes begin: some 42,000 tokens
    tokens: int = 1_300_000
    seeds: int = 3


class Job(NamedTuple):
    name: str
    seed: int


class Case(NamedTuple):
    sites: dict = {}  # site pattern -> what differs there
    books: dict = {}  # settings of the codebooks
    training: dict = {}  # what differs from the recipe


BOTH = {"heads.*": {}, "mlp.*": {}}
RESIDUAL, SINGLE = dict(select="residual", learn="ema"), dict(select="euclidean", learn="ema")
COSINE = dict(select="cosine", learn="gradient")
ONE = dict(k=1, select="euclidean")


def tables():
    "name -> Case: every k and number of codes."
    found = {}
    for k, n in itertools.product((4, 1, 2, 8), (1024, 512, 2048, 256)):
        form = RESIDUAL if k > 1 else SINGLE
        found[f"residual k={k} C={n}"] = Case(BOTH, dict(n_codes=n, k=k, **form))
    for k, n in itertools.product((1, 4, 8, 16), (1024, 256)):
        found[f"cosine k={k} C={n}"] = Case(BOTH, dict(n_codes=n, k=k, **COSINE))
    return found


def places():
    "name -> Case: codes at fewer or other sites."
    single, four = dict(n_codes=1024, k=1, **SINGLE), dict(n_codes=1024, k=4, **RESIDUAL)
    whole = "whole attention output k=1, MLP k=1"
    return {
        "attention k=1": Case({"heads.*": {}}, single),
        "MLP k=1": Case({"mlp.*": {}}, single),
        whole: Case({"attn.*": {}, "mlp.*": {}}, single),
        "attention k=4": Case({"heads.*": {}}, four),
        "MLP k=4": Case({"mlp.*": {}}, four),
        "attention k=4, MLP k=1": Case({"heads.*": {}, "mlp.*": ONE}, four),
        "attention k=1, MLP k=4": Case({"heads.*": ONE, "mlp.*": {}}, four),
    }


def variants():
    "name -> Case: one choice changed at a time."
    base, paper = dict(n_codes=1024, k=4, **RESIDUAL), dict(n_codes=1024, k=8, **COSINE)
    still, random, as_is = dict(resample_every=0), dict(start="random"), dict(steps=0)
    untrained = "from data, no training"
    return {
        "residual k=4, no resampling": Case(BOTH, base, still),
        "residual k=4, random start": Case(BOTH, base, random),
        f"residual k=4, {untrained}": Case(BOTH, base, as_is),
        f"residual k=4 C=256, {untrained}": Case(BOTH, base | dict(n_codes=256), as_is),
        "residual k=4, codes by gradient": Case(BOTH, base | dict(learn="gradient")),
        "residual k=4, 600 steps": Case(BOTH, base, dict(steps=600)),
        "control, 600 steps": Case(training=dict(steps=600)),
        "euclidean k=4": Case(BOTH, base | dict(select="euclidean")),
        "cosine k=8, mean": Case(BOTH, paper | dict(combine="mean")),
        "cosine k=8, LayerNorm": Case(BOTH, paper | dict(norm=True)),
        "cosine k=8, averages": Case(BOTH, paper | dict(learn="ema")),
        "cosine k=8, no resampling": Case(BOTH, paper, still),
        "cosine k=8, random start": Case(BOTH, paper, random),
        "cosine k=1, no resampling": Case(BOTH, paper | dict(k=1), still),
    }


@cache
def cases():
    "name -> Case, the most important first."
    controls = dict(control=Case(), pretrained=Case(training=dict(steps=0)))
    return controls | tables() | places() | variants()


def jobs(s):
    "Every case and seed."
    return [Job(name, seed) for name in cases() for seed in range(s.seeds)]


class Texts(NamedTuple):
    train: Text
    test: Text
    told: Text  # stories whose concepts are known
    truth: torch.Tensor
    asked: list  # prompts: who gets the gift?


@cache
def texts_of(tokens):
    "What models are trained and measured on."
    _, tok = load_lm("stories")
    told, facts = story_text(30_000, split="test", seed=1)
    train = load_text(tok, "stories", n_tokens=tokens, length=256, split="train", seed=5)
    test = load_text(tok, "stories", n_tokens=50_000, length=256)
    return Texts(train, test, told, atoms(facts).flatten(0, 1), gift_prompts(300))


def with_codes(model, case, text, *, seed, rows):
    "A codebook per site (per head at heads.*), begun from data or in random directions."
    dims, books, heads = site_dims(model, list(case.sites)), {}, model.config.num_attention_heads
    for pattern, differs in case.sites.items():
        groups = heads if pattern == "heads.*" else 1
        settings = dict(groups=groups, commitment=0.25) | case.books | differs
        for site in match_sites(model, pattern):
            torch.manual_seed(seed * 100 + len(books))
            books[site] = Codebook(dims[site], **settings)
    cb, init = CodebookModel(model, books), dict(generator=seeded(seed), pad=text.pad)
    if "start" not in case.training:
        return cb.init_from_data(text.ids[:rows], **init)
    began = {site: book.weight.detach().clone() for site, book in books.items()}
    cb.init_from_data(text.ids[:rows], iters=1, **init)
    for site, book in books.items():  # random directions, as long as the codes from data
        length = book.weight.norm(dim=-1, keepdim=True)
        book.weight.data = normalize(began[site], dim=-1) * length
        if book.learn == "ema":
            book.total.copy_(book.weight)
    return cb


def likeness(cb, text):
    "Mean cosine of two codes at the same place, and of two at different places; None for k=1."
    same, other, mask = [], [], text.attention_mask[:16]
    for site, ids in record_codes(cb, text.ids[:16]).items():
        book = cb.codebooks[site]
        if book.k == 1:
            continue
        codes = [book.weight[g][ids[..., g, :]][mask] for g in range(len(book.weight))]
        a, b = torch.stack(codes, 1).unbind(2)[:2]  # of [N, groups, k, width]
        same.append(cosine_similarity(a, b, dim=-1).mean())
        other.append(cosine_similarity(a, b.roll(1000, 0), dim=-1).mean())
    if not same:
        return None
    pair = {"same place": same, "different places": other}
    return {name: torch.stack(values).mean().item() for name, values in pair.items()}


def f1_table(features, truth, n):
    "F1 of every feature for every concept [n, concepts], and how often the concepts hold."
    real = truth.float()
    hits = torch.zeros(n, real.shape[1])
    for slot in features.T:
        hits.index_add_(0, slot, real)
    uses = torch.bincount(features.flatten(), minlength=n).float()
    return 2 * hits / (uses[:, None] + real.sum(0)).clamp(min=1), real.sum(0)


def meaning(cb, text, truth):
    "F1 of each concept's best code, chosen on one half of the rows and scored on the other."
    found = record_codes(cb, text.ids)
    numbers = [feature_numbers(cb, found, site) + 100_000 * i for i, site in enumerate(found)]
    names, features = torch.cat(numbers, 1).unique(return_inverse=True)
    there, half = text.mask.flatten(), len(text.ids) // 2 * text.ids.shape[1]

    def f1(truth):
        (chosen, seen), (scored, again) = (
            f1_table(features[part][there[part]], truth[part][there[part]], len(names))
            for part in (slice(None, half), slice(half, None))
        )
        asked = (seen >= 20) & (again >= 20)
        best = scored.gather(0, chosen.argmax(0, keepdim=True))[0]
        return best[asked].mean().item(), int(asked.sum())

    value, n = f1(truth)
    shifted, _ = f1(truth.view(*text.ids.shape, -1).roll(1, 0).flatten(0, 1))
    return {"f1": value, "f1, truth of another row": shifted, "concepts": n}


def of_codes(cb, texts, logs):
    "What is measured where there are codes."
    bits = bits_per_activation(cb, texts.test)  # counts afresh, on the test text
    row = dict(dead=cb.dead_share())
    row |= {key: {site: b[key] for site, b in bits.items()} for key in ("bits", "most", "dense")}
    row |= dict(likeness=likeness(cb, texts.test), meaning=meaning(cb, texts.told, texts.truth))
    if logs:
        last = {n: v for n, v in logs[-1].items() if n.startswith("error ")}
        row["errors"] = {n.removeprefix("error "): v for n, v in last.items()}
    return row


def run_one(job, s):
    "Train one case from one seed and measure it."
    texts, start, case = texts_of(s.tokens), time.process_time(), cases()[job.name]
    model, cut, logs = load_lm("stories")[0], s.start_rows, None
    training = s.recipe | case.training
    training.pop("start", None)
    if case.sites:
        model = with_codes(model, case, texts.train, seed=job.seed, rows=cut)
    if training["steps"]:
        logs = finetune(model, texts.train[cut:], seed=job.seed, log_every=25, **training)
    trained = time.process_time() - start
    answers = torch.tensor([q.answer for q in texts.asked])
    found = next_probs(model, [q.ids for q in texts.asked]).argmax(-1)
    row = job._asdict() | dict(sites=list(case.sites), settings=case.books, training=training)
    row |= dict(loss=lm_loss(model, texts.test))
    row |= dict(ioi=(found == answers).double().mean().item())
    row |= of_codes(model, texts, logs) if case.sites else {}
    return row | dict(train_cpu_seconds=round(trained, 1))


def finish(grid):
    "What the file holds after its header; notes are written by hand, and kept."
    s = grid.settings
    return dict(
        notes=grid.committed().get("notes", ""),
        recipe=s.recipe | dict(start_rows=s.start_rows),
        seeds="where the codes begin, and the order of the text; one base model",
        units="loss: nats a token, 50,000 tokens of unseen stories; ioi: share of 300 held-out"
        " pairs; dead: share of codes not used on those 50,000 tokens; bits: a position, per site",
        rows=grid.rows(),
    )


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish)

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    GRID.main()
