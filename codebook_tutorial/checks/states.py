__all__ = [
    "check_majority",
    "check_held_out_precision",
    "check_precision_at_recall",
    "check_write_boundary",
    "check_answer_03_5",
    "check_smallest",
    "check_answer_03_7",
]

import torch

from codebook_tutorial.core import seeded

from .core import Verdict, check, check_choice


def _codes_and_labels():
    labels = torch.randint(6, (400,), generator=seeded(0))
    noise = torch.randint(30, (400,), generator=seeded(1))
    true = torch.rand(400, generator=seeded(2)) < 0.6
    return torch.where(true, labels * 3 + torch.arange(400) % 3, noise), labels


def check_majority(majority):
    "Exercise 03.1."
    table = torch.tensor([[5, 1, 0], [0, 0, 0], [2, 3, 9], [0, 4, 1]])
    return check(
        lambda: majority(table),
        torch.tensor([0, -1, 2, 1]),
        {
            "a code that was never used belongs to no label: -1": table.argmax(1),
            "you went down the columns: codes are the rows": table.argmax(0),
            "those are the counts; the label is wanted": table.max(1).values,
        },
    )


def check_held_out_precision(held_out_precision):
    "Exercise 03.2."
    codes, labels = _codes_and_labels()

    def run(choose, score, unseen=-1):
        table = torch.bincount(codes[choose] * 6 + labels[choose], minlength=240).view(40, 6)
        owner = torch.where(table.sum(1) > 0, table.argmax(1), unseen)
        return (owner[codes[score]] == labels[score]).float().mean()

    first, second, both = slice(0, 200), slice(200, None), slice(None)
    return check(
        lambda: held_out_precision(codes, labels, 40),
        run(first, second),
        {
            "you scored where you chose: choose on the first half, score on the second": run(
                first, first
            ),
            "all data chose and all were scored: split into halves": run(both, both),
            "all data chose; only the first half may": run(both, second),
            "you scored on the first half what the second chose": run(second, first),
            "you scored all positions; only the second half counts": run(first, both),
        },
    )


def check_precision_at_recall(precision_at_recall):
    "Exercise 03.3."
    truth = torch.rand(300, generator=seeded(4)) < 0.2
    acts = torch.randn(300, generator=seeded(3)) + truth

    def at(order, recall=0.7):
        hits = truth[order].cumsum(0)
        rank = int((hits < recall * truth.sum()).sum())
        return hits[rank] / (rank + 1), rank

    falling = acts.argsort(descending=True)
    right, rank = at(falling)
    of_all = 0.7 * 300 / int(truth.sum()) if 0.7 * 300 <= int(truth.sum()) else 1.0
    return check(
        lambda: precision_at_recall(acts, truth, 0.7),
        right,
        {
            "you sorted lowest first: high activations fire first": at(acts.argsort())[0],
            "that is the recall; precision is hits / number that fire": (
                torch.tensor(0.7).mul(truth.sum()).ceil() / truth.sum()
            ),
            "off by one: after rank r (from 0) r + 1 positions fire": right * (rank + 1) / rank,
            "that is the threshold, not the precision": acts.sort(descending=True).values[rank],
            "the recall is of the true positions, not of all": at(falling, of_all)[0],
        },
    )


def check_write_boundary(write_boundary):
    "Exercise 03.4."
    ids = torch.randint(50, (4, 6, 2, 1), generator=seeded(5))

    def written(where):
        out = ids.clone()
        out[where] = 77
        return out

    fed = ids.clone()
    verdict = check(
        lambda: write_boundary(77)(fed),
        written((slice(None), -2)),
        {
            "that is the last position; the boundary is the second last, -2": written(
                (slice(None), -1)
            ),
            "you wrote at both positions": written((slice(None), slice(-2, None))),
            "you wrote everywhere": torch.full_like(ids, 77),
            "you wrote group -2 of every position; positions are the second axis": written(
                (slice(None), slice(None), -2)
            ),
            "nothing changed": ids,
        },
    )
    if verdict and not torch.equal(fed, ids):
        return Verdict(
            False,
            "right ids, but you wrote into the tensor that was handed in: work on ids.clone()",
        )
    return verdict


def check_answer_03_5(answer):
    "Exercise 03.5."
    return check_choice(
        answer,
        "b",
        "yes: a control should differ in the one thing the claim is about",
        why_not={
            "a": "they also break the model: the distance stays large whatever the codes mean",
            "c": (
                "the untouched model shows that something happened, "
                "not that it was b's codes' meaning"
            ),
        },
    )


def check_smallest(smallest):
    "Exercise 03.6."
    mass = {600: 0.97, 150: 0.7, 300: 0.92, 450: 0.9, 900: 0.99}
    got = check(
        lambda: smallest([600, 150, 300, 450, 900], 0.91, mass.get),
        300,
        {
            "600 comes first in the list, but 300 is smaller and reaches the goal": 600,
            "that is the largest that reaches the goal": 900,
            "that is the smallest size; does it reach the goal?": 150,
            "450 does not reach the goal": 450,
            "that is the mass; the size is wanted": 0.92,
        },
    )
    if not got:
        return got
    try:
        none = smallest([150, 450], 0.95, mass.get)
    except Exception as e:
        return Verdict(
            False, f"when no size reaches the goal your code stops with {type(e).__name__}: {e}"
        )
    if none is None:
        return got
    return Verdict(False, f"when no size reaches the goal, return None, not {none}")


def check_answer_03_7(answer):
    "Exercise 03.7."
    return check_choice(
        answer,
        "a",
        "yes: on true walks it knows the next state, so what fails is "
        "the sampling; the beat is the first suspect",
        why_not={
            "b": "more codes mend what codes lose, and on true walks little is lost",
            "c": "that compares detectors; it does not explain the sampling",
        },
    )
