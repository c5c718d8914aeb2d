"""Files of autoencoders: ours, and the peers' layouts written and read.

What we cannot compute or trust is refused; the Hub; the penalty's units. The peers themselves
stand in peers_formats.py; here their forward passes are written out in numpy, from the raw
files."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as numpy_file
from safetensors.torch import load_file, save_file

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import formats
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.dictionary.fetch import saelens_release
from codebook_tutorial.dictionary.formats import export_sae, load_sae, save_sae
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.layouts import ALPHA_UNITS, FILES, WRITES, convert_alpha

D, N, K = 16, 40, 5
X = torch.randn(64, D, generator=seeded(9)) * 1.5
PAIRS = [(layout, kind) for layout, kinds in WRITES.items() for kind in kinds]


def random_sae(kind, unit=True, seed=0, **settings):
    """An autoencoder with nothing at its beginning:
    b_dec, thresholds and all else are as uneven as after training."""
    draw = seeded(seed)
    settings = (dict(k=K) if "topk" in kind or kind == "matryoshka" else {}) | settings
    sae = KINDS[kind](D, N, generator=draw, **settings)
    with torch.no_grad():
        for name, t in sae.state_dict().items():
            t.add_(torch.randn(t.shape, generator=draw) * 0.3)
        if unit:
            sae.project()
        if hasattr(sae, "threshold"):
            sae.threshold.abs_().add_(0.1)
    return sae.eval()


def same(a, b, tol=1e-5):
    "Two autoencoders, or one and what another gave: features and reconstructions agree."
    with torch.no_grad():
        f, x_hat = (
            (b.encode(X), b.decode(b.encode(X)))
            if hasattr(b, "encode")
            else map(torch.as_tensor, b)
        )
        mine = a.encode(X)
        assert torch.equal(mine != 0, f != 0) and (mine != 0).any()
        torch.testing.assert_close(mine, f.float(), atol=tol, rtol=0)
        torch.testing.assert_close(a.decode(mine), x_hat.float(), atol=tol, rtol=0)


# ---- their forward passes, from their files alone
def relu(x):
    return np.maximum(x, 0)


def top(h, k):
    keep = np.zeros_like(h)
    np.put_along_axis(keep, np.argsort(-h, 1)[:, :k], 1, 1)
    return relu(h) * keep


def saelens_forward(folder, x):
    cfg, w = (
        json.loads((folder / "cfg.json").read_text()),
        {n: t.astype("f8") for n, t in numpy_file(folder / "sae_weights.safetensors").items()},
    )
    h = (x - w["b_dec"] * cfg["apply_b_dec_to_input"]) @ w["W_enc"]
    norm = np.linalg.norm(w["W_dec"], axis=1) if cfg.get("rescale_acts_by_decoder_norm") else 1
    if cfg["architecture"] == "gated":
        f = (h + w["b_gate"] > 0) * relu(h * np.exp(w["r_mag"]) + w["b_mag"])
    elif cfg["architecture"] == "jumprelu":
        f = relu(h + w["b_enc"]) * (h + w["b_enc"] > w["threshold"])
    elif cfg["architecture"] == "topk":
        f = top((h + w["b_enc"]) * norm, cfg["k"])
    else:
        f = relu(h + w["b_enc"])
    return f, f / norm @ w["W_dec"] + w["b_dec"]


def dictionary_learning_forward(folder, x):
    cls = json.loads((folder / "config.json").read_text())["trainer"]["dict_class"]
    w = {n: t.double().numpy() for n, t in torch.load(folder / "ae.pt", weights_only=True).items()}
    if cls == "GatedAutoEncoder":
        h = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        f = (h + w["gate_bias"] > 0) * relu(h * np.exp(w["r_mag"]) + w["mag_bias"])
        return f, f @ w["decoder.weight"].T + w["decoder_bias"]
    if cls in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        h = (x - w["b_dec"] * (cls != "JumpReluAutoEncoder")) @ w["W_enc"] + w[
            "b_enc"
        ]  # JumpReluAutoEncoder: apply_b_dec_to_input is False
        f = relu(h) * (h > w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"]
    if cls == "AutoEncoderNew":
        f = relu(x @ w["encoder.weight"].T + w["encoder.bias"])
        return f, f @ w["decoder.weight"].T + w["decoder.bias"]
    b_dec = w["bias" if cls == "AutoEncoder" else "b_dec"]
    h = relu((x - b_dec) @ w["encoder.weight"].T + w["encoder.bias"])
    f = (
        top(h, int(w["k"]))
        if cls == "AutoEncoderTopK"
        else h * (h > w["threshold"])
        if cls == "BatchTopKSAE"
        else h
    )
    return f, f @ w["decoder.weight"].T + b_dec


def sparsify_forward(folder, x):
    cfg, w = (
        json.loads((folder / "cfg.json").read_text()),
        {n: t.astype("f8") for n, t in numpy_file(folder / "sae.safetensors").items()},
    )
    f = top((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"], cfg["k"])
    return f, f @ w["W_dec"] + w["b_dec"]


FORWARD = dict(
    saelens=saelens_forward,
    dictionary_learning=dictionary_learning_forward,
    sparsify=sparsify_forward,
)


def theirs(layout, folder):
    return FORWARD[layout](folder, X.double().numpy())


# ---- round trips
@pytest.mark.parametrize("kind", KINDS)
def test_our_own_format_keeps_every_bit(kind, tmp_path):
    sae = random_sae(kind, unit=False, **dict(patience=77, k_aux=3) if "topk" in kind else {})
    save_sae(sae, tmp_path, site="resid.2", alpha=0.1, note="für später")
    state = torch.random.get_rng_state()
    again = load_sae(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)  # loading draws nothing
    assert (
        type(again) is type(sae)
        and again.config == sae.config
        and not again.training
        and {p.name for p in tmp_path.iterdir()} == {"sae.json", "sae_state.safetensors"}
    )
    for name, t in sae.state_dict().items():
        assert torch.equal(again.state_dict()[name], t), name
    assert torch.equal(again.encode(X), sae.encode(X)) and torch.equal(
        again.decode(again.encode(X)), sae.decode(sae.encode(X))
    )
    assert [p.requires_grad for p in again.parameters()] == [
        p.requires_grad for p in sae.parameters()
    ]
    assert (
        again.source["layout"] == "ours"
        and again.source["site"] == "resid.2"
        and again.source["config"]["meta"] == {"alpha": 0.1, "note": "für später"}
    )
    again.loss(X, 0.1).backward()  # and it can be trained on
    assert again.W_dec.grad.abs().sum() > 0 and again.silent.device.type == "cpu"


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("layout,kind", PAIRS)
def test_exported_and_loaded_again(layout, kind, unit, tmp_path):
    sae = random_sae(kind, unit=unit)
    assert sae.b_dec.abs().min() > 0
    export_sae(sae, tmp_path, layout, site="mlp.1", model_name="stories")
    same(sae, theirs(layout, tmp_path))  # as their code would read it
    again = load_sae(tmp_path, normalize_decoder=False)
    same(sae, again)
    loaded_as = {"tied": "untied"} | (
        dict(batchtopk="jumprelu", matryoshka="jumprelu") if layout == "saelens" else {}
    )
    assert (
        again.kind == loaded_as.get(kind, kind)
        and again.source["layout"] == layout
        and not again.training
        and not list(tmp_path.glob("*.part"))
    )
    if kind == "matryoshka" and layout == "dictionary_learning":
        assert again.sizes == sae.sizes and again.k == K
    own = again.state_dict().values()
    assert len({t.untyped_storage().data_ptr() for t in own}) == len(
        own
    )  # trained on, no tensor writes into another


def test_what_the_configurations_say(tmp_path):
    for layout in WRITES:
        export_sae(
            random_sae("topk"), tmp_path / layout, layout, site="heads.3", model_name="stories"
        )
    lens = json.loads((tmp_path / "saelens" / "cfg.json").read_text())
    assert (
        lens["metadata"]["hook_name"] == "blocks.3.attn.hook_z"
        and lens["reshape_activations"] == "hook_z"
        and int(lens["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    )
    assert (lens["architecture"], lens["k"], lens["d_in"], lens["d_sae"]) == (
        "topk",
        K,
        D,
        N,
    ) and load_sae(tmp_path / "saelens").source["site"] == "heads.3"
    trainer = json.loads((tmp_path / "dictionary_learning" / "config.json").read_text())["trainer"]
    assert (trainer["dict_class"], trainer["k"], trainer["lm_name"], trainer["layer"]) == (
        "AutoEncoderTopK",
        K,
        "stories",
        3,
    )
    assert json.loads((tmp_path / "sparsify" / "cfg.json").read_text())["num_latents"] == N
    assert torch.load(tmp_path / "dictionary_learning" / "ae.pt", weights_only=True).keys() == {
        "encoder.weight",
        "encoder.bias",
        "decoder.weight",
        "b_dec",
        "k",
        "threshold",
    }


@pytest.mark.parametrize(
    "hook,site",
    [
        ("blocks.8.hook_resid_pre", "resid.7"),
        ("blocks.0.hook_resid_pre", None),
        ("blocks.2.hook_mlp_out", "mlp.2"),
        ("hook_embed", None),
        (None, None),
    ],
)
def test_where_a_saelens_autoencoder_belongs(hook, site, tmp_path):
    export_sae(random_sae("untied"), tmp_path, "saelens")
    change(tmp_path / "cfg.json", metadata={"hook_name": hook, "sae_lens_version": "6.0.0"})
    assert load_sae(tmp_path).source["site"] == site


# ---- what the peers write and we do not
def change(file, **more):
    "Settings put into a configuration, in a trainer's where it has one."
    config = json.loads(file.read_text())
    (config["trainer"] if "trainer" in config else config).update(more)
    file.write_text(json.dumps(config))


def retensor(file, fn):
    """A weights file with fn(tensors) in place of its tensors, as a peer would have written it:
    without a checksum."""
    for told in file.parent.glob("*.json"):
        told.write_text(
            json.dumps({k: v for k, v in json.loads(told.read_text()).items() if k != "sha256"})
        )
    tensors = torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)
    (torch.save if file.suffix == ".pt" else save_file)(fn(tensors), file)


@pytest.mark.parametrize(
    "kind,more",
    [
        ("untied", {}),
        ("topk", {}),
        ("jumprelu", {}),
        ("gated", {}),
        ("topk", dict(rescale_acts_by_decoder_norm=True)),
    ],
)
def test_saelens_without_the_bias_at_its_input(kind, more, tmp_path):
    export_sae(random_sae(kind, unit=False), tmp_path, "saelens")
    change(tmp_path / "cfg.json", apply_b_dec_to_input=False, **more)
    sae = load_sae(tmp_path)
    same(sae, theirs("saelens", tmp_path))
    if more:
        assert torch.allclose(sae.W_dec.norm(dim=-1), torch.ones(N))


def test_saelens_before_version_6_topk_is_not_loaded_as_relu(tmp_path):
    export_sae(random_sae("topk"), tmp_path, "saelens")
    want = theirs("saelens", tmp_path)
    old = dict(
        d_in=D,
        d_sae=N,
        dtype="float32",
        hook_point="blocks.3.hook_resid_pre",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        normalize_activations=False,
    )
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    retensor(tmp_path / "sae_weights.safetensors", lambda t: t | {"scaling_factor": torch.ones(N)})
    sae = load_sae(tmp_path)
    assert sae.kind == "topk" and sae.k == K
    same(sae, want)


@pytest.mark.parametrize(
    "layout,kind",
    [
        ("saelens", "jumprelu"),
        ("dictionary_learning", "batchtopk"),
        ("dictionary_learning", "jumprelu"),
        ("dictionary_learning", "matryoshka"),
    ],
)
def test_thresholds_below_zero_let_nothing_negative_pass(
    layout, kind, tmp_path
):  # dictionary_learning's -1: none was learnt
    export_sae(random_sae(kind), tmp_path, layout)
    retensor(
        next(p for p in tmp_path.iterdir() if p.suffix != ".json"),
        lambda t: t | {"threshold": torch.full_like(t["threshold"], -1.0)},
    )
    sae = load_sae(tmp_path)
    same(sae, theirs(layout, tmp_path))
    assert (sae.encode(X) >= 0).all()


def test_other_classes_of_dictionary_learning(tmp_path):
    export_sae(random_sae("untied"), tmp_path, "dictionary_learning")
    retensor(
        tmp_path / "ae.pt",
        lambda t: {("decoder.bias" if n == "bias" else n): v for n, v in t.items()},
    )
    change(
        tmp_path / "config.json", dict_class="AutoEncoderNew", activation_dim=None, dict_size=None
    )
    same(load_sae(tmp_path), theirs("dictionary_learning", tmp_path))
    export_sae(
        random_sae("topk"), tmp_path / "old", "dictionary_learning"
    )  # before k and threshold were kept beside the weights
    want = theirs("dictionary_learning", tmp_path / "old")
    retensor(
        tmp_path / "old" / "ae.pt",
        lambda t: {n: v for n, v in t.items() if n not in ("k", "threshold")},
    )
    same(load_sae(tmp_path / "old"), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    export_sae(random_sae("untied"), tmp_path, "saelens")
    retensor(tmp_path / "sae_weights.safetensors", lambda t: {n: v.to(dtype) for n, v in t.items()})
    sae = load_sae(tmp_path)
    assert {t.dtype for t in sae.state_dict().values()} == {torch.float32} and torch.equal(
        sae.W_dec, random_sae("untied").W_dec.to(dtype).float()
    )


def gemma(folder, dtype="f4", **more):
    "params.npz as Gemma Scope has it."
    draw = np.random.default_rng(0)
    w = (
        dict(
            W_enc=draw.normal(size=(D, N)) / 4,
            W_dec=draw.normal(size=(N, D)) / 4,
            b_enc=draw.normal(size=N),
            b_dec=draw.normal(size=D),
            threshold=draw.normal(size=N),
        )
        | more
    )
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / "params.npz",
        **{n: v if v.dtype == object else v.astype(dtype) for n, v in w.items()},
    )
    return folder


def gemma_forward(folder, x):
    w = {n: v.astype("f8") for n, v in np.load(folder / "params.npz").items()}
    h = x @ w["W_enc"] + w["b_enc"]
    f = relu(h) * (h > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_gemma_scope(dtype, tmp_path):
    want = gemma_forward(
        gemma(tmp_path / "layer_20" / "width_16k" / "average_l0_71", dtype), X.double().numpy()
    )
    for path in (
        "",
        "layer_20/width_16k/average_l0_71",
        "/layer_20/width_16k/average_l0_71/params.npz",
    ):
        sae = load_sae(tmp_path, path)
        assert sae.kind == "jumprelu" and sae.source == dict(
            layout="gemma_scope",
            name=str(tmp_path),
            path="layer_20/width_16k/average_l0_71",
            site=None,
            config={},
        )
        same(sae, want)
    same(load_sae(tmp_path / "layer_20" / "width_16k" / "average_l0_71" / "params.npz"), want)


def test_gemma_scope_transcoders_are_told_by_their_repository(tmp_path, monkeypatch):
    "By the resolved folder, not by what was typed, nor by words above the repository."
    theirs = tmp_path / "gemma-scope-2b-pt-transcoders"
    gemma(theirs / "layer_3" / "width_16k")
    assert load_sae(tmp_path, "gemma-scope-2b-pt-transcoders/layer_3").transcodes
    monkeypatch.chdir(theirs)
    assert load_sae("layer_3/width_16k").transcodes
    own = tmp_path / "transcoder-comparison" / "gemma-scope-2b-pt-res" / "layer_3"
    gemma(own)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_sae(own).kind == "jumprelu" and not load_sae(own).transcodes
    gemma(tmp_path / "renamed")
    with pytest.warns(UserWarning, match="transcoders have the same tensors"):
        load_sae(tmp_path / "renamed")


HOOKS = {
    "model.layers.7.output": "resid.7",
    "model.layers.7.self_attn.o_proj.input": "heads.7",
    "model.language_model.layers.7.post_feedforward_layernorm.output": "mlp.7",
    "model.layers.7.pre_feedforward_layernorm.output": "mlp_in.7",
    "model.layers.7.input_layernorm.output": None,
}


def gemma_2(folder, tensors=None, **config):
    "Files as google/gemma-scope-2-* has them, in the names that SAELens' loader asks for."
    draw = seeded(1)
    shapes = dict(w_enc=(D, N), w_dec=(N, D), b_enc=(N,), b_dec=(D,), threshold=(N,))
    w = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    w["threshold"] = w["threshold"].abs()
    folder.mkdir(parents=True)
    save_file(w | (tensors or {}), folder / "params.safetensors")
    said = dict(architecture="jump_relu", model_name="gemma-v3-1b-pt") | config
    (folder / "config.json").write_text(json.dumps(said))
    return {name: t.double().numpy() for name, t in w.items()}


@pytest.mark.parametrize("hook", HOOKS)
def test_gemma_scope_2(hook, tmp_path):
    w = gemma_2(tmp_path / "resid_post" / "layer_7_width_16k_l0_small", hf_hook_point_in=hook)
    sae = load_sae(tmp_path)
    pre = X.double().numpy() @ w["w_enc"] + w["b_enc"]
    f = relu(pre) * (pre > w["threshold"])
    same(sae, (f, f @ w["w_dec"] + w["b_dec"]))
    assert (sae.kind, sae.source["layout"], sae.source["site"]) == (
        "jumprelu",
        "gemma_scope_2",
        HOOKS[hook],
    )


def test_gemma_scope_2_has_one_architecture(tmp_path):
    gemma_2(tmp_path / "c", architecture="gated")
    refused(tmp_path / "c", "architecture is 'gated'", "'jump_relu'")


@pytest.mark.parametrize("kind", ["untied", "tied"])
def test_dictionary_learnings_rows_are_unit_as_in_its_loader(kind, tmp_path):
    "Its load_dictionary makes AutoEncoder's rows unit: features by other numbers, x^ the same."
    sae = random_sae(kind, unit=False)
    export_sae(sae, tmp_path, "dictionary_learning")
    own = load_sae(tmp_path)
    norm = sae.W_dec.detach().norm(dim=-1)
    assert (norm - 1).abs().max() > 0.1
    f, x_hat = sae.encode(X) * norm, sae.decode(sae.encode(X))
    same(own, (f.detach(), x_hat.detach()))
    assert torch.allclose(own.W_dec.norm(dim=-1), torch.ones(N))


def qwen(folder, layer):
    "A file as Qwen's SAE-Res repositories have it."
    draw = seeded(layer)
    shapes = dict(W_enc=(N, D), W_dec=(D, N), b_enc=(N,), b_dec=(D,))
    w = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(w, folder / f"layer{layer}.sae.pt")
    return {name: t.double().numpy() for name, t in w.items()}


def test_qwen_scope(tmp_path):
    "k and the layer are in names alone."
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    w = {layer: qwen(folder, layer) for layer in (3, 11)}
    refused(folder, "2 autoencoders", "layer11.sae.pt, layer3.sae.pt")
    sae = load_sae(folder, "layer11.sae.pt")
    pre = X.double().numpy() @ w[11]["W_enc"].T + w[11]["b_enc"]
    f = relu(pre) * (pre >= np.sort(pre, 1)[:, [-5]])
    same(sae, (f, f @ w[11]["W_dec"].T + w[11]["b_dec"]))
    source = sae.source
    assert (sae.kind, sae.k, source["site"], source["path"], source["config"]["base"]) == (
        "topk",
        5,
        "resid.11",
        "layer11.sae.pt",
        "Qwen3-1.7B-Base",
    )
    qwen(tmp_path / "renamed", 3)
    refused(tmp_path / "renamed", "k is in no file", "SAE-Res-")


HYPERPARAMS = dict(
    hook_point_in="blocks.9.hook_resid_post",
    hook_point_out="blocks.9.hook_resid_post",
    use_decoder_bias=True,
    apply_decoder_bias_to_pre_encoder=False,
    use_glu_encoder=False,
    d_model=D,
    d_sae=N,
    act_fn="jumprelu",
    jump_relu_threshold=0.3,
    norm_activation="dataset-wise",
    dataset_average_activation_norm={"in": 2.0, "out": 2.0},
    sparsity_include_decoder_norm=True,
    top_k=5,
)


def openmoss(weights, head, told, more=None, unit=False):
    "An autoencoder's files as OpenMOSS has them; rows of 0.5 to 2, which published ones are near."
    draw = seeded(4)
    shapes = {"encoder.weight": (N, D), "encoder.bias": (N,), "decoder.bias": (D,)}
    w = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    rows = torch.nn.functional.normalize(torch.randn(N, D, generator=draw), dim=-1)
    lengths = torch.ones(N) if unit else torch.rand(N, generator=draw) * 1.5 + 0.5
    w |= {"decoder.weight": (rows * lengths[:, None]).T.contiguous()} | (more or {})
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(w, weights)
    head.write_text(json.dumps(told))
    return {name: t.double().numpy() for name, t in w.items()}


def llama(folder, unit=False, **more):
    "hyperparams.json and final.safetensors, as fnlp/Llama3_1-8B-Base-* have them."
    weights, head = folder / "checkpoints" / "final.safetensors", folder / "hyperparams.json"
    return openmoss(weights, head, HYPERPARAMS | more, unit=unit)


def test_llama_scope(tmp_path):
    """As the authors' code prepares it for inference: states scaled to sqrt(d), the encoder's bias
    and the decoder scaled back, rows made unit, then the file's threshold."""
    w = llama(tmp_path / "Llama3_1-8B-Base-L9R-8x")
    llama(tmp_path / "Llama3_1-8B-Base-L10R-8x")
    sae = load_sae(tmp_path, "Llama3_1-8B-Base-L9R-8x")
    factor, rows = D**0.5 / 2.0, w["decoder.weight"].T
    norm = np.linalg.norm(rows, axis=1)
    pre = (X.double().numpy() @ w["encoder.weight"].T + w["encoder.bias"] / factor) * norm
    f = pre * (pre > 0.3)
    same(sae, (f, f @ (rows / norm[:, None]) + w["decoder.bias"] / factor))
    assert (sae.kind, sae.source["layout"], sae.source["site"], sae.source["path"]) == (
        "jumprelu",
        "llama_scope",
        "resid.9",
        "Llama3_1-8B-Base-L9R-8x",
    )
    assert torch.allclose(sae.threshold, torch.tensor(0.3))
    by_file = "Llama3_1-8B-Base-L9R-8x/checkpoints/final.safetensors"
    same(load_sae(tmp_path, by_file), sae)
    refused(tmp_path, "2 autoencoders", by_file)


