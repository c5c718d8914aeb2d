"""Costs counted without computing, the cost model, memory.

Text that is changed, features that are trusted, the attack by one word."""

import os

import numpy as np
import pytest
import torch

from codebook_tutorial.dictionary.base import Directions
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.feature.detect import fires
from codebook_tutorial.score import robust
from codebook_tutorial.score.robust import (
    in_cipher,
    one_word_attack,
    relied_on,
    stories_of,
    story_changes,
    trusted,
    with_typos,
    with_words_shuffled,
)
from codebook_tutorial.score.scale import (
    CostModel,
    blank,
    count,
    measured_bytes,
    one_pass,
    training_bytes,
)
from codebook_tutorial.world.concepts import ATOMS
from codebook_tutorial.world.grammar import ID, MARKS, TOPICS

SMALL = ((64, 2, 4), 300)


@pytest.mark.parametrize(
    "name,parameters",
    [("pythia-70m", 70_426_624), ("pythia-410m", 405_334_016), ("pythia-1.4b", 1_414_647_808)],
)
def test_blank_models_are_as_large_as_the_published_ones(name, parameters):
    model = blank(name)
    assert sum(p.numel() for p in model.parameters()) == parameters and all(
        p.is_meta for p in model.parameters()
    )
    with pytest.raises(ValueError, match="blank: size='pythia-7b', expected one of pythia-70m"):
        blank("pythia-7b")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    "codes", [None, dict(n_codes=50, k=1), dict(n_codes=50, k=4, select="residual", learn="ema")]
)
def test_a_count_without_computing_is_that_of_the_real_run(codes, train):
    found = {}
    for where in ("meta", "cpu"):
        model = blank(*SMALL, device=where)
        if codes:
            model = add_codebooks(model, ["heads.*", "mlp.*"], **codes)
        found[where] = count(one_pass(model, 2, 32, train=train))
        assert next(model.parameters()).device.type == where
    assert found["meta"]["flops"] == found["cpu"]["flops"] > 0
    for key in ("bytes", "calls", "peak"):
        assert found["meta"][key] == pytest.approx(found["cpu"][key], rel=0.15), (
            key
        )  # argmax by numpy is no call of torch


def test_what_is_counted():
    x, w = torch.randn(10, 20), torch.randn(20, 30)
    assert count(lambda: x @ w) == dict(flops=2 * 10 * 20 * 30, bytes=0, calls=1, peak=4 * 300)
    assert count(lambda: (x + x).T.reshape(-1)) == dict(
        flops=0, bytes=4 * 200 * 3 + 4 * 200 * 2, calls=2, peak=2 * 800
    )  # views are free, a copy is not

    def first_layer():
        w.T
        w.grad.zero_()
        return x @ w.T.T

    w.grad = torch.zeros_like(w)
    assert (
        count(first_layer)["peak"] == 4 * 300
    )  # a view of what was there before is nothing new, nor is what is written into it

    def chain():
        y = x
        for _ in range(5):
            y = y * 2.0

    assert count(chain)["peak"] == 2 * 800  # what is not needed any more is not counted


def test_codes_add_what_the_formula_says():
    d, layers, C = 128, 3, 700
    model = blank((d, layers, 4), 50)
    own, length = count(one_pass(model, length=64))["flops"], 64
    added = (
        count(one_pass(add_codebooks(model, ["heads.*", "mlp.*"], C), length=length))["flops"] - own
    )
    assert added == 2 * layers * 2 * C * d * length


def test_prices_are_found_again_and_bad_data_is_refused():
    g = np.random.default_rng(0)
    counts = [
        dict(flops=f, bytes=b, calls=c)
        for f, b, c in np.exp(g.normal(0, 2, (40, 3))) * [1e9, 1e8, 1e3]
    ]
    taken = [1e-11 * c["flops"] + 2e-10 * c["bytes"] + 3e-5 * c["calls"] for c in counts]
    cost = CostModel().fit(counts, taken)
    assert (
        cost.prices == pytest.approx([1e-11, 2e-10, 3e-5], rel=1e-6)
        and cost.error(counts, taken) < 1e-6
    )
    assert (
        cost.error(counts, [2 * t for t in taken]) == pytest.approx(np.log(2))
        and (CostModel(("flops", "calls")).fit(counts, taken).prices >= 0).all()
    )
    with pytest.raises(ValueError, match="nothing was fitted yet"):
        CostModel().predict(counts)
    with pytest.raises(ValueError, match="as many times as counts"):
        CostModel().fit(counts, taken[:-1])
    with pytest.raises(ValueError, match="times above 0, got 0"):
        CostModel().fit(counts, [0.0, *taken[1:]])


@pytest.mark.parametrize(
    "codes", [None, dict(n_codes=100, k=1), dict(n_codes=100, k=1, learn="ema")]
)
def test_memory_is_the_sum_of_its_parts(codes):
    model = blank(*SMALL)
    own = sum(p.numel() for p in model.parameters())
    if codes:
        model = add_codebooks(model, "mlp.*", **codes)
    need, half = training_bytes(model, 4, 32), training_bytes(model, 4, 32, shards=2)
    learnt = own + (2 * 100 * 64 if codes and "learn" not in codes else 0)
    assert (
        need["gradients"] == 4 * learnt
        and need["moments"] == 8 * learnt
        and need["weights"] == 4 * learnt
        and need["others"] >= (4 * 3 * 2 * 100 * 64 if codes and "learn" in codes else 0)
        and need["total"] == sum(v for k, v in need.items() if k != "total")
    )
    assert (
        half["activations"] == need["activations"]
        and half["weights"] == need["weights"] / 2
        and half["others"] == need["others"]
    )
    assert training_bytes(model, 8, 32)["activations"] > 1.6 * need["activations"] > 0


