# %% [markdown]
# **Reading a feature** (`circuits`): which tokens, in which range; where it is strong.

# %%
#| export
import heapq
from collections import Counter
from dataclasses import dataclass, field
import matplotlib.pyplot as plt, numpy as np, torch, torch.nn.functional as F
from codebook_tutorial import show
from codebook_tutorial.codebook import Codebook
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary import Dictionary
from codebook_tutorial.models import Text, _check_length, _evaluating
from codebook_tutorial.patching import Tail
from codebook_tutorial.sae import SAE
from codebook_tutorial.sites import _structure, capture, intervene, match_sites

# %%
#| export
def _value(dictionary, x, feature: int):      # [.., d] -> [..]
    "One feature's activation; of a code, whether it is among those chosen."
    if isinstance(dictionary, Codebook): return (dictionary.encode_sparse(x)[0] == feature).any(-1).to(x.dtype)
    return dictionary.encode(x)[..., feature]

@torch.no_grad()
def feature_acts(model, site: str, dictionary: Dictionary, text: Text, features, batch: int = 32):      # -> [rows, length, n], 0 at BOS and padding
    "What some features do along a text."
    _check_length(model, text.ids.shape[1], "feature_acts")
    features, where, out = torch.as_tensor(features).reshape(-1), next(model.parameters()).device, []
    with _evaluating(model), capture(model, site) as acts:
        for i in range(0, len(text), batch):
            part = text[i:i + batch]
            getattr(model, "base_model", model)(input_ids=part.ids.to(where), use_cache=False)
            f = dictionary.encode(acts[site])[..., features.to(where)] if not isinstance(dictionary, Codebook) else torch.stack([_value(dictionary, acts[site], int(j)) for j in features], -1)
            out.append((f * part.mask.to(where)[..., None]).cpu())
    return torch.cat(out)

# %%
#| export
def token_histogram(f,                       # [N] activations of one feature
                    tokens: list,            # [N] strings
                    bins: int = 8,           # ranges of activation, from just above 0 to the largest
                    top: int = 6) -> dict:
    "Which tokens a feature is active at, by activation range (arXiv 2309.08600, section 5): edges [bins + 1], tokens (the `top` most frequent, then 'other'), counts [bins, top + 1]."
    f = torch.as_tensor(f).detach().cpu().float()
    if f.dim() != 1 or len(f) != len(tokens): raise ValueError(f"token_histogram: expected one activation a token, got {list(f.shape)} and {len(tokens)} tokens")
    active = (f > 0).nonzero()[:, 0].tolist()
    if not active: raise ValueError("token_histogram: the feature is active at none of these tokens; give it more text, or take another feature")
    edges = torch.linspace(0, float(f.max()), bins + 1)
    names = [t for t, _ in Counter(tokens[i] for i in active).most_common(top)]
    counts = torch.zeros(bins, top + 1, dtype=torch.long)
    for i, b in zip(active, torch.bucketize(f[active], edges[1:-1]).tolist()): counts[b, names.index(tokens[i]) if tokens[i] in names else top] += 1
    return dict(edges=edges, tokens=names + [""] * (top - len(names)) + ["other"], counts=counts)

def draw_histogram(found: dict, title: str, alt: str):
    "token_histogram as stacked bars: the share of each token in each range, the number of tokens above."
    counts, edges = found["counts"].numpy(), found["edges"].numpy()
    total, left, mid = counts.sum(1).clip(1), np.zeros(len(counts)), (edges[1:] + edges[:-1]) / 2
    fig, ax = plt.subplots(figsize=(7, 3))
    for token, n, color in zip(found["tokens"], counts.T, [*list(show.PALETTE.values())[:len(found["tokens"]) - 1], "#DDDDDD"]):
        if n.any(): ax.bar(mid, n / total, width=.9 * (mid[1] - mid[0]), bottom=left, color=color, label=token)
        left += n / total
    for x, n in zip(mid, counts.sum(1)): ax.text(x, 1.02, f"{n:,}", ha="center", fontsize=8)
    ax.set(title=f"{title}\n", xlabel="activation", ylabel="share of tokens", ylim=(0, 1)); ax.legend(bbox_to_anchor=(1, 1)); ax.grid(False)
    return show.picture(fig, alt)

# %%
#| export
@dataclass(eq=False)
class Contexts:
    "Beginnings of documents that end where a feature is strong; contexts[:10], len(contexts)."
    ids: torch.Tensor      # [n, length], padded behind
    last: torch.Tensor     # [n] where each ends
    acts: torch.Tensor     # [n] the feature's activation there
    def __len__(self): return len(self.ids)
    def __getitem__(self, rows): return Contexts(self.ids[rows], self.last[rows], self.acts[rows])
    def __repr__(self): return f"{len(self)} contexts of up to {self.ids.shape[1]} tokens, activation {self.acts.min():.2f} to {self.acts.max():.2f}"
    @property
    def there(self): "[n, length]: True up to each end."; return torch.arange(self.ids.shape[1]) <= self.last[:, None]

