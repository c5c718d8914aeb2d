"""Sparse autoencoders: what each kind computes, its loss, stacks, dead features, refitting,
measures."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.sae import SAE, KeepK, Tied
from codebook_tutorial.dictionary.train import (
    refit,
    resample_dead,
    train_sae,
    tune_decoder,
    unstack,
)
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import lm_loss
from codebook_tutorial.model.sites import capture
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.score.metrics import loss_recovered, measure, replaced_loss

REAL = Path(os.environ.get("COURSE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
D, N_FEATS, N = 12, 30, 64
X = torch.randn(N, D, generator=seeded(0)) * 2 + 1
SETTINGS = {kind: {"k": 4} if issubclass(cls, KeepK) else {} for kind, cls in KINDS.items()}


def some(kind, seed=1, **kw):
    "One with random parameters, as after training."
    sae = KINDS[kind](D, N_FEATS, generator=seeded(seed), **SETTINGS[kind] | kw)
    with torch.no_grad():
        for i, (name, p) in enumerate(sae.named_parameters()):
            if name not in ("W_dec", "W_enc"):
                p.copy_(
                    torch.randn(p.shape, generator=seeded(seed * 100 + i)).abs() * 0.3
                    if name == "threshold"
                    else torch.randn(p.shape, generator=seeded(seed * 100 + i)) * 0.3
                )
            elif name == "W_enc":
                p.add_(torch.randn(p.shape, generator=seeded(seed * 100 + i)) * 0.1)
    if hasattr(sae, "threshold") and "threshold" not in dict(sae.named_parameters()):
        sae.threshold.fill_(0.7)
    return sae.eval()


def sparse_data(n=4000, n_true=20, seed=3, *, d=D):
    "States that are sums of a few of more directions than dimensions."
    true = F.normalize(torch.randn(n_true, d, generator=seeded(seed)), dim=-1)
    f = (torch.rand(n, n_true, generator=seeded(seed + 1)) < 0.1) * (
        torch.rand(n, n_true, generator=seeded(seed + 2)) + 0.5
    )
    return 5 + 3 * f @ true, true


# ---- what each kind computes, written out
def by_hand(sae, x):
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    match sae.kind:
        case "tied" | "untied":
            return pre.clamp(min=0)
        case "topk":
            return torch.where(pre >= pre.sort(-1, descending=True).values[:, 3:4], pre, 0.0).clamp(
                min=0
            )
        case "batchtopk" | "matryoshka" | "jumprelu":
            return torch.where(pre > sae.threshold, pre, 0.0)
        case "gated":
            return (pre > 0) * (
                ((x - sae.b_dec) @ sae.W_enc.T) * sae.r_mag.exp() + sae.b_mag
            ).clamp(min=0)


@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode_are_the_formula(kind):
    sae = some(kind)
    f = sae.encode(X)
    assert torch.allclose(f, by_hand(sae, X), atol=1e-5) and 0 < (f != 0).float().mean() < 1
    assert torch.allclose(sae.decode(f), f @ sae.W_dec + sae.b_dec, atol=1e-5)
    ids, values = sae.encode_sparse(X)
    assert torch.allclose(
        torch.zeros_like(f).scatter_add(-1, ids, values), f, atol=1e-5
    ) and torch.allclose(sae.decode_sparse(ids, values), sae.decode(f), atol=1e-4)
    batched = X.view(4, 16, D)
    assert torch.allclose(sae.encode(batched).flatten(0, 1), f, atol=1e-5) and torch.allclose(
        sae.decode(sae.encode(batched)).flatten(0, 1), sae.decode(f), atol=1e-5
    )
    assert sae.decode(sae.encode(X[0])).shape == (D,) and sae.directions.shape == (N_FEATS, D)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_formula(kind):
    sae, alpha = some(kind).train(), 0.3
    pre = sae.pre(X)

    def squared(f):
        return (X - sae.decode(f)).pow(2).sum(-1).mean()

    if kind in ("tied", "untied"):
        want = squared(f := sae.encode(X)) + alpha * f.sum(-1).mean()
    if kind == "topk":
        want = squared(sae.encode(X))
    if kind in ("batchtopk", "matryoshka"):
        f = torch.where(
            pre >= pre.flatten().sort(descending=True).values[4 * N - 1], pre, 0.0
        ).clamp(min=0)
        want = (
            squared(f)
            if kind == "batchtopk"
            else torch.stack(
                [squared(torch.where(torch.arange(N_FEATS) < n, f, 0.0)) for n in (2, 4, 8, 15, 30)]
            ).mean()
        )
    if kind == "jumprelu":
        want = squared(f := sae.encode(X)) + alpha * (f > 0).float().sum(-1).mean()
    if kind == "gated":
        want = squared(sae.encode(X)) + alpha * pre.relu().sum(-1).mean() + squared(pre.relu())
    assert sae.loss(X, alpha).item() == pytest.approx(want.item(), rel=1e-5)


def test_thresholds_of_jumprelu_learn_as_the_paper_says():
    "Gradients of the paper's equations 11 and 12, with a rectangle of the bandwidth as kernel."
    sae, alpha = some("jumprelu").train(), 0.3
    sae.loss(X, alpha).backward()
    with torch.no_grad():
        pre, t, width = sae.pre(X).relu(), sae.threshold, sae.bandwidth
        near = ((pre - t).abs() < width / 2) / width
        left = 2 * (sae.decode(sae.encode(X)) - X) @ sae.W_dec.T
        want = (-(t * near * left).sum(0) - alpha * near.sum(0)) / N
    assert torch.allclose(sae.threshold.grad, want, atol=1e-5) and want.abs().sum() > 0


def test_the_gates_extra_loss_does_not_move_the_decoder():
    sae = some("gated").train()
    gate, size = sae.paths(X)
    (plain,) = torch.autograd.grad(
        (X - sae.decode(size * (gate > 0))).pow(2).sum(-1).mean(), sae.W_dec
    )
    assert torch.allclose(torch.autograd.grad(sae.loss(X, 0.3), sae.W_dec)[0], plain, atol=1e-5)


# ---- dead features
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_the_auxiliary_loss_reaches_the_encoder_of_dead_features_only(kind):
    sae = some(kind, patience=10).train()
    with torch.no_grad():
        sae.b_enc[:5] = -100.0
    sae.silent[:5] = 11
    sae.loss(X, 0.0).backward()
    assert (sae.W_enc.grad[:5] == 0).all()
    sae.zero_grad()
    sae.silent[:5] = 11
    with torch.no_grad():
        sae.b_enc[:5] = 0.5 - 100 * (sae.pre(X)[:, :5].amax(0) > 1e9)
    sae.b_enc.data[5:] += 50.0  # so that none of the five is among the largest
    sae.silent[:5] = 11
    sae.loss(X, 1.0).backward()
    assert (sae.W_enc.grad[:5].abs().sum(-1) > 0).all() and (sae.b_enc.grad[:5] != 0).any()


def test_silence_is_counted_in_rows():
    for kind in KINDS:
        sae = some(kind).train()
        sae.b_enc.data[0] = -1e4
        if kind == "gated":
            sae.b_mag.data[0] = -1e4
        for _ in range(3):
            sae.loss(X, 0.1)
        assert sae.silent[0] == 3 * N and (sae.silent == 0).any(), kind


@pytest.mark.parametrize("kind", ["tied", "untied", "jumprelu", "gated"])
def test_dead_features_begin_anew_and_the_optimiser_forgets_them(kind):
    sae = some(kind).train()
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad])
    sae.loss(X, 0.1).backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    before, sae.silent[:] = {n: p.detach().clone() for n, p in sae.named_parameters()}, 0.0
    sae.silent[[3, 7]] = 500
    left = X - sae.decode(sae.encode(X)).detach()
    assert resample_dead(sae, X, optimizer, patience=400, generator=seeded(0)) == 2
    for i in (3, 7):
        assert F.cosine_similarity(sae.W_dec[i].detach(), left, dim=-1).max() > 1 - 1e-5
    assert sae.b_enc[[3, 7]].eq(0).all() and (sae.silent == 0).all()
    others = [i for i in range(N_FEATS) if i not in (3, 7)]
    for name, p in sae.named_parameters():
        if name == "b_dec":
            assert torch.equal(p, before[name])
            continue
        assert torch.equal(p[others], before[name][others])
        if p in optimizer.state:
            for m in ("exp_avg", "exp_avg_sq"):
                assert (optimizer.state[p][m][[3, 7]] == 0).all() and (
                    optimizer.state[p][m][others] == 1
                ).all()
    assert resample_dead(sae, X, optimizer, patience=400, generator=seeded(0)) == 0


# ---- stacks and training
@pytest.mark.parametrize("kind", ["tied", "untied", "jumprelu", "gated"])
def test_a_stack_trains_each_as_if_it_were_alone(kind):
    x, _ = sparse_data()
    alphas = [0.05, 0.5, 20.0]
    together = train_sae(x, 16, kind, alpha=alphas, steps=40, batch=256)
    for alpha, one in zip(alphas, together):
        alone = unstack(train_sae(x, 16, kind, alpha=[alpha], steps=40, batch=256)[0])[0]
        assert type(one) is KINDS[kind] and one.W_dec.shape == (16, D)
        assert torch.allclose(one.encode(x[:100]), alone.encode(x[:100]), atol=1e-3)
    assert measure(together[0], x)["l0"] > measure(together[2], x)["l0"]


SPARSE = dict(
    tied=dict(alpha=1.5),
    untied=dict(alpha=1.5),
    gated=dict(alpha=3.0),
    jumprelu=dict(alpha=1.0),
    topk=dict(k=2),
    batchtopk=dict(k=2),
    matryoshka=dict(k=2),
)


@pytest.mark.parametrize("kind", KINDS)
def test_training_finds_the_directions_that_made_the_data(kind):
    x, true = sparse_data(20_000, n_true=18)
    sae = train_sae(x, 24, kind, steps=800, batch=512, **SPARSE[kind])
    found = measure(sae, x)

    def like(d):
        return (F.normalize(d.directions, dim=-1).detach() @ true.T).amax(0).mean().item()

    assert found["fvu"] < 0.25 and found["l0"] < 4, found
    assert like(sae) > 0.85 and like(random_directions(24, D)) < 0.6
    assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(24), atol=1e-4)


def test_where_the_data_lies_and_how_large_it_is_makes_no_difference():
    x, _ = sparse_data()
    for kind in KINDS:
        a, b = (
            train_sae(data, 16, kind, steps=30, batch=256, **SETTINGS[kind])
            for data in (x, 7 * x - 40)
        )
        assert torch.allclose(7 * a.encode(x), b.encode(7 * x - 40), atol=2e-2, rtol=1e-2), kind
        assert torch.allclose(
            7 * a.decode(a.encode(x)) - 40, b.decode(b.encode(7 * x - 40)), atol=5e-2
        ), kind


def test_the_same_seed_gives_the_same_and_another_another():
    x, _ = sparse_data()
    a, b, c = (train_sae(x, 16, steps=20, batch=256, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.W_dec, b.W_dec) and not torch.equal(a.W_dec, c.W_dec)


def test_batchtopk_keeps_k_in_the_mean_afterwards():
    x, _ = sparse_data()
    assert measure(train_sae(x, 24, "batchtopk", steps=300, batch=512, k=3), x)[
        "l0"
    ] == pytest.approx(3, abs=0.5)


# ---- refitting
def test_refitting_is_least_squares_and_undoes_shrinkage():
    x, _ = sparse_data()
    sae = train_sae(x, 24, alpha=1.0, steps=300, batch=512)
    new = refit(sae, x, ridge=0.0)
    f = sae.encode(x).detach()
    want = torch.linalg.lstsq(f, x - sae.b_dec).solution
    used = (f > 0).any(0)
    assert (
        torch.allclose(new.encode(x), f, atol=1e-5)
        and torch.allclose(new.decode(f).detach(), f @ want + sae.b_dec, atol=1e-2)
        and used.any()
    )
    assert measure(new, x)["fvu"] < 0.8 * measure(sae, x)["fvu"]

    def size(s):
        return (s.decode(s.encode(x)) - s.b_dec).norm(dim=-1).mean().item()

    assert size(new) > size(sae)


def test_refitting_leaves_features_that_never_fire():
    x, _ = sparse_data()
    sae = train_sae(x, 24, alpha=0.3, steps=50, batch=512)
    with torch.no_grad():
        sae.b_enc[4] = -1e6
    new = refit(sae, x)
    assert torch.isfinite(new.W_dec).all() and torch.allclose(new.W_dec[4], sae.W_dec[4], atol=1e-6)
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    assert torch.equal(refit(sae, x).W_dec, sae.W_dec)  # nor does it break where none does


# ---- measures
class Given(SAE):
    "Decodes to what it is told."

    def __init__(self, out):
        super().__init__(D, N_FEATS)
        self.out = out

    def encode(self, x):
        return torch.ones(*x.shape[:-1], N_FEATS)

    def decode(self, f):
        return self.out.expand(*f.shape[:-1], D)


def test_the_mean_explains_nothing_and_the_input_everything():
    assert measure(Given(X.mean(0)), X)["fvu"] == pytest.approx(1, abs=1e-6)
    exact = SAE(D, 2 * D)
    with torch.no_grad():
        for w in (exact.W_enc, exact.W_dec):
            w.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    found = measure(exact, X, batch=7)
    assert (
        found["fvu"] == pytest.approx(0, abs=1e-9)
        and found["cosine"] == pytest.approx(1, abs=1e-5)
        and found["l0"] == pytest.approx(D)
    )


def test_counts_of_active_features():
    sae = some("untied")
    f = sae.encode(X)
    found, uses = measure(sae, X, batch=10), (f > 0).sum(0)
    assert found["l0"] == pytest.approx((f > 0).sum(-1).float().mean().item()) and found[
        "dead_share"
    ] == pytest.approx((uses == 0).float().mean().item())
    assert found["alive"] == int((uses > 10).sum()) and torch.allclose(found["density"], uses / N)
    sae.b_enc.data[:] = -1e6
    assert measure(sae, X)["dead_share"] == 1


def test_loss_recovered_on_a_real_model():
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2000, length=128)

    class Same(SAE):
        def __init__(self):
            super().__init__(96, 4)

        def encode(self, x):
            return x

        def decode(self, f):
            return f

    found = loss_recovered(model, text, "resid.1", dictionary=Same(), batch=5)
    assert found["clean"] == pytest.approx(lm_loss(model, text), abs=1e-4) and found[
        "decoded"
    ] == pytest.approx(found["clean"], abs=1e-6)
    assert (
        found["recovered_zero"] == pytest.approx(1)
        and found["perplexity_ratio"] == pytest.approx(1)
        and min(found["zero"], found["mean"]) > found["clean"] + 1
    )

    class Zero(Same):
        def decode(self, f):
            return 0 * f

    found = loss_recovered(model, text, "resid.1", dictionary=Zero(), batch=5)
    assert found["recovered_zero"] == pytest.approx(0, abs=1e-6) and found[
        "decoded"
    ] == pytest.approx(found["zero"])


def test_replacing_a_tuned_decoder_tells_the_model_more():
    model, tok = load_lm("stories")
    text, test = (
        load_text(tok, "stories", n_tokens=n, length=256, split=split)
        for n, split in ((20_000, "train"), (4000, "test"))
    )
    states = harvested(model, text, "resid.1")
    sae = refit(train_sae(states, 128, steps=150, batch=512, alpha=1.0), states)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    tuned = tune_decoder(sae, model, text, site="resid.1", steps=40)

    def cost(s):
        return replaced_loss(
            model, test, "resid.1", fn=lambda x: s.decode(s.encode(x)).detach()
        ) - lm_loss(model, test)

    assert (
        0 < cost(tuned) < 0.6 * cost(sae)
        and torch.equal(tuned.encode(states), sae.encode(states))
        and measure(tuned, states)["fvu"] < 1.3 * measure(sae, states)["fvu"]
    )
    assert all(
        torch.equal(p, weights[name]) and p.grad is None for name, p in model.named_parameters()
    ) and torch.equal(tuned.b_dec, sae.b_dec)
    again = tune_decoder(sae, model, text, site="resid.1", steps=3)
    assert (
        torch.equal(again.W_dec, tune_decoder(sae, model, text, site="resid.1", steps=3).W_dec)
        and not model.training
    )


def test_a_tied_one_is_tuned_without_its_encoder():
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=3000, length=256)
    sae = Tied(96, 40, generator=seeded(0))
    new = tune_decoder(sae, model, text, site="resid.1", steps=2)
    assert (
        torch.equal(new.W_enc, sae.W_dec)
        and not torch.equal(new.W_dec, sae.W_dec)
        and new.kind == "untied"
    )


def harvested(model, text, site):
    with torch.no_grad(), capture(model, site) as acts:
        model(input_ids=text.ids)
    return acts[site][text.mask].float()


def pythia_shaped():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=300,
            hidden_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=256,
            max_position_embeddings=128,
        )
    ).eval()
    ids = torch.randint(2, 300, (30, 64), generator=seeded(0))
    ids[:, 0] = 1
    return model, Text(ids, bos=1, pad=0)


@pytest.mark.parametrize("name", ["stories260K", "pythia"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_model_in_any_precision(name, dtype, tmp_path):
    "The whole path, store to loss, on a Llama and on a Pythia-shaped random model."
    if name == "pythia":
        model, text = pythia_shaped()
    else:
        if not (REAL / "models" / name).exists():
            pytest.skip(f"no {name}")
        model, tok = load_lm(REAL / "models" / name)
        text = load_text(tok, REAL / "text" / "tinystories.json", n_tokens=4000, length=128)
    model.to(dtype)
    store = harvest(
        model,
        text,
        ["resid.1"],
        folder=tmp_path / "store",
        dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        verbose=False,
    )
    x = store.load("resid.1")
    sae = refit(
        train_sae(store, 2 * x.shape[1], site="resid.1", steps=120, batch=256, alpha=0.3), x
    )
    found, effect = measure(sae, x), loss_recovered(model, text[:8], "resid.1", dictionary=sae)
    assert found["fvu"] < 0.4 and 0 < found["l0"] < x.shape[1]
    if name != "pythia":
        assert effect["clean"] <= effect["decoded"] < min(effect["zero"], effect["mean"])
    tuned = tune_decoder(sae, model, text, site="resid.1", steps=2, rows=4)
    assert torch.isfinite(tuned.W_dec).all() and next(model.parameters()).dtype == dtype


# ---- bad input
def test_states_of_another_width_are_refused():
    for kind in KINDS:
        for x in (torch.zeros(3, D + 1), torch.zeros(D - 1)):
            with pytest.raises(ValueError, match=rf"expected states \[.., {D}\], got"):
                some(kind).encode(x)


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(kind="relu"), "kind='relu', expected one of tied"),
        (dict(n_feats=0), "n_feats"),
        (dict(kind="topk", k=99), "k=99"),
        (dict(alpha=-1.0), "alpha"),
        (dict(steps=0), "steps"),
        (dict(kind="topk", alpha=[0.1, 0.2]), "one alpha"),
        (dict(alpha=[]), "one or a list"),
        (dict(batch=10**6), "rows"),
    ],
)
def test_impossible_settings_are_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        train_sae(X, **dict(n_feats=8, steps=2, batch=16) | kw)


@pytest.mark.parametrize(
    "x,says",
    [
        (X[:, 0], "expected activations"),
        (X * 0, "that vary"),
        (X * 1e-20, "that vary"),
        (X * 1e30, "that vary"),
        (X.double() * 1e60, "finite"),
    ],
)
def test_states_that_cannot_be_scaled_are_refused(x, says):
    with pytest.raises(ValueError, match=f"train_sae: .*{says}"):
        train_sae(x, 8, steps=1, batch=16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int])
def test_states_of_other_types_are_trained_on_in_float32(dtype):
    x = (X * 8).round()  # whole numbers that every type holds
    a, b = (train_sae(some, 8, steps=5, batch=16) for some in (x, x.to(dtype)))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused(bad):
    x = X.clone()
    x[3, 2] = bad
    for call in (lambda: train_sae(x, 8, steps=1, batch=16), lambda: measure(some("tied"), x)):
        with pytest.raises(ValueError, match="expected finite numbers"):
            call()


def test_a_penalty_that_kills_every_feature_warns():
    x, _ = sparse_data()
    with pytest.warns(UserWarning, match="no feature active"):
        train_sae(x, 16, alpha=1e4, steps=60, batch=256, lr=0.1)


@pytest.mark.parametrize(
    "kind,kw",
    [
        ("tied", dict(alpha=[0.05, 0.1])),
        ("topk", dict(k=4)),
        ("matryoshka", dict(k=4)),
        ("jumprelu", {}),
        ("gated", {}),
    ],
)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch, kind, kw):
    """Stopped between two saves: bit-equal to one that was not,
    through dead features that begin anew; called once more, nothing is trained."""
    x, kw = (
        torch.randn(600, 12, generator=seeded(0)),
        dict(n_feats=30, kind=kind, steps=60, batch=50, save_every=20, lr=0.02) | kw,
    )
    whole, steps = train_sae(x, **kw), 0
    step = torch.optim.Adam.step

    def stops(self, *args, **k):
        nonlocal steps
        steps += 1
        if steps == 47:
            raise KeyboardInterrupt
        return step(self, *args, **k)

    monkeypatch.setattr(torch.optim.Adam, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        train_sae(x, folder=tmp_path, **kw)
    again = train_sae(x, folder=tmp_path, **kw)
    assert steps == 47 + 20 and [p.name for p in tmp_path.iterdir()] == [
        "training.safetensors"
    ]  # from step 40 on
    third = train_sae(x, folder=tmp_path, **kw)
    assert steps == 47 + 20
    for some in zip(*([m] if isinstance(m, torch.nn.Module) else m for m in (whole, again, third))):
        a, b, c = (one.state_dict() for one in some)
        assert all(torch.equal(a[n], b[n]) and torch.equal(a[n], c[n]) for n in a)


def test_a_training_does_not_go_on_with_other_settings_or_a_damaged_file(tmp_path):
    x, kw = torch.randn(200, 6, generator=seeded(0)), dict(n_feats=10, steps=4, batch=20)
    train_sae(x, folder=tmp_path, **kw)
    file = tmp_path / "training.safetensors"
    with pytest.raises(
        ValueError,
        match="different settings .*steps: 4 then, 8 now.*give another folder",
    ):
        train_sae(x, folder=tmp_path, **kw | dict(steps=8))
    with pytest.raises(ValueError, match="different settings .*mean"):
        train_sae(x + 1, folder=tmp_path, **kw)
    with safe_open(file, "pt") as f:
        kept, told = {n: f.get_tensor(n) for n in f.keys()}, f.metadata()
    save_file(
        kept, file, metadata={n: told[n] for n in ("done", "began")}
    )  # as before there were checksums
    train_sae(x, folder=tmp_path, **kw)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="training.safetensors is missing, damaged .*delete it"):
        train_sae(x, folder=tmp_path, **kw)
