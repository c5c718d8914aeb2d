"""The long run of chapter 10: how few features carry "who gets the gift", for every method, at every layer, three seeds -> claims/10.full.json; see `hours` there.

usage: python scripts/ioi_full.py [--part 0/2]

Every finished (site, method, seed) is kept in out/ioi_rows/SETTINGS/, so that a stopped run goes on where it was; each trained dictionary is made anew for its row. One set for all prompts is chosen on 32 pairs and measured on 32 others; sets of each prompt are chosen and measured on the first 32 of those.
"""
import argparse, functools, hashlib, json, platform, random, subprocess, tempfile, time
from pathlib import Path
import torch, torch.nn.functional as F
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.baselines import Affine, ica, pca
from codebook_tutorial.codebook import Codebook, CodebookModel
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import basis, random_directions
from codebook_tutorial.metrics import measure
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.pairs import task_pairs
from codebook_tutorial.patching import ORDERS, Patch, nested_sets
from codebook_tutorial.sae import refit, train_sae
from codebook_tutorial.stories import NAMES

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "ioi_rows", ROOT / "claims" / "10.full.json"
N, MOST, STEPS, SEEDS, N_FEATS, K = 32, 40, 2000, 3, 384, 12
ALPHAS, POOLS = (.25, .75, 1.5), (4, 8, 16, 32, 64, 128)
MAIN = ["sae_tied_0.75", "sae_topk", "sae_alpha0", "codebook", "pca", "ica", "basis", "random"]
CODED = ["codebook_single", "codebook_top8", "codebook_residual"]           # finetuned networks of chapter 05
TIED = ["sae_tied_0.25", "sae_tied_1.5", "sae_tied_raw"]
SITES = {"resid.1": MAIN + TIED, "mlp.0": MAIN + TIED + CODED, "resid.0": MAIN + TIED, "resid.2": MAIN + TIED, **{f"neurons.{i}": ["neurons"] for i in range(3)}}

KEY = hashlib.sha256(json.dumps([2, N, MOST, STEPS, N_FEATS, K, POOLS]).encode()).hexdigest()[:8]      # rows made with other settings are not taken up; raise the first number when what a row means changes


def build(method, seed, x):
    "A method's dictionary for the training states x, and what it is like."
    d = x.shape[1]
    if method.startswith("sae_tied"):
        one = train_sae(x, N_FEATS, "tied", alpha=.75 if method.endswith("raw") else float(method.split("_")[-1]), steps=STEPS, seed=seed)
        return one if method.endswith("raw") else refit(one, x[:200_000])
    if method == "sae_alpha0": return train_sae(x, N_FEATS, "tied", alpha=0., steps=STEPS, seed=seed, resample=())
    if method == "sae_topk": return train_sae(x, N_FEATS, "topk", k=K, steps=STEPS, seed=seed)
    if method == "codebook": return Codebook(d, N_FEATS, K, select="residual").init_from(x[torch.randperm(len(x), generator=seeded(seed))[:40_000]], generator=seeded(seed)).eval()
    if method == "random":
        D = random_directions(N_FEATS, d, seed=seed + 100).directions
        return Affine(D, torch.linalg.pinv(D).T.contiguous())          # all together they give x back
    return dict(pca=pca, ica=functools.partial(ica, seed=seed), basis=lambda x: basis(d), neurons=lambda x: basis(d))[method](x)


def numbers(curve):                           # of [k + 1, n] -> means over prompts
    return {key: [round(v, 4) for v in value.mean(1).tolist()] for key, value in curve.items()}


def boot(kl, seed=0):                         # [k + 1, n]
    "95 % interval of mean KL with 5 features: prompts drawn again."
    at = kl[min(5, len(kl) - 1)]
    means = at[torch.randint(len(at), (1000, len(at)), generator=seeded(seed))].mean(1)
    return [round(v, 4) for v in means.quantile(torch.tensor([.025, .975])).tolist()]


@torch.no_grad()
def random_edits(patch, sets, seed):
    "KL where every edit has the length it has, and a random direction."
    draw, kl = seeded(seed), []
    for some in sets.expand(-1, len(patch.pairs), -1).split(2):
        edits = patch.writes.edit(some)
        kl.append(patch.kl(patch.run(F.normalize(torch.randn(edits.shape, generator=draw), dim=-1) * edits.norm(dim=-1, keepdim=True))))
    return torch.cat(kl)


def one_set(model, site, dictionary, pairs, n_feats, order="greedy", control=None, **kw):
    "Chosen on the first half, measured on the second."
    first, second = Patch(model, site, dictionary, pairs[:N]), Patch(model, site, dictionary, pairs[N:])
    features = first.features[ORDERS[order](first, n_feats, **kw)]
    sets = torch.cat([second.chosen(features[:k]) for k in range(len(features) + 1)])
    curve, floor = second.measure(sets), second.measure(~second.none)
    out = dict(**numbers(curve), interval=boot(curve["kl"]), floor=floor["kl"].mean().item(), floor_edit=floor["edit"].mean().item(), n_feats=len(first.features), passes=first.passes, features=features.tolist())
    if control is not None: out["kl_random_edit"] = numbers(dict(kl=random_edits(second, sets, control)))["kl"]
    return out


