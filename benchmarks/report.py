"""The page of benchmarks: tables, bounds and pictures from benchmarks/results/<device>.json.

    python benchmarks/report.py FOLDER            # writes benchmarks.md and its pictures there (`course.py docs` does)"""
import json, sys
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from codebook_tutorial import show  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
OURS, PEERS, FLOOR = show.PALETTE["orange"], show.PALETTE["blue"], show.PALETTE["black"]


def name(row):
    "Who, and of which kind."
    return " ".join(str(v) for v in (row["who"].split("/")[-1], row.get("kind"), row.get("optimizer"), "dense" if row.get("use_sparse_activations") is False else None) if v)


def is_ours(row): return row["who"].endswith("/course")
def ratio(row): return f"{row['x_floor']:.2f} ({row['low'] * row['x_floor'] / row['seconds']:.2f} to {row['high'] * row['x_floor'] / row['seconds']:.2f})" if "x_floor" in row else "failed: " + row.get("failed", "")[-80:].replace("\n", " ").replace("|", "/")
def table(head, rows): return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(map(str, r)) + " |" for r in rows)])


def bounds(found):
    "(what, measured, bound, met) for all that was promised and measured."
    for race in found.get("codebook", []):
        for row in race:
            if is_ours(row) and "x_floor" in row:
                yield f"codebook layer, C={row['C']:,}, k={row['k']}: time, times the bare floor's", row["x_floor"], 1.1, row["x_floor"] <= 1.1
                if row["k"] == 100 and row["C"] == 10_000: yield "codebook layer, C=10,000, k=100: peak memory, MB (0.4 of the original's 1546)", row["peak_mb"], 618, row["peak_mb"] <= 618
    for race in found.get("sae", []):
        kinds, others = {row["kind"]: row for row in race if is_ours(row) and "x_floor" in row}, [row for row in race if not is_ours(row) and "x_floor" in row and row["who"] != "sae/floor"]
        for kind, most in (("tied", 1.15), ("untied", 1.15), ("topk", .85)):
            if kind in kinds: yield f"autoencoder, {kind}: a training step, times the bare floor's", kinds[kind]["x_floor"], most, kinds[kind]["x_floor"] <= most
        peers = {name(row): row["x_floor"] for row in others if row["kind"] == "topk"}
        if peers and "topk" in kinds: yield f"autoencoder, topk: faster than every peer (the fastest: {min(peers, key=peers.get)})", kinds["topk"]["x_floor"], min(peers.values()), kinds["topk"]["x_floor"] < min(peers.values())
    for row in found.get("patching", []):
        if row["who"] in ("attribution", "greedy", "acdc") and "fewer_layers" in row: yield f"ordering features for patching, {row['who']}: how many times fewer layers than naive", row["fewer_layers"], 20, row["fewer_layers"] >= 20


def dots(races, title, path):
    "Times the floor, a row a contestant, with their ranges; the races one above the other."
    rows = [(label, row) for label, race in races for row in race if "x_floor" in row and not row["who"].endswith("/floor")]
    fig, ax = plt.subplots(figsize=(7, .8 + .24 * len(rows)))
    for y, (label, row) in enumerate(rows):
        scale, color = row["x_floor"] / row["seconds"], OURS if is_ours(row) else PEERS
        ax.hlines(y, row["low"] * scale, row["high"] * scale, color=color, lw=1.5); ax.plot(row["x_floor"], y, "o", color=color, ms=5)
    ax.axvline(1, color=FLOOR, ls=":", lw=1.2)
    ax.set_yticks(range(len(rows)), [f"{label}{name(row)}" for label, row in rows], fontsize=8); ax.invert_yaxis()
    ax.set(title=title, xlabel="times the floor's time (dotted), median and range; orange: the course", xscale="log"); ticks = [.5, .7, 1, 1.5, 2, 3, 5]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks]); ax.minorticks_off(); ax.grid(axis="y", visible=False)
    fig.tight_layout(); fig.savefig(path, dpi=110); plt.close(fig)


