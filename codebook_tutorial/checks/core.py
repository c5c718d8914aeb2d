__all__ = ["Verdict", "check", "check_choice", "tensor", "same", "brief"]

import torch


class Verdict:
    "What a check found: true if passed, with a message."

    def __init__(self, passed, message):
        self.passed = passed
        self.message = message

    def __bool__(self):
        return self.passed

    def __repr__(self):
        return ("✅ " if self.passed else "❌ ") + self.message


def check(
    attempt,  # calls the learner's function and returns its answer
    right,  # the right answer: a tensor, number, string, ...
    mistakes: dict | None = None,  # message -> the answer that this mistake gives
    *,
    praise: str = "right",
    tol: float = 1e-4,
) -> Verdict:
    "Compare an attempt with the right answer; name the mistake when it is a known one."
    try:
        got = attempt()
    except Exception as e:
        return Verdict(False, f"your code stopped with {type(e).__name__}: {e}")
    if got is None or got is ...:
        return Verdict(False, "nothing came back yet: write your code, and return the result")
    if not isinstance(right, (str, bool)) and tensor(got) is None:
        return Verdict(False, f"expected {brief(right)}, got a {type(got).__name__}")
    if same(got, right, tol):
        return Verdict(True, praise)
    for message, wrong in (mistakes or {}).items():
        if same(got, wrong, tol):
            return Verdict(False, message)
    if torch.is_tensor(right) and (shape := list(tensor(got).shape)) != list(right.shape):
        return Verdict(False, f"expected shape {list(right.shape)}, got {shape}")
    return Verdict(False, f"not this: expected {brief(right)}, got {brief(got)}")


def check_choice(
    answer,  # returns the letter that the learner chose
    right: str,
    praise: str,
    *,
    why_not: dict,  # wrong letter -> the reason against it
) -> Verdict:
    "Compare a chosen letter; a wrong one is answered with the reason against it."
    try:
        got = answer()
    except Exception as e:
        return Verdict(False, f"your code stopped with {type(e).__name__}: {e}")
    if got is None or got is ...:
        return Verdict(False, "nothing chosen yet: return one of the letters")
    if got == right:
        return Verdict(True, praise)
    letters = ", ".join(sorted([right, *why_not]))
    return Verdict(False, why_not.get(str(got), f"choose one of {letters}, not {got!r}"))


def tensor(v):
    "v as a tensor of doubles; None if it is nothing of the kind."
    try:
        return torch.as_tensor(v).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return None


def same(
    got,
    right,
    tol: float = 1e-4,  # absolute and relative
) -> bool:
    "Equal strings, or numbers and tensors equal within tol."
    if isinstance(right, (str, bool)) or isinstance(got, str):
        return got == right
    got, right = tensor(got), tensor(right)
    if got is None:
        return False
    close = dict(atol=tol, rtol=tol, equal_nan=True)
    return got.shape == right.shape and torch.allclose(got, right, **close)


def brief(v) -> str:
    "A value in few characters."
    if torch.is_tensor(v) and v.numel() > 6:
        first = [round(float(x), 3) for x in v.flatten()[:4]]
        return f"a tensor {list(v.shape)} starting {first}"
    return str(v.tolist() if torch.is_tensor(v) else v)[:80]