def each_prompt(model, site, dictionary, pairs, n_feats, order="greedy", control=None, **kw):
    "Chosen and measured for every prompt by itself."
    patch = Patch(model, site, dictionary, pairs)
    sets = nested_sets(patch, ORDERS[order](patch, n_feats, per_prompt=True, **kw))
    passes, curve, floor = patch.passes, patch.measure(sets), patch.measure(~patch.none)
    size, draw = sets.sum(2), seeded(0)
    chance = torch.rand(sets.shape[1:], generator=draw).masked_fill(~patch.active, -1.).argsort(1, descending=True).argsort(1) < size[..., None]       # as many that differ, drawn at random
    out = dict(**numbers(curve), interval=boot(curve["kl"]), floor=floor["kl"].mean().item(), floor_edit=floor["edit"].mean().item(), n_feats=patch.active.sum(1).float().mean().item(), passes=passes, kl_random_features=numbers(dict(kl=patch.measure(chance)["kl"]))["kl"])
    if control is not None: out["kl_random_edit"] = numbers(dict(kl=random_edits(patch, sets, control)))["kl"]
    return out


def row_of(site, method, seed, model, tok, x):
    start = time.process_time()
    dictionary = model.codebooks[site] if method.startswith("codebook_") else build(method, seed, x)
    few = dict(l0=None, fvu=None) if x is None or isinstance(dictionary, Codebook) else {key: measure(dictionary, x[:50_000])[key] for key in ("l0", "fvu")}
    many, draw, control = task_pairs(tok, "ioi", 2 * N, seed=seed), random.Random(seed), seed if method == "sae_tied_0.75" else None
    fixed = [draw.sample(NAMES, 2) for _ in range(3)]
    row = dict(site=site, method=method, seed=seed, **few, random=one_set(model, site, dictionary, many, MOST, control=control), per_prompt=each_prompt(model, site, dictionary, many[:N], 16, control=control),
               fixed=[dict(receivers=names, **one_set(model, site, dictionary, task_pairs(tok, "ioi", 2 * N, seed=seed, receivers=names), 16, control=control)) for names in fixed])
    if site == "resid.1" and method in ("sae_tied_0.75", "pca", "ica", "random"):
        row["pools"] = {p: dict(one_set=one_set(model, site, dictionary, task_pairs(tok, "ioi", 2 * N, seed=seed, pool=p), MOST), per_prompt=each_prompt(model, site, dictionary, task_pairs(tok, "ioi", 2 * N, seed=seed, pool=p)[:N], 16)) for p in POOLS}
    if site == "resid.1" and method in ("sae_tied_0.75", "pca"):
        ways = dict(attribution=dict(order="attribution"), attribution_3=dict(order="attribution", points=3), greedy_all=dict(order="greedy", width=None)) | {f"acdc_{s}": dict(order="acdc", seed=s) for s in range(3)}
        row["orders"] = {name: {kind: one_set(model, site, dictionary, pairs, 16 if name == "greedy_all" else MOST, **way) for kind, pairs in (("random", many), ("fixed", task_pairs(tok, "ioi", 2 * N, seed=seed, receivers=fixed[0])))} for name, way in ways.items()}
    return row | dict(cpu_seconds=time.process_time() - start)


def slim(row):
    "Without what the chapter does not read: a row's file in out/ has it all."
    if isinstance(row, list): return [slim(v) for v in row]
    return {k: slim(v) for k, v in row.items() if k not in ("features", "logit_diff")} if isinstance(row, dict) else row


def write(rows):
    sha = {f"data/{name}": hashlib.sha256((data_path(name.split('/')[0]) / name.partition('/')[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors", "codes/single/model.safetensors", "codes/top8/model.safetensors", "codes/residual/model.safetensors")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/ioi_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows) / 3600, inputs_sha256=sha, steps=STEPS, prompts=N, alphas=ALPHAS,
               seeds="the dictionary's own (start and order of an autoencoder, rows seen by ICA and k-means, random directions; PCA, coordinates and finetuned codes have none), the prompts, and which three pairs of receivers are fixed")
    text = json.dumps(out, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(slim(r)) for r in rows) + "\n]}\n"
    CLAIMS.with_suffix(".part").write_text(text); CLAIMS.with_suffix(".part").replace(CLAIMS)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    part, parts = map(int, p.parse_args().part.split("/"))
    torch.set_num_threads(1); folder_of_rows = ROWS / KEY; folder_of_rows.mkdir(parents=True, exist_ok=True)
    model, tok = load_lm("stories")
    finetuned = functools.cache(lambda name: CodebookModel.from_pretrained(data_path(f"codes/{name}")).eval())
    work = [(site, method, seed) for site, methods in SITES.items() for method in methods for seed in range(SEEDS)]
    text, states = load_text(tok, n_tokens=300_000, length=256, split="train", seed=7), {}
    file_of = lambda *key: folder_of_rows / ("_".join(map(str, key)) + ".json")
    with tempfile.TemporaryDirectory() as folder:
        for i, (site, method, seed) in enumerate(tqdm(work, desc="ioi_full")):
            file, tuned = file_of(site, method, seed), method.removeprefix("codebook_") if method.startswith("codebook_") else None
            if i % parts != part or file.exists(): continue
            if not tuned and site not in states: states = {site: harvest(model, text, site, Path(folder) / site, verbose=False).load(site)}
            row = row_of(site, method, seed, finetuned(tuned) if tuned else model, tok, None if tuned else states[site])
            file.with_suffix(".part").write_text(json.dumps(row)); file.with_suffix(".part").replace(file)
    done = [file_of(*key) for key in work]
    if all(f.exists() for f in done): write([json.loads(f.read_text()) for f in done])


if __name__ == "__main__": main()
