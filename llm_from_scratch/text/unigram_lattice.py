"""Training a unigram vocabulary on all words at once, with numpy: what `train_naive` computes.

All cuts of a word are the paths through a *lattice*: its nodes are the gaps between characters,
and every occurrence of a piece is an edge from where it begins to where it ends. The lattices of
all words lie in one set of arrays. Edges are sorted by their *column*, the distance of their end
from the word's beginning. An edge only continues what ended in earlier columns, so one column is
handled for all words together, and a pass takes as many steps as the longest word has characters.

The backward pass needs no order of its own: how often an edge is expected is the derivative of
log P(word) by the edge's score, so it is the forward pass run in reverse, as in any autograd.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import regex

from llm_from_scratch.text.bpe import Array, Progress
from llm_from_scratch.text.unigram import (
    DIGITS,
    LEAST,
    LONGEST,
    SEEDS,
    SHRINK,
    STEPS,
    SURPLUS,
    most_probable,
)

BOUNDARY = "\0"  # stands around the words
LONGEST_WORD = 256  # longer ones are cut: a pass takes as many steps as a word has characters
MOST_CHARACTERS = 1 << 22  # of distinct words; each takes about 500 bytes


def train_unigram(
    words: Mapping[str, int],
    size: int,
    *,
    characters: Collection[str] | None = None,
    without: Collection[str] = (),
    min_count: int = 2,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Learn `size` pieces and their log probabilities from word counts, most probable first.

    Args:
        words: how often each word occurs; no piece crosses a word. Of a very large collection
            only the most frequent words are used, up to four million characters.
        size: pieces in all, at least as many as `characters`. A small text may yield fewer.
        characters: these always keep a piece of their own, and no piece has any other; None
            stands for all that occur.
        without: texts that must not become a piece.
        min_count: substrings that occur less often are not considered.
        progress: called as `progress(what, done, total)` while this takes its time.
    """
    words = usable_words(words, characters)
    if not words:
        return {}
    trainer = _Trainer(words, max(min_count, 1), progress)
    begun = len(trainer.scores)
    target = max(int(size * SURPLUS), int((trainer.length == 1).sum()))
    while True:
        for _ in range(STEPS):
            trainer.improve()
        left = len(trainer.scores)
        if progress:
            progress("dropping pieces", begun - max(left, target), max(begun - target, 0))
        if left <= target:
            return trainer.result(size, frozenset(without))
        trainer.prune(max(target, int(SHRINK * left)))


def usable_words(
    words: Mapping[str, int], characters: Collection[str] | None = None
) -> dict[str, int]:
    """`words` cut at all but `characters` and at `LONGEST_WORD`; the rarest go if need be."""
    allowed = set().union(*words) if characters is None else set(characters)
    allowed.discard(BOUNDARY)
    if not allowed:
        return {}
    runs = regex.compile(f"[{''.join(map(regex.escape, sorted(allowed)))}]{{1,{LONGEST_WORD}}}")
    usable: dict[str, int] = {}
    for word, count in words.items():
        for run in runs.findall(word):
            usable[run] = usable.get(run, 0) + count
    if sum(map(len, usable)) > MOST_CHARACTERS:
        ranked = sorted(usable, key=lambda word: (-usable[word], word))
        room = int(np.searchsorted(np.cumsum([len(word) for word in ranked]), MOST_CHARACTERS))
        lost = set().union(*ranked[room:]).difference(*ranked[:room])
        usable = {word: usable[word] for word in ranked[:room]} | dict.fromkeys(sorted(lost), 1)
    return usable


# ------------------------------------------------------------------------- candidates


@dataclass
class Substrings:
    """The frequent substrings of one length.

    Attributes:
        count: how often each occurs; `useful`: whether it is worth an entry; `example`: where
            one of its occurrences starts.
        start, which: where something of this length stands, and which of them it is.
    """

    length: int
    count: Array
    useful: Array
    example: Array
    start: Array
    which: Array


