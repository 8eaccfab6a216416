"""The report of a fine-tuning run: what came of it, how it went, and what it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_from_scratch.evaluate.report import Section, Table, write_report
from llm_from_scratch.evaluate.report_parts import curves_sections, examples_section
from llm_from_scratch.train.methods.base import Outcome

NAMED = 16  # broken rows and contradictions shown; the run folder has them all
COUNTS = {
    "train_rows": "to learn from",
    "val_rows": "to choose the best model on",
    "test_rows": "to measure on",
    "exact_duplicates": "left out: the same as another",
    "near_duplicates": "left out: near-duplicates of another",
    "held_out_prompts": "left out: the prompt of a row to measure or choose on",
    "avoided_exact": "left out: the same as a text to avoid",
    "avoided_near": "left out: near-duplicates of a text to avoid",
    "label_conflicts": "the same as another, but with another label",
    "rows_not_selected": "left out: not selected",
    "skipped_rows": "left out: cannot be used",
    "unseen_val_rows": "of these, to choose on: labels that training never saw",
    "unseen_test_rows": "of these, to measure on: labels that training never saw",
}


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Figures as JSON can hold them: None for what is no number."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }


def write_run_report(
    folder: Path, title: str, summary: Mapping[str, Any], before: Mapping[str, Any], after: Outcome
) -> None:
    """report.md and report.html of a finished run.

    `summary` is what goes into summary.json, `before` what before.json says ("figures",
    "examples"), `after` the outcome on the part that is reported.
    """
    sections = [
        *result_sections(summary),
        *curves_sections(folder),
        *after.sections,
        *([examples_section(before["examples"], after.examples)] if after.examples else []),
        *data_sections(folder, summary),
    ]
    write_report(folder, title, sections)


def result_sections(summary: Mapping[str, Any]) -> list[Section]:
    """What came of the run, beside the model as it was; then everything else that was measured."""
    rows: list[Sequence[Any]] = []
    used = set(COUNTS)
    for part in ("test", "val"):
        for name, value in summary.items():
            if name.startswith(f"{part}_") and name not in used:
                base = f"base_{name}"
                used |= {name, base}
                rows.append((name.replace("_", " "), summary.get(base), value))
    rest = [(n.replace("_", " "), value) for n, value in summary.items() if n not in used]
    if any(row[1] is not None for row in rows):
        results = Table(("figure", "before", "after"), rows)
    else:
        results = Table(("figure", "value"), [(name, value) for name, _, value in rows])
    sections = [Section("Results", table=results)] if rows else []
    return [*sections, Section("Run", table=Table(("figure", "value"), rest))]


def data_sections(folder: Path, counts: Mapping[str, Any]) -> list[Section]:
    """What was read, and what was left out of it."""
    rows = [(text, counts[name]) for name, text in COUNTS.items() if name in counts]
    sections = [Section("Data", table=Table(("rows", ""), rows))]
    for title, name in (
        ("Labels that contradict each other", "conflicts.txt"),
        ("Rows that could not be used", "skipped.txt"),
    ):
        path = folder / "data" / name
        sentences = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
        if sentences:
            text = f"{len(sentences):,}; all of them stand in data/{name}."
            sections.append(Section(title, text, verbatim="\n".join(sentences[:NAMED])))
    return sections
