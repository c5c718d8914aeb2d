"""Our files in the peers' own loaders, and theirs in ours: largest differences on random inputs.

    PYTHONPATH=tests python benchmarks/peers_formats.py        (an environment with sae-lens, dictionary-learning, eai-sparsify beside ours)
"""
import contextlib, io, json, os, sys, tempfile, warnings
from pathlib import Path
os.environ.setdefault("OMP_NUM_THREADS", "1"); os.environ.setdefault("HF_HUB_OFFLINE", "1"); os.environ.setdefault("WANDB_MODE", "disabled")
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
from importlib.metadata import version
from codebook_tutorial.formats import WRITES, convert_alpha, export_sae, load_sae
from test_formats import D, N, gemma, random_sae
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import sae_lens, sparsify
    from sae_lens import saes
    from dictionary_learning import dictionary as dl, utils
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, matryoshka_batch_top_k, standard, top_k

X = torch.randn(64, D, generator=torch.Generator().manual_seed(5))
ROOT, ROWS = Path(tempfile.mkdtemp()), []


def dense(peer, x):
    "sparsify's sparse code as [N, F]."
    top, ids, _ = peer.encode(x)
    return torch.zeros(len(x), peer.num_latents).scatter(-1, ids, top)

THEIRS = dict(saelens=lambda folder: sae_lens.SAE.load_from_disk(folder), dictionary_learning=lambda folder: utils.load_dictionary(str(folder), "cpu")[0],
              sparsify=lambda folder: sparsify.SparseCoder.load_from_disk(folder))

@torch.no_grad()
def row(way, layout, what, ours, peer, x=X):
    f = dense(peer, x) if layout == "sparsify" else peer.encode(x)
    x_hat = peer.decode(*peer.encode(x)[:2]) if layout == "sparsify" else peer.decode(f)
    mine = ours.encode(x)
    flips = int(((mine != 0) != (f != 0)).sum())
    ROWS.append((way, layout, what, (mine - f).abs().max().item(), (ours.decode(mine) - x_hat).abs().max().item(), flips, (f != 0).sum(-1).float().mean().item()))


def shake(module, seed=3):
    "Every parameter of a peer as random as after training; rows of the decoder of length 1 only where `unit`."
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.numel(): p.add_(torch.randn(p.shape, generator=draw).to(p.dtype) * .3)
            if name == "threshold": p.abs_()
    return module


# ---- ours, loaded by them
for layout, kinds in WRITES.items():
    for kind in kinds:
        for unit in (True, False):
            ours, folder = random_sae(kind, unit=unit), ROOT / f"{layout}-{kind}-{unit}"
            export_sae(ours, folder, layout, site="resid.2", model_name="stories")
            with contextlib.redirect_stdout(io.StringIO()): peer = THEIRS[layout](folder)
            scaled = layout == "dictionary_learning" and not unit and kind in ("tied", "untied")     # their loader makes rows unit and features longer by it
            if scaled: peer = dl.AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
            row("ours -> theirs", layout, f"{kind}{'' if unit else ', free rows'}{' (normalize_decoder=False)' if scaled else ''}", ours, peer)
            row("and back", layout, f"{kind}{'' if unit else ', free rows'}", load_sae(folder), peer)
peer = sae_lens.SAE.load_from_disk(ROOT / "saelens-topk-True")
assert peer.cfg.metadata.hook_name == "blocks.2.hook_resid_post" and peer.cfg.metadata.model_name == "stories", peer.cfg.metadata
ours = random_sae("untied")
export_sae(ours, ROOT / "hook_z", "saelens", site="heads.1")
z = sae_lens.SAE.load_from_disk(ROOT / "hook_z")
with torch.no_grad(): ROWS.append(("ours -> theirs", "saelens", "untied at heads.1 (hook_z)", (z.encode(X.view(64, 4, 4)) - ours.encode(X)).abs().max().item(), (z(X.view(64, 4, 4)).flatten(1) - ours.decode(ours.encode(X))).abs().max().item(), 0, float("nan")))


