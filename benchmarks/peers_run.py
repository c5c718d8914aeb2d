"""Our exported autoencoders run in the peers: stores, evaluations, loaders by folder name, cards.

PYTHONPATH=tests python benchmarks/peers_run.py

README.md says in which environment. Each number is beside ours, taken from the same rows at the
same positions: the loss with reconstructed states, active features, explained variance.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

for name, value in dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled").items():
    os.environ.setdefault(name, value)
warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from helpers.hub import Hub  # noqa: E402

from codebook_tutorial.core import data_path  # noqa: E402
from codebook_tutorial.dictionary.formats import export_sae, load_sae  # noqa: E402
from codebook_tutorial.dictionary.kinds import KINDS  # noqa: E402
from codebook_tutorial.dictionary.train import train_sae  # noqa: E402
from codebook_tutorial.model.hub import load_lm  # noqa: E402
from codebook_tutorial.model.sites import capture, intervene  # noqa: E402
from codebook_tutorial.score.metrics import measure  # noqa: E402
from codebook_tutorial.world.concepts import story_text  # noqa: E402

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import datasets
    import sparsify
    from sae_bench.evals.core import main as core
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.sae_bench_utils.general_utils import load_and_format_sae
    from sae_lens import SAE, evals
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

LENGTH, BATCH, N_BATCHES, N_FEATS, K = 256, 4, 2, 256, 8
SITES = ("attn.1", "mlp.1", "heads.1", "neurons.1")
MEASURES = ("loss", "loss with it", "KL", "l0", "explained", "error^2")
ROOT = Path(tempfile.mkdtemp())


def tiny_llama(folder):
    "A random Llama with the stories' tokenizer; its logits are large enough to be moved."
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tok = load_lm("stories")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, vocab_size=len(tok))
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=1))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
        for block in model.model.layers:
            block.mlp.down_proj.weight.mul_(20)
            block.self_attn.o_proj.weight.mul_(20)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def states(model, text, site):
    "Our activations at a site."
    with capture(model, [site]) as acts:
        model(input_ids=text.ids)
    return acts[site]


def exported(model, text, folder):
    "{(kind, site): folder}: seven kinds at resid.1, topk at the other sites, trained and exported."
    folders, more = {}, dict(steps=100, batch=512)
    for kind, site in [(kind, "resid.1") for kind in KINDS] + [("topk", site) for site in SITES]:
        x = states(model, text, site)[text.mask]
        how = dict(k=K) if kind in ("topk", "batchtopk", "matryoshka") else dict(alpha=0.1)
        sae = train_sae(x, N_FEATS, kind, **how, **more).eval()
        folders[kind, site] = at = folder / f"{kind}-{site}"
        export_sae(sae, at, "saelens", site=site, model_name="stories", context_size=LENGTH)
    return folders


@torch.no_grad()
def our_numbers(model, text, site, *, sae, keep_special):
    """MEASURES of ours as the peers count: without positions that hold BOS or padding.

    keep_special: BOS keeps its own state (SAELens); else it is reconstructed too (sae-bench)."""
    ids, counts = text.ids, text.ordinary
    swapped = counts[..., None] if keep_special else torch.tensor(True)
    clean = model(input_ids=ids).logits.log_softmax(-1)
    with intervene(model, {site: lambda x: torch.where(swapped, sae.decode(sae.encode(x)), x)}):
        logits = model(input_ids=ids).logits.log_softmax(-1)
    kl = (clean.exp() * (clean - logits)).sum(-1)[counts].mean()
    x = states(model, text, site)[counts]
    found = measure(sae, x)
    error = (x - sae.decode(sae.encode(x))).pow(2).sum(-1).mean()
    before = counts[:, :-1]
    losses = [F.nll_loss(p[:, :-1][before], ids[:, 1:][before]) for p in (clean, logits)]
    numbers = (*losses, kl, found["l0"], 1 - found["fvu"], error)
    return dict(zip(MEASURES, map(float, numbers), strict=True))


def store_of(bridge, peer, text):
    "SAELens' store over the same rows, by the metadata alone."
    rows = datasets.Dataset.from_dict({"input_ids": text.ids.tolist()})
    sizes = dict(store_batch_size_prompts=BATCH, train_batch_size_tokens=LENGTH)
    return ActivationsStore.from_sae(bridge, peer, rows, **sizes)


def of_metrics(found):
    "MEASURES out of a peer's nested results."
    flat = {name: value for group in found.values() for name, value in group.items()}
    names = "ce_loss_without_sae ce_loss_with_sae kl_div_with_sae l0 explained_variance mse"
    return dict(zip(MEASURES, (flat[name] for name in names.split()), strict=True))


def in_saelens(bridge, peer, text):
    "Its run_evals."
    store = store_of(bridge, peer, text)
    how = evals.get_eval_everything_config(BATCH, N_BATCHES, N_BATCHES)
    return of_metrics(evals.run_evals(peer, store, bridge, ActivationScaler(), how)[0])


def in_sae_bench(bridge, peer, text):
    "Its core; explained and error^2 are not what their names say (findings/)."
    load_and_format_sae("ours", peer, "cpu")
    flags = "kl ce_loss l2_norms sparsity_metrics variance_metrics"
    flags += " featurewise_density_statistics featurewise_weight_based_metrics"
    how = CoreEvalConfig(
        batch_size_prompts=BATCH,
        n_eval_reconstruction_batches=N_BATCHES,
        n_eval_sparsity_variance_batches=N_BATCHES,
        context_size=LENGTH,
        **{f"compute_{flag}": True for flag in flags.split()},
    )
    tok = bridge.tokenizer
    ignored = {tok.pad_token_id, tok.eos_token_id, tok.bos_token_id}
    store = store_of(bridge, peer, text)
    scalars, features = core.run_evals(peer, store, bridge, how, ignore_tokens=ignored)
    core.calculate_misc_metrics(features)
    return of_metrics(scalars)


def same_states(bridge, peer, model, *, text, site):
    "Largest difference of the store's activations from ours, for the rows of its first batch."
    store = store_of(bridge, peer, text)
    tokens = store.get_batch_tokens(BATCH)
    assert torch.equal(tokens, text.ids[:BATCH])
    theirs = store.get_activations(tokens).flatten(2).squeeze()
    ours = states(model, text[:BATCH], site)
    assert next(store.get_data_loader()).shape[-1] == ours.shape[-1]
    return (theirs.view_as(ours) - ours).abs().max().item()


def compare(name, path):
    "Run all of a model's autoencoders in both evaluations; print; the largest relative difference."
    model, _ = load_lm(path)
    text = story_text(BATCH * N_BATCHES * LENGTH, LENGTH, seed=5)[0]
    training = story_text(20_000, LENGTH, seed=6)[0]
    bridge = SAETransformerBridge.boot_transformers(path, device="cpu")
    # without it hooks set by old names with run_with_hooks are never called (findings/)
    bridge.enable_compatibility_mode(no_processing=True)
    worst = 0.0
    for (kind, site), folder in exported(model, training, ROOT / name).items():
        sae = load_sae(folder)
        off = same_states(bridge, SAE.load_from_disk(folder), model, text=text, site=site)
        print(f"\n{name}, {kind} at {site}: the store's activations differ by {off:.1e}")
        for peer, run in (("SAELens", in_saelens), ("sae-bench", in_sae_bench)):
            theirs = run(bridge, SAE.load_from_disk(folder), text)
            ours = our_numbers(model, text, site, sae=sae, keep_special=peer == "SAELens")
            cells = [f"{m} {theirs[m]:.5f} ({ours[m]:.5f})" for m in MEASURES]
            print(f"  {peer:9s} (ours): {', '.join(cells)}")
            alike = MEASURES if peer == "SAELens" else MEASURES[:4]
            gaps = [abs(theirs[m] - ours[m]) / max(1, abs(ours[m])) for m in alike]
            worst = max(worst, off, *gaps)
    return worst


def by_folder_name(path):
    "sparsify's loaders, and SAELens' of sparsify's files, which take the layer from the folder."
    model, _ = load_lm(path)
    text = story_text(20_000, LENGTH, seed=6)[0]
    x = states(model, text, "resid.1")[text.mask]
    sae = train_sae(x, N_FEATS, "topk", k=K, steps=50, batch=512).eval()
    export_sae(sae, ROOT / "sparse" / "layers.1", "sparsify", site="resid.1")
    peers = sparsify.SparseCoder.load_many(str(ROOT / "sparse"), local=True)
    peers["from disk"] = sparsify.SparseCoder.load_from_disk(ROOT / "sparse" / "layers.1")
    assert list(peers) == ["layers.1", "from disk"]
    worst = 0.0
    for peer in peers.values():
        top, ids, _ = peer.requires_grad_(False).encode(x)
        f = torch.zeros(len(x), N_FEATS).scatter(-1, ids, top)
        worst = max(worst, (f - sae.encode(x).detach()).abs().max().item())
    print(f"\nsparsify, load_many and load_from_disk of layers.1: features differ by {worst:.1e}")
    config, tensors = sparsify_disk_loader(ROOT / "sparse" / "layers.1")
    peers["layers.1"].save_to_disk(ROOT / "own" / "layers.1")
    _, own = sparsify_disk_loader(ROOT / "own" / "layers.1")
    shapes = list(tensors["W_dec"].shape), list(own["W_dec"].shape)
    print(f"SAELens' sparsify_disk_loader takes that folder as {config['hook_name']}")
    print(f"  its W_dec: {shapes[0]}, of sparsify's own file {shapes[1]}; SAELens' own: transposed")
    return worst


PUSH = """
from codebook_tutorial.dictionary.share import push_saes
from test_formats import random_sae
for layout in ("saelens", "sparsify", "dictionary_learning"):
    saes = {site: random_sae("topk", seed=n) for n, site in enumerate(("resid.1", "mlp.2"))}
    push_saes(saes, f"me/{layout}", layout=layout, model_name="stories", token="hf_any")
