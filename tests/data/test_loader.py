"""Every token is a target exactly once per epoch, and never of another document."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED, Batch, PackedTokens, evaluation_batches
from llm_from_scratch.data.shards import TokenStore, write_store

lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=8)


def numbered(lengths: list[int]) -> tuple[TokenStore, list[list[int]]]:
    """Documents in which every token is its own position in the stream."""
    documents, total = [], 0
    for length in lengths:
        documents.append(list(range(total, total + length)))
        total += length
    return TokenStore.from_documents(documents, vocab_size=total), documents


def concatenated(batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, targets and document ids (zeros for None) of several batches as one."""
    ids = [
        torch.zeros_like(b.tokens) if b.document_ids is None else b.document_ids for b in batches
    ]
    return (
        torch.cat([b.tokens for b in batches]),
        torch.cat([b.targets for b in batches]),
        torch.cat(ids),
    )


def check_rows(batch: Batch, documents: list[list[int]]) -> list[int]:
    """Check targets and document ids of every row; the targets that count, in order."""
    document_of = {token: n for n, document in enumerate(documents) for token in document}
    found = []
    for row in range(len(batch.tokens)):
        tokens, targets = batch.tokens[row].tolist(), batch.targets[row].tolist()
        for token, target in zip(tokens, targets, strict=True):
            if target != IGNORED:
                assert target == token + 1
                assert document_of[target] == document_of[token]
                found.append(target)
        if batch.document_ids is not None:
            real = [document_of[token] - document_of[tokens[0]] for token in tokens]
            assert batch.document_ids[row].tolist() == real
        else:
            assert len({document_of[token] for token in tokens}) == 1
    return found


@given(lengths=lengths_strategy, seq_len=st.integers(1, 20), shuffle=st.booleans())
def test_every_token_is_a_target_once_in_every_epoch(
    lengths: list[int], seq_len: int, shuffle: bool
) -> None:
    store, documents = numbered(lengths)
    if len(store) < seq_len + 1:
        with pytest.raises(UserError, match="shorter than the context"):
            PackedTokens(store, seq_len, seed=1)
        return
    packed = PackedTokens(store, seq_len, seed=1, shuffle=shuffle)
    expected = sorted(t for document in documents for t in document[1:])
    for epoch in range(3):
        batch = packed.batch(epoch * len(packed), len(packed))
        assert batch.tokens.shape == batch.targets.shape == (len(packed), seq_len)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        found = check_rows(batch, documents)
        assert sorted(found) == expected
        if not shuffle:
            assert found == expected


@given(
    lengths=lengths_strategy,
    seq_len=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    start=st.integers(0, 50),
)
def test_a_batch_does_not_depend_on_how_it_is_asked_for(
    lengths: list[int], seq_len: int, cuts: list[int], start: int
) -> None:
    store, _ = numbered([seq_len + 1, *lengths])
    whole = concatenated([PackedTokens(store, seq_len, seed=3).batch(start, 40)])
    packed = PackedTokens(store, seq_len, seed=3)
    points = sorted({0, 40, *cuts})
    pieces = [packed.batch(start + a, b - a) for a, b in itertools.pairwise(points)]
    for one, other in zip(whole, concatenated(pieces), strict=True):
        assert torch.equal(one, other)


def test_epochs_and_seeds_differ() -> None:
    store, _ = numbered([1000])
    packed = PackedTokens(store, 10, seed=1)
    first, second = (packed.batch(e * len(packed), len(packed)).tokens for e in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, PackedTokens(store, 10, seed=2).batch(0, len(packed)).tokens)
    phases = {int(packed.batch(e * len(packed), len(packed)).tokens[:, 0].min()) for e in range(9)}
    assert phases == {0}
    offsets = {
        frozenset(t % 10 for t in packed.batch(e * len(packed), len(packed)).tokens[:, 0].tolist())
        for e in range(20)
    }
    assert len(offsets) > 3, "the phase changes from epoch to epoch"


