"""What three networks know of the stories, trained with other seeds of weights and text -> claims/04.full.json: about five CPU minutes.

usage: python scripts/stories_full.py [data/stories out/stories_1/model out/stories_2/model]

The folders are what `scripts/make_stories.py --seed N --out FOLDER` wrote, in the order of their seeds.
"""
import argparse, hashlib, json, platform, subprocess, time
from pathlib import Path
import torch
from codebook_tutorial.concepts import QUESTIONS, ask, score, shuffled
from codebook_tutorial.models import lm_loss, load_lm, load_text, next_probs
from codebook_tutorial.stories import gift_prompts
from make_stories import entropy                      # the script beside this one

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / "data/stories", ROOT / "out/stories_1/model", ROOT / "out/stories_2/model"]


def measure(folder):
    "Loss on 50,000 unseen tokens; who receives (300 held-out pairs) and its control; every question (200 places) and its control."
    model, tok = load_lm(folder)
    asked = gift_prompts(300)
    p, mixed, answers = next_probs(model, [q.ids for q in asked]), next_probs(model, shuffled(asked)), torch.tensor([q.answer for q in asked])
    row = dict(loss=lm_loss(model, load_text(tok, "stories", n_tokens=50_000, length=256)), ioi_accuracy=(p.argmax(-1) == answers).double().mean().item(),
               ioi_probability=score(p, asked).mean().item(), ioi_accuracy_control=(mixed.argmax(-1) == answers).double().mean().item())
    for question in QUESTIONS:
        found = ask(model, question)
        row |= {question: found["score"].mean().item(), f"{question}, control": found["control"].mean().item()}
    return row


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="*", type=Path, default=FOLDERS)
    args = p.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    rows = []
    for seed, folder in enumerate(args.folders):
        rows.append({"seed": seed, **measure(folder), "sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(), "training": json.loads((folder / "training.json").read_text())})
        print(json.dumps(rows[-1]), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    found = dict(command="python scripts/stories_full.py", commit=commit, hardware="one CPU core", machine=platform.machine(), hours=(time.process_time() - start) / 3600,
                 entropy=entropy(), units="loss and entropy: nats a token; all else shares", rows=rows)
    part = ROOT / "claims/04.full.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n"); part.replace(ROOT / "claims/04.full.json")


if __name__ == "__main__": main()
