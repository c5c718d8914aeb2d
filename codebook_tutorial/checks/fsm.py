__all__ = [
    "check_share_legal",
    "check_first_digit_loss",
    "check_f1_score",
    "check_state_mass",
    "check_answer_01_5",
    "check_bigram_mass",
    "check_on_and_off",
    "check_answer_01_8",
]

import math

import torch

from codebook_tutorial.core import seeded
from codebook_tutorial.world.fsm import TokFSM, drop_first_digit, legal_steps

from .core import check, check_choice


def check_share_legal(share_legal):
    "Exercise 01.1."
    fsm = TokFSM()
    states = fsm.walk(20, 9, seeded(0))
    states[::2] = torch.randint(100, (10, 9), generator=seeded(1))
    hit = fsm.legal[states[:, :-1], states[:, 1:]]
    return check(
        lambda: share_legal(states.clone(), fsm),
        hit.mean(),
        {
            "you went backwards: legal[from, to]": fsm.legal[states[:, 1:], states[:, :-1]].mean(),
            "you counted; the share is the mean": hit.sum(),
            "you took every second step; all of them count": hit[:, ::2].mean(),
            "a walk of n states has n - 1 steps": hit.sum() / states.numel(),
        },
    )


def check_first_digit_loss(first_digit_loss):
    "Exercise 01.2."
    fsm, state = TokFSM(), 17

    def entropy(x):
        p = torch.bincount(x, minlength=10) / fsm.n_edges
        return -torch.special.xlogy(p, p).sum()

    tens, ones = fsm.successors[state] // 10, fsm.successors[state] % 10
    return check(
        lambda: first_digit_loss(fsm, state),
        entropy(tens),
        {
            "that is in bits; the course counts nats": entropy(tens) / math.log(2),
            "you took the second digit (% 10); the first is // 10": entropy(ones),
            "that is the whole step, ln 10; exits with the same "
            "first digit belong together": torch.tensor(math.log(10.0)),
            "the sign: an entropy is positive": -entropy(tens),
        },
    )


def check_f1_score(f1_score):
    "Exercise 01.3."
    fires, truth = (torch.rand(200, generator=seeded(s)) < p for s, p in ((0, 0.4), (1, 0.2)))
    truth = truth | (fires & (torch.rand(200, generator=seeded(2)) < 0.5))
    hits, n, m = (fires & truth).sum(), fires.sum(), truth.sum()
    return check(
        lambda: f1_score(fires, truth),
        2 * hits / (n + m),
        {
            "that is the precision alone": hits / n,
            "that is the recall alone": hits / m,
            "that is the plain mean of the two; F1 is the harmonic one": (hits / n + hits / m) / 2,
            "that is intersection over union; F1 counts hits twice": hits / (n + m - hits),
            "that is the accuracy": (fires == truth).float().mean(),
        },
    )


def check_state_mass(state_mass):
    "Exercise 01.4."
    first = torch.randn(10, generator=seeded(0)).softmax(-1)
    second = torch.randn(10, 10, generator=seeded(1)).softmax(-1)
    legal = TokFSM().legal[17]
    joint = first[:, None] * second
    exchanged = (joint.T.flatten() * legal).sum()
    wrong_pairs = ((first[None] * second).flatten() * legal).sum()
    return check(
        lambda: state_mass(first, second, legal),
        (joint.flatten() * legal).sum(),
        {
            "rows and columns are exchanged: the first digit is the row": exchanged,
            "you left out P(first digit)": (second.flatten() * legal).sum(),
            "first[None] pairs P(first) with the second digit: first[:, None]": wrong_pairs,
            "that is the mean over the 100 states; a mass is a sum": (
                (joint.flatten() * legal).mean()
            ),
        },
    )


def check_answer_01_5(answer):
    "Exercise 01.5."
    return check_choice(
        answer,
        "a",
        "yes: the best of many lucky detectors is only lucky where it was chosen",
        why_not={
            "b": "the walks are drawn alike; states occur as often in both halves",
            "c": "the walks are drawn alike, and so are the activations",
        },
    )


def check_bigram_mass(bigram_mass):
    "Exercise 01.6."
    fsm = TokFSM()
    legal = fsm.legal.view(10, 10, 100)
    step = legal / fsm.n_edges

    def mass(guess):
        return (legal * guess).sum(-1).mean()

    return check(
        lambda: bigram_mass(fsm),
        mass(step.mean(0)),
        {
            "you kept the first digit and forgot the second: average over the first axis": mass(
                step.mean(1, keepdim=True)
            ),
            "that guesser knows nothing at all; keep the second digit": mass(step.mean((0, 1))),
            "that guesser knows the state": mass(step),
            "legal holds ones; divide by n_edges to get probabilities": mass(legal.mean(0)),
        },
    )


def check_on_and_off(on_and_off):
    "Exercise 01.7."
    fsm = TokFSM()
    ids = fsm.sample(20, 34, seeded(3))
    ids[:8] = torch.cat([ids[:8, :1], ids[:8, 2:], ids[:8, 1:2]], 1)
    on, off = legal_steps(ids, fsm).mean(), legal_steps(drop_first_digit(ids), fsm).mean()
    return check(
        lambda: on_and_off(ids.clone(), fsm),
        torch.stack([on, off]),
        {
            "the two are exchanged: as written first": torch.stack([off, on]),
            "what is not legal as written need not be legal "
            "one digit late: read it so": torch.stack([on, 1 - on]),
            "you read both as written": torch.stack([on, on]),
            "you read both one digit late": torch.stack([off, off]),
        },
    )


def check_answer_01_8(answer):
    "Exercise 01.8."
    return check_choice(
        answer,
        "a",
        "yes: more things known than coordinates to keep them apart",
        why_not={
            "b": (
                "there are more hidden neurons than states: room for all, "
                "so that alone shows no lack of room"
            ),
            "c": "switching off a random direction damages several states as well",
        },
    )
