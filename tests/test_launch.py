"""scripts/finetune_model.py: a model split over two processes trains as in one, stops and resumes.

The commands that start it; faults."""

import json
import multiprocessing
import multiprocessing.connection
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from codebook_tutorial.dictionary.bottleneck import CodebookModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import finetune_model as launch  # noqa: E402

BASE = {
    "tokens": 2048,
    "length": 256,
    "codes": 60,
    "k": 2,
    "steps": 6,
    "lr": 0.003,
    "batch": 4,
    "resample-every": 3,
    "save-every": 2,
    "log-every": 1,
}  # 8 rows of the stories, padded: two steps an epoch
MORE = {"gradient": {"learn": "gradient", "select": "euclidean", "k": 1}, "ema": {}}

GRADIENT, NIGHTLY = (
    pytest.param("gradient", marks=pytest.mark.nightly),
    os.environ.get("COURSE_NIGHTLY", "") not in ("", "0"),
)
COMMANDS = {
    "torchrun --fsdp": (
        [
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            "127.0.0.1:0",
        ],
        dict(fsdp=True, gradient_checkpointing=True, batch=2, codes=12),
    ),
    "accelerate launch": (
        [
            "accelerate.commands.accelerate_cli",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ],
        dict(batch=2, codes=12, **MORE["gradient"]),
    ),
}


def command(model, folder, **kw):
    flags = {n.replace("_", "-"): v for n, v in kw.items()}
    return [
        word
        for n, v in (BASE | {"model": model, "folder": folder} | flags).items()
        if v is not False
        for word in ([f"--{n}"] if v is True else [f"--{n}", str(v)])
    ]


def local_bytes(tensors):
    return sum(t.to_local().numel() * t.element_size() for t in tensors if hasattr(t, "to_local"))


def noting(step, path):
    "The optimizer's step, which also writes down how much this process holds."

    def noted(self, *a, **kw):
        out = step(self, *a, **kw)
        ps = [p for g in self.param_groups for p in g["params"]]
        held = {
            "parameters": local_bytes(ps),
            "gradients": local_bytes(p.grad for p in ps),
            "moments": local_bytes(t for p in ps for t in self.state[p].values()),
            "whole": sum(p.numel() * p.element_size() for p in ps),
        }
        path.write_text(json.dumps(held))
        return out

    return noted


def work(rank, world, port, *, argv, stop, dtype):
    """One of several processes, as torchrun would start it; notes what it holds.

    Killed before checkpoint `stop` gets its name."""
    os.environ |= dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        COURSE_DEVICE="cpu",
        TQDM_DISABLE="1",
    )
    torch.set_num_threads(1)
    rename, folder = Path.replace, Path(argv[argv.index("--folder") + 1])

    def killed(self, to):
        os.kill(os.getpid(), signal.SIGKILL) if self.name == f"sharded-{stop}.part" else rename(
            self, to
        )

    launch.load_lm = partial(launch.load_lm, dtype=dtype)
    if "--fsdp" in argv:
        torch.optim.AdamW.step = noting(torch.optim.AdamW.step, folder / f"held-{rank}.json")
    Path.replace = killed
    launch.main(argv)


@pytest.fixture(scope="module")
def server():
    "Processes are forked off one that has imported everything already."
    was, os.environ["PYTHONPATH"] = (
        os.environ.get("PYTHONPATH", ""),
        os.pathsep.join([str(ROOT / "scripts"), str(ROOT / "tests"), str(ROOT)]),
    )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["test_launch", "codebook_tutorial.world.stories", "accelerate", "datasets"]
    )
    context.Process(target=time.time).start()
    os.environ["PYTHONPATH"] = was
    return context


@pytest.fixture(scope="module")
def start(server):
    def run(processes, argv, stop=0, *, dtype=torch.float64):
        """Exit codes; in float64, so that rounding turns no choice of a code:
        what is left to differ is an error."""
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        kw = dict(argv=argv, stop=stop, dtype=dtype)
        alive = [
            server.Process(target=work, args=(r, processes, port), kwargs=kw)
            for r in range(processes)
        ]
        for p in alive:
            p.start()
        multiprocessing.connection.wait(
            [p.sentinel for p in alive] if stop else [alive[0].sentinel], 120
        )
        for p in alive:
            p.kill() if stop else p.join(60)
        for p in alive:
            p.join(60)
        return [p.exitcode for p in alive]

    return run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def commands(model, tmp_path_factory):
    """Started as a reader types them, and left to run beside the other tests:
    most of their time goes into imports."""
    running, where = {}, tmp_path_factory.mktemp("commands")
    for i, (how, (tool, kw)) in enumerate(list(COMMANDS.items())[: None if NIGHTLY else 1]):
        with open(where / f"{i}.err", "w") as err:
            running[how] = (
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        *tool,
                        str(ROOT / "scripts" / "finetune_model.py"),
                        *command(model, where / str(i), **kw),
                    ],
                    stdout=err,
                    stderr=err,
                    env=os.environ
                    | dict(COURSE_DEVICE="cpu", TQDM_DISABLE="1", OMP_NUM_THREADS="1"),
                ),
                where / str(i),
            )
    yield running
    for process, _ in running.values():
        process.kill()


