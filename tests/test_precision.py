"""bfloat16 and torch.compile: codebooks,
autoencoders and harvesting give what float32 without a compiler gives, within stated
tolerances. (Compiled by `aot_eager`: the same graphs as on a GPU, no C++ compiler needed.)"""

import pytest
import torch
from test_finetune import some_text, tiny

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.harvest import harvest
from codebook_tutorial.dictionary.kinds import KINDS
from codebook_tutorial.dictionary.train import train_sae
from codebook_tutorial.score.metrics import measure

BOOKS = [
    dict(),
    dict(k=4),
    dict(k=4, select="residual", learn="ema", commitment=0.25),
    dict(select="euclidean", groups=4),
    dict(k=2, norm=True, combine="mean"),
]


def states(n=400, d=32):
    return torch.randn(n, 8, generator=seeded(0)).relu() @ torch.randn(
        8, d, generator=seeded(1)
    ) + 0.1 * torch.randn(n, d, generator=seeded(2))


@pytest.mark.parametrize("kw", BOOKS)
def test_a_codebook_is_one_graph(kw):
    "fullgraph: nothing falls back to Python; outputs, codes, gradients and counts are equal."
    torch._dynamo.reset()
    plain, same = Codebook(32, 50, **kw).train(), Codebook(32, 50, **kw).train()
    same.load_state_dict(plain.state_dict())
    results = []
    for book, call in (
        (plain, plain),
        (same, torch.compile(same, backend="aot_eager", fullgraph=True)),
    ):
        x = states().requires_grad_()
        out, ids, recon = call(x)
        ((out * torch.arange(32)).sum() + recon).backward()
        results.append(
            [
                out,
                ids,
                recon,
                x.grad,
                book.counts,
                *([book.weight.grad] if book.learn == "gradient" else [book.new]),
            ]
        )
    for a, b in zip(*results):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    assert results[0][4].sum() == 400 * plain.k * len(plain.weight)


def test_a_model_with_codebooks_compiles():
    torch._dynamo.reset()
    cb, ids = add_codebooks(tiny(), ["heads.*", "mlp.*"], 20).eval(), some_text().ids[:4]
    want = cb(input_ids=ids).logits
    assert torch.allclose(
        torch.compile(cb, backend="aot_eager")(input_ids=ids).logits, want, atol=1e-5
    ) and all(v.shape[:2] == ids.shape for v in cb.ids.values())


@pytest.mark.parametrize("kw", BOOKS)
def test_codes_in_bfloat16_are_as_near(kw):
    """Near ties may turn, so what is compared is how far the codes are from the states:
    within 1 % of float32's."""
    book, x = Codebook(32, 50, **kw).init_from(states(), generator=seeded(0)).eval(), states()

    def far(b, x):
        return (b(x)[0].float() - states()).pow(2).sum().item()

    assert far(book.bfloat16(), x.bfloat16()) == pytest.approx(
        far(Codebook(32, 50, **kw).init_from(states(), generator=seeded(0)).eval(), x), rel=0.01
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_trained_in_bfloat16_explains_as_much(kind):
    """Products in bfloat16, weights in float32:
    unexplained variance within .02 of float32's, and far below what training begins with."""
    x = states(2000)
    kw = dict(
        n_feats=48,
        kind=kind,
        steps=300,
        batch=200,
        **(dict(k=6) if "topk" in kind or kind == "matryoshka" else {}),
    )
    with torch.random.fork_rng():
        whole, half = train_sae(x, **kw), train_sae(x, bf16=True, **kw)
    assert all(p.dtype == torch.float32 for p in half.parameters())
    fvu = [measure(sae, x)["fvu"] for sae in (whole, half, train_sae(x, **kw | dict(steps=1)))]
    assert fvu[1] == pytest.approx(fvu[0], abs=0.02) and fvu[1] < 0.5 * fvu[2], fvu


@pytest.mark.parametrize("kind", ["tied", "topk", "gated"])
def test_a_compiled_autoencoder_learns_the_same(kind, monkeypatch):
    torch._dynamo.reset()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn: compiled(fn, backend="aot_eager"))
    x, kw = states(), dict(n_feats=40, kind=kind, steps=20, batch=100)
    a, b = train_sae(x, **kw), train_sae(x, compile=True, **kw)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p, q, atol=1e-4)


def test_what_a_bfloat16_model_gives_is_harvested_as_it_is(tmp_path):
    "bfloat16 keeps 8 bits a number: within 3 % of float32's states, and not the same."
    text, sites = some_text(), ["resid.1", "mlp.0"]
    whole = harvest(tiny(), text, sites, folder=tmp_path / "a", dtype=torch.float32, verbose=False)
    half = harvest(
        tiny().bfloat16(), text, sites, folder=tmp_path / "b", dtype=torch.bfloat16, verbose=False
    )
    for site in sites:
        a, b = whole.load(site).float(), half.load(site).float()
        assert (a - b).norm() < 0.03 * a.norm() and not torch.equal(a, b)
