"""The page of benchmarks: tables, bounds and pictures from benchmarks/results/<device>.json.

python benchmarks/report.py FOLDER            writes benchmarks.md and its pictures there
"""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

from codebook_tutorial.show.figures import PALETTE, style  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
OURS, PEERS, FLOOR = PALETTE["orange"], PALETTE["blue"], PALETTE["black"]
RACES = {
    "codebook": "The codebook layer, forward and backward",
    "lookup": "Looking up the nearest codes (floor: faiss)",
    "sae": "A training step of an autoencoder",
}
PARTS = {
    "harvest": "Harvesting beside the bare forward pass",
    "patching": "Ordering features by what patching them does",
    "steering": "Generation under steering",
    "index": "The index of codes",
    "neurons": "Codes beside neurons",
    "autointerp": "Explaining and scoring features of eight dictionaries",
    "chapters": "Chapters, FAST, after set-up",
}
ABOUT = """# Benchmarks

The course beside its peers and beside bare floors, each race in one run: each contestant in
processes (a peer in an environment) of its own, several one after the other, taking turns; medians
and ranges of the processor's own seconds (the clock's on a GPU, and for harvest, patching, index,
neurons, explanations and chapters). On Linux the C library is told to keep freed memory, for all
alike: otherwise it is luck whether a process asks the system for the same pages at each step, which
moves a short step by up to a third. Repeat it with `python course.py bench`. A *floor* is the least
code that does the same work: nothing checked, counted or edited. What is measured, and how, is in
`benchmarks/`.

"""


def name(row):
    "Who, and of which kind."
    dense = "dense" if row.get("use_sparse_activations") is False else None
    words = (row["who"].split("/")[-1], row.get("kind"), row.get("optimizer"), dense)
    return " ".join(str(word) for word in words if word)


def size_of(row):
    "Number of codes, where there are any."
    return f"C={row['C']:,} k={row['k']}: " if "C" in row else ""


def is_ours(row):
    "Is it the course's?"
    return row["who"].endswith("/course")


def ratio(row):
    "Times the floor, with its range; or why there is none."
    if "x_floor" not in row:
        why = row.get("failed", "")[-80:].replace("\n", " ").replace("|", "/")
        return f"failed: {why}"
    low, high = (row[key] * row["x_floor"] / row["seconds"] for key in ("low", "high"))
    return f"{row['x_floor']:.2f} ({low:.2f} to {high:.2f})"


def table(head, rows):
    "A Markdown table."
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


class Bound(NamedTuple):
    what: str
    measured: float
    bound: float
    met: bool


def at_most(what, measured, bound):
    "A bound from above."
    return Bound(what, measured, bound, measured <= bound)


def codebook_bounds(found):
    "Time of the layer, and its memory."
    for row in [row for race in found.get("codebook", []) for row in race]:
        if is_ours(row) and "x_floor" in row:
            what = f"codebook layer, C={row['C']:,}, k={row['k']}: time, times the bare floor's"
            yield at_most(what, row["x_floor"], 1.1)
            if row["k"] == 100 and row["C"] == 10_000:
                what = "codebook layer, C=10,000, k=100: peak memory, MB"
                yield at_most(f"{what} (0.4 of the original's 1546)", row["peak_mb"], 618)


def sae_bounds(found):
    "Time of a training step."
    for race in found.get("sae", []):
        done = [row for row in race if "x_floor" in row and row["who"] != "sae/floor"]
        kinds = {row["kind"]: row["x_floor"] for row in done if is_ours(row)}
        for kind, most in (("tied", 1.15), ("untied", 1.15), ("topk", 0.85)):
            if kind in kinds:
                what = f"autoencoder, {kind}: a training step, times the bare floor's"
                yield at_most(what, kinds[kind], most)
        theirs = [row for row in done if not is_ours(row) and row["kind"] == "topk"]
        peers = {name(row): row["x_floor"] for row in theirs}
        if peers and "topk" in kinds:
            best = min(peers, key=peers.get)
            what = f"autoencoder, topk: faster than every peer (the fastest: {best})"
            yield Bound(what, kinds["topk"], peers[best], kinds["topk"] < peers[best])


def bounds(found):
    "All that was promised and measured."
    yield from codebook_bounds(found)
    yield from sae_bounds(found)
    for row in found.get("patching", []):
        if row["who"] in ("attribution", "greedy", "acdc") and "fewer_layers" in row:
            what = f"ordering features for patching, {row['who']}:"
            what += " how many times fewer layers than naive"
            yield Bound(what, row["fewer_layers"], 20, row["fewer_layers"] >= 20)


