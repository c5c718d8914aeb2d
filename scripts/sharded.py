"""`finetune_model.py --fsdp`: training of a model split over the processes.

Trainer splits no model on CPUs, so the loop is ours; loss, the codes' steps and logs are
CodebookTrainer's.
"""

import json
import shutil

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.bottleneck import CodebookModel
from codebook_tutorial.dictionary.codefiles import to_model
from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.trainer import CodebookTrainer
from codebook_tutorial.dictionary.finetune import same_run, as_dataset
from codebook_tutorial.model.structure import blocks_of


def shard(cb, args):
    "Split the model block by block, and make the optimiser; moving averages stay whole in each."
    mesh = init_device_mesh(cb.device.type, (dist.get_world_size(),))
    names, groups = {p: n for n, p in cb.named_parameters()}, []
    for g in cb.param_groups(args.lr, args.codes_lr):  # while codes are whole: their size counts
        groups.append(g | dict(params=[names[p] for p in g["params"]], initial_lr=g["lr"]))
    half = (torch.bfloat16, torch.float32) if args.bf16 else ()
    precision = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(*half))

    def by_code(w):  # [groups, codes, width]: there may be one group only
        return next((Shard(d) for d in (1, 2) if w.shape[d] % mesh.size() == 0), Shard(0))

    for book in cb.codebooks.values() if args.learn == "gradient" else ():
        fully_shard(book, mesh=mesh, shard_placement_fn=by_code)  # float32 also with --bf16
    for block in blocks_of(cb.model):
        fully_shard(block, **precision)
    averaged = {b.weight for b in cb.codebooks.values() if b.learn == "ema"}
    fully_shard(cb, ignored_params=averaged, **precision)
    parts = dict(cb.named_parameters())
    groups = [g | dict(params=[parts[n] for n in g["params"]]) for g in groups]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


@torch.no_grad()
def resample(book, x, nats, *, optimizer, generator):
    "Codebook.resample, for inputs in bfloat16 and for sharded codes too."
    w, x = book.weight, x.to(book.weight.dtype)
    if not isinstance(w, DTensor):
        return Codebook.resample(book, x, nats, optimizer=optimizer, generator=generator)

    def part(t):  # of the whole, what this process keeps
        return distribute_tensor(t, w.device_mesh, w.placements, src_data_rank=None)

    whole = Codebook(**book.config).to(x)
    whole.weight.data, whole.counts = w.full_tensor(), book.counts
    before = whole.weight.clone()
    whole.resample(x, nats, generator=generator)
    w.copy_(part(whole.weight.data))
    stays = part((whole.weight == before).all(-1, keepdim=True).expand_as(before).to(before))
    for moment in optimizer.state[w].values():
        moment.mul_(stays if moment.shape == w.shape else 1)


def make_trainer(cb, rows, args):
    "Of which loss, codes' steps and logs are used."
    settings = TrainingArguments(
        str(args.folder),
        max_steps=args.steps,
        learning_rate=args.lr,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        logging_steps=args.log_every,
        seed=args.seed,
        report_to="none",
        disable_tqdm=True,
        use_cpu=cb.device.type == "cpu",
    )
    names = ("recon", "decay", "codes_lr", "resample_every")
    codes = {name: getattr(args, name) for name in names}
    trainer = CodebookTrainer(cb, settings, train_dataset=rows, **codes)
    trainer.remove_callback(PrinterCallback)
    trainer.measure_power()
    trainer.state.max_steps = args.steps
    return trainer


def checkpoints(folder):
    "The whole ones, by step."
    found = (p for p in folder.glob("sharded-*") if p.name[8:].isdigit())
    return sorted(found, key=lambda p: int(p.name[8:]))