def find_substrings(text: Array, weights: Array, min_count: int) -> Iterator[Substrings]:
    """The characters of `text`, its frequent pairs, and so on: code points, 0 around the words.

    A substring can only be frequent when what it begins with and what it ends with, each one
    character shorter, both are. So it is known by the numbers of these two, and few are looked at.
    """
    letters, number = np.unique(text, return_inverse=True)
    number = number.astype(np.int64) - 1  # of the substring that starts here; -1: of none
    kinds = len(letters) - 1
    for length in range(1, LONGEST + 1):
        start = np.flatnonzero(number >= 0).astype(np.int32)
        which = number[start]
        count = np.bincount(which, weights[start], kinds)
        example = np.zeros(kinds, np.int32)
        example[which] = start

        longer = start[number[start + 1] >= 0]
        codes, code = np.unique(number[longer] * kinds + number[longer + 1], return_inverse=True)
        longer_count = np.bincount(code, weights[longer], len(codes))
        useful = np.ones(kinds, bool)
        if 1 < length < LONGEST:  # what always goes on with the same character is not
            begins_with = codes // kinds
            useful[begins_with[longer_count == count[begins_with]]] = False
        yield Substrings(length, count, useful, example, start, which.astype(np.int32))

        frequent = longer_count >= min_count
        number = np.full(len(text), -1, np.int64)
        number[longer] = np.where(frequent, np.cumsum(frequent) - 1, -1)[code]
        kinds = int(frequent.sum())
        if not kinds:
            break


# ------------------------------------------------------------------------- the lattice


class Lattice:
    """All cuts of many texts into pieces, as arrays of edges.

    Attributes:
        start, end, piece: of each edge the nodes that it joins, and the number of its piece.
        column: how far its end is from the beginning of its text.
        begin, finish: of each text the first and the last node.
        text: of each node the number of its text.
    """

    def __init__(self, start: Array, end: Array, piece: Array, begin: Array, finish: Array) -> None:
        self.begin, self.finish = begin, finish
        self.nodes = int(finish[-1]) + 1
        numbers = np.arange(len(begin), dtype=np.int32)
        self.text = np.repeat(numbers, np.diff(begin, append=self.nodes))
        column = (end - begin[self.text[start]]).astype(np.int32)
        order = np.argsort(column * np.int64(self.nodes) + end, kind="stable").astype(np.int32)
        self.start, self.end = start[order], end[order]
        self.piece, self.column = piece[order], column[order]
        self._index()

    def _index(self) -> None:
        """Edges with the same end stand together: where each such group begins, and its columns."""
        self.first = np.flatnonzero(np.diff(self.end, prepend=-1))
        self.size = np.diff(self.first, append=len(self.end))
        bounds = np.arange(1, int(self.column.max(initial=0)) + 2)
        edges = np.searchsorted(self.column, bounds)
        groups = np.searchsorted(self.column[self.first], bounds)
        self.columns = [
            (slice(*edges[i : i + 2]), slice(*groups[i : i + 2])) for i in range(len(bounds) - 1)
        ]

    def keep(self, pieces: Array, texts: Array | None = None) -> None:
        """Renumber pieces (and texts): `pieces[old]` is the new number, -1 drops the edges."""
        stay = pieces[self.piece] >= 0
        if texts is not None:
            self.text = np.where(self.text < 0, np.int32(-1), texts[self.text])
            stay &= self.text[self.start] >= 0
            self.begin, self.finish = self.begin[texts >= 0], self.finish[texts >= 0]
        self.start, self.end, self.column = self.start[stay], self.end[stay], self.column[stay]
        self.piece = pieces[self.piece[stay]]
        self._index()

    def expected(self, scores: Array, times: Array) -> Array:
        """How often each piece is expected when text `i` occurs `times[i]` times."""
        total = np.zeros(self.nodes)  # log of the probability of all cuts up to a node
        share = np.empty(len(self.start))  # of an edge in all that reaches its end
        for edges, groups in self.columns:
            first, size = self.first[groups] - edges.start, self.size[groups]
            reached = total[self.start[edges]] + scores[self.piece[edges]]
            best = np.maximum.reduceat(reached, first)
            part = np.exp(reached - np.repeat(best, size))
            sums = np.add.reduceat(part, first)
            total[self.end[edges][first]] = best + np.log(sums)
            share[edges] = part / np.repeat(sums, size)
        # Now in reverse. Within a column every edge has a start of its own, so += adds up.
        flow = np.zeros(self.nodes)
        flow[self.finish] = times
        for edges, _ in reversed(self.columns):
            share[edges] *= flow[self.end[edges]]
            flow[self.start[edges]] += share[edges]
        return np.bincount(self.piece, share, len(scores))

    def viterbi(self, scores: Array) -> Array:
        """For each node the last edge of the best cut up to there."""
        total = np.zeros(self.nodes)
        last = np.zeros(self.nodes, np.int64)
        for edges, groups in self.columns:
            first, size = self.first[groups] - edges.start, self.size[groups]
            reached = total[self.start[edges]] + scores[self.piece[edges]]
            best = np.maximum.reduceat(reached, first)
            total[self.end[edges][first]] = best
            hits = edges.start + np.flatnonzero(reached == np.repeat(best, size))
            last[self.end[hits]] = hits  # of equal ones the last remains, which is the longest
        return last

    def walk(self, last: Array, texts: Array) -> Iterator[tuple[Array, Array]]:
        """The best cuts of `texts`, from their ends: (texts not yet done, an edge of each)."""
        at = self.finish[texts]
        while len(texts):
            edges = last[at]
            yield texts, edges
            at = self.start[edges]
            going = at > self.begin[texts]
            texts, at = texts[going], at[going]


