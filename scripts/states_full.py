"""The long run of chapter 03: codebook sizes, choices of sites, and a model of the paper's own shape -> claims/03.full.json.

usage: python scripts/states_full.py [--train-steps 14000] [--work out/full]

Trains the paper's shape (4 layers, d=128, standard rotary, 796,160 parameters; about 50 minutes on one CPU core) unless it stands in the work
folder already; every finished row is kept there too, so that a stopped run goes on where it was.
"""
import argparse, hashlib, json, platform, subprocess, time
from pathlib import Path
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, logging
from codebook_tutorial.codebook import add_codebooks
from codebook_tutorial.core import data_path, device, seeded
from codebook_tutorial.fsm import TokFSM, drop_first_digit, generate_walks, legal_mass, legal_steps, state_accuracy, train_fsm
from codebook_tutorial.states import measure_beliefs, measure_codes

ROOT = Path(__file__).resolve().parents[1]


def paper_shape(folder, steps):
    "A plain GPT-NeoX of the paper's size, transformers' own initialisation and rotary settings, trained on the endless stream."
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=11, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
                                                 max_position_embeddings=2048, bos_token_id=10, eos_token_id=None)).to(device())
        start = time.process_time()
        losses = train_fsm(model, TokFSM(), steps, batch=16, lr=1e-3, warmup=200)
        model.cpu().save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps({"steps": steps, "batch": 16, "loss": sum(losses[-200:]) / 200, "cpu_hours": (time.process_time() - start) / 3600}))
    return AutoModelForCausalLM.from_pretrained(folder).to(device()).eval()


def commit():
    "The commit that the numbers come from."
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def along_the_walk(model, fsm):
    "Legal steps in 400 sampled sequences: in the first ten steps, the last ten; read one digit late (off the beat); legal in either reading."
    ids = generate_walks(model, 400)
    on, off = (legal_steps(t, fsm) for t in (ids, drop_first_digit(ids)))
    return {"first_ten": on[:, :10].mean().item(), "last_ten": on[:, -10:].mean().item(), "off_beat_last_ten": off[:, -10:].mean().item(),
            "either_last_ten": torch.maximum(on, off)[:, -10:].mean().item(), "off_beat_where_on_is_illegal": off[on == 0].mean().item()}


def one_row(load, name, sites, n_codes, fsm):
    "One setting: codebooks begun from data, nothing trained, all measures."
    start, model, sampled = time.process_time(), load(), (sites, n_codes) == ("heads.* + mlp.*", 1000)
    seed = int(name[-1]) if name.startswith("shipped") else 0
    base = {"base_legal_mass": legal_mass(model, fsm, fsm.sample(64, 128, seeded(99)).to(device())), "base_state_accuracy": state_accuracy(model, fsm),
            "base_sampled": along_the_walk(model, fsm) if sampled else None}
    cb = add_codebooks(model, sites.split(" + "), n_codes).eval().init_from_data(fsm.sample(160 * max(1, n_codes // 1000), 128, seeded(seed)), generator=seeded(seed))
    books = list(cb.codebooks)
    mlp, attention = [s for s in books if s.startswith("mlp")], [s for s in books if not s.startswith("mlp")]
    sets = {"all": books, **({"mlp": mlp} if mlp else {}), **({"attention": attention} if attention else {}), **{s: [s] for s in mlp}}
    beliefs = measure_beliefs(cb, fsm, sets)
    jsds = {f"jsd_{k}": beliefs[k][1] if k in beliefs else None for k in ("all", "mlp", "attention")}
    extra = {k: v for k, v in beliefs.items() if k not in ("all", "mlp", "attention")}
    return {"model": name, "sites": sites, "n_codes": n_codes, **base, **measure_codes(cb, fsm, (mlp or attention)[-1]), **jsds, "beliefs": extra, "sampled": along_the_walk(cb, fsm) if sampled else None,
            "commit": commit(), "cpu_seconds": round(time.process_time() - start, 1)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train-steps", type=int, default=14_000)
    p.add_argument("--work", type=Path, default=ROOT / "out" / "full", help="where the trained model and finished rows are kept")
    args = p.parse_args()
    logging.set_verbosity_error(); logging.disable_progress_bar(); torch.set_num_threads(1)
    fsm, kept = TokFSM(), args.work / "rows.json"
    args.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(kept.read_text()) if kept.exists() else []
    shipped = lambda s: (lambda: AutoModelForCausalLM.from_pretrained(data_path(f"fsm_{s}")).to(device()).eval(), f"shipped, seed {s}")
    paper = (lambda: paper_shape(args.work / "paper_shape", args.train_steps), "paper's shape")
    jobs = [(*shipped(s), "heads.* + mlp.*", n) for n in (400, 700, 1000, 1500, 2000, 4000) for s in range(3)]
    jobs += [(*shipped(s), sites, 1000) for sites in ("mlp.*", "heads.*", "attn.* + mlp.*") for s in range(3)]
    jobs += [(*paper, sites, n) for sites, n in (("heads.* + mlp.*", 1000), ("heads.* + mlp.*", 2000), ("heads.* + mlp.*", 4000), ("attn.* + mlp.*", 2000), ("mlp.*", 2000), ("heads.*", 2000))]
    done = {(r["model"], r["sites"], r["n_codes"]) for r in rows}
    for load, name, sites, n in tqdm(jobs, desc="states_full"):
        if (name, sites, n) in done: continue
        rows.append(one_row(load, name, sites, n, fsm))
        kept.with_suffix(".part").write_text(json.dumps(rows)); kept.with_suffix(".part").replace(kept)
    training = json.loads((args.work / "paper_shape" / "training.json").read_text())
    sha = {p.parent.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in [*(data_path(f"fsm_{s}") / "model.safetensors" for s in range(3)), args.work / "paper_shape" / "model.safetensors"]}
    out = {"command": f"python scripts/states_full.py --train-steps {args.train_steps}", "commit": commit(), "hardware": "one CPU core", "machine": platform.machine(),
           "hours": sum(r["cpu_seconds"] for r in rows) / 3600 + training["cpu_hours"], "paper_shape_training": training, "inputs_sha256": sha,
           "units": "shares 0-1; jsd_*: to b's true next states / untouched, codes at boundary and next; beliefs: [boundary alone, boundary and next]", "rows": rows}
    path = ROOT / "claims" / "03.full.json"
    path.with_suffix(".part").write_text(json.dumps(out, indent=1) + "\n"); path.with_suffix(".part").replace(path)
    print(f"{path}: {len(rows)} rows, {out['hours']:.2f} CPU hours")


if __name__ == "__main__": main()
