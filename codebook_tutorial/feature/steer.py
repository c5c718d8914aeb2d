"""Switches that steer by features."""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from codebook_tutorial.dictionary.base import Feature, Lens
from codebook_tutorial.feature.choices import Choices
from codebook_tutorial.feature.detect import precision_coverage
from codebook_tutorial.model.run import passes
from codebook_tutorial.model.text import Text


# %% [markdown]
# What is active at the places where a text chooses.
# %%
@torch.no_grad()
def active_features(
    model,
    dictionaries: dict,  # {site: Dictionary}
    text: Text,
    *,
    look,  # [rows, length] bool: where
    batch: int = 32,  # rows per pass
) -> dict:
    """{site: (places [e], features [e], values [e])}: what is active where.

    Places are numbered in the order of look.nonzero(); a code that was chosen has the value 1.
    """
    lenses = {site: Lens(model, site, d) for site, d in dictionaries.items()}
    found, n = {site: [] for site in lenses}, 0
    run = passes(model, text, list(lenses), batch=batch, call="active_features", bar="features")
    for rows, _, acts in run:
        here = look[rows]
        for site, lens in lenses.items():
            x = acts[site]
            ids, values = lens.sparse(x, here.to(x.device))
            on = values > 0
            entries = (on.nonzero()[:, 0] + n, ids[on], values[on].float())
            found[site].append([t.cpu() for t in entries])
        n += int(here.sum())
    return {site: [torch.cat(part) for part in zip(*parts)] for site, parts in found.items()}