def lattice_of_pieces(corpus: Lattice, example: Array, length: Array) -> Lattice:
    """The lattice of the pieces' own texts, each without the edge that is the piece itself.

    A piece stands somewhere in the corpus (`example`), and so do all the pieces in it.
    """
    order = np.argsort(corpus.start, kind="stable").astype(np.int32)
    first = np.searchsorted(corpus.start[order], np.arange(corpus.nodes + 1))
    begin = (np.cumsum(length + 1) - (length + 1)).astype(np.int32)
    starts, ends, pieces = [], [], []
    for offset in range(int(length.max())):
        owner = np.flatnonzero(length > max(offset, 1)).astype(np.int32)  # a character has no parts
        node = example[owner] + offset
        count = first[node + 1] - first[node]
        # All edges that begin at these nodes, behind one another.
        places = np.arange(count.sum()) + np.repeat(first[node] - np.cumsum(count) + count, count)
        edge, owner = order[places], np.repeat(owner, count)
        reach = corpus.end[edge] - example[owner]
        inside = (reach <= length[owner]) & (corpus.piece[edge] != owner)
        edge, owner, reach = edge[inside], owner[inside], reach[inside]
        starts.append(begin[owner] + np.int32(offset))
        ends.append(begin[owner] + reach)
        pieces.append(corpus.piece[edge])
    edges = np.concatenate(starts), np.concatenate(ends), np.concatenate(pieces)
    return Lattice(*edges, begin, begin + length)


# ------------------------------------------------------------------------- training


