"""Near-duplicates: texts that are mostly contained in another one.

Each text becomes a set of hashed shingles (runs of 5 words, or of 5 characters where words are not
spaced), and two texts are compared by containment: the share of the smaller set that is in the
larger one (Broder 1997, "On the resemblance and containment of documents").

Comparing all pairs is too slow, so candidates are found on sketches: the shingles whose hash is
among the smallest quarter of all hash values. This is MinHash with a fraction in place of a fixed
number (FracMinHash, Irber et al. 2022): unlike the usual signatures in LSH bands, which estimate
Jaccard similarity, it also finds a short text inside of a long one. Candidates are then compared
exactly, on all their shingles, so nothing is ever dropped by an estimate. What can be missed is a
text of fewer than about 40 shingles inside of one of more than 256, and pairs among many texts
that share most of their shingles with a crowd; `exact=True` misses nothing, for more time: each
text asks for its rarest shingles among those of all others (prefix filtering, Chaudhuri et al.
2006). Everything is deterministic: no random seed, no order of a set.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from llm_from_scratch.data.read import Document

WORDS = 5
CHARACTERS = 5
KEEP_ONE_IN = 4  # sketches hold a quarter of the shingles
SHORT = 256  # texts of at most so many shingles are kept whole in their sketch
SLACK = 2.0  # by how many square roots of its size a sketch may share less than expected
CROWD = 64  # a shingle of more texts than this links them with the largest and their next ones
NEXT = 8

Hashes = npt.NDArray[np.uint64]


class Similarity(NamedTuple):
    """Of two shingle sets A and B: |A ∩ B| / |A ∪ B| and |A ∩ B| / min(|A|, |B|)."""

    jaccard: float
    containment: float


class Dropped(NamedTuple):
    """A document that was left out, the kept one it is like, and their containment."""

    document: Document
    because_of: Document
    similarity: float


def shingles(text: str) -> Hashes:
    """The sorted, distinct 64-bit hashes of a text's shingles; empty for a text without words.

    Words are runs of letters and digits, in lower case; texts that are for a good part Japanese or
    Chinese are cut into characters instead, blanks left out. A text shorter than one shingle is a
    shingle of its own.
    """
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), dtype="<u4")
    if not len(codes):
        return np.empty(0, dtype=np.uint64)
    unspaced = (codes >= 0x3040) & (codes <= 0x9FFF) | (codes >= 0x20000)
    if unspaced.mean() > 0.2:
        blank = np.char.isspace(codes.view("<U1"))
        units, size = _mix(codes[~blank].astype(np.uint64)), CHARACTERS
    else:
        units, size = _word_hashes(codes), WORDS
    if not len(units):
        return units
    size = min(size, len(units))
    count = len(units) - size + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(size):  # a polynomial in an odd constant, so the order counts
        hashes = hashes * _ODD + units[place : place + count]
    return np.unique(_mix(hashes))


def similarity(first: Hashes, second: Hashes) -> Similarity:
    """Exact Jaccard similarity and containment of two results of `shingles`."""
    small, large = sorted((first, second), key=len)
    if not len(small):
        return Similarity(0.0, 0.0)
    places = np.searchsorted(large, small)
    shared = int((large[np.minimum(places, len(large) - 1)] == small).sum())
    return Similarity(shared / (len(small) + len(large) - shared), shared / len(small))


def drop_near_duplicates(
    documents: Sequence[Document],
    threshold: float = 0.8,
    *,
    against: Sequence[Document] = (),
    exact: bool = False,
) -> tuple[list[Document], list[Dropped]]:
    """Leave out documents of which `threshold` is contained in another, or the other in them.

    Of a group the largest document stays (of equals, the first). `against` are documents that stay
    whatever happens, such as a validation split: what is like one of them is dropped, they
    themselves are not returned. `exact`: no candidate is missed. Both results are in the order of
    `documents`.
    """
    every = [*against, *documents]
    found = _like_others([shingles(one.text) for one in every], len(against), threshold, exact)
    kept = [one for n, one in enumerate(every) if n >= len(against) and n not in found]
    return kept, [Dropped(every[n], every[of], found[n][1]) for n, (of, _) in sorted(found.items())]


class Duplicate(NamedTuple):
    """A text that is like another: both by number, the other's from below 0 for `against`.

    `of` is the text itself (-1 is the last of `against`, as in a list), `exact` whether the two are
    the same but for case, width and blanks; `similarity` is the containment.
    """

    number: int
    of: int
    similarity: float
    exact: bool


def find_duplicates(
    texts: Sequence[str],
    threshold: float = 0.8,
    *,
    against: Sequence[str] = (),
    among: bool = True,
    exact: bool = False,
) -> list[Duplicate]:
    """The texts to leave out, in their order, so that none is like another or like `against`.

    Without `among`, only so that none is like `against`.

    First what is the same as an earlier text but for case, width (full or half) and blanks, then
    near-duplicates as in `drop_near_duplicates`. Texts without words can only be the same.
    """
    first: dict[str, int] = {}
    for number, text in enumerate(against, start=-len(against)):
        first.setdefault(plain(text), number)
    found, left = [], []
    for number, text in enumerate(texts):
        of = first.setdefault(plain(text), number) if among else first.get(plain(text), number)
        if of == number:
            left.append(number)
        else:
            found.append(Duplicate(number, of, 1.0, True))
    sets = [shingles(text) for text in [*against, *(texts[number] for number in left)]]
    alike = _like_others(sets, len(against), threshold, exact, among)
    for number, (of, share) in alike.items():
        other = of - len(against)  # from below 0 for `against`
        place = left[other] if other >= 0 else other
        found.append(Duplicate(left[number - len(against)], place, share, False))
    return sorted(found)


def plain(text: str) -> str:
    """A text by which others are the same: without case, width and blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _like_others(
    sets: Sequence[Hashes], fixed: int, threshold: float, exact: bool, among: bool = True
) -> dict[int, tuple[int, float]]:
    """Which sets to leave out, and the one that each is like; the first `fixed` stay.

    Without `among` the others are compared with those alone.
    """
    # Rank 0 is the document that wins against all others.
    order = sorted(
        range(len(sets)), key=lambda number: (number >= fixed, -len(sets[number]), number)
    )
    ranked = [sets[number] for number in order]
    alive = np.ones(len(order), dtype=bool)
    dropped: dict[int, tuple[int, float]] = {}
    if exact:
        candidates = _all_candidates(ranked, threshold, alive)
    else:
        candidates = iter(_candidates(ranked, threshold).items())
    for rank, rivals in candidates:
        if order[rank] < fixed:
            continue
        best, reason = 0.0, -1
        for rival in rivals:
            if alive[rival] and (among or rival < fixed):
                found = similarity(ranked[rank], ranked[rival]).containment
                if found > best:
                    best, reason = found, rival
        if best >= threshold:
            alive[rank] = False
            dropped[order[rank]] = order[reason], best
    return dropped


