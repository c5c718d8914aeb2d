__all__ = [
    "check_unexplained",
    "check_sae_loss",
    "check_keep_k",
    "check_best_decoder",
    "check_answer_07_5",
    "check_threshold_gradient",
]

import torch

from codebook_tutorial.core import seeded

from .core import check, check_choice


def check_unexplained(unexplained):
    "Exercise 07.1."
    x = torch.randn(50, 4, generator=seeded(0)) * torch.tensor([1.0, 2, 3, 9]) + 5
    noise = torch.randn(50, 4, generator=seeded(1))
    left = noise.pow(2)
    total = (x - x.mean(0)).pow(2)
    return check(
        lambda: unexplained(x, x + noise),
        left.sum() / total.sum(),
        {
            "that is the variance explained": 1 - left.sum() / total.sum(),
            "centre x first: far from zero any answer would look good": left.sum() / x.pow(2).sum(),
            "the mean is a vector, one number a coordinate": (
                left.sum() / (x - x.mean()).pow(2).sum()
            ),
            "sum before you divide: coordinates with little variance "
            "would count as much as large ones": (left.sum(0) / total.sum(0)).mean(),
            "that is the squared error; divide by the variance": left.sum(-1).mean(),
            "squares, not lengths": left.sum(-1).sqrt().sum() / total.sum(-1).sqrt().sum(),
        },
    )


def check_sae_loss(sae_loss):
    "Exercise 07.2."
    x = torch.randn(20, 4, generator=seeded(0))
    M = torch.randn(7, 4, generator=seeded(1))
    b = torch.randn(7, generator=seeded(2))
    alpha = 0.7
    pre = x @ M.T + b
    f = pre.relu()
    error, penalty = (x - f @ M).pow(2), f.sum(-1).mean()
    want = error.sum(-1).mean() + alpha * penalty
    return check(
        lambda: sae_loss(x, M, b, alpha),
        want,
        {
            "the mean over coordinates is the paper's code, "
            "not its equation: sum them": error.mean() + alpha * penalty,
            "the penalty's mean over features: sum them": error.sum(-1).mean() + alpha * f.mean(),
            "the penalty is missing": error.sum(-1).mean(),
            "the ReLU is missing": (x - pre @ M).pow(2).sum(-1).mean() + alpha * pre.sum(-1).mean(),
            "the bias is missing": (
                (x - (x @ M.T).relu() @ M).pow(2).sum(-1).mean()
                + alpha * (x @ M.T).relu().sum(-1).mean()
            ),
            "L1 is the sum of the features, not of their squares": (
                error.sum(-1).mean() + alpha * f.pow(2).sum(-1).mean()
            ),
            "sums over states: take the mean": error.sum() + alpha * f.sum(),
        },
    )


def check_keep_k(keep_k):
    "Exercise 07.3."
    pre = torch.randn(20, 9, generator=seeded(0)) - 0.5
    k = 3
    values, ids = pre.topk(k, -1)

    def put(values, ids):
        return torch.zeros_like(pre).scatter(-1, ids, values)

    return check(
        lambda: keep_k(pre, k),
        put(values.relu(), ids),
        {
            "negative ones among the k are kept: they become 0, too": put(values, ids),
            "the largest by size, whatever the sign": put(
                pre.gather(-1, pre.abs().topk(k, -1).indices), pre.abs().topk(k, -1).indices
            ),
            "k for each feature: of every row, please": torch.zeros_like(pre).scatter(
                0, pre.topk(k, 0).indices, pre.topk(k, 0).values.relu()
            ),
            "that is the k largest, but not at their places": values.relu(),
            "that is a ReLU: nothing limits the number": pre.relu(),
            "k of the whole batch: that is BatchTopK": (
                torch.where(pre >= pre.flatten().topk(k * len(pre)).values[-1], pre, 0.0).relu()
            ),
        },
    )


def check_best_decoder(best_decoder):
    "Exercise 07.4."
    f, x = torch.rand(40, 5, generator=seeded(0)), torch.randn(40, 3, generator=seeded(1)) + 1
    W = torch.linalg.lstsq(f, x).solution
    return check(
        lambda: best_decoder(f, x),
        W,
        {
            "that is the features' covariance with the states; features "
            "that fire together need the inverse of fᵀ f": f.T @ x,
            "each feature by itself: they overlap, so they must be solved for together": (
                (f.T @ x) / f.pow(2).sum(0)[:, None]
            ),
            "that is the encoder's question: features from states": (
                torch.linalg.lstsq(x, f).solution
            ),
            "transposed: W is [F, d]": W.T,
            "rows need not have length 1 here": W / W.norm(dim=-1, keepdim=True),
        },
    )


def check_answer_07_5(answer):
    "Exercise 07.5."
    return check_choice(
        answer,
        "b",
        "yes: the scale's other end is a wreck; the loss in nats, or the "
        "ratio of perplexities, says what is left to do",
        why_not={
            "a": "compare what the table says of the perplexity with what it says is recovered",
            "c": (
                "loss is not variance: small errors in the wrong direction "
                "cost much, large ones in others nothing"
            ),
        },
    )


def check_threshold_gradient(threshold_gradient):
    "Exercise 07.6."
    pre = torch.rand(200, 4, generator=seeded(0))
    theta = torch.tensor([0.2, 0.4, 0.6, 0.97])
    width = 0.3
    near = ((pre - theta).abs() < width / 2).float()
    return check(
        lambda: threshold_gradient(pre, theta, width),
        -near.mean(0) / width,
        {
            "the sign: a higher threshold makes fewer features active": near.mean(0) / width,
            "divide by the width: a wide window catches more "
            "rows without being steeper": -near.mean(0),
            "width / 2 to either side, not width": (
                -((pre - theta).abs() < width).float().mean(0) / width
            ),
            "the mean over rows, not the sum": -near.sum(0) / width,
            "one number a feature": -near.mean() / width,
            "only rows above the threshold counted; those just below would become active": (
                -(near * (pre > theta)).mean(0) / width
            ),
        },
    )
