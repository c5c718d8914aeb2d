"""Steering: word lists, choices, precision and coverage, switches of features and codes,
generation with the cache, effect and price, panel and page."""

import json

import pytest
import torch
from test_browser import browser, jupyter, run_all  # noqa: F401
from test_sites import CONFIGS, D, V, hooks
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import Lens, random_directions
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.feature.choices import find_choices, split_words
from codebook_tutorial.feature.detect import precision_coverage
from codebook_tutorial.feature.force import force_codes, token_codes, write_codes
from codebook_tutorial.feature.steer import (
    Switch,
    add_vector,
    find_switches,
    mean_difference,
    steer,
    topic_features,
)
from codebook_tutorial.model.generate import generate, text_nats
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import token_losses
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.score.effects import (
    Effect,
    best_within,
    count_words,
    distinct,
    effect_and_price,
    recognise,
    topic_words,
)
from codebook_tutorial.world.grammar import ID, LISTS, TOPICS
from codebook_tutorial.world.words import WORD_TABLES

BOS, PAD = 1, 0


class Tok:
    bos_token_id, pad_token_id = BOS, PAD


@pytest.fixture(params=CONFIGS)
def tiny(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture
def neox():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]).eval()


def some_text(rows=12, length=24):
    ids = torch.randint(2, V, (rows, length), generator=seeded(0))
    ids[:, 0] = ids[:, 11] = BOS
    ids[::2, -3:] = PAD
    return Text(ids, BOS, PAD)


GROUPS, HELD = {"a": [5, 6, 7], "b": [8, 9]}, {"a": [10], "b": [11, 12]}


# ---------------------------------------------------------------- words and places
def test_words_are_split_with_their_forms_together():
    words = {"x": [(1, 2), (3, 4), 5, 6, (7, 8), 9], "y": [10, 11, 12]}
    first, second = split_words(words, 1 / 3, seed=4)
    for name, some in words.items():
        every = [t for w in some for t in (w if isinstance(w, tuple) else (w,))]
        assert sorted(first[name] + second[name]) == every and not set(first[name]) & set(
            second[name]
        )
        assert all(
            (w[0] in first[name]) == (w[1] in first[name]) for w in some if isinstance(w, tuple)
        )
    assert split_words(words, 1 / 3, 4)[0] == first and any(
        split_words(words, 1 / 3, s)[0] != first for s in range(5)
    )
    with pytest.raises(ValueError, match="leaves one part empty"):
        split_words({"x": [1]})
    with pytest.raises(ValueError, match="'x' names the token 5 twice"):
        split_words({"x": [5, (4, 5), 6]})


def test_choices_are_what_a_plain_loop_says():
    text = some_text()
    found, named = (
        find_choices(text, GROUPS, HELD),
        {t: i for i, some in enumerate(GROUPS.values()) for t in some},
    )
    held = {t for some in HELD.values() for t in some}
    for r, row in enumerate(text.ids.tolist()):
        spans = [(0, 11), (11, 24)]
        for begin, end in spans:
            votes = [sum(named.get(t) == i for t in row[begin:end]) for i in range(2)]
            about = -1 if votes[0] == votes[1] else votes.index(max(votes))
            for c in range(begin, end):
                ahead = row[c + 1] if c + 1 < 24 else None
                assert found.about[r, c] == about and found.next[r, c] == named.get(ahead, -1)
                said = any(t in named or t in held for t in row[begin : c + 1])
                assert found.open[r, c] == (ahead in named and not said and bool(text.mask[r, c]))
                assert found.look[r, c] == (
                    bool(text.mask[r, c]) and row[c] not in held and ahead not in held
                )
    assert (
        found.open.any()
        and (found.about >= 0).any()
        and torch.equal(
            find_choices(text, GROUPS, undecided=text.ids == 3).open, (text.ids == 3) & text.mask
        )
    )
    for bad in (dict(words={"a": [5], "b": [5]}), dict(words={"a": [5]}, hidden={"a": [5]})):
        with pytest.raises(ValueError, match="token 5 stands in two lists"):
            find_choices(text, **bad)
    with pytest.raises(ValueError, match="no words for 'z'"):
        find_choices(text, GROUPS | {"z": []})


def test_a_document_that_goes_on_in_the_next_row_is_decided_there():
    text = Text(torch.tensor([[BOS, 5, 3, 6], [3, 3, 5, 3], [BOS, 3, 8, 3]]), BOS, PAD)
    found = find_choices(text, GROUPS)
    assert found.open.tolist() == [
        [False] * 4,
        [False] * 4,
        [False, True, False, False],
    ] and found.about.tolist() == [[0] * 4, [0] * 4, [1] * 4]


