"""Chapter 12's ways to steer: what one seed needs, and every method as an edit at a site."""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.world.prompts import prompts
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.score.effects import effect_and_price, recognise, topic_words
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.model.text import load_text
from codebook_tutorial.dictionary.train import refit, train_sae, tune_decoder
from codebook_tutorial.model.sites import intervene
from codebook_tutorial.feature.steer import (
    add_vector,
    find_switches,
    mean_difference,
    topic_features,
)
from codebook_tutorial.feature.choices import find_choices, split_words
from codebook_tutorial.feature.force import force_codes
from codebook_tutorial.world.grammar import TOPICS
from grid import ROOT, language

LAST, CODED = "resid.2", ("heads.2", "mlp.2")


def autoencoder(seed, s):
    "Seed 0: as shipped; others by the same recipe, kept between runs."
    sae, (model, tok) = load_sae(data_path("sae/last")), language()
    if seed == 0:
        return sae
    alpha = json.loads((data_path("sae/last") / "sae.json").read_text())["meta"]["alpha"]
    file = ROOT / "out" / "rows" / f"12_sae_{s.steps}_{s.tune}_{alpha}_{seed}.safetensors"
    if file.exists():
        sae.load_state_dict(load_file(file))
        return sae
    text = load_text(tok, "stories", n_tokens=1_000_000, length=256, split="train", seed=11)
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, LAST, folder=Path(folder) / "acts", verbose=False).load(LAST)
        x, n_feats = x.to(model.device), sae.W_dec.shape[0]
        sae = refit(train_sae(x, n_feats, alpha=alpha, steps=s.steps, seed=seed), x[:400_000])
        sae = tune_decoder(sae, model, text, site=LAST, steps=s.tune, seed=seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(sae.state_dict(), file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
    return sae


def second_sentence(story):
    "Where a story's third sentence begins."
    return np.searchsorted(story.sentences, [2]) if story.document == "story" else []


def asked(seed):
    "200 places at which texts are continued."
    return prompts(200, second_sentence, seed=seed, each=1)


def every_topic(n):
    "Each topic n times."
    return torch.arange(len(TOPICS)).repeat_interleave(n)


class Setting:
    "All that one seed needs."

    def __init__(self, seed, s):
        (model, tok), self.seed, self.n = language(), seed, s.n
        text, some = (
            load_text(tok, n_tokens=s.tokens, length=256, split="train", seed=3),
            asked(100 + seed),
        )
        self.choose, self.count = split_words(topic_words(), seed=10 + seed)
        self.text, self.model = text, model
        self.sae = autoencoder(seed, s).to(model.device)
        self.coded = CodebookModel.from_pretrained(data_path("codes/single")).to(model.device)
        self.choices = find_choices(text, self.choose, self.count)
        self.target, self.prompts = (
            every_topic(s.n),
            [some[i].ids for _ in TOPICS for i in range(s.n)],
        )
        real = recognise([p.story.ids[p.at : p.at + 96].tolist() for p in some], self.count)
        topics = torch.tensor([p.story.facts["topic"] for p in some])
        self.recogniser = (real == topics).float().mean().item()
        self.features = find_switches(
            model, {LAST: self.sae}, text, choices=self.choices, precision=s.precision
        )
        books = {site: self.coded.codebooks[site] for site in CODED}
        self.codes = find_switches(
            self.coded, books, text, choices=self.choices, precision=s.precision
        )
        self.ranked = self.rank(self.coded)
        self.vectors = {
            name: (
                site,
                mean_difference(model, site, text, choices=self.choices, at=name.split(",")[0]),
            )
            for name, site in self.places().items()
        }
        draw = seeded(100 + seed)
        noise = torch.randn(self.vectors["next"][1].shape, generator=draw)
        self.noise = normalize(noise, dim=-1).to(model.device)
        self.random_codes = {site: self.drawn(switch) for site, switch in self.codes.items()}

    @staticmethod
    def places():
        "Vectors by name, and where they are added."
        sites = {"about, resid.1": "resid.1", "about, resid.0": "resid.0"}
        return {"next": LAST, "about": LAST} | sites

    def drawn(self, switch):
        "Codes at random where a switch writes."
        codes, n = switch.lens.codes(switch.write), switch.lens.dictionary.weight.shape[1]
        drawn = torch.randint(0, n, codes.shape, generator=seeded(100 + self.seed))
        return switch.lens.one_each(torch.where(codes >= 0, drawn, -1))

    def rank(self, coded):
        "The topics' best codes."
        text = self.text[:200]
        choices = find_choices(text, self.choose, self.count)
        return topic_features(coded, coded.codebooks, text, choices=choices, n=8)

    def effect(self, model, starts, way):
        "What a way to steer brings and costs."
        return effect_and_price(
            model,
            language()[1],
            starts,
            target=self.target,
            words=self.count,
            judge=self.model,
            steer=way,
            seed=self.seed,
            progress=False,
        )


# ---- ways to steer: (setting, strength, kw) -> site, and for the topics of a batch the edit there


def sae_tied(its, strength, kw):
    "Switches between features."
    return LAST, lambda t: its.features[LAST].fn(t, strength=strength, **kw)


def sae_tied_added(its, strength, _):
    "The topic's direction everywhere."
    usual, directions = its.features[LAST].write, its.sae.directions.detach()
    return LAST, lambda t: add_vector(strength * usual[t] @ directions)


def mean_vector(its, strength, _):
    "A difference of means everywhere."
    name, _, x = strength.partition(" x ")
    site, v = its.vectors[name]
    return site, lambda t: add_vector(float(x) * v[t])


def mean_vector_at_places(its, strength, _):
    "A difference of means where the switch's features fire."
    fires, v = its.features[LAST].fires, its.vectors["next"][1]

    def edit(t):
        return lambda x: x + fires(x, t)[..., None] * strength * v[t, None]

    return LAST, edit


def mean_vector_at_words(its, strength, _):
    "Where the model itself gives the words that choose, of all topics together, more than 0.2."
    chosen, v = (
        torch.tensor([t for some in its.choose.values() for t in some]),
        its.vectors["next"][1],
    )
    final, out = its.model.base_model.final_layer_norm, its.model.get_output_embeddings()

    def likely(x):
        return out(final(x)).softmax(-1)[..., chosen].sum(-1, keepdim=True) > 0.2

    def edit(t):
        return lambda x: x + likely(x) * strength * v[t, None]

    return LAST, edit


def noise(its, strength, _):
    "Edits as long as the switch's of that strength, at the same places."

    def edit(t):
        own = its.features[LAST].fn(t, strength=strength)
        return lambda x: x + (own(x) - x).norm(dim=-1, keepdim=True) * its.noise[t, None]

    return LAST, edit


EDITS = dict(
    sae_tied=sae_tied,
    sae_tied_added=sae_tied_added,
    mean_difference=mean_vector,
    mean_difference_at_places=mean_vector_at_places,
    mean_difference_at_words=mean_vector_at_words,
    random=noise,
)
KINDS = dict(start=dict(swap=False), swap=dict(start=False))


def way_of(its, method, strength):
    "The model that writes, and what is opened around each batch."
    base, _, kind = method.rpartition("_")
    base, kw = (base, KINDS[kind]) if kind in KINDS else (method, {})
    if base in ("codebook", "random_codes"):
        sites = CODED if strength == "both" else (strength,)

        def tables(t):
            write = its.random_codes if base == "random_codes" else {}
            return {site: its.codes[site].fn(t, write=write.get(site), **kw) for site in sites}

        return its.coded, lambda rows: its.coded.edit_codes(tables(its.target[rows]))
    if base == "codebook_forced":
        return its.coded, forced(its.coded, its.ranked, strength, target=its.target)
    if base.endswith("unsteered"):
        return (its.model if base == "unsteered" else its.coded), None
    site, edit = EDITS[base](its, strength, kw)
    return its.model, lambda rows: intervene(its.model, {site: edit(its.target[rows])})


def forced(cb, ranked, n, *, target):
    "The n best codes of every topic at every position (no more than k in a group)."
    best = {site: [] for site in cb.codebooks}
    for site, lists in best.items():
        for name in TOPICS:
            some = [r["feature"] for r in ranked[name][:n]]
            lists.append([f.id for f in some if f.site == site])

    def way(rows):
        some = {site: lists for site, lists in best.items() if any(lists)}
        books = cb.codebooks
        edits = {site: force_codes(books[site], x, target[rows]) for site, x in some.items()}
        return cb.edit_codes(edits)

    return way
