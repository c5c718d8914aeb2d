"""How long it takes to explain and score 150 features of each of eight dictionaries of one layer with the predicate explainer, from states on disk; medians.

    python benchmarks/autointerp_speed.py [--fragments 5000] [--features 150] [--repeats 3]

Dictionaries are there already (training them is another benchmark); reading the states, encoding, choosing fragments, explaining, simulating and correlating are timed, by step."""
import argparse, statistics, tempfile, time
from pathlib import Path
import torch
from codebook_tutorial.activations import harvest
from codebook_tutorial.autointerp import fragments, interpret, make_cases, pieces, some_features
from codebook_tutorial.baselines import Affine, ica, pca
from codebook_tutorial.codebook import Codebook
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import random_directions
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.predicates import PredicateExplainer, story_words
from codebook_tutorial.sae import train_sae

STEPS = ("read states", "encode", "choose fragments", "explain and score")


def one_run(store, site, methods, words, n):
    times, last = dict.fromkeys(STEPS, 0.), time.perf_counter()
    def lap(step):
        nonlocal last
        now = time.perf_counter(); times[step] += now - last; last = now
    x = store.load(site); lap("read states")
    explainer, explained = PredicateExplainer(**story_words()), 0      # a new one: nothing remembered from the last run
    for dictionary in methods.values():
        f, ids = some_features(dictionary, x, n); lap("encode")
        cases = make_cases(f, words, ids); lap("choose fragments")
        rows = interpret(cases, explainer); lap("explain and score")
        explained += sum(r is not None for r in rows)
    return times, explained


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--fragments", type=int, default=5000); p.add_argument("--features", type=int, default=150); p.add_argument("--repeats", type=int, default=3); p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load_lm("stories")
    text = fragments(load_text(tok, n_tokens=100 * args.fragments, length=256, split="train", seed=11))[:args.fragments]
    words = pieces(text, tok)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        store = harvest(model, text, "resid.1", Path(folder) / "states", verbose=False)
        print(f"{len(text):,} fragments, {text.n_tokens:,} tokens; states of one site written in {time.perf_counter() - start:.1f} s")
        x = store.load("resid.1")
        few = x[torch.randperm(len(x), generator=seeded(0))[:40_000]]
        sae, wide = load_sae(data_path("sae/tied")), lambda **kw: Affine(random_directions(384, 96, seed=100).directions, mean=x.mean(0), **kw)
        methods = {"sae_tied": sae, "sae_topk": train_sae(x, 384, "topk", k=12, steps=200), "sae_alpha0": train_sae(x, 384, "tied", alpha=0., steps=200, resample=()), "codebook": Codebook(96, 384, 12, select="residual").init_from(few, generator=seeded(0)).eval(),
                   "random": wide(relu=True), "random, signed": wide(), "ica": ica(x), "pca": pca(x)}      # the last two have 96 features, all of which are taken
        runs = [one_run(store, "resid.1", methods, words, args.features) for _ in range(args.repeats)]
    totals = [sum(times.values()) for times, _ in runs]
    for step in STEPS: print(f"{step:18s} {statistics.median(times[step] for times, _ in runs):6.2f} s")
    print(f"{'together':18s} {statistics.median(totals):6.2f} s ({min(totals):.2f} to {max(totals):.2f}), {runs[0][1]} features of {len(methods)} dictionaries, {args.threads} thread(s)")


if __name__ == "__main__": main()
