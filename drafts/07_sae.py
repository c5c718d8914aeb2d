# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 Sparse autoencoders
#
# > What are a network's states made of, if we leave the network as it is?
#
# [![Open in Colab](images/colab.svg)](https://colab.research.google.com/github/codebook-tutorial/codebook_tutorial/blob/main/nbs/07_sae.ipynb) | needs: 02, 04 | about 2 CPU minutes | exports `activations`, `sae`, `formats`

# %%
#| default_exp sae

# %% [markdown]
# ## By the end you can
#
# - **harvest** the states of any site of any model into a store that is larger than memory;
# - **train** a sparse autoencoder, and say in which units its penalty counts;
# - **judge** it: how sparse, how faithful, how much the model loses when it must use what was decoded;
# - **mend** what the L1 penalty breaks: dead features, and features that are too small;
# - **choose** among today's kinds, and carry one to the libraries that others use.

# %% [markdown]
# ## Why care?
#
# Codebooks (chapters 02 to 06) make a network readable by changing it. A sparse autoencoder leaves it alone, and asks what its states are made of. The bet (chapter 01): a state is a sum of a few of very many directions, each of which stands for something.
#
# Below is one state of our little model, at one word: first the ninety-six numbers that it is, then the features that an autoencoder finds in it, each with the concept of the stories that fits it best. Nobody told the autoencoder about concepts. How is it trained, what does it get wrong, and how would we know?

# %% [markdown]
# ## Setup

# %%
#| colab
import sys
if "google.colab" in sys.modules:
    # %pip install -q git+https://github.com/codebook-tutorial/codebook_tutorial@main

# %%
import tempfile
from pathlib import Path
import matplotlib.pyplot as plt, torch, torch.nn.functional as F
from codebook_tutorial import show
from codebook_tutorial.concepts import ATOMS, atoms, story_text
from codebook_tutorial.core import claim, data_path, full_claims, seeded, set_seed
from codebook_tutorial.dictionary import fvu, random_directions
from codebook_tutorial.models import load_lm, load_text, token_losses
from codebook_tutorial.sites import capture, intervene
from codebook_tutorial.stories import ID, needs_stories

# %%
#| export
import math
from itertools import product
import torch, torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary import Dictionary
from codebook_tutorial.kmeans import finite
from codebook_tutorial.models import token_losses
from codebook_tutorial.sites import capture, intervene, site_dims

# %%
from codebook_tutorial.activations import harvest, open_activations
from codebook_tutorial.formats import convert_alpha, export_sae, load_sae
from codebook_tutorial.sae import loss_recovered, measure, refit, train_sae
show.style(); set_seed(0)
model, tok = load_lm()
STORIES = needs_stories(tok)
SITE = "resid.1" if STORIES else f"resid.{model.config.num_hidden_layers // 2}"

# %% [markdown]
# States first. `harvest` runs the model over a text and writes down what it finds at a site, ordinary tokens only (BOS and padding have states of another kind). It says beforehand what it will take:

# %%
if STORIES: train, test = load_text(tok, n_tokens=300_000, length=256, split="train", seed=7), load_text(tok, n_tokens=25_000, length=256)
else: train, test = load_text(tok, n_tokens=325_000, length=256).split(.92)
store = harvest(model, train, SITE, Path(tempfile.mkdtemp()) / "train")
store

# %%
x, y = store.load(SITE), harvest(model, test, SITE, Path(tempfile.mkdtemp()) / "test", verbose=False).load(SITE)
x.shape, y.shape

# %% [markdown]
# ### The picture we are going to explain

# %%
def named(sae, names=3):
    "For every feature, the concepts whose tokens it fits best (F1 on text of its own)."
    text, facts = story_text(25_000, split="train", seed=8)
    with torch.no_grad(), capture(model, SITE) as acts: model.base_model(input_ids=text.ids)
    active, truth = (sae.encode(acts[SITE][text.mask]) > 0).float(), atoms(facts)[text.mask].float()
    f1 = 2 * active.T @ truth / (active.sum(0)[:, None] + truth.sum(0)).clamp(min=1)
    return [[ATOMS[i] for i in row.topk(names).indices] for row in f1]

sae = load_sae(data_path("sae/tied")) if STORIES else train_sae(x, 2 * x.shape[1], alpha=.5, steps=1000)
if STORIES: names = named(sae)

# %%
if STORIES:
    row = test[:1]
    words = [tok.decode([i]) for i in row.ids[0]]
    with torch.no_grad(), capture(model, SITE) as acts: model.base_model(input_ids=row.ids)
    at = next(t for t, w in enumerate(words) if t > 30 and w == "gave")
    state, feats = acts[SITE][0, at], sae.encode(acts[SITE][0, at]).detach()
    top = feats.topk(8)
    fig, axes = plt.subplots(1, 2, figsize=(10, 2.6), width_ratios=[1, 1.2])
    axes[0].bar(range(len(state)), state, color=show.PALETTE["grey"]); axes[0].set(title=f"The state at “{words[at]}”: {len(state)} numbers", xlabel="coordinate")
    axes[1].barh([f"{i}: {names[i][0]}" for i in top.indices.tolist()][::-1], top.values.flip(0), color=show.PALETTE["blue"]); axes[1].set(title=f"The same as features: {int((feats > 0).sum())} of {len(feats)} are active")
    display(show.picture(fig, "Left: the numbers of one state, as bars, without a pattern. Right: the largest features that are active there, each with the name of the concept that fits it best."))

# %% [markdown]
# ## 1 The idea on five numbers
#
# Five numbers, but eight directions in which something can be written: more than there are dimensions, so they cannot all be perpendicular.

# %%
D = F.normalize(torch.randn(8, 5, generator=seeded(3)), dim=-1)
state = 2 * D[1] + 1.5 * D[6]
state

# %% [markdown]
# Which features are in it? Ask each direction, by the dot product:

# %%
D @ state

# %% [markdown]
# All answer, since all are a little alike: **interference**. A threshold silences those that only echo: subtract something, cut off what is negative. That is a layer with a bias and a ReLU:

# %%
f = (D @ state - 1.2).relu()
f, f @ D

# %% [markdown]
# The right two are left. But both are **too small** now, by the threshold; so what we decode is too small as well. Both belong together in a sparse autoencoder, and we shall meet them again: sparsity is bought with shrinkage.
#
# How would one find such directions, if only states were given? Ask for a dictionary with which *every* state can be decoded from *few* features: minimise |x - x^|² + α Σ|f|. The second term, the L1 penalty, makes features zero where they bring little.

# %% [markdown]
# ## 2 Minimal code
#
# The paper's autoencoder: one matrix M with rows of length one, features f = ReLU(M x + b), and back x^ = Mᵀ f. Centre the states, take twice as many features as dimensions:

# %%
M = F.normalize(torch.randn(2 * x.shape[1], x.shape[1], generator=seeded(0)), dim=-1).requires_grad_()
b, mean = torch.zeros(len(M), requires_grad=True), x.mean(0)
optimizer, track = torch.optim.Adam([M, b], lr=4e-3), []
for step in range(300):
    part = x[torch.randint(len(x), (1024,), generator=seeded(step))] - mean
    f = (part @ M.T + b).relu()
    loss = (f @ M - part).pow(2).sum(-1).mean() + .1 * f.sum(-1).mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
    with torch.no_grad(): M.copy_(F.normalize(M, dim=-1))
    track.append((fvu(part, f @ M), (f > 0).sum(-1).float().mean().item()))

# %% [markdown]
# Two numbers say how it does. **FVU**, the fraction of variance unexplained: 0 is perfect, and answering always with the mean gives 1. **L0**: how many features are active in a state.
#
# <details><summary>Predict: will it be sparse after 300 steps, one second of training?</summary>No. The error falls at once; sparsity comes slowly, since the penalty only shaves a little off each feature at each step.</details>

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 2.8))
for ax, values, title in ((axes[0], [a for a, _ in track], "fraction of variance unexplained"), (axes[1], [n for _, n in track], f"active features of {len(M)} (L0)")):
    ax.plot(values, color=show.PALETTE["blue"]); ax.set(title=title, xlabel="step", ylim=(0, None))
show.picture(fig, "Two lines over 300 steps: the unexplained variance falls quickly, the number of active features slowly.")

# %% [markdown]
# Good errors are cheap: nobody needs an autoencoder for states of ninety-six numbers. What counts is the *pair*: how little is left unexplained, by how few features.

# %% [markdown]
# ## 3 Make it right
#
# **1. In which units?** The penalty above had the weight 0.1. Had the states been ten times larger, their squares would be a hundred times and the features ten times larger: 0.1 would then weigh a tenth. So weights can only be compared in like units. Ours: states are centred and scaled so that the mean square of a coordinate is 1, and the error is summed over coordinates, as in the paper's equation. The paper's *code* divides the error by the number of dimensions, too; so its 8.6e-4 is another number in the equation's units:

# %%
convert_alpha(8.6e-4, d_model=512, begin="paper_code", end="equation")

# %% [markdown]
# After training, the scale is put into the biases: the autoencoder takes states as they are. (A lost scale is a fault that published autoencoders have had.)
#
# The library's class has an encoder and a decoder of their own, the paper's ties them. Everything else of this chapter is a variation of these lines. (A parameter may have one more dimension in front, a *stack*: several autoencoders, trained together as one.)

# %%
#| export
class SAE(Dictionary):
    "Sparse autoencoder, f = ReLU(pre), pre = W_enc (x - b_dec) + b_enc, x^ = f W_dec + b_dec; encoder and decoder apart (untied), unit rows in W_dec."
    kind, tied, in_units, fresh = "untied", False, ("b_enc", "b_dec"), {}          # fresh: what else than 0 a new feature's parameters begin with
    def __init__(self, d_model: int, n_feats: int,
                 stack: tuple = (),            # (S,): S autoencoders of this shape in one, for batches [N, d]
                 generator=None, **settings):
        super().__init__()
        if n_feats < 1 or d_model < 1: raise ValueError(f"{type(self).__name__}: expected d_model and n_feats of at least 1, got d_model={d_model}, n_feats={n_feats}")
        self.config = dict(kind=self.kind, d_model=d_model, n_feats=n_feats) | settings
        start = F.normalize(torch.randn(n_feats, d_model, generator=generator), dim=-1).expand(*stack, n_feats, d_model)        # all of a stack begin alike
        self.W_dec = nn.Parameter(start.clone())
        if not self.tied: self.W_enc = nn.Parameter(start.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(*stack, n_feats)), nn.Parameter(torch.zeros(*stack, d_model), requires_grad=not self.tied)
        self.register_buffer("silent", torch.zeros(*stack, n_feats), persistent=False)        # rows since a feature last fired

    directions = property(lambda self: self.W_dec)

    def linear(self, x): return (x - _row(self.b_dec)) @ self.W_enc.mT
    def pre(self, x): return self.linear(x) + _row(self.b_enc)
    def encode(self, x): return self.pre(x).relu()
    def decode(self, f): return f @ self.W_dec + _row(self.b_dec)
    def decode_sparse(self, ids, values): return super().decode_sparse(ids, values) + self.b_dec

    def loss(self, x, alpha):              # [N, d], weight of the penalty -> [] or [S]
        "|x - x^|^2 + alpha |f|_1, mean over rows (arXiv 2309.08600, equation 4)."
        f = self.encode(x)
        self.note(f > 0)
        return error(x, self.decode(f)) + alpha * f.sum(-1).mean(-1)

    def note(self, active):                # [.., N, F] bool
        "Count for how many rows each feature has been silent."
        self.silent.add_(active.shape[-2]).masked_fill_(active.any(-2), 0.)

    @torch.no_grad()
    def project(self):
        "Rows of W_dec back to length 1."
        self.W_dec.copy_(F.normalize(self.W_dec, dim=-1))

    @torch.no_grad()
    def in_units_of(self, mean, scale):
        "Trained on (x - mean) / scale: now the same for x."
        for name in self.in_units: getattr(self, name).mul_(scale)
        self.b_dec.add_(mean)


