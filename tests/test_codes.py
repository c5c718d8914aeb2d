"""The index of what every feature is active at, and what is asked of it:
against plain loops, on real tokenizers, under damage and on endless text."""

import functools
import gc
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

import codebook_tutorial.feature.indexing as index_module
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Directions, random_directions
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.feature.detect import scores
from codebook_tutorial.feature.index import open_index
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.feature.neurons import against_neurons, neuron_acts, unit_scores
from codebook_tutorial.feature.search import nearest_features, shared
from codebook_tutorial.feature.states import neuron_precision
from codebook_tutorial.feature.surface import Surface
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.sites import capture
from codebook_tutorial.model.text import Text, pack
from codebook_tutorial.world.concepts import atoms, story_text
from codebook_tutorial.world.grammar import ID, VOCABULARY

SHARED = Path(
    os.environ.get("COURSE_SHARED")
    or next(
        (
            p / "shared"
            for p in Path(__file__).resolve().parents
            if (p / "shared" / "models").exists()
        ),
        "shared",
    )
)
STORIES260K = SHARED / "models" / "stories260K"
SITES = ["mlp.0", "mlp.2", "heads.1"]


# ---------------------------------------------------------------- what there is to ask
@pytest.fixture(scope="module")
def stories():
    """Tokenizer, text of 24 rows, what holds in it, and a model with small books.

    Heads.1 has a book a head."""
    (model, tok), (text, facts) = load_lm("stories"), story_text(24 * 256)
    return (
        tok,
        text,
        facts,
        add_codebooks(model, SITES, n_codes=64, k=2)
        .eval()
        .init_from_data(text[:6].ids, 3, generator=seeded(0)),
    )


@pytest.fixture(scope="module")
def index(stories, tmp_path_factory):
    tok, text, _, cb = stories
    return build_index(cb, tok, text, folder=tmp_path_factory.mktemp("index") / "codes", batch=5)


@pytest.fixture(scope="module")
def active(stories):
    "{site: one set of feature numbers a position}, by plain loops over the model's own ids."
    _, text, _, cb = stories
    found = {}
    with torch.no_grad():
        cb(input_ids=text.ids)
    for site, ids in cb.ids.items():
        found[site] = [
            {64 * g + int(i) for g in range(ids.shape[2]) for i in ids[r, t, g]}
            if text.mask[r, t]
            else set()
            for r in range(24)
            for t in range(256)
        ]
    return found


def documents(ids, mask):
    "Positions of each document's tokens: behind BOS, or where a row begins."
    for r in range(len(ids)):
        some = []
        for t in range(ids.shape[1] + 1):
            if t < ids.shape[1] and mask[r][t]:
                some.append((r, t))
            elif some:
                yield some
                some = []


def naive_mark(tok, text, pattern):
    "Each token lies where decoding one token more adds text."
    marked = torch.zeros_like(text.mask)
    for places in documents(text.ids, text.mask):
        ids = [int(text.ids[p]) for p in places]
        ends = [
            len(tok.decode(ids[:i], clean_up_tokenization_spaces=False))
            for i in range(len(ids) + 1)
        ]
        regex = re.compile(pattern)
        for m in regex.finditer(tok.decode(ids, clean_up_tokenization_spaces=False)):
            a, b = m.span(regex.groups)
            for i, p in enumerate(places):
                if ends[i] < b and ends[i + 1] > a and a < b:
                    marked[p] = True
    return marked


# ---------------------------------------------------------------- what is written down
def test_every_activation_is_there_by_token_and_by_feature(index, active):
    assert list(index.sites) == SITES and set(active) == set(SITES)
    for site, sets in active.items():
        store = index.arrays[site]
        assert [
            set(store["features"][a:b].tolist())
            for a, b in itertools.pairwise(store["starts"].tolist())
        ] == sets
        assert len(store["features"]) == sum(map(len, sets))  # and nothing twice
        by_feature = {
            f: [at for at, s in enumerate(sets) if f in s]
            for f in range(index.sites[site]["n_feats"])
        }
        assert [
            store["positions"][a:b].tolist()
            for a, b in itertools.pairwise(store["offsets"].tolist())
        ] == list(by_feature.values())
        assert index.active(site).tolist() == [len(v) for v in by_feature.values()]
        assert "values" not in store  # codes are on or off
    assert (
        index.sites["heads.1"]["n_feats"] == 4 * 64
        and max(index.arrays["heads.1"]["features"]) >= 192
    )


def test_text_is_there_and_bos_and_padding_are_never_active(index, stories):
    _, text, *_ = stories
    assert (
        np.array_equal(index.ids, text.ids)
        and np.array_equal(index.mask, text.mask)
        and not text.mask.all()
    )
    for site in index.sites:
        n = np.diff(index.arrays[site]["starts"].astype(int)).reshape(text.mask.shape)
        assert (n[~index.mask] == 0).all() and (
            n[index.mask] == (8 if site == "heads.1" else 2)
        ).all()
    assert repr(index).startswith(
        f"Index: {text.n_tokens:,} tokens in 24 rows of 256; mlp.0 (64 features)"
    )


def test_a_code_chosen_twice_at_a_token_is_active_once(stories, tmp_path):
    tok, text, _, _ = stories
    cb = (
        add_codebooks(load_lm("stories")[0], "mlp.1", n_codes=4, k=4, select="residual")
        .eval()
        .init_from_data(text[:4].ids, 3, generator=seeded(0))
    )
    index = build_index(cb, tok, text[:4], folder=tmp_path / "i")
    with torch.no_grad():
        cb(input_ids=text[:4].ids)
    sets = [set(ids.flatten().tolist()) for ids in cb.ids["mlp.1"][text[:4].mask]]
    assert min(map(len, sets)) < 4
    assert (
        index.sites["mlp.1"]["active"] == sum(map(len, sets))
        and index.active("mlp.1").max() <= text[:4].n_tokens
    )


