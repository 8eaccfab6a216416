"""Sentences as columns: one word a line with its tag, an empty line after each sentence.

That is the format of CoNLL's shared tasks (Tjong Kim Sang & De Meulder 2003) in its many kinds:

    Empire    B-location        1   Tampa   B-LOC   -   stephen        EU  NNP  B-NP  B-ORG
    State     I-location        2   bay     I-LOC   -   stephen        rejects VBZ B-VP O

Which column has the words and which the tags is found out from the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.archives import Source, open_sources, shown
from llm_from_scratch.data.bio import joined, spans_of_tags
from llm_from_scratch.data.records import (
    BadRows,
    Row,
    files_in,
    other_ending,
    readable,
    rows_of_source,
)
from llm_from_scratch.data.tables import TABLES

ENDINGS = (".conll", ".iob2", ".iob", ".bio", ".bioes", ".ner", ".txt", ".tsv", ".conllu")
_TAG = re.compile(r"(O|[BIESLUM][-_]\S+)\Z")
_NUMBER = re.compile(r"\d+\Z")
_RANGE = re.compile(r"\d+[-.]\d+\Z")  # a word of several, or an empty one, in CoNLL-U
_KEPT = 200  # lines by which the columns are found
_ALL_ENDINGS = [*dict.fromkeys([*TABLES, *(one for one in ENDINGS if one != ".txt")])]


@dataclass(frozen=True)
class _Columns:
    """What stands where: the numbers of two columns, of how many, separated by what."""

    word: int
    tag: int
    count: int
    separator: str | None

    def cells(self, line: str) -> list[str]:
        return line.split(self.separator) if self.separator else line.split()


class NoColumns(UserError):
    """A file that has no columns at all, such as one of prose."""


def read_tagged(path: Path | str, bad: BadRows, columns: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a file, or of the files in a folder or archive: sentences, and tables.

    Files with an ending of `ENDINGS` are read as `read_conll` reads them, others as `read_rows`
    does. In a folder a .txt without columns (README.txt) is passed over if there is anything else.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{shown(path)} does not exist; check the path.")
    known, passed_over = False, list[NoColumns]()
    for file in files_in(path):
        with readable(file):
            for source in open_sources(file, bad):
                if source.suffix in ENDINGS:
                    try:
                        sentences = _Sentences.of(source)
                    except NoColumns as error:
                        if source.suffix != ".txt":
                            raise
                        passed_over.append(error)
                        continue
                    yield from sentences.rows(bad)
                elif source.suffix in TABLES:
                    yield from rows_of_source(source, bad, columns)
                elif source.name == shown(path):
                    raise other_ending(path, _ALL_ENDINGS)
                else:
                    continue
                known = True
    if passed_over and not known:
        raise passed_over[0]
    if not known and path.is_dir():
        raise other_ending(path, _ALL_ENDINGS)


def read_conll(path: Path | str, bad: BadRows) -> Iterator[Row]:
    """The sentences of a file: {"text", "entities": [[begin, end, type]], "words": [[begin, end]]}.

    A row's place names the line that its sentence begins in. A sentence with a broken line (too few
    columns, a tag of no scheme, broken UTF-8) is named to `bad` and left out. IOB1, IOB2, BIOES and
    BILOU tags are understood. Raises `UserError` for a file in which no column holds tags.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{shown(path)} does not exist; check the path given as --data.")
    with readable(path):
        for source in open_sources(path, bad):
            yield from _Sentences.of(source).rows(bad)


