"""Models and texts from anywhere: four families, every kind of file and a Hub on this machine,
through the real libraries; and what is said when it fails."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.hub import Hub

from codebook_tutorial.core import seeded
from codebook_tutorial.model.presets import PRESETS
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import lm_loss, next_probs, token_losses
from codebook_tutorial.model.sources import TEXTS
from codebook_tutorial.model.text import Text, load_text, pack

SHARED = Path(os.environ.get("COURSE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
STORIES260K, TINYSTORIES = SHARED / "models" / "stories260K", SHARED / "text" / "tinystories.json"
WORDS = "the a dog cat bird saw chased liked and then it ran home sat slept".split()
IDS = [[1, 5, 6, 7, 3, 9, 4, 8]]


# ---- small models, tokenizers, documents
def documents(n, seed=0):
    "Sentences of 3 to 12 words; the last word is one of its own, so that order shows."

    def draw(k):
        return int(torch.randint(k, (), generator=g))

    g = seeded(seed)
    return [" ".join(WORDS[draw(len(WORDS))] for _ in range(3 + draw(10))) for _ in range(n)]


def word_tokenizer(folder, **special):
    "One token a word."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(
        models.WordLevel(
            {w: i for i, w in enumerate(["<unk>", "<bos>", "<pad>", *WORDS])}, unk_token="<unk>"
        )
    )
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **(special or dict(bos_token="<bos>", pad_token="<pad>", unk_token="<unk>")),
    )
    tok.save_pretrained(folder)
    return tok


def byte_tokenizer(folder):
    "GPT-2's kind: bytes and merges, one <|endoftext|> for BOS and EOS, no padding token."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        documents(50),
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


def tiny(family, seed=0, vocab=300):
    "A random model of two layers."
    import transformers as t

    common = dict(vocab_size=vocab, bos_token_id=1, eos_token_id=1)
    config = {
        "gpt2": lambda: t.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common),
        "neo": lambda: t.GPTNeoConfig(
            hidden_size=16,
            num_layers=2,
            attention_types=[[["global", "local"], 1]],
            num_heads=2,
            max_position_embeddings=64,
            **common,
        ),
        "neox": lambda: t.GPTNeoXConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            **common,
        ),
        "llama": lambda: t.LlamaConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            **common,
        ),
    }[family]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return t.AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model):
    return model(torch.tensor(IDS)).logits.tolist()


def save(folder, family="llama", seed=0, *, tokenizer=word_tokenizer, **kw):
    "A model's folder; returns the logits it should give."
    model = tiny(family, seed)
    model.save_pretrained(folder, **kw)
    if tokenizer:
        tokenizer(folder)
    return logits(model)


def parquet(texts, path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), path)


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    "Words as tokens, with BOS 1 and padding 2."
    return word_tokenizer(tmp_path_factory.mktemp("tok"))


# ---- packing
def random_docs(g, n, longest):
    return [
        torch.randint(
            10, 50, (int(torch.randint(1, longest + 1, (), generator=g)),), generator=g
        ).tolist()
        for _ in range(n)
    ]


@pytest.mark.parametrize("pad", [0, 1])
def test_pack_cuts_one_stream_into_equal_rows(pad):
    g = seeded(0)
    for _ in range(200):
        docs, length = (
            random_docs(g, int(torch.randint(1, 12, (), generator=g)), 20),
            int(torch.randint(2, 40, (), generator=g)),
        )
        stream, ids = (
            [1] + [t for doc in docs for t in [*doc, 1]],
            pack(iter(docs), length, bos=1, pad=pad),
        )
        assert ids.dtype == torch.int64 and ids.shape[1] == length
        if len(stream) >= length:
            assert (
                ids.flatten().tolist() == stream[: len(stream) // length * length]
            )  # nothing lost but the last partial row, nothing doubled
        else:
            assert ids.tolist() == [stream + [pad] * (length - len(stream))]


@pytest.mark.parametrize("pad", [0, 1])
def test_pack_whole_never_cuts(pad):
    g = seeded(1)
    for _ in range(200):
        docs, length = (
            random_docs(g, int(torch.randint(1, 12, (), generator=g)), 20),
            int(torch.randint(22, 60, (), generator=g)),
        )
        rows, found = pack(docs, length, bos=1, pad=pad, whole=True).tolist(), []
        for row in rows:
            assert len(row) == length and row[0] == 1
            while row[-1] == pad and (pad != 1 or row[-2] == 1):
                row.pop()  # padding stands at the end alone
            inside = []
            for t in row[1:]:
                if t != 1:
                    inside.append(t)
                else:
                    found.append(inside)
                    inside = []
            assert not inside  # each document has its BOS behind it
        assert found == docs
        used = [sum(t > 1 for t in row) + sum(1 for t in row if t == 1) for row in rows]
        assert len(rows) == 1 or all(u > 0 for u in used)


def test_pack_whole_fills_a_row_while_documents_fit():
    docs = [[10] * 3, [11] * 4, [12] * 1, [13] * 6]
    assert pack(docs, 10, 1, pad=0, whole=True).tolist() == [
        [1, 10, 10, 10, 1, 11, 11, 11, 11, 1],
        [1, 12, 1, 13, 13, 13, 13, 13, 13, 1],
    ]
    assert pack(docs[:3], 8, 1, pad=0, whole=True).tolist() == [
        [1, 10, 10, 10, 1, 0, 0, 0],
        [1, 11, 11, 11, 11, 1, 12, 1],
    ]
    assert pack([[10] * 6], 8, 1, pad=0, whole=True).tolist() == [[1] + [10] * 6 + [1]]
    with pytest.raises(
        ValueError,
        match=r"document 1 has 7 tokens, a row of 8 has room for 6; take length=9 or more, or "
        r"whole=False",
    ):
        pack([[10], [11] * 7], 8, 1, pad=0, whole=True)


# ---- texts and losses
def test_text_knows_tokens_from_bos_and_padding():
    text = Text(torch.tensor([[1, 5, 6, 1, 7, 1, 0, 0], [8, 9, 1, 1, 5, 1, 0, 0]]), bos=1, pad=0)
    assert (
        text.mask.int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0]]
        and text.n_tokens == 5
        and text.ordinary.sum() == 6
    )
    assert text.labels.tolist() == [
        [-100, 5, 6, 1, 7, 1, -100, -100],
        [-100, 9, 1, -100, 5, 1, -100, -100],
    ]  # no BOS after BOS, nothing behind padding
    assert repr(text) == "Text: 2 rows of 8, 5 tokens, 10 BOS and padding, 1 at a row's start"
    same = Text(
        torch.tensor([[1, 5, 6, 1, 7, 1, 1, 1]]), bos=1, pad=1
    )  # a tokenizer with one token for both
    assert (
        same.mask.int().tolist() == [[0, 1, 1, 0, 1, 0, 0, 0]]
        and same.labels.tolist() == text[0].labels.tolist()
    )


def test_text_goes_by_rows():
    text = Text(torch.arange(10, 50).view(10, 4), bos=1, pad=0)
    assert (
        text[2].ids.tolist() == [[18, 19, 20, 21]]
        and text[-1].ids.tolist() == [[46, 47, 48, 49]]
        and (text[1:].bos, text[1:].pad) == (1, 0)
    )
    first, rest = text.split(0.7)
    assert (len(first), len(rest)) == (7, 3) and torch.equal(
        torch.cat([first.ids, rest.ids]), text.ids
    )
    assert torch.equal(text[torch.tensor([3, 1])].ids, text.ids[[3, 1]])
    for share in (0, 1, 0.01):
        with pytest.raises(ValueError, match="split: .* of 10 rows leaves one part empty"):
            text.split(share)


@pytest.mark.parametrize("family", ["gpt2", "neo", "neox", "llama"])
def test_loss_equals_transformers_own_without_padding(family):
    model, g = tiny(family), seeded(2)
    ids = torch.randint(2, 300, (5, 24), generator=g)
    ids[:, 0], ids[:, 9] = 1, 1
    text = Text(ids, bos=1, pad=0)
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=ids).loss.item()
    assert lm_loss(model, text, batch=2) == pytest.approx(theirs, abs=1e-5)
    each = token_losses(model, text, batch=3)
    assert each.shape == (5, 24) and each[:, 0].isnan().all() and not each[:, 1:].isnan().any()


def test_loss_equals_a_loop_with_padding_and_does_not_see_what_padding_is():
    model, docs = tiny("llama"), random_docs(seeded(3), 14, 12)
    texts = [Text(pack(docs, 32, 1, pad=pad, whole=True), 1, pad) for pad in (0, 1, 299)]
    with torch.no_grad():
        logp = model(texts[0].ids).logits.log_softmax(-1)
    nats, row, at = torch.full(texts[0].ids.shape, torch.nan), 0, 0
    for doc in docs:  # by hand: place each document, read off its tokens and the BOS behind it
        if at + len(doc) + 2 > 32:
            row, at = row + 1, 0
        for t in [*doc, 1]:
            nats[row, at + 1] = -logp[row, at, t]
            at += 1
    assert texts[0].mask.sum() == sum(map(len, docs)) and (texts[0].ids == 0).sum() > 10
    for text in texts:
        each = token_losses(model, text)
        assert torch.equal(each.isnan(), nats.isnan()) and torch.allclose(
            each.nan_to_num(), nats.nan_to_num(), atol=1e-5
        )
        assert lm_loss(model, text) == pytest.approx(nats.nanmean().item(), abs=1e-5)
        with torch.no_grad():
            assert lm_loss(model, text[:1]) == pytest.approx(
                model(input_ids=text[:1].ids, labels=text[:1].labels).loss.item(), abs=1e-5
            )


@pytest.mark.parametrize("family", ["gpt2", "neo", "neox", "llama"])
def test_next_probs_are_the_models_own_in_rows_of_any_length(family):
    model, rows = tiny(family), [[1, 5, 6], [1], [1, 7, 8, 9, 4, 4, 3], [2, 9], [1, 5, 6]]
    want = torch.stack([model(torch.tensor([r])).logits[0, -1].softmax(-1) for r in rows])
    model.train()  # dropout would make every answer another
    for batch in (1, 2, 64):
        assert torch.allclose(next_probs(model, rows, batch), want, atol=1e-6)
    assert model.training
    with pytest.raises(
        ValueError, match="next_probs: the model reads 64 positions, the text has rows of 65"
    ):
        next_probs(model, [[1] * 65])
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="next_probs: expected rows with at least one token"):
            next_probs(model, bad)


def test_an_ordinary_token_that_also_pads_is_padding_only_at_the_end():
    text = Text(torch.tensor([[1, 5, 0, 6, 1, 7, 1, 0, 0]]), bos=1, pad=0)
    assert text.mask.tolist() == [[False, True, True, True, False, True, False, False, False]]
    assert text.labels.tolist() == [[-100, 5, 0, 6, 1, 7, 1, -100, -100]]


def test_a_callers_own_mistake_is_not_explained_away(tmp_path):
    save(tmp_path, "neox")
    with pytest.raises(TypeError, match="nonsense"):
        load_lm(tmp_path, nonsense=1)


def test_loss_leaves_the_model_as_it_was():
    model, text = (
        tiny("gpt2").train(),
        Text(torch.randint(2, 300, (3, 16), generator=seeded(0)), bos=1, pad=0),
    )
    assert (
        lm_loss(model, text) == lm_loss(model, text) and model.training
    )  # no dropout while it measures
    with pytest.raises(
        ValueError,
        match=r"token_losses: the model reads 64 positions, the text has rows of 65; "
        r"load_text\(..., length=64\)",
    ):
        token_losses(model, Text(torch.full((1, 65), 5), 1, 0))


# ---- text from files
def write_files(folder, docs):
    "The same documents in every format."
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strings.json").write_text(json.dumps(docs, indent=0))
    (folder / "objects.json").write_text(
        json.dumps([{"n": i, "story": d} for i, d in enumerate(docs)])
    )
    (folder / "lines.jsonl").write_text(
        "".join(json.dumps({"text": d, "n": i}) + "\n" for i, d in enumerate(docs))
    )
    (folder / "paragraphs.txt").write_text(
        "\n\n".join(d.replace(" ", "\n", 1) for d in docs) + "\n"
    )
    parquet(docs, folder / "table.parquet")


def test_every_kind_of_file_gives_the_same_text(tok, tmp_path):
    docs, folder = documents(150), tmp_path / "odd [name] *"
    write_files(folder, docs)
    want = pack([tok(d)["input_ids"] for d in docs], 32, 1, pad=2)
    for name, kw in {
        "strings.json": {},
        "objects.json": dict(column="story"),
        "lines.jsonl": {},
        "paragraphs.txt": {},
        "table.parquet": {},
    }.items():
        text = load_text(tok, str(folder / name), length=32, **kw)
        assert torch.equal(text.ids, want) and (text.bos, text.pad) == (1, 2), name
    assert torch.equal(
        load_text(tok, folder / "lines.jsonl", n_tokens=100, length=32).ids, want[:3]
    )  # as many whole rows as 100 positions make
    other = [load_text(tok, folder / "lines.jsonl", length=32, seed=s).ids for s in (1, 1, 2)]
    assert (
        torch.equal(other[0], other[1])
        and not torch.equal(other[0], want)
        and not torch.equal(other[0], other[2])
    )
    assert other[0].shape == want.shape
    whole = load_text(tok, folder / "lines.jsonl", length=32, whole=True)
    assert torch.equal(
        whole.ids, pack([tok(d)["input_ids"] for d in docs], 32, 1, pad=2, whole=True)
    ) and whole.n_tokens == sum(len(d.split()) for d in docs)


def test_blank_lines_part_documents(tok, tmp_path):
    "Also where they hold spaces, or end as Windows ends them."
    docs = documents(20)
    for i, gap in enumerate(["\n\n", "\n \n", "\n\t\n\n", "\r\n  \r\n"]):
        (tmp_path / f"{i}.txt").write_bytes(gap.join(docs).encode())
        found = load_text(tok, tmp_path / f"{i}.txt", length=16)
        assert torch.equal(found.ids, load_text(tok, docs, length=16).ids)


def test_documents_can_be_a_list(tok, tmp_path):
    "As read from a file; a short name in errors, and an item that is no text is named."
    docs = documents(30)
    write_files(tmp_path, docs)
    there = load_text(tok, tmp_path / "lines.jsonl", length=16)
    assert torch.equal(load_text(tok, docs, length=16).ids, there.ids)
    with pytest.raises(ValueError, match="^load_text: a list of 1 documents has 5 tokens"):
        load_text(tok, ["the dog saw the cat"], length=16)
    with pytest.raises(TypeError, match="^load_text: expected a list of texts, got int at 1"):
        load_text(tok, ["the dog", 3], length=16)


def test_the_default_text_can_be_set(tok, tmp_path, monkeypatch):
    write_files(tmp_path, documents(30))
    monkeypatch.setenv("COURSE_TEXT", str(tmp_path / "strings.json"))
    assert torch.equal(
        load_text(tok, length=16).ids, load_text(tok, tmp_path / "lines.jsonl", length=16).ids
    )


@pytest.mark.parametrize(
    "name,content,kw,words",
    [
        ("text.csv", "text\na", {}, ["of no known kind", ".txt, .json, .jsonl, .parquet"]),
        ("none.jsonl", None, {}, ["not there"]),
        ("empty.txt", "", {}, ["is empty"]),
        ("blank.txt", "\n\n \n\n", {}, ["0 tokens in 0 documents"]),
        ("nothing.json", "[]", {}, []),
        (
            "few.txt",
            "the dog saw the cat",
            {},
            ["5 tokens in 1 documents, too few for a row of 16", "smaller length"],
        ),
        (
            "columns.jsonl",
            '{"story": "the dog", "n": 1}\n' * 20,
            {},
            ["no column 'text'", "the columns are story, n", "column=..."],
        ),
        (
            "numbers.jsonl",
            '{"story": "the dog", "n": 1}\n' * 20,
            dict(column="n"),
            ["column 'n' holds int, expected text", "story, n"],
        ),
        (
            "split.jsonl",
            '{"text": "the dog"}\n' * 20,
            dict(split="validation"),
            ["validation", "train"],
        ),
        (
            "broken.jsonl",
            '{"text": "the dog"}\n{"text": "the',
            {},
            ["broken.jsonl", "could not be read"],
        ),
        (
            "broken.parquet",
            "PAR1 and then nothing of the kind",
            {},
            ["broken.parquet", "could not be read"],
        ),
        (
            "short.txt",
            "the dog saw the cat",
            dict(n_tokens=10),
            ["n_tokens=10 is less than one row of length=16"],
        ),
    ],
)
def test_a_bad_file_is_explained_and_a_good_one_read_after_it(
    tok, tmp_path, name, content, kw, words
):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="^load_text: ") as e:
        load_text(tok, str(tmp_path / name), length=16, **kw)
    assert all(w in str(e.value) for w in words), str(e.value)
    if "could not be read" in str(e.value):
        assert e.value.__cause__ is not None
    write_files(tmp_path, documents(30))
    assert len(load_text(tok, tmp_path / "lines.jsonl", length=16)) > 5


def test_mistaken_arguments_are_explained(tok, tmp_path):
    with pytest.raises(ValueError, match="expected load_lm's tokenizer first.*'tinystories'"):
        load_text("tinystories", tok)
    bare = word_tokenizer(tmp_path, unk_token="<unk>")
    with pytest.raises(ValueError, match="with BOS and pad"):
        load_text(bare, "tinystories")


def test_the_stories_are_asked_for_a_seed_and_a_split(tok, monkeypatch):
    from itertools import islice

    from codebook_tutorial.world.grammar import ID
    from codebook_tutorial.world.stories import make_tokenizer, stories

    monkeypatch.delenv("COURSE_TEXT", raising=False)
    own = make_tokenizer()
    ids = [
        load_text(own, n_tokens=2560, length=256, **kw).ids
        for kw in ({}, dict(source="stories"), dict(seed=1), dict(split="train"))
    ]
    assert all(i.shape == (10, 256) for i in ids) and torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2]) and not torch.equal(ids[0], ids[3])
    want = [s.ids.tolist() for s in islice(stories(0, "test"), 60)]
    assert torch.equal(
        ids[0], pack(want, 256, ID["<bos>"], pad=ID["<pad>"], whole=True)[:10]
    )  # in their own tokenizer no story is cut,
    assert torch.equal(
        load_text(own, n_tokens=2560, length=256, whole=False).ids,
        pack(want, 256, ID["<bos>"], pad=ID["<pad>"])[:10],
    )
    other = load_text(
        tok, "stories", n_tokens=640, length=32
    ).ids  # in another's they are one stream
    assert torch.equal(
        other,
        pack(
            [
                tok(s.text, add_special_tokens=False)["input_ids"]
                for s in islice(stories(0, "test"), 60)
            ],
            32,
            1,
            pad=2,
        )[:20],
    )


# ---- models from folders
def test_a_folder_and_the_default_model(tmp_path, monkeypatch):
    want = save(tmp_path / "m", tokenizer=byte_tokenizer)
    model, tok = load_lm(tmp_path / "m")
    assert (
        logits(model) == want
        and not model.training
        and (tok.bos_token, tok.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    )
    monkeypatch.setenv("COURSE_MODEL", str(tmp_path / "m"))
    assert logits(load_lm()[0]) == want
    assert load_lm(tmp_path / "m", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert (
        len(tok) == 300
        and tok("the dog")["input_ids"]
        == load_lm(tmp_path / "m", bos="a")[1]("the dog")["input_ids"]
    )


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def bad_config(folder):
    (folder / "config.json").write_text('{"model_type": "lla')


def bad_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')


def unknown_family(folder):
    (folder / "config.json").write_text('{"model_type": "octopus"}')


def cut_weights(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-200])


def garbled_weights(folder):
    (folder / "model.safetensors").write_bytes(b"no tensors here" * 100)


def lost_weights(folder):
    from safetensors.torch import load_file, save_file

    save_file(
        {
            k: v
            for k, v in load_file(folder / "model.safetensors").items()
            if "layers.1.mlp" not in k
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


@pytest.mark.parametrize(
    "spoil,words",
    [
        (no_config, ["no config.json in", "save_pretrained"]),
        (no_weights, ["no model.safetensors in", "config.json"]),
        (only_pickle, ["only pytorch_model.bin", "run code", "refs/pr/N"]),
        (no_tokenizer, ["no tokenizer in", "tokenizer.json"]),
        (bad_config, ["could not be read", "config.json"]),
        (bad_tokenizer, ["could not be read", "force_download=True"]),
        (unknown_family, ["could not be read", "octopus"]),
        (cut_weights, ["model.safetensors of", "cut short", "force_download=True"]),
        (garbled_weights, ["model.safetensors of", "damaged"]),
        (lost_weights, ["lack model.layers.1.mlp", "(3 in all)", "LlamaForCausalLM"]),
    ],
)
def test_a_spoilt_folder_is_explained(tmp_path, spoil, words):
    want = save(tmp_path)
    kept = {p: p.read_bytes() for p in tmp_path.iterdir()}
    spoil(tmp_path)
    with pytest.raises(ValueError, match="^load_lm: ") as e:
        load_lm(tmp_path)
    assert all(w in str(e.value) for w in words), str(e.value)
    for path, data in kept.items():
        path.write_bytes(data)
    assert logits(load_lm(tmp_path)[0]) == want


def test_a_tokenizer_without_bos(tmp_path):
    want = save(tmp_path, tokenizer=lambda folder: word_tokenizer(folder, eos_token="<bos>"))
    with pytest.raises(
        ValueError, match=r"has no BOS token, and texts begin with one; .*bos='<bos>'"
    ):
        load_lm(tmp_path)
    with pytest.raises(ValueError, match=r"'<start>' is not in the vocabulary"):
        load_lm(tmp_path, bos="<start>")
    model, tok = load_lm(tmp_path, bos="<bos>")
    assert (tok.bos_token_id, tok.pad_token_id) == (1, 1) and logits(model) == want


@pytest.mark.parametrize(
    "name,words",
    [
        ("pythia-70m", ["EleutherAI/pythia-70m", "hf download EleutherAI/pythia-70m"]),
        ("pythia70m", ["did you mean 'pythia-70m'"]),
        (
            "tinystories-33m",
            [
                "hf download roneneldan/TinyStories-33M --revision "
                + PRESETS["tinystories-33m"]["revision"]
            ],
        ),
    ],
)
def test_offline_names_the_ways_out(name, words):
    with pytest.raises(
        ConnectionError, match=r"^load_lm: .*HF_HUB_OFFLINE.*load_lm\('stories'\) needs none"
    ) as e:
        load_lm(name)
    assert all(w in str(e.value) for w in words) and e.value.__cause__ is not None


def test_offline_texts_and_names_that_cannot_be(tok, tmp_path):
    with pytest.raises(
        ConnectionError,
        match=r"load_text: roneneldan/TinyStories is not .* `hf download roneneldan/TinyStories "
        r"--repo-type dataset`.* load_text\(tok, 'stories'\)",
    ):
        load_text(tok, "tinystories")
    with pytest.raises(ValueError, match="load_lm: no folder"):
        load_lm(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="load_lm: no folder './here'"):
        load_lm("./here")
    with pytest.raises(ValueError, match="is a folder and has no revision 'v1'"):
        load_lm(tmp_path, revision="v1")
    with pytest.raises(
        ValueError, match="load_lm: 'a b!' is no preset .stories, tinystories-1l-21m"
    ):
        load_lm("a b!")


def test_presets_are_complete():
    assert set(PRESETS) == {
        "stories",
        "tinystories-1l-21m",
        "tinystories-33m",
        "pythia-70m",
        "gpt2",
        "pythia-410m",
    } and set(TEXTS) == {"tinystories", "wikitext-103", "pile-10k"}
    for name, p in PRESETS.items():
        assert {"id", "params", "download", "layers", "d_model", "fits"} <= set(p) and (
            name == "stories" or p["id"].count("/") == 1
        )
    for p in TEXTS.values():
        assert {"id", "config", "split", "column", "note"} <= set(p) and p["id"].count("/") == 1


# ---- from the Hub, in processes of their own
CLIENT = """
import json, os, sys, time, urllib.request
from pathlib import Path
import torch
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
time.sleep = lambda s: None                       # the libraries' pauses between their retries
torch.set_num_threads(1)
IDS, out, home = torch.tensor({ids}), {{}}, Path(os.environ["HF_HOME"])
@torch.no_grad()
def logits(*a, **kw): return load_lm(*a, **kw)[0](IDS).logits.tolist()
def told(fn, *a, **kw):
    try: fn(*a, **kw)
    except Exception as e: return [type(e).__name__, str(e), type(e.__cause__).__name__]
    return ["no error", "", ""]
