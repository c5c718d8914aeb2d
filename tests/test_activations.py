"""Harvested activations: against capture and plain loops, killed and taken up again,
in several processes, under faults, and read back in random order."""

import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import codebook_tutorial.dictionary.harvest as activations
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary import store as stores
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.store import open_activations
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.model.text import Text, load_text, pack

SMALL = dict(vocab_size=50, bos_token_id=0, eos_token_id=0)
CONFIGS = {
    "gpt2": ("GPT2Config", dict(n_embd=32, n_layer=2, n_head=2, n_positions=32)),
    "neo": (
        "GPTNeoConfig",
        dict(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global"], 2]],
            max_position_embeddings=32,
        ),
    ),
    "neox": (
        "GPTNeoXConfig",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        ),
    ),
    "llama": (
        "LlamaConfig",
        dict(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=48,
            max_position_embeddings=32,
        ),
    ),
}
SITES, FOUR = ["resid.1", "neurons.0"], ["resid.0", "mlp.1", "heads.1", "neurons.0"]


def tiny(family="neox"):
    import transformers  # seconds, which the processes below do without

    torch.manual_seed(0)
    kind, config = CONFIGS[family]
    return transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, kind)(**config, **SMALL)
    ).eval()


class Plain(torch.nn.Module):
    "Two blocks under GPT-2's names; a token sees the mean of those before it."

    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_proj = torch.nn.Linear(32, 32)

        def forward(self, x):
            return self.c_proj(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])

    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.c_fc, self.c_proj = torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

        def forward(self, x):
            return self.c_proj(torch.nn.functional.gelu(self.c_fc(x)))

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.mlp = Plain.Mean(), Plain.MLP()

        def forward(self, x):
            x = x + self.attn(x)
            return x + self.mlp(x)

    def __init__(self, seed=0, name=""):
        super().__init__()
        torch.manual_seed(seed)
        self.config, self.wte, self.h = (
            SimpleNamespace(name_or_path=name),
            torch.nn.Embedding(50, 32),
            torch.nn.ModuleList([Plain.Block(), Plain.Block()]),
        )

    def forward(self, input_ids, use_cache=False):
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x)
        return x


def some_text(rows=14, length=16, pad=1, *, seed=0):
    """Documents cut into rows, so that rows begin in their middle.

    Every third row ends in padding; the pad token also stands inside."""
    draw = seeded(seed)
    docs = [
        torch.randint(1, 50, (int(n),), generator=draw).tolist()
        for n in torch.randint(3, 20, (rows * 2,), generator=draw)
    ]
    ids = pack(docs, length, 0, pad=pad)[:rows]
    for row in range(0, rows, 3):
        ids[row, length - 1 - row % 5 :] = pad
    ids[1, 4] = 1
    return Text(ids, 0, pad)