# %%
def _about(active, n_feats, *, document, about, t):
    "Precision (by tokens) and coverage (by documents) of features for alternative t, each [F]."
    places, features, _ = active
    fired = features.bincount(minlength=n_feats).clamp(min=1)
    precision = features[about[places] == t].bincount(minlength=n_feats) / fired
    pairs = torch.unique(document[places] * n_feats + features)
    of_document = torch.full((int(document.max()) + 1,), -1).scatter_(0, document, about)
    met = (pairs % n_feats)[of_document[pairs // n_feats] == t].bincount(minlength=n_feats)
    return precision, met / max(document[about == t].unique().numel(), 1)


def topic_features(
    model,
    dictionaries: dict,  # {site: Dictionary}
    text: Text,
    *,
    choices: Choices,
    n: int = 8,
) -> dict:
    """For every alternative the n features, at any site, that tell documents about it from others.

    {name: [{feature: Feature, precision (by tokens), coverage (share of its documents)}]}, the
    largest product first.
    """
    look = choices.look
    active = active_features(model, dictionaries, text, look=look)
    document = torch.cumsum((text.ids == text.bos).flatten(), 0).view_as(text.ids)[look]
    found = {name: [] for name in choices.names}
    for site, some in active.items():
        n_feats = len(dictionaries[site].directions)
        for t, name in enumerate(choices.names):
            p, c = _about(some, n_feats, document=document, about=choices.about[look], t=t)
            for i in (p * c).topk(min(n, n_feats)).indices.tolist():
                row = dict(precision=p[i].item(), coverage=c[i].item())
                found[name].append(dict(feature=Feature(site, i), **row))
    for some in found.values():
        some.sort(key=lambda r: -r["precision"] * r["coverage"])
        del some[n:]
    return found


# %% [markdown]
# A switch: which features speak for whom, which say that nothing is decided, and what to write.
# %%
class NoSwitch(ValueError):
    "No feature speaks for some alternative."


@dataclass(eq=False)
class Switch:
    "Features that choose among alternatives at one site; how they are written, the lens knows."

    lens: Lens
    names: list  # the n alternatives
    owner: torch.Tensor  # [F] whom a feature speaks for, -1 nobody
    threshold: torch.Tensor  # [F] above which it does
    gates: torch.Tensor  # [F] bool: it fires where nothing is decided
    gate_threshold: torch.Tensor  # [F] above which it does
    write: torch.Tensor  # [n, F] what is written for each alternative
    neutral: torch.Tensor  # [F] what is written where one is taken away
    coverage: torch.Tensor  # [parts, n] share of its words before which a feature of its own fires

    def fn(
        self,
        target,  # index of an alternative, or one per row
        **kw,  # start, swap, write; strength of vectors, groups of codes
    ):
        "fn for `lens.editing`: where the switch fires, features of others become the target's."
        return self.lens.turn(self, target, **kw)

    def off(self, target):  # index of an alternative, or one per row
        "fn for `lens.editing`: the target's own features are taken out wherever they speak."
        return self.lens.turn_off(self, target)

    def fires(self, x, target, **kw):  # states [batch, seq, d]
        "Where another alternative speaks (swap), or nothing is decided (start) [batch, seq] bool."
        return self.lens.fires(self, x, target, **kw)


# %%
def find_switches(
    model,  # a model with dictionaries, or a CodebookModel with its own books
    dictionaries: dict,  # {site: Dictionary}
    text: Text,
    *,
    choices: Choices,
    precision: float = 0.3,  # a feature speaks where it is right at least so often
    at_least: int = 4,  # and so many times
) -> dict:
    "{site: Switch}: features that fire before an alternative's words and seldom elsewhere."
    look, n = choices.look, len(choices.names)
    next = choices.next[look]
    marks = torch.cat([next[:, None] == torch.arange(n), choices.open[look][:, None]], 1)
    counts = marks.sum(0)
    if missing := [name for name, count in zip(choices.names, counts) if count < at_least]:
        raise ValueError(
            f"find_switches: fewer than {at_least} places before words of "
            f"{', '.join(map(repr, missing))}; give more text or more words"
        )
    switches = {}
    for site, active in active_features(model, dictionaries, text, look=look).items():
        lens = Lens(model, site, dictionaries[site])
        n_feats = len(dictionaries[site].directions)
        s = precision_coverage(*active, marks=marks, n_feats=n_feats)
        sure = (s["precision"] >= precision) & (s["coverage"] * counts > at_least - 0.5)
        switches[site] = _switch(lens, choices.names, s, sure=sure, active=active, next=next)
    written = torch.stack([(s.write > 0).any(1).cpu() for s in switches.values()]).any(0)
    if mute := [name for name, some in zip(choices.names, written) if not some]:
        raise NoSwitch(
            f"find_switches: no feature at {', '.join(switches)} speaks for "
            f"{', '.join(map(repr, mute))}; give more text, other sites, or a lower precision"
        )
    return switches


def _switch(lens, names, s, *, sure, active, next):
    "s: precision, coverage, threshold, each [F, n + 1]; the last column is for open places."
    n, (places, features, values) = len(names), active
    score = s["precision"] * s["coverage"]
    best = torch.where(sure[:, :n], s["precision"][:, :n], 0.0).max(1)
    owner = lens.speakers(torch.where(best.values > 0, best.indices, -1), score[:, :n])
    asked = torch.stack([(next == t).sum() for t in range(n)])[:, None]
    here = next[places] >= 0
    total = torch.zeros(n * len(owner))
    total.index_add_(0, (next[places] * len(owner) + features)[here], values[here])
    gates, coverage = sure[:, n], s["coverage"][:, n]
    found = dict(
        owner=owner,
        threshold=s["threshold"].gather(1, owner.clamp(min=0)[:, None])[:, 0],
        gates=gates,
        gate_threshold=s["threshold"][:, n],
        write=lens.written(owner, score[:, :n], total.view(n, -1) / asked),
        neutral=lens.neutral(gates, coverage),
        coverage=_covered(owner, active, next, n=n, parts=lens.parts) / asked.T,
    )
    device = lens.dictionary.directions.device
    return Switch(lens, names, **{key: t.to(device) for key, t in found.items()})


def _covered(owner, active, next, *, n, parts):
    "Before how many of each alternative's words one of its own features of each part fires."
    places, features, _ = active
    right = (owner[features] == next[places]) & (next[places] >= 0)
    part = features[right] // (len(owner) // parts)
    met = torch.stack([part, next[places[right]], places[right]])
    met = torch.unique(met, dim=1)  # several codes of a group may be right at one place
    counts = torch.zeros(parts, n)
    return counts.index_put_((met[0], met[1]), torch.ones(met.shape[1]), accumulate=True)


# %%
@contextmanager
def steer(
    model,
    switches: dict,  # {site: Switch}
    target,  # index of an alternative, or one per row
    **kw,  # as in Switch.fn
):
    "While the block runs, every switch points to the target; works under `generate`."
    if not switches:
        raise ValueError("steer: no switch came; expected {site: switch} from find_switches")
    with ExitStack() as stack:
        for site, switch in switches.items():
            lens = Lens(model, site, switch.lens.dictionary)
            if lens.graded != switch.lens.graded:
                raise ValueError(
                    "steer: switches of a model's own codes need the CodebookModel they were "
                    f"found in, got {type(model).__name__}"
                )
            stack.enter_context(lens.turned(switch, target, **kw))
        yield


def add_vector(v):  # [d], or [batch, d], one per row
    "fn(x): x + v at every position, the control that everybody uses."
    return lambda x: x + (v if v.dim() == 1 else v[:, None]).to(x)


# %%
@torch.no_grad()
def mean_difference(
    model,
    site: str,
    text: Text,
    *,
    choices: Choices,
    at: str = "next",  # states before an alternative's words; "about": all of documents about it
    batch: int = 32,  # rows per pass
) -> torch.Tensor:
    "For every alternative [n, d], the mean of its states less the mean over alternatives."
    if at not in ("next", "about"):
        raise ValueError(f"mean_difference: at={at!r}, expected 'next' or 'about'")
    label = torch.where(choices.look, getattr(choices, at), -1)
    n, total, count = len(choices.names), 0.0, 0.0
    for rows, _, acts in passes(model, text, [site], batch=batch, call="mean_difference"):
        x = acts[site].flatten(0, 1).float()
        own = F.one_hot(label[rows].flatten().to(x.device) + 1, n + 1)[:, 1:].float()
        total, count = total + own.T @ x, count + own.sum(0)
    if (count == 0).any():
        names = ", ".join(name for name, c in zip(choices.names, count) if not c)
        raise ValueError(f"mean_difference: no state of {names}; give more text")
    mean = total / count[:, None]
    return mean - mean.mean(0)
