"""The scoreboard: probes and families with planted answers, what is asked of a dictionary,
rows for every method, stability, sums."""

import numpy as np
import pytest
import torch
from test_sites import hooks

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import Dictionary, Directions, Lens, random_directions
from codebook_tutorial.dictionary.baselines import Affine
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.feature.steer import find_switches, steer
from codebook_tutorial.model.generate import generate
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import states_of
from codebook_tutorial.model.text import load_text
from codebook_tutorial.score.answers import known_answers
from codebook_tutorial.score.benches import Halves
from codebook_tutorial.score.concepts import absorbed, concept_board, families, sparse_probes
from codebook_tutorial.score.methods import METHODS, fsm_states, make_dictionary, sums_of
from codebook_tutorial.score.scoreboard import scoreboard, stability
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.world.fsm import TokFSM


def planted(n=4000, seed=0):
    """Three features; concepts: feature 0, feature 0 or 1, feature 2 negative,
    and one that nothing knows."""
    g = seeded(seed)
    on = torch.rand(n, 3, generator=g) < 0.15
    f = on * (0.5 + torch.rand(n, 3, generator=g))
    f[:, 2] *= -1
    return f, torch.stack(
        [on[:, 0], on[:, 0] | on[:, 1], on[:, 2], torch.rand(n, generator=g) < 0.2], 1
    )


def test_probes_take_the_features_that_are_needed_and_are_scored_on_the_other_half():
    f, truth = planted()
    p = sparse_probes(
        torch.cat([f, torch.full((len(f), 1), 7.0)], 1), truth, ks=(1, 2, 3)
    )  # the last feature never changes
    assert (
        min(p[1]["f1"][[0, 2]]) > 0.98
        and 0.6 < p[1]["f1"][1] < 0.75
        and p[2]["f1"][1] > 0.95
        and p[3]["f1"][3] < 0.5
    )  # a threshold from one half may miss the lowest of the other
    assert (
        set(p["chosen"][1, :2].tolist()) == {0, 1}
        and p["chosen"][0, 0] == 0
        and p["chosen"][2, 0] == 2
    )
    assert all(len(set(row)) == 3 for row in p["chosen"].tolist())  # nothing twice
    assert (
        p[1]["fires"].shape == (2000, 4)
        and (p[1]["fires"][:, 0] == truth[2000:, 0]).float().mean() > 0.99
    )
    other = truth.clone()
    other[2000:] = ~other[2000:]  # what is scored must not choose
    q = sparse_probes(f, other, ks=(1, 2))
    assert (q["chosen"][:3, 0] == p["chosen"][:3, 0]).all() and q[1]["f1"][0] < 0.02
    assert min(p["all"]["f1"][:3]) > 0.95


@pytest.mark.parametrize(
    "f,truth,ks,words",
    [
        (torch.zeros(10, 3), torch.zeros(9, 2, dtype=torch.bool), (1,), "same tokens"),
        (torch.zeros(10, 3), torch.zeros(10, dtype=torch.bool), (1,), r"truth \[N, C\]"),
        (torch.zeros(10, 3), torch.zeros(10, 2, dtype=torch.bool), (5,), "of 3 features"),
    ],
)
def test_probes_say_what_is_wrong(f, truth, ks, words):
    with pytest.raises(ValueError, match=words):
        sparse_probes(f, truth, ks)


def test_families_are_found_and_siblings_are_not():
    t = torch.zeros(800, 5, dtype=torch.bool)
    t[::4, 0] = True
    t[::16, 1] = True
    t[8::16, 2] = True
    t[1::4, 3] = True
    t[::100, 4] = True  # 1, 2 lie in 0; 3 outside; 4 too rare
    assert set(families(t)) == {(0, 1), (0, 2)}
    t[::8, 1] = True  # half of the parent: too large
    assert (0, 1) not in families(t)
    t[:, 0] = True
    assert (0, 2) not in families(t)  # a parent that always holds
    assert not any(p == c for p, c in families(t, at_least=1))


