"""The notebooks' workshop behind course.py: execute, normalise, clean, export, compare claims, write learner's copies."""
import asyncio, base64, configparser, json, os, re, subprocess, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parents[1]
NBS, OUT, CLAIMS = ROOT / "nbs", ROOT / "out", ROOT / "claims"
FIRST = ROOT / "docs" / "_static" / "first.png"                                   # the picture of the README and of the site's first page
CELL_LIMIT = 600 if os.environ.get("COURSE_FULL", "") in ("", "0") else None     # seconds


def chapters(only=()):
    "Paths of the chapters, all or those whose number is in `only`."
    books = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
    unknown = [n for n in only if not any(b.name.startswith(n + "_") for b in books)]
    if unknown: sys.exit(f"no chapter {', '.join(unknown)}; there are {', '.join(b.name[:2] for b in books)}")
    return [b for b in books if not only or b.name[:2] in only]


# ---- files -----------------------------------------------------------------------------------------------------------
def write_text(path, text):
    "Write whole or not at all: to a temporary name, then rename."
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)


def read_book(path): return nbformat.read(path, as_version=4)
def write_book(path, nb): write_text(path, nbformat.writes(nb) + "\n")


def directives(cell):
    "Words of a cell's `#|` lines: `#| export checks.fsm` gives {'export': 'checks.fsm'}."
    lines = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", cell.source, re.M) if cell.cell_type == "code" else []
    return {name: rest.strip() for name, rest in lines}


# ---- executing -------------------------------------------------------------------------------------------------------
class Client(NotebookClient):
    "Executes a notebook, skips `#| eval: false` cells, and remembers each cell's seconds."
    async def async_execute_cell(self, cell, cell_index, **kw):
        if directives(cell).get("eval") == "false": return cell
        start = time.time()
        try: return await super().async_execute_cell(cell, cell_index, **kw)
        finally: self.seconds.append((round(time.time() - start, 1), cell_index))


def peak_mb(client):
    "Peak memory of the kernel so far, MB (Linux; 0 elsewhere)."
    try: return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{client.km.provisioner.pid}/status").read_text())[1]) // 1024
    except (OSError, AttributeError, TypeError): return 0


