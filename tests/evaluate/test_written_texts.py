"""What is reported of written texts: figures, lengths, sureness and the errors worth reading."""

from __future__ import annotations

import math

import pytest

from llm_from_scratch.evaluate.written_texts import (
    Written,
    evenly,
    sureness,
    worst_section,
    written_examples,
    written_figures,
    written_sections,
)
from llm_from_scratch.generate.sampling import TokenLogprobs
from llm_from_scratch.generate.texts import Result


def text(number: int, got: str, wanted: str, sure: float, cut: bool = False) -> Written:
    return Written(f"rows:{number}", f"source {number}", (wanted,), got, sure, 3, cut)


TEXTS = [
    text(1, "the red house", "the red house", 0.9),
    text(2, "a blue car", "the red house", 0.8, cut=True),
    text(3, "no idea", "the green tree", 0.3),
    text(4, "the old dog", "the old cat", 0.6),
]


def test_some_of_many_are_spread_evenly() -> None:
    assert evenly(4, 0) == evenly(4, 9) == [0, 1, 2, 3]
    assert evenly(10, 3) == [0, 3, 6]
    assert evenly(7, 7) == list(range(7)) and evenly(0, 5) == []


def test_sureness_is_the_geometric_mean() -> None:
    told = [TokenLogprobs(1, math.log(0.5), ()), TokenLogprobs(2, math.log(0.125), ())]
    result = Result("ab", [1, 2], "stop", 3, 1.0, 0.1, 2.0, logprobs=told)
    assert sureness(result) == pytest.approx(0.25)
    assert sureness(Result("", [], "stop", 3, 1.0, 0.1, 0.0, logprobs=[])) == 1.0


def test_figures_and_examples() -> None:
    figures = written_figures(TEXTS, "en", ["rouge", "exact_match"])
    assert figures["written_rows"] == 4 and figures["exact_match"] == 0.25
    assert figures["rouge1"] == pytest.approx((1 + 0 + 0 + 2 / 3) / 4)
    assert written_figures([], "en") == {} and written_sections([], "en") == []
    assert [one["place"] for one in written_examples(TEXTS, 2)] == ["rows:1", "rows:3"]
    several = Written("rows:5", "s", ("a", "b"), "c", 0.5, 1, False)
    assert written_examples([several])[0]["wanted"] == "a | b"


def test_the_report_shows_what_is_surely_wrong() -> None:
    lengths, sure, worst = written_sections(TEXTS, "en")
    assert "1 of them reached the greatest length" in lengths.text
    assert lengths.table is not None and lengths.table.rows[0][1:] == (11, 13.0, 12.8, 14)
    assert sure.table is not None and sure.draw is not None
    assert [row[0] for row in sure.table.rows] == [
        "surest quarter", "second", "third", "least sure quarter",
    ]  # fmt: skip
    assert [row[3] for row in sure.table.rows] == pytest.approx([1.0, 0.0, 2 / 3, 0.0])
    assert worst.table is not None and [row[0] for row in worst.table.rows] == ["rows:2"]
    # Without ROUGE there is no overlap to be sure of.
    assert len(written_sections(TEXTS, "en", ["chrf"])) == 1
    # A text that is right is no error, however little the others have in common.
    assert worst_section(TEXTS[:1], [1.0]).table is None