def test_a_hole_is_found_where_it_was_planted_and_not_by_chance():
    n = 800
    parent = np.zeros(n, bool)
    parent[::2] = True
    child, sibling = np.zeros(n, bool), np.zeros(n, bool)
    child[::8], sibling[4::8] = True, True
    truth = np.stack([parent, child, sibling], 1)
    fires = np.stack(
        [parent & ~child, child, sibling], 1
    )  # the parent's feature does not see the child
    pairs, f1 = [(0, 1), (0, 2)], np.array([0.8, 0.9, 0.9])
    got = absorbed(fires, f1, np.array([5, 6, 7]), truth=truth, pairs=pairs)
    assert got == dict(asked=2, holes=[(0, 1)], control=0)
    assert (
        absorbed(fires, np.array([0.8, 0.4, 0.9]), np.array([5, 6, 7]), truth=truth, pairs=pairs)[
            "asked"
        ]
        == 1
    )  # the child has no feature worth the name
    assert absorbed(fires, f1, np.array([5, 5, 7]), truth=truth, pairs=pairs) == dict(
        asked=1, holes=[], control=0
    )  # one feature for both: nothing has absorbed anything
    whole = np.stack([parent, child, sibling], 1)
    assert absorbed(whole, f1, np.array([5, 6, 7]), truth=truth, pairs=pairs)["holes"] == []


def test_split_counts_concepts_that_precise_features_tell_in_part():
    g = seeded(4)
    which = torch.randint(0, 12, (6000,), generator=g)
    f = torch.nn.functional.one_hot(which, 12).float() * (1 + torch.rand(6000, 1, generator=g))
    truth = torch.stack(
        [which < 2, which == 5, (which > 5) & (which < 8), which > 7], 1
    )  # two features, one, two, four
    got = concept_board(f.numpy(), truth.numpy())
    assert (
        got["split"] == 0.5
        and got["precise"] == 0.75
        and got["probe_5"] > 0.97
        and got["probe_1"] < 0.8
    )  # the last: firing nearly always beats each of its four features, and is not precise
    blind = concept_board(torch.randn(6000, 12, generator=g).numpy(), truth.numpy())
    assert blind["split"] == 0 and blind["f1"] < 0.6


def test_halves_have_no_signs_and_decode_to_the_same():
    d = Affine(torch.eye(4)[[2, 0, 1]], mean=torch.arange(4.0))
    x = torch.randn(50, 4, generator=seeded(1))
    two = Halves(d)
    f = two.encode(x)
    assert (
        (f >= 0).all()
        and f.shape == (50, 6)
        and torch.allclose(two.decode(f), d.decode(d.encode(x)))
        and torch.equal(two.directions, torch.cat([d.directions, -d.directions]))
    )
    assert ((f[:, :3] > 0) & (f[:, 3:] > 0)).sum() == 0


def test_stability_of_equal_shuffled_and_unrelated_dictionaries():
    a = random_directions(30, 16, seed=1)
    shuffled = Directions(
        -a.directions[torch.randperm(30, generator=seeded(2))]
    )  # other order, other signs: the same
    got = stability([a, shuffled])
    assert (
        got["stability"] == pytest.approx(1, abs=1e-5)
        and len(got["values"]) == 1
        and 0.3 < got["random"] < 0.8
        and got["states"] is None
    )
    three = stability([random_directions(30, 16, seed=s) for s in range(3)])
    assert len(three["values"]) == 3 and abs(three["stability"] - three["random"]) < 0.06
    doubled = [
        Directions(torch.cat([d.directions[:1].expand(30, -1), torch.zeros(0, 16)]))
        for d in (a, random_directions(30, 16, seed=3))
    ]
    one = (a.directions[0] @ random_directions(30, 16, seed=3).directions[0]).abs().item()
    assert stability(doubled)["stability"] == pytest.approx(
        one, abs=1e-4
    )  # one to one: copies gain nothing
    narrow = torch.randn(500, 16, generator=seeded(5)) * torch.tensor(
        [9.0] + [0.1] * 15
    )  # states along one line: raw samples agree without having learnt
    assert stability([a, shuffled], narrow)["states"] > 0.9
    with pytest.raises(ValueError, match="two dictionaries or more"):
        stability([a])
    with pytest.raises(ValueError, match="of one width"):
        stability([a, random_directions(30, 8)])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_a_dictionary(method):
    x = torch.randn(3000, 12, generator=seeded(0)) * torch.arange(1.0, 13)
    d = make_dictionary(method, x, 20, k=3, steps=30, alpha=[0.1, 0.3])
    assert (
        isinstance(d, Dictionary)
        and d.directions.shape
        == ((12 if method in ("ica", "pca", "basis", "random_d") else 20), 12)
        and torch.isfinite(d.encode(x)).all()
    )
    if method in ("sae_topk", "kmeans", "codebook"):
        assert (d.encode(x) != 0).sum(1).max() <= 3
    if method in ("ica", "pca", "basis", "random", "random_d"):
        assert torch.allclose(
            d.decode(d.encode(x)), x, atol=1e-3
        )  # what spans the space loses nothing