def test_files_are_safetensors_and_the_same_each_time(index, stories, tmp_path):
    from safetensors.numpy import load_file

    tok, text, _, cb = stories
    again = build_index(cb, tok, text, folder=tmp_path / "again", batch=24)
    assert sorted(p.name for p in again.folder.iterdir()) == sorted(
        ["index.json", "text.safetensors", *(f"{s}.safetensors" for s in SITES)]
    )
    for file in again.folder.iterdir():
        if file.suffix == ".safetensors":
            theirs, mine = load_file(file), again.arrays[file.stem]
            assert theirs.keys() == mine.keys() and all(
                np.array_equal(theirs[n], mine[n]) and theirs[n].dtype == mine[n].dtype
                for n in mine
            )
            assert all(array.ctypes.data % array.itemsize == 0 for array in mine.values())
        assert file.read_bytes() == (index.folder / file.name).read_bytes()


def test_features_of_a_dictionary_with_their_values(stories, tmp_path):
    tok, text, _, cb = stories
    book = random_directions(300, 96, relu=True)
    book.directions[7] = 0  # never active
    with cb.bypass():
        index = build_index(
            cb, tok, text[:3], folder=tmp_path / "i", dictionaries={"resid.1": book}
        )
    with cb.bypass(), torch.no_grad(), capture(cb, "resid.1") as acts:
        cb(input_ids=text[:3].ids)
    feats = torch.where(text[:3].mask[..., None], book.encode(acts["resid.1"]), 0.0).flatten(0, 1)
    store = index.arrays["resid.1"]
    for f in (0, 7, 150, 299):
        own = slice(*store["offsets"][f : f + 2])
        assert store["positions"][own].tolist() == feats[:, f].nonzero()[:, 0].tolist()
        assert np.allclose(store["values"][own], feats[:, f][feats[:, f] != 0], rtol=1e-3)
    assert index.active("resid.1")[7] == 0 and index.sites["resid.1"] | {} == dict(
        kind="Directions", n_feats=300, groups=1, config={}, active=int((feats != 0).sum())
    )
    best = index.windows("resid.1", 150, n=3, before=2, after=2)
    tops = [float(feats.view(3, 256, -1)[r, :, 150].max()) for r in range(3)]
    assert [max(w["values"]) for w in best] == pytest.approx(
        sorted(tops, reverse=True), rel=1e-3
    )  # highest first, one a row


def test_negative_values_are_activations_and_huge_ones_are_cut(stories, tmp_path):
    tok, text, _, cb = stories
    book = Directions(torch.eye(96)[:2] * torch.tensor([[1.0], [1e9]]))
    with cb.bypass():
        store = build_index(
            cb, tok, text[:1], folder=tmp_path / "i", dictionaries={"resid.0": book}
        ).arrays["resid.0"]
    values = store["values"][: text[:1].n_tokens]
    assert (values < 0).any() and (values > 0).any() and np.abs(store["values"]).max() == 65504


class Steps(Directions):
    """1 in the text's first row or rows, 2 in those behind:
    which value is seen last must not decide."""

    def encode(self, x):
        Steps.calls += 1
        return torch.full((*x.shape[:-1], 2), 1.0 + (Steps.calls in self.twos))


