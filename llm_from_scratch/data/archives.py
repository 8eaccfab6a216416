"""Files, .gz files and the members of .zip archives as one kind of source.

Nothing is unpacked to the disk, so a member's path can do no harm; it only names the document.
What a small archive may unpack to is limited, against archives made to fill the memory.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import lzma
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import human_bytes

# Text compresses to a tenth, repetitive tables to a fiftieth; deflate's limit is a thousandth.
MAX_RATIO = 200
ALWAYS_ALLOWED = 64 << 20  # bytes that any archive may unpack to
DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
# What `zipfile` raises besides: for newer versions and methods, for encryption, for broken names.
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error)


@dataclasses.dataclass(frozen=True)
class Source:
    """Something to read: `name` for messages, `suffix` without .gz, and a way to open it."""

    name: str
    suffix: str
    open: Callable[[], IO[bytes]]

    def read(self) -> bytes:
        """All of its bytes."""
        with self.open() as file:
            return file.read()


def shown(path: Path | str) -> str:
    """A path as text that can be written anywhere: bytes of it that are not UTF-8 as `\\xff`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def open_sources(path: Path, bad: Callable[[str], None]) -> Iterator[Source]:
    """The sources of one file: itself, or the members of an archive in the order of their names.

    `bad` is told of members that cannot be read; a broken archive raises `UserError`.
    """
    suffix = path.suffix.lower()
    if suffix == ".gz":
        inner = Path(path.stem).suffix.lower()
        yield Source(shown(path), inner, lambda: _open_gzip(path))
    elif suffix == ".zip":
        yield from _members(path, bad)
    else:
        yield Source(shown(path), suffix, lambda: path.open("rb"))


def allowed_size(compressed: int) -> int:
    """To how many bytes a file of `compressed` bytes may unpack."""
    return max(ALWAYS_ALLOWED, MAX_RATIO * compressed)


class _Limited(io.RawIOBase):
    """A stream that ends with a `UserError` when it gives more than it may, or is broken."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, limit: int, name: str) -> None:
        self._stream, self._left, self._limit, self._name = stream, limit, limit, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            data = self._stream.read(len(buffer))
        except DAMAGE as error:
            raise UserError(f"{self._name}: the archive is damaged ({error}).") from None
        except OSError as error:
            if error.errno is not None:  # the disk's; bzip2 has no error of its own
                raise
            raise UserError(f"{self._name}: the archive is damaged ({error}).") from None
        self._left -= len(data)
        if self._left < 0:
            raise UserError(
                f"{self._name}: unpacks to more than {human_bytes(self._limit)}, which no text of "
                "its size does; unpack it yourself if it is what you want."
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._stream.close()
        super().close()


def _open_gzip(path: Path) -> IO[bytes]:
    limit = allowed_size(path.stat().st_size)
    return io.BufferedReader(_Limited(gzip.open(path, "rb"), limit, shown(path)), 1 << 20)


def _members(path: Path, bad: Callable[[str], None]) -> Iterator[Source]:
    try:
        archive = zipfile.ZipFile(path)
    except NotImplementedError as error:  # "zip file version 9.9"
        raise UserError(
            f"{shown(path)}: needs a newer unpacker ({error}); unpack it yourself."
        ) from None
    except UNREADABLE as error:
        raise UserError(
            f"{shown(path)}: is not a zip archive, or a damaged one ({error})."
        ) from None
    with archive:
        left = allowed_size(path.stat().st_size)
        for member in sorted(archive.infolist(), key=_member_name):
            inside = _member_name(member)
            parts = PurePosixPath(inside).parts
            name = f"{shown(path)}!{inside}"
            if member.is_dir() or any(_is_hidden(part) for part in parts):
                continue
            suffix = PurePosixPath(inside).suffix.lower()
            if inside.startswith(("/", "\\")) or ".." in parts or ":" in inside[:2]:
                bad(f"{name}: the path leads out of the archive.")
            elif member.flag_bits & 1:
                bad(f"{name}: is encrypted; unpack it yourself with its password.")
            elif suffix in (".zip", ".gz"):
                bad(f"{name}: is an archive inside of an archive; unpack the outer one.")
            elif member.file_size > left:
                raise UserError(
                    f"{shown(path)}: unpacks to more than "
                    f"{human_bytes(allowed_size(path.stat().st_size))}, which no text of its size "
                    "does; unpack it yourself if it is what you want."
                )
            else:
                left -= member.file_size  # of all members together: they may overlap in the file
                yield Source(name, suffix, _opener(archive, member, name))


def _opener(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str
) -> Callable[[], IO[bytes]]:
    def open_member() -> IO[bytes]:
        try:
            stream = archive.open(member)
        except UNREADABLE as error:
            raise UserError(f"{name}: cannot be unpacked ({error}).") from None
        return io.BufferedReader(_Limited(stream, member.file_size, name), 1 << 20)

    return open_member


def _is_hidden(part: str) -> bool:
    return part == "__MACOSX" or (part.startswith(".") and part not in (".", ".."))


def _member_name(member: zipfile.ZipInfo) -> str:
    """The member's path; names without the UTF-8 mark are Shift_JIS if they can be."""
    if member.flag_bits & 0x800 or member.filename.isascii():
        return member.filename
    try:
        return member.filename.encode("cp437").decode("cp932")
    except UnicodeError:
        return member.filename
