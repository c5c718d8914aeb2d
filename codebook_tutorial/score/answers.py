"""Everything a dictionary of one site is asked, made once."""

from dataclasses import dataclass

import numpy as np
import torch

from codebook_tutorial.feature.explain.protocol import fragments, pieces
from codebook_tutorial.feature.explain.rules import story_words
from codebook_tutorial.feature.steer import find_choices, split_words
from codebook_tutorial.model.run import evaluating, states_of
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.score.benches import (
    Concepts,
    Explained,
    Kept,
    Patched,
    Steered,
    Subject,
)
from codebook_tutorial.score.effects import effect_and_price, topic_words
from codebook_tutorial.score.metrics import replaced_loss
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.world.grammar import ID
from codebook_tutorial.world.stories import prompts
from codebook_tutorial.world.tasks import one_token_names, task_pairs, task_score


# %%
@dataclass(eq=False)
class Answers:
    "What dictionaries of one site are asked: `benches`, one per question, and what is known."

    subject: Subject
    text: Text  # unseen; for the loss, and whose concepts are known
    states: torch.Tensor  # [N, d] at its ordinary tokens
    truth: np.ndarray | None  # [N, C] bool; None: nothing is known
    benches: dict  # {question: bench}, those that can be asked of this model

    def __repr__(self):
        concepts = f"{self.truth.shape[1]} concepts" if self.truth is not None else "no concepts known"
        pairs = self.benches["patched"].pairs if "patched" in self.benches else []
        asked = self.benches["steered"].prompts if "steered" in self.benches else []
        return (
            f"Answers at {self.subject.site}: {len(self.states):,} states, {concepts}, "
            f"{len(self.benches['explained'].words):,} fragments, "
            f"{sum(map(len, pairs))} pairs of prompts, {len(asked)} prompts"
        )


# %% [markdown]
# Making them. Each part has a default for the stories, and can be given for another model.
# %%
def _known_text(tok, text, truth, *, seed):
    "Text and truth [rows, length, C] to ask about."
    if text is not None:
        return text, truth
    if tok.get_vocab() != ID:
        return load_text(tok, n_tokens=40_000, length=128), truth
    text, facts = story_text(40_000, seed=seed, split="test")
    return text, atoms(facts)


def _explained(model, tok, site, *, text, seed):
    stories = tok.get_vocab() == ID
    if text is None and stories:
        draw = 5 + 10 * seed
        text = load_text(tok, n_tokens=200_000, length=256, split="test", seed=draw)
    elif text is None:
        text = load_text(tok, n_tokens=60_000, length=256)
    shown = fragments(text)
    rules = story_words() if stories else {}
    return Explained(pieces(shown, tok), states_of(model, shown, site), rules)


def _patched(subject, n, *, names, seed):
    "Who gets the gift, for some couples of names; None where the model cannot do the task."
    try:
        known = one_token_names(subject.tok)
        found = []
        for i in range(names):
            couple = np.random.default_rng([seed, i]).choice(known, 2, replace=False)
            receivers = tuple(map(str, couple))
            found.append(task_pairs(subject.tok, "ioi", n=n, seed=seed, receivers=receivers))
    except ValueError:
        return None
    with evaluating(subject.model):
        done = [task_score(subject.model, pairs) for pairs in found]
    able = all(min(s["base"], s["target"]) >= 0.75 for s in done)
    return Patched(subject, found) if able else None


def _after_one_sentence(story):
    return np.searchsorted(story.sentences, [2]) if story.document == "story" else []


def story_openings(n: int, seed: int = 0) -> list:
    "Two sentences each of n unseen stories, as lists of token ids."
    return [p.ids for p in prompts(n, _after_one_sentence, seed=100 + seed, each=1)]


def _steered(subject, states, topics, *, openings, text, texts, seed):
    tok, stories = subject.tok, subject.tok.get_vocab() == ID
    if text is None:
        split = "train" if stories else None
        text = load_text(tok, n_tokens=120_000, length=256, split=split, seed=3 + 10 * seed)
    choose, count = split_words(topics, seed=10 + seed)
    choices = find_choices(text, choose, count)
    asked = [openings[i % len(openings)] for _ in count for i in range(texts)]
    target = torch.arange(len(count)).repeat_interleave(texts)
    plain = effect_and_price(
        subject.judge,
        tok,
        asked,
        target=target,
        words=count,
        judge=subject.judge,
        seed=seed,
        progress=False,
    )
    return Steered(subject, states, text, choices, count, asked, target, plain)


# %%
def known_answers(
    model,
    tok,
    site: str = "resid.1",
    *,
    judge=None,  # the untouched model, where `model` is a finetuned copy of it; None: model
    text: Text | None = None,  # unseen text; None: the stories
    truth=None,  # [rows, length, C] bool, what holds there; None: the stories' concepts
    fragment_text: Text | None = None,  # where explanations look
    steer_text: Text | None = None,  # where switches are found
    topics: dict | None = None,  # {name: [ids of a word's forms]}; None: the stories' ten
    openings: list | None = None,  # lists of ids to steer from; None: unseen stories' beginnings
    texts: int = 12,  # sampled per topic, an even number: half of them choose the strength
    n_pairs: int = 16,
    names: int = 4,  # n_pairs prompts for each of so many couples of receivers
    seed: int = 0,
) -> Answers:
    "Make all that is asked of every dictionary at a site; of other models, what they can be asked."
    _check_asked(model, site, judge, text=text, truth=truth, texts=texts)
    stories = tok.get_vocab() == ID
    subject = Subject(model, tok, site, judge or model)
    text, truth = _known_text(tok, text, truth, seed=seed)
    explained = _explained(model, tok, site, text=fragment_text, seed=seed)
    topics = topic_words() if topics is None and stories else topics
    openings = story_openings(texts, seed) if openings is None and stories else openings
    states = states_of(model, text, site)
    truth = None if truth is None else np.asarray(truth)[text.mask.numpy()]
    benches = dict(explained=explained)
    if topics and openings:
        ask = dict(openings=openings, text=steer_text, texts=texts, seed=seed)
        benches["steered"] = _steered(subject, states, topics, **ask)
    if truth is not None:
        benches["concepts"] = Concepts(states, truth)
    if patched := _patched(subject, n_pairs, names=names, seed=seed):
        benches["patched"] = patched
    clean = replaced_loss(subject.judge, text, site, fn=lambda x: x)
    benches["kept"] = Kept(subject, text, states, clean)
    return Answers(subject, text, states, truth, benches)


def _check_asked(model, site, judge, *, text, truth, texts):
    books = getattr(model, "codebooks", None)
    if books is not None and (judge is None or site not in books):
        given = None if judge is None else "a model"
        raise ValueError(
            "known_answers: a model with codebooks can only be asked at their sites "
            f"({', '.join(books)}), with judge= the untouched model; got {site!r}, judge={given}"
        )
    if books is None and "_codebook_model" in model.__dict__:
        raise ValueError(
            "known_answers: this model has codebooks in it; give the CodebookModel (and judge=), "
            "or take them out: codebook_model.remove()"
        )
    if texts % 2 or texts < 2:
        raise ValueError(
            f"known_answers: expected an even number of texts for each topic, got {texts}"
        )
    if truth is None:
        return
    fits = text is not None and tuple(truth.shape[:2]) == tuple(text.ids.shape)
    if not fits or torch.as_tensor(truth).dtype != torch.bool:
        got = "no text" if text is None else list(text.ids.shape)
        raise ValueError(
            "known_answers: expected truth as bool [rows, length, C] with the text that it is "
            f"about, got {list(truth.shape)} and {got}"
        )