def dots(races, title, path):
    "Times the floor, a row per contestant, with their ranges; the races one above the other."
    rows = [row for race in races for row in race if "x_floor" in row]
    rows = [row for row in rows if not row["who"].endswith("/floor")]
    fig, ax = plt.subplots(figsize=(7, 0.8 + 0.24 * len(rows)))
    for y, row in enumerate(rows):
        scale, color = row["x_floor"] / row["seconds"], OURS if is_ours(row) else PEERS
        ax.hlines(y, row["low"] * scale, row["high"] * scale, color=color, lw=1.5)
        ax.plot(row["x_floor"], y, "o", color=color, ms=5)
    ax.axvline(1, color=FLOOR, ls=":", lw=1.2)
    ax.set_yticks(range(len(rows)), [size_of(row) + name(row) for row in rows], fontsize=8)
    ax.invert_yaxis()
    told = "times the floor's time (dotted), median and range; orange: the course"
    ax.set(title=title, xlabel=told, xscale="log")
    ticks = [0.5, 0.7, 1, 1.5, 2, 3, 5]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.grid(axis="y", visible=False)
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def slopes(races):
    "Rows of the table: the power of a size with which seconds grow (least squares of logarithms)."
    for race in races:
        sizes = ("N", "C", "k", "d", "n_feats")
        varied = next(v for v in sizes if len({row.get(v) for row in race}) > 1)
        done = [(row[varied], row["seconds"]) for row in race if "seconds" in row]
        power = float(np.polyfit(*np.log(np.array(done)).T, 1)[0])
        what = name(race[0]) if race[0]["who"].startswith("sae") else "codebook layer"
        low, high = min(done)[0], max(done)[0]
        yield what, varied, f"{low:,} to {high:,}", f"{power:.2f}"


def number(x):
    "Two digits after the point where they matter."
    return f"{x:,.2f}" if x < 100 else f"{x:,.0f}"


def promised(found):
    "The bounds."
    rows = [
        (b.what, number(b.measured), number(b.bound), "met" if b.met else "**not met**")
        for b in bounds(found)
    ]
    return "### What was promised\n\n" + table(["what", "measured", "bound", ""], rows)


def race_part(part, races, device, *, folder):
    "Picture and table of one kind of race."
    title, picture, size = RACES[part], f"bench_{part}_{device}.png", races[0][0]
    dots(races, title, folder / picture)
    alt = "time as a multiple of a bare floor's, a dot for each contestant with its range;"
    alt = f"{title}: {alt} the table below has the numbers."
    feats = f", {size['n_feats']:,} features" if "n_feats" in size else ""
    rows = [row for race in races for row in race]
    cells = [(size_of(row) + name(row), ratio(row), row.get("peak_mb", "")) for row in rows]
    return (
        f"### {title}\n\n![{alt}]({picture})\n\n"
        f"{size['N']:,} rows of {size['d']} numbers{feats}.\n\n"
        + table(["", "times the floor (range)", "peak memory, MB"], cells)
    )


def cell(value):
    "A value in a table."
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "").replace("|", "\\|")


def own_part(title, rows):
    "A table of what the course measures of itself."
    keys = dict.fromkeys(key for row in rows for key in row)
    keys = [key for key in keys if key not in ("low", "high", "site", "n_feats")]
    head = [key.replace("_", " ").replace("x plain", "times plain") for key in keys]
    cells = [[cell(row.get(key)) for key in keys] for row in rows]
    return f"### {title}\n\n" + table(head, cells)


def report(device, found, folder):
    "The part of the page for one device."
    m = found["machine"]
    peers = ", ".join(f"{peer} ({version})" for peer, version in m["peers"].items())
    versions = f"torch {m['torch']}, Python {m['python']}; peers: {peers}. {m.get('note', '')}"
    title = "CPU" if device == "cpu" else m["gpu"]
    page = [f"## {title}\n\n{m['cpu']}, {m['threads']} thread(s), {versions}"]
    page.append(promised(found))
    for part in RACES:
        if part in found:
            page.append(race_part(part, found[part], device, folder=folder))
    if "slopes" in found:
        told = "Seconds grow as size to this power (1: in proportion)."
        grows = table(["what", "size", "from, to", "power"], slopes(found["slopes"]))
        page.append(f"### Cost against size\n\n{told}\n\n{grows}")
    page += [own_part(title, found[part]) for part, title in PARTS.items() if found.get(part)]
    return "\n\n".join(page)


def main(folder):
    "Write the page."
    style()
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    parts = [report(device, rows, Path(folder)) for device, rows in found.items()]
    page = ABOUT + "\n\n".join(parts) + "\n"
    (Path(folder) / "benchmarks.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
