"""Reading a feature, taking it out, effects on logits, causal trees, against plain code.

For every kind of dictionary and family of models."""

import pytest
import torch
from test_sites import CONFIGS, D, V, hooks
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Lens, basis, random_directions
from codebook_tutorial.dictionary.baselines import Affine
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.train import refit, train_sae
from codebook_tutorial.feature.ablate import (
    ablate_nodes,
    check_tree,
    edit_lengths,
    others_active,
)
from codebook_tutorial.feature.read import (
    best_features,
    strong_contexts,
    token_histogram,
)
from codebook_tutorial.feature.trace import (
    FeatureTree,
    causal_tree,
    direct_effects,
    feature_effects,
    logit_effects,
    nearest_across,
)
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.model.text import Text
from codebook_tutorial.show import draw_histogram

BOS, PAD = 1, 0


@pytest.fixture(params=CONFIGS)
def tiny(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


@pytest.fixture
def neox():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]).eval()


def some_text(rows=8, length=24):
    "Rows of two documents each, with padding behind the second in every other row."
    ids = torch.randint(2, V, (rows, length), generator=seeded(0))
    ids[:, 0] = ids[:, 11] = BOS
    ids[::2, -3:] = PAD
    return Text(ids, BOS, PAD)


def contexts_of(text=None, n=6):
    text = text or some_text()
    f = torch.rand(text.ids.shape, generator=seeded(1)) * text.mask
    return strong_contexts(text, f, n)


def dictionaries(model, sites=("resid.0", "resid.1"), n=24):
    return {site: random_directions(n, D, seed=100 + i, relu=True) for i, site in enumerate(sites)}


def states(n=400):
    return torch.randn(n, D, generator=seeded(2)) @ torch.randn(D, D, generator=seeded(3)) / 4 + 0.3


def plain_ends(model, contexts, edits=None):
    with torch.no_grad(), intervene(model, edits or {}):
        return (
            model(input_ids=contexts.ids)
            .logits[torch.arange(len(contexts)), contexts.last]
            .log_softmax(-1)
        )


# ---------- reading
def test_activations_along_a_text_are_those_of_the_states(tiny):
    text, book = some_text(), Codebook(D, 9, k=2)
    for dictionary in (random_directions(7, D, relu=True), book):
        with torch.no_grad(), capture(tiny, "resid.1") as acts:
            tiny(input_ids=text.ids)
        want = dictionary.encode(acts["resid.1"])
        if dictionary is book:
            want = (want != 0).float()
        found = Lens(tiny, "resid.1", dictionary).read(text, batch=3)
        assert (
            torch.allclose(found[text.mask], want[text.mask], atol=1e-5)
            and not found[~text.mask].any()
            and not found.requires_grad
        )
        assert torch.equal(
            Lens(tiny, "resid.1", dictionary).read(text, features=[5, 2], batch=3),
            found[..., [5, 2]],
        ) and torch.equal(
            Lens(tiny, "resid.1", dictionary).read(text, features=5)[..., 0], found[..., 5]
        )


def test_codes_of_a_codebook_model_are_those_of_the_pass(neox):
    cb = add_codebooks(neox, ["mlp.0", "heads.1"], n_codes=12, k=3).eval()
    text = some_text()
    with torch.no_grad():
        cb(input_ids=text.ids)
    book = cb.codebooks["heads.1"]
    ids = cb.ids["heads.1"] + 12 * torch.arange(book.weight.shape[0])[:, None]
    want = (
        torch.zeros(*text.ids.shape, len(book.directions)).scatter(-1, ids.flatten(2), 1.0)
        * text.mask[..., None]
    )
    assert torch.equal(Lens(cb, "heads.1", book).read(text), want)


