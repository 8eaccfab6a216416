"""Duplicates in files: read as documents or as rows, found, counted, and left out of a copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.near_duplicates import Duplicate, find_duplicates
from llm_from_scratch.data.read import ReadReport, read_documents
from llm_from_scratch.data.records import BadRows, read_rows
from llm_from_scratch.data.tables import choices

BEGINS = 72  # characters of a text that are shown


@dataclass
class Texts:
    """Texts, where each is from, and the row or document that each stands for."""

    texts: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, text: str, place: str, record: dict[str, Any]) -> None:
        self.texts.append(text)
        self.places.append(place)
        self.records.append(record)


@dataclass
class Deduplicated:
    """What was found: `kept` are the numbers of the texts that stay."""

    texts: Texts
    against: Texts
    duplicates: list[Duplicate]
    kept: list[int]

    @property
    def counts(self) -> dict[str, int]:
        """How many texts there were, were left out for which reason, and stay."""
        found = {"texts": len(self.texts.texts)}
        for kind, exact in (("exact", True), ("near", False)):
            alike = [one for one in self.duplicates if one.exact == exact]
            found[f"{kind}_duplicates"] = sum(one.of >= 0 for one in alike)
            if self.against.texts:
                found[f"{kind}_in_against"] = sum(one.of < 0 for one in alike)
        return {**found, "kept": len(self.kept)}

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Each text that is left out beside the one that it is like."""
        return [
            {
                "text": self.texts.places[one.number],
                "like": (self.texts if one.of >= 0 else self.against).places[one.of],
                "similarity": round(one.similarity, 4),
                "exact": one.exact,
                "begins": " ".join(self.texts.texts[one.number][: 2 * BEGINS].split())[:BEGINS],
            }
            for one in self.duplicates
        ]

    def write(self, path: Path) -> None:
        """What stays, as JSON lines."""
        with write_aside(path) as file:
            for number in self.kept:
                file.write(json.dumps(self.texts.records[number], ensure_ascii=False) + "\n")


def read_texts(
    paths: Sequence[str],
    fields: Sequence[str] | None,
    columns: Sequence[str],
    bad: list[str],
    line: LiveLine,
) -> Texts:
    """The texts of files: of each row the `fields` together, or documents where there are none.

    What cannot be read is added to `bad`. `UserError` for a path that does not exist, for files
    without any text, and for rows of which none has the fields.
    """
    found = Texts()
    if fields is None:
        report = ReadReport()
        for document in read_documents(paths, report=report):
            line.show(f"Reading {document.source}")
            record = {"text": document.text, "source": document.source}
            found.add(document.text, document.source, record)
        bad += report.bad
        return found
    rows = BadRows()
    for path in paths:
        for row in read_rows(path, rows, columns):
            line.show(f"Reading {row.place}")
            missing = [name for name in fields if name not in row.values]
            if missing:
                there = choices(missing[0], list(row.values))
                rows(f"{row.place}: has no field '{missing[0]}'{there}.")
                continue
            text = "\n".join(_as_text(row.values[name]) for name in fields)
            found.add(text, row.place, row.values)
    if not found.texts:
        reason = f" ({rows.sentences[0].rstrip('.')})" if rows.sentences else ""
        raise UserError(f"No row of {', '.join(paths)} has a text{reason}; look at --field.")
    bad += rows.sentences
    return found


def _as_text(value: Any) -> str:
    """A field as text; lists and objects (messages, say) as their texts, in order."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict | list):
        inside = value.values() if isinstance(value, dict) else value
        return "\n".join(filter(None, map(_as_text, inside)))
    return "" if value is None else str(value)


def deduplicate(
    texts: Texts, against: Texts, similarity: float = 0.8, *, exact: bool = False
) -> Deduplicated:
    """Find which texts are like others or like one of `against`; see `find_duplicates`."""
    duplicates = find_duplicates(texts.texts, similarity, against=against.texts, exact=exact)
    out = {one.number for one in duplicates}
    kept = [number for number in range(len(texts.texts)) if number not in out]
    return Deduplicated(texts, against, duplicates, kept)
