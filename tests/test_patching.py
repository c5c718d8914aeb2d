"""Pairs of prompts, patches by vectors and codes, rerun, and the three orders,
against plain code."""

import pytest
import torch
from test_sites import CONFIGS, LAYERS, V, hooks
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.base import basis, random_directions
from codebook_tutorial.dictionary.baselines import Affine
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.formats import load_sae
from codebook_tutorial.feature.orders import (
    acdc_order,
    attribution_order,
    greedy_order,
    nested_sets,
)
from codebook_tutorial.feature.patch import Patch, check_task, patch_curve
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.rerun import rerun
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.world.tasks import (
    TASKS,
    Pairs,
    logit_difference,
    make_pairs,
    one_token_names,
    task_pairs,
    task_score,
)


@pytest.fixture(scope="module")
def lm():
    return load_lm("stories")


@pytest.fixture(scope="module")
def pairs(lm):
    return task_pairs(lm[1], "ioi", 12)


@pytest.fixture(params=CONFIGS)
def tiny(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def some_pairs(n=3, length=7):
    "Random prompts of a tiny model, of different lengths; one word differs."
    base = torch.randint(1, V, (n, length), generator=seeded(0))
    target, last = base.clone(), torch.tensor([length - 1, length - 2, length - 3])[:n]
    target[:, 2] = (base[:, 2] + 1) % V
    return Pairs(base, target, last, torch.ones(n, 1, dtype=torch.long), torch.full((n, 1), 2))


def whole(model, site, pairs, *, edit):
    "Log-probabilities at the prompts' ends, by a hook and the whole model."
    with torch.no_grad(), intervene(model, {site: lambda x: x + edit}):
        return (
            model(input_ids=pairs.base).logits[torch.arange(len(pairs)), pairs.last].log_softmax(-1)
        )


def overrides(model):
    return sum("forward" in m.__dict__ for m in model.modules())


# ---------- pairs
def test_ioi_pairs_differ_in_the_receiver_alone_and_stand_in_both_orders(lm):
    tok = lm[1]
    pairs, orders, known = task_pairs(tok, "ioi", 60), [], set(one_token_names(tok))
    for a, b, n, right, wrong in zip(
        pairs.base, pairs.target, pairs.last, pairs.base_answers, pairs.target_answers
    ):
        differs = (a != b).nonzero()[:, 0]
        assert (
            len(differs) == 1
            and a[differs] == right
            and b[differs] == wrong
            and a[0] == tok.bos_token_id
        )
        names = [t for t in a[: n + 1].tolist() if tok.decode(t) in known]
        assert (
            len(names) == 3 and names.count(right.item()) == 1
        )  # giver, receiver, giver: in one of two orders
        orders.append(names.index(right.item()) == 0)
        assert (a[n + 1 :] == tok.pad_token_id).all() and (a[1 : n + 1] != tok.pad_token_id).all()
    assert 0.25 < sum(orders) / 60 < 0.75
    assert torch.equal(pairs.base, task_pairs(tok, "ioi", 60).base) and not torch.equal(
        pairs.base, task_pairs(tok, "ioi", 60, seed=1).base
    )


def test_the_templates_are_not_always_of_one_length_and_padding_is_behind(lm):
    pairs = task_pairs(lm[1], "ioi", 60)
    assert (
        pairs.last.unique().numel() > 1 and pairs.there.sum(1).tolist() == (pairs.last + 1).tolist()
    )
    assert (
        len(pairs[:5]) == 5
        and "60 pairs" in repr(pairs)
        and torch.equal(pairs.to("cpu").last, pairs.last)
    )


def test_fixed_receivers_and_pools(lm):
    tok = lm[1]
    pairs = task_pairs(tok, "ioi", 20, receivers=("Anna", "Henry"))
    assert {tok.decode(t) for t in pairs.base_answers.flatten()} == {"Anna"} and {
        tok.decode(t) for t in pairs.target_answers.flatten()
    } == {"Henry"}
    assert (
        len(pairs.base_answers.unique()) == 1
        and len(task_pairs(tok, "ioi", 60, pool=4).base_answers.unique()) <= 4
    )


@pytest.mark.parametrize("task", TASKS)
def test_every_task_can_be_told_in_the_stories_language(lm, task):
    pairs = task_pairs(lm[1], task, 20)
    assert (
        len(pairs) == 20
        and lm[1].unk_token_id not in pairs.base
        and not (pairs.base_answers[:, :1] == pairs.target_answers[:, :1]).any()
    )


def test_several_answers(lm):
    pairs = task_pairs(lm[1], "greater", 10)
    assert (pairs.base_answers == -1).any() and pairs.base_answers.shape[1] >= 5
    logp = torch.randn(2, 10, len(lm[1]), generator=seeded(0)).log_softmax(-1)
    sets = [[row[row >= 0] for row in part] for part in (pairs.base_answers, pairs.target_answers)]
    want = torch.stack(
        [
            torch.stack(
                [
                    p[i][sets[0][i]].exp().sum().log() - p[i][sets[1][i]].exp().sum().log()
                    for i in range(10)
                ]
            )
            for p in logp
        ]
    )
    assert torch.allclose(logit_difference(logp, pairs), want, atol=1e-5)


def test_pairs_that_cannot_be_are_refused(lm):
    tok = lm[1]
    ok = (
        "Anna and Tom met. Tom gave a ball to",
        "Anna and Henry met. Tom gave a ball to",
        "Anna",
        "Henry",
    )

    def make(a=ok[0], b=ok[1], x=ok[2], *, y=ok[3]):
        return make_pairs(tok, [a], [b], base_answers=[x], target_answers=[y])

    assert len(make()) == 1
    with pytest.raises(ValueError, match="equal length, got 11 tokens .* and 12"):
        make(b="Anna and Henry met. Tom gave a big ball to")
    with pytest.raises(ValueError, match="the same tokens"):
        make(b=ok[0])
    with pytest.raises(ValueError, match="answers of one token, got 'Anna Tom'"):
        make(x="Anna Tom")
    with pytest.raises(ValueError, match="vocabulary"):
        make(x="Xerxes")
    with pytest.raises(ValueError, match="vocabulary"):
        make(a="Xerxes and Tom met. Tom gave a ball to")
    with pytest.raises(ValueError, match="tell base and target apart"):
        make(y="Anna")
    with pytest.raises(ValueError, match="four lists of one length, got 1, 2, 1 and 1"):
        make_pairs(tok, [ok[0]], [ok[1]] * 2, base_answers=["Anna"], target_answers=["Henry"])
    with pytest.raises(ValueError, match="four lists"):
        make_pairs(tok, [], [], base_answers=[], target_answers=[])
    with pytest.raises(ValueError, match="expected one of ioi"):
        task_pairs(tok, "sums")
    with pytest.raises(ValueError, match="at least 3 names"):
        task_pairs(tok, names=["Anna", "Henry"])
    with pytest.raises(ValueError, match="names of one token, got 'Xerxes'"):
        task_pairs(tok, receivers=("Xerxes", "Anna"))
    with pytest.raises(ValueError, match="receivers go with"):
        task_pairs(tok, "gender", receivers=("Anna", "Henry"))
    with pytest.raises(ValueError, match="names of girls and of boys"):
        task_pairs(tok, "gender", names=["Anna", "Emma", "Lily"])


def test_a_tokenizer_whose_unknown_token_is_its_bos():
    "As GPT-2's: bytes and a few merges, <|endoftext|> for everything special."
    from itertools import islice

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    from codebook_tutorial.world.stories import stories

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        [s.text for s in islice(stories(), 400)],
        BpeTrainer(
            vocab_size=1200,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    pairs = task_pairs(tok, "ioi", 10)
    assert (
        len(one_token_names(tok)) > 5
        and all(tok.decode(r).startswith(" ") for r in pairs.base_answers)
        and (pairs.base[:, 0] == tok.bos_token_id).all()
    )


def test_the_model_does_what_it_can(lm):
    for task in ("ioi", "copying", "gender"):
        assert min(task_score(lm[0], task_pairs(lm[1], task, 40)).values()) > 0.9, task
    swapped = task_pairs(lm[1], "ioi", 40)
    swapped.base_answers, swapped.target_answers = swapped.target_answers, swapped.base_answers
    assert max(task_score(lm[0], swapped).values()) < 0.1


# ---------- rerun
@pytest.mark.parametrize("kind", ["resid", "attn", "mlp", "heads", "neurons"])
def test_rerun_gives_what_the_whole_model_gives(tiny, kind):
    pairs = some_pairs()
    for layer in range(LAYERS):
        site = f"{kind}.{layer}"
        tail = rerun(tiny, site, pairs.base, last=pairs.last)
        assert tail.n_layers == LAYERS - layer - (kind == "resid")
        edits = torch.randn(2, *tail.x.shape, generator=seeded(1))
        with torch.no_grad():
            found = tail(tail.x + edits)
        for edit, logp in zip(edits, found):
            assert torch.allclose(logp, whole(tiny, site, pairs, edit=edit), atol=1e-5)
    assert hooks(tiny) == 0 and overrides(tiny) == 0


def test_padding_changes_nothing(tiny):
    pairs = some_pairs()
    edit = torch.randn(1, 3, 7, 32, generator=seeded(1))
    with torch.no_grad():
        tail = rerun(tiny, "resid.1", pairs.base, last=pairs.last)
        together = tail(tail.x + edit)[0]
        for i in range(3):
            n = int(pairs.last[i]) + 1
            alone = rerun(tiny, "resid.1", pairs.base[i : i + 1, :n], last=pairs.last[i : i + 1])
            assert torch.allclose(
                alone(alone.x + edit[:, i : i + 1, :n])[0, 0], together[i], atol=1e-5
            )


def test_nothing_is_left_behind_even_by_an_error(tiny):
    pairs = some_pairs()
    tail = rerun(tiny, "mlp.1", pairs.base, last=pairs.last)
    with pytest.raises(Exception):
        tail(torch.zeros(1, 3, 7, 5))
    assert hooks(tiny) == 0 and overrides(tiny) == 0
    kept = tiny.base_model.forward
    block = rerun(tiny, "resid.0", pairs.base, last=pairs.last).skipped[0]
    block.forward = own = block.forward  # as some library may have wrapped it
    with torch.no_grad():
        tail = rerun(tiny, "resid.0", pairs.base, last=pairs.last)
        tail(tail.x[None])
    assert block.__dict__["forward"] is own and tiny.base_model.forward == kept


def test_the_model_stays_in_the_mode_it_was_in(tiny):
    tiny.train()
    patch = Patch(tiny, "resid.0", basis(32), pairs=some_pairs())
    patch.measure(~patch.none)
    assert tiny.training


# ---------- patches
def test_a_patch_is_the_papers_formula(lm, pairs):
    model, tok = lm
    sae = load_sae(data_path("sae/tied"))
    patch = Patch(model, "resid.1", sae, pairs=pairs)
    with torch.no_grad(), capture(model, "resid.1") as acts:
        model(input_ids=pairs.base)
        x = acts["resid.1"]
    with torch.no_grad(), capture(model, "resid.1") as acts:
        model(input_ids=pairs.target)
        y = acts["resid.1"]
    chosen = torch.rand(1, len(pairs), len(patch.features), generator=seeded(0)) < 0.5
    with torch.no_grad():
        c = sae.encode(y) - sae.encode(x)
        for i in range(len(pairs)):
            features, n = patch.features[chosen[0, i]], int(pairs.last[i]) + 1
            want = torch.zeros_like(x[i])
            want[:n] = sum(c[i, :n, j, None] * sae.directions[j] for j in features)
            assert torch.allclose(patch.writes.edit(chosen)[0, i], want, atol=1e-4)
        never = torch.isin(torch.arange(384), patch.features, invert=True)
        assert (c * pairs.there[..., None]).abs().sum((0, 1))[never].max() == 0
    found = patch.measure(chosen)
    assert torch.allclose(
        found["edit"][0],
        patch.writes.edit(chosen)[0].flatten(1).norm(dim=1)
        / ((y - x) * pairs.there[..., None]).flatten(1).norm(dim=1),
        atol=1e-5,
    )
    logp = whole(model, "resid.1", pairs, edit=patch.writes.edit(chosen)[0])
    assert torch.allclose(found["kl"][0], (logp.exp() * (logp - patch.goal)).sum(-1), atol=1e-4)


def test_all_coordinates_patched_are_the_counterfactual_and_none_is_the_prompt(lm, pairs):
    patch = Patch(lm[0], "resid.0", basis(96), pairs=pairs)
    assert patch.measure(~patch.none)["kl"].abs().max() < 1e-4 and torch.allclose(
        patch.measure(~patch.none)["edit"], torch.ones(1, len(pairs)), atol=1e-4
    )
    assert (
        patch.measure(patch.none)["kl"].min() > 5 and patch.measure(patch.none)["edit"].max() == 0
    )
    assert (patch.measure(patch.none)["logit_diff"] > 0).all() and (
        patch.measure(~patch.none)["logit_diff"] < 0
    ).all()


def states_at(model, ids, site="resid.1"):
    with torch.no_grad(), capture(model, site) as acts:
        model(input_ids=ids)
        return acts[site]


@pytest.mark.parametrize(
    "settings",
    [
        dict(k=1, select="euclidean"),
        dict(k=3, select="residual"),
        dict(k=2, combine="mean"),
        dict(k=2, groups=4),
    ],
)
def test_codes_are_written_over_codes(lm, pairs, settings):
    model, tok = lm
    x, y = (states_at(model, ids) for ids in (pairs.base, pairs.target))
    book = Codebook(96, 24, **settings).init_from(x.flatten(0, 1), generator=seeded(0)).eval()
    patch, a, b = Patch(model, "resid.1", book, pairs=pairs), book.choose(x), book.choose(y)
    chosen = torch.rand(2, len(pairs), len(patch.features), generator=seeded(0)) < 0.5
    for some, edits in zip(chosen, patch.writes.edit(chosen)):
        for i in range(len(pairs)):
            wanted = torch.zeros_like(x[i])
            for p in range(int(pairs.last[i]) + 1):
                for g in range(len(book.weight)):
                    wanted[p].view(len(book.weight), -1)[g] += written(
                        book.weight[g] * (1 / book.k if book.combine == "mean" else 1),
                        a[i, p, g].tolist(),
                        b[i, p, g].tolist(),
                        chosen={int(f) - 24 * g for f in patch.features[some[i]]},
                    )
            assert torch.allclose(edits[i], wanted, atol=1e-4)
    g = torch.randn(len(pairs), x.shape[1], 96, generator=seeded(1))
    each = torch.stack(
        [
            (g * patch.writes.edit(F_one(patch, j))[0]).sum((1, 2))
            for j in range(len(patch.features))
        ],
        1,
    )
    assert torch.allclose(patch.writes.along(g), each, atol=1e-3)
    assert torch.equal(
        patch.active,
        torch.stack(
            [
                patch.writes.edit(F_one(patch, j))[0].abs().sum((1, 2)) > 0
                for j in range(len(patch.features))
            ],
            1,
        ),
    )


def written(codes, a, b, *, chosen):
    "One place by hand: what both hold stays; the target's chosen codes push out the base's others."
    slots, rest = list(a), list(b)
    for code in a:
        if code in rest:
            rest.remove(code)
            slots[slots.index(code)] = None
    free = [i for i, code in enumerate(slots) if code is not None]
    return sum(
        (codes[new] - codes[a[i]] for i, new in zip(free, rest) if new in chosen),
        torch.zeros_like(codes[0]),
    )


def F_one(patch, j):
    return (
        torch.nn.functional.one_hot(torch.tensor(j), len(patch.features))
        .bool()[None, None]
        .expand(1, len(patch.pairs), -1)
    )


def test_codes_of_a_finetuned_network_stay_codes(lm, pairs):
    coded = CodebookModel.from_pretrained(data_path("codes/residual")).eval()
    book = coded.codebooks["mlp.0"]
    patch = Patch(coded, "mlp.0", book, pairs=pairs)
    logp = patch.run(patch.writes.edit(~patch.none)).detach()
    with torch.no_grad():
        coded(input_ids=pairs.target)
        ids = coded.ids["mlp.0"].clone()

        def write(own):
            own[pairs.there] = ids[pairs.there]
            return own

        with coded.edit_codes({"mlp.0": write}):
            want = (
                coded(input_ids=pairs.base)
                .logits[torch.arange(len(pairs)), pairs.last]
                .log_softmax(-1)
            )
    assert torch.allclose(logp[0], want, atol=1e-3)


def test_another_codebook_at_the_site_reads_the_states_itself(lm, pairs):
    coded = CodebookModel.from_pretrained(data_path("codes/single")).eval()
    x = Patch(coded, "mlp.0", coded.codebooks["mlp.0"], pairs=pairs).tail.x
    other = Codebook(96, 30, 2).init_from(x.flatten(0, 1), generator=seeded(0)).eval()
    patch = Patch(coded, "mlp.0", other, pairs=pairs)
    assert patch.features.max() < 30
    y = (
        x
        + Patch(coded, "mlp.0", basis(96), pairs=pairs).writes.edit(
            torch.ones(1, len(pairs), 96, dtype=torch.bool)
            if len(Patch(coded, "mlp.0", basis(96), pairs=pairs).features) == 96
            else None
        )[0]
    )
    assert torch.allclose(
        patch.writes.edit(~patch.none)[0],
        (other.decode_ids(other.choose(y)) - other.decode_ids(other.choose(x)))
        * pairs.there[..., None],
        atol=1e-3,
    )


def test_codebooks_between_the_blocks_do_not_touch_what_is_patched(tiny):
    coded, pairs = add_codebooks(tiny, ["resid.*", "mlp.*"], n_codes=12, k=2).eval(), some_pairs()
    for site in ("resid.0", "resid.1", "mlp.1", "neurons.2"):
        tail = rerun(coded, site, pairs.base, last=pairs.last)
        edits = (
            torch.randn(2, *tail.x.shape, generator=seeded(1))
            * torch.tensor([0.0, 1.0])[:, None, None, None]
        )
        with torch.no_grad():
            found = tail(tail.x + edits)
        assert torch.allclose(found[0], tail.logp, atol=1e-5) and torch.allclose(
            found[1], whole(coded, site, pairs, edit=edits[1]), atol=1e-5
        )
    coded.remove()


def test_half_precision(lm, pairs):
    model, _ = load_lm("stories", dtype=torch.bfloat16)
    patch, exact = (
        Patch(m, "resid.1", load_sae(data_path("sae/tied")), pairs=pairs) for m in (model, lm[0])
    )
    found = patch.measure(~patch.none)
    assert (
        found["kl"].dtype == torch.float32
        and found["kl"].mean() < 0.1 * patch.measure(patch.none)["kl"].mean()
    )
    assert abs(patch.measure(patch.none)["kl"].mean() - exact.measure(exact.none)["kl"].mean()) < 1


def test_attribution_is_the_slope_and_its_points_add_up(lm, pairs):
    patch = Patch(lm[0], "resid.1", pca_like(), pairs=pairs)
    gain = patch.attribution(points=1)
    whole_way, small = patch.writes.edit(~patch.none), 1e-2
    for j in (0, 7):
        with torch.no_grad():
            fall = (
                patch.kl(patch.run(0 * whole_way))[0]
                - patch.kl(patch.run(small * patch.writes.edit(F_one(patch, j))))[0]
            )
        assert torch.allclose(fall / small, gain[:, j], atol=0.05, rtol=0.1)
    many = patch.attribution(points=20).sum(1)  # along the straight way, all of it
    with torch.no_grad():
        assert torch.allclose(
            many,
            patch.kl(patch.run(0 * whole_way))[0] - patch.kl(patch.run(whole_way))[0],
            rtol=0.1,
        )


def pca_like():
    D = torch.linalg.qr(torch.randn(96, 96, generator=seeded(0)))[0]
    return Affine(D[:40].contiguous())


# ---------- orders
def test_greedy_is_the_plain_loop(lm, pairs):
    patch = Patch(lm[0], "resid.1", pca_like(), pairs=pairs)
    chosen = []
    for _ in range(3):
        kl = {
            j: patch.measure(patch.chosen(patch.features[chosen + [j]]))["kl"].mean().item()
            for j in range(len(patch.features))
            if j not in chosen
        }
        chosen.append(min(kl, key=kl.get))
    assert greedy_order(patch, 3, width=None).tolist() == chosen


def test_greedy_for_each_prompt_is_greedy_on_that_prompt(lm, pairs):
    sae = load_sae(data_path("sae/tied"))
    found = greedy_order(
        patch := Patch(lm[0], "resid.1", sae, pairs=pairs), 4, per_prompt=True, width=None
    )
    for i in (0, 5):
        alone = Patch(lm[0], "resid.1", sae, pairs=pairs[i : i + 1])
        assert (
            patch.features[found[:, i]].tolist()
            == alone.features[greedy_order(alone, 4, width=None)].tolist()
        )
    assert patch.active.gather(1, found.T).all()


def test_few_candidates_lose_little(lm, pairs):
    patch = Patch(lm[0], "resid.1", load_sae(data_path("sae/tied")), pairs=pairs)
    kl = {
        width: patch.measure(nested_sets(patch, greedy_order(patch, 6, True, width=width)))["kl"][
            -1
        ]
        .mean()
        .item()
        for width in (16, None)
    }
    assert kl[16] < 1.2 * kl[None] + 0.3


def test_acdc_is_the_algorithm_as_printed(lm, pairs):
    patch, thresholds = Patch(lm[0], "resid.1", pca_like(), pairs=pairs), [0.01, 0.1, 0.3, 1.0, 3.0]

    def kl_of(left):
        return patch.measure(left[None, None])["kl"].mean().item()

    left, dropped, draw = torch.ones(len(patch.features), dtype=torch.bool), [], seeded(3)
    now = kl_of(left)
    for threshold in thresholds:
        visits = torch.randperm(len(left), generator=draw).tolist()
        for j in [j for j in visits if left[j]]:
            left[j] = False
            if (new := kl_of(left)) - now < threshold:
                now = new
                dropped.append(j)
            else:
                left[j] = True
    found = acdc_order(patch, thresholds=thresholds, seed=3).tolist()
    assert found == left.nonzero()[:, 0].tolist() + dropped[::-1]


def test_acdc_does_not_depend_much_on_the_visits(lm, pairs):
    patch = Patch(lm[0], "resid.1", load_sae(data_path("sae/tied")), pairs=pairs)
    ends = [
        patch.measure(nested_sets(patch, acdc_order(patch, 12, seed=seed)))["kl"][-1].mean().item()
        for seed in (0, 1)
    ]
    assert abs(ends[0] - ends[1]) < 0.25 * patch.measure(patch.none)["kl"].mean()


def test_attribution_order_sorts(lm, pairs):
    patch = Patch(lm[0], "resid.1", pca_like(), pairs=pairs)
    gain = patch.attribution(points=1)
    assert torch.equal(attribution_order(patch, 5), gain.mean(0).argsort(descending=True)[:5])
    assert torch.equal(
        attribution_order(patch, 5, per_prompt=True, points=1)[:, 2],
        gain[2].argsort(descending=True)[:5],
    )
    patch = Patch(lm[0], "resid.1", load_sae(data_path("sae/tied")), pairs=pairs)
    order = attribution_order(patch, 384, per_prompt=True)
    assert ((order >= 0).sum(0) == patch.active.sum(1)).all()


def test_nested_sets(lm, pairs):
    patch = Patch(lm[0], "resid.1", pca_like(), pairs=pairs)
    one, many = (
        nested_sets(patch, torch.tensor([3, 1])),
        nested_sets(patch, torch.tensor([[3] * 11 + [-1], [1] * 12])),
    )
    assert one.shape == (3, 12, 40) and [s.nonzero()[:, 0].tolist() for s in one[:, 0]] == [
        [],
        [3],
        [1, 3],
    ]
    assert [s.nonzero()[:, 0].tolist() for s in many[:, 11]] == [[], [], [1]]


# ---------- the whole
def test_one_set_is_chosen_on_the_first_half_and_measured_on_the_second(lm):
    model, tok = lm
    pairs, other = task_pairs(tok, "ioi", 16), task_pairs(tok, "ioi", 16, seed=5)
    mixed = make_joined(pairs, other, 8)
    a, b = (patch_curve(model, "resid.1", pca_like(), pairs=p, n_feats=5) for p in (pairs, mixed))
    assert (
        a.features.tolist() == b.features.tolist()
        and a.kl.shape == (6, 8)
        and not torch.allclose(a.kl, b.kl)
    )
    assert torch.allclose(
        a.kl[0],
        Patch(model, "resid.1", pca_like(), pairs=pairs[8:]).measure(
            Patch(model, "resid.1", pca_like(), pairs=pairs[8:]).none
        )["kl"][0],
    )


def make_joined(a, b, n):
    length = max(a.base.shape[1], b.base.shape[1])

    def pad(t):
        return (
            torch.nn.functional.pad(t, (0, length - t.shape[1]))
            if t.dim() == 2 and t.shape[1] > 1
            else t
        )

    return Pairs(
        *(
            torch.cat([pad(getattr(a, k))[:n], pad(getattr(b, k))[n:]])
            for k in Pairs.__dataclass_fields__
        )
    )


@pytest.mark.parametrize(
    "order,per_prompt",
    [
        ("greedy", False),
        ("greedy", True),
        ("attribution", False),
        ("attribution", True),
        ("acdc", False),
    ],
)
def test_curves_fall_far_below_random_directions(lm, order, per_prompt):
    pairs, sae = task_pairs(lm[1], "gender", 16), load_sae(data_path("sae/tied"))
    noise = random_directions(384, 96, seed=100).directions
    kw = dict(points=3) if order == "attribution" else {}
    curve, chance = (
        patch_curve(
            lm[0], "resid.1", d, pairs=pairs, n_feats=6, **kw, order=order, per_prompt=per_prompt
        )
        for d in (sae, Affine(noise, torch.linalg.pinv(noise).T.contiguous()))
    )
    assert (
        curve.kl[6].mean() < 0.35 * curve.kl[0].mean() < 0.5 * chance.kl[6].mean()
        and curve.passes > 0
    )
    assert (
        curve.first(0.5) <= 6
        and chance.first(0.9) is None
        and f"{len(curve.kl) - 1} features" in repr(curve)
    )


def test_a_task_the_model_cannot_do_is_refused(lm):
    with pytest.raises(
        ValueError,
        match=r"answers \d+% of the prompts and \d+% of the counterfactuals \(chance is 50%",
    ):
        patch_curve(lm[0], "resid.1", basis(96), pairs=task_pairs(lm[1], "greater", 20))
    torch.manual_seed(0)
    untrained = AutoModelForCausalLM.from_config(lm[0].config).eval()
    with pytest.raises(ValueError, match="no behaviour"):
        check_task(untrained, task_pairs(lm[1], "ioi", 40))
    check_task(lm[0], task_pairs(lm[1], "ioi", 40))


def test_bad_input(lm, pairs):
    model = lm[0]
    with pytest.raises(ValueError, match="for the 96 numbers of resid.1, got a Directions for 64"):
        patch_curve(model, "resid.1", basis(64), pairs=pairs)
    with pytest.raises(ValueError, match="for the 384 numbers of neurons.1"):
        patch_curve(model, "neurons.1", basis(96), pairs=pairs)
    with pytest.raises(ValueError, match="no site 'resid.7'"):
        patch_curve(model, "resid.7", basis(96), pairs=pairs)
    with pytest.raises(ValueError, match="expected one site"):
        patch_curve(model, "resid.*", basis(96), pairs=pairs)
    with pytest.raises(ValueError, match="one of greedy, attribution, acdc"):
        patch_curve(model, "resid.1", basis(96), pairs=pairs, order="best")
    with pytest.raises(ValueError, match="one set for all prompts"):
        patch_curve(model, "resid.1", basis(96), pairs=pairs, order="acdc", per_prompt=True)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        patch_curve(model, "resid.1", basis(96), pairs=pairs[:1])
    long = Pairs(
        *(
            torch.cat([t] * 30, 1) if t.dim() == 2 else t
            for t in (
                pairs.base,
                pairs.target,
                pairs.last,
                pairs.base_answers,
                pairs.target_answers,
            )
        )
    )
    with pytest.raises(ValueError, match="the model reads 256 positions"):
        Patch(model, "resid.1", basis(96), pairs=long)


def test_nothing_that_differs_nothing_to_order(lm, pairs):
    same = Pairs(pairs.base, pairs.base, pairs.last, pairs.base_answers, pairs.target_answers)
    patch = Patch(lm[0], "resid.1", pca_like(), pairs=same)
    assert (
        len(patch.features) == 0
        and greedy_order(patch, 4).shape == (0,)
        and greedy_order(patch, 4, True).shape == (0, 12)
        and acdc_order(patch).shape == (0,)
        and attribution_order(patch, 4).shape == (0,)
    )
    assert patch.measure(patch.none)["kl"].abs().max() < 1e-5
