"""Chapter 03: codebook sizes, choices of sites, and a model of the paper's own shape.

Trains the paper's shape (4 layers, d=128, standard rotary, 796,160 parameters; about 50 minutes on
one CPU core) unless out/paper_shape_STEPS holds it.
"""

import json
import time
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, logging

from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.core import data_path, device, seeded
from codebook_tutorial.world.fsm import (
    TokFSM,
    drop_first_digit,
    generate_walks,
    legal_mass,
    legal_steps,
    state_accuracy,
    train_fsm,
)
from codebook_tutorial.feature.states import measure_beliefs, measure_codes
from grid import ROOT, Grid, commit, sha256

BOTH, PAPER = "heads.* + mlp.*", "paper's shape"


class Settings(NamedTuple):
    version: int = 1  # raise when what a row means changes
    train_steps: int = 14_000
    sizes: tuple = (400, 700, 1000, 1500, 2000, 4000)
    seeds: int = 3


class Job(NamedTuple):
    model: str
    sites: str
    n_codes: int


def jobs(s):
    "Shipped models at every size, at other sites; the paper's shape."
    shipped = [f"shipped, seed {seed}" for seed in range(s.seeds)]
    others = ("mlp.*", "heads.*", "attn.* + mlp.*")
    found = [Job(name, BOTH, n) for n in s.sizes for name in shipped]
    found += [Job(name, sites, 1000) for sites in others for name in shipped]
    found += [Job(PAPER, BOTH, n) for n in (1000, 2000, 4000)]
    return found + [Job(PAPER, sites, 2000) for sites in ("attn.* + mlp.*", "mlp.*", "heads.*")]


def paper_folder(steps):
    "Where the paper's shape is kept."
    return ROOT / "out" / f"paper_shape_{steps}"


def train_paper_shape(steps):
    "GPT-NeoX of the paper's size, transformers' own initialisation and rotary, endless stream."
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=11,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=2048,
        bos_token_id=10,
        eos_token_id=None,
    )
    model, start = GPTNeoXForCausalLM(config).to(device()), time.process_time()
    losses = train_fsm(model, TokFSM(), steps, batch=16, lr=1e-3, warmup=200)
    model.cpu().save_pretrained(paper_folder(steps))
    training = dict(steps=steps, batch=16, loss=sum(losses[-200:]) / 200)
    training["cpu_hours"] = (time.process_time() - start) / 3600
    (paper_folder(steps) / "training.json").write_text(json.dumps(training))


def load(name, steps):
    "A model by the name that rows give it."
    folder = paper_folder(steps) if name == PAPER else data_path(f"fsm_{name[-1]}")
    if name == PAPER and not (folder / "training.json").exists():
        train_paper_shape(steps)
    return AutoModelForCausalLM.from_pretrained(folder).to(device()).eval()


def along_the_walk(model, fsm):
    "Legal steps in 400 sampled sequences: first ten, last ten; off the beat; in either reading."
    ids = generate_walks(model, 400)
    on, off = (legal_steps(t, fsm) for t in (ids, drop_first_digit(ids)))
    return {
        "first_ten": on[:, :10].mean().item(),
        "last_ten": on[:, -10:].mean().item(),
        "off_beat_last_ten": off[:, -10:].mean().item(),
        "either_last_ten": torch.maximum(on, off)[:, -10:].mean().item(),
        "off_beat_where_on_is_illegal": off[on == 0].mean().item(),
    }


def belief_sets(sites):
    "Which codebooks are changed together."
    mlp = [s for s in sites if s.startswith("mlp")]
    attention = [s for s in sites if not s.startswith("mlp")]
    kinds = dict(all=sites, mlp=mlp, attention=attention)
    return {k: v for k, v in kinds.items() if v or k == "all"} | {s: [s] for s in mlp}


def run_one(job, s):
    "One setting: codebooks begun from data, nothing trained, all measures."
    fsm, model = TokFSM(), load(job.model, s.train_steps)
    seed = 0 if job.model == PAPER else int(job.model[-1])
    sampled = job[1:] == (BOTH, 1000)
    row = job._asdict() | dict(
        base_legal_mass=legal_mass(model, fsm, fsm.sample(64, 128, seeded(99)).to(device())),
        base_state_accuracy=state_accuracy(model, fsm),
        base_sampled=along_the_walk(model, fsm) if sampled else None,
    )
    walks = fsm.sample(160 * max(1, job.n_codes // 1000), 128, seeded(seed))
    cb = add_codebooks(model, job.sites.split(" + "), job.n_codes).eval()
    cb.init_from_data(walks, generator=seeded(seed))
    sets = belief_sets(list(cb.codebooks))
    beliefs = measure_beliefs(cb, fsm, sets)
    row |= measure_codes(cb, fsm, sets.get("mlp", sets["all"])[-1])
    for kind in ("all", "mlp", "attention"):
        found = beliefs.pop(kind, None)
        row[f"jsd_{kind}"] = None if found is None else found[1]
    row |= dict(beliefs=beliefs, sampled=along_the_walk(cb, fsm) if sampled else None)
    return row | dict(commit=commit())


def finish(grid):
    "What the file holds after its header, and what its header does not know of the paper's shape."
    folder = paper_folder(grid.settings.train_steps)
    training = json.loads((folder / "training.json").read_text())
    weights = {f"fsm_{i}": data_path(f"fsm_{i}") for i in range(3)} | dict(paper_shape=folder)
    return dict(
        paper_shape_training=training,
        inputs_sha256={
            name: sha256(where / "model.safetensors") for name, where in weights.items()
        },
        units="shares 0-1; jsd_*: to b's true next states / untouched, codes at boundary and next;"
        " beliefs: [boundary alone, boundary and next]",
        rows=grid.rows(),
    )


GRID = Grid(__file__, Settings(), jobs, run_one=run_one, finish=finish, hardware="one CPU core")

if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    GRID.main()
