"""Train the three TokFSM models that the course ships in data/fsm_0 .. fsm_2: about 80 CPU seconds each on one core.

usage: python scripts/make_fsm.py [--seeds 0 1 2] [--steps 3000] [--out data]
"""
import argparse, hashlib, json, time
from pathlib import Path
import torch
from codebook_tutorial.core import device, seeded
from codebook_tutorial.fsm import TokFSM, fsm_model, legal_mass, train_fsm


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seed of weights and of the stream of walks")
    p.add_argument("--steps", type=int, default=3000)
    p.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "data")
    args = p.parse_args()
    torch.set_num_threads(1)              # sums in a fixed order: the same weights again on the same kind of machine
    fsm = TokFSM()
    for seed in args.seeds:
        start, model = time.process_time(), fsm_model(seed=seed).to(device())
        losses = train_fsm(model, fsm, args.steps, seed=seed)
        mass = legal_mass(model, fsm, fsm.sample(64, 128, seeded(99)).to(device()))
        folder = args.out / f"fsm_{seed}"
        model.cpu().save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        sha = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        print(json.dumps({"model": folder.name, "steps": args.steps, "loss, last 100 steps": round(sum(losses[-100:]) / 100, 4), "legal mass": round(mass, 4),
                          "cpu_seconds": round(time.process_time() - start), "sha256": sha}), flush=True)


if __name__ == "__main__": main()
