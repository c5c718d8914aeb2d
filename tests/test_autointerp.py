"""The protocol of chapter 09 against slow forms, its scorers where the answer is known,
the language of predicates, puzzles and pages."""

import math
import re

import numpy as np
import pytest
import torch

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.dictionary.baselines import ica, pca
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.feature.explain.concepts import concept_fit, feature_concepts
from codebook_tutorial.feature.explain.protocol import (
    Case,
    Explainer,
    Fragment,
    fragments,
    integers,
    make_cases,
    pieces,
    some_features,
)
from codebook_tutorial.feature.explain.puzzles import PUZZLES, Puzzle, puzzle_cases, solve
from codebook_tutorial.feature.explain.rules import (
    PREDICATES,
    PredicateExplainer,
    story_words,
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
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.show.features import explained_strips, export_features, feature_table

BOS, PAD = 1, 0


# ---- fragments
def rows_of(*rows):
    return Text(torch.tensor(rows), BOS, PAD)


def test_one_fragment_a_document():
    text = rows_of(
        [BOS, *range(10, 19), BOS, 20, 21, BOS, PAD],
        [30, 31, BOS, 40, 41, 42, 43, 44, 45, 46, 47, 48, BOS, 50, BOS],
    )  # the second row goes on in the middle of a document
    got = fragments(text, length=4, seed=0)
    docs = [
        list(range(10, 19)),
        [20, 21],
        list(range(40, 49)),
        [50],
    ]  # [30, 31] began somewhere else, where it has had its chance
    assert len(got) == 4 and got.ids.shape == (4, 5) and (got.ids[:, 0] == BOS).all()
    for row, doc in zip(got.ids[:, 1:].tolist(), docs):
        own = [i for i in row if i != PAD]
        assert len(own) == min(4, len(doc)) and own == doc[doc.index(own[0]) :][: len(own)]
    starts = {fragments(text, 4, seed).ids[0, 1].item() for seed in range(60)}
    assert starts == set(range(10, 16)), "any offset that leaves a whole fragment, and no other"
    assert torch.equal(fragments(text, 4, 3).ids, fragments(text, 4, 3).ids)


def test_no_fragment_twice_and_what_is_refused():
    assert len(fragments(rows_of([BOS, 5, 6, BOS, 5, 6, BOS, 7]))) == 2
    with pytest.raises(ValueError, match="no document begins"):
        fragments(rows_of([BOS, PAD, PAD]))
    with pytest.raises(ValueError, match="length of 1"):
        fragments(rows_of([BOS, 5]), 0)


def test_pieces_are_what_the_model_reads():
    model, tok = load_lm("stories")
    text = fragments(load_text(tok, n_tokens=4000, length=256))
    words = pieces(text, tok)
    assert [len(w) for w in words] == text.mask.sum(1).tolist()
    assert [tok.convert_tokens_to_ids(w.strip()) for w in words[3]] == text.ids[3][
        text.mask[3]
    ].tolist()


def test_some_features():
    x, d = torch.randn(50, 8, generator=seeded(0)), random_directions(30, 8)
    f, ids = some_features(d, x, 12, seed=1, batch=7)
    assert (
        f.shape == (50, 12)
        and len(set(ids)) == 12
        and ids == sorted(ids)
        and np.allclose(f, d.encode(x)[:, ids], atol=1e-6)
    )
    assert some_features(d, x, 12, seed=2)[1] != ids and some_features(d, x, 150)[1] == list(
        range(30)
    )
    with pytest.raises(ValueError, match="some_features"):
        some_features(d, torch.full((3, 8), torch.nan))


# ---- cases
def planted(n=60, length=6, seed=0):
    """A feature active in the first 40 fragments, at one token each,
    with the fragment's rank for its height."""
    words, f = (
        [[f"w{i}.{t}" for t in range(length)] for i in range(n)],
        np.zeros((n * length, 1), np.float32),
    )
    heights = np.random.default_rng(seed).permutation(40) + 1
    for i, h in enumerate(heights):
        f[i * length + i % length] = h
    return words, f, heights


def test_ranks_explain_and_score_and_random_ones_are_others():
    words, f, heights = planted()
    (case,) = make_cases(f, words, [7])
    rank = {f"w{i}": int((heights > h).sum()) for i, h in enumerate(heights)}

    def ranks(some):
        return [rank.get(fr.tokens[0].split(".")[0]) for fr in some]

    assert (
        case.feature == 7
        and case.active == 40
        and ranks(case.explain) == [0, 4, 8, 12, 16]
        and ranks(case.top) == [2, 6, 10, 14, 18]
    )
    assert (
        len(case.random) == 5
        and all(r >= 20 for r in ranks(case.random))
        and len(set(ranks(case.random))) == 5
    )
    assert (
        len(case.silent) == 10
        and set(ranks(case.silent)) == {None}
        and all(max(fr.acts) == 0 for fr in case.silent)
    )
    assert [max(fr.acts) for fr in case.explain] == [10, 9, 8, 7, 6] and max(case.top[0].acts) == 38
    assert make_cases(f, words, [7])[0] == case and [
        r.tokens for r in make_cases(f, words, [7], seed=1)[0].random
    ] != [r.tokens for r in case.random]


def test_silent_fragments_are_as_long_as_those_that_score():
    draw = np.random.default_rng(0)
    words = [["w"] * n for n in draw.integers(5, 40, size=400)]
    f = np.zeros((sum(map(len, words)), 1))
    starts = np.cumsum([0, *map(len, words)])
    for i in draw.permutation(400)[:60]:
        f[starts[i], 0] = len(words[i])  # the longer, the stronger
    (case,) = make_cases(f, words)

    def lengths(some):
        return [len(fr.tokens) for fr in some]

    assert (
        len(case.silent) == len(case.score) == 10
        and max(abs(a - b) for a, b in zip(lengths(case.score), lengths(case.silent))) <= 1
    )
    by_length = type(
        "Length",
        (Explainer,),
        dict(judge=lambda self, asks: [float(len(tokens)) for _, tokens, _ in asks]),
    )()
    assert abs(detection([case], ["x"], by_length)[0] - 0.5) < 0.2


def test_too_seldom_active_is_skipped_and_ties_are_drawn():
    words, f, _ = planted()
    few = f.copy()
    few[19 * 6 :] = 0
    assert make_cases(few, words) == [None]
    same = [
        tuple(fr.tokens[0] for fr in make_cases((f > 0).astype(float), words, seed=s)[0].explain)
        for s in range(4)
    ]
    assert len(set(same)) == 4
    constant = np.ones_like(f)
    assert make_cases(constant, words)[0].random == []  # nothing varies
    assert make_cases(f - 100, words) == [None]  # never above 0


def test_what_make_cases_refuses():
    words, f, _ = planted()
    for wrong, says in (
        (f[:-1], r"expected features \[360, F\]"),
        (f[:, 0], "expected features"),
        (np.full_like(f, np.nan), "NaN"),
    ):
        for ids in ([0], None):
            with pytest.raises(ValueError, match=says):
                make_cases(wrong, words, ids)
    with pytest.raises(ValueError, match="the 0 fragments"):
        make_cases(f[:0], [])
    with pytest.raises(ValueError, match="a number for each of 1 features, got 2"):
        make_cases(f, words, [0, 1])
    with pytest.raises(ValueError, match="fragment 2 has no token"):
        make_cases(f, [*words[:2], [], *words[2:-1], words[-1]])


def test_integers():
    assert integers(np.array([-3, 0, 0.39, 0.4, 3.99, 4, 9]), 4) == [0, 0, 0, 1, 9, 10, 10]
    assert integers(np.arange(11) * 0.1, 1.0) == list(
        range(11)
    )  # though .1 * 3 is a little more than .3


# ---- scores
class Known(Explainer):
    def __init__(self, cases, fn=lambda a: a):
        self.answers = [fn(np.array(fr.acts)) for c in cases if c for fr in c.score]

    def explain(self, features):
        return ["known"] * len(features)

    def simulate(self, asks):
        assert len(asks) == len(self.answers)
        return self.answers


def random_cases(n_feats=12, seed=0, n=80, *, length=20):
    draw = np.random.default_rng(seed)
    words = [[f"t{w}" for w in draw.integers(50, size=length)] for _ in range(n)]
    return make_cases(np.maximum(draw.standard_normal((n * length, n_feats)) - 1, 0), words), words


def test_perfect_is_1_scale_is_nothing_unrelated_is_about_0():
    cases, _ = random_cases()
    for fn in (lambda a: a, lambda a: 7 * a + 3):
        assert all(
            r[key] == pytest.approx(1)
            for r in interpret(cases, Known(cases, fn))
            for key in ("r", "r_top", "r_random")
        )
    assert all(r["r"] == pytest.approx(-1) for r in interpret(cases, Known(cases, lambda a: -a)))
    draw = np.random.default_rng(1)
    unrelated = summary(
        [r["r"] for r in interpret(cases, Known(cases, lambda a: draw.permutation(a)))]
    )
    assert unrelated["low"] < 0.05 and abs(unrelated["mean"]) < 0.1
    assert [r["r"] for r in interpret(cases, Known(cases, lambda a: 0 * a))] == [None] * len(cases)


def test_r_is_pooled_over_tokens():
    cases, _ = random_cases(3)
    draw = np.random.default_rng(2)
    for row, case in zip(
        interpret(cases, Known(cases, lambda a: a + draw.standard_normal(len(a)))), cases
    ):

        def flat(some):
            return np.concatenate(some)

        assert row["r"] == pytest.approx(
            np.corrcoef(flat([fr.acts for fr in case.score]), flat(row["simulated"]))[0, 1]
        )
        assert row["r_random"] == pytest.approx(
            np.corrcoef(flat([fr.acts for fr in case.random]), flat(row["simulated"][5:]))[0, 1]
        )


def test_no_score_and_skipped_ones_keep_their_places():
    cases, _ = random_cases(4)
    cases[1] = None
    rows = interpret(cases, Known(cases))
    assert rows[1] is None and [r["feature"] for r in rows if r] == [0, 2, 3]
    with pytest.raises(ValueError, match="expected an explanation for each of 3 features"):
        interpret(cases, Known(cases), ["one"])
    assert (
        correlation([1, 1], [1, 2]) is None
        and correlation([], []) is None
        and correlation([1, 2, 4], [2, 4, 8]) == pytest.approx(1)
    )
    with pytest.raises(ValueError, match="as many predictions"):
        correlation([1, 2], [1])
    bare = Case(0, cases[0].explain, cases[0].top, [], [], 20)
    assert interpret([bare], Known([bare]))[0]["r_random"] is None


class Judge(Explainer):
    def __init__(self, fn):
        self.fn = fn

    def judge(self, asks):
        return [self.fn(*ask) for ask in asks]


def test_detection_and_fuzzing():
    words, f, _ = planted()
    f = np.concatenate(
        [f, np.abs(f) + 1, f], 1
    )  # the second is silent nowhere: nothing to detect, nobody else's answers are shifted
    cases = make_cases(f, words)
    active = {tuple(w) for i, w in enumerate(words) if i < 40}
    knows = Judge(
        lambda why, tokens, marked: (
            float(tuple(tokens) in active)
            if marked is None
            else float(
                all(
                    int(tokens[i].split(".")[1]) == int(tokens[0].split(".")[0][1:]) % 6
                    for i in marked
                )
            )
        )
    )
    assert detection(cases, ["a", "b", "c"], knows) == [1.0, None, 1.0]
    assert fuzzing([cases[0], None], ["a"], knows) == [1.0, None]
    assert detection(cases, ["a", "b", "c"], Judge(lambda *_: 0.3)) == [0.5, None, 0.5]
    assert (
        detection(
            cases,
            ["a", "b", "c"],
            Judge(lambda why, tokens, marked: -knows.fn(why, tokens, marked)),
        )[0]
        == 0.0
    )
    asked = []
    fuzzing([cases[0]], ["a"], Judge(lambda *ask: asked.append(ask) or 0.0))
    assert len(asked) == 20 and all(len(marked) == 1 for _, _, marked in asked)
    with pytest.raises(ValueError):
        detection(cases, ["a"], knows)


def test_an_explainer_that_simulates_can_judge():
    simulates = type(
        "S", (Explainer,), dict(simulate=lambda self, asks: [[0.0, 10.0, 5.0] for _ in asks])
    )()
    assert simulates.judge([("x", ["a", "b", "c"], None), ("x", ["a", "b", "c"], [0, 2])]) == [
        1.0,
        0.25,
    ]


def test_intervals():
    scores = [None, *np.random.default_rng(0).normal(0.5, 0.2, 400)]
    s = summary(scores)
    assert (
        s["n"] == 400
        and s["no_score"] == 1
        and s["mean"] == pytest.approx(np.mean(scores[1:]))
        and s["high"] - s["low"] == pytest.approx(2 * 1.96 * 0.2 / 20, rel=0.15)
        and s["low"] < s["mean"] < s["high"]
    )
    assert summary([None, None]) == dict(mean=None, low=None, high=None, n=0, no_score=2)
    assert (
        summary([None, 0.6, 0.8], none=0.0)["mean"] == pytest.approx(1.4 / 3)
        and summary([None, 0.6, 0.8], none=0.0)["no_score"] == 1
        and summary([None], none=0.0)["mean"] == 0.0
    )
    assert difference([None, 1.0, 1.0], [0.5, 0.5], none=0.0)["mean"] == pytest.approx(2 / 3 - 0.5)
    d = difference(scores, [s - 0.3 for s in scores[1:]])
    assert (
        d["mean"] == pytest.approx(0.3)
        and d["low"] > 0.25
        and d["high"] < 0.35
        and difference([None], scores)["mean"] is None
    )
    assert difference(scores, scores)["low"] < 0 < difference(scores, scores)["high"]


def test_moments():
    from scipy.stats import kurtosis, skew

    f = np.random.default_rng(0).exponential(size=(2000, 3)).astype(np.float32)
    f[:, 2] = 1.0
    m = moments(f)
    assert np.allclose(m["mean"], f.mean(0), rtol=1e-4) and np.allclose(
        m["variance"], f.var(0), rtol=1e-3, atol=1e-9
    )
    assert (
        np.allclose(m["skew"][:2], skew(f[:, :2]), rtol=1e-3)
        and np.allclose(m["kurtosis"][:2], kurtosis(f[:, :2]), rtol=1e-3)
        and np.isfinite(m["skew"]).all()
    )


# ---- the truth as a judge
def concepts_and_features():
    "What holds, and a feature for one, for none, for two, and one that is always on."
    draw = np.random.default_rng(0)
    truth = draw.random((4000, 6)) < [0.9, 0.1, 0.05, 0.2, 0.001, 0.1]
    f = np.stack(
        [
            truth[:, 1] * 3.0 + draw.random(4000),
            draw.random(4000),
            2 * truth[:, 2] + 5 * truth[:, 3] + 0.1 * draw.random(4000),
            np.ones(4000),
        ],
        1,
    )
    return f, truth


def test_feature_concepts_and_concept_fit():
    f, truth = concepts_and_features()
    got = feature_concepts(f, truth)
    assert (
        got["concept"][[0, 2]].tolist() == [1, 3]
        and got["f1"][0] > 0.99
        and got["gain"][0] > 0.99
        and got["precision"][0] > 0.99
        and got["recall"][0] > 0.99
    )
    assert abs(got["gain"][1]) < 0.1 and abs(got["gain"][3]) < 0.02, (
        "above always firing, noise and a constant gain nothing, though F1 of the frequent concept "
        "is high"
    )
    fires = f[2000:, 2] >= 4
    assert got["f1"][2] == pytest.approx(
        2 * (fires & truth[2000:, 3]).sum() / (fires.sum() + truth[2000:, 3].sum()), abs=0.02
    )
    r, chosen = concept_fit(f, truth)
    assert (
        set(chosen[2][:2]) == {2, 3}
        and r[2] > 0.99
        and r[0] > 0.9
        and abs(r[1]) < 0.1
        and math.isnan(r[3])
    )
    always = np.concatenate([np.ones((4000, 1), bool), truth], 1)
    assert feature_concepts(f, always)["concept"].tolist() == (got["concept"] + 1).tolist(), (
        "what always holds is no concept"
    )
    with pytest.raises(ValueError, match="no concept holds"):
        feature_concepts(f[:20], truth[:20], at_least=15)
    for call in (feature_concepts, concept_fit):
        with pytest.raises(ValueError, match="same tokens"):
            call(f, truth[:-1])


# ---- predicates
STORIES = PredicateExplainer(**story_words())


def holds(text, by=STORIES):
    return [set(s) - {"any word"} for s in by.holds(text.split(" "))]


def test_what_holds_where():
    got = holds("Tom ran . “ In May the dragon ( a pet ) slept ”")
    assert {
        '"ran"',
        'after "Tom"',
        '"ran" after "Tom"',
        "any verb",
        "after any name",
        "word 2 of the text",
    } <= got[1]
    assert (
        "any month" in got[5]
        and "after any month" in got[6]
        and "any word about dragon" in got[7]
        and "after any word about dragon" in got[8]
    )
    assert [i for i, s in enumerate(got) if "inside quotation marks" in s] == list(
        range(4, 13)
    ) and [i for i, s in enumerate(got) if "inside parentheses" in s] == [9, 10]
    assert [i for i, s in enumerate(got) if "word 1 of a sentence" in s] == [
        3
    ] and "word 2 of a sentence" in got[4]
    assert not any(p.startswith("after") for p in got[0])


def test_a_text_that_begins_inside_marks():
    assert [("inside quotation marks" in s) for s in holds("she is here ” said Tom “ no ”")] == [
        True
    ] * 3 + [False] * 4 + [True, False]


def test_classes_by_spelling_for_any_text():
    by = PredicateExplainer()
    got = holds("She quickly walked , 42 dogs singing A", by)
    for i, name in (
        (0, "capitalised word"),
        (1, "word in -ly"),
        (2, "word in -ed"),
        (3, "mark"),
        (4, "number"),
        (5, "word in -s"),
        (6, "word in -ing"),
        (7, "single letter"),
    ):
        assert f"any {name}" in got[i]
    assert (
        by.holds([" dogs", "dogs"])[0] >= {'"dogs"'}
        and '"dogs" after "dogs"' in by.holds([" dogs", "dogs "])[1]
    )


NASTY = [
    '"',
    "\\",
    ";",
    " (",
    ");",
    '"; "',
    "(3)",
    "\n",
    " ",
    "any word (3)",
    "naïve",
    "<b>",
    "'",
    "“",
    "after",
]


def test_every_phrase_can_be_read_again():
    by = PredicateExplainer({"a class": ["x"], "odd name": r"\d+"}, {"a topic": ["y"]})
    tokens = NASTY + ["x", "y", "7"] + NASTY[::-1]
    for phrases in by.holds(tokens):
        for phrase in phrases:
            assert by.read(f"{phrase} (4)") == {phrase: 4}
    every = sorted(p for s in by.holds(tokens) for p in s)
    assert by.read("; ".join(f"{p} (1)" for p in dict.fromkeys(every))) == {p: 1 for p in every}
    with pytest.raises(ValueError, match="names of classes and topics"):
        PredicateExplainer({"odd (name)": ["x"]})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "months",
        "any month",
        "any month (x)",
        "any monthly (3)",
        "any month (3); the rest",
        "any month (3) any name (2)",
        'after after "x" (3)',
        'any name after "to" (10)',
        "word 9 of a sentence (2)",
        "any month (-3)",
    ],
)
def test_what_it_cannot_read(text):
    with pytest.raises(ValueError, match="PredicateExplainer: cannot read"):
        STORIES.simulate([(text, ["a"])])