async def execute(path):
    "Execute one chapter in a kernel of its own; returns (notebook, failure text or '', seconds per cell, peak MB)."
    nb, number = read_book(path), path.name[:2]
    folder = OUT / "run" / number
    folder.mkdir(parents=True, exist_ok=True)
    (OUT / "claims" / f"{number}.json").unlink(missing_ok=True)
    env = {**os.environ, "COURSE_CLAIMS": str(OUT / "claims" / f"{number}.json"), "PYTHONHASHSEED": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    if all(Path(os.environ.get(name) or ".").exists() for name in ("COURSE_MODEL", "COURSE_TEXT")): env.setdefault("HF_HUB_OFFLINE", "1")        # else something of the Hub is asked for
    if CELL_LIMIT: env.setdefault("OMP_NUM_THREADS", "1")      # FAST: sums in one order, the same outputs again; and two threads on a busy core are far slower than one
    client = Client(nb, timeout=CELL_LIMIT, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.extra_arguments, client.seconds, failure, memory = ["--log-level=ERROR"], [], "", 0
    client.km = client.create_kernel_manager()
    try:                              # not nbclient's own context manager: it takes Ctrl-C for itself
        await client.async_start_new_kernel(env=env)
        await client.async_start_new_kernel_client()
        for i, cell in enumerate(nb.cells): await client.async_execute_cell(cell, i, store_history=True)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e: failure = f"cell {i}: {e}"
    finally:
        memory = peak_mb(client)
        if client.kc: client.kc.stop_channels()
        await client.km.shutdown_kernel(now=True)
    return nb, failure, client.seconds, memory


def compare_claims(number):
    "What in a fresh run's claims does not agree with the committed ones: a list of lines."
    fresh, kept = ((json.loads(p.read_text()) if p.exists() else {}) for p in (OUT / "claims" / f"{number}.json", CLAIMS / f"{number}.json"))
    if os.environ.get("COURSE_MODEL") or CELL_LIMIT is None: return []        # other models and FULL runs: other numbers
    lines = [f"{k}: committed, but this run did not record it" for k in kept.keys() - fresh.keys()]
    for k, new in fresh.items():
        old = kept.get(k)
        if old is None: lines.append(f"{k}: new; `course.py author {number}` commits it")
        elif (old["value"] is None) != (new["value"] is None) or (
                old["value"] is not None and abs(old["value"] - new["value"]) > max(old["tolerance"], new["tolerance"])):
            lines.append(f"{k}: {new['value']} here, {old['value']} committed, tolerance {old['tolerance']}")
    return sorted(lines)


def other_outputs(path, nb):
    "Cells of a fresh run whose committed outputs are not the same to the letter: of older code, or of another machine."
    kept = {c.id: c.outputs for c in read_book(path).cells if c.cell_type == "code"}
    return [i for i, c in enumerate(nb.cells) if c.cell_type == "code" and kept.get(c.id) != c.outputs]


def save_figures(nb, stem, folder=None):
    "Put a chapter's pictures into a folder (out/figures/); their names and alt texts."
    folder, saved = folder or OUT / "figures", []
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{stem}_[0-9][0-9].png"): old.unlink()
    for data in (out.get("data", {}) for cell in nb.cells for out in cell.get("outputs", [])):
        if "image/png" not in data: continue
        saved.append((f"{stem}_{len(saved) + 1:02}.png", data["text/plain"]))
        (folder / saved[-1][0]).write_bytes(base64.b64decode(data["image/png"]))
    return saved


async def execute_all(books, jobs, done):
    "Execute chapters, `jobs` at a time; `done(path, nb, failure, seconds, memory)` is called as each ends."
    gate = asyncio.Semaphore(jobs)
    async def one(path):
        async with gate: done(path, *await execute(path))
    await asyncio.gather(*map(one, books))


def run(args):
    "Execute the chapters into out/; the work tree stays as it was."
    books, failed, start = chapters(args.only), [], time.time()
    def done(path, nb, failure, seconds, memory):
        write_book(OUT / "nbs" / path.name, normalise(nb))
        save_figures(nb, path.stem)
        slow = max(seconds, default=(0, 0))
        problems = [failure] if failure else [f"claim {line}" for line in compare_claims(path.name[:2])]
        if problems: failed.append((path, problems))
        state = f"FAILED at {failure.split(':')[0]}" if failure else "FAILED: claims differ" if problems else "passed"
        if args.outputs and not failure and (other := other_outputs(path, nb)): state += f"; committed outputs differ in cells {', '.join(map(str, other))}"
        print(f"{path.stem:<16} {sum(s for s, _ in seconds):6.1f} s   slowest cell {slow[1]:3}: {slow[0]:5.1f} s   {memory:5} MB   {state}", flush=True)
    asyncio.run(execute_all(books, max(1, args.jobs), done))
    for path, problems in failed: print(f"\n{path.stem}:", *problems, sep="\n  ")
    print(f"\n{len(books) - len(failed)} of {len(books)} chapters passed in {time.time() - start:.0f} s. Executed copies: out/nbs, figures: "
          "out/figures, claims: out/claims.\nNext: `python course.py lab` opens the chapters; `python course.py learner FOLDER` writes copies to solve.")
    return 1 if failed else 0


# ---- authoring -------------------------------------------------------------------------------------------------------
def keep(out):
    "Whether an output belongs in the committed notebook: no progress bars, no warnings, no log lines."
    bar = "application/vnd.jupyter.widget-view+json" in out.get("data", {}) and re.search(r"\[[\d:]+[<,]", out["data"].get("text/plain", ""))
    return not bar and (out.output_type != "stream" or out.name != "stderr")


def normalise(nb):
    "Outputs that come out the same from every run: no stderr, no execution counts, no timestamps, no widgets' states."
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code": continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if keep(o)]
        for o in cell.outputs:                                 # a panel's state belongs to its kernel
            if o.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None): o["data"]["text/plain"] = "a panel: it comes to life where the cell is run"
        for o in cell.outputs:
            if "execution_count" in o: o.execution_count = None
    nb.metadata = nbformat.from_dict({"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    return nb


def text_path(path): return OUT / "text" / (path.stem + ".py")


def from_text():
    "Take chapters edited (or begun) as text in out/text/ back into notebooks; ids and outputs of unchanged cells stay."
    for text in sorted((OUT / "text").glob("[0-9][0-9]_*.py")):
        book = NBS / (text.stem + ".ipynb")
        if book.exists() and book.stat().st_mtime >= text.stat().st_mtime: continue
        mode = ["--update"] if book.exists() else []
        subprocess.run([sys.executable, "-m", "jupytext", "--quiet", "--to", "ipynb", *mode, "--output", book, text], check=True)
        stable_ids(book)


def settings():
    "settings.ini with {names} filled in."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    s = dict(ini["DEFAULT"])
    return {k: v.format(**s) if k == "install" else v for k, v in s.items()}


def apply_settings(nb, name):
    "Write the Colab badge's address and the Colab cell's install source from settings.ini."
    s = settings()
    url = f"https://colab.research.google.com/github/{s['user']}/{s['repo']}/blob/{s['branch']}/nbs/{name}"
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = re.sub(r"https://colab\.research\.google\.com/github/[^)\s]+", url, cell.source)
        elif "colab" in directives(cell):
            cell.source = f'#| colab\nimport sys\nif "google.colab" in sys.modules:\n    %pip install -q {s["install"]}'
    return nb


def stable_ids(book):
    "Cell ids that do not change from one making to the next: chapter and running number, kept where already so."
    nb = apply_settings(read_book(book), book.name)
    taken = {c.id for c in nb.cells if re.fullmatch(r"c\d\d-\d+", c.id)}
    n = max([int(i.split("-")[1]) for i in taken], default=0)
    seen = set()
    for c in nb.cells:
        if c.id not in taken or c.id in seen:
            n += 1
            c.id = f"c{book.name[:2]}-{n}"
        seen.add(c.id)
    write_book(book, nb)


def export():
    "Export every chapter's `#| export` cells; each named module is made anew (nbdev appends to those that are no default_exp)."
    from nbdev.config import add_init, get_config
    from nbdev.doclinks import _build_modidx
    from nbdev.export import nb_export
    from nbdev.maker import ModuleMaker
    class Fresh(ModuleMaker):
        def __init__(self, *a, is_new=True, **kw): super().__init__(*a, is_new=True, **kw)
    os.chdir(ROOT)
    for path in chapters(): nb_export(path, mod_maker=Fresh)
    add_init(get_config().lib_path)
    _build_modidx()


def clean():
    from nbdev.clean import nbdev_clean
    os.chdir(ROOT)
    nbdev_clean.__wrapped__()


def author(args):
    "Text (if it was edited) -> notebook -> export -> execute -> normalise -> clean -> claims in place."
    if args.text:
        (OUT / "text").mkdir(parents=True, exist_ok=True)
        for path in chapters(args.only):
            subprocess.run([sys.executable, "-m", "jupytext", "--quiet", "--to", "py:percent", "--output", text_path(path), path], check=True)
            print(text_path(path).relative_to(ROOT))
        return 0
    from_text()
    export()                          # first, so that chapters import what they are about to show
    failed = []
    def done(path, nb, failure, seconds, memory):
        if failure:
            failed.append(path)
            write_book(OUT / "nbs" / path.name, nb)
            return print(f"{path.stem}: FAILED {failure}\n(the notebook is left as it was; the failed run is in out/nbs)", flush=True)
        write_book(path, normalise(nb))
        save_figures(nb, path.stem)
        fresh = OUT / "claims" / f"{path.name[:2]}.json"
        if fresh.exists(): write_text(CLAIMS / fresh.name, fresh.read_text())
        else: (CLAIMS / fresh.name).unlink(missing_ok=True)
        top = ", ".join(f"cell {i} {s} s" for s, i in sorted(seconds, reverse=True)[:3])
        print(f"{path.stem}: executed in {sum(s for s, _ in seconds):.0f} s, {memory} MB; slowest {top}", flush=True)
    for path in chapters(args.only): asyncio.run(execute_all([path], 1, done))
    clean(); export(); readme()
    return 1 if failed else 0


# finding | claim | setting, and the paper's figure as it is told there
REPRODUCES = [
    ("TokFSM: state + digit triples", "01", "fsm.trigrams", "the paper's world and seed", "686"),
    ("A small GPT-NeoX learns the world: state accuracy", "01", "fsm.state_accuracy", "2 layers, d=64, half turn; paper 4 layers, d=128", "0.968"),
    ("Sampled walks lose the beat: legal when read one digit late", "01", "fsm.off_beat", "standard rotary, short training; control: true walks", "not told"),
    ("With codes at every head and MLP, k=1: state accuracy", "03", "states.state_accuracy", "1000 codes from data, no training; paper 10,000 codes, trained", "0.637"),
    ("Dead codes", "03", "states.dead_share", "the same", "0.93 to 0.997"),
    ("A state's best code: precision", "03", "states.code_precision", "the same, held out", "0.971"),
    ("The best neuron at the same recall: precision", "03", "states.neuron_precision", "512 hidden neurons, both signs; paper 128 a layer", "0.705"),
    ("Writing a state's codes moves the model there (JSD, 1 = untouched)", "03", "states.jsd_all", "all codes, two positions", "near 0 (its figure)"),
    ("The MLP layers' codes alone suffice (JSD, 1 = untouched)", "03", "states.jsd_mlp", "two layers", "near 0 (its figure): here only in part"),
    ("The course's language model: loss, nats a token", "04", "stories.loss", "0.75M parameters, unseen stories; control: words in random order", "none"),
    ("The lowest loss there is (entropy of the stories)", "04", "stories.entropy_floor", "known from the choices that made them; control: word frequencies alone", "none"),
    ("It remembers a story's month", "04", "stories.month_persistence", "share of the months' probability; control: another story's beginning; chance 0.083", "none"),
    ("It does not remember place, object, colour, number, relative", "04", "stories.forgotten_facts", "the same, mean of five; a finding about this model", "none"),
    ("Who receives? Held-out pairs of names", "04", "stories.ioi_accuracy", "likeliest of all words; control: words in random order", "none"),
    ("Four residual codes at every head and MLP: loss above the control, nats", "05", "finetune.loss_gap", "1024 codes a book; control: every code replaced by another", "not its form"),
    ("One code at every head and MLP: loss above the control, share", "05", "finetune.gap_single", "2048 codes a book, nearest", "not told"),
    ("The paper's selection, 8 best cosines: loss above the control, share", "05", "finetune.gap_top8", "1024 codes, heads and MLPs, short training; paper: attention alone, 10,000 codes", "0.06 to 0.14, attention alone"),
    ("Who receives, in residual codes", "05", "finetune.ioi_accuracy", "held-out pairs; control: every code replaced by another", "none"),
    ("Codes of the best cosines are near-duplicates (cosine of two at one place)", "05", "finetune.likeness_top8", "control: at different places", "not told"),
    ("Codes against neurons at the same recall: precision gained", "06", "codes.precision_gain_over_neurons", "all codes, held out, mean over concepts; control: as many codes as neurons", "> 0.30, its patterns; no such control"),
    ("The same, as many codes as neurons", "06", "codes.precision_gain_equal_pool", "codes drawn at random; control: the most used", "not told"),
    ("Writing a month's codes makes the model name that month", "06", "codes.written_month", "share of the months' probability; control: the told month's own codes", "none"),
    ("A sparse autoencoder's active features (L0)", "07", "sae.l0", "tied, 384 features, resid.1", "its choice"),
    ("Variance that it leaves unexplained (FVU)", "07", "sae.fvu", "decoder refitted and tuned; control: as many random directions by matching pursuit", "not told for this size"),
    ("Perplexity with decoded states / as it is", "07", "sae.perplexity_ratio", "decoder tuned on the model's predictions; control: random directions, decoder tuned as long; paper: Pythia-70M, layer 2, tied", "1.6 (25 to 40)"),
    ("Two seeds find the same features: mean cosine to the nearest", "07", "sae.seed_overlap", "192 features; control: random directions", "not told"),
    ("Best single feature for a known concept, F1: tied autoencoder", "08", "baselines.concept_f1.sae_tied", "held out, mean over concepts; control: as many random directions", "none"),
    ("The same: PCA", "08", "baselines.concept_f1.pca", "96 components; control: as many random directions", "none"),
    ("The same: ICA", "08", "baselines.concept_f1.ica", "96 components; control: as many random directions", "none"),
    ("The same: hidden neurons", "08", "baselines.concept_f1.neurons", "384 neurons of the same block; control: as many random directions", "none"),
    ("A feature that detects the coming class of word also carries it: nats lost when held still", "08", "baselines.detector_held", "mean of 15 classes; control: as much taken away in a random direction", "none"),
    ("How well a machine's explanations predict features, r: tied autoencoder", "09", "autointerp.score.sae_tied.layer1", "predicate explainer, top and random fragments; control: random directions", "its Fig. 2: highest, no language model here"),
    ("The same: ICA, cut off at zero", "09", "autointerp.score.ica_relu.layer1", "the same", "its Fig. 2: second (signed)"),
    ("The same: ICA as it is", "09", "autointerp.score.ica.layer1", "the same", "its Fig. 2: second"),
    ("The same: PCA as it is", "09", "autointerp.score.pca.layer1", "the same", "its Fig. 2: third"),
    ("The same: random directions, cut off at zero", "09", "autointerp.score.random.layer1", "the same", "its Fig. 2: last, with the basis"),
    ("Does the score agree with the truth? Rank correlation with the F1 of the best concept", "09", "autointerp.agreement_with_truth", "over an autoencoder's features, without predicates that coincide with concepts; control: shuffled", "nobody could ask"),
    ("The same, when the truth knows every word as well", "09", "autointerp.agreement_with_truth_and_words", "the same", "nobody could ask"),
    ("One code of the first MLP, written at the receiver's name, gives the gift to somebody else", "10", "ioi.one_code", "share of 40 prompts, one code at every head and MLP; control: a random code there", "none"),
    ("KL to the counterfactual with 5 features patched, fixed names: tied autoencoder", "10", "ioi.kl_at_5.sae_tied.fixed", "one set for all prompts, nats; control: random directions", "its Fig. 3: falls fastest"),
    ("The same: PCA", "10", "ioi.kl_at_5.pca.fixed", "the same", "its Fig. 3: slower"),
    ("The same: an autoencoder without penalty", "10", "ioi.kl_at_5.sae_alpha0.fixed", "the same", "its Fig. 3: slower"),
    ("The same: ICA", "10", "ioi.kl_at_5.ica.fixed", "the same", "not asked: here as good as autoencoders"),
    ("A low error is no low floor: KL left with all features of the tied autoencoder patched, last layer", "10", "ioi.floor_last_layer", "random names, nats; control: TopK autoencoder", "not asked"),
    ("Length of the edit that takes away 90 % of KL, random names: tied autoencoder", "10", "ioi.edit_at_90pct.sae_tied.per_prompt", "a set for each prompt; of the whole difference", "its Fig. 3: less than PCA; here as much"),
    ("The same: PCA", "10", "ioi.edit_at_90pct.pca.per_prompt", "the same", "its Fig. 3: more"),
    ("Features that the last layer's best ) feature rests on, ablated: share of the right )'s probability lost", "11", "circuits.tree_effect", "held-out places; control: as many others, edits as long", "shown without a control"),
    ("The same: that feature itself", "11", "circuits.root_alone", "control: the features below it", "not asked"),
    ("The same, by codes of the first MLP", "11", "circuits.code_tree_effect", "one code at every head and MLP; control: as many others", "none"),
    ("A code of (, written in the first MLP where nobody opens a parenthesis: probability of a closing one", "11", "circuits.written_parenthesis", "largest within six words; control: random codes", "none"),
    ("The strongest child is the feature with the most similar direction", "11", "circuits.nearest_is_strongest", "share of the parents of three trees", "not asked"),
    ("Stories about the topic asked for, within 1.5 x the unsteered loss: codes, written where the topic is chosen", "12", "steering.topic_rate_at_budget.codebook", "ten topics, held-out words; control: random codes there", "its Table 3: 65 to 100 % (mentions, no price given)"),
    ("The same: the paper's way, codes forced everywhere, the cheapest setting (over the budget)", "12", "steering.topic_rate_at_budget.codebook_forced", "the same, one code a state; control: unsteered", "its Table 3"),
    ("Eight of the codes of a model with eight a state, forced everywhere: stories that mention the topic", "12", "steering.forced_mentions", "at several times the unsteered loss; control: eight random codes", "its Table 3: 65 to 100 %"),
    ("The same within the budget: features of an autoencoder, where the topic is chosen", "12", "steering.topic_rate_at_budget.sae_tied", "control: as long edits in random directions there", "not asked"),
    ("The same: a mean-difference vector, everywhere", "12", "steering.topic_rate_at_budget.mean_difference", "control: unsteered", "not asked"),
    ("The same: that vector, where the features say", "12", "steering.topic_rate_at_budget.mean_difference_at_places", "control: edits in random directions there", "not asked"),
    ("The same: that vector, where the model would say a topic word (no features)", "12", "steering.topic_rate_at_budget.mean_difference_at_words", "control: unsteered", "not asked"),
    ("Known concepts by the best single feature, F1: tied autoencoder", "13", "scoreboard.concept_f1.sae_tied", "384 features behind block 1; control: random directions", "not known there"),
    ("The same: codes of a network finetuned with them there", "13", "scoreboard.concept_f1.codebook_tuned", "the same", "not known there"),
    ("The same: ICA", "13", "scoreboard.concept_f1.ica", "the same, 96 components", "not known there"),
    ("Steering at the last block, within 1.5 x the unsteered loss: ICA", "13", "scoreboard.steered.ica", "the same switch for every dictionary; control: random directions", "not asked"),
    ("The machine's hundred states by the best single feature, F1: one code (k-means)", "13", "scoreboard.fsm_f1.kmeans", "512 features of the last MLP; control: random directions", "its Section 4: precision alone"),
    ("The same: TopK autoencoder", "13", "scoreboard.fsm_f1.sae_topk", "the same", "not asked"),
    ("The states of one machine, F1: one code (k-means)", "13", "scoreboard.one_code_one_machine", "128 codes; control: as many random directions", "not asked"),
    ("The same, three machines walking at once, their states added up", "13", "scoreboard.one_code_three_machines", "the same", "not asked"),
    ("The same: ICA", "13", "scoreboard.ica_three_machines", "64 components; control: 512 random directions", "not asked"),
    ("Features of two seeds, partnered one to one: mean cosine, TopK autoencoder", "13", "scoreboard.stability.sae_topk", "control: as many raw states drawn at random", "asked for by its reviewers"),
    ("Codes looked up at every head and MLP of the course's model: time added, as a multiple of its own", "14", "scale.codebook_overhead", "2048 codes at six sites, one CPU core", "asked for by its reviewers"),
    ("Seconds of sizes never timed, predicted from three prices: median absolute log ratio", "14", "scale.prediction_error", "up to 768 wide and 10,000 codes; control: FLOPs alone", "none"),
    ("Memory of a training step, counted without running it: median absolute log ratio to the measured", "14", "scale.memory_error", "nine small models on a CPU; control: all but activations", "none"),
    ("Precision of trusted features on changed text: tied autoencoder", "14", "scale.shift_precision", "mean of five changes; control: random directions chosen alike", "asked for by its reviewers"),
    ("Features of two seeds and texts, partnered one to one: mean cosine, codes from data", "14", "scale.seed_stability.codebook", "eleven codes a state; control: raw states drawn at random", "asked for by its reviewers"),
    ("Writing another sentence's codes at the heads makes the model name its receiver", "05", "finetune.written_receiver", "control: codes of the same sentence with another giver", "none"),
]


# what the README shows at first sight; the rest it folds away
HEADLINES = {"states.state_accuracy", "states.jsd_all", "states.jsd_mlp", "finetune.gap_single", "codes.precision_gain_over_neurons", "codes.precision_gain_equal_pool", "sae.perplexity_ratio", "ioi.kl_at_5.sae_tied.fixed",
             "ioi.kl_at_5.pca.fixed", "autointerp.agreement_with_truth", "steering.topic_rate_at_budget.codebook", "steering.topic_rate_at_budget.codebook_forced", "scoreboard.one_code_one_machine", "scoreboard.one_code_three_machines"}


def findings(headlines):
    "The table of what reproduces, from claims/: its headlines, or all of it with seeds and settings."
    num = lambda v: "–" if v is None else f"{v:.3g}" if v < 10 else f"{v:.0f}"
    lines = ["| finding | ours | control | paper |", "|---|---|---|---|"] if headlines else ["| finding | ours (seeds) | control | paper | setting |", "|---|---|---|---|---|"]
    for finding, number, name, setting, paper in REPRODUCES:
        if not (CLAIMS / f"{number}.json").exists() or headlines and name not in HEADLINES: continue
        c = json.loads((CLAIMS / f"{number}.json").read_text())[name]
        seeds = f" ({', '.join(map(num, c['values']))})" if len(c["values"]) > 1 and not headlines else ""
        lines.append(f"| {finding} | {num(c['value'])}{seeds} | {num(c['control'])} | {paper} |" + ("" if headlines else f" {setting} |"))
    return "\n".join(lines)


def readme():
    "Write README.md's tables of findings from claims/, and its picture from chapter 07."
    outputs = (out.get("data", {}) for cell in read_book(NBS / "07_sae.ipynb").cells for out in cell.get("outputs", []))
    picture = base64.b64decode(next(data["image/png"] for data in outputs if "image/png" in data))
    if not FIRST.exists() or FIRST.read_bytes() != picture: FIRST.write_bytes(picture)
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    for part in ("headlines", "claims"):
        before, rest = text.split(f"<!-- {part}: begin -->")
        text = f"{before}<!-- {part}: begin -->\n{findings(part == 'headlines')}\n<!-- {part}: end -->{rest.split(f'<!-- {part}: end -->')[1]}"
    write_text(path, text)


def check(args):
    "Export, clean, make the README's table, then fail if git sees a change."
    export(); clean(); readme()
    watched = ["nbs", "codebook_tutorial", "README.md", "docs/_static"]
    dirty = subprocess.run(["git", "status", "--porcelain", "--", *watched], cwd=ROOT, capture_output=True, text=True).stdout
    if not dirty:
        print("check: export, clean and the README table change nothing")
        return 0
    print(dirty + subprocess.run(["git", "diff", "--stat", "--", *watched], cwd=ROOT, capture_output=True, text=True).stdout)
    print("check: FAILED: notebooks and library disagree, or changes are not committed. `course.py author` brings them together; then commit.")
    return 1


# ---- the learner's copies --------------------------------------------------------------------------------------------
SOLUTION = re.compile(r"^(?P<pad>[ \t]*)### BEGIN SOLUTION\n.*?^[ \t]*### END SOLUTION\n?", re.M | re.S)


def stub(source):
    "An exercise cell without its solution: the marked lines become one `...  # your code here`."
    found, n = SOLUTION.subn(lambda m: f"{m['pad']}...  # your code here\n", source)
    if not n or "SOLUTION" in found: raise ValueError(f"exercise cell: expected ### BEGIN SOLUTION ... ### END SOLUTION, got:\n{source}")
    return found.rstrip("\n")


def learner_copy(nb):
    "The learner's notebook: stubs for solutions, no outputs of exercises, the rest as it is."
    for cell in nb.cells:
        d = directives(cell)
        if "exercise" in d: cell.source = stub(cell.source)
        if "exercise" in d or "check_" in cell.source and cell.cell_type == "code": cell.outputs = []
    return nb


def learner(args):
    "Write the learner's copies; never over a notebook somebody may have worked in."
    folder = Path(args.folder).expanduser()
    if folder.exists() and not folder.is_dir(): sys.exit(f"learner: expected a folder, got the file {folder}")
    there = [p.name for p in chapters() if (folder / p.name).exists()]
    if there and not args.force: sys.exit(f"learner: {folder} already holds {', '.join(there)}; choose another folder, or --force to overwrite them")
    for path in chapters(): write_book(folder / path.name, learner_copy(read_book(path)))
    print(f"{len(chapters())} learner's notebooks in {folder}; open them with: python course.py lab --notebook-dir {folder}")
    return 0


def figures(args):
    "Every figure as a picture file, with its alt text in CHAPTER.md; drawn anew when a resolution is asked for."
    folder, failed, found = Path(args.folder), [], {}
    if folder.exists() and not folder.is_dir(): sys.exit(f"figures: expected a folder, got the file {folder}")
    if args.dpi is None: found = {path.stem: save_figures(read_book(path), path.stem, folder) for path in chapters(args.only)}
    elif not 20 <= args.dpi <= 600: sys.exit(f"figures: --dpi {args.dpi}, expected 20 to 600")
    else:
        os.environ["COURSE_DPI"] = str(args.dpi)
        def done(path, nb, failure, seconds, memory):
            if failure: failed.append(path.stem)
            else: found[path.stem] = save_figures(nb, path.stem, folder)
            print(f"{path.stem}: {f'FAILED {failure}' if failure else f'{len(found[path.stem])} figures'}", flush=True)
        asyncio.run(execute_all(chapters(args.only), min(2, os.cpu_count() or 1), done))
    for stem, saved in found.items(): write_text(folder / f"{stem}.md", f"# {stem}\n\n" + "".join(f"![{alt}]({name})\n\n{alt}\n\n" for name, alt in saved))
    print(f"{sum(map(len, found.values()))} figures in {folder}; beside them one .md a chapter says what each shows")
    return len(failed) > 0


def main():
    sys.path.insert(0, str(ROOT))
    from course import parser
    args = parser().parse_args()
    try: return globals()[args.verb](args)
    except KeyboardInterrupt:
        print("\nstopped; what was finished is in out/, the chapters are as they were", flush=True)
        return 130


if __name__ == "__main__": sys.exit(main())
