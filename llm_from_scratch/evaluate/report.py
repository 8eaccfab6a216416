"""Reports of runs: tables, pictures and examples, as Markdown and as one HTML file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_from_scratch.core.files import write_aside


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; numbers are written with the digits that they need."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Section:
    """A part of a report: a title, a sentence or two, a table, a picture.

    `draw` gets matplotlib axes; `name` is the picture's file name without its ending.
    """

    title: str
    text: str = ""
    table: Table | None = None
    draw: Callable[[Any], None] | None = None
    name: str = ""


def write_report(folder: Path, title: str, sections: Sequence[Section]) -> None:
    """report.md in `folder`."""
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n\n{section.text}\n")
        if section.table is not None:
            header = " | ".join(section.table.header)
            rule = "|".join("---" for _ in section.table.header)
            rows = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in section.table.rows)
            parts.append(f"| {header} |\n|{rule}|\n{rows}\n")
    with write_aside(folder / "report.md") as file:
        file.write("\n".join(parts))
