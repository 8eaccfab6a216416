"""Rows of labelled data: where each stands, what it holds, and what is wrong with it.

A row keeps the place it is from (`file:row`, counted from 1), so that whatever is found wrong later
(no answer, a label never seen, too long for the model) is said with the row's number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside


@dataclass(frozen=True)
class Row:
    """One record and where it is from: `data.jsonl:12`."""

    values: dict[str, Any]
    place: str


class BadRow(ValueError):
    """What is wrong with a row and how to mend it, without its place: a sentence's end.

    `raise BadRow("has no field 'text'; name the column with --classify.text_field.")`
    """


@dataclass
class BadRows:
    """What is done with broken rows: named and left out ("skip"), or the first one ends the run."""

    on_bad: str = "skip"
    sentences: list[str] = field(default_factory=list)

    def __call__(self, sentence: str) -> None:
        """Take note of a broken row; `UserError` where the first one is to end the run."""
        if self.on_bad == "stop":
            raise UserError(sentence)
        self.sentences.append(sentence)


def read_rows(path: Path | str, bad: BadRows, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a .jsonl or .json file."""
    with Path(path).open(encoding="utf-8") as file:
        text = file.read()
    if text.lstrip().startswith("["):
        records = json.loads(text)
    else:
        records = [json.loads(line) for line in text.split("\n") if line.strip()]
    for number, record in enumerate(records, start=1):
        yield Row(record, f"{Path(path).name}:{number}")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, each with its place; `stored_rows` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(path) as file:
        for row in rows:
            file.write(json.dumps({"place": row.place, **row.values}, ensure_ascii=False) + "\n")


def stored_rows(path: Path) -> list[Row]:
    """What `write_rows` wrote; no file, no rows."""
    if not path.is_file():
        return []
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                values = json.loads(line)
                rows.append(Row(values, values.pop("place")))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}). Start a new run.") from error
    return rows
