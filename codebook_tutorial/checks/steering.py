__all__ = [
    "check_add_where",
    "check_best_feature",
    "check_switch_table",
    "check_recognised_topic",
    "check_rate_at_budget",
    "check_answer_12_6",
    "check_word_lists",
]

import torch

from .core import check, check_choice


def check_add_where(add_where):
    "12.1"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, generator=g)
    v = torch.randn(3, generator=g)
    where = torch.rand(2, 4, generator=g) > 0.5
    return check(
        lambda: add_where(x.clone(), v.clone(), where.clone()),
        x + where[..., None] * v,
        {
            "that is everywhere": x + v,
            "that is where the mask is false": x + ~where[..., None] * v,
            "added, not put in place of the state": torch.where(where[..., None], v, x),
            "the state is gone: x + ...": where[..., None] * v,
        },
    )


def check_best_feature(best_feature):
    "12.2"
    g = torch.Generator().manual_seed(1)
    marked = torch.rand(400, generator=g) < 0.2
    often = torch.ones(400, dtype=torch.bool)
    one = torch.zeros(400, dtype=torch.bool)
    part = marked & (torch.rand(400, generator=g) < 0.8)
    one[marked.nonzero()[0]] = True
    part |= torch.rand(400, generator=g) < 0.05
    fires = torch.stack([torch.zeros(400, dtype=torch.bool), often, part, one, ~marked], 1)
    return check(
        lambda: torch.tensor(float(best_feature(fires.clone(), marked.clone()))),
        torch.tensor(2.0),
        {
            "that is the best coverage: a feature that always fires has all of it": torch.tensor(
                1.0
            ),
            "that is the best precision: a feature that fired once, rightly, has it": torch.tensor(
                3.0
            ),
            "that feature never fires: 0 / 0": torch.tensor(0.0),
            "that one fires where the marks are not": torch.tensor(4.0),
        },
    )


def check_switch_table(switch_table):
    "12.3"
    owner = torch.tensor([-1, 0, 1, 2, -1, 1, 0, 2])
    gates = torch.tensor([False] * 4 + [True, True] + [False] * 2)
    write = torch.tensor([6, 2, 3])
    target = 1

    def table(change):
        t = torch.arange(8)
        t[change] = write[target]
        return t.float()

    return check(
        lambda: switch_table(owner.clone(), gates.clone(), write.clone(), target=target).float(),
        table((owner >= 0) & (owner != target) | gates),
        {
            "the codes of open places change as well, or no topic is ever started": table(
                (owner >= 0) & (owner != target)
            ),
            "codes that speak for nobody must stay (except at open places)": table(
                (owner != target) | gates
            ),
            "the target's own codes stay what they are (but for those of open places)": table(
                (owner >= 0) | gates
            ),
            "all codes of open places change, also one that speaks for the target": table(
                (owner != target) & ((owner >= 0) | gates)
            ),
            "that only starts: other alternatives' codes change as well": table(gates),
            "the code write[target], not the number target": (
                torch.where(
                    (owner >= 0) & (owner != target) | gates, target, torch.arange(8)
                ).float()
            ),
        },
    )


def check_recognised_topic(recognised_topic):
    "12.4"
    counts = torch.tensor([[3, 1, 0], [0, 0, 0], [2, 2, 1], [0, 1, 4], [1, 0, 0], [0, 5, 5]])
    return check(
        lambda: recognised_topic(counts.clone()).float(),
        torch.tensor([0.0, -1, -1, 2, 0, -1]),
        {
            "a text without any word, or with two equal, has no topic: -1": (
                counts.argmax(1).float()
            ),
            "two equal: -1 as well": torch.tensor([0.0, -1, 0, 2, 0, 1]),
            "the number of the topic, not how many words it has": counts.max(1).values.float(),
        },
    )


def check_rate_at_budget(rate_at_budget):
    "12.5"
    g = torch.Generator().manual_seed(4)
    rate = torch.rand(4, 60, generator=g) * 0.2 + torch.tensor([0.1, 0.4, 0.6, 0.75])[:, None]
    loss = torch.rand(4, 60, generator=g) * 0.2 + torch.tensor([1.2, 1.4, 1.6, 4.0])[:, None]
    limit = 1.9
    return check(
        lambda: torch.as_tensor(rate_at_budget(loss.clone(), rate.clone(), limit)).float(),
        rate[2, 1::2].mean(),
        {
            "scored on the texts that chose: use the odd ones": rate[2, ::2].mean(),
            "that strength is over the budget": rate[3, 1::2].mean(),
            "scored on all texts, half of which chose": rate[2].mean(),
            "the highest rate within the budget, not the lowest loss": rate[0, 1::2].mean(),
        },
    )


def check_answer_12_6(answer):
    "12.6"
    return check_choice(
        answer,
        "b",
        "right: direction and place, and the place can be known in more than one way",
        why_not={
            "a": (
                "The vector where the model is about to say a topic "
                "word uses no feature, and works."
            ),
            "c": (
                "Edits as long in a random direction were made at the "
                "same places, and brought no topic."
            ),
        },
    )


def check_word_lists(word_lists):
    "12.7"
    groups = {"wet": ["rain", "drizzle", "grey", "flood"], "dry": ["sun", "grey", "dust"]}
    ids = {"rain": 3, "drizzle": 4, "grey": 5, "sun": 6, "dust": 7}

    def flat(d):
        return torch.tensor([float(t) for name in groups for t in [*d.get(name, []), -1]])

    return check(
        lambda: flat(word_lists({k: list(v) for k, v in groups.items()}, dict(ids))),
        torch.tensor([3.0, 4, -1, 6, 7, -1]),
        {
            "a word of two groups tells nothing: leave it out": torch.tensor(
                [3.0, 4, 5, -1, 6, 5, 7, -1]
            ),
            "a word of two groups belongs to neither, not to the first": torch.tensor(
                [3.0, 4, 5, -1, 6, 7, -1]
            ),
            "... nor to the last": torch.tensor([3.0, 4, -1, 6, 5, 7, -1]),
        },
    )
