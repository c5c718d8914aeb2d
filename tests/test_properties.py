"""Properties of what takes arrays and texts:
of any shape and with any numbers the answer of a plain reference, or a ValueError; never
another error, never NaN for an answer."""

import math
import tempfile
from html.parser import HTMLParser
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.extra import numpy as hnp
from scipy import stats

from codebook_tutorial import show
from codebook_tutorial.core import jsd, seeded
from codebook_tutorial.dictionary.base import Directions, fvu
from codebook_tutorial.dictionary.base import overlap
from codebook_tutorial.dictionary.baselines import pca, pursue
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.kmeans import kmeans, nearest
from codebook_tutorial.dictionary.sae import KeepK
from codebook_tutorial.feature.detect import concept_scores
from codebook_tutorial.feature.explain.concepts import feature_concepts
from codebook_tutorial.feature.explain.protocol import (
    Case,
    Explainer,
    Fragment,
    integers,
    make_cases,
)
from codebook_tutorial.feature.explain.scores import (
    correlation,
    detection,
    difference,
    fuzzing,
    interpret,
    moments,
    summary,
)
from codebook_tutorial.model.text import fill_rows
from codebook_tutorial.score.concepts import sparse_probes
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.score.scoreboard import stability
from codebook_tutorial.world.fsm import (
    TokFSM,
    bayes,
    best_f1,
    detector_scores,
    legal_steps,
    state_labels,
)
from codebook_tutorial.world.grammar import VOCABULARY
from codebook_tutorial.world.stories import make_tokenizer, stories

set_hypothesis_home_dir(Path(tempfile.gettempdir()) / "hypothesis")
settings.register_profile("course", max_examples=25, deadline=None, derandomize=True, database=None)
settings.load_profile("course")

ORDINARY, HUGE, BAD = (
    st.integers(-800, 800).map(lambda i: i / 100),
    st.sampled_from([1e30, -1e30, 1e15, 1e-30, 1e-44]),
    st.sampled_from([math.nan, math.inf, -math.inf]),
)
FLOATS = st.sampled_from([torch.float32, torch.float64])


@st.composite
def array(draw, *shape, of=ORDINARY, dtype=np.float32):
    "A tensor; its sizes are numbers or strategies."
    return torch.from_numpy(
        draw(
            hnp.arrays(
                dtype,
                tuple(draw(n) if isinstance(n, st.SearchStrategy) else n for n in shape),
                elements=of,
            )
        )
    )


@st.composite
def labelled(draw, least, features, *, of=ORDINARY):
    "Features [N, F] and what holds [N, C]."
    n = draw(st.integers(least, 14))
    return draw(array(n, features, of=of)), draw(array(n, size(0, 3), of=st.booleans(), dtype=bool))


def size(least=0, most=6):
    return st.integers(least, most)


def refuses(call, says=""):
    with pytest.raises(ValueError, match=says):
        call()


# ---- codes
@given(array(size(), 3), array(size(1), 3), st.booleans(), size(1), FLOATS)
def test_nearest_are_the_k_nearest_best_first(x, codes, cosine, k, dtype):
    x, codes = x.to(dtype), codes.to(dtype)
    refuses(lambda: nearest(x[:, :2], codes, cosine, k=1), "of one width")
    if k > len(codes):
        return refuses(lambda: nearest(x, codes, cosine, k=k), "k from 1 to")
    ids = nearest(x, codes, cosine, k=k, rows=2)
    far = (
        1 - F.normalize(x, dim=-1).double() @ F.normalize(codes, dim=-1).double().T
        if cosine
        else torch.cdist(x.double(), codes.double()) ** 2
    )
    assert ids.shape == (len(x), k) and all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(far.gather(1, ids), far.sort(1).values[:, :k], atol=1e-3, rtol=1e-4)


