"""Autoencoders pushed to a Hub, their cards, and from_pretrained; a card's own code is run."""

import os
import re
import subprocess
import sys

import pytest
import torch
from test_formats import D, N, X, random_sae, same

from codebook_tutorial.dictionary.formats import save_sae
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.layouts import FILES
from codebook_tutorial.dictionary.sae import SAE, Tied, TopK
from codebook_tutorial.dictionary.share import card_row, push_saes, sae_card
from codebook_tutorial.score.metrics import measure


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_is_load_sae_of_this_class(kind, tmp_path):
    sae = random_sae(kind)
    save_sae(sae, tmp_path / "one", site="resid.2")
    for cls in (SAE, type(sae)):
        again = cls.from_pretrained(tmp_path, "one")
        same(sae, again)
        assert type(again) is type(sae) and again.source["site"] == "resid.2"
    other = Tied if kind != "tied" else TopK
    with pytest.raises(
        ValueError, match=f"one is a {type(sae).__name__}; expected a {other.__name__}"
    ):
        other.from_pretrained(tmp_path, "one")


def test_a_card_says_what_a_reader_needs():
    sae = random_sae("topk")
    found = measure(sae, X) | dict(recovered_zero=0.98765)
    row = card_row(sae, "resid.2", "resid.2", measures=found)
    card = sae_card([row], "me/saes", model_name="owner/lm", layout="saelens", data="ten stories")
    head, body = card.split("---\n")[1:3]
    assert set(head.splitlines()) == {
        "library_name: codebook_tutorial",
        "tags: [sparse-autoencoder, interpretability]",
        "base_model: owner/lm",
    }
    for says in (
        "# Sparse autoencoder of owner/lm\n",
        "Trained on ten stories",
        "`blocks.2.hook_resid_post`",
        f"| topk | {D} | {N} | 5 | 5.0000 |",
        "| 0.9877 |",
        "- l0: active features per token\n",
        'load_sae("me/saes", "resid.2")',
        'SAE.from_pretrained("me/saes", "resid.2")',
    ):
        assert says in body, body
    assert "density" not in card  # a tensor is no cell


def test_a_card_without_a_model_or_site_still_loads():
    card = sae_card([card_row(random_sae("tied"), "", None)], "me/one")
    assert "base_model" not in card and "load_lm" not in card and " k |" not in card
    card = sae_card([card_row(random_sae("topk"), "", None)], "me/one", layout="sparsify")
    assert 'SparseCoder.load_from_hub("me/one")' in card
    assert "not named" in card and 'load_sae("me/one")' in card


def test_a_transcoders_card_names_both_sites():
    "A class of its own, with d_out in its settings, is told from them alone."

    class Transcoder(SAE):
        kind = "transcoder"

    sae = Transcoder(D, N, d_out=24)
    row = card_row(sae, "mlp.1", "mlp.1", writes="resid.1")
    card = sae_card([row], "me/saes", model_name="stories")
    assert "# Transcoder of stories\n" in card and "tags: [transcoder, " in card
    assert "| transcoder | 16 | 24 | 40 |" in card and "base_model" not in card
    assert "`blocks.1.hook_mlp_out` | `resid.1` | `blocks.1.hook_resid_post`" in card


@pytest.mark.parametrize("path", ["../up", "a/../../b"])
def test_no_folder_outside_the_repository(path):
    with pytest.raises(ValueError, match="expected a folder of the repository"):
        random_sae("topk").push_to_hub("me/saes", path_in_repo=path)


def test_what_cannot_be_written_is_refused_before_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    with pytest.raises(ValueError, match="sparsify holds topk only"):
        random_sae("gated").push_to_hub("me/saes", "resid.1", layout="sparsify")
    with pytest.raises(ValueError, match="expected only what JSON can hold"):
        random_sae("gated").push_to_hub("me/saes", "resid.1", note=torch.zeros(1))
    with pytest.raises(ValueError, match="got no autoencoder"):
        push_saes({}, "me/saes")