@pytest.mark.parametrize(
    "phrase",
    [
        '"gave"',
        'after "the"',
        '"the" after "to"',
        "any month",
        "after any name",
        "any word about dragon",
        "after any word about dragon",
        "word 1 of a sentence",
        "inside parentheses",
        "inside quotation marks",
    ],
)
def test_finds_what_was_planted(phrase, words):
    acts = [[10 * (phrase in s) for s in STORIES.holds(w)] for w in words]
    some = sorted(
        (Fragment(w, a) for w, a in zip(words, acts) if 0 < sum(a) < 300),
        key=lambda fr: -sum(fr.acts),
    )[:5]
    assert STORIES.explain([some]) == [f"{phrase} (10)"]
    assert STORIES.simulate([(f"{phrase} (10)", words[0])])[0] == acts[0]


def test_strengths_add_up_to_10_at_most_and_without_takes_kinds_away(words):
    assert STORIES.simulate(
        [('"gave" (9); any verb (3); any word (1)', ["Tom", "gave", "it"])]
    ) == [[1.0, 10.0, 1.0]]
    some = [
        Fragment(w, [10 * ("any month" in s) for s in STORIES.holds(w)])
        for w in words
        if any("any month" in s for s in STORIES.holds(w))
    ][:5]
    bare = PredicateExplainer(
        **story_words(), without=tuple(k for k in PREDICATES if k not in ("any", "word"))
    )
    assert all(re.fullmatch(r'"\w+"|any word', p) for p in bare.read(bare.explain([some])[0]))
    with pytest.raises(ValueError, match="without="):
        PredicateExplainer(without=("any",))
    with pytest.raises(ValueError, match="without="):
        PredicateExplainer(without=("colour",))
    assert STORIES.explain([[Fragment(["a", "b"], [0, 0])]]) == [
        "any word (0)"
    ] and STORIES.simulate([("any word (0)", ["a"])]) == [[0.0]]


