"""The rows of .jsonl, .json, .csv, .tsv and .parquet: whole, or their text alone.

Every function gives (place, record) pairs, the place being `file:row` with rows counted from 1 as
an editor counts lines (for .json and .parquet: entries), and tells `bad` of rows that cannot be
read. A row with bytes that are not UTF-8 is such a row; the others of its file are read.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.data.archives import Source
from llm_from_scratch.data.decode_bytes import decode_rows

Rows = Iterator[tuple[str, str]]
Records = Iterator[tuple[str, Any]]
Bad = Callable[[str], None]

# A .json file that is one object holds its rows under one of these names.
LISTS = ("data", "examples", "rows", "records", "items")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Wanted:
    """What of a table is needed.

    columns: the names of the columns of a .csv or .tsv whose first line is a row already.
    field: the only field that is needed; None for all. Of .parquet no other is then read, and
        rows of .csv and .tsv need only be long enough to have it.
    """

    columns: tuple[str, ...] = ()
    field: str | None = None


def records_of(source: Source, bad: Bad, columns: Sequence[str] = ()) -> Records:
    """The rows of a table as they stand there; its kind is told by `source.suffix`.

    Rows of .csv and .tsv are dictionaries of texts, by the names in the header or in `columns`.
    """
    return TABLES[source.suffix](source, Wanted(tuple(columns)), bad)


def rows_of(source: Source, field: str, bad: Bad, columns: Sequence[str] = ()) -> Rows:
    """The texts of a table, from one field of each row; `columns` as in `records_of`."""
    texts = _Texts(source.name, field, bad)
    for place, record in TABLES[source.suffix](source, Wanted(tuple(columns), field), bad):
        yield from texts.text(record, place)
    texts.finish()


# --- JSON ----------------------------------------------------------------------------------------


def _jsonl(source: Source, wanted: Wanted, bad: Bad) -> Records:
    """Line by line, split at ``\\n`` alone: U+0085 and U+2028 may stand inside of a string."""
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
            if b"\\u" not in line or _sound(record, wanted, place, bad):
                yield place, record


def _json(source: Source, wanted: Wanted, bad: Bad) -> Records:
    """A list of records, an object that holds one, or JSON lines under the wrong name."""
    text, damaged = decode_rows(source.read(), source.name)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{"):
            data = text.encode("utf-8", "surrogateescape")
            again = Source(source.name, ".jsonl", lambda: io.BytesIO(data))
            yield from _jsonl(again, wanted, bad)
            return
        raise UserError(f"{source.name}: is not JSON ({error}).") from None
    if isinstance(entries, dict):
        lists = [entries[name] for name in LISTS if isinstance(entries.get(name), list)]
        entries = lists[0] if len(lists) == 1 and wanted.field not in entries else [entries]
    elif not isinstance(entries, list):
        entries = [entries]
    doubtful = damaged or "\\u" in text
    for number, entry in enumerate(entries, start=1):
        place = f"{source.name}:{number}"
        if not doubtful or _sound(entry, wanted, place, bad):
            yield place, entry


def _sound(record: Any, wanted: Wanted, place: str, bad: Bad) -> bool:
    """Whether all of what is needed is made of characters; `bad` is told otherwise."""
    if wanted.field is not None and isinstance(record, dict):
        record = record.get(wanted.field)
    found = _SURROGATE.search(json.dumps(record, ensure_ascii=False))
    if found is None:
        return True
    bad(f"{place}: {_no_character(found.group())}")
    return False


def _no_character(half: str) -> str:
    if "\udc80" <= half <= "\udcff":
        return (
            f"has the byte {ord(half) - 0xDC00:02X} (or half a surrogate pair), which is not "
            "UTF-8; mend the row."
        )
    return f"holds half a surrogate pair ({half!a}), which is no character."


class _Texts:
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
            yield place, value
            return
        names = list(record) if isinstance(record, dict) else []
        if self.field in names:
            sentence = f"{place}: '{self.field}' is not a text."
        else:
            sentence = f"{place}: has no field '{self.field}'{choices(self.field, names)}."
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
                f"'{self.field}'{choices(self.field, self.names)}; give the field's name."
            )


def choices(field: str, names: Sequence[str]) -> str:
    """` but id, texte (perhaps 'texte')`: what there is in place of a field that there is not."""
    if not names:
        return ""
    guess = nearest(field, names).removeprefix(" Did you mean ").rstrip("?")
    shown = ", ".join(str(name)[:40] for name in names[:8])
    return f" but {shown}" + (f" (perhaps {guess})" if guess else "")


# --- separated values ----------------------------------------------------------------------------


def _csv(source: Source, wanted: Wanted, bad: Bad) -> Records:
    text, damaged = _table_text(source)
    rows = csv.reader(io.StringIO(text, newline=""))
    yield from _separated(source.name, rows, wanted, bad, damaged)


def _tsv(source: Source, wanted: Wanted, bad: Bad) -> Records:
    """Tab-separated values know no quoting, but some writers quote: only if the columns ask."""
    text, damaged = _table_text(source)

    def rows(quoting: Any, strict: bool = False) -> Any:
        lines = io.StringIO(text, newline="")
        return csv.reader(lines, delimiter="\t", quoting=quoting, strict=strict)

    quoted = False
    if '"' in text:
        quoted = all(map(_QUOTED.fullmatch, _with_quotes(rows(csv.QUOTE_NONE))))
        if not quoted and (odd := _odd_rows(rows(csv.QUOTE_NONE))):
            # A quotation mark that closes nothing is an error: they are letters like others.
            with contextlib.suppress(csv.Error):
                quoted = _odd_rows(rows(csv.QUOTE_MINIMAL, strict=True)) < odd
    chosen = rows(csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE)
    yield from _separated(source.name, chosen, wanted, bad, damaged)


def _with_quotes(rows: Any) -> Iterator[str]:
    return (cell for row in rows for cell in row if '"' in cell)


def _odd_rows(rows: Any) -> int:
    """How many rows have not as many cells as most."""
    widths = Counter(len(row) for row in rows if row)
    return widths.total() - max(widths.values(), default=0)


def _table_text(source: Source) -> tuple[str, bool]:
    text, damaged = decode_rows(source.read(), source.name)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # a field may be a book
    return text, damaged


def _separated(name: str, rows: Any, wanted: Wanted, bad: Bad, damaged: bool) -> Records:
    header, waiting = _header(name, rows, wanted)
    if not header:
        return
    before = 0 if waiting else rows.line_num
    while True:
        try:
            row = waiting or next(rows, None)
        except csv.Error as error:
            bad(f"{name}:{before + 1}: cannot be read ({error}).")
            before = rows.line_num
            continue
        waiting = None
        if row is None:
            return
        place, before = f"{name}:{before + 1}", rows.line_num
        if not row:
            continue
        record = _record(row, header, wanted, place, bad)
        if record is not None and (not damaged or _sound(record, wanted, place, bad)):
            yield place, record


def _header(name: str, rows: Any, wanted: Wanted) -> tuple[list[str], list[str] | None]:
    """The columns' names, and the first line where it is a row."""
    first: list[str] | None = next(rows, None)
    if first is None:
        return [], None
    if wanted.columns:
        header = list(wanted.columns)
        if wanted.field is not None and wanted.field not in header:
            raise UserError(
                f"{name}: --data.columns names no '{wanted.field}'"
                f"{choices(wanted.field, header)}; name the column with the text so."
            )
        return header, None if first == header else first
    if wanted.field is not None and wanted.field not in first:
        raise UserError(
            f"{name}:1: the header has no column '{wanted.field}'{choices(wanted.field, first)}; "
            "name the column in the file's first line."
        )
    twice = [column for column, count in Counter(first).items() if count > 1]
    if wanted.field is None and twice:
        raise UserError(
            f"{name}:1: the header names '{twice[0]}' twice; if the first line is a row already, "
            "name the columns with --data.columns, else give every column a name of its own."
        )
    return first, None


