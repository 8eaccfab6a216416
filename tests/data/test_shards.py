"""A token store gives back what was written, piece by piece, and notices damage."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.shards import TokenStore, write_store

documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=12), max_size=12)


def flat(documents: list[list[int]]) -> list[int]:
    return [token for document in documents for token in document]


@settings(max_examples=20)  # every write is flushed to the disk
@given(documents=documents_strategy, shard_tokens=st.integers(1, 7), frame=st.booleans())
def test_roundtrip(
    documents: list[list[int]], shard_tokens: int, frame: bool, tmp_path_factory
) -> None:
    folder = tmp_path_factory.mktemp("store") / "tokens"
    marks = {"bos_id": 100, "eos_id": 101} if frame else {}
    expected = [d for d in documents if d]
    if not expected:
        with pytest.raises(UserError, match="no text"):
            write_store(folder, documents, 102, shard_tokens=shard_tokens, **marks)
        assert not folder.exists()
        return
    if frame:
        expected = [[100, *d, 101] for d in expected]
    store = write_store(folder, iter(documents), 102, shard_tokens=shard_tokens, **marks)
    memory = TokenStore.from_documents(documents, 102, **marks)
    for found in (store, memory):
        assert len(found) == len(flat(expected))
        assert found.documents == len(expected)
        assert [found.document(n).tolist() for n in range(found.documents)] == expected
        for start in range(len(found)):
            for stop in range(start, len(found) + 1, 3):
                assert found.slice(start, stop).tolist() == flat(expected)[start:stop]
    store.verify()
    memory.verify()


def test_many_shards_refuse_to_be_one_array(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [[1, 2, 3]], 4, shard_tokens=2)
    with pytest.raises(UserError, match="2 shards"):
        _ = store.tokens
    assert write_store(tmp_path / "t", [[1, 2, 3]], 4).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "<u2"), (65537, "<u4")])
def test_width_of_the_ids(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    store = write_store(tmp_path / "s", [[0, vocab_size - 1]], vocab_size)
    assert store.tokens.dtype == np.dtype(dtype)
    assert store.tokens.tolist() == [0, vocab_size - 1]


@pytest.mark.parametrize("wrong", [-1, 10])
def test_id_outside_of_the_vocabulary(tmp_path: Path, wrong: int) -> None:
    with pytest.raises(UserError, match=rf"Document 2 holds the token id {wrong}"):
        write_store(tmp_path / "s", [[1], [2, wrong, 3]], 10)
    assert not list(tmp_path.iterdir())


def test_documents_are_not_collected_while_writing(tmp_path: Path) -> None:
    """At most one document is alive at a time."""
    alive = 0

    class Document(list):  # type: ignore[type-arg]
        def __init__(self) -> None:
            nonlocal alive
            alive += 1
            super().__init__(range(100))

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    most = 0

    def documents() -> Iterator[list[int]]:
        nonlocal most
        for _ in range(50):
            yield Document()
            most = max(most, alive)

    write_store(tmp_path / "s", documents(), 100)
    assert most <= 2


def test_a_failed_write_leaves_the_old_store(tmp_path: Path) -> None:
    write_store(tmp_path / "s", [[1, 2]], 10)

    def broken() -> Iterator[list[int]]:
        yield [3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", broken(), 10)
    assert TokenStore.open(tmp_path / "s").tokens.tolist() == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def damaged(tmp_path: Path) -> Path:
    write_store(tmp_path / "s", [[1, 2, 3], [4, 5]], 10, shard_tokens=3)
    return tmp_path / "s"


def test_cut_shard(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    os.truncate(folder / "tokens-00001.bin", 2)
    with pytest.raises(UserError, match=r"tokens-00001.bin has 2 bytes instead of 4"):
        TokenStore.open(folder)


def test_missing_shard_and_missing_index(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    (folder / "tokens-00000.bin").unlink()
    with pytest.raises(UserError, match=r"tokens-00000.bin is missing"):
        TokenStore.open(folder)
    with pytest.raises(UserError, match="is not a token store"):
        TokenStore.open(tmp_path)


def test_altered_shard_is_found_by_verify(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    (folder / "tokens-00000.bin").write_bytes(b"\x01\x00\x02\x00\x07\x00")
    with pytest.raises(UserError, match=r"tokens-00000.bin was altered"):
        TokenStore.open(folder).verify()


def test_index_that_does_not_fit(tmp_path: Path) -> None:
    folder = damaged(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    for change, message in [
        ({"tokens": 6}, "does not fit"),
        ({"version": 9}, "of version 9"),
        ({"dtype": "wrong"}, "damaged"),
        ({"shards": [{}]}, "damaged"),
    ]:
        (folder / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(UserError, match=message):
            TokenStore.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        TokenStore.open(folder)