R1 = dict(HYPERPARAMS, sae_type="sae", expansion_factor=N / D, jump_relu_threshold=0.0)
R1 |= dict(sparsity_include_decoder_norm=False)
del R1["dataset_average_activation_norm"], R1["d_sae"]


def llama_r1(folder, more=None, **told):
    "config.json and sae_weights.safetensors, as fnlp/Llama-Scope-R1-Distill has them."
    levels = dict(log_jumprelu_threshold=torch.randn(N, generator=seeded(8)) / 4 - 0.5)
    files = folder / "sae_weights.safetensors", folder / "config.json"
    return openmoss(*files, R1 | told, levels | (more or {}))


@pytest.mark.parametrize("where", ["weights", "asked"])
def test_llama_scope_r1(where, tmp_path):
    "Thresholds learnt in the unit of scaled states; the mean length is in the weights, or asked."
    length = {"dataset_average_activation_norm.blocks.9.hook_resid_post": torch.tensor(2.0)}
    w = llama_r1(tmp_path, length if where == "weights" else {})
    if where == "asked":
        refused(tmp_path, "its factor is None", "norm_scaling_factor=")
    sae = load_sae(tmp_path, norm_scaling_factor=2.0 if where == "asked" else None)
    factor = D**0.5 / 2.0  # 2, both ways
    pre = X.double().numpy() * factor @ w["encoder.weight"].T + w["encoder.bias"]
    f = pre * (pre > np.exp(w["log_jumprelu_threshold"]))
    same(sae, (f, (f @ w["decoder.weight"].T + w["decoder.bias"]) / factor))
    assert (sae.source["layout"], sae.source["site"]) == ("llama_scope_r1", "resid.9")