class _Trainer:
    """The pieces that are left, with the lattices of the words and of the pieces themselves."""

    def __init__(
        self, words: Mapping[str, int], min_count: int, progress: Progress | None = None
    ) -> None:
        self.string = BOUNDARY + BOUNDARY.join(words) + BOUNDARY
        text = np.frombuffer(self.string.encode("utf-32-le"), np.uint32)
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        counts = np.fromiter(words.values(), np.int64, len(words))
        self.times = counts.astype(float)
        finish = np.cumsum(lengths + 1).astype(np.int32)  # of a word: the boundary behind it
        weights = np.concatenate([[0], np.repeat(counts, lengths + 1)])
        levels: list[Substrings] = []
        for level in find_substrings(text, weights, min_count):
            levels.append(level)
            if progress:
                progress("finding pieces by their length", level.length, LONGEST)

        count = np.concatenate([level.count for level in levels])
        length = np.concatenate([np.full(len(lv.count), lv.length) for lv in levels])
        useful = np.concatenate([level.useful for level in levels])
        value = np.where(length == 1, np.inf, np.where(useful, count * length, 0))
        chosen = np.sort(np.argsort(-value, kind="stable")[: len(levels[0].count) + SEEDS])
        chosen = chosen[value[chosen] > 0]
        self.length = length[chosen].astype(np.int32)
        self.example = np.concatenate([level.example for level in levels])[chosen]
        self.scores = np.log(count[chosen] / count[chosen].sum())

        number = np.full(len(count), -1, np.int32)
        number[chosen] = np.arange(len(chosen))
        starts, ends, pieces = [], [], []
        first_of = np.searchsorted(length, [level.length for level in levels])
        for level, first in zip(levels, first_of, strict=True):
            piece = number[first + level.which]
            starts.append(level.start[piece >= 0])
            ends.append(starts[-1] + np.int32(level.length))
            pieces.append(piece[piece >= 0])
        levels.clear()  # as large as the lattice itself
        edges = np.concatenate(starts), np.concatenate(ends), np.concatenate(pieces)
        self.corpus = Lattice(*edges, (finish - lengths).astype(np.int32), finish)
        self.own = lattice_of_pieces(self.corpus, self.example, self.length)

    def improve(self) -> None:
        """One step of expectation maximisation; pieces that are hardly expected go."""
        expected = self.corpus.expected(self.scores, self.times)
        self._keep(np.flatnonzero((expected >= LEAST) | (self.length == 1)), expected)

    def _keep(self, kept: Array, expected: Array | None = None) -> None:
        """Go on with the pieces `kept`, with new scores if it is known how often they occur."""
        number = np.full(len(self.scores), -1, np.int32)
        number[kept] = np.arange(len(kept))
        self.corpus.keep(number)
        self.own.keep(number, number)
        self.length, self.example = self.length[kept], self.example[kept]
        self.scores = self.scores[kept]
        if expected is not None:
            counts = np.maximum(expected[kept], LEAST)
            self.scores = digamma(counts) - digamma(counts.sum(keepdims=True))

    def prune(self, size: int) -> None:
        """Keep the `size` pieces that it would cost most to do without; characters come first."""
        ranked = np.argsort(-self.losses(), kind="stable")
        self._keep(np.sort(ranked[:size]))

    def losses(self) -> Array:
        """What it costs to write each piece with others: `unigram.loss` for all of them."""
        counts = np.zeros(len(self.scores))
        last = self.corpus.viterbi(self.scores)
        for texts, edges in self.corpus.walk(last, np.arange(len(self.times))):
            counts += np.bincount(self.corpus.piece[edges], self.times[texts], len(counts))
        total = counts.sum()
        without, parts = np.zeros(len(counts)), np.zeros(len(counts))
        used = np.flatnonzero((self.length > 1) & (counts > 0))
        for pieces, edges in self.own.walk(self.own.viterbi(self.scores), used):
            without[pieces] += np.log(counts[self.own.piece[edges]] + counts[pieces])
            parts[pieces] += 1
        losses = np.where(self.length == 1, np.inf, -np.inf)
        n, k = counts[used], parts[used]
        without[used] -= k * np.log(total + n * (k - 1))
        losses[used] = np.round(n * (np.log(n) - np.log(total) - without[used]), DIGITS)
        return losses

    def result(self, size: int, without: Collection[str]) -> dict[str, float]:
        """At most `size` pieces with their scores."""
        spans = zip(self.example.tolist(), self.length.tolist(), strict=True)
        pieces = [self.string[start : start + length] for start, length in spans]
        scores = dict(zip(pieces, self.scores.tolist(), strict=True))
        return most_probable({p: s for p, s in scores.items() if p not in without}, size)


def digamma(x: Array) -> Array:
    """`unigram.digamma` for an array."""
    x = x.astype(float)
    below = np.zeros_like(x)
    for _ in range(7):
        low = x < 7
        below[low] -= 1 / x[low]
        x[low] += 1
    y = 1 / (x - 0.5) ** 2
    series = y / 24 - 7 * y**2 / 960 + 31 * y**3 / 8064 - 127 * y**4 / 30720
    return np.asarray(below + np.log(x - 0.5) + series)