def test_moving_averages_make_codes_better_than_their_seeding():
    g = seeded(3)
    x = (
        torch.randn(12, 8, generator=g)[torch.randint(0, 12, (6000,), generator=g)]
        + torch.randn(9, 8, generator=g)[torch.randint(0, 9, (6000,), generator=g)]
        + 0.1 * torch.randn(6000, 8, generator=g)
    )
    seeded_only = Codebook(8, 21, 2, select="residual").init_from(x, generator=seeded(0)).eval()

    def err(d):
        return (d.decode(d.encode(x)) - x).pow(2).mean().item()

    assert err(make_dictionary("codebook", x, 21, k=2)) < err(seeded_only)


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="sae_gated has a penalty in place of k; give some to try"):
        make_dictionary("sae_gated", torch.zeros(10, 3), 4, k=1)
    with pytest.raises(ValueError, match="method='sae', expected one of sae_tied"):
        make_dictionary("sae", torch.zeros(10, 3), 4, k=1)


def test_sums_hold_what_any_part_holds_and_states_are_complete():
    from transformers import AutoModelForCausalLM

    fsm, model = TokFSM(), AutoModelForCausalLM.from_pretrained(data_path("fsm_0")).eval()
    x, truth = fsm_states(model, fsm, "mlp.1", n=6, seed=0)
    whole, some = fsm_states(model, fsm, "mlp.1", n=6, seed=0, complete=True)
    assert (
        x.shape == (6 * 127, 64)
        and truth.shape == (6 * 127, 100)
        and len(whole) == truth.any(1).sum() == 6 * 63
        and (some.sum(1) == 1).all()
        and torch.equal(whole, x[truth.any(1)])
    )
    y, both = sums_of(whole, some, 2, seed=3)
    assert y.shape == whole.shape and set(both.sum(1)) == {1, 2}
    half = len(whole) // 2
    for part in (slice(half), slice(half, None)):
        assert torch.allclose(
            y[part].sum(0), 2 * whole[part].sum(0), rtol=1e-3, atol=1e-2
        )  # each half by itself: nothing that scores has chosen
    states = {tuple(np.round(v.numpy(), 3)): t for v, t in zip(whole, some)}
    assert len(states) > 50
    assert not hooks(model)


@pytest.fixture(scope="module")
def asked():
    model, tok = load_lm("stories")
    text, facts = story_text(8000, split="test")
    some = load_text(tok, n_tokens=40_000, length=256, split="train", seed=3)
    return known_answers(
        model,
        tok,
        "resid.1",
        text=text,
        truth=atoms(facts),
        fragment_text=load_text(tok, n_tokens=15_000, length=256, split="test", seed=5),
        steer_text=some,
        texts=2,
        n_pairs=4,
        names=2,
    )


def test_answers_hold_together_and_states_are_those_of_harvest(asked, tmp_path):
    assert (
        len(asked.states) == len(asked.truth) == asked.text.n_tokens
        and len(asked.benches["steered"].prompts) == len(asked.benches["steered"].target) == 20
        and [len(p) for p in asked.benches["patched"].pairs] == [4, 4]
    )
    explained = asked.benches["explained"]
    assert len(explained.states) == sum(map(len, explained.words))
    store = harvest(
        asked.subject.model,
        asked.text,
        "resid.1",
        folder=tmp_path / "acts",
        dtype=torch.float32,
        verbose=False,
    )
    assert torch.allclose(asked.states, store.load("resid.1"), atol=1e-4)
    assert "resid.1" in repr(asked) and "526 concepts" in repr(asked)