# %%
#| export
def _row(b): return b if b.dim() == 1 else b.unsqueeze(-2)           # a bias beside [N, ..]; of a stack, [S, 1, ..]
def error(x, x_hat): return (x - x_hat).pow(2).sum(-1).mean(-1)

class Tied(SAE):
    "The paper's: f = ReLU(M x + b), x^ = M^T f, unit rows in M; x is centred (section 2)."
    kind, tied = "tied", True
    W_enc = property(lambda self: self.W_dec)


# %% [markdown]
# **2. Dead features.** A feature that is never active gets no gradient: it stays dead. Three strengths of the penalty, trained together, once with dead features beginning anew as what is badly explained, and once left alone:

# %%
alphas = [.5, 2., 8.]
left_alone, anew = (train_sae(x, 2 * x.shape[1], alpha=alphas, steps=600, resample=r) for r in ((), (.2, .4, .6)))
show.table([{"alpha": a, "dead": measure(u, y)["dead_share"], "dead, begun anew": measure(v, y)["dead_share"], "FVU": measure(u, y)["fvu"], "FVU, begun anew": measure(v, y)["fvu"]} for a, u, v in zip(alphas, left_alone, anew)], "Dead features")

# %% [markdown]
# **3. Shrinkage.** The penalty pulls every active feature down, also where that costs error. Once the features are chosen, nothing forces the decoder to live with that: with the features held fixed, the decoder that explains most is a least-squares problem.

# %%
show.table([{"alpha": a, "L0": measure(s, y)["l0"], "FVU": measure(s, y)["fvu"], "FVU, decoder refitted": measure(refit(s, x), y)["fvu"]} for a, s in zip(alphas, anew)], "The same features, another decoder")

# %% [markdown]
# (The features do not change; so neither does L0. The refitted decoder is chosen on the training states and scored on others.)
#
# **4. More states than memory.** Fifty million states of 512 numbers are 50 GB. `harvest` has written ours in shards; what reads them shuffles without ever holding more than a stated number of rows. `train_sae(store, ..., site=SITE)` takes the store in place of a tensor.

# %%
some = next(store.batches(SITE, 1024, hold=8192))
some.shape, [f.name for f in sorted(store.folder.iterdir())][:5]

# %% [markdown]
# Trainer, refitting, measures, store and the formats of other libraries are in the appendix.

# %% [markdown]
# ## 4 Measure
#
# A measure first shows that it can be wrong. Always answering with the mean must leave a fraction of exactly 1 unexplained; answering with the state itself, 0:

# %%
fvu(y, y.mean(0).expand_as(y)), fvu(y, y)

# %% [markdown]
# Now the whole range of the penalty, trained together as one stack; two controls beside it. **Scrambled states**: every coordinate shuffled over the tokens by itself, so that each has the values that it had, but nothing goes together. **Random directions**: as many as features, and for each state the best few of them.

# %%
alphas = [.2, .4, .8, 1.6, 3.2]
N_FEATS = 2 * x.shape[1]
sweep = train_sae(x, N_FEATS, alpha=alphas, steps=1500)
mixed, mixed_y = (torch.stack([c[torch.randperm(len(c), generator=seeded(i))] for i, c in enumerate(z.T)], 1) for z in (x, y))
scrambled = train_sae(mixed, N_FEATS, alpha=alphas, steps=600)

# %%
def best_random(k):
    "FVU of k random directions chosen for each state by matching pursuit."
    left, D = y - x.mean(0), random_directions(N_FEATS, x.shape[1]).directions
    for _ in range(k):
        dots = left @ D.T
        i = dots.abs().argmax(-1)
        left = left - dots.gather(1, i[:, None]) * D[i]
    return (left.pow(2).sum() / (y - y.mean(0)).pow(2).sum()).item()

line = lambda saes, z: list(zip(*[(m["l0"], m["fvu"]) for m in (measure(s, z) for s in saes)]))
series = {"as trained": line(sweep, y), "decoder refitted": line([refit(s, x) for s in sweep], y), "scrambled states": line(scrambled, mixed_y), "random directions": ([2, 4, 8, 16, 32], [best_random(k) for k in (2, 4, 8, 16, 32)])}
show.curves(series, f"{SITE}: sparsity against error, {N_FEATS} features", "active features (L0)", "fraction of variance unexplained", "Lines: unexplained variance against the number of active features, for autoencoders of five penalties, with refitted decoder, on scrambled states and for random directions.", xscale="log")

# %% [markdown]
# READING OF THE PICTURE
#
# What does the *model* lose when it must go on with what was decoded? Put the decoded state in its place and look at the loss of the text: beside the loss as it is, and with the state set to zero or to its mean.

# %%
some_text = test[:40]
effects = {a: loss_recovered(model, some_text, SITE, refit(s, x)) for a, s in zip(alphas, sweep)}
show.table([{"alpha": a, "L0": measure(s, y)["l0"], "loss as it is": e["clean"], "decoded": e["decoded"], "zero": e["zero"], "mean": e["mean"], "recovered of zero": e["recovered_zero"], "perplexity": e["perplexity_ratio"]} for (a, e), s in zip(effects.items(), sweep)], "The model with decoded states, refitted", digits=3)

# %% [markdown]
# *Recovered* sounds better than it is: without any state at this place a model is worse than one that only knows how frequent words are, so nearly everything is recovered at once. The ratio of perplexities is the more honest number. (And the mean state is not harmless either; the two are often quoted as if they were alike.)

# %% [markdown]
# ### Do two seeds find the same features?
#
# If features were the states' own, another start should find them again. For each feature of one autoencoder the cosine to its nearest in another, trained in the same way from another seed and on the states in another order; and to the nearest of as many random directions:

# %%
def nearest_cosine(a, b):
    "For each direction of a, the cosine to the nearest of b."
    return (F.normalize(a.directions, dim=-1) @ F.normalize(b.directions, dim=-1).T).amax(-1).detach()

same = [train_sae(x, N_FEATS, alpha=.8, steps=1500, seed=s) for s in (1, 2)]
likeness = {"another seed": nearest_cosine(*same), "random directions": nearest_cosine(same[0], random_directions(N_FEATS, x.shape[1]))}
fig, ax = plt.subplots(figsize=(6, 2.8))
for (name, values), color in zip(likeness.items(), ("blue", "red")): ax.hist(values.numpy(), bins=40, range=(0, 1), alpha=.6, label=name, color=show.PALETTE[color])
ax.set(title="Each feature's nearest in another dictionary", xlabel="cosine", ylabel="features"); ax.legend()
show.picture(fig, "Two histograms of cosines: to the nearest feature of another seed, and to the nearest random direction.")

# %% [markdown]
# SEEDS READING

# %% [markdown]
# ### The shipped one
#
# `scripts/make_sae.py` has trained the paper's form for longer, on more text, and refitted its decoder. It is what the picture at the top shows, and what later chapters use. What it does on unseen text, with what the same number of random directions can do beside it:

# %%
if STORIES:
    found, effect = measure(sae, y), loss_recovered(model, test, SITE, sae)
    k = round(found["l0"])
    display(claim("sae.l0", found["l0"], at_most=12, unit="active features", note="the paper's tied form, decoder refitted, resid.1"))
    display(claim("sae.fvu", found["fvu"], at_most=.06, unit="fraction of variance", control=best_random(k), note="unseen stories; control: as many random directions, the best L0 of them for each state"))
    display(claim("sae.perplexity_ratio", effect["perplexity_ratio"], at_most=1.05, unit="ratio", control=math.exp(effect["mean"] - effect["clean"]), context={"recovered of zero": effect["recovered_zero"], "recovered of mean": effect["recovered_mean"]}, note="the model going on with decoded states; control: with their mean"))
    display(claim("sae.dead_share", found["dead_share"], context={"alive by the paper's count": found["alive"], "of": len(sae.directions)}, note="never active on 25,000 tokens"))

# %%
claim("sae.seed_overlap", likeness["another seed"].mean().item(), unit="cosine", control=likeness["random directions"].mean().item(), context={"share above 0.9": (likeness["another seed"] > .9).double().mean().item()}, tolerance=.05, note="mean over features of the cosine to the nearest feature of another seed")

# %%
fig, ax = plt.subplots(figsize=(6, 2.8))
density = measure(sae, y)["density"]
ax.hist(density[density > 0].log10().numpy(), bins=40, color=show.PALETTE["blue"]); ax.set(title="How often is a feature active?", xlabel="share of tokens (log10)", ylabel="features")
show.picture(fig, "Histogram of the logarithm of the share of tokens at which each feature is active.")

# %% [markdown]
# DENSITY READING

# %% [markdown]
# ## 5 Look inside: what does one feature do?
#
# A feature that is active inside parentheses may stand for "a parenthesis is open", or merely accompany it. The test is to take it away, x - c f, wherever it is active, and to look where the parenthesis should close. Which feature? The one that fits best (F1), chosen on text of its own. The controls: other features, each active at about as many tokens inside parentheses.
#
# <details><summary>Predict: will the model forget that a parenthesis is open?</summary>In part at most: the stream passes by this site, and what stands for the open parenthesis may be spread over several features, or be read by earlier attention.</details>

# %%
if STORIES:
    chosen, facts = story_text(40_000, split="train", seed=8)
    with torch.no_grad(), capture(model, SITE) as acts: model.base_model(input_ids=chosen.ids)
    active, inside = (sae.encode(acts[SITE][chosen.mask]) > 0).float(), atoms(facts)[chosen.mask][:, ATOMS.index("in_parentheses=yes")].float()
    uses, hits = active.sum(0), inside @ active
    f1 = 2 * hits / (uses + inside.sum()).clamp(min=1)
    ranked = f1.argsort(descending=True)
    others = (hits - hits[ranked[0]]).abs().argsort()
    others = [i for i in others.tolist() if i not in ranked[:5].tolist()][:5]            # as often active there, but not for that
    f1[ranked[:4]], hits[ranked[:4]], hits[others]


# %%
@torch.no_grad()
def closing(features):
    "Mean probability of the closing parenthesis where it stands, without these features."
    fn = lambda x: x - sae.encode(x)[..., features] @ sae.directions[features]
    with intervene(model, {SITE: fn}): p = model(input_ids=test.ids).logits.softmax(-1)
    closes = (test.ids == ID[")"])[:, 1:]
    return p[:, :-1, ID[")"]][closes].mean().item()

