"""Codes as detectors and as levers: the scores by brute force, the edits by what they write."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import data_path, seeded
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.feature.states import (
    belief,
    code_scores,
    code_table,
    feature_numbers,
    measure_beliefs,
    modal_codes,
    neuron_precision,
    owners,
    purity,
    random_codes,
    record_codes,
    situation_labels,
    walks_to,
    write_state,
)
from codebook_tutorial.world.fsm import TokFSM, fsm_model, next_state_probs, state_labels

FSM = TokFSM()


@pytest.fixture(scope="module")
def cb():
    "A small untrained model with small codebooks: enough to test what is written where."
    model = fsm_model(d_model=32, n_heads=2, seed=0).eval()
    return (
        add_codebooks(model, ["heads.*", "mlp.*"], 40)
        .eval()
        .init_from_data(FSM.sample(20, 64, seeded(0)), generator=seeded(0))
    )


def test_code_table_counts_pairs():
    codes, labels = torch.tensor([[0, 1], [0, 2], [1, 1]]), torch.tensor([1, -1, 0])
    table = code_table(codes, labels, n_codes=4, n_labels=2)
    assert table.tolist() == [[0, 1, 1], [2, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert owners(table).tolist() == [1, 0, 2, 2]  # a tie goes to a label; unused codes to none


def test_code_scores_by_brute_force():
    g = seeded(0)
    labels = torch.randint(-1, 5, (600,), generator=g)
    codes = torch.where(
        torch.rand(600, generator=g) < 0.7,
        3 * (labels + 1) + torch.randint(3, (600,), generator=g),
        torch.randint(20, (600,), generator=g),
    )
    got = code_scores(codes, labels, 20, n_labels=5)
    A, B = (
        (codes[:300].tolist(), labels[:300].tolist()),
        (codes[300:].tolist(), labels[300:].tolist()),
    )

    def count(part, c, s):
        return sum(1 for x, y in zip(*part) if x == c and y == s)

    owner = {c: max([*range(5), -1], key=lambda s: count(A, c, s)) for c in range(20) if c in A[0]}
    for s in range(5):
        mine = [c for c in owner if owner[c] == s]
        best = max(mine, key=lambda c: count(A, c, s))
        hits, fires, truth = count(B, best, s), B[0].count(best), B[1].count(s)
        assert (
            got["best"][s] == best
            and got["precision"][s] == pytest.approx(hits / fires)
            and got["recall"][s] == pytest.approx(hits / truth)
        )
        set_hits, set_fires = sum(count(B, c, s) for c in mine), sum(B[0].count(c) for c in mine)
        assert got["set_f1"][s] == pytest.approx(2 * set_hits / (set_fires + truth)) and got[
            "codes_per_label"
        ][s] == len(mine)


def test_perfect_codes_score_one_and_shuffled_ones_near_nothing():
    labels = torch.randint(100, (20_000,), generator=seeded(0))
    assert code_scores(labels + 7, labels, 200)["set_f1"].min() == 1
    shuffled = code_scores(labels + 7, labels[torch.randperm(20_000, generator=seeded(1))], 200)
    assert shuffled["set_f1"].mean() < 0.03 and shuffled["precision"].mean() < 0.03


def test_a_label_without_a_code_scores_zero():
    got = code_scores(torch.zeros(100, dtype=torch.long), torch.arange(100) % 2, 3, n_labels=2)
    assert got["precision"].tolist() == [0.5, 0] and got["codes_per_label"].tolist() == [1, 0]


def test_neuron_precision_by_brute_force():
    g = seeded(3)
    labels = torch.randint(-1, 3, (200,), generator=g)
    acts = torch.randn(200, 4, generator=g) - 4 * (labels == 1)[:, None] * torch.tensor(
        [0.0, 1, 0, 0]
    )  # unit 1, downwards, knows label 1
    recall = torch.tensor([0.5, 0.8, 0.3])
    got = neuron_precision(acts, labels, recall, n_labels=3)
    for s in range(3):
        best = (-1, None)
        for unit in torch.cat([acts, -acts], 1).T:
            need = torch.ceil(recall[s] * (labels[:100] == s).sum())
            t = next(
                t
                for t in unit[:100].sort(descending=True).values
                if ((unit[:100] >= t) & (labels[:100] == s)).sum() >= need
            )
            fires = unit[:100] >= t
            p = ((fires & (labels[:100] == s)).sum() / fires.sum()).item()
            if p > best[0]:
                best = (p, unit[100:] >= t)
        assert got[s] == pytest.approx(
            ((best[1] & (labels[100:] == s)).sum() / best[1].sum().clamp(min=1)).item(), abs=1e-6
        )
    assert got[1] > 0.6


def test_situations():
    ids = torch.tensor([[10, 4, 2, 1, 7, 3]])
    assert situation_labels(ids).tolist() == [[-1, -1, 42, 100 + 420 + 1, 17, 100 + 170 + 3]]


def test_purity_counts_codes_in_one_situation():
    assert purity(torch.tensor([[12, 0, 0], [6, 6, 0], [0, 0, 30], [3, 1, 0]])) == pytest.approx(
        2 / 3
    )


def test_modal_codes_are_the_most_frequent(cb):
    ids = FSM.sample(60, 64, seeded(1))
    table, codes, labels = (
        modal_codes(cb, ids),
        record_codes(cb, ids, rows=7),
        situation_labels(ids),
    )
    for site, g in (("mlp.1", 0), ("heads.0", 1)):
        assert table[site].shape == (1100, len(cb.codebooks[site].weight), 1)
        for situation in (17, 42, 100 + 10 * 17 + int(FSM.successors[17, 0]) // 10):
            seen = codes[site][:, :, g, 0][labels == situation]
            assert (
                len(seen)
                and (seen == table[site][situation, g, 0]).sum() == torch.bincount(seen).max()
            )


@pytest.mark.parametrize("both", [False, True])
def test_write_state_writes_the_target_and_nothing_else(cb, both):
    table, prefixes = (
        modal_codes(cb, FSM.sample(60, 64, seeded(1))),
        walks_to(FSM, torch.tensor([3, 8, 3])),
    )
    target = torch.tensor([17, 42, 5])
    with cb.edit_codes({"heads.0": write_state(table["heads.0"], target, both)}):
        belief(cb, prefixes)
    written = cb.ids["heads.0"]
    belief(cb, prefixes)
    own, state, digit = cb.ids["heads.0"], target.repeat_interleave(10), torch.arange(10).repeat(3)
    assert torch.equal(written[:, :-2], own[:, :-2]) and torch.equal(
        written[:, -2], table["heads.0"][state]
    )
    assert torch.equal(
        written[:, -1], table["heads.0"][100 + 10 * state + digit] if both else own[:, -1]
    )


def test_random_codes_touch_the_same_positions():
    ids = torch.full((500, 6, 2, 1), 99)
    for both in (False, True):
        out = random_codes(50, both)(ids.clone())
        assert (
            (out[:, :4] == 99).all()
            and (out[:, -2] < 50).all()
            and ((out[:, -1] < 50).all() if both else (out[:, -1] == 99).all())
        )
        assert out[:, -2].unique().numel() == 50


def test_belief_is_the_exact_next_state_distribution(cb):
    ids = walks_to(FSM, torch.tensor([17, 42]), steps=3, seed=2)
    with cb.bypass():
        got, want = belief(cb, ids), next_state_probs(cb, ids)[:, -1]
    assert torch.allclose(got, want / want.sum(-1, keepdim=True), atol=1e-5)


def test_walks_end_where_asked_and_differ():
    states = torch.tensor([5, 9, 5, 5])
    ids = walks_to(FSM, states, steps=4, seed=1)
    labels = state_labels(ids)[:, 2::2]
    assert (
        torch.equal(labels[:, -1], states)
        and FSM.legal[labels[:, :-1], labels[:, 1:]].all()
        and len(ids.unique(dim=0)) == 4
    )


def test_all_codes_of_the_shipped_model_reach_the_floor_and_controls_do_not():
    base = AutoModelForCausalLM.from_pretrained(data_path("fsm_0")).eval()
    cb = (
        add_codebooks(base, ["heads.*", "mlp.*"], 300)
        .eval()
        .init_from_data(FSM.sample(100, 128, seeded(0)), iters=3, generator=seeded(0))
    )
    got = measure_beliefs(cb, FSM, {"all": list(cb.codebooks)}, n=30)
    assert (
        got["all"][1] < 0.2
        and got["a third state's codes"][1] > 0.9
        and got["random codes"][1] > 0.9
        and got["floor: really in b"][1] < got["all"][1] + 0.05
    )


def test_walks_to_nowhere_are_refused():
    with pytest.raises(ValueError, match=r"no walk of 4 states ends in \[10\]"):
        walks_to(TokFSM(100, 3, 1), torch.tensor([11, 10]))
    many = torch.full((1000,), 7)
    assert (
        state_labels(walks_to(FSM, many))[:, -1] == 7
    ).all()  # more than the pool holds: some come twice, none elsewhere


def test_the_same_id_in_two_heads_is_two_codes(cb):
    numbers = feature_numbers(cb, record_codes(cb, FSM.sample(4, 32, seeded(0))), "heads.0")
    assert numbers.shape == (128, 2) and numbers[:, 0].max() < 40 <= numbers[:, 1].min()


def test_scores_stay_scores_with_several_codes_a_position():
    labels = torch.randint(5, (400,), generator=seeded(0))
    got = code_scores(torch.stack([labels, labels + 5, labels], 1), labels, 10, n_labels=5)
    assert all((got[k] == 1).all() for k in ("precision", "recall", "set_f1"))