def test_precision_and_coverage_are_counts():
    g = seeded(2)
    f = torch.rand(300, 9, generator=g) * (torch.rand(300, 9, generator=g) < 0.4)
    f[:, 8] = 0
    marks = torch.rand(300, 2, generator=g) < 0.3
    places, features = f.nonzero().T
    found = precision_coverage(places, features, f[places, features], marks=marks, n_feats=9)
    for j in range(8):
        for m in range(2):
            options = []
            for share in (0.0, 0.1, 0.25, 0.4, 0.6):
                on = f[:, j] > share * f[:, j].max()
                hits = (on & marks[:, m]).sum().item()
                options.append(
                    (
                        hits / on.sum().item() * hits / marks[:, m].sum().item(),
                        hits / on.sum().item(),
                        share * f[:, j].max().item(),
                    )
                )
            best = max(options, key=lambda o: o[0])
            assert (
                found["precision"][j, m] * found["coverage"][j, m]
                == pytest.approx(best[0], abs=1e-6)
                and found["precision"][j, m] == pytest.approx(best[1], abs=1e-6)
                and found["threshold"][j, m] == pytest.approx(best[2], abs=1e-6)
            )
    assert (found["precision"][8] == 0).all() and (found["coverage"][8] == 0).all()


# ---------------------------------------------------------------- switches
def feature_switch(n=20):
    d = random_directions(n, D, seed=100, relu=True)
    owner = torch.full((n,), -1)
    owner[[0, 1]], owner[[2, 3]], owner[4] = 0, 1, 2
    usual = torch.rand(3, n, generator=seeded(1)) * 3 * (owner == torch.arange(3)[:, None])
    gates, gate_threshold = torch.zeros(n, dtype=torch.bool), torch.zeros(n)
    gates[[7, 8]], gate_threshold[[7, 8]] = True, torch.tensor([0.5, 0.9])
    return Switch(
        Lens(None, "resid.0", d),
        ["a", "b", "c"],
        owner=owner,
        threshold=torch.full((n,), 0.4),
        gates=gates,
        gate_threshold=gate_threshold,
        write=usual,
        neutral=torch.zeros(n),
        coverage=torch.ones(1, 3),
    )


def plain_switch(s, x, t, *, strength, start=True, swap=True):
    out = x.clone()
    for b in range(len(x)):
        for i in range(x.shape[1]):
            f = s.lens.dictionary.encode(x[b, i])
            others = [j for j in range(len(f)) if s.owner[j] >= 0 and s.owner[j] != t]
            fires = (
                swap
                and any(f[j] > s.threshold[j] for j in others)
                or start
                and any(f[j] > s.gate_threshold[j] for j in s.gates.nonzero()[:, 0])
            )
            if not fires:
                continue
            for j in others:
                out[b, i] -= f[j] * s.lens.dictionary.directions[j]
            for j in (s.owner == t).nonzero()[:, 0].tolist():
                out[b, i] += (
                    max(0.0, float(strength * s.write[t, j] - f[j]))
                    * s.lens.dictionary.directions[j]
                )
    return out


@pytest.mark.parametrize("kw", [{}, dict(start=False), dict(swap=False)])
def test_a_switch_of_features_is_what_a_loop_does_row_by_row(kw):
    s, x = feature_switch(), torch.randn(6, 5, D, generator=seeded(3))
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    want = torch.cat(
        [
            plain_switch(s, x[i : i + 1], t, strength=1.5, **kw)
            for i, t in enumerate(target.tolist())
        ]
    )
    assert torch.allclose(
        s.fn(target, strength=1.5, **kw)(x), want, atol=1e-4
    ) and not torch.allclose(want, x)
    assert torch.allclose(
        s.fn(1, strength=1.5, **kw)(x), plain_switch(s, x, 1, strength=1.5, **kw), atol=1e-4
    )
    still = ~s.fires(x, target, **kw)
    assert still.any() and torch.equal(s.fn(target, strength=1.5, **kw)(x)[still], x[still])


def test_off_takes_out_only_the_targets_own_features_where_they_speak():
    s, x = feature_switch(), torch.randn(3, 5, D, generator=seeded(4))
    f = s.lens.dictionary.encode(x)
    want = x - sum(
        (f[..., j : j + 1] * (f[..., j : j + 1] > 0.4)) * s.lens.dictionary.directions[j]
        for j in (2, 3)
    )
    assert torch.allclose(s.off(1)(x), want, atol=1e-5) and torch.allclose(
        s.off(torch.tensor([1, 0, 1]))(x)[[0, 2]], want[[0, 2]], atol=1e-5
    )
    with pytest.raises(ValueError, match="targets from 0 to 2, got 3"):
        s.off(3)
    with pytest.raises(ValueError, match="targets from 0 to 2, got -1"):
        s.fn(torch.tensor([0, -1]))


