__all__ = [
    "check_story_nats",
    "check_lowest_loss",
    "check_mean_loss",
    "check_one_stream",
    "check_answer_04_5",
    "check_counterfactual",
    "check_holds_from",
    "check_copy_at",
]

import math

import torch

from codebook_tutorial.core import seeded

from .core import Verdict, check, check_choice


def check_story_nats(story_nats):
    "Exercise 04.1."
    ps = torch.tensor([0.25, 0.5, 1.0, 0.1])
    right = -ps.log().sum()
    return check(
        lambda: story_nats(ps),
        right,
        {
            "those are bits: the natural logarithm gives nats": right / math.log(2),
            "that is the mean over the choices; the story's surprise is their sum": right / 4,
            "the sign: a surprise is positive": -right,
            "that is the probability; its surprise is -log of it": ps.prod(),
            "probabilities of choices that follow one another multiply": -ps.sum().log(),
            "p log p belongs to an entropy, a mean over what could "
            "have come; these choices were made": -(ps * ps.log()).sum(),
        },
    )


def check_lowest_loss(lowest_loss):
    "Exercise 04.2."
    choices = [torch.tensor(p) for p in ([0.25] * 4, [0.5, 0.25, 0.25, 0.0], [0.9, 0.1])]
    entropies = [-torch.xlogy(p, p).sum() for p in choices]
    right = sum(entropies) / 6
    return check(
        lambda: lowest_loss(choices, 6),
        right,
        {
            "you divided by the choices; most tokens are no choice, yet they are tokens": right * 2,
            "those are bits": right / math.log(2),
            "that is a sentence's entropy; divide by its tokens": right * 6,
            "that takes every choice as if its alternatives were equally likely": (
                sum(math.log(len(p)) for p in choices) / 6
            ),
            "that is the surprise of the likeliest sentence, not the mean": (
                -sum(p.max().log() for p in choices) / 6
            ),
            "the sign: an entropy is positive": -right,
            "0 times log 0 is nan in floating point; such an "
            "alternative never comes and costs nothing": torch.tensor(math.nan),
        },
    )


def check_mean_loss(mean_loss):
    "Exercise 04.3."
    ids = torch.tensor(
        [
            [1, 5, 6, 1, 7, 8, 9, 1, 1, 0],
            [1, 5, 1, 0, 0, 0, 0, 0, 0, 0],
            [1, 5, 6, 7, 8, 9, 1, 5, 6, 7],
        ]
    )  # a document may be empty, a row may end within one
    nats = (
        torch.rand(3, 10, generator=seeded(1))
        + torch.tensor([[9.0], [3.0], [0.0]]) * (ids == 0)
        + (ids == 1)
    )
    word = (ids != 1) & (ids != 0)
    rolled = word | (ids == 1) & word.roll(1, 1)
    counts = rolled.clone()
    counts[:, 0] = False
    no_first = ids != 0
    no_first[:, 0] = False
    return check(
        lambda: mean_loss(nats, ids, 1, 0),
        nats[counts].mean(),
        {
            "padding is counted": nats.mean(),
            "the first BOS of a row is counted; nothing predicts it": nats[ids != 0].mean(),
            "roll carried the last token of a full row to the "
            "front: a row's first BOS never counts": nats[rolled].mean(),
            "a BOS right behind a BOS ends nothing": nats[no_first].mean(),
            "the end of a document is to be predicted, too: the BOS behind an ordinary token": (
                nats[word].mean()
            ),
            "you took the mean of the rows' means; a token of a short row would count for more": (
                torch.stack([n[c].mean() for n, c in zip(nats, counts)]).mean()
            ),
        },
    )


def check_one_stream(one_stream):
    "Exercise 04.4."
    docs = [[5, 6, 7, 7], [8, 9], [5, 5, 5, 5, 6, 6]]

    def cut(flat):
        return torch.tensor(flat[: len(flat) // 4 * 4]).view(-1, 4)

    right = [1, 5, 6, 7, 7, 1, 8, 9, 1, 5, 5, 5, 5, 6, 6, 1]
    return check(
        lambda: one_stream(docs, 4, 1),
        cut(right),
        {
            "BOS before every document is missing": cut(sum(docs, [])),
            "a BOS behind the last document is missing": cut(right[:-1]),
            "BOS stands before every document, not only at the start": cut(
                [1] + sum(docs, []) + [1]
            ),
            "every row begins with BOS only where a document happens to": torch.tensor(
                [[1] + sum(docs, [])[i : i + 3] for i in (0, 3, 6, 9)]
            ),
        },
    )


def check_answer_04_5(answer):
    "Exercise 04.5."
    return check_choice(
        answer,
        "b",
        "yes: a control removes what the claim is about, and nothing else",
        why_not={
            "a": "that would be true of 'who receives?' as well, where shuffling serves",
            "c": (
                "one could shuffle only the sentences before; their "
                "words would still tell the topic"
            ),
        },
    )


def check_counterfactual(counterfactual):
    "Exercise 04.6."
    ids = torch.tensor([[1, 20, 4, 21, 5, 21, 6], [1, 22, 4, 20, 5, 22, 20]])
    receiver = torch.tensor([20, 20])
    other = torch.tensor([30, 31])
    right = torch.tensor([[1, 30, 4, 21, 5, 21, 6], [1, 22, 4, 31, 5, 22, 31]])
    first, fed = right.clone(), ids.clone()
    first[1, 6] = 20
    verdict = check(
        lambda: counterfactual(fed, receiver, other),
        right,
        {
            "the receiver may stand more than once: replace it everywhere": first,
            "that replaces the other names; the receiver's was wanted": torch.where(
                ids == receiver[:, None], ids, other[:, None]
            ),
            "nothing changed": ids,
            "every row has its own other name": torch.where(
                ids == receiver[:, None], other[0], ids
            ),
        },
    )
    if verdict and not torch.equal(fed, ids):
        return Verdict(
            False, "right ids, but you wrote into the tensor that was handed in: work on a new one"
        )
    return verdict


def check_holds_from(holds_from):
    "Exercise 04.7."
    tells = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()
    right = tells.cumsum(0) > 0
    return check(
        lambda: torch.as_tensor(holds_from(tells.clone())).float(),
        right.float(),
        {
            "that is only where it is told; from there on it is kept": tells.float(),
            "that is only before it was told": 1 - right.float(),
            "you begin at the second telling": (tells.cumsum(0) > 1).float(),
            "nobody can know it before it is told": torch.ones(7),
        },
    )


def check_copy_at(copy_at):
    "Exercise 04.8."
    x, source = (torch.randn(2, 5, 4, generator=seeded(i)) for i in (0, 1))
    at = torch.tensor([0, 1, 0, 0, 1]).bool()
    return check(
        lambda: copy_at(source, at)(x.clone()),
        torch.where(at[:, None], source, x),
        {
            "you copied everywhere": source,
            "you copied everywhere else": torch.where(at[:, None], x, source),
            "you added instead of replacing": x + source * at[:, None],
            "nothing changed": x,
        },
    )
