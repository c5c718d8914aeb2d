#!/usr/bin/env bash
# sae-bench 0.6.0, core: `explained_variance` is no share of the variance. An autoencoder that gives
# the mean for every input explains none of it; SAELens' run_evals, from which the code comes, says
# 0. sae-bench says 0.37, 0.09, -1.0 or 1.5, by the length of the states alone: in place of the
# squared mean of each coordinate it subtracts the squared mean of all squares. `mse` is smaller
# than the mean squared error by the number of positions, as that is divided by twice. The column
# explained_variance_legacy is as it was, a mean of ratios per position.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0 pydantic \
  matplotlib scikit-learn seaborn tabulate
"$folder/venv/bin/pip" install -q --no-deps sae-bench==0.6.0  # its core needs no torchvision
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version
from types import SimpleNamespace

import torch
from sae_bench.evals.core import main as core
from sae_lens import StandardSAE, StandardSAEConfig, evals
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens import HookedTransformer, HookedTransformerConfig

print(*(f"{name} {version(name)}" for name in ("sae-bench", "sae-lens", "transformer-lens")))
torch.manual_seed(0)
sizes = dict(n_layers=1, d_model=32, n_ctx=64, d_head=8, n_heads=4, d_vocab=50, act_fn="relu")
model = HookedTransformer(HookedTransformerConfig(**sizes, device="cpu"))
ids = torch.randint(0, 50, (8, 64))
embedding = torch.randn(50, 32)
HOOK = "blocks.0.hook_resid_post"
store = SimpleNamespace(get_batch_tokens=lambda n: ids)
flags = "l2_norms sparsity_metrics variance_metrics featurewise_density_statistics".split()
how = {f"compute_{flag}": flag == "variance_metrics" for flag in flags}
how |= dict(n_batches=1, eval_batch_size_prompts=8, model_kwargs={})


@torch.no_grad()
def measured(scale):
    "Both libraries' numbers for the mean of the states, and the states' variance."
    model.W_E.copy_(embedding * scale)
    x = model.run_with_cache(ids)[1][HOOK].flatten(0, 1)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64))
    for part in (sae.W_enc, sae.b_enc):
        part.zero_()  # no feature is ever active
    sae.b_dec.copy_(x.mean(0))
    sae.cfg.metadata.hook_name = sae.cfg.hook_name = HOOK
    sae.cfg.hook_layer, sae.cfg.hook_head_index = 0, None
    bench, _ = core.get_sparsity_and_variance_metrics(sae, model, store, **how)
    lens, _ = evals.get_sparsity_and_variance_metrics(sae, model, store, ActivationScaler(), **how)
    return bench, lens, (x - x.mean(0)).pow(2).sum(-1).mean().item()


for scale in (0.1, 1.0, 4.0, 10.0):
    bench, lens, variance = measured(scale)
    name = "explained_variance"
    print(
        f"embedding x {scale}: {name} {bench[name]:.3f} (SAELens {lens[name]:.3f}); "
        f"mse {bench['mse']:.4f} (SAELens {lens['mse']:.2f}, variance {variance:.2f})"
    )
    assert abs(lens[name]) < 1e-3 and abs(bench[name]) > 0.05, "the behaviour has changed"
    assert abs(bench["mse"] * ids.numel() / variance - 1) < 1e-3, "the behaviour has changed"
assert bench[name] > 1, "the behaviour has changed"
print("seen: the mean of all states explains from less than none to more than all of the variance")
PYTHON