@pytest.mark.parametrize("write", [llama, llama_r1])
@pytest.mark.parametrize(
    "more,says",
    [
        (dict(hook_point_out="blocks.9.hook_mlp_out"), "is a transcoder"),
        (dict(act_fn="topk"), "act_fn is 'topk'"),
        (dict(norm_activation="token-wise"), "norm_activation is 'token-wise'"),
        (dict(use_glu_encoder=True), "use_glu_encoder is True"),
        (dict(apply_decoder_bias_to_pre_encoder=True), "apply_decoder_bias_to_pre_encoder is True"),
        (dict(use_decoder_bias=False), "use_decoder_bias is False"),
        (dict(sparsity_include_decoder_norm=None), "sparsity_include_decoder_norm is None"),
    ],
)
def test_what_openmoss_can_say_and_we_cannot_compute(write, more, says, tmp_path):
    write(tmp_path, **more)
    refused(tmp_path, says)


def test_llama_scope_without_its_numbers(tmp_path):
    llama(tmp_path / "a", dataset_average_activation_norm={"in": 2.0, "out": 3.0})
    refused(tmp_path / "a", "dataset_average_activation_norm.out is 3.0")
    llama(tmp_path / "b", dataset_average_activation_norm=None)
    refused(tmp_path / "b", "its factor is None")
    for n, wrong in enumerate((None, "x", -0.1, float("inf"))):
        llama(tmp_path / f"c{n}", jump_relu_threshold=wrong)
        refused(tmp_path / f"c{n}", f"jump_relu_threshold is {wrong!r}")
    llama(tmp_path / "d", d_model=None)
    refused(tmp_path / "d", "none of llama_scope")
    llama(tmp_path / "e", d_sae=N + 1)
    refused(tmp_path / "e", "tensor decoder.weight has shape [16, 40]; expected [16, 41]")


