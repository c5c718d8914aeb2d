"""How fast `harvest` runs beside the bare model's forward on the same tokens, for one to four sites, in one run, interleaved; medians.

    python benchmarks/harvest_speed.py [--tokens 100000] [--model stories] [--repeats 5]

Two floors: the whole model, as one would call it, and the model without its language-model head, which harvesting does not need."""
import argparse, shutil, statistics, tempfile, time
from pathlib import Path
import torch
from codebook_tutorial.activations import harvest
from codebook_tutorial.models import load_lm, load_text


@torch.no_grad()
def forward(model, text, batch=16):
    for part in (text[i:i + batch] for i in range(0, len(text), batch)): model(input_ids=part.ids.to(model_device(model)), use_cache=False)
    if torch.cuda.is_available(): torch.cuda.synchronize()

def model_device(model): return next(model.parameters()).device

def timed(fn):
    start = time.perf_counter(); fn()
    return time.perf_counter() - start


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=100_000); p.add_argument("--model", default="stories"); p.add_argument("--repeats", type=int, default=5); p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load_lm(args.model)
    text = load_text(tok, "stories" if args.model == "stories" else None, n_tokens=args.tokens, length=256)
    n = model.config.num_hidden_layers
    every = [f"resid.{n // 2}", f"mlp.{n // 2}", f"attn.{n // 2}", f"neurons.{n // 2}"]
    root, times = Path(tempfile.mkdtemp()), {}
    for turn in range(args.repeats + 1):                                # the first warms up
        now = {"whole model": timed(lambda: forward(model, text)), "without its head": timed(lambda: forward(model.base_model, text))}
        for k in range(1, 5): now[f"harvest, {k} site{'s' * (k > 1)}"] = timed(lambda: harvest(model, text, every[:k], root / f"{turn}-{k}", verbose=False))
        shutil.rmtree(root, ignore_errors=True); root.mkdir()
        if turn:
            for name, t in now.items(): times.setdefault(name, []).append(t)
    floor = statistics.median(times["whole model"])
    print(f"{text.n_tokens:,} tokens, {args.model}, {args.threads} thread(s), float16 store, checksums included")
    for name, ts in times.items():
        t = statistics.median(ts)
        print(f"{name:20s} {t:7.2f} s ({min(ts):.2f} to {max(ts):.2f})  {text.n_tokens / t:10,.0f} tokens/s  {floor / t:5.2f} of the whole model's throughput")


if __name__ == "__main__": main()
