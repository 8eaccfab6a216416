"""Reading GGUF, the single-file format of llama.cpp (versions 2 and 3), with nothing but numpy.

The file is: magic, version, counts; then the metadata (typed keys and values); then one record per
tensor (name, shape, type, offset); then, aligned, the tensors' bytes. The file is mapped into
memory, and every count, length and offset in it is checked against its size before it is used: a
truncated or lying file is refused with a sentence. Specification: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.quant.formats import FORMATS, Format, dequantise

MOST_ENTRIES = 1 << 16  # metadata keys, and tensors
LONGEST_NAME = 1 << 16
LONGEST_TEXT = 1 << 24
MOST_ELEMENTS = 1 << 24  # of an array: the largest vocabularies have a quarter of a million tokens

# Value types of the metadata: number -> struct code. 8 is text, 9 an array, 7 a boolean byte.
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
TEXT, ARRAY, BOOLEAN = 8, 9, 7


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` in PyTorch's order (rows first), `start` in bytes from the
    beginning of the file."""

    shape: tuple[int, ...]
    form: Format
    start: int
    size: int


class Cursor:
    """A position in the mapped file; every read is checked against the file's end."""

    def __init__(self, data: np.ndarray[Any, Any], path: Path) -> None:
        self.view = memoryview(data)  # type: ignore[arg-type]  # numpy's stubs before 3.12
        self.path = path
        self.at = 0

    def broken(self, what: str) -> UserError:
        return UserError(f"{self.path} is not a sound GGUF file: {what}. Download it anew.")

    def take(self, count: int) -> memoryview:
        if count > len(self.view) - self.at:
            raise self.broken(f"it ends at byte {len(self.view)}, inside its header")
        self.at += count
        return self.view[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str, limit: int) -> int:
        value = int(self.number("<Q"))
        if value > limit:
            raise self.broken(f"it announces {value} {what}")
        return value

    def text(self, limit: int = LONGEST_TEXT) -> str:
        start = self.at
        try:
            return str(self.take(self.count("bytes of text", limit)), "utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"the text at byte {start} is not UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise self.broken(f"it has a metadata value of the unknown type {kind}")
        value = self.number(SCALARS[kind])
        return bool(value) if kind == BOOLEAN else value

    def array(self) -> list[Any]:
        kind = self.number("<I")
        width = 8 if kind == TEXT else struct.calcsize(SCALARS.get(kind, "<B"))
        most = min((len(self.view) - self.at) // width, MOST_ELEMENTS)
        count = self.count("array elements", most)
        if kind == TEXT:
            return [self.text() for _ in range(count)]
        if kind not in SCALARS:
            raise self.broken(f"it has an array of the unknown type {kind}")
        code = SCALARS[kind]
        values = struct.unpack(f"<{count}{code[1]}", self.take(count * width))
        return [bool(v) for v in values] if kind == BOOLEAN else list(values)


class GGUF:
    """One open file: `metadata` (key -> value), `tensors` (name -> where), `read` (name -> values).

    Raises `UserError` naming the file for anything that is not a sound GGUF of version 2 or 3, or
    whose tensors have a type that we do not decode.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            # Copy-on-write, so that PyTorch may wrap the bytes; nothing ever writes to them.
            self.data = np.memmap(self.path, dtype=np.uint8, mode="c")
        except FileNotFoundError:
            raise UserError(f"There is no file {self.path}.") from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path} cannot be read as GGUF ({error}); download it anew."
            ) from error
        cursor = Cursor(self.data, self.path)
        if bytes(self.data[:4]) != b"GGUF":
            raise UserError(
                f"{self.path} is not a GGUF file (it does not begin with 'GGUF'); download it anew."
            )
        cursor.take(4)
        self.version = int(cursor.number("<I"))
        if self.version not in (2, 3):
            raise UserError(
                f"{self.path} is GGUF version {self.version}"
                + (" (or big-endian)" if self.version >= 1 << 16 else "")
                + "; versions 2 and 3, little-endian, can be read."
            )
        n_tensors = cursor.count("tensors", MOST_ENTRIES)
        n_keys = cursor.count("metadata keys", MOST_ENTRIES)
        self.metadata = self._read_metadata(cursor, n_keys)
        self.tensors = self._read_tensors(cursor, n_tensors)

    def _read_metadata(self, cursor: Cursor, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = cursor.text(LONGEST_NAME)
            if key in metadata:
                raise cursor.broken(f"the key '{key}' appears twice")
            metadata[key] = cursor.value(cursor.number("<I"))
        return metadata

    def _read_tensors(self, cursor: Cursor, count: int) -> dict[str, TensorInfo]:
        found: dict[str, tuple[tuple[int, ...], Format, int]] = {}
        for _ in range(count):
            name = cursor.text(LONGEST_NAME)
            if name in found:
                raise cursor.broken(f"the tensor '{name}' appears twice")
            rank = cursor.number("<I")
            if not 1 <= rank <= 4:
                raise cursor.broken(f"the tensor '{name}' has {rank} axes")
            # GGUF names the fastest axis first, PyTorch last.
            shape = tuple(cursor.number("<Q") for _ in range(rank))[::-1]
            kind, offset = cursor.number("<I"), cursor.number("<Q")
            if kind not in FORMATS:
                known = ", ".join(form.name for form in FORMATS.values())
                raise UserError(
                    f"{self.path}: the tensor '{name}' has the type number {kind}, which cannot be "
                    f"decoded; take a file in one of {known}."
                )
            found[name] = shape, FORMATS[kind], offset
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise cursor.broken(f"general.alignment is {shown(alignment)}")
        data = -(-cursor.at // alignment) * alignment
        placed = {
            name: self._place(cursor, name, shape, form, data + offset)
            for name, (shape, form, offset) in found.items()
        }
        end = 0
        for name, info in sorted(placed.items(), key=lambda item: item[1].start):
            if info.start < end:  # else a small file might unpack to any number of weights
                raise cursor.broken(f"the tensor '{name}' overlaps another")
            end = info.start + info.size
        return placed

    def forms(self) -> Counter[str]:
        """The name of each format -> the bytes of the tensors that are stored in it."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
            sizes[info.form.name] += info.size
        return sizes

    def _place(
        self, cursor: Cursor, name: str, shape: tuple[int, ...], form: Format, start: int
    ) -> TensorInfo:
        if shape[-1] % form.values or 0 in shape:
            raise cursor.broken(f"the tensor '{name}' of type {form.name} has the shape {shape}")
        size = prod(shape) // form.values * form.bytes
        if start + size > len(self.data):
            raise UserError(
                f"{self.path} is truncated: the tensor '{name}' ends at byte "
                f"{start + size:,}, the file at byte {len(self.data):,}. Download it anew."
            )
        return TensorInfo(shape, form, start, size)

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values of a tensor, decoded into fresh memory: `dtype`, shape as in `tensors`."""
        info = self.tensors[name]
        return dequantise(self.raw(name), info.form, dtype).view(info.shape)

    def raw(self, name: str) -> Tensor:
        """The bytes of a tensor as they lie in the file, not copied."""
        info = self.tensors[name]
        return torch.from_numpy(self.data[info.start : info.start + info.size])
