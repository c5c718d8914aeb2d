"""One contestant of the benchmark in a process of its own.

It prepares, says "ready", runs as many steps as each line of its input asks for, and answers with
the seconds of one. It runs in its peer's environment: only the course's own import the course.

echo 3 | python benchmarks/contestants.py '{"who": "sae/floor", "N": 64, "d": 8, "n_feats": 16}'
"""

import json
import os
import resource
import sys
import time
import warnings

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ |= dict(HF_HUB_OFFLINE="1", WANDB_MODE="disabled", TQDM_DISABLE="1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
warnings.filterwarnings("ignore")
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

WHO = {}


def contestant(name):
    "Put a function under the name that settings call it by; its parameters are the sizes."

    def put(fn):
        WHO[name] = fn
        return fn

    return put


ANSWERS = sys.stdout  # what a peer prints goes elsewhere


def turns(device):
    "Yields once per step and waits between rounds; the CPU's own seconds, the clock's on a GPU."

    def now():
        if device != "cpu":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    print("ready", file=ANSWERS, flush=True)
    for line in sys.stdin:
        n, start = int(line), now()
        for _ in range(n):
            yield
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if device != "cpu":
            peak = torch.cuda.max_memory_allocated() / 1e6
        answer = dict(seconds=(now() - start) / n, peak_mb=round(peak))
        print(json.dumps(answer), file=ANSWERS, flush=True)
    sys.exit()  # also out of a peer's endless loop


def repeat(step, device):
    "Steps for as long as they are asked for."
    for _ in turns(device):
        step()


# ---- the codebook layer: forward and backward of x [N, d] through k of C codes
def layer(book, x, grad):
    "One step of a layer that gives its output, or a tuple that begins with it."

    def step():
        out = book(x)
        (out[0] if isinstance(out, tuple) else out).backward(grad)
        x.grad = None
        for p in book.parameters():
            p.grad = None

    return step


def states(N, d, device):
    "Inputs [N, d], and the gradient of what comes out."
    return torch.randn(N, d, device=device, requires_grad=True), torch.randn(N, d, device=device)


class Floor(nn.Module):
    "One product, a topk in pieces of 256 rows, a sum, straight through: nothing is counted."

    def __init__(self, d, C, k):
        super().__init__()
        self.codes, self.k = nn.Parameter(torch.randn(C, d)), k

    def forward(self, x):
        "The sum of the k nearest codes."
        with torch.no_grad():
            parts = [(part @ self.codes.T).topk(self.k, -1).indices for part in x.split(256)]
        return F.embedding_bag(torch.cat(parts), self.codes, mode="sum") + (x - x.detach())


@contestant("codebook/floor")
def codebook_floor(*, N, d, C, k, device):
    "The least code that does a layer's work."
    repeat(layer(Floor(d, C, k).to(device), *states(N, d, device)), device)


@contestant("codebook/course")
def codebook_course(*, N, d, C, k, device, **kw):
    "The course's layer."
    from codebook_tutorial.dictionary.codebook import Codebook

    repeat(layer(Codebook(d, C, k, **kw).to(device), *states(N, d, device)), device)


@contestant("codebook/authors")
def codebook_authors(*, N, d, C, k, device):
    "The layer of the paper's authors."
    from codebook_features import models

    book = models.CodebookLayer(
        d, C, "bench", kcodes=k, snap_fn=models.InnerProductSnapFunction
    ).to(device)
    x, grad = states(N, d, device)
    x, grad = x.detach()[None].requires_grad_(), grad[None]
    repeat(layer(book, x, grad), device)


@contestant("codebook/vector-quantize-pytorch")
def codebook_quantize(*, N, d, C, k, device):
    "A library of vector quantisers."
    from vector_quantize_pytorch import VectorQuantize

    if k != 1:
        raise ValueError("one code only")
    book = VectorQuantize(
        dim=d, codebook_size=C, use_cosine_sim=True, decay=0.99, commitment_weight=0.25
    ).to(device)
    x, grad = states(N, d, device)
    repeat(layer(book, x.detach()[None].requires_grad_(), grad[None]), device)


# ---- looking up the nearest of C codes
@contestant("lookup/course")
def lookup_course(*, N, d, C, k, device):
    "The course's search."
    from codebook_tutorial.dictionary.kmeans import nearest

    x, codes = torch.randn(N, d, device=device), torch.randn(C, d, device=device)
    repeat(lambda: nearest(x, codes, cosine=False, k=k), device)


@contestant("lookup/faiss")
def lookup_faiss(*, N, d, C, k, device):
    "A library of nearest neighbours."
    import faiss

    faiss.omp_set_num_threads(1)
    x, index = torch.randn(N, d).numpy(), faiss.IndexFlatL2(d)
    index.add(torch.randn(C, d).numpy())
    repeat(lambda: index.search(x, k), device)


# ---- one training step of an autoencoder: x [N, d], n_feats features
@contestant("sae/floor")
def sae_floor(*, N, d, n_feats, device, **kw):
    "The least code of a training step: no bias, no penalty."
    W1 = nn.Parameter(torch.randn(d, n_feats, device=device) / d**0.5)
    W2 = nn.Parameter(torch.randn(n_feats, d, device=device) / d**0.5)
    x = torch.randn(N, d, device=device)
    optimizer = torch.optim.Adam([W1, W2], 1e-4, fused=True)

    def step():
        loss = (x - (x @ W1).relu() @ W2).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    repeat(step, device)


class Stream:
    "One batch for ever, as train_sae reads it: timed from the data's side, the whole loop counts."

    def __init__(self, x, device):
        self.x, self.device = x, device

    def __len__(self):
        return len(self.x)

    def load(self, site, n):
        "The first n activations."
        return self.x[:n]

    def batches(self, site, size, seed=0):
        "The same batch, once per step."
        for _ in turns(self.device):
            yield self.x


@contestant("sae/course")
def sae_course(*, N, d, n_feats, device, kind, **settings):
    "The course's training loop."
    from codebook_tutorial.dictionary.train import train_sae

    train_sae(
        Stream(torch.randn(N, d, device=device), device),
        n_feats,
        kind,
        steps=10**9,
        batch=N,
        lr=1e-4,
        site="any",
        **settings,
    )


@contestant("sae/sae-lens")
def sae_saelens(*, N, d, n_feats, device, kind, **settings):
    "Its trainer's own step: features counted, gradients clipped, schedules; nothing logged."
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = dict(l1="Standard", topk="TopK", batchtopk="BatchTopK")[kind]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")
    config = config(d_in=d, d_sae=n_feats, dtype="float32", device=device, **settings)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    x = torch.randn(N, d, device=device)
    samples = dict(total_training_samples=N * 10**6, train_batch_size_samples=N)
    training = SAETrainerConfig(**samples, lr=1e-4, lr_end=1e-5, device=device)
    trainer = SAETrainer(training, sae, iter(()))

    def step():
        trainer._train_step(sae, x)
        trainer.n_training_steps += 1

    repeat(step, device)


@contestant("sae/dictionary-learning")
def sae_dictionary_learning(*, N, d, n_feats, device, kind, **settings):
    "Its trainer's update."
    from dictionary_learning.trainers import batch_top_k, standard, top_k

    kinds = dict(l1=standard.StandardTrainer, topk=top_k.TopKTrainer)
    make = (kinds | dict(batchtopk=batch_top_k.BatchTopKTrainer))[kind]
    trainer = make(
        steps=10**6,
        activation_dim=d,
        dict_size=n_feats,
        layer=0,
        lm_name="bench",
        device=device,
        lr=1e-4,
        **settings,
    )
    x, count = torch.randn(N, d, device=device), iter(range(10**9))
    repeat(lambda: trainer.update(next(count), x), device)


@contestant("sae/eai-sparsify")
def sae_sparsify(*, N, d, n_feats, device, kind, optimizer="adam", k=32):
    "Its trainer's lines for one sparse coder: unit rows, projected gradient, which features fired."
    from sparsify import SparseCoder, SparseCoderConfig
    from sparsify.sign_sgd import SignSGD

    config = SparseCoderConfig(num_latents=n_feats, k=k)
    sae, x = SparseCoder(d, config, device=device), torch.randn(N, d, device=device)
    fired = torch.zeros(n_feats, dtype=torch.long, device=device)
    if optimizer == "signum":
        from schedulefree import ScheduleFreeWrapper

        moves = ScheduleFreeWrapper(SignSGD(sae.parameters(), lr=1e-4), momentum=0.95)
        moves.train()
    else:
        moves = torch.optim.Adam(sae.parameters(), 1e-4)

    def step():
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=fired > 10_000_000)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        moves.step()
        moves.zero_grad()
        fired.add_(N)
        fired[out.latent_indices.flatten()] = 0

    repeat(step, device)


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.stdout = sys.stderr
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    WHO[settings.pop("who")](**settings)