def linear(file, encoder="encoder_linear"):
    "Two Linear layers in a file, as Goodfire (and, as `encoder`, qresearch) has them."
    draw, decoder = seeded(6), encoder.replace("en", "de")
    shapes = {f"{encoder}.weight": (N, D), f"{encoder}.bias": (N,)}
    shapes |= {f"{decoder}.weight": (D, N), f"{decoder}.bias": (D,)}
    w = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(w, file)
    return [t.double().numpy() for t in w.values()]


@pytest.mark.parametrize(
    "name,encoder,site",
    [
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "encoder_linear", "resid.50"),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "encoder_linear", "resid.19"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "encoder", "resid.19"),
    ],
)
def test_goodfire_and_the_like(name, encoder, site, tmp_path):
    "b_dec is not subtracted; model and layer are in the name alone."
    W_enc, b_enc, W_dec, b_dec = linear(tmp_path / name, encoder)
    sae = load_sae(tmp_path)
    f = relu(X.double().numpy() @ W_enc.T + b_enc)
    same(sae, (f, f @ W_dec.T + b_dec))
    assert (sae.kind, sae.source["layout"], sae.source["site"], sae.source["path"]) == (
        "untied",
        "goodfire",
        site,
        name,
    )
    assert sae.source["config"]["base"] == name.partition("-SAE")[0]
    (tmp_path / name).rename(tmp_path / "x-SAE-last.pt")
    refused(tmp_path, "x-SAE-last.pt does not say model and layer")


