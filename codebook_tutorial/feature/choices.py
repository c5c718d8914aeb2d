"""Where a text chooses among alternatives: words that tell, and places before them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from codebook_tutorial.model.text import Text


# %%
def split_words(
    words: dict,  # {name: [token id, or (ids of a word's forms), ...]}; forms stay together
    share: float = 1 / 3,  # of each list goes to the first part
    seed: int = 0,
) -> tuple:
    "Two {name: [token ids]}: words to choose features by, and words to count success with."
    rng, first, second = np.random.default_rng(seed), {}, {}
    for name, some in words.items():
        forms = [w if isinstance(w, (tuple, list)) else (w,) for w in some]
        _check_forms(name, forms)
        cut = round(share * len(forms))
        if not 0 < cut < len(forms):
            raise ValueError(
                f"split_words: {share:.2f} of the {len(forms)} words of {name!r} leaves one part "
                "empty; expected more words, or another share"
            )
        order = rng.permutation(len(forms))
        for part, rows in ((first, order[:cut]), (second, order[cut:])):
            part[name] = [t for i in sorted(rows) for t in forms[i]]
    return first, second


def _check_forms(name, forms):
    every = [t for w in forms for t in w]
    if len(every) > len(set(every)):
        raise ValueError(
            f"split_words: {name!r} names the token {max(every, key=every.count)} twice; "
            "give all forms of a word as one tuple, each token once"
        )


# %%
@dataclass(eq=False)
class Choices:
    "Where the next word is one of several alternatives; each tensor is [rows, length]."

    names: list  # the alternatives
    next: torch.Tensor  # which of them the next word is, -1 none
    open: torch.Tensor  # bool: before a document's first word of any, where nothing is decided
    about: torch.Tensor  # what most chosen words of its document belong to, -1 nothing or a tie
    look: torch.Tensor  # bool: ordinary tokens, neither a held-out word nor before one


def _owner(ids, words):  # [..] ids -> [..] index of the list an id is in, -1 none
    top = max([int(ids.max()), *(max(w, default=0) for w in words.values())])
    table = torch.full((top + 1,), -1)
    for i, some in enumerate(words.values()):
        table[torch.as_tensor(some, dtype=torch.long)] = i
    return table[ids]


def _ahead(x):  # [rows, length]: what comes next
    return F.pad(x[:, 1:], (0, 1), value=-1)


def _majority(document, at, n):  # numbers of documents; index of a word's list, -1
    "What most words of each document belong to, -1 for none or a tie."
    votes = torch.zeros(int(document.max()) + 1, n, dtype=torch.long)
    where = (document[at >= 0], at[at >= 0])
    votes.index_put_(where, torch.ones(1, dtype=torch.long), accumulate=True)
    top = votes.topk(min(2, n), 1)
    clear = top.values[:, 0] > 0
    if n > 1:
        clear = clear & (top.values[:, 0] > top.values[:, 1])
    return torch.where(clear, top.indices[:, 0], -1)[document]


def _before_first(text, said):  # [rows, length] bool: a word of any list
    "Positions at which their document has not said any; a row may continue a document."
    said = said.flatten().long().cumsum(0)
    starts = text.ids.flatten() == text.bos
    before = torch.where(starts, said, 0).cummax(0).values  # what other documents have said
    return (said == before).view_as(text.ids)


def find_choices(
    text: Text,
    words: dict,  # {name: [token ids]}: the alternatives
    hidden: dict | None = None,  # words that features must not be chosen by
    *,
    undecided=None,  # [rows, length] bool; None: before a document's first word of any alternative
) -> Choices:
    "The places of a text where the next word belongs to one of the alternatives."
    hidden = hidden or {"": []}
    _check_lists(words, hidden)
    at, held = _owner(text.ids, words), _owner(text.ids, hidden)
    document = torch.cumsum((text.ids == text.bos).flatten(), 0).view_as(text.ids)
    next = _ahead(at)
    if undecided is None:
        undecided = (next >= 0) & _before_first(text, (at >= 0) | (held >= 0))
    return Choices(
        names=list(words),
        next=next,
        open=undecided & text.mask,
        about=_majority(document, at, len(words)),
        look=text.mask & (held < 0) & (_ahead(held) < 0),
    )


def _check_lists(words, hidden):
    if empty := [name for name, some in words.items() if not len(some)]:
        raise ValueError(f"find_choices: no words for {', '.join(map(repr, empty))}")
    lists = [*words.values(), *hidden.values()]
    every = [t for some in lists for t in set(some)]
    if len(every) > len(set(every)):
        raise ValueError(
            f"find_choices: token {max(every, key=every.count)} stands in two lists; "
            "expected each word in one, of words or hidden"
        )