@given(
    array(size(), size(1, 3), of=ORDINARY | BAD),
    size(0, 7),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_kmeans_refuses_or_gives_finite_codes(x, n, cosine, dtype):
    if not 1 <= n <= len(x) or not x.isfinite().all():
        return refuses(
            lambda: kmeans(x.to(dtype), n, 2, cosine=cosine, generator=seeded(0)),
            "kmeans: expected",
        )
    codes = kmeans(x.to(dtype), n, 2, cosine=cosine, generator=seeded(0))
    assert codes.shape == (n, x.shape[1]) and codes.dtype == dtype and codes.isfinite().all()


@given(array(size(3), 2), size(1, 3), st.booleans())
def test_kmeans_is_lloyds(x, n, cosine):
    codes = want = x[:n].clone()
    for _ in range(3):
        own = nearest(x, want, cosine)[:, 0]
        want = torch.stack([x[own == i].mean(0) if (own == i).any() else want[i] for i in range(n)])
    torch.testing.assert_close(
        kmeans(x, n, 3, cosine=cosine, seeds=codes), want, atol=1e-4, rtol=1e-4
    )


@given(
    array(size(0, 3), size(1, 3), 4, of=ORDINARY | HUGE),
    st.sampled_from(["cosine", "euclidean", "residual"]),
    size(1, 3),
    st.sampled_from([1, 2]),
    FLOATS,
    size(3, 5),
)
def test_a_codebook_gives_the_sum_of_the_codes_it_names(x, select, k, groups, dtype, width):
    torch.manual_seed(0)
    book, x = Codebook(4, 3, k, groups=groups, select=select).to(dtype).eval(), x.to(dtype)
    if width != 4:
        return refuses(lambda: book(x.new_zeros(2, width)), "expected activations")
    ids, f = book.choose(x), book.encode(x)
    assert (
        ids.shape == (*x.shape[:-1], groups, k)
        and f.shape == (*x.shape[:-1], groups * 3)
        and torch.equal(f.sum(-1), torch.full(x.shape[:-1], groups * k, dtype=dtype))
    )
    out, same, recon = book(x)
    assert (
        torch.equal(same, ids)
        and torch.equal(out, book.decode_ids(ids))
        and int(book.counts.sum()) == ids.numel()
        and not recon.isnan()
    )
    assert x.numel() or recon == 0
    _, _, nothing = book(x, mask=torch.zeros(x.shape[:-1], dtype=torch.bool))
    assert nothing == 0 and int(book.counts.sum()) == ids.numel()
    torch.testing.assert_close(out, book.decode(f))
    torch.testing.assert_close(out, book.decode_sparse(*book.encode_sparse(x)))


@given(
    array(size(1, 3), 4, of=ORDINARY | BAD), st.sampled_from(["cosine", "euclidean", "residual"])
)
def test_a_codebook_makes_no_finite_state_of_one_that_is_not(x, select):
    out, _, _ = Codebook(4, 3, 2, groups=1, select=select).eval()(x)
    assert torch.equal(out.isfinite(), x.isfinite())


# ---- autoencoders and measures
@given(
    st.sampled_from(list(KINDS)), array(size(0, 3), size(0, 3), 4, of=ORDINARY | HUGE), size(3, 5)
)
def test_an_autoencoder_says_the_same_densely_and_sparsely(kind, x, width):
    sae = KINDS[kind](
        4, 6, generator=seeded(0), **(dict(k=2) if issubclass(KINDS[kind], KeepK) else {})
    ).eval()
    if width != 4:
        return refuses(lambda: sae.encode(x.new_zeros(2, width)), "expected states")
    with torch.no_grad():
        f = sae.encode(x)
        x_hat = sae.decode(f)
        assert (
            f.shape == (*x.shape[:-1], 6)
            and x_hat.shape == x.shape
            and f.isfinite().all()
            and x_hat.isfinite().all()
            and (f >= 0).all()
        )
        if kind in ("tied", "untied", "gated"):
            torch.testing.assert_close(f, ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu())
        if kind == "topk":
            assert ((f > 0).sum(-1) <= 2).all()
        if not x.numel():
            return
        ids, values = sae.encode_sparse(x)
        assert torch.equal(torch.zeros_like(f).scatter(-1, ids, values), f)
        torch.testing.assert_close(sae.decode_sparse(ids, values), x_hat)


@given(st.sampled_from(list(KINDS)), array(size(1, 3), 4, of=ORDINARY | BAD))
def test_an_autoencoder_makes_no_finite_features_of_nan(kind, x):
    with torch.no_grad():
        f = (
            KINDS[kind](
                4, 6, generator=seeded(0), **(dict(k=6) if issubclass(KINDS[kind], KeepK) else {})
            )
            .eval()
            .encode(x)
        )
    assert (
        not f[x.isnan().any(-1)].isfinite().all(-1).any()
        and f[x.isfinite().all(-1)].isfinite().all()
    )


@given(array(size(2, 9), 3, of=ORDINARY | BAD), array(5, 3), st.booleans())
def test_measure_is_what_plain_loops_count(x, directions, relu):
    d = Directions(directions, relu)
    if not x.isfinite().all():
        return refuses(lambda: measure(d, x), "expected finite")
    if (x == x[0]).all():
        return refuses(lambda: measure(d, x), "not all the same")
    for some in (x[:1], x[:0], x[0]):
        refuses(lambda: measure(d, some), "not all the same")
        refuses(lambda: fvu(some, some), "not all the same")
    refuses(lambda: fvu(x, x[:1]), "of one shape")
    found, f = measure(d, x, batch=2), d.encode(x)
    left, all = (x - d.decode(f)).double().pow(2).sum(), (x - x.mean(0)).double().pow(2).sum()
    assert (
        found["fvu"] == pytest.approx((left / all).item(), rel=1e-3)
        and found["fvu"] == pytest.approx(fvu(x, d.decode(f)), rel=1e-3)
        and -1.001 <= found["cosine"] <= 1.001
    )
    assert (
        found["l0"] == pytest.approx((f != 0).sum().item() / len(x))
        and found["dead_share"] == pytest.approx((f == 0).all(0).float().mean().item())
        and torch.allclose(found["density"], (f != 0).float().mean(0))
    )


# ---- baselines
@given(
    array(size(0, 9), size(0, 4), of=ORDINARY | BAD),
    st.none() | size(1, 5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    size(1, 9),
)
def test_pca_explains_what_svd_does(x, n, dtype, batch):
    if not x.isfinite().all() or not 1 <= (n or x.shape[1]) <= min(x.shape):
        return refuses(lambda: pca(x.to(dtype), n), "pca: expected")
    if batch < (n or x.shape[1]):
        return refuses(lambda: pca(x.to(dtype), n, batch), "as many rows as directions")
    x, found = x.to(dtype), pca(x.to(dtype), n)
    torch.testing.assert_close(
        pca(x, n, batch).mean.double(), x.double().mean(0), atol=1e-4, rtol=1e-4
    )  # every row counts
    x = x.to(found.mean.dtype)
    centred = (x - x.mean(0)).double()
    left, tail = (
        (x - found.decode(found.encode(x))).double().pow(2).sum(),
        torch.linalg.svdvals(centred)[n or x.shape[1] :].pow(2).sum(),
    )
    assert found.directions.shape == (n or x.shape[1], x.shape[1]) and left.item() == pytest.approx(
        tail.item(), abs=1e-3 * (1 + centred.pow(2).sum().item())
    )


@given(array(size(), 3), array(size(1), 3), size(0, 4))
def test_pursuit_never_leaves_more_and_takes_k_at_most(x, directions, k):
    before = x.double().norm(dim=1)
    for steps in range(k + 1):
        f = pursue(x, directions, steps, batch=2)
        after = (x.double() - f.double() @ directions.double()).norm(dim=1)
        assert (
            f.shape == (len(x), len(directions))
            and ((f != 0).sum(1) <= steps).all()
            and (after <= before + 1e-4).all()
        )
        if steps == 1:
            torch.testing.assert_close(
                after**2,
                (
                    (x.double().norm(dim=1) ** 2)[:, None]
                    - (x.double() @ F.normalize(directions.double(), dim=1).T) ** 2
                ).amin(1),
                atol=1e-3,
                rtol=1e-4,
            )
        before = after


@given(array(size(), 3, of=ORDINARY | st.sampled_from([1e15, 1e-30])), array(size(1), 3))
def test_overlap_is_the_largest_cosine(a, b):
    found = overlap(Directions(a), Directions(b))
    want = [
        max(abs(float(F.normalize(u.double(), dim=0) @ F.normalize(v.double(), dim=0))) for v in b)
        for u in a
    ]
    assert (
        found.shape == (len(a),)
        and ((0 <= found) & (found < 1.0001)).all()
        and all(abs(w - g) < 1e-5 for u, w, g in zip(a, want, found.tolist()) if u.norm() > 1e-6)
    )


# ---- scores of concepts
def best_of(f, truth):
    "The best F1 over features, signs and thresholds, by trying all."
    return max(
        2 * ((s * f[:, j] >= t) & truth).sum() / ((s * f[:, j] >= t).sum() + truth.sum())
        for j in range(f.shape[1])
        for s in (1, -1)
        for t in s * f[:, j]
    )


@pytest.mark.filterwarnings("error")
@given(labelled(2, size(1, 3), of=ORDINARY | HUGE), size(1, 3))
def test_concept_scores_choose_the_best_and_score_it_elsewhere(told, at_least):
    f, truth = (t.numpy() for t in told)
    half, found = len(f) // 2, concept_scores(f, truth.astype(int), at_least=at_least, points=500)
    for c in range(truth.shape[1]):
        few = min(truth[:half, c].sum(), truth[half:, c].sum()) < at_least
        assert np.isnan(found["f1"][c]) == np.isnan(found["chosen_f1"][c]) == few
        if few:
            continue
        fires = found["sign"][c] * f[half:, found["feature"][c]] >= found["threshold"][c]
        assert found["chosen_f1"][c] == pytest.approx(best_of(f[:half], truth[:half, c])) and found[
            "f1"
        ][c] == pytest.approx(
            2 * (fires & truth[half:, c]).sum() / (fires.sum() + truth[half:, c].sum())
        )
        assert np.isnan(found["auroc"][c]) if truth[half:, c].all() else 0 <= found["auroc"][c] <= 1
    refuses(
        lambda: concept_scores(np.where(np.arange(len(f))[:, None] == 1, np.nan, f), truth),
        "finite",
    )
    refuses(lambda: concept_scores(f[:, :0], truth), "of the same tokens")
    refuses(lambda: concept_scores(f[:1], truth[:1]), "of the same tokens")
    refuses(lambda: concept_scores(f, truth[:-1]), "of the same tokens")
    refuses(lambda: concept_scores(f[:, 0], truth), "of the same tokens")


@given(
    labelled(4, size(1, 4), of=ORDINARY | HUGE), st.sampled_from([(1,), (1, 2), (2,), (0,), (5,)])
)
def test_sparse_probes_take_what_explains_most(told, ks):
    f, truth = told
    if not 1 <= min(ks) <= max(ks) <= f.shape[1]:
        return refuses(lambda: sparse_probes(f, truth, ks), "sparse_probes: ks")
    found, half = sparse_probes(f, truth, ks), len(f) // 2
    assert found["chosen"].shape == (truth.shape[1], max(ks)) and all(
        len(set(row)) == max(ks) for row in found["chosen"].tolist()
    )
    for k in (*ks, "all"):
        assert ((0 <= found[k]["f1"]) & (found[k]["f1"] <= 1)).all() and found[k][
            "fires"
        ].shape == truth[half:].shape
    same = sparse_probes(f, truth.long(), ks)
    assert torch.equal(found["chosen"], same["chosen"]) and torch.equal(
        found["all"]["f1"], same["all"]["f1"]
    )
    refuses(lambda: sparse_probes(f, truth[:-1], (1,)), "of the same tokens")
    refuses(lambda: sparse_probes(f[:1], truth[:1], (1,)), "of the same tokens")
    refuses(lambda: sparse_probes(f.clone().fill_(torch.nan), truth, (1,)), "finite")


@given(labelled(4, size(1, 3)), size(1, 3))
def test_feature_concepts_are_what_is_counted(told, at_least):
    f, truth = (t.numpy() for t in told)
    half = len(f) // 2
    asked = [
        c
        for c in range(truth.shape[1])
        if min(truth[:half, c].sum(), truth[half:, c].sum()) >= at_least
        and not truth[:half, c].all()
    ]
    if not asked:
        return refuses(lambda: feature_concepts(f, truth, at_least), "no concept holds")
    found = feature_concepts(f, truth.astype(int), at_least)
    refuses(lambda: feature_concepts(f * np.nan, truth, at_least), "finite")
    refuses(lambda: feature_concepts(f[:, :0], truth, at_least), "of the same tokens")
    assert (
        set(found["concept"]) <= set(asked)
        and all(np.isfinite(v).all() for v in found.values())
        and all(((0 <= found[k]) & (found[k] <= 1)).all() for k in ("precision", "recall", "f1"))
    )
    assert np.allclose(
        found["f1"],
        2
        * found["precision"]
        * found["recall"]
        / np.maximum(found["precision"] + found["recall"], 1e-12),
    )


@given(array(size(1), 3), st.randoms(use_true_random=False))
def test_the_same_directions_in_another_order_are_stable(a, draw):
    keep = a[a.norm(dim=1) > 0]
    if not len(keep):
        return
    order = list(range(len(keep)))
    draw.shuffle(order)
    found = stability([Directions(keep), Directions(-2 * keep[order])])
    assert found["stability"] == pytest.approx(1, abs=1e-5) and 0 <= found["random"] <= 1 + 1e-6
    refuses(lambda: stability([Directions(keep)]), "expected two")
    refuses(lambda: stability([Directions(keep), Directions(keep[:, :2])]), "of one width")
    for states in (torch.zeros(len(keep), 2), torch.zeros(len(keep) - 1, 3), torch.zeros(3)):
        refuses(
            lambda: stability([Directions(keep), Directions(keep)], states),
            "stability: expected states",
        )


# ---- explanations
@given(array(size(), of=ORDINARY | HUGE), array(size(), of=ORDINARY | HUGE))
def test_a_correlation_lies_between_its_bounds(a, b):
    if len(a) != len(b):
        return refuses(lambda: correlation(a, b), "as many predictions")
    r = correlation(a, b)
    assert (r is None) == (not len(a) or bool((a == a[0]).all() or (b == b[0]).all())) and (
        r is None or -1.0001 <= r <= 1.0001
    )
    if r is not None and max(a.abs().max(), b.abs().max()) < 100:
        assert r == pytest.approx(stats.pearsonr(a.double(), b.double())[0], abs=1e-6)


SCORES = st.lists(st.none() | ORDINARY, max_size=8)


@given(SCORES, SCORES, st.none() | ORDINARY)
def test_summaries_count_every_score(a, b, none):
    refuses(lambda: summary(a, none, 0), "at least 1")
    refuses(lambda: difference(a, b, none, n=0), "at least 1")
    one, two, gap = summary(a, none, 50), summary(b, none, 50), difference(a, b, none, n=50)
    kept = [none if s is None else s for s in a if s is not None or none is not None]
    assert (
        one["n"] == len(kept)
        and one["no_score"] == a.count(None)
        and (one["mean"] is None) == (not kept)
    )
    if kept:
        assert (
            one["mean"] == pytest.approx(np.mean(kept))
            and one["low"] <= one["high"]
            and min(kept) - 1e-9 <= one["low"]
            and one["high"] <= max(kept) + 1e-9
        )
    assert gap["mean"] == (
        None if None in (one["mean"], two["mean"]) else pytest.approx(one["mean"] - two["mean"])
    )


@given(array(size(2, 9), 2))
def test_moments_are_scipys(f):
    found = moments(f.numpy())
    for j in range(2):
        a = f[:, j].double().numpy()
        if np.ptp(a) > 0:
            assert [found[k][j] for k in ("mean", "variance", "skew", "kurtosis")] == pytest.approx(
                [a.mean(), a.var(), stats.skew(a), stats.kurtosis(a)], abs=1e-6
            )


@given(array(size(), of=ORDINARY | HUGE), st.floats(1e-3, 1e30))
def test_integers_are_0_to_10(a, top):
    for no in (0, -top, math.nan):
        refuses(lambda: integers(a.double().numpy(), no), "above 0")
    assert integers(a.double().numpy(), top) == [
        min(10, math.floor(10 * max(float(x), 0) / top + 1e-6)) for x in a.double()
    ]


class Knows(Explainer):
    "Told a feature's own activations as its explanation."

    def explain(self, features):
        return ["" for _ in features]

    def simulate(self, asks):
        return [[10.0 * ("!" in t) for t in tokens] for _, tokens in asks]


TOKENS = st.text(max_size=4) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "&amp;",
        '"',
        "'",
        "</span>",
        "<b",
        "\n",
        "\r\n",
        "--><!--",
        "]]>",
        " onload=x",
        "\x00",
        "‮",
    ]
)
FRAGMENT = st.lists(TOKENS, min_size=1, max_size=5).map(
    lambda tokens: Fragment(tokens, [float("!" in t) for t in tokens])
)


