"""Our codes beside two peers' on the same input: equal where they should be, else by how much.

benchmarks/README.md says how to make the environment; without the packages nothing runs."""

import pytest
import torch
import torch.nn.functional as F

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.codebook import Codebook

D, C, K = 16, 40, 3
CLOSE = dict(rtol=0, atol=1e-5)
X = 1.7 * torch.randn(4, 25, D, generator=seeded(5)) + 0.4
G = torch.randn(X.shape, generator=seeded(6))  # what comes back from the layers above


def vq():
    why = "vector-quantize-pytorch is not here: benchmarks/README.md"
    return pytest.importorskip("vector_quantize_pytorch", reason=why)


def authors():
    why = "codebook-features is not here: benchmarks/README.md"
    return pytest.importorskip("codebook_features.models", reason=why, exc_type=ImportError)


def ours(k=1, **kw):
    torch.manual_seed(1)
    return Codebook(D, C, k, **kw)


def start_as(book, peer):
    "The peer's codes and averages as ours; its `codebook` alone would leave the averages."
    for name in ("embed", "embed_avg"):
        getattr(peer._codebook, name).data.copy_(book.weight.detach())
    return peer


def straight(book, **kw):
    "VectorQuantize with the plain straight-through gradient."
    how = dict(rotation_trick=False) | kw
    return start_as(book, vq().VectorQuantize(dim=D, codebook_size=C, **how))


def residual(book, **kw):
    how = dict(shared_codebook=True, rotation_trick=False, threshold_ema_dead_code=0) | kw
    peer = vq().ResidualVQ(dim=D, codebook_size=C, num_quantizers=K, **how)
    start_as(book, peer.layers[0])
    return peer


def gradient(layer, loss):
    "Gradients to the input, and to the codes where they learn by it."
    x = X.clone().requires_grad_()
    loss(x).backward()
    return x.grad, next((p.grad for p in layer.parameters() if p.grad is not None), None)


def theirs(book, snap, *, k):
    "The authors' layer with our codes."
    m = authors()
    layer = m.CodebookLayer(D, C, key="test", snap_fn=getattr(m, snap), kcodes=k)
    layer.codebook.weight.data.copy_(book.weight[0].detach())
    return layer


def test_nearest_code_and_gradient_as_vector_quantize():
    book = ours(select="euclidean")
    peer = straight(book)
    out, ids, _ = book(X)
    q, their_ids, _ = peer(X)
    assert torch.equal(ids[..., 0, 0], their_ids)
    torch.testing.assert_close(out, q, **CLOSE)
    mine, _ = gradient(book, lambda x: (book(x)[0] * G).sum())
    same, _ = gradient(peer, lambda x: (peer(x)[0] * G).sum())
    torch.testing.assert_close(mine, same, **CLOSE)


def test_rotated_gradient_is_the_peers_default_and_another():
    book = ours(select="euclidean")
    peer = start_as(book, vq().VectorQuantize(dim=D, codebook_size=C))
    torch.testing.assert_close(book(X)[0], peer(X)[0], **CLOSE)
    mine, _ = gradient(book, lambda x: (book(x)[0] * G).sum())
    other, _ = gradient(peer, lambda x: (peer(x)[0] * G).sum())
    assert (mine - other).abs().max() > 0.1


def test_cosine_chooses_as_vector_quantize_and_writes_another_length():
    book = ours(select="cosine")
    peer = straight(book, use_cosine_sim=True)
    peer._codebook.embed.data.copy_(F.normalize(book.weight.detach(), dim=-1))
    out, ids, _ = book(X)
    q, their_ids, _ = peer(X)
    assert torch.equal(ids[..., 0, 0], their_ids)
    torch.testing.assert_close(F.normalize(out, dim=-1), q, **CLOSE)  # theirs: unit codes


@pytest.mark.parametrize("decay", [0.8, 0.99])
def test_moving_averages_as_vector_quantize(decay):
    book = ours(select="euclidean", learn="ema").train()
    peer = straight(book, decay=decay, eps=0.0).train()
    begin = book.weight.clone()
    for step in range(20):
        x = 1.3 * torch.randn(3, 50, D, generator=seeded(step))
        with torch.no_grad():
            torch.testing.assert_close(book(x)[0], peer(x)[0], **CLOSE)
        book.ema_step(decay)
        torch.testing.assert_close(book.size, peer._codebook.cluster_size, **CLOSE)
        torch.testing.assert_close(book.weight, peer._codebook.embed, **CLOSE)
    assert (book.weight - begin).abs().max() > 0.1


def test_smoothing_of_averages_is_the_peers_alone():
    "Its default eps = 1e-5 counts each code that little more often: less than 1e-3 here."
    book = ours(select="euclidean", learn="ema").train()
    peer = straight(book, decay=0.8).train()
    for step in range(20):
        x = 1.3 * torch.randn(3, 50, D, generator=seeded(step))
        book(x), peer(x), book.ema_step(0.8)
    assert 0 < (book.weight - peer._codebook.embed).abs().max() < 1e-3


def test_losses_for_codes_and_input_as_vector_quantize():
    "Theirs is the mean over coordinates, ours the sum; both pulls together are theirs, twice."
    book = ours(select="euclidean", commitment=1.0).train()
    learnt = dict(learnable_codebook=True, ema_update=False, commitment_weight=1.0)
    peer = straight(book, **learnt).train()
    torch.testing.assert_close(book(X)[2], 2 * D * peer(X)[2].squeeze(), rtol=1e-5, atol=0)
    mine = gradient(book, lambda x: book(x)[2])
    same = gradient(peer, lambda x: D * peer(x)[2].sum())
    for a, b in zip(mine, same):
        torch.testing.assert_close(a, b.view(a.shape), **CLOSE)