class Sharded:
    "One process's part of the training."

    def __init__(self, cb, text, args):
        self.cb, self.text, self.args = cb, text, args
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.rows, self.own = as_dataset(text), args.batch * args.accumulate
        if len(text) < self.own * self.world:
            raise ValueError(
                f"--fsdp: a step takes {self.own * self.world} rows (batch x accumulate x"
                f" processes), the text has {len(text)}; give more --tokens or a smaller --batch"
            )
        self.trainer = make_trainer(cb, self.rows, args)
        self.trainer.optimizer = self.optimizer = shard(cb, args)

    def books(self):
        "How the codebooks are set."
        return {site: book.config for site, book in self.cb.codebooks.items()}

    def state(self):
        "What a checkpoint holds."
        model, moments = get_state_dict(self.cb, self.optimizer)
        books, total = self.cb.codebooks.items(), self.trainer.total
        counts = {site: total(book.counts.clone()) for site, book in books}
        return dict(model=model, optimizer=moments, counts=counts)

    def save(self, step):
        "sharded-N, written under another name, renamed when it is whole; the two newest are kept."
        part, kept = self.args.folder / f"sharded-{step}.part", checkpoints(self.args.folder)
        if self.rank == 0:  # of a stop in mid-writing; others write when this process has planned
            shutil.rmtree(part, ignore_errors=True)
        dcp.save(self.state(), checkpoint_id=part)
        if self.rank == 0:
            run = dict(logs=self.trainer.state.log_history, books=self.books())
            (part / "run.json").write_text(json.dumps(run))
            part.replace(part.with_suffix(""))
            for old in kept[:-1]:
                shutil.rmtree(old)
        dist.barrier()

    def resume(self):
        "Load the last whole checkpoint; the steps done; ValueError if it is of another run."
        last, most = (checkpoints(self.args.folder) or [None])[-1], self.args.steps
        same_run(self.trainer, self.text, last)
        if last is None:
            return 0
        found, books = json.loads((last / "run.json").read_text()), self.books()
        if found["books"] != books:
            raise ValueError(
                f"--fsdp: {last} has the codebooks {found['books']}, expected {books};"
                " give another folder"
            )
        if (done := int(last.name[8:])) > most:
            raise ValueError(f"--fsdp: {last} is further than --steps {most}; give another folder")
        dcp.load(kept := self.state(), checkpoint_id=last)
        states = dict(model_state_dict=kept["model"], optim_state_dict=kept["optimizer"])
        set_state_dict(self.cb, self.optimizer, **states)
        for site, book in self.cb.codebooks.items():  # they are summed again later
            book.counts.copy_(kept["counts"][site] * (self.rank == 0))
        self.trainer.state.log_history = found["logs"]
        return done

    def batches(self, step):
        "This process's rows of a step; the same again in a run that resumes."
        seed, all_own = self.args.seed * 1_000_003, self.own * self.world
        epoch, i = divmod(step, len(self.rows) // all_own)
        order = torch.randperm(len(self.rows), generator=seeded(seed + epoch))
        mine = order[(i * self.world + self.rank) * self.own :][: self.own]
        torch.manual_seed((seed + step) * self.world + self.rank)  # of dropout
        self.trainer.state.epoch = (step + 1) * all_own / len(self.rows)
        for some in mine.split(self.args.batch):
            rows = [self.rows[j] for j in some]
            yield {n: torch.stack([r[n] for r in rows]).to(self.cb.device) for n in rows[0]}

    def step(self, step, schedule):
        "One step of the optimiser and of the codes; what is logged."
        cb, trainer, loss = self.cb, self.trainer, 0.0
        batches, trainer.state.global_step = list(self.batches(step)), step
        for batch in trainer.get_batch_samples(iter(batches), len(batches), cb.device)[0]:
            with torch.autocast(cb.device.type, torch.bfloat16, enabled=self.args.bf16):
                part = trainer.compute_loss(cb, batch)
            part.backward()
            loss += part.detach() / self.world
        norm = torch.nn.utils.clip_grad_norm_(cb.parameters(), 1.0).full_tensor().item()
        lr = schedule.get_last_lr()[0]
        self.optimizer.step()
        schedule.step()
        self.optimizer.zero_grad()
        trainer.state.global_step += 1
        trainer.codes_step()
        trainer.usage.pop("code_norm", None)  # of a part of the codes only
        return dict(loss=loss, grad_norm=norm, learning_rate=lr)

    def train(self):
        "All steps that are not done yet; the logs."
        args, trainer = self.args, self.trainer
        trainer.logged = done = self.resume()
        warmup = dict(num_warmup_steps=args.steps // 10, num_training_steps=args.steps)
        schedule = get_cosine_schedule_with_warmup(self.optimizer, **warmup, last_epoch=done - 1)
        bar = dict(initial=done, total=args.steps, desc="finetune", unit="step")
        bar = tqdm(range(done, args.steps), **bar, **({"disable": True} if self.rank else {}))
        self.cb.train()
        for step in bar:
            row = self.step(step, schedule)
            if (step + 1) % args.log_every == 0:
                trainer.log(row | dict(loss=trainer.total(row["loss"]).item()))
                bar.set_postfix(loss=f"{trainer.state.log_history[-1]['lm_loss']:.3f}")
            if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
                self.save(step + 1)
        return trainer.state.log_history

    def whole(self):
        "The model put together in process 0."
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_model_state_dict(self.cb, options=options)
        if self.rank:
            return None
        model = AutoModelForCausalLM.from_config(self.cb.config)
        model.generation_config = self.cb.model.generation_config
        books = {site: to_model(Codebook(**own), model) for site, own in self.books().items()}
        found = CodebookModel(model, books)
        found.load_state_dict(full)
        return found