def test_what_one_fragment_alone_shows_is_no_rule(words):
    acts = [[0] * len(w) for w in words[:5]]
    acts[0][3] = 10
    assert STORIES.explain([[Fragment(w, a) for w, a in zip(words, acts)]]) == ["any word (0)"]
    with pytest.raises(ValueError, match="expected an integer 0..10"):
        STORIES.explain([[Fragment(["a"], [11])]])
    with pytest.raises(ValueError, match="has no fragments"):
        STORIES.explain([[]])
    with pytest.raises(ValueError, match="at least one string"):
        STORIES.simulate([("any word (1)", [])])


# ---- the whole path
@pytest.fixture(scope="module")
def told():
    model, tok = load_lm("stories")
    text = fragments(load_text(tok, n_tokens=90_000, length=256, split="train", seed=5))
    return model, text, pieces(text, tok)


@pytest.fixture(scope="module")
def words(told):
    return [[w.strip() for w in some] for some in told[2]]


def test_puzzles(told):
    rows = solve(STORIES, puzzle_cases(told[2]))
    assert len(rows) == len(PUZZLES) == 12
    by = {r["puzzle"]: r for r in rows}
    assert [r["puzzle"] for r in rows if r["right_first"]] == [p.name for p in PUZZLES[:8]] and all(
        by[p.name]["right"] > 0.999 and by[p.name]["own"] > 0.9 for p in PUZZLES[:8]
    )
    assert all(by[p.name]["right"] is None for p in PUZZLES[8:]), (
        "its language has no words for these"
    )
    turned = [Puzzle(p.name, p.acts, p.wrong[0], [p.right]) for p in PUZZLES[:8]]
    assert not any(r["right_first"] for r in solve(STORIES, puzzle_cases(told[2], turned), turned))
    one = Puzzle("never", lambda w: [False] * len(w), "any word", [])
    assert puzzle_cases(told[2], [one]) == [None] and solve(STORIES, [None], [one]) == []
    broken = PredicateExplainer(**story_words())

    def refused(asks):
        raise ValueError("the endpoint answers 400")

    broken.simulate = refused
    with pytest.raises(ValueError, match="answers 400"):
        solve(broken, puzzle_cases(told[2]))


