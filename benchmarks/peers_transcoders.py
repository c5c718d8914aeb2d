"""Transcoders' files in our loader and in the peers', both ways."""

import json
from types import SimpleNamespace

import sparsify
import torch
from layouts_page import by_loader, shake
from sae_lens import SAE, saes
from safetensors.torch import save_file
from test_formats import D, N, gemma, gemma_2
from test_transcoder_files import MLP, OUT, PAIRS, some, weights

from codebook_tutorial.dictionary.formats import export_sae, load_sae

X = torch.randn(64, D, generator=torch.Generator().manual_seed(5))  # as peers_formats.py has it
WAY = "theirs -> ours"


def whole(peer):
    "A peer whose `decode` gives all that it writes, with its skip connection."
    return SimpleNamespace(encode=peer.encode, decode=lambda f: peer(X))


def in_sparsify(peer):
    "The same for sparsify, whose code is sparse."

    def decode(f):
        top, ids, _ = peer.encode(X)
        skipped = 0.0 if peer.W_skip is None else X @ peer.W_skip.mT
        return peer.decode(top, ids) + skipped

    def encode(x):
        top, ids, _ = peer.encode(x)
        return torch.zeros(len(x), peer.num_latents).scatter(-1, ids, top)

    return SimpleNamespace(encode=encode, decode=decode)


def saelens(row, root):
    "SAELens' four classes."
    size = dict(d_in=D, d_sae=N, d_out=OUT, apply_b_dec_to_input=False)
    size["metadata"] = saes.sae.SAEMetadata(**MLP)
    for name in ("", "Skip", "JumpReLU", "JumpReLUSkip"):
        cls, config = (getattr(saes, f"{name}Transcoder{end}") for end in ("", "Config"))
        peer = shake(cls(config(**size)))
        peer.save_model(folder := root / f"saelens-{name}")
        ours = load_sae(folder)
        assert (ours.source["site"], ours.source["writes"]) == ("mlp_in.2", "mlp.2")
        row(WAY, "saelens", f"{name}Transcoder", ours=ours, peer=whole(peer))


def gemma_scope(row, root):
    "Gemma Scope's, and those of Gemma Scope 2 with and without an affine skip connection."
    repo, path = "gemma-scope-2b-pt-transcoders", "layer_2/width_16k/average_l0_9"
    gemma(root / repo / path, threshold=weights(threshold=True)["threshold"].numpy())
    size = dict(d_in=D, d_sae=N, d_out=D)
    at = dict(path=path, root=root, size=size)
    load = "gemma_2_transcoder_huggingface_loader"
    peer, _ = by_loader(load, "JumpReLUTranscoder", repo, **at)
    what = "params.npz of transcoders, by SAELens' loader"
    row(WAY, "gemma_scope", what, ours=load_sae(root / repo), peer=whole(peer))
    told = dict(hf_hook_point_in="model.layers.7.pre_feedforward_layernorm.output")
    told["hf_hook_point_out"] = "model.layers.7.post_feedforward_layernorm.output"
    for skip in (False, True):
        repo, path = f"gemma-scope-2-1b-pt-{skip}", "transcoder/layer_7_width_16k_l0_small"
        more = dict(affine_skip_connection=torch.randn(D, D) / 4) if skip else {}
        gemma_2(root / repo / path, more, affine_connection=skip, **told)
        cls = "JumpReLUSkipTranscoder" if skip else "JumpReLUTranscoder"
        at = dict(path=path, root=root, size=size)
        peer, _ = by_loader("gemma_3_sae_huggingface_loader", cls, repo, **at)
        what = f"transcoder, affine skip connection {skip}, by SAELens' loader"
        row(WAY, "gemma_scope_2", what, ours=load_sae(root / repo), peer=whole(peer))


def circuit_tracer(row, root):
    "Its layer_N.safetensors, by SAELens' loader of mwhanna's."
    repo, w = "mwhanna/qwen3-0.6b-transcoders", weights(D)
    (folder := root / repo).mkdir(parents=True)
    save_file(w | dict(W_enc=w["W_enc"].T.contiguous()), folder / "layer_9.safetensors")
    hooks = "model_name: x\nfeature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
    (folder / "config.yaml").write_text(hooks)
    sizes = dict(d_model=D, d_feature=N, batch_size=64)
    told = {name: dict(value=value) for name, value in sizes.items()}
    (folder / "wandb-config.yaml").write_text(json.dumps(told))
    at = dict(path="layer_9.safetensors", root=root, size={})
    peer, _ = by_loader("mwhanna_transcoder_huggingface_loader", "Transcoder", repo, **at)
    ours = load_sae(folder)
    assert (ours.source["site"], ours.source["writes"]) == ("mlp_in.9", "mlp.9")
    what = "layer_9.safetensors, by SAELens' loader"
    row(WAY, "circuit_tracer", what, ours=ours, peer=whole(peer))


def eai_sparsify(row, root):
    "sparsify's, with and without a skip connection."
    for transcode, skip in ((True, False), (True, True), (False, True)):
        how = dict(k=5, num_latents=N, transcode=transcode, skip_connection=skip)
        peer = shake(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**how)))
        peer.save_to_disk(folder := root / f"sparsify-{transcode}-{skip}")
        what = f"SparseCoder transcode={transcode}, skip_connection={skip}"
        row(WAY, "sparsify transcoders", what, ours=load_sae(folder), peer=in_sparsify(peer))


def ours_in_theirs(row, root):
    "Every transcoder that we write, in the peer's loader."
    for layout, kind in PAIRS:
        for skip in (False, True):
            ours = some(kind, skip, D if layout == "sparsify" else OUT)
            folder = root / f"ours-{layout}-{kind}-{skip}"
            export_sae(ours, folder, layout, site="mlp_in.2", writes="mlp.2", model_name="x")
            if layout == "saelens":
                peer = whole(SAE.load_from_disk(folder))
            else:
                peer = in_sparsify(sparsify.SparseCoder.load_from_disk(folder))
            what = f"transcoder, {kind}, skip={skip}"
            row("ours -> theirs", f"{layout} transcoders", what, ours=ours, peer=peer)


ALL = (saelens, gemma_scope, circuit_tracer, eai_sparsify, ours_in_theirs)