def hook_z(folder, layer=5):
    "A file and its settings as ckkissane/attn-saes-gpt2-small-all-layers has them."
    draw, name = seeded(layer), f"gpt2-small_L{layer}_Hcat_z_lr1.20e-03_l11.00e+00_v9"
    shapes = dict(W_enc=(D, N), W_dec=(N, D), b_enc=(N,), b_dec=(D,))
    w = {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(w, folder / f"{name}.pt")
    told = dict(act_name=f"blocks.{layer}.attn.hook_z", act_size=D, dict_size=N)
    (folder / f"{name}_cfg.json").write_text(json.dumps(told))
    return f"{name}.pt", {name: t.double().numpy() for name, t in w.items()}


def test_hook_z(tmp_path):
    "Each file has settings of its own name; b_dec is subtracted."
    hook_z(tmp_path, 3)
    name, w = hook_z(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"nobody's")
    refused(tmp_path, "2 autoencoders", "gpt2-small_L3", name)
    sae = load_sae(tmp_path, name)
    f = relu((X.double().numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    same(sae, (f, f @ w["W_dec"] + w["b_dec"]))
    source = sae.source
    assert (source["layout"], source["site"], source["path"]) == ("hook_z", "heads.5", name)
    (tmp_path / f"{name[:-3]}_cfg.json").unlink()
    refused(tmp_path, "no autoencoder", path=name)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_saelens_checkpoints_of_batchtopk(architecture, rescale, tmp_path):
    "As SAELens' save_inference_model writes them: a threshold for rows of any length in W_dec."
    export_sae(random_sae("jumprelu", unit=False), tmp_path, "saelens")
    retensor(
        tmp_path / "sae_weights.safetensors",
        lambda t: (
            {name: v for name, v in t.items() if name != "threshold"}
            | dict(topk_threshold=torch.tensor(0.7, dtype=torch.double))
        ),
    )
    told = dict(architecture=architecture, k=3.0, rescale_acts_by_decoder_norm=rescale)
    change(tmp_path / "cfg.json", **told)
    w = {k: v.double().numpy() for k, v in load_file(tmp_path / "sae_weights.safetensors").items()}
    norm = np.linalg.norm(w["W_dec"], axis=1) if rescale else 1.0
    pre = ((X.double().numpy() - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norm
    f = relu(pre) * (pre > 0.7)
    rows = w["W_dec"] / np.reshape(norm, (-1, 1)) if rescale else w["W_dec"]
    sae = load_sae(tmp_path)
    same(sae, (f, f @ rows + w["b_dec"]))
    assert sae.kind == "batchtopk" and sae.k == 3


def test_saelens_finds_what_its_stores_ask_for(tmp_path):
    "ActivationsStore.from_sae and run_evals want these three in the metadata."
    export_sae(random_sae("topk"), tmp_path, "saelens", site="resid.1", dataset="owner/texts")
    meta = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (meta["prepend_bos"], meta["context_size"], meta["dataset_path"]) == (
        True,
        256,
        "owner/texts",
    )
    export_sae(random_sae("topk"), tmp_path, "saelens", prepend_bos=False, context_size=64)
    meta = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (meta["prepend_bos"], meta["context_size"]) == (False, 64)


TABLE = """
small-res:
  repo_id: owner/small
  saes:
  - {id: blocks.8.hook_resid_pre, path: layer_8}
  - {id: blocks.9.hook_resid_pre, path: layer_9, norm_scaling_factor: 2.5}
rescaled:
  repo_id: owner/rescaled
  config_overrides: {normalize_activations: constant_norm_rescale}
  saes:
  - {id: a, path: ""}
centred:
  repo_id: owner/centred
  config_overrides:
    model_from_pretrained_kwargs: {center_writing_weights: true}
  saes:
  - {id: a, path: ""}
"""


def test_release_names_of_saelens(tmp_path, monkeypatch):
    "From the table that ships with it, where it is installed; without it the error says so."
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "__init__.py").write_text("raise ImportError('not to be imported')")
    (tmp_path / "sae_lens" / "pretrained_saes.yaml").write_text(TABLE)
    monkeypatch.syspath_prepend(tmp_path)
    found = saelens_release("small-res", "blocks.8.hook_resid_pre")
    assert found == ("owner/small", "layer_8", {})
    assert saelens_release("other", "x") == ("other", "x", {})
    scaled = saelens_release("small-res", "blocks.9.hook_resid_pre")
    assert scaled == ("owner/small", "layer_9", dict(norm_scaling_factor=2.5))
    with pytest.warns(UserWarning, match="center_writing_weights"):
        assert saelens_release("centred", "a")[0] == "owner/centred"
    with pytest.raises(ValueError, match="is 2 autoencoders, none 'blocks.8'.*blocks.8.hook_resid"):
        load_sae("small-res", "blocks.8")
    with pytest.raises(ValueError, match="no folder 'other'.*where sae_lens is installed"):
        load_sae("other", "x")


def test_what_only_saelens_table_says_counts(tmp_path, monkeypatch):
    "A factor, and a setting that overrides the file's: used, or refused, never passed over."
    (tmp_path / "sae_lens").mkdir()
    (tmp_path / "sae_lens" / "pretrained_saes.yaml").write_text(TABLE)
    (tmp_path / "sae_lens" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    sae, weights = random_sae("untied"), tmp_path / "theirs" / "sae_weights.safetensors"
    export_sae(sae, weights.parent, "saelens")
    monkeypatch.setattr(formats, "fetch_sae", lambda name, path, revision: (weights, "saelens", ""))
    assert load_sae("rescaled", "a").rows == "constant_norm_rescale"
    change(weights.with_name("cfg.json"), normalize_activations="expected_average_only_in")
    own = load_sae("small-res", "blocks.9.hook_resid_pre")
    f = sae.encode(X * 2.5)
    same(own, (f.detach(), sae.decode(f).detach() / 2.5))


# ---- what cannot be computed, or trusted, is refused
def refused(folder, *says, path=""):
    with pytest.raises(ValueError) as e:
        load_sae(folder, path)
    assert str(e.value).startswith("load_sae: ") and all(part in str(e.value) for part in says), (
        e.value
    )


OPTIONS = [
    (
        "saelens",
        "untied",
        dict(architecture="temporal", rescale_acts_by_decoder_norm=True),
        "architecture is 'temporal'",  # the reason that matters first
    ),
    ("saelens", "untied", dict(architecture="transcoder"), "apply_b_dec_to_input is True"),
    ("saelens", "untied", dict(architecture="crosscoder"), "architecture is 'crosscoder'"),
    ("saelens", "untied", dict(activation_fn="tanh-relu"), "activation_fn is 'tanh-relu'"),
    ("saelens", "gated", dict(activation_fn_str="topk"), "activation_fn is 'topk'"),
    (
        "saelens",
        "untied",
        dict(normalize_activations="covariance_whitening"),
        "normalize_activations is 'covariance_whitening'",
    ),
    (
        "saelens",
        "untied",
        dict(normalize_activations="expected_average_only_in"),
        "scaled to a mean length",
    ),
    ("saelens", "untied", dict(normalize_activations=True), "its factor is None"),
    ("saelens", "untied", dict(norm_scaling_factor=2.0), "norm_scaling_factor with"),
    ("saelens", "untied", dict(reshape_activations="other"), "reshape_activations is 'other'"),
    (
        "saelens",
        "untied",
        dict(
            metadata=dict(hook_name="blocks.1.hook_mlp_in", hook_name_out="blocks.1.hook_mlp_out")
        ),
        "hook_name_out is 'blocks.1.hook_mlp_out'",
    ),
    (
        "saelens",
        "jumprelu",
        dict(rescale_acts_by_decoder_norm=True),
        "rescale_acts_by_decoder_norm is True",
    ),
    ("saelens", "topk", dict(k=N + 1), "k is 41; expected a whole number from 1 to 40"),
    ("saelens", "topk", dict(k=None), "k is None"),
    ("saelens", "topk", dict(k=2.5), "k is 2.5"),
    ("saelens", "untied", dict(d_sae=0), "n_feats is 0"),
    (
        "saelens",
        "untied",
        dict(d_sae=10**9),
        "tensor W_dec has shape [40, 16]; expected [1000000000, 16]",
    ),
    ("saelens", "untied", dict(metadata="x"), "settings are none of saelens's"),
    ("sparsify", "topk", dict(signed=True), "signed is True"),
    ("sparsify", "topk", dict(skip_connection=True), "tensor W_skip has shape none"),
    ("sparsify", "topk", dict(signed=True), "signed is True"),
    ("sparsify", "topk", dict(activation="relu"), "activation is 'relu'"),
    (
        "sparsify",
        "topk",
        dict(num_latents=0, expansion_factor=2),
        "tensor W_dec has shape [40, 16]; expected [32, 16]",
    ),
    (
        "dictionary_learning",
        "untied",
        dict(dict_class="IdentityDict"),
        "dict_class is 'IdentityDict'",
    ),
    ("dictionary_learning", "untied", dict(dict_class=None), "dict_class is None"),
    ("dictionary_learning", "topk", dict(k=7), "trainer.k is 7"),
    (
        "dictionary_learning",
        "batchtopk",
        dict(dict_class="AutoEncoder"),
        "tensor b_dec has shape [16]; expected no such tensor",
    ),
]


@pytest.mark.parametrize("layout,kind,more,says", OPTIONS, ids=[says for *_, says in OPTIONS])
def test_options_that_we_do_not_have_are_named(layout, kind, more, says, tmp_path):
    export_sae(random_sae(kind), tmp_path, layout)
    load_sae(tmp_path)
    change(next(tmp_path.glob("*.json")), **more)
    refused(tmp_path, says)


def test_scaled_features_and_other_tensors_are_refused(tmp_path):
    export_sae(random_sae("untied"), tmp_path / "a", "saelens")
    retensor(
        tmp_path / "a" / "sae_weights.safetensors",
        lambda t: t | {"scaling_factor": torch.full((N,), 2.0)},
    )
    refused(tmp_path / "a", "scaling_factor")
    export_sae(random_sae("topk"), tmp_path / "b", "sparsify")
    retensor(tmp_path / "b" / "sae.safetensors", lambda t: t | {"W_skip": torch.zeros(D, D)})
    refused(tmp_path / "b", "tensor W_skip", "no such tensor")
    export_sae(random_sae("untied"), tmp_path / "c", "dictionary_learning")
    config = json.loads((tmp_path / "c" / "config.json").read_text()) | {
        "buffer": {"io": "in_and_out"}
    }
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "c", "buffer.io is 'in_and_out'")


WRITERS = dict(ours=lambda sae, folder: save_sae(sae, folder)) | {
    layout: lambda sae, folder, layout=layout: export_sae(sae, folder, layout) for layout in WRITES
}


@pytest.mark.parametrize(
    "fault",
    ["missing", "shape", "turned", "nan", "cut", "empty", "noise", "cut settings", "list settings"],
)
@pytest.mark.parametrize("layout", WRITERS)
def test_damaged_files_are_named(layout, fault, tmp_path):
    WRITERS[layout](random_sae("topk"), tmp_path)
    head, weights = (tmp_path / name for name in FILES[layout])
    first = {"ours": "W_enc", "saelens": "W_enc"}.get(layout, "encoder.weight")
    says = {
        "missing": [
            f"tensor {first} has shape none: it is missing",
            f"expected {[D, N] if layout == 'saelens' else [N, D]}",
        ],
        "shape": ["tensor b_dec has shape [15]; expected [16]"],
        "turned": [f"tensor {first} has shape", "expected"],
        "nan": ["tensor b_dec", "NaN"],
    }.get(fault, [head.name if "settings" in fault else weights.name])
    if fault == "missing":
        retensor(weights, lambda t: {n: v for n, v in t.items() if n != first})
    if fault == "shape":
        retensor(weights, lambda t: t | {"b_dec": t["b_dec"][:-1].clone()})
    if fault == "turned":
        retensor(weights, lambda t: t | {first: t[first].T.contiguous()})
    if fault == "nan":
        retensor(weights, lambda t: t | {"b_dec": t["b_dec"] * torch.nan})
    if fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-700])
    if fault == "empty":
        weights.write_bytes(b"")
    if fault == "noise":
        weights.write_bytes(bytes(range(256)) * 20)
    if fault == "cut settings":
        head.write_text(head.read_text()[:40])
    if fault == "list settings":
        head.write_text("[1, 2]")
    refused(tmp_path, *says)


def test_a_damaged_npz_and_objects_in_it(tmp_path):
    gemma(tmp_path)
    whole = (tmp_path / "params.npz").read_bytes()
    (tmp_path / "params.npz").write_bytes(whole[:-900])
    refused(tmp_path, "params.npz", "damaged or cut short")
    gemma(tmp_path, b_enc=np.array([Evil(tmp_path / "ran")] * N, dtype=object))
    refused(tmp_path, "params.npz", "more than tensors")
    gemma(tmp_path, threshold=np.zeros(3))
    refused(tmp_path, "tensor threshold has shape [3]; expected [40]")
    gemma(tmp_path, W_dec=np.zeros(3))
    refused(tmp_path, "tensor W_dec has shape [3]; expected [40, 16]")
    assert not (tmp_path / "ran").exists()


class Evil:
    "A pickle that leaves a file behind when it is opened the usual way."

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["in a dict", "alone", "protocol 2", "protocol 4"])
def test_a_malicious_pickle_is_refused_and_not_run(how, tmp_path):
    export_sae(random_sae("untied"), tmp_path, "dictionary_learning")
    state, evil = torch.load(tmp_path / "ae.pt", weights_only=True), Evil(tmp_path / "ran")
    if "protocol" in how:
        (tmp_path / "ae.pt").write_bytes(pickle.dumps(evil, int(how[-1])))
    else:
        torch.save(state | {"bias": evil} if how == "in a dict" else evil, tmp_path / "ae.pt")
    refused(
        tmp_path,
        "ae.pt",
        *["more than tensors, which are not run"]
        if how == "protocol 4"
        else ["wants to run", "system", "nothing of it was run"],
    )
    with pytest.raises(ValueError) as e:
        load_sae(tmp_path)
    assert "weights_only" not in str(e.value) and not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(evil))  # the trap works
    assert (tmp_path / "ran").exists()