def code_switch(groups=2, n_codes=12):
    g = seeded(5)
    book = Codebook(D, n_codes, 3, groups=groups)
    owner = torch.randint(-1, 3, (groups, n_codes), generator=g)
    write = torch.tensor([[0, 1, 2], [3, -1, 4]])
    gates, lens = torch.rand(groups, n_codes, generator=g) < 0.2, Lens(None, "mlp.0", book)
    return Switch(
        lens,
        ["a", "b", "c"],
        owner=owner.flatten(),
        threshold=torch.zeros(groups * n_codes),
        gates=gates.flatten(),
        gate_threshold=torch.zeros(groups * n_codes),
        write=lens.one_each(write),
        neutral=lens.one_each(torch.tensor([[5], [-1]]))[0],
        coverage=torch.ones(groups, 3),
    )


@pytest.mark.parametrize(
    "kw",
    [
        {},
        dict(start=False),
        dict(swap=False),
        dict(groups=[0]),
        dict(write=torch.tensor([[7, 7, 7], [8, 8, 8]])),
    ],
)
def test_a_switch_of_codes_is_a_table(kw):
    s, ids = code_switch(), torch.randint(0, 12, (4, 6, 2, 3), generator=seeded(6))
    target, write = torch.tensor([0, 1, 2, 1]), kw.get("write", s.lens.codes(s.write))
    if "write" in kw:
        kw = kw | dict(write=s.lens.one_each(write))
    owner, gates = s.owner.view(2, -1), s.gates.view(2, -1)
    want = ids.clone()
    for b in range(4):
        t = int(target[b])
        for i, g, k in ((i, g, k) for i in range(6) for g in range(2) for k in range(3)):
            c = int(ids[b, i, g, k])
            change = (
                kw.get("swap", True)
                and owner[g, c] >= 0
                and owner[g, c] != t
                or kw.get("start", True)
                and gates[g, c]
            )
            if change and write[g, t] >= 0 and g in kw.get("groups", [0, 1]):
                want[b, i, g, k] = write[g, t]
    assert torch.equal(s.fn(target, **kw)(ids), want) and not torch.equal(want, ids)
    assert torch.equal(s.fn(2, **kw)(ids)[2], want[2])


def test_off_writes_the_code_of_open_places_where_there_is_one():
    s, ids = code_switch(), torch.randint(0, 12, (2, 6, 2, 3), generator=seeded(7))
    new = s.off(torch.tensor([0, 2]))(ids)
    assert torch.equal(new[:, :, 1], ids[:, :, 1])  # the second group has none
    for b, t in ((0, 0), (1, 2)):
        assert torch.equal(
            new[b, :, 0], torch.where(s.owner[:12][ids[b, :, 0]] == t, 5, ids[b, :, 0])
        )


def test_forced_codes_take_the_places_asked_for():
    book, ids = (
        Codebook(D, 12, 3, groups=2),
        torch.randint(0, 12, (3, 4, 2, 3), generator=seeded(8)),
    )
    features, target = (
        [[3, 12 + 4, 5], [1]],
        torch.tensor([0, 1, 0]),
    )  # 3 and 5 in group 0, 4 in group 1; 1 in group 0
    last = force_codes(book, features, target)(ids.clone())
    assert (
        (last[0, :, 0, -1] == 3).all()
        and (last[0, :, 0, -2] == 5).all()
        and (last[2, :, 1, -1] == 4).all()
        and torch.equal(last[0, :, 0, 0], ids[0, :, 0, 0])
    )
    assert (
        (last[1, :, 0, -1] == 1).all()
        and torch.equal(last[1, :, 1], ids[1, :, 1])
        and torch.equal(last[1, :, 0, :2], ids[1, :, 0, :2])
    )
    first = force_codes(book, features, 0, slots="first")(ids.clone())
    assert (
        (first[:, :, 0, 0] == 3).all()
        and (first[:, :, 0, 1] == 5).all()
        and torch.equal(first[:, :, 0, 2], ids[:, :, 0, 2])
    )
    assert (force_codes(book, features, 1, slots="all")(ids.clone())[:, :, 0] == 1).all() and (
        force_codes(book, features, 0, slots="all")(ids.clone())[:, :, 0] == 3
    ).all()  # the first of a group
    with pytest.raises(ValueError, match="features from 0 to 23"):
        force_codes(book, [[24]], 0)
    with pytest.raises(ValueError, match="slots='middle'"):
        force_codes(book, features, 0, slots="middle")


