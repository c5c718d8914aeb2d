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
    x = (
        torch.randn(300, 5, generator=seeded(0))
        * torch.tensor([1.0, 5, 2, 0.5, 3])
        @ torch.linalg.qr(torch.randn(5, 5, generator=seeded(1)))[0]
        + 4
    )
    n = 3

    def V(x):
        return torch.linalg.svd(x, full_matrices=False)[2]

    own, raw = V(x - x.mean(0)), V(x)

    def like(D):
        return D.T @ D if D.shape[-1] == 5 else D  # the signs do not matter

    def mine():
        D = principal(x, n)
        return torch.cat([d[:, None] * d for d in D]) if D.shape == (n, 5) else D

    def outer(D):
        return torch.cat([d[:, None] * d for d in D])

    return check(
        mine,
        outer(own[:n]),
        {
            "centre first: the mean is no direction of variance": outer(raw[:n]),
            "those are the smallest: eigh sorts upwards": outer(own.flip(0)[:n]),
            "transposed: one direction a row": own[:n].T,
            "all of them: only the first n": own,
            "rows of length 1": outer(
                torch.linalg.svd(x - x.mean(0), full_matrices=False)[1][:n, None] * own[:n]
            ),
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
    f = torch.rand(400, 4, generator=seeded(0)).log().neg() * torch.tensor(
        [1.0, -1, 1, -1]
    ) + torch.tensor([-6.0, 6, 0, 0])
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
    want = ((gap > 0).float() + 0.5 * (gap == 0)).mean()
    return check(
        lambda: auroc(v, truth),
        want,
        {
            "equal values count one half": (gap > 0).float().mean(),
            "equal values count one half, not one": (gap >= 0).float().mean(),
            "the wrong way round": 1 - want,
            "that is an accuracy at one threshold": ((v > v.mean()) == truth).float().mean(),
            "that is how many pairs, not their share": ((gap > 0).float() + 0.5 * (gap == 0)).sum(),
            "pairs of one token of each kind, not of any two": (
                ((v[:, None] - v) > 0).float() + 0.5 * ((v[:, None] - v) == 0)
            ).mean(),
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
    v = torch.cat(
        [torch.randn(40, generator=seeded(2)), torch.randn(40, generator=seeded(4)) + 0.7]
    )
    truth = torch.cat(
        [
            torch.rand(40, generator=seeded(5)) < torch.sigmoid(2 * v[:40]),
            torch.rand(40, generator=seeded(1)) < torch.sigmoid(2 * v[40:] - 2),
        ]
    )

    def f1(fires, true):
        return 2 * (fires & true).sum() / (fires.sum() + true.sum())

    n = 40

    def best(v, truth, at=lambda v, t: v >= t, by=f1):
        return max(v.unique(), key=lambda t: by(at(v, t), truth))

    t = best(v[:n], truth[:n])
    return check(
        lambda: held_out_f1(v, truth),
        f1(v[n:] >= t, truth[n:]),
        {
            "that is the score where the threshold was chosen": f1(v[:n] >= t, truth[:n]),
            "the threshold was chosen on all tokens": f1(v[n:] >= best(v, truth), truth[n:]),
            "the threshold was chosen on the second half, where it is scored": f1(
                v[n:] >= best(v[n:], truth[n:]), truth[n:]
            ),
            "scored on all tokens": f1(v >= t, truth),
            "that is an accuracy": ((v[n:] >= t) == truth[n:]).float().mean(),
            "that is the precision": (truth[n:] & (v[n:] >= t)).sum() / (v[n:] >= t).sum(),
            "that is the recall": (truth[n:] & (v[n:] >= t)).sum() / truth[n:].sum(),
            "that is the threshold": t,
        },
    )
