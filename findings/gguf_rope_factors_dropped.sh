#!/usr/bin/env bash
# transformers: a GGUF of Llama 3.1 or later holds its stretched rotary positions as a tensor,
# rope_freqs.weight (llama.cpp's converter writes it; the metadata names no scaling). transformers
# loads such a file without a word and without the factors: the model turns by plain positions, its
# loading report names no unexpected weight, and every state after the first position is another.
# rope.scaling.type (yarn, linear) of older architectures is passed over in the same way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import gguf, numpy as np, torch, transformers
from transformers import AutoModelForCausalLM

print("transformers", transformers.__version__)
d, heads, layers, vocab = 32, 2, 1, 64


def write(path, factors=None, scaling=None):
    draw, w = np.random.default_rng(0), gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(512)
    w.add_embedding_length(d)
    w.add_feed_forward_length(48)
    w.add_head_count(heads)
    w.add_rope_dimension_count(d // heads)
    w.add_rope_freq_base(10_000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(vocab)
    if scaling:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(4.0)
    sizes = {"token_embd": (vocab, d), "output": (vocab, d), "output_norm": (d,)}
    sizes |= {f"blk.0.attn_{x}": (d, d) for x in ("q", "k", "v", "output")}
    sizes |= {"blk.0.ffn_gate": (48, d), "blk.0.ffn_up": (48, d), "blk.0.ffn_down": (d, 48)}
    sizes |= {"blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,)}
    for name, size in sizes.items():
        w.add_tensor(f"{name}.weight", draw.normal(0, 0.5, size).astype(np.float32))
    if factors is not None:
        w.add_tensor("rope_freqs.weight", factors)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def read(path):
    model, told = AutoModelForCausalLM.from_pretrained(
        ".", gguf_file=path, dtype=torch.float32, output_loading_info=True
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.model.rotary_emb.inv_freq.div_(8.0)
        meant = model(ids).logits
    return model.config.rope_parameters, told["unexpected_keys"], before, meant


write("plain.gguf")
write("stretched.gguf", factors=np.full(d // heads // 2, 8, np.float32))
write("yarn.gguf", scaling=True)
plain = read("plain.gguf")
for name in ("stretched.gguf", "yarn.gguf"):
    rope, unexpected, logits, meant = read(name)
    same = torch.equal(logits, plain[2])
    print(name, "| read as:", rope, "| unexpected:", set(unexpected) or None,
          "| logits equal to those of plain.gguf:", same)
    assert rope["rope_type"] == "default" and not unexpected and same, "the behaviour has changed"
gap = (plain[3] - plain[2]).abs().max().item()
print(f"with frequencies divided by 8, as rope_freqs.weight says, logits differ by up to {gap:.2f}")
assert gap > 0.1
print("seen: the factors are dropped without a word")
PYTHON
