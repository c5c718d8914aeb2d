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
# *She ate bread (and a little custard* ... and the model closes the parenthesis. It has to remember, word after word, that one is open. Chapter 10 found *which* features carry an answer at one place. Here is what happens to the closing parenthesis when the features are taken out that one single feature of the last layer rests on, in the two layers before; and when as many others are, that are active at the same words:

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
SITES = [f"resid.{i}" for i in range(model.config.num_hidden_layers)][:3]

# %% [markdown]
# A dictionary for every layer: the shipped autoencoder for the middle one, two trained here, in a few seconds each.
