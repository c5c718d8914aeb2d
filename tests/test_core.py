"""Claims, data, and the one place that draws."""

import html
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from codebook_tutorial import show
from codebook_tutorial.claims import ClaimError, claim, full_claims
from codebook_tutorial.core import data_path, jsd, seeded, set_seed


@pytest.fixture(autouse=True)
def claims_file(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CLAIMS", str(tmp_path / "claims" / "07.json"))
    monkeypatch.delenv("COURSE_MODEL", raising=False)
    return tmp_path / "claims" / "07.json"


def test_a_claim_is_recorded_with_mean_spread_and_interval(claims_file):
    shown = claim("x.share", [0.90, 0.94, 0.92], at_least=0.8, control=0.1, paper=0.7)
    kept = json.loads(claims_file.read_text())["x.share"]
    assert kept["value"] == pytest.approx(0.92) and kept["values"] == [0.90, 0.94, 0.92]
    assert kept["tolerance"] == pytest.approx(0.04)  # never below the spread
    half = (
        4.302653 * np.std([0.90, 0.94, 0.92], ddof=1) / 3**0.5
    )  # t quantile for 2 degrees of freedom
    assert kept["interval"] == pytest.approx([0.92 - half, 0.92 + half], abs=1e-6)
    assert "0.92" in repr(shown) and "paper 0.7" in repr(shown)
    claim("x.other", 3, unit="states")
    assert set(json.loads(claims_file.read_text())) == {"x.share", "x.other"}


def test_a_share_stays_between_0_and_1():
    assert claim("x.high", [0.97, 0.999, 0.99])["interval"][1] == 1.0


@pytest.mark.parametrize("bound", [dict(at_least=0.6), dict(at_most=0.4)])
def test_a_claim_outside_its_bound_stops_the_chapter_but_is_recorded(bound, claims_file):
    with pytest.raises(ClaimError, match="x.low: 0.5 lies outside"):
        claim("x.low", 0.5, **bound)
    assert json.loads(claims_file.read_text())["x.low"]["value"] == 0.5


def test_bounds_hold_for_the_shipped_model_only(monkeypatch):
    monkeypatch.setenv("COURSE_MODEL", "somewhere")
    assert claim("x.low", 0.5, at_least=0.6)["value"] == 0.5


@pytest.mark.parametrize("values", [None, [], float("nan"), [0.5, float("inf")]])
def test_a_claim_needs_finite_numbers_or_a_reason(values):
    with pytest.raises(ValueError, match="claim x.none"):
        claim("x.none", values)


def test_words_of_a_finding_are_recorded_only_where_given(claims_file):
    claim("x.plain", 0.5)
    words = dict(title="Dead codes", setting="1000 codes", paper_said="0.93", headline=True)
    shown = claim("x.told", 0.5, **words)
    kept = json.loads(claims_file.read_text())
    assert kept["x.told"] == kept["x.plain"] | words == shown.entry()
    assert not kept["x.plain"].keys() & words.keys()
    assert claim("x.told", 0.5, title="Dead codes", headline=False).entry().keys() == {
        *kept["x.plain"],
        "title",
    }
    with pytest.raises(TypeError):
        claim("x.wrong", 0.5, heading="not a field")


def test_committed_claims_are_entries_of_today():
    fields = set(claim("x.y", 0.5).entry()) | {"title", "setting", "paper_said", "headline"}
    for path in sorted((Path(__file__).parents[1] / "claims").glob("[0-9][0-9].json")):
        for name, kept in json.loads(path.read_text()).items():
            assert kept.keys() <= fields, name
            args = {k: v for k, v in kept.items() if k not in ("value", "values")}
            again = claim(name, kept["values"] or None, **args).entry()
            assert again == kept or again | dict(value=kept["value"]) == kept
            assert again["value"] == pytest.approx(kept["value"])


def test_no_score_with_a_reason_is_a_claim():
    assert claim("x.none", None, note="constant prediction")["value"] is None


def test_an_interval_of_ones_own_takes_the_place_of_that_over_seeds(claims_file):
    assert claim("x.boot", [0.5, 0.6], interval=(0.52, np.float64(0.57)))["interval"] == [
        0.52,
        0.57,
    ] and json.loads(claims_file.read_text())["x.boot"]["interval"] == [0.52, 0.57]
    for wrong in ((0.6, 0.5), (float("nan"), 1)):
        with pytest.raises(ValueError, match="an interval"):
            claim("x.boot", 0.5, interval=wrong)


def test_nothing_is_written_without_a_claims_file(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_CLAIMS")
    claim("x.y", 0.5)
    assert not list(tmp_path.iterdir())


def test_data_path_names_what_there_is():
    assert (data_path("fsm_0") / "config.json").exists()
    with pytest.raises(ValueError, match="no 'fsm_9'; expected one of .*fsm_0"):
        data_path("fsm_9")


def test_seeds():
    set_seed(3)
    first = (torch.rand(2), np.random.rand(2))
    set_seed(3)
    second = (torch.rand(2), np.random.rand(2))
    assert torch.equal(first[0], second[0]) and (first[1] == second[1]).all()
    assert torch.equal(torch.rand(2, generator=seeded(1)), torch.rand(2, generator=seeded(1)))


def test_jsd_against_scipy():
    from scipy.spatial.distance import jensenshannon

    p, q = (torch.randn(20, 10, generator=seeded(s)).double().mul(2).softmax(-1) for s in range(2))
    assert np.allclose(jsd(p, q), jensenshannon(p, q, base=2, axis=-1) ** 2, atol=1e-9)
    p = torch.tensor([1.0, 0, 0])
    q = torch.tensor([0, 0.5, 0.5])
    assert jsd(p, p) == 0 and jsd(p, q) == pytest.approx(1)


def test_full_claims_say_how_they_were_made():
    full = full_claims("03")
    assert {"command", "commit", "hours", "inputs_sha256", "rows"} <= set(full) and len(
        full["rows"]
    ) > 20


NASTY = '<script>alert("x")</script>&'


def test_token_text_is_escaped_everywhere():
    for shown in (
        show.strip([NASTY, "b"], [1.0, -2.0], title=NASTY)._repr_html_(),
        show.table([{NASTY: NASTY, "n": 1.23456}], NASTY)._repr_html_(),
    ):
        assert "<script" not in shown and "&lt;script&gt;" in shown


def test_table_rounds_and_marks_missing_values():
    assert (
        "1.235" in show.table([{"n": 1.23456}])._repr_html_()
        and "<td>–</td>" in show.table([{"n": None}])._repr_html_()
    )


def test_a_table_of_columns_is_the_table_of_its_rows():
    rows = [{"alpha": 0.5, "L0": 3}, {"alpha": 1.0, "L0": None}]
    columns = {"alpha": torch.tensor([0.5, 1.0]), "L0": [3, None]}
    assert show.table(columns, "t").source == show.table(rows, "t").source
    with pytest.raises(ValueError, match="columns of the same length, got {'a': 1, 'b': 2}"):
        show.table({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="no rows"):
        show.table({"a": []})


def test_source_is_coloured_escaped_and_whole():
    shown = show.source(show.strip, show.Html.__repr__)
    assert "<span" in shown.source and "</span>" in shown.source
    text = html.unescape(re.sub(r"</?(?:span|pre)[^>]*>", "", shown.source))
    assert text == shown.words and "def __repr__(self):\n    return self.words" in text
    assert "&lt;b&gt;" in shown.source and "<b>" not in shown.source
    with pytest.raises(ValueError, match="expected functions"):
        show.source()


def test_strip_wants_one_value_a_token():
    with pytest.raises(ValueError, match="2 tokens and 3 values"):
        show.strip(["a", "b"], [1, 2, 3])


def test_strips_may_share_a_scale():
    def alpha(shown):
        return re.findall(r"rgba\([\d,]+,([\d.]+)\)", shown.source)

    assert alpha(show.strip(["a", "b"], [1, 2])) == ["0.375", "0.750"] and alpha(
        show.strip(["a", "b"], [1, -20], top=10)
    ) == ["0.075", "0.750"]


def test_every_picture_needs_alt_text():
    with pytest.raises(ValueError, match="alt text"):
        show.bars({"a": 1}, "t", "y", alt=" ")
    lines = [
        segment.get_segments()[0]
        for segment in show.bars(
            {"a": 1, "b": 3}, "t", "y", alt="two bars", errors={"b": (2.5, 3.25)}
        )
        .fig.axes[0]
        .collections
    ]
    assert len(lines) == 1 and lines[0].tolist() == [[1, 2.5], [1, 3.25]]
    shown = show.bars({"a": [1, 2], "b": 3}, "t", "y", alt="two bars", lines={"chance": 0.5})
    assert repr(shown) == "two bars" and shown._repr_png_()[:4] == b"\x89PNG"
    assert shown._repr_png_() == shown._repr_png_()  # no time stamp inside


def test_a_share_outside_0_and_1_is_no_share():
    with pytest.raises(ValueError, match="a share is between 0 and 1"):
        claim("x.share", [0.5, 1.2])
