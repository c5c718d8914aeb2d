"""The long run of chapter 13: every method at two sites of the stories' model, and on the machine with a hundred states, three seeds -> claims/13.full.json; see `hours` there.

usage: python scripts/scoreboard_full.py [--part 0/2]

A seed means: the text that the dictionary is made from and the unseen text that scores it, the method's own randomness, the names of the prompts, the words, prompts and sampling of steering, the features drawn for explanations. Finished rows, and the dictionaries' directions, are kept in out/scoreboard_rows/SETTINGS/, so that a stopped run goes on where it was.
"""
import argparse, hashlib, json, platform, subprocess, time
from pathlib import Path
import numpy as np, torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from codebook_tutorial.answers import known_answers, states_of
from codebook_tutorial.baselines import Affine
from codebook_tutorial.codebook import add_codebooks
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import Directions
from codebook_tutorial.finetune import finetune
from codebook_tutorial.formats import load_sae
from codebook_tutorial.fsm import TokFSM
from codebook_tutorial.metrics import measure
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.scoreboard import METHODS, concept_board, fsm_states, make_dictionary, scoreboard, stability, sums_of

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "scoreboard_rows", ROOT / "claims" / "13.full.json"
TOKENS, STEPS, TUNE, SEEDS, WALKS = 300_000, 2000, 200, 3, 2000
# site -> features, active ones, what is asked there, penalties for kinds that have one
SITES = {"resid.1": dict(n_feats=384, k=11, parts=["kept", "concepts", "explained", "patched"], penalties=dict(sae_tied=[.88], sae_untied=[.75], sae_gated=[1.4], sae_jumprelu=[.16])),
         "resid.2": dict(n_feats=384, k=11, parts=["kept", "concepts", "explained", "steered"], penalties=dict(sae_tied=[.6], sae_untied=[.52], sae_gated=[.85], sae_jumprelu=[.1])),
         "fsm mlp.1": dict(n_feats=512, k=4, parts=["kept", "concepts"], penalties=dict(sae_tied=[.4], sae_untied=[.6], sae_gated=[1.], sae_jumprelu=[.3]))}
MORE = ["sae_untied", "sae_gated", "sae_jumprelu", "sae_matryoshka"]                         # last: the board can be written without them
ROWS_OF = [m for m in [*METHODS, "codebook_tuned", "neurons"] if m not in MORE]
SUMS = dict(site="mlp.1", n_feats=512, steps=2000, walks=1500, at_once=[1, 2, 3], methods=["sae_tied", "sae_topk", "codebook", "kmeans", "ica", "pca", "random"], penalty=[.4, .8])      # states of the machine, added up
FSM_HAS_NO = ("codebook_tuned",)
GRID = [("resid.1", "shipped", 0)] + [(site, m, seed) for seed in range(SEEDS) for site in SITES for m in ROWS_OF if not (site.startswith("fsm") and m in FSM_HAS_NO)]
GRID += [(f"sum {n}", m, seed) for seed in range(SEEDS) for n in SUMS["at_once"] for m in SUMS["methods"]]
NEEDED, GRID = GRID, GRID + [(site, m, seed) for m in MORE for seed in range(SEEDS) for site in SITES]
FEW = 128                                                                                    # the sums again with about as many features as there are states: kmeans_128, random_128
GRID += [(f"sum {n}", f"{m}_{FEW}", seed) for m in ("kmeans", "random") for seed in range(SEEDS) for n in SUMS["at_once"]]
NO_SEED = ("basis", "neurons", "shipped")
DATA = ("stories/model.safetensors", "sae/tied/sae_state.safetensors", *(f"fsm_{i}/model.safetensors" for i in range(3)))
SHA = {f"data/{name}": hashlib.sha256((data_path(name.rpartition("/")[0]) / name.rpartition("/")[2]).read_bytes()).hexdigest() for name in DATA}
KEY = hashlib.sha256(json.dumps([2, TOKENS, STEPS, TUNE, WALKS, SITES, SUMS, SHA]).encode()).hexdigest()[:8]      # raise the first number when what a row means changes


