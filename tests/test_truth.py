"""Numbers that were wrong without a word on models other than ours: first positions, half
precision, modes, compiled models, gradient checkpointing, damaged configurations."""

import json
import warnings

import pytest
import torch
from test_sites import CONFIGS, IDS
from transformers import AutoModelForCausalLM, GPT2Config, TrainingArguments

from codebook_tutorial.core import draw_rows, seeded
from codebook_tutorial.dictionary.base import basis, fvu, random_directions
from codebook_tutorial.dictionary.baselines import ica, pca
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.card import model_card
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.finetune import as_dataset, bits_per_activation, finetune
from codebook_tutorial.dictionary.positions import coded_positions
from codebook_tutorial.dictionary.harvest import _weights_mark, harvest
from codebook_tutorial.dictionary.train import train_sae
from codebook_tutorial.dictionary.trainer import CodebookTrainer, batch_size
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.modes import keeping_mode
from codebook_tutorial.model.run import (
    far_out,
    lm_loss,
    mean_state,
    next_probs,
    states_of,
    token_losses,
)
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.model.structure import blocks_of
from codebook_tutorial.model.text import Text, load_text
from codebook_tutorial.score.metrics import loss_recovered, measure, replaced_loss

BOS, PAD = 1, 0


def some_text(rows=8, length=16):
    "Packed rows, of which only the first begins with BOS."
    ids = torch.randint(2, 50, (rows, length), generator=seeded(0))
    ids[0, 0] = ids[:, 9] = BOS
    ids[-1, -4:] = PAD
    return Text(ids, BOS, PAD)


def tiny(name="llama", **kw):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **kw)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=seeded(1)).to(p)
    return model.eval()


@pytest.fixture
def sink():
    "A model that makes the first position of every row a hundred times longer."
    model = tiny()

    def lengthen(module, args, output):
        out = output.clone()
        out[:, 0] *= 100
        return out

    model.model.layers[0].register_forward_hook(lengthen)
    return model


# ---- the first position ------------------------------------------------------------------------


def test_a_rows_first_position_never_counts_whatever_stands_there():
    text = some_text()
    assert not text.mask[:, 0].any() and text.ordinary[1:, 0].all()
    want = (text.ids != BOS) & (torch.arange(16) > 0)
    want[-1, -4:] = False
    assert torch.equal(text.mask, want) and text.n_tokens == want.sum()
    assert (text.labels != -100).sum() == text.n_tokens + 8  # and the BOS that ends a document
    assert "7 at a row's start" in repr(text)


def test_a_sink_is_in_no_states_no_mean_and_no_loss_of_ablation(sink, tmp_path, capsys):
    text = some_text()
    x = states_of(sink, text, "resid.1")
    assert len(x) == text.n_tokens and not far_out(x).any()
    store = harvest(sink, text, "resid.1", folder=tmp_path / "a", dtype=torch.float32)
    assert torch.allclose(store.load("resid.1"), x, atol=1e-5) and (store.position > 0).all()
    assert "median" not in capsys.readouterr().out
    mean = mean_state(sink, text, "resid.1")
    assert torch.allclose(mean, x.mean(0), atol=1e-4)
    kept = []
    with intervene(sink, {"resid.2": lambda x: kept.append(x[:, 0])}):
        replaced_loss(sink, text, "resid.1", fn=torch.zeros_like)
    with capture(sink, "resid.1") as acts, torch.no_grad():
        sink(text.ids)
    assert kept[0].norm(dim=-1).min() > 10 * x.norm(dim=-1).median()  # ablation keeps the sink
    assert acts["resid.1"][:, 0].norm(dim=-1).min() > 10 * x.norm(dim=-1).median()


