"""The default corpus is text, always the same, and its two sides share no document."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.near_duplicates import Dropped, shingles, similarity
from llm_from_scratch.data.python_corpus import (
    HELD_OUT,
    LEFT_OUT,
    library_sources,
    package_of,
    python_corpus,
)
from llm_from_scratch.data.read import Document

Corpus = tuple[list[Document], list[Document], list[Dropped]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    dropped: list[Dropped] = []
    train, held_out = python_corpus(dropped)
    return train, held_out, dropped


def test_sizes(corpus: Corpus) -> None:
    train, held_out, _ = corpus
    sizes = [sum(len(d.text) for d in side) for side in (train, held_out)]
    assert 6_000_000 < sizes[0] < 14_000_000
    assert 0.04 < sizes[1] / sum(sizes) < 0.07


def test_whole_packages_are_held_out(corpus: Corpus) -> None:
    train, held_out, _ = corpus
    assert {package_of(d) for d in held_out} == set(HELD_OUT)
    assert not {package_of(d) for d in train} & set(HELD_OUT)


def test_what_is_left_out(corpus: Corpus) -> None:
    train, held_out, _ = corpus
    for document in train + held_out:
        folders = set(document.source.split("/")[:-1]) - {"pydoc_data"}
        assert not folders & LEFT_OUT, document.source
        assert "_sysconfigdata" not in document.source
        assert document.text.strip()


def test_topics_are_texts(corpus: Corpus) -> None:
    train, _, _ = corpus
    topics = {d.source: d.text for d in train if package_of(d) == "pydoc_data"}
    assert len(topics) > 40
    assert 'The "assert" statement' in topics["python/pydoc_data/assert"]
    assert not any(name.endswith(".py") for name in topics)


def test_no_near_duplicates_are_left(corpus: Corpus) -> None:
    train, held_out, dropped = corpus
    assert dropped
    sets = [shingles(d.text) for d in held_out]
    for document in train:
        mine = shingles(document.text)
        assert all(similarity(mine, other).containment < 0.8 for other in sets), document.source
    for twin in dropped:
        assert twin.similarity >= 0.8
        assert twin.because_of in train + held_out


def test_always_the_same(corpus: Corpus) -> None:
    assert python_corpus() == corpus[:2]


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in (tmp_path, tmp_path / "python313.zip"):
        monkeypatch.setattr(sysconfig, "get_path", lambda name, place=place: str(place))
        with pytest.raises(UserError, match="no sources of its standard library"):
            python_corpus()


def test_only_sources_that_python_could_read(tmp_path: Path) -> None:
    for name, data in {
        "good.py": b"x = 1\r\n",
        "latin.py": b"# coding: latin-1\n# caf\xe9\n",
        "broken.py": b"# caf\xe9\n",
        "data.txt": b"text",
        "empty.py": b"\n",
        "test/skipped.py": b"y = 2\n",
        "package/_sysconfigdata_x.py": b"z = 3\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert list(library_sources(tmp_path)) == [
        Document("x = 1\n", "python/good.py"),
        Document("# coding: latin-1\n# café\n", "python/latin.py"),
    ]