def make(folder, model=None, text=None, **kw):
    "A store of five shards, the last a smaller one."
    return harvest(
        model or Plain(),
        text or some_text(),
        **dict(sites=SITES, folder=folder, shard=50, batch=2, verbose=False) | kw,
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def ordinary(text):
    "(row, position, document) of every ordinary token but a row's first, by a plain loop."
    found, document = [], -1
    for r, ids in enumerate(text.ids.tolist()):
        end = len(ids)
        while end and ids[end - 1] == text.pad:
            end -= 1
        for p, token in enumerate(ids):
            document += token == text.bos
            if token != text.bos and 0 < p < end:
                found.append((r, p, max(document, 0)))
    return found


def captured(model, text, sites, *, batch, k):
    "What capture itself reads in the whole model, in the same passes."
    kept = {site: [] for site in sites}
    for part in (
        span[i : i + batch]
        for span in (text[j : j + k] for j in range(0, len(text), k))
        for i in range(0, len(span), batch)
    ):
        with capture(model, sites) as acts, torch.no_grad():
            model(input_ids=part.ids)
        for site in sites:
            kept[site].append(acts[site][part.mask])
    return {site: torch.cat(parts) for site, parts in kept.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of an undisturbed run. Not to be changed."
    return make(tmp_path_factory.mktemp("whole") / "acts").folder


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copy"))


# ---- what is written ---------------------------------------------------------------------------
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_what_capture_reads(tmp_path, family, dtype):
    text, model = some_text(), tiny(family)
    store, want = (
        make(
            tmp_path / "a",
            model,
            text,
            sites=["resid.0", "mlp.1", "heads.*", "neurons.0"],
            dtype=dtype,
        ),
        captured(model, text, [*FOUR, "heads.0"], batch=2, k=3),
    )
    assert store.sites == {
        "resid.0": 32,
        "mlp.1": 32,
        "heads.0": 32,
        "heads.1": 32,
        "neurons.0": dict(gpt2=128, neo=128, neox=64, llama=48)[family],
    }
    for site in store.sites:
        got = store.load(site)
        assert (
            got.dtype == torch.float32
            and torch.equal(got, want[site].to(dtype).float())
            and got.std() > 1e-4
        )
        assert load_file(tmp_path / "a" / "shard-00001.safetensors")[site].dtype == dtype


@pytest.mark.parametrize("pad", [1, 0])  # 0: GPT-2 pads with its BOS
def test_tokens_rows_positions_and_documents(tmp_path, pad):
    text = some_text(pad=pad)
    store, want = make(tmp_path / "a", text=text), ordinary(text)
    assert (
        len(store) == store.n == text.n_tokens == len(want) < text.ids.numel()
        and store.info["shards"] == len(store.shards) == 5
    )
    assert (
        list(zip(store.row.tolist(), store.position.tolist(), store.document.tolist(), strict=True))
        == want
    )
    assert (
        store.ids.tolist() == [int(text.ids[r, p]) for r, p, _ in want]
        and 0 not in store.ids
        and {x.dtype for x in (store.ids, store.row, store.position, store.document)}
        == {torch.int32}
    )
    assert (
        len(store.document.unique()) > 5 and (store.ids == 1).any()
    )  # the pad token inside a row is an ordinary one
    assert (
        store.ids is store.ids
        and f"Activations: {store.n} tokens in 5 shards, float16; resid.1 (32), neurons.0 (64)"
        == repr(store)
    )
    assert torch.equal(store.load("resid.1", 60), store.load("resid.1")[:60]) and store.load(
        "resid.1", 0
    ).shape == (0, 32)


def test_rows_without_ordinary_tokens_and_a_text_that_begins_without_bos(tmp_path):
    text = some_text()
    text.ids[3:6] = 1
    text.ids[0, 0] = 5  # a whole shard of padding
    store = make(tmp_path / "a", text=text)
    assert [n for _, n in store.shards][1] == 0 and store.document[0] == 0
    assert list(
        zip(store.row.tolist(), store.position.tolist(), store.document.tolist(), strict=True)
    ) == ordinary(text)
    assert sorted(torch.cat(list(store.batches("resid.1", 7))).tolist()) == sorted(
        store.load("resid.1").tolist()
    )


def test_a_folder_holds_safetensors_and_json(whole):
    assert sorted(contents(whole)) == sorted(
        [
            "activations.json",
            *(f"shard-{i:05d}.{kind}" for i in range(5) for kind in ("json", "safetensors")),
        ]
    )
    assert len({p.stat().st_mode for p in whole.iterdir()}) == 1  # who may read one may read all
    info, note = (
        json.loads((whole / "activations.json").read_text()),
        json.loads((whole / "shard-00004.json").read_text()),
    )
    assert (
        info
        | dict(
            format=1,
            dtype="float16",
            rows=14,
            length=16,
            bos=0,
            pad=1,
            rows_a_shard=3,
            tokens=some_text().n_tokens,
            sites={"resid.1": 32, "neurons.0": 64},
        )
        == info
    )
    assert note["rows"] == 2 and note["n"] == some_text()[12:].n_tokens
    assert load_file(whole / "shard-00004.safetensors").keys() == {
        *SITES,
        "ids",
        "document",
        "row",
        "position",
    }


def test_the_model_is_left_as_it_was_and_runs_in_eval_mode_without_its_head(tmp_path):
    model = tiny("gpt2")
    want = make(tmp_path / "eval", model)

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    model.train()
    heads = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *a: heads.append(1))
    got = make(tmp_path / "train", model)  # with dropout of 0.1
    assert len(heads) == 1  # that of site_dims
    handle.remove()
    assert model.training and not hooks() and torch.equal(got.load("resid.1"), want.load("resid.1"))
    assert not torch.distributed.is_initialized()


def test_codebooks_are_seen_and_a_model_without_head_will_do(tmp_path):
    text, model = some_text(), tiny()
    plain = make(tmp_path / "plain", model, text)
    assert torch.equal(
        make(tmp_path / "base", model.base_model, text).load("resid.1"), plain.load("resid.1")
    )
    cb = add_codebooks(model, ["mlp.0", "resid.1"], n_codes=4, k=1)
    store = make(tmp_path / "codes", cb, text, dtype=torch.float32)
    assert torch.equal(
        store.load("resid.1"), captured(cb, text, ["resid.1"], batch=2, k=3)["resid.1"]
    )
    assert len(store.load("resid.1").unique(dim=0)) <= 4 < len(plain.load("resid.1").unique(dim=0))


def test_shipped_model(tmp_path, capsys):
    model, tok = load_lm("stories")
    text = load_text(tok, n_tokens=24 * 128, length=128)
    capsys.readouterr()
    store = harvest(model, text, ["resid.*", "heads.1"], folder=tmp_path / "a", shard=1000)
    said, want = (
        capsys.readouterr().out,
        captured(model, text, ["resid.2", "heads.1"], batch=16, k=7),
    )
    assert len(store.shards) == 4 and all(
        torch.equal(store.load(site), want[site].half().float()) for site in want
    )
    assert store.ids.tolist() == text.ids[text.mask].tolist() and not {
        tok.bos_token_id,
        tok.pad_token_id,
    } & set(store.ids.tolist())
    assert list(
        zip(store.row.tolist(), store.position.tolist(), store.document.tolist(), strict=True)
    ) == ordinary(text)
    size = sum(p.stat().st_size for p in tmp_path.rglob("*.safetensors"))
    assert said.count("\n") == 1 and said.startswith(
        f"harvest: {text.n_tokens:,} tokens x 4 sites (resid.0 96, resid.1 96, resid.2 96, heads.1 "
        f"96), float16: "
    )
    assert "in 4 shards, at most " in said and float(
        said.split(": ")[2].split(" MB")[0]
    ) == pytest.approx(size / 1e6, abs=0.06)


def test_no_more_than_one_shard_is_held(tmp_path, monkeypatch):
    seen, save = [], activations._save

    def spy(folder, i, tensors, *, info):
        assert all(ref() is None for ref in seen)
        seen.extend(weakref.ref(x) for x in tensors.values())
        return save(folder, i, tensors, info=info)

    monkeypatch.setattr(activations, "_save", spy)
    make(tmp_path / "a")
    assert len(seen) == 5 * 6


# ---- interrupted -------------------------------------------------------------------------------
KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from test_activations import *
def die(): os.kill(os.getpid(), signal.SIGKILL)
save, write, rows = activations.save_file, activations.write_json, activations._harvest_rows
def in_a_shard(model, text, first, **kw):
    return rows(model, text, first, **kw) if first < 6 else die()
def in_a_file(tensors, path):
    save(tensors, path)
    if "00002" in path.name:
        os.truncate(path, path.stat().st_size // 2)
        Path(path.parent, ".tmpA1b2C3").write_bytes(b"half")
        die()
def before(name): return lambda path, info: die() if path.name == name else write(path, info)
def at_the_start(path, info):
    path.parent.mkdir()
    Path(str(path) + ".part").write_text("half")
    die()
cases = {{
    "in a shard": ("_harvest_rows", in_a_shard),
    "in a file": ("save_file", in_a_file),
    "before the json": ("write_json", before("shard-00002.json")),
    "at the start": ("write_json", at_the_start),
}}
for case, (name, fn) in cases.items():
    if not (child := os.fork()):
        setattr(activations, name, fn)
        make(Path({folder!r}) / case)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
"""
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "COURSE_DEVICE": "cpu"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "Folders of harvests that were killed, each in a process of its own."
    folder = tmp_path_factory.mktemp("killed")
    got = subprocess.run(
        [
            sys.executable,
            "-c",
            KILLED.format(path=[str(Path(__file__).parent)], folder=str(folder)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENV,
    )
    assert got.returncode == 0, got.stderr[-2000:]
    return folder


@pytest.mark.parametrize(
    "case,done", [("in a shard", 2), ("in a file", 2), ("before the json", 2), ("at the start", 0)]
)
def test_killed_and_called_again_it_ends_with_the_same_files(killed, whole, capsys, case, done):
    folder = killed / case
    finished = [folder / f"shard-{i:05d}.safetensors" for i in range(done)]
    assert len(list(folder.glob("shard-*.json"))) == done and (
        case != "in a file"
        or (folder / ".tmpA1b2C3").exists()
        and len(list(folder.glob("*.part"))) == 1
    )
    with pytest.raises(
        ValueError,
        match="3 of 5 shards are missing .*shard-00002.* call harvest again"
        if done
        else "no activations in",
    ):
        open_activations(folder)
    assert (folder / "shard-00002.safetensors").exists() == (case == "before the json")
    before = [(p.stat().st_mtime_ns, p.stat().st_ino) for p in finished]
    make(folder, verbose=True)
    assert (f"; {done} of the shards are there" in capsys.readouterr().out) == (done > 0)
    assert [(p.stat().st_mtime_ns, p.stat().st_ino) for p in finished] == before
    assert contents(folder) == contents(whole)


def test_a_finished_harvest_runs_nothing(copy, monkeypatch):
    monkeypatch.setattr(activations, "_harvest_rows", None)
    assert make(copy).n == some_text().n_tokens


def test_two_processes_make_what_one_does(tmp_path, whole):
    (tmp_path / "run.py").write_text(f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}
import torch; torch.set_num_threads(1)
from test_activations import *
save, rank = activations._save, os.environ["RANK"]
folder = Path({str(tmp_path)!r})
def spy(part, i, tensors, *, info):
    save(part, i, tensors, info=info)
    print(f"rank {{rank}} made {{i}};", file=open(folder / f"made-{{rank}}", "a"))
activations._save = spy
(folder / f"tokens-{{rank}}").write_text(str(make(folder / "acts").n))
""")
    got = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-port",
            "0",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            "--rdzv-backend",
            "c10d",
            str(tmp_path / "run.py"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=ENV,
    )
    assert got.returncode == 0, got.stderr[-2000:]
    assert [(tmp_path / f"tokens-{r}").read_text() for r in "01"] == [str(some_text().n_tokens)] * 2
    assert [(tmp_path / f"made-{r}").read_text().split(";\n")[:-1] for r in "01"] == [
        [f"rank 0 made {i}" for i in (0, 2, 4)],
        [f"rank 1 made {i}" for i in (1, 3)],
    ]
    assert contents(tmp_path / "acts") == contents(whole)


# ---- faults ------------------------------------------------------------------------------------
def test_a_disk_that_fills_up(tmp_path, whole, monkeypatch):
    def full(tensors, path):
        save(tensors, path)
        if "00002" in path.name:
            os.truncate(path, path.stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device")

    save = activations.save_file
    with monkeypatch.context() as m:
        m.setattr(activations, "save_file", full)
        with pytest.raises(
            OSError,
            match=r"shard-00002.* could not be written \(.*No space left.*2 of 5 shards are in "
            r".*call harvest again",
        ):
            make(tmp_path / "a")
    assert set(contents(tmp_path / "a")) == {
        "activations.json",
        *(f"shard-{i:05d}.{kind}" for i in (0, 1) for kind in ("json", "safetensors")),
    }
    make(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole)


def test_a_file_that_the_system_refuses(tmp_path, whole):
    "The kernel's own error, through safetensors."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(OSError, match="shard-00000.* could not be written .*0 of 5 shards"):
            make(tmp_path / "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(contents(tmp_path / "a")) == {"activations.json"}
    make(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(whole)


def test_too_little_room_is_seen_before_anything_is_made(copy, tmp_path, monkeypatch):
    def room(free):
        return monkeypatch.setattr(
            shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - free, free)
        )

    room(20_000)
    with pytest.raises(
        OSError, match=r"harvest: 0\.\d MB are needed in .*, the disk has 0\.0 MB left"
    ):
        make(tmp_path / "deep" / "a")
    assert not (tmp_path / "deep").exists()
    for i in (0, 3):
        (copy / f"shard-{i:05d}.json").unlink()
    kept = contents(copy)
    room(10_000)
    with pytest.raises(OSError, match="are needed"):
        make(copy)
    assert contents(copy) == kept
    room(20_000)  # what is there needs no more room
    assert make(copy).n == make(copy, overwrite=True).n


@pytest.mark.parametrize(
    "value,dtype,says",
    [
        (float("nan"), torch.float32, "NaN or infinity"),
        (float("-inf"), torch.bfloat16, "NaN or infinity"),
        (1e5, torch.float16, "too large for torch.float16: use bfloat16 or float32"),
        (3.4e38, torch.bfloat16, "too large for torch.bfloat16: use float32"),
    ],
)
def test_numbers_that_are_not_finite_are_named(tmp_path, value, dtype, says):
    text, seen = some_text(), [0]
    row, position = next((r, p) for r, p, _ in ordinary(text) if r == 5 and p > 5)

    def spoil(x, at):
        if x.shape[1] == 1:
            return None  # site_dims
        first, x = seen[0], x.clone()
        seen[0] += len(x)
        if first <= at[0] < first + len(x):
            x[at[0] - first, at[1], 3] = value
        return x

    model = Plain()
    with (
        intervene(model, {"neurons.0": lambda x: spoil(x, (row, position))}),
        pytest.raises(
            ValueError, match=f"harvest: neurons.0 at row {row}, position {position} holds .*{says}"
        ),
    ):
        make(tmp_path / "a", model, text, dtype=dtype, sites=["neurons.0"])
    assert set(contents(tmp_path / "a")) == {
        "activations.json",
        "shard-00000.json",
        "shard-00000.safetensors",
    }
    seen[0] = 0
    with intervene(model, {"neurons.0": lambda x: spoil(x, (0, 0))}):
        make(
            tmp_path / "b", model, text, dtype=dtype, sites=["neurons.0"]
        )  # at BOS it does not matter
    if value == 1e5:
        seen[0] = 0
        with intervene(model, {"neurons.0": lambda x: spoil(x, (row, position))}):
            store = make(tmp_path / "c", model, text, dtype=torch.bfloat16, sites=["neurons.0"])
        assert (
            store.load("neurons.0")[(store.row == row) & (store.position == position)][0, 3]
            == torch.tensor(1e5).bfloat16()
        )


@pytest.mark.parametrize(
    "other,says",
    [
        (
            dict(sites=["resid.1"]),
            r"sites: \{'resid.1': 32, 'neurons.0': 64\} then, \{'resid.1': 32\} now",
        ),
        (dict(dtype=torch.float32), "dtype: float16 then, float32 now"),
        (dict(text=some_text(seed=1)), "text: "),
        (dict(text=some_text()[:13]), "rows: 14 then, 13 now"),
        (dict(shard=100), "rows_a_shard: 3 then, 6 now"),
        (dict(model=Plain(1)), "weights: "),
        (dict(model=Plain(name="another")), "model:  then, another now"),
    ],
)
def test_a_harvest_with_other_settings_is_not_gone_on_with(copy, other, says):
    (copy / "shard-00003.json").unlink()
    kept = contents(copy)
    with pytest.raises(
        ValueError, match=f"started with different settings .*{says}.*overwrite=True"
    ):
        make(copy, **other)
    assert contents(copy) == kept
    again, fresh = make(copy, overwrite=True, **other), make(copy.parent / "fresh", **other)
    assert contents(copy) == contents(fresh.folder) != kept and again.n == fresh.n


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "activations.json", "shard-00000.safetensors", None])
def test_a_strangers_folder_stays_untouched(tmp_path, name, overwrite):
    folder = tmp_path / "a"
    if name:
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
    else:
        folder.write_text("a file")
    kept = contents(folder) if name else folder.read_text()
    with pytest.raises(
        ValueError,
        match="activations.json is missing, damaged or cut short .*expected format 1|KeyError"
        if name == "activations.json"
        else "holds no activations",
    ):
        make(folder, overwrite=overwrite)
    assert kept == (contents(folder) if name else folder.read_text())


@pytest.mark.parametrize(
    "kw,says",
    [
        (
            dict(dtype=torch.float64),
            "dtype=torch.float64, expected one of torch.float16, torch.bfloat16, torch.float32",
        ),
        (dict(dtype="float16"), "dtype=float16"),
        (dict(batch=0), "batch=0"),
        (dict(sites=["resid.7"]), "no site 'resid.7'"),
        (dict(sites=[]), "no site"),
        (dict(text=some_text().ids), "expected a Text, got Tensor"),
        (dict(shard=0), "shard=0"),
        (dict(text=Text(torch.zeros(2, 8, dtype=torch.long), 0, 1)), "no position that counts"),
        (dict(text=Text(torch.ones(2, 40, dtype=torch.long) * 3, 0, 1)), "reads 32 positions"),
    ],
)
def test_bad_arguments_say_what_is_wrong(tmp_path, kw, says):
    with pytest.raises(ValueError, match=says):
        harvest(tiny(), **dict(text=some_text(), sites=SITES, folder=tmp_path / "a") | kw)
    assert not (tmp_path / "a").exists()


def test_an_altered_byte_is_found_and_mended(copy, whole):
    path = copy / "shard-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-9] ^= 1
    path.write_bytes(raw)
    open_activations(whole, verify=True)
    store = open_activations(copy)
    for check in (store.verify, lambda: open_activations(copy, verify=True)):
        with pytest.raises(
            ValueError,
            match="verify: .*shard-00001.safetensors is missing, damaged .*its checksum differs",
        ):
            check()
    path.unlink()
    make(copy).verify()
    assert contents(copy) == contents(whole)


@pytest.mark.parametrize(
    "fault,says",
    [
        ("no store", "no activations in"),
        ("missing", "1 of 5 shards are missing .* shard-00002.safetensors; call harvest again"),
        ("no json", "1 of 5 shards are missing"),
        ("cut", "shard-00002.* damaged or cut short"),
        ("empty", "shard-00002.* damaged or cut short"),
        ("longer", "shard-00002.* damaged"),
        ("header", "shard-00002.* damaged"),
        ("another", "shard-00002.* damaged .*expected"),
        ("n", "shard-00002.* damaged"),
        ("two shards for one", "hold .* tokens, expected"),
        ("json", "activations.json is missing, damaged"),
        ("format", "expected format 1"),
        ("keys", "expected format 1"),
    ],
)
def test_what_is_not_whole_is_refused(copy, fault, says):
    path, note, main = (
        copy / "shard-00002.safetensors",
        copy / "shard-00002.json",
        copy / "activations.json",
    )
    if fault == "no store":
        main.unlink()
    if fault == "missing":
        path.unlink()
    if fault == "no json":
        note.unlink()
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    if fault == "empty":
        path.write_bytes(b"")
    if fault == "longer":
        path.write_bytes(path.read_bytes() + b"abc")
    if fault == "header":
        path.write_bytes(path.read_bytes().replace(b'"I32"', b'"F32"', 1))
    if fault == "another":
        shutil.copy(make(copy.parent / "other", sites=["resid.1"]).folder / path.name, path)
    if fault == "n":
        note.write_text(json.dumps(json.loads(note.read_text()) | dict(n=3)))
    if fault == "two shards for one":
        [
            shutil.copy(copy / f"shard-00004.{kind}", copy / f"shard-00002.{kind}")
            for kind in ("json", "safetensors")
        ]
    if fault == "json":
        main.write_text(main.read_text()[:50])
    if fault == "format":
        main.write_text(main.read_text().replace('"format": 1', '"format": 2'))
    if fault == "keys":
        main.write_text('{"format": 1}')
    with pytest.raises(ValueError, match=says):
        open_activations(copy)


# ---- read back ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def large(tmp_path_factory):
    "Some 2,000 tokens in 10 shards."
    return make(
        tmp_path_factory.mktemp("large") / "acts",
        text=some_text(160),
        shard=256,
        batch=16,
        sites=["resid.1"],
    )


@pytest.fixture
def numbered(large, monkeypatch):
    "The same store, whose rows read as their own numbers; and a note of how many were read."
    read, first = [0], list(itertools.accumulate([n for _, n in large.shards], initial=0))

    def number(self, site, run):
        i, begin, end = run
        assert 0 <= begin < end <= self.shards[i][1]
        read[0] += end - begin
        return torch.arange(first[i] + begin, first[i] + end, dtype=torch.float)[:, None]

    monkeypatch.setattr(stores.Activations, "_read", number)
    return large, read


@pytest.mark.parametrize(
    "size,hold", [(1, 2), (7, 7), (7, 100), (64, 500), (100, 10**6), (5000, 5000)]
)
def test_every_row_comes_once_an_epoch_and_no_more_than_hold_are_held(numbered, size, hold):
    (store, read), given, most, out, epochs = numbered, [], 0, 0, 2
    for batch in store.batches("resid.1", size, hold=hold, epochs=epochs):
        most = max(most, read[0] - out)  # what was read by now, less what was given before
        given.append(batch[:, 0])
        out += len(batch)
    assert most == min(hold, store.n)
    per_epoch = -(-store.n // size)
    assert [len(b) for b in given] == (
        [size] * (per_epoch - 1) + [store.n - size * (per_epoch - 1)]
    ) * epochs
    both = torch.cat(given).view(epochs, -1)
    assert all(
        torch.equal(order.sort().values, torch.arange(store.n).float()) for order in both
    ) and (size == 1 or not torch.equal(*both))


@pytest.mark.parametrize("hold", [320, 10**6])
def test_batches_are_shuffled(numbered, hold):
    (store, _), n = numbered, numbered[0].n
    order = torch.cat(list(store.batches("resid.1", 32, hold=hold)))[:, 0]
    assert abs(torch.corrcoef(torch.stack([order, torch.arange(n).float()]))[0, 1]) < 0.1
    assert (order.diff().abs() == 1).float().mean() < 0.05  # neighbours do not stay together
    assert all(
        (order[:64] // (n / 4) == q).sum() >= 5 for q in range(4)
    )  # from the beginning, out of all parts of the store


def test_seeds_and_dtypes(large):
    def first(**kw):
        return torch.cat(list(large.batches("resid.1", 50, hold=200, **kw)))

    assert torch.equal(first(), first(seed=0)) and not torch.equal(first(), first(seed=1))
    assert torch.equal(first(epochs=2)[: large.n], first()) and not torch.equal(
        first(epochs=2)[large.n :], first()
    )
    assert sorted(first().tolist()) == sorted(
        large.load("resid.1").tolist()
    )  # the values themselves
    assert (
        first().dtype == torch.float32
        and (half := first(dtype=torch.float16)).dtype == torch.float16
        and torch.equal(half, first().half())
    )
    kept = list(large.batches("resid.1", 50, hold=200))
    assert torch.equal(torch.cat(kept), first()) and kept[0].shape == (
        50,
        32,
    )  # batches given out do not change later


def test_wrong_questions(large):
    with pytest.raises(ValueError, match="load: no site 'mlp.0' in .*; expected one of resid.1"):
        large.load("mlp.0")
    with pytest.raises(ValueError, match="batches: no site 'x'"):
        large.batches("x", 4)  # at once, not with the first batch
    with pytest.raises(ValueError, match="size=50, hold=49"):
        large.batches("resid.1", 50, hold=49)
    with pytest.raises(ValueError, match="size=0"):
        large.batches("resid.1", 0)
    with pytest.raises(ValueError, match=f"n=-1, expected 0 to {large.n}"):
        large.load("resid.1", -1)
    with pytest.raises(ValueError, match="expected 0 to"):
        large.load("resid.1", large.n + 1)
