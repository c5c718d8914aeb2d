"""The long run of chapter 11: what three features of the last layer rest on, checked, three seeds -> claims/11.full.json; see `hours` there.

usage: python scripts/circuits_full.py

Every seed trains the autoencoders of the first and the last layer anew (the middle one is the shipped one), draws other contexts, and chooses the roots again. Finished seeds are kept in out/circuits_rows/SETTINGS/, so that a stopped run goes on where it was.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import torch
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.circuits import causal_tree, check_tree
from codebook_tutorial.reading import best_features, strong_contexts
from codebook_tutorial.core import data_path
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae
from codebook_tutorial.stories import ID

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "circuits_rows", ROOT / "claims" / "11.full.json"
TOKENS, STEPS, ALPHA, SEEDS, N_TREE, N_TEST, DRAWS = 180_000, 800, .75, 3, 20, 24, 20
KEY = hashlib.sha256(json.dumps([1, TOKENS, STEPS, ALPHA, N_TREE, N_TEST, DRAWS]).encode()).hexdigest()[:8]      # raise the first number when what a row means changes


def rows_of(seed, model, tok):
    start = time.process_time()
    text = load_text(tok, n_tokens=TOKENS, length=256, split="train", seed=3)
    first, second = text.split(.5)
    half, follows = len(first), text.ids.roll(-1, 1)
    follows[:, -1] = text.pad
    truths = {"before )": follows == ID[")"], "before 's": follows == ID["'s"], "at 's": text.ids == ID["'s"]}
    with tempfile.TemporaryDirectory() as folder:
        store = harvest(model, first, ["resid.0", "resid.2"], Path(folder) / "acts", verbose=False)
        made = {site: refit(train_sae(store.load(site), 384, "tied", alpha=ALPHA, steps=STEPS, seed=seed), store.load(site)) for site in ("resid.0", "resid.2")}
    dicts, out = {site: sae.to(model.device) for site, sae in (("resid.0", made["resid.0"]), ("resid.1", load_sae(data_path("sae/tied"))), ("resid.2", made["resid.2"]))}, []
    for words, best in best_features(model, "resid.2", dicts["resid.2"], text, truths).items():
        f = best.acts
        contexts = strong_contexts(first, f[:half], N_TREE, 12, where=truths[words][:half], seed=2 * seed)
        test = strong_contexts(second, f[half:], N_TEST, 12, where=truths[words][half:], seed=2 * seed + 1)
        tree = causal_tree(model, dicts, ("resid.2", best.feature), contexts)
        found = check_tree(model, dicts, tree, test, DRAWS, seed=seed)
        out.append(dict(words=words, seed=seed, root=list(tree.root), f1=[best.f1, best.f1_held_out], nodes=tree.nodes, edges=tree.edges, runs=tree.runs, clean=found["clean"], root_alone=found["root"], below=found["below"], others=found["others"], random=found["random"]))
    return dict(rows=out, cpu_seconds=time.process_time() - start)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1); (ROWS / KEY).mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    for seed in tqdm(range(SEEDS), desc="circuits_full"):
        if (file := ROWS / KEY / f"{seed}.json").exists(): continue
        file.with_suffix(".part").write_text(json.dumps(rows_of(seed, model, tok))); file.with_suffix(".part").replace(file)
    done = [json.loads((ROWS / KEY / f"{seed}.json").read_text()) for seed in range(SEEDS)]
    sha = {f"data/{name}": hashlib.sha256((data_path(name.partition("/")[0]) / name.partition("/")[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors", "sae/tied/sae_state.safetensors")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/circuits_full.py", commit=commit, hardware="one CPU core", machine=platform.machine(), hours=sum(d["cpu_seconds"] for d in done) / 3600, inputs_sha256=sha, tokens=TOKENS, steps=STEPS, alpha=ALPHA,
               seeds="start and order of the autoencoders of resid.0 and resid.2, the contexts of tree and test, the draws of the control")
    text = json.dumps(out, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(r) for d in done for r in d["rows"]) + "\n]}\n"
    CLAIMS.with_suffix(".part").write_text(text); CLAIMS.with_suffix(".part").replace(CLAIMS)


if __name__ == "__main__": main()
