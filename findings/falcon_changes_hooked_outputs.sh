#!/usr/bin/env bash
# transformers: in Falcon's blocks with parallel attention, what a forward hook keeps of the MLP
# (and what it handed on) is changed afterwards: the block adds attention's output to it in place.
# Whoever keeps the tensor without a copy reads MLP + attention. In sequential blocks it stays.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch, transformers
from transformers import FalconConfig, FalconForCausalLM

print("torch", torch.__version__, "transformers", transformers.__version__)
seen = {}
for parallel in (True, False):
    torch.manual_seed(0)
    model = FalconForCausalLM(FalconConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        parallel_attn=parallel, new_decoder_architecture=False, multi_query=False,
    )).eval()
    block, kept = model.transformer.h[0], {}
    block.mlp.register_forward_hook(lambda m, a, out: kept.update(held=out, copy=out.clone()))
    block.self_attention.register_forward_hook(lambda m, a, out: kept.update(attention=out[0]))
    with torch.no_grad():
        model(torch.arange(1, 9)[None])
    changed = kept["held"] - kept["copy"]
    seen[parallel] = (
        bool(changed.abs().max() > 1e-4),
        torch.allclose(changed, kept["attention"], atol=1e-5),
    )
    print(f"parallel_attn={parallel}: held tensor changed {seen[parallel][0]}, "
          f"by attention's output {seen[parallel][1]}")
assert seen[True] == (True, True) and not seen[False][0], "the behaviour has changed"
print("seen: Falcon with parallel attention adds to the MLP's output in place")
PYTHON
