"""The long run of chapter 09: every method explained by the predicate explainer and scored, at every layer, three seeds -> claims/09.full.json; see `hours` there.

usage: python scripts/autointerp_full.py [--part 0/2] [--fragments 50000]

Every finished (layer, method, seed) is kept in out/autointerp_rows/FRAGMENTS/, so that a stopped run goes on where it was. L1 autoencoders are trained as a stack of penalties, and of these the one is scored whose L0 on the training states is nearest to that of the shipped one.
"""
import argparse, hashlib, json, platform, subprocess, tempfile, time
from pathlib import Path
import numpy as np, torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm
from codebook_tutorial.activations import harvest
from codebook_tutorial.autointerp import concept_fit, feature_concepts, fragments, interpret, make_cases, moments, pieces, some_features, summary
from codebook_tutorial.baselines import Affine, ica, pca
from codebook_tutorial.codebook import Codebook, CodebookModel
from codebook_tutorial.concepts import CONCEPTS, atoms, story_text
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary import Dictionary, random_directions
from codebook_tutorial.formats import load_sae
from codebook_tutorial.metrics import measure
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.predicates import PredicateExplainer, story_words
from codebook_tutorial.sae import refit, train_sae

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "autointerp_rows", ROOT / "claims" / "09.full.json"
LAYERS, STEPS, N, PENALTIES = (0, 1, 2), 2000, 150, (.5, .75, 1.)
METHODS = ("sae_tied", "sae_topk", "sae_alpha0", "codebook", "codebook_tuned", "ica", "ica_relu", "ica_topk", "pca", "pca_relu", "pca_topk", "neurons", "basis", "random")
OVERLAP = ("class", "previous class", "topic", "previous topic", "position", "inside")          # predicates that say what a concept says


class Ids(Dictionary):
    "Codes of a finetuned network as features: what comes in are its feature numbers."
    def __init__(self, n): super().__init__(); self.directions = torch.zeros(n, 1)
    def encode(self, x): return torch.zeros(len(x), len(self.directions)).scatter(1, x.long(), 1.)


def build(method, seed, x, n_feats, k):
    "A method's dictionary for the training states x."
    d, kind = x.shape[1], method.removeprefix("sae_")
    if kind == "tied":
        trained = train_sae(x, n_feats, kind, alpha=list(PENALTIES), steps=STEPS, seed=seed)
        best = min(trained, key=lambda one: abs(measure(one, x[:50_000])["l0"] - k))
        return refit(best, x[:200_000])
    if kind == "alpha0": return train_sae(x, n_feats, "tied", alpha=0., steps=STEPS, seed=seed, resample=())
    if kind == "topk": return train_sae(x, n_feats, kind, k=k, steps=STEPS, seed=seed)
    if method == "codebook": return Codebook(d, n_feats, k, select="residual").init_from(x[torch.randperm(len(x), generator=seeded(seed))[:40_000]], generator=seeded(seed)).eval()
    way = dict(relu=method.endswith("relu"), k=k if method.endswith("topk") else None)
    if method.startswith("ica"): return ica(x, seed=seed).at(**way)
    if method.startswith("pca"): return pca(x).at(**way)
    return Affine(torch.eye(d) if method in ("basis", "neurons") else random_directions(n_feats, d, seed=seed + 100).directions, mean=None if method == "neurons" else x.mean(0), relu=True)


@torch.no_grad()
def codes_of(cb_model, text, site, batch=64):                 # -> feature numbers [tokens, groups * k]
    book, found = cb_model.codebooks[site], []
    for i in range(0, len(text), batch):
        some = text[i:i + batch]
        cb_model(input_ids=some.ids)
        numbers = (cb_model.ids[site] + book.weight.shape[1] * torch.arange(book.weight.shape[0])[:, None]).flatten(2)
        found.append(numbers[some.mask].int())
    return torch.cat(found)


def agreement(r, concepts, density, draw):
    "Rank correlation of scores with how well the best concept fits, over features that have both; the same shuffled (95 % of its size); with density; and what is left of it at equal density."
    there = np.array([v is not None for v in r])
    score, fit, dense = np.array([v for v in r if v is not None]), concepts[there], density[there]
    rho = lambda a, b: float(spearmanr(a, b).statistic) if len(a) > 3 and np.ptp(a) > 0 and np.ptp(b) > 0 else None
    own, a, b = rho(score, fit), rho(score, dense), rho(fit, dense)
    if None in (own, a, b): return dict(rho=own, shuffled=None, density=a, partial=None)
    chance = [abs(rho(score, draw.permutation(fit))) for _ in range(200)]
    return dict(rho=own, shuffled=float(np.quantile(chance, .95)), density=a, partial=(own - a * b) / max(((1 - a * a) * (1 - b * b))**.5, 1e-9))


