#!/usr/bin/env bash
# SAELens: a hook set by an old name (blocks.1.hook_resid_post, hook_mlp_out, attn.hook_z) with
# run_with_hooks of its SAETransformerBridge is never called, and run_with_cache leaves the name
# out; nothing is said. TransformerLens' own TransformerBridge, its base class, calls the same hook.
# So run_evals, for an autoencoder whose metadata has such a name (nearly all have), compares the
# model with itself: three equal losses. enable_compatibility_mode(no_processing=True), or the
# bridge's new names (blocks.1.hook_out), are what helps.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 sae-lens==6.54.12 transformer-lens==3.9.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from tokenizers import Tokenizer, models
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

print(*(f"{name} {version(name)}" for name in ("sae-lens", "transformer-lens", "transformers")))
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, vocab_size=50)
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).save_pretrained("llama")
words = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
marks = dict(bos_token="<bos>", eos_token="<bos>", pad_token="<bos>", unk_token="<unk>")
PreTrainedTokenizerFast(tokenizer_object=words, **marks).save_pretrained("llama")
ids = torch.arange(10)[None]
OLD = ["blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"]


def tried(model, name):
    "Largest change of the logits by a hook that writes zeros, its calls, and is it in the cache?"
    calls = []
    plain = model(ids)
    hooked = model.run_with_hooks(
        ids, fwd_hooks=[(name, lambda x, hook: calls.append(1) or torch.zeros_like(x))]
    )
    _, cache = model.run_with_cache(ids, names_filter=[name])
    return round((hooked - plain).abs().max().item(), 4), len(calls), name in cache


seen = {}
for cls in (TransformerBridge, SAETransformerBridge):
    model = cls.boot_transformers("llama", device="cpu")
    for mode in ("as it comes", "compatibility mode"):
        if mode != "as it comes":
            model.enable_compatibility_mode(no_processing=True)
        for name in [*OLD, "blocks.1.hook_out"]:
            seen[cls.__name__, mode, name] = tried(model, name)
            print(cls.__name__, mode, name, "change, calls, in cache:", *tried(model, name))
for (cls, mode, name), (change, calls, cached) in seen.items():
    silent = cls == "SAETransformerBridge" and mode == "as it comes" and name in OLD
    wanted = (change == 0, calls == 0, not cached) == (silent,) * 3
    assert wanted, f"the behaviour has changed: {cls}, {mode}, {name}"
print("seen: hooks by the old names are never called on SAELens' bridge, and no error says so")
PYTHON
