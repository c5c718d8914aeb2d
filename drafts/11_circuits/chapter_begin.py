# %% [markdown]
# # 11 Circuits
#
# > What does one feature read, write, and listen to in the layer before?
#
# [![Open in Colab](images/colab.svg)](https://colab.research.google.com/github/codebook-tutorial/codebook_tutorial/blob/main/nbs/11_circuits.ipynb) | needs: 07, 09, 10 | about 1 CPU minute | exports `circuits`

# %%
#| default_exp circuits

# %% [markdown]
# ## By the end you can
#
# - **read** a feature by the words it is active at, range by range of its activation, and see where its meaning ends;
# - **take it out** of a state, leaving everything else where it was, and read off every logit what the model lost;
# - **trace** it back: which features of the layers before it rests on, as a graph whose edges are measured effects;
# - **test** such a graph: does the behaviour break without it, and not without as many others, just as active, taken out as hard?

# %% [markdown]
# ## Why care?
#
# *She ate bread (and a little custard* ... and the model closes the parenthesis. It has to remember, word after word, that one is open. Below is what happens to the closing parenthesis when a handful of features are taken out in the two layers before the last: those that one feature of the last layer rests on, or as many others that are active at the same words, with edits of the same length.

# %% [markdown]
# ## Setup

# %%
#| colab
import sys
if "google.colab" in sys.modules:
    # %pip install -q git+https://github.com/codebook-tutorial/codebook_tutorial@main

# %%
import tempfile
from collections import Counter
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, torch
from codebook_tutorial import show
from codebook_tutorial.activations import harvest
from codebook_tutorial.codebook import CodebookModel
from codebook_tutorial.core import FAST, claim, data_path, seeded, set_seed
from codebook_tutorial.formats import load_sae
from codebook_tutorial.models import load_lm, load_text
from codebook_tutorial.sae import refit, train_sae
from codebook_tutorial.sites import capture, intervene
from codebook_tutorial.stories import ID, needs_stories

# %%
set_seed(); show.style()
model, tok = load_lm()
STORIES = needs_stories(tok)
SITES = [f"resid.{i}" for i in range(model.config.num_hidden_layers)][-3:]

# %% [markdown]
# A dictionary for every layer: the shipped autoencoder for the middle one, two trained here, in a few seconds each. The text is cut in two: features and contexts are chosen on the first half, and what is claimed is measured on the second.

# %%
text = load_text(tok, n_tokens=120_000 if FAST else 2_000_000, length=256, split="train" if STORIES else None, seed=3)
first, second = text.split(.5)
with tempfile.TemporaryDirectory() as folder:
    store = harvest(model, text, SITES, Path(folder) / "acts", verbose=False)
    def trained(site): return refit(train_sae(store.load(site), 4 * store.load(site).shape[1], "tied", alpha=.75, steps=800), store.load(site)).to(model.device)
    DICTS = {site: load_sae(data_path("sae/tied")).to(model.device) if STORIES and site == "resid.1" else trained(site) for site in SITES}

# %% [markdown]
# Which feature of the last layer? The one that best says that `)` comes next (F1 on the first half of the text, when it counts as on above half of its maximum):

# %%
def best_feature(site, truth):
    "Of one site, the feature whose strong half fits a truth [rows, length] best on the first half of the text; its F1 there and on the second half."
    acts = feature_acts(model, site, DICTS[site], text, range(len(DICTS[site].directions)))
    n, scores = len(first), []
    strong = (acts >= .5 * acts[:n].flatten(0, 1).amax(0)) & (acts > 0)
    f1 = lambda some, true: 2 * (some & true[..., None]).sum((0, 1)) / (some.sum((0, 1)) + true.sum()).clamp(min=1)
    j = int(f1(strong[:n], truth[:n]).argmax())
    return j, f1(strong[:n], truth[:n])[j].item(), f1(strong[n:], truth[n:])[j].item(), acts[..., j]