if STORIES:
    p_close = {"as it is": closing([]), "without the best feature": closing(ranked[:1].tolist()), "without the best four": closing(ranked[:4].tolist()), "without one of five others": [closing([i]) for i in others]}
    display(show.bars(p_close, "Is the parenthesis closed?", "probability of “)” where it stands", "Bars: probability of the closing parenthesis with the state as it is, without the feature of open parentheses, without the four best, and without other features.", rotate=15))

# %% [markdown]
# CAUSAL READING

# %%
if STORIES: display(claim("sae.parenthesis_forgotten", 1 - p_close["without the best feature"] / p_close["as it is"], tolerance=.05, control=1 - sum(p_close["without one of five others"]) / 5 / p_close["as it is"], note="fall of the closing parenthesis' probability when the feature chosen on other text is taken away; control: features as often active there"))

# %% [markdown]
# ## Exercises
#
# ### Exercise 07.1 (difficulty 1, 5 minutes)
#
# `unexplained(x, x_hat)`: the fraction of variance unexplained of `x` [N, d] by `x_hat` [N, d]: the squared error over all rows, divided by the squared distance of the rows from their mean.
#
# <details><summary>Hint</summary>The mean is a vector: <code>x.mean(0)</code>.</details>

# %%
#| exercise
def unexplained(x, x_hat):
    "FVU, a number."
    ### BEGIN SOLUTION
    return (x - x_hat).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    ### END SOLUTION


# %%
from codebook_tutorial.checks.sae import *
check_unexplained(unexplained)


# %% [markdown]
# ### Exercise 07.2 (difficulty 2, 8 minutes)
#
# `sae_loss(x, M, b, alpha)`: the paper's loss for states `x` [N, d], dictionary `M` [F, d] and bias `b` [F]: features by ReLU, decoded by the same M; squared error summed over coordinates, plus alpha times the sum of the features, both averaged over states.
#
# <details><summary>Hint</summary><code>f = (x @ M.T + b).relu()</code>, and back with <code>f @ M</code>.</details>

# %%
#| exercise
def sae_loss(x, M, b, alpha):
    "A number."
    ### BEGIN SOLUTION
    f = (x @ M.T + b).relu()
    return (x - f @ M).pow(2).sum(-1).mean() + alpha * f.sum(-1).mean()
    ### END SOLUTION


# %%
check_sae_loss(sae_loss)


# %% [markdown]
# ### Exercise 07.3 (difficulty 2, 8 minutes)
#
# `keep_k(pre, k)`: TopK. Of every row of `pre` [N, F] keep the k largest values, the rest becomes 0; what is negative becomes 0 as well.
#
# <details><summary>Hint</summary><code>values, ids = pre.topk(k, -1)</code>; <code>torch.zeros_like(pre).scatter(-1, ids, values)</code> puts them back.</details>

# %%
#| exercise
def keep_k(pre, k):
    "[N, F] with at most k that are not 0 in each row."
    ### BEGIN SOLUTION
    values, ids = pre.topk(k, -1)
    return torch.zeros_like(pre).scatter(-1, ids, values.relu())
    ### END SOLUTION


# %%
check_keep_k(keep_k)


# %% [markdown]
# ### Exercise 07.4 (difficulty 3, 12 minutes)
#
# `best_decoder(f, x)`: features `f` [N, F] are given; which decoder W [F, d] explains the (centred) states `x` [N, d] with the least squared error, x ≈ f W?
#
# <details><summary>Hint</summary>Least squares: (fᵀ f) W = fᵀ x, by <code>torch.linalg.solve</code>; or <code>torch.linalg.lstsq</code>.</details>

# %%
#| exercise
def best_decoder(f, x):
    "W [F, d]."
    ### BEGIN SOLUTION
    return torch.linalg.solve(f.T @ f, f.T @ x)
    ### END SOLUTION


# %%
check_best_decoder(best_decoder)


# %% [markdown]
# ### Exercise 07.5 (interpret; difficulty 3, 8 minutes)
#
# A paper reports: "our autoencoder recovers 98 % of the loss" (of zero ablation). Look at the table *The model with decoded states*. What follows for the model that goes on with decoded states?
#
# - `"a"`: it is nearly as good as the model itself.
# - `"b"`: little: setting the state to zero does such damage that 98 % of it leaves room for a much worse model.
# - `"c"`: the autoencoder explains 98 % of the variance.

# %%
#| exercise
def answer_07_5():
    "One of 'a', 'b', 'c'."
    ### BEGIN SOLUTION
    return "b"
    ### END SOLUTION


# %%
check_answer_07_5(answer_07_5)


# %% [markdown]
# ### Exercise 07.6 (extend; difficulty 4, 15 minutes)
#
# One term's gradient. JumpReLU's threshold has no gradient of its own: f jumps from 0 to its value. `threshold_gradient(pre, theta, width)` [F]: the estimate of the gradient of the *number of active features* (mean over rows) by the thresholds `theta` [F]: minus the share of rows whose `pre` [N, F] lies within `width` / 2 of the threshold, divided by `width`.
#
# Then go on: harvest a site of another model (`load_lm("pythia-70m")` on Colab, or your own), train the kind you like best, and `export_sae` it to the library your group uses.
#
# <details><summary>Hint</summary><code>((pre - theta).abs() < width / 2)</code> are those near enough.</details>

# %%
#| exercise
def threshold_gradient(pre, theta, width):
    "[F]"
    ### BEGIN SOLUTION
    return -((pre - theta).abs() < width / 2).float().mean(0) / width
    ### END SOLUTION


# %%
check_threshold_gradient(threshold_gradient)

# %%
#| export checks.sae
import torch
from codebook_tutorial.checks.core import check, check_choice
from codebook_tutorial.core import seeded


# %%
#| export checks.sae
def check_unexplained(unexplained):
    "Exercise 07.1."
    x, noise = torch.randn(50, 4, generator=seeded(0)) * torch.tensor([1., 2, 3, 9]) + 5, torch.randn(50, 4, generator=seeded(1))
    left = noise.pow(2)
    total = (x - x.mean(0)).pow(2)
    return check(lambda: unexplained(x, x + noise), left.sum() / total.sum(), {
        "that is the variance explained": 1 - left.sum() / total.sum(), "centre x first: far from zero any answer would look good": left.sum() / x.pow(2).sum(), "the mean is a vector, one number a coordinate": left.sum() / (x - x.mean()).pow(2).sum(),
        "sum before you divide: coordinates with little variance would count as much as large ones": (left.sum(0) / total.sum(0)).mean(), "that is the squared error; divide by the variance": left.sum(-1).mean(), "squares, not lengths": left.sum(-1).sqrt().sum() / total.sum(-1).sqrt().sum()})

def check_sae_loss(sae_loss):
    "Exercise 07.2."
    x, M, b, alpha = torch.randn(20, 4, generator=seeded(0)), torch.randn(7, 4, generator=seeded(1)), torch.randn(7, generator=seeded(2)), .7
    pre = x @ M.T + b
    f = pre.relu()
    error, penalty = (x - f @ M).pow(2), f.sum(-1).mean()
    want = error.sum(-1).mean() + alpha * penalty
    return check(lambda: sae_loss(x, M, b, alpha), want, {
        "the mean over coordinates is the paper's code, not its equation: sum them": error.mean() + alpha * penalty, "the penalty's mean over features: sum them": error.sum(-1).mean() + alpha * f.mean(), "the penalty is missing": error.sum(-1).mean(), "the ReLU is missing": (x - pre @ M).pow(2).sum(-1).mean() + alpha * pre.sum(-1).mean(),
        "the bias is missing": (x - (x @ M.T).relu() @ M).pow(2).sum(-1).mean() + alpha * (x @ M.T).relu().sum(-1).mean(), "L1 is the sum of the features, not of their squares": error.sum(-1).mean() + alpha * f.pow(2).sum(-1).mean(), "sums over states: take the mean": error.sum() + alpha * f.sum()})


# %%
#| export checks.sae
def check_keep_k(keep_k):
    "Exercise 07.3."
    pre = torch.randn(6, 9, generator=seeded(0)) - .8
    k = 3
    values, ids = pre.topk(k, -1)
    put = lambda values, ids: torch.zeros_like(pre).scatter(-1, ids, values)
    return check(lambda: keep_k(pre, k), put(values.relu(), ids), {
        "negative ones among the k are kept: they become 0, too": put(values, ids), "the largest by size, whatever the sign": put(pre.gather(-1, pre.abs().topk(k, -1).indices), pre.abs().topk(k, -1).indices), "k for each feature: of every row, please": torch.zeros_like(pre).scatter(0, pre.topk(k, 0).indices, pre.topk(k, 0).values.relu()),
        "that is the k largest, but not at their places": values.relu(), "that is a ReLU: nothing limits the number": pre.relu(), "k of the whole batch: that is BatchTopK": torch.where(pre >= pre.flatten().topk(k * len(pre)).values[-1], pre, 0.).relu()})

def check_best_decoder(best_decoder):
    "Exercise 07.4."
    f, x = torch.rand(40, 5, generator=seeded(0)), torch.randn(40, 3, generator=seeded(1)) + 1
    W = torch.linalg.lstsq(f, x).solution
    return check(lambda: best_decoder(f, x), W, {
        "that is the features' covariance with the states; features that fire together need the inverse of fᵀ f": f.T @ x, "each feature by itself: they overlap, so they must be solved for together": (f.T @ x) / f.pow(2).sum(0)[:, None],
        "that is the encoder's question: features from states": torch.linalg.lstsq(x, f).solution, "transposed: W is [F, d]": W.T, "rows need not have length 1 here": W / W.norm(dim=-1, keepdim=True)})



# %%
#| export checks.sae
def check_answer_07_5(answer):
    "Exercise 07.5."
    return check_choice(answer, "b", "yes: the scale's other end is a wreck; the loss in nats, or the ratio of perplexities, says what is left to do", {
        "a": "compare what the table says of the perplexity with what it says is recovered", "c": "loss is not variance: small errors in the wrong direction cost much, large ones in others nothing"})

def check_threshold_gradient(threshold_gradient):
    "Exercise 07.6."
    pre, theta, width = torch.rand(200, 4, generator=seeded(0)), torch.tensor([.2, .4, .6, .97]), .3
    near = ((pre - theta).abs() < width / 2).float()
    return check(lambda: threshold_gradient(pre, theta, width), -near.mean(0) / width, {
        "the sign: a higher threshold makes fewer features active": near.mean(0) / width, "divide by the width: a wide window catches more rows without being steeper": -near.mean(0), "width / 2 to either side, not width": -((pre - theta).abs() < width).float().mean(0) / width,
        "the mean over rows, not the sum": -near.sum(0) / width, "one number a feature": -near.mean() / width, "only rows above the threshold counted; those just below would become active": -(near * (pre > theta)).mean(0) / width})