@given(
    st.lists(
        st.none()
        | st.builds(
            Case,
            st.integers(0, 99),
            st.just([Fragment(["a!"], [10])]),
            st.lists(FRAGMENT, max_size=3),
            st.lists(FRAGMENT, max_size=3),
            st.lists(
                FRAGMENT.map(
                    lambda f: Fragment(
                        [t.replace("!", "?") for t in f.tokens], [0.0] * len(f.tokens)
                    )
                ),
                max_size=3,
            ),
            st.just(5),
        ),
        max_size=3,
    )
)
def test_who_knows_a_feature_scores_1_or_there_is_no_score(cases):
    rows, why = interpret(cases, Knows()), [""] * sum(c is not None for c in cases)
    judged = detection(cases, why, Knows()), fuzzing(cases, why, Knows())
    for c, row, *scores in zip(cases, rows, *judged):
        assert (c is None) == (row is None) and (c is not None or scores == [None, None])
        if c is None:
            continue
        acts = [a for f in c.score for a in f.acts]
        assert row["r"] == (None if len(set(acts)) < 2 else pytest.approx(1)) and scores[1] in (
            None,
            1.0,
        )
        assert (
            scores[0] is None
            if not (c.score and c.silent)
            else scores[0] == pytest.approx(np.mean([1.0 if max(f.acts) else 0.5 for f in c.score]))
        )