ends = (".incomplete", ".part", ".tmp")
def partial(): return [str(p) for p in home.rglob("*") if p.name.endswith(ends)]
def mend(): urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mend").read()
{code}
print(); print(json.dumps(out))
"""


def client(env, code):
    "What a process with the Hub's environment found."
    got = subprocess.run(
        [sys.executable, "-c", CLIENT.format(ids=IDS, code=code)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    assert "hf_secret" not in got.stdout + got.stderr
    return json.loads(got.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf")


def add_models(hub, root, want):
    "Every family, a sharded one, one in two versions."
    for family, id, tokenizer in (
        ("gpt2", "openai-community/gpt2", byte_tokenizer),
        ("neo", "tests/neo", byte_tokenizer),
        ("neox", "EleutherAI/pythia-70m", byte_tokenizer),
        ("llama", "tests/llama", word_tokenizer),
        ("llama", "alone", word_tokenizer),
    ):
        want[id] = save(root / id, family, tokenizer=tokenizer, seed=len(want))
        hub.add("model", id, root / id)
    want["sharded"] = save(root / "sharded", seed=11, max_shard_size="10KB")
    hub.add("model", "tests/sharded", root / "sharded")
    want["v2"] = save(root / "v2", seed=12)
    want["sha"] = hub.add("model", "tests/versions", root / "v2", revision="v2")
    want["main"] = save(root / "v3", seed=13)
    hub.add("model", "tests/versions", root / "v3")
    for folder in ("elsewhere", "onnx"):
        (root / "v3" / folder).mkdir()


def add_pinned(hub, root, want):
    """As on the Hub: main has a pickle and the tokenizer, a pull request safetensors
    and no tokenizer."""
    pinned = PRESETS["tinystories-1l-21m"]
    want["pinned"] = save(root / "pr", "neo", seed=14, tokenizer=None)
    byte_tokenizer(root / "main")
    hub.add(
        "model",
        pinned["id"],
        {
            "pytorch_model.bin": b"a pickle",
            "config.json": (root / "pr" / "config.json").read_bytes(),
            **{p.name: p.read_bytes() for p in (root / "main").iterdir()},
        },
    )
    hub.add("model", pinned["id"], root / "pr", revision="refs/pr/1", sha=pinned["revision"])


def add_faulty(hub, root, want):
    "What must be refused, and files that break off or are damaged."
    hub.add("model", "tests/pickled", {"config.json": b"{}", "pytorch_model.bin": b"a pickle"})
    hub.add("model", "tests/files", {"README.md": b"nothing"})
    hub.add("model", "tests/gated", root / "v2", gated=True)
    for fault in ("truncated", "corrupt"):
        want[fault] = save(root / fault, seed=15)
        hub.add("model", f"tests/{fault}", root / fault)
        hub.faults[f"tests/{fault}", "model.safetensors"] = fault


def add_texts(hub, root):
    for split, seed in (("train", 0), ("validation", 1)):
        parquet(documents(200, seed), root / "ts" / "data" / f"{split}-00000-of-00001.parquet")
    hub.add("dataset", "roneneldan/TinyStories", root / "ts")
    lines = [{"story": d} for d in documents(200, 2)]
    hub.add("dataset", "tests/lines", {"train.jsonl": "\n".join(map(json.dumps, lines)).encode()})
    hub.add(
        "dataset",
        "tests/lines",
        {"train.jsonl": "\n".join(map(json.dumps, lines[::-1])).encode()},
        revision="backwards",
    )
    hub.add("dataset", "tests/gated", {"train.jsonl": b'{"text": "a"}'}, gated=True)
    hub.add("dataset", "tests/none", {"README.md": b"nothing"})


def add_articles(hub, root, want):
    articles = [
        [
            f" = the {w} = \n",
            "",
            " the dog saw the cat . \n",
            " = = home = = \n",
            f" it ran and the {w} slept . \n",
        ]
        for w in WORDS
    ]
    parquet(sum(articles, []), root / "wiki" / "raw" / "train-0.parquet")
    parquet(["no"] * 9, root / "wiki" / "other" / "train-0.parquet")
    (root / "wiki" / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-103-raw-v1\n  data_files:\n"
        "  - split: test\n    path: raw/train-*\n"
        "- config_name: other\n  data_files:\n  - split: train\n    path: other/train-*\n---\n"
    )
    hub.add("dataset", "Salesforce/wikitext", root / "wiki")
    want["articles"] = ["".join(a) for a in articles]


@pytest.fixture(scope="module")
def served(tmp_path_factory, home):
    "One Hub with models and data sets, what they should give, and what one client saw of them."
    root, want = tmp_path_factory.mktemp("repos"), {}
    with Hub() as hub:
        add_models(hub, root, want)
        add_pinned(hub, root, want)
        add_faulty(hub, root, want)
        add_texts(hub, root)
        add_articles(hub, root, want)
        yield hub, want, root


ASKED = """
for id in ("openai-community/gpt2", "tests/neo", "EleutherAI/pythia-70m", "tests/llama", "alone"):
    out[id] = logits(id)
