"""What steering does, and its price."""

from dataclasses import dataclass

import numpy as np
import torch

from codebook_tutorial.model.generate import generate, text_nats
from codebook_tutorial.world.concepts import WORD_TABLES
from codebook_tutorial.world.grammar import ID, LISTS, TOPICS, plural


# %% [markdown]
# The stories' own topics: which words speak of which.
# %%
def _forms(word, part):
    "A word, and of a noun its plural."
    return dict.fromkeys((word, plural(word)) if part == "noun" else (word,))


def _words_of(topic, i):
    for part in ("noun", "verb", "adj", "place"):
        for word in LISTS[f"topic_{part}"][topic]:
            ids = (ID[form] for form in _forms(word, part))
            yield tuple(t for t in ids if WORD_TABLES["topic_word"][t] == i)


def topic_words() -> dict:
    "{topic: [(ids of a word's forms), ...]}, as `split_words` takes them."
    return {topic: [f for f in _words_of(topic, i) if f] for i, topic in enumerate(TOPICS)}


# %% [markdown]
# Success is counted in words, the price in nats under the untouched model.
# %%
def count_words(
    samples: list,  # n lists of token ids
    words: dict,  # {name: token ids}
) -> torch.Tensor:
    "How many words of each list a text holds, [n, names]."
    counts = torch.zeros(len(samples), len(words), dtype=torch.long)
    for j, some in enumerate(map(set, words.values())):
        for i, sample in enumerate(samples):
            counts[i, j] = sum(t in some for t in sample)
    return counts


def recognise(
    samples: list,  # n lists of token ids
    words: dict,  # {name: token ids}
) -> torch.Tensor:
    "Which name most words of a text belong to, [n]; -1 for none, or for two alike."
    counts = count_words(samples, words)
    top = counts.topk(min(2, counts.shape[1]), 1)
    clear = top.values[:, 0] > 0
    if counts.shape[1] > 1:
        clear = clear & (top.values[:, 0] > top.values[:, 1])
    return torch.where(clear, top.indices[:, 0], -1)


def _ngrams(sample, n):
    return [tuple(sample[i : i + n]) for i in range(len(sample) - n + 1)]


def distinct(samples: list, n: int = 2) -> float:
    "Share of a text's n-grams that are not repeats, mean over texts."
    grams = [g for g in (_ngrams(sample, n) for sample in samples) if g]
    return float(np.mean([len(set(g)) / len(g) for g in grams] or [1.0]))


# %%
@dataclass(eq=False)
class Effect:
    "What steering did to every sample, and what it cost; effect[rows] for some of them."

    samples: list  # n lists of token ids
    right: torch.Tensor  # [n] bool: most counted words are the target's
    mention: torch.Tensor  # [n] bool: some counted word is the target's
    nats: torch.Tensor  # [n] under the untouched model
    tokens: torch.Tensor  # [n]

    @property
    def rate(self):
        "Share of samples that are about the target."
        return self.right.float().mean().item()

    @property
    def mentions(self):
        "Share of samples that mention the target."
        return self.mention.float().mean().item()

    @property
    def loss(self):
        "Nats per token under the untouched model."
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def distinct(self):
        "Share of bigrams that do not repeat within a text."
        return distinct(self.samples)

    def __getitem__(self, rows):
        rows = torch.arange(len(self.samples))[rows]
        samples = [self.samples[i] for i in rows.tolist()]
        numbers = (self.right, self.mention, self.nats, self.tokens)
        return Effect(samples, *(t[rows] for t in numbers))

    def __repr__(self):
        return (
            f"{len(self.samples)} samples: rate {self.rate:.3f}, mentions {self.mentions:.3f}, "
            f"loss {self.loss:.3f}, distinct {self.distinct:.3f}"
        )


# %%
def effect_and_price(
    model,
    tok,
    prompts: list,  # n lists of token ids
    *,
    target,  # [n] index of the alternative that each prompt is steered to
    words: dict,  # {name: token ids} that count as success
    judge,  # the untouched model, whose loss is the price
    steer=None,  # as in `generate`
    **kw,  # for `generate`
) -> Effect:
    "Sample with steering; measure how often the target appears and what the text costs."
    target = torch.as_tensor(target).cpu()
    if len(target) != len(prompts):
        raise ValueError(
            f"effect_and_price: expected a target per prompt, "
            f"got {len(prompts)} prompts and {len(target)} targets"
        )
    samples = generate(model, tok, prompts, steer=steer, **kw)
    mention = count_words(samples, words).gather(1, target[:, None])[:, 0] > 0
    return Effect(
        samples,
        right=recognise(samples, words) == target,
        mention=mention,
        nats=text_nats(judge, prompts, samples),
        tokens=torch.tensor([float(len(s)) for s in samples]),
    )


def best_within(
    effects: dict,  # {strength: Effect}; samples ordered so that every target is in both halves
    limit: float,  # nats per token
) -> tuple:
    "(strength, Effect): the best rate within the limit on one half, measured on the other."
    n = torch.arange(len(next(iter(effects.values())).samples))
    chosen = {s: e[n[::2]] for s, e in effects.items()}
    within = [s for s, e in chosen.items() if e.loss <= limit]
    if within:
        best = max(within, key=lambda s: chosen[s].rate)
    else:
        best = min(chosen, key=lambda s: chosen[s].loss)
    return best, effects[best][n[1::2]]