@given(
    array(size(0, 30), size(0, 2), of=ORDINARY | BAD),
    size(1, 4),
    size(0, 4),
    st.lists(size(0, 4), max_size=12),
)
def test_cases_explain_from_other_fragments_than_they_score_by(f, n_top, n_random, lengths):
    words, f = [[f"w{i}.{t}" for t in range(n)] for i, n in enumerate(lengths)], f.numpy()
    if not lengths or len(f) != sum(lengths) or not np.isfinite(f).all() or 0 in lengths:
        return refuses(lambda: make_cases(f, words, n_top=n_top, n_random=n_random), "make_cases: ")
    check_cases(f, words, lengths, n_top=n_top, n_random=n_random)


@given(
    size(1, 8).flatmap(
        lambda n: st.tuples(st.lists(size(1, 4), min_size=n, max_size=n), st.integers(0, 999))
    ),
    size(1, 4),
    size(0, 4),
)
def test_cases_of_what_fits(lengths_and_seed, n_top, n_random):
    lengths, seed = lengths_and_seed
    check_cases(
        np.random.default_rng(seed).integers(-3, 4, (sum(lengths), 2)).astype(float),
        [[f"w{i}.{t}" for t in range(n)] for i, n in enumerate(lengths)],
        lengths,
        n_top=n_top,
        n_random=n_random,
    )