out["gpt2"] = logits("gpt2")
out["pythia-70m"] = logits("pythia-70m")
out["sharded"] = logits("tests/sharded")
out["main"] = logits("tests/versions")
out["v2"] = logits("tests/versions", revision="v2")
out["sha"] = logits("tests/versions", revision=SHA)
model, tok = load_lm("tinystories-1l-21m")
out["pinned"] = model(IDS).logits.tolist()
out["name"] = model.name_or_path
out["bos"] = [tok.bos_token, tok.pad_token, model.training]
for name in ("gpt3", "tests/none", "tests/pickled", "tests/files", "tests/gated"):
    out["told " + name] = told(load_lm, name)
out["told revision"] = told(load_lm, "tests/versions", revision="v9")
out["told truncated"], out["partial"] = told(load_lm, "tests/truncated"), partial()
out["kept"] = [p.name for p in (home / "hub" / "models--tests--truncated" / "snapshots").rglob("*")]
out["told corrupt"] = told(load_lm, "tests/corrupt")
mend()
# a plain call is enough: nothing of the broken download was kept
out["truncated"] = logits("tests/truncated")
# this file was whole, so the cache keeps it
out["still corrupt"] = told(load_lm, "tests/corrupt")
out["corrupt"] = logits("tests/corrupt", force_download=True)
out["after"], out["partial after"] = logits("tests/corrupt"), partial()

