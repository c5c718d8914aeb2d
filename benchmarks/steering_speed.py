"""Generation under steering beside plain generation, in one run, interleaved; medians.

    python benchmarks/steering_speed.py [--prompts 80] [--tokens 64] [--repeats 5]

The course's model, its autoencoder of the last block, and its model with codes."""
import argparse, statistics, time
import numpy as np, torch
from codebook_tutorial.codebook import CodebookModel
from codebook_tutorial.core import data_path
from codebook_tutorial.effects import generate, topic_words
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sites import intervene
from codebook_tutorial.steering import add_vector, find_choices, find_switches, split_words, steer
from codebook_tutorial.stories import prompts


def measure(n_prompts=80, tokens=64, repeats=5):
    "Rows: who, seconds (median, lowest, highest), ratio to plain generation of the same model."
    model, tok = load_lm("stories")
    coded = CodebookModel.from_pretrained(data_path("codes/single"))
    text, (choose, hidden) = load_text(tok, "stories", n_tokens=60_000, length=256, split="train", seed=3), split_words(topic_words())
    choices, sae = find_choices(text, choose, hidden), load_sae(data_path("sae/last"))
    switches, tables = find_switches(model, {"resid.2": sae}, text, choices), find_switches(coded, {site: coded.codebooks[site] for site in ("heads.2", "mlp.2")}, text[:150], choices=find_choices(text[:150], choose, hidden))
    start = [p.ids for p in prompts(n_prompts, lambda s: np.searchsorted(s.sentences, [1]) if s.document == "story" else [], seed=0, each=1)][:n_prompts]
    target = torch.arange(len(start)) % len(choices.names)
    ways = {"plain": (model, None), "a vector added": (model, lambda rows: intervene(model, {"resid.2": add_vector(sae.directions[0])})), "switch of features": (model, lambda rows: steer(model, switches, target[rows])),
            "codes, plain": (coded, None), "switch of codes": (coded, lambda rows: steer(coded, tables, target[rows]))}
    times = {name: [] for name in ways}
    for turn in range(repeats + 1):                                    # the first warms up
        for name, (of, way) in ways.items():
            begin = time.process_time(); generate(of, tok, start, tokens, steer=way, progress=False)
            if turn: times[name].append(time.process_time() - begin)
    middle = {name: statistics.median(t) for name, t in times.items()}
    return [dict(who=name, seconds=middle[name], low=min(t), high=max(t), x_plain=middle[name] / middle["codes, plain" if "codes" in name else "plain"]) for name, t in times.items()]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--prompts", type=int, default=80); p.add_argument("--tokens", type=int, default=64); p.add_argument("--repeats", type=int, default=5); p.add_argument("--threads", type=int, default=1)
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    for r in measure(args.prompts, args.tokens, args.repeats): print(f"{r['who']:20s} {r['seconds']:6.2f} s ({r['low']:.2f} to {r['high']:.2f})  {r['x_plain']:.2f} x plain")


if __name__ == "__main__": main()
