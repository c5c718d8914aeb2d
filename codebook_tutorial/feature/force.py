"""Codes written outright: forced everywhere, or taken from another text."""

import torch

from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.switching import check_rows, target_rows
from codebook_tutorial.model.run import evaluating


# %%
def _places(features, book, slots):
    "(group, slot, code) of each: the first k of a group, or the first alone."
    n_codes, places, seen = book.weight.shape[1], [], {}
    for feature in features:
        group, code = divmod(feature, n_codes)
        n = seen.get(group, 0)
        if n < (1 if slots == "all" else book.k):
            slot = {"all": slice(None), "first": n, "last": -1 - n}[slots]
            places.append((group, slot, code))
            seen[group] = n + 1
    return places


def force_codes(
    book: Codebook,
    features: list,  # per alternative, ids of codes; at most k in a group, one for slots="all"
    target,  # index of an alternative, or one per row
    *,
    slots: str = "last",  # codes replace a group's "last" (weakest) ones, its "first", or "all"
):
    "fn(ids): the same codes at every position, whatever was there (arXiv 2310.17230, section 4.3)."
    if slots not in ("last", "first", "all"):
        raise ValueError(f"force_codes: slots={slots!r}, expected 'last', 'first' or 'all'")
    target = target_rows(target, len(features))
    n = book.weight.shape[0] * book.weight.shape[1]
    if any(not 0 <= f < n for some in features for f in some):
        raise ValueError(f"force_codes: expected features from 0 to {n - 1}")
    places = [_places(some, book, slots) for some in features]

    def edit(ids):  # [batch, seq, groups, k]
        check_rows(target, len(ids))
        for t in target.unique().tolist():
            rows = (target == t).expand(len(ids)).nonzero()[:, 0].to(ids.device)
            for group, slot, code in places[t]:
                ids[rows, :, group, slot] = code
        return ids

    return edit


# %%
@torch.no_grad()
def token_codes(
    coded,  # a CodebookModel
    ids: list,  # a text's token ids
    at: int = -1,  # which token
) -> dict:
    "{site: [groups, k]}: the codes of one token of a text, at every site."
    if not -len(ids) <= at < len(ids):
        raise ValueError(f"token_codes: a text of {len(ids)} tokens has no token {at}")
    with evaluating(coded):
        coded(input_ids=torch.tensor([ids], device=coded.device), use_cache=False)
    return {site: found[0, at] for site, found in coded.ids.items()}


def _writes(new, first):
    def edit(ids):
        if not first:
            ids[:] = new
        elif ids.shape[1] > 1:  # the first call under `generate` holds the whole prompt
            ids[:, -1] = new
        return ids

    return edit


def write_codes(
    codes: dict,  # {site: [groups, k]}, of token_codes
    first: bool = False,  # only at the end of a prompt, not while the model continues
) -> dict:
    "{site: fn(ids)} for `edit_codes`: another token's codes in place of those at every position."
    return {site: _writes(new, first) for site, new in codes.items()}
