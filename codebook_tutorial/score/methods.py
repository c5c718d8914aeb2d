"""A dictionary by any method; states of the finite state machine and their sums."""

import numpy as np
import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Dictionary
from codebook_tutorial.dictionary.baselines import Affine, ica, pca
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.train import refit, train_sae
from codebook_tutorial.model.run import evaluating, model_device
from codebook_tutorial.model.sites import capture
from codebook_tutorial.score.metrics import measure
from codebook_tutorial.world.fsm import TokFSM, state_labels

# %%
METHODS = (
    "sae_tied",
    "sae_untied",
    "sae_topk",
    "sae_batchtopk",
    "sae_jumprelu",
    "sae_gated",
    "sae_matryoshka",
    "sae_alpha0",
    "codebook",
    "kmeans",
    "ica",
    "pca",
    "basis",
    "random",
    "random_d",
)


def _codes(x, n_feats, k, *, seed, moves: int):
    "Codes from data alone: seeded, then moved by moving averages on `moves` batches."
    draw = seeded(seed)
    select = "residual" if k > 1 else "euclidean"
    book = Codebook(x.shape[1], n_feats, k, select=select, learn="ema").to(x.device)
    some = torch.randperm(len(x), generator=draw)[:40_000].to(x.device)
    book.init_from(x[some], generator=draw).train()
    with torch.no_grad():
        for _ in range(moves):
            book(x[torch.randint(len(x), (2048,), generator=draw).to(x.device)])
            book.ema_step(0.9)
    return book.eval()


def _random(x, n, seed):
    "Features read along random directions (a rotation where n is d), decoded as well as can be."
    d, draw = x.shape[1], seeded(seed + 100)
    if n == d:
        reads = torch.linalg.qr(torch.randn(d, d, generator=draw)).Q
    else:
        reads = F.normalize(torch.randn(n, d, generator=draw), dim=-1)
    reads = reads.to(x)
    return Affine(torch.linalg.pinv(reads).T.contiguous(), reads, x.mean(0))


def _penalised(kind, x, n_feats, *, k, alpha, **kw):
    "Of several penalties, the one whose l0 is nearest to k; refitted where L1 shrinks what it keeps."
    if not alpha:
        raise ValueError(
            f"make_dictionary: sae_{kind} has a penalty in place of k; give some to try, "
            f"alpha=[...]: the one whose l0 is nearest to {k} is taken"
        )
    found = train_sae(x, n_feats, kind, alpha=list(alpha), **kw)
    best = min(found, key=lambda one: abs(measure(one, x[:50_000])["l0"] - k))
    return refit(best, x[:200_000]) if kind in ("tied", "untied") else best


# %%
def make_dictionary(
    method: str,  # one of METHODS
    x,  # [N, d] states
    n_feats: int,  # PCA, ICA, the basis and random_d: d, whatever is said here
    *,
    k: int,  # active features per state, where a method can be told
    seed: int = 0,
    alpha: list | None = None,  # penalties to try, for the kinds that have one in place of k
    steps: int = 2000,
) -> Dictionary:
    "A dictionary of some states by any method; codes from data alone."
    if method not in METHODS:
        expected = ", ".join(METHODS)
        raise ValueError(f"make_dictionary: method={method!r}, expected one of {expected}")
    kind, train = method.removeprefix("sae_"), dict(steps=steps, seed=seed)
    if kind == "alpha0":
        return train_sae(x, n_feats, "tied", alpha=0.0, resample=(), **train)
    if kind in ("topk", "batchtopk", "matryoshka"):
        return train_sae(x, n_feats, kind, k=k, **train)
    if method.startswith("sae"):
        return _penalised(kind, x, n_feats, k=k, alpha=alpha, **train)
    if method in ("codebook", "kmeans"):
        return _codes(x, n_feats, 1 if method == "kmeans" else k, seed=seed, moves=200)
    if method == "pca":
        return pca(x)
    if method == "ica":
        return ica(x, seed=seed)
    if method == "basis":
        return Affine(torch.eye(x.shape[1]).to(x), mean=x.mean(0))
    return _random(x, n_feats if method == "random" else x.shape[1], seed)


# %% [markdown]
# The machine with a hundred states, and several of them walking at once.
# %%
@torch.no_grad()
def fsm_states(
    model,
    fsm: TokFSM,
    site: str,
    *,
    n: int,  # walks
    seed: int,
    complete: bool = False,  # only positions that complete a state of the machine
) -> tuple:
    "Hidden states along walks, without BOS [N, d]; the machine's state there [N, n_states] bool."
    ids, kept = fsm.sample(n, generator=seeded(seed)), []
    for some in ids.split(64):
        with evaluating(model), capture(model, site) as acts:
            model(input_ids=some.to(model_device(model)), use_cache=False)
        kept.append(acts[site][:, 1:].flatten(0, 1))
    truth = state_labels(ids)[:, 1:].flatten()[:, None] == torch.arange(fsm.n_states)
    keep = truth.any(1) if complete else slice(None)
    return torch.cat(kept)[keep], truth[keep].numpy()


def sums_of(
    x,  # [N, d]
    truth,  # [N, C] bool
    n: int,  # rows added up
    *,
    seed: int,
) -> tuple:
    "Sums of n rows drawn independently, each half by itself; true is what is true of any of them."
    half = len(x) // 2
    parts = torch.arange(len(x)).split([half, len(x) - half])
    drawn = []
    for i in range(n):
        orders = [torch.randperm(len(part), generator=seeded(1000 * seed + i)) for part in parts]
        drawn.append(torch.cat([part[order] for part, order in zip(parts, orders)]))
    held = np.any([truth[rows.numpy()] for rows in drawn], 0)
    return sum(x[rows] for rows in drawn), held