def at_neurons(site, method): return site.replace("resid", "neurons").replace("mlp", "neurons") if method == "neurons" else site
def name_of(site, method, seed): return f"{site.replace(' ', '_')}_{method}_{seed}"


class Stories:
    "The language model: texts, states and questions, made when they are needed."
    def __init__(self):
        self.model, self.tok = load_lm("stories")
        self.kept = {}

    def once(self, key, make):             # the last few alone: states are large
        if key not in self.kept:
            while len(self.kept) > 5: self.kept.pop(next(iter(self.kept)))
            self.kept[key] = make()
        return self.kept[key]

    def text(self, seed): return self.once(("text", seed), lambda: load_text(self.tok, "stories", n_tokens=TOKENS, length=256, split="train", seed=7 + seed))
    def states(self, site, seed): return self.once((site, seed), lambda: states_of(self.model, self.text(seed), site))
    def answers(self, site, seed): return self.once(("answers", site, seed), lambda: known_answers(self.model, self.tok, site, seed=seed))

    def tuned(self, site, seed, n_feats, k):
        "A copy of the model, finetuned with one codebook at the site."
        model, text = load_lm("stories")[0], self.text(seed)
        start = time.process_time()
        cb = add_codebooks(model, [site], n_codes=n_feats, k=k, select="residual", learn="ema", commitment=.25).init_from_data(text.ids[:200], generator=seeded(seed), pad=text.pad)
        finetune(cb, text[200:], TUNE, seed=seed)
        return cb.eval(), time.process_time() - start

    def row(self, site, method, seed):
        "-> scores, directions"
        n_feats, k, parts, penalties = (SITES[site][key] for key in ("n_feats", "k", "parts", "penalties"))
        at, x, start = at_neurons(site, method), None if method in ("neurons", "codebook_tuned", "shipped") else self.states(site, seed), time.process_time()
        if method == "codebook_tuned":
            model, made = self.tuned(site, seed, n_feats, k)
            d, answers = model.codebooks[site], known_answers(model, self.tok, site, judge=self.model, seed=seed)
        else:
            d = Affine(torch.eye(self.model.config.intermediate_size)) if method == "neurons" else load_sae(data_path("sae/tied")) if method == "shipped" else make_dictionary(method, x, n_feats, k, seed, penalties.get(method), STEPS)
            made, answers = time.process_time() - start, self.answers(at, seed)
        return dict(made_seconds=made) | scoreboard(d, answers, tuple(parts), seed), d.directions


class Machine:
    "The machine with a hundred states: three models of it, one a seed."
    def row(self, site, method, seed):
        n_feats, k, penalties = (SITES[site][key] for key in ("n_feats", "k", "penalties"))
        model, fsm, at = AutoModelForCausalLM.from_pretrained(data_path(f"fsm_{seed}")).eval(), TokFSM(), at_neurons(site, method).removeprefix("fsm ")
        x, (y, truth), start = fsm_states(model, fsm, at, WALKS, 100 + seed)[0], fsm_states(model, fsm, at, 700, 200 + seed), time.process_time()
        d = Affine(torch.eye(x.shape[1])) if method == "neurons" else make_dictionary(method, x, n_feats, k, seed, penalties.get(method), STEPS)
        made = time.process_time() - start
        m = measure(d, y)
        with torch.no_grad(): f = d.encode(y).numpy()
        return dict(made_seconds=made, n_feats=len(d.directions), l0=m["l0"], fvu=m["fvu"], dead=m["dead_share"]) | concept_board(f, truth), d.directions


    def sum_row(self, n, method, seed):
        "Complete states alone, n of independent walks added up; as many features active for each."
        model, fsm = AutoModelForCausalLM.from_pretrained(data_path(f"fsm_{seed}")).eval(), TokFSM()
        x, y = (sums_of(*fsm_states(model, fsm, SUMS["site"], walks, base + seed, complete=True), n, seed) for walks, base in ((SUMS["walks"], 300), (500, 400)))
        start, few, method = time.process_time(), method.endswith(f"_{FEW}"), method.removesuffix(f"_{FEW}")
        d = make_dictionary(method, x[0], FEW if few else SUMS["n_feats"], 2 * n, seed, SUMS["penalty"] if method == "sae_tied" else None, SUMS["steps"])
        made, m = time.process_time() - start, measure(d, y[0])
        with torch.no_grad(): f = d.encode(y[0]).numpy()
        return dict(made_seconds=made, n_feats=len(d.directions), l0=m["l0"], fvu=m["fvu"]) | concept_board(f, y[1]), d.directions


