"""How long it takes to order one dictionary's features by what patching them does, and how many layers are run for it; beside the naive way (every feature tried at every step, whole model, one set at a time), whose time is that of the bare model on the same prompts times the number of passes.

    python benchmarks/patching_speed.py [--prompts 32] [--features 32] [--repeats 3] [--model stories]

With the course's model the dictionary is the shipped autoencoder; with another, four times as many random directions as the site has numbers (what is timed does not depend on them)."""
import argparse, statistics, time
import torch
from codebook_tutorial.core import data_path
from codebook_tutorial.dictionary import random_directions
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm
from codebook_tutorial.pairs import task_pairs
from codebook_tutorial.patching import Patch, acdc_order, attribution_order, greedy_order
from codebook_tutorial.sites import site_dims


def timed(fn, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter(); out = fn()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=32); p.add_argument("--features", type=int, default=32); p.add_argument("--repeats", type=int, default=3); p.add_argument("--threads", type=int, default=1)
    p.add_argument("--model", default="stories"); p.add_argument("--task", default="ioi"); p.add_argument("--site", default=None, help="the middle layer's output, unless said otherwise"); p.add_argument("--batch", type=int, default=64)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load_lm(args.model)
    layers = model.config.num_hidden_layers
    site, pairs = args.site or f"resid.{layers // 2}", task_pairs(tok, args.task, args.prompts)
    d = site_dims(model, site)[site]
    dictionary = (load_sae(data_path("sae/tied")) if args.model == "stories" and site == "resid.1" else random_directions(4 * d, d)).to(next(model.parameters()).device)
    ids = pairs.base.to(next(model.parameters()).device)
    with torch.no_grad(): bare, _ = timed(lambda: model(input_ids=ids, use_cache=False), 20)
    n = len(dictionary.directions)
    naive = sum(n - i for i in range(args.features))
    print(f"{site}, {n} features, {args.prompts} prompts of up to {ids.shape[1]} tokens; one bare pass {bare * 1e3:.2f} ms; naive greedy: {naive:,} passes, {naive * layers:,} layers, {naive * bare:.0f} s")
    ways = dict(attribution=lambda patch: attribution_order(patch, args.features), attribution_3=lambda patch: attribution_order(patch, args.features, points=3), greedy=lambda patch: greedy_order(patch, args.features),
                greedy_each_prompt=lambda patch: greedy_order(patch, args.features, per_prompt=True), greedy_all=lambda patch: greedy_order(patch, args.features, width=None), acdc=lambda patch: acdc_order(patch))
    for name, way in ways.items():
        def once():
            patch = Patch(model, site, dictionary, pairs, args.batch)
            way(patch)
            return patch
        seconds, patch = timed(once, 1 if name == "greedy_all" else args.repeats)
        run = patch.passes * patch.tail.n_layers
        print(f"{name:20} {seconds:7.2f} s  {patch.passes:7,} passes  {run:7,} layers  {naive * layers / run:8.1f} times fewer layers than naive, {naive * bare / seconds:7.1f} times faster")


if __name__ == "__main__": main()
