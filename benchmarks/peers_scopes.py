"""Published suites' own files in our loader and in SAELens' loader of each."""

import json
from types import SimpleNamespace

import torch
from layouts_page import by_loader
from safetensors.torch import load_file
from test_formats import (
    D,
    HYPERPARAMS,
    N,
    gemma,
    gemma_2,
    hook_z,
    linear,
    llama,
    llama_r1,
    qwen,
    random_sae,
)

from codebook_tutorial.dictionary.formats import export_sae, load_sae
from codebook_tutorial.model.sites import to_transformer_lens

SIZE = dict(d_in=D, d_sae=N, dtype="float32")
WAY = "theirs -> ours"


def scaled(peer, factor):
    "A peer whose features are `factor` times ours."
    return SimpleNamespace(
        encode=lambda x: peer.encode(x) / factor, decode=lambda f: peer.decode(f * factor)
    )


def gemma_scope(row, root):
    "Its params.npz, by SAELens' loader; no network: their loader, our file."
    repo, path = "gemma-scope-2b-pt-res", "layer_2/width_16k/average_l0_9"
    gemma(root / repo / path)
    load, at = "gemma_2_sae_huggingface_loader", dict(path=path, root=root, size=SIZE)
    peer, _ = by_loader(load, "JumpReLUSAE", repo, **at)
    what = "params.npz, by SAELens' loader of Gemma Scope"
    row(WAY, "gemma_scope", what, ours=load_sae(root / repo), peer=peer)


def gemma_scope_2(row, root):
    "Its params.safetensors, by SAELens' loader, at each of its sites."
    repo = "gemma-scope-2-1b-pt"
    for kind, hook in (
        ("resid_post", "output"),
        ("attn_out", "self_attn.o_proj.input"),
        ("mlp_out", "post_feedforward_layernorm.output"),
    ):
        path = f"{kind}/layer_7_width_16k_l0_small"
        gemma_2(root / repo / path, hf_hook_point_in=f"model.layers.7.{hook}")
        load, at = "gemma_3_sae_huggingface_loader", dict(path=path, root=root, size=SIZE)
        peer, hook_name = by_loader(load, "JumpReLUSAE", repo, **at)
        ours = load_sae(root / repo, path)
        assert to_transformer_lens(ours.source["site"]) == hook_name, (ours.source, hook_name)
        peer.turn_off_forward_pass_hook_z_reshaping()  # heads side by side, as ours
        row(WAY, "gemma_scope_2", f"{kind}, by SAELens' loader", ours=ours, peer=peer)


def qwen_scope(row, root):
    "Its layerN.sae.pt, by SAELens' loader."
    repo = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_5"
    qwen(root / repo, 3)
    load, at = "qwen_scope_sae_huggingface_loader", dict(path="layer3.sae.pt", root=root, size=SIZE)
    peer, hook_name = by_loader(load, "TopKSAE", repo, **at)
    ours = load_sae(root / repo)
    assert to_transformer_lens(ours.source["site"]) == hook_name
    row(WAY, "qwen_scope", "layer3.sae.pt, by SAELens' loader", ours=ours, peer=peer)


def openmoss(folder):
    "Llama Scope as its authors run it, from the file's numbers: OpenMOSS' sae.py, inference mode."
    w = {n: t.double() for n, t in load_file(folder / "checkpoints/final.safetensors").items()}
    factor = D**0.5 / HYPERPARAMS["dataset_average_activation_norm"]["in"]
    length = w["decoder.weight"].norm(dim=0)

    def encode(x):
        pre = (x.double() @ w["encoder.weight"].T + w["encoder.bias"] / factor) * length
        return (pre * (pre > HYPERPARAMS["jump_relu_threshold"])).float()

    def decode(f):
        rows = (w["decoder.weight"] / length).T
        return (f.double() @ rows + w["decoder.bias"] / factor).float()

    return SimpleNamespace(encode=encode, decode=decode)