def test_all_codes_of_a_token_are_written_everywhere_or_once(tiny):
    cb = add_codebooks(tiny, ["mlp.*", "heads.0"], n_codes=8, k=2).eval()
    ids = torch.randint(3, V, (1, 6), generator=seeded(1))
    codes = token_codes(cb, ids[0].tolist(), 3)
    cb(input_ids=ids)
    assert set(codes) == set(cb.codebooks) and all(
        (codes[s] == cb.ids[s][0, 3]).all() for s in codes
    )
    other = torch.randint(3, V, (2, 5), generator=seeded(2))
    with cb.edit_codes(write_codes(codes)):
        cb(input_ids=other)
    assert all((cb.ids[s] == codes[s]).all() for s in codes)
    cb(input_ids=other)
    plain = cb.ids["heads.0"].clone()
    with cb.edit_codes(write_codes(codes, first=True)):
        cb(input_ids=other)
        assert (cb.ids["heads.0"][:, -1] == codes["heads.0"]).all() and (
            cb.ids["heads.0"][:, :-1] == plain[:, :-1]
        ).all()  # the first site: nothing before it has changed
        cb(input_ids=other[:, :1])
        assert (
            cb.ids["heads.0"] == plain[:, :1]
        ).all()  # later calls under generate hold one position
    with pytest.raises(ValueError, match="a text of 6 tokens has no token 6"):
        token_codes(cb, ids[0].tolist(), 6)


def test_topic_words_are_the_topics_own_and_keep_forms_together():
    words = topic_words()
    assert list(words) == list(TOPICS)
    for i, (topic, some) in enumerate(words.items()):
        flat = [t for forms in some for t in forms]
        assert len(flat) == len(set(flat)) > 50 and all(
            WORD_TABLES["topic_word"][t] == i for t in flat
        )
        assert sum(len(forms) == 2 for forms in some) > 10  # a noun and its plural


# ---------------------------------------------------------------- finding them
def test_switches_are_found_on_every_family_and_point_where_they_should(tiny):
    text = some_text(60)
    choices = find_choices(text, GROUPS, HELD)
    with capture(tiny, "resid.0") as acts, torch.no_grad():
        tiny(input_ids=text.ids)
    x = acts["resid.0"]
    d = random_directions(30, D, relu=True)
    f = d.encode(x[choices.look])
    places, features = f.nonzero().T
    marks = torch.stack(
        [
            choices.next[choices.look] == 0,
            choices.next[choices.look] == 1,
            choices.open[choices.look],
        ],
        1,
    )
    found = precision_coverage(places, features, f[places, features], marks=marks, n_feats=30)
    s = find_switches(tiny, {"resid.0": d}, text, choices=choices, precision=0.05, at_least=2)[
        "resid.0"
    ]
    product, enough = (
        found["precision"] * found["coverage"],
        (found["precision"] >= 0.05)
        & (((f[:, :, None] > found["threshold"]) & marks[:, None]).sum(0) >= 2),
    )
    best = torch.where(enough[:, :2], found["precision"][:, :2], 0.0).max(1)
    owner = torch.where(best.values > 0, best.indices, -1)
    for t in range(2):
        if not (owner == t).any():
            owner[torch.where(owner < 0, product[:, t], -1.0).argmax()] = t
    assert (
        torch.equal(s.owner, owner) and torch.equal(s.gates, enough[:, 2]) and (s.owner >= 0).any()
    )
    for t in range(2):
        assert torch.allclose(s.write[t], f[marks[:, t]].mean(0) * (owner == t), atol=1e-5)


def test_a_switch_leaves_no_hooks_and_its_mistakes_are_named(tiny):
    text = some_text(60)
    choices = find_choices(text, GROUPS, HELD)
    d = random_directions(30, D, relu=True)
    with capture(tiny, "resid.0") as acts, torch.no_grad():
        tiny(input_ids=text.ids)
    x = acts["resid.0"]
    s = find_switches(tiny, {"resid.0": d}, text, choices=choices, precision=0.05, at_least=2)[
        "resid.0"
    ]
    before = hooks(tiny)
    with (
        steer(tiny, {"resid.0": s}, 0, strength=5.0),
        capture(tiny, "resid.0") as acts,
        torch.no_grad(),
    ):
        assert hooks(tiny) != before
        tiny(input_ids=text.ids)
    assert (
        hooks(tiny) == before
        and torch.allclose(acts["resid.0"], s.fn(0, strength=5.0)(x), atol=1e-4)
        and not torch.allclose(acts["resid.0"], x)
    )
    with (
        pytest.raises(ValueError, match="2 targets for a batch of 60"),
        steer(tiny, {"resid.0": s}, torch.tensor([0, 1])),
        torch.no_grad(),
    ):
        tiny(input_ids=text.ids)
    assert hooks(tiny) == before
    with pytest.raises(ValueError, match="fewer than 4 places before words of 'c'"):
        find_switches(
            tiny, {"resid.0": d}, text, choices=find_choices(text, GROUPS | {"c": [V + 9]}, HELD)
        )
    with pytest.raises(ValueError, match="no switch came"), steer(tiny, {}, 0):
        pass


