"""What a dictionary is asked: one class per question, each with score(dictionary)."""

from dataclasses import dataclass

import numpy as np
import torch

from codebook_tutorial.dictionary.base import Dictionary, Lens
from codebook_tutorial.feature.explain.protocol import make_cases, some_features
from codebook_tutorial.feature.explain.rules import PredicateExplainer, story_words
from codebook_tutorial.feature.explain.scores import interpret
from codebook_tutorial.feature.patch import patch_curve
from codebook_tutorial.feature.steer import Choices, find_switches, steer
from codebook_tutorial.model.text import Text
from codebook_tutorial.score.concepts import concept_board
from codebook_tutorial.score.effects import Effect, best_within, effect_and_price
from codebook_tutorial.score.metrics import measure, replaced_loss
from codebook_tutorial.world.grammar import ID


# %%
@dataclass(eq=False)
class Subject:
    "Who is asked: one site of a model, and the untouched model that judges the price."

    model: object  # whose states are read; of a CodebookModel only its own book can be asked
    tok: object
    site: str
    judge: object  # the untouched model


# %% [markdown]
# What is left when states are decoded from their features.
# %%
@dataclass(eq=False)
class Kept:
    "Sparsity, error, dead features, and the loss that decoding costs."

    subject: Subject
    text: Text  # unseen
    states: torch.Tensor  # [N, d] at its ordinary tokens
    clean: float  # nats per token of the text, by the judge

    @torch.no_grad()
    def score(self, dictionary: Dictionary, seed: int = 0) -> dict:
        "l0, fvu, dead (share), paid (nats per token more than the untouched model)."
        m = measure(dictionary, self.states)
        model, site = self.subject.model, self.subject.site
        decoded = Lens(model, site, dictionary).decoded
        paid = replaced_loss(model, self.text, site, fn=decoded) - self.clean
        return dict(l0=m["l0"], fvu=m["fvu"], dead=m["dead_share"], paid=paid)


# %%
@dataclass(eq=False)
class Concepts:
    "Known concepts in single features, in a few, split and absorbed."

    states: torch.Tensor  # [N, d]
    truth: np.ndarray  # [N, C] bool

    @torch.no_grad()
    def score(self, dictionary: Dictionary, seed: int = 0) -> dict:
        "As `concept_board`."
        return concept_board(dictionary.encode(self.states).cpu().numpy(), self.truth)


# %%
@dataclass(eq=False)
class Explained:
    "How well explanations by rule predict features (positive parts only)."

    words: list  # of the fragments
    states: torch.Tensor  # [n, d] there
    rules: dict  # for PredicateExplainer

    @torch.no_grad()
    def score(self, dictionary: Dictionary, seed: int = 0, n: int = 60) -> dict:
        "Mean top-and-random score of n features (0 where there is none), share skipped."
        f, ids = some_features(dictionary, self.states, n, seed=seed)
        cases = make_cases(np.maximum(f, 0), self.words, ids, seed=seed)
        rows = interpret(cases, PredicateExplainer(**self.rules))
        r = [row["r"] or 0.0 if row else 0.0 for row in rows]
        skipped = np.mean([case is None for case in cases])
        return dict(explained=float(np.mean(r)), explained_skipped=float(skipped))


# %%
@dataclass(eq=False)
class Patched:
    "How much of a counterfactual a few features carry. A code writes over the one in its slot."

    subject: Subject
    pairs: list  # Pairs, one per couple of names

    def score(self, dictionary: Dictionary, seed: int = 0, n: int = 4) -> dict:
        "Share of the KL that n features (one set, chosen on half) remove; all features; length."
        ask = dict(n_feats=n, check=False)
        model, site = self.subject.model, self.subject.site
        curves = [patch_curve(model, site, dictionary, pairs=p, **ask) for p in self.pairs]
        gone = [1 - c.kl[-1].mean().item() / c.kl[0].mean().item() for c in curves]
        most = [1 - c.floor.mean().item() / c.kl[0].mean().item() for c in curves]
        edits = [c.edit[-1].mean().item() for c in curves]
        names = ("patched", "patched_all", "patched_edit")
        return {name: float(np.mean(v)) for name, v in zip(names, (gone, most, edits))}


# %% [markdown]
# Steering needs features without signs: a dictionary with signs is asked by its halves.
# %%
class Halves(Dictionary):
    "A dictionary with signs as one without: every feature's positive and negative part."

    def __init__(self, dictionary):
        super().__init__()
        self.dictionary = dictionary

    @property
    def directions(self):
        return torch.cat([self.dictionary.directions, -self.dictionary.directions])

    def encode(self, x):
        f = self.dictionary.encode(x)
        return torch.cat([f, -f], -1).relu()

    def decode(self, f):
        n = f.shape[-1] // 2
        return self.dictionary.decode(f[..., :n] - f[..., n:])


def unsigned(dictionary: Dictionary, states) -> Dictionary:
    "The dictionary itself, or its halves where features are negative at some of the states."
    return Halves(dictionary) if (dictionary.encode(states[:1000]) < 0).any() else dictionary


# %%
@dataclass(eq=False)
class Steered:
    "Texts steered to topics by the switch of chapter 12, within a budget of loss."

    subject: Subject
    states: torch.Tensor  # [N, d], to see whether features have signs
    text: Text  # in which the switch is found
    choices: Choices
    words: dict  # {topic: token ids} that count as success
    prompts: list
    target: torch.Tensor  # [n] which topic each prompt is steered to
    plain: Effect  # unsteered, by the judge

    def _switches(self, dictionary):
        "Codes that are too rarely right are given less certain ones, as autoencoders are."
        found = {self.subject.site: dictionary}
        for precision in (0.3, 0.1, 0.0):
            try:
                return find_switches(
                    self.subject.model,
                    found,
                    self.text,
                    choices=self.choices,
                    precision=precision,
                )
            except NoSwitch as e:
                why = e
        raise why

    def _effect(self, switches, seed, **kw):
        s = self.subject
        return effect_and_price(
            s.model,
            s.tok,
            self.prompts,
            target=self.target,
            words=self.words,
            judge=s.judge,
            steer=lambda rows: steer(s.model, switches, self.target[rows], **kw),
            seed=seed,
            progress=False,
        )

    def score(
        self,
        dictionary: Dictionary,
        seed: int = 0,
        strengths: tuple = (1.0, 2.0, 3.0),
        *,
        limit: float = 1.5,  # times the unsteered loss
    ) -> dict:
        "Share of texts about their topic, at the best strength within the limit; their loss."
        rest = self.plain[1::2]
        try:
            switches = self._switches(unsigned(dictionary, self.states))
        except NoSwitch as e:
            return dict(steered=rest.rate, steered_loss=1.0, strength=0.0, steered_why=str(e))
        if not next(iter(switches.values())).lens.graded:  # codes are written or not
            ways = {strengths[0]: {}}
        else:
            ways = {s: dict(strength=s) for s in strengths}
        effects = {s: self._effect(switches, seed, **kw) for s, kw in ways.items()}
        strength, e = best_within({0.0: self.plain} | effects, limit * self.plain[::2].loss)
        return dict(steered=e.rate, steered_loss=e.loss / rest.loss, strength=strength)