tok = load_lm("tests/llama")[1]
def ids(*a, **kw): return load_text(tok, *a, length=32, **kw).ids.tolist()
out["train"] = ids("tinystories", split="train")
out["validation"] = ids("tinystories")
out["lines"] = ids("tests/lines", column="story")
out["by id"] = ids("roneneldan/TinyStories")
out["shuffled"] = ids("tinystories", split="train", seed=5)
out["backwards"] = ids("tests/lines", column="story", revision="backwards")
out["articles"] = ids("wikitext-103")
for name in ("tinystory", "tests/nothing", "tests/gated", "tests/lines", "tests/none"):
    out["text " + name] = told(ids, name)
out["text revision"] = told(ids, "tinystories", revision="v9")
out["text split"] = told(ids, "tinystories", split="test")
out["text config"], out["partial texts"] = told(ids, "Salesforce/wikitext"), partial()
from huggingface_hub import snapshot_download
# what `hf download` does, for the test without a network
snapshot_download("roneneldan/TinyStories", repo_type="dataset")
"""


@pytest.fixture(scope="module")
def seen(served, home):
    "One process asks for everything: models, texts, and what must fail."
    hub, want, _ = served
    code = f"SHA = {want['sha']!r}\n{ASKED}"
    return client(hub.env(home, HF_TOKEN="hf_secret"), code)


@pytest.mark.parametrize(
    "id", ["openai-community/gpt2", "tests/neo", "EleutherAI/pythia-70m", "tests/llama", "alone"]
)
def test_every_family_comes_from_the_hub_as_it_was_saved(served, seen, id):
    assert seen[id] == served[1][id]


def test_presets_shards_and_revisions(served, seen):
    hub, want, _ = served
    assert (
        seen["gpt2"] == want["openai-community/gpt2"]
        and seen["pythia-70m"] == want["EleutherAI/pythia-70m"]
    )
    assert seen["sharded"] == want["sharded"]
    assert seen["main"] == want["main"] and seen["v2"] == seen["sha"] == want["v2"] != want["main"]
    assert (
        seen["pinned"] == want["pinned"]
        and seen["name"] == "tinystories-1l-21m"
        and seen["bos"] == ["<|endoftext|>", "<|endoftext|>", False]
    )


@pytest.mark.parametrize(
    "case,kind,words",
    [
        ("gpt3", "ValueError", ["'gpt3' is no preset", "did you mean 'gpt2'", "hf auth login"]),
        ("tests/none", "ValueError", ["no public repository", "HF_TOKEN"]),
        ("tests/pickled", "ValueError", ["only pytorch_model.bin", "run code", "refs/pr/N"]),
        ("tests/files", "ValueError", ["no config.json in tests/files"]),
        (
            "tests/gated",
            "ValueError",
            ["tests/gated is gated", "licence", "hf auth login", "HF_TOKEN"],
        ),
        (
            "revision",
            "ValueError",
            ["tests/versions has no revision 'v9'", "branch, tag or commit"],
        ),
        ("truncated", "ConnectionError", ["broke off", "tests/truncated", "call again"]),
        (
            "corrupt",
            "ValueError",
            ["model.safetensors of tests/corrupt", "load_lm('tests/corrupt', force_download=True)"],
        ),
    ],
)
def test_failures_of_the_hub_are_explained(seen, case, kind, words):
    got, text, cause = seen[f"told {case}"]
    assert got == kind and text.startswith("load_lm: ") and all(w in text for w in words), text
    assert "hf_secret" not in text and (
        cause != "NoneType" or case in ("tests/pickled", "tests/files")
    )


def test_after_a_failure_the_right_call_works(served, seen):
    want = served[1]
    assert (
        seen["partial"] == seen["partial after"] == [] and "model.safetensors" not in seen["kept"]
    )
    assert seen["truncated"] == want["truncated"]
    assert (
        seen["still corrupt"][0] == "ValueError"
        and "force_download=True" in seen["still corrupt"][1]
    )
    assert seen["corrupt"] == seen["after"] == want["corrupt"]


def test_no_pickle_is_fetched_and_no_conversion_asked_for(served, seen):
    asked = served[0].log
    assert any("model.safetensors" in line for line in asked)
    assert not [
        line
        for line in asked
        if "pytorch_model.bin" in line
        or "discussions" in line
        or "commits" in line
        or line.startswith("POST /api/models")
    ]


def test_streams_from_the_hub_are_the_documents(seen, served, tok):
    def rows(docs):
        return pack([tok(d)["input_ids"] for d in docs], 32, 1, pad=2).tolist()

    assert seen["train"] == seen["by id"] == rows(documents(200, 0)) and seen["validation"] == rows(
        documents(200, 1)
    )
    assert seen["lines"] == rows(documents(200, 2)) and seen["backwards"] == rows(
        documents(200, 2)[::-1]
    )
    assert seen["shuffled"] != seen["train"] and len(seen["shuffled"]) == len(seen["train"])
    assert (
        seen["articles"]
        == rows(served[1]["articles"])
        != rows(sum((a.splitlines() for a in served[1]["articles"]), []))
    )  # articles, not lines


@pytest.mark.parametrize(
    "case,words",
    [
        (
            "tinystory",
            [
                "'tinystory' is no preset (stories, tinystories, wikitext-103, pile-10k)",
                "did you mean 'tinystories'",
            ],
        ),
        ("tests/nothing", ["no public repository"]),
        ("tests/gated", ["tests/gated is gated", "licence"]),
        ("tests/lines", ["no column 'text'", "the columns are story"]),
        ("tests/none", ["'tests/none' could not be read"]),
        ("revision", ["roneneldan/TinyStories has no revision 'v9'"]),
        ("split", ["train", "validation"]),
        ("config", ["wikitext-103-raw-v1", "config="]),
    ],
)
def test_failures_of_texts_are_explained(seen, case, words):
    got, text, _ = seen[f"text {case}"]
    assert (
        got == "ValueError" and text.startswith("load_text: ") and all(w in text for w in words)
    ), text
    assert seen["partial texts"] == []


def test_without_a_network_the_cache_serves_and_the_rest_fails_at_once(served, seen, home):
    hub, want, root = served
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]  # nobody listens there now
    got = client(
        {**hub.env(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}"},
        """
