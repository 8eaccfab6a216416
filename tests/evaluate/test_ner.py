"""Scores of entities beside seqeval's, and what is said of errors."""

from __future__ import annotations

import random

import pytest
from seqeval.metrics import classification_report

from llm_from_scratch.data.bio import Span, spans_of_tags
from llm_from_scratch.evaluate.ner import (
    NONE,
    Fault,
    confusion,
    faults_of,
    figures,
    marked,
    score_types,
    sections,
)

LABELS = ("O", "O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-東", "I-東")


def random_tags(seed: int) -> tuple[list[list[str]], list[list[str]]]:
    draw = random.Random(seed)
    wanted = [[draw.choice(LABELS) for _ in range(draw.randrange(1, 14))] for _ in range(40)]
    found = [[t if draw.random() < 0.8 else draw.choice(LABELS) for t in row] for row in wanted]
    return wanted, found


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_seqeval(seed: int) -> None:
    wanted, found = random_tags(seed)
    theirs = classification_report(wanted, found, output_dict=True, zero_division=0)
    spans = [[spans_of_tags(row) for row in rows] for rows in (wanted, found)]
    ours = figures(*spans)
    assert ours["f1"] == pytest.approx(theirs["micro avg"]["f1-score"], abs=1e-12)
    assert ours["precision"] == pytest.approx(theirs["micro avg"]["precision"], abs=1e-12)
    assert ours["recall"] == pytest.approx(theirs["micro avg"]["recall"], abs=1e-12)
    assert ours["macro_f1"] == pytest.approx(theirs["macro avg"]["f1-score"], abs=1e-12)
    for name, score in score_types(*spans).items():
        assert score.f1 == pytest.approx(theirs[name]["f1-score"], abs=1e-12)
        assert score.wanted == theirs[name]["support"]


def test_nothing_wanted_or_nothing_found() -> None:
    span: Span = (0, 2, "A")
    assert figures([[]], [[]])["f1"] == 0
    assert figures([[span]], [[]]) == dict.fromkeys(
        ("f1", "precision", "recall", "macro_f1", "border_f1"), 0
    )
    assert figures([[span]], [[(0, 2, "B")]])["border_f1"] == 1


def test_kinds_of_errors() -> None:
    wanted: list[Span] = [(0, 5, "A"), (6, 9, "A"), (10, 15, "B"), (20, 22, "A"), (30, 33, "B")]
    found: list[Span] = [(0, 5, "A"), (6, 9, "B"), (10, 13, "B"), (21, 24, "B"), (40, 41, "A")]
    assert {*faults_of(wanted, found)} == {
        Fault("wrong type", (6, 9, "A"), (6, 9, "B")),
        Fault("wrong borders", (10, 15, "B"), (10, 13, "B")),
        Fault("both wrong", (20, 22, "A"), (21, 24, "B")),
        Fault("missed", (30, 33, "B"), None),
        Fault("made up", None, (40, 41, "A")),
    }
    names, counts = confusion([wanted], [found])
    assert names == ["A", "B", NONE]
    assert counts == [[1, 2, 0], [0, 1, 1], [1, 0, 0]]


def test_one_error_each() -> None:
    """An entity cut in two is one with wrong borders and one that is made up."""
    faults = faults_of([(0, 10, "A")], [(0, 4, "A"), (5, 10, "A")])
    assert [fault.kind for fault in faults] == ["wrong borders", "made up"]
    assert faults[0].found == (5, 10, "A")  # the longer half


def test_text_with_its_entities() -> None:
    assert marked("Ada saw Paris.", [(8, 13, "LOC"), (0, 3, "PER")]) == (
        "[Ada PER] saw [Paris LOC]."
    )


def test_report() -> None:
    found = sections(
        ["a:1", "a:2"],
        ["Ada saw Paris.", "Nothing."],
        [[(0, 3, "PER"), (8, 13, "LOC")], []],
        [[(0, 3, "PER"), (8, 13, "PER")], [(0, 7, "LOC")]],
        [[0.9, 0.8], [0.6]],
    )
    tables = {section.title: section.table for section in found}
    by_type = tables["Entities by type"]
    assert by_type is not None
    assert [row[:4] for row in by_type.rows] == [
        ("LOC", 1, 1, 0), ("PER", 1, 2, 1), ("all", 2, 3, 1)
    ]  # fmt: skip
    errors = tables["Most confident errors"]
    assert errors is not None
    assert errors.rows[0] == ("a:1", "Ada saw Paris.", "Paris (LOC)", "Paris (PER)", 0.8)
    assert errors.rows[1][2:4] == (NONE, "Nothing (LOC)")
    assert "Calibration" in tables
    assert "Calibration" not in [section.title for section in sections([], [], [], [], [])]
