__all__ = [
    "check_ablate_feature",
    "check_child_effect",
    "check_proposed_effects",
    "check_same_words",
    "check_as_long",
    "check_answer_11_6",
    "check_comes_next",
    "check_virtual_weights",
]

import torch

from codebook_tutorial.core import seeded

from .core import check, check_choice


def check_ablate_feature(ablate_feature):
    "Exercise 11.1."
    draw = seeded(0)
    x = torch.randn(8, 5, generator=draw)
    e = torch.tensor([0.9, 0.3, 0.3, 0.0, 0.2])
    d = torch.tensor([0.6, 0.8, 0.0, 0.0, 0.0])
    b = -0.2
    ways = (d, -d)  # the second cannot be taken out
    along_e = x - ((x @ e + b).relu() / (e @ e))[:, None] * e

    def taken(d, c, slope):
        return x - (c / slope)[:, None] * d

    def right(c=torch.relu, slope=lambda d: e @ d, guard=True):
        pre = c(x @ e + b)
        return torch.cat([x if guard and e @ d <= 0 else taken(d, pre, slope(d)) for d in ways])

    return check(
        lambda: torch.cat([ablate_feature(x.clone(), e.clone(), b, d=d.clone()) for d in ways]),
        right(),
        {
            "a step of c along d moves what is read by c (e.d): divide by it": right(
                slope=lambda d: 1.0, guard=False
            ),
            "a step of c along d moves what is read by c (e.d): divide by e.d": right(
                slope=lambda d: 1.0
            ),
            "only where it is active: the pre-activation cut to 0": right(c=lambda pre: pre),
            "if e.d is not positive, one would have to add more "
            "of d: leave the states alone": right(guard=False),
            "the bias belongs to the pre-activation": right(c=lambda pre: (pre - b).relu()),
            "that is d.d; what is read is e.x": right(slope=lambda d: d @ d),
            "go back along d, not along e": torch.cat([along_e, x]),
        },
    )


def check_child_effect(child_effect):
    "Exercise 11.2."
    pairs = [
        (torch.tensor([4.0, 1.0, 0.1]), torch.tensor([1.0, 0.9, 0.1])),
        (torch.tensor([2.0, 2.0]), torch.tensor([3.0, 2.5])),
    ]

    def of(fn):
        return torch.tensor([float(fn(a, b)) for a, b in pairs])

    right = of(lambda a, b: 1 - b.sum() / a.sum())
    return check(
        lambda: of(child_effect),
        right,
        {
            "one share of the sums, not the mean of shares": of(lambda a, b: (1 - b / a).mean()),
            "signed: a parent that grows has a negative effect": right.abs(),
            "that is what is left": 1 - right,
            "a share, so divide by the parent's activation": of(lambda a, b: (a - b).sum()),
            "what goes, not what comes": -right,
            "divide by what it was with the child": of(lambda a, b: a.sum() / b.sum() - 1),
        },
    )


def check_proposed_effects(proposed_effects):
    "Exercise 11.3."
    draw = seeded(1)
    g = torch.randn(3, 4, 5, generator=draw)
    amounts = torch.rand(3, 4, 6, generator=draw)
    moves = torch.randn(6, 5, generator=draw)
    right = (amounts * (g @ moves.T)).sum((0, 1))
    return check(
        lambda: proposed_effects(g, amounts, moves),
        right,
        {
            "what goes, not what comes: taking out moves the state by minus the amount": -right,
            "sum over contexts and words": amounts * (g @ moves.T),
            "the sum over words, not the mean": right / 12,
            "signed: some would make the parent grow": right.abs(),
            "products first, then sums": amounts.sum((0, 1)) * (g.sum((0, 1)) @ moves.T),
            "the gradient along a move, times how far it goes": (g @ moves.T).sum((0, 1)),
        },
    )


def check_same_words(same_words):
    "Exercise 11.4."
    shares = torch.tensor([0.3, 0.5, 0.1, 0.8, 0.3, 0.6, 0.0])
    active = torch.rand(40, 7, generator=seeded(2)) < shares
    active[:, 6] = False
    a, pick = active.float(), (1, 6)

    def of(fn):
        return torch.cat([fn(a.T @ a[:, j], a.sum(0), a[:, j].sum()) for j in pick])

    return check(
        lambda: torch.cat([same_words(active.clone(), j).float() for j in pick]),
        of(lambda both, size, own: both / (size + own - both).clamp(min=1)),
        {
            "a share, not a number of words": of(lambda both, size, own: both),
            "of the words at which either is active, not of j's": of(
                lambda both, size, own: both / own.clamp(min=1)
            ),
            "of the words at which either is active, not of the other's": of(
                lambda both, size, own: both / size.clamp(min=1)
            ),
            "words at which both are active count once in the union": of(
                lambda both, size, own: both / (size + own).clamp(min=1)
            ),
            "0 where neither is active anywhere, not NaN": of(
                lambda both, size, own: both / (size + own - both)
            ),
            "that is Dice's measure": of(
                lambda both, size, own: 2 * both / (size + own).clamp(min=1)
            ),
        },
    )


