"Counting, choosing on one half and scoring on the other: every number against a plain loop."

import numpy as np
import pytest
import torch

from codebook_tutorial.feature.detect import (
    Best,
    auroc,
    best_thresholds,
    check_by,
    checked,
    concept_scores,
    count,
    fires,
    hits_by_bin,
    often,
    rank_picks,
    ranked,
    scores,
    scores_of,
    search_value,
    sparse_truth,
)


def drawn(seed=0, n=300, f=5, *, c=4):
    """Features in steps of one half, so that there are ties, and concepts:
    two told, one always, one never."""
    g = np.random.default_rng(seed)
    values = np.round(2 * g.normal(size=(n, f))) / 2
    truth = np.stack([values[:, i % f] + g.normal(size=n) > 1 for i in range(c)], 1)
    truth[:, c - 2], truth[:, c - 1] = True, False
    return values, truth


# ---- scores
def test_scores_by_hand_for_numbers_arrays_and_tensors():
    want = dict(precision=[0.75, 0.0, 0.0], recall=[0.6, 0.0, 0.0], f1=[6 / 9, 0.0, 0.0])
    hits, active, marked = [3, 0, 0], [4, 7, 0], [5, 5, 0]
    assert [scores(3, 4, 5)[k] for k in want] == pytest.approx([v[0] for v in want.values()])
    for make in (np.array, torch.tensor):
        got = scores(make(hits), make(active), make(marked))
        assert {k: v.tolist() for k, v in got.items()} == {
            k: pytest.approx(v) for k, v in want.items()
        }
    assert scores(np.array([3]), np.array([4]), 5)["f1"] == pytest.approx([6 / 9])


@pytest.mark.parametrize("n", [0, 1, 50])
def test_sparse_and_dense_counts_are_those_of_a_loop(n):
    g = np.random.default_rng(n)
    on, truth = g.random((n, 6)) < 0.3, g.random((n, 3)) < 0.4
    if n:
        on[:, 4], on[:, 5], truth[:, 2] = True, False, True
    places, features = torch.from_numpy(on).nonzero().unbind(1)
    mixed = torch.randperm(len(places))  # in any order
    hits, active = count(places[mixed], features[mixed], torch.from_numpy(truth), n_feats=7)
    assert hits.shape == (7, 3) and active.tolist() == [*on.sum(0), 0]
    sparse = scores(hits, active[:, None], torch.from_numpy(truth).sum(0))
    for j in range(6):
        for c in range(3):
            h = sum(bool(a and b) for a, b in zip(on[:, j], truth[:, c]))
            assert hits[j, c] == h
            dense = scores_of(on[:, j], truth[:, c])
            same = scores_of(*(torch.from_numpy(t) for t in (on[:, j], truth[:, c])))
            for key in dense:
                assert dense[key] == pytest.approx(same[key].item()), key
                assert dense[key] == pytest.approx(sparse[key][j, c].item()), key


def test_concepts_that_are_rare_in_either_half_are_left_out():
    truth = np.zeros((20, 4), bool)
    truth[[0, 1, 10, 11], 0] = True
    truth[[0, 1, 2, 3], 1] = True  # in one half alone
    truth[:, 2] = True
    assert often(truth, 2).tolist() == [True, False, True, False]
    assert often(truth, 2, half=2).tolist() == [True, True, True, False]
    assert often(truth, 0).all() and not often(truth, 11).any()


# ---- choosing
@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_the_best_is_kept_with_what_came_with_it_and_the_first_wins_a_tie(make):
    best = Best()
    best.offer(make([1.0, -np.inf, 0.0]), feature=0, at=make([7.0, 8.0, 9.0]))
    best.offer(make([1.0, 0.5, -1.0]), feature=1, at=make([1.0, 2.0, 3.0]))
    best.offer(make([0.0, 0.6, 0.0]), feature=2, at=make([4.0, 5.0, 6.0]))
    assert best["value"].tolist() == pytest.approx([1.0, 0.6, 0.0])
    assert best["feature"].tolist() == [0, 2, 0] and best["at"].tolist() == [7.0, 5.0, 9.0]


