__all__ = [
    "check_to_integers",
    "check_split_top",
    "check_pooled_r",
    "check_expected_strength",
    "check_answer_09_5",
    "check_after_word",
]

import numpy as np
import torch

from codebook_tutorial.core import seeded

from .core import check, check_choice


def check_to_integers(to_integers):
    "Exercise 09.1."
    acts, top = torch.tensor([-2.0, 0.0, 0.5, 1.3, 3.9, 4.0, 6.0]), 4.0
    scaled = 10 * acts / top
    largest = 10 * acts.clamp(min=0) / acts.max()
    return check(
        lambda: to_integers(acts, top),
        scaled.clamp(min=0).floor().clamp(max=10),
        {
            "round down, not to the nearest": scaled.clamp(min=0).round().clamp(max=10),
            "negative activations are 0": scaled.floor().clamp(max=10),
            "at most 10": scaled.clamp(min=0).floor(),
            "integers: round down": scaled.clamp(0, 10),
            "`top` becomes 10, not the largest of these": largest.floor(),
            "from 0 to 10, not to 1": (acts.clamp(min=0) / top).clamp(max=1),
            "a negative activation is 0, not its size": scaled.abs().floor().clamp(max=10),
        },
    )


def check_split_top(split_top):
    "Exercise 09.2."
    peaks = torch.rand(60, generator=seeded(0))
    order = peaks.argsort(descending=True)
    weakest = order.flip(0)
    explain = order[0:20:4]
    score = order[2:20:4]

    def together(a, b):
        return torch.cat([a, b])

    def mine():
        a, b = split_top(peaks)
        return torch.cat([a, b])

    return check(
        mine,
        together(explain, score),
        {
            "those are the weakest: sort downwards": together(weakest[0:20:4], weakest[2:20:4]),
            "only the first twenty ranks": together(order[0::4], order[2::4]),
            "the two are exchanged": together(score, explain),
            "alternate: 0, 4, 8, .. and 2, 6, 10, ..": together(order[:5], order[5:10]),
            "every fourth, from 0 and from 2": together(order[0:20:2], order[1:20:2]),
            "fragment numbers, not their peaks": together(peaks[explain], peaks[score]),
            "from rank 2, not 1": together(explain, order[1:20:4]),
        },
    )


def check_pooled_r(pooled_r):
    "Exercise 09.3."
    draw = seeded(1)
    true = [torch.rand(n, generator=draw) * top for n, top in ((5, 10.0), (9, 1.0), (7, 4.0))]
    simulated = [t * 0.5 + torch.rand(len(t), generator=draw) * 3 for t in true]

    def r(a, b):
        return torch.corrcoef(torch.stack([a, b]))[0, 1]

    a, b = torch.cat(true), torch.cat(simulated)
    single = torch.stack([r(s, t) for s, t in zip(true, simulated)])
    means = [torch.stack([t.mean() for t in some]) for some in (true, simulated)]
    return check(
        lambda: pooled_r(true, simulated),
        r(a, b),
        {
            "over all tokens together, not the mean of each fragment's r": single.mean(),
            "r, not its square": r(a, b) ** 2,
            "centre both first: that is a cosine": torch.cosine_similarity(a, b, dim=0),
            "that is the covariance: divide by both spreads": torch.cov(torch.stack([a, b]))[0, 1],
            "one number: the entry beside the diagonal": torch.corrcoef(torch.stack([a, b])),
            "means of fragments are not tokens": r(*means),
        },
    )


def check_expected_strength(expected_strength):
    "Exercise 09.4."
    p = torch.tensor([0.3, 0.2, 0.05, 0.05, 0.02, 0.03, 0.02, 0.02, 0.05, 0.06])
    zero = 0.4
    ten = p[1] * zero
    one = (p[1] - ten)[None]
    right = torch.cat([p[:1], one, p[2:], ten[None]])
    exchanged = torch.cat([p[:1], ten[None], p[2:], one])
    sum_only = (right * torch.arange(11)).sum()

    def mean(q):
        return (q * torch.arange(len(q))).sum() / q.sum()

    return check(
        lambda: expected_strength(p.clone(), zero),
        mean(right),
        {
            "the number 1 loses what goes to 10": mean(torch.cat([p, ten[None]])),
            "10 is there, too: P(1) P(0 | 1)": mean(p),
            "renormalise: other tokens have some of the probability": sum_only,
            "P(0 | 1) counts only where a 1 is written": mean(torch.cat([p, torch.tensor([zero])])),
            "the 0 of a 10 is not the number 0": mean(torch.cat([p[:1] * zero, p[1:]])),
            "the expectation, not the most likely number": right.argmax().float(),
            "of p[1] the share p_zero is the 10, the rest the 1": mean(exchanged),
        },
    )


def check_answer_09_5(answer):
    "Exercise 09.5."
    return check_choice(
        answer,
        "a",
        "yes: directions that know nothing get explanations as well, and fit their top "
        "fragments; only the distance to them is worth anything",
        why_not={
            "b": (
                "it might raise the number, of features and of random "
                "directions alike: compared with what?"
            ),
            "c": (
                "that makes the number more exact, and as flattering as before: top "
                "fragments are where a feature is most like itself"
            ),
        },
    )


def _by_place(fragments, where):  # -> {word: activations} where it holds, and elsewhere
    there, elsewhere = {}, {}
    for tokens, acts in fragments:
        for i, (w, a) in enumerate(zip(tokens, acts)):
            (there if where(tokens, i) else elsewhere).setdefault(w, []).append(a)
    return there, elsewhere


def check_after_word(after_word):
    "Exercise 09.6."
    fragments = [
        (["to", "Tom", "ran", "to", "see"], [0, 9, 1, 0, 2]),
        (["Tom", "gave", "to", "Ann", "Tom"], [3, 0, 0, 8, 4]),
        (["Ann", "to", "ran", "to", "Bob"], [8, 0, 1, 0, 0]),
        (["see", "Tom", "to", "Sue", "to", "Sue"], [5, 1, 0, 6, 0, 4]),
    ]

    def found(where, better=lambda a, b: a > b, alone=True):
        there, elsewhere = _by_place(fragments, where)
        words = [w for w in there if alone or w in elsewhere]
        pairs = {w: (np.mean(there[w]), np.mean(elsewhere.get(w, [0.0]))) for w in words}
        return " ".join(sorted(w for w, (a, b) in pairs.items() if better(a, b)))

    def after(tokens, i):
        return i > 0 and tokens[i - 1] == "to"

    def before(tokens, i):
        return i + 1 < len(tokens) and tokens[i + 1] == "to"

    def mine():
        got = after_word(fragments, "to")
        return " ".join(got) if isinstance(got, list) else got

    return check(
        mine,
        found(after),
        {
            "the mean elsewhere of a word that never stands elsewhere counts as 0": found(
                after, alone=False
            ),
            "above, not at least as high": found(after, lambda a, b: a >= b),
            "the words after `before`, not before it": found(before),
            "their mean there must be above that elsewhere": found(after, lambda a, b: True),
            "the other way round": found(after, lambda a, b: a < b),
        },
    )