def test_a_file_of_something_else_than_tensors(tmp_path):
    export_sae(random_sae("untied"), tmp_path, "dictionary_learning")
    for other in ([1, 2], {"bias": 3}, torch.zeros(3)):
        torch.save(other, tmp_path / "ae.pt")
        refused(tmp_path, "ae.pt", "expected plain tensors by name")


def test_any_value_of_any_setting_loads_or_is_refused(tmp_path):
    for layout in WRITERS:
        WRITERS[layout](random_sae("topk"), tmp_path / layout)
        file = tmp_path / layout / FILES[layout][0]
        config = json.loads(file.read_text())
        inner = {"ours": "config", "dictionary_learning": "trainer"}.get(layout)
        for part in [config, config[inner]] if inner else [config]:
            for option, was in list(part.items()):
                for other in (None, -3, 1.5, "x", [1], {"a": 1}, True):
                    part[option] = other
                    file.write_text(json.dumps(config))
                    try:
                        load_sae(tmp_path / layout)
                    except ValueError:
                        pass
                part[option] = was


@pytest.mark.parametrize("write", [llama, llama_r1, hook_z])
def test_any_value_of_a_suite_s_settings_loads_or_is_refused(write, tmp_path):
    write(tmp_path)
    file = next(tmp_path.glob("*.json"))
    config = json.loads(file.read_text())
    for option, was in list(config.items()):
        for other in (None, -3, 1.5, "x", [1], {"in": 0, "out": 0}, {"in": "x", "out": "x"}, True):
            config[option] = other
            file.write_text(json.dumps(config))
            try:
                load_sae(tmp_path)
            except ValueError as e:
                assert str(e).startswith("load_sae: "), e
        config[option] = was


