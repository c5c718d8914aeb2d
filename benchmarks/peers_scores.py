"""Autoencoders of ours and of SAELens: what sae-bench says of them, beside what is known.

PYTHONPATH=. python benchmarks/peers_scores.py [docs/scored_by_others.md]

README.md says in which environment. A row that is in results/peers/scores.json is not made again.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import time
import warnings
from functools import lru_cache
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace

QUIET = dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled")
# sae-bench's own annotations fail in its probes under today's beartype
for name, value in (QUIET | dict(JAXTYPING_DISABLE="1")).items():
    os.environ.setdefault(name, value)
warnings.filterwarnings("ignore")
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scores_page import VERSIONS, write_page  # noqa: E402

from codebook_tutorial.core import data_path, seeded  # noqa: E402
from codebook_tutorial.dictionary.formats import load_sae  # noqa: E402
from codebook_tutorial.dictionary.kinds import TopK  # noqa: E402
from codebook_tutorial.feature.detect import concept_scores  # noqa: E402
from codebook_tutorial.model.hub import load_lm  # noqa: E402
from codebook_tutorial.model.run import states_of  # noqa: E402
from codebook_tutorial.model.text import Text, load_text  # noqa: E402
from codebook_tutorial.score.methods import make_dictionary  # noqa: E402
from codebook_tutorial.score.metrics import measure  # noqa: E402
from codebook_tutorial.world.concepts import atoms, story_text  # noqa: E402
from codebook_tutorial.world.grammar import ID  # noqa: E402
from codebook_tutorial.world.stories import stories  # noqa: E402

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    from sae_bench.custom_saes.base_sae import BaseSAE
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
    from sae_lens import SAE, saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer
    from transformer_lens.model_bridge import TransformerBridge

FILE = Path(__file__).resolve().parent / "results" / "peers" / "scores.json"
SITE, LAYER, HOOK = "resid.1", 1, "blocks.1.hook_resid_post"
SETTINGS = dict(site=SITE, n_feats=384, k=11, tokens=300_000, steps=1000, batch=1024, lr=4e-3)
# penalties that leave about k features active, found on seed 0 by active features alone
ALPHA = dict(sae_tied=[1.55], sae_untied=[1.15], sae_gated=[2.05], sae_jumprelu=[0.3])
WARM = SETTINGS["steps"] // 10
SAELENS = dict(
    Standard=dict(l1_coefficient=0.71, l1_warm_up_steps=WARM),
    TopK=dict(k=11),
    BatchTopK=dict(k=11.0),
    JumpReLU=dict(l0_coefficient=0.13, l0_warm_up_steps=WARM),
)
OURS = ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
CONTROLS = ("random directions", "untrained TopK", "PCA", "PCA, 11 largest")
METHODS = [f"ours, {kind}" for kind in OURS] + [f"SAELens, {kind}" for kind in SAELENS]
SEEDS = range(3)
PROBED = 40  # concepts that sae-bench's probes are given; F1 is asked of all others
KS = (1, 2, 5)


@lru_cache(1)
def language():
    "The model, its tokenizer, and the same weights in TransformerLens."
    bridge = TransformerBridge.boot_transformers(str(data_path("stories")), device="cpu")
    bridge.enable_compatibility_mode(no_processing=True)
    return *load_lm("stories"), bridge


@lru_cache(1)
def train_states(seed):
    "What a seed's dictionaries are made from, as the scoreboard's."
    model, tok, _ = language()
    how = dict(n_tokens=SETTINGS["tokens"], length=256, split="train", seed=7 + seed)
    return states_of(model, load_text(tok, "stories", **how), SITE)


@lru_cache(1)
def held_out(seed):
    "Unseen text as the scoreboard's, its states, what holds at each, and stories with topics."
    model = language()[0]
    text, codes = story_text(40_000, seed=seed, split="test")
    y, truth = states_of(model, text, SITE), atoms(codes)[text.mask].numpy()
    return SimpleNamespace(text=text, y=y, truth=truth, topics=topic_states(model, seed))


def topic_states(model, seed, *, each=(60, 30), length=64):
    "{train, test}: {topic: states [stories, length, d]}, 0 at BOS and padding, as sae-bench wants."
    rows, wanted = {}, sum(each)
    for s in stories(100 + seed, "test"):
        topic = s.facts.get("topic")
        if topic is None or len(rows.setdefault(topic, [])) == wanted:
            continue
        ids = [ID["<bos>"], *s.ids[: length - 1].tolist()]
        rows[topic].append(ids + [ID["<pad>"]] * (length - len(ids)))
        if len(rows) == 10 and all(len(found) == wanted for found in rows.values()):
            break
    found = dict(train={}, test={})
    for topic, ids in sorted(rows.items()):
        text = Text(torch.tensor(ids), ID["<bos>"], ID["<pad>"])
        x = torch.zeros(*text.ids.shape, model.config.hidden_size)
        x[text.mask] = states_of(model, text, SITE)
        found["train"][str(topic)], found["test"][str(topic)] = x[: each[0]], x[each[0] :]
    return found


def batches(x, seed):
    "Shuffled batches without end, for SAELens' trainer."
    for epoch in count():
        order = torch.randperm(len(x), generator=seeded(1000 * seed + epoch))
        parts = order.split(SETTINGS["batch"])
        yield from (x[rows] for rows in parts if len(rows) == SETTINGS["batch"])


def train_saelens(kind, x, seed):
    "One of SAELens' training classes by its own trainer; read from the file that it writes."
    torch.manual_seed(seed)
    config = getattr(saes, f"{kind}TrainingSAEConfig")(
        d_in=x.shape[1],
        d_sae=SETTINGS["n_feats"],
        normalize_activations="expected_average_only_in",
        metadata=saes.sae.SAEMetadata(hook_name=HOOK),
        **SAELENS[kind],
    )
    sae, steps = getattr(saes, f"{kind}TrainingSAE")(config), SETTINGS["steps"]
    how = SAETrainerConfig(
        total_training_samples=steps * SETTINGS["batch"],
        train_batch_size_samples=SETTINGS["batch"],
        lr=SETTINGS["lr"],
        lr_end=SETTINGS["lr"] / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=int(0.3 * steps),
        n_batches_for_norm_estimate=50,
        dead_feature_window=50,
    )
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        SAETrainer(how, sae, batches(x, seed)).fit()
        sae.save_inference_model(folder)
        ours, theirs = load_sae(folder), SAE.load_from_disk(folder)
    some = x[:1000]
    off = (ours.encode(some) - theirs.encode(some)).abs().max().item()
    assert off < 1e-3, f"load_sae reads another autoencoder: features differ by {off}"
    return ours


def make(method, seed):
    "A dictionary by the name of its method."
    x, (n, k) = train_states(seed), (SETTINGS["n_feats"], SETTINGS["k"])
    library, _, kind = method.partition(", ")
    if library == "SAELens":
        return train_saelens(kind, x, seed)
    if library == "PCA":
        whole = make_dictionary("pca", x, n, k=k)
        return whole.at(k=k) if kind else whole
    if method == "untrained TopK":
        sae = TopK(x.shape[1], n, k=k, generator=seeded(seed))
        sae.b_dec.data.copy_(x.mean(0))
        return sae.eval()
    name = "random" if method == "random directions" else f"sae_{kind}"
    how = dict(k=k, seed=seed, alpha=ALPHA.get(name), steps=SETTINGS["steps"])
    return make_dictionary(name, x, n, **how)


class Entry(BaseSAE):
    "Any dictionary as a class of sae-bench's own."

    def __init__(self, dictionary):
        (n, d), cpu = dictionary.directions.shape, torch.device("cpu")
        super().__init__(d, n, "stories", LAYER, cpu, torch.float32, HOOK)
        self.dictionary = dictionary

    def encode(self, x):
        return self.dictionary.encode(x)

    def decode(self, feature_acts):
        return self.dictionary.decode(feature_acts)

    def forward(self, x):
        return self.decode(self.encode(x))


class Store:
    "Text for sae-bench's core, in place of a data set that must be downloaded."

    context_size, store_batch_size_prompts = 256, 16

    def __init__(self, ids):
        self.ids, self.at = ids, 0

    def reset_input_dataset(self):
        self.at = 0

    def get_batch_tokens(self, n):
        self.at += n
        return self.ids[self.at - n : self.at]


def core(entry, text):
    "sae-bench's core, its replacement only where tokens count, as its own script does."
    asked = CoreEvalConfig(
        model_name="stories",
        batch_size_prompts=16,
        n_eval_reconstruction_batches=3,
        n_eval_sparsity_variance_batches=3,
        exclude_special_tokens_from_reconstruction=True,
        **{f"compute_{part}": True for part in ("kl", "ce_loss", "l2_norms")},
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    skip = {ID["<bos>"], ID["<pad>"]}
    groups, _ = run_evals(entry, Store(text.ids), language()[2], asked, ignore_tokens=skip)
    return {name: value for group in groups.values() for name, value in group.items()}


def concepts_of(truth, at_least=100):
    "Concepts of the probes, drawn in one order for all seeds; the others."
    half = len(truth) // 2
    often = np.minimum(truth[:half].sum(0), truth[half:].sum(0)) >= at_least
    rare = np.maximum(truth[:half].mean(0), truth[half:].mean(0)) < 0.5
    order = np.random.default_rng(0).permutation(truth.shape[1])
    probed = [c for c in order if often[c] and rare[c]][:PROBED]
    return probed, np.setdiff1d(order, probed)


def accuracy(train, test, **how):
    "Mean test accuracy of sae-bench's probes."
    with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
        found = train_probe_on_activations(train, test, **how)[1]
    return float(np.mean(list(found.values())))


def probing(entry, h, seed):
    "sae-bench's sparse probing: topics of stories from mean features, concepts of single tokens."
    torch.manual_seed(seed)
    sets = {part: get_sae_meaned_activations(acts, entry, 125) for part, acts in h.topics.items()}
    row = {f"topic_{k}": accuracy(sets["train"], sets["test"], select_top_k=k) for k in KS}
    f, half, found = entry.encode(h.y), len(h.y) // 2, {k: [] for k in KS}
    draw = np.random.default_rng(seed)
    for c in concepts_of(h.truth)[0]:
        sets = []
        for part, size in ((slice(half), 500), (slice(half, None), 250)):
            own = h.truth[part, c]
            n = min(size, own.sum())
            some = {"has": np.flatnonzero(own), "has not": np.flatnonzero(~own)}
            sets.append({who: f[part][draw.choice(at, n, False)] for who, at in some.items()})
        for k in KS:
            found[k].append(accuracy(*sets, select_top_k=k))
    return row | {f"token_{k}": float(np.mean(found[k])) for k in KS}


@torch.no_grad()
def score(dictionary, seed):
    "All that is asked of one dictionary."
    h, entry = held_out(seed), Entry(dictionary)
    m = measure(dictionary, h.y)
    f1 = concept_scores(dictionary.encode(h.y).numpy(), h.truth)["f1"]
    probed, others = concepts_of(h.truth)
    row = dict(l0=m["l0"], fvu=m["fvu"], dead=m["dead_share"], f1_all=float(np.nanmean(f1)))
    row |= dict(f1=float(np.nanmean(f1[others])), f1_probed=float(np.nanmean(f1[probed])))
    told = core(entry, h.text)
    row |= {f"core_{name}": value for name, value in told.items() if "tokens" not in name}
    return row | probing(entry, h, seed)


def main():
    "Make and score what is missing, keep each row, write the page."
    torch.set_num_threads(1)
    kept = dict(settings=SETTINGS, versions=VERSIONS, rows=[])
    if FILE.exists():
        kept["rows"] = json.loads(FILE.read_text())["rows"]
    done = {(row["method"], row["seed"]) for row in kept["rows"]}
    for seed, method in product(SEEDS, [*CONTROLS, *METHODS]):
        if (method, seed) in done:
            continue
        start = time.process_time()
        dictionary = make(method, seed)
        made = time.process_time() - start
        row = dict(method=method, seed=seed, made_seconds=made) | score(dictionary, seed)
        kept["rows"].append(row | dict(seconds=time.process_time() - start))
        FILE.write_text(json.dumps(kept, indent=1) + "\n")
        told = {name: round(row[name], 3) for name in ("l0", "fvu", "f1", "token_1")}
        print(f"{method:20s} {seed} {told}", flush=True)
    if len(sys.argv) > 1:
        write_page(Path(sys.argv[1]), kept, trained=METHODS, controls=CONTROLS)


if __name__ == "__main__":
    main()