def test_far_out_rows_are_told_and_can_be_left_out(tmp_path, capsys):
    model, text = tiny(), some_text(60)
    model.model.embed_tokens.weight.data[5] *= 1000
    store = harvest(model, text, "resid.1", folder=tmp_path / "a", dtype=torch.float32)
    n = int(((text.ids == 5) & text.mask).sum())
    assert f"states longer than 10 x the median: resid.1 {n};" in capsys.readouterr().out
    whole, some = store.load("resid.1"), store.load("resid.1", outliers="drop")
    assert len(whole) - len(some) == n == int(far_out(whole).sum())
    batches = store.batches("resid.1", 50, outliers="drop")
    assert sum(map(len, batches)) == len(some)
    with pytest.warns(UserWarning, match=f"{n} of 32,387 states hold 94% of the variance"):
        measure(basis(32), torch.cat([whole[~far_out(whole)].repeat(40, 1), whole[far_out(whole)]]))
    kw = dict(kind="topk", k=4, steps=20, batch=64, site="resid.1")
    clean = train_sae(some, 32, **{**kw, "site": None})
    kept = train_sae(store, 32, outliers="drop", **kw)
    assert kept.b_dec.norm() < 3 * clean.b_dec.norm()
    with pytest.raises(ValueError, match="outliers='none', expected 'keep' or 'drop'"):
        store.load("resid.1", outliers="none")


# ---- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_agrees_with_float32_at_every_batch_size(dtype):
    text = some_text(64)
    model, half = tiny(), tiny().to(dtype)
    dictionary = random_directions(64, 32)
    want = loss_recovered(model, text, "resid.1", dictionary=dictionary)
    mean = mean_state(model, text, "resid.1")
    for batch in (1, 8, 32):
        got = loss_recovered(half, text, "resid.1", dictionary=dictionary.to(dtype), batch=batch)
        for key in ("clean", "decoded", "zero", "mean"):
            assert got[key] == pytest.approx(want[key], rel=0.02), (key, batch)
        assert torch.allclose(mean_state(half, text, "resid.1", batch=batch), mean, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_squares_are_not_taken_in_half_precision(dtype):
    x = 20 * torch.randn(30_000, 16, generator=seeded(0)) + 5
    dictionary = random_directions(8, 16)
    want, got = measure(dictionary, x), measure(dictionary.to(dtype), x.to(dtype))
    for key in ("fvu", "cosine"):
        assert got[key] == pytest.approx(want[key], rel=0.01), key
    x_hat = x + torch.randn(x.shape, generator=seeded(1))
    assert fvu(x.to(dtype), x_hat.to(dtype)) == pytest.approx(fvu(x, x_hat), rel=0.05)
    book = Codebook(16, 4).to(dtype)
    assert book((100 * x[:5]).to(dtype))[2].isfinite()  # infinite in float16's own squares


# ---- modes and hooks ---------------------------------------------------------------------------


def dropping_out():
    config = GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_finetune_leaves_the_mode_it_found_also_when_it_is_stopped(error, monkeypatch):
    from codebook_tutorial.dictionary.trainer import CodebookTrainer

    model, text = dropping_out(), some_text()
    model.transformer.h[1].train()
    finetune(model, text, steps=2, batch=2)
    assert not model.training and model.transformer.h[1].training

    def stop(self, *args, **kw):
        raise error

    monkeypatch.setattr(CodebookTrainer, "compute_loss", stop)
    with pytest.raises(error):
        finetune(model, text, steps=2, batch=2)
    assert not model.training and model.transformer.h[1].training
    with keeping_mode(model):
        model.train()
    assert not model.training


@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_a_compiled_model_is_refused(way):
    model = tiny()
    if way == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    for use in (intervene(compiled, {"resid.1": torch.zeros_like}), capture(compiled, "resid.1")):
        with pytest.raises(ValueError, match="is compiled"):
            with use:
                compiled(input_ids=IDS)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_passes_are_not_captured(reentrant):
    model = tiny()
    names = ["resid.1", "attn.1", "heads.1", "neurons.1", "mlp.1"]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            kw = dict(use_reentrant=reentrant)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kw)
            model.train()
        with capture(model, names, grad=True) as acts:
            model(IDS, labels=IDS).loss.backward()
        assert all(x.shape[:2] == IDS.shape for x in acts.values())
        grads.append(model.model.layers[0].mlp.up_proj.weight.grad.clone())
        model.zero_grad()
    assert torch.allclose(*grads, atol=1e-6)