def test_the_best_feature_is_the_one_that_was_made_to_be(neox):
    text = some_text(16)
    d = basis(D, relu=True)
    f = Lens(neox, "resid.0", d).read(text)
    truth = (f[..., 3] >= 0.5 * f[:8, :, 3].max()) & (f[..., 3] > 0)
    found = best_features(
        neox, "resid.0", d, text=text, truths={"a": truth, "b": ~truth & text.mask}
    )
    assert (
        found["a"].feature == 3
        and found["a"].f1 == 1
        and found["a"].f1_held_out == 1
        and torch.equal(found["a"].acts, f[..., 3])
        and found["b"].f1 < 1
    )


def test_the_best_code_is_found_by_counting(neox):
    text, book = some_text(16), Codebook(D, 6)
    f = Lens(neox, "resid.0", book).read(text)
    j = int(f.sum((0, 1)).argmax())
    truth = f[..., j] > 0
    found = best_features(neox, "resid.0", book, text=text, truths={"a": truth})["a"]
    assert (found.feature, found.f1) == (j, 1) and torch.equal(found.acts, f[..., j])
    shifted = truth.roll(1, 1)

    def score(some, true):
        return (2 * (some & true).sum() / (some.sum() + true.sum()).clamp(min=1)).item()

    found = best_features(neox, "resid.0", book, text=text, truths={"a": shifted})["a"]
    want = [score(f[:8, :, i] > 0, (shifted & text.mask)[:8]) for i in range(6)]
    assert found.f1 == pytest.approx(max(want)) and found.f1_held_out == pytest.approx(
        score(f[8:, :, found.feature] > 0, (shifted & text.mask)[8:])
    )


def test_a_truth_that_does_not_fit_is_refused(neox):
    text = some_text()
    with pytest.raises(
        ValueError, match=r"expected a truth for every position \[8, 24\], got \[8, 23\] for 'a'"
    ):
        best_features(
            neox, "resid.0", basis(D), text=text, truths={"a": torch.ones(8, 23, dtype=torch.bool)}
        )
    with pytest.raises(ValueError, match="'a' holds nowhere in the first half"):
        best_features(
            neox, "resid.0", basis(D), text=text, truths={"a": torch.zeros(8, 24, dtype=torch.bool)}
        )


def test_the_histogram_counts_every_active_token_once():
    draw = seeded(0)
    f, tokens = (
        torch.randn(500, generator=draw).relu(),
        [f"w{int(i)}" for i in torch.randint(0, 12, (500,), generator=draw)],
    )
    found = token_histogram(f, tokens, bins=5, top=4)
    assert (
        found["counts"].sum() == (f > 0).sum()
        and len(found["tokens"]) == 5
        and found["tokens"][-1] == "other"
        and found["edges"][-1] == f.max()
    )
    for b in range(5):
        inside = [
            t
            for v, t in zip(f.tolist(), tokens)
            if v > 0 and (found["edges"][b] < v or b == 0) and v <= found["edges"][b + 1]
        ]
        assert found["counts"][b].tolist() == [inside.count(t) for t in found["tokens"][:-1]] + [
            sum(t not in found["tokens"][:-1] for t in inside)
        ]
    assert draw_histogram(found, "t", "alt")._repr_png_()[:4] == b"\x89PNG"