def file_of(job): return ROWS / KEY / f"{name_of(*job)}.json"


def stable(stories, site, method):
    "Agreement of the seeds' directions; controls: random ones, and raw states (centred, where the method reads centred ones)."
    each = [Directions(load_file(file_of((site, method, seed)).with_suffix(".safetensors"))["directions"].float()) for seed in range(SEEDS)]
    x = stories.states(site, 0)
    return dict(site=site, method=method, **stability(each, x if method in ("codebook", "kmeans", "codebook_tuned") else x - x.mean(0)))


def write(stories):
    "claims/13.full.json: of every method whose rows are all there, if all that are needed are; what an earlier run of these settings wrote stays."
    if not all(file_of(job).exists() for job in NEEDED): return
    done = [job for job in GRID if all(file_of((*job[:2], seed)).exists() for seed in ([0] if job[1] == "shipped" else range(SEEDS)))]
    rows = [json.loads(file_of(job).read_text()) for job in done]
    old = json.loads(CLAIMS.read_text()) if CLAIMS.exists() else {}
    agree = {(s["site"], s["method"]): s for s in old.get("stability", []) if old.get("settings") == KEY}
    fitted = [(site, m) for site in SITES if not site.startswith("fsm") for m in dict.fromkeys(job[1] for job in done if job[0] == site) if m not in NO_SEED]        # three machines are three different models
    agree = [stable(stories, *of) if file_of((*of, 0)).with_suffix(".safetensors").exists() else agree[of] for of in fitted]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/scoreboard_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows) / 3600, settings=KEY, inputs_sha256=SHA, tokens=TOKENS, steps=STEPS, tuning_steps=TUNE, walks=WALKS, sites=SITES, sums=SUMS,
               seeds="text of the dictionary, unseen text that scores it, the method's own randomness, names of the prompts, words, prompts and sampling of steering, features drawn for explanations; of the machine: the model")
    lines = lambda some: "[\n" + ",\n".join(json.dumps(r) for r in some) + "\n]"
    CLAIMS.with_suffix(".part").write_text(json.dumps(out, indent=1)[:-2] + f',\n "rows": {lines(rows)},\n "stability": {lines(agree)}\n}}\n'); CLAIMS.with_suffix(".part").replace(CLAIMS)


def take_up():
    "Rows that claims/13.full.json holds already, of these settings."
    old = json.loads(CLAIMS.read_text()) if CLAIMS.exists() else {}
    for row in old["rows"] if old.get("settings") == KEY else []:
        if not (file := file_of((row["site"], row["method"], row["seed"]))).exists(): file.write_text(json.dumps(row))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    part, parts = map(int, p.parse_args().part.split("/"))
    torch.set_num_threads(1); (ROWS / KEY).mkdir(parents=True, exist_ok=True)
    take_up()
    stories, machine = Stories(), Machine()
    for i, (site, method, seed) in enumerate(tqdm(GRID, desc="scoreboard_full")):
        file = file_of((site, method, seed))
        if i % parts != part or file.exists(): continue
        start = time.process_time()
        row, directions = machine.sum_row(int(site[4:]), method, seed) if site.startswith("sum") else (machine if site.startswith("fsm") else stories).row(site, method, seed)
        save_file(dict(directions=directions.detach().half().contiguous()), file.with_suffix(".safetensors"))
        file.with_suffix(".part").write_text(json.dumps(dict(site=site, method=method, seed=seed) | row | dict(cpu_seconds=time.process_time() - start))); file.with_suffix(".part").replace(file)
    write(stories)


if __name__ == "__main__": main()
