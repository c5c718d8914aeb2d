#!/usr/bin/env bash
# sae-bench: with today's beartype and jaxtyping, which its requirements allow (>=0.14.1, >=0.2.25),
# sparse probing stops with a type violation on valid input. `train_probe_on_activations` names the
# rows of a class "train_dataset_size" in its own annotations, and then hands its probe the rows of
# the class and as many others, twice that number, under the same name; beartype now looks into
# dictionaries, where it meets the first size. JAXTYPING_DISABLE=1 in the environment helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 "numpy<2" scikit-learn jaxtyping==0.3.11 \
    beartype==0.23.1  # what its probes import
"$folder/venv/bin/pip" install -q --no-deps sae-bench==0.6.0
cat > "$folder/probe.py" <<'PYTHON'
import contextlib
import io
from importlib.metadata import version

import torch
from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

print(*(f"{name} {version(name)}" for name in ("sae-bench", "beartype", "jaxtyping")), sep=" | ")
torch.manual_seed(0)
train, test = ({c: torch.randn(n, 20) + i for i, c in enumerate("abc")} for n in (400, 100))
try:
    with contextlib.redirect_stdout(io.StringIO()):
        _, found = train_probe_on_activations(train, test, select_top_k=2)
    print("test accuracy of each class:", found)
except Exception as e:
    print(type(e).__name__, "|", str(e).strip().splitlines()[-1][-160:])
PYTHON
cd "$folder"
plain=$("$folder/venv/bin/python" -W ignore probe.py 2>/dev/null)
off=$(JAXTYPING_DISABLE=1 "$folder/venv/bin/python" -W ignore probe.py 2>/dev/null)
echo "as installed: $plain"
echo "JAXTYPING_DISABLE=1: $off"
grep -q "train_dataset_size" <<< "$plain" || { echo "the behaviour has changed"; exit 1; }
grep -q "test accuracy" <<< "$off" || { echo "the behaviour has changed"; exit 1; }
echo "seen: sparse probing as installed stops at its own annotations"
