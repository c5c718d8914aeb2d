"""Kinds that are loaded and not trained here, and autoencoders of states scaled row by row.

The peers themselves are in peers_formats.py; here their forward passes are written out in numpy."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_formats import D, K, N, X, change, random_sae, refused, relu, retensor, same

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Lens
from codebook_tutorial.dictionary.formats import export_sae, load_sae, save_sae
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.otherkinds import OTHER_KINDS
from codebook_tutorial.dictionary.rows import ROWS, PerRow
from codebook_tutorial.dictionary.train import refit, train_sae, tune_decoder
from codebook_tutorial.score.metrics import measure

ROWS64 = X.double().numpy()


def other(kind):
    "One with nothing at its beginning; matching pursuit has unit rows and no encoder."
    sae = OTHER_KINDS[kind](
        D, N, generator=seeded(0), **({} if kind == "matching_pursuit" else dict(k=K))
    )
    draw = seeded(1)
    with torch.no_grad():
        for t in sae.state_dict().values():
            t.add_(torch.randn(t.shape, generator=draw) * 0.3)
        if kind == "matching_pursuit":
            sae.project()
    return sae.eval()


def tensors_of(folder, name="sae_weights.safetensors"):
    return {n: t.double().numpy() for n, t in load_file(folder / name).items()}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_they_are_saved_and_loaded_and_nothing_else(kind, tmp_path):
    sae = other(kind)
    save_sae(sae, tmp_path, site="resid.2")
    again = load_sae(tmp_path)
    assert type(again) is type(sae) and again.config == sae.config
    f, x_hat = again.reconstructed(X)
    assert torch.equal(f, sae.encode(X)) and torch.equal(x_hat, sae.decode(f)) and (f != 0).any()
    ids, values = again.encode_sparse(X)
    assert torch.allclose(again.decode_sparse(ids, values), x_hat, atol=1e-5)
    assert (values.abs().diff() <= 0).all()  # largest first
    assert torch.equal(again.encode(X.view(4, 16, D)), f.view(4, 16, N))
    with pytest.raises(ValueError, match=f"kind '{kind}'; expected save_sae"):
        export_sae(sae, tmp_path / "x", "saelens")
    with pytest.raises(ValueError, match=f"kind='{kind}', expected one of tied"):
        train_sae(X, N, kind=kind)
    with pytest.raises(ValueError, match=f"{type(sae).__name__} is loaded.*expected one of Tied"):
        sae.loss(X, 0.1)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_abstopk(before, rescale, tmp_path):
    "The k largest by size, with their signs."
    export_sae(random_sae("topk", unit=False), tmp_path, "saelens")
    how = dict(apply_b_dec_to_input=before, rescale_acts_by_decoder_norm=rescale)
    change(tmp_path / "cfg.json", architecture="abstopk", **how)
    w = tensors_of(tmp_path)
    norm = np.linalg.norm(w["W_dec"], axis=1) if rescale else np.ones(N)
    pre = ((ROWS64 - w["b_dec"] * before) @ w["W_enc"] + w["b_enc"]) * norm
    f = pre * (np.abs(pre) >= np.sort(np.abs(pre), 1)[:, [-K]])
    sae = load_sae(tmp_path)
    assert sae.kind == "abstopk" and sae.k == K and (f < 0).any()
    same(sae, (f, f / norm @ w["W_dec"] + w["b_dec"]))


def pursue(x, rows, *, least=1e-2, steps=D, duplicate=True):
    "Matching pursuit of one state."
    f, rest = np.zeros(len(rows)), x.copy()
    for _ in range(steps):
        best = np.argmax(rest @ rows.T)
        before, amount = f != 0, max(rest @ rows[best], 0)
        f[best] += amount
        rest = rest - amount * rows[best]
        if np.linalg.norm(rest) < least or duplicate and ((f != 0) == before).all():
            break
    return f


@pytest.mark.parametrize(
    "stops",
    [
        dict(),
        dict(max_iterations=3),
        dict(stop_on_duplicate_support=False, residual_threshold=0.5, max_iterations=9),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_saelens_matching_pursuit(stops, before, tmp_path):
    "Without a bias at its input it adds none to its output either."
    export_sae(random_sae("untied"), tmp_path, "saelens")
    change(tmp_path / "cfg.json", architecture="matching_pursuit", apply_b_dec_to_input=before)
    change(tmp_path / "cfg.json", **stops)
    drop = ("W_enc", "b_enc")
    file = tmp_path / "sae_weights.safetensors"
    retensor(file, lambda t: {name: v for name, v in t.items() if name not in drop})
    w = tensors_of(tmp_path)
    bias = w["b_dec"] * before
    names = dict(residual_threshold="least", max_iterations="steps")
    how = {names.get(name, "duplicate"): value for name, value in stops.items()}
    f = np.stack([pursue(x, w["W_dec"], **how) for x in ROWS64 - bias])
    sae = load_sae(tmp_path)
    same(sae, (f, f @ w["W_dec"] + bias))
    with pytest.raises(ValueError, match="got a MatchingPursuit"):
        refit(sae, X)
    for wrong in (dict(residual_threshold="x"), dict(max_iterations=0)):
        change(tmp_path / "cfg.json", **dict(residual_threshold=0.1, max_iterations=None) | wrong)
        with pytest.raises(ValueError, match="MatchingPursuit: expected a number"):
            load_sae(tmp_path)
    change(tmp_path / "cfg.json", normalize_activations="expected_average_only_in")
    refused(tmp_path, "normalize_activations is 'expected_average_only_in'")


def test_sparsify_groupmax(tmp_path):
    export_sae(random_sae("topk"), tmp_path, "sparsify")
    change(tmp_path / "cfg.json", activation="groupmax")
    w = tensors_of(tmp_path, "sae.safetensors")
    pre = relu((ROWS64 - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"])
    groups = pre.reshape(len(X), K, N // K)
    f = (groups * (groups == groups.max(-1, keepdims=True))).reshape(len(X), N)
    same(load_sae(tmp_path), (f, f @ w["W_dec"] + w["b_dec"]))
    change(tmp_path / "cfg.json", k=7)
    refused(tmp_path, "k is 7; expected a divisor of n_feats, 40")


# ---- states scaled row by row
def scaled(x, rows):
    "What goes in, and fn(x^) for what comes out, as SAELens has them."
    if rows == "layer_norm":
        mean, std = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
        return (x - mean) / (std + 1e-5), lambda x_hat: x_hat * std + mean
    scale = np.linalg.norm(x, axis=1, keepdims=True) / D**0.5
    return x / scale, lambda x_hat: x_hat * scale


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["untied", "topk", "jumprelu", "gated"])
def test_states_scaled_row_by_row(kind, rows, tmp_path):
    "Features as the peer has them; decoding wants the states, and a lens only reads."
    inner = random_sae(kind)
    export_sae(inner, tmp_path / "a", "saelens", site="resid.1")
    change(tmp_path / "a" / "cfg.json", normalize_activations=rows)
    sae = load_sae(tmp_path / "a")
    save_sae(sae, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "sae.json").read_text())["config"]["rows"] == rows
    own, back = scaled(ROWS64, rows)
    want = inner.encode(torch.tensor(own).float())
    for one in (sae, load_sae(tmp_path / "b")):
        assert isinstance(one, PerRow) and one.rows == rows
        f, x_hat = one.reconstructed(X)
        assert torch.equal(f != 0, want != 0) and torch.equal(f, one.encode(X))
        torch.testing.assert_close(f, want, atol=1e-5, rtol=0)
        theirs = torch.tensor(back(inner.decode(want).detach().double().numpy())).float()
        torch.testing.assert_close(x_hat, theirs, atol=1e-5, rtol=0)
    assert sae.source["site"] == "resid.1" and set(measure(sae, X)) > {"fvu", "l0"}
    ids, values = sae.encode_sparse(X)
    assert torch.allclose(torch.zeros_like(f).scatter(-1, ids, values), f)


def test_what_a_row_s_scale_forbids(tmp_path):
    sae, says = PerRow(random_sae("untied"), "layer_norm"), "scales each row of states by itself"
    lens = Lens(None, "resid.1", sae)
    f = sae.encode(X)
    for call in (
        lambda: sae.decode(f),
        lambda: sae.decode_sparse(*sae.encode_sparse(X)),
        lambda: lens.moves,
        lambda: lens.slope,
        lambda: lens.amounts(X),
        lambda: lens.taken(X, [0]),
        lambda: lens.difference(f, f),
        lambda: lens.turn(None, 0),
        lambda: lens.turn_off(None, 0),
        lambda: refit(sae, X),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with pytest.raises(ValueError, match="got a PerRow"):
        tune_decoder(sae, None, None, site="resid.1")
    with pytest.raises(ValueError, match="got a PerRow"):
        export_sae(sae, tmp_path, "saelens")
    assert torch.equal(lens.decoded(X), sae.reconstructed(X)[1])
    assert torch.equal(lens.acts(X), f) and KINDS.keys().isdisjoint(OTHER_KINDS)
    zeros = sae.reconstructed(torch.zeros(2, D))[1]
    assert zeros.isfinite().all() and not lens.discrete