def nobody(s): raise AssertionError("a library waits and tries again")
time.sleep = nobody
out["new"] = told(load_lm, "tests/never-loaded")
out["pinned new"] = told(load_lm, "tinystories-33m")
out["llama"] = logits("tests/llama")
out["v2"] = logits("tests/versions", revision="v2")
out["pinned"] = logits("tinystories-1l-21m")
tok = load_lm("tests/llama")[1]
out["text new"] = told(load_text, tok, "pile-10k")
out["text streamed"] = told(load_text, tok, "tests/lines")
out["text"] = load_text(tok, "tinystories", split="train", length=32).ids.tolist()
""",
    )
    for case, words in {
        "new": [
            "tests/never-loaded",
            "load_lm('tests/never-loaded') or `hf download tests/never-loaded`",
        ],
        "pinned new": [f"--revision {PRESETS['tinystories-33m']['revision']}"],
        "text new": ["`hf download NeelNanda/pile-10k --repo-type dataset`"],
        "text streamed": ["`hf download tests/lines --repo-type dataset`"],
    }.items():
        assert got[case][0] == "ConnectionError" and all(w in got[case][1] for w in words), got[
            case
        ]
    assert (
        got["llama"] == want["tests/llama"]
        and got["v2"] == want["v2"]
        and got["pinned"] == want["pinned"]
        and got["text"] == seen["train"]
    )


# ---- the real thing
@pytest.mark.real
@pytest.mark.skipif(
    not (STORIES260K.exists() and TINYSTORIES.exists()),
    reason=f"no real model and text at {STORIES260K} and {TINYSTORIES}; set COURSE_SHARED",
)
def test_a_real_model_reads_real_text_as_well_as_it_should():
    model, tok = load_lm(STORIES260K)
    text = load_text(tok, TINYSTORIES, n_tokens=512 * 48, length=512)
    short = Text(
        text.ids.view(-1, 128), text.bos, text.pad
    )  # the same tokens with less to look back to
    worse = Text(text.ids.masked_fill(text.ids == text.bos, tok.unk_token_id), text.bos, text.pad)
    losses = [lm_loss(model, t) for t in (text, short, worse)]
    print(
        f"\nstories260K: {losses[0]:.3f} nats/token in rows of 512, {losses[1]:.3f} in rows of "
        f"128, {losses[2]:.3f} without BOS"
    )
    assert losses[0] <= 1.52 and losses[0] < losses[1] < 1.9 and losses[0] < losses[2]


def test_the_shipped_model_knows_the_stories(monkeypatch):
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    monkeypatch.delenv("COURSE_TEXT", raising=False)
    model, tok = load_lm()
    preset, config = PRESETS["stories"], model.config
    assert (preset["layers"], preset["d_model"]) == (
        config.num_hidden_layers,
        config.hidden_size,
    ) and preset["params"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M"
    assert (
        not model.training
        and len(tok) == config.vocab_size
        and (tok.bos_token_id, tok.pad_token_id) == (config.bos_token_id, config.pad_token_id)
    )
    text = load_text(tok, n_tokens=256 * 40, length=config.max_position_embeddings)
    assert (
        len(text) == 40
        and (text.ids[:, 0] == tok.bos_token_id).all()
        and not (text.ids == tok.unk_token_id).any()
    )
    shuffled = Text(
        text.ids.where(
            ~text.mask,
            text.ids[text.mask][torch.randint(text.n_tokens, text.ids.shape, generator=seeded(0))],
        ),
        text.bos,
        text.pad,
    )
    assert lm_loss(model, text) < 1.3 < 3 < lm_loss(model, shuffled)
