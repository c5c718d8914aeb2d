"""How a switch rewrites what stands at a site: features as vectors, and codes."""

import torch


# %%
def target_rows(target, n: int) -> torch.Tensor:
    "An index, or one per row, as [1] or [batch] on the CPU."
    target = torch.as_tensor(target).reshape(-1).cpu()
    if not len(target):
        raise ValueError("steering: expected a target, or one per row, got none")
    low, high = int(target.min()), int(target.max())
    if not 0 <= low <= high < n:
        raise ValueError(f"steering: expected targets from 0 to {n - 1}, got {low} to {high}")
    return target


def check_rows(target, batch: int):
    "ValueError unless there is one target, or one per row."
    if len(target) not in (1, batch):
        raise ValueError(
            f"steering: expected one target, or one per row, "
            f"got {len(target)} targets for a batch of {batch}"
        )


# %% [markdown]
# Features as vectors: a switch fires where another alternative speaks, or where nothing is decided.
# %%
class VectorSwitching:
    "What a `Switch` (feature.steer) asks of a lens; `switch` has features per number [F]."

    graded = True  # can features be written more or less strongly?
    parts = 1  # of the state, each with features of its own

    def speakers(self, owner, score):  # [F] -1 for nobody, [F, n] precision x coverage
        "An alternative whose features are never right often enough speaks by its best one."
        owner = owner.clone()
        for t in range(score.shape[1]):
            best = torch.where(owner < 0, score[:, t], -1.0).argmax()
            if not (owner == t).any() and score[best, t] > 0:
                owner[best] = t
        return owner

    def written(self, owner, score, usual):  # [F], [F, n], [n, F] mean before its words
        "What to write for each alternative [n, F]: its own features, as strong as usual."
        return usual * (owner == torch.arange(len(usual))[:, None])

    def neutral(self, gates, score):  # [F] bool, [F] coverage
        "What to write where an alternative is taken away [F]: nothing."
        return torch.zeros(len(gates))

    def _fires(self, switch, f, target, *, start: bool = True, swap: bool = True):
        own = switch.owner >= 0
        others = switch.owner[own] != target[:, None, None].to(f.device)
        speaks = (f[..., own] > switch.threshold[own]) & others
        open = f[..., switch.gates] > switch.gate_threshold[switch.gates]
        return (speaks.any(-1) & swap) | (open.any(-1) & start)

    def fires(self, switch, x, target, **kw):  # [batch, seq, d], index of an alternative
        "Where another alternative speaks (swap), or nothing is decided (start) [batch, seq]."
        return self._fires(switch, self.seen(x), target_rows(target, len(switch.names)), **kw)

    def turn(self, switch, target, *, strength: float = 2.0, write=None, **kw):
        "x -> x': where it fires, others' features go and the target's are raised (write [n, F])."
        own, target = switch.owner >= 0, target_rows(target, len(switch.names))
        write = switch.write if write is None else write
        rows = target.to(own.device)
        mine = switch.owner[own] == rows[:, None, None]
        wanted = strength * write[rows][:, None, own]
        directions = self.dictionary.directions.detach()[own]

        def edit(x):
            check_rows(target, len(x))
            f = self.seen(x)
            at = self._fires(switch, f, target, **kw)
            f = f[..., own]
            change = (torch.where(mine, torch.maximum(f, wanted), 0.0) - f) @ directions
            return torch.where(at[..., None], x + change, x)

        return edit

    def turn_off(self, switch, target):
        "x -> x': the target's own features are taken out wherever they speak."
        own, target = switch.owner >= 0, target_rows(target, len(switch.names))
        mine = switch.owner[own] == target[:, None, None].to(own.device)
        directions = self.dictionary.directions.detach()[own]

        def edit(x):
            check_rows(target, len(x))
            f = self.seen(x)[..., own]
            return x - (f * ((f > switch.threshold[own]) & mine)) @ directions

        return edit

    def turned(self, switch, target, **kw):
        "Context: while the block runs, the switch points to the target."
        return self.editing(self.turn(switch, target, **kw))


# %% [markdown]
# Codes: an edit is a table from codes to codes; of k codes in a group, each goes through it.
# %%
class CodeSwitching:
    "The same for a codebook, where a group is a part."

    @property
    def parts(self):
        return self.dictionary.weight.shape[0]

    @property
    def graded(self):
        "The model's own codes are written or not; other codes are added to the state."
        return not self.own

    def _grouped(self, t):  # [F, ..] -> [groups, n_codes, ..]
        return t.unflatten(0, (self.parts, -1))

    def codes(self, write):  # [n, F] -> [groups, n], -1 for none
        "The code that each group has for each alternative."
        best = write.T.unflatten(0, (self.parts, -1)).max(1)
        return torch.where(best.values > 0, best.indices, -1)

    def one_each(self, codes):  # [groups, n], -1 for none -> [n, F]
        "1 at a code of each group."
        n_codes = self.dictionary.weight.shape[1]
        hot = codes[..., None] == torch.arange(n_codes, device=codes.device)
        return hot.float().transpose(0, 1).flatten(1)

    def speakers(self, owner, score):
        return owner

    def written(self, owner, score, usual):
        own = owner[:, None] == torch.arange(score.shape[1])
        return self.one_each(self.codes(torch.where(own, score, 0.0).T))

    def neutral(self, gates, score):
        return self.one_each(self.codes(torch.where(gates, score, 0.0)[None]))[0]

    def _through(self, tables):  # [T, groups, n_codes], T 1 or batch
        def edit(ids):  # [batch, seq, groups, k]
            check_rows(tables, len(ids))
            flat = ids.transpose(1, 2).flatten(2)
            new = tables.to(ids.device).expand(len(ids), -1, -1).gather(2, flat)
            return new.unflatten(2, (ids.shape[1], ids.shape[3])).transpose(1, 2)

        return edit

    def _table(self, change, new):  # [T, F] bool, [groups, T] -1 for none
        change = change.unflatten(1, (self.parts, -1)).cpu()
        new = new.T[..., None].cpu()
        same = torch.arange(change.shape[-1])
        return self._through(torch.where(change & (new >= 0), new, same))

    def turn(self, switch, target, *, write=None, start=True, swap=True, groups=None):
        """ids -> ids: codes of others (swap) and of open places (start) become the target's.

        write [n, F] may say other codes; groups: only there."""
        target = target_rows(target, len(switch.names))
        others = (switch.owner >= 0) & (switch.owner != target.to(switch.owner.device)[:, None])
        new = self.codes(switch.write if write is None else write)[:, target]
        if groups is not None:
            keep = torch.tensor([g in groups for g in range(self.parts)], device=new.device)
            new = torch.where(keep[:, None], new, -1)
        return self._table((others & swap) | (switch.gates & start), new)

    def turn_off(self, switch, target):
        "ids -> ids: the target's codes become the code of open places."
        target = target_rows(target, len(switch.names))
        mine = switch.owner == target.to(switch.owner.device)[:, None]
        new = self.codes(switch.neutral[None]).expand(-1, len(target))
        return self._table(mine, new)

    def turned(self, switch, target, *, strength: float | None = None, **kw):
        fn = self.turn(switch, target, **kw)
        if strength is None:
            return self.editing(fn)
        if self.own:
            raise ValueError(
                "steer: the model's own codes are written or not; expected no strength, "
                f"got {strength}"
            )
        return self.editing(self.shift(fn, strength))