def coded_text(neox):
    text = some_text(60)
    cb = add_codebooks(neox, ["mlp.0", "heads.0"], 16, select="euclidean")
    cb = cb.init_from_data(text.ids, generator=seeded(0)).eval()
    return text, find_choices(text, GROUPS, HELD), cb


def test_codes_are_found_by_what_stands_there(neox):
    text, choices, cb = coded_text(neox)
    found = find_switches(cb, cb.codebooks, text, choices=choices, precision=0.05, at_least=2)
    cb(input_ids=text.ids)
    ids, nxt = cb.ids["mlp.0"][..., 0, 0][choices.look], choices.next[choices.look]
    s = found["mlp.0"]
    for c in range(16):
        right = torch.stack([((ids == c) & (nxt == t)).sum() for t in range(2)])
        p = right / (ids == c).sum().clamp(min=1)
        want = [t for t in range(2) if right[t] >= 2 and p[t] >= 0.05]
        assert int(s.owner[c]) == (max(want, key=lambda t: p[t]) if want else -1)
    for t in range(2):
        own = [c for c in range(16) if s.owner[c] == t]
        rank = {
            c: ((ids == c) & (nxt == t)).sum().item() ** 2 / max(1, (ids == c).sum().item())
            for c in own
        }
        assert int(s.lens.codes(s.write)[0, t]) == (
            max(own, key=rank.get) if own else -1
        ) and s.coverage[0, t] == pytest.approx(
            sum(((ids == c) & (nxt == t)).sum().item() for c in own) / (nxt == t).sum().item(),
            abs=1e-6,
        )
    gates = [
        c
        for c in range(16)
        if (right := ((ids == c) & choices.open[choices.look]).sum()) >= 2
        and right / (ids == c).sum() >= 0.05
    ]
    assert s.gates.nonzero()[:, 0].tolist() == gates and int(
        s.lens.codes(s.neutral[None])[0, 0]
    ) == (
        max(gates, key=lambda c: ((ids == c) & choices.open[choices.look]).sum()) if gates else -1
    )
    assert len(s.owner) == 16 and found["heads.0"].lens.parts == neox.config.num_attention_heads


def test_codes_of_a_topic_are_ranked_by_precision_and_coverage(neox):
    text, choices, cb = coded_text(neox)
    ranked = topic_features(cb, cb.codebooks, text, choices=choices, n=5)
    best = ranked["a"][0]
    assert [r["precision"] * r["coverage"] for r in ranked["a"]] == sorted(
        [r["precision"] * r["coverage"] for r in ranked["a"]], reverse=True
    )
    group, code = divmod(best["feature"].id, 16)
    cb(input_ids=text.ids)
    fires = (cb.ids[best["feature"].site][..., group, 0] == code) & choices.look
    document = (text.ids == BOS).flatten().cumsum(0).view_as(text.ids)
    topical = document[choices.look & (choices.about == 0)].unique()
    assert best["precision"] == pytest.approx(
        (fires & (choices.about == 0)).sum().item() / fires.sum().item()
    ) and best["coverage"] == pytest.approx(
        torch.isin(topical, document[fires]).float().mean().item()
    )


def test_with_several_codes_a_state_a_share_stays_a_share(neox):
    "Codes that are chosen twice, or several that are right at one place, count once."
    text = some_text(60)
    cb = (
        add_codebooks(neox, ["mlp.0"], 12, k=4, select="residual")
        .init_from_data(text.ids, generator=seeded(0))
        .eval()
    )
    choices = find_choices(text, GROUPS, HELD)
    s = find_switches(cb, cb.codebooks, text, choices=choices, precision=0.05, at_least=2)["mlp.0"]
    cb(input_ids=text.ids)
    ids, nxt = cb.ids["mlp.0"][..., 0, :][choices.look], choices.next[choices.look]
    for t in range(2):
        assert s.coverage[0, t] == pytest.approx(
            (s.owner[ids] == t).any(-1)[nxt == t].float().mean().item(), abs=1e-6
        )
    assert (s.coverage <= 1).all() and (s.coverage > 0).any()
    with pytest.raises(ValueError, match="no feature at mlp.0 speaks for"):
        find_switches(cb, cb.codebooks, text, choices=choices, precision=0.999)
    with (
        pytest.raises(ValueError, match="need the CodebookModel they were found in"),
        steer(neox, {"mlp.0": s}, 0),
    ):
        pass


