"""Sites on every causal language model that transformers knows, as tiny random models: all of them
nightly, some in every run. `python tests/test_architectures.py` writes docs/architectures.md."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.architectures import NAMES, VARIANTS, build

from codebook_tutorial.model.sites import SITE_KINDS, capture, intervene, sites
from codebook_tutorial.model.structure import blocks_of, structure

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architectures.md"
IDS = torch.tensor([[3, 17, 99, 42], [120, 8, 55, 71]])
ALWAYS = (
    "gpt2 gptj gpt_neo gpt_neox phi falcon falcon@new_decoder falcon@sequential bloom opt mpt "
    "starcoder2 glm4 mixtral qwen2_moe qwen3_moe qwen3_next qwen3_5_text olmoe gpt_oss "
    "deepseek_v3 granite llama4_text gemma3 minicpm3 mamba doge bert"
).split()
HEAD = """# Which architectures

Every causal language model of transformers {version}, built small, all its parameters random. \
Does every site exist, is it [batch, seq, d], does it change the prediction, and is what a block \
adds `attn` + `mlp`? A model whose parts do not add up offers the sites that are sound; asked for \
the others, it says why.

| model type | sites | not offered, and why |
|---|---|---|
"""


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
def raw(model):
    "What goes in and comes out of every block, by plain hooks."
    seen, handles = [], []
    for block in blocks_of(model):
        row = []
        seen.append(row)

        def before(module, args, kwargs, row=row):
            row.append((args[0] if args else kwargs["hidden_states"]).clone())

        def after(module, args, out, row=row):
            row.append((out[0] if isinstance(out, tuple | list) else out).clone())

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after))
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


def check_sums(model, acts):
    "Every block that offers its parts adds their sum."
    for layer, row in enumerate(raw(model)):
        parts = [acts[name] for k in ("attn", "mlp") if (name := f"{k}.{layer}") in acts]
        if parts and row:
            delta = row[1] - row[0]
            assert (delta - sum(parts)).abs().max() < 1e-3 * delta.abs().max(), layer
        if row:
            assert torch.equal(acts[f"resid.{layer}"], row[1])


def check_reads(model, acts):
    "The MLP makes of other rows at mlp_in what it makes of these rows, and of nothing else."
    for site in [name for name in acts if name.startswith("mlp_in.")]:
        mlp = site.replace("mlp_in", "mlp")
        with intervene(model, {site: lambda x: x.flip(0)}), capture(model, mlp) as other:
            logits(model)
        want = acts[mlp].flip(0)
        assert (other[mlp] - want).abs().max() < 1e-4 * want.abs().max(), site


def check_sites(model):
    "All that is offered is there, has its form, and matters; nothing is changed by looking."
    some, want = sites(model), logits(model)
    with intervene(model, {"*": lambda x: x.clone()}):
        assert torch.equal(logits(model), want)
    with capture(model, "*") as acts:
        assert torch.equal(logits(model), want)
    assert set(acts) == set(some) and all(x.shape[:2] == IDS.shape for x in acts.values())
    check_sums(model, acts)
    check_reads(model, acts)
    for site in some:
        with intervene(model, {site: torch.zeros_like}):
            assert not torch.equal(logits(model), want), site


def row_of(name):
    "A line of the table: the sites, and what is missing."
    try:
        model = build(name)
    except Exception as e:
        return f"| {name} | not built | {type(e).__name__} |"
    try:
        found = structure(model)
    except ValueError as e:
        return f"| {name} | refused | {cell(e)} |"
    check_sites(model)
    kinds = [k for k in SITE_KINDS if any(k in places for places in found.places)]
    why = dict.fromkeys(cell(v) for k, v in found.missing.items() if k not in kinds)
    return f"| {name} | {', '.join(kinds)} | {'; '.join(why)} |"


def cell(text):
    line = " ".join(str(text).split("; expected one of")[0].split()).replace("|", "/")
    return line.replace("sites: ", "")


def kinds_of(row):
    return row.split(" | ")[1].split(", ")


def table():
    "Every architecture in a process of its own, since some of them end it."
    rows = []
    for name in [*NAMES, *VARIANTS]:
        command = [sys.executable, __file__, name]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=600)
        last = ran.stdout.strip().split("\n")[-1]
        error = (ran.stderr.strip().split("\n") or [""])[-1]
        rows.append(last if last.startswith("| ") else f"| {name} | WRONG | {cell(error)} |")
        print(rows[-1], flush=True)
    return rows


@pytest.mark.parametrize("name", ALWAYS)
def test_sites_are_true_on(name):
    row = row_of(name)
    told = [r for r in PAGE.read_text().split("\n") if r.startswith(f"| {name} |")]
    assert [kinds_of(r) for r in told] == [kinds_of(row)]
    if name not in ("bert", "doge"):  # whose parts do not add up
        assert "attn" in kinds_of(row)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", "gpt_neox_japanese doge bert llama granite falcon".split())
def test_half_precision_sees_what_float32_sees(name, dtype):
    "The Japanese NeoX leaves out one layer's bias, a twelfth of what that layer adds."
    whole, half = structure(build(name)), structure(build(name).to(dtype))
    assert whole.missing.keys() == half.missing.keys() and whole.family == half.family


@pytest.mark.nightly
def test_sites_are_true_on_every_architecture():
    check_table(table())


def test_the_table_holds_every_architecture():
    rows = [row for row in PAGE.read_text().split("\n") if row.startswith("| ")][1:]
    assert [row.split(" | ")[0][2:] for row in rows] == [*NAMES, *VARIANTS]
    check_table(rows)


def check_table(rows):
    kinds = {row.split(" | ")[0][2:]: kinds_of(row) for row in rows}
    right = [name for name in NAMES if "attn" in kinds[name]]
    assert len(right) >= 120 and not [row for row in rows if "WRONG" in row]
    assert sum(kinds[name] == ["not built"] for name in NAMES) <= 12


if __name__ == "__main__":
    import transformers

    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        print(row_of(sys.argv[1]))
    else:
        head = HEAD.format(version=transformers.__version__)
        PAGE.write_text(head + "\n".join(table()) + "\n")
