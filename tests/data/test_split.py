"""Documents are split whole, a single one is cut once, and no side is empty by accident."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.read import Document
from llm_from_scratch.data.split import split_documents


def documents_of(sizes: list[int]) -> list[Document]:
    return [Document(chr(ord("a") + n % 26) * size, f"{n}.txt") for n, size in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(1, 500), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 5),
)
def test_whole_documents(sizes: list[int], fraction: float, seed: int) -> None:
    documents = documents_of(sizes)
    train, validation = split_documents(documents, fraction, seed)
    assert train
    assert validation
    assert sorted(train + validation, key=documents.index) == documents
    assert [d for d in documents if d in train] == train
    assert [d for d in documents if d in validation] == validation
    drawn = sum(len(d.text) for d in validation)
    assert abs(drawn - fraction * sum(sizes)) <= max(sizes)
    assert (train, validation) == split_documents(documents, fraction, seed)


def test_the_seed_decides_and_is_pinned() -> None:
    documents = documents_of([10] * 20)
    drawn = [[d.source for d in split_documents(documents, 0.1, seed)[1]] for seed in range(4)]
    assert drawn[0] == ["10.txt", "16.txt"]
    assert len({tuple(names) for names in drawn}) > 1


def test_a_huge_document_does_not_become_validation() -> None:
    train, validation = split_documents(documents_of([10, 100_000, 10]), 0.05)
    assert "1.txt" in {d.source for d in train}
    assert validation


def test_a_single_document_is_cut_at_its_end() -> None:
    train, validation = split_documents([Document("0123456789", "a")], 0.2)
    assert (train[0].text, validation[0].text) == ("01234567", "89")
    train, validation = split_documents([Document("01", "a")], 0.01)
    assert (train[0].text, validation[0].text) == ("0", "1")


def test_no_validation() -> None:
    assert split_documents(documents_of([5, 5]), 0.0) == (documents_of([5, 5]), [])


@pytest.mark.parametrize(
    ("sizes", "fraction", "message"),
    [
        ([], 0.1, "holds no text"),
        ([0, 0], 0.1, "holds no text"),
        ([0, 8], 0.1, "Only one document holds text"),
        ([1], 0.1, "only 1 character"),
        ([10, 10], 1.0, "must be at least 0 and below 1, not 1.0"),
        ([10, 10], -0.1, "must be at least 0"),
    ],
)
def test_what_cannot_be_split(sizes: list[int], fraction: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_documents(documents_of(sizes), fraction)
