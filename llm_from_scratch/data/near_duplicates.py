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
that share most of their shingles with a crowd. Everything is deterministic: no random seed, no
order of a set.
"""

from __future__ import annotations

from collections.abc import Sequence
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
) -> tuple[list[Document], list[Dropped]]:
    """Leave out documents of which `threshold` is contained in another, or the other in them.

    Of a group the largest document stays (of equals, the first). `against` are documents that stay
    whatever happens, such as a validation split: what is like one of them is dropped, they
    themselves are not returned. Both results are in the order of `documents`.
    """
    every = [*against, *documents]
    sets = [shingles(document.text) for document in every]
    # Rank 0 is the document that wins against all others.
    order = sorted(
        range(len(every)), key=lambda number: (number >= len(against), -len(sets[number]), number)
    )
    ranked = [sets[number] for number in order]
    alive = np.ones(len(order), dtype=bool)
    dropped: dict[int, Dropped] = {}
    for rank, rivals in _candidates(ranked, threshold).items():
        if order[rank] < len(against):
            continue
        best, reason = 0.0, -1
        for rival in rivals:
            if alive[rival]:
                found = similarity(ranked[rank], ranked[rival]).containment
                if found > best:
                    best, reason = found, rival
        if best >= threshold:
            alive[rank] = False
            number = order[rank]
            dropped[number] = Dropped(every[number], every[order[reason]], best)
    kept = [document for n, document in enumerate(every) if n >= len(against) and n not in dropped]
    return kept, [dropped[number] for number in sorted(dropped)]


def similar_pairs(
    documents: Sequence[Document], threshold: float = 0.8
) -> list[tuple[int, int, Similarity]]:
    """All pairs (i < j) of documents whose containment is at least `threshold`."""
    sets = [shingles(document.text) for document in documents]
    found = []
    for second, rivals in _candidates(sets, threshold).items():
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
