"""Finetune the stories' model with codes, in three forms, and without (the control) -> data/codes/:
about a quarter of an hour on one CPU core.

usage: python data/make_codes.py [--only single] [--steps 600] [--out data/codes]

A stopped run resumes from its last checkpoint in out/codes/. Weights and codes are kept in half
precision, codes without the averages they were learnt by.
"""

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path

import torch
from transformers import logging

from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.card import model_card
from codebook_tutorial.dictionary.finetune import finetune
from codebook_tutorial.model.run import lm_loss, next_probs
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.world.prompts import gift_prompts

ROOT = Path(__file__).resolve().parents[1]
SITES = ["heads.*", "mlp.*"]
FORMS = {
    "control": None,
    "residual": dict(n_codes=1024, k=4, select="residual", learn="ema", commitment=0.25),
    "single": dict(n_codes=2048, k=1, select="euclidean", learn="ema", commitment=0.25),
    # the paper's: k best cosines, summed
    "top8": dict(n_codes=1024, k=8, select="cosine", learn="gradient", commitment=0.25),
}


def options():
    "What the command line asks for."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--only", choices=list(FORMS))
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=ROOT / "data" / "codes")
    p.add_argument("--work", type=Path, default=ROOT / "out" / "codes", help="for checkpoints")
    return p.parse_args()


def lean(cb):
    "Codes as they are, without the averages that moved them."
    for book in cb.codebooks.values():
        if book.learn == "gradient":
            continue
        for name in ("size", "total", "new"):
            delattr(book, name)
        book.learn = book.config["learn"] = "gradient"
    return cb


def train(form, args, folder):
    "The model with codes (or alone), finetuned; its tokenizer; its logs."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2_000_000, length=256, split="train", seed=5)
    if form:
        model = add_codebooks(model, SITES, **form)
        model.init_from_data(text.ids[:400], generator=seeded(args.seed), pad=text.pad)
    return model, tok, finetune(model, text[400:], args.steps, folder=folder, seed=args.seed)


def save(model, tok, folder):
    "In half precision; returns what a reader loads."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if isinstance(model, CodebookModel):
        lean(model).half().save_pretrained(folder)
        return CodebookModel.from_pretrained(folder)
    model.half().save_pretrained(folder)
    tok.save_pretrained(folder)
    return load_lm(folder)[0]


def measured(model, tok):
    "Loss on unseen stories, and who gets the gift."
    asked = gift_prompts(300)
    answers = torch.tensor([q.answer for q in asked])
    test = load_text(tok, "stories", n_tokens=50_000, length=256)
    right = next_probs(model, [q.ids for q in asked]).argmax(-1) == answers
    return dict(loss=lm_loss(model, test), ioi_accuracy=right.double().mean().item())


def make(name, args):
    "One folder: weights, card and training.json."
    start, form, folder = time.process_time(), FORMS[name], args.out / name
    model, tok, logs = train(form, args, args.work / name)
    model = save(model, tok, folder)
    found = measured(model, tok)
    if form:
        card = model_card(model, {"50,000 tokens of unseen stories": found["loss"]})
        (folder / "README.md").write_text(card)
    files = sorted(folder.glob("*.safetensors"))
    training = dict(
        command=f"python data/make_codes.py --steps {args.steps} --seed {args.seed}",
        form=form,
        sites=SITES if form else [],
        steps=args.steps,
        seed=args.seed,
        **found,
        last_log=dict(logs[-1]),
        cpu_hours=(time.process_time() - start) / 3600,
        sha256={f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files},
    )
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    print(name, json.dumps(found), sum(f.stat().st_size for f in folder.iterdir()), flush=True)


def main():
    "Make one folder or all."
    args = options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in [args.only] if args.only else FORMS:
        make(name, args)


if __name__ == "__main__":
    main()
