"""Finetuning with codebooks through transformers' Trainer:
sums over parts and processes, stops and resumes, logs, controls, faults."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.finetune import as_dataset, bits_per_activation, finetune
from codebook_tutorial.dictionary.trainer import CodebookTrainer, code_usage, token_nats
from codebook_tutorial.dictionary.checkpoints import last_checkpoint
from codebook_tutorial.model.run import token_losses
from codebook_tutorial.model.text import Text

SMALL = dict(vocab_size=50, bos_token_id=0, eos_token_id=0)
CONFIGS = {
    "neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
            **SMALL,
        ),
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **SMALL,
        ),
    ),  # tied embeddings
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=32,
            **SMALL,
        ),
    ),
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # transformers makes every output_dir that it is told


def tiny(family="neox"):
    torch.manual_seed(0)
    kind, config = CONFIGS[family]
    return kind(config).eval()


def some_text(rows=32, length=16, padded=True):
    """Rows that follow a rule (each token is the one before plus 1, 2 or 3),
    so that there is something to learn; half of them end in padding (1)."""
    draw = seeded(1)
    ids = 2 + (torch.randint(1, 4, (rows, length), generator=draw).cumsum(1) % 48)
    ids[:, 0] = 0
    if padded:
        for row in range(0, rows, 2):
            ids[row, length - 1 - row % 7 :] = 1
    return Text(ids, 0, 1)


def with_codes(model=None, text=None, **kw):
    model, text = model or tiny(), text or some_text()
    kw = dict(n_codes=12, k=2, select="residual", learn="ema", commitment=0.25) | kw
    return add_codebooks(model, ["heads.*", "mlp.*"], **kw).init_from_data(
        text.ids, generator=seeded(0), pad=text.pad
    )


KINDS = {
    "averages, residual": {},
    "gradient, k=1": dict(k=1, select="euclidean", learn="gradient"),
    "the paper's": dict(k=2, select="cosine", learn="gradient", commitment=0.0),
}


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def apart(a, b):
    return max((a[n].float() - b[n].float()).abs().max().item() for n in a)


def test_token_nats_is_the_models_own_loss():
    text, model = some_text(), tiny()
    nats = token_nats(model(input_ids=text.ids).logits, text.labels)
    assert nats.shape == text.ids.shape and torch.allclose(
        nats.sum() / (text.labels != -100).sum(),
        model(input_ids=text.ids, labels=text.labels).loss,
        atol=1e-6,
    )
    assert (
        torch.allclose(nats[:, :-1], token_losses(model, text)[:, 1:].nan_to_num(), atol=1e-5)
        and (nats[:, -1] == 0).all()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_parts_give_the_update_of_one_big_batch(kind):
    "Rows with unlike amounts of padding; codes move, averages step, unused codes are resampled."
    done = []
    for batch, parts in ((8, 1), (2, 4)):
        cb = with_codes(**KINDS[kind], n_codes=20)
        logs = finetune(
            cb,
            some_text(),
            steps=6,
            batch=batch,
            gradient_accumulation_steps=parts,
            resample_every=2,
            resample_until=1.0,
            log_every=2,
        )
        done.append((state(cb), logs))
    (big, logs), (small, again) = done
    assert (
        apart(big, small) < 2e-4 and apart(big, state(with_codes(**KINDS[kind], n_codes=20))) > 0.01
    )
    for a, b in zip(logs, again):
        assert a.keys() == b.keys() and all(
            a[n] == pytest.approx(b[n], rel=2e-3, abs=1e-5) for n in a if n not in ("epoch",)
        )


@pytest.mark.parametrize(
    "family,kind",
    [
        ("gpt2", "averages, residual"),
        ("neox", "the paper's"),
        pytest.param("llama", "gradient, k=1", marks=pytest.mark.nightly),
    ],
)
def test_gradient_checkpointing_changes_nothing(family, kind, monkeypatch):
    "A block that is computed twice counts its codes once; with padding, in parts."
    passes = []
    monkeypatch.setattr(
        CodebookModel,
        "_bottleneck",
        lambda self, site, x, plain=CodebookModel._bottleneck: [
            passes.append(site),
            plain(self, site, x),
        ][1],
    )
    done = []
    for more in ({}, {"gradient_checkpointing": True}):
        passes.clear()
        logs = finetune(
            cb := with_codes(tiny(family), **KINDS[kind]),
            some_text(),
            steps=4,
            batch=4,
            gradient_accumulation_steps=2,
            resample_every=2,
            resample_until=1.0,
            log_every=2,
            **more,
        )
        done.append(
            (
                state(cb),
                {site: b.counts.clone() for site, b in cb.codebooks.items()},
                logs,
                len(passes),
            )
        )
    (one, counts, logs, once), (two, again, logs2, twice) = done
    assert apart(one, two) == 0 and all(torch.equal(n, again[site]) for site, n in counts.items())
    assert [row["lm_loss"] for row in logs] == [
        row["lm_loss"] for row in logs2
    ] and twice > 1.5 * once


def test_a_loss_scaled_for_mixed_precision_gives_the_same_step():
    """The reconstruction term reaches the codes through autograd,
    so a scaled loss scales its gradient too."""
    grads = []
    for scale in (1.0, 1024.0):
        cb = with_codes(**KINDS["gradient, k=1"])
        trainer = CodebookTrainer(
            cb,
            TrainingArguments("unused", use_cpu=True, report_to="none"),
            train_dataset=as_dataset(some_text()),
        )
        trainer.measure_power()
        cb.train()
        inputs = trainer.data_collator(as_dataset(some_text())[:8])
        trainer.get_batch_samples(iter([inputs]), 1, "cpu")
        (trainer.compute_loss(cb, inputs) * scale).backward()
        grads.append({n: p.grad / scale for n, p in cb.named_parameters() if p.grad is not None})
    assert apart(*grads) < 1e-6 and any(
        "_books" in n and g.abs().max() > 1e-4 for n, g in grads[0].items()
    )


def test_the_control_is_what_the_plain_trainer_does():
    text, args = (
        some_text(padded=False),
        dict(
            max_steps=8,
            learning_rate=1e-3,
            per_device_train_batch_size=4,
            seed=0,
            data_seed=0,
            lr_scheduler_type="cosine",
            adam_beta2=0.98,
            weight_decay=0.01,
        ),
    )
    plain, ours = tiny(), tiny()
    Trainer(
        plain,
        TrainingArguments(
            "unused", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, **args
        ),
        train_dataset=as_dataset(text),
    ).train()
    logs = finetune(ours, text, steps=8, lr=1e-3, batch=4, warmup_steps=0, log_every=4)
    assert apart(state(plain), state(ours)) < 1e-6 and apart(state(ours), state(tiny())) > 1e-3
    assert [row["step"] for row in logs] == [4, 8] and set(logs[0]) == {
        "loss",
        "lm_loss",
        "grad_norm",
        "learning_rate",
        "epoch",
        "step",
    }


def test_finetuning_learns_and_the_logs_say_what_happened():
    text, cb = some_text(64), with_codes(text=some_text(64))
    heads, mlp = ([f"error {kind}.{i}" for i in range(2)] for kind in ("heads", "mlp"))
    logs = finetune(
        cb, text, steps=60, batch=16, lr=3e-3, recon=0.5, log_every=10, resample_every=10
    )
    assert (
        not cb.training
        and set(heads + mlp) <= set(logs[0])
        and [row["step"] for row in logs] == list(range(10, 61, 10))
    )
    assert logs[-1]["lm_loss"] < logs[0]["lm_loss"] - 0.5
    for row in logs:
        assert row["loss"] == pytest.approx(
            row["lm_loss"] + 0.5 * 1.25 * sum(row[n] for n in heads + mlp), rel=1e-3
        )
        assert (
            0 <= row["dead_share"] < 1
            and 0 < row["usage_entropy"] <= torch.tensor(12.0).log() + 1e-6
            and row["code_norm"] > 0
        )


def logs_by_hand(cb, text):
    "Each site's relative error, and the use of the codes."
    there, want = text.attention_mask, {}
    cb.train()
    cb.reset_counts()
    cb(input_ids=text.ids, attention_mask=there)
    for site, book in cb.codebooks.items():
        x = cb.inputs[site][there]
        want[f"error {site}"] = (
            (book.decode_ids(book.choose(x)) - x).pow(2).sum() / x.pow(2).sum()
        ).item()
    shares = torch.cat(
        [b.counts.double() / b.counts.sum(1, keepdim=True) for b in cb.codebooks.values()]
    )
    want |= dict(
        dead_share=(shares == 0).double().mean().item(),
        usage_entropy=-(shares * shares.clamp(min=1e-30).log()).sum(1).mean().item(),
        code_norm=torch.cat([b.weight.norm(dim=-1).flatten() for b in cb.codebooks.values()])
        .view(-1, 10)
        .mean(1)
        .view(-1)
        .mean()
        .item(),
    )
    return want


def test_relative_errors_and_usage_are_what_they_are_called():
    "One step at learning rate 0 on all rows: the logs against numbers worked out here."
    text, cb = some_text(8), with_codes(text=some_text(8), n_codes=10)
    want = logs_by_hand(cb, text)
    assert code_usage(cb)["usage_entropy"] == pytest.approx(want["usage_entropy"])
    for b in cb.codebooks.values():
        b.new.zero_()
    cb.reset_counts()
    power = CodebookTrainer(
        cb,
        TrainingArguments("unused", use_cpu=True, report_to="none"),
        train_dataset=as_dataset(text),
    )
    power.measure_power()
    (row,) = finetune(
        cb,
        text,
        steps=1,
        lr=0.0,
        batch=8,
        log_every=1,
        resample_every=1,
        resample_until=0.0,
        decay=1.0,
    )
    for site in cb.codebooks:
        assert power.power[site] > 0
    for name in ("dead_share", "usage_entropy"):
        assert row[name] == pytest.approx(want[name], rel=1e-5)
    assert row["lm_loss"] == pytest.approx(torch.nanmean(token_losses(cb, text)).item(), rel=1e-5)
    for name in (n for n in want if n.startswith("error heads.0")):
        assert row[name] == pytest.approx(
            want[name], rel=1e-4
        )  # its inputs are those of the untouched model


# ---- stops, resumes, processes -----------------------------------------------------------------
RUN = """
import functools, os, signal, sys
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
torch.set_default_dtype(getattr(torch, os.environ.get("DTYPE", "float32")))
from test_finetune import *
from transformers import TrainerCallback
class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kw):
        if state.global_step == int(os.environ.get("STOP", 0)): os.kill(os.getpid(), signal.SIGKILL)
