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


def measure(tokens=100_000, name="stories", repeats=5):
    "Rows: who, seconds (median, lowest, highest), share of the whole model's throughput."
    model, tok = load_lm(name)
    text = load_text(tok, "stories" if name == "stories" else None, n_tokens=tokens, length=256)
    n = model.config.num_hidden_layers
    every = [f"resid.{n // 2}", f"mlp.{n // 2}", f"attn.{n // 2}", f"neurons.{n // 2}"]
    root, times = Path(tempfile.mkdtemp()), {}
    for turn in range(repeats + 1):                                # the first warms up
        now = {"whole model": timed(lambda: forward(model, text)), "without its head": timed(lambda: forward(model.base_model, text))}
        for k in range(1, 5): now[f"harvest, {k} site{'s' * (k > 1)}"] = timed(lambda: harvest(model, text, every[:k], root / f"{turn}-{k}", verbose=False))
        shutil.rmtree(root, ignore_errors=True); root.mkdir()
        if turn:
            for who, t in now.items(): times.setdefault(who, []).append(t)
    floor = statistics.median(times["whole model"])
    return [dict(who=who, seconds=(t := statistics.median(ts)), low=min(ts), high=max(ts), tokens_per_second=text.n_tokens / t, of_whole_model=floor / t) for who, ts in times.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=100_000); p.add_argument("--model", default="stories"); p.add_argument("--repeats", type=int, default=5); p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.model}, {args.threads} thread(s), float16 store, checksums included")
    for r in measure(args.tokens, args.model, args.repeats): print(f"{r['who']:20s} {r['seconds']:7.2f} s ({r['low']:.2f} to {r['high']:.2f})  {r['tokens_per_second']:10,.0f} tokens/s  {r['of_whole_model']:5.2f} of the whole model's throughput")


if __name__ == "__main__": main()
