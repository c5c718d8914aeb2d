__all__ = [
    "check_principal",
    "check_best_cosine",
    "check_tail_up",
    "check_auroc",
    "check_answer_08_5",
    "check_held_out_f1",
]

import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded

from .core import check, check_choice


def check_principal(principal):
    "Exercise 08.1."
    spread = torch.tensor([1.0, 5, 2, 0.5, 3])
    turn = torch.linalg.qr(torch.randn(5, 5, generator=seeded(1)))[0]
    x = torch.randn(300, 5, generator=seeded(0)) * spread @ turn + 4
    n = 3
    _, sizes, own = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    raw = torch.linalg.svd(x, full_matrices=False)[2]

    def outer(D):  # the signs do not matter
        return torch.cat([d[:, None] * d for d in D])

    def mine():
        D = principal(x, n)
        return outer(D) if D.shape == (n, 5) else D

    return check(
        mine,
        outer(own[:n]),
        {
            "centre first: the mean is no direction of variance": outer(raw[:n]),
            "those are the smallest: eigh sorts upwards": outer(own.flip(0)[:n]),
            "transposed: one direction a row": own[:n].T,
            "all of them: only the first n": own,
            "rows of length 1": outer(sizes[:n, None] * own[:n]),
        },
    )


def check_best_cosine(best_cosine):
    "Exercise 08.2."
    A, B = torch.randn(6, 4, generator=seeded(0)) * 3, torch.randn(9, 4, generator=seeded(3)) * 2
    dots = A @ B.T
    cos = F.normalize(A, dim=-1) @ F.normalize(B, dim=-1).T
    return check(
        lambda: best_cosine(A, B),
        cos.abs().amax(-1),
        {
            "a direction turned round is the same direction: take the absolute value": cos.amax(-1),
            "divide by the lengths: that is the dot product": dots.abs().amax(-1),
            "for every row of A, not of B": cos.abs().amax(0),
            "all pairs: only the largest of each row": cos.abs(),
            "the absolute value comes before the maximum": cos.amax(-1).abs(),
            "the mean over B says little: take the largest": cos.abs().mean(-1),
            "that is which row it is, not how like": cos.abs().argmax(-1),
        },
    )


def check_tail_up(tail_up):
    "Exercise 08.3."
    sign = torch.tensor([1.0, -1, 1, -1])
    mean = torch.tensor([-6.0, 6, 0, 0])
    f = torch.rand(400, 4, generator=seeded(0)).log().neg() * sign + mean
    skew = ((f - f.mean(0)) ** 3).mean(0).sign()
    return check(
        lambda: tail_up(f),
        f * skew,
        {
            "centre first: here the mean says the opposite of the tail": f * (f**3).mean(0).sign(),
            "that is the sign of the mean": f * f.mean(0).sign(),
            "turned the wrong way": -f * skew,
            "that cuts off the tails: turn the component": f.abs(),
            "only the signs": skew,
            "nothing is turned": f,
            "centring is for finding the sign alone": (f - f.mean(0)) * skew,
        },
    )


def check_auroc(auroc):
    "Exercise 08.4."
    v = (torch.randn(60, generator=seeded(0)) * 2).round()
    truth = torch.rand(60, generator=seeded(1)) < torch.sigmoid(v)
    gap = v[truth][:, None] - v[~truth]
    wins = (gap > 0).float() + 0.5 * (gap == 0)
    want = wins.mean()
    any_two = v[:, None] - v
    any_wins = (any_two > 0).float() + 0.5 * (any_two == 0)
    return check(
        lambda: auroc(v, truth),
        want,
        {
            "equal values count one half": (gap > 0).float().mean(),
            "equal values count one half, not one": (gap >= 0).float().mean(),
            "the wrong way round": 1 - want,
            "that is an accuracy at one threshold": ((v > v.mean()) == truth).float().mean(),
            "that is how many pairs, not their share": wins.sum(),
            "pairs of one token of each kind, not of any two": any_wins.mean(),
            "that is the difference of the means": gap.mean(),
        },
    )


def check_answer_08_5(answer):
    "Exercise 08.5."
    return check_choice(
        answer,
        "b",
        "yes: the best of 16,000 is compared with the best of 768; only as many "
        "directions that know nothing say what the number itself is worth",
        why_not={
            "a": (
                "more concepts make the shares more exact, but each still "
                "compares the best of 16,000 with the best of 768"
            ),
            "c": (
                "variance says how well states are rebuilt, not whether a feature fits a "
                "concept; how many features were there to choose from?"
            ),
        },
    )


def check_held_out_f1(held_out_f1):
    "Exercise 08.6."
    n = 40
    v = torch.cat([torch.randn(n, generator=seeded(2)), torch.randn(n, generator=seeded(4)) + 0.7])
    early = torch.rand(n, generator=seeded(5)) < torch.sigmoid(2 * v[:n])
    late = torch.rand(n, generator=seeded(1)) < torch.sigmoid(2 * v[n:] - 2)
    truth = torch.cat([early, late])

    def f1(fires, true):
        return 2 * (fires & true).sum() / (fires.sum() + true.sum())

    def best(v, truth):
        return max(v.unique(), key=lambda t: f1(v >= t, truth))

    t = best(v[:n], early)
    fires = v[n:] >= t
    return check(
        lambda: held_out_f1(v, truth),
        f1(fires, late),
        {
            "that is the score where the threshold was chosen": f1(v[:n] >= t, early),
            "the threshold was chosen on all tokens": f1(v[n:] >= best(v, truth), late),
            "the threshold was chosen on the second half, where it is scored": f1(
                v[n:] >= best(v[n:], late), late
            ),
            "scored on all tokens": f1(v >= t, truth),
            "that is an accuracy": (fires == late).float().mean(),
            "that is the precision": (late & fires).sum() / fires.sum(),
            "that is the recall": (late & fires).sum() / late.sum(),
            "that is the threshold": t,
        },
    )
