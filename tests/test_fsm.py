"""The world with known answers: exact numbers, the branch trick against plain passes,
and the shipped models."""

import hashlib
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.world.fsm import (
    TokFSM,
    bayes,
    best_f1,
    detector_scores,
    drop_first_digit,
    fsm_model,
    generate_walks,
    legal_mass,
    legal_steps,
    next_state_probs,
    state_accuracy,
    state_labels,
    train_fsm,
)


@pytest.fixture(scope="module")
def fsm():
    return TokFSM()


class Oracle(nn.Module):
    """Knows the world: exact next-digit probabilities from the last complete state.

    Reads branches by position ids and mask."""

    def __init__(self, fsm, mix=0.0):
        super().__init__()
        self.fsm, self.mix, self.p = fsm, mix, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, position_ids=None, *, use_cache=None):
        n, length = input_ids.shape
        sees = (
            torch.ones(length, length).tril().bool()
            if attention_mask is None
            else attention_mask[0, 0] == 0
        )
        position = torch.arange(length) if position_ids is None else position_ids[0]
        out = torch.full((n, length, 11), -30.0)
        step = (self.fsm.legal / self.fsm.n_edges).view(100, 10, 10)
        for i in range(length):
            past = [j for j in range(length) if sees[i, j]]
            past.sort(key=lambda j: position[j])
            digits = input_ids[:, past]
            for row in range(n):
                d, p = digits[row].tolist()[1:], int(position[i])
                if p % 2 == 0:
                    prob = step[10 * d[-2] + d[-1]].sum(-1) if p else torch.full((10,), 0.1)
                else:
                    joint = step[10 * d[-3] + d[-2]][d[-1]] if p > 1 else torch.full((10,), 0.1)
                    prob = joint / joint.sum() if joint.sum() > 0 else torch.full((10,), 0.1)
                out[row, i, :10] = ((1 - self.mix) * prob + self.mix / 10).clamp(min=1e-12).log()
        return SimpleNamespace(logits=out)


