__all__ = [
    "check_most_bits",
    "check_likeness",
    "check_whole_loss",
    "check_resampling_odds",
    "check_answer_05_5",
    "check_cheapest",
    "check_write_at",
]

import math

import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded

from .core import check, check_choice


def check_most_bits(most_bits):
    "Exercise 05.1."
    return check(
        lambda: most_bits(4, 1024, 3),
        120.0,
        {
            "those are nats: bits are logarithms to base 2": 12 * math.log(1024),
            "every group has a book of its own, and picks for itself": 30.0,
            "k picks carry k times the bits of one": 40.0,
            "that is how many codes there are, not the bits it takes to name some": 4.0 * 1024,
            "that is how many states can be named; its logarithm is wanted": 1024.0**12,
            "the k picks of a group are in an order (each for what is left over), and may repeat": (
                4 * math.log2(math.comb(1024, 3))
            ),
        },
    )


def check_likeness(likeness_of):
    "Exercise 05.2."
    codes = torch.randn(12, 6, generator=seeded(0)) * torch.rand(12, 1, generator=seeded(1)) * 9
    ids = torch.randint(12, (50, 3), generator=seeded(2))
    a, b = codes[ids[:, 0]], codes[ids[:, 1]]
    return check(
        lambda: likeness_of(codes, ids),
        F.cosine_similarity(a, b, dim=-1).mean(),
        {
            "that is the mean dot product: long codes count for "
            "more; a cosine divides by both lengths": (a * b).sum(-1).mean(),
            "that is the cosine of the mean codes; the mean "
            "of the cosines was wanted": F.cosine_similarity(a.mean(0), b.mean(0), dim=0),
            "each place by itself, please: one number, their mean": F.cosine_similarity(
                a, b, dim=-1
            ),
            "you compare codes of one slot at different places": (
                F.cosine_similarity(a[:-1], a[1:], dim=-1).mean()
            ),
            "that is the likeness of all pairs of the book, whether they stand together or not": (
                F.cosine_similarity(codes[:, None], codes, dim=-1).mean()
            ),
        },
    )


def check_whole_loss(whole_loss):
    "Exercise 05.3."
    asked = [
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]) == 1,
        torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0]]) == 1,
    ]
    nats = [torch.rand(2, 4, generator=seeded(i)) + 3 * i for i in range(2)]
    sums = torch.stack([x[a].sum() for x, a in zip(nats, asked)])
    n = torch.tensor([7.0, 3.0])
    return check(
        lambda: whole_loss(nats, asked),
        sums / 10,
        {
            "those are the parts' own means; their sum is no mean": sums / n,
            "the mean of the parts' means: tokens of the shorter part count for more": sums / n / 2,
            "padding is counted": torch.stack([x.sum() for x in nats]) / 16,
            "padding adds to the sum": torch.stack([x.sum() for x in nats]) / 10,
            "that is the whole loss; say what each part adds": sums.sum() / 10,
            "divide by all that counts, not by all positions": sums / 16,
        },
    )


def check_resampling_odds(resampling_odds):
    "Exercise 05.4."
    x = torch.randn(8, 5, generator=seeded(0))
    own = torch.randn(8, 5, generator=seeded(1))
    nats = torch.rand(8, generator=seeded(2))
    own[3] = 2 * x[3]
    far = 1 - F.cosine_similarity(x, own, dim=-1)
    far[3] = 0.0

    def odds(w):
        return w / w.sum()

    return check(
        lambda: resampling_odds(x, own, nats),
        odds(far * nats),
        {
            "those are weights; probabilities add up to 1": far * nats,
            "the surprise is left out": odds(far),
            "the distance is left out": odds(nats),
            "that is the squared distance; a code that only has the "
            "wrong length would count as bad": odds(((x - own) ** 2).sum(-1) * nats),
            "that prefers states that are well coded: 1 - cosine": odds(
                (1 - far).clamp(min=0) * nats
            ),
            "weights multiply: a state that is coded perfectly "
            "gains nothing from a code of its own": odds(far + nats),
            "a softmax is not 'in proportion to'": (far * nats).softmax(0),
        },
    )


def check_answer_05_5(answer):
    "Exercise 05.5."
    return check_choice(
        answer,
        "b",
        "yes: a mean hides what is rare; so ask for the thing itself, beside the loss",
        why_not={
            "a": "the text of the loss has such sentences, too; both come from the same teller",
            "c": (
                "it would have to fall just below another word in so many sentences at "
                "once; and a lower probability costs loss as well"
            ),
        },
    )


def check_cheapest(cheapest):
    "Exercise 05.6."
    bits = torch.tensor([90.0, 40.0, 60.0, 20.0, 50.0])
    gaps = torch.tensor(
        [
            [0.01, 0.01, 0.01],
            [0.01, 0.05, 0.00],
            [0.015, 0.02, 0.04],
            [0.2, 0.1, 0.01],
            [0.018, 0.018, 0.021],
        ]
    )

    def pair(i, g):
        return torch.tensor([float(i), g])

    verdict = check(
        lambda: cheapest(bits, gaps, 0.02),
        pair(4, 0.021),
        {
            "the last seed took part in the choice; then its gap is no fair test": pair(0, 0.01),
            "that is the gap that chose it; the last seed's was wanted": pair(4, 0.018),
            "that is the best, not the cheapest that is good enough": pair(0, 0.01),
            "the cheapest of all, whether good enough or not": pair(3, 0.01),
            "good enough in one seed is not good enough in the mean": pair(1, 0.0),
        },
    )
    if not verdict:
        return verdict
    none = pair(-1, math.nan)
    return check(lambda: cheapest(bits, gaps, 0.001), none, praise=verdict.message)


def check_write_at(write_at):
    "Exercise 05.7."
    ids = torch.randint(9, (3, 5, 2, 1), generator=seeded(0))
    new = torch.full((3, 2, 1), 77)
    at = torch.tensor([1, 4, 2])
    right, last, every = ids.clone(), ids.clone(), ids.clone()
    right[torch.arange(3), at] = new
    last[:, -1] = new
    every[:, at] = 77
    return check(
        lambda: write_at(new, at)(ids.clone()),
        right,
        {
            "each row has a position of its own: ids[torch.arange(len(ids)), at]": every,
            "you wrote at the last position": last,
            "you wrote everywhere": torch.full_like(ids, 77),
            "nothing changed": ids,
        },
    )