def check_as_long(as_long):
    "Exercise 11.5."
    draw = seeded(3)
    own = torch.randn(3, 4, 3, generator=draw)
    wanted = 3 * torch.randn(3, 4, 3, generator=draw) * torch.tensor([1.0, 4.0, 2.0])[:, None, None]
    own[2] = 0

    def n(edits):
        return edits.norm(dim=-1, keepdim=True)

    return check(
        lambda: as_long(own.clone(), wanted.clone()),
        own * n(wanted).sum(1, keepdim=True) / n(own).sum(1, keepdim=True).clamp(min=1e-6),
        {
            "where the control has no edit, it stays 0: do not divide by 0": (
                own * n(wanted).sum(1, keepdim=True) / n(own).sum(1, keepdim=True)
            ),
            "one factor for each context, not for each word": (
                own * n(wanted) / n(own).clamp(min=1e-6)
            ),
            "one factor for each context, not for all": own * n(wanted).sum() / n(own).sum(),
            "the sum of lengths, not the length of the sum": (
                own
                * wanted.sum(1, keepdim=True).norm(dim=-1, keepdim=True)
                / own.sum(1, keepdim=True).norm(dim=-1, keepdim=True).clamp(min=1e-6)
            ),
            "lengths, added up: not the root of all squares": (
                own
                * wanted.flatten(1).norm(dim=1)[:, None, None]
                / own.flatten(1).norm(dim=1)[:, None, None].clamp(min=1e-6)
            ),
            "as long as the tree's, not the reverse": (
                own * n(own).sum(1, keepdim=True) / n(wanted).sum(1, keepdim=True)
            ),
        },
    )


def check_answer_11_6(answer):
    "Exercise 11.6."
    return check_choice(
        answer,
        "b",
        "right: its margin shrinks, the answer stays; without what lies below it the margin turns",
        why_not={
            "a": (
                "Where it is strong, ) follows far more often than elsewhere, on text that did "
                "not choose it, and without it the margin of ) shrinks. It has to do with "
                "parentheses; the answer does not hang by it alone."
            ),
            "c": (
                "Taking a few features of the layers before out takes the answer away, and as many "
                "others with edits as long mostly do not: features carry it."
            ),
        },
    )


def check_comes_next(comes_next):
    "Exercise 11.7."
    ids = torch.tensor([[5, 2, 3, 2, 0, 0], [2, 4, 7, 4, 2, 9], [9, 7, 2, 2, 7, 0]])
    tokens = [2, 7]
    pad = 0

    def found(shift=-1, last=True, some=tokens):
        out = torch.isin(ids.roll(shift, 1), torch.tensor(some)) & (ids != pad)
        if last:
            out[:, -1] = False
        return out.float()

    return check(
        lambda: comes_next(ids.clone(), list(tokens), pad).float(),
        found(),
        {
            "of the last column nothing is known: roll brings the first one's": found(last=False),
            "where the token comes next, not where it stands": found(shift=0),
            "the next word, not the one before": found(shift=1),
            "any of the tokens": found(some=tokens[:1]),
            "True where it comes": 1 - found(),
        },
    )


def check_virtual_weights(virtual_weights):
    "Exercise 11.8."
    draw = seeded(0)
    writes = torch.randn(4, 6, generator=draw) + 1
    reads = torch.randn(3, 6, generator=draw)
    gamma = torch.rand(6, generator=draw) + 0.5

    def found(mean=lambda w: w.mean(-1, keepdim=True), before=1.0, times=gamma):
        return ((writes * before - mean(writes * before)) * times) @ reads.T

    return check(
        lambda: virtual_weights(writes.clone(), reads.clone(), gamma.clone()),
        found(),
        {
            "the norm subtracts each direction's mean first": found(mean=lambda w: 0.0),
            "one mean per direction, over its coordinates": found(mean=lambda w: w.mean(0)),
            "one mean per direction, not one of all": found(mean=lambda w: w.mean()),
            "the norm multiplies by its weights": found(times=1.0),
            "first the mean goes, then the weights multiply": found(before=gamma, times=1.0),
            "a row per feature that writes, a column per feature that reads": found().T,
        },
    )
