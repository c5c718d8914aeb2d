"""GGUF files, written by llama.cpp's own package: read as the model that they were made from."""

import copy
import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.finetune import finetune
from codebook_tutorial.model.gguf import gguf_in
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text

gguf = pytest.importorskip("gguf")
HEADS, KV, LAYERS, WIDTH = 4, 2, 3, 64
TEXT = ["Chapter 1\n\n2 cats sat.\n\n13 dogs ran  to 2024 hills.\n\n\n7 birds"] * 3
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x if x != 'o' else 'output'}" for x in "qkvo"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


@pytest.fixture(scope="module")
def tok():
    "Byte-level pairs; digits are cut one by one first, as SmolLM's are."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    marks = ["<|endoftext|>", "<|im_start|>"]
    kinds = dict(special_tokens=marks, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, **kinds))
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=marks[0], eos_token=marks[0])


@pytest.fixture(scope="module")
def model(tok):
    "A random Llama with shared key-value heads; norms and their scales random."
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def paired(weight, heads):
    "Rows in the order of llama.cpp: the two halves of each head's rotation side by side."
    return weight.view(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def write(path, model, tok, *, pre="smollm", kind="F32", blocks=LAYERS, extra=None, said=None):
    "A GGUF as llama.cpp's converter lays it out."
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(blocks)
    w.add_context_length(256)
    w.add_embedding_length(WIDTH)
    w.add_feed_forward_length(96)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_rope_freq_base(10_000.0)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(len(tok))
    for key, value in (said or {}).items():
        w.add_string(key, value) if isinstance(value, str) else w.add_uint16(key, value)
    w.add_tokenizer_model("gpt2")
    if pre:
        w.add_tokenizer_pre(pre)
    data = json.loads(tok.backend_tokenizer.to_str())["model"]
    tokens = sorted(data["vocab"], key=data["vocab"].get)
    w.add_token_list(tokens)
    w.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    w.add_token_merges([" ".join(pair) for pair in data["merges"]])
    w.add_bos_token_id(tok.bos_token_id)
    w.add_eos_token_id(tok.eos_token_id)
    for name, t in laid_out(model).items():
        packed = kind != "F32" and t.ndim == 2
        how = gguf.GGMLQuantizationType[kind if packed else "F32"]
        w.add_tensor(name, gguf.quantize(t, how), raw_dtype=how)
    for name, t in (extra or {}).items():
        w.add_tensor(name, t)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def laid_out(model):
    "Tensors under the names of llama.cpp."
    state, found = model.state_dict(), {}
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, t in state.items():
        name = name.removesuffix(".weight")
        if name in ends:
            new = ends[name]
        else:
            _, _, layer, part = name.split(".", 3)
            new = f"blk.{layer}.{NAMES[part]}"
        t = paired(t, HEADS) if new.endswith("attn_q") else t
        t = paired(t, KV) if new.endswith("attn_k") else t
        found[f"{new}.weight"] = t.float().contiguous().numpy()
    return found


def logits(model, tok):
    with torch.no_grad():
        return model(**tok(TEXT[:1], return_tensors="pt", return_token_type_ids=False)).logits


def test_read_as_the_model_that_it_was_made_from(tmp_path, model, tok):
    "Logits of the weights, in 8 bits of the rounded ones; tokens; a file and its folder alike."
    file = write(tmp_path / "x.gguf", model, tok)
    read, own = load_lm(file)
    assert (logits(read, tok) - logits(model, tok)).abs().max() < 1e-4
    assert own(TEXT).input_ids == tok(TEXT).input_ids
    assert own.bos_token == tok.bos_token and own.pad_token
    again, _ = load_lm(tmp_path)
    assert torch.equal(logits(again, tok), logits(read, tok))
    (tmp_path / "q").mkdir()
    small, _ = load_lm(write(tmp_path / "q" / "x.gguf", model, tok, kind="Q8_0"))
    rounded = copy.deepcopy(model)
    for p in rounded.parameters():
        if p.dim() == 2:  # rows are packed one by one: their order does not matter
            how = gguf.GGMLQuantizationType.Q8_0
            p.data = torch.tensor(gguf.dequantize(gguf.quantize(p.data.numpy(), how), how))
    assert (logits(small, tok) - logits(rounded, tok)).abs().max() < 1e-4
    assert (logits(small, tok) - logits(model, tok)).abs().max() > 1e-2
    half, _ = load_lm(file, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16


def test_saved_copied_and_trained(tmp_path, model, tok):
    "A model out of a GGUF is like any other: nothing about it is quantised any more."
    read, own = load_lm(write(tmp_path / "x.gguf", model, tok, kind="Q4_0"))
    before = logits(read, tok)
    assert torch.equal(logits(copy.deepcopy(read), tok), before)
    read.save_pretrained(tmp_path / "saved")
    own.save_pretrained(tmp_path / "saved")
    saved, again = load_lm(tmp_path / "saved")
    assert torch.equal(logits(saved, tok), before)
    assert again(TEXT).input_ids == tok(TEXT).input_ids
    text = load_text(own, TEXT * 40, n_tokens=2000, length=32)
    codes = add_codebooks(read, ["mlp.*"], n_codes=16).init_from_data(text[:8])
    finetune(codes, text, 2, batch=4)
    codes.save_pretrained(tmp_path / "codes")
    back = CodebookModel.from_pretrained(tmp_path / "codes")
    assert torch.equal(logits(back.eval(), tok), logits(codes.eval(), tok))
    assert not torch.equal(logits(codes, tok), before)


def test_text_is_cut_by_the_rule_that_the_file_names(tmp_path, model, tok, recwarn):
    "transformers 5.23 cuts by GPT-2's rule where it does not know the name; the tokens differ."
    cut = load_lm(write(tmp_path / "x.gguf", model, tok))[1]
    plain = load_lm(write(tmp_path / "y.gguf", model, tok, pre="gpt-2"))[1]
    assert cut.tokenize(TEXT[0]) != plain.tokenize(TEXT[0])
    assert not [w for w in recwarn if "splits text" in str(w.message)]
    for pre in (None, "default"):  # not GPT-2's in llama.cpp
        with pytest.warns(UserWarning, match="splits text by .*rule"):
            load_lm(write(tmp_path / f"{pre}.gguf", model, tok, pre=pre))
    with pytest.warns(UserWarning, match="by the rule 'no-such-rule'.* tokenizer.json"):
        load_lm(write(tmp_path / "z.gguf", model, tok, pre="no-such-rule"))


def test_a_folders_own_tokenizer_comes_first(tmp_path, model, tok):
    write(tmp_path / "x.gguf", model, tok, pre="no-such-rule")
    tok.save_pretrained(tmp_path)
    assert load_lm(tmp_path)[1](TEXT).input_ids == tok(TEXT).input_ids


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(extra={"rope_freqs.weight": np.full(8, 8, np.float32)}), "rotary.*rope_freqs.weight"),
        (dict(said={"llama.rope.scaling.type": "yarn"}), "rotary.*llama.rope.scaling.type"),
        (dict(blocks=LAYERS - 1), f"says that it has {LAYERS - 1} layers, and holds {LAYERS}"),
        (dict(said={"split.count": 3}), "one of 3 parts.*--merge"),
    ],
)
def test_what_would_be_read_in_part_is_refused(tmp_path, model, tok, settings, says):
    file = write(tmp_path / "x.gguf", model, tok, **settings)
    with pytest.raises(ValueError, match=f"load_lm: .*{says}"):
        load_lm(file)


