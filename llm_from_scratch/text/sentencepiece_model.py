"""SentencePiece's `.model` files: a small reader of the protobuf wire format.

Such a file is one message (`ModelProto` of sentencepiece_model.proto): the pieces with their scores
and types, what trained them, and how text is normalised before it is cut. The wire format is a row
of fields, each a key (number and type) and a value, so a few lines read it without a schema
compiler: https://protobuf.dev/programming-guides/encoding. Fields that do not change a single id
(the trainer's settings) are passed over.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.checks import REMEDY
from llm_from_scratch.text.sentencepiece_spec import BYTE, NORMAL, UNKNOWN

# The largest known files (a quarter of a million pieces) have 5 MB.
LARGEST_FILE = 1 << 28
LARGEST_PIECE = 256  # bytes; the trainer stops at 16 characters unless it is told otherwise
# Every beginning of a piece is stored, so that memory goes by the squares of their lengths: half of
# this is what a quarter of a million pieces of 16 characters come to.
LARGEST_SQUARES = 1 << 27
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Value = int | memoryview


@dataclass
class SentencePieceModel:
    """The content of a `.model` file; a piece's id is its place.

    Attributes:
        kind: "unigram" or "bpe".
        pieces, scores, types: the vocabulary; types as in `sentencepiece_spec`.
        charsmap: the compiled normalisation (`charsmap.Charsmap` reads it); b"" for none.
        add_dummy_prefix: a space is put before every text.
        remove_extra_whitespaces: runs of spaces become one, those at the ends none.
        escape_whitespaces: a space is written `▁`.
        space_after: the space belongs to the end of a word, not to its beginning.
        bos_id, eos_id, unk_id, pad_id: their ids; -1 where there is no such piece.
    """

    kind: str = "unigram"
    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    charsmap: bytes = b""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    space_after: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1

    def roles(self) -> dict[str, str]:
        """Which piece begins, ends and pads a text and stands for the unknown."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        count = len(self.pieces)
        return {f"{role}_token": self.pieces[i] for role, i in ids.items() if 0 <= i < count}


class _NotAModel(ValueError):
    """What is wrong with the bytes, as the second half of a sentence."""


def fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of one message: their numbers and raw values. Raises `ValueError`."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise _NotAModel(f"there is no field type {kind}")
        if size > len(data) - at:
            raise _NotAModel("it ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _NotAModel("it ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise _NotAModel("a number in it has no end")


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise _NotAModel("a number is expected where there is none")
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value  # negative numbers have ten bytes


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _NotAModel("a text or a message is expected where there is a number")
    return value


def parse_sentencepiece(data: bytes, where: Path | str) -> SentencePieceModel:
    """The model in the bytes of a `.model` file; a `UserError` naming `where` if it is none."""
    model = SentencePieceModel()
    try:
        for number, value in fields(memoryview(data)):
            if number == 1:
                _piece(model, _bytes(value))
            elif number == 2:
                _trainer(model, _bytes(value))
            elif number == 3:
                _normalizer(model, _bytes(value))
        if not model.pieces:
            raise _NotAModel("it has no pieces")
        if len(set(model.pieces)) != len(model.pieces):
            raise _NotAModel("it has the same piece twice")
        if sum(len(piece) ** 2 for piece in model.pieces) > LARGEST_SQUARES:
            raise _NotAModel("its pieces are far too long")
        if UNKNOWN not in model.types:
            raise _NotAModel("it has no piece for what is unknown")
        model.unk_id = model.types.index(UNKNOWN)
    except (_NotAModel, UnicodeDecodeError) as error:
        what = "a piece is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(f"{where} is not a SentencePiece model ({what}); {REMEDY}.") from None
    if model.kind not in ("unigram", "bpe"):
        raise UserError(
            f"{where} is a SentencePiece model of the kind '{model.kind}'; unigram and bpe can be "
            "read."
        )
    return model


def read_sentencepiece(path: Path | str) -> SentencePieceModel:
    """The content of a `.model` file; `UserError` naming the file for what is none."""
    return parse_sentencepiece(sentencepiece_bytes(path), path)


def sentencepiece_bytes(path: Path | str) -> bytes:
    """The bytes of a `.model` file, unless there are far too many of them."""
    path = Path(path)
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path} is too large for a SentencePiece model; {REMEDY}.")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {REMEDY}.") from error


def _piece(model: SentencePieceModel, data: memoryview) -> None:
    piece, score, kind = "", 0.0, NORMAL
    for number, value in fields(data):
        if number == 1:
            if len(_bytes(value)) > LARGEST_PIECE:
                raise _NotAModel(f"a piece is longer than {LARGEST_PIECE} bytes")
            piece = str(_bytes(value), "utf-8")
        elif number == 2:
            if len(_bytes(value)) != 4:
                raise _NotAModel("a score is not a number of 4 bytes")
            (score,) = struct.unpack("<f", _bytes(value))
        elif number == 3:
            kind = _number(value)
    if not piece or not math.isfinite(score) or not NORMAL <= kind <= BYTE:
        raise _NotAModel(f"piece {len(model.pieces)} is empty, or has no sound score or type")
    if kind == BYTE and not BYTE_PIECE.fullmatch(piece):
        raise _NotAModel(f"piece {len(model.pieces)} stands for a byte, but is not like <0x0A>")
    model.pieces.append(piece)
    model.scores.append(score)
    model.types.append(kind)


def _trainer(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in fields(data):
        if number == 3:
            kind = _number(value)
            if kind not in KINDS:
                raise _NotAModel(f"there is no model type {kind}")
            model.kind = KINDS[kind]
        elif number == 24:
            model.space_after = bool(_number(value))
        elif number in (41, 42, 43):
            setattr(model, {41: "bos_id", 42: "eos_id", 43: "pad_id"}[number], _number(value))


def _normalizer(model: SentencePieceModel, data: memoryview) -> None:
    for number, value in fields(data):
        if number == 2:
            model.charsmap = bytes(_bytes(value))
        elif number == 3:
            model.add_dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_number(value))
        elif number == 5:
            model.escape_whitespaces = bool(_number(value))
