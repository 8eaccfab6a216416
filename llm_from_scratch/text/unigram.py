"""The unigram language model: a vocabulary as a distribution over pieces, in plain Python.

Byte pair encoding remembers an order of merges. A unigram model gives every piece a probability
instead, as if a text were pieces drawn one by one. A word can then be cut in many ways, each as
probable as the product of its pieces, and encoding takes the most probable cut (Viterbi).

Training starts with far too many pieces, all frequent substrings, and alternates two things:
*expectation maximisation* (how often is each piece expected, over all cuts of all words? take
that as its new probability) and *pruning* (drop the pieces whose loss hurts the likelihood
least), until the vocabulary has the size that was asked for.

This file says what is computed, one word after the other; `unigram_lattice.py` computes the same
for all words at once, some hundred times faster.

Papers: Kudo 2018, "Subword Regularization", arXiv:1804.10959, section 3.2; the M step, thresholds
and losses are those of `sentencepiece` (Kudo and Richardson 2018, arXiv:1808.06226).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

# What training keeps to, here and in `unigram_lattice.py`.
LONGEST = 16  # characters of a piece
SEEDS = 1_000_000  # substrings to begin with
SHRINK = 0.75  # share of the pieces that a round of pruning keeps
STEPS = 2  # of expectation maximisation per round
SURPLUS = 1.1  # pruning stops at so much more than the size; the least probable pieces go last
LEAST = 0.5  # pieces expected less often than this are dropped
DIGITS = 6  # of a score behind the point: every program reads such a number alike
UNKNOWN_PENALTY = 10.0  # an unknown character is so much worse than the worst piece


# ------------------------------------------------------------------------- cuts of a word


def segmentations(word: str, pieces: Collection[str]) -> Iterator[list[str]]:
    """Every way to cut `word` into `pieces`: exponentially many, for reading and testing."""
    if not word:
        yield []
    for end in range(1, len(word) + 1):
        if word[:end] in pieces:
            for rest in segmentations(word[end:], pieces):
                yield [word[:end], *rest]


def expected_by_enumeration(
    word: str, scores: Mapping[str, float]
) -> tuple[float, dict[str, float]]:
    """The definition: log P(word), and how often each piece is expected in it.

    P(cut) is the product of its pieces' probabilities, P(word) the sum over all cuts, and a cut
    counts with its share in that sum. `scores` are natural logarithms of probabilities.
    """
    cuts = list(segmentations(word, scores))
    weights = [math.exp(sum(scores[piece] for piece in cut)) for cut in cuts]
    total = sum(weights)
    expected: dict[str, float] = defaultdict(float)
    for cut, weight in zip(cuts, weights, strict=True):
        for piece in cut:
            expected[piece] += weight / total
    return math.log(total), dict(expected)


def forward_backward(word: str, scores: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The same in time that grows with the length of the word only.

    `forward[i]` is log P(word[:i]) over all its cuts, `backward[i]` that of word[i:]. All cuts
    that hold the piece word[i:j] together have the probability forward[i] * P * backward[j].
    """
    size = len(word)
    edges = [
        (i, j)
        for i in range(size)
        for j in range(i + 1, min(i + LONGEST, size) + 1)
        if word[i:j] in scores
    ]
    forward = [0.0] + [-math.inf] * size
    for i, j in sorted(edges, key=lambda edge: edge[1]):
        forward[j] = _log_add(forward[j], forward[i] + scores[word[i:j]])
    backward = [-math.inf] * size + [0.0]
    for i, j in sorted(edges, reverse=True):
        backward[i] = _log_add(backward[i], scores[word[i:j]] + backward[j])
    expected: dict[str, float] = defaultdict(float)
    for i, j in edges:
        log_share = forward[i] + scores[word[i:j]] + backward[j] - forward[size]
        expected[word[i:j]] += math.exp(log_share)
    return forward[size], dict(expected)


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    low, high = sorted((a, b))
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def viterbi(
    word: str,
    scores: Mapping[str, float],
    *,
    longest: int = LONGEST,
    unknown: float = -math.inf,
    unknown_piece: str = "",
) -> list[str]:
    """The most probable cut of `word`, as the `tokenizers` package finds it.

    A character without an entry of its own is scored `unknown`. Neighbouring ones come out as one
    string, together with `unknown_piece` if the text happens to spell it. Of equal cuts the one
    whose last piece begins first wins.
    """
    size = len(word)
    best: list[float | None] = [0.0] + [None] * size
    came_from = [0] * (size + 1)
    for start in range(size):
        here = best[start]
        assert here is not None  # every character leads on, by its own entry or as unknown
        for end in range(start + 1, min(start + longest, size) + 1):
            score = scores.get(word[start:end], unknown if end == start + 1 else None)
            if score is None:
                continue
            known = best[end]
            if known is None or score + here > known:
                best[end] = score + here
                came_from[end] = start
    pieces: list[str] = []
    end, joins = size, False
    while end:
        start = came_from[end]
        piece = word[start:end]
        is_unknown = piece not in scores or piece == unknown_piece
        if is_unknown and joins:
            pieces[-1] = piece + pieces[-1]
        else:
            pieces.append(piece)
        end, joins = start, is_unknown
    return pieces[::-1]