def test_padding_counts_nowhere_in_generation_and_in_the_first_codes():
    model, text = tiny(), some_text()
    cb = add_codebooks(model, "mlp.1", n_codes=8)
    cb.init_from_data(text, generator=seeded(0)).eval()
    same = add_codebooks(tiny(), "mlp.1", n_codes=8)
    same.init_from_data([text.ids], generator=seeded(0), pad=PAD)
    assert torch.allclose(cb.codebooks["mlp.1"].weight, same.codebooks["mlp.1"].weight, atol=1e-5)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[0, :3] = 0
    cb.reset_counts()
    cb.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False
    )
    assert cb.codebooks["mlp.1"].counts.sum() == mask.sum() + 2 * 2
    assert cb.mask is None


# ---- edges -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_all_features_may_be_kept(kind):
    x = torch.randn(300, 8, generator=seeded(0))
    sae = train_sae(x, 16, kind, k=16, steps=30, batch=64)
    assert measure(sae, x)["fvu"] < 0.5


@pytest.mark.parametrize("lacking", ["whole", "twice", "sum", "constant"])
@pytest.mark.parametrize("method", [pca, ica])
def test_states_with_fewer_directions_give_fewer_components(method, lacking):
    x = torch.randn(3000, 6, generator=seeded(0)).pow(3)
    y = dict(
        whole=x,
        twice=torch.cat([x, x[:, :1]], 1),
        sum=x - x.mean(1, keepdim=True),
        constant=torch.cat([x, torch.ones(len(x), 1)], 1),
    )[lacking]
    found = method(y)
    assert len(found.directions) == 6 - (lacking == "sum")
    assert fvu(y, found.decode(found.encode(y))) < 1e-6


def test_rows_are_drawn_from_more_than_multinomial_takes(monkeypatch):
    weight = torch.zeros(2**24 + 100)
    weight[-50:] = 1.0
    drawn = draw_rows(weight, 40, seeded(0))
    assert len(drawn.unique()) == 40 and drawn.min() >= 2**24 + 50
    assert torch.equal(drawn, draw_rows(weight, 40, seeded(0)))


# ---- quiet lies --------------------------------------------------------------------------------


def test_numbers_that_are_none_are_no_prediction():
    model, text = tiny(), some_text()
    ruin = {
        "resid.1": lambda x: torch.where(torch.arange(len(x))[:, None, None] == 3, torch.nan, x)
    }
    with (
        intervene(model, ruin),
        pytest.raises(ValueError, match="loss is nan in row 3, position 1"),
    ):
        lm_loss(model, text)
    with pytest.raises(ValueError, match="not finite"):
        replaced_loss(model, text, "resid.1", fn=lambda x: x * torch.nan)
    with pytest.raises(ValueError, match="no token to predict"):
        token_losses(model, Text(torch.full((2, 8), PAD), BOS, PAD))


@pytest.mark.parametrize("settings", [dict(alpha=float("inf")), dict(lr=1e30)])
def test_training_that_diverges_says_so(settings):
    x = torch.randn(300, 8, generator=seeded(0))
    with pytest.raises(ValueError, match="alpha of at least 0|training has diverged"):
        train_sae(x, 16, "untied", steps=120, batch=64, **settings)


def test_shares_that_leave_features_out_are_refused():
    for shares in [(0.25, 0.5), (0.5, 0.25, 1), (0.0, 1)]:
        with pytest.raises(ValueError, match="shares that grow"):
            train_sae(torch.randn(90, 8), 16, "matryoshka", k=2, steps=1, batch=8, shares=shares)