def _record(
    row: list[str], header: list[str], wanted: Wanted, place: str, bad: Bad
) -> dict[str, str] | None:
    if wanted.field is not None:
        column = header.index(wanted.field)
        if len(row) > column:
            return {wanted.field: row[column]}
        bad(f"{place}: has {len(row)} columns, '{wanted.field}' is number {column + 1}.")
        return None
    while len(row) > len(header) and not row[-1]:
        row = row[:-1]
    if len(row) == len(header):
        return dict(zip(header, row, strict=True))
    names = "--data.columns names" if wanted.columns else "the header has"
    bad(
        f"{place}: has {len(row)} columns, {names} {len(header)}; look for a separator or a "
        "quotation mark too many or too few."
    )
    return None


# --- parquet -------------------------------------------------------------------------------------


def _parquet(source: Source, wanted: Wanted, bad: Bad) -> Records:
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
            names, field = table.schema_arrow.names, wanted.field
            if field is not None and field not in names:
                raise UserError(f"{source.name}: has no column '{field}'{choices(field, names)}.")
            number = 0
            only = None if field is None else [field]
            for batch in table.iter_batches(batch_size=1024, columns=only):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{source.name}:{number}", record
        except (pyarrow.ArrowException, OSError) as error:
            reason = str(error).split("\n", 1)[0].rstrip(".")
            raise UserError(f"{source.name}: is not parquet, or damaged ({reason}).") from None


TABLES: dict[str, Callable[[Source, Wanted, Bad], Records]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
