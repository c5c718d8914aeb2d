"""Transcoders: equations, training, and a place in a model.

The known answer is an MLP with ReLU: it is a transcoder, whose features are its neurons."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from test_circuits import contexts_of, some_text
from test_patching import some_pairs
from transformers import GPT2Config, GPT2LMHeadModel

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Lens, basis, fvu
from codebook_tutorial.dictionary.formats import load_sae, save_sae
from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.sae import SAE
from codebook_tutorial.dictionary.train import refit, train_sae, tune_decoder
from codebook_tutorial.dictionary.transcoder import TRANSCODERS, Transcoder, TranscoderLens
from codebook_tutorial.feature.ablate import ablate_nodes, check_tree, joined
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.feature.patch import Patch
from codebook_tutorial.feature.trace import (
    FeatureTree,
    causal_tree,
    direct_effects,
    feature_effects,
)
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import passes
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.score.metrics import loss_recovered, measure, replaced_loss

D, OUT, N, ROWS = 12, 7, 20, 600
SETTINGS = dict(topk=dict(k=4), batchtopk=dict(k=4), matryoshka=dict(k=4))


def rows(n=ROWS, d=D):
    return torch.randn(n, d, generator=seeded(1)) * 3 + torch.arange(d) / 4


def written(x, d=OUT):
    "What a layer of five neurons makes of x, in units of its own."
    a = torch.randn(D, 5, generator=seeded(2))
    b = torch.randn(5, d, generator=seeded(3))
    return (x @ a / 3 - 1).relu() @ b * 20 + 40


def some_transcoder(kind, skip=True, seed=0):
    "With every parameter as random as after training."
    draw = seeded(seed)
    t = TRANSCODERS[kind](D, N, d_out=OUT, skip=skip, generator=draw, **SETTINGS.get(kind, {}))
    with torch.no_grad():
        for name, p in t.named_parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.3)
            if name == "threshold":
                p.abs_()
        if kind in ("batchtopk", "matryoshka"):
            t.threshold.fill_(0.4)
    return t.eval()


@pytest.mark.parametrize("kind", TRANSCODERS)
@torch.no_grad()
def test_it_encodes_as_its_kind_and_writes_the_equation(kind):
    t, x = some_transcoder(kind), rows()
    f, pre = t.encode(x), x @ t.W_enc.T + t.b_enc
    if kind == "untied":
        want = pre.relu()
    elif kind == "topk":
        top = pre.topk(4, -1)
        want = torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())
    elif kind == "gated":
        magnitude = (x @ t.W_enc.T) * t.r_mag.exp() + t.b_mag
        want = magnitude.relu() * (pre > 0)
    else:
        want = pre * (pre > t.threshold)
    torch.testing.assert_close(f, want, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(t(x), f @ t.W_dec + t.b_dec + x @ t.W_skip.T)
    ids, values = t.encode_sparse(x)
    torch.testing.assert_close(t.decode_sparse(ids, values), t.decode(f), atol=1e-4, rtol=1e-5)
    bare = some_transcoder(kind, skip=False)
    torch.testing.assert_close(bare(x), bare.decode(bare.encode(x)))
    assert t.transcodes and isinstance(t, Transcoder) and isinstance(t, SAE)
    again = pickle.loads(pickle.dumps(t))  # as other processes need
    assert type(again) is type(t) and torch.equal(again(x), t(x))


@pytest.mark.parametrize("kind", TRANSCODERS)
@torch.no_grad()
def test_folding_keeps_what_it_computes(kind):
    t, x = some_transcoder(kind), rows()
    mean, scale, mean_y, scale_y = x.mean(0), torch.tensor(3.0), torch.arange(OUT) + 0.5, 20.0
    normal = (x - mean) / scale
    f, y = t.encode(normal), t(normal) * scale_y + mean_y
    t.fold_normalisation(mean, scale, target=(mean_y, torch.tensor(scale_y)))
    torch.testing.assert_close(t(x), y, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(t.encode(x), f * scale_y, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_the_loss_is_the_error_of_what_it_writes(kind):
    "And its gradients are those of the printed equation, skip included."
    t, x = some_transcoder(kind).train(), rows(64)
    y = written(x)
    if kind in ("topk", "untied"):
        error = (y - t(x)).pow(2).sum(-1).mean()
        penalty = t.encode(x).sum(-1).mean() if kind == "untied" else 0.0
        loss = t.loss(x, 0.5, y)
        torch.testing.assert_close(loss, error + 0.5 * penalty)
        want = torch.autograd.grad(error + 0.5 * penalty, [t.W_skip, t.W_dec, t.W_enc])
        got = torch.autograd.grad(loss, [t.W_skip, t.W_dec, t.W_enc])
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)
    with pytest.raises(ValueError, match="expected y, the states that it must write"):
        t.loss(x, 0.5)


@pytest.mark.parametrize("kind", TRANSCODERS)
@pytest.mark.parametrize("skip", [False, True])
def test_training_learns_what_a_layer_does(kind, skip):
    "Beside controls: the mean (1 by definition), and the same rows in another order."
    x, held_out = rows(4000).split(3000)
    kw = dict(steps=600, batch=256, skip=skip, **SETTINGS.get(kind, {}))
    kw |= dict(alpha=0.02) if kind in ("untied", "gated", "jumprelu") else {}
    t = train_sae(x, N, kind, target=written(x), **kw)
    found = measure(t, held_out, target=written(held_out))
    mixed = train_sae(x, N, kind, target=written(x)[torch.randperm(3000)], **kw)
    control = measure(mixed, held_out, target=written(held_out))
    assert found["fvu"] < 0.15 < 0.8 < control["fvu"], (found["fvu"], control["fvu"])
    assert torch.allclose(t.W_dec.norm(dim=-1), torch.ones(N), atol=1e-5)
    assert (t.W_skip is not None) == skip and t.config["d_out"] == OUT
    if not skip:
        new = refit(t, x, target=written(x))
        assert fvu(written(x), new(x)) < fvu(written(x), t(x)) + 1e-6


def test_several_alphas_are_several_transcoders():
    x = rows()
    kw = dict(target=written(x), steps=40, batch=128)
    both = train_sae(x, N, "untied", alpha=[0.01, 0.1], **kw)
    for alpha, t in zip((0.01, 0.1), both):
        alone = train_sae(x, N, "untied", alpha=alpha, **kw)
        torch.testing.assert_close(t.W_enc, alone.W_enc, atol=1e-3, rtol=1e-3)


def test_dead_features_read_inputs_and_write_what_is_missing():
    from codebook_tutorial.dictionary.train import resample_dead

    t, x = some_transcoder("untied"), rows()
    optimizer = torch.optim.Adam(t.parameters())
    t.loss(x, 0.1, written(x)).backward()
    optimizer.step()
    skip, b_dec = t.W_skip.clone(), t.b_dec.clone()
    t.silent[3] = 1000
    residual = (written(x) - t(x)).detach()
    how = dict(y=written(x), patience=500, generator=seeded(0))
    assert resample_dead(t, x, optimizer, **how) == 1
    row = (F.normalize(x, dim=-1) @ t.W_enc[3]).argmax()
    torch.testing.assert_close(t.W_enc[3], F.normalize(x[row], dim=-1))
    torch.testing.assert_close(t.W_dec[3], F.normalize(residual[row], dim=-1))
    assert torch.equal(t.W_skip, skip) and torch.equal(t.b_dec, b_dec) and t.b_enc[3] == 0


def test_what_cannot_be_trained_is_refused():
    x = rows()
    for kw, match in (
        (dict(kind="tied", target=written(x)), "kind='tied' cannot write another site"),
        (dict(kind="topk", target=written(x)[:-1]), "a row of target for each of the 600"),
        (dict(kind="topk", target="mlp.1"), "both tensors, or an Activations"),
        (dict(kind="topk", target=written(x) * float("nan")), "train_sae"),
    ):
        with pytest.raises(ValueError, match=match):
            train_sae(x, N, steps=2, batch=64, **kw)
    t = some_transcoder("topk")
    with pytest.raises(ValueError, match=r"expected states \[.., 12\] of the site that it reads"):
        t.encode(written(x))
    with pytest.raises(ValueError, match="measure: expected a target for a TopKTranscoder"):
        measure(t, x)
    with pytest.raises(ValueError, match="measure: expected no target for a Directions"):
        measure(basis(D), x, target=x)
    with pytest.raises(ValueError, match="measure: expected a target per state, got 599 for 600"):
        measure(t, x, target=written(x)[1:])
    with pytest.raises(ValueError, match="refit: expected a target for a TopKTranscoder"):
        refit(t, x)
    with pytest.raises(ValueError, match="tune_decoder: expected an autoencoder"):
        tune_decoder(t, None, None, site="mlp.1")


@pytest.mark.parametrize("kind", TRANSCODERS)
def test_saved_and_loaded_it_is_the_same(kind, tmp_path):
    t = some_transcoder(kind)
    save_sae(t, tmp_path, site="mlp_in.1", writes="mlp.1")
    again = load_sae(tmp_path)
    assert type(again) is type(t) and again.config == t.config
    assert again.source["site"] == "mlp_in.1" and again.source["writes"] == "mlp.1"
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), t.parameters()))
    assert torch.equal(again(rows()), t(rows()))


# ---- in a model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    "GPT-2 with ReLU, so that its MLPs are transcoders."
    torch.manual_seed(0)
    sizes = dict(n_layer=3, n_embd=32, n_head=4, n_inner=48, n_positions=64, vocab_size=64)
    config = GPT2Config(**sizes, activation_function="relu", bos_token_id=1, eos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=seeded(1))
    return model


def exact(model, layer=1):
    "The transcoder that this MLP is."
    mlp, n = model.transformer.h[layer].mlp, 48
    t = TRANSCODERS["untied"](32, n)
    state = dict(W_enc=mlp.c_fc.weight.T, b_enc=mlp.c_fc.bias)
    t.load_state_dict(state | dict(W_dec=mlp.c_proj.weight, b_dec=mlp.c_proj.bias))
    return t.eval()


def test_in_place_of_the_mlp_it_changes_nothing(model):
    text, t = some_text(), exact(model)
    lens = Lens(model, "mlp.1", t)
    assert type(lens) is TranscoderLens and (lens.site, lens.writes) == ("mlp_in.1", "mlp.1")
    with torch.no_grad():
        want = model(text.ids).logits
        with intervene(model, lens.edits(lens.decoded)):
            torch.testing.assert_close(model(text.ids).logits, want, atol=1e-4, rtol=1e-4)
    for site in ("mlp.1", "mlp_in.1"):
        found = loss_recovered(model, text, site, dictionary=t, batch=3)
        assert found["decoded"] == pytest.approx(found["clean"], abs=1e-5)
        assert found["recovered_zero"] == pytest.approx(1, abs=1e-3)
        assert abs(found["zero"] - found["clean"]) > 1e-3
    # one that writes the mean is as good as the mean
    t.W_dec.data.zero_()
    means = [acts["mlp.1"][part.mask] for _, part, acts in passes(model, text, ["mlp.1"])]
    t.b_dec.data.copy_(torch.cat(means).mean(0))
    found = loss_recovered(model, text, "mlp.1", dictionary=t)
    assert found["recovered_mean"] == pytest.approx(0, abs=1e-3)


def test_generation_reads_every_step(model):
    t, ids = exact(model), torch.tensor([[1, 5, 9, 13]])
    lens = Lens(model, "mlp.1", t)
    kw = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), **kw)
    with lens.editing(lens.decoded):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **kw), plain)
    neurons = Lens(model, "neurons.1", basis(48))
    some = list(range(0, 48, 3))
    with neurons.editing(neurons.take_out(some)):
        want = model.generate(ids, attention_mask=torch.ones_like(ids), **kw)
    with lens.editing(lens.take_out(some)):
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **kw), want)


def test_its_features_are_the_neurons_wherever_features_are_read(model, tmp_path):
    text, t = some_text(), exact(model)
    ours, neurons = Lens(model, "mlp.1", t), Lens(model, "neurons.1", basis(48))
    torch.testing.assert_close(ours.read(text), neurons.read(text), atol=1e-5, rtol=1e-5)

    _, tok = load_lm("stories")
    found = {}
    for site, dictionary in {"mlp.1": t, "neurons.1": basis(48)}.items():
        index = build_index(
            model, tok, text, folder=tmp_path / site, dictionaries={site: dictionary}
        )
        found[site] = index.active(site)
    assert (found["mlp.1"] == found["neurons.1"]).all() and found["mlp.1"].sum() > 100


def both(model):
    "The same features twice: {site: Dictionary} with a transcoder, and with neurons."
    below = {"resid.0": basis(32)}
    return below | {"mlp.1": exact(model)}, below | {"neurons.1": basis(48)}


@pytest.mark.parametrize("at_end", [False, True])
def test_effects_of_its_features_are_those_of_the_neurons(model, at_end):
    "As children of a later feature, and as parents of an earlier one."
    contexts, above = contexts_of(), {"resid.2": basis(32)}
    kw = dict(contexts=contexts, at_end=at_end, most=None, min_active=1)
    ours, neurons = both(model)
    for child in (("mlp.1", "neurons.1"), ("resid.0", "resid.0")):
        parents = [("resid.2", 3)] * 2 if child[0] == "mlp.1" else [("mlp.1", 7), ("neurons.1", 7)]
        got, want = (
            feature_effects(model, some | above, parent, child_site=site, **kw)
            for some, parent, site in zip((ours, neurons), parents, child)
        )
        assert torch.equal(got[0], want[0]) and got[2] == want[2]
        torch.testing.assert_close(got[1], want[1], atol=1e-4, rtol=1e-3)
        assert got[1].abs().max() > 0.01


def test_trees_and_their_checks_are_those_of_the_neurons(model):
    contexts, above = contexts_of(), {"resid.2": basis(32)}
    ours, neurons = both(model)
    kw = dict(contexts=contexts, width=8, budget=20, least=0.0, back=2, min_active=1)
    trees = [causal_tree(model, some | above, ("resid.2", 3), **kw) for some in (ours, neurons)]
    named = [
        [(e["child"][0].replace("neurons", "mlp"), e["child"][1]) for e in t.edges] for t in trees
    ]
    assert named[0] == named[1] and any(site == "mlp.1" for site, _ in named[0])
    nodes = [("mlp.1", 4), ("mlp.1", 9)]
    tree = FeatureTree(
        ("resid.2", 3), [dict(child=n, parent=("resid.2", 3), effect=0.5) for n in nodes]
    )
    other = [dict(e, child=("neurons.1", e["child"][1])) for e in tree.edges]
    other = FeatureTree(("resid.2", 3), other)
    found = check_tree(model, ours | above, tree, contexts=contexts, draws=2)
    want = check_tree(model, neurons | above, other, contexts=contexts, draws=2)
    for key in ("kl", "p", "margin", "act"):
        assert found["below"][key] == pytest.approx(want["below"][key], abs=1e-4)
    assert found["below"]["kl"] > 1e-4


def test_patched_features_are_the_neurons(model):
    ours, neurons = (
        Patch(model, site, d, pairs=some_pairs())
        for site, d in (("mlp.1", exact(model)), ("neurons.1", basis(48)))
    )
    assert torch.equal(ours.features, neurons.features) and len(ours.features) > 5
    for some in (ours.features[:3], ours.features):
        got, want = (p.measure(p.chosen(some)) for p in (ours, neurons))
        torch.testing.assert_close(got["kl"], want["kl"], atol=1e-4, rtol=1e-3)


def test_direct_effects_are_those_of_what_it_writes(model):
    t, contexts = exact(model, 2), contexts_of()
    got = direct_effects(model, t, 5, contexts=contexts)
    with torch.no_grad(), capture(model, "resid.2") as acts:
        clean = model(contexts.ids).logits
    n = torch.arange(len(contexts))
    x = acts["resid.2"][n, contexts.last] + contexts.acts[:, None] * t.W_dec[5]
    with torch.no_grad():
        want = model.lm_head(model.transformer.ln_f(x)) - clean[n, contexts.last]
    torch.testing.assert_close(got, want - want.mean(-1, keepdim=True), atol=1e-3, rtol=1e-3)


def test_edits_that_it_could_not_hear_are_refused(model):
    t = exact(model)
    lens = Lens(model, "mlp.1", t)
    with pytest.raises(ValueError, match="has not read mlp_in.1 in this pass"):
        with intervene(model, {"mlp.1": lens.take_out([2])}), torch.no_grad():
            model(some_text().ids)
    with torch.no_grad(), lens.editing(lens.decoded):
        model(some_text().ids)
    with pytest.raises(ValueError, match="has not read mlp_in.1 in this pass"):  # nor an older one
        with intervene(model, {"mlp.1": lens.take_out([2])}), torch.no_grad():
            model(some_text().ids)
    with pytest.raises(ValueError, match="a transcoder that reads resid.0; expected site 'mlp.L'"):
        Lens(model, "resid.0", t).edits(lens.decoded)
    named = TranscoderLens(model, "resid.0", t, writes="attn.1")
    assert set(named.edits(named.decoded)) == {"resid.0", "attn.1"}
    assert replaced_loss(model, some_text(), named, fn=torch.zeros_like) == pytest.approx(
        replaced_loss(model, some_text(), "attn.1", fn=torch.zeros_like)
    )


def test_edits_at_one_site_are_done_one_after_the_other():
    double, add = {"a.0": lambda x: 2 * x}, {"a.0": lambda x: x + 1, "b.0": lambda x: None}
    both = joined(double, add, {"a.0": lambda x: None})
    assert both["a.0"](torch.tensor(3.0)) == 7 and both["b.0"](1) is None


def test_nodes_of_a_transcoder_and_of_another_dictionary_where_it_reads(model):
    "The transcoder hears what the other edit leaves."
    contexts, t = contexts_of(), exact(model)
    found = {"mlp_in.1": basis(32), "mlp.1": t}
    edits = ablate_nodes(model, found, [("mlp_in.1", 3), ("mlp.1", 4)], contexts=contexts)
    assert set(edits) == {"mlp_in.1", "mlp.1"}
    with torch.no_grad(), intervene(model, edits), capture(model, ["mlp_in.1", "mlp.1"]) as acts:
        model(contexts.ids)
    there = contexts.there
    assert acts["mlp_in.1"][..., 3][there].abs().max() < 1e-6
    f = t.encode(acts["mlp_in.1"])
    f[..., 4] = 0
    torch.testing.assert_close(acts["mlp.1"][there], t.decode(f)[there], atol=1e-4, rtol=1e-4)


def test_a_store_gives_both_sites_of_the_same_tokens(model, tmp_path):
    text = some_text(16)
    kw = dict(folder=tmp_path, dtype=torch.float32, shard=60, verbose=False)
    store = harvest(model, text, ["mlp_in.1", "mlp.1"], **kw)
    x, y = store.load("mlp_in.1"), store.load("mlp.1")
    how = dict(steps=30, batch=64, k=4)
    t = train_sae(store, 48, "topk", site="mlp_in.1", target="mlp.1", **how)
    from codebook_tutorial.dictionary.data import TrainingData

    rows = TrainingData(store, "mlp_in.1", "mlp.1", outliers="keep")
    a, b = next(rows.batches(64, seed=3))
    at = torch.cdist(a * rows.scale + rows.mean, x).argmin(1)
    mean, scale = rows.target_scale
    torch.testing.assert_close(b * scale + mean, y[at], atol=1e-4, rtol=1e-4)
    assert len(at.unique()) == 64 and measure(t, x, target=y)["fvu"] < 1


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    x = rows()
    kw = dict(target=written(x), steps=40, batch=128, k=4, save_every=10, skip=True)
    want = train_sae(x, N, "topk", **kw)
    import codebook_tutorial.dictionary.train as train

    loop = train.train_loop

    def stopped(run, batches, **kw):
        loop(run, (pair for _, pair in zip(range(20), batches)), **kw)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_loop", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_sae(x, N, "topk", folder=tmp_path, **kw)
    monkeypatch.setattr(train, "train_loop", loop)
    again = train_sae(x, N, "topk", folder=tmp_path, **kw)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), want.parameters()))
    with pytest.raises(ValueError, match="target_mean"):
        train_sae(x, N, "topk", folder=tmp_path, **kw | dict(target=written(x) + 1))
