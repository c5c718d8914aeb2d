__all__ = [
    "check_added",
    "check_fit_prices",
    "check_training_state",
    "check_precision_change",
    "check_answer_14_5",
    "check_renamed",
]

import numpy as np
import torch

from codebook_tutorial.core import seeded

from .core import Verdict, check, check_choice


def check_added(added):
    "14.1"
    cases = [(512, 1000, 1), (1024, 10_000, 1), (96, 300, 6), (2560, 10_000, 32)]

    def of(fn):
        return torch.tensor([float(fn(*c)) for c in cases], dtype=torch.float64)

    return check(
        lambda: of(added),
        of(lambda d, C, g: C / (6 * d)),
        {
            "two sites a block: attention and MLP": of(lambda d, C, g: C / (12 * d)),
            "a multiplication and an addition are two FLOPs, in the look-up as in the block": of(
                lambda d, C, g: 2 * C * d / (24 * d * d)
            ),
            "a group's codes are d / groups long: many short ones cost what few long ones do": of(
                lambda d, C, g: g * C / (6 * d)
            ),
            "as a multiple of the block: divide by 24 d²": of(lambda d, C, g: 4 * C * d),
        },
    )


def check_fit_prices(fit_prices):
    "14.2"
    from scipy.optimize import nnls

    g = np.random.default_rng(0)
    counts = np.exp(g.normal(0, 2, (40, 3))) * [1e9, 1e8, 1e3]
    taken = counts @ [2e-11, 0, 3e-5] * np.exp(g.normal(0, 0.2, 40))

    def log(p):
        return torch.as_tensor(np.asarray(p, float) * [1e11, 1e11, 1e5])

    relative = counts / taken[:, None]
    return check(
        lambda: log(fit_prices(counts.copy(), taken.copy())),
        log(nnls(relative, np.ones(40))[0]),
        {
            "that minimises errors in seconds: the slowest case decides alone": log(
                nnls(counts, taken)[0]
            ),
            "prices must not be negative: nobody is paid for a FLOP": log(
                np.linalg.lstsq(relative, np.ones(40), rcond=None)[0]
            ),
            "nnls returns the prices and a norm: take the first": torch.as_tensor(
                nnls(relative, np.ones(40))[1]
            ),
        },
    )


def check_training_state(training_state):
    "14.3"
    cases = [(1000, 0, False), (1000, 500, False), (1000, 500, True), (0, 300, True)]

    def of(fn):
        return torch.tensor([float(fn(*c)) for c in cases], dtype=torch.float64)

    def numbers(weight, code, ema_code):  # how many numbers are kept of each
        return of(lambda w, c, ema: weight * w + (ema_code if ema else code) * c)

    right = 4 * numbers(4, 4, 3)
    return check(
        lambda: of(training_state),
        right,
        {
            "four bytes a number in float32": right / 4,
            "AdamW keeps two moments a weight": 4 * numbers(3, 3, 3),
            "codes that learn by averages have no gradient and no moments, but two buffers": (
                4 * numbers(4, 4, 4)
            ),
            "their two buffers count as well": 4 * numbers(4, 4, 1),
            "the weights themselves are held too": 4 * numbers(3, 3, 2),
        },
    )


def _firing_and_truth():  # of five concepts, then and now
    g = seeded(0)
    draws = ((40, 0.4), (40, 0.5), (60, 0.3), (60, 0.6))
    on_was, truth_was, on_now, truth_now = (torch.rand(n, 5, generator=g) < p for n, p in draws)
    on_was[:, 1] = False
    on_now[:, 3] = False
    return on_was, truth_was, on_now, truth_now


def check_precision_change(precision_change):
    "14.4"
    on_was, truth_was, on_now, truth_now = _firing_and_truth()
    hits_was, hits_now = (on_was & truth_was).sum(0), (on_now & truth_now).sum(0)
    was, now = hits_was / on_was.sum(0), hits_now / on_now.sum(0)
    both = on_was.any(0) & on_now.any(0)
    recalls = hits_now / truth_now.sum(0) - hits_was / truth_was.sum(0)
    as_zero = now.nan_to_num() - was.nan_to_num()

    def change():
        now = dict(on_now=on_now.clone(), truth_now=truth_now.clone())
        return torch.as_tensor(float(precision_change(on_was.clone(), truth_was.clone(), **now)))

    return check(
        change,
        (now - was)[both].mean(),
        {
            "the two means are over different concepts: ask the same ones in both": (
                now.nanmean() - was.nanmean()
            ),
            "a feature that never fires has no precision, not one of 0": as_zero.mean(),
            "that is was - now": (was - now)[both].mean(),
            "that is recall: divide by where the feature fires": recalls[both].mean(),
        },
    )


def check_answer_14_5(answer):
    "14.5"
    return check_choice(
        answer,
        "b",
        "right: two sites a block cost 4 C d, the block 24 d². What a wide model needs "
        "in codes is an open question, which costs do not answer",
        why_not={
            "a": "More sites, but more blocks as well: the ratio is a matter of one block.",
            "c": "A look-up is added; the block still does all its products.",
        },
    )


def check_renamed(renamed):
    "14.6"
    girls = torch.tensor([4, 7, 9, 12])
    boys = torch.tensor([5, 6, 15])
    ids = torch.randint(0, 20, (6, 30), generator=seeded(0))
    try:
        new = renamed(ids.clone(), girls.clone(), boys.clone(), seed=3)
    except Exception as e:
        return Verdict(False, f"your code stopped with {type(e).__name__}: {e}")
    if not torch.is_tensor(new) or new.shape != ids.shape:
        got = list(new.shape) if torch.is_tensor(new) else type(new).__name__
        return Verdict(False, f"expected ids of shape {list(ids.shape)}, got {got}")
    names = torch.cat([girls, boys])
    if (new != ids)[~torch.isin(ids, names)].any():
        return Verdict(False, "not yet: a token that is no name has changed")
    table = {int(a): set(new[ids == a].tolist()) for a in names}
    if any(len(v) > 1 for v in table.values()):
        return Verdict(False, "not yet: a name must become the same other name everywhere")
    table = {a: v.pop() for a, v in table.items()}
    if any(a == b for a, b in table.items()):
        return Verdict(
            False,
            "not yet: a name has stayed itself (a random order leaves some "
            "in place; a step round the circle does not)",
        )
    for some, who in ((girls, "girl"), (boys, "boy")):
        if any(table[a] not in some.tolist() for a in some.tolist()):
            return Verdict(False, f"not yet: a {who}'s name became one of the other kind")
        if len({table[a] for a in some.tolist()}) < len(some):
            return Verdict(False, "not yet: two names became one")
    return Verdict(True, "right: one to one, nobody keeps their name, and all else stays")
