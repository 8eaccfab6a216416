"""Exact similarities, no pair missed by the sketches, and the better document kept."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.data.near_duplicates import (
    CROWD,
    Duplicate,
    drop_near_duplicates,
    find_duplicates,
    shingles,
    similar_pairs,
    similarity,
)
from llm_from_scratch.data.read import Document

WORDS = [f"word{n}" for n in range(400)]


def prose(seed: int, length: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def document(words: list[str], name: str = "x") -> Document:
    return Document(" ".join(words), name)


def naive(text: str, size: int, characters: bool) -> set[tuple[str, ...]]:
    units = [c for c in text if not c.isspace()] if characters else text.lower().split()
    size = min(size, len(units))
    return {tuple(units[n : n + size]) for n in range(len(units) - size + 1)} if units else set()


@given(
    st.lists(st.sampled_from(["a", "b", "c", "The", "the"]), max_size=30),
    st.lists(st.sampled_from(["a", "b", "c", "The", "the"]), max_size=30),
)
def test_similarity_is_that_of_the_sets_of_words(first: list[str], second: list[str]) -> None:
    sets = [naive(" ".join(words), 5, characters=False) for words in (first, second)]
    found = similarity(shingles(" ".join(first)), shingles(" ".join(second)))
    shared = len(sets[0] & sets[1])
    least = min(map(len, sets))
    assert found.containment == (shared / least if least else 0)
    assert found.jaccard == (shared / len(sets[0] | sets[1]) if least else 0)


@given(st.text("あいう漢字 \n", max_size=30), st.text("あいう漢字 \n", max_size=30))
def test_similarity_is_that_of_the_sets_of_characters(first: str, second: str) -> None:
    sets = [naive(text, 5, characters=True) for text in (first, second)]
    found = similarity(shingles(first), shingles(second))
    least = min(map(len, sets))
    assert found.containment == (len(sets[0] & sets[1]) / least if least else 0)


def test_the_hash_is_pinned() -> None:
    assert shingles("one two three four five").tolist() == [5157812376136009035]


def test_letter_case_and_punctuation_do_not_count() -> None:
    assert (shingles("Hello, World -- it's ME!") == shingles("hello world it s me")).all()
    assert len(shingles("")) == len(shingles("?!  \n")) == 0


def test_the_larger_document_stays() -> None:
    long = document(prose(1, 2000), "long")
    part = document(prose(1, 2000)[500:900], "part")
    other = document(prose(2, 300), "other")
    kept, dropped = drop_near_duplicates([part, other, long])
    assert kept == [other, long]
    assert [(d.document, d.because_of) for d in dropped] == [(part, long)]
    assert dropped[0].similarity == 1.0


def test_the_first_of_equals_stays() -> None:
    copies = [document(prose(3, 50), str(n)) for n in range(3)]
    kept, dropped = drop_near_duplicates(copies)
    assert kept == copies[:1]
    assert {d.because_of.source for d in dropped} == {"0"}


def test_what_must_stay_stays_even_if_smaller() -> None:
    long, part = document(prose(1, 2000), "long"), document(prose(1, 2000)[:300], "part")
    kept, dropped = drop_near_duplicates([long, document(prose(2, 99))], against=[part, part])
    assert [d.source for d in kept] == ["x"]
    assert dropped[0].because_of == part


def test_the_threshold() -> None:
    words, changed = prose(5, 1000), prose(5, 1000)
    changed[700:] = prose(6, 300)
    pair = [document(words, "a"), document(changed, "b")]
    exact = similarity(*(shingles(d.text) for d in pair)).containment
    assert 0.65 < exact < 0.75
    assert len(drop_near_duplicates(pair, exact)[1]) == 1
    assert len(drop_near_duplicates(pair, exact + 0.01)[1]) == 0


@pytest.mark.parametrize("exact", [False, True])
def test_a_crowd_of_copies(exact: bool) -> None:
    """Thousands of pages from one template cost no quadratic time and leave one page."""
    template = prose(7, 200)
    pages = [document([*template, f"page{n}"], str(n)) for n in range(3 * CROWD)]
    kept, dropped = drop_near_duplicates(pages, exact=exact)
    assert len(kept) == 1
    assert len(dropped) == len(pages) - 1


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=14), max_size=12),
    st.sampled_from([0.3, 0.5, 0.6, 0.75, 0.8, 1.0]),
)
def test_the_exact_search_misses_nothing(texts: list[list[str]], threshold: float) -> None:
    documents = [document(words, str(number)) for number, words in enumerate(texts)]
    sets = [shingles(one.text) for one in documents]
    pairs = [
        (i, j)
        for (i, first), (j, second) in itertools.combinations(enumerate(sets), 2)
        if similarity(first, second).containment >= threshold
    ]
    found = similar_pairs(documents, threshold, exact=True)
    assert [pair[:2] for pair in found] == pairs
    kept, dropped = drop_near_duplicates(documents, threshold, exact=True)
    assert len(kept) + len(dropped) == len(documents)
    assert similar_pairs(kept, threshold, exact=True) == []


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=14), max_size=8),
    st.lists(st.lists(st.sampled_from("abcdef"), max_size=14), max_size=6),
    st.sampled_from([0.5, 0.75, 1.0]),
    st.booleans(),
)
def test_nothing_like_what_must_stay_is_kept(
    texts: list[list[str]], against: list[list[str]], threshold: float, among: bool
) -> None:
    fixed = [" ".join(words) for words in against]
    every = [" ".join(words) for words in texts]
    found = find_duplicates(every, threshold, against=fixed, among=among, exact=True)
    out = {one.number for one in found}
    for number, text in enumerate(every):
        if number not in out:
            for other in fixed:
                assert text != other
                assert similarity(shingles(text), shingles(other)).containment < threshold
    for one in found:
        other = fixed[one.of] if one.of < 0 else every[one.of]
        same = similarity(shingles(every[one.number]), shingles(other)).containment
        assert one.exact or same == one.similarity >= threshold
        assert among or one.of < 0


def test_a_short_text_inside_of_a_long_one_is_found_exactly() -> None:
    long = document(prose(1, 4000), "long")
    parts = [document(prose(1, 4000)[n : n + 12], str(n)) for n in range(0, 3000, 300)]
    _, dropped = drop_near_duplicates([long, *parts], exact=True)
    assert [d.document for d in dropped] == parts
    _, estimated = drop_near_duplicates([long, *parts])
    assert len(estimated) < len(parts)  # what the sketches are known to miss


def test_the_same_and_the_alike_are_told_apart() -> None:
    text = " ".join(prose(1, 60))
    texts = ["!?", text, text.upper(), "ＡＢＣ", " abc", "!?", f"{text} and more", "new words"]
    assert find_duplicates(texts, against=["new  Words", "other"]) == [
        Duplicate(1, 6, 1.0, False),
        Duplicate(2, 1, 1.0, True),
        Duplicate(4, 3, 1.0, True),
        Duplicate(5, 0, 1.0, True),
        Duplicate(7, -2, 1.0, True),
    ]
    (found,) = find_duplicates([text], against=["x", f"see: {text}."])
    assert (found.of, found.exact) == (-1, False)


def test_nothing_and_texts_without_words() -> None:
    assert drop_near_duplicates([]) == ([], [])
    blank = [Document("...", "a"), Document("", "b")]
    assert drop_near_duplicates(blank) == (blank, [])


@given(seed=st.integers(0, 10_000))
def test_the_sketches_miss_no_pair(seed: int) -> None:
    chance = random.Random(seed)
    longest = chance.choice([200, 3000])  # all sketches whole, or only a quarter of them
    base = [prose(n, chance.randint(longest // 4, longest)) for n in range(4)]
    documents = []
    for _ in range(12):
        words = list(chance.choice(base))
        start = chance.randrange(len(words) // 2)
        words = words[start:] + chance.choices(WORDS, k=chance.randint(0, 40))
        documents.append(document(words))
    sets = [shingles(d.text) for d in documents]
    expected = [
        (a, b)
        for a, b in itertools.combinations(range(len(documents)), 2)
        if similarity(sets[a], sets[b]).containment >= 0.8
    ]
    assert [(a, b) for a, b, _ in similar_pairs(documents, 0.8)] == expected


@pytest.fixture(scope="module")
def aozora(data_dir: Path) -> tuple[dict[str, Document], list[dict[str, str]]]:
    with gzip.open(data_dir / "aozora/aozora_clean.jsonl.gz", "rt", "utf-8", newline="\n") as file:
        works = [json.loads(line) for line in file]
    with (data_dir / "aozora/same_title_pairs.tsv").open(encoding="utf-8") as table:
        pairs = list(csv.DictReader(table, delimiter="\t"))
    return {w["id"]: Document(w["text"], w["id"]) for w in works}, pairs


def test_the_measured_pairs_of_aozora(aozora) -> None:
    """Both columns of the table to its four digits, and the sketches find every such pair."""
    works, pairs = aozora
    found = {
        frozenset((list(works)[a], list(works)[b]))
        for a, b, _ in similar_pairs(list(works.values()), 0.6)
    }
    for pair in pairs:
        ours = similarity(shingles(works[pair["id_a"]].text), shingles(works[pair["id_b"]].text))
        assert ours.jaccard == pytest.approx(float(pair["jaccard_char5"]), abs=2e-4)
        assert ours.containment == pytest.approx(float(pair["containment_char5"]), abs=2e-4)
        if ours.containment >= 0.6:
            assert frozenset((pair["id_a"], pair["id_b"])) in found


def test_dropping_from_aozora(aozora) -> None:
    works, _ = aozora
    kept, dropped = drop_near_duplicates(list(works.values()))
    assert (len(kept), len(dropped)) == (398, 27)
    left = [shingles(d.text) for d in kept]
    assert not similar_pairs(kept, 0.8)
    assert len(left) == len(kept)


def test_instruction_examples(data_dir: Path) -> None:
    """The copies among 200 short records; five-word shingles ask for more than rewordings."""
    path = data_dir / "near-duplicates/instruction-examples.json"
    records = json.loads(path.read_text("utf-8"))

    def pairs(field: str, threshold: float) -> list[tuple[str, str]]:
        texts = [Document(r[field], str(n)) for n, r in enumerate(records)]
        return [(texts[a].text, texts[b].text) for a, b, _ in similar_pairs(texts, threshold)]

    assert pairs("instruction", 0.8) == [("Name a dwarf planet in our solar system.",) * 2]
    assert len(pairs("instruction", 0.6)) == 2
    assert pairs("input", 0.6) == []
    assert len(pairs("output", 0.8)) == 2
