"""Train the language model of the stories that the course ships in data/stories: about half an hour
on one CPU core per seed.

The learning rate stays constant until the criteria hold (indirect objects found for held-out pairs
of names, the month remembered, loss near the entropy of the text), then falls to zero. A stopped
run resumes from its last checkpoint in out/stories_SEED.

usage: python data/make_stories.py [--seed 0] [--out data/stories]
"""

import argparse
import hashlib
import json
import time
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from codebook_tutorial.world.questions import ask
from codebook_tutorial.core import data_path, device
from codebook_tutorial.world.fsm import init_weights
from codebook_tutorial.model.run import next_probs
from codebook_tutorial.world.grammar import ID, VOCABULARY
from codebook_tutorial.model.text import fill_rows
from codebook_tutorial.world.prompts import gift_prompts
from codebook_tutorial.world.stories import make_tokenizer, stories

ROOT = Path(__file__).resolve().parents[1]
BOS, PAD, LENGTH, BATCH = ID["<bos>"], ID["<pad>"], 256, 6


def new_model(seed, d_model=96, n_layers=3, *, n_heads=4):
    "An untrained GPT-NeoX with rotary positions; attention first, then the MLP."
    rope = dict(rope_type="default", rope_theta=10_000.0, partial_rotary_factor=1.0)
    config = GPTNeoXConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        intermediate_size=4 * d_model,
        max_position_embeddings=LENGTH,
        rope_parameters=rope,
        use_parallel_residual=False,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(seed)
    return init_weights(GPTNeoXForCausalLM(config)).to(device())


def batches(seed, split, skip=0):
    "An endless stream of [BATCH, LENGTH] token ids; `skip`: batches to leave out."
    rows = islice(
        fill_rows((s.ids.tolist() for s in stories(seed, split)), LENGTH, BOS, pad=PAD),
        skip * BATCH,
        None,
    )
    while True:
        yield torch.tensor(list(islice(rows, BATCH))).to(device())


def loss_of(model, ids):
    "Nats a token, documents' ends included, padding not."
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].masked_fill(ids[:, 1:] == PAD, -100).flatten()
    )


@torch.no_grad()
def score(model, prompts, text):
    "Loss on unseen text; share and probability of right receivers; month remembered."
    p, answer = (
        next_probs(model, [q.ids for q in prompts]),
        torch.tensor([q.answer for q in prompts]),
    )
    months = ask(model, "month", 100)["score"].mean().item()
    return dict(
        loss=sum(loss_of(model, ids).item() for ids in text) / len(text),
        ioi=(p.argmax(-1) == answer).double().mean().item(),
        ioi_p=p.gather(1, answer[:, None]).mean().item(),
        month=months,
    )


def save_checkpoint(path, state, *, model, opt):
    "Weights, optimiser and progress in one file, written under another name and then renamed."
    tensors = {f"model.{k}": v.detach() for k, v in model.named_parameters()}
    tensors |= {
        f"opt.{i}.{k}": v for i, s in opt.state_dict()["state"].items() for k, v in s.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        path.with_suffix(".part"),
        {"state": json.dumps(state)},
    )
    path.with_suffix(".part").replace(path)


def load_checkpoint(path, recipe, *, model, opt):
    "Fill model and optimiser, return the progress; refuse another recipe or language."
    with safe_open(path, "pt") as f:
        tensors, state = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["state"])
    if state["recipe"] != recipe:
        raise SystemExit(
            f"{path} belongs to another training ({state['recipe']}, not {recipe});"
            " delete it or move it away"
        )
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(tensors[f"model.{k}"])
    saved = opt.state_dict()
    for k, v in tensors.items():
        if k.startswith("opt."):
            saved["state"].setdefault(int(k.split(".")[1]), {})[k.split(".", 2)[2]] = v
    opt.load_state_dict(saved)
    return state


def entropy(n=4000):
    "Entropy of the generator's choices, nats a token, estimated on n documents of the test stream."
    some = list(islice(stories(0, "test"), n))
    return sum(s.nats.sum() for s in some) / sum(len(s) + 1 for s in some)


def next_state(state, now, args, *, floor):
    "Where training stands after a measurement: criteria met, and when the rate began to fall."
    found = min(now["ioi"], now["month"]) >= 0.95 and now["loss"] <= floor + args.gap
    state["met"] = state["met"] + 1 if found else 0
    enough = state["met"] == 2 or state["step"] >= args.most
    if state["falling"] < 0 and enough:
        state["falling"] = state["step"]


def rate_of(state, fall):
    "Share of the learning rate: 100 steps of warm-up, constant, then down to zero."
    if state["falling"] < 0:
        return min(1, (state["step"] + 1) / 100)
    return 1 - (state["step"] - state["falling"]) / fall


def optimise(model, opt, ids, *, lr):
    "One step; returns the loss."
    for group in opt.param_groups:
        group["lr"] = lr
    loss = loss_of(model, ids)
    opt.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    opt.step()
    return loss.item()