@pytest.mark.parametrize("layers", [2, 4])
def test_a_config_that_does_not_fit_the_weights_is_refused(layers, tmp_path):
    cb = add_codebooks(tiny(), "mlp.1", n_codes=8)
    cb.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=layers)))
    with pytest.raises(
        ValueError, match="asks for 2 layers" if layers == 2 else "lack model.layers.3"
    ):
        CodebookModel.from_pretrained(tmp_path)


def test_a_codebooks_settings_are_sealed_with_its_weights(tmp_path):
    add_codebooks(tiny(), "mlp.1", n_codes=8, k=2).save_pretrained(tmp_path)
    CodebookModel.from_pretrained(tmp_path)
    file = tmp_path / "codebooks.json"
    info = json.loads(file.read_text())
    info["sites"]["mlp.1"]["k"] = 1
    file.write_text(json.dumps(info))
    with pytest.raises(ValueError, match="does not say what the codebooks were saved with"):
        CodebookModel.from_pretrained(tmp_path)


def test_every_default_of_load_text_works():
    from codebook_tutorial.model.text import load_text

    model, tok = load_lm("stories")
    assert load_text(tok).ids.shape[1] == 256


def test_a_quoted_special_token_is_text(tmp_path):
    from codebook_tutorial.model.text import load_text

    _, tok = load_lm("stories")
    quoted = [dict(text=f"Anna said {tok.bos_token} to Tom . " * 30) for _ in range(30)]
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(map(json.dumps, quoted)))
    ids = load_text(tok, str(file), n_tokens=2000, length=64, whole=False).ids
    assert (ids == tok.bos_token_id).sum() <= 30
    plain = tmp_path / "b.txt"
    plain.write_text("\ufeff" + "Anna gave Tom a ball . " * 100, encoding="utf-8")
    assert (
        load_text(tok, str(plain), n_tokens=256, length=64, whole=False).ids[0, 1]
        == tok("Anna").input_ids[-1]
    )


def test_parts_of_a_character_are_told_apart():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from codebook_tutorial.feature.surface import Surface

    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tok = PreTrainedTokenizerFast(tokenizer_object=inner)
    words = Surface(tok).words(tok("a日 é").input_ids)
    assert words == ["a", "<0xE6>", "<0x97>", "<0xA5>", " ", "<0xC3>", "<0xA9>"]


def test_dollars_in_a_table_are_no_formula():
    from codebook_tutorial.show import table

    shown = table([{"explanation": "prices from $5 to $10"}])._repr_html_()
    assert shown.startswith('<div class="mathjax_ignore') and "$5 to $10" in shown
    assert "mathjax" not in table([{"explanation": "prices"}])._repr_html_()


# codes, and a first position that is a sink


@pytest.fixture
def story_sink():
    "A model whose first positions are a hundred times as long as the others at resid.0; text."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=4096, length=64, whole=False)
    block = blocks_of(model)[0]

    def grow(module, args, out):
        x = (out[0] if isinstance(out, tuple) else out).clone()
        x[:, 0] *= 100
        return (x, *out[1:]) if isinstance(out, tuple) else x

    hook = block.register_forward_hook(grow)
    yield model, tok, text
    hook.remove()


def with_codes(model, text, keep_first, **kw):
    torch.manual_seed(0)
    cb = add_codebooks(model, ["resid.1"], n_codes=32, keep_first=keep_first, **kw)
    return cb.init_from_data(text, generator=seeded(0))