def slopes(races):
    "(what, variable, sizes, slope): the power of the variable with which seconds grow, by least squares of the logarithms."
    for race in races:
        varied = next(v for v in ("N", "C", "k", "d", "n_feats") if len({row.get(v) for row in race}) > 1)
        sizes, taken = [row[varied] for row in race if "seconds" in row], [row["seconds"] for row in race if "seconds" in row]
        yield name(race[0]) if race[0]["who"].startswith("sae") else "codebook layer", varied, sizes, float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])


def report(device, found, folder):
    "The part of the page for one device."
    m, page = found["machine"], []
    page.append(f"## {m['gpu'] if device != 'cpu' else 'CPU'}\n\n{m['cpu']}, {m['threads']} thread(s), torch {m['torch']}, Python {m['python']}; peers: {', '.join(f'{n} ({v})' for n, v in m['peers'].items())}. {m.get('note', '')}")
    page.append("### What was promised\n\n" + table(["what", "measured", "bound", ""], [(w, f"{v:,.2f}" if v < 100 else f"{v:,.0f}", f"{b:,.2f}" if b < 100 else f"{b:,.0f}", "met" if ok else "**not met**") for w, v, b, ok in bounds(found)]))
    for part, title, label in (("codebook", "The codebook layer, forward and backward", lambda r: f"C={r['C']:,} k={r['k']}: "), ("lookup", "Looking up the nearest codes (floor: faiss)", lambda r: f"C={r['C']:,} k={r['k']}: "), ("sae", "A training step of an autoencoder", lambda r: "")):
        if part not in found: continue
        dots([(label(race[0]), race) for race in found[part]], title, folder / f"bench_{part}_{device}.png")
        size = found[part][0][0]
        page.append(f"### {title}\n\n![{title}: time as a multiple of a bare floor's, a dot for each contestant with its range; the table below has the numbers.](bench_{part}_{device}.png)\n\n" + f"{size['N']:,} rows of {size['d']} numbers" + (f", {size['n_feats']:,} features" if "n_feats" in size else "") + ".\n\n"
                    + table(["", "times the floor (range)", "peak memory, MB"], [(label(row) + name(row), ratio(row), row.get("peak_mb", "")) for race in found[part] for row in race]))
    if "slopes" in found: page.append("### Cost against size\n\nSeconds grow as size to this power (1: in proportion).\n\n" + table(["what", "size", "from, to", "power"], [(w, v, f"{min(s):,} to {max(s):,}", f"{p:.2f}") for w, v, s, p in slopes(found["slopes"])]))
    for part, title in (("harvest", "Harvesting beside the bare forward pass"), ("patching", "Ordering features by what patching them does"), ("steering", "Generation under steering"), ("index", "The index of codes"), ("chapters", "Chapters, FAST, after set-up")):
        if rows := found.get(part):
            keys = [k for k in dict.fromkeys(k for r in rows for k in r) if k not in ("low", "high", "site", "n_feats")]
            page.append(f"### {title}\n\n" + table([k.replace("_", " ").replace("x plain", "times plain") for k in keys], [[f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v if v is not None else "").replace("|", "\\|") for v in (r.get(k) for k in keys)] for r in rows]))
    return "\n\n".join(page)


def main(folder):
    folder = Path(folder)
    show.style()
    parts = [report(path.stem, json.loads(path.read_text()), folder) for path in sorted(RESULTS.glob("*.json"))]
    (folder / "benchmarks.md").write_text("# Benchmarks\n\nThe course beside its peers and beside bare floors, each race in one run: each contestant in processes (a peer in an environment) of its own, several one after the other, taking turns; medians and ranges of the processor's own seconds (the clock's on a GPU, and for harvest, patching, index and chapters). On Linux the C library is told to keep freed memory, for everybody alike: otherwise it is luck whether a process asks the system for the same pages at each step, which moves a short step by up to a third. Repeat it with `python course.py bench`. A *floor* is the least code that does the same work: nothing checked, counted or edited. "
                                           "What is measured, and how, stands in `benchmarks/`.\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__": main(sys.argv[1])
