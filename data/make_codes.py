"""Finetune the stories' model with codes, in three forms, and without (the control) -> data/codes/: about a quarter of an hour on one CPU core.

usage: python scripts/make_codes.py [--only single] [--steps 600] [--out data/codes]

A stopped run goes on from its last checkpoint in out/codes/. Weights and codes are kept in half precision, codes without the averages they were learnt by.
"""
import argparse, hashlib, json, shutil, time
from pathlib import Path
import torch
from transformers import logging
from codebook_tutorial.codebook import CodebookModel, add_codebooks
from codebook_tutorial.core import seeded
from codebook_tutorial.finetune import finetune, model_card
from codebook_tutorial.models import lm_loss, load_lm, load_text, next_probs
from codebook_tutorial.stories import gift_prompts

ROOT = Path(__file__).resolve().parents[1]
SITES = ["heads.*", "mlp.*"]
FORMS = {"control": None,
         "residual": dict(n_codes=1024, k=4, select="residual", learn="ema", commitment=.25),
         "single": dict(n_codes=2048, k=1, select="euclidean", learn="ema", commitment=.25),
         "top8": dict(n_codes=1024, k=8, select="cosine", learn="gradient", commitment=.25)}      # the paper's: k best cosines, summed


def lean(cb):
    "Codes as they are, without the averages that moved them."
    for book in cb.codebooks.values():
        if book.learn == "gradient": continue
        for name in ("size", "total", "new"): delattr(book, name)
        book.learn = book.config["learn"] = "gradient"
    return cb


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=list(FORMS)); p.add_argument("--steps", type=int, default=600); p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=ROOT / "data" / "codes"); p.add_argument("--work", type=Path, default=ROOT / "out" / "codes", help="where checkpoints are kept meanwhile")
    args = p.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); torch.set_num_threads(1)
    asked = gift_prompts(300)
    answers = torch.tensor([q.answer for q in asked])
    for name in [args.only] if args.only else FORMS:
        start, (model, tok) = time.process_time(), load_lm("stories")
        text, test = load_text(tok, "stories", n_tokens=2_000_000, length=256, split="train", seed=5), load_text(tok, "stories", n_tokens=50_000, length=256)
        cb = add_codebooks(model, SITES, **FORMS[name]).init_from_data(text.ids[:400], generator=seeded(args.seed), pad=text.pad) if FORMS[name] else model
        logs = finetune(cb, text[400:], args.steps, folder=args.work / name, seed=args.seed)
        folder = args.out / name
        shutil.rmtree(folder, ignore_errors=True); folder.mkdir(parents=True)
        if FORMS[name]: lean(cb).half().save_pretrained(folder); cb = CodebookModel.from_pretrained(folder)
        else: cb.half().save_pretrained(folder); tok.save_pretrained(folder); cb, _ = load_lm(folder)
        found = dict(loss=lm_loss(cb, test), ioi_accuracy=(next_probs(cb, [q.ids for q in asked]).argmax(-1) == answers).double().mean().item())
        if FORMS[name]: (folder / "README.md").write_text(model_card(cb, {"50,000 tokens of unseen stories": found["loss"]}))
        sha = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.safetensors"))}
        training = dict(command=f"python scripts/make_codes.py --steps {args.steps} --seed {args.seed}", form=FORMS[name], sites=SITES if FORMS[name] else [], steps=args.steps, seed=args.seed, **found,
                        last_log={k: v for k, v in logs[-1].items()}, cpu_hours=(time.process_time() - start) / 3600, sha256=sha)
        (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
        print(name, json.dumps(found), sum(f.stat().st_size for f in folder.iterdir()), flush=True)


if __name__ == "__main__": main()