def strong_contexts(text: Text,
                    f,                       # [rows, length] the feature along the text
                    n: int = 20,
                    low: float = .5,         # from this share of its maximum M up to M (arXiv 2309.08600, section 5: [M/2, M])
                    where=None,              # [rows, length] bool: only there
                    seed: int = 0) -> Contexts:
    "Places where a feature is strong, drawn at random, each in a document of its own as far as there are enough; with their document up to there."
    if f.shape != text.ids.shape: raise ValueError(f"strong_contexts: expected an activation for every position {list(text.ids.shape)}, got {list(f.shape)}")
    if not (f > 0).any(): raise ValueError("strong_contexts: the feature is active nowhere in this text; give it more text, or take another feature")
    strong = (f >= low * f.max()) & (f > 0) & (True if where is None else where)
    begin = torch.where(text.ids == text.bos, torch.arange(f.shape[1]), 0).cummax(1).values               # where the document of each position begins
    places = strong.nonzero()[torch.randperm(int(strong.sum()), generator=seeded(seed))].tolist()
    if len(places) < n: raise ValueError(f"strong_contexts: expected {n} places with an activation of at least {low} of the largest, found {len(places)}; give it more text, or a smaller n")
    first, again, seen = [], [], set()
    for r, c in places:
        key = (r, int(begin[r, c]))
        (again if key in seen else first).append((r, c)); seen.add(key)
    chosen = (first + again)[:n]
    rows = [text.ids[r, int(begin[r, c]):c + 1] for r, c in chosen]
    return Contexts(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=text.pad), torch.tensor([len(row) - 1 for row in rows]), torch.stack([f[r, c] for r, c in chosen]))

# %% [markdown]
# **Taking features out**.

# %%
#| export
class Ablation:
    "How to take features of a dictionary out of states: x' = x - amounts(x)[.., S] @ moves[S]. `moves` [F, d]: the features' directions; of a code, what it writes more than the code most like it."
    def __init__(self, dictionary: Dictionary):
        self.dictionary = dictionary
        if isinstance(dictionary, Codebook):
            near = [torch.cdist(w, w) if dictionary.select != "cosine" else -F.normalize(w, dim=-1) @ F.normalize(w, dim=-1).T for w in dictionary.weight.detach()]
            others = [w - w[d.fill_diagonal_(torch.inf).argmin(1)] for w, d in zip(dictionary.weight.detach(), near)]
            self.moves, self.slope = torch.block_diag(*others), None
        else:
            self.moves = dictionary.directions.detach()
            reads = dictionary.W_enc.detach() if isinstance(dictionary, SAE) else getattr(dictionary, "reads", self.moves)
            self.slope = (reads * self.moves).sum(1)                  # [F] by how much one step along a direction moves what the feature reads

    def amounts(self, x):                      # [.., d] -> [.., F]
        "How far to go along each direction so that the feature's pre-activation is 0; 0 where it is inactive, and where no step brings it there (e.d <= 0)."
        f = self.dictionary.encode(x)
        if self.slope is None: return f
        pre = self.dictionary.pre(x) if isinstance(self.dictionary, SAE) else f
        return torch.where((f != 0) & (self.slope > 0), pre / self.slope.clamp(min=1e-12), 0)

    def without(self, features):               # one, or several at once
        "fn(x) -> x' for `intervene`."
        features = torch.as_tensor(features).reshape(-1)
        if self.slope is not None and (bad := features[self.slope[features] <= 0]).numel():
            raise ValueError(f"ablation: feature {int(bad[0])} reads against what it writes (e.d = {float(self.slope[bad[0]]):.3g}); no step along its direction brings it to 0")
        return lambda x: x - self.amounts(x)[..., features] @ self.moves[features]

def ablation(dictionary: Dictionary, features):
    "fn(x) -> x' without a feature, or several: less than a rank-one ablation, since where they are inactive nothing changes (arXiv 2309.08600, section 5); of tied unit rows x' = x - c f; a code gives way to the one most like it."
    return Ablation(dictionary).without(features)

# %%
#| export
@torch.no_grad()
def logit_effects(model, site: str, fn,        # fn(x) -> x'
                  contexts: Contexts):
    "Change of every token's log-probability [n, vocabulary] at the ends of contexts, when the states at a site become fn(x)."
    with _evaluating(model):
        tail = Tail(model, site, contexts.ids, contexts.last)
        return (tail(fn(tail.x)[None])[0] - tail.logp)

