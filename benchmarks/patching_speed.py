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


def measure(prompts=32, features=32, repeats=3, name="stories", task="ioi", site=None, batch=64):
    "One row for the naive way (its time is that of the bare model times the passes), one for each order: seconds, passes, layers, and how many times fewer layers."
    model, tok = load_lm(name)
    layers = model.config.num_hidden_layers
    site, pairs, where = site or f"resid.{layers // 2}", task_pairs(tok, task, prompts), next(model.parameters()).device
    d = site_dims(model, site)[site]
    dictionary = (load_sae(data_path("sae/tied")) if name == "stories" and site == "resid.1" else random_directions(4 * d, d)).to(where)
    ids = pairs.base.to(where)
    with torch.no_grad(): bare, _ = timed(lambda: model(input_ids=ids, use_cache=False), 20)
    n = len(dictionary.directions)
    naive = sum(n - i for i in range(features))
    rows = [dict(who="naive greedy, computed", seconds=naive * bare, passes=naive, layers=naive * layers, fewer_layers=1., site=site, n_feats=n)]
    ways = dict(attribution=lambda patch: attribution_order(patch, features), attribution_3=lambda patch: attribution_order(patch, features, points=3), greedy=lambda patch: greedy_order(patch, features),
                greedy_each_prompt=lambda patch: greedy_order(patch, features, per_prompt=True), greedy_all=lambda patch: greedy_order(patch, features, width=None), acdc=lambda patch: acdc_order(patch))
    for who, way in ways.items():
        def once():
            patch = Patch(model, site, dictionary, pairs, batch)
            way(patch)
            return patch
        seconds, patch = timed(once, 1 if who == "greedy_all" else repeats)
        run = patch.passes * patch.tail.n_layers
        rows.append(dict(who=who, seconds=seconds, passes=patch.passes, layers=run, fewer_layers=naive * layers / run, site=site, n_feats=n))
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=32); p.add_argument("--features", type=int, default=32); p.add_argument("--repeats", type=int, default=3); p.add_argument("--threads", type=int, default=1)
    p.add_argument("--model", default="stories"); p.add_argument("--task", default="ioi"); p.add_argument("--site", default=None, help="the middle layer's output, unless said otherwise"); p.add_argument("--batch", type=int, default=64)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    rows = measure(args.prompts, args.features, args.repeats, args.model, args.task, args.site, args.batch)
    for r in rows: print(f"{r['who']:24} {r['seconds']:7.2f} s  {r['passes']:7,} passes  {r['layers']:7,} layers  {r['fewer_layers']:8.1f} times fewer layers, {rows[0]['seconds'] / r['seconds']:7.1f} times faster than naive")


if __name__ == "__main__": main()
