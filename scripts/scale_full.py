"""The long run of chapter 14: what passes and training cost beside what was predicted, and what features are worth on changed text, under attack, after longer training and across three seeds -> claims/14.full.json.

usage: python scripts/scale_full.py [--part costs|memory|changes|longer]

Finished rows lie in out/scale_rows: a run that was stopped goes on there. Parts may run side by side; the last to end writes the file."""
import argparse, hashlib, json, platform, subprocess, time
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from codebook_tutorial.answers import states_of
from codebook_tutorial.codebook import add_codebooks
from codebook_tutorial.core import data_path
from codebook_tutorial.dictionary import Directions
from codebook_tutorial.metrics import measure
from codebook_tutorial.models import load_lm
from codebook_tutorial.robust import one_word_attack, relied_on, stories_of, story_changes, trusted
from codebook_tutorial.scale import blank, count, measured_bytes, one_pass, seconds, training_bytes
from codebook_tutorial.scoreboard import concept_board, make_dictionary, stability
from codebook_tutorial.stories import TOPICS

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "scale_rows", ROOT / "claims" / "14.full.json"
SITE, N_FEATS, K, SEEDS, TOKENS = "resid.1", 384, 11, 3, 200_000
METHODS = dict(sae_tied=[.88], sae_topk=None, sae_jumprelu=[.16], codebook=None, kmeans=None, ica=None, pca=None, random=None)          # method -> its penalty
LONGER = {"sae_tied": (250, 1000, 4000), "sae_topk": (250, 1000, 4000)}                              # steps
COSTS = [dict(d=d, layers=2, C=C, k=k, rows=rows) for d in (64, 128, 256) for C, k in ((0, 1), (500, 1), (500, 8), (2000, 1), (2000, 8)) for rows in (2, 8)]
COSTS += [dict(d=d, layers=2, C=C, k=k, rows=4, train=True) for d in (64, 128, 256) for C, k in ((0, 1), (500, 1), (2000, 8))]          # all these are fitted to
HELD_OUT = [dict(d=d, layers=4, C=C, k=k, rows=8) for d in (512, 768) for C, k in ((0, 1), (4000, 1), (4000, 8), (10_000, 1))] + [dict(d=512, layers=4, C=C, k=k, rows=4, train=True) for C, k in ((0, 1), (4000, 1), (4000, 8))]
MEMORY = [dict(size=(d, layers, heads), vocab=2000, codes=codes, rows=8, length=256) for d, layers, heads in ((128, 4, 4), (256, 4, 4), (512, 4, 8)) for codes in (None, dict(n_codes=2000, k=1), dict(n_codes=2000, k=4, learn="ema", select="residual"))]
SHA = {f"data/{name}": hashlib.sha256(data_path(name.rpartition("/")[0]).joinpath(name.rpartition("/")[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors",)}
KEY = hashlib.sha256(json.dumps([2, SITE, N_FEATS, K, TOKENS, METHODS, LONGER, COSTS, HELD_OUT, MEMORY, SHA]).encode()).hexdigest()[:8]      # raise the first number when what a row means changes


def model_of(d, layers, C, k, where, **_):
    model = blank((d, layers, max(1, d // 64)), vocab=2000, device=where)
    return add_codebooks(model, ["heads.*", "mlp.*"], C, k=k) if C else model

def cost(case, fitted):
    passes = {where: one_pass(model_of(**case, where=where), case["rows"], 128, case.get("train", False)) for where in ("meta", "cpu")}
    return case | dict(fitted=fitted, **count(passes["meta"]), seconds=seconds(passes["cpu"]))

def memory(case):
    model = blank(case["size"], case["vocab"])
    counted = training_bytes(add_codebooks(model, ["heads.*", "mlp.*"], **case["codes"]) if case["codes"] else model, case["rows"], case["length"])
    return case | dict(counted=counted, measured=measured_bytes(**case))


class World:
    "The stories' model, texts and states of a seed."
    def __init__(self): self.model, self.kept = load_lm("stories")[0], {}
    def texts(self, seed):
        if seed not in self.kept:
            chosen = stories_of(TOPICS[:len(TOPICS) // 2], 60_000, 7 + seed, "train")
            whole, changes = stories_of(TOPICS, TOKENS, 70 + seed, "train"), story_changes(40_000, seed)
            self.kept = {seed: dict(chosen=chosen, changes=changes, states={name: states_of(self.model, c.text, SITE) for name, c in {"chosen": chosen, "whole": whole, **changes}.items()})}
        return self.kept[seed]

    def changed(self, method, seed):
        t = self.texts(seed)
        d = make_dictionary(method, t["states"]["whole"], N_FEATS, K, seed, METHODS[method])
        with torch.no_grad(): best = trusted(d.encode(t["states"]["chosen"]).cpu().numpy(), t["chosen"].truth[t["chosen"].text.mask].numpy())
        on, plain = {}, t["changes"]["as it is"]
        for name, c in t["changes"].items():
            with torch.no_grad(): f, own = (d.encode(t["states"][n]) for n in (name, "as it is"))
            both = {key: relied_on(best, *((v := some.of(x))[0].cpu().numpy(), v[1]), c.asked) for key, some, x in (("now", c, f), ("was", plain, own))}
            on[name] = both | dict(fvu=measure(d, t["states"][name])["fvu"], l0=measure(d, t["states"][name])["l0"])
        return dict(good=int(best["good"].sum()), on=on, attack=one_word_attack(self.model, SITE, plain.text, plain.truth, {method: (d, best)}, n=60, seed=seed)[method]), d.directions

    def longer(self, method, steps, seed):
        t = self.texts(seed)
        d, whole = make_dictionary(method, t["states"]["whole"], N_FEATS, K, seed, METHODS[method], steps=steps), t["changes"]["as it is"]
        with torch.no_grad(): board = concept_board(d.encode(t["states"]["as it is"]).cpu().numpy(), whole.truth[whole.text.mask].numpy())
        return {key: board[key] for key in ("f1", "precise")} | {key: v for key, v in measure(d, t["states"]["as it is"]).items() if key in ("fvu", "l0", "dead_share")}, d.directions


def grid():
    "(name, part, call), in the order in which they are computed; a call returns a row, or a row and directions."
    world = []
    def of(name, *args): return lambda: getattr(world[0] if world else world.append(World()) or world[0], name)(*args)
    yield from ((f"cost_{i}_{fitted}", "costs", lambda case=case, fitted=fitted: cost(case, fitted)) for fitted, cases in ((True, COSTS), (False, HELD_OUT)) for i, case in enumerate(cases))
    yield from ((f"memory_{i}", "memory", lambda case=case: memory(case)) for i, case in enumerate(MEMORY))
    for seed in range(SEEDS): yield from ((f"changes_{m}_{seed}", "changes", of("changed", m, seed)) for m in METHODS)
    for seed in range(SEEDS): yield from ((f"longer_{m}_{steps}_{seed}", "longer", of("longer", m, steps, seed)) for m in LONGER for steps in LONGER[m])


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", choices=("costs", "memory", "changes", "longer"))
    args, begun = p.parse_args(), time.time()
    torch.set_num_threads(1)
    ROWS.mkdir(parents=True, exist_ok=True)
    todo = list(grid())
    for name, part, call in todo:
        file = ROWS / f"{KEY}_{name}.json"
        if file.exists() or args.part and part != args.part: continue
        start, got = time.process_time(), call()
        row, directions = got if isinstance(got, tuple) else (got, None)
        if directions is not None: save_file({"directions": directions.detach().contiguous().cpu()}, file.with_suffix(".safetensors"))
        file.with_suffix(".part").write_text(json.dumps(row | dict(cpu_seconds=time.process_time() - start))); file.with_suffix(".part").replace(file)
        print(f"{name}: {time.process_time() - start:.0f} s", flush=True)
    rows = {name: ROWS / f"{KEY}_{name}.json" for name, *_ in todo}
    if missing := [name for name, file in rows.items() if not file.exists()]: print(f"{len(missing)} rows to go: {', '.join(missing[:4])} ..."); return
    rows = {name: json.loads(file.read_text()) for name, file in rows.items()}
    read = lambda name: Directions(load_file(ROWS / f"{KEY}_{name}.safetensors")["directions"])
    alike = {f"{part}_{m}": stability([read(f"{part}_{m}_{seed}") for seed in range(SEEDS)]) for part, m in [("changes", m) for m in METHODS] + [("longer", f"{m}_{steps}") for m in LONGER for steps in LONGER[m]]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = dict(command="python scripts/scale_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows.values()) / 3600, settings=KEY, inputs_sha256=SHA,
                 site=SITE, n_feats=N_FEATS, k=K, tokens=TOKENS, seeds="text of the dictionary, text that chooses features, text that is changed, the change's and the method's own randomness", rows=rows, stability=alike)
    CLAIMS.with_suffix(".part").write_text(json.dumps(found, indent=1) + "\n"); CLAIMS.with_suffix(".part").replace(CLAIMS)
    print(f"{CLAIMS.name} written, {(time.time() - begun) / 60:.0f} minutes now")


if __name__ == "__main__": main()