@dataclass(frozen=True)
class _Sentences:
    """The lines of a source, and what stands where in them."""

    name: str
    lines: list[bytes]
    columns: _Columns

    @classmethod
    def of(cls, source: Source) -> _Sentences:
        lines = source.read().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        columns = _find_columns(source.name, [_decoded(line) or "" for line in lines])
        return cls(source.name, lines, columns)

    def rows(self, bad: BadRows) -> Iterator[Row]:
        sentence: list[tuple[int, str | None]] = []
        for number, raw in enumerate([*self.lines, b""], start=1):
            line = _decoded(raw)
            if line is not None and not line.strip():
                if sentence:
                    yield from _sentence(self.name, sentence, self.columns, bad)
                sentence = []
            elif line is None or not _is_comment(line, self.columns):
                sentence.append((number, line))


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode().rstrip("\r")
    except UnicodeDecodeError:
        return None


def _find_columns(name: str, lines: Sequence[str]) -> _Columns:
    numbers = [
        number
        for number, line in enumerate(lines)
        if line.strip() and not line.startswith(("# ", "-DOCSTART-"))
    ]
    plain = [lines[number] for number in numbers[:_KEPT]]
    separator = "\t" if any("\t" in line for line in plain) else None
    rows = [line.split(separator) for line in plain]
    if not rows:
        raise NoColumns(f"{name} has no line with a word and its tag.")
    counts = [len(row) for row in rows]
    count = max(set(counts), key=counts.count)
    rows = [row for row in rows if len(row) == count]

    def share(column: int, pattern: re.Pattern[str]) -> float:
        return sum(bool(pattern.match(row[column])) for row in rows) / len(rows)

    numbered = share(0, _NUMBER) + share(0, _RANGE) == 1 and count > 2 and rows[0][0] == "1"
    word = int(numbered)
    shares = {column: share(column, _TAG) for column in range(word + 1, count)}
    # The last one that holds nothing but tags: CoNLL-2003 has another kind of them before it.
    best = max(shares, key=lambda column: (shares[column], column), default=None)
    if best is None or shares[best] <= 0.5:  # a few broken lines are named later
        even = count > 1 and 2 * len(rows) > len(plain)
        raise (UserError if even else NoColumns)(
            f"{name}:{numbers[0] + 1}: no column holds tags such as O, B-PER and I-PER (the "
            f"line is {plain[0]!r:.60}); give a CoNLL file, or rows with 'text' and 'entities' as "
            ".jsonl."
        )
    return _Columns(word, best, count, separator)


def _is_comment(line: str, columns: _Columns) -> bool:
    """Whether a line is no word: `# text = ...`, `-DOCSTART-`, a range of CoNLL-U.

    A word may begin with # as well; then it has its tag.
    """
    cells = columns.cells(line)
    if line.startswith("-DOCSTART-"):
        return True
    if line.startswith("#"):
        return len(cells) != columns.count or not _TAG.match(cells[columns.tag])
    return columns.word == 1 and bool(_RANGE.match(cells[0]))


def _sentence(
    name: str, lines: list[tuple[int, str | None]], columns: _Columns, bad: BadRows
) -> Iterator[Row]:
    words, tags = list[str](), list[str]()
    for number, line in lines:
        where = f"{name}:{number}"
        cells = columns.cells(line) if line is not None else []
        if line is None:
            return bad(f"{where}: is not UTF-8; save the file as UTF-8.")
        if len(cells) <= max(columns.tag, columns.word):
            return bad(
                f"{where}: has {len(cells)} column{'' if len(cells) == 1 else 's'}, the tag is in "
                f"number {columns.tag + 1}: complete the line."
            )
        word, tag = cells[columns.word].strip(), cells[columns.tag].strip()
        if not word:
            return bad(f"{where}: has no word before its tag; give one, or take the line out.")
        if not _TAG.match(tag):
            return bad(
                f"{where}: has the tag {tag!r:.40}; it must be O, or one such as B-PER and I-PER."
            )
        words.append(word)
        tags.append(tag)
    text, places = joined(words)
    entities = [[places[a][0], places[b - 1][1], kind] for a, b, kind in spans_of_tags(tags)]
    values = {"text": text, "entities": entities, "words": [list(place) for place in places]}
    yield Row(values, f"{name}:{lines[0][0]}")
    return None
