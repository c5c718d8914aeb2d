"""The benchmark's race: contestants take turns, ratios are to the first,
one that fails is told and the others go on. (What it measures is not tested: times are no
tests.)"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import bench  # noqa: E402


def test_contestants_take_turns_and_one_that_fails_is_told():
    size = dict(N=64, d=16, C=50, k=2, device="cpu")
    floor, ours, none = bench.race(
        [
            (sys.executable, dict(who=who, **size))
            for who in ("codebook/floor", "codebook/course", "codebook/vector-quantize-pytorch")
        ],
        rounds=2,
        processes=2,
        least=0.001,
    )
    assert (
        floor["x_floor"] == 1
        and 0 < ours["low"] <= ours["seconds"] <= ours["high"]
        and ours["x_floor"] == pytest.approx(ours["seconds"] / floor["seconds"])
        and ours["peak_mb"] > 50
    )
    assert "x_floor" not in none and (
        "one code only" in none["failed"] or "vector_quantize_pytorch" in none["failed"]
    )


def test_a_step_of_train_sae_is_timed_from_the_side_of_its_data():
    floor, ours = bench.race(
        [
            (sys.executable, dict(who=who, N=64, d=16, n_feats=32, device="cpu", **kw))
            for who, kw in (("sae/floor", {}), ("sae/course", dict(kind="topk", k=4)))
        ],
        rounds=2,
        least=0.001,
    )
    assert ours["seconds"] > 0 and "failed" not in ours
