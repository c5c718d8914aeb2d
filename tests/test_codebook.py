"""The codebook layer and the model around it:
against the plain form, by its invariants, and under bad input."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Dictionary, basis, fvu, random_directions
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks, load_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.kmeans import kmeans, kmeans_parallel, nearest
from codebook_tutorial.model.sites import capture, intervene

FORMS = [
    dict(select="cosine"),
    dict(select="cosine", combine="mean"),
    dict(select="euclidean"),
    dict(select="euclidean", combine="mean"),
    dict(select="residual"),
]
X = torch.randn(3, 20, 16, generator=seeded(0))


def distances(a, b):
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def layer(n_codes=30, k=2, groups=1, *, seed=1, **kw):
    torch.manual_seed(seed)
    return Codebook(16, n_codes, k, groups=groups, **kw)


def naive_ids(x, codes, k, *, select):
    if select == "cosine":
        return (F.normalize(x, dim=-1) @ F.normalize(codes, dim=-1).T).topk(k).indices
    if select == "euclidean":
        return torch.cdist(x, codes).topk(k, largest=False).indices
    ids, left = [], x
    for _ in range(k):
        ids.append(torch.cdist(left, codes).argmin(-1))
        left = left - codes[ids[-1]]
    return torch.stack(ids, -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_output_is_that_of_the_plain_form(form, k, groups):
    book = layer(k=k, groups=groups, **form)
    out, ids, recon = book(X)
    assert out.shape == X.shape and ids.shape == (3, 20, groups, k)
    parts = []
    for g, (x, codes) in enumerate(zip(X.flatten(0, 1).chunk(groups, -1), book.weight)):
        own = naive_ids(x, codes, k, select=form["select"])
        assert torch.equal(own, ids.flatten(0, 1)[:, g])
        gathered = codes[own]
        parts.append(gathered.mean(1) if form.get("combine") == "mean" else gathered.sum(1))
    want = torch.cat(parts, -1).view_as(X)
    assert torch.allclose(out, want, atol=1e-5)
    assert recon.item() == pytest.approx((want - X).pow(2).sum(-1).mean().item(), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_those_of_the_plain_form(form, k, groups):
    book, target = (
        layer(k=k, groups=groups, **form).double(),
        torch.randn(60, 16, generator=seeded(3)).double(),
    )
    x1, x2 = (X.flatten(0, 1).double().requires_grad_() for _ in range(2))
    x1, x2 = x1.clone().detach().requires_grad_(), x2.clone().detach().requires_grad_()
    out, ids, recon = book(x1)
    ((out - target).pow(2).mean() + 0.7 * recon).backward()
    codes = book.weight.detach().clone().requires_grad_()
    gathered = [codes[g][ids[:, g]] for g in range(groups)]
    plain = torch.cat(
        [v.mean(1) if form.get("combine") == "mean" else v.sum(1) for v in gathered], -1
    )
    (
        (plain + (x2 - x2.detach()) - target).pow(2).mean()
        + 0.7 * (plain - x2.detach()).pow(2).sum(-1).mean()
    ).backward()
    assert torch.allclose(x1.grad, x2.grad, atol=1e-12) and torch.allclose(
        book.weight.grad, codes.grad, atol=1e-12
    )


def test_only_chosen_codes_get_a_gradient():
    book = layer(n_codes=200, k=1)
    out, ids, recon = book(X)
    (out.sum() + recon).backward()
    touched = book.weight.grad[0].abs().sum(-1) > 0
    assert set(touched.nonzero()[:, 0].tolist()) == set(ids.unique().tolist())


def test_commitment_reaches_the_input_and_recon_alone_does_not():
    for commitment in (0.0, 0.25):
        x = X.clone().requires_grad_()
        book = layer(k=1, commitment=commitment)
        out, _, recon = book(x)
        grad = torch.autograd.grad(recon, x, allow_unused=True)[0]
        if commitment:
            assert torch.allclose(grad, 0.25 * 2 * (x - out).detach() / 60, atol=1e-6)
        else:
            assert grad is None


class Largest(TorchDispatchMode):
    "Remembers the largest tensor that any operation makes."

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(t):
                self.numel = max(self.numel, t.numel())
        return out


@pytest.mark.parametrize(
    "select,combine", [("cosine", "sum"), ("euclidean", "mean"), ("residual", "sum")]
)
def test_never_holds_all_similarities_nor_all_gathered_codes(select, combine):
    n, c, d, k = 2048, 1000, 64, 16
    book, x = (
        Codebook(d, c, k, select=select, combine=combine),
        torch.randn(n, d, requires_grad=True),
    )
    with Largest() as largest:
        out, _, recon = book(x)
        (out.sum() + recon).backward()
    assert largest.numel <= max(256 * c, n * (d + 1), c * d) < min(n * c, n * k * d)


def test_selection_does_not_depend_on_the_chunks():
    x, codes = torch.randn(100, 8, generator=seeded(0)), torch.randn(40, 8, generator=seeded(1))
    for cosine in (True, False):
        for k in (1, 5):
            assert torch.equal(
                nearest(x, codes, cosine, k=k, rows=7), nearest(x, codes, cosine, k=k, rows=1000)
            )


# ---- as a Dictionary ---------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 4])
def test_encode_and_decode_say_what_the_layer_does(form, groups):
    book = layer(k=3, groups=groups, **form).eval()
    out, ids, _ = book(X)
    f = book.encode(X)
    assert (
        isinstance(book, Dictionary)
        and f.shape == (3, 20, groups * 30)
        and book.directions.shape == (groups * 30, 16)
    )
    assert torch.allclose(book.decode(f), out, atol=1e-5)
    assert torch.allclose(book.decode_sparse(*book.encode_sparse(X)), out, atol=1e-5)
    g, w = groups - 1, 16 // groups
    assert (
        torch.equal(book.directions[g * 30 + 5, g * w : (g + 1) * w], book.weight[g, 5])
        and book.directions[g * 30 + 5].count_nonzero() == w
    )
    assert (
        f.reshape(60, groups, 30).sum(-1) - (1.0 if form.get("combine") == "mean" else 3.0)
    ).abs().max() < 1e-5


def test_fixed_directions_as_dictionaries():
    assert torch.equal(basis(16).decode(basis(16).encode(X)), X)
    cut = basis(16, relu=True)
    ids, values = cut.encode_sparse(X)
    assert (
        torch.allclose(cut.decode_sparse(ids, values), X.relu(), atol=1e-6)
        and ids.shape[-1] == (X > 0).sum(-1).max()
    )
    d = random_directions(40, 16, seed=3)
    assert torch.allclose(d.directions.norm(dim=-1), torch.ones(40)) and torch.equal(
        d.directions, random_directions(40, 16, seed=3).directions
    )
    with pytest.raises(NotImplementedError, match="Dictionary has no encode"):
        Dictionary().encode(X)


def test_the_mean_predictor_has_fvu_one():
    x = X.flatten(0, 1)
    assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1) and fvu(x, x) == 0


# ---- k-means -----------------------------------------------------------------------------------
@pytest.mark.parametrize("cosine", [True, False])
def test_kmeans_finds_separate_crowds(cosine):
    centres = 5 * F.normalize(torch.randn(12, 24, generator=seeded(0)), dim=-1)
    x = centres.repeat_interleave(torch.arange(5, 65, 5), 0)  # crowds of 5 to 60
    x = x + 0.05 * torch.randn(x.shape, generator=seeded(1))
    codes = kmeans(x, 24, cosine=cosine, generator=seeded(2))
    assert (
        torch.cdist(centres, codes).min(1).values.max() < 0.2
    )  # also the crowd of five has a code


def test_seeding_gives_exactly_as_many_seeds_from_the_data():
    x = torch.randn(300, 5, generator=seeded(0))
    for n in (1, 7, 8, 29):
        seeds = kmeans_parallel(x, n, generator=seeded(1))
        assert len(seeds) == n and (distances(seeds, x).min(1).values < 1e-5).all()


def test_seeding_prefers_what_is_badly_served():
    x = torch.cat(
        [torch.tensor([[1.0, 0.0]]).repeat(5000, 1), torch.tensor([[0.0, 1.0]]).repeat(3, 1)]
    ) + 1e-4 * torch.randn(5003, 2, generator=seeded(0))
    found = sum(
        (kmeans_parallel(x, 16, generator=seeded(s))[:, 1] > 0.5).any().item() for s in range(20)
    )
    by_chance = sum(
        (x[torch.randperm(5003, generator=seeded(s))[:16]][:, 1] > 0.5).any().item()
        for s in range(20)
    )
    assert found == 20 and by_chance < 5


def test_more_codes_than_different_states_is_no_error():
    x = torch.randn(5, 4, generator=seeded(0)).repeat(20, 1)
    assert fvu(x, (c := kmeans(x, 30, generator=seeded(1)))[nearest(x, c)[:, 0]]) < 1e-6


def test_init_from_data_lowers_the_error():
    x = torch.randn(2000, 16, generator=seeded(0)) @ torch.randn(16, 16, generator=seeded(1))
    for form in FORMS:
        for groups in (1, 2):
            book = layer(n_codes=100, k=2, groups=groups, **form).eval()
            before = fvu(x, book.decode_ids(book.choose(x)))
            assert fvu(x, book.init_from(x, generator=seeded(2)).decode_ids(book.choose(x))) < min(
                0.9, 0.8 * before
            )


# ---- counting, moving averages, resampling ------------------------------------------------------
def test_uses_are_counted_per_group_and_code():
    book = layer(k=2, groups=2)
    _, ids, _ = book(X)
    book(X)
    for g in range(2):
        assert torch.equal(book.counts[g], 2 * torch.bincount(ids[:, :, g].flatten(), minlength=30))
    book.reset_counts()
    assert book.counts.sum() == 0


@pytest.mark.parametrize(
    "select,combine",
    [("cosine", "sum"), ("cosine", "mean"), ("euclidean", "sum"), ("residual", "sum")],
)
@pytest.mark.parametrize("k", [1, 2])
def test_moving_averages_by_hand(select, combine, k):
    book = layer(n_codes=6, k=k, select=select, combine=combine, learn="ema").train()
    before, x = book.weight[0].clone(), X.flatten(0, 1)
    assert not book.weight.requires_grad
    _, ids, _ = book(X)
    book.ema_step(decay=0.9)
    share = 1 / k if combine == "sum" and select != "residual" else 1.0
    size, total, left = torch.full((6,), 0.9), 0.9 * before, x.clone()
    for j in range(k):
        wanted = left if select == "residual" else share * x
        for n in range(60):
            size[ids.flatten(0, 1)[n, 0, j]] += 0.1
            total[ids.flatten(0, 1)[n, 0, j]] += 0.1 * wanted[n]
        left = left - before[ids.flatten(0, 1)[:, 0, j]]
    assert torch.allclose(book.weight[0], total / size[:, None], atol=1e-5)


def test_moving_averages_do_not_care_how_a_batch_is_cut():
    whole, cut = (layer(k=1, learn="ema", groups=2).train() for _ in range(2))
    whole(X)
    whole.ema_step()
    for part in X.split(1):
        cut(part)
    cut.ema_step()
    assert torch.allclose(whole.weight, cut.weight, atol=1e-6)


def test_moving_averages_stand_still_in_eval():
    book = layer(k=1, learn="ema").eval()
    before = book.weight.clone()
    book(X)
    book.ema_step()
    assert torch.allclose(book.weight, before, atol=1e-6)


@pytest.mark.parametrize("by", ["distance", "random"])
def test_resampling_moves_dead_codes_onto_inputs_and_resets_their_moments(by):
    book = layer(n_codes=50, k=1, groups=2)
    book.weight.data[:, 25:] = (
        torch.randn(2, 25, 8, generator=seeded(9)) * 0.1 - 50
    )  # far from everything: dead
    opt = torch.optim.AdamW(book.parameters(), lr=1e-2)
    out, _, recon = book(X)
    (out.sum() + recon).backward()
    opt.step()
    moments = opt.state[book.weight]
    moments["exp_avg"].fill_(1.0)
    moments["exp_avg_sq"].fill_(1.0)
    book.reset_counts()
    book(X)
    dead, before = book.counts == 0, book.weight.detach().clone()
    moved = book.resample(X, by=by, optimizer=opt, generator=seeded(0))
    assert moved == dead.sum() > 0 and torch.equal(book.weight.detach()[~dead], before[~dead])
    for g in range(2):
        inputs = X.flatten(0, 1)[:, 8 * g : 8 * (g + 1)]
        assert (distances(book.weight.detach()[g][dead[g]], inputs).min(1).values < 1e-5).all()
    for m in ("exp_avg", "exp_avg_sq"):
        assert (moments[m][dead] == 0).all() and (moments[m][~dead] == 1).all()
    assert book.counts.sum() == 0  # counting begins afresh


@pytest.mark.parametrize("learn", ["gradient", "ema"])
def test_resampling_of_residual_codes_moves_some_onto_what_earlier_codes_leave_over(learn):
    book = layer(n_codes=50, k=3, groups=2, select="residual", learn=learn)
    book.weight.data[:, 20:] = -50.0  # dead
    ids, codes = book.choose(X).flatten(0, 1), book.weight.detach().clone()
    book.reset_counts()
    book(X)
    dead = book.counts == 0
    assert book.resample(X, generator=seeded(0)) == dead.sum() >= 60
    for g in range(2):
        left, stages = X.flatten(0, 1)[:, 8 * g : 8 * (g + 1)], []
        for slot in range(3):
            stages.append(left)
            left = left - codes[g, ids[:, g, slot]]
        near = (
            torch.stack(
                [
                    distances(book.weight.detach()[g][dead[g]], stage).min(1).values
                    for stage in stages
                ]
            )
            < 1e-5
        )
        assert (
            near.any(0).all() and (near.sum(1) > 3).all()
        )  # each code stands at one of the three stages, and all stages have some
    if learn == "ema":
        assert torch.equal(book.total[dead], book.weight[dead]) and (book.size[dead] == 1).all()


def test_guided_resampling_goes_where_the_error_is():
    book = layer(n_codes=40, k=1)
    book.weight.data[0, 5:] = -50.0
    error = torch.zeros(3, 20)
    error[1, :10] = 1.0
    book.reset_counts()
    book(X)
    dead = (book.counts[0] == 0).nonzero()[:, 0]
    moved = book.resample(X, error=error, generator=seeded(0))
    assert 0 < moved <= 10 < len(dead)
    targets = distances(book.weight.detach()[0, dead[:moved]], X.flatten(0, 1)).argmin(1)
    assert ((targets >= 20) & (targets < 30)).all()


# ---- bad input ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(k=31), "1 <= k <= n_codes, got k=31, n_codes=30"),
        (dict(k=0), "got k=0"),
        (dict(groups=3), "d_model divisible by groups, got d_model=16, groups=3"),
        (dict(select="angle"), "select='angle', expected one of cosine, euclidean, residual"),
        (dict(combine="max"), "combine='max'"),
        (dict(learn="no"), "learn='no'"),
        (dict(select="residual", combine="mean"), "combine must be 'sum'"),
    ],
)
def test_impossible_settings_are_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        layer(**kw)


def test_a_wrong_width_says_so():
    with pytest.raises(ValueError, match=r"expected activations \[.., 16\], got \[3, 20, 15\]"):
        layer()(X[..., :15])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_refused_where_data_enters(bad):
    x = X.clone()
    x[0, 3, 2] = bad
    with pytest.raises(
        ValueError, match="init_from: expected finite numbers, got 1 NaN or infinite of 960"
    ):
        layer().init_from(x)
    with pytest.raises(ValueError, match="resample: expected finite"):
        layer().resample(x)
    with pytest.raises(ValueError, match="kmeans: expected finite"):
        kmeans(x.flatten(0, 1), 3)
    book = layer(learn="ema", k=1).train()
    book(x)
    with pytest.raises(ValueError, match="ema_step: expected finite"):
        book.ema_step()


def test_too_little_data_to_begin_from():
    with pytest.raises(ValueError, match="expected at least n_codes=30 rows of data, got 20"):
        layer().init_from(X[0])


@pytest.mark.parametrize(
    "edit,says",
    [
        (lambda ids: ids[:, :1], r"expected ids of shape \[3, 20, 1, 2\], got \[3, 1, 1, 2\]"),
        (lambda ids: ids + 30, "expected ids from 0 to 29, got 30"),
        (lambda ids: ids - 99, "expected ids from 0 to 29, got -99"),
        (lambda ids: None, "got NoneType"),
    ],
)
def test_a_bad_edit_says_what_was_expected(edit, says):
    with pytest.raises(ValueError, match=says):
        layer()(X, edit)


# ---- the model around it -----------------------------------------------------------------------
V = 40
IDS = torch.randint(1, V, (4, 9), generator=seeded(0))
SMALL = dict(vocab_size=V, bos_token_id=0, eos_token_id=None, pad_token_id=None)
CONFIGS = {
    "gpt2, tied": GPT2Config(n_embd=32, n_layer=2, n_head=4, **SMALL),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, **SMALL
    ),
    "llama": LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        **SMALL,
    ),
}


@pytest.fixture(params=CONFIGS)
def base(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param]).eval()


def with_codebooks(base, **kw):
    return add_codebooks(base, ["heads.*", "mlp.*"], 20, **kw).eval()


def test_every_trainable_parameter_is_in_one_group_once(base):
    cb = with_codebooks(base)
    grouped = [p for g in cb.param_groups(1e-3, codes_lr=1e-2) for p in g["params"]]
    live = [p for p in cb.parameters() if p.requires_grad]
    assert len(grouped) == len({id(p) for p in grouped}) == len(live) and {
        id(p) for p in grouped
    } == {id(p) for p in live}
    before = {n: p.detach().clone() for n, p in cb.named_parameters()}
    opt = torch.optim.AdamW(cb.param_groups(1e-2))
    loss = cb(input_ids=IDS, labels=IDS).loss + cb.recon_loss()
    loss.backward()
    opt.step()
    no_effect = (
        "k_proj.bias",
        "attention.masked_bias",
    )  # softmax does not see a constant in the keys
    still = [
        n
        for n, p in cb.named_parameters()
        if torch.equal(p, before[n]) and not n.endswith(no_effect)
    ]
    assert not still, f"never trained: {still}"


def test_codes_are_never_decayed_and_have_their_own_rate(base):
    cb = with_codebooks(base)
    codes = [
        g
        for g in cb.param_groups(1e-3, codes_lr=0.5, weight_decay=0.1)
        if any(g["params"][0] is b.weight for b in cb.codebooks.values())
    ]
    assert len(codes) == 4 and all(g["weight_decay"] == 0 for g in codes)
    for g, b in zip(codes, cb.codebooks.values()):
        assert g["lr"] == pytest.approx(0.5 * b.weight.pow(2).mean().sqrt().item())
    frozen = with_codebooks(base, learn="ema").param_groups(1e-3, codes_lr=0.5)
    assert len(frozen) == 2 and all(
        g["lr"] == 1e-3 for g in frozen
    )  # moving averages are no parameters of the optimiser


def test_one_book_a_head_and_what_flows_on(base):
    cb = with_codebooks(base, k=2)
    assert cb.codebooks["heads.0"].weight.shape == (4, 20, 8) and cb.codebooks[
        "mlp.1"
    ].weight.shape == (1, 20, 32)
    with capture(cb, list(cb.codebooks)) as acts, torch.no_grad():
        cb(IDS)
    for site, book in cb.codebooks.items():
        assert cb.ids[site].shape == (4, 9, len(book.weight), 2)
        assert torch.allclose(acts[site], book.decode_ids(cb.ids[site]), atol=1e-6)


def test_an_intervention_acts_after_the_codebook(base):
    cb = with_codebooks(base)
    with intervene(cb, {"mlp.0": lambda x: x * 0}), capture(cb, "mlp.0") as acts, torch.no_grad():
        cb(IDS)
    assert (acts["mlp.0"] == 0).all()


def test_bypass_and_remove_give_the_model_back(base):
    with torch.no_grad():
        own = base(IDS).logits
        cb = with_codebooks(base)
        assert not torch.equal(cb(IDS).logits, own)
        with cb.bypass():
            assert torch.equal(cb(IDS).logits, own)
        assert not torch.equal(base(IDS).logits, own)  # the codebooks sit in the model itself
        cb.remove()
        assert torch.equal(base(IDS).logits, own) and not any(
            m._forward_hooks or m._forward_pre_hooks for m in base.modules()
        )


def test_edits_write_codes_and_end_with_the_block(base):
    cb = with_codebooks(base)

    def fn(ids):
        ids[:, -1] = 7
        return ids

    with torch.no_grad():
        own = cb(IDS).logits
        with cb.edit_codes({"mlp.*": fn}):
            edited = cb(IDS).logits
            assert (cb.ids["mlp.1"][:, -1] == 7).all() and not (cb.ids["heads.0"][:, -1] == 7).all()
            with cb.edit_codes({"mlp.1": lambda ids: ids * 0}):
                cb(IDS)
                assert (cb.ids["mlp.1"] == 0).all() and (cb.ids["mlp.0"][:, -1] == 7).all()
            assert torch.equal(cb(IDS).logits, edited)
        assert torch.equal(edited[:, :-1], own[:, :-1]) and not torch.equal(
            edited[:, -1], own[:, -1]
        )
        with pytest.raises(
            ValueError, match="no codebook at 'resid.0'; there are heads.0, heads.1"
        ):
            with cb.edit_codes({"resid.0": fn}):
                pass
        with pytest.raises(RuntimeError):
            with cb.edit_codes({"mlp.0": fn}):
                raise RuntimeError
        assert torch.equal(cb(IDS).logits, own)


def test_generation_with_a_cache_equals_generation_without(base):
    cb = with_codebooks(base).init_from_data(
        torch.randint(1, V, (20, 30), generator=seeded(2)), generator=seeded(3)
    )
    options = dict(
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
    )
    assert torch.equal(cb.generate(IDS, **options), cb.generate(IDS, use_cache=False, **options))


def test_saved_and_loaded_is_equal(base, tmp_path):
    for kw in (dict(k=2, select="residual"), dict(learn="ema", commitment=0.25)):
        cb = with_codebooks(copy.deepcopy(base), **kw).init_from_data(
            IDS.repeat(4, 1), generator=seeded(0)
        )
        cb.save_pretrained(tmp_path)
        again = CodebookModel.from_pretrained(tmp_path)
        assert torch.equal(again(IDS).logits, cb(IDS).logits)
        assert {s: b.config for s, b in again.codebooks.items()} == {
            s: b.config for s, b in cb.codebooks.items()
        }
        assert torch.equal(
            AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits,
            cb.remove() or cb(IDS).logits,
        )  # the folder is the base model's
        assert not list(tmp_path.glob("*.part"))


def test_loading_refuses_what_does_not_fit(base, tmp_path):
    cb = with_codebooks(base)
    with pytest.raises(ValueError, match="no codebooks.json in"):
        load_codebooks(base, tmp_path)
    cb.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=16, n_layer=2, n_head=4, **SMALL))
    with pytest.raises(
        ValueError, match="heads.0 of this model has 16 numbers, its codebook expects 32"
    ):
        load_codebooks(other, tmp_path)
    one = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=1, n_head=4, **SMALL))
    with pytest.raises(ValueError, match="no site 'heads.1'"):
        load_codebooks(one, tmp_path)
    settings = json.loads((tmp_path / "codebooks.json").read_text())
    settings["sites"]["mlp.1"]["n_codes"] = 21
    (tmp_path / "codebooks.json").write_text(json.dumps(settings))
    cb.remove()
    with pytest.raises(ValueError, match=r"mlp.1 in .*: expected .*21, 32.*got .*20, 32"):
        load_codebooks(base, tmp_path)
    (tmp_path / "codebooks.json").write_text(json.dumps(settings | dict(format=2)))
    with pytest.raises(ValueError, match="format 2; expected 1"):
        load_codebooks(base, tmp_path)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_a_copy_stands_on_its_own(base):
    cb = with_codebooks(base)
    twin = copy.deepcopy(cb)
    with torch.no_grad():
        before = cb(IDS).logits
        for book in twin.codebooks.values():
            book.weight.data.zero_()
        assert torch.equal(cb(IDS).logits, before) and not torch.equal(twin(IDS).logits, before)
        for book in cb.codebooks.values():
            book.reset_counts()
        twin(IDS)
        assert all(b.counts.sum() == 0 for b in cb.codebooks.values())


def test_dead_share_is_a_mean_over_books(base):
    cb = with_codebooks(base)
    cb.reset_counts()
    assert cb.dead_share() == 1
    with torch.no_grad():
        cb(IDS)
    by_hand = [
        len(set(range(20)) - set(cb.ids[s][:, :, g].flatten().tolist())) / 20
        for s, b in cb.codebooks.items()
        for g in range(len(b.weight))
    ]
    assert cb.dead_share() == pytest.approx(sum(by_hand) / len(by_hand))


def test_accumulated_gradients_are_those_of_the_big_batch(base):
    def grads(parts):
        cb = with_codebooks(copy.deepcopy(base))
        for part in parts:
            ((cb(input_ids=part, labels=part).loss + cb.recon_loss()) / len(parts)).backward()
        return [p.grad for p in cb.parameters() if p.grad is not None]

    torch.manual_seed(0)
    whole = grads([IDS])
    torch.manual_seed(0)
    cut = grads(IDS.split(2))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, cut, strict=True))


# ---- what a review found -----------------------------------------------------------------------
def test_codebooks_put_twice_do_not_stack(base):
    first = with_codebooks(base)
    again = with_codebooks(base)
    with capture(again, "mlp.0") as acts, torch.no_grad():
        again(IDS)
    assert (
        torch.allclose(
            acts["mlp.0"], again.codebooks["mlp.0"].decode_ids(again.ids["mlp.0"]), atol=1e-6
        )
        and not first._handles
    )
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()) == 4
    again.remove()
    assert "_codebook_model" not in base.__dict__


def test_training_mode_is_the_models(base):
    assert (
        not add_codebooks(base.eval(), "mlp.0", 5).training
        and add_codebooks(base.train(), "mlp.0", 5).training
    )


def test_moving_averages_keep_their_digits_in_bf16(base):
    book = add_codebooks(base.bfloat16(), "mlp.0", 1, learn="ema").train().codebooks["mlp.0"]
    assert (
        book.weight.dtype == torch.bfloat16
        and book.size.dtype == book.total.dtype == book.new.dtype == torch.float32
    )
    book.weight.data.fill_(1.0)
    book.total.fill_(1.0)
    for _ in range(600):
        book(torch.full((64, 32), 1.25, dtype=torch.bfloat16))
        book.ema_step()
    assert book.weight.float().mean() == pytest.approx(1.25, abs=0.01)


def test_unused_codes_stay_where_they_are():
    book = layer(n_codes=2, k=1, learn="ema").train()
    book.weight.data[0, 1] = -100 * X.mean((0, 1)).sign()
    book.total.copy_(book.weight)
    x = book.weight.detach()[0, 0].expand(64, 16).clone()
    before = book.weight[0, 1].clone()
    for _ in range(1500):
        book(x)
        book.ema_step()
    assert torch.allclose(book.weight[0, 1], before, rtol=1e-2)


def test_beginning_from_data_forgets_what_was_seen_before():
    book = layer(learn="ema", k=1).train()
    for _ in range(3):
        book(X + 40)
    book.init_from(X, generator=seeded(0))
    before = book.weight.clone()
    book.ema_step()
    assert torch.allclose(book.weight, before, atol=1e-5) and book.counts.sum() == 0


def test_bypass_leaves_no_stale_codes_and_copies_work_after_a_pass(base):
    cb = with_codebooks(base)
    cb(IDS)
    copy.deepcopy(cb)
    with cb.bypass():
        cb(IDS)
        assert not cb.ids and not cb.recon and cb.recon_loss() == 0


# ---- padding, LayerNorm, the Hub ---------------------------------------------------------------
@pytest.mark.parametrize(
    "form", [dict(select="residual", learn="ema", k=2), dict(select="cosine", k=2)]
)
def test_padding_counts_nowhere(base, form):
    """The last three positions of two rows are padding:
    reconstruction, uses and averages are those of the other positions alone."""
    cb = with_codebooks(base, commitment=0.25, **form).train()
    cb.model.eval()  # no dropout
    there = torch.ones_like(IDS)
    there[:2, -3:] = 0
    masked = cb(input_ids=IDS, attention_mask=there).logits
    recon, uses = dict(cb.recon), {s: b.counts.clone() for s, b in cb.codebooks.items()}
    sums = {s: b.new.clone() for s, b in cb.codebooks.items() if b.learn == "ema"}
    for site, book in cb.codebooks.items():
        real = cb.inputs[site][there.bool()]
        book.reset_counts()
        if book.learn == "ema":
            book.new.zero_()
        want = book(real)[2]
        assert (
            torch.allclose(recon[site], want, rtol=1e-4)
            and torch.equal(uses[site], book.counts)
            and uses[site].sum() == real.shape[0] * book.k * len(book.weight)
        )
        if book.learn == "ema":
            assert torch.allclose(sums[site], book.new, atol=1e-4)
    assert torch.allclose(
        masked[there.bool()], cb(input_ids=IDS).logits[there.bool()], atol=1e-4
    )  # and what is real reads no padding
    assert cb.mask is None and sum(int(b.counts.sum()) for b in cb.codebooks.values()) > sum(
        int(u.sum()) for u in uses.values()
    )


def test_a_mask_does_not_outlive_its_pass(base):
    cb = with_codebooks(base)
    cb(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert cb.generate(
        IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
    ).shape == (1, 7)
    with pytest.raises(Exception):
        cb(input_ids=IDS, attention_mask=torch.ones(3, 5))
    assert cb.mask is None
    cb.reset_counts()
    cb(
        input_ids=IDS, attention_mask=torch.zeros(1, 1, 1, 1)
    )  # says who may look where, not what is padding
    assert all(
        int(b.counts.sum()) == IDS.numel() * len(b.counts) * b.k for b in cb.codebooks.values()
    )


def test_beginning_from_data_leaves_padding_out(base):
    ids = IDS.clone()
    ids[:, -4:] = 0
    begun = with_codebooks(base).init_from_data(ids, iters=0, generator=seeded(0), pad=0)
    with capture(base, "mlp.0") as acts, begun.bypass(), torch.no_grad():
        base(input_ids=ids)
    real, padding = acts["mlp.0"][:, :-4].flatten(0, 1), acts["mlp.0"][:, -4:].flatten(0, 1)
    codes = begun.codebooks["mlp.0"].weight[0]
    assert distances(codes, real).min(1).values.max() < 1e-4 < distances(codes, padding).min()


def test_layernorm_before_the_look_up():
    """Chosen for LayerNorm(x), so a shift of all numbers and a scale change nothing.

    What is written is as without it."""
    book, plain = layer(k=2, norm=True), layer(k=2)
    ids = book.choose(X)
    assert (
        torch.equal(
            ids[..., 0, :], naive_ids(F.layer_norm(X, (16,)), book.weight[0], 2, select="cosine")
        )
        and torch.equal(ids, book.choose(3 * X + 7))
        and not torch.equal(ids, plain.choose(X + 7))
    )
    assert torch.equal(book.decode_ids(ids), plain.decode_ids(ids)) and book.config["norm"]
    with pytest.raises(ValueError, match="norm=True"):
        layer(select="residual", norm=True)


def test_a_folder_that_is_not_there_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        CodebookModel.from_pretrained(tmp_path / "nothing")
