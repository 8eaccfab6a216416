"""From whatever people have on their disks to documents of clean text.

Files, folders, .gz and .zip (read in place, never unpacked to the disk); plain text in the
encodings of `decode_bytes`, Aozora Bunko's format, .jsonl, .json, .csv, .tsv and .parquet. A file
with any other ending is read as plain text. What is broken is named with its place and skipped,
or refused with `on_bad="stop"`; nothing is mangled silently.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.aozora import clean_aozora, is_aozora
from llm_from_scratch.data.archives import Source, open_sources, shown
from llm_from_scratch.data.decode_bytes import decode_text
from llm_from_scratch.data.tables import TABLES, rows_of

PYTHON = "python"  # among --data no path, but the corpus of `python_corpus`
_BINARY_ENDINGS = """
    .7z .a .aac .avi .bin .bmp .bz2 .class .ckpt .db .dll .doc .docx .dylib .eot .epub .exe .flac
    .gguf .gif .h5 .ico .index .jar .jpeg .jpg .ko .lib .m4a .mid .mkv .mo .mov .mp3 .mp4 .npy .npz
    .o .obj .odt .ogg .onnx .otf .pdf .pickle .pkl .png .ppt .pptx .psd .pt .pth .pyc .pyd .pyo .rar
    .safetensors .so .sqlite .tar .tgz .tif .tiff .ttf .wasm .wav .webm .webp .whl .woff .woff2 .xls
    .xlsx .xz .zst