def test_a_row_of_the_shipped_autoencoder_beats_random_directions(asked):
    sae, blind = (
        load_sae(data_path("sae/tied")),
        Affine(random_directions(384, 96, seed=3).directions, mean=asked.states.mean(0)),
    )
    mine, other = (
        scoreboard(d, asked, parts=("kept", "concepts", "explained", "patched"))
        for d in (sae, blind)
    )
    assert (
        mine["f1"] > other["f1"] + 0.04
        and mine["patched"] > other["patched"] + 0.1
        and mine["explained"] > other["explained"]
        and mine["paid"] < other["paid"]
        and mine["n_feats"] == 384
    )
    assert "steered" not in mine and not hooks(asked.subject.model)


def test_perfect_and_empty_dictionaries_pay_nothing_and_all(asked):
    kept = asked.benches["kept"].score
    whole = kept(Directions(torch.eye(96)))
    assert abs(whole["paid"]) < 1e-5 and whole["fvu"] < 1e-10
    assert (
        abs(kept(make_dictionary("random", asked.states, 384, k=0))["paid"]) < 1e-3
    )  # 384 directions lose nothing either
    none = kept(Affine(torch.eye(96)[:1] * 1e-6))
    assert none["paid"] > 3 and none["fvu"] > 0.9


def test_codes_are_written_as_differences_and_leave_the_model_as_it_was(asked):
    book = make_dictionary("codebook", asked.states, 64, k=2)
    x, model = asked.states[:6].view(2, 3, 96), asked.subject.model
    shift = Lens(model, "resid.1", book).shift
    assert torch.equal(shift(lambda ids: ids, 3.0)(x), x)  # the same codes: nothing happens
    ids = book.choose(x)
    other = ids.clone()
    other[..., 0, 0] = 5
    assert torch.allclose(
        shift(lambda ids: other, 2.0)(x),
        x + 2 * (book.decode_ids(other) - book.decode_ids(ids)),
        atol=1e-5,
    )
    before = model(input_ids=asked.text.ids[:2]).logits
    got = asked.benches["steered"].score(book, strengths=(1.0,))
    assert (
        0 <= got["steered"] <= 1
        and got["strength"] in (0.0, 1.0)
        and not hooks(model)
        and torch.equal(model(input_ids=asked.text.ids[:2]).logits, before)
    )


def test_whoever_is_over_the_budget_has_not_steered(asked):
    bench, weak = asked.benches["steered"], random_directions(96, 96, seed=2, relu=True)
    got = bench.score(weak, strengths=(400.0,))
    assert (
        got["strength"] == 0
        and got["steered"] == bench.plain[1::2].rate
        and got["steered_loss"] == 1
    )


class Short(Dictionary):
    "A new kind in ten lines: the autoencoder's formula, from its numbers."

    def __init__(self, sae):
        super().__init__()
        self.directions, self.reads = sae.W_dec.detach(), sae.W_enc.detach()
        self.bias, self.mean = sae.b_enc.detach(), sae.b_dec.detach()

    def encode(self, x):
        return ((x - self.mean) @ self.reads.T + self.bias).relu()

    def decode(self, f):
        return f @ self.directions + self.mean


def test_a_new_kind_is_asked_indexed_and_steers_as_the_one_that_it_copies(asked, tmp_path):
    sae, ten_lines = load_sae(data_path("sae/tied")), Short(load_sae(data_path("sae/tied")))
    parts = ("kept", "concepts", "explained", "patched")
    mine, other = (scoreboard(one, asked, parts=parts) for one in (ten_lines, sae))
    assert mine == pytest.approx(other, rel=1e-4) and mine["f1"] > 0.2

    model, tok = asked.subject.model, asked.subject.tok
    found = []
    for name, one in (("new", ten_lines), ("old", sae)):
        kw = dict(folder=tmp_path / name, dictionaries={"resid.1": one})
        places = build_index(model, tok, asked.text[:8], **kw).search(r"\bgave\b")
        found.append([(h["feature"], h["precision"]) for h in places])
    assert found[0] == found[1] and len(found[0]) > 3

    ask, texts = asked.benches["steered"], []
    for one in (ten_lines, sae):
        at = {"resid.1": one}
        switches = find_switches(model, at, ask.text, choices=ask.choices, precision=0.1)
        with steer(model, switches, ask.target, strength=2.0):
            texts.append(generate(model, tok, ask.prompts, n_tokens=12, progress=False))
    plain = generate(model, tok, ask.prompts, n_tokens=12, progress=False)
    assert texts[0] == texts[1] != plain


