"""WordPiece, BERT's vocabulary: how text is cut into words, and words into the longest pieces.

A piece that begins a word is written as it is, one that goes on with `##` before it. Training
starts with single characters and joins pairs, as byte pair encoding does. Encoding knows no
merges: it takes the longest piece that the word begins with, and again for what is left.

Which pair to join? In the literature, the one that raises the likelihood of a unigram model most;
often given as count(pair) / (count(left) * count(right)). That quotient alone is a bad guide: it is
highest for pairs of rare symbols that happen to meet, and the vocabulary fills with them.
`train_naive` takes either score, so the two can be compared; `train_wordpiece` counts, like the
trainer of the `tokenizers` package, and with the same indexed code as byte pair encoding.

Papers: Schuster & Nakajima 2012, "Japanese and Korean Voice Search"; Devlin et al. 2019,
arXiv:1810.04805 (BERT), whose code has the rules for words; Sennrich et al. 2016 (pairs by count).
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np
import regex

from llm_from_scratch.text.bpe import Progress, learn_merges, merge_pair
from llm_from_scratch.text.pretokenize import frequent, special_splitter, split_words
from llm_from_scratch.text.wordpiece_spec import CONTINUES

LONGEST_WORD = 100  # characters; a longer word is unknown as a whole
BEGIN = "\0"  # in training, before the first character of a word: no clean text has it
Score = Callable[[int, int, int], float]  # counts of a pair, its left and its right symbol

# ------------------------------------------------------------------------- text to words

_SIGNS = r"\p{P}$+<=>^`|~"  # BERT calls all that is neither letter nor digit in ASCII punctuation
_WORD = regex.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+")
_CONTROL = regex.compile(r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\uFFFD]")
_SPACE = regex.compile(r"\s")
_CHINESE = regex.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def normalize(
    text: str,
    *,
    clean: bool = True,
    chinese_apart: bool = True,
    strip_accents: bool | None = None,
    lowercase: bool = True,
) -> str:
    """`text` as BERT wants it, the same as `BertNormalizer` of the `tokenizers` package.

    Args:
        clean: without control characters, and with plain spaces for all white space.
        chinese_apart: spaces around every Chinese character (kanji, too).
        strip_accents: é becomes e, but also が becomes か; None: if `lowercase`.
        lowercase: in lower case.

    The package's own tables end with Unicode 8 (2015); of later characters it knows fewer.
    """
    if clean:
        text = _SPACE.sub(" ", _CONTROL.sub("", text))
    if chinese_apart:
        text = _CHINESE.sub(r" \g<0> ", text)
    if lowercase if strip_accents is None else strip_accents:
        decomposed = unicodedata.normalize("NFD", text)
        text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
    if lowercase:
        text = text.replace("Σ", "σ").lower()  # elsewhere than in Python a final Σ is like others
    return text


def words_of(text: str) -> list[str]:
    """Normalised text cut at white space and around every punctuation sign."""
    found: list[str] = _WORD.findall(text)
    return found


def count_words(
    texts: Iterable[str],
    *,
    special: Sequence[str] = (),
    pattern: str | None = None,
    chinese_apart: bool = True,
    strip_accents: bool | None = None,
    lowercase: bool = True,
    progress: Progress | None = None,
) -> Counter[str]:
    """How often each word occurs in `texts`; special tokens are cut out and not counted.

    `pattern` cuts the text before `words_of` does: Japanese has no spaces to go by.
    """
    split = special_splitter(special)
    words: Counter[str] = Counter()
    characters = 0
    for text in texts:
        for plain in split(text)[::2]:
            clean = normalize(
                plain,
                chinese_apart=chinese_apart,
                strip_accents=strip_accents,
                lowercase=lowercase,
            )
            for part in split_words(clean, pattern) if pattern else [clean]:
                words.update(words_of(part))
        characters += len(text)
        if progress:
            progress("counting words", characters, 0)
    return words


# ------------------------------------------------------------------------- words to pieces


def encode_word(word: str, vocab: Container[str], longest: int = LONGEST_WORD) -> list[str] | None:
    """Cut one word, the longest piece first; None when that leads nowhere or it is too long."""
    if len(word) > longest:
        return None
    pieces: list[str] = []
    start = 0
    while start < len(word):
        mark = CONTINUES if start else ""
        for end in range(len(word), start, -1):
            if mark + word[start:end] in vocab:
                break
        else:
            return None
        pieces.append(mark + word[start:end])
        start = end
    return pieces


# ------------------------------------------------------------------------- training


def by_count(pair: int, left: int, right: int) -> float:
    """Join what stands together most often."""
    return pair


def by_ratio(pair: int, left: int, right: int) -> float:
    """Join what stands together more often than chance would have it, however rare it is."""
    return pair / (left * right)


def train_naive(
    words: Mapping[str, int], size: int, *, score: Score = by_count, min_count: int = 2
) -> list[str]:
    """Learn a vocabulary of `size` pieces from word counts: all characters, then joined pairs.

    Of equal scores the greater pair wins, where the beginning of a word comes before all letters.
    For reading and testing; `train_wordpiece` finds the same by count, much faster.
    """
    symbols = {word: [BEGIN + word[0], *word[1:]] for word in words}
    vocabulary = dict.fromkeys(sorted(set(itertools.chain(*symbols.values()))))
    while len(vocabulary) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        single: Counter[str] = Counter()
        for word, parts in symbols.items():
            for pair in itertools.pairwise(parts):
                pairs[pair] += words[word]
            for part in parts:
                single[part] += words[word]
        scores = {
            (left, right): score(count, single[left], single[right])
            for (left, right), count in pairs.items()
            if count >= min_count
        }
        if not scores:
            break
        best = max(scores, key=lambda pair: (scores[pair], pair))
        vocabulary[best[0] + best[1]] = None
        symbols = {word: merge_pair(parts, best) for word, parts in symbols.items()}
    return [_spelled(symbol) for symbol in vocabulary]


def _spelled(symbol: str) -> str:
    return symbol[1:] if symbol.startswith(BEGIN) else CONTINUES + symbol


def train_wordpiece(
    words: Mapping[str, int],
    size: int,
    *,
    coverage: float = 1.0,
    min_count: int = 2,
    progress: Progress | None = None,
) -> list[str]:
    """Learn a vocabulary of `size` pieces from word counts: characters, then pairs by count.

    Args:
        words: how often each word occurs, without white space in them.
        size: entries in all. A small text may yield fewer.
        coverage: the share of the text whose characters are kept, the most frequent ones; they
            take at most three quarters of the vocabulary. Words with any other are passed over:
            they will be unknown.
        min_count: pairs that occur less often are not joined.
        progress: called as `progress("learning merges", done, total)`.
    """
    counts: Counter[str] = Counter()
    for word, count in words.items():
        counts[BEGIN + word[0]] += count
        for character in word[1:]:
            counts[character] += count
    symbols = sorted(frequent(counts, coverage, max(1, size * 3 // 4)))
    # In training a symbol is its text as bytes, whose order is that of the characters; the last
    # one stands around the words, as bytes that no text has.
    alphabet = [symbol.encode() for symbol in symbols] + [b"\xff"]
    number = {symbol: place for place, symbol in enumerate(symbols)}
    line, kept = [len(symbols)], []
    for word, count in words.items():
        parts = [number.get(BEGIN + word[0]), *map(number.get, word[1:])]
        if None not in parts:
            line += [*(part for part in parts if part is not None), len(symbols)]
            kept.append(count)
    merges = learn_merges(np.array(line), kept, alphabet, size + 1, min_count, progress)
    joined = [(left + right).decode() for left, right in merges]
    return [_spelled(symbol) for symbol in dict.fromkeys([*symbols, *joined])]