def check_cases(f, words, lengths, *, n_top, n_random):
    most = np.array([part.max(0) for part in np.split(f, np.cumsum(lengths)[:-1])])
    for j, case in enumerate(make_cases(f, words, n_top=n_top, n_random=n_random)):
        assert (case is None) == ((most[:, j] > 0).sum() < n_top)
        if case is None:
            continue
        used = [fr.tokens[0] for fr in case.explain + case.score + case.silent]
        assert (
            len(used) == len(set(used))
            and len(case.random) <= n_random
            and len(case.silent) <= len(case.score)
            and all(set(fr.acts) <= set(range(11)) and max(fr.acts) > 0 for fr in case.explain)
        )
        assert (
            all(max(fr.acts) > 0 for fr in case.score)
            and all(max(fr.acts) <= 0 for fr in case.silent)
            and max(max(fr.acts) for fr in case.explain) == 10
        )


# ---- pages
class Read(HTMLParser):
    "What a browser makes of a page: its elements, and the text in each of some."

    def __init__(self, source):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.text.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, "closed"))

    def handle_data(self, data):
        self.text[-1:] = [(self.text or [""])[-1] + data]

    def handle_comment(self, data):
        self.tags.append(("comment", data))

    handle_decl = handle_pi = unknown_decl = handle_comment


