"""A real pretrained language model on real text:
codebooks that begin from data lose some loss, 100 steps of finetuning win most of it back."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.model.sites import capture, intervene, sites

SHARED = Path(os.environ.get("COURSE_SHARED") or Path(__file__).resolve().parents[2] / "shared")
MODEL = Path(os.environ.get("COURSE_MODEL") or SHARED / "models" / "stories260K")
TEXT = SHARED / "text" / "tinystories.json"
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODEL.exists() and TEXT.exists()),
        reason=f"no real model and text at {MODEL} and {TEXT}; set COURSE_SHARED",
    ),
]


@pytest.fixture(scope="module")
def text():
    "Token ids [documents, 128] of the real text, cut to one length; the last 64 are held out."
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(MODEL)
    start = [tok.bos_token_id] if tok.bos_token_id is not None else []
    ids = [
        start + tok(story, add_special_tokens=False)["input_ids"]
        for story in json.loads(TEXT.read_text())
    ]
    rows = torch.tensor([i[:128] for i in ids if len(i) >= 128])
    assert len(rows) > 300
    return rows[:-64], rows[-64:]


def load():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@torch.no_grad()
def loss_of(model, ids):
    return sum(model(input_ids=part, labels=part).loss.item() for part in ids.split(16)) / len(
        ids.split(16)
    )


def finetune(cb, train, steps=100, *, batch=8):
    """Language-model loss + reconstruction loss.

    Every weight by AdamW, the codes by moving averages."""
    opt = torch.optim.AdamW(cb.param_groups(lr=1e-3))
    cb.train()
    for _ in range(steps):
        ids = train[torch.randint(len(train), (batch,), generator=finetune.draw)]
        loss = cb(input_ids=ids, labels=ids).loss + 0.02 * cb.recon_loss()
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(cb.parameters(), 1.0)
        opt.step()
        cb.ema_step()
    return cb.eval()


def test_codebooks_on_a_real_language_model(text, tmp_path):
    train, held_out = text
    model, finetune.draw = load(), seeded(0)
    own = loss_of(model, held_out)
    cb = add_codebooks(
        model,
        ["heads.*", "mlp.*"],
        n_codes=256,
        k=4,
        select="residual",
        learn="ema",
        commitment=0.25,
    ).eval()
    random = loss_of(cb, held_out)
    cb.init_from_data([train[:100]], generator=seeded(0))
    untrained = loss_of(cb, held_out)
    cb.reset_counts()
    trained = loss_of(finetune(cb, train), held_out)
    print(
        f"\nheld-out loss: own {own:.3f}, random codes {random:.3f}, codes from data "
        f"{untrained:.3f}, after 100 steps {trained:.3f}"
    )
    assert own < trained < untrained < random
    assert trained - own < 0.75 * (untrained - own)  # wins back a good part, does not merely differ
    assert cb.dead_share() < 0.2
    cb.save_pretrained(tmp_path)
    again = CodebookModel.from_pretrained(tmp_path)
    assert torch.equal(again(held_out[:4]).logits, cb(held_out[:4]).logits)


def test_generation_under_codebooks_and_interventions(text):
    _, held_out = text
    cb = (
        add_codebooks(load(), "mlp.*", n_codes=64)
        .eval()
        .init_from_data(text[0][:40], generator=seeded(0))
    )
    prompt = held_out[:2, :8]

    def fn(ids):
        ids[:] = 3
        return ids

    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)
    plain = cb.generate(prompt, **options)
    with cb.edit_codes({"mlp.1": fn}), capture(cb, "mlp.1") as acts:
        edited = cb.generate(prompt, **options)
    assert acts["mlp.1"].shape[1] == 8 + 12 - 1
    assert torch.allclose(
        acts["mlp.1"], cb.codebooks["mlp.1"].weight[0, 3].expand_as(acts["mlp.1"]), atol=1e-6
    )  # what flows on is the code that was written
    assert not torch.equal(plain, edited)
    assert torch.equal(plain, cb.generate(prompt, **options))


def test_sites_on_the_real_model(text):
    model, ids = load(), text[1][:2]
    before = model(ids).logits
    with intervene(model, {s: (lambda x: x.clone()) for s in sites(model)}):
        assert torch.equal(model(ids).logits, before)
    with capture(model, "*") as acts, torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(acts["resid.0"], hidden[1])


def run_chapter(stem, tmp_path, timeout=900):
    """A chapter unchanged, under COURSE_MODEL and COURSE_TEXT:
    (its claims, the executed notebook's text)."""
    root = Path(__file__).resolve().parents[1]
    code = f"""
import asyncio, pathlib, sys
sys.path.insert(0, {str(root)!r})
from workshop import books
books.OUT = pathlib.Path({str(tmp_path)!r})
path = pathlib.Path({str(root / "nbs" / f"{stem}.ipynb")!r})
nb, failure, *_ = asyncio.run(books.execute(path))
books.write_book(books.OUT / "done.ipynb", nb)
sys.exit(failure or 0)
"""
    got = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "COURSE_MODEL": str(MODEL), "COURSE_TEXT": str(TEXT), "COURSE_FULL": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert got.returncode == 0, got.stderr[-3000:]
    claims = tmp_path / "claims" / f"{stem[:2]}.json"
    return json.loads(claims.read_text()) if claims.exists() else {}, (
        tmp_path / "done.ipynb"
    ).read_text()


def test_the_stories_chapter_runs_on_the_real_model(tmp_path):
    "Its loss is that of the real model, cells that need the stories say so."
    found, printed = run_chapter("04_stories", tmp_path)
    assert found["stories.loss"]["value"] <= 1.52 < 2 < found["stories.loss"]["control"]
    assert (
        printed.count("skipped: this cell scores facts that only the stories record") >= 6
        and "stories.ioi_accuracy" not in found
    )


def test_the_finetuning_chapter_runs_on_the_real_model(tmp_path):
    "A short run of every form: residual codes cost least, broken codes most."
    found, _ = run_chapter("05_finetune", tmp_path)
    gap, single, top8, dead = (
        found[f"finetune.{n}"] for n in ("loss_gap", "gap_single", "gap_top8", "dead_share")
    )
    own = gap["context"]["control's loss"]
    print(
        f"\nreal model: control {own:.3f} nats; residual codes cost {gap['value']:.3f} more, one "
        f"code {single['value']:.1%}, the 8 best cosines {top8['value']:.1%}; dead codes "
        f"{dead['value']:.3f}"
    )
    assert (
        0 < gap["value"] < top8["value"] * own
        and gap["value"] < 0.5 * gap["control"]
        and "finetune.ioi_accuracy" not in found
    )


def test_names_after_named_have_codes_on_the_real_model(tmp_path):
    """Finetune, index, search, browse:
    the best code for what follows 'named', chosen on one half, is far more precise on the other
    than always firing."""
    from codebook_tutorial.dictionary.finetune import finetune as train_codes
    from codebook_tutorial.feature.indexing import build_index
    from codebook_tutorial.feature.search import nearest_features
    from codebook_tutorial.model.hub import load_lm
    from codebook_tutorial.model.run import lm_loss
    from codebook_tutorial.model.text import load_text
    from codebook_tutorial.show.browser import browse, export_browser

    model, tok = load_lm(MODEL)
    train, held_out = load_text(tok, TEXT, n_tokens=160_000, length=256).split(0.6)
    own = lm_loss(model, held_out[:40])
    cb = add_codebooks(
        model, ["heads.*", "mlp.*"], 256, select="euclidean", learn="ema", commitment=0.25
    ).init_from_data(train.ids[:60], generator=seeded(0), pad=train.pad)
    begun = lm_loss(cb, held_out[:40])
    train_codes(cb, train, steps=50)
    trained = lm_loss(cb, held_out[:40])
    index = build_index(cb, tok, held_out, folder=tmp_path / "index")
    marked, line = index.mark(r"named (\w+)"), index.best(r"named (\w+)", min_recall=0.1)[0]
    always = marked.sum().item() / index.mask.sum()
    print(
        f"\nreal model: loss {own:.3f}, with codes {begun:.3f}, finetuned {trained:.3f}; names "
        f"after 'named': {line['site']} code {line['feature']}, precision {line['precision']:.2f}, "
        f"recall {line['recall']:.2f} (always firing: {always:.4f})"
    )
    assert own < trained < begun - 0.2 * (begun - own) and marked.sum() > 50
    assert line["precision"] > 20 * always and line["recall"] > 0.05
    assert len(
        nearest_features(cb.codebooks[line["site"]], line["feature"])
    ) == 5 and "[1]" in repr(index.contexts(line["site"], line["feature"], n=3))
    assert (
        export_browser(index, tmp_path / "codes.html", patterns=[r"named (\w+)"]).stat().st_size
        > 100_000
        and len(browse(index, r"named (\w+)").children) == 6
    )


def test_the_codes_chapter_runs_on_the_real_model(tmp_path):
    "Index, search, contexts and browser; what needs the stories' facts is left out."
    found, printed = run_chapter("06_codes", tmp_path)
    assert not found and "features)" in printed and "VBox(children" in printed


@pytest.mark.nightly
def test_the_autoencoder_chapter_runs_on_the_real_model(tmp_path):
    """Harvest, sweep, controls, substitution, export:
    an autoencoder of real states explains more than random directions, and two seeds agree more
    than chance."""
    found, printed = run_chapter("07_sae", tmp_path)
    overlap = found["sae.seed_overlap"]
    print(
        f"\nreal model: two seeds' features agree by {overlap['value']:.3f} (random "
        f"{overlap['control']:.3f})"
    )
    assert (
        set(found) == {"sae.interop_error", "sae.seed_overlap"}
        and found["sae.interop_error"]["value"] < 1e-5
    )
    assert (
        overlap["value"] > overlap["control"] + 0.1
        and "The same features, three decoders" in printed
    )


def test_the_baselines_chapter_runs_on_the_real_model(tmp_path):
    "Every method as a dictionary of real states; what needs the stories' facts is left out."
    found, printed = run_chapter("08_baselines", tmp_path)
    assert (
        not found
        and "Unexplained with" in printed
        and "expected activations of at least 0" in printed
    )


@pytest.mark.nightly
def test_the_autointerpretation_chapter_runs_on_the_real_model(tmp_path):
    """Every method explained by spelling and words; what needs the stories' facts is left out.

    The ruler is straight here, too."""
    found, printed = run_chapter("09_autointerp", tmp_path)
    assert (
        set(found) == {"autointerp.perfect_simulator"}
        and "Differences of means" in printed
        and "what has none" in printed
    )


@pytest.mark.nightly
def test_the_patching_chapter_runs_on_the_real_model(tmp_path):
    """Who gets the gift is more than it can do:
    the chapter says so, and goes on with a task that it can."""
    found, printed = run_chapter("10_ioi", tmp_path)
    passes = found["ioi.forward_passes"]
    print(
        f"\nreal model: 8 features ordered in {passes['value']:.0f} passes; greedy leaves KL "
        f"{passes['context']['16 tried, KL with 4 (fixed names)']:.2f} with 4"
    )
    assert (
        set(found) == {"ioi.forward_passes"}
        and "task 'copying'" in printed
        and "there is no behaviour here" in printed
    )


@pytest.mark.nightly
def test_the_circuits_chapter_runs_on_the_real_model(tmp_path):
    """Two frequent tokens that it is surest of, the trees of their features, and the check.

    What needs the stories is left out."""
    found, printed = run_chapter("11_circuits", tmp_path)
    tree = found["circuits.tree_effect"]
    print(
        f"\nreal model: share of the right token's probability lost without what a feature rests "
        f"on {tree['value']:.2f}, as many others {tree['control']:.2f}"
    )
    assert (
        set(found) == {"circuits.preactivation_after_ablation", "circuits.tree_effect"}
        and tree["value"] > tree["control"]
        and "Nearest by direction" in printed
        and "resid.4 / " in printed
    )


def test_the_steering_chapter_runs_on_the_real_model(tmp_path):
    """Groups of frequent words stand in for topics: the functions run, the figures mean little.

    What needs the stories is left out."""
    found, printed = run_chapter("12_steering", tmp_path)
    assert (
        not found
        and "A vector at every position" in printed
        and "The same places, other edits" in printed
        and "group 0" in printed
    )


def test_the_scoreboard_chapter_runs_on_the_real_model(tmp_path):
    """What can be asked of any model is asked: error, loss, explanations, patching.

    Known concepts are the stories' alone."""
    found, printed = run_chapter("13_scoreboard", tmp_path)
    assert (
        not found
        and "no concepts known" in printed
        and "explained" in printed
        and "patched" in printed
    )


def test_the_scale_chapter_runs_on_the_real_model(tmp_path):
    "Counts, prices and memory are asked of any model; changed stories of the stories alone."
    found, printed = run_chapter("14_scale", tmp_path)
    assert (
        found["scale.codebook_overhead"]["value"] > 0
        and "scale.prediction_error" in found
        and "One word before, exchanged\\n" not in printed
    )


def explained(d, x, words, *, explainer):
    from codebook_tutorial.feature.explain.protocol import make_cases, some_features
    from codebook_tutorial.feature.explain.scores import interpret

    f, ids = some_features(d, x, 60)
    cases = make_cases(f, words, ids)
    return cases, interpret(cases, explainer)


def test_features_of_the_real_model_have_explanations_and_pages(tmp_path):
    """Words of real text: an autoencoder's features are explained better than random directions.

    As an explainer the model itself is too short-sighted, and is told so."""
    from codebook_tutorial.dictionary.base import random_directions
    from codebook_tutorial.dictionary.harvest import harvest
    from codebook_tutorial.dictionary.train import train_sae
    from codebook_tutorial.feature.explain.local import LocalLMExplainer
    from codebook_tutorial.feature.explain.protocol import fragments, pieces
    from codebook_tutorial.feature.explain.rules import PredicateExplainer
    from codebook_tutorial.feature.explain.scores import difference, summary
    from codebook_tutorial.model.hub import load_lm
    from codebook_tutorial.model.text import load_text
    from codebook_tutorial.show.features import export_features

    model, tok = load_lm(MODEL)
    text = fragments(load_text(tok, TEXT, n_tokens=160_000, length=256))
    words, site = pieces(text, tok), f"resid.{model.config.num_hidden_layers // 2}"
    x = harvest(model, text, site, folder=tmp_path / "states", verbose=False).load(site)
    sae, explainer, scores = train_sae(x, 128, "topk", k=8, steps=400), PredicateExplainer(), {}
    random = random_directions(128, x.shape[1], seed=100, relu=True)
    for name, d in (("sae", sae), ("random", random)):
        cases, rows = explained(d, x, words, explainer=explainer)
        scores[name] = [r["r"] for r in rows if r]
        if name == "sae":
            page = export_features(cases, rows, tmp_path / "features.html")
            case = next(c for c in cases if c)
    print(
        f"\nreal model: explained by predicates, r {summary(scores['sae'])['mean']:.2f} (random "
        f"directions {summary(scores['random'])['mean']:.2f})"
    )
    assert difference(scores["sae"], scores["random"])["low"] > 0 and page.stat().st_size > 10_000
    short = [type(case.explain[0])(case.explain[0].tokens[:12], case.explain[0].acts[:12])]
    with pytest.raises(
        ValueError,
        match="the model reads 512; expected fewer or shorter fragments, or a model that reads "
        "more",
    ):
        LocalLMExplainer(load_lm(MODEL)[0], tok).explain([short * 3])
