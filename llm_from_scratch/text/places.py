"""Where in a text each of its tokens stands, in characters, for every tokenizer.

Names are marked by characters, models see tokens. Tokens may share a character (the bytes of a
kanji), begin with the space before a word, or stand for characters that normalisation has changed:
places are always those of the text as it was given.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import regex
import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.backend import Placed, run_with_places
from llm_from_scratch.text.front import Front
from llm_from_scratch.text.japanese import JapaneseWords
from llm_from_scratch.text.pretokenize import special_splitter
from llm_from_scratch.text.tokenizer import Tokenizer

_SURROGATES = re.compile("[\ud800-\udfff]")
_CLUSTERS = regex.compile(r"\X")  # a character with the marks that belong to it


def encode_with_places(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[Placed]]:
    """(id, begin, end) of each token of each text; the ids are those of `tokenizer.encode`.

    White space at a token's edges is not part of its place; a token that is nothing else has an
    empty place. `UserError` for a tokenizer that cannot tell (Marian's).
    """
    plain = [_SURROGATES.sub("\ufffd", text) for text in texts]
    for text in plain:
        tokenizer._check_characters(text, special=False)
    found = _run(tokenizer, tokenizer._plain, plain)
    special = tokenizer._special_ids
    for number, row in enumerate(found):
        if not special.isdisjoint(token for token, _, _ in row):  # as `encode` disarms them
            (found[number],) = _run(tokenizer, tokenizer._inert, [plain[number]])
    return [
        [(token, *_trimmed(text, begin, end)) for token, begin, end in row]
        for text, row in zip(plain, found, strict=True)
    ]


def _trimmed(text: str, begin: int, end: int) -> tuple[int, int]:
    while begin < end and text[begin].isspace():
        begin += 1
    while end > begin and text[end - 1].isspace():
        end -= 1
    return begin, end


def _run(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer, texts: list[str]
) -> list[list[Placed]]:
    if tokenizer.front is None:
        return run_with_places(backend, texts)
    front = _telling(tokenizer.front)
    added = {t["content"]: t["id"] for t in tokenizer.rules["added_tokens"] if not t["special"]}
    split = special_splitter(list(added))
    rows = []
    for text in texts:
        row: list[Placed] = []
        place = 0
        for number, part in enumerate(split(text)):
            if number % 2:
                row.append((added[part], place, place + len(part)))
            else:
                found = _of_japanese(front, backend, part)
                row += [(token, place + begin, place + end) for token, begin, end in found]
            place += len(part)
        rows.append(row)
    return rows


def _telling(front: Front) -> JapaneseWords:
    if not isinstance(front, JapaneseWords):
        raise UserError(
            f"A {front.name} does not tell where in a text its tokens stand; take a model with "
            "another tokenizer."
        )
    return front


def _of_japanese(front: JapaneseWords, backend: tokenizers.Tokenizer, text: str) -> list[Placed]:
    """MeCab's words are found in the normalised text, and their tokens in the words."""
    letters, places = normalised(text, front)
    words = front.words(text)
    cut = front.cut(backend, words)
    row: list[Placed] = []
    at = 0
    for word, tokens in zip(words, cut, strict=True):
        start = letters.find(word, at)
        if start < 0:  # lower case that depends on what stands around it
            start = at
        at = min(start + len(word), len(letters))
        for token, begin, end in tokens:
            inside = places[min(start + begin, at) : min(start + end, at)]
            where = (inside[0][0], inside[-1][1]) if inside else (0, 0)
            row.append((token, *where))
    return row


def normalised(text: str, front: JapaneseWords) -> tuple[str, list[tuple[int, int]]]:
    """The text as `front` hands it to MeCab, and for each of its characters the place in `text`."""
    letters: list[str] = []
    places: list[tuple[int, int]] = []
    for match in _CLUSTERS.finditer(text):
        part = match.group()
        if front.normalise or front.subwords == "character":
            part = unicodedata.normalize("NFKC", part)
        if front.lower:
            part = part.lower()
        # Where normalising kept the number of characters, each has a place of its own.
        same = len(part) == match.end() - match.start()
        for number, letter in enumerate(part):
            letters.append(letter)
            first = match.start() + number
            places.append((first, first + 1) if same else match.span())
    return "".join(letters), places