def shown(text):
    return str(text).replace("\n", "⏎")


@given(TOKENS)
def test_escaped_text_is_text(token):
    read = Read(f"<i>{show.escape(token)}</i>")
    assert (
        read.tags == [("i", ())]
        and read.text == [shown(token)]
        and not set(show.escape(token)) & set("<>\"'\n")
    )


@given(st.lists(TOKENS, min_size=1, max_size=4), st.data(), st.none() | st.floats(0.1, 9), TOKENS)
def test_a_strip_shows_any_tokens_as_text(tokens, data, top, title):
    values = data.draw(
        array(size(0, 5) if data.draw(st.booleans()) else len(tokens), of=ORDINARY | HUGE)
    )
    refuses(lambda: show.strip([], []), "one value per token")
    refuses(lambda: show.table([]), "no rows")
    refuses(lambda: show.beside({}), "no texts")
    if len(values) != len(tokens):
        return refuses(lambda: show.strip(tokens, values, title, top=top), "one value per token")
    read = Read(show.strip(tokens, values, title, top=top).source)
    assert read.tags == [("div", ("style",)), ("b", ()), ("br", ())] + [
        ("span", ("title", "style"))
    ] * len(tokens) and read.text[1] == shown(title)
    assert [t if i == len(tokens) - 1 else t[:-1] for i, t in enumerate(read.text[3:])] == [
        shown(t) for t in tokens
    ]


