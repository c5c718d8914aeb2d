__all__ = [
    "check_precision_recall",
    "check_code_precisions",
    "check_touched",
    "check_held_out_best",
    "check_answer_06_5",
    "check_best_set",
    "check_by_code",
]

import torch

from codebook_tutorial.core import seeded

from .core import check, check_choice


def _example(n=400, n_codes=12):
    ids = torch.randint(n_codes, (n,), generator=seeded(0))
    noise = torch.rand(n, generator=seeded(1))
    shares = torch.tensor([0.95, 0.8, 0.6, 0.45, 0.3, 0.2, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0])
    meant = noise < shares[ids]
    # a code that is precise by chance: three times on the first half alone
    ids[:3] = n_codes
    meant[:3] = True
    return ids, meant, n_codes + 2


def check_precision_recall(precision_recall):
    "Exercise 06.1."
    fires, meant = torch.arange(12) % 3 == 0, torch.arange(12) < 5
    never = torch.zeros(12).bool()
    p, r, f = 0.5, 0.4, 4 / 9
    right = torch.tensor([p, r, f])
    verdict = check(
        lambda: precision_recall(fires, meant),
        right,
        {
            "precision and recall are exchanged: precision divides by what fired": torch.tensor(
                [r, p, f]
            ),
            "that is the accuracy; the many tokens neither "
            "meant nor found would decide it": torch.tensor([(fires == meant).float().mean()] * 3),
            "F1 is the harmonic mean: 2 hits / (fired + meant)": torch.tensor([p, r, (p + r) / 2]),
            "without the 2, F1 never exceeds a half": torch.tensor([p, r, f / 2]),
        },
    )
    if not verdict:
        return verdict
    return check(
        lambda: precision_recall(never, meant),
        torch.zeros(3),
        {"a detector that never fires divides by nothing": torch.tensor([torch.nan, 0.0, 0.0])},
        praise=verdict.message,
    )


def check_code_precisions(code_precisions):
    "Exercise 06.2."
    ids, meant, n = _example()
    hits, fires = torch.bincount(ids[meant], minlength=n), torch.bincount(ids, minlength=n)
    right = hits / fires.clamp(min=1)
    return check(
        lambda: code_precisions(ids, meant, n),
        right,
        {
            "that is the recall: precision divides by the code's own firings": hits / meant.sum(),
            "those are hits; divide by the firings": hits,
            "a code that never fires gives 0 / 0: make it 0": hits / fires,
            "that divides by all tokens": hits / len(ids),
            "that is the share of its firings that were *not* meant": 1 - right,
            "minlength: codes that never fire are missing at the end": right[:-1],
        },
    )


def check_touched(touched):
    "Exercise 06.3."
    ends = torch.tensor([3, 5, 6, 10, 14, 15, 20])
    begins, spans = torch.tensor([0, 3, 5, 6, 10, 14, 15]), [(4, 6), (10, 11), (16, 18)]

    def over(fn):
        return torch.stack([fn(a, b) for a, b in spans]).any(0).float()

    right = over(lambda a, b: (begins < b) & (a < ends))
    return check(
        lambda: torch.as_tensor(touched(begins, ends, spans)).float(),
        right,
        {
            "a token that ends where the span begins does not touch "
            "it, nor one that begins where it ends": over(lambda a, b: (begins <= b) & (a <= ends)),
            "you ask for tokens that lie inside a span; a token may be longer than it": over(
                lambda a, b: (begins >= a) & (ends <= b)
            ),
            "you ask for tokens that hold a whole span; it may go over several": over(
                lambda a, b: (begins <= a) & (ends >= b)
            ),
            "you ask where a token begins; it may begin before the span and reach into it": over(
                lambda a, b: (begins >= a) & (begins < b)
            ),
            "only the last span counted": ((begins < 18) & (16 < ends)).float(),
        },
    )


def check_held_out_best(held_out_best):
    "Exercise 06.4."
    ids, meant, n = _example()
    half = len(ids) // 2

    def at(part, best):
        fires = ids[part] == best
        return (fires & meant[part]).sum() / fires.sum().clamp(min=1)

    first, later, every = slice(None, half), slice(half, None), slice(None)

    def best(part, least):
        hits = torch.bincount(ids[part][meant[part]], minlength=n)
        fires = torch.bincount(ids[part], minlength=n)
        enough = hits > least * meant[part].sum()
        return torch.where(enough, hits / fires.clamp(min=1), -1.0).argmax()

    return check(
        lambda: held_out_best(ids, meant, n),
        at(later, best(first, 0.1)),
        {
            "scored where it was chosen": at(first, best(first, 0.1)),
            "codes of little recall took part; one was right three times, by chance": at(
                later, best(first, 0.0)
            ),
            "all tokens chose": at(every, best(every, 0.1)),
            "chosen on the second half, too": at(later, best(later, 0.1)) + 0.0,
            "that is the code, not its precision": best(first, 0.1).float(),
        },
    )


def check_answer_06_5(answer):
    "Exercise 06.5."
    return check_choice(
        answer,
        "b",
        "yes: the best of thirty thousand is better than the best of a thousand, whatever "
        "they are; with equal pools the difference is that of the kind",
        why_not={
            "a": "that makes sure of the 20 points, not of their reason",
            "c": "a fair question, too; but thirty thousand would still compete with one thousand",
        },
    )


def check_best_set(best_set):
    "Exercise 06.6."
    ids, meant, n = _example()
    half = len(ids) // 2
    fires = torch.bincount(ids[:half], minlength=n)
    hits = torch.bincount(ids[:half][meant[:half]], minlength=n)
    precision = torch.where(fires > 0, hits / fires.clamp(min=1), -1.0)
    order = precision.argsort(descending=True, stable=True)
    f1 = 2 * hits[order].cumsum(0) / (fires[order].cumsum(0) + meant[:half].sum())
    m = 1 + int((f1[1:] > f1[:-1]).int().cumprod(0).sum())

    def score(chosen, part):
        found = torch.isin(ids[part], chosen)
        return 2 * (found & meant[part]).sum() / (found.sum() + meant[part].sum())

    later = slice(half, None)
    return check(
        lambda: best_set(ids, meant, n),
        score(order[:m], later),
        {
            "scored where it was chosen": score(order[:m], slice(None, half)),
            "that is the best single code": score(order[:1], later),
            "every code that fires: recall 1, and hardly any precision": score(order, later),
            "one code too many: the set with which F1 falls is not taken": score(
                order[: m + 1], later
            ),
            "one code too few": score(order[: m - 1], later),
            "all tokens chose and scored": score(order[:m], slice(None)),
        },
    )


def check_by_code(by_code):
    "Exercise 06.7."
    ids, n_codes = torch.randint(6, (30,), generator=seeded(2)), 8
    positions, count = ids.argsort(stable=True), torch.bincount(ids, minlength=n_codes)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), count.cumsum(0)])

    def both(a, b):
        return torch.cat([a, b])

    return check(
        lambda: both(*by_code(ids.clone(), n_codes)),
        both(positions, offsets),
        {
            "those are counts; offsets add them up": both(positions, count),
            "offsets begin with 0": both(positions, offsets[1:]),
            "those are the sorted codes; their positions were wanted": both(
                ids.sort().values, offsets
            ),
            "codes that never fire need an offset, too: minlength": both(
                positions, offsets[: int(ids.max()) + 2]
            ),
        },
    )