@torch.no_grad()
def direct_effects(model, dictionary: Dictionary, feature: int, contexts: Contexts, scale: float = 1.):
    "What a feature's direction does to the logits by itself [n, vocabulary]: added to the last layer's output at the contexts' ends, `scale` times the feature's activation there; no layer in between reads it."
    last = f"resid.{len(_structure(model)[1]) - 1}"
    with _evaluating(model):
        tail = Tail(model, last, contexts.ids, contexts.last)
        edit = torch.zeros_like(tail.x)
        edit[torch.arange(len(contexts)), contexts.last] = scale * contexts.acts[:, None] * dictionary.directions[feature].detach()
        return tail((tail.x + edit)[None])[0] - tail.logp

# %% [markdown]
# **The causal tree**.

# %%
#| export
@dataclass
class FeatureTree:
    "Which features of earlier sites a feature rests on: `edges` [{child, parent, effect}], a node is (site, feature); effect: share of the parent's activation that is lost without the child (negative: gained)."
    root: tuple
    edges: list = field(default_factory=list)
    passes: int = 0
    def __repr__(self): return f"tree of {len(self.nodes)} features below and with {self.root}, {len(self.edges)} edges, {self.passes:,} passes"
    @property
    def nodes(self): "The root, and all from which positive effects lead to it."; return list(dict.fromkeys([self.root] + [e["child"] for e in self.edges if e["effect"] > 0]))