def test_a_sink_that_codes_would_stand_for_is_told(story_sink):
    model, _, text = story_sink
    with pytest.warns(UserWarning, match=r"first positions hold 9\d% .* resid.1.*keep_first=True"):
        with_codes(model, text[:16], False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_codes(model, text[:16], True)


def test_first_positions_are_kept_where_asked(story_sink):
    "States, codes' start, counts, loss and units leave them out, alone, padded, and in generation."
    model, tok, text = story_sink
    text = text[:8]
    cb = with_codes(model, text, True).train()
    with torch.no_grad(), cb.bypass(), capture(cb, "resid.1") as before:
        model(input_ids=text.ids)
    with torch.no_grad(), capture(cb, "resid.1") as after:
        cb(input_ids=text.ids, attention_mask=text.attention_mask)
    x, y, real = before["resid.1"], after["resid.1"], text.attention_mask
    assert torch.equal(x[:, 0], y[:, 0]) and not torch.equal(x[:, 1], y[:, 1])
    others = real.clone()
    others[:, 0] = False
    assert cb.codebooks["resid.1"].counts.sum() == others.sum()
    error = (x - y).pow(2).sum(-1)[others].mean()
    assert torch.isclose(cb.recon["resid.1"], error, rtol=1e-5)
    assert cb.codebooks["resid.1"].weight.norm(dim=-1).max() < x[others].norm(dim=-1).max() * 1.01
    left = dict(  # padding on the left: the first token counts, wherever it is
        input_ids=torch.cat([torch.zeros(8, 3, dtype=torch.long), text.ids], 1),
        attention_mask=torch.cat([torch.zeros(8, 3, dtype=torch.bool), real], 1).long(),
    )
    cb.codebooks["resid.1"].reset_counts()
    with torch.no_grad(), capture(cb, "resid.1") as padded:
        cb(**left)
    assert cb.codebooks["resid.1"].counts.sum() == others.sum()
    with torch.no_grad(), cb.bypass(), capture(cb, "resid.1") as plain:
        model(**left)
    x, y = plain["resid.1"], padded["resid.1"]
    assert torch.equal(x[:, 3], y[:, 3]) and not torch.isclose(x[:, 4:], y[:, 4:]).any(-1).all()
    cb.codebooks["resid.1"].reset_counts()
    prompt = text.ids[:2, :5]
    ones = torch.ones_like(prompt)
    cb.generate(prompt, attention_mask=ones, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert cb.codebooks["resid.1"].counts.sum() == 2 * (5 - 1 + 3)  # later tokens all have codes
    later = coded_positions(torch.zeros(2, 1, 4), torch.ones(2, 9), True)
    assert later.all()  # a cache of any kind: the mask is longer than the pass


def test_keep_first_is_saved_sealed_and_trained(story_sink, tmp_path):
    "A folder keeps it; a changed one is refused; the error's unit is that of the other positions."
    model, tok, text = story_sink
    cb = with_codes(model, text[:16], True, learn="ema")
    args = TrainingArguments(str(tmp_path / "run"), report_to="none", use_cpu=True)
    trainer = CodebookTrainer(cb, args, train_dataset=as_dataset(text))
    trainer.measure_power()
    rows = text[:8]
    with torch.no_grad(), cb.bypass(), capture(cb, "resid.1") as acts:
        model(input_ids=rows.ids)
    others = rows.attention_mask.clone()
    others[:, 0] = False
    squares = acts["resid.1"].pow(2).sum(-1)[others].mean()
    assert torch.isclose(trainer.power["resid.1"], squares, rtol=1e-5)
    whole = batch_size(dict(labels=rows.labels), trainer.coded(dict(input_ids=rows.ids)))
    assert whole.tolist()[1] == rows.ids.numel() - len(rows.ids)
    logs = finetune(cb, text, 3, batch=4, log_every=1)
    assert all(0 < row["error resid.1"] < 2 for row in logs)
    cb.eval().save_pretrained(tmp_path / "codes")
    back = CodebookModel.from_pretrained(tmp_path / "codes")
    assert back.keep_first and "first position passes as it is" in model_card(back)
    config = tmp_path / "codes" / "codebooks.json"
    config.write_text(config.read_text().replace('"keep_first": true', '"keep_first": false'))
    with pytest.raises(ValueError, match="does not say what the codebooks were saved with"):
        CodebookModel.from_pretrained(tmp_path / "codes")


def test_without_keep_first_nothing_changes(tmp_path):
    "The paper's way: every position has codes, and the folder is as it was."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2048, length=64, whole=False)
    cb = with_codes(model, text, False)
    cb(input_ids=text.ids, attention_mask=text.attention_mask)
    assert cb.codebooks["resid.1"].counts.sum() == text.attention_mask.sum()
    cb.save_pretrained(tmp_path)
    assert "keep_first" not in (tmp_path / "codebooks.json").read_text()
    again = CodebookModel.from_pretrained(tmp_path)
    assert not again.keep_first and "first position" not in model_card(again)


# weights that are elsewhere


NEOX = ["embed_in", "emb_dropout", "rotary_emb", "layers.0", "layers.1", "layers.2"]
PARTS = [f"gpt_neox.{name}" for name in [*NEOX, "final_layer_norm"]] + ["lm_head"]


@pytest.mark.parametrize("away", [["embed_in"], ["layers.1"], ["embed_in", "layers.0", "layers.2"]])
def test_weights_on_disk_change_nothing(away, tmp_path):
    "accelerate's offload: losses, states, stores and codes equal those of a model in memory."
    away = [f"gpt_neox.{name}" for name in away]
    places = {name: "disk" if name in away else "cpu" for name in PARTS}
    model, tok = load_lm("stories", device_map=places, offload_folder=tmp_path / "weights")
    assert any(p.is_meta for p in model.parameters())
    plain, _ = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2048)
    asked = [text.ids[0, :9], text.ids[1, :5]]

    def numbers(model, folder):
        store = harvest(model, text, ["resid.1"], folder=folder)
        found = [states_of(model, text, "heads.1"), store.load("resid.1", 64)]
        found += [next_probs(model, asked), torch.tensor(lm_loss(model, text))]
        cb = add_codebooks(model, ["mlp.*"], n_codes=8)
        cb.init_from_data(text[:4], generator=seeded(0))
        found += [torch.tensor(lm_loss(cb, text))]
        cb.remove()
        return found

    for a, b in zip(numbers(plain, tmp_path / "a"), numbers(model, tmp_path / "b")):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert _weights_mark(model) == _weights_mark(plain)


