__all__ = [
    "check_patch_features",
    "check_kl_nats",
    "check_first_order",
    "check_features_needed",
    "check_acdc_pass",
    "check_answer_10_6",
    "check_month_prompts",
]

import torch

from codebook_tutorial.core import seeded

from .core import check, check_choice


def _example(seed=0):
    "x, c, c_target, directions."
    length, F, d = 4, 6, 5
    draw = seeded(seed)
    return (
        torch.randn(length, d, generator=draw),
        torch.rand(length, F, generator=draw),
        torch.rand(length, F, generator=draw),
        torch.randn(F, d, generator=draw),
    )


def check_patch_features(patch_features):
    "Exercise 10.1."
    x, c, c_target, D = _example()
    chosen = [4, 1]
    delta = (c_target - c)[:, chosen] @ D[chosen]
    return check(
        lambda: patch_features(x, c, c_target, D, list(chosen)),
        x + delta,
        {
            "the counterfactual's features less the prompt's, not the reverse": x - delta,
            "only the chosen features": x + (c_target - c) @ D,
            "add to the state, which keeps what no feature writes": delta,
            "the prompt's own features have to go": x + c_target[:, chosen] @ D[chosen],
            "that is what is not chosen": x + (c_target - c) @ D - delta,
            "do not rebuild the state from its features: what they leave out would be lost": (
                c @ D + delta
            ),
        },
    )


def check_kl_nats(kl_nats):
    "Exercise 10.2."
    draw = seeded(1)
    a, b = 3 * torch.randn(5, 7, generator=draw), 3 * torch.randn(5, 7, generator=draw)
    p, q = a.log_softmax(-1), b.log_softmax(-1)

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1)

    return check(
        lambda: kl_nats(a, b),
        kl(p, q),
        {
            "the other way round: KL(patched || target)": kl(q, p),
            "nats, not bits": kl(p, q) / torch.log(torch.tensor(2.0)),
            "logits are no log-probabilities: log_softmax first": (p.exp() * (a - b)).sum(-1),
            "one number a row": kl(p, q).mean(),
            "sum over the vocabulary, not the mean": (p.exp() * (p - q)).mean(-1),
            "weigh with the patched probabilities": (p - q).sum(-1),
            "symmetric is another measure": (kl(p, q) + kl(q, p)) / 2,
        },
    )


def check_first_order(first_order):
    "Exercise 10.3."
    g, c, c_target, D = _example(2)
    change = c_target - c
    slope = g @ D.T
    right = -(change * slope).sum(0)
    return check(
        lambda: first_order(g, c, c_target, D),
        right,
        {
            "by how much KL would fall, not rise": -right,
            "sum over the words": -(change * slope),
            "the mean over words is not the effect of patching all of them": right / len(g),
            "times the difference of the feature": -slope.sum(0),
            "the difference, not the counterfactual's value": -(c_target * slope).sum(0),
            "signed: some features would make it rise": right.abs(),
            "sum first over words of each product, not of its factors": (
                -change.sum(0) * slope.sum(0)
            ),
        },
    )


def _reached(kl, at):
    return next((k for k, v in enumerate(kl.tolist()) if v <= at + 1e-6), None)


def check_features_needed(features_needed):
    "Exercise 10.4."
    values = [[10.0, 11, 4, 6, 2, 0.9, 1.2], [8.0, 7, 6, 5], [4.0, 0.3, 0.1]]
    curves = [torch.tensor(v) for v in values]

    def number(fn):
        return torch.tensor([float(-1 if (k := fn(kl)) is None else k) for kl in curves])

    def right(kl):
        return _reached(kl, 0.1 * float(kl[0]))

    def one_more(kl):
        return None if (k := right(kl)) is None else k + 1

    def to_the_end(kl):
        return len(kl) - 1 if (k := right(kl)) is None else k

    def last(kl):
        low = [k for k in range(len(kl)) if kl[k] <= 0.1 * kl[0] + 1e-6]
        return low[-1] if low else None

    def of_the_way(kl):
        return _reached(kl, float(kl.min() + 0.1 * (kl[0] - kl.min())))

    return check(
        lambda: number(lambda kl: features_needed(kl, 0.9)),
        number(right),
        {
            "(1 - share) of what it was, not share": number(
                lambda kl: _reached(kl, 0.9 * float(kl[0]))
            ),
            "relative to KL with none patched": number(lambda kl: _reached(kl, 0.1)),
            "count features, not entries: none patched is 0": number(one_more),
            "None where it never falls so far": number(to_the_end),
            "the first time, not the last": number(last),
            "fallen by the share of what there was, not of the way to the lowest": number(
                of_the_way
            ),
        },
    )


