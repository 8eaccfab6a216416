"""Rows with marked names in the forms that tools write, and what may be wrong with them."""

from __future__ import annotations

from typing import Any

import pytest

from llm_from_scratch.data.entities import entity_row
from llm_from_scratch.data.records import BadRow

TEXT = "Ada saw Paris."


def made(**values: Any) -> dict[str, Any]:
    return entity_row(values, "text", "entities")


@pytest.mark.parametrize(
    "values",
    [
        {"entities": [[0, 3, "PER"], [8, 13, "LOC"]]},
        {"entities": [{"name": "Paris", "span": [8, 13], "type": "LOC"},
                      {"name": "Ada", "span": [0, 3], "type": "PER"}]},
        {"spans": [{"start": 0, "end": 3, "label": "PER"},
                   {"start": 8, "end": 13, "label": "LOC"}]},
        {"label": [[0, 3, "PER"], [7, 13, "LOC"]]},  # with the space before it
    ],
)  # fmt: skip
def test_forms(values: dict[str, Any]) -> None:
    row = made(text=TEXT, **values)
    assert row == {"text": TEXT, "entities": [[0, 3, "PER"], [8, 13, "LOC"]]}
    assert made(**row) == row  # what was checked can be checked again


def test_tokens_and_tags() -> None:
    row = made(tokens=["Ada", "saw", "Paris"], ner_tags=["B-PER", "O", "B-LOC"])
    assert row["text"] == "Ada saw Paris"
    assert row["entities"] == [[0, 3, "PER"], [8, 13, "LOC"]]
    assert row["words"] == [[0, 3], [4, 7], [8, 13]]
    assert made(**row) == row


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"entities": []}, "has no text in 'text'; name the field with --ner.text_field"),
        ({"text": " \n", "entities": []}, "nothing but white space"),
        ({"text": "a\ud83d", "entities": []}, "half a character"),
        ({"text": TEXT}, "has no list of entities in 'entities'"),
        ({"text": TEXT, "entities": [[0, 3]]}, "which is neither"),
        ({"text": TEXT, "entities": [[0, True, "A"]]}, "which is neither"),
        ({"text": TEXT, "entities": [[0, 3, ""]]}, "which is neither"),
        ({"text": TEXT, "entities": [[3, 3, "A"]]}, r"entity at \[3, 3\], but the text has 14"),
        ({"text": TEXT, "entities": [[8, 99, "A"]]}, r"entity at \[8, 99\]"),
        ({"text": TEXT, "entities": [[3, 4, "A"]]}, "nothing but white space; take it out"),
        ({"text": TEXT, "entities": [{"span": [1, 4], "type": "A", "name": "Ada"}]}, "'da '"),
        ({"text": TEXT, "entities": [[0, 7, "A"], [4, 7, "B"]]}, "two entities in one place"),
        ({"text": TEXT, "entities": [], "words": [[0, 3], [2, 5]]}, "among its 'words'"),
        ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, "no list of texts"),
        ({"tokens": ["a"], "tags": ["PER"]}, "has the tag 'PER'"),
    ],
)
def test_rows_that_cannot_be_used(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadRow, match=sentence):
        made(**values)
