#!/usr/bin/env bash
# sae-bench: the core evaluation's "explained_variance" subtracts the squared mean of squares where
# the squared mean belongs, so that it mixes x^2 with x^4: the same autoencoder on the same states
# gets another score when both are multiplied by a constant, and large states get one above 1.
# "explained_variance_legacy", which its own comment calls incorrect, does not change. SAELens, from
# which the code came, has since corrected it. Orders within one model and site are kept.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q sae-bench==0.6.0
"$folder/venv/bin/python" - <<'PYTHON' 2>/dev/null
from importlib.metadata import version
from types import SimpleNamespace

import torch
from sae_bench.custom_saes.base_sae import BaseSAE
from sae_bench.evals.core.main import get_sparsity_and_variance_metrics

print("sae-bench", version("sae-bench"), "| sae-lens", version("sae-lens"))
draw = torch.Generator().manual_seed(0)
states = torch.randn(4, 64, 32, generator=draw)
hook = "blocks.0.hook_resid_post"
asked = dict(compute_l2_norms=False, compute_sparsity_metrics=True, compute_variance_metrics=True)
asked |= dict(compute_featurewise_density_statistics=False, n_batches=1, model_kwargs={})


class Half(BaseSAE):
    "Keeps the first half of the coordinates: explains half of the variance."

    def encode(self, x):
        return x[..., :16]

    def decode(self, f):
        return torch.cat([f, torch.zeros_like(f)], -1)

    def forward(self, x):
        return self.decode(self.encode(x))


found = {}
for size in (0.1, 1.0, 3.0, 10.0):
    x = size * states
    model = SimpleNamespace(run_with_cache=lambda *args, **kw: (None, {hook: x}))
    store = SimpleNamespace(get_batch_tokens=lambda n: torch.zeros(4, 64, dtype=torch.long))
    sae = Half(32, 16, "any", 0, torch.device("cpu"), torch.float32, hook)
    got, _ = get_sparsity_and_variance_metrics(
        sae, model, store, eval_batch_size_prompts=4, **asked
    )
    rows = x.flatten(0, 1)
    left = (rows - sae(rows)).pow(2).sum() / (rows - rows.mean(0)).pow(2).sum()
    found[size] = got["explained_variance"]
    print(f"states x {size:4}: explained_variance {found[size]:8.4f},", end=" ")
    print(f"legacy {got['explained_variance_legacy']:.4f}, 1 - FVU {1 - left.item():.4f}")
assert abs(found[0.1] - found[1.0]) > 0.01 and found[10.0] > 1, "the behaviour has changed"
print("seen: the score depends on the unit of the states, and passes 1")
PYTHON
