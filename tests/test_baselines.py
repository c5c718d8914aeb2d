"Baselines: what each computes, in its own words; concept scores against a slow form."

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import fvu, random_directions
from codebook_tutorial.dictionary.nmf import NMF
from codebook_tutorial.dictionary.baselines import Affine, ica, keep_largest, pca, pursue
from codebook_tutorial.dictionary.base import overlap
from codebook_tutorial.feature.detect import concept_scores

X = torch.randn(3000, 8, generator=seeded(0)) @ torch.randn(8, 8, generator=seeded(1)) + 3


def test_pca_is_the_eigenvectors():
    d = pca(X, batch=500)
    values, vectors = torch.linalg.eigh(torch.cov(X.T))
    assert torch.allclose((d.directions @ vectors).abs().flip(1), torch.eye(8), atol=2e-2)
    assert torch.allclose(d.mean, X.mean(0), atol=1e-4) and fvu(X, d.decode(d.encode(X))) < 1e-8
    few = pca(X, 3)
    assert fvu(X, few.decode(few.encode(X))) == pytest.approx(
        (values[:5].sum() / values.sum()).item(), rel=0.02
    )


def test_ica_finds_independent_sources_with_the_long_tail_positive():
    s = torch.rand(8000, 4, generator=seeded(2)).log().neg() - 1  # exponential: skewed
    A = torch.randn(4, 8, generator=seeded(3))
    x = s @ A + 2
    d = ica(x, 4)
    assert overlap(Affine(F.normalize(A, dim=-1)), d).min() > 0.99
    f = d.encode(x)
    assert ((f**3).mean(0) > 0).all() and torch.allclose(
        d.directions.norm(dim=-1), torch.ones(4), atol=1e-5
    )
    assert fvu(x, d.decode(f)) < 1e-6
    like = torch.corrcoef(torch.cat([f, s], 1).T)[:4, 4:]
    assert (like.amax(1) > 0.98).all()  # positive: the sign is the source's


def test_reading_rectified_or_the_k_largest():
    d = Affine(torch.eye(8), mean=torch.ones(8))
    f = d.encode(X)
    assert torch.equal(d.at(relu=True).encode(X), f.clamp(min=0)) and torch.equal(
        d.at(k=3).encode(X), keep_largest(f, 3)
    )
    kept = keep_largest(f, 3)
    assert ((kept != 0).sum(-1) == 3).all() and (kept.abs().amin(-1) == 0).all()
    assert (
        kept.abs().sum(-1) - f.abs().sort(-1, descending=True).values[:, :3].sum(-1)
    ).abs().max() < 1e-4
    ids, values = d.at(k=3).encode_sparse(X)
    assert ids.shape == (3000, 3) and torch.allclose(
        d.decode_sparse(ids, values), d.decode(kept), atol=1e-5
    )
    assert fvu(X, d.decode(d.encode(X))) < 1e-10


def test_nmf_finds_parts_and_never_goes_below_zero():
    parts = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]])
    x = (
        (torch.rand(2000, 3, generator=seeded(0)) < 0.4)
        * torch.rand(2000, 3, generator=seeded(1))
        @ parts
    )
    d = NMF(x, 3)
    f = d.encode(x)
    assert (
        (f >= 0).all()
        and (d.directions >= 0).all()
        and fvu(x, d.decode(f)) < 0.02
        and overlap(Affine(parts), d).min() > 0.98
    )
    with pytest.raises(ValueError, match="NMF: expected activations of at least 0"):
        d.encode(x - 1)


def test_overlap_is_one_with_oneself_and_small_with_random_ones():
    d = random_directions(40, 64)
    assert (
        torch.allclose(overlap(d, d), torch.ones(40), atol=1e-5)
        and overlap(d, random_directions(40, 64, seed=1)).max() < 0.7
    )
    turned = Affine(-3 * d.directions)
    assert torch.allclose(overlap(d, turned), torch.ones(40), atol=1e-5)


def test_pursuit_keeps_the_largest_of_an_orthonormal_set_and_gets_closer_step_by_step():
    centred, axes = X - X.mean(0), torch.linalg.qr(torch.randn(8, 8, generator=seeded(4)))[0]
    assert torch.allclose(pursue(centred, axes, 3), keep_largest(centred @ axes.T, 3), atol=1e-4)
    D = random_directions(30, 8).directions
    left = [((centred - pursue(centred, D, k, batch=700) @ D) ** 2).sum(-1) for k in (1, 2, 5, 40)]
    assert (
        all((b <= a + 1e-4).all() for a, b in zip(left, left[1:]))
        and left[-1].sum() < 0.01 * (centred**2).sum()
    )
    assert ((pursue(centred, D, 5) != 0).sum(-1) <= 5).all()
    assert torch.allclose(
        pursue(centred, 7 * D, 5) @ (7 * D), pursue(centred, D, 5) @ D, atol=1e-4
    )  # rows of any length