@pytest.mark.parametrize("twos", [{1}, {2}, {3}, set()])
def test_values_are_left_out_only_where_all_are_one(stories, tmp_path, twos):
    tok, text, _, cb = stories
    book, Steps.calls = Steps(torch.eye(96)[:2]), 0
    book.twos = twos
    with cb.bypass():
        store = build_index(
            cb, tok, text[:3], folder=tmp_path / "i", dictionaries={"resid.0": book}, batch=1
        ).arrays["resid.0"]
    assert ("values" in store) == bool(twos)
    if twos:
        assert np.array_equal(
            store["values"] == 2, np.isin(store["positions"] // 256 + 1, list(twos))
        )


@pytest.mark.parametrize("step", [1, 500, 20_000])
def test_sorting_a_few_at_a_time_gives_the_same(index, stories, tmp_path, monkeypatch, step):
    tok, text, _, cb = stories
    monkeypatch.setattr(
        index_module,
        "_invert",
        functools.partial(index_module._invert, step=step if step > 1 else 2000),
    )
    if step == 1:
        monkeypatch.setattr(index_module, "_small", lambda n: np.uint32)  # as for many features
    streamed = build_index(cb, tok, text, folder=tmp_path / "i")
    for site in SITES:
        for name, array in index.arrays[site].items():
            assert np.array_equal(array, streamed.arrays[site][name]), (site, name)


# ---- building: streams, mistakes, interruptions
def test_a_stream_of_texts_is_one_text(index, stories, tmp_path):
    tok, text, _, cb = stories
    streamed = build_index(
        cb, tok, (text[i : i + 7] for i in range(0, 24, 7)), folder=tmp_path / "i"
    )
    for file in streamed.folder.iterdir():
        assert file.read_bytes() == (index.folder / file.name).read_bytes()


def test_memory_does_not_grow_with_the_text(stories, tmp_path, monkeypatch):
    """numpy's and Python's memory, for a text four times as long.

    Sorting is told to hold few at a time, as it would on a long one."""
    tok, text, _, _ = stories
    monkeypatch.setattr(index_module, "_invert", functools.partial(index_module._invert, step=4096))
    monkeypatch.setattr(
        index_module,
        "_features",
        lambda lenses, acts: {
            "resid.0": (
                (f := torch.randint(3000, (*acts["resid.0"].shape[:2], 8))),
                torch.rand(f.shape),
            )
        },
    )

    def peak(rows):
        gc.collect()
        tracemalloc.start()
        index = build_index(
            tiny,
            tok,
            (text[:8] for _ in range(rows // 8)),
            folder=tmp_path / "i",
            dictionaries={"resid.0": random_directions(3000, 96)},
            overwrite=True,
        )
        high = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(index.ids) == rows and index.sites["resid.0"]["active"] > 8 * 150 * rows
        return high

    tiny = load_lm("stories")[0]
    peak(16)
    few, many = peak(64), peak(256)
    held = 256 * 256 * 8 * 8  # what only the longer text's sorted positions would take, as int64
    assert many < few * 1.1 + 1e5 and many < held / 2, (few, many)


def test_a_builders_mistakes_are_named(index, stories, tmp_path):
    tok, text, _, cb = stories
    model, fits = cb.model, random_directions(5, 96)

    def fails(says, model=cb, text=text[:1], *, folder=tmp_path / "i", **kw):
        with pytest.raises(ValueError, match=says):
            build_index(model, tok, text, folder=folder, **kw)
        assert not folder.exists() or folder.name != "i"
        assert not list(tmp_path.glob("*.part"))

    fails(
        "GPTNeoXForCausalLM has no codebooks; expected a CodebookModel, or dictionaries",
        model=model,
    )
    fails("no site; expected dictionaries", dictionaries={})
    fails(
        "resid.0 has 96 numbers, its dictionary expects 64",
        dictionaries={"resid.0": random_directions(5, 64)},
    )
    fails(
        "expected site names as keys of dictionaries, got a pattern that means mlp.0",
        dictionaries={"mlp.*": fits},
    )
    fails("no site 'mlp.9'", dictionaries={"mlp.9": fits})
    fails("expected a Text or several, got Tensor", text=[text.ids])
    fails(
        "all texts need the same row length, bos and pad",
        text=[text[:1], Text(text.ids[:1, :100], 1, 0)],
    )
    fails(
        "the model reads 256 positions, the text has rows of 300",
        text=Text(torch.ones(1, 300, dtype=torch.long), 1, 0),
    )
    fails("the text is empty", text=[])
    fails("NaN", dictionaries={"resid.0": Directions(torch.full((2, 96), torch.nan))})
    fails(
        "there is an index in .*; open_index reads it, overwrite=True replaces it",
        folder=index.folder,
    )


def test_a_folder_that_is_no_index_is_left_alone(stories, tmp_path):
    tok, text, _, cb = stories
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is there and no index"):
        build_index(cb, tok, text[:1], folder=tmp_path / "mine", overwrite=True)
    assert not list(tmp_path.glob("*.part"))
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_error_on_the_way_leaves_the_old_index_and_nothing_half(stories, tmp_path, monkeypatch):
    tok, text, _, cb = stories
    old = build_index(cb, tok, text[:2], folder=tmp_path / "i")

    def breaks():
        yield text[:3]
        raise KeyboardInterrupt

    modes = []
    block = cb.codebooks["mlp.0"]
    handle = block.register_forward_pre_hook(lambda *_: modes.append(cb.training))
    cb.train()
    with pytest.raises(KeyboardInterrupt):
        build_index(cb, tok, breaks(), folder=tmp_path / "i", overwrite=True)
    handle.remove()
    assert cb.training and set(modes) == {False}
    cb.eval()  # dropout would make other features
    assert [p.name for p in tmp_path.iterdir()] == ["i"] and len(
        open_index(tmp_path / "i", tok).ids
    ) == 2
    assert (
        len(build_index(cb, tok, text[:3], folder=tmp_path / "i", overwrite=True).ids) == 3
        and len(old.ids) == 2
    )


def test_a_killed_build_is_told_and_can_be_run_again(stories, tmp_path):
    tok, text, _, cb = stories
    code = f"""
import os, signal
import codebook_tutorial
from codebook_tutorial.feature.indexing import build_index
from codebook_tutorial.world.concepts import story_text
from codebook_tutorial.dictionary.base import random_directions
from codebook_tutorial.model.hub import load_lm
(model, tok), (text, _) = load_lm('stories'), story_text(1024)
def stream(): yield text; os.kill(os.getpid(), signal.SIGKILL)
books = {{'mlp.1': random_directions(8, 96)}}
build_index(model, tok, stream(), folder={str(tmp_path / "i")!r}, dictionaries=books)"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True).returncode
        == -signal.SIGKILL
    )
    with pytest.raises(
        ValueError,
        match="no index in .*; build_index was interrupted: call it again",
    ):
        open_index(tmp_path / "i", tok)
    assert len(build_index(cb, tok, text[:2], folder=tmp_path / "i").ids) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["i"] and not list(
        (tmp_path / "i").glob("mlp.1*")
    )  # nothing of the first attempt


@pytest.mark.parametrize("file", ["index.json", "text.safetensors", "mlp.0.safetensors"])
@pytest.mark.parametrize("fault", ["gone", "cut", "longer", "garbage", "another's"])
def test_damage_is_named(index, stories, tmp_path, file, fault):
    tok, text, _, cb = stories
    shutil.copytree(index.folder, tmp_path / "i")
    path = tmp_path / "i" / file
    if fault == "gone":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif fault == "longer":
        path.write_bytes(path.read_bytes() + b"\0" * 8)
    elif fault == "garbage":
        path.write_bytes(b"\xff" * 100)
    else:
        path.write_bytes(
            (build_index(cb, tok, text[:2], folder=tmp_path / "other").folder / file).read_bytes()
        )
    says = (
        "no index in"
        if (file, fault) == ("index.json", "gone")
        else "is missing, damaged or cut short"
    )
    with pytest.raises(ValueError, match=says):
        open_index(tmp_path / "i", tok)


def test_another_tokenizer_is_refused(index, stories):
    tok = stories[0]
    other = load_lm("stories")[1]
    other.add_tokens(["zzz"])
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        open_index(index.folder, other)
    with pytest.raises(ValueError, match="no index in .*; build_index makes one"):
        open_index(index.folder / "x", tok)


# ---------------------------------------------------------------- tokens as text
def text_of(surface, ids, mask=None):
    ids = np.atleast_2d(ids)
    return surface.join(ids, np.ones(ids.shape, bool) if mask is None else mask)


def test_the_stories_text_is_what_decoding_gives(stories):
    tok, text, *_ = stories
    raw, starts, ends, begins = text_of(Surface(tok), text.ids.numpy(), text.mask.numpy())
    docs = [
        tok.decode([int(text.ids[p]) for p in places], clean_up_tokenization_spaces=False)
        for places in documents(text.ids, text.mask)
    ]
    assert [
        raw[a:b].decode() for a, b in itertools.pairwise([*starts[begins], len(raw)])
    ] == docs and len(docs) > 50
    assert (
        any("(" in d for d in docs)
        and any("“" in d for d in docs)
        and any("n't" in d for d in docs)
    )


@pytest.fixture(scope="module")
def byte_tok():
    "GPT-2's kind, with a token of its own for two spaces, as Pythia has."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        ["the cat saw the other cat"] * 9,
        trainers.BpeTrainer(
            vocab_size=270,
            special_tokens=["<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|end|>", pad_token="<|end|>")
    tok.add_tokens(["  "])
    return tok


MIXED = " the cat naïve 日本 👍🏽 the\n\n  end “the” \x7f ĠÄ"


def test_byte_level_text_keeps_every_byte(byte_tok):
    ids = byte_tok(MIXED)["input_ids"]
    raw, starts, ends, begins = text_of(Surface(byte_tok), ids)
    assert (
        raw.decode() == MIXED == byte_tok.decode(ids, clean_up_tokenization_spaces=False)
        and begins.tolist() == [0]
        and len(byte_tok) - 1 in ids
    )
    assert (starts[1:] == ends[:-1]).all()


def bytes_index(byte_tok, docs, length, *, tmp_path, **kw):
    "An index of a plain model without features to speak of, over this text."
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, n_positions=128)
    ).eval()
    text = Text(pack([byte_tok(d)["input_ids"] for d in docs], length, 0, pad=0, **kw), 0, 0)
    return build_index(
        model,
        byte_tok,
        text,
        folder=tmp_path / "i",
        dictionaries={"mlp.0": random_directions(2, 8)},
    ), text


def test_marks_on_parts_of_characters(byte_tok, tmp_path):
    index, text = bytes_index(byte_tok, [MIXED, "x日"], 100, tmp_path=tmp_path)
    pieces = Surface(byte_tok).pieces

    def got(pattern):
        return b"".join(pieces[index.ids[index.mark(pattern).numpy()]])

    assert (
        got("日") == "日".encode() * 2
        and got("本") == "本".encode()
        and got("ï(v)") == b"v"
        and got("👍") == "👍".encode()
        and got("(?<=👍).") == "🏽".encode()
    )
    assert (
        got(r"n(a.v)e") == "aïv".encode()
        and got(r"\n(\s+)e") == b"\n  "
        and got("“(the)”") == b"the"
        and got("Ġ") == "Ġ".encode()
    )
    assert int(index.mark("日").sum()) == 6  # three tokens each: all that overlap
    assert got("é") == b"" == got("\x80")


def test_a_character_cut_in_two_by_a_rows_end_is_no_character(byte_tok, tmp_path):
    ids = byte_tok("a日b")["input_ids"]
    assert len(ids) == 5
    index, _ = bytes_index(
        byte_tok, ["a日b", "a日b"], 3, tmp_path=tmp_path
    )  # BOS a \xe6 | \x97 \xa5 b | BOS a \xe6 | ...
    assert (
        not index.mark("日").any()
        and int(index.mark("b").sum()) == 2
        and int(index.mark("�").sum()) == 4  # what a row begins with does not count
    )


@pytest.mark.parametrize(
    "pattern",
    [
        r"\b(the)\b",
        r"\b[tT]he\b",
        r"[Tt]he (\w+)",
        r"“(.*?)”",
        r"\((.+?)\)",
        r"(\w+)n't",
        r"n't",
        r"\w+'s",
        r"(?i)\bs(he)\b",
        r"^(\w+)",
        r"(\W)$",
        r"e",
        r". (He|She) ",
        r"(\w+) \w+\.",
        r"(?:a|the) (?=dog)?",
        r"x*",
    ],
)
def test_marks_are_those_of_a_plain_loop(index, stories, pattern):
    tok, text, *_ = stories
    got, want = index.mark(pattern, chunk=7), naive_mark(tok, text, pattern)
    assert torch.equal(got, want) and (want.any() or pattern == "x*")
    assert not (got & ~text.mask).any()


def test_no_match_crosses_a_document_or_a_row(index, stories, byte_tok, tmp_path):
    tok, text, *_ = stories
    assert not index.mark(r"\.\s*\n?\s*(?:Once|This is) .*\. (?:Once) upon").any()
    starts = index.mark(r"^(\S)")
    assert torch.equal(starts, text.mask & (text.ids.roll(1, 1) == ID["<bos>"]))  # once a document
    whole = index.mark(r"(?s)(.*)")
    assert torch.equal(whole, text.mask)
    cut, _ = bytes_index(
        byte_tok, ["the cat the cat"], 3, tmp_path=tmp_path
    )  # one document over two rows
    assert (
        not cut.mark("the cat the").any()
        and cut.mark("the cat").any()
        and int(cut.mark("^.").sum()) == 2
    )


def test_patterns_that_are_none(index):
    for pattern, says in (
        (r"(", "is no regular expression: missing \\), unterminated subpattern at position 0"),
        (r"abc[", "at position 3"),
        (r"(a)(b)", "has 2 groups, expected one that marks"),
    ):
        for ask in (index.mark, index.search, index.best):
            with pytest.raises(ValueError, match=says):
                ask(pattern)
    with pytest.raises(ValueError, match="search: 'zebra crossing' marks no token of the text"):
        index.search("zebra crossing")
    assert index.mark(r"the|(quux)").sum() == 0  # a group that takes no part marks nothing


def test_functions_and_masks_ask_the_same(index, stories):
    _, text, *_ = stories
    want = index.mark(r"\bthe\b")
    assert torch.equal(index.mark(lambda words: [w.strip() == "the" for w in words], chunk=5), want)
    assert torch.equal(index.mark(text.ids == ID["the"]), want) and torch.equal(
        index.mark((text.ids == ID["the"]).numpy()), want
    )
    assert torch.equal(index.mark(text.ids >= 0), text.mask)  # BOS and padding are nobody's target
    sizes = []
    index.mark(lambda words: sizes.append(len(words)) or [True] * len(words))
    assert sizes == [len(d) for d in documents(text.ids, text.mask)]
    with pytest.raises(ValueError, match="expected one True or False for each of .* tokens, got 1"):
        index.mark(lambda words: [True])
    with pytest.raises(ValueError, match=r"expected a mask \[24, 256\], got \[24, 255\]"):
        index.mark(text.mask[:, 1:])


# ---------------------------------------------------------------- search
def naive_rows(active, marked, first=0, *, last=None):
    "{(site, feature): (hits, active, number marked)} over some positions."
    marked = marked.flatten().tolist()[first:last]
    out = {}
    for site, sets in active.items():
        for m, s in zip(marked, sets[first:last]):
            for f in s:
                h, a, _ = out.get((site, f), (0, 0, 0))
                out[site, f] = (h + m, a + 1, sum(marked))
    return out


@pytest.mark.parametrize(
    "pattern", [r"\b(the)\b", r"\b(dragon|castle|king|knight)s?\b", r"(\w+)", r"“(.*?)”"]
)
def test_precision_and_recall_are_those_of_a_plain_loop(index, stories, active, pattern):
    marked = naive_mark(stories[0], stories[1], pattern)
    names = ("precision", "recall", "f1", "hits", "active")
    want = {
        (*key, name): v
        for key, (h, a, m) in naive_rows(active, marked).items()
        if h / m > 0.01
        for name, v in zip(names, (h / a, h / m, 2 * h / (a + m), h, a))
    }
    found = index.search(pattern)
    assert {
        (r["site"], r["feature"], name): r[name] for r in found for name in names
    } == pytest.approx(want) and len(found) * 5 == len(want) > 15
    assert [r["precision"] for r in found] == sorted((r["precision"] for r in found), reverse=True)
    for r in found:
        assert (
            r["feature"] == 64 * r["group"] + r["id"]
            and 0 <= r["id"] < 64
            and (r["group"] == 0 or r["site"] == "heads.1")
        )
    assert any(r["group"] == 3 for r in index.search(r"(\w+)"))


def test_search_narrows_and_sorts(index):
    everything = index.search(r"\b(the)\b", min_recall=-1)
    assert len(everything) == sum(
        d["n_feats"] for d in index.sites.values()
    )  # also what is never active there
    narrow = index.search(r"\b(the)\b", min_recall=0.2, min_precision=0.1)
    assert narrow == [
        r for r in everything if r["recall"] > 0.2 and r["precision"] >= 0.1
    ] and 0 < len(narrow) < len(everything)
    for by in ("f1", "recall"):
        assert [r[by] for r in index.search("the", by=by)] == sorted(
            (r[by] for r in index.search("the", by=by)), reverse=True
        )
    few = {"mlp.0": np.arange(10), "heads.1": [200]}
    assert index.search(r"\b(the)\b", min_recall=-1, pool=few) == [
        r for r in everything if r["feature"] in few.get(r["site"], [])
    ]
    for pool, says in (
        ({"mlp.7": [1]}, "no site 'mlp.7' in this index"),
        ({"mlp.0": []}, "expected features of mlp.0 from 0 to 63"),
        ({"mlp.0": [3, 64]}, "got \\[3, 64\\]"),
    ):
        for ask in (index.search, index.best):
            with pytest.raises(ValueError, match=says):
                ask("the", pool=pool)
    assert index.search("the", pool={}) == []
    with pytest.raises(
        ValueError, match="search: by='best', expected 'precision', 'recall' or 'f1'"
    ):
        index.search("the", by="best")


@pytest.mark.parametrize("by", ["precision", "f1"])
def test_best_is_chosen_on_one_half_and_scored_on_the_other(index, stories, active, by):
    marked = index.mark(r"\b(the|a)\b")
    half, at = 12 * 256, dict(precision=0, recall=1, f1=2)[by]

    def score(h, a, m):
        return (h / a, h / m, 2 * h / (a + m))

    early, late = naive_rows(active, marked, 0, last=half), naive_rows(active, marked, half)
    got = index.best(marked, min_recall=0.05, by=by)
    assert sorted(r["site"] for r in got) == sorted(SITES)
    for r in got:
        own = {f: score(*v) for (site, f), v in early.items() if site == r["site"]}
        top = max(s[at] for s in own.values() if s[1] > 0.05)
        assert own[r["feature"]][at] == pytest.approx(top) == r["first_half"]
        assert (r["precision"], r["recall"], r["f1"]) == pytest.approx(
            score(*late[r["site"], r["feature"]])
        )
    assert [r["first_half"] for r in got] == sorted((r["first_half"] for r in got), reverse=True)
    other = marked.clone()
    other[12:] = stories[1].mask[12:] & ~marked[12:]  # another second half: the same choice
    assert [(r["site"], r["feature"], r["first_half"]) for r in index.best(other, 0.05, by)] == [
        (r["site"], r["feature"], r["first_half"]) for r in got
    ]
    alone = index.best(marked, 0.05, by, pool={got[0]["site"]: [3, got[0]["feature"]]})
    assert alone == got[:1]


def test_best_without_enough(index, stories):
    only = stories[1].mask.clone()
    only[12:] = False
    with pytest.raises(
        ValueError, match="marked tokens in the first half of the rows and 0 in the other"
    ):
        index.best(only)
    r = index.best(r"\b(the)\b", min_recall=1)[0]  # none reaches it: the highest recall
    early = index.mark(r"\b(the)\b").numpy().copy()
    early[12:] = False
    at = np.flatnonzero(early)
    assert index.hits(r["site"], at)[r["feature"]] == max(index.hits(s, at).max() for s in SITES)


def test_hits_in_many_pieces_are_the_same(index, monkeypatch):
    at = np.flatnonzero(index.mask)
    assert (
        index.hits("mlp.0", at).tolist() == index.active("mlp.0").tolist()
        and index.hits("mlp.0", at[:0]).sum() == 0
    )
    split = np.array_split
    monkeypatch.setattr(np, "array_split", lambda a, n: split(a, 37))
    assert index.hits("mlp.0", at).tolist() == index.active("mlp.0").tolist()


def test_pools(index):
    places = {
        s: np.repeat(np.arange(index.sites[s]["n_feats"]), index.active(s)) for s in SITES
    }  # feature of every entry of the store by code
    first = {
        s: places[s][index.arrays[s]["positions"] < len(index.mask) // 2 * index.mask.shape[1]]
        for s in SITES
    }
    active = {
        (s, f): int((first[s] == f).sum()) for s in SITES for f in range(index.sites[s]["n_feats"])
    }
    used, drawn = index.pool(40, "used"), index.pool(40, seed=1)
    assert sum(map(len, used.values())) == sum(map(len, drawn.values())) == 40
    assert (
        sorted(active[s, f] for s, fs in used.items() for f in fs) == sorted(active.values())[-40:]
    )
    assert (
        all(active[s, f] for s, fs in drawn.items() for f in fs)
        and len({(s, f) for s, fs in drawn.items() for f in fs}) == 40
    )
    assert str(index.pool(40, seed=1)) == str(drawn) != str(index.pool(40, seed=2))
    with pytest.raises(ValueError, match="asked for 9999 features, only"):
        index.pool(9999)
    with pytest.raises(ValueError, match="by='best'"):
        index.pool(3, "best")


# ---------------------------------------------------------------- neurons
@pytest.mark.parametrize("kind", ["smooth", "cut at zero", "coarse"])
def test_units_agree_with_the_sorted_search(kind):
    g, n, n_labels = seeded(0), 8000, 30
    labels = torch.where(
        torch.rand(n, generator=g) < 0.6, torch.randint(n_labels, (n,), generator=g), -1
    )
    sign = torch.randint(2, (n_labels, 40), generator=g) * 2 - 1
    acts = torch.randn(n, 40, generator=g)
    for label in range(n_labels):
        acts[labels == label, label] += (
            3.0 * sign[label, label]
        )  # one unit knows a label, up or down
    acts[labels == 4] += 2
    if kind == "cut at zero":
        acts = acts.relu()
    if kind == "coarse":
        acts = acts.round()
    for share in (0.05, 0.3, 0.9):
        recall = torch.full((n_labels,), share)
        want = neuron_precision(acts, labels, recall, n_labels=n_labels)
        got = unit_scores(
            acts,
            torch.nn.functional.one_hot(labels + 1, n_labels + 1)[:, 1:].bool(),
            recall[None],
            half=n // 2,
        )[0]
        diff = np.abs(got["precision"] - want.numpy())
        assert diff.mean() < 0.012 and np.median(diff) < 1e-6, (kind, share, diff)
        if kind == "smooth":
            assert abs(got["recall"].mean() - share) < 0.1
        if kind == "smooth" and share == 0.3:
            assert (
                np.mean(got["unit"] == [l if sign[l, l] > 0 else l + 40 for l in range(n_labels)])
                > 0.8
                and got["precision"].mean() > 0.5
            )


def test_the_unit_for_a_rare_concept_is_found():
    """Twenty-five tokens of 2500: one unit knows them, another takes a hundred for them,
    which bins of equal width could not tell."""
    g = seeded(2)
    order = torch.cat(
        [torch.randperm(2500, generator=g), 2500 + torch.randperm(2500, generator=g)]
    ).view(2, -1)
    truth, wide = torch.zeros(5000, 1, dtype=torch.bool), torch.zeros(5000)
    truth[order[:, :25]], wide[order[:, :100]] = True, 1
    acts = torch.randn(5000, 2, generator=g)
    acts[:, 0] += 20 * wide
    acts[:, 1] += 20 * truth[:, 0]
    for turn in (1, -1):
        got = unit_scores(turn * acts, truth, [[0.9]], half=2500)[0]
        assert got["unit"][0] % 2 == 1 and got["precision"][0] == 1


def test_units_are_chosen_on_the_first_half():
    g = seeded(1)
    truth = torch.rand(4000, 1, generator=g) < 0.1
    acts = torch.randn(4000, 6, generator=g)
    acts[:2000, 2] += 4 * truth[:2000, 0]
    acts[2000:, 3] += 9 * truth[2000:, 0]  # unit 2 knows in the first half, unit 3 in the second
    got = unit_scores(acts, truth, [[0.5]], half=2000)[0]
    assert got["unit"] == [2] and got["precision"][0] < 0.3
    down = unit_scores(-acts, truth, [[0.5]], half=2000)[0]
    assert down["unit"] == [2 + 6] and down["precision"][0] == got["precision"][0]


def test_neuron_acts_are_the_models_own(stories):
    _, text, _, cb = stories
    with cb.bypass():
        got = neuron_acts(cb, text[:3], batch=2)
        with capture(cb, "neurons.*") as acts, torch.no_grad():
            cb(input_ids=text[:3].ids)
        want = torch.cat([acts[f"neurons.{i}"] for i in range(3)], -1)[text[:3].mask]
    assert got.shape == (text[:3].n_tokens, 3 * 384) and torch.allclose(got, want, atol=1e-5)


def held_and_neurons(text, active):
    "What holds where, and five neurons, of which one follows `the`."
    held = {
        "the code itself": torch.tensor([17 in s for s in active["mlp.2"]]).view(24, 256),
        "the": text.ids == ID["the"],
        "nobody": torch.zeros(24, 256, dtype=torch.bool),
    }
    held["in one half"] = held["the"].clone()
    held["in one half"][12:] = False
    acts = torch.randn(text.n_tokens, 5, generator=seeded(0))
    acts[:, 1] -= 9 * held["the"][text.mask]
    return held, acts


def test_codes_against_neurons(index, stories, active):
    _, text, facts, _ = stories
    held, acts = held_and_neurons(text, active)
    got = against_neurons(index, acts, torch.stack(list(held.values()), -1), min_recall=0.05)
    assert (
        got["skipped"] == 2
        and np.isnan(got["precision_codes"]).tolist()
        == [False, False, True, True]
        == np.isnan(got["precision_neurons"]).tolist()
    )
    assert got["precision_codes"][0] == got["recall_codes"][0] == 1 and (
        got["site"][0],
        got["feature"][0],
    ) == ("mlp.2", 17)
    assert (
        got["unit"].tolist()[1:] == [1 + 5, -1, -1]
        and got["precision_neurons"][1] == 1
        and got["precision_neurons"][0] < 0.3
    )
    assert (
        abs(got["recall_neurons"][1] - got["recall_chosen"][1]) < 0.15
    )  # matched on the first half, near it on the other
    for c, mask in enumerate(list(held.values())[:2]):
        r = index.best(mask, 0.05)[0]
        assert (got["site"][c], got["feature"][c]) == (r["site"], r["feature"]) and (
            got["precision_codes"][c],
            got["recall_codes"][c],
        ) == pytest.approx((r["precision"], r["recall"]))


def test_codes_of_a_pool_against_neurons(index, stories, active):
    held, acts = held_and_neurons(stories[1], active)
    got = against_neurons(index, acts, torch.stack(list(held.values()), -1), min_recall=0.05)
    few = against_neurons(
        index, acts, torch.stack(list(held.values()), -1), pool={"heads.1": [3, 4]}
    )
    both = against_neurons(
        index,
        acts,
        torch.stack(list(held.values()), -1),
        pool=[{"heads.1": [3, 4]}, None],
        min_recall=0.05,
    )
    assert (
        len(both) == 2
        and all(
            np.array_equal(both[1][k], got[k], equal_nan=k.startswith(("precision", "recall")))
            for k in got
        )
        and set(both[0]["site"]) <= {"heads.1", ""}
    )
    assert (
        abs(few["recall_neurons"][1] - few["recall_chosen"][1]) < 0.15
        and few["recall_chosen"][1] < 0.6
    )
    assert set(few["site"][:2]) == {"heads.1"} and set(few["feature"][:2]) <= {3, 4}


def test_many_concepts_on_the_first_rows(index, stories):
    _, text, facts, _ = stories
    truth = atoms(facts[:10])
    got = against_neurons(
        index, torch.randn(text[:10].n_tokens, 4, generator=seeded(0)), truth, by="f1"
    )
    n = truth[:5][text.mask[:5]].sum(0), truth[5:][text.mask[5:10]].sum(0)
    assert (
        got["skipped"]
        == int((torch.minimum(*n) < 20).sum())
        == np.isnan(got["precision_codes"]).sum()
        > 100
    )
    assert (
        np.isfinite(got["precision_codes"]).sum() > 80
        and np.nanmean(got["precision_codes"]) > np.nanmean(got["precision_neurons"]) + 0.1
    )  # these units know nothing
    with pytest.raises(
        ValueError, match=f"these 10 rows have {text[:10].n_tokens} ordinary tokens, acts are of 7"
    ):
        against_neurons(index, torch.randn(7, 4), truth)
    with pytest.raises(
        ValueError, match=r"expected truth \[rows, 256, n_concepts\] for at most 24 rows"
    ):
        against_neurons(index, torch.randn(7, 4), truth[:, :5])


# ---------------------------------------------------------------- contexts and neighbours
def check_window(w, f, text, *, active):
    "Inside its document, at most six tokens before and three behind, and all of those."
    span = range(w["begin"], w["begin"] + len(w["words"]))
    assert (
        w["at"] in span
        and w["at"] - w["begin"] <= 6
        and span[-1] - w["at"] <= 3
        and text.mask[w["row"], list(span)].all()
    )
    assert [v.strip() for v in w["words"]] == [
        VOCABULARY[i] for i in text.ids[w["row"], list(span)]
    ]
    assert (
        w["values"] == [float(f in active[256 * w["row"] + t]) for t in span]
        and w["values"][w["at"] - w["begin"]] == 1
    )
    for t, edge in ((span[0] - 1, w["at"] - 6), (span[-1] + 1, w["at"] + 4)):
        assert t in (edge - 1, edge) or not 0 <= t < 256 or not text.mask[w["row"], t]


def test_contexts_lie_inside_documents_and_show_what_is_active(index, stories, active):
    tok, text, *_ = stories
    f = int(index.active("mlp.2").argmax())
    found = index.windows("mlp.2", f, n=99, before=6, after=3)
    assert (
        len({w["row"] for w in found})
        == len(found)
        == len({i // 256 for i, fs in enumerate(active["mlp.2"]) if f in fs})
        > 20
        and len(index.windows("mlp.2", f, n=10)) == 10
    )
    for w in (
        w
        for seed in range(9)
        for w in index.windows("mlp.2", f, n=99, before=6, after=3, seed=seed)
    ):
        check_window(w, f, text, active=active["mlp.2"])
    assert any(len(w["words"]) < 10 for w in index.windows("mlp.2", f, n=24, before=6, after=3))
    assert (
        index.windows("mlp.2", f, seed=0)
        == index.windows("mlp.2", f)
        != index.windows("mlp.2", f, seed=1)
    )
    shown = index.contexts("mlp.2", f, n=2)
    assert (
        shown.source.count("<div") == 2
        and repr(shown).count("\n") == 1
        and f"mlp.2 feature {f}, row" in repr(shown)
    )


def test_contexts_of_nothing(index):
    for site, f, says in (
        ("mlp.7", 0, "no site 'mlp.7' in this index; there are mlp.0"),
        ("mlp.0", 64, "mlp.0 has features 0 to 63, got 64"),
        ("mlp.0", -1, "got -1"),
    ):
        with pytest.raises(ValueError, match=says):
            index.contexts(site, f)
    site, f = next(
        (s, f) for s in ("heads.1", "mlp.0", "mlp.2") for f in range(64) if index.active(s)[f] == 0
    )
    with pytest.raises(ValueError, match=f"feature {f} of {site} is never active"):
        index.contexts(site, f)


def test_markup_in_the_text_is_shown_as_text(byte_tok, tmp_path):
    index, _ = bytes_index(
        byte_tok, ["<script>window.hacked=1</script> & more"], 60, tmp_path=tmp_path
    )
    source = index.contexts("mlp.0", 0, before=60, after=60).source
    assert "<script" not in source and source.count("&lt;") == 2 and "&amp;" in source


def test_nearest_directions(stories):
    book = stories[3].codebooks["mlp.0"]
    w = book.weight.detach()[0]
    cosine = [float(torch.cosine_similarity(w[5], w[j], dim=0)) for j in range(64)]
    want = sorted((j for j in range(64) if j != 5), key=lambda j: -cosine[j])[:4]
    got = nearest_features(book, 5, n=4)
    assert [r["feature"] for r in got] == want and [r["cosine"] for r in got] == pytest.approx(
        [cosine[j] for j in want], abs=1e-5
    )
    assert all(
        64 <= r["feature"] < 128 for r in nearest_features(stories[3].codebooks["heads.1"], 70, n=3)
    )  # of its own head
    assert len(nearest_features(random_directions(3, 8), 0, n=9)) == 2
    with pytest.raises(ValueError, match="expected a feature from 0 to 63, got 64"):
        nearest_features(book, 64)


@pytest.mark.parametrize(
    "a,b,rows", [("mlp.0", "mlp.2", None), ("mlp.2", "mlp.2", None), ("mlp.0", "heads.1", 9)]
)
def test_shared_codes_are_those_of_a_plain_loop(index, active, a, b, rows):
    upto = (rows or 24) * 256

    def where_of(s):
        return {
            f: {i for i, fs in enumerate(active[s][:upto]) if f in fs}
            for f in range(index.sites[s]["n_feats"])
        }

    where = {s: where_of(s) for s in {a, b}}
    want = sorted(
        (
            len(p & q) / len(p | q)
            for f, p in where[a].items()
            for g, q in where[b].items()
            if len(p) >= 20 <= len(q) and (a != b or f < g)
        ),
        reverse=True,
    )[:6]
    got = shared(index, a, b, n=6, rows=rows)
    assert [r["jaccard"] for r in got] == pytest.approx(want)
    for r in got:
        p, q = where[a][r["a"]], where[b][r["b"]]
        assert (
            r["both"] == len(p & q)
            and r["jaccard"] == pytest.approx(len(p & q) / len(p | q))
            and 0 <= r["shuffled"] < r["jaccard"]
        )
    assert (
        shared(index, a, b, n=6, rows=rows) == got
        and shared(index, a, b, n=6, rows=rows, seed=5) != got
    )


def test_scores_of_nothing_are_zero():
    assert {k: float(v) for k, v in scores(0, 0, 0).items()} == dict(precision=0, recall=0, f1=0)


# ---------------------------------------------------------------- a real model
@pytest.mark.real
@pytest.mark.skipif(
    not STORIES260K.exists(), reason=f"no real model at {STORIES260K}; set COURSE_SHARED"
)
def shared_stories(tok):
    stories = ["The naïve 日本 dog said: “Hi!”\nHe didn't 👍."] + json.loads(
        (SHARED / "text" / "tinystories.json").read_text()
    )[:12]
    return Text(
        pack(
            [tok(s, add_special_tokens=False)["input_ids"] for s in stories],
            128,
            tok.bos_token_id,
            pad=tok.pad_token_id,
        ),
        tok.bos_token_id,
        tok.pad_token_id,
    )


def test_a_sentencepiece_model_and_text_with_bytes(tmp_path):
    model, tok = load_lm(str(STORIES260K))
    text = shared_stories(tok)
    cb = (
        add_codebooks(model, "mlp.*", n_codes=32)
        .eval()
        .init_from_data(text[:4].ids, 2, generator=seeded(0))
    )
    index = build_index(cb, tok, text, folder=tmp_path / "i")
    raw, starts, ends, begins = index.surface.join(index.ids, index.mask)
    docs = [
        tok.decode([int(text.ids[p]) for p in places], clean_up_tokenization_spaces=False)
        for places in documents(text.ids, text.mask)
    ]
    assert [
        raw[a:b].decode(errors="replace")
        for a, b in itertools.pairwise([*starts[begins], len(raw)])
    ] == docs
    for pattern in (r"\b([Tt]he)\b", r"(\w+)\.", r"said"):
        assert torch.equal(index.mark(pattern), naive_mark(tok, text, pattern))
    got = b"".join(index.surface.pieces[index.ids[index.mark("日").numpy()]])
    assert (
        got == "日".encode()
        and int(index.mark("日").sum()) == 3
        and index.mark("didn't 👍").sum() > 4
    )
    with pytest.raises(ValueError, match="another tokenizer"):
        open_index(index.folder, load_lm("stories")[1])
    best = index.search(r"\b([Tt]he)\b", by="f1")[0]
    assert best["f1"] > 0.3  # some code stands for so frequent a word