def tiny(folder, family="neox"):
    from codebook_tutorial.world.stories import make_tokenizer

    tok, small = make_tokenizer(), dict(bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    made = {
        "neox": lambda: GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=len(tok),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=256,
                **small,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tok),
                n_embd=32,
                n_layer=2,
                n_head=2,
                n_positions=256,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **small,
            )
        ),
    }[family]()  # tied embeddings
    made.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(model, start, tmp_path_factory):
    "Undisturbed runs of two processes that split the model."
    kept = {}

    def run(learn):
        if learn not in kept:
            kept[learn] = tmp_path_factory.mktemp("two") / learn
            assert start(2, command(model, kept[learn], fsdp=True, batch=2, **MORE[learn])) == [
                0,
                0,
            ]
        return kept[learn]

    return run


def weights(folder):
    return {
        n: t
        for file in ("model", "codebooks")
        for n, t in load_file(folder / "result" / f"{file}.safetensors").items()
    }


def apart(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


def logs(folder):
    return json.loads((folder / "logs.json").read_text())


def same_logs(a, b, rel=1e-5):
    for x, y in zip(logs(a), logs(b), strict=True):
        for name in set(x) & set(y) - {"epoch"}:
            assert x[name] == pytest.approx(y[name], rel=rel, abs=1e-6), (name, x["step"])


@pytest.mark.parametrize("learn", [GRADIENT, "ema"])
def test_split_over_two_processes_it_trains_as_in_one(two, model, start, tmp_path, learn):
    assert start(1, command(model, tmp_path / "one", fsdp=True, **MORE[learn])) == [0]
    difference, rows = apart(tmp_path / "one", two(learn)), logs(two(learn))
    print(f"{learn}: largest difference {difference:.1e}")
    assert (
        difference < 1e-5
        and rows[-1]["lm_loss"] < rows[0]["lm_loss"] - 0.1
        and rows[-1]["dead_share"] > 0
    )  # there was something to resample
    same_logs(tmp_path / "one", two(learn))


@pytest.mark.nightly
def test_tied_embeddings_and_an_odd_number_of_codes(start, tmp_path):
    gpt2, same = (
        tiny(tmp_path / "gpt2", "gpt2"),
        dict(fsdp=True, learn="gradient", select="cosine", codes=31, steps=3),
    )
    assert start(2, command(gpt2, tmp_path / "two", batch=2, **same)) == [0, 0] and start(
        1, command(gpt2, tmp_path / "one", **same)
    ) == [0]
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    found = CodebookModel.from_pretrained(tmp_path / "two" / "result").model
    assert found.lm_head.weight is found.transformer.wte.weight


@pytest.mark.nightly
@pytest.mark.parametrize("fsdp", [True, False])
def test_bfloat16_keeps_parameters_and_codes_in_float32(two, model, start, tmp_path, fsdp):
    "Codes are resampled meanwhile."
    assert not any(
        start(
            1 + fsdp,
            command(model, tmp_path / "x", fsdp=fsdp, bf16=True, batch=4 // (1 + fsdp), steps=4),
            dtype=torch.float32,
        )
    )
    assert logs(tmp_path / "x")[-1]["dead_share"] > 0
    assert {t.dtype for t in weights(tmp_path / "x").values()} == {torch.float32}
    if fsdp:
        assert [r["lm_loss"] for r in logs(tmp_path / "x")] == pytest.approx(
            [r["lm_loss"] for r in logs(two("ema"))][:4], rel=0.01
        )


@pytest.mark.parametrize("learn", [GRADIENT, "ema"])
def test_its_loop_is_the_librarys(model, start, tmp_path, learn):
    """As many rows as a step takes, so that their order, which differs, does not matter.

    Nothing is resampled, for that draws by order."""
    same = dict(tokens=1024, resample_every=0, **MORE[learn])
    assert (
        start(1, command(model, tmp_path / "split", fsdp=True, **same))
        == start(1, command(model, tmp_path / "trainer", **same))
        == [0]
    )
    print(f"{learn}: largest difference {apart(tmp_path / 'split', tmp_path / 'trainer'):.1e}")
    assert apart(tmp_path / "split", tmp_path / "trainer") < 1e-5
    for a, b in zip(logs(tmp_path / "split"), logs(tmp_path / "trainer"), strict=True):
        for name in set(a) & set(b):
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-6), name
    assert {"lm_loss", "grad_norm", "error heads.0", "error mlp.1"} <= set(a) & set(b)


@pytest.mark.parametrize("learn", [GRADIENT, "ema"])
def test_each_process_holds_about_half(two, learn):
    for rank in range(2):
        held = json.loads((two(learn) / f"held-{rank}.json").read_text())
        print(f"{learn}, process {rank}: {held}")
        assert (
            all(
                0.4 * held["whole"] < held[n] < 0.6 * held["whole"]
                for n in ("parameters", "gradients")
            )
            and 0.8 * held["whole"] < held["moments"] < 1.2 * held["whole"]
        )


@pytest.mark.parametrize("learn", [GRADIENT, "ema"])
def test_killed_and_resumed_it_ends_with_the_same_weights(two, model, start, tmp_path, learn):
    """Killed while a checkpoint is written.

    The one before lies in the middle of a window of counting. Another number of processes may
    go on."""
    argv, difference = (
        command(model, tmp_path / "x", fsdp=True, batch=2, **MORE[learn]),
        partial(apart, two(learn)),
    )
    assert start(2, argv, stop=4)[0] == -signal.SIGKILL and sorted(
        p.name for p in (tmp_path / "x").glob("sharded-*")
    ) == ["sharded-2", "sharded-4.part"]
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    assert (
        start(2, argv) == [0, 0]
        and difference(tmp_path / "x") == 0
        and logs(tmp_path / "x") == logs(two(learn))
    )
    assert sorted(p.name for p in (tmp_path / "x").glob("sharded-*")) == ["sharded-4", "sharded-6"]
    if learn == "gradient":
        assert (
            start(1, command(model, tmp_path / "y", fsdp=True, **MORE[learn])) == [0]
            and difference(tmp_path / "y") < 1e-5
        )


@pytest.mark.parametrize(
    "how",
    [
        how if i == 0 else pytest.param(how, marks=pytest.mark.nightly)
        for i, how in enumerate(COMMANDS)
    ],
)
def test_the_commands_of_the_recipes(commands, model, start, tmp_path, how):
    "As typed, in float32 and with few codes; against one process."
    process, folder = commands[how]
    assert start(
        1, command(model, tmp_path / "one", **COMMANDS[how][1] | dict(batch=4)), dtype=torch.float32
    ) == [0]
    assert process.wait(120) == 0 and "finetune_model: 2 processes on cpu" in (
        says := folder.with_suffix(".err").read_text()
    ), says[-3000:]
    print(f"{how}: largest difference {apart(tmp_path / 'one', folder):.1e}")
    assert apart(tmp_path / "one", folder) < 2e-4
    same_logs(tmp_path / "one", folder, rel=1e-3)
    ids = torch.arange(2, 30)[None]
    assert torch.allclose(
        CodebookModel.from_pretrained(folder / "result")(input_ids=ids).logits,
        CodebookModel.from_pretrained(tmp_path / "one" / "result")(input_ids=ids).logits,
        atol=1e-3,
    )


# ---- faults ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(model="./nowhere"), "no folder './nowhere'"),
        (dict(sites="mlp.7"), "no site 'mlp.7'; this model has"),
        (dict(length=300), "reads 256 positions"),
        (dict(text="nowhere.txt"), "not there"),
        (dict(batch=20), "a step takes 20 rows .*the text has 8"),
        (dict(k=99), "1 <= k <= n_codes, got k=99"),
        (dict(start=1, codes=999), "at least n_codes"),
    ],
)
def test_faults_are_told_in_one_line(model, tmp_path, monkeypatch, kw, says):
    monkeypatch.setattr(
        sys,
        "argv",
        ["finetune_model.py", *command(model, tmp_path / "x", fsdp=True, **kw)]
        if "model" not in kw
        else ["finetune_model.py", *command(kw["model"], tmp_path / "x", fsdp=True)],
    )
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    try:
        with pytest.raises(SystemExit, match=f"^finetune_model: .*{says}"):
            runpy.run_path(str(ROOT / "scripts" / "finetune_model.py"), run_name="__main__")
    finally:
        dist.destroy_process_group()
    assert not (tmp_path / "x" / "result").exists()


def test_another_run_is_not_taken_up_and_one_process_is_told(
    two, model, tmp_path, monkeypatch, capsys
):
    shutil.copytree(two("gradient"), tmp_path / "x")
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    for kw, says in (
        (dict(lr=0.1), "different settings .*lr: 0.003 then, 0.1 now"),
        (dict(batch=2), "batch: 4 then, 2 now"),
        (dict(tokens=1024), "text: .* then"),
        (dict(codes=20), "has the codebooks"),
        (dict(steps=5), "further than --steps 5"),
    ):
        with pytest.raises(ValueError, match=says):
            launch.main(command(model, tmp_path / "x", fsdp=True, **MORE["gradient"] | kw))
        dist.destroy_process_group()
    assert (
        "in one process --fsdp splits nothing: start it with torchrun" in capsys.readouterr().err
        and logs(tmp_path / "x") == logs(two("gradient"))
    )


def test_help(capsys):
    with pytest.raises(SystemExit):
        launch.options(["--help"])
    assert (
        "torchrun --nproc-per-node" in (shown := capsys.readouterr().out)
        and "(['heads.*', 'mlp.*'])" in shown
        and "(None)" not in shown
    )