def test_the_count_of_memory_is_near_what_training_takes():
    counted = training_bytes(blank((128, 2, 4), 2000), 16, 256)["total"]
    was = dict(os.environ)
    assert (
        0.9 * counted < measured_bytes((128, 2, 4), 2000, rows=16, length=256) < 1.2 * counted
        and os.environ == was
    )


# ---- changed text
@pytest.fixture(scope="module")
def plain():
    return stories_of(TOPICS[:5], 6000)


def test_changes_change_what_they_say_and_no_more(plain):
    text = plain.text
    spelt, there = with_typos(text, 0.3, ID["<unk>"], seed=1)
    hit = spelt.ids != text.ids
    assert (
        0.25 < hit.sum() / text.n_tokens < 0.35
        and (spelt.ids[hit] == ID["<unk>"]).all()
        and text.mask[hit].all()
        and not there[hit].any()
    )
    mixed, order = with_words_shuffled(text, 1)
    assert (
        torch.equal(mixed.mask, text.mask)
        and torch.equal(text.ids.flatten()[order], mixed.ids)
        and torch.equal(order.flatten().sort().values, torch.arange(order.numel()))
    )
    document = (~text.mask).flatten().cumsum(0).view_as(text.ids)
    assert (
        torch.equal(document.flatten()[order], document)
        and (mixed.ids != text.ids)[text.mask].float().mean() > 0.5
    )  # inside a document
    words = [i for w, i in ID.items() if w not in MARKS and i > 2]
    other = in_cipher(text, words, 1)
    pairs = set(zip(text.ids.flatten().tolist(), other.ids.flatten().tolist()))
    assert (
        len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
        and all(a == b for a, b in pairs if a not in words)
        and torch.equal(other.mask, text.mask)
    )
    with pytest.raises(ValueError, match="a rate between 0 and 1, got 3"):
        with_typos(text, 3, 2)


def test_what_is_still_known_of_changed_stories(plain):
    changes = story_changes(6000)
    family = np.array([n.split("=")[0] for n in ATOMS])

    def word(c):
        return c.text.ids[c.text.mask]

    table = torch.tensor([w in MARKS for w in ID])
    for name, c in changes.items():
        assert (
            c.truth.shape[:2] == c.text.ids.shape == c.there.shape
            and len(c.asked) == len(ATOMS)
            and c.asked.any()
        ), name
        mark = c.truth[c.text.mask][:, family == "mark"].any(-1)[c.there[c.text.mask]]
        assert torch.equal(mark, table[word(c)][c.there[c.text.mask]]), (
            name
        )  # what the word itself decides goes with the word

    def topic(c):
        return {
            ATOMS[i]
            for i in np.flatnonzero(c.truth[c.text.mask].any(0).numpy())
            if ATOMS[i].startswith("story_topic")
        }

    assert len(topic(changes["as it is"])) == len(
        topic(changes["other topics"])
    ) == 5 and not topic(changes["as it is"]) & topic(changes["other topics"])
    assert not changes["words shuffled"].asked[family == "story_topic"].any() and set(
        family[changes["another language"].asked]
    ) == set(robust.OF_FORM)


def test_trusted_features_are_judged_where_nothing_was_chosen():
    """Against plain loops, on features of which one follows a concept,
    one does so in the first half alone, and the rest are noise."""
    g = np.random.default_rng(0)
    truth = g.random((800, 3)) < 0.2
    f = g.random((800, 5)) * 0.4
    f[:, 0] += truth[:, 0]
    f[:400, 1] += truth[:400, 1]
    best = trusted(f, truth)
    assert best["good"].tolist() == [True, False, False] and best["feature"][0] == 0
    later, known = g.random((300, 5)) * 0.4, g.random((300, 3)) < 0.2
    later[:200, 0] += known[:200, 0]
    got, on = relied_on(best, later, known, asked=np.ones(3, bool)), fires(best, later)[:, 0]
    assert (
        got["n"] == 1
        and got["precision"] == pytest.approx(known[on, 0].mean())
        and got["recall"] == pytest.approx(on[known[:, 0]].mean())
        and got["base"] == pytest.approx(known[:, 0].mean())
    )
    assert relied_on(best, later * 0, known, asked=np.ones(3, bool)) == dict(
        precision=None, recall=0.0, base=pytest.approx(known[:, 0].mean()), n=1, silent=1
    )
    assert relied_on(best, later, known, asked=np.zeros(3, bool))["n"] == 0


def test_one_word_silences_what_reads_the_word_before_and_nothing_else(plain, monkeypatch):
    """Two dictionaries of made-up states:
    one reads the word alone, one is silent behind words with an odd number."""
    c = ATOMS.index("mark=.")

    def states(model, text, site, *, batch=0):
        own = (text.ids == ID["."]).float()
        return torch.stack([own, own * (text.ids.roll(1, 1) % 2 == 0)], -1)[text.mask]

    monkeypatch.setattr(robust, "states_of", states)

    def of(i):
        return Directions(torch.eye(2)[i : i + 1]), dict(
            good=np.arange(len(ATOMS)) == c,
            feature=np.zeros(len(ATOMS), int),
            sign=np.ones(len(ATOMS)),
            threshold=np.full(len(ATOMS), 0.5),
        )

    got = one_word_attack(
        torch.nn.Linear(1, 1),
        "resid.0",
        plain.text,
        truth=plain.truth,
        dictionaries={"word": of(0), "both": of(1)},
        n=12,
        words=60,
    )
    assert got["word"] == dict(asked=12, worst=0.0, usual=0.0)
    assert (
        0 < got["both"]["asked"] < 12
        and got["both"]["worst"] == 1
        and 0.3 < got["both"]["usual"] < 0.7
    )
