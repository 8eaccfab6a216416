"""What a report says of a classifier, and of a regression: figures, examples, sections.

Rows are checked ones: {"text", "pair", "choices", "label"}, of which only the first and the last
must be there. Axes: r rows, n labels or choices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llm_from_scratch.data.records import Row
from llm_from_scratch.evaluate.classification import (
    Ints,
    confusion,
    f1_of_each,
    label_figures,
    number_figures,
)
from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.report_parts import (
    Mistake,
    calibration_error,
    calibration_section,
    confusion_section,
    counts_section,
    errors_section,
    reliability,
    scatter_section,
)

EXAMPLES = 8  # rows shown before and after training
WORST = 20
Reported = tuple[dict[str, float], list[dict[str, str]], list[Section]]


def given_in(values: Mapping[str, Any]) -> str:
    """The texts of a row, for people to read."""
    return "\n".join(
        [values["text"], *([values["pair"]] if "pair" in values else [])]
        + [f"({number}) {text}" for number, text in enumerate(values.get("choices", []))]
    )


def outcome_of_labels(
    rows: Sequence[Row],
    probabilities: Sequence[Sequence[float]],
    labels: Sequence[str] | None,
    *,
    positive: int | None = None,
    training: Mapping[str, int] | None = None,
) -> Reported:
    """Of a classifier, by each row's probabilities of the labels; without labels, of its choices.

    `positive` is the number of the label that is looked for; `training` how often each label was
    learnt from.
    """
    got = [int(np.argmax(row)) for row in probabilities]
    sure = [float(row[number]) for row, number in zip(probabilities, got, strict=True)]
    if labels is None:
        wanted = [int(row.values["label"]) for row in rows]
        said = [
            (row.values["choices"][w], row.values["choices"][g])
            for row, w, g in zip(rows, wanted, got, strict=True)
        ]
    else:
        numbers = {label: number for number, label in enumerate(labels)}
        wanted = [numbers[row.values["label"]] for row in rows]
        said = [(labels[w], labels[g]) for w, g in zip(wanted, got, strict=True)]
    right = np.array(got) == np.array(wanted)
    examples = [
        {
            "place": row.place, "given": given_in(row.values), "wanted": w,
            "got": f"{g} ({confidence:.2f})",
        }
        for row, (w, g), confidence in zip(rows[:EXAMPLES], said, sure, strict=False)
    ]  # fmt: skip
    mistakes = [
        Mistake(row.place, given_in(row.values), w, g, confidence)
        for row, (w, g), confidence, fits in zip(rows, said, sure, right, strict=True)
        if not fits
    ]
    sections: list[Section] = []
    if labels is None:
        figures = {
            "accuracy": float(right.mean()) if len(right) else 0.0,
            "ece": calibration_error(reliability(sure, right)),
        }
    else:
        figures = label_figures(np.array(probabilities), wanted, positive)
        counts = confusion(wanted, got, len(labels))
        measured = Counter(row.values["label"] for row in rows)
        known = {"training": dict(training)} if training else {}
        sections += [
            counts_section({**known, "measured": measured}, "Label statistics"),
            each_label_section(labels, counts),
            confusion_section(labels, counts),
        ]
    sections += [calibration_section(sure, right), errors_section(mistakes)]
    return figures, examples, sections


def each_label_section(labels: Sequence[str], counts: Ints) -> Section:
    """Precision, recall and F1 of each label."""
    right, given, wanted = np.diag(counts), counts.sum(0), counts.sum(1)
    rows = [
        (label, int(w), r / max(1, g), r / max(1, w), f1)
        for label, r, g, w, f1 in zip(
            labels, right.tolist(), given.tolist(), wanted.tolist(), f1_of_each(counts).tolist(),
            strict=True,
        )
    ]  # fmt: skip
    return Section("Labels", table=Table(("label", "rows", "precision", "recall", "F1"), rows))


def outcome_of_numbers(rows: Sequence[Row], got: Sequence[float]) -> Reported:
    """Of a regression, by the number that each row was given."""
    wanted = [float(row.values["label"]) for row in rows]
    figures = number_figures(got, wanted)
    examples = [
        {
            "place": row.place, "given": given_in(row.values), "wanted": f"{w:g}",
            "got": f"{g:.2f}",
        }
        for row, w, g in zip(rows[:EXAMPLES], wanted, got, strict=False)
    ]  # fmt: skip
    worst = sorted(range(len(rows)), key=lambda n: -abs(got[n] - wanted[n]))[:WORST]
    table = Table(
        ("row", "text", "wanted", "got", "error"),
        [
            (rows[n].place, given_in(rows[n].values), wanted[n], got[n], got[n] - wanted[n])
            for n in worst
        ],
    )
    spread = Table(
        ("", "rows", "mean", "standard deviation", "least", "greatest"),
        [
            (name, len(values), *(float(f(values)) for f in (np.mean, np.std, np.min, np.max)))
            for name, values in (("wanted", wanted), ("got", list(got)))
        ],
    )
    sections = [
        Section("Number statistics", table=spread),
        scatter_section(wanted, got),
        Section("Largest errors", f"The first {len(worst)} of {len(rows):,} rows.", table),
    ]
    return figures, examples, sections