import codebook_tutorial.dictionary.trainer as ft
init = ft.CodebookTrainer.__init__
@functools.wraps(init)
def stopping(self, *a, **kw):
    init(self, *a, **kw)
    self.add_callback(Stop())
ft.CodebookTrainer.__init__ = stopping
family, folder, kind, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
cb = with_codes(tiny(family), **KINDS[kind], n_codes=int(os.environ.get("CODES", 100)))
logs = finetune(
    cb, some_text(), steps=11, batch=batch, folder=folder, save_every=3, log_every=2,
    resample_every=4, resample_until=1.,
)
if int(os.environ.get("RANK", 0)) == 0:
    cb.save_pretrained(folder + "/end")
    (Path(folder) / "logs.json").write_text(json.dumps(logs))
"""


def run(folder, family="neox", kind="averages, residual", *, batch=8, stop=0, processes=0, **more):
    "finetune in a process of its own (or several), killed after step `stop`."
    code = folder.parent / "run.py"
    code.write_text(RUN.format(path=[str(Path(__file__).parent)]))
    command = [sys.executable] + (
        [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(processes),
            "--master-port",
            "0",
            "--rdzv-endpoint",
            "127.0.0.1:0",
            "--rdzv-backend",
            "c10d",
        ]
        if processes
        else []
    )
    return subprocess.run(
        [*command, str(code), family, str(folder), kind, str(batch)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "STOP": str(stop),
            "OMP_NUM_THREADS": "1",
            "COURSE_DEVICE": "cpu",
            **more,
        },
    )


@pytest.mark.parametrize(
    "family,kind",
    [
        ("neox", "averages, residual"),
        pytest.param("gpt2", "gradient, k=1", marks=pytest.mark.nightly),
    ],
)
def test_killed_and_resumed_it_ends_with_the_same_weights(tmp_path, family, kind):
    "The checkpoint lies in the middle of a window of counting; tied embeddings too."
    whole, cut = tmp_path / "whole" / "x", tmp_path / "cut" / "x"
    for folder in (whole, cut):
        folder.parent.mkdir()
    assert (got := run(whole, family, kind)).returncode == 0, got.stderr[-2000:]
    assert (
        run(cut, family, kind, stop=8).returncode == -signal.SIGKILL and not (cut / "end").exists()
    )
    assert last_checkpoint(cut).endswith("checkpoint-6")
    assert (got := run(cut, family, kind)).returncode == 0, got.stderr[-2000:]
    for name in ("model.safetensors", "codebooks.safetensors"):
        a, b = load_file(whole / "end" / name), load_file(cut / "end" / name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name
    first, second = (json.loads((f / "logs.json").read_text()) for f in (whole, cut))
    assert first[-1] == second[-1]


@pytest.mark.parametrize(
    "kind,codes",
    [("averages, residual", 24), pytest.param("the paper's", 40, marks=pytest.mark.nightly)],
)
def test_two_processes_reach_what_one_does(tmp_path, kind, codes):
    """In float64 and with few codes, so that neither rounding nor two equal codes can turn a
    choice: what is left to differ is an error."""
    logs = []
    for processes, batch in ((0, 8), (2, 4)):
        folder = tmp_path / str(processes) / "x"
        folder.parent.mkdir()
        got = run(
            folder, kind=kind, batch=batch, processes=processes, DTYPE="float64", CODES=str(codes)
        )
        assert got.returncode == 0, got.stderr[-3000:]
        logs.append(json.loads((folder / "logs.json").read_text()))
        logs[-1].append(
            CodebookModel.from_pretrained(folder / "end", dtype=torch.float64).state_dict()
        )
    one, two = logs
    assert apart(one.pop(), two.pop()) < 1e-6 and any(
        row.get("dead_share", 0) > 0 for row in one
    )  # there was something to resample
    for a, b in zip(one, two, strict=True):
        for name in set(a) - {"epoch"}:
            assert a[name] == pytest.approx(b[name], rel=1e-7, abs=1e-9), name


def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None
    cb, kw = with_codes(), dict(steps=12, batch=4, folder=tmp_path, save_every=3, log_every=3)
    finetune(cb, some_text(), **kw)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-12")
    (tmp_path / "checkpoint-12" / "checksums.json").rename(
        tmp_path / "checkpoint-12" / "checksums.part"
    )
    (tmp_path / "checkpoint-12" / ".tmpAb12Cd").touch()
    (tmp_path / "checkpoint-x").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    finetune(again := with_codes(), some_text(), **kw)
    assert apart(state(again), state(cb)) == 0 and not [
        *tmp_path.rglob(".tmp*"),
        *tmp_path.rglob("*.part"),
    ]


def test_a_run_whose_settings_are_lost_or_incomplete_is_not_taken_up(tmp_path):
    finetune(with_codes(), some_text(), steps=1, batch=4, folder=tmp_path, save_every=1)
    kept, file = json.loads((tmp_path / "finetune.json").read_text()), tmp_path / "finetune.json"
    for told in (None, [1], {n: v for n, v in kept.items() if n != "lr"}):
        file.unlink(missing_ok=True) if told is None else file.write_text(json.dumps(told))
        with pytest.raises(
            ValueError, match="(finetune.json is missing, damaged|lr: not set then).* resume=False"
        ):
            finetune(with_codes(), some_text(), steps=2, batch=4, folder=tmp_path)
    assert (
        finetune(
            with_codes(), some_text(), steps=2, batch=4, folder=tmp_path, log_every=1, resume=False
        )[0]["step"]
        == 1
    )


def test_codes_without_checksums_are_read_and_damage_is_told_all_the_same(tmp_path):
    (cb := with_codes()).save_pretrained(tmp_path)
    told = json.loads((file := tmp_path / "codebooks.json").read_text())
    assert set(told.pop("sha256")) == {"model.safetensors", "codebooks.safetensors"}
    file.write_text(json.dumps(told))
    assert apart(state(CodebookModel.from_pretrained(tmp_path)), state(cb)) == 0
    for name in ("codebooks.safetensors", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(ValueError, match=name):
            CodebookModel.from_pretrained(tmp_path)


def test_resuming_refuses_other_codebooks(tmp_path):
    text = some_text()
    finetune(with_codes(), text, steps=2, batch=4, folder=tmp_path, save_every=1)
    with pytest.raises(ValueError, match="the checkpoint .* resume=False"):
        finetune(with_codes(n_codes=9), text, steps=4, batch=4, folder=tmp_path)
    assert (
        finetune(
            with_codes(n_codes=9), text, steps=2, batch=4, folder=tmp_path / "other", log_every=1
        )[-1]["step"]
        == 2
    )


@pytest.mark.parametrize(
    "kw,says",
    [
        (dict(lr=1e-4), "lr: 0.0005 then, 0.0001 now"),
        (dict(batch=2), "batch: 4 then, 2 now"),
        (dict(seed=1), "seed"),
        (dict(resample_every=0), "resample_every"),
        (dict(text=1), "text"),
    ],
)
@pytest.mark.parametrize("codes", [True, False])
def test_resuming_refuses_other_settings_and_another_text(tmp_path, kw, says, codes):
    model = with_codes() if codes else tiny("llama")
    finetune(model, some_text(), steps=1, batch=4, folder=tmp_path, save_every=1, log_every=1)
    kept = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"different settings .*{says}.*resume=False"):
        finetune(
            model,
            some_text()[:-1] if "text" in kw else some_text(),
            **dict(steps=2, batch=4, folder=tmp_path)
            | {n: v for n, v in kw.items() if n != "text"},
        )
    assert kept == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    logs = finetune(
        model,
        some_text(),
        steps=2,
        batch=2,
        gradient_accumulation_steps=2,
        folder=tmp_path,
        log_every=1,
    )  # the same batch in parts
    assert logs[-1]["step"] == 2


def test_the_best_checkpoint_is_loaded_at_the_end_and_a_longer_run_is_not_taken_up(tmp_path):
    text, cb = some_text(), with_codes()
    args = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        learning_rate=1.0,
        use_cpu=True,
        report_to="none",
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        disable_tqdm=True,
    )
    trainer = CodebookTrainer(
        cb, args, train_dataset=as_dataset(text), eval_dataset=as_dataset(text)
    )
    trainer.train()
    assert (
        trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)
        and trainer.state.best_global_step < 4
    )  # at this rate it gets worse
    with pytest.raises(ValueError, match="further than steps=2"):
        finetune(with_codes(), text, steps=2, folder=tmp_path)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="before 5.18 Trainer cannot take up a run of several processes on CPUs: it asks torch "
    "for the device cpu:0",
)
@pytest.mark.nightly
def test_counts_of_a_window_survive_a_stop_of_two_processes(tmp_path):
    """Stopped in the middle of a window and resumed,
    two processes end where two undisturbed ones do."""
    ends = []
    for name, stop in (("whole", 0), ("cut", 8)):
        folder = tmp_path / name / "x"
        folder.parent.mkdir()
        if stop:
            assert run(
                folder, kind="the paper's", batch=4, processes=2, stop=stop
            ).returncode != 0 and last_checkpoint(folder).endswith("checkpoint-6")
        got = run(folder, kind="the paper's", batch=4, processes=2)
        assert got.returncode == 0, got.stderr[-2000:]
        ends.append(CodebookModel.from_pretrained(folder / "end").state_dict())
    assert apart(*ends) == 0


def test_going_on_with_more_steps(tmp_path):
    text, cb = some_text(), with_codes()
    finetune(cb, text, steps=2, batch=4, folder=tmp_path, save_every=1, log_every=1)
    logs = finetune(
        with_codes(), text, steps=4, batch=4, folder=tmp_path, save_every=1, log_every=1
    )
    assert [row["step"] for row in logs] == [1, 2, 3, 4]


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_trains_resumes_and_loads(tmp_path, family):
    text = some_text()
    logs = finetune(
        cb := with_codes(tiny(family)),
        text,
        steps=4,
        batch=4,
        folder=tmp_path,
        save_every=2,
        log_every=1,
    )
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in logs)
    resumed = with_codes(tiny(family))
    finetune(resumed, text, steps=4, batch=4, folder=tmp_path)
    assert apart(state(resumed), state(cb)) == 0
    again = CodebookModel.from_pretrained(tmp_path / "checkpoint-4")
    assert torch.equal(again(input_ids=text.ids[:2]).logits, cb(input_ids=text.ids[:2]).logits)
    assert not list(tmp_path.rglob("*.bin"))


def test_bf16_trains_and_averages_stay_exact():
    cb = with_codes()
    logs = finetune(
        cb, some_text(), steps=20, batch=8, lr=3e-3, bf16=True, log_every=5, resample_every=4
    )
    assert logs[-1]["lm_loss"] < logs[0]["lm_loss"] and all(
        b.total.dtype == torch.float32 for b in cb.codebooks.values()
    )


@pytest.mark.parametrize("batch", [32, 5])
def test_evaluation_gives_the_loss_and_leaves_the_counts_alone(batch):
    text, cb = some_text(), with_codes()
    trainer = CodebookTrainer(
        cb,
        TrainingArguments(
            "unused", use_cpu=True, report_to="none", per_device_eval_batch_size=batch
        ),
        train_dataset=as_dataset(text),
        eval_dataset=as_dataset(text),
    )
    cb(input_ids=text.ids)
    before = {s: b.counts.clone() for s, b in cb.codebooks.items()}
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(
        torch.nanmean(token_losses(cb, text)).item(), rel=1e-5
    )
    cb.reset_counts()
    cb(input_ids=text.ids)
    assert all(torch.equal(before[s], b.counts) for s, b in cb.codebooks.items())


def test_resampling_moves_codes_only_while_it_may_and_only_unused_ones():
    def moved(**kw):
        cb = with_codes(n_codes=30, learn="gradient")
        for book in cb.codebooks.values():
            book.weight.data[:, -5:] = 1e3  # never the nearest
        finetune(cb, some_text(), steps=4, batch=8, lr=0.0, log_every=2, **kw)
        return [
            int((book.weight[:, -5:] != 1e3).any(-1).sum()) for book in cb.codebooks.values()
        ], cb

    assert (
        moved(resample_every=0)[0]
        == moved(resample_every=2, resample_until=0.25)[0]
        == [0, 0, 0, 0]
    )
    found, cb = moved(resample_every=2)
    assert (
        found == [10, 10, 5, 5] and min(b.weight.abs().max() for b in cb.codebooks.values()) < 100
    )


def test_bits_are_those_of_the_codes_in_use():
    text, cb = some_text(), with_codes(n_codes=16)
    found = bits_per_activation(cb, text)
    assert (
        found["heads.0"]["most"] == 2 * 2 * 4
        and found["mlp.0"]["most"] == 2 * 4
        and found["mlp.0"]["dense"] == 32 * 32
    )
    cb.reset_counts()
    cb(input_ids=text.ids, attention_mask=text.attention_mask.long())
    share = cb.codebooks["mlp.1"].counts[0].double() / cb.codebooks["mlp.1"].counts.sum()
    assert (
        found["mlp.1"]["bits"]
        == pytest.approx(-2 * (share[share > 0] * share[share > 0].log2()).sum().item())
        and found["mlp.1"]["bits"] <= found["mlp.1"]["most"]
    )


def test_bad_arguments_say_what_is_wrong():
    with pytest.raises(ValueError, match="no rows"):
        finetune(tiny(), some_text()[:0])
    with pytest.raises(ValueError, match="reads 32 positions"):
        finetune(tiny(), Text(torch.zeros(4, 40, dtype=torch.long), 0, 1))
    with pytest.raises(TypeError, match="nonsense"):
        finetune(tiny(), some_text(), nonsense=3)


# ---- folders and the Hub -----------------------------------------------------------------------
def test_a_folder_holds_all_and_a_card(tmp_path):
    from codebook_tutorial.world.stories import make_tokenizer

    cb = with_codes()
    cb.save_with_card(tmp_path, make_tokenizer(), {"own text": 1.25, "the same without codes": 1.2})
    card = (tmp_path / "README.md").read_text()
    assert (
        "| `heads.0` | 12 | 2 | 2 | residual, sum |" in card
        and "| own text | 1.2500 |" in card
        and card.startswith("---\n")
        and not list(tmp_path.glob("*.part"))
    )
    assert {p.name for p in tmp_path.iterdir()} >= {
        "README.md",
        "config.json",
        "model.safetensors",
        "codebooks.json",
        "codebooks.safetensors",
        "tokenizer.json",
    }
    again = CodebookModel.from_pretrained(tmp_path)
    assert torch.equal(
        again(input_ids=some_text().ids).logits, cb(input_ids=some_text().ids).logits
    )


@pytest.mark.parametrize(
    "fault,says",
    [
        ("no codebooks", "no codebooks.json"),
        ("cut short", "damaged or cut short"),
        ("json", "damaged or cut short"),
        ("missing", "damaged or cut short"),
        ("other size", "expected"),
        ("other sites", "no site"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, fault, says):
    with_codes().save_pretrained(tmp_path)
    weights, config = tmp_path / "codebooks.safetensors", tmp_path / "codebooks.json"
    if fault == "no codebooks":
        config.unlink()
    if fault == "cut short":
        weights.write_bytes(weights.read_bytes()[:-50])
    if fault == "json":
        config.write_text(config.read_text()[:40])
    if fault == "missing":
        weights.unlink()
    if fault == "other size":
        config.write_text(config.read_text().replace('"n_codes": 12', '"n_codes": 11'))
    if fault == "other sites":
        config.write_text(config.read_text().replace("heads.1", "heads.7"))
    with pytest.raises(ValueError, match=says):
        CodebookModel.from_pretrained(tmp_path)


PUSH = """
import sys, torch
from codebook_tutorial.dictionary.bottleneck import CodebookModel
import codebook_tutorial.dictionary.finetune
cb = CodebookModel.from_pretrained(sys.argv[1])
print(cb.push_to_hub("tests/codes", losses={"text": 1.5}, token="hf_secret"))
again = CodebookModel.from_pretrained("tests/codes")
ids = torch.arange(10)[None]
print(torch.equal(cb(input_ids=ids).logits, again(input_ids=ids).logits))
try: CodebookModel.from_pretrained("tests/plain")
except ValueError as e: print(e)
"""


def test_push_and_load_through_a_hub(tmp_path):
    from helpers.hub import Hub

    with_codes().save_pretrained(tmp_path / "kept")
    with Hub() as hub:
        tiny().save_pretrained(tmp_path / "plain")
        hub.add("model", "tests/plain", tmp_path / "plain")
        got = subprocess.run(
            [sys.executable, "-c", PUSH, str(tmp_path / "kept")],
            capture_output=True,
            text=True,
            env=hub.env(tmp_path / "home"),
            timeout=300,
        )
        assert got.returncode == 0, got.stderr[-3000:]
        assert got.stdout.splitlines() == [
            f"{hub.url}/tests/codes",
            "True",
            "from_pretrained: no codebooks.json in tests/plain; expected what "
            "CodebookModel.save_pretrained wrote",
        ]
        files = hub.repos["model", "tests/codes"]["commits"][
            hub.repos["model", "tests/codes"]["refs"]["main"]
        ]
        assert b"| text | 1.5000 |" in files["README.md"] and {
            "codebooks.json",
            "codebooks.safetensors",
            "model.safetensors",
            "config.json",
        } <= set(files)
        assert "hf_secret" not in got.stdout + got.stderr