def test_what_is_chosen_has_the_recall_that_is_asked_for_if_any_has():
    hits, active = np.array([1, 5, 9]), np.array([1, 10, 90])
    how = dict(by="precision", allowed=np.ones(3, bool))
    assert search_value(hits, active, 10, min_recall=0.05, **how).argmax() == 0
    assert search_value(hits, active, 10, min_recall=0.2, **how).argmax() == 1
    assert search_value(hits, active, 10, min_recall=0.95, **how).argmax() == 2  # highest recall
    how["allowed"] = np.array([False, True, False])
    assert search_value(hits, active, 10, min_recall=0.95, **how).argmax() == 1
    with pytest.raises(ValueError, match="who: by='best', expected 'precision'"):
        check_by("best", "who")


# ---- thresholds and ranks
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("points", [5, 2000])
def test_the_best_thresholds_are_those_of_a_loop(seed, points):
    f, truth = drawn(seed)
    picks, known = rank_picks(len(f), points), sparse_truth(truth)
    for j in range(f.shape[1]):
        found = dict(zip((1, -1), best_thresholds(ranked(f[:, j]), known, picks, signs=(1, -1))))
        for sign, (f1, threshold) in found.items():
            v = sign * f[:, j]
            tried = np.sort(v)[::-1][picks - 1]  # the values at these ranks from the top
            for c in range(truth.shape[1] - 1):
                want = [scores_of(v >= t, truth[:, c])["f1"] for t in tried]
                assert f1[c] == pytest.approx(max(want))
                assert scores_of(v >= threshold[c], truth[:, c])["f1"] == pytest.approx(f1[c])
        ((alone, _),) = best_thresholds(ranked(f[:, j]), known, picks)
        assert np.array_equal(alone, found[1][0])


def test_auroc_is_the_share_of_pairs_and_ties_count_half():
    f, truth = drawn(4)
    for j in range(f.shape[1]):
        got = auroc(ranked(f[:, j]), sparse_truth(truth))
        for c in range(2):
            gap = np.subtract.outer(f[truth[:, c], j], f[~truth[:, c], j])
            assert got[c] == pytest.approx(((gap > 0) + 0.5 * (gap == 0)).mean())
    assert auroc(ranked(np.ones(9)), sparse_truth(np.arange(9)[:, None] < 4)) == [0.5]


def test_tokens_are_counted_by_bin():
    truth = np.array([[1, 0], [1, 1], [0, 1], [1, 0]], bool)
    assert hits_by_bin(np.array([2, 0, 1, 2]), 3, sparse_truth(truth)).tolist() == [
        [1, 0, 2],
        [1, 1, 0],
    ]
    assert hits_by_bin(np.array([2, 0]), 3, sparse_truth(truth[:2, :0])).shape == (0, 3)


# ---- all together
def test_features_of_concepts_and_where_they_fire():
    f, truth = drawn(5, n=600)
    best, half = concept_scores(f, truth, points=1000), 300
    assert best["skipped"] == 1 and np.isnan(best["f1"][3]) and best["feature"][3] == -1
    assert np.isnan(best["auroc"][2]) and best["f1"][2] == 1  # what always holds has no others
    on = fires(best, f[half:])
    assert on.shape == (300, 4) and not on[:, 3].any()
    assert scores_of(on, truth[half:])["f1"][:3] == pytest.approx(best["f1"][:3])
    assert scores_of(fires(best, f[:half]), truth[:half])["f1"][:3] == pytest.approx(
        best["chosen_f1"][:3]
    )
    nothing = concept_scores(f, truth, at_least=400)
    assert nothing["skipped"] == 4 and np.isnan(nothing["f1"]).all()


def test_a_feature_that_never_changes_fires_always():
    truth = np.arange(100)[:, None] % 2 == 0
    best = concept_scores(np.zeros((100, 1)), truth)
    assert best["f1"][0] == pytest.approx(2 / 3) and best["auroc"][0] == 0.5
    assert fires(best, np.zeros((4, 1))).all()


@pytest.mark.parametrize(
    "f,truth,says",
    [
        (np.zeros((10, 2)), np.zeros((9, 2)), "of the same tokens, got"),
        (np.zeros(10), np.zeros((10, 2)), "of the same tokens, got"),
        (np.zeros((10, 0)), np.zeros((10, 2)), "of the same tokens, got"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "N at least 2"),
        (np.full((10, 2), np.inf), np.zeros((10, 2)), "expected finite numbers"),
    ],
)
def test_what_does_not_fit_is_named(f, truth, says):
    with pytest.raises(ValueError, match=says) as e:
        checked("who", f, truth)
    assert str(e.value).startswith("who: ")
