"""Token shards: a corpus as integers on the disk, mapped into memory instead of loaded.

A store is a folder::

    index.json       dtype, vocabulary size, tokenizer hash, number of tokens and documents,
                     and for every other file its length and SHA-256
    starts.npy       int64 (documents,): where in the stream each document begins
    tokens-00000.bin little-endian uint16 (or uint32 above 65,536 entries), no header

All documents form one long stream; a shard is only a piece of it, and a document may lie across
two shards. Writing holds one document at a time in memory, reading only what is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import folder_aside, sha256_of

VERSION = 1
SHARD_TOKENS = 100_000_000  # 200 MB of uint16: small enough to copy, large enough to be few

IdArray = npt.NDArray[Any]  # uint16 or uint32


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest stored integer that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 65536 else np.dtype("<u4")


def framed(
    documents: Iterable[Sequence[int]], bos_id: int | None, eos_id: int | None
) -> Iterator[npt.NDArray[np.int64]]:
    """Each document that is not empty with `bos_id` before it and `eos_id` after it, if given."""
    before = np.array([] if bos_id is None else [bos_id], dtype=np.int64)
    after = np.array([] if eos_id is None else [eos_id], dtype=np.int64)
    for ids in documents:
        if len(ids):
            yield np.concatenate([before, np.asarray(ids, dtype=np.int64), after])


class TokenStore:
    """A stream of tokens and the places where its documents begin.

    Attributes:
        shards: read-only arrays, one per file, in the order of the stream.
        starts: int64 (documents,), strictly increasing; `starts[0] == 0`.
        vocab_size: every id is below it.
        tokenizer_hash: what the writer said about the tokenizer, or "".
    """

    def __init__(
        self,
        shards: Sequence[IdArray],
        starts: npt.NDArray[np.int64],
        vocab_size: int,
        tokenizer_hash: str = "",
        folder: Path | None = None,
    ) -> None:
        self.shards = list(shards)
        self.starts = starts
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.folder = folder
        self._ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process (a data loader's worker) maps the files itself."""
        if self.folder is not None:
            return TokenStore.open, (self.folder,)
        return TokenStore, (self.shards, self.starts, self.vocab_size, self.tokenizer_hash)

    def __len__(self) -> int:
        """The number of tokens."""
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.starts)

    @property
    def name(self) -> str:
        """How messages call this store."""
        return str(self.folder) if self.folder else "the corpus"

    @property
    def tokens(self) -> IdArray:
        """The whole stream as one array; only a store of a single shard has it without a copy."""
        if len(self.shards) != 1:
            raise UserError(
                f"{self.name} has {len(self.shards)} shards: read it with `slice(start, stop)`, "
                "which maps only what is needed."
            )
        return self.shards[0]

    def slice(self, start: int, stop: int) -> IdArray:
        """Tokens `start` to `stop - 1` of the stream; a view where one shard holds them all."""
        if len(self.shards) == 1:
            return self.shards[0][start:stop]
        first = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        for shard, end in zip(self.shards[first:], self._ends[first:], strict=True):
            offset = int(end) - len(shard)
            pieces.append(shard[max(0, start - offset) : stop - offset])
            if stop <= end:
                break
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def document(self, number: int) -> IdArray:
        """The tokens of document `number` (from 0), with what was stored before and after it."""
        ends = self.starts[number + 1] if number + 1 < len(self.starts) else len(self)
        return self.slice(int(self.starts[number]), int(ends))

    @classmethod
    def from_documents(
        cls,
        documents: Iterable[Sequence[int]],
        vocab_size: int,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
    ) -> TokenStore:
        """A store in memory, for corpora that are small and tests; same rules as `write_store`."""
        starts, pieces, total = array("q"), [], 0
        dtype = token_dtype(vocab_size)
        for number, ids in enumerate(framed(documents, bos_id, eos_id)):
            pieces.append(_as_tokens(ids, dtype, vocab_size, number))
            starts.append(total)
            total += len(ids)
        _refuse_empty(total)
        return cls([np.concatenate(pieces)], np.asarray(starts, dtype=np.int64), vocab_size)

    @classmethod
    def open(cls, folder: Path | str) -> TokenStore:
        """Map the store in `folder`; checks every file's length (`verify` checks the contents).

        Raises `UserError` if the folder holds no store or a file is missing, cut or too long.
        """
        folder = Path(folder)
        index = read_index(folder)
        try:
            dtype = np.dtype(index["dtype"])
            for entry in [*index["shards"], index["starts"]]:
                _check_length(folder / entry["file"], entry["bytes"])
            starts = np.load(folder / index["starts"]["file"], mmap_mode="r", allow_pickle=False)
            shards = [
                # The plain array view of the map: slicing np.memmap itself costs microseconds.
                np.asarray(np.memmap(folder / entry["file"], dtype=dtype, mode="r"))
                for entry in index["shards"]
            ]
            store = cls(shards, np.asarray(starts), index["vocab_size"], index["tokenizer"], folder)
            fits = len(store) == index["tokens"] and store.documents == index["documents"]
        except UserError:
            raise
        except (KeyError, TypeError, ValueError):
            raise _damaged(folder / "index.json") from None
        if not fits:
            raise UserError(
                f"{folder / 'index.json'} does not fit the files beside it; write the store again."
            )
        return store

    def verify(self) -> None:
        """Read every file once and compare its SHA-256; `UserError` names the altered file."""
        if self.folder is None:
            return
        index = read_index(self.folder)
        for entry in [*index["shards"], index["starts"]]:
            path = self.folder / entry["file"]
            if sha256_of(path) != entry["sha256"]:
                raise UserError(
                    f"{path} was altered since it was written (its SHA-256 differs from "
                    "index.json); write the store again."
                )