# %% [markdown]
# ## Limits
#
# - One small model of a language made by rules, one site, one width. Wider dictionaries find finer features; nothing here says which fineness is right.
# - Sparse and faithful is not yet *meaningful*. Chapter 08 asks whether features fit known concepts better than simpler directions do, chapter 13 compares every method.
# - The penalty's weight, the number of steps and the rate were not searched for each kind.
# - Taking a feature away at one site leaves whatever else the network has.
#
# ## Recap
#
# - A state is decoded from a few of many directions; a pair of numbers, L0 and unexplained variance, says how well, and controls say what is easy.
# - The penalty counts in units of the states; it kills features and shrinks the rest. Both can be mended.
# - What the model loses is a question of its own, and "recovered" flatters.
# - Harvest once, train often: the store is larger than memory.
#
# Exported: `harvest`, `open_activations`, `train_sae`, `refit`, `measure`, `loss_recovered`, `load_sae`, `export_sae`, `convert_alpha`. Next: chapter 08, what a feature must beat.
#
# References: Cunningham et al. 2023 ([arXiv 2309.08600](https://arxiv.org/abs/2309.08600)); Gao et al. 2024 (TopK, [arXiv 2406.04093](https://arxiv.org/abs/2406.04093)); Bussmann et al. 2024, 2025 (BatchTopK, Matryoshka, [arXiv 2412.06410](https://arxiv.org/abs/2412.06410), [arXiv 2503.17547](https://arxiv.org/abs/2503.17547)); Rajamanoharan et al. 2024 (Gated, JumpReLU, [arXiv 2404.16014](https://arxiv.org/abs/2404.16014), [arXiv 2407.14435](https://arxiv.org/abs/2407.14435)).

# %% [markdown]
# ## Appendix: the library of this chapter

# %% [markdown]
# **The other kinds.** Each a few lines that differ.

# %%
#| export
class TopK(SAE):
    "The k largest are kept (arXiv 2406.04093); features long silent learn from what the others leave over."
    kind = "topk"
    def __init__(self, *args, k: int = 8, patience: int = 50_000, k_aux: int = 32, **kw):     # rows of silence after which a feature counts as dead
        super().__init__(*args, k=k, patience=patience, k_aux=k_aux, **kw)
        if not 1 <= k <= self.config["n_feats"]: raise ValueError(f"{type(self).__name__}: expected 1 <= k <= n_feats, got k={k}, n_feats={self.config['n_feats']}")
        self.k, self.patience, self.k_aux = k, patience, k_aux

    def encode_sparse(self, x):
        values, ids = self.pre(x).topk(self.k, -1)
        return ids, values.relu()

    def encode(self, x):
        ids, values = self.encode_sparse(x)
        return values.new_zeros(*values.shape[:-1], len(self.b_enc)).scatter(-1, ids, values)

    def loss(self, x, alpha):
        "|x - x^|^2 + alpha * the auxiliary loss."
        pre = self.pre(x)
        values, ids = pre.topk(self.k, -1, sorted=False)
        self.silent.add_(len(x))[ids[values > 0]] = 0
        left = x - self.decode_sparse(ids, values.relu())
        return left.pow(2).sum(-1).mean() + alpha * self.auxiliary(pre, left.detach())

    def auxiliary(self, pre, left):        # [N, F], [N, d] what the others leave over
        "How badly the dead features alone explain what is left; its gradient reaches encoder and decoder."
        dead = (self.silent > self.patience).nonzero()[:, 0]
        if not len(dead): return 0.
        values, ids = pre[:, dead].topk(min(self.k_aux, len(dead)), -1)
        return error(left, self.decode_sparse(dead[ids], values.relu()) - self.b_dec)


# %%
#| export
class BatchTopK(TopK):
    "The k N largest of a whole batch of N are kept (arXiv 2412.06410); afterwards, all above their threshold."
    kind, in_units = "batchtopk", ("b_enc", "b_dec", "threshold")
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.register_buffer("threshold", torch.tensor(0.))

    encode_sparse = Dictionary.encode_sparse
    def encode(self, x):
        pre = self.pre(x)
        return pre * (pre > self.threshold)

    def active(self, pre):                 # in training: [N, F] -> the same, zero but for k a row in the mean
        f = pre.relu()
        least = f.detach().flatten().kthvalue(f.numel() - self.k * len(f)).values
        self.threshold.lerp_(least.clamp(min=0), .01 if self.threshold > 0 else 1.)
        self.note(f > least)
        return f * (f > least)

    def loss(self, x, alpha):
        pre = self.pre(x)
        left = x - self.decode(self.active(pre))
        return left.pow(2).sum(-1).mean() + alpha * self.auxiliary(pre, left.detach())


# %%
#| export
class Matryoshka(BatchTopK):
    "BatchTopK whose first features must do alone, and so on in nested groups (arXiv 2503.17547)."
    kind = "matryoshka"
    def __init__(self, *args, shares: tuple = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1), **kw):
        super().__init__(*args, shares=list(shares), **kw)
        self.sizes = [max(1, round(s * self.config["n_feats"])) for s in shares]

    def loss(self, x, alpha):
        "Mean over the nested dictionaries of |x - x^|^2, + alpha * the auxiliary loss."
        pre = self.pre(x)
        f, x_hat, total, begin = self.active(pre), self.b_dec, 0., 0
        for end in self.sizes:
            x_hat = x_hat + f[:, begin:end] @ self.W_dec[begin:end]
            total, begin = total + error(x, x_hat) / len(self.sizes), end
        return total + alpha * self.auxiliary(pre, (x - x_hat).detach())


# %%
#| export
class JumpReLU(SAE):
    "A threshold of its own for every feature, learnt with the number of active features as penalty (arXiv 2407.14435)."
    kind, in_units, fresh = "jumprelu", ("b_enc", "b_dec", "threshold"), {"threshold": .1}
    def __init__(self, *args, stack=(), bandwidth: float = .1, **kw):
        super().__init__(*args, stack=stack, bandwidth=bandwidth, **kw)
        self.bandwidth, self.threshold = bandwidth, nn.Parameter(torch.full((*stack, self.config["n_feats"]), self.fresh["threshold"]))

    def encode(self, x):
        pre = self.pre(x)
        return pre * (pre > _row(self.threshold))

    def loss(self, x, alpha):
        "|x - x^|^2 + alpha * number of active features; thresholds learn from the features near them."
        pre, threshold = self.pre(x).relu(), _row(self.threshold)
        active = pre > threshold
        self.note(active)
        near = ((pre - threshold).abs() < self.bandwidth / 2) / self.bandwidth
        moves = threshold.detach() - threshold                                        # zero; its gradient is -1 by the threshold
        f = pre * active + near * threshold.detach() * moves
        return error(x, self.decode(f)) + alpha * (active + near * moves).sum(-1).mean(-1)

    @torch.no_grad()
    def project(self): super().project(); self.threshold.clamp_(min=1e-3)


# %%
#| export
class Gated(SAE):
    "One path decides which features are active, another how much (arXiv 2404.16014)."
    kind, in_units = "gated", ("b_enc", "b_dec", "b_mag")
    def __init__(self, *args, stack=(), **kw):
        super().__init__(*args, stack=stack, **kw)
        self.r_mag, self.b_mag = (nn.Parameter(torch.zeros(*stack, self.config["n_feats"])) for _ in range(2))

    def paths(self, x):
        "Which (before its step), how much."
        shared = self.linear(x)
        return shared + _row(self.b_enc), (shared * _row(self.r_mag).exp() + _row(self.b_mag)).relu()

    def encode(self, x):
        gate, size = self.paths(x)
        return size * (gate > 0)

    def loss(self, x, alpha):
        "|x - x^|^2 + alpha |ReLU(gate)|_1 + |x - what the gate alone decodes to|^2, the last with the decoder frozen."
        gate, size = self.paths(x)
        self.note(gate > 0)
        alone = gate.relu() @ self.W_dec.detach() + _row(self.b_dec.detach())
        return error(x, self.decode(size * (gate > 0))) + alpha * gate.relu().sum(-1).mean(-1) + error(x, alone)

KINDS = {cls.kind: cls for cls in (Tied, SAE, TopK, BatchTopK, JumpReLU, Gated, Matryoshka)}


# %% [markdown]
# **Training, refitting.**

# %%
#| export
def _stream(acts, site, size, seed):          # shuffled batches [size, d] without end
    epoch = 0
    while True:
        if torch.is_tensor(acts): some = (acts[i] for i in torch.randperm(len(acts), generator=seeded(seed + epoch)).split(size))
        else: some = acts.batches(site, size, seed=seed + epoch)
        for x in some:
            if len(x) == size: yield x
        epoch += 1

@torch.no_grad()
def begin_anew(sae, x, optimizer, patience: int, generator=None) -> int:      # [N, d]; rows of silence after which a feature is dead
    "Dead features begin anew as what is badly explained of inputs, drawn by their squared error; returns how many."
    left, moved = x - sae.decode(sae.encode(x)), 0
    for one in product(*map(range, sae.silent.shape[:-1])):                              # of a stack, each by itself
        dead = (sae.silent[one] > patience).nonzero()[:, 0]
        if not len(dead): continue
        rows = torch.multinomial(left[one].pow(2).sum(-1), len(dead), replacement=len(dead) > len(x), generator=generator)
        for name, p in sae.named_parameters():
            if name == "b_dec": continue
            p[one][dead] = F.normalize(left[one][rows], dim=-1) if name in ("W_dec", "W_enc") else sae.fresh.get(name, 0.)
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in optimizer.state[p]: optimizer.state[p][moment][one][dead] = 0.
        sae.silent[one][dead] = 0.
        moved += len(dead)
    return moved


# %%
#| export
def members(sae) -> list:
    "The autoencoders of a stack, each by itself."
    if sae.silent.dim() == 1: return [sae]
    found = []
    for one in range(len(sae.silent)):
        found.append(type(sae)(**{k: v for k, v in sae.config.items() if k != "kind"}))
        found[-1].load_state_dict({name: t[one] for name, t in sae.state_dict().items()})
    return found

ALPHA = dict(tied=.1, untied=.1, gated=.1, jumprelu=.05, topk=1 / 32, batchtopk=1 / 32, matryoshka=1 / 32)


# %%
#| export
def train_sae(acts,                           # [N, d]; or an Activations, with site=
              n_feats: int, kind: str = "tied",
              alpha: float | list | None = None,     # weight of the penalty, for activations whose coordinates have mean square 1; several: trained together, a list comes back
              steps: int = 2000, batch: int = 1024, lr: float = 4e-3, seed: int = 0,
              site: str | None = None,
              resample: tuple = (.2, .4, .6), # shares of the steps after which dead features begin anew (the TopK kinds have an auxiliary loss instead)
              **settings):                    # of the kind: k, patience, k_aux, shares, bandwidth
    "Train a sparse autoencoder on activations."
    alpha = _checked(kind, ALPHA.get(kind) if alpha is None else alpha, steps)
    mean, scale = _units(acts if torch.is_tensor(acts) else acts.load(site, 50_000))
    if not 1 <= batch <= len(acts): raise ValueError(f"train_sae: expected a batch of at most the {len(acts)} rows of data, got {batch}")
    sae = KINDS[kind](len(mean), n_feats, stack=tuple(alpha.shape), generator=seeded(seed), **settings).to(mean.device)
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr, betas=(.9, .99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1., (t + 1) / (.05 * steps), (steps - t) / (.3 * steps)))
    for t, x in zip(tqdm(range(steps), desc=f"train_sae {kind}", unit="step", delay=2), _stream(acts, site, batch, seed)):
        x = (x.to(mean) - mean) / scale
        loss = sae.loss(x, alpha * min(1., (t + 1) / (.1 * steps)))
        optimizer.zero_grad(); loss.sum().backward()
        optimizer.step(); schedule.step(); sae.project()
        if t + 1 in [int(s * steps) for s in resample] and not isinstance(sae, TopK): begin_anew(sae, x, optimizer, 50 * batch, seeded(seed + t))
    for one, a in zip(members(sae), alpha.view(-1)):
        if (one.encode(x) == 0).all(): warnings.warn(f"train_sae: with alpha={a:g} no feature is active any more; try a smaller one", stacklevel=2)
    sae.in_units_of(mean, scale)
    return sae.eval() if not alpha.dim() else [one.eval() for one in members(sae)]


