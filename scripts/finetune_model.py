"""Finetune a language model with codebooks, in one process or in several; --fsdp splits the model itself over them.

usage: python scripts/finetune_model.py --model pythia-70m --text wikitext-103 --folder out/codes
       torchrun --nproc-per-node 2 scripts/finetune_model.py --model EleutherAI/pythia-1b ...            one whole model a process
       torchrun --nproc-per-node 4 scripts/finetune_model.py --fsdp --bf16 --model EleutherAI/pythia-2.8b ...

A stopped run, called again, goes on from the last whole checkpoint in its folder; folder/result is for CodebookModel.from_pretrained. Recipes: docs/launch.md
"""
import argparse, json, os, shutil, sys
from functools import partial
from pathlib import Path
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PrinterCallback, TrainingArguments, get_cosine_schedule_with_warmup
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel, add_codebooks
from codebook_tutorial.dictionary.codefiles import to_model
from codebook_tutorial.core import device, seeded, set_seed
from codebook_tutorial.dictionary.trainer import CodebookTrainer
from codebook_tutorial.dictionary.finetune import as_dataset, finetune, same_run
from codebook_tutorial.model.run import check_length
from codebook_tutorial.model.hub import load_lm
from codebook_tutorial.model.text import load_text
from codebook_tutorial.model.sites import structure

