"What must a feature beat? Directions from simpler methods as Dictionaries, and how they compare: overlap, error at equal sparsity, known concepts."
import numpy as np, torch, torch.nn.functional as F
from tqdm.auto import tqdm
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary import Dictionary, fvu
from codebook_tutorial.kmeans import finite


class Affine(Dictionary):
    "Features read along directions of their own, from centred activations: f = (x - mean) reads^T, x^ = f directions + mean."
    def __init__(self, directions, reads=None, mean=None,     # [F, d]; [F, d] or None: the directions; [d] or None: zero
                 relu: bool = False,                          # negative features cut to 0
                 k: int | None = None):                       # only the k largest by size are kept
        super().__init__()
        self.register_buffer("directions", directions)
        self.register_buffer("reads", directions if reads is None else reads)
        self.register_buffer("mean", torch.zeros(directions.shape[1]) if mean is None else mean)
        if k is not None and not 1 <= k <= len(directions): raise ValueError(f"Affine: expected 1 <= k <= {len(directions)} features, got k={k}")
        self.relu, self.k = relu, k

    def encode(self, x):
        f = (x - self.mean) @ self.reads.T
        if self.relu: f = f.relu()
        return f if self.k is None else keep_largest(f, self.k)

    def decode(self, f): return f @ self.directions + self.mean
    def decode_sparse(self, ids, values): return super().decode_sparse(ids, values) + self.mean
    def at(self, **kw): "The same directions, read with another `relu` or `k`."; return Affine(self.directions, self.reads, self.mean, **dict(relu=self.relu, k=self.k) | kw)


def keep_largest(f, k):                       # [.., F]
    "All but the k features largest by size set to 0."
    ids = f.abs().topk(k, -1).indices
    return torch.zeros_like(f).scatter(-1, ids, f.gather(-1, ids))


def pca(x, n: int | None = None, batch: int = 16_384) -> Affine:      # [N, d], -> n of at most d directions, largest variance first
    "Principal components, estimated in one pass (scikit-learn's IncrementalPCA)."
    from sklearn.decomposition import IncrementalPCA
    _enough(x, n or x.shape[1], "pca")
    fitted = IncrementalPCA(n)
    for part in x.split(batch):
        if len(part) >= (n or x.shape[1]): fitted.partial_fit(part.cpu().numpy())
    return Affine(_tensor(fitted.components_, x), mean=_tensor(fitted.mean_, x))


def ica(x, n: int | None = None, rows: int = 20_000, seed: int = 0) -> Affine:        # [N, d]
    "Independent components (scikit-learn's FastICA on some of the rows); each turned so that its long tail is positive, rows of length 1."
    from sklearn.decomposition import FastICA
    _enough(x, n or x.shape[1], "ica")
    some = x[torch.randperm(len(x), generator=seeded(seed))[:rows]].cpu().double().numpy()
    fitted = FastICA(n, random_state=seed, whiten="unit-variance", max_iter=400).fit(some)
    reads, writes = fitted.components_, fitted.mixing_.T
    f = (some - fitted.mean_) @ reads.T
    sign = np.sign((f**3).mean(0))
    size = np.linalg.norm(writes, axis=1)
    return Affine(_tensor(sign[:, None] * writes / size[:, None], x), _tensor(sign[:, None] * reads * size[:, None], x), _tensor(fitted.mean_, x))


def _tensor(a, like): return torch.from_numpy(np.ascontiguousarray(a)).to(like)
def _enough(x, n, call):
    finite(x, call)
    if not 1 <= n <= min(x.shape): raise ValueError(f"{call}: expected 1 to {min(x.shape)} directions of {list(x.shape)} activations, got {n}")


class NMF(Dictionary):
    "Non-negative parts (scikit-learn's MiniBatchNMF): x ~ f directions with nothing below 0; for activations that are never negative, such as neurons behind a ReLU."
    def __init__(self, x, n_feats: int, seed: int = 0, steps: int = 60):       # [N, d]
        super().__init__()
        from sklearn.decomposition import MiniBatchNMF
        _enough(x, n_feats, "NMF"); self._positive(x)
        parts = MiniBatchNMF(n_feats, random_state=seed, batch_size=2048, max_iter=30).fit(x.cpu().numpy()).components_
        self.register_buffer("directions", F.normalize(_tensor(parts, x), dim=-1))
        self.steps = steps

    def _positive(self, x):
        if (x < 0).any(): raise ValueError(f"NMF: expected activations of at least 0, got {x.min():.3g}; cut them off (relu), or use another method")

    def encode(self, x):
        "Lee and Seung's multiplicative steps, which keep features at least 0 and never raise the error."
        self._positive(x)
        D = self.directions
        wanted, alike, f = x @ D.T, D @ D.T, torch.ones(*x.shape[:-1], len(D), dtype=x.dtype, device=x.device)
        for _ in range(self.steps): f = f * wanted / (f @ alike).clamp(min=1e-9)
        return f


