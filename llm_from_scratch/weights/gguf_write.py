"""Writing GGUF, version 3: the mirror image of `gguf.py`.

The header says where everything will lie, so the whole plan (names, shapes, formats) has to be
known before the first byte; the numbers themselves come one tensor at a time, a part at a time,
and are written aside and moved into place. Specification: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import write_aside
from llm_from_scratch.quant.formats import Format, quantise
from llm_from_scratch.weights.gguf import ARRAY, SCALARS, TEXT

VERSION = 3
ALIGNMENT = 32  # bytes; every tensor begins at a multiple of it
LONGEST_NAME = 63  # of a tensor, in bytes: ggml keeps names in 64, the last of them zero

# The metadata types that Python's own stand for (the numbers of enum gguf_type).
U8, I32, U32, F32, BOOL, U64 = 0, 5, 4, 6, 7, 10


@dataclass(frozen=True)
class Typed:
    """A metadata value whose type is not the one that its Python type stands for.

    `kind` is the number of the type; of a list, that of its elements.
    """

    kind: int
    value: Any


@dataclass(frozen=True)
class Planned:
    """A tensor to be written; `read()` makes its values, of this shape, when it is its turn."""

    name: str
    shape: tuple[int, ...]
    form: Format
    read: Callable[[], Tensor]

    @property
    def size(self) -> int:
        """In bytes."""
        return prod(self.shape) // self.form.values * self.form.bytes


def write_gguf(path: Path | str, metadata: Mapping[str, Any], tensors: Sequence[Planned]) -> None:
    """Write a GGUF file; it appears under `path` whole or not at all.

    Metadata values are `str`, `bool`, `int` (uint32, or uint64 where it is larger and int32 where
    it is negative), `float` (fp32), `bytes` (an array of uint8), lists of one of these (integers
    as int32), or `Typed`.
    Raises `UserError` naming the tensor whose values its format cannot hold.
    """
    header = _header(metadata, tensors)
    with write_aside(path, "wb") as file:
        file.write(header)
        for tensor in tensors:
            _write_tensor(file, tensor)


def _header(metadata: Mapping[str, Any], tensors: Sequence[Planned]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts += [_text(key), *_typed(key, value)]
    start = 0
    for tensor in tensors:
        assert tensor.shape[-1] % tensor.form.values == 0, tensor.name
        name = tensor.name.encode()
        assert len(name) <= LONGEST_NAME, tensor.name
        shape = tensor.shape[::-1]  # GGUF names the fastest axis first, PyTorch last
        parts.append(struct.pack("<Q", len(name)) + name)
        parts.append(struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        parts.append(struct.pack("<IQ", tensor.form.number, start))
        start += tensor.size + _padding(tensor.size)
    header = b"".join(parts)
    return header + bytes(_padding(len(header)))


def _padding(size: int) -> int:
    return -size % ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode("utf-8", "replace")  # half a character cannot be written
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> Iterable[bytes]:
    """The type and the bytes of one metadata value."""
    kind = None
    if isinstance(value, Typed):
        kind, value = value.kind, value.value
    if isinstance(value, bytes):
        value, kind = list(value), U8
    if isinstance(value, list | tuple):
        if kind is None:
            kind = _kind_of(key, value[0] if value else "", I32)
        return [struct.pack("<IIQ", ARRAY, kind, len(value)), _array(kind, value)]
    if kind is None:
        kind = _kind_of(key, value, _whole(value) if isinstance(value, int) else U32)
    return [struct.pack("<I", kind), _array(kind, [value])]


def _whole(value: int) -> int:
    return I32 if value < 0 else U32 if value < 1 << 32 else U64


def _kind_of(key: str, value: Any, whole: int) -> int:
    for python, kind in ((str, TEXT), (bool, BOOL), (int, whole), (float, F32)):
        if isinstance(value, python):
            return kind
    raise TypeError(f"{key}: GGUF has no type for {value!r}")


def _array(kind: int, values: Sequence[Any]) -> bytes:
    if kind == TEXT:
        return b"".join(map(_text, values))
    return struct.pack(f"<{len(values)}{SCALARS[kind][1]}", *values)


def _write_tensor(file: IO[bytes], tensor: Planned) -> None:
    values = tensor.read()
    assert tuple(values.shape) == tensor.shape, tensor.name
    written = 0
    try:
        for part in quantise(values, tensor.form):
            written += file.write(part.numpy().data)
    except UserError as error:
        raise UserError(
            f"The tensor '{tensor.name}' cannot be written as {tensor.form.name}: {error}."
        ) from error
    assert written == tensor.size, tensor.name
    file.write(bytes(_padding(written)))