@pytest.mark.nightly
def test_features_of_the_autoencoder_are_explained_better_than_random_directions(told):
    import tempfile

    from codebook_tutorial.dictionary.harvest import harvest

    model, text, words = told
    with tempfile.TemporaryDirectory() as folder:
        x = harvest(model, text, "resid.1", folder=folder + "/acts", verbose=False).load("resid.1")
    scores = {}
    for name, d in (
        ("sae", load_sae(data_path("sae/tied"))),
        ("random", random_directions(384, 96, seed=100)),
        ("pca", pca(x)),
        ("ica", ica(x, rows=8000)),
    ):
        f, ids = some_features(d, x, 40)
        rows = interpret(make_cases(f, words, ids), STORIES)
        scores[name] = [r["r"] for r in rows if r]
        assert rows == interpret(make_cases(f, words, ids), PredicateExplainer(**story_words())), (
            "the same twice"
        )
    assert (
        all(difference(scores["sae"], scores[other])["low"] > 0 for other in ("random", "pca"))
        and difference(scores["ica"], scores["pca"])["low"] > 0
    )


# ---- pages
def page_rows():
    words = [["<script>alert(1)</script>", "&amp;", f"w{i}"] for i in range(30)]
    f = np.array([[0.0, 1 + i, 0.5 * i] for i in range(30)]).reshape(-1, 1)
    cases = make_cases(np.concatenate([f, np.zeros_like(f), -f + 20], 1), words, [3, 4, 5])
    return cases, interpret(
        cases, Known(cases), ['"<script>alert(2)</script>" (9)', '"<img src=x>" (2)']
    )