def test_a_histogram_of_few_tokens_and_of_none():
    found = token_histogram([0.0, 1.0, 2.0], ["a", "b", "b"])
    assert (
        found["counts"].sum() == 2
        and found["tokens"][0] == "b"
        and draw_histogram(found, "t", "alt")
    )
    with pytest.raises(ValueError, match="bins and top of at least 1, got 0 and 6"):
        token_histogram([0.0, 1.0], ["a", "b"], bins=0)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        draw_histogram(token_histogram([1.0] * 12, [str(i) for i in range(12)], top=9), "t", "alt")
    with pytest.raises(ValueError, match="active at none"):
        token_histogram([0.0, 0.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"one activation per token, got \[2\] and 3 tokens"):
        token_histogram([0.0, 0.0], ["a", "b", "c"])


def test_contexts_are_documents_up_to_a_strong_place():
    text = some_text()
    f = torch.rand(text.ids.shape, generator=seeded(1)) * text.mask
    c = strong_contexts(text, f, 12, seed=3)
    rows = text.ids.tolist()
    for ids, last, act, follows in zip(c.ids, c.last.tolist(), c.acts, c.next):
        assert (
            ids[0] == BOS
            and (ids[1 : last + 1] != BOS).all()
            and (ids[last + 1 :] == PAD).all()
            and act >= 0.5 * f.max()
        )
        whole = ids[: last + 1].tolist() + [follows.item()]
        assert any(row[i : i + len(whole)] == whole for row in rows for i in (0, 11))
    assert (
        torch.equal(c.there.sum(1), c.last)
        and not c.there[:, 0].any()
        and len(c[0]) == 1
        and "1 contexts" in repr(c[0])
        and len(c[:5]) == 5
        and "12 contexts" in repr(c)
        and torch.equal(c.to("cpu").ids, c.ids)
    )
    assert not torch.equal(c.ids, strong_contexts(text, f, 12, seed=4).ids[:, : c.ids.shape[1]])


def test_contexts_come_from_as_many_documents_as_there_are_and_from_where_they_may():
    text = some_text()
    f = torch.ones(text.ids.shape) * text.mask
    c = strong_contexts(text, f, 16)
    assert len({tuple(ids[1:3].tolist()) for ids in c.ids}) == 16  # 8 rows of 2 documents
    where = torch.zeros_like(text.mask)
    where[:, 5] = True
    assert (strong_contexts(text, f, 8, where=where).last == 5).all()
    with pytest.raises(
        ValueError,
        match="expected 9 places with an activation of at least 0.5 of the largest, found 8",
    ):
        strong_contexts(text, f, 9, where=where)
    assert len(strong_contexts(text, f, 9, at_least=3, where=where)) == 8
    with pytest.raises(ValueError, match="n of at least 1, got 0"):
        strong_contexts(text, f, 0)
    with pytest.raises(ValueError, match=r"`where` for every position \[8, 24\], got \[8, 23\]"):
        strong_contexts(text, f, 3, where=where[:, 1:])
    with pytest.raises(ValueError, match="active nowhere"):
        strong_contexts(text, 0 * f)
    with pytest.raises(ValueError, match="an activation for every position"):
        strong_contexts(text, f[:, 1:])


# ---------- taking out
@pytest.mark.parametrize("kind", [*KINDS, "refitted"])
def test_the_pre_activation_is_exactly_0_and_inactive_rows_untouched(kind, neox):
    x = states()
    settings = dict(k=4) if "topk" in kind or kind == "matryoshka" else {}
    sae = (
        refit(train_sae(x, 40, "tied", steps=30, batch=64), x)
        if kind == "refitted"
        else train_sae(x, 40, kind, steps=30, batch=64, **settings)
    )
    ablate, f = Lens(neox, "resid.0", sae), sae.encode(x)
    tried = [j for j in (f != 0).sum(0).topk(12).indices.tolist() if ablate.slope[j] > 0]
    assert len(tried) >= 6
    with torch.no_grad():
        for j in tried:
            on, new = f[:, j] != 0, ablate.take_out(j)(x)
            assert (
                sae.pre(new)[on, j].abs().max() < 2e-4 * sae.pre(x)[on, j].abs().max()
                and not sae.encode(new)[on, j].abs().gt(1e-4 * f[:, j].max()).any()
            )
            assert torch.equal(new[~on], x[~on])
            moved = new - x
            assert torch.allclose(
                moved,
                (moved @ sae.directions[j])[:, None]
                * sae.directions[j]
                / sae.directions[j].norm() ** 2,
                atol=1e-5,
            )  # along its direction alone
    if kind == "tied":
        assert torch.allclose(
            ablate.take_out(tried[0])(x), x - f[:, [tried[0]]] * sae.directions[tried[0]], atol=1e-5
        )


@pytest.mark.parametrize(
    "dictionary",
    [
        random_directions(20, D, relu=True),
        basis(D),
        Affine(
            torch.randn(10, D, generator=seeded(5)),
            torch.randn(10, D, generator=seeded(6)),
            torch.randn(D, generator=seeded(7)),
        ),
    ],
    ids=["random", "basis", "affine"],
)
def test_what_is_not_an_autoencoder_is_taken_out_as_well(dictionary, neox):
    x, ablate = states(), Lens(neox, "resid.0", dictionary)
    f = dictionary.encode(x)
    for j in (j for j in range(10) if ablate.slope[j] > 0):
        on, new = f[:, j] != 0, ablate.take_out(j)(x)
        assert dictionary.encode(new)[on, j].abs().max() < 1e-4 * f[
            :, j
        ].abs().max() and torch.equal(new[~on], x[~on])


def test_a_feature_that_reads_against_what_it_writes_is_refused(neox):
    d = torch.eye(D)[:3]
    crossed = Affine(d, torch.stack([d[0], -d[1], d[0]]))
    with pytest.raises(ValueError, match=r"feature 1 reads against what it writes \(e.d = -1\)"):
        Lens(neox, "resid.0", crossed).take_out([0, 1])
    assert not Lens(neox, "resid.0", crossed).amounts(states())[:, 1:].any()


@pytest.mark.parametrize("combine,k", [("sum", 1), ("sum", 3), ("mean", 3)])
def test_a_code_gives_way_to_the_mean_of_its_book(combine, k, neox):
    book, x = Codebook(D, 10, k=k, groups=2, combine=combine).eval(), states(30)
    with torch.no_grad():
        out, ids, _ = book(x)
    j, (g, own) = 13, (1, 3)
    new = Lens(neox, "resid.0", book).take_out(j)(x) - x
    scale = 1 / k if combine == "mean" else 1.0
    want = torch.zeros_like(x)
    want[:, D // 2 :] = (book.weight[g].mean(0) - book.weight[g, own]).detach() * scale
    want *= (ids[:, g] == own).any(-1)[:, None]
    assert want.any() and torch.allclose(new, want, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Maximum number of iterations")
def test_an_nmf_states_of_another_pass_and_numbers_that_are_not_there_are_refused(neox):
    from codebook_tutorial.dictionary.nmf import NMF

    with pytest.raises(ValueError, match="features of an NMF are read all together"):
        Lens(
            neox,
            "neurons.0",
            NMF(torch.rand(50, 4, generator=seeded(0)) @ torch.eye(4, 8), 4, steps=400),
        ).take_out(0)
    with pytest.raises(ValueError, match="resid.0 has features 0 to 31, got 2 to 32"):
        Lens(neox, "resid.0", basis(D)).read(some_text(), features=[2, 32])
    cb = add_codebooks(neox, "mlp.1", n_codes=8).eval()
    with torch.no_grad():
        cb(input_ids=some_text().ids)
    with pytest.raises(
        ValueError, match=r"the pass that just ran at mlp.1, \[8, 24\], got \[2, 24\]"
    ):
        Lens(cb, "mlp.1", cb.codebooks["mlp.1"]).amounts(torch.zeros(2, 24, D))


def test_effects_on_logits_are_those_of_a_plain_hook(tiny):
    c, d = contexts_of(), random_directions(24, D, relu=True)
    fn = Lens(tiny, "resid.1", d).take_out([3, 4])
    found, want = (
        logit_effects(tiny, "resid.1", fn, contexts=c),
        plain_ends(tiny, c, {"resid.1": fn}) - plain_ends(tiny, c),
    )
    assert torch.allclose(found, want - want.mean(1, keepdim=True), atol=1e-4) and hooks(tiny) == 0


def test_direct_effects_are_those_of_the_norm_and_the_unembedding(neox):
    c, d = contexts_of(), random_directions(24, D)
    with torch.no_grad(), capture(neox, "resid.2") as acts:
        before = neox(input_ids=c.ids).logits[torch.arange(len(c)), c.last]
        x = acts["resid.2"][torch.arange(len(c)), c.last]
        after = neox.get_output_embeddings()(
            neox.gpt_neox.final_layer_norm(x + 2 * c.acts[:, None] * d.directions[7])
        )
    want = after - before
    assert torch.allclose(
        direct_effects(neox, d, 7, contexts=c, scale=2.0),
        want - want.mean(1, keepdim=True),
        atol=1e-4,
    )
    with pytest.raises(
        ValueError, match="in the 32 numbers that the last block hands on, got one of 16"
    ):
        direct_effects(neox, random_directions(4, 16), 0, contexts=c)


# ---------- the tree
def at_words(contexts, fn):
    return lambda x: torch.where(contexts.there[..., None], fn(x), x)


def plain_effect(model, dicts, parent, *, child, contexts, at_end):
    def strength(edits):
        with torch.no_grad(), intervene(model, edits), capture(model, parent[0]) as acts:
            model(input_ids=contexts.ids)
        f = dicts[parent[0]].encode(acts[parent[0]])[..., parent[1]]
        return (
            f[torch.arange(len(contexts)), contexts.last].sum()
            if at_end
            else (f * contexts.there).sum()
        )

    edit = at_words(contexts, Lens(model, child[0], dicts[child[0]]).take_out(child[1]))
    return (1 - strength({child[0]: edit}) / strength({})).item()


@pytest.mark.parametrize("at_end", [True, False])
def test_effects_are_those_of_plain_hooks(tiny, at_end):
    dicts, c = dictionaries(tiny, ("resid.0", "resid.2")), contexts_of()
    children, effects, runs = feature_effects(
        tiny,
        dicts,
        ("resid.2", 5),
        child_site="resid.0",
        contexts=c,
        at_end=at_end,
        most=None,
        min_active=1,
        batch=4,
    )
    assert len(children) > 12 and 0 < runs <= len(children) * len(c)
    for j, e in list(zip(children.tolist(), effects.tolist()))[::5]:
        assert e == pytest.approx(
            plain_effect(
                tiny, dicts, ("resid.2", 5), child=("resid.0", j), contexts=c, at_end=at_end
            ),
            abs=2e-4,
        )
    assert hooks(tiny) == 0 and not any("forward" in m.__dict__ for m in tiny.modules())


def test_inside_a_block_as_well(neox):
    dicts, c = (
        {
            "mlp.0": random_directions(24, D, seed=100, relu=True),
            "attn.1": random_directions(24, D, seed=101, relu=True),
        },
        contexts_of(),
    )
    children, effects, _ = feature_effects(
        neox, dicts, ("attn.1", 5), child_site="mlp.0", contexts=c, most=None, min_active=1
    )
    for j, e in list(zip(children.tolist(), effects.tolist()))[::6]:
        assert e == pytest.approx(
            plain_effect(neox, dicts, ("attn.1", 5), child=("mlp.0", j), contexts=c, at_end=False),
            abs=2e-4,
        )


def test_the_gradient_keeps_the_largest_of_a_linear_map(neox):
    "Small edits, for which first order is all there is."
    c, dicts = contexts_of(), dictionaries(neox)
    every, effects, _ = feature_effects(
        neox, dicts, ("resid.1", 5), child_site="resid.0", contexts=c, most=None
    )
    kept, *_ = feature_effects(
        neox, dicts, ("resid.1", 5), child_site="resid.0", contexts=c, most=8
    )
    best = every[effects.abs().topk(4).indices].tolist()
    assert len(kept) == 8 and len(set(best) & set(kept.tolist())) >= 3


def test_codes_have_effects_by_whether_the_parent_is_still_chosen(neox):
    cb = add_codebooks(neox, ["mlp.0", "heads.2"], n_codes=6, k=1).eval()
    c, books = contexts_of(), cb.codebooks
    with torch.no_grad():
        cb(input_ids=c.ids)
    own = cb.ids["heads.2"][..., 0] + 6 * torch.arange(books["heads.2"].weight.shape[0])
    parent = int(own[c.there].flatten().bincount().argmax())
    children, effects, _ = feature_effects(
        cb, books, ("heads.2", parent), child_site="mlp.0", contexts=c, min_active=1
    )
    before = ((own == parent).any(-1) & c.there).sum()
    for j, e in zip(children.tolist(), effects.tolist()):
        with (
            torch.no_grad(),
            intervene(cb, {"mlp.0": at_words(c, Lens(cb, "mlp.0", books["mlp.0"]).take_out(j))}),
        ):
            cb(input_ids=c.ids)
        now = ((cb.ids["heads.2"][..., 0] + 6 * torch.arange(4) == parent).any(-1) & c.there).sum()
        assert e == pytest.approx(1 - (now / before).item(), abs=1e-5)


def test_a_tree_keeps_to_its_width_and_budget_and_knows_signs(neox):
    dicts, c = dictionaries(neox, ("resid.0", "resid.1", "resid.2")), contexts_of()
    tree = causal_tree(neox, dicts, ("resid.2", 5), contexts=c, width=2, budget=5, least=0.0)
    children = [e["child"] for e in tree.edges]
    assert 2 <= len({*children, tree.root}) <= 5 and all(
        sum(e["parent"] == p for e in tree.edges) <= 2 for p in {e["parent"] for e in tree.edges}
    )
    assert (
        tree.nodes[0] == tree.root
        and set(tree.nodes[1:]) == {e["child"] for e in tree.edges if e["effect"] > 0}
        and tree.runs > 0
        and "features below resid.2/5" in repr(tree)
    )
    first = feature_effects(neox, dicts, tree.root, child_site="resid.1", contexts=c, at_end=True)
    assert [e["child"][1] for e in tree.edges if e["parent"] == tree.root] == first[0][
        first[1].abs().topk(2).indices
    ].tolist()
    assert not causal_tree(neox, dicts, ("resid.2", 5), contexts=c, least=1e9).edges
    far = causal_tree(
        neox, dicts, ("resid.2", 5), contexts=c, width=20, budget=30, least=0.0, back=2
    )
    assert {s for (s, _), p in ((e["child"], e["parent"]) for e in far.edges) if p == far.root} == {
        "resid.0",
        "resid.1",
    }


def test_a_feature_with_two_sides_counts_by_its_size(neox):
    dicts, c = (
        {
            "resid.0": random_directions(24, D, seed=100, relu=True),
            "resid.1": random_directions(24, D, seed=101),
        },
        contexts_of(),
    )

    def size(edits):
        with torch.no_grad(), intervene(neox, edits), capture(neox, "resid.1") as acts:
            neox(input_ids=c.ids)
        return dicts["resid.1"].encode(acts["resid.1"])[..., 5]

    clean = size({})
    children, effects, _ = feature_effects(
        neox, dicts, ("resid.1", 5), child_site="resid.0", contexts=c, most=None, min_active=1
    )
    for j, e in list(zip(children.tolist(), effects.tolist()))[::6]:
        edit = at_words(c, Lens(neox, "resid.0", dicts["resid.0"]).take_out(j))
        assert e == pytest.approx(
            1
            - (
                (size({"resid.0": edit}) * clean.sign() * c.there).sum()
                / (clean.abs() * c.there).sum()
            ).item(),
            abs=2e-4,
        )
    assert effects.abs().max() < 1.5


def test_dictionaries_out_of_order_or_of_another_width_are_refused(neox):
    dicts, c = dictionaries(neox), contexts_of()
    with pytest.raises(
        ValueError,
        match="expected dictionaries from early to late, resid.0, resid.1, got resid.1, resid.0",
    ):
        causal_tree(neox, dict(reversed(dicts.items())), ("resid.1", 0), contexts=c)
    with pytest.raises(ValueError, match="resid.0 has 32 numbers, its dictionary is for 16"):
        causal_tree(neox, dicts | {"resid.0": random_directions(5, 16)}, ("resid.1", 0), contexts=c)
    with pytest.raises(
        ValueError, match="expected one dictionary per site, got one for 'resid.[*]'"
    ):
        causal_tree(neox, {"resid.*": dicts["resid.0"]}, ("resid.1", 0), contexts=c)
    with pytest.raises(ValueError, match="rerun: expected a site after resid.1, got 'resid.0'"):
        feature_effects(neox, dicts, ("resid.0", 0), child_site="resid.1", contexts=c)


def test_half_precision_does(neox):
    text, c, model = some_text(), contexts_of(), neox.to(torch.bfloat16)
    dicts = dictionaries(model, ("resid.0", "resid.1"))
    tree = causal_tree(model, dicts, ("resid.1", 5), contexts=c, least=0.0, budget=4)
    assert (
        check_tree(model, dicts, tree, contexts=c, draws=1)["below"]["kl"] >= 0
        and torch.isfinite(
            logit_effects(
                model,
                "resid.0",
                Lens(model, "resid.0", dicts["resid.0"]).take_out(3),
                contexts=c,
            )
        ).all()
    )
    cb = add_codebooks(model, "mlp.1", n_codes=8).eval()
    assert (
        Lens(cb, "mlp.1", cb.codebooks["mlp.1"]).read(text).sum() == text.mask.sum()
        and torch.isfinite(
            logit_effects(
                cb, "mlp.1", Lens(cb, "mlp.1", cb.codebooks["mlp.1"]).take_out(3), contexts=c
            )
        ).all()
    )


def test_a_root_that_is_not_there_is_refused(neox):
    dicts, c = dictionaries(neox), contexts_of()
    with pytest.raises(
        ValueError, match="expected the root at one of resid.0, resid.1, got 'resid.2'"
    ):
        causal_tree(neox, dicts, ("resid.2", 0), contexts=c)
    with pytest.raises(ValueError, match="resid.1 has features 0 to 23, got 24"):
        causal_tree(neox, dicts, ("resid.1", 24), contexts=c)
    with pytest.raises(ValueError, match="no site 'resid.7'"):
        causal_tree(neox, {"resid.7": basis(D)}, ("resid.7", 0), contexts=c)


# ---------- its check
def test_nodes_are_taken_out_together_and_controls_have_edits_as_long(neox):
    dicts, c = dictionaries(neox), contexts_of()
    nodes, others = (
        [("resid.0", 1), ("resid.0", 2), ("resid.1", 3)],
        [("resid.0", 7), ("resid.0", 8), ("resid.1", 9)],
    )
    with torch.no_grad(), capture(neox, ["resid.0"]) as acts:
        neox(input_ids=c.ids)
    x = acts["resid.0"]
    plain = Lens(neox, "resid.0", dicts["resid.0"]).take_out([1, 2])(x)
    edits = ablate_nodes(neox, dicts, nodes, contexts=c)
    lengths = edit_lengths(neox, c, edits)
    like = edit_lengths(neox, c, ablate_nodes(neox, dicts, others, contexts=c, lengths=lengths))
    assert (
        set(edits) == {"resid.0", "resid.1"}
        and torch.allclose(edits["resid.0"](x)[c.there], plain[c.there], atol=1e-5)
        and torch.equal(edits["resid.0"](x)[~c.there], x[~c.there])
    )
    assert torch.allclose(lengths["resid.0"][c.there], (plain - x).norm(dim=-1)[c.there], atol=1e-5)
    for site in lengths:  # where the control is active nowhere, it cannot be scaled
        active = like[site].sum(1) > 0
        assert active.sum() >= 3 and torch.allclose(
            lengths[site].sum(1)[active], like[site].sum(1)[active], rtol=1e-3
        )
    assert not ablate_nodes(neox, dicts, [], contexts=c)


def test_others_are_active_at_the_same_words_and_none_twice(neox):
    dicts, c = dictionaries(neox, n=60), contexts_of()
    nodes = [("resid.0", 1), ("resid.0", 2), ("resid.1", 3)]
    draws = others_active(neox, dicts, nodes, contexts=c, draws=6, n=5)
    assert len(draws) == 6 and len({tuple(some) for some in draws}) > 1
    with torch.no_grad(), capture(neox, ["resid.0"]) as acts:
        neox(input_ids=c.ids)
    active = (dicts["resid.0"].encode(acts["resid.0"]) > 0)[c.there]

    def like(i, j):
        return ((active[:, i] & active[:, j]).sum() / (active[:, i] | active[:, j]).sum()).item()

    ranked = sorted((like(1, j) for j in range(60) if j not in (1, 2)), reverse=True)
    for some in draws:
        assert (
            [s for s, _ in some] == [s for s, _ in nodes]
            and len(set(some)) == 3
            and not set(some) & set(nodes)
        )
        assert like(1, some[0][1]) >= ranked[4] - 1e-6
    assert draws == others_active(neox, dicts, nodes, contexts=c, draws=6, n=5)
    with pytest.raises(ValueError, match="no other feature of resid.0 is active where"):
        others_active(neox, dictionaries(neox, n=3), [("resid.0", 0), ("resid.0", 1)], contexts=c)


def test_the_check_measures_what_plain_hooks_do(neox):
    dicts, c = dictionaries(neox, ("resid.0", "resid.1", "resid.2")), contexts_of()
    tree = max(
        (
            causal_tree(neox, dicts, ("resid.2", j), contexts=c, least=0.0, budget=6)
            for j in range(6)
        ),
        key=lambda tree: len(tree.nodes),
    )
    assert len(tree.nodes) > 2
    found = check_tree(neox, dicts, tree, contexts=c, draws=3)
    clean, rows = plain_ends(neox, c), torch.arange(len(c))
    gone = plain_ends(neox, c, ablate_nodes(neox, dicts, tree.nodes[1:], contexts=c))
    assert (
        found["clean"]["kl"] == 0
        and found["clean"]["p"] == pytest.approx(clean[rows, c.next].exp().mean().item(), rel=1e-4)
        and len(found["others"]) == 3
    )
    assert found["below"]["kl"] == pytest.approx(
        (clean.exp() * (clean - gone)).sum(-1).mean().item(), rel=1e-2, abs=1e-6
    ) and found["below"]["p"] == pytest.approx(gone[rows, c.next].exp().mean().item(), rel=1e-3)
    assert (
        found["root"]["act"] == pytest.approx(0, abs=1e-5)
        and found["clean"]["act"] > 0
        and hooks(neox) == 0
    )
    want = sum(
        far.sum(1).mean().item()
        for far in edit_lengths(
            neox, c, ablate_nodes(neox, dicts, tree.nodes[1:], contexts=c)
        ).values()
    )
    assert (
        found["clean"]["edit"] == 0
        and found["below"]["edit"] == pytest.approx(want, rel=1e-4)
        and len(found["random"]) == 3
    )
    assert all(
        one["edit"] == pytest.approx(want, rel=1e-3) and one["kl"] > 0 for one in found["random"]
    ) and all(0 < one["edit"] <= want * 1.001 for one in found["others"])


def test_a_tree_is_drawn_and_likeness_is_cosine(neox):
    tree = FeatureTree(
        ("resid.1", 3),
        [
            dict(child=("resid.0", 2), parent=("resid.1", 3), effect=0.5),
            dict(child=("resid.0", 4), parent=("resid.1", 3), effect=-0.2),
        ],
    )
    assert tree.nodes == [("resid.1", 3), ("resid.0", 2)]
    assert (
        tree.draw("t", "alt", labels={("resid.0", 2): "a <b>"})._repr_png_()[:4] == b"\x89PNG"
        and FeatureTree(("mlp.0", 1)).draw("t", "alt").alt == "alt"
    )
    dicts = {
        "resid.0": random_directions(9, D, seed=1),
        "resid.1": random_directions(9, D, seed=2),
        "mlp.0": random_directions(5, 2 * D),
    }
    cosines = torch.nn.functional.cosine_similarity(
        dicts["resid.0"].directions, dicts["resid.1"].directions[3:4]
    )
    assert nearest_across(dicts, ("resid.1", 3)) == {
        "resid.0": (int(cosines.argmax()), pytest.approx(cosines.max().item(), abs=1e-5))
    }