def train(args, model):
    "Constant rate until the criteria hold twice in a row, then to zero; what training.json keeps."
    betas = dict(betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    opt = torch.optim.AdamW(model.parameters(), lr=args.lr, **betas)
    path = ROOT / f"out/stories_{args.seed}/checkpoint.safetensors"
    prompts, text, floor = (
        gift_prompts(300, seed=1),
        list(islice(batches(1, "test"), 12)),
        entropy(),
    )
    recipe = {key: getattr(args, key) for key in ("seed", "lr", "fall", "most", "gap")}
    recipe["grammar"] = hashlib.sha256(data_path("stories/grammar.toml").read_bytes()).hexdigest()
    state = dict(recipe=recipe, step=0, falling=-1, met=0, cpu_s=0.0)
    if path.exists():
        state = load_checkpoint(path, recipe, model=model, opt=opt)
    losses, last = [], time.process_time()
    stream = batches(args.seed, "train", skip=state["step"])
    while state["falling"] < 0 or state["step"] < state["falling"] + args.fall:
        lr = args.lr * rate_of(state, args.fall)
        losses.append(optimise(model, opt, next(stream), lr=lr))
        state["step"] += 1
        if state["step"] % 500:
            continue
        now = score(model, prompts, text)
        state["cpu_s"] += time.process_time() - last
        last = time.process_time()
        row = dict(step=state["step"], train=sum(losses[-500:]) / len(losses[-500:]), **now)
        row |= dict(floor=floor, falling=state["falling"], cpu_s=state["cpu_s"])
        print(json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
        next_state(state, now, args, floor=floor)
        save_checkpoint(path, state, model=model, opt=opt)
    found = dict(seed=args.seed, steps=state["step"], falling=state["falling"])
    found |= dict(tokens=state["step"] * BATCH * LENGTH, lr=args.lr, gap=args.gap, fall=args.fall)
    return found | score(model, prompts, text) | dict(floor=floor, hours=state["cpu_s"] / 3600)


CARD = """# A small language model of the stories
GPT-NeoX of transformers: {layers} layers, d_model {width}, {heads} heads, {parameters:,}
parameters, rotary positions, {length} positions, float32; a word-level tokenizer of
{vocabulary:,} words and marks.

**Data.** Stories of `codebook_tutorial.stories` (grammar.toml beside this file), endless
stream, split "train", seed {seed}: {tokens:,} positions, each read once. One pair of names in
ten never shares a sentence there.

**Training.** `python data/make_stories.py --seed {seed}`: AdamW (0.9, 0.98), no weight decay,
learning rate {lr}, constant until indirect objects and months were found in 95 % of unseen
cases and the loss came within {gap} nats of the entropy (step {falling}), then linearly to zero
over {fall} steps; {batch} rows of {length} tokens a step, gradients clipped at 1; seed {seed}
of the weights as well; one CPU core, {hours:.2f} hours; torch {torch}.

**Result.** Loss {loss:.4f} nats a token on unseen stories (their entropy: {floor:.4f}); the
receiver is the likeliest word in {ioi:.1%} of sentences with such held-out pairs (its
probability {ioi_p:.3f}).

**Use.** For the course. It has read nothing but these stories. Licence: Apache-2.0. sha256 of
model.safetensors: {sha256}
"""


def write_model(folder, model, training):
    "Model, tokenizer, training.json and card, as a folder that from_pretrained reads."
    model.cpu().eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    c, sha = model.config, hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "README.md").write_text(
        CARD.format(
            **training,
            layers=c.num_hidden_layers,
            width=c.hidden_size,
            heads=c.num_attention_heads,
            parameters=model.num_parameters(),
            vocabulary=c.vocab_size,
            length=LENGTH,
            batch=BATCH,
            torch=torch.__version__.split("+")[0],
            sha256=sha,
        ),
        encoding="utf-8",
    )
    return sha


def options():
    "What the command line asks for."
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--seed", type=int, default=0, help="of the weights and of the training stream")
    p.add_argument("--lr", type=float, default=2.5e-3)
    gap = "criterion: loss above the entropy, nats per token, at constant rate (%(default)s)"
    p.add_argument("--gap", type=float, default=0.2, help=gap)
    fall = "steps over which the rate falls to zero (%(default)s)"
    p.add_argument("--fall", type=int, default=6000, help=fall)
    most = "steps at constant rate at most; more: the script fails (%(default)s)"
    p.add_argument("--most", type=int, default=16000, help=most)
    p.add_argument("--out", type=Path, default=ROOT / "data/stories")
    return p.parse_args()


def main():
    "Train until the criteria hold, and write the model's folder."
    args = options()
    torch.set_num_threads(1)  # sums in a fixed order: the same weights on the same kind of machine
    model = new_model(args.seed)
    found = train(args, model)
    met = min(found["ioi"], found["month"]) >= 0.95 and found["loss"] <= found["floor"] + args.gap
    if not met:
        raise SystemExit(f"the criteria do not hold: {found}; nothing written")
    print(write_model(args.out, model, found))


if __name__ == "__main__":
    main()