def test_the_order_is_pinned() -> None:
    """A saved run must find the same order in later versions of this program."""
    store, _ = numbered([60])
    batch = PackedTokens(store, 7, seed=5).batch(0, 6)
    assert batch.tokens[:, 0].tolist() == [40, 47, 19, 12, 26, 33]


def test_unshuffled_is_the_text_in_order() -> None:
    store, _ = numbered([23])
    batch = PackedTokens(store, 5, seed=1, shuffle=False).batch(0, 5)
    assert batch.tokens[0].tolist() == [0, 1, 2, 3, 4]
    assert batch.targets[4].tolist() == [IGNORED, IGNORED, IGNORED, 21, 22]
    assert batch.document_ids is None


def test_document_ids_only_where_a_row_needs_them() -> None:
    store = TokenStore.from_documents([[1, 2, 3, 4], [5, 6, 7, 8]], 10)
    packed = PackedTokens(store, 4, seed=0, shuffle=False)
    first = packed.batch(0, 1)
    assert first.document_ids is None
    assert first.targets.tolist() == [[2, 3, 4, IGNORED]]
    both = packed.batch(0, 2)
    assert both.document_ids is not None
    assert both.tokens.tolist() == [[1, 2, 3, 4], [4, 5, 6, 7]]
    assert both.document_ids.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1]]
    assert both.targets.tolist() == [[2, 3, 4, IGNORED], [IGNORED, 6, 7, 8]]


@given(
    lengths=lengths_strategy,
    seq_len=st.integers(1, 20),
    stride=st.integers(1, 20),
    batch_size=st.integers(1, 4),
)
def test_evaluation_counts_every_token_once_in_order(
    lengths: list[int], seq_len: int, stride: int, batch_size: int
) -> None:
    store, documents = numbered(lengths)
    if stride > seq_len or len(store) < 2:
        with pytest.raises(UserError):
            list(evaluation_batches(store, seq_len, batch_size, stride))
        return
    found: list[int] = []
    for batch in evaluation_batches(store, seq_len, batch_size, stride):
        assert batch.tokens.shape[1] == seq_len
        assert len(batch.tokens) <= batch_size
        for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            places = [n for n, target in enumerate(targets) if target != IGNORED]
            assert all(targets[n] == row[n] + 1 for n in places)
            if found and places:
                assert places[0] >= min(seq_len - stride, row[places[0]])
            found += [targets[n] for n in places]
    assert found == [t for document in documents for t in document[1:]]


def test_evaluation_masks_documents_too() -> None:
    store = TokenStore.from_documents([[1, 2, 3], [4, 5]], 10)
    (batch,) = evaluation_batches(store, 6, 4)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0]]
    assert batch.targets.tolist() == [[2, 3, IGNORED, 5, IGNORED, IGNORED]]
    assert batch.document_ids is not None
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_shards_and_memory_give_the_same_batches(tmp_path: Path) -> None:
    documents = [list(range(n, n + 17)) for n in range(0, 60, 4)]
    mapped = PackedTokens(write_store(tmp_path / "s", documents, 100, shard_tokens=13), 20, 1)
    memory = PackedTokens(TokenStore.from_documents(documents, 100), 20, 1)
    for one, other in zip(
        concatenated([mapped.batch(0, 50)]), concatenated([memory.batch(0, 50)]), strict=True
    ):
        assert torch.equal(one, other)


def test_a_loader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s", [range(100), range(100, 9000)], 9000)
    packed = PackedTokens(store, 7, seed=1)
    packed.batch(0, 3)
    sent = pickle.dumps(packed)
    assert len(sent) < 16_000, "the map is opened again, not copied"
    again = pickle.loads(sent)
    assert torch.equal(again.batch(5, 9).tokens, packed.batch(5, 9).tokens)


def test_too_short_text_names_both_lengths() -> None:
    store, _ = numbered([40])
    with pytest.raises(UserError, match=r"has 40 tokens.*needs 65.*seq_len to at most 39"):
        PackedTokens(store, 64, seed=1)
    assert len(PackedTokens(store, 39, seed=1)) == 1