def options(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    def add(name, default, help, **kw): p.add_argument(name, default=default, help=help + ("" if default is None else f" ({default})"), **({} if "nargs" in kw or default is None else {"type": type(default)}), **kw)
    add("--model", "stories", "a folder, a preset or a Hub id")
    add("--text", None, "a file (.txt .json .jsonl .parquet), a preset or a data set of the Hub; None: the stories")
    add("--split", "train", "which part of the text"); add("--tokens", 1_000_000, "positions of text"); add("--length", 128, "positions a row")
    add("--sites", ["heads.*", "mlp.*"], "where codebooks go", nargs="+"); add("--codes", 1024, "codes a group"); add("--k", 4, "codes chosen at once")
    add("--select", "residual", "how they are chosen", choices=("cosine", "euclidean", "residual")); add("--learn", "ema", "how codes move: ema has neither gradients nor moments", choices=("gradient", "ema"))
    add("--commitment", .25, "pull of the states towards their codes"); add("--recon", 1., "weight of the reconstruction errors"); add("--decay", .99, "of the moving averages")
    add("--start", None, "rows of text from which codes begin; None: 20 tokens a code", type=int)
    add("--steps", 200, "optimiser steps"); add("--batch", 8, "rows at once in each process"); add("--accumulate", 1, "so many batches make a step")
    add("--lr", 5e-4, "highest learning rate"); add("--codes-lr", .01, "that of codes learnt by gradient, in units of their size"); add("--revive-every", 25, "steps between moves of unused codes; 0: never")
    add("--save-every", 100, "steps between checkpoints"); add("--log-every", 25, "steps between logs"); add("--seed", 0, "of codes and order of rows")
    p.add_argument("--folder", type=Path, required=True, help="checkpoints, logs.json and result/ go here")
    p.add_argument("--bf16", action="store_true", help="compute in bfloat16; parameters, moments and codes stay float32")
    p.add_argument("--gradient-checkpointing", action="store_true", help="keep no block's inside for the backward pass, compute it again there: less memory, the forward pass twice")
    p.add_argument("--fsdp", action="store_true", help="split parameters, gradients and moments over the processes (torch's fully_shard)")
    return p.parse_args(argv)

def join(fsdp):
    "Meet the processes that torchrun or accelerate launch started; this one's number, and how many there are."
    cuda = device().type == "cuda"
    if cuda: torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    if (fsdp or not alone) and not dist.is_initialized(): dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **alone)
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def begin(args):
    "Model with codes begun from the text, the same in every process; the tokenizer; the text."
    set_seed(args.seed)
    model, tok = load_lm(args.model)
    text = load_text(tok, args.text, n_tokens=args.tokens, length=args.length, split=args.split)
    check_length(model, args.length, "finetune_model")
    cb = add_codebooks(model, args.sites, args.codes, k=args.k, select=args.select, learn=args.learn, commitment=args.commitment)
    cb.init_from_data(text.ids[:args.start or -(-20 * args.codes // args.length)].split(8), generator=seeded(args.seed), pad=text.pad)
    for book in cb.codebooks.values(): book.resample = partial(resample, book)
    if args.gradient_checkpointing: cb.gradient_checkpointing_enable()
    if dist.is_initialized():                              # GPUs add in any order, so k-means may end elsewhere in each process
        for t in cb.state_dict().values(): dist.broadcast(t, 0)
    return cb, tok, text

# ---- --fsdp: Trainer splits no model on CPUs, so the loop is ours; loss, codes' steps and logs are CodebookTrainer's -----------
def shard(cb, args):
    "Split the model over the processes, block by block, and make the optimiser; moving averages stay whole in each."
    mesh, names = init_device_mesh(cb.device.type, (dist.get_world_size(),)), {p: n for n, p in cb.named_parameters()}
    groups = [g | dict(params=[names[p] for p in g["params"]], initial_lr=g["lr"]) for g in cb.param_groups(args.lr, args.codes_lr)]         # while codes are whole: their size counts
    precision = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy())
    by_code = lambda w: next((Shard(d) for d in (1, 2) if w.shape[d] % mesh.size() == 0), Shard(0))                 # [groups, codes, width]: there may be one group only
    for book in cb.codebooks.values() if args.learn == "gradient" else (): fully_shard(book, mesh=mesh, shard_placement_fn=by_code)        # float32 also with --bf16
    for block in structure(cb.model)[1]: fully_shard(block, **precision)
    fully_shard(cb, ignored_params={b.weight for b in cb.codebooks.values() if b.learn == "ema"}, **precision)
    parts = dict(cb.named_parameters())
    return torch.optim.AdamW([g | dict(params=[parts[n] for n in g["params"]]) for g in groups], betas=(.9, .98))

@torch.no_grad()
def resample(book, x, nats, optimizer, generator):
    "Codebook.resample, for inputs in bfloat16 too; where codes are sharded, on the whole of them, of which each process then keeps its part."
    w, x = book.weight, x.to(book.weight.dtype)
    if not isinstance(w, DTensor): return Codebook.resample(book, x, nats, optimizer=optimizer, generator=generator)
    whole, part = Codebook(**book.config).to(x), lambda t: distribute_tensor(t, w.device_mesh, w.placements, src_data_rank=None)
    whole.weight.data, whole.counts = w.full_tensor(), book.counts
    before = whole.weight.clone()
    whole.resample(x, nats, generator=generator)
    w.copy_(part(whole.weight.data))
    stays = part((whole.weight == before).all(-1, keepdim=True).expand_as(before).to(before))
    for moment in optimizer.state[w].values(): moment.mul_(stays if moment.shape == w.shape else 1)

def state(cb, optimizer, trainer):
    model, moments = get_state_dict(cb, optimizer)
    return dict(model=model, optimizer=moments, counts={site: trainer.total(b.counts.clone()) for site, b in cb.codebooks.items()})

def checkpoints(folder): return sorted((p for p in folder.glob("sharded-*") if p.name[8:].isdigit()), key=lambda p: int(p.name[8:]))

def save(cb, optimizer, trainer, folder, step, rank):
    "sharded-N, written under another name and renamed when it is whole; the two newest are kept."
    part, kept = folder / f"sharded-{step}.part", checkpoints(folder)
    if rank == 0: shutil.rmtree(part, ignore_errors=True)                  # of a stop in mid-writing; the others write when this process has planned
    dcp.save(state(cb, optimizer, trainer), checkpoint_id=part)
    if rank == 0:
        (part / "run.json").write_text(json.dumps(dict(logs=trainer.state.log_history, books={site: b.config for site, b in cb.codebooks.items()}))); part.replace(part.with_suffix(""))
        for old in kept[:-1]: shutil.rmtree(old)
    dist.barrier()

def resume(cb, optimizer, trainer, text, folder, rank):
    "Load the last whole checkpoint; returns the steps done, 0 if there is none; ValueError if it is of another run."
    last = (checkpoints(folder) or [None])[-1]
    same_run(trainer, text, last)
    if last is None: return 0
    found, books = json.loads((last / "run.json").read_text()), {site: b.config for site, b in cb.codebooks.items()}
    if found["books"] != books: raise ValueError(f"--fsdp: {last} has the codebooks {found['books']}, expected {books}; give another folder")
    if (done := int(last.name[8:])) > trainer.state.max_steps: raise ValueError(f"--fsdp: {last} is further than --steps {trainer.state.max_steps}; give another folder")
    dcp.load(kept := state(cb, optimizer, trainer), checkpoint_id=last)
    set_state_dict(cb, optimizer, model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
    for site, book in cb.codebooks.items(): book.counts.copy_(kept["counts"][site] * (rank == 0))            # they are summed again later
    trainer.state.log_history = found["logs"]
    return done

def train(cb, text, args, rank, world):
    "Train a model split over all processes; returns the logs."
    own, rows = args.batch * args.accumulate, as_dataset(text)
    if len(text) < own * world: raise ValueError(f"--fsdp: a step takes {own * world} rows (batch x accumulate x processes), the text has {len(text)}; give more --tokens or a smaller --batch")
    trainer = CodebookTrainer(cb, TrainingArguments(str(args.folder), max_steps=args.steps, learning_rate=args.lr, per_device_train_batch_size=args.batch, gradient_accumulation_steps=args.accumulate, logging_steps=args.log_every,
                              seed=args.seed, report_to="none", disable_tqdm=True, use_cpu=cb.device.type == "cpu"), train_dataset=rows, recon=args.recon, decay=args.decay, codes_lr=args.codes_lr, revive_every=args.revive_every)
    trainer.remove_callback(PrinterCallback); trainer.measure_power()
    trainer.optimizer = optimizer = shard(cb, args)
    trainer.state.max_steps = args.steps
    trainer.logged = done = resume(cb, optimizer, trainer, text, args.folder, rank)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps, last_epoch=done - 1)
    cb.train()
    for step in (bar := tqdm(range(done, args.steps), initial=done, total=args.steps, desc="finetune", unit="step", **({"disable": True} if rank else {}))):
        epoch, i = divmod(step, len(rows) // (own * world))
        mine = torch.randperm(len(rows), generator=seeded(args.seed * 1_000_003 + epoch))[(i * world + rank) * own:][:own]
        batches = [{n: torch.stack([rows[j][n] for j in some]).to(cb.device) for n in rows[0]} for some in mine.split(args.batch)]
        torch.manual_seed((args.seed * 1_000_003 + step) * world + rank)                                           # of dropout: a resumed run draws the same
        loss, trainer.state.global_step, trainer.state.epoch = 0., step, (step + 1) * own * world / len(rows)
        for batch in trainer.get_batch_samples(iter(batches), len(batches), cb.device)[0]:
            with torch.autocast(cb.device.type, torch.bfloat16, enabled=args.bf16): part = trainer.compute_loss(cb, batch)
            part.backward(); loss += part.detach() / world
        norm, lr = torch.nn.utils.clip_grad_norm_(cb.parameters(), 1.).full_tensor().item(), schedule.get_last_lr()[0]
        optimizer.step(); schedule.step(); optimizer.zero_grad()
        trainer.state.global_step += 1; trainer.codes_step(); trainer.usage.pop("code_norm", None)               # of a part of the codes only
        if (step + 1) % args.log_every == 0: trainer.log(dict(loss=trainer.total(loss).item(), grad_norm=norm, learning_rate=lr)); bar.set_postfix(loss=f"{trainer.state.log_history[-1]['lm_loss']:.3f}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps: save(cb, optimizer, trainer, args.folder, step + 1, rank)
    return trainer.state.log_history

def whole(cb, rank):
    "A sharded model, put together in process 0."
    full = get_model_state_dict(cb, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank: return None
    model = AutoModelForCausalLM.from_config(cb.config)
    model.generation_config = cb.model.generation_config
    found = CodebookModel(model, {site: to_model(Codebook(**book.config), model) for site, book in cb.codebooks.items()})
    found.load_state_dict(full)
    return found

def main(argv=None):
    args = options(argv)
    rank, world = join(args.fsdp)
    if rank == 0: print(f"finetune_model: {world} process{'es' * (world > 1)} on {device()}" + ("; in one process --fsdp splits nothing: start it with torchrun --nproc-per-node N" if args.fsdp and world == 1 else ""), file=sys.stderr)
    cb, tok, text = begin(args)
    if args.fsdp: logs = train(cb, text, args, rank, world); cb = whole(cb, rank)
    else: logs = finetune(cb, text, args.steps, lr=args.lr, batch=args.batch, folder=args.folder, save_every=args.save_every, log_every=args.log_every, seed=args.seed, bf16=args.bf16, gradient_accumulation_steps=args.accumulate,
                          recon=args.recon, decay=args.decay, codes_lr=args.codes_lr, revive_every=args.revive_every)
    if rank == 0: (args.folder / "logs.json").write_text(json.dumps(logs, indent=1)); cb.save_with_card(args.folder / "result", tok)
    if dist.is_initialized(): dist.barrier(); dist.destroy_process_group()


if __name__ == "__main__":
    try: main()
    except (ValueError, ConnectionError) as e: sys.exit(f"finetune_model: {e}")