@torch.no_grad()
def feature_effects(model, dictionaries: dict,      # {site: Dictionary}
                    parent: tuple,             # (site, feature)
                    child_site: str, contexts: Contexts,
                    at_end: bool = False,      # count the parent only where contexts end; False: summed over all words
                    min_active: int = 3,       # children active in fewer of the contexts are passed over
                    batch: int = 64):          # contexts in one pass
    "Ablate each feature of an earlier site by itself: children [m], and the share of the parent's activation that each takes away [m] (negative: adds)."
    site, feature = parent
    dictionary, ablate, there = dictionaries[site], Ablation(dictionaries[child_site]), contexts.there
    count = F.one_hot(contexts.last, contexts.ids.shape[1]).bool() if at_end else there
    strength = lambda x: (_value(dictionary, x, feature).view(-1, *there.shape) * count).sum((1, 2))
    with _evaluating(model), capture(model, site) as acts:
        tail = Tail(model, child_site, contexts.ids, contexts.last)
        whole = strength(acts[site])[0]
        amounts = ablate.amounts(tail.x) * there[..., None]
        children = ((amounts != 0).any(1).sum(0) >= min_active).nonzero()[:, 0]
        left = []
        for some in children.split(max(1, batch // len(contexts))):
            tail(torch.stack([tail.x - amounts[..., [i]] * ablate.moves[i] for i in some]))
            left.append(strength(acts[site]))
    return children, (whole - torch.cat(left)) / whole.clamp(min=1e-9) if left else torch.zeros(0)

# %%
#| export
def causal_tree(model, dictionaries: dict,     # {site: Dictionary}, from early to late
                root: tuple,                   # (site, feature)
                contexts: Contexts,            # where the root is strong (strong_contexts)
                width: int = 3,                # children kept of a node, the largest effects of either sign
                budget: int = 12,              # nodes in all
                least: float = .05,            # effects smaller than this are left out
                **kw) -> FeatureTree:          # for feature_effects
    "Ablate every feature of the site before, keep those that take most of the parent's activation away, and go on from these, the most important first (arXiv 2309.08600, section 5 and appendix)."
    order = list(dictionaries)
    for site in order: match_sites(model, site)
    if root[0] not in order: raise ValueError(f"causal_tree: expected the root at one of {', '.join(order)}, got {root[0]!r}")
    if not 0 <= root[1] < len(dictionaries[root[0]].directions): raise ValueError(f"causal_tree: {root[0]} has features 0 to {len(dictionaries[root[0]].directions) - 1}, got {root[1]}")
    tree, waiting, seen = FeatureTree(root), [(-1., root)], {root}
    while waiting and len(seen) < budget:
        weight, parent = heapq.heappop(waiting)
        if not (at := order.index(parent[0])): continue                        # nothing comes before
        children, effects = feature_effects(model, dictionaries, parent, order[at - 1], contexts, at_end=parent == root, **kw)
        tree.passes += len(children)
        for i in effects.abs().argsort(descending=True)[:width].tolist():
            child, effect = (order[at - 1], int(children[i])), float(effects[i])
            if abs(effect) < least or child not in seen and len(seen) >= budget: continue
            tree.edges.append(dict(child=child, parent=parent, effect=effect))
            if child not in seen and effect > 0: heapq.heappush(waiting, (weight * min(effect, 1.), child))
            seen.add(child)
    return tree

# %%
#| export
def ablate_nodes(dictionaries: dict, nodes,    # [(site, feature)]
                 like=None) -> dict:           # other nodes: the edits get the length at every word that ablating those would have there
    "{site: fn} for `intervene`: all the nodes taken out."
    def at(site, some): return [j for s, j in some if s == site]
    def edit(site):
        ablate = Ablation(dictionaries[site])
        def taken(x, features): return ablate.amounts(x)[..., features] @ ablate.moves[features]
        def fn(x):
            own = taken(x, at(site, nodes))
            if like is None: return x - own
            wanted = taken(x, at(site, like)).norm(dim=-1, keepdim=True)
            return x - own * wanted / own.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        return fn
    return {site: edit(site) for site in dictionaries if at(site, nodes)}

@torch.no_grad()
def others_active(model, dictionaries: dict, nodes, contexts: Contexts, n: int = 10, seed: int = 0) -> list:
    "The control: for every node another feature of its site that is active at the same words, drawn from the n that share most of them (Jaccard), none of them twice or a node itself."
    draw, chosen = seeded(seed), []
    with _evaluating(model), capture(model, list(dictionaries)) as acts: model(input_ids=contexts.ids, use_cache=False)
    for site in dictionaries:
        active = (dictionaries[site].encode(acts[site]) != 0)[contexts.there].float()          # [N, F]
        both, size = active.T @ active, active.sum(0)
        for j in [j for s, j in nodes if s == site]:
            like = both[j] / (size + size[j] - both[j]).clamp(min=1)
            like[[k for s, k in [*nodes, *chosen] if s == site]] = -1
            some = like.topk(min(n, len(like))).indices
            chosen.append((site, int(some[torch.randint(len(some), (1,), generator=draw)])))
    return chosen

# %%
#| export
def draw_tree(tree: FeatureTree, title: str, alt: str,
              labels: dict | None = None):     # {(site, feature): what it stands for}
    "The tree as a graph: a column a site, edges as wide as their effects, dashed and red where the child holds its parent down."
    import networkx as nx
    graph, columns = nx.DiGraph(), {}
    for edge in tree.edges: graph.add_edge(edge["child"], edge["parent"], effect=edge["effect"])
    graph.add_node(tree.root)
    for node in graph: columns.setdefault(node[0], []).append(node)
    order = sorted(columns, key=lambda site: (int(site.split(".")[1]), site))
    at = {node: (order.index(site), (i - (len(some) - 1) / 2) / max(len(some), 1)) for site, some in columns.items() for i, node in enumerate(some)}
    fig, ax = plt.subplots(figsize=(3.4 * len(order), .8 + .62 * max(map(len, columns.values()))))
    for sign, color, dash in ((1, "blue", "-"), (-1, "red", "--")):
        some = [(a, b) for a, b, e in graph.edges(data="effect") if (e > 0) == (sign > 0)]
        nx.draw_networkx_edges(graph, at, some, width=[.6 + 5 * min(abs(graph.edges[e]["effect"]), 1) for e in some], edge_color=show.PALETTE[color], style=dash, arrows=True, arrowstyle="-", ax=ax, alpha=.7)
    nx.draw_networkx_edge_labels(graph, at, {(a, b): f"{e:.0%}" for a, b, e in graph.edges(data="effect")}, font_size=7, ax=ax, label_pos=.35, rotate=False)
    for node, (x, y) in at.items():
        ax.text(x, y, f"{node[0]} / {node[1]}\n{(labels or {}).get(node, '')}".strip(), ha="center", va="center", fontsize=8, bbox=dict(boxstyle="round,pad=.35", fc="white", ec=show.PALETTE["orange" if node == tree.root else "grey"]))
    ax.set(title=title, xlim=(-.5, len(order) - .5), ylim=(-.62, .62)); ax.axis("off")
    return show.picture(fig, alt)

def nearest_across(dictionaries: dict, node: tuple) -> dict:      # {site: (feature, cosine)}
    "The feature of every other site (of the same width) whose direction is most like this one's."
    site, feature = node
    own = F.normalize(dictionaries[site].directions[feature].detach(), dim=-1)
    found = {}
    for other, dictionary in dictionaries.items():
        if other == site or dictionary.directions.shape[1] != len(own): continue
        cosines = F.normalize(dictionary.directions.detach(), dim=-1) @ own
        found[other] = (int(cosines.argmax()), float(cosines.max()))
    return found