def test_edits_keep_half_precision(neox):
    s, x = feature_switch(), torch.randn(3, 5, D, generator=seeded(4)).bfloat16()
    neox = neox.bfloat16()
    with steer(neox, {"resid.0": s}, 1), torch.no_grad():
        assert neox(input_ids=some_text().ids).logits.dtype == torch.bfloat16
    assert s.off(1)(x).shape == x.shape and s.fires(x, 0).dtype == torch.bool


def test_mean_differences_are_means(neox):
    text = some_text(40)
    choices = find_choices(text, GROUPS, HELD)
    with capture(neox, "resid.1") as acts, torch.no_grad():
        neox(input_ids=text.ids)
    for at in ("next", "about"):
        mean = torch.stack(
            [acts["resid.1"][choices.look & (getattr(choices, at) == t)].mean(0) for t in range(2)]
        )
        assert torch.allclose(
            mean_difference(neox, "resid.1", text, choices=choices, at=at, batch=7),
            mean - mean.mean(0),
            atol=1e-5,
        )
    with pytest.raises(ValueError, match="at='here'"):
        mean_difference(neox, "resid.1", text, choices=choices, at="here")
    with pytest.raises(ValueError, match="no state of c"):
        mean_difference(neox, "resid.1", text, choices=find_choices(text, GROUPS | {"c": [V + 9]}))