def test_a_finetuned_codebook_is_asked_with_its_codes_in_place(asked):
    model, tok = load_lm("stories")
    cb = (
        add_codebooks(model, ["resid.1"], n_codes=64, k=2, select="residual")
        .init_from_data(asked.text.ids[:10], generator=seeded(0))
        .eval()
    )
    args = dict(
        text=asked.text,
        truth=asked.text.ids[..., None] % 7 == 3,
        fragment_text=asked.text,
        steer_text=asked.text,
        topics={},
        n_pairs=4,
        names=1,
    )
    own = known_answers(cb, tok, "resid.1", judge=asked.subject.model, **args)
    assert torch.allclose(
        own.states, asked.states, atol=1e-4
    )  # what goes into the codes, not what comes out
    row = scoreboard(cb.codebooks["resid.1"], own, parts=("kept", "concepts"))
    assert row["paid"] > 0.2 and row["fvu"] > 0.02
    with pytest.raises(ValueError, match="asked about its own"):
        scoreboard(random_directions(8, 96), own)
    with pytest.raises(ValueError, match="with judge= the untouched model"):
        known_answers(cb, tok, "resid.1", **args)
    with pytest.raises(ValueError, match="can only be asked at their sites"):
        known_answers(cb, tok, "resid.0", judge=asked.subject.model, **args)
    with pytest.raises(ValueError, match="has codebooks in it"):
        known_answers(model, tok, "resid.1", **args)
    cb.remove()
    assert not hooks(model)


def test_what_cannot_be_asked_is_left_out_and_mistakes_are_named(asked):
    from dataclasses import replace

    some = {name: asked.benches[name] for name in ("kept", "explained")}
    bare = replace(asked, truth=None, benches=some)
    row = scoreboard(load_sae(data_path("sae/tied")), bare)
    assert (
        {"l0", "explained"} <= set(row)
        and not {"f1", "patched", "steered"} & set(row)
        and "no concepts known" in repr(bare)
    )
    with pytest.raises(
        ValueError,
        match="expected a dictionary for the 96 numbers of resid.1, got a Directions for 64",
    ):
        scoreboard(random_directions(8, 64), asked)
    with pytest.raises(ValueError, match=r"parts=\['colour'\], expected some of kept"):
        scoreboard(random_directions(8, 96), asked, parts=("colour",))
    whom = asked.subject.model, asked.subject.tok
    with pytest.raises(ValueError, match="expected truth as bool"):
        known_answers(*whom, text=asked.text, truth=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="no text"):
        known_answers(*whom, truth=torch.zeros(3, 4, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="an even number of texts"):
        known_answers(*whom, texts=3)
    with pytest.raises(ValueError, match="expected one site"):
        states_of(whom[0], asked.text[:1], "resid.*")
    with pytest.raises(ValueError, match="none of the 4 concepts"):
        concept_board(np.zeros((50, 3), np.float32), np.zeros((50, 4), bool))


def test_explanations_count_features_without_a_score(asked):
    class Dead(Directions):
        def encode(self, x):
            f = super().encode(x).relu()
            f[:, ::2] = 0
            return f

    explained = asked.benches["explained"].score
    got = explained(Dead(random_directions(20, 96, seed=1).directions))
    assert got["explained_skipped"] == pytest.approx(0.5)
    assert explained(Directions(torch.zeros(4, 96))) == dict(explained=0.0, explained_skipped=1.0)
    assert 0 <= asked.benches["patched"].score(load_sae(data_path("sae/tied")))["patched"] <= 1