_WORTH = dict(a=3.0, b=0.2, c=-0.5, d=0.3, e=0.25, f=1.0)


def _kl_of(some):  # d and e stand in for one another
    some = set(some)
    return 10 - sum(_WORTH[f] for f in some) - (1.0 if some & {"d", "e"} else 0.0)


def _passed(features, least, *, stale=False, size=False, fresh=True, back=False):
    "One pass that drops what matters less than `least`, right or with a mistake."
    left, now, every = list(features), _kl_of(features), _kl_of(features)
    for f in features[::-1] if back else features:
        rise = _kl_of(set(features) - {f}) - every if stale else _kl_of(set(left) - {f}) - now
        if (abs(rise) if size else rise) < least:
            left.remove(f)
            if fresh:
                now = _kl_of(left)
    return left


def check_acdc_pass(acdc_pass):
    "Exercise 10.5."
    features = list(_WORTH)
    threshold = 0.5

    def text(some):
        return " ".join(some) or "nothing"

    def passed(**mistake):
        return text(_passed(features, threshold, **mistake))

    right = _passed(features, threshold)
    wrong_sign = [
        f for f in features if _kl_of(features) - _kl_of(set(features) - {f}) > -threshold
    ]
    return check(
        lambda: text(acdc_pass(_kl_of, list(features), threshold)),
        text(right),
        {
            "against the set as it is by then: what was dropped before is gone": passed(stale=True),
            "renew KL at every drop": passed(fresh=False),
            "a feature that makes KL rise is dropped as well: the rise is signed": passed(
                size=True
            ),
            "visit them in the order given": passed(back=True),
            "the features left, not those dropped": text([f for f in features if f not in right]),
            "drop what matters less than the threshold, keep the others": text(wrong_sign),
        },
    )


def check_answer_10_6(answer):
    "Exercise 10.6."
    return check_choice(
        answer,
        "a",
        "right: what does the same in another language of features cannot "
        "be said to be the model's own (here, ICA does)",
        why_not={
            "b": (
                "That is a reason to ask for a control with as many features, not "
                "yet an answer: it may help or not. Coordinates and random "
                "directions may choose as well, and need more."
            ),
            "c": (
                "The floor says that something of the answer passes by the dictionary, a little "
                "here. It does not say that the features patched do nothing."
            ),
        },
    )


def check_month_prompts(month_prompts):
    "Exercise 10.7."
    months = ["May", "June", "July"]
    text = "It was {}, and the rain fell all day long. It was still"

    def joined(*, shift=1, answers=0, cut=0, at=0):
        a = months[: len(months) - cut]
        b = (months[shift:] + months[:shift])[: len(a)]
        lists = [[text.format(m) for m in a], [text.format(m) for m in b], a, b]
        if answers:
            lists[2], lists[3] = lists[3], lists[2]
        if at:
            lists[0], lists[1] = lists[1], lists[0]
        return " | ".join(" / ".join(some) for some in lists)

    return check(
        lambda: " | ".join(" / ".join(some) for some in month_prompts(list(months))),
        joined(),
        {
            "after the last comes the first": joined(cut=1),
            "the month after it, not before": joined(shift=2),
            "the prompt's answer is its own month": joined(answers=1),
            "first the prompts, then the counterfactuals": joined(answers=1, at=1),
        },
    )
