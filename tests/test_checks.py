"""Every exercise: its solution passes, its stub fails, another right answer passes,
plausible wrong answers fail, and at least one is told by name."""

import ast
import functools
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from codebook_tutorial.core import jsd  # noqa: E402
from codebook_tutorial.dictionary.base import random_directions  # noqa: E402
from workshop import books, learner  # noqa: E402


def raw(v):
    return lambda *a: v


def cdist_ids(x, codes, k):
    return torch.cdist(x, codes).topk(k, largest=False).indices


def f1_by_parts(fires, truth):
    p, r = (fires & truth).sum() / fires.sum(), (fires & truth).sum() / truth.sum()
    return 2 * p * r / (p + r)


def entropy(p):
    return -(p[p > 0] * p[p > 0].log()).sum()


def tens(fsm, s):
    return torch.bincount(fsm.successors[s] // 10, minlength=10) / 10


def f1_held_out(v, truth, choose=slice(40)):
    "Threshold by a sweep over the sorted values of some tokens, scored on the second half."
    chosen = v[choose].sort(descending=True)
    hits = truth[choose][chosen.indices].cumsum(0)
    score = 2 * hits / (torch.arange(1, len(hits) + 1) + hits[-1])
    fires = v[40:] >= chosen.values[score.argmax()]
    return 2 * (fires & truth[40:]).sum() / (fires.sum() + truth[40:].sum())


def words_after(fragments, before, better=lambda a, b: a > b):
    pairs = [
        (w, a, i > 0 and tokens[i - 1] == before)
        for tokens, acts in fragments
        for i, (w, a) in enumerate(zip(tokens, acts))
    ]

    def mean(w, there):
        return (
            sum(some) / len(some)
            if (some := [a for v, a, at in pairs if v == w and at == there])
            else 0.0
        )

    return [
        w for w in sorted({w for w, _, at in pairs if at}) if better(mean(w, True), mean(w, False))
    ]


def _acdc_right(kl_of, features, threshold):
    left = set(features)
    for f in features:
        if kl_of(left - {f}) - kl_of(left) < threshold:
            left = left - {f}
    return [f for f in features if f in left]


def _acdc_stale(kl_of, features, threshold):
    return [f for f in features if kl_of(set(features) - {f}) - kl_of(set(features)) >= threshold]


def _acdc_size(kl_of, features, threshold):
    left = set(features)
    for f in features:
        if abs(kl_of(left - {f}) - kl_of(left)) < threshold:
            left = left - {f}
    return [f for f in features if f in left]


def _months(a, b):
    text = "It was {}, and the rain fell all day long. It was still"
    return [text.format(m) for m in a], [text.format(m) for m in b], list(a), list(b)


def _next_by_hand(z, y, chosen):
    q, _ = torch.linalg.qr(z[:, chosen])
    size = ((y - q @ (q.T @ y)) @ z).abs()
    return max((j for j in range(z.shape[1]) if j not in chosen), key=lambda j: size[j])


def _renamed_by_hand(ids, girls, boys):
    other = {int(a): int(b) for some in (girls, boys) for a, b in zip(some, some.roll(1))}
    return ids.clone().apply_(lambda i: other.get(i, i))


def _batchtopk(x, n, k):
    from codebook_tutorial.dictionary.train import train_sae

    return train_sae(x, n, "batchtopk", k=k, steps=400, batch=512)


def _sparse_random(n, d, k):
    from codebook_tutorial.dictionary.baselines import Affine

    return Affine(random_directions(n, d, seed=9).directions, k=k)


def _attention_share(model, ids, layer, *, a="attn", b="mlp", mean=None):
    from codebook_tutorial.model.sites import capture

    with torch.no_grad(), capture(model, [f"{kind}.{layer}" for kind in ("attn", "mlp")]) as acts:
        model(input_ids=ids)
    a, b = (acts[f"{kind}.{layer}"].pow(2).sum(-1).sqrt() for kind in (a, b))
    return a.mean() / (a + b).mean() if mean else 1 - (b / (a + b)).mean()


def _on_and_off(ids, fsm, off=True):
    def legal(ids):
        pairs = ids[:, 1 : 1 + (ids.shape[1] - 1) // 2 * 2].view(len(ids), -1, 2)
        states = torch.where((pairs < 10).all(-1), pairs[..., 0] * 10 + pairs[..., 1], 0)
        return fsm.legal[states[:, :-1], states[:, 1:]].mean()

    return torch.stack([legal(ids), legal(torch.cat([ids[:, :1], ids[:, 2:]], 1))])


def _write_at(new, at):
    def fn(ids):
        here = torch.arange(ids.shape[1])[None] == at[:, None]
        return torch.where(here[..., None, None], new[:, None], ids)

    return fn


def _by_code(ids, n):
    places = [(ids == c).nonzero()[:, 0] for c in range(n)]
    return torch.cat(places), torch.tensor([0] + [len(p) for p in places]).cumsum(0)


# exercise: (another right answer, [wrong answers], words that a named mistake's message must hold)
CASES = {
    "zero_last": (
        lambda x: torch.cat([x[:, :-1], x[:, -1:] * 0], 1),
        [
            lambda x: x * 0,
            lambda x: torch.cat([x[:, :1] * 0, x[:, 1:]], 1),
            lambda x: x[:, :-1],
            lambda x: x.__setitem__((slice(None), -1), 0) or x,
        ],
        "every position",
    ),
    "keep_head": (
        lambda x, h, n: x * (torch.arange(x.shape[-1]) // (x.shape[-1] // n) == h),
        [
            lambda x, h, n: x * (torch.arange(x.shape[-1]) % n == h),
            lambda x, h, n: x * (torch.arange(x.shape[-1]) // (x.shape[-1] // n) != h),
            lambda x, h, n: x.unflatten(-1, (n, -1))[..., h, :],
        ],
        "interleaved",
    ),
    "moved_share": (
        lambda p, a, b: (jsd(a, b).mean() - jsd(p, b).mean()) / jsd(a, b).mean(),
        [
            lambda p, a, b: jsd(p, b).mean() / jsd(a, b).mean(),
            lambda p, a, b: (1 - jsd(p, b) / jsd(a, b)).mean(),
            lambda p, a, b: 1 - jsd(p, a).mean() / jsd(a, b).mean(),
        ],
        "left",
    ),
    "answer_00_4": (raw("b"), [raw("a"), raw("c"), raw("z")], "untrained"),
    "adder": (
        lambda v, s: lambda x: x + s * F.normalize(v, dim=0) * x.norm(dim=-1)[..., None],
        [
            lambda v, s: lambda x: x + s * v,
            lambda v, s: lambda x: x + s * v / v.norm(),
            lambda v, s: lambda x: x + s * x.norm(dim=-1, keepdim=True) * v,
        ],
        "scale times v",
    ),
    "attention_share": (
        _attention_share,
        [
            lambda m, i, l: 1 - _attention_share(m, i, l),
            lambda m, i, l: _attention_share(m, i, 0),
            lambda m, i, l: _attention_share(m, i, l, mean=True),
        ],
        "MLP's share",
    ),
    "on_and_off": (
        _on_and_off,
        [
            lambda i, f: _on_and_off(i, f).flip(0),
            lambda i, f: _on_and_off(i, f)[[0, 0]],
            lambda i, f: _on_and_off(i, f)[[1, 1]],
        ],
        "exchanged",
    ),
    "answer_01_8": (raw("a"), [raw("b"), raw("c"), raw("z")], "more hidden neurons"),
    "rewrite": (
        lambda old, new: lambda ids: ids * (ids != old) + new * (ids == old),
        [
            lambda o, n: lambda ids: torch.full_like(ids, n),
            lambda o, n: lambda ids: ids,
            lambda o, n: lambda ids: torch.where(ids == o, ids, n),
        ],
        "everywhere",
    ),
    "answer_03_7": (raw("a"), [raw("b"), raw("c"), raw("z")], "true walks"),
    "holds_from": (
        lambda t: t.int().cummax(0).values.bool(),
        [
            lambda t: t,
            lambda t: t.cumsum(0) == 0,
            lambda t: t.cumsum(0) > 1,
            lambda t: torch.ones_like(t),
        ],
        "only where it is told",
    ),
    "copy_at": (
        lambda s, at: lambda x: x + (s - x) * at.float()[:, None],
        [
            lambda s, at: lambda x: s,
            lambda s, at: lambda x: x,
            lambda s, at: lambda x: x + s * at[:, None],
        ],
        "added",
    ),
    "write_at": (
        _write_at,
        [
            lambda n, at: lambda ids: ids,
            lambda n, at: lambda ids: torch.full_like(ids, 77),
            lambda n, at: lambda ids: torch.cat([ids[:, :-1], n[:, None]], 1),
        ],
        "last position",
    ),
    "by_code": (
        _by_code,
        [
            lambda i, n: (i.argsort(stable=True), torch.bincount(i, minlength=n)),
            lambda i, n: (_by_code(i, n)[0], _by_code(i, n)[1][1:]),
            lambda i, n: (i.sort().values, _by_code(i, n)[1]),
        ],
        "counts",
    ),
    "share_legal": (
        lambda s, fsm: (
            sum(fsm.legal[a, b] for row in s.tolist() for a, b in zip(row, row[1:]))
            / s[:, 1:].numel()
        ),
        [
            lambda s, fsm: fsm.legal[s[:, 1:], s[:, :-1]].mean(),
            lambda s, fsm: fsm.legal[s[:, :-1], s[:, 1:]].sum(),
            lambda s, fsm: fsm.legal[s[:, :-1:2], s[:, 1::2]].mean(),
        ],
        "backwards",
    ),
    "first_digit_loss": (
        lambda fsm, s: entropy(tens(fsm, s)),
        [
            lambda fsm, s: entropy(tens(fsm, s)) / torch.tensor(2.0).log(),
            lambda fsm, s: torch.tensor(10.0).log(),
            lambda fsm, s: entropy(torch.bincount(fsm.successors[s] % 10, minlength=10) / 10),
        ],
        "bits",
    ),
    "f1_score": (
        f1_by_parts,
        [
            lambda f, t: (f & t).sum() / f.sum(),
            lambda f, t: (f == t).float().mean(),
            lambda f, t: (f & t).sum() / (f | t).sum(),
        ],
        "precision alone",
    ),
    "state_mass": (
        lambda a, b, legal: sum(a[s // 10] * b[s // 10, s % 10] for s in range(100) if legal[s]),
        [
            lambda a, b, legal: (b.flatten() * legal).sum(),
            lambda a, b, legal: ((a[:, None] * b).T.flatten() * legal).sum(),
            lambda a, b, legal: ((a[None] * b).flatten() * legal).sum(),
        ],
        r"left out P\(first digit\)",
    ),
    "answer_01_5": (raw("a"), [raw("b"), raw("c"), raw(None)], "drawn alike"),
    "bigram_mass": (
        lambda fsm: (
            sum(
                (
                    fsm.legal[s]
                    * torch.stack([fsm.legal[t] / 10 for t in range(100) if t % 10 == s % 10]).mean(
                        0
                    )
                ).sum()
                for s in range(100)
            )
            / 100
        ),
        [
            lambda fsm: torch.tensor(0.1),
            lambda fsm: torch.tensor(1.0),
            lambda fsm: (
                (
                    fsm.legal.view(10, 10, 100)
                    * (fsm.legal / 10).view(10, 10, 100).mean(1, keepdim=True)
                )
                .sum(-1)
                .mean()
            ),
        ],
        "nothing at all|knows the state|forgot the second",
    ),
    "choose_codes": (
        lambda x, c, k: torch.stack(
            [
                torch.tensor(
                    sorted(range(len(c)), key=lambda j: -F.cosine_similarity(row, c[j], dim=0))[:k]
                )
                for row in x
            ]
        ),
        [
            lambda x, c, k: (x @ c.T).topk(k).indices,
            cdist_ids,
            lambda x, c, k: (
                F.cosine_similarity(x[:, None], c[None], dim=-1).topk(k, largest=False).indices
            ),
        ],
        "long codes win",
    ),
    "sum_of_codes": (
        lambda ids, c: sum(c[ids[:, j]] for j in range(ids.shape[1])),
        [lambda ids, c: c[ids].mean(1), lambda ids, c: c[ids], lambda ids, c: c[ids].amax(1)],
        "did you take the mean of the codes\\? the paper sums them",
    ),
    "pass_through": (
        lambda x, out: x - x.detach() + out,
        [lambda x, out: out, lambda x, out: x + (out - x).detach(), lambda x, out: out + x],
        "nothing reaches x",
    ),
    "dead_share": (
        lambda ids, n: sum(c not in set(ids.flatten().tolist()) for c in range(n)) / n,
        [
            lambda ids, n: len(ids.unique()) / n,
            lambda ids, n: n - len(ids.unique()),
            lambda ids, n: 1 - len(ids[:, 0].unique()) / n,
        ],
        r"\*is\* used",
    ),
    "residual_ids": (
        lambda x, c, k: torch.stack(
            (
                lambda r: [
                    (lambda i: (i, r.__setitem__(0, r[0] - c[i]))[0])(
                        ((r[0][:, None] - c) ** 2).sum(-1).argmin(-1)
                    )
                    for _ in range(k)
                ]
            )([x]),
            -1,
        ),
        [
            cdist_ids,
            lambda x, c, k: torch.cdist(x, c).argmin(-1)[:, None].expand(-1, k),
            lambda x, c, k: (x @ c.T).topk(k).indices,
        ],
        "what is \\*left\\*|same code three times",
    ),
    "answer_02_6": (raw("a"), [raw("b"), raw("c"), raw(3)], "mean predictor has 1"),
    "bits": (
        lambda counts: (
            torch.distributions.Categorical(probs=counts / counts.sum()).entropy()
            / torch.tensor(2.0).log()
        ),
        [
            lambda c: entropy(c / c.sum()),
            lambda c: torch.tensor(float(len(c))).log2(),
            lambda c: torch.tensor(float((c > 0).sum())).log2(),
        ],
        "nats",
    ),
    "majority": (
        lambda t: torch.tensor([row.argmax() if row.sum() else -1 for row in t]),
        [lambda t: t.argmax(1), lambda t: t.argmax(0), lambda t: t.max(1).values],
        "never used",
    ),
    "held_out_precision": (
        lambda codes, labels, n: (
            sum(
                (lambda seen: bool(seen) and max(range(6), key=lambda s: seen.count(s)) == y)(
                    [b for a, b in zip(codes[:200].tolist(), labels[:200].tolist()) if a == x]
                )
                for x, y in zip(codes[200:].tolist(), labels[200:].tolist())
            )
            / 200
        ),
        [
            lambda c, l, n: (
                (torch.bincount(c * 6 + l, minlength=6 * n).view(n, 6).argmax(1)[c] == l)
                .float()
                .mean()
            ),
            lambda c, l, n: (
                (
                    torch.bincount(c[:200] * 6 + l[:200], minlength=6 * n)
                    .view(n, 6)
                    .argmax(1)[c[:200]]
                    == l[:200]
                )
                .float()
                .mean()
            ),
            raw(1 / 6),
        ],
        "scored where you chose|all data chose",
    ),
    "precision_at_recall": (
        lambda a, t, r: next(
            ((a >= th) & t).sum() / (a >= th).sum()
            for th in a.sort(descending=True).values
            if ((a >= th) & t).sum() >= r * t.sum()
        ),
        [
            lambda a, t, r: t[a.argsort()].cumsum(0)[100] / 101,
            lambda a, t, r: torch.tensor(r),
            lambda a, t, r: a.sort(descending=True).values[
                int((t[a.argsort(descending=True)].cumsum(0) < r * t.sum()).sum())
            ],
        ],
        "that is the threshold",
    ),
    "write_boundary": (
        lambda code: (
            lambda ids: torch.cat(
                [ids[:, :-2], torch.full_like(ids[:, -2:-1], code), ids[:, -1:]], 1
            )
        ),
        [
            lambda code: (
                lambda ids: torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], code)], 1)
            ),
            lambda code: lambda ids: torch.full_like(ids, code),
            lambda code: lambda ids: ids.__setitem__((slice(None), -2), code) or ids,
        ],
        "last position",
    ),
    "answer_03_5": (raw("b"), [raw("a"), raw("c"), raw("")], "break the model"),
    "story_nats": (
        lambda ps: torch.stack([-p.log() for p in ps]).sum(),
        [lambda ps: -ps.log2().sum(), lambda ps: -ps.log().mean(), lambda ps: ps.prod()],
        "bits",
    ),
    "lowest_loss": (
        lambda cs, n: sum(torch.distributions.Categorical(probs=p).entropy() for p in cs) / n,
        [
            lambda cs, n: sum(map(entropy, cs)) / len(cs),
            lambda cs, n: sum(map(entropy, cs)),
            lambda cs, n: sum(torch.tensor(float(len(p))).log() for p in cs) / n,
        ],
        "divided by the choices",
    ),
    "mean_loss": (
        lambda nats, ids, bos, pad: torch.stack(
            [
                n[t]
                for n, row in zip(nats, ids)
                for t in range(1, len(row))
                if row[t] not in (bos, pad) or row[t] == bos and row[t - 1] not in (bos, pad)
            ]
        ).mean(),
        [
            lambda nats, ids, bos, pad: nats.mean(),
            lambda nats, ids, bos, pad: nats[ids != pad].mean(),
            lambda nats, ids, bos, pad: nats[(ids != pad) & (ids != bos)].mean(),
        ],
        "padding is counted",
    ),
    "one_stream": (
        lambda docs, length, bos: (
            lambda flat: torch.tensor(
                [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]
            )
        )(sum(([bos] + d for d in docs), []) + [bos]),
        [
            lambda docs, length, bos: (
                lambda f: torch.tensor(f[: len(f) // length * length]).view(-1, length)
            )(sum(docs, [])),
            lambda docs, length, bos: (
                lambda f: torch.tensor(f[: len(f) // length * length]).view(-1, length)
            )(sum(([bos] + d for d in docs), [])),
            lambda docs, length, bos: (
                lambda f: torch.tensor(f[: len(f) // length * length]).view(-1, length)
            )([bos] + sum(docs, []) + [bos]),
        ],
        "BOS before every document is missing",
    ),
    "answer_04_5": (raw("b"), [raw("a"), raw("c"), raw(2)], "still tell the topic"),
    "counterfactual": (
        lambda ids, r, o: torch.stack(
            [
                torch.tensor([int(b) if t == a else t for t in row.tolist()])
                for row, a, b in zip(ids, r, o)
            ]
        ),
        [
            lambda ids, r, o: torch.where(ids == r[:, None], ids, o[:, None]),
            lambda ids, r, o: ids,
            lambda ids, r, o: torch.where(ids == r[:, None], o[0], ids),
            lambda ids, r, o: ids.masked_fill_(ids == 20, 30),
        ],
        "the receiver's was wanted",
    ),
    "most_bits": (
        lambda g, n, k: sum(torch.tensor(float(n)).log2() for _ in range(g * k)),
        [
            lambda g, n, k: k * torch.tensor(float(n)).log2(),
            lambda g, n, k: g * k * torch.tensor(float(n)).log(),
            lambda g, n, k: g * n,
        ],
        "those are nats",
    ),
    "likeness_of": (
        lambda c, ids: (
            (F.normalize(c, dim=-1)[ids[:, 0]] * F.normalize(c, dim=-1)[ids[:, 1]]).sum(-1).mean()
        ),
        [
            lambda c, ids: (c[ids[:, 0]] * c[ids[:, 1]]).sum(-1).mean(),
            lambda c, ids: F.cosine_similarity(c[ids[:, 0]], c[ids[:, 1]], dim=-1),
            lambda c, ids: F.cosine_similarity(c[:, None], c, dim=-1).mean(),
        ],
        "long codes count for more",
    ),
    "whole_loss": (
        lambda nats, asked: [
            float((x * a).sum()) / sum(int(b.sum()) for b in asked) for x, a in zip(nats, asked)
        ],
        [
            lambda nats, asked: torch.stack([x[a].mean() for x, a in zip(nats, asked)]),
            lambda nats, asked: torch.stack([x[a].mean() for x, a in zip(nats, asked)]) / 2,
            lambda nats, asked: torch.stack([x.sum() for x in nats]) / sum(x.numel() for x in nats),
        ],
        "shorter part count for more",
    ),
    "resampling_odds": (
        lambda x, own, nats: F.normalize(
            (1 - (F.normalize(x, dim=-1) * F.normalize(own, dim=-1)).sum(-1)).clamp(min=0) * nats,
            p=1,
            dim=0,
        ),
        [
            lambda x, own, nats: (1 - F.cosine_similarity(x, own, dim=-1)) * nats,
            lambda x, own, nats: nats / nats.sum(),
            lambda x, own, nats: ((1 - F.cosine_similarity(x, own, dim=-1)) * nats).softmax(0),
        ],
        "surprise is left out|distance is left out",
    ),
    "answer_05_5": (raw("b"), [raw("a"), raw("c"), raw(1)], "same teller"),
    "cheapest": (
        lambda bits, gaps, most: (
            lambda ok: (
                (lambda i: torch.tensor([i, gaps[i, -1]]))(min(ok, key=lambda i: bits[i]))
                if ok
                else torch.tensor([-1, torch.nan])
            )
        )([i for i in range(len(bits)) if gaps[i, :-1].mean() <= most]),
        [
            lambda b, g, m: torch.tensor([float(b.argmin()), g[b.argmin(), -1]]),
            lambda b, g, m: torch.tensor(
                [float(g[:, :-1].mean(1).argmin()), g[g[:, :-1].mean(1).argmin(), -1]]
            ),
            lambda b, g, m: (lambda i: torch.tensor([float(i), g[i, :-1].mean()]))(
                torch.where(g[:, :-1].mean(1) <= m, b, torch.inf).argmin()
            ),
        ],
        "whether good enough or not",
    ),
    "precision_recall": (
        lambda f, m: (
            torch.tensor([0.0, 0.0, 0.0])
            if not f.any()
            else torch.stack([m[f].float().mean(), f[m].float().mean(), f1_by_parts(f, m)])
        ),
        [
            lambda f, m: torch.stack(
                [(f & m).sum() / m.sum(), (f & m).sum() / f.sum(), f1_by_parts(f, m)]
            ),
            lambda f, m: torch.tensor([(f == m).float().mean()] * 3),
            lambda f, m: torch.stack(
                [(f & m).sum() / f.sum(), (f & m).sum() / m.sum(), f1_by_parts(f, m)]
            ),
        ],
        "are exchanged|divides by nothing",
    ),
    "code_precisions": (
        lambda ids, m, n: torch.stack(
            [
                m[ids == c].float().mean() if (ids == c).any() else torch.tensor(0.0)
                for c in range(n)
            ]
        ),
        [
            lambda ids, m, n: torch.bincount(ids[m], minlength=n) / m.sum(),
            lambda ids, m, n: (
                torch.bincount(ids[m], minlength=n) / torch.bincount(ids, minlength=n)
            ),
            lambda ids, m, n: (
                torch.bincount(ids[m]) / torch.bincount(ids).clamp(min=1)[: int(ids[m].max()) + 1]
            ),
        ],
        "that is the recall",
    ),
    "touched": (
        lambda b, e, spans: torch.tensor(
            [any(max(int(x), s) < min(int(y), t) for s, t in spans) for x, y in zip(b, e)]
        ),
        [
            lambda b, e, spans: torch.stack([(b <= t) & (s <= e) for s, t in spans]).any(0),
            lambda b, e, spans: torch.stack([(b >= s) & (e <= t) for s, t in spans]).any(0),
            lambda b, e, spans: torch.stack([(b >= s) & (b < t) for s, t in spans]).any(0),
        ],
        "lie inside a span",
    ),
    "held_out_best": (
        lambda ids, m, n: (
            lambda h: (lambda c: m[h:][ids[h:] == c].float().mean())(
                max(
                    (c for c in range(n) if (m[:h] & (ids[:h] == c)).sum() > 0.1 * m[:h].sum()),
                    key=lambda c: m[:h][ids[:h] == c].float().mean(),
                )
            )
        )(len(ids) // 2),
        [
            lambda ids, m, n: max(m[ids == c].float().mean() for c in ids.unique()),
            lambda ids, m, n: (
                lambda h: (
                    m[h:][
                        ids[h:]
                        == max(ids[:h].unique(), key=lambda c: m[:h][ids[:h] == c].float().mean())
                    ]
                    .float()
                    .sum()
                    / 1e9
                )
            )(len(ids) // 2),
            lambda ids, m, n: torch.tensor(0.5),
        ],
        "by chance",
    ),
    "answer_06_5": (raw("b"), [raw("a"), raw("c"), raw(0)], "not of their reason"),
    "best_set": (
        lambda ids, m, n: (
            lambda h: (
                lambda order: (
                    lambda sizes: f1_by_parts(
                        torch.isin(ids[h:], torch.tensor(order[:sizes])), m[h:]
                    )
                )(
                    next(
                        (
                            i
                            for i in range(1, len(order))
                            if f1_by_parts(torch.isin(ids[:h], torch.tensor(order[: i + 1])), m[:h])
                            <= f1_by_parts(torch.isin(ids[:h], torch.tensor(order[:i])), m[:h])
                        ),
                        len(order),
                    )
                )
            )(
                sorted(
                    ids[:h].unique().tolist(),
                    key=lambda c: (-m[:h][ids[:h] == c].float().mean(), c),
                )
            )
        )(len(ids) // 2),
        [
            lambda ids, m, n: m.float().mean() * 2 / (1 + m.float().mean()),
            lambda ids, m, n: (
                lambda h: f1_by_parts(
                    torch.isin(
                        ids[h:],
                        torch.tensor(
                            [
                                max(
                                    ids[:h].unique(),
                                    key=lambda c: m[:h][ids[:h] == c].float().mean(),
                                )
                            ]
                        ),
                    ),
                    m[h:],
                )
            )(len(ids) // 2),
            lambda ids, m, n: (lambda h: f1_by_parts(torch.isin(ids[h:], ids[:h].unique()), m[h:]))(
                len(ids) // 2
            ),
        ],
        "best single code|hardly any precision",
    ),
    "smallest": (
        lambda sizes, goal, f: min([s for s in sizes if f(s) >= goal], default=None),
        [
            lambda sizes, goal, f: next(s for s in sizes if f(s) >= goal),
            lambda sizes, goal, f: max(s for s in sizes if f(s) >= goal),
            lambda sizes, goal, f: min(s for s in sizes if f(s) >= goal),
        ],
        "300 is smaller",
    ),
    "unexplained": (
        lambda x, y: (
            1 - ((x - x.mean(0)).pow(2).sum() - (x - y).pow(2).sum()) / (x - x.mean(0)).pow(2).sum()
        ),
        [
            lambda x, y: 1 - (x - y).pow(2).sum() / (x - x.mean(0)).pow(2).sum(),
            lambda x, y: (x - y).pow(2).sum() / x.pow(2).sum(),
            lambda x, y: ((x - y).var(0) / x.var(0)).mean(),
        ],
        "far from zero",
    ),
    "sae_loss": (
        lambda x, M, b, a: (
            sum(
                ((r - torch.relu(M @ r + b) @ M) ** 2).sum() + a * torch.relu(M @ r + b).sum()
                for r in x
            )
            / len(x)
        ),
        [
            lambda x, M, b, a: (
                F.mse_loss((x @ M.T + b).relu() @ M, x) + a * (x @ M.T + b).relu().sum(-1).mean()
            ),
            lambda x, M, b, a: (x - (x @ M.T + b).relu() @ M).pow(2).sum(-1).mean(),
            lambda x, M, b, a: (
                (x - (x @ M.T + b) @ M).pow(2).sum(-1).mean() + a * (x @ M.T + b).sum(-1).mean()
            ),
        ],
        "paper's code",
    ),
    "keep_k": (
        lambda pre, k: torch.where(
            pre >= pre.sort(-1, descending=True).values[:, k - 1 : k], pre, 0.0
        ).clamp(min=0),
        [
            lambda pre, k: torch.where(
                pre >= pre.sort(-1, descending=True).values[:, k - 1 : k], pre, 0.0
            ),
            lambda pre, k: pre.topk(k, -1).values.relu(),
            lambda pre, k: pre.relu(),
        ],
        "negative ones",
    ),
    "best_decoder": (
        lambda f, x: torch.linalg.pinv(f) @ x,
        [
            lambda f, x: f.T @ x,
            lambda f, x: (f.T @ x) / f.pow(2).sum(0)[:, None],
            lambda f, x: torch.linalg.lstsq(f, x).solution.T,
        ],
        "inverse",
    ),
    "answer_07_5": (raw("b"), [raw("a"), raw("c"), raw(None)], "perplexity"),
    "threshold_gradient": (
        lambda pre, t, w: (
            -torch.stack([((p > t - w / 2) & (p < t + w / 2)).float() for p in pre]).mean(0) / w
        ),
        [
            lambda pre, t, w: ((pre - t).abs() < w / 2).float().mean(0) / w,
            lambda pre, t, w: -((pre - t).abs() < w / 2).float().mean(0),
            lambda pre, t, w: -((pre - t).abs() < w).float().mean(0) / w,
        ],
        "sign",
    ),
    "principal": (
        lambda x, n: torch.linalg.eigh(torch.cov(x.T))[1].flip(1).T[:n],
        [
            lambda x, n: torch.linalg.svd(x, full_matrices=False)[2][:n],
            lambda x, n: torch.linalg.eigh(torch.cov(x.T))[1].T[:n],
            lambda x, n: torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:n].T,
        ],
        "centre first",
    ),
    "best_cosine": (
        lambda A, B: torch.stack(
            [torch.stack([torch.cosine_similarity(a, b, 0).abs() for b in B]).max() for a in A]
        ),
        [
            lambda A, B: (F.normalize(A, dim=-1) @ F.normalize(B, dim=-1).T).amax(-1),
            lambda A, B: (A @ B.T).abs().amax(-1),
            lambda A, B: (F.normalize(A, dim=-1) @ F.normalize(B, dim=-1).T).abs().amax(0),
        ],
        "absolute value",
    ),
    "tail_up": (
        lambda f: torch.where(((f - f.mean(0)) ** 3).sum(0) < 0, -f, f),
        [
            lambda f: f * (f**3).mean(0).sign(),
            lambda f: f.abs(),
            lambda f: f * f.mean(0).sign(),
            lambda f: f - f.mean(0),
        ],
        "centre first",
    ),
    "auroc": (
        lambda v, t: (
            sum((v[~t] < p).float().mean() + (v[~t] == p).float().mean() / 2 for p in v[t])
            / t.sum()
        ),
        [
            lambda v, t: (v[t][:, None] > v[~t]).float().mean(),
            lambda v, t: 1 - (v[t][:, None] > v[~t]).float().mean(),
            lambda v, t: ((v > v.mean()) == t).float().mean(),
        ],
        "one half",
    ),
    "answer_08_5": (raw("b"), [raw("a"), raw("c"), raw(3)], "768"),
    "to_integers": (
        lambda a, top: torch.tensor(
            [min(10.0, float(int(10 * max(v, 0.0) / top))) for v in a.tolist()]
        ),
        [
            lambda a, top: (10 * a / top).round().clamp(0, 10),
            lambda a, top: (10 * a / top).floor().clamp(max=10),
            lambda a, top: (10 * a.clamp(min=0) / top).floor(),
            lambda a, top: (10 * a.clamp(min=0) / a.max()).floor(),
        ],
        "round down",
    ),
    "split_top": (
        lambda p: tuple(
            torch.tensor([int(p.topk(20).indices[i]) for i in range(start, 20, 4)])
            for start in (0, 2)
        ),
        [
            lambda p: (p.argsort()[:20][0::4], p.argsort()[:20][2::4]),
            lambda p: (p.topk(20).indices[:5], p.topk(20).indices[5:10]),
            lambda p: (p.topk(20).indices[2::4], p.topk(20).indices[0::4]),
            lambda p: (p.topk(20).indices[0::4], p.topk(20).indices[1::4]),
        ],
        "sort downwards",
    ),
    "pooled_r": (
        lambda t, s: (
            ((a := torch.cat(t) - torch.cat(t).mean()) @ (b := torch.cat(s) - torch.cat(s).mean()))
            / (a.norm() * b.norm())
        ),
        [
            lambda t, s: torch.stack(
                [torch.corrcoef(torch.stack(p))[0, 1] for p in zip(t, s)]
            ).mean(),
            lambda t, s: torch.cosine_similarity(torch.cat(t), torch.cat(s), 0),
            lambda t, s: torch.corrcoef(torch.stack([torch.cat(t), torch.cat(s)])),
            lambda t, s: torch.corrcoef(torch.stack([torch.cat(t), torch.cat(s)]))[0, 1] ** 2,
        ],
        "each fragment's r",
    ),
    "expected_strength": (
        lambda p, z: (
            (sum(i * p[i] for i in range(2, 10)) + p[1] * (1 - z) + 10 * p[1] * z) / p.sum()
        ),
        [
            lambda p, z: (p * torch.arange(10)).sum() / p.sum(),
            lambda p, z: sum(i * p[i] for i in range(10)) + 10 * p[1] * z,
            lambda p, z: (sum(i * p[i] for i in range(10)) + 10 * p[1] * z) / (p.sum() + p[1] * z),
            lambda p, z: sum(i * p[i] for i in range(2, 10)) + p[1] * (1 - z) + 10 * p[1] * z,
        ],
        "loses what goes to 10",
    ),
    "answer_09_5": (raw("a"), [raw("b"), raw("c"), raw(None)], "compared with what"),
    "after_word": (
        words_after,
        [
            lambda f, b: words_after(f, b, lambda x, y: True),
            lambda f, b: words_after(f, b, lambda x, y: x >= y),
            lambda f, b: words_after([(t[::-1], a[::-1]) for t, a in f], b),
            lambda f, b: words_after(f, b, lambda x, y: x < y),
        ],
        "at least as high",
    ),
    "held_out_f1": (
        f1_held_out,
        [
            lambda v, t: f1_held_out(v, t, slice(None)),
            lambda v, t: f1_held_out(v, t, slice(40, None)),
            lambda v, t: f1_held_out(v.flip(0), t.flip(0)),
            lambda v, t: f1_held_out(torch.cat([v[:40], v[:40]]), torch.cat([t[:40], t[:40]])),
        ],
        "where the threshold was chosen",
    ),
    "patch_features": (
        lambda x, c, t, D, s: x + sum((t[:, [j]] - c[:, [j]]) * D[j] for j in s),
        [
            lambda x, c, t, D, s: x - (t - c)[:, s] @ D[s],
            lambda x, c, t, D, s: x + (t - c) @ D,
            lambda x, c, t, D, s: (t - c)[:, s] @ D[s],
            lambda x, c, t, D, s: x + t[:, s] @ D[s],
            lambda x, c, t, D, s: x + (t - c)[:, s].sum(0) @ D[s],
        ],
        "not the reverse",
    ),
    "kl_nats": (
        lambda a, b: F.kl_div(
            b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1),
        [
            lambda a, b: (b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1),
            lambda a, b: (a.softmax(-1) * (a - b)).sum(-1),
            lambda a, b: (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1).mean(),
            lambda a, b: (a - b).pow(2).sum(-1),
        ],
        "the other way round",
    ),
    "first_order": (
        lambda g, c, t, D: -torch.einsum("lf,fd,ld->f", t - c, D, g),
        [
            lambda g, c, t, D: ((t - c) * (g @ D.T)).sum(0),
            lambda g, c, t, D: -(t - c) * (g @ D.T),
            lambda g, c, t, D: -(t * (g @ D.T)).sum(0),
            lambda g, c, t, D: -((t - c).sum(0) * (g @ D.T).sum(0)),
        ],
        "fall, not rise",
    ),
    "features_needed": (
        lambda kl, share: next((i for i, v in enumerate(kl) if v <= kl[0] - share * kl[0]), None),
        [
            lambda kl, share: next((i for i, v in enumerate(kl) if v <= share * kl[0]), None),
            lambda kl, share: next(
                (i + 1 for i, v in enumerate(kl) if v <= (1 - share) * kl[0]), None
            ),
            lambda kl, share: int((kl > (1 - share) * kl[0]).sum()),
            lambda kl, share: next((i for i, v in enumerate(kl) if v <= 1 - share), None),
        ],
        "not share",
    ),
    "acdc_pass": (
        _acdc_right,
        [
            _acdc_stale,
            _acdc_size,
            lambda kl_of, features, threshold: list(features),
            lambda kl_of, features, threshold: [
                f for f in features if f not in _acdc_right(kl_of, features, threshold)
            ],
        ],
        "by then",
    ),
    "answer_10_6": (raw("a"), [raw("b"), raw("c"), raw(None)], "control"),
    "month_prompts": (
        lambda months: tuple(
            zip(
                *[
                    (
                        f"It was {m}, and the rain fell all day long. It was still",
                        f"It was {n}, and the rain fell all day long. It was still",
                        m,
                        n,
                    )
                    for m, n in zip(months, [*months[1:], months[0]])
                ]
            )
        ),
        [
            lambda months: _months(months, months[-1:] + months[:-1]),
            lambda months: _months(months[:-1], months[1:]),
            lambda months: (
                _months(months, months[1:] + months[:1])[:2]
                + _months(months, months[1:] + months[:1])[:1:-1]
            ),
        ],
        "not before",
    ),
    "add_where": (
        lambda x, v, where: torch.where(where[..., None], x + v, x),
        [
            lambda x, v, where: x + v,
            lambda x, v, where: torch.where(where[..., None], v, x),
            lambda x, v, where: x + ~where[..., None] * v,
        ],
        "that is everywhere",
    ),
    "best_feature": (
        lambda fires, marked: max(
            range(fires.shape[1]),
            key=lambda j: float((fires[:, j] & marked).sum()) ** 2 / max(1, int(fires[:, j].sum())),
        ),
        [
            lambda fires, marked: int((fires & marked[:, None]).sum(0).argmax()),
            lambda fires, marked: 3,
            lambda fires, marked: 0,
        ],
        "best coverage",
    ),
    "switch_table": (
        lambda owner, gates, write, target: torch.tensor(
            [
                int(write[target]) if g or (o >= 0 and o != target) else i
                for i, (o, g) in enumerate(zip(owner.tolist(), gates.tolist()))
            ]
        ),
        [
            lambda owner, gates, write, target: torch.where(
                (owner >= 0) & (owner != target), write[target], torch.arange(len(owner))
            ),
            lambda owner, gates, write, target: torch.where(
                gates, write[target], torch.arange(len(owner))
            ),
            lambda owner, gates, write, target: torch.where(
                (owner != target) | gates, write[target], torch.arange(len(owner))
            ),
        ],
        "open places change as well",
    ),
    "recognised_topic": (
        lambda counts: torch.tensor(
            [
                row.index(max(row)) if max(row) > 0 and row.count(max(row)) == 1 else -1
                for row in counts.tolist()
            ]
        ),
        [
            lambda counts: counts.argmax(1),
            lambda counts: torch.where(counts.max(1).values > 0, counts.argmax(1), -1),
            lambda counts: counts.max(1).values,
        ],
        "two equal",
    ),
    "rate_at_budget": (
        lambda loss, rate, limit: max(
            (r[::2].mean().item(), r[1::2].mean().item())
            for l, r in zip(loss, rate)
            if l[::2].mean() <= limit
        )[1],
        [
            lambda loss, rate, limit: rate[3, 1::2].mean(),
            lambda loss, rate, limit: rate[2, ::2].mean(),
            lambda loss, rate, limit: rate[2].mean(),
        ],
        "scored on the texts that chose",
    ),
    "answer_12_6": (lambda: "b", [lambda: "a", lambda: "c", lambda: ""], "uses no feature"),
    "set_f1": (
        lambda f, t: f1_by_parts(f.sum(1) > 0, t),
        [
            lambda f, t: f1_by_parts(f.all(1), t),
            lambda f, t: torch.stack([f1_by_parts(c, t) for c in f.T]).mean(),
            lambda f, t: (f.any(1) & t).sum() / f.any(1).sum(),
            lambda f, t: (f.any(1) == t).float().mean(),
        ],
        "better than each of its members",
    ),
    "next_feature": (
        _next_by_hand,
        [
            lambda z, y, chosen: (z.T @ y).abs().index_fill(0, torch.tensor(chosen), -1.0).argmax(),
            lambda z, y, chosen: (z.T @ y).abs().argmax(),
            lambda z, y, chosen: (
                (z.T @ (y - z[:, chosen] @ (z[:, chosen].T @ y)))
                .index_fill(0, torch.tensor(chosen), -9.0)
                .argmax()
            ),
            lambda z, y, chosen: 4,
        ],
        "has said all of that already",
    ),
    "is_absorbed": (
        lambda f, p, c: (f & c).sum() * 2 * (p & ~c).sum() < (f & p & ~c).sum() * c.sum(),
        [
            lambda f, p, c: f[c].float().mean() < f[p].float().mean() / 2,
            lambda f, p, c: f[c].float().mean() < f[~p].float().mean() / 2,
            lambda f, p, c: f[c].float().mean() < f[p & ~c].float().mean(),
            lambda f, p, c: True,
        ],
        "hide part of the hole",
    ),
    "paired_interval": (
        lambda a, b, t=4.303: (
            (a - b).mean() - t * ((a - b).var() / len(a)).sqrt(),
            (a - b).mean() + t * ((a - b).var() / len(a)).sqrt(),
        ),
        [
            lambda a, b, t=4.303: (
                (a.mean() - b.mean()) - t * ((a.var() + b.var()) / 3).sqrt(),
                (a.mean() - b.mean()) + t * ((a.var() + b.var()) / 3).sqrt(),
            ),
            lambda a, b, t=4.303: (
                (a - b).mean() - t * (a - b).std(),
                (a - b).mean() + t * (a - b).std(),
            ),
            lambda a, b, t=4.303: ((a - b).min(), (a - b).max()),
        ],
        "take the differences first",
    ),
    "answer_13_5": (
        raw("b"),
        [raw("a"), raw("c"), raw("")],
        "Random directions would report nearly the same",
    ),
    "my_dictionary": (
        _batchtopk,
        [
            lambda x, n, k: random_directions(n, x.shape[1], seed=9),
            lambda x, n, k: _sparse_random(n, x.shape[1], k),
            lambda x, n, k: random_directions(2 * n, x.shape[1]),
            lambda x, n, k: x,
        ],
        "a dense dictionary",
    ),
    "added": (
        lambda d, C, g=1: C / d / 6,
        [
            lambda d, C, g=1: C / d / 12,
            lambda d, C, g=1: g * C / d / 6,
            lambda d, C, g=1: 4 * C * d,
            lambda d, C, g=1: 0.0,
        ],
        "two sites a block",
    ),
    "fit_prices": (
        lambda c, t: (
            __import__("scipy.optimize", fromlist=["lsq_linear"])
            .lsq_linear(
                c / t[:, None] / np.abs(c / t[:, None]).max(0),
                np.ones(len(t)),
                (0, np.inf),
                tol=1e-14,
            )
            .x
            / np.abs(c / t[:, None]).max(0)
        ),
        [
            lambda c, t: __import__("scipy.optimize", fromlist=["nnls"]).nnls(c, t)[0],
            lambda c, t: np.linalg.lstsq(c / t[:, None], np.ones(len(t)), rcond=None)[0],
            lambda c, t: np.zeros(3),
        ],
        "the slowest case decides alone",
    ),
    "training_state": (
        lambda w, c, ema: 16 * w + (12 if ema else 16) * c,
        [
            lambda w, c, ema: 16 * (w + c),
            lambda w, c, ema: 4 * w + 3 * c,
            lambda w, c, ema: 16 * w + (4 if ema else 16) * c,
            lambda w, c, ema: 12 * (w + c),
        ],
        "no gradient and no moments",
    ),
    "precision_change": (
        lambda a, s, on_now, truth_now: torch.stack(
            [
                b_[t_].sum() / b_.sum() - a_[s_].sum() / a_.sum()
                for a_, s_, b_, t_ in zip(a.T.float(), s.T, on_now.T.float(), truth_now.T)
                if a_.any() and b_.any()
            ]
        ).mean(),
        [
            lambda a, s, on_now, truth_now: (
                ((on_now & truth_now).sum(0) / on_now.sum(0)).nanmean()
                - ((a & s).sum(0) / a.sum(0)).nanmean()
            ),
            lambda a, s, on_now, truth_now: (
                (on_now & truth_now).sum() / on_now.sum() - (a & s).sum() / a.sum()
            ),
            lambda a, s, on_now, truth_now: (
                (on_now & truth_now).sum(0) / on_now.sum(0).clamp(min=1)
                - (a & s).sum(0) / a.sum(0).clamp(min=1)
            ).mean(),
        ],
        "ask the same ones in both",
    ),
    "answer_14_5": (
        raw("b"),
        [raw("a"), raw("c"), raw("")],
        "The block still does all its products|More sites, but more blocks",
    ),
    "renamed": (
        lambda ids, girls, boys, seed=0: _renamed_by_hand(ids, girls, boys),
        [
            lambda ids, girls, boys, seed=0: ids,
            lambda ids, girls, boys, seed=0: torch.where(
                torch.isin(ids, torch.cat([girls, boys])), girls[0], ids
            ),
            lambda ids, girls, boys, seed=0: _renamed_by_hand(
                ids, torch.cat([girls, boys]), boys[:0]
            ),
            lambda ids, girls, boys, seed=0: ids + 1,
        ],
        "two names became one|must become|stayed itself",
    ),
    "word_lists": (
        lambda groups, ids: {
            n: [ids[w] for w in ws if w in ids and sum(groups.values(), []).count(w) == 1]
            for n, ws in groups.items()
        },
        [
            lambda groups, ids: {n: [ids[w] for w in ws if w in ids] for n, ws in groups.items()},
            lambda groups, ids: {},
            lambda groups, ids: {"wet": [3, 4, 5], "dry": [6, 7]},
        ],
        "leave it out",
    ),
    "ablate_feature": (
        lambda x, e, b, d: (
            x - (e @ d > 0) * ((x @ e + b).clamp(min=0) / (e @ d))[:, None] * d[None]
        ),
        [
            lambda x, e, b, d: x - (x @ e + b).relu()[:, None] * d,
            lambda x, e, b, d: x - ((x @ e + b) / (e @ d))[:, None] * d,
            lambda x, e, b, d: x - ((x @ e + b).relu() / (e @ d))[:, None] * d,
            lambda x, e, b, d: x - ((x @ e) / (e @ d))[:, None] * d,
        ],
        "divide by it",
    ),
    "child_effect": (
        lambda a, b: (a - b).sum() / a.sum(),
        [
            lambda a, b: (1 - b / a).mean(),
            lambda a, b: b.sum() / a.sum(),
            lambda a, b: (a - b).sum(),
            lambda a, b: ((a - b).sum() / a.sum()).abs(),
        ],
        "not the mean of shares",
    ),
    "proposed_effects": (
        lambda g, a, m: torch.einsum("nlf,fd,nld->f", a, m, g),
        [
            lambda g, a, m: -(a * (g @ m.T)).sum((0, 1)),
            lambda g, a, m: (a * (g @ m.T)).sum(1),
            lambda g, a, m: a.sum((0, 1)) * (g.sum((0, 1)) @ m.T),
            lambda g, a, m: (a * (g @ m.T)).mean((0, 1)),
        ],
        "products first",
    ),
    "same_words": (
        lambda active, j: torch.stack(
            [
                (active[:, i] & active[:, j]).sum()
                / (active[:, i] | active[:, j]).sum().clamp(min=1)
                for i in range(active.shape[1])
            ]
        ),
        [
            lambda active, j: (
                (active & active[:, [j]]).float().sum(0) / active[:, j].sum().clamp(min=1)
            ),
            lambda active, j: (active & active[:, [j]]).sum(0),
            lambda active, j: (active & active[:, [j]]).sum(0) / (active | active[:, [j]]).sum(0),
            lambda active, j: (
                2
                * (active & active[:, [j]]).sum(0)
                / (active.sum(0) + active[:, j].sum()).clamp(min=1)
            ),
        ],
        "not of j's",
    ),
    "as_long": (
        lambda own, wanted: torch.stack(
            [
                a * b.norm(dim=-1).sum() / a.norm(dim=-1).sum() if a.any() else a
                for a, b in zip(own, wanted)
            ]
        ),
        [
            lambda own, wanted: (
                own
                * wanted.norm(dim=-1, keepdim=True)
                / own.norm(dim=-1, keepdim=True).clamp(min=1e-6)
            ),
            lambda own, wanted: own * wanted.norm(dim=-1).sum() / own.norm(dim=-1).sum(),
            lambda own, wanted: own * (wanted.norm() / own.norm()),
            lambda own, wanted: own,
        ],
        "not for each word",
    ),
    "answer_11_6": (raw("b"), [raw("a"), raw("c"), raw("z")], "carry it"),
    "virtual_weights": (
        lambda writes, reads, gamma: torch.stack(
            [(reads * (gamma * (w - w.mean()))).sum(1) for w in writes]
        ),
        [
            lambda writes, reads, gamma: (writes * gamma) @ reads.T,
            lambda writes, reads, gamma: (writes - writes.mean(-1, keepdim=True)) @ reads.T,
            lambda writes, reads, gamma: ((writes - writes.mean(0)) * gamma) @ reads.T,
            lambda writes, reads, gamma: writes @ reads.T,
        ],
        "subtracts each direction's mean",
    ),
    "comes_next": (
        lambda ids, tokens, pad: torch.cat(
            [
                torch.stack([ids[:, 1:] == t for t in tokens]).any(0) & (ids[:, :-1] != pad),
                torch.zeros(len(ids), 1, dtype=torch.bool),
            ],
            1,
        ),
        [
            lambda ids, tokens, pad: (
                torch.isin(ids.roll(-1, 1), torch.tensor(tokens)) & (ids != pad)
            ),
            lambda ids, tokens, pad: (
                torch.isin(ids, torch.tensor(tokens))
                & (torch.arange(ids.shape[1]) < ids.shape[1] - 1)
            ),
            lambda ids, tokens, pad: (
                torch.isin(ids.roll(1, 1), torch.tensor(tokens)) & (ids != pad)
            ),
        ],
        "roll",
    ),
}


def exercises():
    """Every exercise cell of every chapter with the check cell behind it:
    (chapter, name of the function, cell, check cell)."""
    for path in books.chapters():
        cells = books.read_book(path).cells
        for i, cell in enumerate(cells):
            if "exercise" in books.directives(cell):
                follow = next(c for c in cells[i + 1 :] if c.cell_type == "code")
                yield pytest.param(
                    path,
                    cell.source,
                    follow.source,
                    id=re.search(r"^def (\w+)", cell.source, re.M)[1],
                )


@functools.cache
def at_hand(path):
    "What a chapter imports, and what it exports."
    space = {}
    for cell in books.read_book(path).cells:
        if exported := re.search(r"^#\| default_exp (\S+)", cell.source, re.M):
            library = importlib.import_module(f"codebook_tutorial.{exported[1]}")
            space |= {k: v for k, v in vars(library).items() if not k.startswith("_")}
        if cell.cell_type == "code" and not re.search(r"^\s*[%!]", cell.source, re.M):
            for node in ast.walk(ast.parse(cell.source)):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    exec(ast.unparse(node), space)
    return space


def run_cell(path, source, check_source):
    "Execute one exercise and its check with what the chapter's learner has at hand."
    chapter = path.stem.split("_", 1)[1]
    space = at_hand(path) | {"torch": torch, "F": F, "jsd": jsd}
    checks = vars(importlib.import_module(f"codebook_tutorial.checks.{chapter}"))
    space |= {k: v for k, v in checks.items() if k.startswith("check_")}
    exec(source, space)
    call = [line for line in check_source.splitlines() if line.startswith("check_")]
    assert len(call) == 1, check_source
    return eval(call[0], space), space, call[0]


EXERCISES = list(exercises())


def test_every_exercise_has_a_case():
    assert {p.id for p in EXERCISES} == set(CASES)


def test_every_chapter_has_four_to_eight_exercises_one_to_interpret_one_to_extend():
    for path in books.chapters():
        prose = "\n".join(
            c.source for c in books.read_book(path).cells if c.cell_type == "markdown"
        )
        heads = re.findall(r"^### Exercise (\d\d\.\d) \(([^)]*)\)", prose, re.M)
        assert 4 <= len(heads) <= 8 and len(heads) == sum(p.values[0] == path for p in EXERCISES), (
            path.name
        )
        assert any("interpret" in h for _, h in heads) and any("extend" in h for _, h in heads)
        assert all(re.search(r"difficulty [1-5], \d+ minutes", h) for _, h in heads)
        assert prose.count("<summary>Hint</summary>") >= sum(
            "interpret" not in h for _, h in heads
        )  # a question to interpret may do without


@pytest.mark.parametrize("path,source,check_source", EXERCISES)
class TestExercise:
    def test_the_solution_passes(self, path, source, check_source):
        verdict, *_ = run_cell(path, source, check_source)
        assert verdict and repr(verdict).startswith("✅")

    def test_the_stub_fails_and_does_not_stop_the_notebook(self, path, source, check_source):
        stub = learner.stub(source)
        assert "SOLUTION" not in stub and "your code here" in stub
        verdict, *_ = run_cell(path, stub, check_source)
        assert not verdict and repr(verdict).startswith("❌")

    def test_other_answers(self, path, source, check_source, request):
        name = re.search(r"^def (\w+)", source, re.M)[1]
        other, wrong, words = CASES[name]
        _, space, call = run_cell(path, source, check_source)

        def judge(fn):
            return eval(call, {**space, name: fn})

        assert judge(other), f"another right answer is refused: {judge(other)!r}"
        verdicts = [judge(fn) for fn in wrong]
        assert len(wrong) >= 3 and not any(verdicts), [repr(v) for v in verdicts]
        assert any(re.search(words, v.message) for v in verdicts), [v.message for v in verdicts]

    def test_an_error_in_the_attempt_is_a_verdict(self, path, source, check_source):
        name = re.search(r"^def (\w+)", source, re.M)[1]
        _, space, call = run_cell(path, source, check_source)

        def broken(*a, **kw):
            raise ZeroDivisionError("oh")

        verdict = eval(call, {**space, name: broken})
        assert not verdict and "ZeroDivisionError: oh" in verdict.message


@pytest.mark.parametrize(
    "answer", ["abc", [1, "a"], (torch.zeros(2), torch.ones(3)), {"a": 1}, object()]
)
def test_an_answer_of_the_wrong_kind_is_a_verdict(answer):
    from codebook_tutorial.checks.core import check, check_choice

    for verdict in (
        check(lambda: answer, torch.zeros(2)),
        check(lambda: answer, 0.5),
        check_choice(lambda: answer, "z", "yes", why_not={"b": "no"}),
    ):
        assert not verdict and verdict.message
