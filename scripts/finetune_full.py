"""The long run of chapter 05: what every choice of codes costs, three seeds each -> claims/05.full.json; about three hours on one CPU core.

usage: python scripts/finetune_full.py [--part 0/2]

Every finished row is kept, in claims/05.full.json at the end and in out/finetune_rows/ meanwhile, so that a stopped run goes on where it was.
Two processes share the work with --part 0/2 and --part 1/2; the one that ends last writes all rows.
"""
import argparse, ast, hashlib, itertools, json, platform, subprocess, time
from pathlib import Path
import torch, torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import logging
from codebook_tutorial.codebook import Codebook, CodebookModel
from codebook_tutorial.concepts import atoms, story_text
from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.finetune import bits_per_activation, finetune
from codebook_tutorial.models import lm_loss, load_lm, load_text, next_probs
from codebook_tutorial.sites import match_sites, site_dims
from codebook_tutorial.states import feature_numbers, record
from codebook_tutorial.stories import gift_prompts

ROOT = Path(__file__).resolve().parents[1]
ROWS, CLAIMS = ROOT / "out" / "finetune_rows", ROOT / "claims" / "05.full.json"
RECIPE = dict(steps=200, lr=5e-4, batch=8, codes_lr=.01)
START = 200                                                # rows of text from which codes begin: some 42,000 tokens
BOTH = {"heads.*": {}, "mlp.*": {}}                        # site pattern -> what differs there
RESIDUAL, SINGLE, TOPK = dict(select="residual", learn="ema"), dict(select="euclidean", learn="ema"), dict(select="cosine", learn="gradient")


def jobs():
    "name -> (sites, settings of the books, settings of the training); the order is that of importance."
    found = {"control": ({}, {}, {}), "pretrained": ({}, {}, dict(steps=0))}
    for k, n in itertools.product((4, 1, 2, 8), (1024, 512, 2048, 256)): found[f"residual k={k} C={n}"] = (BOTH, dict(n_codes=n, k=k, **(RESIDUAL if k > 1 else SINGLE)), {})
    for k, n in itertools.product((1, 4, 8, 16), (1024, 256)): found[f"cosine k={k} C={n}"] = (BOTH, dict(n_codes=n, k=k, **TOPK), {})
    for name, sites in {"attention k=1": {"heads.*": {}}, "MLP k=1": {"mlp.*": {}}, "whole attention output k=1, MLP k=1": {"attn.*": {}, "mlp.*": {}}}.items(): found[name] = (sites, dict(n_codes=1024, k=1, **SINGLE), {})
    for name, sites in {"attention k=4": {"heads.*": {}}, "MLP k=4": {"mlp.*": {}}, "attention k=4, MLP k=1": {"heads.*": {}, "mlp.*": dict(k=1, select="euclidean")},
                        "attention k=1, MLP k=4": {"heads.*": dict(k=1, select="euclidean"), "mlp.*": {}}}.items(): found[name] = (sites, dict(n_codes=1024, k=4, **RESIDUAL), {})
    base, paper = dict(n_codes=1024, k=4, **RESIDUAL), dict(n_codes=1024, k=8, **TOPK)
    found |= {"residual k=4, no revival": (BOTH, base, dict(revive_every=0)), "residual k=4, random start": (BOTH, base, dict(start="random")), "residual k=4, from data, no training": (BOTH, base, dict(steps=0)), "residual k=4 C=256, from data, no training": (BOTH, base | dict(n_codes=256), dict(steps=0)),
              "residual k=4, codes by gradient": (BOTH, base | dict(learn="gradient"), {}), "residual k=4, 600 steps": (BOTH, base, dict(steps=600)), "control, 600 steps": ({}, {}, dict(steps=600)),
              "euclidean k=4": (BOTH, base | dict(select="euclidean"), {}), "cosine k=8, mean": (BOTH, paper | dict(combine="mean"), {}), "cosine k=8, LayerNorm": (BOTH, paper | dict(norm=True), {}),
              "cosine k=8, averages": (BOTH, paper | dict(learn="ema"), {}), "cosine k=8, no revival": (BOTH, paper, dict(revive_every=0)), "cosine k=8, random start": (BOTH, paper, dict(start="random")),
              "cosine k=1, no revival": (BOTH, paper | dict(k=1), dict(revive_every=0))}
    return found


