"""Labelled rows: which choice a label means."""

from __future__ import annotations

from typing import Any

import pytest

from llm_from_scratch.data.labelled import LabelledFields
from llm_from_scratch.data.records import BadRow


def chosen(label: Any, choices: list[Any]) -> float | int | str:
    fields, row = LabelledFields(), {"text": "?", "label": label, "choices": choices}
    found = fields.texts(row, choices=True)["choices"]
    return fields.wanted(row, "choices", found)


@pytest.mark.parametrize(
    ("label", "choices", "wanted"),
    [
        # The text of exactly one choice means that one ...
        ("four", ["three", "four"], 1),
        ("4", ["3", "4"], 1),
        ("1", ["1", "2", "0"], 0),
        (4, ["3", "4"], 1),  # there is no fifth choice
        (1, [1, 2, 0], 0),  # numbers among numbers
        (2.0, [1, 2, 0], 1),
        (" 2 ", ["1 ", " 2", "0"], 1),
        # ... else a number counts from 0 and a letter from A.
        ("1", ["a", "b"], 1),
        (1, ["a", "b"], 1),
        ("B", ["a", "b"], 1),
        ("1", ["1", "1"], 1),
        ("A", ["A", "B"], 0),
        ("D", ["D", "E"], 0),
        # A number beside texts is a place, as data sets keep it, whatever the texts are.
        (1, ["1", "2", "0"], 1),
        (0, ["4", "0"], 0),
    ],
)
def test_what_a_label_means_among_choices(label: Any, choices: list[Any], wanted: int) -> None:
    assert chosen(label, choices) == wanted


@pytest.mark.parametrize(
    ("label", "choices", "sentence"),
    [
        ("B", ["B", "A"], "the letter of one choice and the text of another; give a number"),
        ("9", ["9", "9"], "the text of 2 of its choices"),
        ("x", ["a", "b"], "which is none of its 2 choices"),
        (7, ["a", "b"], "which is none of its 2 choices"),
        (-1, ["a", "b"], "which is none of its 2 choices"),
    ],
)
def test_labels_that_mean_no_choice(label: Any, choices: list[Any], sentence: str) -> None:
    with pytest.raises(BadRow, match=sentence):
        chosen(label, choices)