# ------------------------------------------------------------------------- training


def digamma(x: float) -> float:
    """The derivative of log Gamma(x), for x > 0."""
    below = 0.0
    while x < 7:
        below -= 1 / x
        x += 1
    y = 1 / (x - 0.5) ** 2
    series = y / 24 - 7 * y**2 / 960 + 31 * y**3 / 8064 - 127 * y**4 / 30720
    return below + math.log(x - 0.5) + series


def substrings(words: Mapping[str, int], min_count: int = 2) -> Counter[str]:
    """Every character, and the substrings that occur at least `min_count` times.

    Left out is what always goes on with the same character: `nternationa` says nothing that
    `nternational` does not say better.
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + LONGEST, len(word)) + 1):
                counts[word[start:end]] += count
    goes_on = {p[:-1] for p, n in counts.items() if len(p) > 1 and counts[p[:-1]] == n}
    return Counter(
        {
            piece: count
            for piece, count in counts.items()
            if len(piece) == 1 or (count >= min_count and piece not in goes_on)
        }
    )


def train_naive(words: Mapping[str, int], size: int, *, min_count: int = 2) -> dict[str, float]:
    """Learn `size` pieces and their log probabilities from word counts; all characters stay.

    One word after the other: for reading and testing; use `train_unigram` for work.
    """
    counts = substrings(words, min_count)
    total = sum(counts.values())
    # From here on pieces stand in the order by which ties are broken: short ones first.
    order = sorted(counts, key=lambda piece: (len(piece), piece))
    scores = {piece: math.log(counts[piece] / total) for piece in order}
    target = max(int(size * SURPLUS), sum(len(piece) == 1 for piece in order))
    while True:
        for _ in range(STEPS):
            scores = maximise(expect(words, scores))
        if len(scores) <= target:
            return most_probable(scores, size)
        scores = prune(words, scores, max(target, int(SHRINK * len(scores))))


def expect(words: Mapping[str, int], scores: Mapping[str, float]) -> dict[str, float]:
    """The E step: how often each piece is expected in all words together."""
    expected = dict.fromkeys(scores, 0.0)
    for word, count in words.items():
        for piece, times in forward_backward(word, scores)[1].items():
            expected[piece] += count * times
    return expected


def maximise(expected: Mapping[str, float]) -> dict[str, float]:
    """The M step: new log probabilities; rare pieces go, characters stay.

    Counts over their sum would be the plain answer. exp(digamma(n)) is about n - 1/2: what a
    prior that prefers small vocabularies makes of a count (variational Bayes), and it is the
    rare pieces that this hurts.
    """
    kept = {p: max(n, LEAST) for p, n in expected.items() if n >= LEAST or len(p) == 1}
    total = digamma(sum(kept.values()))
    return {piece: digamma(n) - total for piece, n in kept.items()}


def prune(words: Mapping[str, int], scores: Mapping[str, float], size: int) -> dict[str, float]:
    """The characters, and those pieces that it would cost most to do without.

    Without a piece, each of its occurrences is written with the next best cut of its own text.
    The loss is by how much that lowers the log likelihood of the words.
    """
    counts = Counter(dict.fromkeys(scores, 0))
    for word, count in words.items():
        for piece in viterbi(word, scores):
            counts[piece] += count
    total = sum(counts.values())
    losses = {}
    for piece in scores:
        others = {p: s for p, s in scores.items() if p in piece and p != piece}
        instead = viterbi(piece, others) if len(piece) > 1 else []
        losses[piece] = loss(counts[piece], [counts[p] for p in instead], total)
    kept = {*sorted(scores, key=lambda piece: -losses[piece])[:size]}
    return {piece: score for piece, score in scores.items() if piece in kept}


def loss(count: int, instead: Sequence[int], total: int) -> float:
    """What it costs to write a piece with others; `total` is the number of pieces in the text.

    All `count` occurrences go over to the pieces that stand in, whose own counts are `instead`.
    """
    if not instead:
        return math.inf  # a character: nothing can stand in for it
    if not count:
        return -math.inf
    grown = total + count * (len(instead) - 1)
    without = sum(math.log(n + count) - math.log(grown) for n in instead)
    # Rounded, so that sums taken in another order rank pieces alike.
    return round(count * (math.log(count) - math.log(total) - without), DIGITS)


def most_probable(scores: Mapping[str, float], size: int) -> dict[str, float]:
    """All characters and the most probable of the other pieces, by probability."""
    rounded = {piece: round(score, DIGITS) for piece, score in scores.items()}
    ranked = sorted(rounded, key=lambda piece: (len(piece) > 1, -rounded[piece]))[:size]
    return {p: rounded[p] for p in sorted(ranked, key=lambda piece: (-rounded[piece], piece))}