def test_commitment_alone_as_vector_quantize_with_averages():
    book = ours(select="euclidean", learn="ema", commitment=0.25).train()
    peer = straight(book, commitment_weight=0.25).train()
    mine, codes = gradient(book, lambda x: book(x)[2])
    same, _ = gradient(peer, lambda x: D * peer(x, freeze_codebook=True)[2].sum())
    torch.testing.assert_close(mine, same, **CLOSE)
    assert codes is None


def test_residual_codes_as_residual_vq():
    book = ours(k=K, select="residual")
    peer = residual(book).eval()
    out, ids, _ = book(X)
    q, their_ids, _ = peer(X)
    assert torch.equal(ids[..., 0, :], their_ids)
    torch.testing.assert_close(out, q, **CLOSE)


def test_residual_vq_hands_back_the_gradient_once_per_code():
    book = ours(k=K, select="residual")
    peer = residual(book).train()
    mine, _ = gradient(book, lambda x: (book(x)[0] * G).sum())
    other, _ = gradient(peer, lambda x: (peer(x, freeze_codebook=True)[0] * G).sum())
    torch.testing.assert_close(mine, G, **CLOSE)
    torch.testing.assert_close(other, K * mine, **CLOSE)


def residual_sums(book, x):
    "Per code chosen first, second, ..: how often [K, C], and what it was chosen for [K, C, D]."
    left, ids = x.reshape(-1, D), book.choose(x).reshape(-1, K)
    n, total = torch.zeros(K, C), torch.zeros(K, C, D)
    for i in range(K):
        n[i].index_add_(0, ids[:, i], torch.ones(len(ids)))
        total[i].index_add_(0, ids[:, i], left)
        left = left - book.weight[0, ids[:, i]]
    return n, total


def test_averages_of_residual_codes():
    "We decay once a batch; the peer's shared book once per code of a row, the last counting most."
    decay, book = 0.9, ours(k=K, select="residual", learn="ema").train()
    peer = residual(book, decay=decay, eps=0.0).train()
    n, total = residual_sums(book, X)
    begin = book.weight[0].clone()
    with torch.no_grad():
        book(X), peer(X)
    book.ema_step(decay)
    for share, power, got in (
        ([1 - decay] * K, decay, book.weight[0]),
        ([(1 - decay) * decay**i for i in (2, 1, 0)], decay**K, peer.layers[0]._codebook.embed[0]),
    ):
        w = torch.tensor(share)[:, None]
        size, moved = power + (w * n).sum(0), power * begin + (w[..., None] * total).sum(0)
        torch.testing.assert_close(got, moved / size[:, None], **CLOSE)
    assert (book.weight[0] - peer.layers[0]._codebook.embed[0]).abs().max() > 0.01


FORMS = [("InnerProductSnapFunction", "cosine"), ("EuclideanSnapFunction", "euclidean")]


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("snap, select", FORMS)
def test_codes_and_gradients_as_the_authors(snap, select, k):
    "Without their LayerNorm; their straight-through gradient and that of the codes."
    book = ours(k=k, select=select, combine="mean")
    peer = theirs(book, snap, k=k)
    peer.ln = torch.nn.Identity()
    chosen = {}
    peer.hook_fn = chosen.__setitem__  # called with the layer's key and its ids
    out, ids, _ = book(X)
    torch.testing.assert_close(out, peer(X), **CLOSE)
    assert (ids[..., 0, :].numpy() == chosen["test"]).all()
    mine = gradient(book, lambda x: (book(x)[0] * G).sum())
    same = gradient(peer, lambda x: (peer(x) * G).sum())
    torch.testing.assert_close(mine[0], same[0], **CLOSE)
    torch.testing.assert_close(mine[1][0], same[1], **CLOSE)


@pytest.mark.parametrize("k", [1, 4])
def test_reconstruction_teaches_codes_as_the_authors_aeloss(k, monkeypatch):
    book = ours(k=k, select="cosine", combine="mean")
    peer = theirs(book, "InnerProductSnapFunction", k=k)
    peer.ln = torch.nn.Identity()
    monkeypatch.setattr(authors().BaseSnapFunction, "loss", "aeloss")
    _, codes = gradient(book, lambda x: book(x)[2])
    _, same = gradient(peer, lambda x: (peer(x) * 0).sum())
    torch.testing.assert_close(codes[0], same, **CLOSE)


@pytest.mark.parametrize("k", [1, 4])
def test_layer_norm_is_the_authors_choice_of_codes_and_not_their_gradient(k):
    "Ours chooses for LayerNorm(x) and hands the gradient past it; theirs goes through it."
    book = ours(k=k, select="cosine", combine="mean", norm=True)
    peer = theirs(book, "InnerProductSnapFunction", k=k)
    torch.testing.assert_close(book(X)[0], peer(X), **CLOSE)
    mine, _ = gradient(book, lambda x: (book(x)[0] * G).sum())
    other, _ = gradient(peer, lambda x: (peer(x) * G).sum())
    through, _ = gradient(book, lambda x: (F.layer_norm(x, (D,)) * G).sum())
    torch.testing.assert_close(mine, G, **CLOSE)
    torch.testing.assert_close(other, through, **CLOSE)
    assert (mine - other).abs().max() > 0.1