# ---- places
def test_several_autoencoders_are_listed(tmp_path):
    for layer in range(23):
        export_sae(
            random_sae("untied", seed=layer),
            tmp_path / "release" / f"blocks.{layer:02d}.hook_resid_post",
            "saelens",
        )
    with pytest.raises(ValueError) as e:
        load_sae(tmp_path / "release")
    assert (
        "23 autoencoders" in str(e.value)
        and str(e.value).count("sae_weights") == 20
        and "blocks.19" in str(e.value)
        and "blocks.20" not in str(e.value)
        and "and 3 more" in str(e.value)
    )
    same(load_sae(tmp_path / "release", "blocks.04.hook_resid_post"), random_sae("untied", seed=4))
    same(
        load_sae(tmp_path, "release/blocks.05.hook_resid_post/sae_weights.safetensors"),
        random_sae("untied", seed=5),
    )
    refused(tmp_path, "23 autoencoders", path="release")
    refused(tmp_path, "no autoencoder", "blocks.99", path="release/blocks.99")
    export_sae(
        random_sae("topk"), tmp_path / "release" / "blocks.04.hook_resid_post" / "below", "sparsify"
    )  # what lies below does not hide what lies here
    same(load_sae(tmp_path / "release" / "blocks.04.hook_resid_post"), random_sae("untied", seed=4))


def test_two_layouts_in_one_folder(tmp_path):
    save_sae(random_sae("untied"), tmp_path)
    export_sae(random_sae("topk"), tmp_path, "dictionary_learning")
    refused(tmp_path, "2 autoencoders", "ae.pt", "sae_state.safetensors")
    assert (
        load_sae(tmp_path, "ae.pt").kind == "topk"
        and load_sae(tmp_path, "sae_state.safetensors").kind == "untied"
    )
    export_sae(random_sae("topk"), tmp_path / "x", "sparsify")
    export_sae(random_sae("untied"), tmp_path / "x", "saelens")  # they fight over cfg.json
    refused(tmp_path / "x", "is ", path="sae.safetensors")
    export_sae(random_sae("topk"), tmp_path / "x", "sparsify")
    refused(tmp_path / "x", "is not what cfg.json was written for", path="sae_weights.safetensors")


def test_nothing_there(tmp_path):
    refused(tmp_path, "no autoencoder", "ae.pt", "none of these files were found")
    refused(tmp_path / "nowhere", "no folder")
    refused("./nowhere/at", "no folder")
    export_sae(random_sae("untied"), tmp_path, "saelens")
    (tmp_path / "cfg.json").unlink()
    refused(tmp_path, "no autoencoder", "only sae_weights.safetensors found")
    with pytest.raises(ValueError, match="has no revision 'v2'"):
        load_sae(tmp_path, revision="v2")


def test_what_cannot_be_written(tmp_path):
    for kind in set(KINDS) - {"topk"}:
        with pytest.raises(
            ValueError,
            match=f"sparsify holds topk only, got kind '{kind}'; expected layout saelens or "
            f"dictionary_learning",
        ):
            export_sae(random_sae(kind), tmp_path, "sparsify")
    sae, below = random_sae("untied"), random_sae("jumprelu")
    with torch.no_grad():
        below.threshold[3] = -0.5
    for call, says in [
        (lambda: export_sae(sae, tmp_path, "gemma_scope"), "layout='gemma_scope'"),
        (lambda: export_sae(sae, tmp_path, "saelens", site="layer.3"), "site='layer.3'"),
        (lambda: export_sae(random_directions(N, D), tmp_path, "saelens"), "got a Directions"),
        (lambda: save_sae(KINDS["tied"](D, N, stack=(3,)), tmp_path), "a stack of 3"),
        (lambda: export_sae(below, tmp_path, "saelens"), "a threshold is -0.5"),
        (lambda: save_sae(sae, tmp_path, seen={1, 2}), "expected only what JSON can hold in seen"),
    ]:
        with pytest.raises(ValueError, match=says):
            call()
    assert not list(tmp_path.iterdir())
    save_sae(below, tmp_path)  # our own keeps even that
    assert torch.equal(load_sae(tmp_path).encode(X), below.encode(X))


def test_a_broken_write_leaves_the_old_files(tmp_path, monkeypatch):
    save_sae(random_sae("untied"), tmp_path)

    def breaks(tensors, to):
        Path(to).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", breaks)
    with pytest.raises(OSError):
        save_sae(random_sae("topk"), tmp_path)
    same(load_sae(tmp_path), random_sae("untied"))
    monkeypatch.undo()
    replace, done = Path.replace, []

    def once(self, to):
        done.append(to.name)
        return replace(self, to) if len(done) == 1 else breaks({}, self)

    monkeypatch.setattr(Path, "replace", once)
    with pytest.raises(OSError):
        save_sae(random_sae("topk"), tmp_path / "new")
    refused(tmp_path / "new", "no autoencoder")  # no settings without their weights
    done.clear()
    with pytest.raises(OSError):
        save_sae(random_sae("untied", seed=1), tmp_path)  # nor old settings with new weights
    refused(tmp_path, "sae_state.safetensors", "is not what sae.json was written for")
    monkeypatch.undo()
    (tmp_path / ".tmpAb12Cd").touch()  # safetensors' own, of a process that was killed
    save_sae(random_sae("untied", seed=1), tmp_path)
    assert not list(tmp_path.glob(".tmp*"))
    same(load_sae(tmp_path), random_sae("untied", seed=1))


def test_files_without_a_checksum_load_as_before(tmp_path):
    save_sae(random_sae("gated"), tmp_path)
    retensor(tmp_path / "sae_state.safetensors", lambda t: t)
    same(load_sae(tmp_path), random_sae("gated"))
    assert "sha256" not in load_sae(data_path("sae/tied")).source["config"]


def test_a_later_format_of_ours_is_refused(tmp_path):
    save_sae(random_sae("untied"), tmp_path)
    change(tmp_path / "sae.json", format=2)
    refused(tmp_path, "format is 2")
    change(tmp_path / "sae.json", format=1, config=dict(kind="neither", d_model=D, n_feats=N))
    refused(tmp_path, "kind is 'neither'")


# ---- the Hub
CLIENT = """
import sys, json
from codebook_tutorial.dictionary.formats import load_sae
for line in sys.stdin:
    name, path, revision = json.loads(line)
    try:
        sae = load_sae(name, path, revision)
        sum = sae.W_dec.double().sum().item()
        print(json.dumps([sae.kind, sae.source["layout"], sae.source["path"], sum]))
    except Exception as e: print(json.dumps([type(e).__name__, str(e)]))
"""