def test_factors_of_one_stretch_nothing(tmp_path, model, tok):
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    read, _ = load_lm(write(tmp_path / "x.gguf", model, tok, extra=extra))
    assert (logits(read, tok) - logits(model, tok)).abs().max() < 1e-4


def test_which_file_is_meant(tmp_path, model, tok):
    "Of several a name is asked for; safetensors come first; a cut-off file is named."
    file = write(tmp_path / "x.gguf", model, tok)
    assert gguf_in("load_lm", str(file)) == file == gguf_in("load_lm", tmp_path)
    assert gguf_in("load_lm", tmp_path / "none.gguf") is None
    with pytest.raises(ValueError, match="load_lm: no folder .*none.gguf.*GGUF file"):
        load_lm(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="is a file and has no revision 'main'"):
        load_lm(file, revision="main")
    (tmp_path / "y.gguf").write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match="several models in .*x.gguf, y.gguf"):
        load_lm(tmp_path)
    with pytest.raises(ValueError, match="load_lm: .*y.gguf.* could not be read"):
        load_lm(tmp_path / "y.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert gguf_in("load_lm", tmp_path) is None


def test_without_the_package(tmp_path, model, tok, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match="x.gguf needs the package gguf: pip install gguf"):
        load_lm(write(tmp_path / "x.gguf", model, tok))
