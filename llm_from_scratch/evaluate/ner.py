"""How well names were found: precision, recall and F1 of whole entities, and what went wrong.

An entity is right if its borders and its type are those that were wanted (CoNLL-2003's measure;
`seqeval` counts the same). Micro means over all entities, macro is the mean over the types.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_from_scratch.data.bio import Span
from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.report_parts import (
    Mistake,
    calibration_section,
    confusion_section,
    errors_section,
)

NONE = "no entity"
AROUND = 30  # characters of text shown on each side of an error


@dataclass(frozen=True)
class Score:
    """How many entities were wanted, found and both."""

    wanted: int = 0
    found: int = 0
    right: int = 0

    @property
    def precision(self) -> float:
        """The share of what was found that is right; 0 where nothing was found."""
        return self.right / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """The share of what was wanted that was found; 0 where nothing was wanted."""
        return self.right / self.wanted if self.wanted else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of the two."""
        return 2 * self.right / (self.wanted + self.found) if self.right else 0.0


def score_spans(wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> Score:
    """The micro score over texts: of each the spans that were wanted and that were found."""
    pairs = [({*a}, {*b}) for a, b in zip(wanted, found, strict=True)]
    return Score(
        sum(len(a) for a, _ in pairs),
        sum(len(b) for _, b in pairs),
        sum(len(a & b) for a, b in pairs),
    )


def score_types(
    wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]
) -> dict[str, Score]:
    """The score of each type that was wanted or found, by name."""
    names = sorted({span[2] for spans in (*wanted, *found) for span in spans})
    return {
        name: score_spans(
            [[s for s in spans if s[2] == name] for spans in wanted],
            [[s for s in spans if s[2] == name] for spans in found],
        )
        for name in names
    }


def figures(wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]) -> dict[str, float]:
    """f1, precision, recall, macro_f1 and border_f1 (which does not ask for the type)."""
    whole = score_spans(wanted, found)
    types = score_types(wanted, found)
    borders = [[[(a, b, "") for a, b, _ in spans] for spans in many] for many in (wanted, found)]
    return {
        "f1": whole.f1,
        "precision": whole.precision,
        "recall": whole.recall,
        "macro_f1": sum(score.f1 for score in types.values()) / max(1, len(types)),
        "border_f1": score_spans(*borders).f1,
    }


# --- what went wrong -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One error: its kind, and the spans of it that there are."""

    kind: str
    wanted: Span | None
    found: Span | None


def faults_of(wanted: Sequence[Span], found: Sequence[Span]) -> list[Fault]:
    """The errors in one text: wrong type, wrong borders, both, missed, made up.

    Each wrong entity is held against the one that it shares most characters with.
    """
    left, extra = sorted({*wanted} - {*found}), sorted({*found} - {*wanted})
    pairs = [
        (min(a[1], b[1]) - max(a[0], b[0]), a, b)
        for a in left
        for b in extra
        if a[0] < b[1] and b[0] < a[1]
    ]
    faults: list[Fault] = []
    used: set[Span] = set()
    for _, a, b in sorted(pairs, key=lambda pair: (-pair[0], pair[1], pair[2])):
        if (a in used and a in left) or b in used:
            continue
        used |= {a, b}
        same = a[:2] == b[:2]
        kind = "wrong type" if same else "wrong borders" if a[2] == b[2] else "both wrong"
        faults.append(Fault(kind, a, b))
    matched = {fault.wanted for fault in faults}, {fault.found for fault in faults}
    faults += [Fault("missed", a, None) for a in left if a not in matched[0]]
    faults += [Fault("made up", None, b) for b in extra if b not in matched[1]]
    return faults


def confusion(
    wanted: Sequence[Sequence[Span]], found: Sequence[Sequence[Span]]
) -> tuple[list[str], list[list[int]]]:
    """(types and "no entity", counts[wanted][found]); entities are paired as in `faults_of`."""
    names = [*sorted({span[2] for spans in (*wanted, *found) for span in spans}), NONE]
    number = {name: place for place, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for a, b in zip(wanted, found, strict=True):
        for span in {*a} & {*b}:
            counts[number[span[2]], number[span[2]]] += 1
        for fault in faults_of(a, b):
            row = fault.wanted[2] if fault.wanted else NONE
            column = fault.found[2] if fault.found else NONE
            counts[number[row], number[column]] += 1
    return names, counts.tolist()


# --- for people ----------------------------------------------------------------------------------


def marked(text: str, spans: Sequence[Span]) -> str:
    """The text with its entities in brackets: `[Paris LOC] is in [France LOC].`"""
    parts, at = [], 0
    for begin, end, name in sorted(spans):
        parts += [text[at:begin], f"[{text[begin:end]} {name}]"]
        at = end
    return "".join([*parts, text[at:]])


def sections(
    places: Sequence[str],
    texts: Sequence[str],
    wanted: Sequence[Sequence[Span]],
    found: Sequence[Sequence[Span]],
    confidences: Sequence[Sequence[float]],
) -> list[Section]:
    """The report's sections: scores by type, kinds of errors, confusions, calibration, errors.

    All are lists by text; `places` says which row each is, `confidences` how sure the model was of
    each span in `found`.
    """
    types = score_types(wanted, found)
    rows = [_score_row(name, score) for name, score in types.items()]
    rows.append(_score_row("all", score_spans(wanted, found)))
    header = ("type", "wanted", "found", "right", "precision", "recall", "F1")
    by_type = Section("Entities by type", table=Table(header, rows))
    kinds: Counter[str] = Counter()
    mistakes: list[Mistake] = []
    for place, text, a, b, sure in zip(places, texts, wanted, found, confidences, strict=True):
        confidence = dict(zip(b, sure, strict=True))
        for fault in faults_of(a, b):
            kinds[fault.kind] += 1
            if fault.found is not None:
                mistakes.append(_mistake(place, text, fault, confidence[fault.found]))
    errors = Section(
        "Kinds of errors",
        "Errors of one entity held against the one that shares most characters with it.",
        Table(("kind", "count"), kinds.most_common()) if kinds else None,
    )
    sure_of = [p for row in confidences for p in row]
    correct = [span in {*a} for a, b in zip(wanted, found, strict=True) for span in b]
    parts = [by_type, errors, confusion_section(*confusion(wanted, found))]
    if sure_of:
        parts.append(calibration_section(sure_of, correct))
    return [*parts, errors_section(mistakes)]


def _score_row(name: str, score: Score) -> tuple[str | int | float, ...]:
    return (
        name, score.wanted, score.found, score.right, score.precision, score.recall, score.f1,
    )  # fmt: skip


def _mistake(place: str, text: str, fault: Fault, confidence: float) -> Mistake:
    spans = [span for span in (fault.wanted, fault.found) if span is not None]
    first = max(0, min(span[0] for span in spans) - AROUND)
    last = max(span[1] for span in spans) + AROUND
    piece = f"{'…' if first else ''}{text[first:last]}{'…' if last < len(text) else ''}"

    def said(span: Span | None) -> str:
        return NONE if span is None else f"{text[span[0] : span[1]]} ({span[2]})"

    return Mistake(place, piece, said(fault.wanted), said(fault.found), confidence)