def test_the_papers_world(fsm):
    rng = np.random.default_rng(42)
    assert all(
        (fsm.successors[s].numpy() == rng.choice(100, size=10, replace=False)).all()
        for s in range(100)
    )
    assert len({(s, int(t) // 10) for s in range(100) for t in fsm.successors[s]}) == 686
    assert (fsm.legal.sum(1) == 10).all()


def test_bayes_is_the_papers_bound(fsm):
    loss, accuracy = bayes(fsm)
    assert loss == pytest.approx(1.1748, abs=1e-4) and round(100 * accuracy, 2) == 46.38


def test_bayes_against_counting():
    "A world small enough to enumerate: 12 states, every walk of three states with its probability."
    fsm, length = TokFSM(12, 3, seed=1), 7
    walks = [
        ((a, b, c), 1 / 12 / 9)
        for a in range(12)
        for b in fsm.successors[a].tolist()
        for c in fsm.successors[b].tolist()
    ]
    tokens = {w: tuple(fsm.tokens(torch.tensor([w]))[0].tolist()) for w, _ in walks}
    loss = hit = 0.0
    for i in range(1, length):
        prefix, full = {}, {}
        for w, p in walks:
            prefix[tokens[w][:i]] = prefix.get(tokens[w][:i], 0) + p
            full[tokens[w][: i + 1]] = full.get(tokens[w][: i + 1], 0) + p
        loss += sum(-p * math.log(p / prefix[t[:-1]]) for t, p in full.items())
        best = {}
        for t, p in full.items():
            best[t[:-1]] = max(best.get(t[:-1], 0), p)
        hit += sum(best.values())
    assert bayes(fsm, length) == pytest.approx((loss / (length - 1), hit / (length - 1)))


def test_walks_are_legal_and_written_as_digits(fsm):
    ids = fsm.sample(50, 41, seeded(0))
    states = state_labels(ids)[:, 2::2]
    assert ids.shape == (50, 41) and (ids[:, 0] == 10).all() and ids[:, 1:].max() < 10
    assert fsm.legal[states[:, :-1], states[:, 1:]].all()
    assert torch.equal(fsm.sample(5, 20, seeded(1)), fsm.sample(5, 20, seeded(1)))
    assert torch.equal(
        state_labels(torch.tensor([[10, 4, 2, 1, 7, 3]])), torch.tensor([[-1, -1, 42, -1, 17, -1]])
    )


def test_the_stream_never_repeats(fsm):
    stream = fsm.stream(4, 30, seed=0)
    seen = torch.cat([next(stream) for _ in range(600)])  # more than one chunk
    assert seen.shape == (2400, 30) and len(seen.unique(dim=0)) == 2400


@pytest.mark.parametrize("kw", [dict(n_states=101), dict(n_states=5, n_edges=6), dict(n_edges=0)])
def test_an_impossible_world_is_refused(kw):
    with pytest.raises(ValueError, match="expected 1 <= n_edges <= n_states <= 100, got"):
        TokFSM(**kw)


def test_branches_equal_plain_passes(fsm):
    model = fsm_model(d_model=32, n_heads=2, seed=3).eval()
    ids = fsm.sample(3, 11, seeded(2))
    p = next_state_probs(model, ids, rows=2)
    assert p.shape == (3, 5, 100) and torch.allclose(p.sum(-1), torch.ones(3, 5), atol=0.3)
    for end in (2, 6, 10):
        ten = torch.cat(
            [ids[:, : end + 1].repeat_interleave(10, 0), torch.arange(10).repeat(3)[:, None]], 1
        )
        with torch.no_grad():
            q = model(ten).logits[:, -2:].softmax(-1)[..., :10].view(3, 10, 2, 10)
        assert torch.allclose(
            p[:, end // 2 - 1], (q[:, 0, 0, :, None] * q[:, :, 1]).flatten(1), atol=1e-5
        )


def test_legal_mass_of_one_who_knows_and_one_who_does_not(fsm):
    ids = fsm.sample(2, 10, seeded(0))
    assert legal_mass(Oracle(fsm), fsm, ids) == pytest.approx(1, abs=1e-4)
    assert legal_mass(Oracle(fsm, mix=1.0), fsm, ids) == pytest.approx(0.1, abs=1e-4)


def test_state_accuracy_counts_legal_steps(fsm, monkeypatch):
    import codebook_tutorial.world.fsm as module

    true = fsm.sample(40, 128, seeded(0))
    monkeypatch.setattr(module, "generate_walks", lambda *a, **kw: true)
    assert state_accuracy(None, fsm) == 1
    noise = torch.randint(10, (400, 128), generator=seeded(1))
    noise[:, 0] = 10
    monkeypatch.setattr(module, "generate_walks", lambda *a, **kw: noise)
    assert state_accuracy(None, fsm) == pytest.approx(0.1, abs=0.01)
    broken = true.clone()
    broken[:, 3] = 10  # "begin" in the middle: two illegal steps of 62
    monkeypatch.setattr(module, "generate_walks", lambda *a, **kw: broken)
    assert state_accuracy(None, fsm) == pytest.approx(1 - 2 / 62)


def test_the_half_turn_survives_saving(tmp_path):
    model = fsm_model(seed=1).eval()
    assert model.gpt_neox.rotary_emb.inv_freq[0] == pytest.approx(math.pi)
    standard = fsm_model(half_turn=False).gpt_neox.rotary_emb.inv_freq
    assert standard[0] == pytest.approx(1) and torch.allclose(
        standard[1:], model.gpt_neox.rotary_emb.inv_freq[1:]
    )
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = TokFSM().sample(2, 128, seeded(0))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_half_turn_changes_nothing_but_the_positions():
    a, b = fsm_model(seed=2), fsm_model(seed=2, half_turn=False)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_training_learns_and_repeats(fsm):
    runs = [
        train_fsm(
            fsm_model(d_model=32, n_layers=1, n_heads=2, seed=0), fsm, steps=40, length=32, seed=5
        )
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and runs[0][-1] < runs[0][0] - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_shipped_models_know_the_world(fsm, seed):
    model = AutoModelForCausalLM.from_pretrained(data_path(f"fsm_{seed}")).eval()
    ids = fsm.sample(16, 128, seeded(123))
    assert legal_mass(model, fsm, ids) > 0.97
    assert state_accuracy(model, fsm, n=20) > 0.95
    assert generate_walks(model, 3, 20).shape == (3, 20)


def test_shipped_models_are_the_ones_in_the_readme():
    text = data_path("README.md").read_text()
    for seed in range(3):
        digest = hashlib.sha256(
            (data_path(f"fsm_{seed}") / "model.safetensors").read_bytes()
        ).hexdigest()
        assert re.search(rf"fsm_{seed}.*{digest}", text)


def test_best_f1_against_trying_every_threshold():
    g = seeded(0)
    acts, labels = torch.randn(60, 3, generator=g), torch.randint(-1, 4, (60,), generator=g)
    scores, thresholds = best_f1(acts, labels, 4)
    for unit in range(3):
        for state in range(4):
            tries = [
                detector_scores((acts[:, unit] >= t)[:, None].expand(60, 4), labels, 4)[2][
                    state
                ].item()
                for t in acts[:, unit]
            ]
            assert scores[unit, state] == pytest.approx(max(tries), abs=1e-6)
            at = detector_scores(
                (acts[:, unit] >= thresholds[unit, state])[:, None].expand(60, 4), labels, 4
            )[2][state]
            assert at == pytest.approx(max(tries), abs=1e-6)


def test_detector_scores_by_hand():
    fires = torch.tensor([[1, 0], [1, 0], [0, 0], [1, 1]]).bool()
    precision, recall, f1 = detector_scores(fires, torch.tensor([0, -1, 0, 1]), 2)
    assert (
        precision.tolist() == pytest.approx([1 / 3, 1])
        and recall.tolist() == pytest.approx([1 / 2, 1])
        and f1.tolist() == pytest.approx([0.4, 1])
    )


def test_no_threshold_cuts_between_equal_activations():
    acts, labels = torch.ones(16, 1), torch.cat([torch.zeros(8), torch.ones(8)]).long()
    scores, thresholds = best_f1(acts, labels, 2)
    assert scores[0].tolist() == pytest.approx([2 / 3, 2 / 3]) and (thresholds == 1).all()


def test_measuring_does_not_disturb_the_stream_of_random_numbers():
    model = fsm_model(d_model=32, n_layers=1, n_heads=2)
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    fsm_model(d_model=32, n_layers=1, n_heads=2, seed=9)
    generate_walks(model, 2, 8)
    assert torch.equal(torch.rand(3), want)


def test_off_the_beat(fsm):
    ids = fsm.sample(50, 64, seeded(0))
    late = torch.cat(
        [ids[:, :1], torch.randint(10, (50, 1), generator=seeded(1)), ids[:, 1:]], 1
    )  # a digit too many: all pairs are shifted
    assert torch.equal(drop_first_digit(late), ids)
    assert (
        legal_steps(late, fsm).mean() < 0.2 and legal_steps(drop_first_digit(late), fsm).mean() == 1
    )
