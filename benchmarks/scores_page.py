"""The page of benchmark scores beside known answers: a table, and rank correlations."""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

CLAIMS = Path(__file__).resolve().parents[1] / "claims" / "13.full.json"
VERSIONS = {peer: version(peer) for peer in ("sae-bench", "sae-lens", "torch")}
# a row's key -> what the page calls it; larger is better
SCORES = {
    "core_ce_loss_score": "loss recovered",
    "core_kl_div_score": "KL recovered",
    "core_explained_variance": "explained variance",
    "core_cossim": "cosine",
    "token_1": "concept probe, 1 feature",
    "token_5": "concept probe, 5",
    "topic_1": "topic probe, 1",
    "topic_5": "topic probe, 5",
}
BESIDE = {"f1_probed": "F1 of the 40 probed concepts", "less_fvu": "our own error (1 - FVU)"}


def values(rows, method, key):
    "One number per seed."
    own = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
    return np.array([1 - row["fvu"] if key == "less_fvu" else row[key] for row in own])


def bootstrap(a, b, n=4000):
    "95 % of the rank correlations when methods are drawn again with replacement."
    draw, found = np.random.default_rng(0), []
    while len(found) < n:
        some = draw.integers(len(a), size=len(a))
        if len(set(a[some])) > 1 and len(set(b[some])) > 1:
            found.append(spearmanr(a[some], b[some])[0])
    return np.percentile(found, [2.5, 97.5])


def agreement(rows, methods, key, *, truth="f1"):
    "Spearman's correlation of a score with F1: of the methods' means, its range, of each seed."
    a, b = (np.stack([values(rows, m, name) for m in methods]) for name in (key, truth))
    low, high = bootstrap(a.mean(1), b.mean(1))
    seeds = [spearmanr(x, y)[0] for x, y in zip(a.T, b.T)]
    return dict(rho=spearmanr(a.mean(1), b.mean(1))[0], low=low, high=high, seeds=seeds)


def between_seeds(rows, methods):
    "How well F1 ranks the methods as F1 of another seed does: the most that can be expected."
    f1 = np.stack([values(rows, m, "f1") for m in methods]).T
    return [spearmanr(f1[i], f1[j])[0] for i, j in ((0, 1), (0, 2), (1, 2))]


def cell(some, digits=3):
    "Mean and range over seeds."
    least, mean, most = some.min(), some.mean(), some.max()
    if most - least < 10**-digits / 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ({least:.{digits}f} to {most:.{digits}f})"


def table(rows, methods):
    "A line per method, the highest F1 first."
    keys = {"f1": "known concepts, F1", "l0": "active", "fvu": "error (FVU)"} | SCORES
    lines = ["| | " + " | ".join(keys.values()) + " |", "|---" * (len(keys) + 1) + "|"]
    for m in sorted(methods, key=lambda m: -values(rows, m, "f1").mean()):
        cells = [cell(values(rows, m, key), 1 if key == "l0" else 3) for key in keys]
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def correlations(rows, trained, controls):
    "A line per score: rank correlation with F1, without the controls and with them."
    head = "| score | trained only | its 95 % range | each seed | with the controls | range |"
    lines = [head, "|---" * 6 + "|"]
    asked = [(key, name, "f1") for key, name in (SCORES | BESIDE).items()]
    for key in ("token_1", "token_5"):
        asked.append((key, f"{SCORES[key]}, and F1 of the same 40 concepts", "f1_probed"))
    for key, name, truth in asked:
        own, every = (
            agreement(rows, some, key, truth=truth) for some in (trained, [*trained, *controls])
        )
        seeds = ", ".join(f"{rho:.2f}" for rho in own["seeds"])
        ranges = [f"{one['low']:.2f} to {one['high']:.2f}" for one in (own, every)]
        cells = (f"{own['rho']:.2f}", ranges[0], seeds, f"{every['rho']:.2f}", ranges[1])
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def board(rows, trained):
    "F1 of all concepts here and in the scoreboard's long run, for methods that are in both."
    long = [row for row in json.loads(CLAIMS.read_text())["rows"] if row["site"] == "resid.1"]
    lines = ["| | here, F1 | the scoreboard, F1 |", "|---|---|---|"]
    here, there = [], []
    for m in trained:
        own = [row["f1"] for row in long if row["method"] == m.replace("ours, ", "sae_")]
        if own:
            here.append(values(rows, m, "f1_all").mean())
            there.append(np.mean(own))
            lines.append(f"| {m} | {here[-1]:.3f} | {there[-1]:.3f} |")
    rho = spearmanr(here, there)[0]
    return "\n".join([*lines, "", f"Rank correlation of the two columns: {rho:.2f}."])


def write_page(file, kept, *, trained, controls):
    "The page, once every method has every seed."
    rows = kept["rows"]
    again = ", ".join(f"{rho:.2f}" for rho in between_seeds(rows, trained))
    template = Path(__file__).resolve().parent / "scores_page.md"
    text = template.read_text(encoding="utf-8").format(
        peers=", ".join(f"{peer} {number}" for peer, number in kept["versions"].items()),
        table=table(rows, [*trained, *controls]),
        correlations=correlations(rows, trained, controls),
        board=board(rows, trained),
        again=again,
        n=len(trained),
        m=len(trained) + len(controls),
        **kept["settings"],
    )
    file.write_text(text, encoding="utf-8")
