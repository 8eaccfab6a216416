"""Byte pair encoding: how a vocabulary is learnt, and how a word is then encoded.

Training starts with the 256 bytes and, over and over, makes the most frequent pair of neighbouring
symbols a new symbol. `train_naive` says just that and recounts everything after every merge;
`train_indexed` finds the same merges some thousand times faster. Encoding replays the merges.

What both trainers promise: the pair with the highest count wins; of equal counts the greater pair
of byte strings wins (compared like Python tuples); pairs in a run count as often as they appear
(`aaa` holds two) and merge from left to right; nothing crosses a word; a merge whose bytes are in
the vocabulary already uses that entry.

Papers: Gage 1994, "A New Algorithm for Data Compression"; Sennrich et al. 2016,
"Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, AnyStr

import numpy as np
import numpy.typing as npt

Merge = tuple[bytes, bytes]
Progress = Callable[[str, int, int], None]  # (what, done, total; total 0 = not known)
Array = npt.NDArray[Any]


# ---------------------------------------------------------------------------------- to read


def train_naive(words: Mapping[str, int], size: int, *, min_count: int = 2) -> list[Merge]:
    """Learn merges from word counts until there are `size` entries, the 256 bytes included.

    Stops earlier when no pair occurs at least `min_count` times. Every merge costs a pass over
    all words: for reading and testing; use `train_indexed` for work.
    """
    symbols = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    vocabulary = {bytes([byte]) for byte in range(256)}
    merges: list[Merge] = []
    while len(vocabulary) < size:
        counts: Counter[Merge] = Counter()
        for word, parts in symbols.items():
            for pair in itertools.pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        if counts[best] < min_count:
            break
        merges.append(best)
        vocabulary.add(best[0] + best[1])
        symbols = {word: merge_pair(parts, best) for word, parts in symbols.items()}
    return merges


def merge_pair(symbols: list[AnyStr], pair: tuple[AnyStr, AnyStr]) -> list[AnyStr]:
    """`symbols` with every occurrence of `pair` joined, from left to right."""
    merged: list[AnyStr] = []
    i = 0
    while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == pair:
            merged.append(symbols[i] + symbols[i + 1])
            i += 2
        else:
            merged.append(symbols[i])
            i += 1
    return merged


def encode_word(word: bytes, ranks: Mapping[Merge, int]) -> list[bytes]:
    """Cut one word into tokens: while neighbours have a merge, apply the earliest learnt one."""
    symbols = [word[i : i + 1] for i in range(len(word))]
    while len(symbols) > 1:
        best = min(itertools.pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        symbols = merge_pair(symbols, best)
    return symbols


# ----------------------------------------------------------------------------------- to use

GONE = -1  # a position inside a token


class _Corpus:
    """All distinct words behind one another, as one array that merges rewrite in place.

    A token occupies as many positions as symbols of the alphabet went into it, and its own symbol
    stands at the first and at the last of them. So a token's neighbours are found without any
    links: one position before it the left neighbour ends, and its own length further the right
    one begins. The alphabet's last symbol stands around the words.
    """

    def __init__(self, symbols: Array, counts: Array, alphabet: int, size: int) -> None:
        index = np.int32 if len(symbols) < 2**31 else np.int64
        self.symbols = symbols.astype(np.int32)
        self.alphabet = alphabet
        self.boundary = alphabet - 1
        weight = np.int32 if counts.max(initial=0) < 2**31 else np.int64
        lengths = np.diff(np.flatnonzero(self.symbols == self.boundary))
        # The count of the word that each position belongs to.
        self.weights = np.concatenate([[0], np.repeat(counts, lengths)]).astype(weight)
        self.length = np.ones(max(size, alphabet) + 1, index)  # of each symbol
        self.index = index

    def first_pairs(self) -> tuple[Array, Array, Array]:
        """All neighbouring symbols: codes (left * alphabet + right), positions, weights."""
        # numpy sorts 16-bit keys by radix, several times faster than wider ones.
        width: Any = np.uint16 if self.alphabet <= 256 else np.int64
        data = self.symbols.astype(width)
        inside = (data[:-1] != self.boundary) & (data[1:] != self.boundary)
        positions = np.flatnonzero(inside).astype(self.index)
        codes = (data[:-1] * self.alphabet + data[1:])[inside]
        return codes, positions, self.weights[positions]

    def where(self, left: int, right: int, candidates: Array) -> Array:
        """Those of `candidates` where `left` still begins and `right` still follows."""
        found = candidates[self.symbols[candidates] == left]
        return found[self.symbols[found + self.length[left]] == right]

    def join(self, left: int, right: int, new: int, at: Array) -> None:
        """Write `new` over `left`, `right` at the positions `at` (ascending)."""
        middle = at + self.length[left]
        self.symbols[middle - 1] = GONE
        self.symbols[middle] = GONE
        self.symbols[at] = new
        self.symbols[middle + (self.length[right] - 1)] = new

    def all_of(self, symbol: int) -> Array:
        """Every position where the (merged) `symbol` begins: it also marks where it ends."""
        return np.flatnonzero(self.symbols == symbol)[::2].astype(self.index)

    def pairs_with(self, new: int, at: Array) -> tuple[Array, Array, Array]:
        """The pairs that `new`, at all its positions `at`, forms with its neighbours.

        Codes are neighbour * 2, plus 1 where the neighbour is the right one; the pair of `new`
        with itself is counted once, at its left part.
        """
        before = self.symbols[at - 1]
        after = self.symbols[at + self.length[new]]
        has_before = before != self.boundary
        has_after = (after != self.boundary) & (after != new)
        before, at_before = before[has_before], at[has_before]
        at_after = at[has_after]
        codes = np.concatenate([before * 2, after[has_after] * 2 + 1])
        positions = np.concatenate([at_before - self.length[before], at_after])
        weights = np.concatenate([self.weights[at_before], self.weights[at_after]])
        if 2 * len(self.length) < 2**16:
            codes = codes.astype(np.uint16)
        return codes, positions, weights


class _Family:
    """The pairs born together in one merge, the most frequent ones first.

    Only pairs whose turn comes are ever handled one by one; most never are.
    """

    def __init__(self, codes: Array, positions: Array, weights: Array, min_count: int) -> None:
        order = np.argsort(codes, kind="stable")
        codes = codes[order]
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        counts = np.add.reduceat(weights[order], starts, dtype=np.int64)
        ends = np.append(starts[1:], len(codes))
        kept = np.flatnonzero(counts >= min_count)
        kept = kept[np.argsort(-counts[kept], kind="stable")]
        self.counts: list[int] = counts[kept].tolist()
        self.codes: list[int] = codes[starts[kept]].tolist()
        self.starts = starts[kept]
        self.ends = ends[kept]
        self.positions = positions[order]
        self.next = 0

    def bound(self) -> int:
        """The highest count among the pairs not yet handed out; 0 when there are none."""
        return self.counts[self.next] if self.next < len(self.counts) else 0

    def take(self) -> Iterator[tuple[int, Array]]:
        """Hand out all pairs with the highest count: their codes and positions."""
        level = self.bound()
        while self.bound() == level and level:
            i = self.next
            self.next += 1
            yield self.codes[i], self.positions[self.starts[i] : self.ends[i]]


class _Queue:
    """Pairs by their last known count, the highest first; of equal counts the greater pair first.

    A family waits here under the count of its best pair until that count's turn comes.
    """

    def __init__(self, alphabet: Sequence[bytes]) -> None:
        self.heap: list[tuple[Any, ...]] = []
        self.ticket = itertools.count()  # so that nothing after it is ever compared
        self.alphabet = len(alphabet)
        # Per symbol a string that sorts in the opposite order: the heap gives the smallest first.
        self.turned = [_turned(token) for token in alphabet]

    def add_family(self, family: _Family, parent: int | None) -> None:
        if bound := family.bound():
            heapq.heappush(self.heap, (-bound, 0, next(self.ticket), family, parent))

    def add(self, count: int, left: int, right: int, at: Array) -> None:
        order = (self.turned[left], self.turned[right])
        heapq.heappush(self.heap, (-count, 1, *order, next(self.ticket), left, right, at))

    def pop(self) -> tuple[int, int, int, Array] | None:
        """The first pair: its last known count, left and right symbol, noted positions."""
        while self.heap:
            count, kind, *rest = heapq.heappop(self.heap)
            if kind == 1:
                return (-count, *rest[3:])
            _, family, parent = rest
            for code, at in family.take():
                self.add(-count, *self.pair(code, parent), at)
            self.add_family(family, parent)
        return None

    def pair(self, code: int, parent: int | None) -> tuple[int, int]:
        """The symbols of a pair code: see `first_pairs` (no parent) and `pairs_with`."""
        if parent is None:
            return divmod(code, self.alphabet)
        return (parent, code >> 1) if code & 1 else (code >> 1, parent)


def train_indexed(
    words: Mapping[str, int],
    size: int,
    *,
    min_count: int = 2,
    progress: Progress | None = None,
) -> list[Merge]:
    """The merges of `train_naive`, found by an index from pairs to positions.

    Once a pair exists its count can only fall: new occurrences arise only around the symbol just
    made. So the count with which a pair enters the queue is an upper bound, and it is enough to
    recount a pair, over the positions noted at its birth, when it reaches the front: if the
    count is still right, no other pair can be better. (The exception, a merge that yields bytes
    already in the vocabulary, brings all pairs of that symbol in again.)

    `progress("learning merges", done, total)` is called about five times a second.
    """
    # No UTF-8 text contains the byte 0xFF, so it can stand around the words.
    text = b"\xff" + b"".join(word.encode() + b"\xff" for word in words)
    symbols = np.frombuffer(text, np.uint8)
    alphabet = [bytes([byte]) for byte in range(256)]
    return learn_merges(symbols, words.values(), alphabet, size, min_count, progress)


def learn_merges(
    symbols: Array,
    counts: Iterable[int],
    alphabet: Sequence[bytes],
    size: int,
    min_count: int = 2,
    progress: Progress | None = None,
) -> list[Merge]:
    """`train_indexed` over any alphabet: until there are `size` entries, all of it included.

    `symbols` are the words as places in `alphabet`, whose last entry stands before, between and
    after them; `counts` says how often each word occurs. WordPiece's symbols are characters.
    """
    min_count = max(min_count, 1)
    corpus = _Corpus(symbols, np.array([*counts], np.int64), len(alphabet), size)
    queue = _Queue(alphabet)
    tokens = [*alphabet]
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = corpus.first_pairs()
    if len(pairs[0]):
        queue.add_family(_Family(*pairs, min_count), None)
    merges: list[Merge] = []
    said = time.monotonic()
    while len(tokens) < size and (first := queue.pop()):
        count, left, right, at = first
        at = corpus.where(left, right, at)
        now = int(corpus.weights[at].sum(dtype=np.int64))
        if now < count:  # it lost some since; back into the queue, if still worth it
            if now >= min_count:
                queue.add(now, left, right, at)
            continue

        merges.append((tokens[left], tokens[right]))
        joined = tokens[left] + tokens[right]
        new = ids.setdefault(joined, len(tokens))
        if fresh := new == len(tokens):
            tokens.append(joined)
            queue.turned.append(_turned(joined))
            corpus.length[new] = corpus.length[left] + corpus.length[right]
        if left == right:
            at = _left_to_right(at, int(corpus.length[left]))
        corpus.join(left, right, new, at)
        pairs = corpus.pairs_with(new, at if fresh else corpus.all_of(new))
        if len(pairs[0]):
            queue.add_family(_Family(*pairs, min_count), new)
        if progress and time.monotonic() - said > 0.2:
            said = time.monotonic()
            progress("learning merges", len(tokens) - len(alphabet), size - len(alphabet))
    if progress:  # where the text has no more to give, what was learnt is all
        progress("learning merges", len(tokens) - len(alphabet), len(tokens) - len(alphabet))
    return merges


def _turned(token: bytes) -> str:
    """A string that sorts before that of every smaller token; the end counts as the smallest."""
    return token.translate(_COMPLEMENT).decode("latin-1") + "\u0100"


_COMPLEMENT = bytes(255 - byte for byte in range(256))


def _left_to_right(at: Array, length: int) -> Array:
    """Of overlapping occurrences (`aa` in `aaa`) the first, third, ... of each run."""
    if len(at) < 2:
        return at
    run_starts = np.concatenate([[True], at[1:] != at[:-1] + length])
    number = np.arange(len(at))
    first = np.maximum.accumulate(np.where(run_starts, number, 0))
    return at[(number - first) % 2 == 0]
