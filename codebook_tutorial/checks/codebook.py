__all__ = [
    "check_choose_codes",
    "check_sum_of_codes",
    "check_pass_through",
    "check_dead_share",
    "check_residual_ids",
    "check_answer_02_6",
    "check_bits",
    "check_rewrite",
]

import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded

from .core import check, check_choice


def _data():  # x, codes of different lengths
    codes = torch.randn(15, 6, generator=seeded(1)) * torch.linspace(0.3, 3, 15)[:, None]
    return torch.randn(40, 6, generator=seeded(0)), codes


def check_choose_codes(choose_codes):
    "Exercise 02.1."
    x, codes = _data()
    unit = F.normalize(codes, dim=-1)
    score = F.normalize(x, dim=-1) @ unit.T
    dots = x @ codes.T
    nearest = torch.cdist(x, codes).topk(3, largest=False).indices
    return check(
        lambda: choose_codes(x, codes, 3),
        score.topk(3).indices,
        {
            "that is the plain dot product: long codes win; normalise them": dots.topk(3).indices,
            "those are the *farthest* codes": score.topk(3, largest=False).indices,
            "topk returns values and indices: the ids are .indices": score.topk(3).values,
            "that is the nearest by distance, not by angle": nearest,
        },
    )


def check_sum_of_codes(sum_of_codes):
    "Exercise 02.2."
    _, codes = _data()
    ids = torch.randint(15, (8, 4), generator=seeded(2))
    return check(
        lambda: sum_of_codes(ids, codes),
        codes[ids].sum(1),
        {
            "did you take the mean of the codes? the paper sums them": codes[ids].mean(1),
            "did you take the largest? the codes are summed": codes[ids].amax(1),
            "you returned the gathered codes; sum over the k of them": codes[ids],
            "you summed over the tokens; sum over the k codes of each token": codes[ids].sum(0),
        },
    )


def check_pass_through(pass_through):
    "Exercise 02.3."

    def grads(fn):
        x, out = (torch.arange(6.0).view(2, 3).add(i).requires_grad_() for i in (0, 5))
        y = fn(x, out)
        if y.requires_grad:
            (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        grads = [torch.zeros(2, 3) if t.grad is None else t.grad for t in (x, out)]
        return torch.stack([y.detach(), *grads])

    return check(
        lambda: grads(pass_through),
        grads(lambda x, out: out + (x - x.detach())),
        {
            "forward right, but nothing reaches x": grads(lambda x, out: out),
            "forward right and x gets its gradient, but the codes get none": grads(
                lambda x, out: x + (out - x).detach()
            ),
            "in the forward pass you hand on x instead of out": grads(
                lambda x, out: x + (out - out.detach())
            ),
            "forward you added x: subtract x.detach()": grads(lambda x, out: out + x),
            "no gradient at all": grads(lambda x, out: out.detach()),
        },
    )


def check_dead_share(dead_share):
    "Exercise 02.4."
    ids = torch.randint(20, (30, 2), generator=seeded(3)) * 2
    alive = len(ids.unique()) / 50
    return check(
        lambda: dead_share(ids, 50),
        1 - alive,
        {
            "that is the share that *is* used": alive,
            "you counted; a share is wanted": 50 - len(ids.unique()),
            "you looked at the first code of each token only": 1 - len(ids[:, 0].unique()) / 50,
            "codes above the largest id seen are dead too: divide by n_codes": (
                1 - len(ids.unique()) / int(ids.max() + 1)
            ),
        },
    )


def check_residual_ids(residual_ids):
    "Exercise 02.5."
    x, codes = _data()

    def run(pick, subtract=True):
        ids, left = [], x
        for _ in range(3):
            ids.append(pick(left))
            left = left - codes[ids[-1]] if subtract else left
        return torch.stack(ids, -1)

    def near(left):
        return torch.cdist(left, codes).argmin(-1)

    def by_angle(left):
        return (F.normalize(left, dim=-1) @ F.normalize(codes, dim=-1).T).argmax(-1)

    nearest = torch.cdist(x, codes).topk(3, largest=False).indices
    return check(
        lambda: residual_ids(x, codes, 3),
        run(near),
        {
            "the same code three times: subtract the chosen one before you choose again": run(
                near, False
            ),
            "those are the three nearest to x; choose for what is *left*": nearest,
            "you chose by angle; residual selection goes by distance": run(by_angle),
            "one row a token: stack along the last axis": run(near).T,
        },
    )


def check_answer_02_6(answer):
    "Exercise 02.6."
    return check_choice(
        answer,
        "a",
        "yes: one is variance at one place, the other the loss after books at four sites in a row",
        why_not={
            "b": "0 is perfect and the mean predictor has 1; the held-out values are what they are",
            "c": "that may be so, but nothing in the two tables separates rare from common states",
        },
    )


def check_bits(bits):
    "Exercise 02.7."
    counts = torch.tensor([50, 25, 0, 13, 12, 0])
    p = counts[counts > 0] / 100
    return check(
        lambda: bits(counts),
        -(p * p.log2()).sum(),
        {
            "those are nats; divide by ln 2": -(p * p.log()).sum(),
            "codes never used give 0 * log 0: leave them out": torch.tensor(float("nan")),
            "that is the logarithm of how many codes are used; weigh by how often": (
                torch.tensor(4.0).log2()
            ),
            "that is log2 of all codes; weigh by how often": torch.tensor(6.0).log2(),
            "the sign: bits are positive": (p * p.log2()).sum(),
        },
    )


def check_rewrite(rewrite):
    "Exercise 02.8."
    ids = torch.randint(5, (2, 6, 2, 1), generator=seeded(4))
    last = ids.clone()
    last[:, -1] = 9
    return check(
        lambda: rewrite(3, 9)(ids.clone()),
        torch.where(ids == 3, 9, ids),
        {
            "you wrote it everywhere, whatever stood there": torch.full_like(ids, 9),
            "you replaced all but `old`": torch.where(ids == 3, ids, 9),
            "you wrote at the last position": last,
            "nothing changed": ids,
        },
    )