# ---- concept scores
def slow(f, truth, signs):
    "Every feature, sign and value as threshold, one by one."
    half = len(f) // 2
    out = []
    for c in range(truth.shape[1]):
        first, later = truth[:half, c], truth[half:, c]
        if min(first.sum(), later.sum()) < 20:
            out.append((np.nan, np.nan))
            continue
        best, area = (-1,), (-1,)
        for j in range(f.shape[1]):
            for sign in (1, -1)[: 1 + signs]:
                v = sign * f[:half, j]
                for t in np.unique(v):
                    fires = v >= t
                    best = max(
                        best, (2 * (fires & first).sum() / (fires.sum() + first.sum()), -j, sign, t)
                    )
                pairs = v[first][:, None] - v[~first]
                area = max(area, (((pairs > 0) + 0.5 * (pairs == 0)).mean(), -j, sign))
        _, j, sign, t = best
        fires = sign * f[half:, -j] >= t
        v = area[2] * f[half:, -area[1]]
        pairs = v[later][:, None] - v[~later]
        out.append(
            (
                2 * (fires & later).sum() / (fires.sum() + later.sum()),
                ((pairs > 0) + 0.5 * (pairs == 0)).mean(),
            )
        )
    return np.array(out).T


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("kind", ["dense", "sparse", "ones"])
def test_concept_scores_agree_with_the_slow_form(kind, signs):
    g = np.random.default_rng(0)
    f = g.normal(size=(400, 6)).astype(np.float32)
    if kind == "sparse":
        f = np.where(f > 0.8, f, 0).astype(np.float32)
    if kind == "ones":
        f = (f > 0.5).astype(np.float32)
    truth = np.stack(
        [
            f[:, 0] + 0.5 * g.normal(size=400) > 0.8,
            -f[:, 1] + 0.3 * g.normal(size=400) > 0.7,
            g.random(400) < 0.3,
            g.random(400) < 0.01,
        ],
        1,
    )
    got = concept_scores(f, truth, signs=signs, points=20_000)
    want = slow(f, truth, signs)
    assert np.allclose(got["f1"], want[0], atol=1e-6, equal_nan=True) and np.allclose(
        got["auroc"], want[1], atol=1e-6, equal_nan=True
    )
    assert (
        got["skipped"] == np.isnan(want[0]).sum()
        and np.isnan(got["f1"][3])
        and got["feature"][0] == 0
    )
    if signs and kind == "dense":
        assert got["sign"][1] == -1


def test_few_thresholds_come_close():
    g = np.random.default_rng(1)
    f = g.normal(size=(4000, 5)).astype(np.float32)
    truth = np.stack([f[:, i] + 0.5 * g.normal(size=4000) > 1 for i in range(5)], 1)
    assert (
        np.abs(concept_scores(f, truth)["f1"] - concept_scores(f, truth, points=2000)["f1"]).max()
        < 0.03
    )


def test_what_is_chosen_does_not_see_the_second_half():
    g = np.random.default_rng(2)
    f, truth = g.normal(size=(600, 30)), g.random((600, 4)) < 0.2
    a = concept_scores(f, truth)
    f[300:], truth[300:] = f[300:][::-1], truth[300:][::-1]
    b = concept_scores(f, truth)
    assert (
        (a["feature"] == b["feature"]).all()
        and (a["threshold"] == b["threshold"]).all()
        and np.allclose(a["f1"], b["f1"])
    )
    assert (a["chosen_f1"] > a["f1"]).all()  # the best of many by chance does worse later


def test_bad_input():
    with pytest.raises(ValueError, match="of the same tokens, got"):
        concept_scores(np.zeros((10, 2)), np.zeros((9, 2), bool))
    with pytest.raises(ValueError, match="expected 1 to 8 directions"):
        pca(X, 9)
    with pytest.raises(ValueError, match="expected finite"):
        ica(X.clone().fill_(float("nan")))
    with pytest.raises(ValueError, match="expected 1 <= k <= 8"):
        Affine(torch.eye(8), k=9)
