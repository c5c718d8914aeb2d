"""Transcoders' files: peers' layouts read and written, each against its own arithmetic in numpy."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import D, N, X, gemma, gemma_2, refused, relu
from test_transcoder import SETTINGS

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.formats import export_sae, load_sae
from codebook_tutorial.dictionary.layouts import WRITES_TRANSCODERS
from codebook_tutorial.dictionary.transcoder import TRANSCODERS

OUT = 10
MLP = dict(hook_name="blocks.2.mlp.hook_in", hook_name_out="blocks.2.hook_mlp_out")


def weights(d_out=OUT, skip=False, threshold=False, seed=3):
    "W_enc [d, F], W_dec [F, d_out], b_enc, b_dec and what else is asked for."
    draw = seeded(seed)
    shapes = dict(W_enc=(D, N), W_dec=(N, d_out), b_enc=(N,), b_dec=(d_out,))
    shapes |= dict(W_skip=(d_out, D)) if skip else {}
    shapes |= dict(threshold=(N,)) if threshold else {}
    w = {name: torch.randn(shape, generator=draw) / 3 for name, shape in shapes.items()}
    if threshold:
        w["threshold"].abs_()
    return w


def wanted(w, kind="relu", k=None):
    "Features and what is written, in float64."
    w = {name: t.double().numpy() for name, t in w.items()}
    x = X.double().numpy()
    pre = x @ w["W_enc"] + w["b_enc"]
    f = relu(pre)
    if kind == "jumprelu":
        f = f * (pre > w["threshold"])
    if kind == "topk":
        least = np.sort(pre, -1)[:, -k][:, None]
        f = f * (pre >= least)
    y = f @ w["W_dec"] + w["b_dec"]
    return f, y + (x @ w["W_skip"].T if "W_skip" in w else 0)


def same(t, want):
    "A loaded transcoder computes these features and this output."
    with torch.no_grad():
        f, y = t.reconstructed(X)
    np.testing.assert_allclose(f, want[0], atol=1e-5)
    np.testing.assert_allclose(y, want[1], atol=1e-5)
    assert t.transcodes and not t.training


def saelens(folder, w, architecture, **config):
    folder.mkdir(parents=True)
    save_file(w, folder / "sae_weights.safetensors")
    d_out = w["W_dec"].shape[1]
    told = dict(architecture=architecture, d_in=D, d_out=d_out, d_sae=N, dtype="float32")
    told |= dict(apply_b_dec_to_input=False, normalize_activations="none", metadata=MLP)
    (folder / "cfg.json").write_text(json.dumps(told | config))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_saelens(kind, skip, tmp_path):
    w = weights(skip=skip, threshold=kind == "jumprelu")
    name = ("jumprelu_" if kind == "jumprelu" else "") + ("skip_" if skip else "") + "transcoder"
    saelens(tmp_path / "a", w, name)
    t = load_sae(tmp_path / "a")
    same(t, wanted(w, kind))
    assert (t.source["site"], t.source["writes"]) == ("mlp_in.2", "mlp.2")
    assert t.config["skip"] is skip and t.config["d_out"] == OUT
    saelens(tmp_path / "b", w, name, normalize_activations="layer_norm")
    refused(tmp_path / "b", "normalize_activations is 'layer_norm'")
    saelens(tmp_path / "d", w | dict(extra=torch.zeros(2)), name)
    refused(tmp_path / "d", "tensor extra")


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(skip, tmp_path):
    "Its affine skip connection is stored [d, d_out], the other way round than W_skip."
    reads = "model.layers.7.pre_feedforward_layernorm.output"
    writes = "model.layers.7.post_feedforward_layernorm.output"
    own = torch.randn(D, D, generator=seeded(5)) / 3
    more = dict(affine_skip_connection=own) if skip else {}
    told = dict(hf_hook_point_in=reads, hf_hook_point_out=writes, affine_connection=skip)
    w = gemma_2(tmp_path / "transcoder" / "layer_7_width_16k_l0_small", more, **told)
    w = {n.replace("w_", "W_"): torch.from_numpy(t) for n, t in w.items()}
    t = load_sae(tmp_path)
    same(t, wanted(w | (dict(W_skip=own.T) if skip else {}), "jumprelu"))
    assert (t.source["site"], t.source["writes"]) == ("mlp_in.7", "mlp.7")


def test_gemma_scope_2_whose_files_disagree(tmp_path):
    gemma_2(tmp_path / "a", affine_connection=True)
    refused(tmp_path / "a", "affine_skip_connection among the tensors is False", "True")
    gemma_2(tmp_path / "b", dict(affine_skip_connection=torch.zeros(D, D)))
    refused(tmp_path / "b", "affine_skip_connection among the tensors is True", "False")


def test_gemma_scope(tmp_path):
    folder = gemma(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3" / "average_l0_9")
    t = load_sae(tmp_path / "gemma-scope-2b-pt-transcoders")
    arrays = np.load(folder / "params.npz")
    same(t, wanted({n: torch.from_numpy(arrays[n]).float() for n in arrays.files}, "jumprelu"))
    assert t.source["site"] is None and t.source["writes"] is None


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
def test_circuit_tracer(kind, skip, tmp_path):
    "W_enc is stored [F, d]; a threshold below 0 lets through what is above it."
    w = weights(D, skip=skip, threshold=kind == "jumprelu")
    stored = w | dict(W_enc=w["W_enc"].T.contiguous())
    if kind == "jumprelu":
        stored["activation_function.threshold"] = stored.pop("threshold")
    for layer in (4, 11):
        save_file(stored, tmp_path / f"layer_{layer}.safetensors")
    t = load_sae(tmp_path, "layer_11.safetensors")
    same(t, wanted(w, kind))
    assert (t.source["site"], t.source["layout"]) == (None, "circuit_tracer")
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (tmp_path / "config.yaml").write_text(hooks)
    t = load_sae(tmp_path, "layer_11.safetensors")
    assert (t.source["site"], t.source["writes"]) == ("mlp_in.11", "mlp.11")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_sparsify(transcode, skip, tmp_path):
    "With a skip connection alone it subtracts b_dec from what it reads."
    if not (transcode or skip):
        return
    w = weights(D, skip=skip)
    stored = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    stored |= {name: w[name] for name in w if name in ("W_dec", "b_dec", "W_skip")}
    save_file(stored, tmp_path / "sae.safetensors")
    config = dict(activation="topk", num_latents=N, k=5, d_in=D)
    config |= dict(transcode=transcode, skip_connection=skip, normalize_decoder=True)
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    if not transcode:
        w = w | dict(b_enc=w["b_enc"] - w["b_dec"] @ w["W_enc"])
    same(load_sae(tmp_path), wanted(w, "topk", 5))
    (tmp_path / "cfg.json").write_text(json.dumps(config | dict(activation="groupmax")))
    refused(tmp_path, "activation, of a transcoder or with a skip connection, is 'groupmax'")


def some(kind, skip, d_out=D):
    draw = seeded(2)
    t = TRANSCODERS[kind](D, N, d_out=d_out, skip=skip, generator=draw, **SETTINGS.get(kind, {}))
    with torch.no_grad():
        for name, p in t.named_parameters():
            if name not in ("W_dec", "W_enc"):
                p.add_(torch.randn(p.shape, generator=draw) / 3)
            if name == "threshold":
                p.abs_()
        if kind in ("batchtopk", "matryoshka"):
            t.threshold.fill_(0.3)
    return t.eval()


PAIRS = [(layout, kind) for layout, kinds in WRITES_TRANSCODERS.items() for kind in kinds]


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layout, kind", PAIRS)
def test_written_and_read_again(layout, kind, skip, tmp_path):
    t = some(kind, skip, D if layout == "sparsify" else OUT)
    export_sae(t, tmp_path, layout, site="mlp_in.2", writes="mlp.2", model_name="stories")
    again = load_sae(tmp_path)
    with torch.no_grad():
        for a, b in zip(again.reconstructed(X), t.reconstructed(X)):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert again.config["skip"] is skip
    config = json.loads((tmp_path / "cfg.json").read_text())
    if layout == "saelens":
        assert {k: config["metadata"][k] for k in MLP} == MLP | dict(
            hook_name_out="blocks.2.hook_mlp_out"
        )
        assert config["apply_b_dec_to_input"] is False and config["d_out"] == OUT
        assert config["architecture"].endswith("skip_transcoder") is skip
    else:
        stored = load_file(tmp_path / "sae.safetensors")
        assert config["transcode"] is True and ("W_skip" in stored) is skip


def test_what_no_layout_holds_is_refused(tmp_path):
    for kind, layout, match in (
        ("gated", "saelens", "a transcoder of kind 'gated'; expected save_sae"),
        ("topk", "saelens", "a transcoder of kind 'topk'; expected layout sparsify"),
        ("untied", "dictionary_learning", "holds none only, .* expected layout saelens"),
    ):
        with pytest.raises(ValueError, match=match):
            export_sae(some(kind, False), tmp_path / "x", layout)
    with pytest.raises(ValueError, match="write as many numbers as they read, got d_model=16"):
        export_sae(some("topk", False, OUT), tmp_path / "x", "sparsify")
    with pytest.raises(ValueError, match="site='mlp2'"):
        export_sae(some("untied", False), tmp_path / "x", "saelens", writes="mlp2")
    assert not (tmp_path / "x").exists()