@given(
    st.lists(TOKENS, min_size=1, max_size=3, unique=True).flatmap(
        lambda keys: st.lists(
            st.fixed_dictionaries({k: TOKENS | st.none() | ORDINARY | st.integers() for k in keys}),
            min_size=1,
            max_size=3,
        )
    ),
    TOKENS,
)
def test_a_table_shows_any_cells_as_text(rows, title):
    read = Read(show.table(rows, title).source)
    assert {tag for tag, _ in read.tags} <= {
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    } and not any(names for _, names in read.tags)
    cells = [text for (tag, _), text in zip(read.tags, read.text) if tag == "td"]
    assert len(cells) == len(rows) * len(rows[0]) and all(
        cell == shown(v)
        for cell, v in zip(cells, [row[k] for row in rows for k in rows[0]])
        if isinstance(v, str)
    )


@given(
    st.dictionaries(
        TOKENS,
        st.lists(TOKENS | st.sampled_from("abc"), max_size=6).map(" ".join),
        min_size=1,
        max_size=3,
    )
)
def test_texts_beside_one_another_are_text(texts):
    assert {tag for tag, _ in Read(show.beside(texts).source).tags} <= {
        "table",
        "tr",
        "td",
        "b",
        "br",
        "mark",
    }


WORDS = st.lists(st.sampled_from("abcd") | TOKENS, max_size=8)


@given(WORDS, WORDS)
def test_marked_words_are_those_the_other_lacks(a, b):
    left, right = show.marked(a, b)

    def plain(side):
        return [w for w, new in side if not new]

    assert (
        [w for w, _ in left] == a
        and [w for w, _ in right] == b
        and plain(left) == plain(right)
        and (a != b or plain(left) == a)
    )


# ---- the stories' language
TOK = make_tokenizer()


@given(
    st.integers(0, 10**6),
    st.sampled_from(["train", "test"]),
    st.sampled_from(["train", "held_out"]),
)
def test_stories_come_back_from_their_tokens(seed, split, pairs):
    for story in islice(stories(seed, split, pairs), 3):
        assert (
            TOK(story.text, add_special_tokens=False)["input_ids"] == story.ids.tolist()
            and TOK.decode(story.ids) == story.text
            and not (story.ids == VOCABULARY.index("<unk>")).any()
        )


@given(st.lists(st.integers(3, len(VOCABULARY) - 1), max_size=12))
def test_any_words_come_back_from_what_is_written(ids):
    assert TOK(TOK.decode(ids), add_special_tokens=False)["input_ids"] == ids