# ---- theirs, loaded by us
BASE = dict(d_in=D, d_sae=N, metadata=saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_pre"))
for cls, config, more in [(saes.StandardSAE, saes.StandardSAEConfig, {}), (saes.TopKSAE, saes.TopKSAEConfig, dict(k=5)), (saes.TopKSAE, saes.TopKSAEConfig, dict(k=5, rescale_acts_by_decoder_norm=True)),
                          (saes.JumpReLUSAE, saes.JumpReLUSAEConfig, {}), (saes.GatedSAE, saes.GatedSAEConfig, {})]:
    for before in (True, False):
        for dtype in ("float32", "bfloat16"):
            peer = shake(cls(config(**BASE, **more, apply_b_dec_to_input=before, dtype=dtype)))
            peer.save_model(folder := ROOT / "theirs")
            ours = load_sae(folder)
            assert ours.source["site"] == "resid.2" and ours.W_dec.dtype == torch.float32
            row("theirs -> ours", "saelens", f"{cls.__name__}, {more or ''} apply_b_dec_to_input={before}, stored {dtype}", ours, sae_lens.SAE.load_from_disk(folder, dtype="float32"))
for cls, config, more in [(saes.BatchTopKTrainingSAE, saes.BatchTopKTrainingSAEConfig, dict(k=5)), (saes.MatryoshkaBatchTopKTrainingSAE, saes.MatryoshkaBatchTopKTrainingSAEConfig, dict(k=5, matryoshka_widths=[10, N])),
                          (saes.TopKTrainingSAE, saes.TopKTrainingSAEConfig, dict(k=5)), (saes.StandardTrainingSAE, saes.StandardTrainingSAEConfig, {}), (saes.JumpReLUTrainingSAE, saes.JumpReLUTrainingSAEConfig, {}),
                          (saes.GatedTrainingSAE, saes.GatedTrainingSAEConfig, {})]:
    peer = shake(cls(config(**BASE, **more)))
    if hasattr(peer, "topk_threshold"): peer.topk_threshold.fill_(.4)
    peer.save_inference_model(folder := ROOT / "trained")
    row("theirs -> ours", "saelens", f"{cls.__name__}, save_inference_model", load_sae(folder), sae_lens.SAE.load_from_disk(folder))
old = dict(d_in=D, d_sae=N, dtype="float32", hook_point="blocks.3.hook_resid_pre", activation_fn_str="topk", activation_fn_kwargs={"k": 5}, apply_b_dec_to_input=False, normalize_activations=False)
saes.TopKSAE(saes.TopKSAEConfig(**BASE, k=5)).save_model(folder := ROOT / "old")
(folder / "cfg.json").write_text(json.dumps(old))
row("theirs -> ours", "saelens", "cfg.json as before 6.0, activation_fn_str topk", load_sae(folder), sae_lens.SAE.load_from_disk(folder))

DL = [(standard.StandardTrainer, {}), (standard.StandardTrainerAprilUpdate, {}), (top_k.TopKTrainer, dict(k=5)), (batch_top_k.BatchTopKTrainer, dict(k=5)),
      (matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer, dict(k=5, group_fractions=[.25, .25, .5])), (gdm.GatedSAETrainer, {}), (jumprelu.JumpReluTrainer, {})]
for cls, more in DL:
    for learnt in (True, False) if "TopK" in cls.__name__ and cls is not top_k.TopKTrainer else (True,):
        trainer = cls(steps=10_000, activation_dim=D, dict_size=N, layer=2, lm_name="x", device="cpu", **more)
        shake(trainer.ae)
        if learnt and hasattr(trainer.ae, "k"): trainer.ae.threshold.fill_(.5)
        (folder := ROOT / f"dl-{cls.__name__}-{learnt}").mkdir()
        torch.save({name: t.cpu() for name, t in trainer.ae.state_dict().items()}, folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": {"io": "out"}}))
        peer = utils.load_dictionary(str(folder), "cpu")[0] if "Standard" not in cls.__name__ else dl.AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
        row("theirs -> ours", "dictionary_learning", f"{cls.__name__}{'' if learnt else ', threshold never learnt'}", load_sae(folder), peer)
new = shake(dl.AutoEncoderNew(D, N))
(folder := ROOT / "dl-new").mkdir()
torch.save(new.state_dict(), folder / "ae.pt"); (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderNew"}}))
row("theirs -> ours", "dictionary_learning", "AutoEncoderNew", load_sae(folder), new)
for more in (dict(num_latents=N), dict(expansion_factor=3), dict(num_latents=N, normalize_decoder=False, multi_topk=True)):
    peer = shake(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(k=5, **more)))
    peer.save_to_disk(folder := ROOT / f"sparsify-{len(more)}")
    row("theirs -> ours", "sparsify", f"SparseCoder {more}", load_sae(folder), peer)

from sae_lens.loading import pretrained_sae_loaders as loaders
gemma(ROOT / "gemma-scope-2b-pt-res" / (path := "layer_2/width_16k/average_l0_9"))
loaders.hf_hub_download = lambda repo_id, filename, subfolder, **kw: ROOT / repo_id / subfolder / filename                 # no network: their loader, our file
cfg, state, _ = loaders.gemma_2_sae_huggingface_loader("gemma-scope-2b-pt-res", path, cfg_overrides=dict(d_in=D, d_sae=N))
peer = saes.JumpReLUSAE(saes.JumpReLUSAEConfig.from_dict(loaders.handle_config_defaulting(cfg)))
peer.load_state_dict(state)
row("theirs -> ours", "gemma_scope", "params.npz, by SAELens' loader of Gemma Scope", load_sae(ROOT / "gemma-scope-2b-pt-res"), peer)

print(f"sae-lens {version('sae-lens')}, dictionary-learning {version('dictionary-learning')}, eai-sparsify {version('eai-sparsify')}, torch {torch.__version__}; d = {D}, F = {N}, {len(X)} rows")
print(f"{'':15s} {'layout':20s} {'':82s} {'encode':>8s} {'decode':>8s} {'flips':>5s} {'l0':>5s}")
for way, layout, what, f, x_hat, flips, l0 in ROWS: print(f"{way:15s} {layout:20s} {what:82s} {f:8.1e} {x_hat:8.1e} {flips:5d} {l0:5.1f}")


# ---- and the penalty: their loss beside the printed equation's
ours, alpha = random_sae("untied"), .44
equation = ours.loss(X, alpha).item()
folder = ROOT / "saelens-untied-True"
export_sae(ours, folder, "saelens"); export_sae(ours, ROOT / "dl-alpha", "dictionary_learning")
lens = saes.StandardTrainingSAE(saes.StandardTrainingSAEConfig(d_in=D, d_sae=N, l1_coefficient=1.))
lens.load_state_dict(sae_lens.SAE.load_from_disk(folder).state_dict())
step = saes.sae.TrainStepInput(sae_in=X, coefficients={"l1": convert_alpha(alpha, D, end="saelens")}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
trainer = standard.StandardTrainer(steps=10_000, activation_dim=D, dict_size=N, layer=2, lm_name="x", device="cpu", l1_penalty=convert_alpha(alpha, D, end="dictionary_learning"), sparsity_warmup_steps=None)
trainer.ae.load_state_dict(torch.load(ROOT / "dl-alpha" / "ae.pt"))
losses = dict(saelens=lens.training_forward_pass(step).loss.item(), dictionary_learning=trainer.loss(X, step=50).item())
print(f"\nloss at alpha = {alpha} by the equation: {equation:.6f}; " + "; ".join(f"{name} {loss:.6f}" for name, loss in losses.items()))
worst = max(max(r[3], r[4]) for r in ROWS)
print(f"largest difference: {worst:.1e}")
sys.exit(worst > 1e-5 or max(abs(loss - equation) for loss in losses.values()) > 1e-4)
