"""The text column of .jsonl, .json, .csv, .tsv and .parquet.

Every function gives (place, text) pairs, the place being `file:row` with rows counted from 1 as
an editor counts lines (for .json and .parquet: entries), and tells `bad` of rows that have no
text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.data.archives import Source
from llm_from_scratch.data.decode_bytes import decode_text

Rows = Iterator[tuple[str, str]]
Bad = Callable[[str], None]


def rows_of(source: Source, field: str, bad: Bad) -> Rows:
    """The texts of a table; its kind is told by `source.suffix`, one of `TABLES`."""
    return TABLES[source.suffix](source, field, bad)


def _jsonl(source: Source, field: str, bad: Bad) -> Rows:
    """Line by line, split at ``\\n`` alone: U+0085 and U+2028 may stand inside of a string."""
    records = _Records(source.name, field, bad)
    with source.open() as file:
        for number, line in enumerate(file, start=1):
            place = f"{source.name}:{number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                bad(f"{place}: byte {error.start} of the line is not UTF-8, as JSON must be.")
                continue
            except (ValueError, RecursionError) as error:
                bad(f"{place}: is not JSON ({error}).")
                continue
            yield from records.text(record, place)
    records.finish()


def _json(source: Source, field: str, bad: Bad) -> Rows:
    """A list of records, or JSON lines under the wrong name."""
    text, _ = decode_text(source.read(), source.name)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            data = text.encode()
            yield from _jsonl(Source(source.name, ".jsonl", lambda: io.BytesIO(data)), field, bad)
            return
        raise UserError(f"{source.name}: is not JSON ({error}).") from None
    records = _Records(source.name, field, bad)
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries], start=1):
        yield from records.text(entry, f"{source.name}:{number}")
    records.finish()


class _Records:
    """The texts of a file's records; a file whose rows all lack the field is named once."""

    PATIENCE = 20

    def __init__(self, name: str, field: str, bad: Bad) -> None:
        self.name, self.field, self.bad = name, field, bad
        self.held_back: list[str] | None = []  # None from the first text on
        self.names: list[str] = []

    def text(self, record: Any, place: str) -> Rows:
        value = record.get(self.field) if isinstance(record, dict) else record
        if isinstance(value, str):
            for sentence in self.held_back or []:
                self.bad(sentence)
            self.held_back = None
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = value[error.start]
                self.bad(f"{place}: holds half a surrogate pair ({half!a}), which is no character.")
                return
            yield place, value
            return
        names = list(record) if isinstance(record, dict) else []
        if self.field in names:
            sentence = f"{place}: '{self.field}' is not a text."
        else:
            sentence = f"{place}: has no field '{self.field}'{_choices(self.field, names)}."
        if self.held_back is None:
            self.bad(sentence)
            return
        self.held_back.append(sentence)
        self.names = self.names or names
        if len(self.held_back) == self.PATIENCE:
            self.finish()

    def finish(self) -> None:
        """At the end of the file, or when there is no hope: `UserError` if no row had a text."""
        if self.held_back:
            raise UserError(
                f"{self.name}: the first {len(self.held_back)} rows have no text "
                f"'{self.field}'{_choices(self.field, self.names)}; give the field's name."
            )


def _choices(field: str, names: list[str]) -> str:
    if not names:
        return ""
    guess = nearest(field, names).removeprefix(" Did you mean ").rstrip("?")
    shown = ", ".join(str(name)[:40] for name in names[:8])
    return f" but {shown}" + (f" (perhaps {guess})" if guess else "")


def _csv(source: Source, field: str, bad: Bad) -> Rows:
    text = _table_text(source)
    yield from _separated(source.name, csv.reader(io.StringIO(text, newline="")), field, bad)


def _tsv(source: Source, field: str, bad: Bad) -> Rows:
    """Tab-separated values know no quoting, but some writers quote: only if the columns ask."""
    text = _table_text(source)
    plain = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    if '"' in text and len({len(row) for row in plain if row}) > 1:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t")
    else:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    yield from _separated(source.name, rows, field, bad)


def _table_text(source: Source) -> str:
    text, _ = decode_text(source.read(), source.name)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a field may be a book
    return text


def _separated(name: str, rows: Any, field: str, bad: Bad) -> Rows:
    header = next(rows, None)
    if header is None:
        return
    if field in header:
        column = header.index(field)
    else:
        raise UserError(
            f"{name}:1: the header has no column '{field}'{_choices(field, header)}; name the "
            "column in the file's first line."
        )
    before = rows.line_num
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            bad(f"{name}:{before + 1}: cannot be read ({error}).")
            before = rows.line_num
            continue
        if row is None:
            return
        place, before = f"{name}:{before + 1}", rows.line_num
        if not row:
            continue
        if len(row) <= column:
            bad(f"{place}: has {len(row)} columns, '{field}' is number {column + 1}.")
        else:
            yield place, row[column]


def _parquet(source: Source, field: str, bad: Bad) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f'{source.name}: reading .parquet needs pyarrow: pip install "scratchlm[eval]".'
        ) from None
    with source.open() as opened:
        # A member of an archive cannot jump about in its file, as parquet must.
        file = opened if opened.seekable() else io.BytesIO(opened.read())
        try:
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if field not in names:
                raise UserError(f"{source.name}: has no column '{field}'{_choices(field, names)}.")
            records, number = _Records(source.name, field, bad), 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from records.text({field: value}, f"{source.name}:{number}")
            records.finish()
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise UserError(f"{source.name}: is not parquet, or damaged ({reason}).") from None


TABLES: dict[str, Callable[[Source, str, Bad], Rows]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