def llama_scope(row, root):
    "Unit rows as SAELens reads them; free rows as the authors do; how far these two differ."
    load, factor = "llama_scope_sae_huggingface_loader", D**0.5 / 2.0
    for unit in (True, False):
        repo, path = f"Llama3_1-8B-Base-LXR-{unit}", "Llama3_1-8B-Base-L9R-8x"
        llama(root / repo / path, unit=unit)
        peer, hook_name = by_loader(load, "JumpReLUSAE", repo, path=path, root=root, size=SIZE)
        peer.fold_activation_norm_scaling_factor(factor)
        ours = load_sae(root / repo)
        assert to_transformer_lens(ours.source["site"]) == hook_name
        how = "unit rows, by SAELens' loader, its features / its factor"
        how = how if unit else "rows of 0.5 to 2, by the authors' formula"
        peer = scaled(peer, factor)
        other = peer if unit else openmoss(root / repo / path)
        row(WAY, "llama_scope", f"final.safetensors, {how}", ours=ours, peer=other)
    x = torch.randn(512, D, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        mine, theirs = ours.encode(x) != 0, peer.encode(x) != 0
    off = (mine != theirs).float().sum() / mine.float().sum()
    print(f"Llama Scope, rows of 0.5 to 2: SAELens and the authors differ in {off:.0%} of features")


def llama_scope_r1(row, root):
    "Its sae_weights.safetensors, by SAELens' loader and the factor of SAELens' table."
    repo, path, factor = "Llama-Scope-R1-Distill", "0-Slimpajama-800M/L9R", 2.0
    llama_r1(root / repo / path)
    load = "llama_scope_r1_distill_sae_huggingface_loader"
    size = dict(SIZE, d_sae=N)
    peer, hook_name = by_loader(load, "JumpReLUSAE", repo, path=path, root=root, size=size)
    peer.fold_activation_norm_scaling_factor(factor)
    ours = load_sae(root / repo, norm_scaling_factor=factor)
    assert to_transformer_lens(ours.source["site"]) == hook_name
    row(WAY, "llama_scope_r1", "sae_weights.safetensors, by SAELens' loader", ours=ours, peer=peer)


def goodfire(row, root):
    "Goodfire's files, and qresearch's of DeepSeek R1."
    for repo, name, encoder, load in (
        ("Goodfire/Llama-3.1-8B-Instruct-SAE-l19", ".pth", "encoder_linear", "get_goodfire"),
        ("Goodfire/Llama-3.3-70B-Instruct-SAE-l50", ".pt", "encoder_linear", "get_goodfire"),
        ("qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19", ".pt", "encoder", "deepseek_r1_sae"),
    ):
        name = repo.partition("/")[2] + name
        linear(root / repo / name, encoder)
        at = dict(path=name, root=root, size=SIZE)
        peer, hook_name = by_loader(f"{load}_huggingface_loader", "StandardSAE", repo, **at)
        ours = load_sae(root / repo)
        assert to_transformer_lens(ours.source["site"]) == hook_name
        row(WAY, "goodfire", f"{name}, by SAELens' loader", ours=ours, peer=peer)


def attention(row, root):
    "Files of heads' outputs, of GPT-2 small."
    repo = "ckkissane/attn-saes-gpt2-small-all-layers"
    path, _ = hook_z(root / repo)
    at = dict(path=path, root=root, size=SIZE)
    peer, hook_name = by_loader("connor_rob_hook_z_huggingface_loader", "StandardSAE", repo, **at)
    peer.turn_off_forward_pass_hook_z_reshaping()
    ours = load_sae(root / repo)
    assert to_transformer_lens(ours.source["site"]) == hook_name
    row(WAY, "hook_z", "gpt2-small_L5_Hcat_z_*.pt, by SAELens' loader", ours=ours, peer=peer)


def dictionary_learning(row, root):
    "dictionary_learning's folders by SAELens' loader, which leaves the rows' length as it is."
    for kind, cls in dict(
        untied="Standard",
        topk="TopK",
        gated="Gated",
        batchtopk="JumpReLU",
        matryoshka="JumpReLU",
        jumprelu="JumpReLU",
    ).items():
        folder = root / "lm_sae" / kind
        export_sae(random_sae(kind), folder, "dictionary_learning", site="resid.2", model_name="x")
        told = json.loads((folder / "config.json").read_text())
        told["buffer"]["ctx_len"] = 128
        (folder / "config.json").write_text(json.dumps(told | dict(sha256=None)))
        load, at = "dictionary_learning_sae_huggingface_loader_1", dict(root=root, size=SIZE)
        peer, _ = by_loader(load, f"{cls}SAE", "lm_sae", path=kind, **at)
        what = f"{told['trainer']['dict_class']}, by SAELens' loader"
        row(WAY, "dictionary_learning", what, ours=load_sae(folder), peer=peer)


SUITES = (gemma_scope, gemma_scope_2, qwen_scope, llama_scope, llama_scope_r1)
ALL = (*SUITES, goodfire, attention, dictionary_learning)