# %%
#| export
def _checked(kind, alpha, steps):
    "alpha as a tensor, [] or [S]; ValueError for what cannot be trained."
    if kind not in KINDS: raise ValueError(f"train_sae: kind={kind!r}, expected one of {', '.join(KINDS)}")
    alpha = torch.as_tensor(alpha, dtype=torch.float)
    if alpha.dim() and issubclass(KINDS[kind], TopK): raise ValueError(f"train_sae: kind={kind!r} takes one alpha, the weight of its auxiliary loss (sparsity is set by k); got {alpha.tolist()}")
    if alpha.dim() > 1 or not (alpha >= 0).all(): raise ValueError(f"train_sae: expected alpha of at least 0, one or a list, got {alpha.tolist()}")
    if steps < 1: raise ValueError(f"train_sae: expected steps of at least 1, got {steps}")
    return alpha

def _units(x):                                # [n, d] -> mean [d], scale: the centred x / scale has mean square 1 a coordinate
    finite(x, "train_sae")
    mean = x.mean(0)
    return mean, (x - mean).pow(2).mean().sqrt().clamp(min=1e-12)

@torch.no_grad()
def refit(sae, x, ridge: float = 1e-4, batch: int = 8192):         # [N, d]
    "The same features, and the decoder that explains x best with them (least squares): undoes what the L1 penalty has shrunk."
    n, width = sae.W_dec.shape
    ff, fx = x.new_zeros(n, n), x.new_zeros(n, width)
    for part in x.split(batch):
        f = sae.encode(part)
        ff += f.T @ f; fx += f.T @ (part - sae.decode(f))
    moved = torch.linalg.solve(ff + ridge * ff.diagonal().mean() * torch.eye(n, device=x.device), fx)      # a feature that never fires stays where it is
    config = {k: v for k, v in sae.config.items() if k != "kind"}
    new = (SAE if sae.tied else type(sae))(**config).to(x.device)
    new.load_state_dict(sae.state_dict() | {"W_enc": sae.W_enc.clone()})
    new.W_dec.add_(moved)
    return new.eval()


# %% [markdown]
# **Measures.**

# %%
#| export
@torch.no_grad()
def measure(dictionary, x, batch: int = 8192) -> dict:       # any Dictionary; [N, d]
    "l0, fvu, cosine (of x and x^, both without x's mean), dead_share, alive (features active more than 10 times, the paper's count), density [F] (share of rows at which each is active)."
    finite(x, "measure")
    mean, active, left, like = x.mean(0), 0, 0., 0.
    for part in x.split(batch):
        f = dictionary.encode(part)
        x_hat = dictionary.decode(f)
        active, left, like = active + (f != 0).sum(0), left + (part - x_hat).pow(2).sum(), like + F.cosine_similarity(part - mean, x_hat - mean, dim=-1).sum()
    return dict(l0=active.sum().item() / len(x), fvu=(left / (x - mean).pow(2).sum()).item(), cosine=like.item() / len(x), dead_share=(active == 0).float().mean().item(),
                alive=int((active > 10).sum()), density=active / len(x))

@torch.no_grad()
def loss_recovered(model, text, site: str, dictionary, batch: int = 32) -> dict:         # text: a Text
    "Nats a token with the site's states as they are, decoded from their features, all zero, all their mean (BOS and padding stay); the shares of the damage of zero and mean that decoding undoes; perplexity decoded / as it is."
    def nats(fn):
        total = 0.
        for part in _parts(text, batch):
            there = part.mask.to(next(model.parameters()).device)[..., None]
            with intervene(model, {site: lambda x: torch.where(there, fn(x), x)}): total += torch.nan_to_num(token_losses(model, part, batch)).sum().item()
        return total / n
    n, mean = int((text.labels[:, 1:] != -100).sum()), _mean_state(model, text, site, batch)
    found = dict(clean=nats(lambda x: x), decoded=nats(lambda x: dictionary.decode(dictionary.encode(x))), zero=nats(torch.zeros_like), mean=nats(lambda x: mean.expand_as(x)))
    undone = lambda what: (found[what] - found["decoded"]) / (found[what] - found["clean"])
    return found | dict(recovered_zero=undone("zero"), recovered_mean=undone("mean"), perplexity_ratio=math.exp(found["decoded"] - found["clean"]))

def _parts(text, rows): return (text[i:i + rows] for i in range(0, len(text), rows))


# %%
#| export
def _mean_state(model, text, site, batch):
    total = 0.
    with capture(model, site) as acts:
        for part in _parts(text, batch):
            model(input_ids=part.ids.to(next(model.parameters()).device), use_cache=False)
            total = total + acts[site][part.mask.to(acts[site].device)].sum(0)
    return total / text.n_tokens


# %% [markdown]
# **The store**: `activations`.

# %%
#| export activations
import hashlib, json, os, shutil
from datetime import timedelta
from functools import cached_property
from pathlib import Path
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from codebook_tutorial.core import seeded
from codebook_tutorial.models import Text, _check_length, _evaluating
from codebook_tutorial.sites import capture, site_dims


# %%
#| export activations
_DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}      # as safetensors calls them
_COLUMNS = ("ids", "document", "row", "position")                                   # int32, beside the sites

def _shard(folder, i, kind="safetensors"): return folder / f"shard-{i:05d}.{kind}"
def _done(folder, i): return _shard(folder, i).exists() and _shard(folder, i, "json").exists()
def _part(path): return path.with_name(path.name + ".part")                         # its name while it is being written

def _write_json(path, info):
    _part(path).write_text(json.dumps(info, indent=1) + "\n")
    _part(path).replace(path)

def _sha256(path):
    with open(path, "rb") as f: return hashlib.file_digest(f, "sha256").hexdigest()

def _info(folder, call):
    "What activations.json says; ValueError if it is damaged, or not ours."
    try:
        info = json.loads((folder / "activations.json").read_text())
        if info["format"] != 1 or not {"sites", "dtype", "tokens", "shards"} <= info.keys(): raise ValueError(f"expected format 1 with sites, dtype, tokens and shards, got {str(info)[:80]}")
        return info
    except Exception as e: raise ValueError(f"{call}: activations.json in {folder} is damaged, or harvest did not write it ({type(e).__name__}: {e}); remove the folder or choose another") from e