"""


def cards():
    "The peers' own code in our cards, run on what was pushed to a Hub on this machine."
    with Hub() as hub:
        env = hub.env(ROOT / "home", PYTHONPATH=os.pathsep.join(sys.path))
        run = [sys.executable, "-W", "ignore", "-c"]
        subprocess.run([*run, PUSH], env=env, check=True, capture_output=True)
        for layout in ("saelens", "sparsify", "dictionary_learning"):
            repo = hub.repos["model", f"me/{layout}"]
            card = repo["commits"][repo["refs"]["main"]]["README.md"].decode()
            code = re.findall(r"```python\n(.*?)```", card, re.S)[1] + "\nprint(type(sae).__name__)"
            got = subprocess.run([*run, code], env=env, check=True, capture_output=True, text=True)
            print(f"a card's code for {layout}: {got.stdout.split()[-1]}")


def main():
    "Run everything; the exit status tells."
    torch.set_num_threads(1)
    peers = "sae-lens sae-bench eai-sparsify dictionary-learning transformer-lens torch".split()
    print(", ".join(f"{peer} {version(peer)}" for peer in peers))
    models = {"stories": str(data_path("stories")), "tiny Llama": tiny_llama(ROOT / "llama")}
    cards()
    worst = max(by_folder_name(models["stories"]), *(compare(*one) for one in models.items()))
    print(f"\nlargest difference: {worst:.1e}")
    return worst > 1e-4


if __name__ == "__main__":
    sys.exit(main())