def similar_pairs(
    documents: Sequence[Document], threshold: float = 0.8, *, exact: bool = False
) -> list[tuple[int, int, Similarity]]:
    """All pairs (i < j) of documents whose containment is at least `threshold`."""
    sets = [shingles(document.text) for document in documents]
    found = []
    if exact:
        candidates = _all_candidates(sets, threshold, np.ones(len(sets), dtype=bool))
    else:
        candidates = iter(_candidates(sets, threshold).items())
    for second, rivals in candidates:
        for first in rivals:
            both = similarity(sets[first], sets[second])
            if both.containment >= threshold:
                found.append((first, second, both))
    return sorted(found)


def _candidates(sets: Sequence[Hashes], threshold: float) -> dict[int, list[int]]:
    """For each set the earlier ones that may share `threshold` of the smaller, by the sketches."""
    limit = np.uint64(2**64 // KEEP_ONE_IN)
    sketches = [hashes if len(hashes) <= SHORT else hashes[hashes < limit] for hashes in sets]
    sizes = np.array([max(1, int(np.searchsorted(hashes, limit))) for hashes in sets], np.int64)
    if not sketches:
        return {}
    hashes = np.concatenate(sketches)
    owners = np.repeat(np.arange(len(sets)), [len(sketch) for sketch in sketches])
    in_order = np.argsort(hashes, kind="stable")  # the owners of one hash stay in their order
    hashes, owners = hashes[in_order], owners[in_order]

    fresh = np.flatnonzero(np.concatenate([[True], hashes[1:] != hashes[:-1]]))
    group_sizes = np.diff(np.append(fresh, len(hashes)))
    in_crowd = np.repeat(group_sizes > CROWD, group_sizes)
    first_owner = np.repeat(owners[fresh], group_sizes) if len(hashes) else owners
    codes = [(first_owner * len(sets) + owners)[in_crowd & (first_owner != owners)]]
    for step in range(1, CROWD):
        if step == NEXT + 1:
            hashes, owners = hashes[~in_crowd], owners[~in_crowd]
        same = np.flatnonzero(hashes[step:] == hashes[:-step])
        if not len(same):
            break
        codes.append(owners[same] * len(sets) + owners[same + step])

    pairs, shared = np.unique(np.concatenate(codes), return_counts=True)
    earlier, later = np.divmod(pairs, len(sets))
    smaller = np.minimum(sizes[earlier], sizes[later])
    likely = shared >= threshold * smaller - SLACK * np.sqrt(smaller)
    found: dict[int, list[int]] = {}
    for one, other in zip(earlier[likely].tolist(), later[likely].tolist(), strict=True):
        found.setdefault(other, []).append(one)
    return dict(sorted(found.items()))


def _all_candidates(
    sets: Sequence[Hashes], threshold: float, alive: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, list[int]]]:
    """For each set in turn all earlier ones that share `threshold` of the smaller, and some others.

    Of a set's shingles, rarest first, so many may be missing in a larger one that one of the first
    `len - ceil(threshold * len) + 1` must be in it. Only sets that are still `alive` are given, so
    that of a crowd of copies each meets the one that stays, not all others.
    """
    sizes = np.array([len(hashes) for hashes in sets], np.int64)
    if not sizes.sum():
        return
    _, places, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes)
    owners = np.repeat(np.arange(len(sets)), sizes)
    # 1e-9: a product that is a hair above a whole number is that number.
    asked = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    by_rarity = np.lexsort((counts[places], owners))
    rank_inside = np.arange(len(owners)) - np.repeat(ends - sizes, sizes)
    asking = np.zeros(len(owners), dtype=bool)
    asking[by_rarity] = rank_inside < np.repeat(asked, sizes)
    in_order = np.argsort(places, kind="stable")  # by shingle, then by owner
    all_owners, begins = owners[in_order], np.concatenate([[0], np.cumsum(counts)])
    few = in_order[asking[in_order]]
    few_owners = owners[few]
    few_begins = np.searchsorted(places[few], np.arange(len(counts) + 1))
    least = np.minimum.accumulate(sizes)
    for number, size in enumerate(sizes.tolist()):
        here = slice(ends[number] - size, ends[number])
        rivals = set[int]()
        for shingle in places[here][asking[here]].tolist():  # in larger ones
            others = all_owners[begins[shingle] : begins[shingle + 1]]
            others = others[: np.searchsorted(others, number)]
            rivals.update(others[(sizes[others] >= size) & alive[others]].tolist())
        mine = places[here]
        mine = mine[few_begins[mine + 1] > few_begins[mine]]
        if number and least[number - 1] < size:
            for shingle in mine.tolist():  # smaller ones in this one
                others = few_owners[few_begins[shingle] : few_begins[shingle + 1]]
                others = others[: np.searchsorted(others, number)]
                rivals.update(others[(sizes[others] < size) & alive[others]].tolist())
        if rivals:
            yield number, sorted(rivals)


_ODD = np.uint64(0x9E3779B97F4A7C15)


def _mix(values: Hashes) -> Hashes:
    """SplitMix64's finaliser: close inputs become unrelated outputs."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _word_hashes(codes: npt.NDArray[Any]) -> Hashes:
    """One hash per run of letters and digits, from all characters and their places in the run."""
    inside = np.char.isalnum(codes.view("<U1"))
    begins = np.flatnonzero(inside & ~np.concatenate([[False], inside[:-1]]))
    if not len(begins):
        return np.empty(0, dtype=np.uint64)
    letters = np.flatnonzero(inside)
    first_letter = np.searchsorted(letters, begins)
    lengths = np.diff(np.append(first_letter, len(letters)))
    places = (letters - np.repeat(begins, lengths)).astype(np.uint64)
    mixed = _mix(codes[letters].astype(np.uint64) + places * _ODD)
    return np.add.reduceat(mixed, first_letter)