"""
# Endings of files that hold no text: passed over in folders and archives, but never when the user
# names such a file.
BINARY_SUFFIXES = frozenset(_BINARY_ENDINGS.split())


@dataclasses.dataclass(frozen=True)
class Document:
    """One text and where it is from: `folder/a.txt`, `b.zip!c.txt` or `d.jsonl:12`."""

    text: str
    source: str


@dataclasses.dataclass
class ReadReport:
    """What reading has met so far.

    files: files with at least one document; an archive's members count one each.
    documents, characters: what was given out.
    bad: one sentence per broken file or row, which was left out.
    notes: one sentence per file that was repaired (stray NUL bytes removed).
    empty: files and rows without text. passed_over: files that hold no text by their ending.
    encodings: how many plain texts were in which encoding.
    """

    files: int = 0
    documents: int = 0
    characters: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    empty: int = 0
    passed_over: int = 0
    encodings: Counter[str] = dataclasses.field(default_factory=Counter)

    def summary(self) -> str:
        """One line: what was read and what was not."""
        line = f"{_count(self.files, 'file')}, {_count(self.documents, 'document')}"
        line += f", {_count(self.characters, 'character')}"
        if others := sorted(set(self.encodings) - {"utf-8"}):
            line += f" ({', '.join(f'{self.encodings[name]:,} in {name}' for name in others)})"
        if self.empty:
            line += f", {self.empty:,} empty"
        if self.passed_over:
            line += f", {self.passed_over:,} not text by their ending"
        if self.notes:
            line += f", {len(self.notes):,} repaired"
        if self.bad:
            shown = "; ".join(sentence.rstrip(".") for sentence in self.bad[:3])
            more = f"; and {len(self.bad) - 3:,} more" if len(self.bad) > 3 else ""
            line += f"; {len(self.bad):,} broken and left out: {shown}{more}"
        return line


def read_documents(
    paths: Sequence[Path | str],
    *,
    on_bad: str = "skip",
    report: ReadReport | None = None,
    text_field: str = "text",
    columns: Sequence[str] = (),
) -> Iterator[Document]:
    """The documents of files, folders and archives, in a fixed order.

    Args:
        paths: in the order given; folders recursively, sorted by name, hidden entries left out.
        on_bad: "skip" notes a broken file or row in the report and goes on, "stop" raises.
        report: filled while the documents are taken.
        text_field: the field or column of .jsonl, .json, .csv, .tsv and .parquet.
        columns: the names of the columns of a .csv or .tsv without a header.

    Raises:
        UserError: at once for a path that does not exist; while reading for anything broken if
            `on_bad` is "stop", and in the end if there was no text at all.
    """
    if on_bad not in ("skip", "stop"):
        raise UserError(f"data.on_bad is 'skip' or 'stop', not '{on_bad}'.")
    if not paths:
        raise UserError("No text was given; name files or folders with --data.")
    for path in paths:
        if Path(path).exists():
            continue
        if str(path) == PYTHON:
            raise UserError("The corpus python stands alone; leave out the other files or python.")
        raise UserError(f"{shown(path)} does not exist; check the path given as --data.")
    report = report if report is not None else ReadReport()
    reading = _Reading(on_bad, report, text_field, tuple(columns))
    return reading.documents([Path(path) for path in paths])


@dataclasses.dataclass
class _Reading:
    """One pass over the sources: settings and report."""

    on_bad: str
    report: ReadReport
    text_field: str
    columns: tuple[str, ...] = ()

    def documents(self, paths: Sequence[Path]) -> Iterator[Document]:
        for path in paths:
            for file, named in self._files(path):
                yield from self._file(file, named)
        if self.report.documents == 0:
            where = ", ".join(map(shown, paths))
            reason = f" ({self.report.bad[0].rstrip('.')})" if self.report.bad else ""
            raise UserError(f"No text was found in {where}{reason}; give files with text.")

    def _files(self, path: Path) -> Iterator[tuple[Path, bool]]:
        """The files of a path, and whether the user named the file itself."""
        if not path.is_dir():
            yield path, True
            return
        seen = set[str]()  # links to folders are followed, but not round in circles
        walk = os.walk(path, onerror=self._unreadable_folder, followlinks=True)
        for folder, folders, names in walk:
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                file = Path(folder) / name
                if name.startswith("."):
                    continue
                if file.exists() and not file.is_file():
                    self.report.passed_over += 1  # a pipe or a device would never end
                    continue
                yield file, False

    def _unreadable_folder(self, error: OSError) -> None:
        self._bad(f"{shown(error.filename)}: the folder cannot be read ({error.strerror}).")

    def _file(self, path: Path, named: bool) -> Iterator[Document]:
        try:
            for source in open_sources(path, self._bad):
                member = source.name != shown(path)
                if source.suffix in BINARY_SUFFIXES and (member or not named):
                    self.report.passed_over += 1
                    continue
                yield from self._source(source)
        except UserError as error:
            self._bad(str(error))
        except OSError as error:
            self._bad(f"{shown(path)}: cannot be read ({error.strerror or error}).")

    def _source(self, source: Source) -> Iterator[Document]:
        before = self.report.documents
        try:
            if source.suffix in TABLES:
                for place, text in rows_of(source, self.text_field, self._bad, self.columns):
                    yield from self._document(text, place)
            else:
                text, encoding = decode_text(source.read(), source.name)
                if text.strip():
                    self.report.encodings[encoding] += 1
                yield from self._document(text, source.name, plain=True)
        except UserError as error:
            if self.on_bad == "stop":
                raise
            self._bad(str(error))
        self.report.files += self.report.documents > before

    def _document(self, text: str, place: str, plain: bool = False) -> Iterator[Document]:
        if nuls := text.count("\0"):
            self._stray_nuls(f"{place}: {_count(nuls, 'NUL byte')} in the text")
            text = text.replace("\0", "")
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if plain and is_aozora(text):
            text = clean_aozora(text)
        if not text.strip():
            self.report.empty += 1
            return
        self.report.documents += 1
        self.report.characters += len(text)
        yield Document(text, place)

    def _bad(self, sentence: str) -> None:
        if self.on_bad == "stop":
            raise UserError(sentence)
        self.report.bad.append(sentence)

    def _stray_nuls(self, finding: str) -> None:
        if self.on_bad == "stop":
            raise UserError(f"{finding}; remove what does not belong there.")
        self.report.notes.append(f"{finding}, removed.")


def _count(number: int, thing: str) -> str:
    """`1 file`, `1,200 files`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