def client(env, *asks):
    got = subprocess.run(
        [sys.executable, "-c", CLIENT],
        input="\n".join(json.dumps(ask) for ask in asks),
        capture_output=True,
        text=True,
        env=env,
        timeout=120,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    return [json.loads(line) for line in got.stdout.splitlines()]


def fill(repo, v2):
    "A repository of every layout, with files beside them that nobody needs, and another revision."
    for layout, write in WRITERS.items():
        write(random_sae("topk", seed=1), repo / layout / "layer.2")
    gemma(repo / "gemma" / "layer_2" / "average_l0_9")
    llama(repo / "llama" / "L9R")
    hook_z(repo / "heads")
    for n in range(2):
        (repo / "saelens" / "layer.2" / f"more{n}.safetensors").write_bytes(b"x" * 99)
    (repo / "README.md").write_text("about")
    save_sae(random_sae("gated", seed=2), v2)


HEADS = "heads/gpt2-small_L5_Hcat_z_lr1.20e-03_l11.00e+00_v9.pt"
WANTED = {f"{layout}/layer.2/{file}" for layout in WRITERS for file in FILES[layout]} | {
    "gemma/layer_2/average_l0_9/params.npz",
    "llama/L9R/hyperparams.json",
    "llama/L9R/checkpoints/final.safetensors",
    HEADS,
    HEADS.replace(".pt", "_cfg.json"),
    "sae.json",
    "sae_state.safetensors",
}
WRONG = [
    (("tests/saes", "", None), "7 autoencoders in tests/saes; expected path= one of"),
    (("tests/saes", "nowhere", None), "no autoencoder in tests/saes at nowhere"),
    (("tests/saes", "", "v9"), "no revision 'v9'"),
    (("tests/none", "", None), "no public repository"),
    (("tests/gated", "", None), "is gated"),
    (("tests/noise", "", None), "sae.safetensors of tests/noise/layer.2 is damaged"),
]


def test_from_the_hub_only_what_is_needed(tmp_path):
    from helpers.hub import Hub

    repo, v2 = tmp_path / "repo", tmp_path / "v2"
    fill(repo, v2)
    asks = [("tests/saes", f"{layout}/layer.2", None) for layout in WRITERS] + [
        ("tests/saes", "gemma", None),
        ("tests/saes", "llama", None),
        ("tests/saes", HEADS, None),
        ("tests/saes", "dictionary_learning/layer.2/ae.pt", None),
        ("tests/saes", "", "v2"),
    ]
    with Hub() as hub:
        hub.add("model", "tests/saes", repo)
        hub.add("model", "tests/saes", v2, revision="v2")
        hub.add("model", "tests/gated", v2, gated=True)
        env = hub.env(tmp_path / "home", PYTHONPATH=os.pathsep.join(sys.path))
        hub.add("model", "tests/noise", repo / "sparsify")
        hub.faults["tests/noise", "layer.2/sae.safetensors"] = "corrupt"
        got = client(env, *asks, *(ask for ask, _ in WRONG))
        loaded = {
            line.split("/resolve/")[1].partition("/")[2]
            for line in hub.log
            if "/tests/saes/resolve/" in line
        }
    assert loaded == WANTED
    local = [load_sae(repo if revision is None else v2, path) for _, path, revision in asks]
    assert got[: len(asks)] == [
        [sae.kind, sae.source["layout"], sae.source["path"], sae.W_dec.double().sum().item()]
        for sae in local
    ]
    for (kind, text), (_, says) in zip(got[len(asks) :], WRONG, strict=True):
        assert kind == "ValueError" and text.startswith("load_sae: ") and says in text, text
    # the Hub is gone: what was loaded is still there
    offline = client(env, *asks, ("tests/elsewhere", "", None))
    assert offline[:-1] == got[: len(asks)] and offline[-1][0] == "ConnectionError"
    assert "is not in this machine's cache" in offline[-1][1]


# ---- units
def test_the_weight_of_the_penalty():
    assert round(convert_alpha(8.6e-4, 512, "paper_code"), 2) == 0.44
    for begin in ALPHA_UNITS:
        for end in ALPHA_UNITS:
            there = convert_alpha(0.3, 96, begin, end=end, scale=7.0)
            assert convert_alpha(there, 96, end, end=begin, scale=1 / 7) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="units 'pytorch'"):
        convert_alpha(1.0, 8, end="pytorch")


def test_the_converted_weight_gives_the_same_loss_but_for_a_factor():
    sae, alpha = random_sae("untied"), 0.3
    with torch.no_grad():
        f = sae.encode(X)
        left = (X - sae.decode(f)).pow(2)
        paper = (
            left.mean() + convert_alpha(alpha, D, end="paper_code") * f.abs().sum(-1).mean()
        )  # their code: mean over rows and d
        torch.testing.assert_close(paper * D, sae.loss(X, alpha))
        small = random_sae("untied")
        small.load_state_dict(sae.state_dict())
        small.fold_normalisation(torch.zeros(D), 1 / 4)  # the same autoencoder for X / 4
        torch.testing.assert_close(
            small.loss(X / 4, alpha) * 16, sae.loss(X, convert_alpha(alpha, D, scale=4.0))
        )


# ---- rows that are not unit, and states that were scaled
@pytest.mark.parametrize("kind", ["tied", "untied", "jumprelu", "gated"])
def test_rows_that_are_not_unit_are_told_or_folded(kind, tmp_path):
    "Folded, the reconstruction is the same and features are longer by their row's length."
    sae = random_sae(kind, unit=False)
    norm = sae.W_dec.detach().norm(dim=-1)
    with pytest.warns(UserWarning, match="rows of W_dec are .* long, not 1.*unit=True"):
        export_sae(sae, tmp_path / "a", "saelens")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_sae(sae, tmp_path / "b", "saelens", unit=True)
        export_sae(random_sae(kind), tmp_path / "c", "saelens")
    again = load_sae(tmp_path / "b")
    f = sae.encode(X)
    same(again, ((f * norm).detach(), sae.decode(f).detach()))
    assert torch.allclose(again.W_dec.norm(dim=-1), torch.ones(N))


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_rows_are_not_folded_where_that_changes_what_is_kept(kind, tmp_path):
    with pytest.raises(ValueError, match=f"unit=True would change which features kind '{kind}'"):
        export_sae(random_sae(kind, unit=False), tmp_path, "saelens", unit=True)


def test_states_scaled_to_a_mean_length(tmp_path):
    "As SAELens' fold_activation_norm_scaling_factor; without the factor it is refused."
    export_sae(random_sae("untied"), tmp_path, "saelens")
    change(tmp_path / "cfg.json", normalize_activations="expected_average_only_in")
    refused(tmp_path, "factor is None", "norm_scaling_factor=")
    gemma(tmp_path / "gemma-scope")
    with pytest.raises(ValueError, match="layout with norm_scaling_factor is 'gemma_scope'"):
        load_sae(tmp_path / "gemma-scope", norm_scaling_factor=2.0)
    for wrong in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="its factor is"):
            load_sae(tmp_path, norm_scaling_factor=wrong)
    sae, factor = random_sae("untied"), 2.5
    own = load_sae(tmp_path, norm_scaling_factor=factor)
    f = sae.encode(X * factor)
    with torch.no_grad():
        inner = (X - sae.b_dec / factor) * factor @ sae.W_enc.T + sae.b_enc
        assert torch.allclose(inner.relu(), f, atol=1e-5)
    same(own, (f.detach(), sae.decode(f).detach() / factor))
