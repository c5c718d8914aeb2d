"""Chapter 04: what three networks know of the stories, trained with other seeds of weights and
text; about five CPU minutes.

The folders are what `data/make_stories.py --seed N --out FOLDER` wrote, in order of their seeds.
"""

import json
import sys
from typing import NamedTuple

import torch

from codebook_tutorial.world.questions import QUESTIONS, ask, score, shuffled
from codebook_tutorial.model.run import lm_loss, next_probs
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.world.prompts import gift_prompts
from grid import ROOT, Grid, sha256

sys.path.insert(0, str(ROOT / "data"))
from make_stories import entropy  # noqa: E402


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    folders: tuple = ("data/stories", "out/stories_1/model", "out/stories_2/model")
    tokens: int = 50_000


class Job(NamedTuple):
    seed: int
    sha256: str  # of the model


def jobs(s):
    "One per folder."
    return [Job(i, sha256(ROOT / f / "model.safetensors")) for i, f in enumerate(s.folders)]


def run_one(job, s):
    "Loss on unseen tokens; who receives (300 held-out pairs); questions (200 places); controls."
    folder = ROOT / s.folders[job.seed]
    model, tok = load_lm(folder)
    asked = gift_prompts(300)
    p, mixed = next_probs(model, [q.ids for q in asked]), next_probs(model, shuffled(asked))
    answers = torch.tensor([q.answer for q in asked])
    text = load_text(tok, "stories", n_tokens=s.tokens, length=256)
    row = dict(
        seed=job.seed,
        loss=lm_loss(model, text),
        ioi_accuracy=(p.argmax(-1) == answers).double().mean().item(),
        ioi_probability=score(p, asked).mean().item(),
        ioi_accuracy_control=(mixed.argmax(-1) == answers).double().mean().item(),
    )
    for question in QUESTIONS:
        found = ask(model, question)
        row[question] = found["score"].mean().item()
        row[f"{question}, control"] = found["control"].mean().item()
    training = json.loads((folder / "training.json").read_text())
    return row | dict(sha256=job.sha256, training=training)


def finish(grid):
    "What the file holds after its header."
    units = "loss and entropy: nats a token; all else shares"
    return dict(entropy=entropy(), units=units, rows=grid.rows(seconds=False))


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish, hardware="one CPU core")

if __name__ == "__main__":
    GRID.main()
