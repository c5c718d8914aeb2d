"""What `peers_formats.py` shares out: SAELens' loaders without a network, files, the page."""

import json

import torch
from safetensors.torch import load_file


def by_loader(load, cls, repo, *, path, root, size):
    "SAELens' own autoencoder, by its loader of others' files, from a folder instead of the Hub."
    from sae_lens import saes
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def local(repo_id, filename, subfolder="", **kw):
        return root / repo_id / subfolder / filename

    def shapes(repo_id, filename):
        return {n: list(t.shape) for n, t in load_file(root / repo_id / filename).items()}

    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = local, shapes
    cfg, state, _ = getattr(loaders, load)(repo, path, device="cpu", cfg_overrides=size)
    config = getattr(saes, f"{cls}Config").from_dict(loaders.handle_config_defaulting(cfg))
    peer = getattr(saes, cls)(config)
    peer.load_state_dict(state)
    return peer, cfg["hook_name"]


def shake(module, seed=3):
    "Every parameter of a peer as random as after training."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.numel():
                p.add_(torch.randn(p.shape, generator=draw).to(p.dtype) * 0.3)
            if name == "threshold":
                p.abs_()
    return module


def write_theirs(folder, state, config):
    "A folder as dictionary_learning writes it."
    folder.mkdir()
    torch.save({name: t.cpu() for name, t in state.items()}, folder / "ae.pt")
    (folder / "config.json").write_text(json.dumps(config))


PAGE = """# Whose files

`load_sae` reads, and `export_sae` writes, the files of other libraries. For each row below, one
side saves an autoencoder with random weights and both sides run it on the same {n} rows. The last
two columns are the largest differences of features and of reconstructions. Of transcoders
the last is of what is written. `load_sae` refuses settings that it cannot compute with a ValueError
that names them.

Peers: {peers}. The page is written by `benchmarks/peers_formats.py`, in an environment of its own.

| layout | what | way | features | reconstructions |
|---|---|---|---|---|
{rows}

Where peers disagree: Llama Scope's files say that a feature counts with the length of its row of
`W_dec` (`sparsity_include_decoder_norm`). OpenMOSS' own code makes rows unit before it compares a
feature with the file's threshold, and so does `load_sae`. SAELens 6.54 leaves the length out and
multiplies features and threshold by the states' scale. Both agree where rows are unit; a user
[measured](https://github.com/OpenMOSS/Llamascopium/issues/128) published rows of 1.54 on average,
and there SAELens has fewer active features. Of Llama Scope R1 both have the same features.

States scaled row by row (`layer_norm`, `constant_norm_rescale`) are loaded as a `PerRow`: features
are the peer's, in the scaled unit; `reconstructed(x)` decodes, a lens reads and does not edit.
`AbsTopK`, `GroupMax` and `MatchingPursuit` are loaded and run, not trained here.

Transcoders know what they read and write (`sae.source["site"]` and `["writes"]`) where the file
says it in names that we have. SAELens 6.54 calls the input of Gemma Scope 2's transcoders
`hook_mlp_in`, which in TransformerLens is the stream before the norm; their own configuration names
the norm's output, and so do we (`mlp_in.L`). Gemma Scope's first transcoders are told apart by the
name of their repository alone, and their sites are left open.

Not read: cross-layer transcoders, OpenMOSS' transcoders, SAELens' `temporal` and
`covariance_whitening` (a checkpoint does not hold its matrices).

Of the autoencoders in SAELens' table of releases, by layout: {covered}.
"""


def write_page(
    file,
    peers: str,
    rows: list,  # (way, layout, what, features' difference, what they decode to)
    *,
    n: int,  # rows compared
    covered: str,  # the share of SAELens' table
):
    "The site's page: every row that was compared."
    lines = [
        f"| {layout} | {what} | {way} | {f:.1e} | {x_hat:.1e} |"
        for way, layout, what, f, x_hat, *_ in rows
    ]
    file.write_text(PAGE.format(n=n, peers=peers, rows="\n".join(lines), covered=covered))
