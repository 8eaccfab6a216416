r"""How text is cut into words before any merge is counted, and how bytes are written as letters.

A byte-level tokenizer never merges across the pieces that a regular expression cuts out of the
text ("pre-tokens", here simply *words*): without that, `dog.`, `dog!` and `dog?` would each earn a
vocabulary entry. The expressions below mean the same to the `regex` package (training and the
readable encoder) and to Oniguruma (the `tokenizers` package, which reads them from
`tokenizer.json`), so they keep to what both understand: no possessive quantifiers, no set
operations.

Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache

import regex

from llm_from_scratch.core.errors import UserError, nearest

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Japanese is written without spaces: GPT-2's \p{L}+ takes a whole clause for one word, and most
# clauses occur once. Here a word is roughly a bunsetsu: kanji or katakana, the hiragana of its
# ending and particles, and the punctuation that closes it; long runs are cut. Held-out text takes
# fewer tokens so (benchmarks/bpe_training.py).
_MARKS = "ーｰ〱-〵"  # long-vowel and kana repeat marks, which Unicode gives no script
_HIRAGANA = r"[\p{Hiragana}〱-〵]"
_CLOSING = "[、。，．！？」』）]{0,3}"
JAPANESE_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d"
    rf"| ?[^\s\p{{N}}\p{{P}}\p{{S}}\p{{Han}}\p{{Hiragana}}\p{{Katakana}}{_MARKS}〆]+"
    rf"|(?:[\p{{Han}}〆]{{1,8}}|[\p{{Katakana}}{_MARKS}]{{1,16}}){_HIRAGANA}{{0,16}}{_CLOSING}"
    rf"|{_HIRAGANA}{{1,16}}{_CLOSING}"
    r"| ?\p{N}{1,3}"
    r"| ?[\p{P}\p{S}]+"
    r"|\s+(?!\S)|\s+"
)

PATTERNS = {"en": GPT2_PATTERN, "ja": JAPANESE_PATTERN}

# A longer text is counted in pieces of about this many characters, to bound the memory.
_PIECE = 1 << 22
_SAFE_CUT = regex.compile(r"(?<=\S)(?=\n)")


def pattern_for(language: str) -> str:
    """The pre-tokenisation pattern that suits `language` ("en" or "ja")."""
    if language not in PATTERNS:
        raise UserError(
            f"There is no pre-tokenisation for language '{language}': choose one of "
            f"{', '.join(PATTERNS)}.{nearest(language, PATTERNS)}"
        )
    return PATTERNS[language]


@lru_cache(maxsize=32)
def compiled(pattern: str) -> regex.Pattern[str]:
    """The compiled expression; a `UserError` when it is not a valid one."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise UserError(f"The pre-tokenisation pattern is not valid: {error}.") from error


def split_words(text: str, pattern: str = GPT2_PATTERN) -> list[str]:
    """`text` cut into words; joined, they are the text again (also where nothing matches)."""
    words, end = [], 0
    for match in compiled(pattern).finditer(text):
        if match.start() > end:
            words.append(text[end : match.start()])
        if match.end() > match.start():
            words.append(match.group())
        end = match.end()
    if end < len(text):
        words.append(text[end:])
    return words


def special_splitter(special: Sequence[str]) -> Callable[[str], list[str]]:
    """A function that cuts a text at special tokens: plain, special, plain, special, ... plain.

    Where one token is the beginning of another, the longer one wins.
    """
    if not special:
        return lambda text: [text]
    longest_first = sorted(special, key=len, reverse=True)
    return regex.compile("(" + "|".join(map(regex.escape, longest_first)) + ")").split


def check_characters(text: str, known: Collection[str], special: Sequence[str]) -> None:
    """Refuse a text with a character, outside of the tokens `special`, that is not `known`."""
    place = 0
    for i, part in enumerate(special_splitter(special)(text)):
        for j, character in enumerate(part if i % 2 == 0 else ""):
            if character not in known:
                raise UserError(
                    f"The character {character!r} (number {place + j + 1} of the text) is not "
                    "in this character vocabulary: leave it out, or train the tokenizer with "
                    "an unknown token."
                )
        place += len(part)


def count_words(
    texts: Iterable[str],
    *,
    pattern: str = GPT2_PATTERN,
    special: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Counter[str]:
    """How often each word occurs in `texts`; special tokens are cut out and not counted.

    `progress("counting words", characters so far, 0)` is called after each text.
    """
    expression = compiled(pattern)
    # Of these it is known that they match every character and have no groups.
    complete = pattern in PATTERNS.values()
    split = special_splitter(special)
    words: Counter[str] = Counter()
    characters = 0
    for text in texts:
        for plain in split(text)[::2]:
            for piece in _pieces(plain):
                words.update(expression.findall(piece) if complete else split_words(piece, pattern))
        characters += len(text)
        if progress:
            progress("counting words", characters, 0)
    return words


def _pieces(text: str) -> Iterator[str]:
    """Cut a very long text between a visible character and a line end: no word spans that."""
    start = 0
    while len(text) - start > _PIECE and (cut := _SAFE_CUT.search(text, start + _PIECE)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:] if start else text


def frequent(counts: Mapping[str, int], coverage: float, most: int) -> list[str]:
    """The most frequent symbols that make up the share `coverage` of all, at most `most` of them.

    A few thousand kanji are nearly all of a Japanese text; as many again occur once or twice.
    """
    ranked = sorted(counts, key=lambda symbol: (-counts[symbol], symbol))
    wanted = coverage * sum(counts.values())
    chosen: list[str] = []
    for symbol in ranked[:most]:
        if wanted <= 0:
            break
        wanted -= counts[symbol]
        chosen.append(symbol)
    return chosen


@lru_cache(maxsize=1)
def byte_letters() -> tuple[str, ...]:
    """GPT-2's 256 letters, by byte: vocabularies in JSON need text, and a byte alone is not text.

    A byte that is a printable Latin-1 character stands for itself, the others (space: `Ġ`, line
    end: `Ċ`) are moved up to U+0100 and beyond.
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in own else chr(next(moved)) for byte in range(256))


@lru_cache(maxsize=1)
def letter_bytes() -> dict[str, int]:
    """The inverse of `byte_letters`."""
    return {letter: byte for byte, letter in enumerate(byte_letters())}


def alphabet() -> list[int]:
    """The 256 bytes in the order of GPT-2's vocabulary: the printable ones first."""
    letters = byte_letters()
    return sorted(range(256), key=lambda byte: letters[byte])


_BYTE_OF_ORD = {ord(letter): chr(byte) for letter, byte in letter_bytes().items()}
_LETTER_OF_ORD = {ord(chr(byte)): letter for byte, letter in enumerate(byte_letters())}


def to_letters(data: bytes) -> str:
    """Bytes in GPT-2's notation: b" a" -> "Ġa"."""
    return data.decode("latin-1").translate(_LETTER_OF_ORD)


def from_letters(token: str) -> bytes:
    """The inverse of `to_letters`; ValueError when `token` is not in this notation."""
    return token.translate(_BYTE_OF_ORD).encode("latin-1")