def with_codes(model, sites, settings, text, seed, start="data"):
    "A codebook at every site, one a head at heads.*; begun from the first rows of the text, or at random in the size of the states."
    dims, books = site_dims(model, list(sites)), {}
    for pattern, differs in sites.items():
        for site in match_sites(model, pattern):
            torch.manual_seed(seed * 100 + len(books))
            books[site] = Codebook(dims[site], groups=model.config.num_attention_heads if pattern == "heads.*" else 1, commitment=.25, **(settings | differs))
    cb = CodebookModel(model, books)
    if start == "data": return cb.init_from_data(text.ids[:START], generator=seeded(seed), pad=text.pad)
    began = {site: book.weight.detach().clone() for site, book in books.items()}
    cb.init_from_data(text.ids[:START], iters=1, generator=seeded(seed), pad=text.pad)
    for site, book in books.items():                       # random directions, as long as the codes from data
        book.weight.data = F.normalize(began[site], dim=-1) * book.weight.norm(dim=-1, keepdim=True)
        if book.learn == "ema": book.total.copy_(book.weight)
    return cb


def likeness(cb, text):
    "Mean cosine between two codes that stand at the same place, and between two that stand at different ones; None for k=1."
    same, other = [], []
    for site, ids in record(cb, text.ids[:16]).items():
        book = cb.codebooks[site]
        if book.k == 1: continue
        codes = torch.stack([book.weight[g][ids[..., g, :]][text.attention_mask[:16]] for g in range(len(book.weight))], 1)          # [N, groups, k, width]
        a, b = codes.unbind(2)[:2]
        same.append(F.cosine_similarity(a, b, dim=-1).mean()); other.append(F.cosine_similarity(a, b.roll(1000, 0), dim=-1).mean())
    return {"same place": torch.stack(same).mean().item(), "different places": torch.stack(other).mean().item()} if same else None


def meaning(cb, text, truth):
    "Mean over the single concepts of the F1 of the code that fits best, chosen on the first half of the rows and scored on the second; and for truths shifted by a row."
    found = record(cb, text.ids)
    features = torch.cat([feature_numbers(cb, found, site) + 100_000 * i for i, site in enumerate(found)], 1)
    names, features = features.unique(return_inverse=True)
    there, half = text.mask.flatten(), len(text.ids) // 2 * text.ids.shape[1]
    def f1(truth):
        tables = []
        for part in (slice(None, half), slice(half, None)):
            some, real = features[part][there[part]], truth[part][there[part]].float()
            hits = torch.zeros(len(names), real.shape[1])
            for slot in some.T: hits.index_add_(0, slot, real)
            uses = torch.bincount(some.flatten(), minlength=len(names)).float()
            tables.append((2 * hits / (uses[:, None] + real.sum(0)).clamp(min=1), real.sum(0)))
        (chosen, seen), (scored, again) = tables
        asked = (seen >= 20) & (again >= 20)
        return scored.gather(0, chosen.argmax(0, keepdim=True))[0][asked].mean().item(), int(asked.sum())
    value, n = f1(truth)
    return {"f1": value, "f1, truth of another row": f1(truth.view(*text.ids.shape, -1).roll(1, 0).flatten(0, 1))[0], "concepts": n}


def one_row(name, sites, settings, training, seed, texts):
    "Train one setting from one seed and measure it."
    start, (model, tok), (train, test, told, truth, asked) = time.process_time(), load_lm("stories"), texts
    training = RECIPE | training
    cb = with_codes(model, sites, settings, train, seed, training.pop("start", "data")) if sites else model
    if training["steps"]: logs = finetune(cb, train[START:], seed=seed, log_every=25, **training)
    trained = time.process_time() - start
    answers = torch.tensor([q.answer for q in asked])
    row = dict(name=name, seed=seed, sites=list(sites), settings=settings, training=training, loss=lm_loss(cb, test),
               ioi=(next_probs(cb, [q.ids for q in asked]).argmax(-1) == answers).double().mean().item())
    if sites:
        bits = bits_per_activation(cb, test)                        # counts afresh, on the test text
        row |= dict(dead=cb.dead_share(), bits={s: b["bits"] for s, b in bits.items()}, most={s: b["most"] for s, b in bits.items()}, dense={s: b["dense"] for s, b in bits.items()},
                    likeness=likeness(cb, test), meaning=meaning(cb, told, truth))
        if training["steps"]: row["errors"] = {n.removeprefix("error "): v for n, v in logs[-1].items() if n.startswith("error ")}
    return row | dict(train_cpu_seconds=round(trained, 1), cpu_seconds=round(time.process_time() - start, 1), code=code())


