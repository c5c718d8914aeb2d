__all__ = [
    "check_set_f1",
    "check_next_feature",
    "check_is_absorbed",
    "check_paired_interval",
    "check_answer_13_5",
    "check_my_dictionary",
]

import torch

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Dictionary, random_directions
from codebook_tutorial.feature.detect import concept_scores

from .core import Verdict, check, check_choice


def check_set_f1(set_f1):
    "13.1"
    g = seeded(0)
    fires, truth = torch.rand(40, 3, generator=g) < 0.25, torch.rand(40, generator=g) < 0.5

    def f1(some):
        return 2 * (some & truth).sum() / (some.sum() + truth.sum())

    return check(
        lambda: torch.as_tensor(float(set_f1(fires.clone(), truth.clone()))),
        f1(fires.any(1)),
        {
            "that fires only where all of them do": f1(fires.all(1)),
            "that is the mean of the single features' F1: a set may "
            "be better than each of its members": torch.stack([f1(c) for c in fires.T]).mean(),
            "that is the precision alone": (fires.any(1) & truth).sum() / fires.any(1).sum(),
            "that is the recall alone": (fires.any(1) & truth).sum() / truth.sum(),
        },
    )


def check_next_feature(next_feature):
    "13.2"
    g = seeded(1)
    base = torch.randn(60, 4, generator=g)
    a, b, c, d = base.T
    z = torch.stack([a, a + 0.2 * b, c, -d, b + c], 1)
    z = z - z.mean(0)
    z = z / z.norm(dim=0)
    y = 3 * z[:, 0] + 0.5 * z[:, 2] - z[:, 3]
    return check(
        lambda: torch.as_tensor(float(next_feature(z.clone(), y.clone(), [0]))),
        torch.tensor(3.0),
        {
            "feature 1 goes with y, but feature 0 has said all of that "
            "already: look at what is left over": torch.tensor(1.0),
            "feature 2 has the largest positive product; a "
            "negative one counts as much": torch.tensor(2.0),
            "that one is chosen already": torch.tensor(0.0),
        },
    )


def _firing_case(at_child, at_rest, outside=10):  # shares of 6, of 14, and how many of the others
    parent, child = torch.arange(40) < 20, torch.arange(40) < 6
    fires = torch.zeros(40, dtype=torch.bool)
    fires[:at_child] = fires[6 : 6 + at_rest] = fires[20 : 20 + outside] = True
    return fires, parent, child


def check_is_absorbed(is_absorbed):
    "13.3"
    sizes = [(0, 10), (2, 9), (2, 8), (4, 9), (6, 3), (2, 10, 0)]
    cases = [_firing_case(*some) for some in sizes]

    def share(fires, where):
        return fires[where].float().mean()

    def of(rule):  # of the shares at: the child, the parent's rest, the parent, elsewhere
        found = []
        for f, p, c in cases:
            found.append(rule(share(f, c), share(f, p & ~c), share(f, p), share(f, ~p)))
        return torch.tensor([float(x) for x in found])

    return check(
        lambda: torch.tensor([float(bool(is_absorbed(*case))) for case in cases]),
        of(lambda child, rest, *_: child < rest / 2),
        {
            "you compare with all tokens of the parent; the child's own "
            "are among them and hide part of the hole": of(
                lambda child, rest, parent, _: child < parent / 2
            ),
            "you compare with tokens outside the parent: there the feature should be silent": of(
                lambda child, rest, parent, outside: child < outside / 2
            ),
            "less than half as often, not just less often": of(
                lambda child, rest, *_: child < rest
            ),
            "the other way round: the hole is at the child": of(
                lambda child, rest, *_: rest < child / 2
            ),
        },
    )


def check_paired_interval(paired_interval):
    "13.4"
    a, b = torch.tensor([0.33, 0.29, 0.36]), torch.tensor([0.31, 0.28, 0.33])
    t = 4.303
    d = a - b
    mean, half = d.mean(), t * d.std() / 3**0.5
    apart = (a.var() / 3 + b.var() / 3) ** 0.5

    def both(mean, half):
        return torch.stack([mean - half, mean + half])

    def mine():
        return [
            torch.as_tensor(v, dtype=torch.float) for v in paired_interval(a.clone(), b.clone(), t)
        ]

    return check(
        lambda: torch.stack(mine()),
        both(mean, half),
        {
            "the seeds are paired: take the differences first, then their spread": (
                both(mean, t * apart)
            ),
            "the standard deviation of three numbers has n - 1 in its denominator": (
                both(mean, t * d.std(correction=0) / 3**0.5)
            ),
            "the error of a mean is s / sqrt(n)": both(mean, t * d.std()),
            "that is b - a": both(-mean, half),
        },
        tol=1e-3,
    )


def check_answer_13_5(answer):
    "13.5"
    return check_choice(
        answer,
        "b",
        "right: with all features allowed, any set of directions that spans the space does as "
        "well, and a dictionary that does worse has thrown something away",
        why_not={
            "a": "Random directions would report nearly the same: section 2 shows it.",
            "c": (
                "A probe on all features sees through every hole; "
                "single features may be full of them."
            ),
        },
    )


def _made_up_world():  # -> states [9000, 24] of 64 parts, which parts are there
    g = seeded(3)
    true = torch.nn.functional.normalize(torch.randn(64, 24, generator=g), dim=-1)
    on = torch.rand(9000, 64, generator=g) < 0.03
    return (on * (0.5 + torch.rand(9000, 64, generator=g))) @ true, on


def _no_dictionary(d):  # -> what is wrong with it, or None
    if not isinstance(d, Dictionary):
        return f"expected a Dictionary, got a {type(d).__name__}: write your code, and return it"
    if d.directions.shape[1] != 24 or len(d.directions) > 96:
        return f"expected directions [at most 96, 24], got {list(d.directions.shape)}"
    return None


@torch.no_grad()
def check_my_dictionary(my_dictionary):
    "13.6"
    x, on = _made_up_world()
    try:
        with torch.enable_grad():
            d = my_dictionary(x[:6000].clone(), 96, 3)
    except Exception as e:
        return Verdict(False, f"your code stopped with {type(e).__name__}: {e}")
    if wrong := _no_dictionary(d):
        return Verdict(False, wrong)
    x, on = x[6000:], on[6000:]

    def f1(one):
        return float(concept_scores(one.encode(x).numpy(), on.numpy())["f1"].mean())

    active = (d.encode(x) != 0).float().sum(1).mean().item()
    if active > 9:
        return Verdict(
            False,
            f"{active:.0f} features are active in the mean, three were asked for: "
            "a dense dictionary is compared with sparse ones here",
        )
    score, blind = f1(d), f1(random_directions(96, 24, seed=5))
    passed = score > blind + 0.15
    return Verdict(
        passed,
        f"{'right' if passed else 'not yet'}: F1 {score:.2f} for the parts of a made-up world; "
        f"as many random directions have {blind:.2f}"
        + ("; now the board" if passed else ", and you should be .15 above them"),
    )
