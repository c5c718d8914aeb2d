"""Our files in the peers' own loaders, and theirs in ours: largest differences on random inputs.

PYTHONPATH=tests python benchmarks/peers_formats.py [docs/layouts.md]

README.md says in which environment.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path

for name, value in dict(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", WANDB_MODE="disabled").items():
    os.environ.setdefault(name, value)
warnings.filterwarnings("ignore")
import torch  # noqa: E402
import peers_scopes  # noqa: E402
import peers_transcoders  # noqa: E402
from layouts_coverage import coverage, entries, table_of_saelens  # noqa: E402
from layouts_page import shake, write_page, write_theirs  # noqa: E402
from test_formats import D, N, random_sae  # noqa: E402

from codebook_tutorial.dictionary.layouts import WRITES, convert_alpha  # noqa: E402
from codebook_tutorial.dictionary.formats import export_sae, load_sae  # noqa: E402
from codebook_tutorial.dictionary.rows import ROWS as ROWS_OF  # noqa: E402

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    import sparsify
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew
    from dictionary_learning.trainers import batch_top_k, gdm, jumprelu, standard, top_k
    from dictionary_learning.trainers import matryoshka_batch_top_k as matryoshka
    from dictionary_learning.utils import load_dictionary
    from sae_lens import SAE, saes

X = torch.randn(64, D, generator=torch.Generator().manual_seed(5))
ROOT, ROWS = Path(tempfile.mkdtemp()), []
LOADS = dict(
    saelens=SAE.load_from_disk,
    dictionary_learning=lambda folder: load_dictionary(str(folder), "cpu")[0],
    sparsify=sparsify.SparseCoder.load_from_disk,
)
BASE = dict(d_in=D, d_sae=N, metadata=saes.sae.SAEMetadata(hook_name="blocks.3.hook_resid_pre"))


@torch.no_grad()
def row(way, layout, what, *, ours, peer):
    "Largest differences of features and of what is decoded; which are active."
    if layout == "sparsify":  # its code is sparse
        top, ids, _ = peer.encode(X)
        f, x_hat = (
            torch.zeros(len(X), peer.num_latents).scatter(-1, ids, top),
            peer.decode(top, ids),
        )
    else:
        f = peer.encode(X)
        x_hat = peer.decode(f)
    mine, own = ours.reconstructed(X)
    off = (mine - f).abs().max().item(), (own - x_hat).abs().max().item()
    flips, l0 = int(((mine != 0) != (f != 0)).sum()), (f != 0).sum(-1).float().mean().item()
    ROWS.append((way, layout, what, *off, flips, l0))


def theirs(layout, what, folder, *, peer):
    "A file of a peer, read by us."
    row("theirs -> ours", layout, what, ours=load_sae(folder), peer=peer)


def ours_in_theirs():
    "Every kind that we write, loaded by them and by us again."
    for layout, kind in [(layout, kind) for layout, kinds in WRITES.items() for kind in kinds]:
        for unit in (True, False):
            ours, folder = random_sae(kind, unit=unit), ROOT / f"{layout}-{kind}-{unit}"
            export_sae(ours, folder, layout, site="resid.2", model_name="stories")
            with contextlib.redirect_stdout(io.StringIO()):
                peer = LOADS[layout](folder)
            what, more = kind if unit else f"{kind}, free rows", ""
            if layout == "dictionary_learning" and not unit and kind in ("tied", "untied"):
                # their loader makes rows unit and features longer by it
                peer = AutoEncoder.from_pretrained(folder / "ae.pt", normalize_decoder=False)
                more = " (normalize_decoder=False)"
            row("ours -> theirs", layout, what + more, ours=ours, peer=peer)
            again = load_sae(folder, normalize_decoder=False)
            row("and back", layout, what, ours=again, peer=peer)
    told = SAE.load_from_disk(ROOT / "saelens-topk-True").cfg.metadata
    wanted = told.hook_name, told.model_name, told.prepend_bos, told.context_size
    assert wanted == ("blocks.2.hook_resid_post", "stories", True, 256), told


@torch.no_grad()
def heads_in_saelens():
    "At heads.1 its hook_z has a dimension for the heads."
    ours, x = random_sae("untied"), X.view(64, 4, 4)
    export_sae(ours, ROOT / "hook_z", "saelens", site="heads.1")
    z = SAE.load_from_disk(ROOT / "hook_z")
    f = ours.encode(X)
    off = (z.encode(x) - f).abs().max(), (z(x).flatten(1) - ours.decode(f)).abs().max()
    what = "untied at heads.1 (hook_z)"
    ROWS.append(("ours -> theirs", "saelens", what, *(t.item() for t in off), 0, float("nan")))


def saelens():
    "Its kinds as they are stored, in two dtypes."
    scaled = dict(k=5, rescale_acts_by_decoder_norm=True)
    for name, more in (
        ("Standard", {}),
        ("TopK", dict(k=5)),
        ("TopK", scaled),
        ("JumpReLU", {}),
        ("Gated", {}),
    ):
        cls, config = getattr(saes, f"{name}SAE"), getattr(saes, f"{name}SAEConfig")
        for before in (True, False):
            for dtype in ("float32", "bfloat16"):
                settings = dict(BASE, **more, apply_b_dec_to_input=before, dtype=dtype)
                shake(cls(config(**settings))).save_model(folder := ROOT / "theirs")
                ours = load_sae(folder)
                assert ours.source["site"] == "resid.2" and ours.W_dec.dtype == torch.float32
                what = f"{name}SAE, {more or ''} apply_b_dec_to_input={before}, stored {dtype}"
                theirs("saelens", what, folder, peer=SAE.load_from_disk(folder, dtype="float32"))


@torch.no_grad()
def saelens_others():
    "Kinds that are loaded and not trained here, and states scaled row by row."
    scaled = dict(k=5, rescale_acts_by_decoder_norm=True)
    kinds = [("AbsTopK", dict(k=5)), ("AbsTopK", scaled)]
    kinds += [("MatchingPursuit", more) for more in ({}, dict(max_iterations=4))]
    for rows in ROWS_OF:
        kinds += [(name, dict(normalize_activations=rows)) for name in ("Standard", "JumpReLU")]
        kinds += [("TopK", scaled | dict(normalize_activations=rows))]
    for name, more in kinds:
        for before in (True, False):
            config = getattr(saes, f"{name}SAEConfig")(**BASE, **more, apply_b_dec_to_input=before)
            peer = shake(getattr(saes, f"{name}SAE")(config))
            if name == "MatchingPursuit":  # whose rows are unit
                peer.W_dec /= peer.W_dec.norm(dim=-1, keepdim=True)
            peer.save_model(folder := ROOT / f"other-{len(ROWS)}")
            what = f"{name}SAE, {more or ''} apply_b_dec_to_input={before}"
            theirs("saelens", what, folder, peer=SAE.load_from_disk(folder))


def saelens_trained():
    "Its kinds as training leaves them, and a file of an old version."
    for name, more in (
        ("BatchTopK", dict(k=5)),
        ("MatryoshkaBatchTopK", dict(k=5, matryoshka_widths=[10, N])),
        ("TopK", dict(k=5)),
        ("Standard", {}),
        ("JumpReLU", {}),
        ("Gated", {}),
    ):
        config = getattr(saes, f"{name}TrainingSAEConfig")(**BASE, **more)
        peer = shake(getattr(saes, f"{name}TrainingSAE")(config))
        if hasattr(peer, "topk_threshold"):
            peer.topk_threshold.fill_(0.4)
        peer.save_inference_model(folder := ROOT / "trained")
        what = f"{name}TrainingSAE, save_inference_model"
        theirs("saelens", what, folder, peer=SAE.load_from_disk(folder))
    old = dict(
        d_in=D,
        d_sae=N,
        dtype="float32",
        hook_point="blocks.3.hook_resid_pre",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": 5},
        apply_b_dec_to_input=False,
        normalize_activations=False,
    )
    saes.TopKSAE(saes.TopKSAEConfig(**BASE, k=5)).save_model(folder := ROOT / "old")
    (folder / "cfg.json").write_text(json.dumps(old))
    what = "cfg.json as before 6.0, activation_fn_str topk"
    theirs("saelens", what, folder, peer=SAE.load_from_disk(folder))


def dictionary_learning():
    "What its trainers leave."
    groups = dict(k=5, group_fractions=[0.25, 0.25, 0.5])
    for cls, more in (
        (standard.StandardTrainer, {}),
        (standard.StandardTrainerAprilUpdate, {}),
        (top_k.TopKTrainer, dict(k=5)),
        (batch_top_k.BatchTopKTrainer, dict(k=5)),
        (matryoshka.MatryoshkaBatchTopKTrainer, groups),
        (gdm.GatedSAETrainer, {}),
        (jumprelu.JumpReluTrainer, {}),
    ):
        for learnt in (True, False) if "BatchTopK" in cls.__name__ else (True,):
            trainer = cls(**trainer_sizes(), **more)
            shake(trainer.ae)
            if learnt and hasattr(trainer.ae, "k"):
                trainer.ae.threshold.fill_(0.5)
            folder = ROOT / f"dl-{cls.__name__}-{learnt}"
            config = {"trainer": trainer.config, "buffer": {"io": "out"}}
            write_theirs(folder, trainer.ae.state_dict(), config)
            with contextlib.redirect_stdout(io.StringIO()):  # rows made unit
                peer = LOADS["dictionary_learning"](folder)
            what = cls.__name__ if learnt else f"{cls.__name__}, threshold never learnt"
            theirs("dictionary_learning", what, folder, peer=peer)
    new, folder = shake(AutoEncoderNew(D, N)), ROOT / "dl-new"
    write_theirs(folder, new.state_dict(), {"trainer": {"dict_class": "AutoEncoderNew"}})
    theirs("dictionary_learning", "AutoEncoderNew", folder, peer=new)


def trainer_sizes():
    "What all its trainers want."
    sizes = dict(steps=10_000, activation_dim=D, dict_size=N)
    return sizes | dict(layer=2, lm_name="x", device="cpu")


def eai_sparsify():
    "Its one kind, by size and form."
    free = dict(num_latents=N, normalize_decoder=False, multi_topk=True)
    groups = dict(num_latents=N, activation="groupmax", normalize_decoder=True, k=8)
    for more in (dict(num_latents=N), dict(expansion_factor=3), free, groups):
        peer = shake(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(**(dict(k=5) | more))))
        peer.save_to_disk(folder := ROOT / f"sparsify-{len(more)}")
        theirs("sparsify", f"SparseCoder {more}", folder, peer=peer)


def saelens_scaled(factor=2.5):
    "For states scaled to a mean length; the peer folds the factor itself."
    how = dict(BASE, normalize_activations="expected_average_only_in")
    peer = shake(saes.StandardSAE(saes.StandardSAEConfig(**how)))
    peer.save_model(folder := ROOT / "scaled")
    peer.fold_activation_norm_scaling_factor(factor)
    ours = load_sae(folder, norm_scaling_factor=factor)
    row("theirs -> ours", "saelens", "StandardSAE, states scaled by 2.5", ours=ours, peer=peer)


def saelens_checkpoints():
    "Its BatchTopK kinds as a training run leaves them; the peer: the same, saved for inference."
    for name, more in (
        ("BatchTopK", dict(k=5)),
        ("MatryoshkaBatchTopK", dict(k=5, matryoshka_widths=[10, N])),
    ):
        for rescale in (True, False):
            how = dict(rescale_acts_by_decoder_norm=rescale)
            config = getattr(saes, f"{name}TrainingSAEConfig")(**BASE, **more, **how)
            peer = shake(getattr(saes, f"{name}TrainingSAE")(config))
            peer.topk_threshold.fill_(0.4)
            peer.save_model(folder := ROOT / f"{name}-{rescale}")
            ours = load_sae(folder)
            peer.save_inference_model(done := ROOT / f"{name}-{rescale}-done")
            what = f"{name}TrainingSAE's checkpoint, rescale={rescale}"
            row("theirs -> ours", "saelens", what, ours=ours, peer=SAE.load_from_disk(done))


def unit_rows():
    "dictionary_learning's own loader at its default: rows made unit."
    for kind in ("tied", "untied"):
        export_sae(random_sae(kind, unit=False), ROOT / f"rows-{kind}", "dictionary_learning")
        with contextlib.redirect_stdout(io.StringIO()):
            peer = LOADS["dictionary_learning"](ROOT / f"rows-{kind}")
        theirs("dictionary_learning", f"{kind}, free rows", ROOT / f"rows-{kind}", peer=peer)


def penalties(alpha=0.44):
    "Their loss beside the printed equation's: (equation, {peer: loss})."
    ours, folder, other = random_sae("untied"), ROOT / "saelens-untied-True", ROOT / "dl-alpha"
    export_sae(ours, folder, "saelens")
    export_sae(ours, other, "dictionary_learning")
    config = saes.StandardTrainingSAEConfig(d_in=D, d_sae=N, l1_coefficient=1.0)
    lens = saes.StandardTrainingSAE(config)
    lens.load_state_dict(SAE.load_from_disk(folder).state_dict())
    step = saes.sae.TrainStepInput(
        sae_in=X,
        coefficients={"l1": convert_alpha(alpha, D, end="saelens")},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    penalty = dict(l1_penalty=convert_alpha(alpha, D, end="dictionary_learning"))
    trainer = standard.StandardTrainer(**trainer_sizes(), **penalty, sparsity_warmup_steps=None)
    trainer.ae.load_state_dict(torch.load(other / "ae.pt"))
    losses = dict(
        saelens=lens.training_forward_pass(step).loss.item(),
        dictionary_learning=trainer.loss(X, step=50).item(),
    )
    return ours.loss(X, alpha).item(), losses


def main():
    "Compare, print, and tell by the exit status; with an argument, write the page there."
    torch.set_num_threads(1)
    torch.manual_seed(0)  # peers begin from the global draw
    for part in (
        ours_in_theirs,
        heads_in_saelens,
        saelens,
        saelens_others,
        saelens_trained,
        saelens_scaled,
        saelens_checkpoints,
        dictionary_learning,
        eai_sparsify,
        unit_rows,
    ):
        part()
    for suite in (*peers_scopes.ALL, *peers_transcoders.ALL):
        suite(row, ROOT)
    peers = ("sae-lens", "dictionary-learning", "eai-sparsify", "torch")
    versions = ", ".join(f"{peer} {version(peer)}" for peer in peers)
    print(f"{versions}; d = {D}, F = {N}, {len(X)} rows")
    head = ("", "layout", "", "encode", "decode", "flips", "l0")
    print("{:15s} {:20s} {:82s} {:>8s} {:>8s} {:>5s} {:>5s}".format(*head))
    for one in ROWS:
        print("{:15s} {:20s} {:82s} {:8.1e} {:8.1e} {:5d} {:5.1f}".format(*one))
    equation, losses = penalties()
    told = "; ".join(f"{name} {loss:.6f}" for name, loss in losses.items())
    print(f"\nloss at alpha = 0.44 by the equation: {equation:.6f}; {told}")
    covered = coverage(entries(table_of_saelens()))
    if len(sys.argv) > 1:
        write_page(Path(sys.argv[1]), versions, ROWS, n=len(X), covered=covered)
    print(f"SAELens' table by layout: {covered}")
    worst = max(max(one[3:5]) for one in ROWS)
    print(f"largest difference: {worst:.1e}")
    return worst > 1e-5 or max(abs(loss - equation) for loss in losses.values()) > 1e-4


if __name__ == "__main__":
    sys.exit(main())