def test_a_store_knows_other_weights_on_disk(tmp_path):
    "Of two models by one name, the second is refused where the first's harvest would resume."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2048)
    for seed in (0, 1):
        torch.manual_seed(seed)
        model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight.data.normal_()
        model.save_pretrained(tmp_path / str(seed))
        tok.save_pretrained(tmp_path / str(seed))
    places = {name: "disk" if name == "gpt_neox.layers.1" else "cpu" for name in PARTS}
    for seed in (0, 1):
        kw = dict(device_map=places, offload_folder=tmp_path / f"weights{seed}")
        away, _ = load_lm(tmp_path / str(seed), **kw)
        away.config.name_or_path = "one name"
        if seed == 0:
            harvest(away, text, ["resid.1"], folder=tmp_path / "store")
            continue
        with pytest.raises(ValueError, match="weights"):
            harvest(away, text, ["resid.1"], folder=tmp_path / "store")


def test_training_and_bits_of_nothing_are_refused():
    "Rows of BOS or padding have no loss and no codes: an error, no NaN."
    model, tok = load_lm("stories")
    text = load_text(tok, "stories", n_tokens=2048, length=64, whole=False)
    bos, pad = tok.bos_token_id, tok.pad_token_id
    marks = Text(torch.tensor([[bos] * 64, [bos] + [pad] * 63]), bos, pad)
    mixed = Text(torch.cat([text.ids[:3], marks.ids[1:]]), bos, pad)
    cb = with_codes(model, text, False)
    with pytest.raises(ValueError, match="finetune: 1 of 4 rows, row 3 first, have no token"):
        finetune(cb, mixed, 1)
    with pytest.raises(ValueError, match="finetune: 2 of 2 rows, row 0 first"):
        finetune(cb, marks, 1)
    padding = Text(torch.full((2, 8), pad), bos, pad)
    with pytest.raises(ValueError, match="bits_per_activation: no position .* has codes"):
        bits_per_activation(cb, padding)
    assert bits_per_activation(cb, text)["resid.1"]["bits"] > 0