def write_store(
    folder: Path | str,
    documents: Iterable[Sequence[int]],
    vocab_size: int,
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    tokenizer_hash: str = "",
    shard_tokens: int = SHARD_TOKENS,
) -> TokenStore:
    """Write documents (each a sequence of ids) as a store and open it.

    `bos_id` and `eos_id`, if given, are stored before and after every document; empty documents
    are left out. The folder appears only when everything is written. Raises `UserError` for an id
    outside of the vocabulary and for a corpus without a single token.
    """
    with folder_aside(folder) as aside:
        writer = _ShardWriter(aside, token_dtype(vocab_size), shard_tokens)
        starts = array("q")
        for number, ids in enumerate(framed(documents, bos_id, eos_id)):
            starts.append(writer.total)
            writer.write(_as_tokens(ids, writer.dtype, vocab_size, number))
        _refuse_empty(writer.total)
        shards = writer.close()
        starts_path = aside / "starts.npy"
        np.save(starts_path, np.asarray(starts, dtype="<i8"), allow_pickle=False)
        index = {
            "version": VERSION,
            "dtype": writer.dtype.str,
            "vocab_size": vocab_size,
            "tokenizer": tokenizer_hash,
            "tokens": writer.total,
            "documents": len(starts),
            "shards": shards,
            "starts": {
                "file": starts_path.name,
                "bytes": starts_path.stat().st_size,
                "sha256": sha256_of(starts_path),
            },
        }
        text = json.dumps(index, indent=2) + "\n"
        (aside / "index.json").write_text(text, encoding="utf-8")
    return TokenStore.open(folder)


def read_index(folder: Path) -> dict[str, Any]:
    """`index.json` of a store, or a `UserError` that says why there is none."""
    path = folder / "index.json"
    try:
        index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = index["version"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not a token store: it has no index.json.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None
    if version != VERSION:
        raise UserError(f"{path} is of version {version}, this program reads {VERSION}.")
    return index


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged; write the token store again.")


@dataclasses.dataclass
class _ShardWriter:
    """Writes the stream into numbered files and hashes it on the way."""

    folder: Path
    dtype: np.dtype[Any]
    shard_tokens: int
    total: int = 0
    _file: IO[bytes] | None = None
    _room: int = 0
    _entries: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    _digest: Any = None

    def write(self, tokens: IdArray) -> None:
        while len(tokens):
            if self._room == 0:
                self._next_file()
            piece, tokens = tokens[: self._room], tokens[self._room :]
            data = piece.tobytes()
            assert self._file is not None
            self._file.write(data)
            self._digest.update(data)
            self._room -= len(piece)
            self.total += len(piece)
            self._entries[-1]["bytes"] += len(data)

    def _next_file(self) -> None:
        self._finish_file()
        name = f"tokens-{len(self._entries):05d}.bin"
        self._file = (self.folder / name).open("wb")
        self._digest = hashlib.sha256()
        self._room = self.shard_tokens
        self._entries.append({"file": name, "bytes": 0})

    def _finish_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._entries[-1]["sha256"] = self._digest.hexdigest()

    def close(self) -> list[dict[str, Any]]:
        self._finish_file()
        return self._entries


def _as_tokens(
    ids: npt.NDArray[np.int64], dtype: np.dtype[Any], vocab_size: int, number: int
) -> IdArray:
    """`ids` as stored integers, or a `UserError` if one does not fit the vocabulary."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise UserError(
            f"Document {number + 1} holds the token id {wrong}, but the vocabulary has "
            f"{vocab_size} entries (0 to {vocab_size - 1}); use the tokenizer that made the ids."
        )
    return ids.astype(dtype)


def _refuse_empty(total: int) -> None:
    if total == 0:
        raise UserError("The corpus holds no text, so there are no tokens to store.")


def _check_length(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError:
        raise UserError(f"{path} is missing; write the token store again.") from None
    if found != expected:
        raise UserError(
            f"{path} has {found:,} bytes instead of {expected:,}: it was cut or altered; write "
            "the token store again."
        )
