"""Rows of labelled data: where each stands, what it holds, and what is wrong with it.

A row keeps the place it is from (`file:row`, counted from 1), so that whatever is found wrong later
(no answer, a label never seen, too long for the model) is said with the row's number.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.data.archives import Source, open_sources, shown
from llm_from_scratch.data.decode_bytes import decode_rows
from llm_from_scratch.data.tables import TABLES, records_of


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
    """The rows of a file, or of the files in a folder in the order of their names.

    .jsonl, .json, .csv, .tsv and .parquet, each also .gz or inside of a .zip. `columns` names the
    columns of a .csv or .tsv without a header. Lines of a .txt are rows with the fields `text` and
    `file` (the file's name without its ending), so that files can be labels; in a folder with
    tables they are passed over. What cannot be read is said to `bad` with its row.

    Raises:
        UserError: for a path that is not there, or a file that is not what its name says.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{shown(path)} does not exist; check the path.")
    known = False
    files = files_in(path)
    tables = [file for file in files if not file.name.removesuffix(".gz").endswith(".txt")]
    if path.is_dir():
        # A README.txt beside tables is no table; a folder of plain texts is read line by line.
        files = [file for file in tables if _is_table(file)] or files
    for file in files:
        with readable(file):
            for source in open_sources(file, bad):
                if source.suffix in (*TABLES, ".txt"):
                    known = True
                    yield from rows_of_source(source, bad, columns)
                elif source.name == shown(path):
                    raise other_ending(path, TABLES)
    if not known and path.is_dir():
        raise other_ending(path, TABLES)


def other_ending(path: Path, endings: Iterable[str]) -> UserError:
    """What to say of a file whose ending is none of these and .txt, or a folder without such."""
    named = ", ".join(endings)
    if path.is_dir():
        return UserError(
            f"{shown(path)}: no file in this folder ends in {named} or .txt (each also .gz); "
            "rename the files after what they hold, or name them one by one."
        )
    return UserError(
        f"{shown(path)}: its ending is none of {named} and .txt (each also .gz); rename the file "
        "after what it holds."
    )


def files_in(path: Path) -> list[Path]:
    """The files in a folder in the order of their names, hidden ones left out; or the file."""
    if not path.is_dir():
        return [path]
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    return [path / file for file in sorted(inside) if not any(p[0] == "." for p in file.parts)]


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """What the disk refuses as a `UserError` that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{shown(file)}: cannot be read ({error.strerror or error}).") from None


def _is_table(file: Path) -> bool:
    suffix = Path(file.name.removesuffix(".gz")).suffix.lower()
    return suffix in TABLES or suffix == ".zip"


def rows_of_source(source: Source, bad: BadRows, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table, or the lines of a .txt."""
    records = records_of(source, bad, columns) if source.suffix in TABLES else _lines(source, bad)
    for place, record in records:
        if isinstance(record, dict):
            yield Row(record, place)
        else:
            bad(f"{place}: is no object with named fields.")


def _lines(source: Source, bad: BadRows) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a plain text as rows."""
    text, damaged = decode_rows(source.read(), source.name)
    file = PurePath(source.name.removesuffix(".gz")).stem
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        if damaged and not line.isascii() and _broken(line):
            bad(f"{source.name}:{number}: has a byte that is not UTF-8; mend the row.")
        elif line.strip():
            yield f"{source.name}:{number}", {"text": line, "file": file}


def _broken(line: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in line)


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
