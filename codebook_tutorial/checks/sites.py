__all__ = [
    "check_zero_last",
    "check_keep_head",
    "check_moved_share",
    "check_answer_00_4",
    "check_adder",
    "check_attention_share",
]

import torch

from codebook_tutorial.core import jsd, seeded
from codebook_tutorial.model.sites import capture

from .core import Verdict, check, check_choice


def _x(seed=0, d=8):
    return torch.randn(2, 5, d, generator=seeded(seed))


def check_zero_last(zero_last):
    "Exercise 00.1."
    x = _x()
    right, first, d, fed = (x.clone() for _ in range(4))
    right[:, -1] = 0
    first[:, 0] = 0
    d[..., -1] = 0
    verdict = check(
        lambda: zero_last(fed),
        right,
        {
            "you set every position to zero; only the last one, x[:, -1]": torch.zeros_like(x),
            "that is the first position; the last is x[:, -1]": first,
            "you cut the last of the d numbers; the positions are the middle axis: x[:, -1]": d,
            "nothing changed": x,
        },
    )
    if verdict and not torch.equal(fed, x):
        return Verdict(
            False,
            "right values, but you wrote into x itself, which the "
            "model still needs: work on x.clone()",
        )
    return verdict


def check_keep_head(keep_head):
    "Exercise 00.2."
    x = _x()
    right = torch.zeros_like(x)
    right[..., 4:6] = x[..., 4:6]
    other = torch.zeros_like(x)
    other[..., 2::4] = x[..., 2::4]
    return check(
        lambda: keep_head(x.clone(), 2, 4),
        right,
        {
            "you took every 4th number: heads stand side by side, not interleaved": other,
            "you removed the head instead of keeping it": x - right,
            "the shape must stay [batch, seq, n_heads * d_head]": x[..., 4:6],
        },
    )


def check_moved_share(moved_share):
    "Exercise 00.3."
    p, a, b = (torch.randn(50, 10, generator=seeded(s)).mul(2).softmax(-1) for s in range(3))
    left = jsd(p, b).mean() / jsd(a, b).mean()
    ratios = 1 - jsd(p, b) / jsd(a, b)
    return check(
        lambda: moved_share(p, a, b),
        1 - left,
        {
            "that is the share that is *left*; the share moved is one minus it": left,
            "you took the mean of the ratios; take the ratio of the means": ratios.mean(),
            "you compared with a; the question is how near to b it came": (
                1 - jsd(p, a).mean() / jsd(a, b).mean()
            ),
            "one number is wanted: take means": ratios,
        },
    )


def check_answer_00_4(answer):
    "Exercise 00.4."
    return check_choice(
        answer,
        "b",
        "yes: a bar that could not have come out otherwise tells nothing about this model",
        why_not={
            "a": "an untrained model has the same bar; what could have come out otherwise?",
            "c": "it answers as walk b does, and b differs from pair to pair",
        },
    )


def check_adder(adder):
    "Exercise 00.5."
    x, v = _x(), torch.arange(1.0, 9.0)
    n = x.norm(dim=-1, keepdim=True)
    short = 0.5 * v / v.norm()
    return check(
        lambda: adder(v, 0.5)(x.clone()),
        x + 0.5 * n * v / v.norm(),
        {
            "you added the scale times v itself; make v one long, then as long as x": x + 0.5 * v,
            "the added vector must be as long as x at that position, times scale": x + short,
            "v is not one long yet: divide by v.norm()": x + 0.5 * n * v,
            "you returned the addition alone, without x": 0.5 * n * v / v.norm(),
        },
    )


def _small_llama():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=11,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        bos_token_id=10,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def check_attention_share(attention_share):
    "Exercise 00.6."
    model = _small_llama()
    ids = torch.randint(10, (2, 7), generator=seeded(0))
    with capture(model, "*") as acts, torch.no_grad():
        model(ids)

    def size(site):
        return acts[site].norm(dim=-1)

    def share(a, b):
        return (size(a) / (size(a) + size(b))).mean()

    return check(
        lambda: attention_share(model, ids, 1),
        share("attn.1", "mlp.1"),
        {
            "that is the MLP's share": share("mlp.1", "attn.1"),
            "that is another layer": share("attn.0", "mlp.0"),
            "divide by what both add, not by the stream": (size("attn.1") / size("resid.1")).mean(),
            "take the share at each position, then the mean": (
                size("attn.1").mean() / (size("attn.1") + size("mlp.1")).mean()
            ),
        },
    )