# ---------------------------------------------------------------- writing
def test_generation_is_the_same_one_by_one_and_with_the_cache(tiny):
    prompts = [[BOS, 4, 9], [BOS, 5], [BOS, 7, 8, 3, 2]]
    v = 3 * torch.randn(3, D, generator=seeded(9))

    def way(rows):
        return intervene(tiny, {"resid.0": add_vector(v[rows])})

    got = generate(tiny, Tok, prompts, n_tokens=6, temperature=1e-4, steer=way, progress=False)
    for i, (prompt, new) in enumerate(zip(prompts, got)):
        assert (
            generate(
                tiny,
                Tok,
                [prompt],
                n_tokens=6,
                temperature=1e-4,
                steer=lambda rows: intervene(tiny, {"resid.0": add_vector(v[i])}),
                progress=False,
            )[0]
            == new
        )
        ids = list(prompt)
        for _ in range(len(new)):  # without a cache, all in one piece
            with torch.no_grad(), intervene(tiny, {"resid.0": add_vector(v[i])}):
                ids.append(
                    int(tiny(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                )
        assert ids[len(prompt) :] == new and (len(new) == 6 or new[-1] == BOS)
    assert got == generate(
        tiny, Tok, prompts, n_tokens=6, temperature=1e-4, steer=way, batch=2, progress=False
    )
    assert generate(tiny, Tok, prompts, n_tokens=6, temperature=1e-4, progress=False) != got


def test_generation_refuses_what_cannot_be_and_leaves_nothing_behind(neox):
    with pytest.raises(ValueError, match="at least one token"):
        generate(neox, Tok, [[BOS], []])
    with pytest.raises(ValueError, match="temperature above 0, got 4 and 0"):
        generate(neox, Tok, [[BOS]], n_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="n_tokens of at least 1"):
        generate(neox, Tok, [[BOS]], n_tokens=0)
    with pytest.raises(ValueError, match="the model reads"):
        generate(neox, Tok, [[BOS]], n_tokens=10**6)
    before = hooks(neox)

    def broken(x):
        raise RuntimeError("oh")

    with pytest.raises(RuntimeError, match="oh"):
        generate(
            neox, Tok, [[BOS]], n_tokens=3, steer=lambda rows: intervene(neox, {"resid.0": broken})
        )
    assert hooks(neox) == before
    neox.train()
    generate(neox, Tok, [[BOS]], n_tokens=2)
    assert neox.training
    torch.manual_seed(5)
    x = torch.rand(1)
    torch.manual_seed(5)
    generate(neox, Tok, [[BOS]], n_tokens=2)
    assert torch.rand(1) == x  # the caller's random numbers are left alone
    a, b, c = (generate(neox, Tok, [[BOS]] * 4, n_tokens=8, seed=s) for s in (0, 0, 1))
    assert a == b != c


def test_a_texts_nats_are_its_tokens_losses(neox):
    prompts, samples = [[BOS, 4, 9], [BOS, 5]], [[6, 7, 8], [2, 3, 4, 9, 9]]
    nats = text_nats(neox, prompts, samples, batch=1)
    for prompt, sample, n in zip(prompts, samples, nats):
        losses = token_losses(neox, Text(torch.tensor([prompt + sample]), BOS, PAD))[0]
        assert n.item() == pytest.approx(losses[len(prompt) :].sum().item(), abs=1e-4)
    assert torch.allclose(text_nats(neox, prompts, samples), nats, atol=1e-4)


# ---------------------------------------------------------------- counting
def test_words_are_counted_and_ties_are_nobodys():
    words, samples = {"a": [1, 2], "b": [3]}, [[1, 2, 3], [9], [3, 1], [3, 3, 2]]
    assert count_words(samples, words).tolist() == [[2, 1], [0, 0], [1, 1], [1, 2]] and recognise(
        samples, words
    ).tolist() == [0, -1, -1, 1]
    assert recognise(samples, {"b": [3]}).tolist() == [0, -1, 0, 0]
    assert count_words([], words).shape == (0, 2) and distinct([[3]]) == 1.0
    assert (
        distinct([[1, 1, 1, 1], [1, 2, 3, 4]]) == pytest.approx((1 / 3 + 1) / 2)
        and distinct([[1, 2], [5]]) == 1.0
    )


def test_the_strength_is_chosen_on_one_half_and_measured_on_the_other():
    def effect(even, odd, loss_even, *, loss_odd, n=20):
        right, nats = torch.zeros(n, dtype=torch.bool), torch.empty(n)
        right[::2], right[1::2] = (
            torch.arange(n // 2) < even * n // 2,
            torch.arange(n // 2) < odd * n // 2,
        )
        nats[::2], nats[1::2] = 10 * loss_even, 10 * loss_odd
        return Effect([[1, 2]] * n, right, right, nats, torch.full((n,), 10.0))

    some = {
        1.0: effect(0.2, 0.9, 1.0, loss_odd=1.0),
        2.0: effect(0.8, 0.3, 1.4, loss_odd=9.0),
        3.0: effect(1.0, 1.0, 5.0, loss_odd=1.0),
    }
    s, best = best_within(some, 1.5)
    assert (
        s == 2.0
        and best.rate == pytest.approx(0.3)
        and best.loss == pytest.approx(9.0)
        and len(best.samples) == 10
    )
    part = some[1.0][some[1.0].right]
    assert (
        len(part.samples) == int(some[1.0].right.sum())
        and part.rate == 1.0
        and len(some[1.0][:3].samples) == 3
    )
    assert best_within(some, 0.5)[0] == 1.0 and "rate 0.550" in repr(some[1.0])


# ---------------------------------------------------------------- the shipped model
@pytest.fixture(scope="module")
def setting():
    model, tok = load_lm("stories")
    text = load_text(tok, n_tokens=80_000, length=256, split="train", seed=3)
    choose, count = split_words(
        {
            t: [ID[w] for p in ("noun", "verb", "adj", "place") for w in LISTS[f"topic_{p}"][t]]
            for t in TOPICS
        }
    )
    return model, tok, text, find_choices(text, choose, count), count


def drawn_codes(codes):
    "A random code for each target, in every switch."
    return {
        site: s.lens.one_each(
            torch.randint(0, 2048, (s.lens.parts, len(s.names)), generator=seeded(100))
        )
        for site, s in codes.items()
    }


def test_shipped_features_and_codes_steer_and_random_ones_do_not(setting):
    model, tok, text, choices, count = setting
    prompt = tok(
        "Once upon a time there was a little girl named Anna . It was a rainy morning in May .",
        add_special_tokens=False,
    )["input_ids"]
    target = torch.arange(10).repeat_interleave(5)

    def rate(way=None, of=model):
        return effect_and_price(
            of,
            tok,
            [[tok.bos_token_id, *prompt]] * 50,
            target=target,
            words=count,
            judge=model,
            steer=way,
            n_tokens=70,
            progress=False,
        )

    sw = find_switches(model, {"resid.2": load_sae(data_path("sae/last"))}, text, choices=choices)
    on, none = rate(lambda r: steer(model, sw, target[r], strength=3.0)), rate()
    assert on.rate > none.rate + 0.4 and on.loss < 1.5 * none.loss
    cb = CodebookModel.from_pretrained(data_path("codes/single"))
    books = {site: cb.codebooks[site] for site in ("mlp.2", "heads.2")}
    codes = find_switches(cb, books, text, choices=choices)
    shuffled = drawn_codes(codes)
    written = rate(lambda r: steer(cb, codes, target[r]), cb)
    control = rate(
        lambda r: cb.edit_codes(
            {site: s.fn(target[r], write=shuffled[site]) for site, s in codes.items()}
        ),
        cb,
    )
    assert written.rate > max(control.rate, none.rate) + 0.4
    assert written.loss < 1.5 * none.loss


# ---------------------------------------------------------------- panel and page
def test_the_panel_writes_with_every_way_and_says_what_went_wrong(setting):
    pytest.importorskip("ipywidgets")
    from codebook_tutorial.show.steering import steering_panel

    model, tok, text, choices, _ = setting
    sae = load_sae(data_path("sae/last"))
    sw = find_switches(model, {"resid.2": sae}, text, choices=choices)

    def bad(t, s):
        raise ValueError("no <such> thing")

    panel = steering_panel(
        tok,
        {"one": [1, *tok("Once upon a time", add_special_tokens=False)["input_ids"]]},
        {
            "switch": (model, choices.names, lambda t, s: steer(model, sw, t, strength=s)),
            "one feature": (
                model,
                768,
                lambda f, s: intervene(model, {"resid.2": add_vector(40 * s * sae.directions[f])}),
            ),
            "broken": (model, ["x"], bad),
        },
        generate=generate,
        n_tokens=30,
    )
    prompt, way, name, number, row, out = panel.children
    assert name.value == "dragon" and "as it is" in out.value and "switch, dragon x 2" in out.value
    way.value = "one feature"
    assert number.max == 767 and number.layout.display == "" and name.layout.display == "none"
    number.value = 50
    row.children[0].value = 8.0
    row.children[2].click()
    assert "one feature, 50 x 8" in out.value and "<mark>" in out.value
    way.value = "broken"
    row.children[2].click()
    assert "no &lt;such&gt; thing" in out.value and not row.children[2].disabled


PANEL = """from codebook_tutorial.core import data_path
from codebook_tutorial.dictionary.base import Lens, random_directions
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.model.generate import generate
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.sites import intervene
from codebook_tutorial.feature.steer import add_vector
from codebook_tutorial.show.steering import steering_panel
model, tok = load_lm("stories")
sae = load_sae(data_path("sae/last"))
prompt = [tok.bos_token_id, *tok("Once upon a time", add_special_tokens=False)["input_ids"]]
def one(f, s):
    return intervene(model, {"resid.2": add_vector(20 * s * sae.directions[f])})"""


def test_the_panel_in_jupyterlab_writes_what_python_writes(tmp_path, browser):  # noqa: F811
    """Run All, choose a feature, move the slider with the keyboard, write:
    the text is the one that generate gives, its new words are marked."""
    here = {}
    exec(PANEL, here)
    with jupyter(
        tmp_path,
        [
            PANEL,
            "steering_panel(tok, {'one': prompt}, {'one feature': (model, len(sae.directions), "
            "one)}, generate=generate, n_tokens=30)",
        ],
    ) as address:
        context = browser.new_context(viewport=dict(width=1300, height=1400))
        page = context.new_page()
        run_all(page, address)
        page.locator(".widget-button").wait_for(timeout=120_000)
        page.locator(".widget-text input[type=number]").first.fill("50")
        page.keyboard.press("Enter")
        slider = page.locator(".widget-slider .noUi-handle")
        slider.focus()
        [slider.press("ArrowRight") for _ in range(4)]
        strength = float(page.locator(".widget-slider .widget-readout").inner_text())
        page.get_by_role("button", name="write").click()
        shown = page.locator(".widget-html").last
        page.wait_for_function(
            "s => [...document.querySelectorAll('.widget-html')].some(e => "
            "e.textContent.includes(s))",
            arg=f"one feature, 50 x {strength:g}",
            timeout=30_000,
        )
        plain, steered = (
            tok_text(here, steer) for steer in (None, lambda rows: here["one"](50, strength))
        )
        words = " ".join(shown.inner_text().split())
        assert strength > 2 and plain != steered
        assert all(" ".join(t.split()) in words for t in (plain, steered))
        assert shown.locator("mark").count() >= 1
        context.close()


def tok_text(here, steer):
    return here["tok"].decode(
        generate(
            here["model"], here["tok"], [here["prompt"]], n_tokens=30, steer=steer, progress=False
        )[0],
        skip_special_tokens=True,
    )


def test_a_page_needs_the_plain_text_beside_the_steered(tmp_path):
    from codebook_tutorial.show.steering import export_steering

    row = dict(prompt="p", way="w", towards="t", strength=2.0, text="a b")
    with pytest.raises(ValueError, match="no text with way None for the prompt 'p'"):
        export_steering(tmp_path / "x.html", [row])
    with pytest.raises(ValueError, match="no steered sample"):
        export_steering(tmp_path / "x.html", [row | dict(way=None)])
    with pytest.raises(ValueError, match="two samples have the same"):
        export_steering(tmp_path / "x.html", [row | dict(way=None), row, row])
    assert not list(tmp_path.iterdir())
    path = export_steering(
        tmp_path / "x.html", [row | dict(way=None, text="a c </script><b>"), row], "T <i>"
    )
    data = json.loads(path.read_text().split('id="data">')[1].split("</script>")[0])
    assert (
        data["rows"][0]["words"] == [["a", False], ["b", True]]
        and "<b>" not in path.read_text().split('id="data">')[1].split("</script>")[0]
        and "T &lt;i&gt;" in path.read_text()
    )
