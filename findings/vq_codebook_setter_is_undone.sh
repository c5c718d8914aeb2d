#!/usr/bin/env bash
# vector-quantize-pytorch: codes that are set by `vq.codebook = codes` are there until the first
# batch in training. The setter writes the codes and not the averages (`embed_avg`) from which each
# training batch computes all codes again, also those that no row has chosen. So codes that were
# loaded or made by hand are gone after one forward pass; nothing says so. In eval mode they stay.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 vector-quantize-pytorch==1.32.0
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from vector_quantize_pytorch import VectorQuantize

print("vector-quantize-pytorch", version("vector-quantize-pytorch"), "| torch", torch.__version__)
torch.manual_seed(0)
codes = 3 * torch.randn(8, 4)
row = codes[:1].clone()[None]  # [1, 1, 4]: it chooses code 0, and no other
moved = {}
for averages in (False, True):
    vq = VectorQuantize(dim=4, codebook_size=8).train()
    born = vq.codebook.clone()
    vq.codebook = codes
    if averages:
        vq._codebook.embed_avg.copy_(codes[None])
    assert torch.equal(vq.codebook, codes)
    _, chosen, _ = vq(row)
    assert chosen.tolist() == [[0]]
    moved[averages] = (vq.codebook[1:] - codes[1:]).abs().max().item()
    back = (vq.codebook[1:] - born[1:]).abs().max().item()
    print(f"averages set too: {averages}; codes 1 to 7 after one batch that chose code 0 alone:")
    print(f"  {moved[averages]:.2g} from what was set, {back:.2g} from what they were born as")
    if not averages:
        assert back < 1e-3, "the behaviour has changed"
assert moved[False] > 1 and moved[True] < 1e-3, "the behaviour has changed"
print("seen: the codes that were set are undone by the first batch in training")
PYTHON