@given(
    st.text(max_size=40) | st.lists(st.sampled_from(VOCABULARY) | TOKENS, max_size=8).map(" ".join)
)
def test_any_text_has_tokens(text):
    ids = TOK(text, add_special_tokens=False)["input_ids"]
    assert (
        all(0 <= i < len(VOCABULARY) for i in ids)
        and isinstance(TOK.decode(ids), str)
        and len(ids) <= len(text)
    )


@given(
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=6), max_size=6), st.integers(-1, 12)
)
def test_rows_hold_every_document_once_in_its_order(docs, length):
    if docs and length < max(map(len, docs)) + 2:
        return refuses(lambda: list(fill_rows(docs, length, 1, pad=0)), "has room for")
    rows = list(fill_rows(docs, length, 1, pad=0))
    text = "".join(map(str, (t for row in rows for t in row))).replace("0", "")
    assert all(len(row) == length and row[0] == 1 for row in rows) and [
        d for d in text.split("1") if d
    ] == ["".join(map(str, d)) for d in docs]


# ---- the machine
@given(
    st.integers(-1, 102), st.integers(-1, 12), size(0, 4), st.integers(1, 12), st.integers(0, 99)
)
def test_walks_follow_edges_and_read_back(n_states, n_edges, n, length, seed):
    if not 1 <= n_edges <= n_states <= 100:
        return refuses(lambda: TokFSM(n_states, n_edges, seed), "TokFSM: expected")
    fsm = TokFSM(n_states, n_edges, seed)
    states = fsm.walk(n, length, seeded(seed))
    ids = fsm.tokens(states)
    assert (
        (fsm.legal.sum(1) == n_edges).all()
        and torch.equal(state_labels(ids)[:, 2::2], states)
        and (state_labels(ids)[:, 1::2] == -1).all()
        and legal_steps(ids, fsm).shape == (n, length - 1)
        and (legal_steps(ids, fsm) == 1).all()
    )
    assert torch.equal(
        fsm.sample(n, length, seeded(seed)),
        fsm.tokens(fsm.walk(n, max(1, length // 2), seeded(seed)))[:, :length],
    )
    refuses(lambda: fsm.walk(n, 0), "at least 1")
    refuses(lambda: bayes(fsm, 1), "at least 2")
    if length > 1:
        loss, accuracy = bayes(fsm, length)
        assert 0 <= loss <= math.log(10) and 0.1 - 1e-9 <= accuracy <= 1 + 1e-9


@given(array(size(1, 9), size(0, 2), of=ORDINARY | HUGE), st.data())
def test_detectors_are_what_plain_loops_count(acts, data):
    labels = torch.tensor(
        data.draw(st.lists(st.integers(-1, 2), min_size=len(acts), max_size=len(acts)))
    )
    scores, thresholds = best_f1(acts, labels, 3)
    if acts.numel():
        refuses(lambda: best_f1(acts * math.nan, labels, 3), "finite")
    for j in range(acts.shape[1]):
        for s in range(3):
            own = (labels == s).numpy()
            tried = [
                2
                * ((acts[:, j] >= t).numpy() & own).sum()
                / ((acts[:, j] >= t).sum().item() + own.sum())
                for t in acts[:, j]
            ]
            assert (
                scores[j, s].item() == pytest.approx(max(tried)) and thresholds[j, s] in acts[:, j]
            )
        precision, recall, f1 = detector_scores(acts[:, j, None] >= thresholds[j], labels, 3)
        assert torch.allclose(f1, scores[j]) and torch.allclose(
            f1 * (precision + recall), 2 * precision * recall
        )


@given(array(size(1, 4), 5, of=st.integers(0, 9)), array(size(1, 4), 5, of=st.integers(0, 9)))
def test_divergences_are_symmetric_and_at_most_1(a, b):
    a, b = (F.normalize(x[: min(len(a), len(b))].double() + 1e-300, p=1, dim=-1) for x in (a, b))
    found = jsd(a, b)
    assert (
        torch.allclose(found, jsd(b, a))
        and (found >= 0).all()
        and (found <= 1 + 1e-9).all()
        and torch.equal(jsd(a, a), torch.zeros(len(a), dtype=torch.double))
    )