def code():
    "Digest of the code that decides a row: what is defined, without comments, docstrings and imports."
    def bare(file):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if hasattr(node, "body") and isinstance(node.body, list): node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
        return "".join(sorted(ast.dump(n) for n in tree.body if not isinstance(n, (ast.Import, ast.ImportFrom, ast.If)) and getattr(n, "name", "") not in ("jobs", "collect", "write", "main")))
    files = [Path(__file__), *(ROOT / "codebook_tutorial" / f"{m}.py" for m in ("kmeans", "codebook", "finetune"))]
    return hashlib.sha256("".join(map(bare, files)).encode()).hexdigest()[:12]


def commit(): return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


def collect():
    "All rows there are, those of an earlier run first."
    kept = json.loads(CLAIMS.read_text())["rows"] if CLAIMS.exists() else []
    rows = {(r["name"], r["seed"]): r for r in kept + [json.loads(p.read_text()) for p in sorted(ROWS.glob("*.json"))]}
    order = list(jobs())
    return sorted((r for r in rows.values() if r["name"] in order), key=lambda r: (order.index(r["name"]), r["seed"]))


def write(rows):
    "claims/05.full.json."
    sha = hashlib.sha256((data_path("stories") / "model.safetensors").read_bytes()).hexdigest()
    notes = json.loads(CLAIMS.read_text()).get("notes", "") if CLAIMS.exists() else ""         # by hand, kept
    found = dict(command="python scripts/finetune_full.py", notes=notes, commit=commit(), hardware="one CPU core a process", machine=platform.machine(), hours=sum(r["cpu_seconds"] for r in rows) / 3600, recipe=RECIPE | dict(start_rows=START),
                 inputs_sha256={"data/stories/model.safetensors": sha}, code=code(), seeds="where the codes begin, and the order of the text; one base model",
                 units="loss: nats a token, 50,000 tokens of unseen stories; ioi: share of 300 held-out pairs; dead: share of codes not used on those 50,000 tokens; bits: a position, per site", rows=rows)
    part = CLAIMS.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n"); part.replace(CLAIMS)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--part", default="0/1", help="which share of the work: 0/2 and 1/2 run side by side")
    p.add_argument("--only", default="", help="names that hold this text")
    args = p.parse_args()
    part, parts = map(int, args.part.split("/"))
    logging.set_verbosity_error(); logging.disable_progress_bar(); torch.set_num_threads(1)
    ROWS.mkdir(parents=True, exist_ok=True)
    _, tok = load_lm("stories")
    told, codes = story_text(30_000, split="test", seed=1)
    texts = (load_text(tok, "stories", n_tokens=1_300_000, length=256, split="train", seed=5), load_text(tok, "stories", n_tokens=50_000, length=256), told, atoms(codes).flatten(0, 1), gift_prompts(300))
    cell = lambda name: name in ("control", "pretrained") or " C=" in name and "from data" not in name        # of the k and C tables: these come first
    work = sorted(((name, seed) for seed in range(3) for name in jobs() if args.only in name), key=lambda w: (w[1] > 0 and not cell(w[0]), w[1]))
    for i, (name, seed) in enumerate(tqdm(work, desc="finetune_full")):
        if i % parts != part or (name, seed) in {(r["name"], r["seed"]) for r in collect()}: continue
        row = one_row(name, *jobs()[name], seed, texts)
        file = ROWS / f"{hashlib.sha1(name.encode()).hexdigest()[:8]}_{seed}.json"
        file.with_suffix(".part").write_text(json.dumps(row)); file.with_suffix(".part").replace(file)
        tqdm.write(json.dumps({k: row.get(k) for k in ("name", "seed", "loss", "ioi", "dead", "meaning", "likeness", "cpu_seconds")}))
    write(collect())


if __name__ == "__main__": main()
