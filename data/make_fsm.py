"""Train the three TokFSM models of the course -> data/fsm_0 .. fsm_2: about 80 CPU seconds each.

usage: python data/make_fsm.py [--seeds 0 1 2] [--steps 3000] [--out data]
"""

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from codebook_tutorial.core import device, seeded
from codebook_tutorial.world.fsm import TokFSM, fsm_model, legal_mass, train_fsm


def options():
    "What the command line asks for."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    seeds = "seed of weights and of the stream of walks"
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help=seeds)
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    return p.parse_args()


def main():
    "Train, save and report each model."
    args, fsm = options(), TokFSM()
    torch.set_num_threads(1)  # sums in a fixed order: the same weights on the same kind of machine
    for seed in args.seeds:
        start, model = time.process_time(), fsm_model(seed=seed).to(device())
        losses = train_fsm(model, fsm, args.steps, seed=seed)
        mass = legal_mass(model, fsm, fsm.sample(64, 128, seeded(99)).to(device()))
        folder = args.out / f"fsm_{seed}"
        model.cpu().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        row = {
            "model": folder.name,
            "steps": args.steps,
            "loss, last 100 steps": round(sum(losses[-100:]) / 100, 4),
            "legal mass": round(mass, 4),
            "cpu_seconds": round(time.process_time() - start),
            "sha256": sha,
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