def _check(model, text, sites, dtype, batch, shard):
    if not isinstance(text, Text): raise ValueError(f"harvest: expected a Text, got {type(text).__name__}; load_text makes one")
    if dtype not in _DTYPES: raise ValueError(f"harvest: dtype={dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    if batch < 1 or shard < 1: raise ValueError(f"harvest: expected batch and shard of 1 or more, got batch={batch}, shard={shard}")
    if not text.n_tokens: raise ValueError("harvest: the text has no ordinary token, only BOS and padding")
    if not sites: raise ValueError("harvest: no site; expected names or patterns, e.g. ['resid.1', 'mlp.*']")
    _check_length(model, text.ids.shape[1], "harvest")


# %%
#| export activations
def _weights_mark(model):                     # sha256
    "Marks a model by a thousand or two numbers of each weight, since two may have one name."
    mark = hashlib.sha256()
    for name, p in model.named_parameters():
        some = p.detach().flatten()[::max(1, p.numel() // 1024)].contiguous()
        mark.update(name.encode() + (b"" if p.is_meta else some.cpu().view(torch.uint8).numpy().tobytes()))
    return mark.hexdigest()

def _settings(model, text, sites, dtype, k):  # k: rows a shard
    "What must agree for a harvest to go on."
    return dict(format=1, model=str(getattr(model.config, "name_or_path", "")), weights=_weights_mark(model), sites=site_dims(model, sites), dtype=str(dtype).removeprefix("torch."),
                text=hashlib.sha256(text.ids.cpu().long().contiguous().numpy().tobytes()).hexdigest(), rows=len(text), length=text.ids.shape[1], bos=text.bos, pad=text.pad,
                tokens=text.n_tokens, rows_a_shard=k, shards=-(-len(text) // k))

def _check_folder(folder, info, overwrite):
    "ValueError unless the folder is to be made, or holds the beginning of this very store, or of one that may be overwritten."
    there = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if folder.is_file() or "activations.json" not in there and there - {"activations.json.part"}:
        raise ValueError(f"harvest: {folder} is there and holds no activations; expected a folder to be made")
    old = _info(folder, "harvest") if "activations.json" in there else info
    differ = [f"{name}: {old.get(name)} there, {new} now" for name, new in info.items() if old.get(name) != new]
    if differ and not overwrite: raise ValueError(f"harvest: the activations in {folder} were begun with other settings: {'; '.join(differ)}. overwrite=True replaces them")


# %%
#| export activations
def _check_room(folder, info, text, batch, overwrite, verbose):
    "Say in one line what it takes; OSError if the disk has less room."
    N, k, sites, MB = info["shards"], info["rows_a_shard"], info["sites"], lambda size: f"{size / 1e6:,.1f} MB"
    token = sum(sites.values()) * getattr(torch, info["dtype"]).itemsize + 4 * len(_COLUMNS)          # bytes
    sizes = [int(n.sum()) * token for n in text.mask.sum(1).split(k)]
    done = set() if overwrite else {i for i in range(N) if _done(folder, i)}
    most = max(sizes) + min(batch, k, len(text)) * info["length"] * (sum(sites.values()) + 2 * max(sites.values())) * 4       # a shard, and what a pass gives
    if verbose: print(f"harvest: {info['tokens']:,} tokens x {len(sites)} sites ({', '.join(f'{s} {d}' for s, d in sites.items())}), {info['dtype']}: {MB(sum(sizes))} on disk "
                      f"in {N} shard{'s' * (N > 1)}, at most {MB(most)} of memory beside the model" + f"; {len(done)} of the shards are there" * bool(done))
    need = sum(size for i, size in enumerate(sizes) if i not in done)
    room = shutil.disk_usage(next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())).free
    if overwrite: room += sum(p.stat().st_size for p in folder.glob("shard-*"))
    if need > room: raise OSError(f"harvest: {MB(need)} are needed in {folder}, the disk has {MB(room)} left; choose fewer sites or tokens, or another disk")

def _begin(folder, info, overwrite):
    "Make the folder, sweep out what a killed run left half-written, write activations.json."
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in [".tmp*"] + ["shard-*"] * overwrite:                             # save_file's own half-written files are .tmp*; a .part is written over
        for path in folder.glob(pattern): path.unlink()
    if overwrite or not (folder / "activations.json").exists(): _write_json(folder / "activations.json", info)

def _refuse(site, x, kept, row, position):    # [n, d] as the model gave it, [n, d] in the store's dtype, [n], [n]
    "ValueError that names the first token with a number that is not finite."
    i = int((~kept.isfinite()).any(1).nonzero()[0])
    wider = "bfloat16 or float32" if kept.dtype == torch.float16 else "float32"
    what = f"a number too large for {kept.dtype}: use {wider}" if x[i].isfinite().all() else "NaN or infinity"
    raise ValueError(f"harvest: {site} at row {int(row[i])}, position {int(position[i])} holds {what}")


# %%
#| export activations
def _harvest_rows(model, text, first, document, sites, dtype, batch, bar):      # rows of a shard, number of the first, [rows, length], {site: width} -> {name: [n, ..]}
    "The activations at the rows' ordinary tokens, and which tokens these are."
    base, where, at = getattr(model, "base_model", model), next(model.parameters()).device, 0         # the base has no language-model head
    keep = text.mask
    row, position = keep.nonzero(as_tuple=True)
    out = {site: torch.empty(len(row), width, dtype=dtype) for site, width in sites.items()}
    with capture(model, list(sites)) as acts:
        for i in range(0, len(text), batch):
            base(input_ids=text.ids[i:i + batch].to(where), use_cache=False)
            here = keep[i:i + batch].flatten().nonzero()[:, 0].to(where)
            span = slice(at, at := at + len(here))
            for site in sites:
                x = acts[site].flatten(0, 1)[here]
                kept = x.to(dtype)
                if not kept.isfinite().all(): _refuse(site, x, kept, row[span] + first, position[span])
                out[site][span] = kept
            bar.update(len(here))
    return out | {name: x.int() for name, x in zip(_COLUMNS, (text.ids[keep], document[keep], row + first, position))}


# %%
#| export activations
def _save(folder, i, tensors, info):
    "Write a shard: under its name only when it is whole, and its json last."
    path, note, k = _shard(folder, i), _shard(folder, i, "json"), info["rows_a_shard"]
    try:
        save_file(tensors, _part(path))
        shutil.copymode(folder / "activations.json", _part(path))                   # save_file lets nobody else read it
        mark = _sha256(_part(path))
        _part(path).replace(path)
        _write_json(note, dict(n=len(tensors["ids"]), rows=min(k, info["rows"] - i * k), sha256=mark))
    except (OSError, SafetensorError) as e:                                         # save_file's errors are no OSErrors
        done = sum(_done(folder, j) for j in range(info["shards"]))
        raise OSError(f"harvest: {path.name} could not be written ({e}); {done} of {info['shards']} shards are in {folder}: make room and call harvest again, it goes on from there") from e
    finally:
        for half in (_part(path), _part(note)): half.unlink(missing_ok=True)

def _processes(where):                        # the model's device
    "accelerate's state where torchrun started several processes, else None."
    if int(os.environ.get("WORLD_SIZE", 1)) == 1: return None
    from accelerate import PartialState
    return PartialState(cpu=where.type == "cpu", timeout=timedelta(days=7))         # one may have a shard more to make than another


# %%
#| export activations
@torch.no_grad()
def harvest(model,                            # any that has sites, also a CodebookModel
            text,                             # a Text: rows of token ids
            sites: str | list[str],           # names or patterns
            folder,                           # to be made, or where a harvest was interrupted
            dtype=torch.float16,              # or torch.bfloat16, torch.float32
            batch: int = 16,                  # rows a pass
            shard: int = 65_536,              # about how many tokens a file holds, and memory
            overwrite: bool = False,          # replace the activations that are there?
            verbose: bool = True):            # say what it takes, show a bar
    "Write down the activations at every ordinary token (never at BOS and padding); called again, it goes on where it was stopped. Returns the open Activations."
    _check(model, text, sites, dtype, batch, shard)
    folder, k, state = Path(folder), max(1, shard // text.ids.shape[1]), _processes(next(model.parameters()).device)
    info = _settings(model, text, sites, dtype, k)
    if state is None or state.is_main_process:
        _check_folder(folder, info, overwrite)
        _check_room(folder, info, text, batch, overwrite, verbose)
        _begin(folder, info, overwrite)
    if state: state.wait_for_everyone()
    rank, world = (state.process_index, state.num_processes) if state else (0, 1)
    spans = {i: slice(i * k, (i + 1) * k) for i in range(rank, info["shards"], world) if not _done(folder, i)}
    document = ((text.ids == text.bos).flatten().cumsum(0, dtype=torch.int32) - 1).clamp(min=0).view_as(text.ids)
    with _evaluating(model), tqdm(total=sum(text[rows].n_tokens for rows in spans.values()), desc="harvest", unit="token", delay=2, disable=not verbose) as bar:
        for i, rows in spans.items(): _save(folder, i, _harvest_rows(model, text[rows], i * k, document[rows], info["sites"], dtype, batch, bar), info)
    if state: state.wait_for_everyone()
    return open_activations(folder)


# %%
#| export activations
def _fill(buffer, free, runs, read):          # [hold, d], slots [m], stack of (shard, begin, end), fn(shard, begin, end) -> [.., d]
    "Read runs off the stack into free slots until either is used up; returns the slots that were filled."
    at = 0
    while runs and at < len(free):
        i, begin, end = runs.pop()
        stop = min(end, begin + len(free) - at)
        if stop < end: runs.append((i, stop, end))
        buffer[free[at:at + stop - begin]] = read(i, begin, stop).to(buffer.dtype)
        at += stop - begin
    return free[:at]


# %%
#| export activations
class Activations:
    "A text's activations on disk: `.sites` {site: width}, `.n` tokens; `.ids`, `.document`, `.row`, `.position` [n] say which tokens they are."
    def __init__(self, folder, info, shards):      # [(safe_open, number of tokens)]
        self.folder, self.info, self.shards, self.sites, self.n = folder, info, shards, info["sites"], info["tokens"]

    ids = cached_property(lambda self: self._column("ids"))
    document = cached_property(lambda self: self._column("document"))
    row = cached_property(lambda self: self._column("row"))
    position = cached_property(lambda self: self._column("position"))
    def _column(self, name): return torch.cat([file.get_tensor(name) for file, _ in self.shards])
    def __len__(self): return self.n
    def __repr__(self): return f"Activations: {self.n:,} tokens in {len(self.shards)} shard{'s' * (len(self.shards) > 1)}, {self.info['dtype']}; " + ", ".join(f"{s} ({d})" for s, d in self.sites.items())

    def _read(self, site, i, begin, end):          # -> [end - begin, d]
        "Some rows of a shard; the file is memory-mapped, so only these are read."
        return self.shards[i][0].get_slice(site)[begin:end]

    def _runs(self, site, length, call):           # -> [(shard, begin, end)] of at most `length` rows
        if site not in self.sites: raise ValueError(f"{call}: no site {site!r} in {self.folder}; expected one of {', '.join(self.sites)}")
        return [(i, a, min(a + length, n)) for i, (_, n) in enumerate(self.shards) for a in range(0, n, length)]

    def load(self, site: str, n: int | None = None):      # -> float32 [n, d]
        "The first n tokens' activations, all if n is None."
        runs, n = self._runs(site, max(self.n, 1), "load"), self.n if n is None else n
        if not 0 <= n <= self.n: raise ValueError(f"load: n={n}, expected 0 to {self.n}")
        out = torch.empty(n, self.sites[site])
        _fill(out, torch.arange(n), runs[::-1], lambda *run: self._read(site, *run))
        return out

    def batches(self, site: str,
                size: int,                         # rows a batch; the last of an epoch may be smaller
                seed: int = 0,
                hold: int = 65_536,                # rows in memory, among which a batch is drawn
                epochs: int = 1,                   # each gives every row once
                dtype=torch.float32):
        "Shuffled batches [size, d]: short runs of rows are read in random order into a buffer, which is shuffled, half given out, and filled again."
        runs = self._runs(site, max(1, min(256, hold // 32)), "batches")
        if not 1 <= size <= hold: raise ValueError(f"batches: expected 1 <= size <= hold, got size={size}, hold={hold}")
        return self._batches(site, runs, size, seeded(seed), hold, epochs, dtype)

    def _batches(self, site, runs, size, draw, hold, epochs, dtype):
        buffer = torch.empty(min(hold, self.n), self.sites[site], dtype=dtype)
        for _ in range(epochs):
            left, full, free = [runs[i] for i in torch.randperm(len(runs), generator=draw).tolist()], torch.arange(0), torch.arange(len(buffer))
            while left or len(full):
                full = torch.cat([full, _fill(buffer, free, left, lambda *run: self._read(site, *run))])
                full = full[torch.randperm(len(full), generator=draw)]
                give = max(1, len(full) // 2 // size) * size
                free, full = full[:give], full[give:]
                for some in free.split(size): yield buffer[some]

    def verify(self):
        "ValueError that names a shard whose file is not the one that was written."
        for i in range(len(self.shards)):
            if _sha256(_shard(self.folder, i)) != json.loads(_shard(self.folder, i, "json").read_text())["sha256"]:
                raise ValueError(f"verify: {_shard(self.folder, i).name} in {self.folder} is not what harvest wrote (its sha256 differs); remove it and call harvest again")


# %%
#| export activations
def _open_shard(folder, i, info):             # -> safe_open, number of tokens
    "A shard, whose header is checked against its json, the store and the file's size; ValueError if they do not agree."
    try:
        n, file = json.loads(_shard(folder, i, "json").read_text())["n"], safe_open(_shard(folder, i), "pt")
        want = {site: ([n, d], _DTYPES[getattr(torch, info["dtype"])]) for site, d in info["sites"].items()} | {name: ([n], "I32") for name in _COLUMNS}
        got = {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}
        if got != want: raise ValueError(f"expected {want}, got {got}")
    except Exception as e: raise ValueError(f"open_activations: {_shard(folder, i).name} in {folder} is damaged or cut short ({type(e).__name__}: {e}); remove it and call harvest again, which makes it anew") from e
    return file, n

def open_activations(folder, verify: bool = False) -> Activations:      # verify: compare all checksums, which reads everything
    "The activations in a folder, memory-mapped; ValueError if there are none, if the harvest is not finished, or if a file is damaged."
    folder = Path(folder)
    if not (folder / "activations.json").exists(): raise ValueError(f"open_activations: no activations in {folder}; harvest makes them")
    info = _info(folder, "open_activations")
    missing = [_shard(folder, i).name for i in range(info["shards"]) if not _done(folder, i)]
    if missing: raise ValueError(f"open_activations: {len(missing)} of {info['shards']} shards are missing in {folder}, the first is {missing[0]}; call harvest again, it goes on from there")
    store = Activations(folder, info, [_open_shard(folder, i, info) for i in range(info["shards"])])
    if (n := sum(n for _, n in store.shards)) != store.n: raise ValueError(f"open_activations: the shards in {folder} hold {n} tokens, expected {store.n}")
    if verify: store.verify()
    return store


# %% [markdown]
# **Files of ours and of other libraries**: `formats`.

# %%
#| export formats
import json, re
from contextlib import contextmanager
from functools import partial
from pathlib import Path
import torch
from codebook_tutorial.core import seeded
from codebook_tutorial.kmeans import finite
from codebook_tutorial.models import _WAYS_OUT, _names, _reach
from codebook_tutorial.sites import TRANSFORMER_LENS, from_transformer_lens, to_transformer_lens
from codebook_tutorial.sae import KINDS, TopK


# %%
#| export formats
# layout -> its files: (configuration,) weights
FILES = dict(ours=("sae.json", "sae_state.safetensors"), saelens=("cfg.json", "sae_weights.safetensors"), dictionary_learning=("config.json", "ae.pt"),
             sparsify=("cfg.json", "sae.safetensors"), gemma_scope=("params.npz",))

# layout -> their class -> our kind, {our tensor: theirs}; .T where theirs lies the other way
_ROWS = dict(W_enc="W_enc.T", W_dec="W_dec", b_enc="b_enc", b_dec="b_dec")
_LINEAR = dict(W_enc="encoder.weight", W_dec="decoder.weight.T", b_enc="encoder.bias", b_dec="b_dec")
_JUMP = dict(threshold="threshold")
TENSORS = {
    "saelens": {"standard": ("untied", _ROWS), "topk": ("topk", _ROWS), "jumprelu": ("jumprelu", _ROWS | _JUMP), "gated": ("gated", _ROWS | dict(b_enc="b_gate", r_mag="r_mag", b_mag="b_mag"))},
    "dictionary_learning": {
        "AutoEncoder": ("untied", _LINEAR | dict(b_dec="bias")), "AutoEncoderNew": ("untied", _LINEAR | dict(b_dec="decoder.bias")), "AutoEncoderTopK": ("topk", _LINEAR),
        "BatchTopKSAE": ("batchtopk", _LINEAR | _JUMP), "MatryoshkaBatchTopKSAE": ("matryoshka", _ROWS | _JUMP), "JumpReluAutoEncoder": ("jumprelu", _ROWS | _JUMP),
        "GatedAutoEncoder": ("gated", _LINEAR | dict(b_enc="gate_bias", b_dec="decoder_bias", r_mag="r_mag", b_mag="mag_bias"))},
    "sparsify": {"topk": ("topk", _LINEAR | dict(W_dec="W_dec"))},
    "gemma_scope": {"jumprelu": ("jumprelu", _ROWS | _JUMP)},
}
_NO_BIAS_FIRST = ("AutoEncoderNew", "JumpReluAutoEncoder")             # dictionary_learning's that do not subtract b_dec before they encode

# layout -> our kind -> their class that can hold it
WRITES = {
    "saelens": dict(tied="standard", untied="standard", topk="topk", batchtopk="jumprelu", matryoshka="jumprelu", jumprelu="jumprelu", gated="gated"),
    "dictionary_learning": dict(tied="AutoEncoder", untied="AutoEncoder", topk="AutoEncoderTopK", batchtopk="BatchTopKSAE", matryoshka="MatryoshkaBatchTopKSAE",
                                jumprelu="JumpReluAutoEncoder", gated="GatedAutoEncoder"),
    "sparsify": dict(topk="topk"),
}


# %%
#| export formats
def save_sae(sae, folder,
             site: str | None = None,         # where its activations come from: "resid.2"
             **meta):                         # what else to remember: anything that JSON holds
    "Write `sae_state.safetensors` and `sae.json`; `load_sae` gives the same autoencoder, bit for bit."
    from safetensors.torch import save_file
    _check(sae, "save_sae")
    try: head = _json(dict(format=1, config=sae.config, site=site, meta=meta))
    except (TypeError, ValueError) as e: raise ValueError(f"save_sae: {e}; expected only what JSON can hold in {', '.join(meta) or 'the settings'}") from e
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in sae.state_dict().items()}
    _write(folder, {"sae_state.safetensors": partial(save_file, tensors), "sae.json": head})

def export_sae(sae, folder,
               layout: str,                   # "saelens", "dictionary_learning" or "sparsify" (TopK only)
               site: str | None = None,       # "resid.2"
               model_name: str | None = None):
    "Write another library's own files, for it to load; a tied autoencoder goes as an untied one, and to SAELens the BatchTopK kinds as JumpReLU."
    from safetensors.torch import save_file
    _check(sae, "export_sae", layout, site)
    cls = WRITES[layout][sae.kind]
    kind, names = TENSORS[layout][cls]
    own = {name: t.detach().float().cpu() for name, t in (sae.state_dict() | {"W_enc": sae.W_enc}).items()}
    if kind == "jumprelu": own["threshold"] = own["threshold"].expand_as(own["b_enc"])
    if cls in _NO_BIAS_FIRST: own = _absorb(own, -1)
    tensors = {theirs.removesuffix(".T"): _turned(own[name], theirs).contiguous().clone() for name, theirs in names.items()}
    config, more = dict(saelens=_for_saelens, dictionary_learning=_for_dictionary_learning, sparsify=_for_sparsify)[layout](sae, cls, site, model_name)
    head, weights = FILES[layout]
    _write(folder, {weights: partial(torch.save if weights == "ae.pt" else save_file, tensors | more), head: _json(config)})

def _turned(t, theirs): return t.T if theirs.endswith(".T") else t
def _lies(theirs, shape): return list(shape)[::-1] if theirs.endswith(".T") else list(shape)
def _json(what): return json.dumps(what, indent=1) + "\n"


# %%
#| export formats
def _check(sae, call, layout=None, site=None):
    if type(sae) not in KINDS.values(): raise ValueError(f"{call}: got a {type(sae).__name__}; expected one of {', '.join(cls.__name__ for cls in KINDS.values())}")
    if sae.b_dec.dim() != 1: raise ValueError(f"{call}: got a stack of {len(sae.b_dec)} autoencoders; expected one of members(sae)")
    if call == "save_sae": return
    if layout not in WRITES: raise ValueError(f"{call}: layout={layout!r}; expected one of {', '.join(WRITES)}")
    if sae.kind not in WRITES[layout]: raise ValueError(f"{call}: {layout} holds {', '.join(WRITES[layout])} only, got kind {sae.kind!r}; expected layout {' or '.join(to for to in WRITES if sae.kind in WRITES[to])}")
    if site and not re.fullmatch(rf"({'|'.join(TRANSFORMER_LENS)})\.\d+", site): raise ValueError(f"{call}: site={site!r}; expected one like resid.2, of {', '.join(TRANSFORMER_LENS)}")
    if (least := getattr(sae, "threshold", torch.zeros(1)).min()) < 0: raise ValueError(f"{call}: a threshold is {least:.3g}; expected none below 0, for in {layout} nothing negative passes")

def _write(folder, files):                    # {name: its text, or fn(path)}, the configuration last
    "All files under names that nobody reads, then all renamed."
    (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
    for name, what in files.items(): (folder / f"{name}.part").write_text(what) if isinstance(what, str) else what(folder / f"{name}.part")
    for name in files: (folder / f"{name}.part").replace(folder / name)

# each: configuration, and tensors beside those of TENSORS
def _for_saelens(sae, cls, site, model_name):
    hook, top = to_transformer_lens(site) if site else None, dict(k=sae.k, rescale_acts_by_decoder_norm=False) if cls == "topk" else {}
    return dict(architecture=cls, d_in=sae.config["d_model"], d_sae=sae.config["n_feats"], dtype="float32", device="cpu", apply_b_dec_to_input=True, normalize_activations="none",
                reshape_activations="hook_z" if (hook or "").endswith("hook_z") else "none", metadata=dict(sae_lens_version="6.0.0", hook_name=hook, model_name=model_name), **top), {}

def _for_dictionary_learning(sae, cls, site, model_name):
    trainer = dict(dict_class=cls, activation_dim=sae.config["d_model"], dict_size=sae.config["n_feats"], lm_name=model_name, submodule_name=site, layer=int(site.split(".")[1]) if site else None)
    more = {"k": torch.tensor(sae.k, dtype=torch.int)} if isinstance(sae, TopK) else {}
    if cls == "AutoEncoderTopK": more["threshold"] = torch.tensor(-1.)                                # theirs, for another way to encode: -1 is "none learnt"
    if cls == "MatryoshkaBatchTopKSAE": more["group_sizes"] = torch.tensor(sorted({0, *sae.sizes, len(sae.b_enc)})).diff()
    return dict(trainer=trainer | ({"k": sae.k} if more else {}), buffer=dict(d_submodule=sae.config["d_model"], io="out")), more

def _for_sparsify(sae, cls, site, model_name):
    d, n = sae.config["d_model"], sae.config["n_feats"]
    return dict(activation=cls, expansion_factor=max(1, n // d), normalize_decoder=True, num_latents=n, k=sae.k, multi_topk=False, skip_connection=False, transcode=False, d_in=d), {}


# %%
#| export formats
def load_sae(name,                            # a folder, or owner/name on the Hub
             path: str = "",                  # the folder in it, or the weights' file
             revision: str | None = None):    # a branch, tag or commit of the Hub
    "An autoencoder in eval mode, float32, on the CPU, of whichever layout lies there; `.source`: layout, name, path, site where known, and the peer's config."
    folder, layout, path = _fetch(str(name), str(path).strip("/"), revision)
    at = "/".join(part for part in (str(name), path) if part)
    config, tensors = _config(folder, layout, at), _tensors(folder / FILES[layout][-1], at)
    try: sae = _build(at, tensors, **_READERS[layout](at, config, tensors))
    except (AttributeError, TypeError, RuntimeError) as e: raise ValueError(f"load_sae: {at}: its settings are none of {layout}'s ({e})") from e
    site = config.get("site") if layout == "ours" else _site(_meta(config).get("hook_name"))
    sae.source = dict(layout=layout, name=str(name), path=path, site=site, config=config)
    return sae.eval()

def _fetch(name, path, revision):             # -> folder on this machine, layout, path
    "Where an autoencoder's files lie; of a Hub repository only those are loaded."
    from huggingface_hub import hf_hub_download
    root = Path(name).expanduser()
    if root.is_file(): root, path = root.parent, root.name
    if root.is_dir():
        if revision: raise ValueError(f"load_sae: {name!r} is a folder and has no revision {revision!r}; expected a Hub id")
        return _local(root, path, name)
    if name.count("/") != 1 or name[0] in "./~": raise ValueError(f"load_sae: no folder {name!r}; expected one with an autoencoder, or owner/name on the Hub")
    with _asking(name, revision):
        info, cached = _reach(name, "model", revision)
        if cached: return _local(Path(cached), path, name)
        folder, layout = _find([f.rfilename for f in info.siblings], path, name)
        for file in FILES[layout]: got = hf_hub_download(name, f"{folder}/{file}".strip("/"), revision=revision)
    return Path(got).parent, layout, folder

def _local(root, path, name):
    folder, layout = _find([p.relative_to(root).as_posix() for p in root.rglob("*")], path, name)
    return root / folder, layout, folder


# %%
#| export formats
def _find(files, path, name):                 # the paths of all files there -> folder, layout
    "The one autoencoder at `path`, else the only one below it."
    known = {f: f.rpartition("/") for f in sorted(files) if any(f.rpartition("/")[2] in needs for needs in FILES.values())}
    found = {f: (folder, layout) for f, (folder, slash, file) in known.items() for layout, needs in FILES.items()
             if file == needs[-1] and all(f"{folder}{slash}{need}" in known for need in needs)}
    here = [f for f in found if path in (f, found[f][0])] or [f for f in found if f.startswith(f"{path}/" if path else "")]
    if len(here) == 1: return found[here[0]]
    place, some = name + (f" at {path}" if path else ""), here or list(known)
    listed = ", ".join(some[:20]) + (f" and {len(some) - 20} more" if len(some) > 20 else "")
    if here: raise ValueError(f"load_sae: {len(here)} autoencoders in {place}; expected path= one of {listed}")
    raise ValueError(f"load_sae: no autoencoder in {place}; expected {', or '.join(' and '.join(needs) for needs in FILES.values())}; of these there are {listed or 'none'}")

@contextmanager
def _asking(id, revision):
    "Turn what the Hub's library raises into an error that says the way out; our own pass as they are."
    try: yield
    except Exception as e:
        if str(e).startswith("load_sae: "): raise
        kind, says = next((kind, says) for raised, kind, says in _WAYS_OUT if raised & _names(e))
        raise kind("load_sae: " + says.format(name=id, id=id, revision=revision, known="autoencoders have none", near="", once=f"load_sae({id!r}, ...) or ", options=f" --revision {revision}" if revision else "",
                                              offline="a folder", detail=f"{type(e).__name__}: {' '.join(str(e).split())[:200]}", last="expected files of an autoencoder")) from e

def _config(folder, layout, at):
    if layout == "gemma_scope": return {}
    try: config = json.loads((folder / FILES[layout][0]).read_text())
    except ValueError as e: raise ValueError(f"load_sae: {FILES[layout][0]} of {at} is damaged or cut short ({e})") from e
    if not isinstance(config, dict): raise ValueError(f"load_sae: {FILES[layout][0]} of {at} holds a {type(config).__name__}; expected the settings of {layout}")
    return config


# %%
#| export formats
def _tensors(file, at):                       # -> {name: tensor}
    "What a weights file holds; a pickle is read as tensors alone, and no code of it is ever run."
    from safetensors.torch import load_file
    try: tensors = load_file(file) if file.suffix == ".safetensors" else _arrays(file) if file.suffix == ".npz" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:
        asks, says = re.search(r"GLOBAL (\S+)", str(e)), type(e).__name__ if "weights_only" in str(e) else f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"      # torch advises to run it
        why = f"is a pickle that wants to run {asks[1]}: refused, nothing of it was run" if asks else f"is damaged or cut short, or holds more than tensors, which are not run ({says}); copy it again, or load it anew with `hf download --force-download`"
        raise ValueError(f"load_sae: {file.name} of {at} {why}; expected plain tensors by name") from None
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()): raise ValueError(f"load_sae: {file.name} of {at} holds a {type(tensors).__name__}; expected plain tensors by name")
    return tensors

def _arrays(file):
    import numpy as np
    with np.load(file, allow_pickle=False) as arrays: return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

def _build(at, tensors, kind, names, d, n, settings, then=()):        # as a reader below found them; `then`: what makes their numbers ours
    "The autoencoder of our own class that computes the same."
    rows = names.get("W_dec", "W_dec")
    if d is None: n, d = _lies(rows, _shaped(at, tensors, rows).shape)
    for what, got in (dict(d_model=d, n_feats=n) | ({"k": settings.get("k")} if issubclass(KINDS[kind], TopK) else {})).items():
        if type(got) is not int or not 0 < got <= (n if what == "k" else got): raise ValueError(f"load_sae: {at}: {what} is {got!r}; expected a whole number from 1" + (f" to {n}" if what == "k" else ""))
    _shaped(at, tensors, rows, _lies(rows, (n, d)))                    # before memory is taken for what a configuration says
    sae = KINDS[kind](d, n, generator=seeded(0), **settings)
    want = {theirs.removesuffix(".T"): _lies(theirs, t.shape) for name, t in sae.state_dict().items() for theirs in [names.get(name, name)]}
    for name in sorted(want.keys() | tensors.keys()): finite(_shaped(at, tensors, name, want.get(name, "no such tensor")), f"load_sae: {at}: tensor {name}")
    own = {name: _turned(tensors[theirs.removesuffix(".T")], theirs).detach().float() for name, theirs in names.items()}
    for mend in then: own = mend(own)
    sae.load_state_dict(own)
    return sae


# %%
#| export formats
def _shaped(at, tensors, name, want=None):    # a shape; None: any matrix
    "A tensor by name; ValueError where it is missing or has another shape."
    name = name.removesuffix(".T")
    got = list(tensors[name].shape) if name in tensors else None
    if got is None or (len(got) != 2 if want is None else got != want): raise ValueError(f"load_sae: {at}: tensor {name} has shape {'none: it is missing' if got is None else got}; expected {'a matrix' if want is None else want}")
    return tensors[name]

def _positive(own):                           # theirs is ReLU(pre) where pre > threshold, ours pre
    return own | {"threshold": own["threshold"].clamp(min=0)} if "threshold" in own else own

def _absorb(own, sign=1):
    "Biases of the encoder for x - b_dec from those for x, or back (-1)."
    moved = sign * (own["W_enc"].double() @ own["b_dec"].double())
    own = own | {"b_enc": (own["b_enc"] + moved).float()}
    return own | {"b_mag": (own["b_mag"] + own["r_mag"].double().exp() * moved).float()} if "b_mag" in own else own

def _fold(own):
    "Features measured by pre * |row of W_dec|: an encoder longer by it, and unit rows."
    norm = own["W_dec"].norm(dim=-1).clamp(min=1e-30)
    return own | dict(W_enc=own["W_enc"] * norm[:, None], b_enc=own["b_enc"] * norm, W_dec=own["W_dec"] / norm[:, None])

def _only(at, option, got, *can):
    if got not in can: raise ValueError(f"load_sae: {at}: {option} is {got!r}, which cannot be loaded as it is; expected {' or '.join(map(repr, can))}")

def _found(at, layout, option, cls, d, n, subtracts=True, then=(), **settings):
    _only(at, option, cls, *TENSORS[layout])
    kind, names = TENSORS[layout][cls]
    settings = {name: settings[name] for name in dict(topk=["k"], batchtopk=["k"], matryoshka=["k", "shares"]).get(kind, ())}
    return dict(kind=kind, names=names, d=d, n=n, settings=settings, then=[_positive] + [_absorb] * (not subtracts) + list(then))


# %%
#| export formats
def _ours(at, config, tensors):
    _only(at, "format", config.get("format"), 1)
    settings = dict(config.get("config") or {})
    _only(at, "kind", kind := settings.pop("kind", None), *KINDS)
    return dict(kind=kind, names={name: name for name in tensors}, d=settings.pop("d_model", 0), n=settings.pop("n_feats", 0), settings=settings)

def _meta(config): return config.get("metadata") or config              # before SAELens 6 all lay together

def _saelens(at, config, tensors):
    meta, cls, fn = _meta(config), config.get("architecture") or "standard", config.get("activation_fn") or config.get("activation_fn_str") or "relu"
    if (cls, fn) == ("standard", "topk"): cls = "topk"
    rescale, before = bool(config.get("rescale_acts_by_decoder_norm")), config.get("apply_b_dec_to_input", True)
    _only(at, "activation_fn", fn, "relu", *["topk"] * (cls == "topk"))
    _only(at, "normalize_activations", config.get("normalize_activations"), "none", None, False)
    _only(at, "reshape_activations", config.get("reshape_activations"), "none", "hook_z", None)                  # heads.L lies flat already
    _only(at, "hook_name_out", meta.get("hook_name_out"), None, meta.get("hook_name"))
    _only(at, "rescale_acts_by_decoder_norm", rescale, False, cls == "topk")
    _only(at, "scaling_factor, all 1,", bool((tensors.pop("scaling_factor", torch.ones(1)) == 1).all()), True)
    k = config.get("k") or (config.get("activation_fn_kwargs") or {}).get("k")
    return _found(at, "saelens", "architecture", cls, config.get("d_in", 0), config.get("d_sae", 0), before, [_fold] * rescale, k=k)

def _dictionary_learning(at, config, tensors):
    trainer, k, groups = config.get("trainer") or {}, tensors.pop("k", None), tensors.pop("group_sizes", torch.ones(1))
    k = trainer.get("k") if k is None else int(k)
    _only(at, "buffer.io", (config.get("buffer") or {}).get("io"), None, "in", "out")
    _only(at, "trainer.k", trainer.get("k"), None, k)
    if (cls := trainer.get("dict_class")) == "AutoEncoderTopK": tensors.pop("threshold", None)
    return _found(at, "dictionary_learning", "trainer.dict_class", cls, trainer.get("activation_dim"), trainer.get("dict_size"), cls not in _NO_BIAS_FIRST,
                  k=k, shares=(groups.cumsum(0) / groups.sum()).tolist())


# %%
#| export formats
def _sparsify(at, config, tensors):
    plain = {"activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "d_in"}
    for option in config.keys() - plain: _only(at, option, config[option], False, None)                # skip_connection, transcode, signed
    n = config.get("num_latents") or (config.get("d_in") or 0) * config.get("expansion_factor", 32)
    return _found(at, "sparsify", "activation", config.get("activation", "topk"), config.get("d_in", 0), n, k=config.get("k"))

def _gemma_scope(at, config, tensors):
    if "transcoder" in at.lower(): raise ValueError(f"load_sae: {at} is a transcoder, which decodes another site than it encodes; expected an autoencoder")
    return _found(at, "gemma_scope", "", "jumprelu", None, None, subtracts=False)

_READERS = dict(ours=_ours, saelens=_saelens, dictionary_learning=_dictionary_learning, sparsify=_sparsify, gemma_scope=_gemma_scope)

def _site(hook):
    "Our name for TransformerLens' hook, None where there is none; what goes in to a block is what came out of the one before."
    if before := re.fullmatch(r"blocks\.([1-9]\d*)\.hook_resid_pre", hook or ""): return f"resid.{int(before[1]) - 1}"
    try: return from_transformer_lens(hook or "")
    except ValueError: return None

# the penalty's weight beside the printed equation's; SAELens 6.54 and dictionary_learning 0.1 also take the sum over d and the mean over rows (and weight |f| by the rows' lengths in W_dec: 1)
ALPHA_UNITS = dict(equation=lambda d: 1., paper_code=lambda d: 1 / d, saelens=lambda d: 1., dictionary_learning=lambda d: 1.)

def convert_alpha(alpha: float, d_model: int,
                  begin: str = "equation",    # |x - x^|^2 + alpha |f|_1, mean over rows; "paper_code": the mean over d too; "saelens", "dictionary_learning": as the equation
                  end: str = "equation",
                  scale: float = 1.) -> float:        # `alpha` was for activations divided by this, as both libraries can do before training; the result is for activations as they are
    "The weight of the L1 penalty in other units: 8.6e-4 in the paper's code at d = 512 is 0.44 in its equation."
    for units in (begin, end):
        if units not in ALPHA_UNITS: raise ValueError(f"convert_alpha: units {units!r}; expected one of {', '.join(ALPHA_UNITS)}")
    return alpha * scale * ALPHA_UNITS[end](d_model) / ALPHA_UNITS[begin](d_model)