def row_of(method, layer, seed, states, words, truth, n_feats, k):
    start, draw = time.process_time(), np.random.default_rng(seed)
    train, long, test = states
    dictionary = Ids(int(max(s.max() for s in states)) + 1) if method == "codebook_tuned" else build(method, seed, train, n_feats, k)
    f, ids = some_features(dictionary, long, N, seed)
    cases, g = make_cases(f, words, ids, seed), some_features(dictionary, test, N, seed)[0]
    full, plain = PredicateExplainer(**story_words()), PredicateExplainer(without=OVERLAP)
    rows, bare = interpret(cases, full), interpret(cases, plain)
    kept = [i for i, c in enumerate(cases) if c]
    score = lambda some, key="r": [some[i][key] for i in kept]
    concepts, density, stats = feature_concepts(g, truth["all"]), (f > 0).mean(0), moments(f[::10])
    told, told_context = (np.nan_to_num(concept_fit(g, truth[key])[0]) for key in ("all", "context"))
    told_words = np.nan_to_num(concept_fit(g, truth["words"])[0])
    judges = {key: concepts[key] for key in ("precision", "recall", "f1", "gain")} | {"told": told, "told by context concepts": told_context, "told, words as well": told_words}
    pearson = lambda v: (lambda pairs: float(np.corrcoef(*zip(*pairs))[0, 1]))([(r, v[i]) for r, i in zip(score(rows), kept) if r is not None])
    short = lambda values: [None if v is None else round(float(v), 3) for v in values]
    few = measure(dictionary, train[:50_000]) if method != "codebook_tuned" else dict(l0=float(train.shape[1]), fvu=None)
    return dict(method=method, layer=layer, seed=seed, n_feats=len(dictionary.directions), tried=len(ids), skipped=len(ids) - len(kept), l0=few["l0"], fvu=few["fvu"],
                **{key: summary(score(rows, key)) for key in ("r", "r_top", "r_random")}, plain=summary(score(bare)),
                table2={key: pearson(v) for key, v in stats.items()},
                agreement={f"{name}{what}": agreement(score(some), fit[kept], density[kept], draw) for what, some in (("", rows), (", without overlap", bare)) for name, fit in judges.items()},
                judged={name: float(fit[kept].mean()) for name, fit in (judges | dict(density=density)).items()}, scores=short(score(rows)), features=[ids[i] for i in kept], cpu_seconds=time.process_time() - start)


def write(rows, k, n):
    sha = {f"data/{name}": hashlib.sha256((data_path(name.split('/')[0]) / name.partition('/')[2]).read_bytes()).hexdigest() for name in ("stories/model.safetensors", "sae/tied/sae_state.safetensors", "codes/single/model.safetensors")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    out = dict(command="python scripts/autointerp_full.py", commit=commit, hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows) / 3600, inputs_sha256=sha, k=k, steps=STEPS, penalties=PENALTIES, fragments=n,
               seeds="the dictionary's own (start and order of an autoencoder, rows seen by ICA and k-means, random directions), which features are drawn, which random fragments")
    text = json.dumps(out, indent=1)[:-2] + ',\n "rows": [\n' + ",\n".join(json.dumps(r) for r in rows) + "\n]}\n"
    CLAIMS.with_suffix(".part").write_text(text); CLAIMS.with_suffix(".part").replace(CLAIMS)


def states_of(layer, method, model, cb_model, texts, folder):      # -> train, fragments, test
    site = f"neurons.{layer}" if method == "neurons" else f"resid.{layer}"
    if method == "codebook_tuned": return [codes_of(cb_model, text, f"mlp.{layer}") for text in texts]
    return [harvest(model, text, site, folder / f"{site}-{i}", verbose=False).load(site) for i, text in enumerate(texts)]


def make_rows(rows, work, part, parts, n_fragments, n_feats, k):
    model, tok = load_lm("stories")
    cb_model = CodebookModel.from_pretrained(data_path("codes/single")).eval()
    train, (test, facts) = load_text(tok, n_tokens=300_000, length=256, split="train", seed=7), story_text(40_000, split="test")
    long = fragments(load_text(tok, n_tokens=100 * n_fragments, length=256, split="train", seed=11))[:n_fragments]
    if len(long) < n_fragments: raise SystemExit(f"only {len(long)} fragments")
    words, everything = pieces(long, tok), atoms(facts)[test.mask].numpy()
    token = np.array([c.kind == "token" for c in CONCEPTS.values() for _ in c.values])
    truth = dict(all=everything, context=everything[:, ~token], words=np.concatenate([everything, test.ids[test.mask].numpy()[:, None] == np.arange(len(tok))], 1))
    with tempfile.TemporaryDirectory() as folder:
        at, states = None, None
        for i, (layer, method, seed) in enumerate(tqdm(work, desc="autointerp_full")):
            file = rows / f"{layer}_{method}_{seed}.json"
            if i // 3 % parts != part or file.exists(): continue
            key = (layer, method if method in ("neurons", "codebook_tuned") else "resid")
            if at != key: states = None; at, states = key, states_of(layer, method, model, cb_model, (train, long, test), Path(folder))
            file.with_suffix(".part").write_text(json.dumps(row_of(method, layer, seed, states, words, truth, n_feats, k))); file.with_suffix(".part").replace(file)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    p.add_argument("--fragments", type=int, default=50_000, help="how many (50000, as in the paper)")
    args = p.parse_args()
    part, parts = map(int, args.part.split("/"))
    torch.set_num_threads(1)
    folder = ROWS / str(args.fragments)
    folder.mkdir(parents=True, exist_ok=True)
    work, n_feats, k = [(layer, method, seed) for layer in LAYERS for method in METHODS for seed in range(3)], 384, 12
    done = [folder / f"{layer}_{method}_{seed}.json" for layer, method, seed in work]
    if not all(f.exists() for f in done): make_rows(folder, work, part, parts, args.fragments, n_feats, k)
    if all(f.exists() for f in done): write([json.loads(f.read_text()) for f in done], k, args.fragments)


if __name__ == "__main__": main()