PUSH = """
import sys
sys.path[:0] = sys.argv[1:]
from codebook_tutorial.dictionary.kinds import JumpReLU
from test_share import SAE, TopK, push_saes, random_sae, same
how = dict(model_name="stories", token="hf_secret")
topk, gated = random_sae("topk"), random_sae("gated", seed=2)
print(topk.push_to_hub("tests/one", "resid.1", measures={"fvu": 0.25}, alpha=0.5, **how))
again = TopK.from_pretrained("tests/one")
same(topk, again)
print(again.source["site"], again.source["config"]["meta"])
again.push_to_hub("tests/many", path_in_repo="resid.1", **how)  # the site is in the file
print(push_saes({"resid.1": topk, "mlp.1": gated}, "peers", layout="saelens", unit=False,
                measures={"mlp.1": {"l0": 3.5}}, **how))
push_saes({"resid.1": topk}, "tests/sparsify", layout="sparsify", **how)
for name, path, sae in (("tests/many", "resid.1", topk), ("me/peers", "mlp.1", gated),
                        ("me/peers", "resid.1", topk), ("tests/sparsify", "layers.1", topk)):
    same(sae, SAE.from_pretrained(name, path))
batch = random_sae("batchtopk")
batch.push_to_hub("tests/jump", "resid.1", layout="saelens", **how)
same(batch, JumpReLU.from_pretrained("tests/jump"))
try: TopK.from_pretrained("tests/jump")
except ValueError as e: print(e)
"""


def client(hub, home, code, *args):
    "Lines that a process prints whose Hub is `hub`; the token is in none of them."
    got = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *args],
        capture_output=True,
        text=True,
        env=hub.env(home, PYTHONPATH=os.pathsep.join(sys.path)),
        timeout=300,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    assert "hf_secret" not in got.stdout + got.stderr
    return got.stdout.splitlines()


def pushed(hub, name):
    repo = hub.repos["model", name]
    return repo["commits"][repo["refs"]["main"]]


def of_card(files):
    "The card of a repository, and its own code for small autoencoders beside a wider model."
    card = next(files[path] for path in files if path.endswith("README.md")).decode()
    assert "hf_secret" not in card
    code = re.search(r"```python\n(from codebook_tutorial.*?)```", card, re.S)[1]
    code = code.replace('features = sae.encode(acts["resid.1"])', "x = acts['resid.1']")
    code += f"\nassert x.shape[-1] == 96 and sae.encode(x[..., :{D}]).shape[-1] == {N}"
    return card, code


def test_pushed_and_loaded_through_a_hub(tmp_path):
    from helpers.hub import Hub

    ours, peers = FILES["ours"], FILES["saelens"]
    with Hub() as hub:
        assert client(hub, tmp_path / "home", PUSH, os.path.dirname(__file__)) == [
            f"{hub.url}/tests/one",
            "resid.1 {'alpha': 0.5, 'model_name': 'stories'}",
            f"{hub.url}/me/peers",
            "TopK.from_pretrained: tests/jump is a JumpReLU; expected a TopK, or call "
            "JumpReLU.from_pretrained",
        ]
        assert set(pushed(hub, "tests/one")) == {"README.md", *ours}
        in_folder = {f"resid.1/{file}" for file in ("README.md", *ours)}
        assert set(pushed(hub, "tests/many")) == in_folder
        folders = {f"{site}/{file}" for site in ("resid.1", "mlp.1") for file in peers}
        assert set(pushed(hub, "me/peers")) == {"README.md"} | folders
        sparse = {f"layers.1/{file}" for file in FILES["sparsify"]}
        assert set(pushed(hub, "tests/sparsify")) == {"README.md"} | sparse
        card, _ = of_card(pushed(hub, "me/peers"))
        assert "# Sparse autoencoders of stories\n" in card and "| 3.5000 |" in card
        for name in ("tests/one", "me/peers", "tests/many"):
            client(hub, tmp_path / "home", of_card(pushed(hub, name))[1])
