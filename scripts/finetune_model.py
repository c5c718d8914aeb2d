"""Finetune a language model with codebooks, in one process or in several.

usage: python scripts/finetune_model.py --model pythia-70m --text wikitext-103 --folder out/codes
one whole model per process:
  torchrun --nproc-per-node 2 scripts/finetune_model.py --model EleutherAI/pythia-1b ...
the model itself split over the processes:
  torchrun --nproc-per-node 4 scripts/finetune_model.py --fsdp --bf16 --model EleutherAI/pythia-2.8b

A stopped run, called again, resumes from the last whole checkpoint in its folder; folder/result is
for CodebookModel.from_pretrained. Recipes: docs/launch.md
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.core import device, seeded, set_seed
from codebook_tutorial.dictionary.finetune import finetune
from codebook_tutorial.model.run import check_length
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from sharded import Sharded, resample

# name -> default, what it is; the default's type is the option's
TEXT = {
    "model": ("stories", "a folder, a preset or a Hub id"),
    "text": (None, "a file (.txt .json .jsonl .parquet), a preset or a data set; none: stories"),
    "split": ("train", "which part of the text"),
    "tokens": (1_000_000, "positions of text"),
    "length": (128, "positions per row"),
}
CODES = {
    "codes": (1024, "codes per group"),
    "k": (4, "codes chosen at once"),
    "commitment": (0.25, "pull of the states towards their codes"),
    "recon": (1.0, "weight of the reconstruction errors"),
    "decay": (0.99, "of the moving averages"),
    "codes-lr": (0.01, "learning rate of codes learnt by gradient, in units of their size"),
    "resample-every": (25, "steps between moves of unused codes; 0: never"),
}
STEPS = {
    "steps": (200, "optimiser steps"),
    "batch": (8, "rows at once in each process"),
    "accumulate": (1, "so many batches make a step"),
    "lr": (5e-4, "highest learning rate"),
    "save-every": (100, "steps between checkpoints"),
    "log-every": (25, "steps between logs"),
    "seed": (0, "of codes and order of rows"),
}
SWITCHES = {
    "bf16": "compute in bfloat16; parameters, moments and codes stay float32",
    "gradient-checkpointing": "compute each block again in the backward pass: less memory",
    "fsdp": "split parameters, gradients and moments over the processes (torch's fully_shard)",
}


def options(argv=None):
    "What the command line asks for."
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    for name, (default, told) in (TEXT | CODES | STEPS).items():
        kind, more = (str, "") if default is None else (type(default), " (%(default)s)")
        p.add_argument(f"--{name}", default=default, type=kind, help=told + more)
    sites = "where codebooks go (%(default)s)"
    p.add_argument("--sites", default=["heads.*", "mlp.*"], nargs="+", help=sites)
    select = "how codes are chosen (%(default)s)"
    kinds = ("cosine", "euclidean", "residual")
    p.add_argument("--select", default="residual", choices=kinds, help=select)
    learn = "how codes move: ema has neither gradients nor moments (%(default)s)"
    p.add_argument("--learn", default="ema", choices=("gradient", "ema"), help=learn)
    start = "rows of text from which codes begin; None: 20 tokens per code"
    p.add_argument("--start", type=int, help=start)
    folder = "checkpoints, logs.json and result/ go here"
    p.add_argument("--folder", type=Path, required=True, help=folder)
    for name, told in SWITCHES.items():
        p.add_argument(f"--{name}", action="store_true", help=told)
    return p.parse_args(argv)


def join(fsdp):
    "Meet the processes that torchrun or accelerate launch started; (own number, how many)."
    cuda = device().type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if (fsdp or not alone) and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def begin(args):
    "Model with codes begun from the text, the same in every process; the tokenizer; the text."
    set_seed(args.seed)
    model, tok = load_lm(args.model)
    text = load_text(tok, args.text, args.tokens, length=args.length, split=args.split)
    check_length(model, args.length, "finetune_model")
    form = dict(select=args.select, learn=args.learn, commitment=args.commitment)
    cb = add_codebooks(model, args.sites, args.codes, k=args.k, **form)
    rows = text.ids[: args.start or -(-20 * args.codes // args.length)].split(8)
    cb.init_from_data(rows, generator=seeded(args.seed), pad=text.pad)
    for book in cb.codebooks.values():
        book.resample = partial(resample, book)
    if args.gradient_checkpointing:
        cb.gradient_checkpointing_enable()
    if dist.is_initialized():  # GPUs add in any order, so k-means may end elsewhere in each process
        for t in cb.state_dict().values():
            dist.broadcast(t, 0)
    return cb, tok, text


def train(cb, text, args):
    "Train in whole models; the logs."
    names = (
        "save_every",
        "log_every",
        "seed",
        "bf16",
        "recon",
        "decay",
        "codes_lr",
        "resample_every",
    )
    settings = {name: getattr(args, name) for name in names}
    settings |= dict(lr=args.lr, batch=args.batch, folder=args.folder)
    return finetune(cb, text, args.steps, gradient_accumulation_steps=args.accumulate, **settings)


def main(argv=None):
    "Train, and write logs and result."
    args = options(argv)
    rank, world = join(args.fsdp)
    if rank == 0:
        told = f"finetune_model: {world} process{'es' * (world > 1)} on {device()}"
        if args.fsdp and world == 1:
            told += "; in one process --fsdp splits nothing: start it with"
            told += " torchrun --nproc-per-node N"
        print(told, file=sys.stderr)
    cb, tok, text = begin(args)
    if args.fsdp:
        sharded = Sharded(cb, text, args)
        logs = sharded.train()
        cb = sharded.whole()
    else:
        logs = train(cb, text, args)
    if rank == 0:
        (args.folder / "logs.json").write_text(json.dumps(logs, indent=1))
        cb.save_with_card(args.folder / "result", tok)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ConnectionError) as e:
        sys.exit(f"finetune_model: {e}")