def overlap(a: Dictionary, b: Dictionary):    # -> [Fa]
    "For every direction of a, the largest cosine, either sign, to one of b."
    return (F.normalize(a.directions, dim=-1) @ F.normalize(b.directions, dim=-1).T).abs().amax(-1)


# ---- known concepts
def _midranks(v):                             # [n] -> [n]
    "Rank from 1, the mean of their ranks for equal values."
    order = np.sort(v)
    return (order.searchsorted(v, "left") + order.searchsorted(v, "right") + 1) / 2


def _best_f1(v, counts, at, concept, levels):  # [n], [C], the true (token, concept) pairs [P] twice, ranks [q] -> F1 [C], threshold [C]
    "The best F1 of v >= threshold for every concept; thresholds are v's values at some ranks."
    order = np.sort(v)
    thresholds = order[len(v) - levels][::-1]                                      # ascending
    fired = len(v) - order.searchsorted(thresholds, "left")
    level = thresholds.searchsorted(v[at], "right")                                # how many thresholds this value reaches
    hits = np.bincount(concept * (len(levels) + 1) + level, minlength=len(counts) * (len(levels) + 1)).reshape(len(counts), -1)
    hits = hits[:, ::-1].cumsum(1)[:, ::-1][:, 1:]                                 # [C, q]: true tokens that reach each threshold
    f1 = 2 * hits / (fired + counts[:, None])
    best = f1.argmax(1)
    return f1.max(1), thresholds[best]


def concept_scores(f,                         # [N, F] features at ordinary tokens
                   truth,                     # [N, C] bool
                   signs: bool = True,        # may a feature also count by its negative?
                   at_least: int = 20,        # concepts with fewer tokens in either half are skipped: nan
                   points: int = 64) -> dict: # thresholds tried, at geometrically spaced ranks
    "For every concept the feature, sign and threshold of the best F1, and the feature and sign of the best AUROC, all chosen on the first half of the tokens; both scored on the second. Every feature is sorted once."
    f, truth = np.asarray(f), np.asarray(truth)
    if f.ndim != 2 or truth.ndim != 2 or len(f) != len(truth): raise ValueError(f"concept_scores: expected features [N, F] and truth [N, C] of the same tokens, got {list(f.shape)} and {list(truth.shape)}")
    half = len(f) // 2
    counts, later = truth[:half].sum(0), truth[half:].sum(0)
    asked = np.flatnonzero(np.minimum(counts, later) >= at_least)
    at, concept = truth[:half, asked].nonzero()
    counts, n = counts[asked], len(asked)
    levels = np.unique(np.geomspace(1, half, points).astype(int))
    top = {key: np.full((3, n), -1.) for key in ("f1", "auroc")}                  # score, feature, sign; and for F1 the threshold
    threshold = np.zeros(n)
    for j in tqdm(range(f.shape[1]), desc="concept_scores", unit="feature", delay=3):
        for sign in (1, -1)[:1 + signs]:
            v = sign * f[:half, j].astype(np.float64)
            value, t = _best_f1(v, counts, at, concept, levels)
            better = value > top["f1"][0]
            top["f1"][:, better] = np.stack([value, np.full(n, j), np.full(n, sign)])[:, better]; threshold[better] = t[better]
            if sign == 1: above = (np.bincount(concept, _midranks(v)[at], n) - counts * (counts + 1) / 2) / (counts * (half - counts)).clip(1)
            value = above if sign == 1 else 1 - above
            better = value > top["auroc"][0]
            top["auroc"][:, better] = np.stack([value, np.full(n, j), np.full(n, sign)])[:, better]
    return _scored(f[half:], truth[half:, asked], top, threshold, asked, truth.shape[1])


def _scored(f, truth, top, threshold, asked, n_concepts):
    "What was chosen, on the tokens that did not choose."
    out = {key: np.full(n_concepts, np.nan) for key in ("f1", "auroc", "chosen_f1", "threshold")} | {"feature": np.full(n_concepts, -1), "sign": np.zeros(n_concepts, int), "skipped": n_concepts - len(asked)}
    for i, c in enumerate(asked):
        own, (_, j, sign), (_, best, way) = truth[:, i], top["f1"][:, i], top["auroc"][:, i]
        fires = sign * f[:, int(j)] >= threshold[i]
        out["f1"][c], out["chosen_f1"][c], out["threshold"][c], out["feature"][c], out["sign"][c] = 2 * (fires & own).sum() / (fires.sum() + own.sum()), top["f1"][0, i], threshold[i], j, sign
        n = own.sum()
        out["auroc"][c] = (_midranks(way * f[:, int(best)])[own].sum() - n * (n + 1) / 2) / (n * (len(own) - n))
    return out
