"""Spans of characters, tags of units, and back; units, words and windows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.data.bio import (
    Span,
    Unit,
    joined,
    labels_of,
    spans_of,
    spans_of_tags,
    tags_of,
    token_units,
    types_of,
    windows,
    word_units,
    words_of,
)


def test_labels() -> None:
    labels = labels_of(["PER", "LOC", "PER"])
    assert labels == ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
    assert types_of(labels) == ("PER", "LOC")


@given(st.data())
def test_spans_that_lie_on_units_come_back(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=12))
    units, at = list[Unit](), 0
    for number, (gap, length) in enumerate(lengths):
        units.append(Unit(at + gap, at + gap + length, number))
        at += gap + length
    spans, first = list[Span](), 0
    while first < len(units):
        last = data.draw(st.integers(first, len(units) - 1))
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(["A", "B"]))
            spans.append((units[first].begin, units[last].end, name))
        first = last + 1
    assert spans_of(units, tags_of(units, spans)) == spans


def test_a_unit_across_a_border_goes_to_the_span_with_most_of_it() -> None:
    units = [Unit(0, 2, 0), Unit(2, 6, 1), Unit(6, 7, 2)]
    assert tags_of(units, [(0, 3, "A"), (3, 7, "B")]) == ["B-A", "B-B", "I-B"]
    assert tags_of(units, [(4, 5, "A")]) == ["O", "B-A", "O"]


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("B-A I-A O B-A", [(0, 2, "A"), (3, 4, "A")]),
        ("I-A I-A O I-B I-A", [(0, 2, "A"), (3, 4, "B"), (4, 5, "A")]),  # IOB1
        ("I-A B-A I-A", [(0, 1, "A"), (1, 3, "A")]),
        ("B-A E-A S-A S-A", [(0, 2, "A"), (2, 3, "A"), (3, 4, "A")]),  # BIOES
        ("B-A I-A L-A U-B B-A", [(0, 3, "A"), (3, 4, "B"), (4, 5, "A")]),  # BILOU
        ("B-A E-A I-A", [(0, 2, "A"), (2, 3, "A")]),
    ],
)
def test_schemes(tags: str, spans: list[Span]) -> None:
    assert spans_of_tags(tags.split()) == spans


def test_a_tag_of_no_scheme() -> None:
    for tag in ("NNP", "B", "B-", "X-A"):
        with pytest.raises(ValueError, match=tag):
            spans_of_tags(["O", tag])


def test_a_character_that_tokens_share_goes_to_the_last_of_them() -> None:
    places = [(9, 0, 1), (9, 1, 2), (9, 1, 2), (9, 2, 2), (9, 3, 5)]
    assert token_units(places) == [Unit(0, 1, 0), Unit(1, 2, 2), Unit(3, 5, 4)]
    # The first has all of a character and some bytes of the next one.
    assert token_units([(9, 0, 2), (9, 1, 3)]) == [Unit(0, 1, 0), Unit(1, 3, 1)]
    assert token_units([(9, 0, 3), (9, 1, 2)]) == [Unit(0, 1, 0), Unit(1, 3, 1)]


def test_each_word_has_a_token_that_speaks_for_it() -> None:
    # un|happy  <dropped>  cat
    places = [(9, 0, 2), (9, 2, 7), (9, 10, 13)]
    words = [(0, 7), (8, 9), (10, 13)]
    assert [unit.token for unit in word_units(places, words)] == [0, 1, 2]
    assert [unit.token for unit in word_units(places, words, last=True)] == [1, 1, 2]


def test_words_of_a_text() -> None:
    text = "Mr. O'Neil's e-mail (bob@x.org) cost $1,200.50 - see https://x.org/a?b, @you #tag!"
    words = [text[a:b] for a, b in words_of(text)]
    assert words == [
        "Mr", ".", "O'Neil's", "e-mail", "(", "bob@x.org", ")", "cost", "$", "1,200.50", "-", "see",
        "https://x.org/a?b", ",", "@you", "#tag", "!",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["In", "New", "York", "."], "In New York ."),
        (["東京", "で", "2", "人", "。"], "東京で2人。"),
        (["彼", "は", "Elvis", "Presley", "、", "だ"], "彼はElvis Presley、だ"),
        (["love", "東", "!"], "love 東 !"),
    ],
)
def test_sentences_from_words(words: list[str], text: str) -> None:
    found, places = joined(words)
    assert found == text
    assert [found[a:b] for a, b in places] == words


@given(st.integers(1, 200), st.integers(2, 40), st.floats(0, 0.9))
def test_each_token_is_decided_by_one_window_that_holds_it(
    tokens: int, room: int, overlap: float
) -> None:
    found = windows(tokens, room, overlap)
    decided = [n for window in found for n in range(window.first, window.last)]
    assert decided == list(range(tokens))
    for window in found:
        assert window.stop - window.start <= room
        assert window.start <= window.first <= window.last <= window.stop


def test_tokens_lie_deep_in_the_window_that_decides_on_them() -> None:
    found = windows(100, 40, 0.5)
    assert [(w.start, w.stop, w.first, w.last) for w in found] == [
        (0, 40, 0, 30), (20, 60, 30, 50), (40, 80, 50, 70), (60, 100, 70, 100)
    ]  # fmt: skip