def test_pages_are_escaped_and_whole(tmp_path):
    cases, rows = page_rows()
    assert rows[1] is None
    path = export_features(cases, rows, tmp_path / "f.html", title="A <title>")
    html = path.read_text()
    assert (
        "<script" not in html
        and "<img" not in html
        and "A &lt;title&gt;" in html
        and html.count("<details>") == 2
        and "1 more are active too seldom" in html
        and "default-src 'none'" in html
    )
    assert (
        "alert(2)" in html
        and [p.name for p in tmp_path.iterdir()] == ["f.html"]
        and not re.search(r'(src|href)="?http', html)
    )
    shown = explained_strips(cases[0], rows[0], n=1)
    assert (
        "<script" not in shown.source
        and "as simulated" in shown.words
        and "r 1.00" in shown.words
        and shown.source.count("<div") == 4
    )
    with pytest.raises(ValueError):
        export_features(cases, rows[:-1], tmp_path / "g.html")
    assert not (tmp_path / "g.html").exists()


def test_the_panel():
    cases, rows = page_rows()
    rows[2]["r"] = None
    panel = feature_table(cases, rows)
    box, (least, order), says, lines, chosen = (
        panel.children[0],
        panel.children[1].children,
        *panel.children[2:],
    )
    assert (
        "2 of 3 features (1 are skipped" in says.value
        and len(lines.options) == 3
        and lines.options[1][0].startswith("3 ")
    )
    lines.value = lines.options[1][1]
    assert "as simulated" in chosen.value and "<script" not in chosen.value
    least.value = 0.5
    assert len(lines.options) == 2 and chosen.value == ""
    least.value, box.value = -1, "IMG"
    assert len(lines.options) == 2 and "no score" in lines.options[1][0]
    box.value = "nothing such"
    assert list(lines.options) == [] and "0 of 3" in says.value
    order.value = "active, most first"
