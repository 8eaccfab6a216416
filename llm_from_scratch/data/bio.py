"""Names in a text as spans of characters, as tags of tokens (BIO), and the way between the two.

What is tagged is a *unit*: a run of characters and the token that speaks for it. Units never
overlap, so every list of tags is a list of spans again; of tokens that share a character (the bytes
of a kanji) the last speaks for it. Units are tokens, or words, for each of which one token speaks.

BIO: B-PER begins a person's name, I-PER goes on with it, O is everything else (Ramshaw & Marcus
1995, in the form of CoNLL-2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import regex

from llm_from_scratch.text.backend import Placed

Span = tuple[int, int, str]  # begin, end (not included) and type
OUTSIDE = "O"

# Words of a text that nobody has cut: numbers, words with marks inside, single signs.
_WORDS = regex.compile(
    r"\w+://\S*[\w/]|[@#]\w+|[\w\p{M}]+(?:[-'’.,&_/@+][\w\p{M}]+)*|[^\w\s\p{M}]\p{M}*"
)
_SPACELESS = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}ー々〆、。「」・！？（）]"
)


@dataclass(frozen=True)
class Unit:
    """A run of characters [begin, end) and the number of the token that speaks for it."""

    begin: int
    end: int
    token: int


def labels_of(types: Iterable[str]) -> tuple[str, ...]:
    """O, then B- and I- of each type: ("O", "B-PER", "I-PER", ...)."""
    pairs = ((f"B-{name}", f"I-{name}") for name in dict.fromkeys(types))
    return (OUTSIDE, *(label for pair in pairs for label in pair))


def types_of(labels: Sequence[str]) -> tuple[str, ...]:
    """The types whose tags are among the labels, in their order."""
    return tuple(dict.fromkeys(label[2:] for label in labels if label[:2] in ("B-", "I-")))


# --- tags and spans ------------------------------------------------------------------------------


def tags_of(units: Sequence[Unit], spans: Sequence[Span]) -> list[str]:
    """The tag of each unit. A unit across a border goes to the span that has most of it."""
    tags = [OUTSIDE] * len(units)
    best = [0] * len(units)
    first = 0
    for begin, end, name in sorted(spans):
        while first < len(units) and units[first].end <= begin:
            first += 1
        number, tag = first, f"B-{name}"
        while number < len(units) and units[number].begin < end:
            unit = units[number]
            common = min(end, unit.end) - max(begin, unit.begin)
            if common > best[number]:
                best[number], tags[number] = common, tag
                tag = f"I-{name}"
            number += 1
    return tags


def spans_of(units: Sequence[Unit], tags: Sequence[str]) -> list[Span]:
    """The spans that the tags mark. I- without a beginning begins one, as in CoNLL's scorer."""
    spans: list[Span] = []
    open_type = ""
    for unit, tag in zip(units, tags, strict=True):
        if tag == OUTSIDE:
            open_type = ""
            continue
        name = tag[2:]
        if tag[0] == "I" and name == open_type:
            spans[-1] = (spans[-1][0], unit.end, name)
        else:
            spans.append((unit.begin, unit.end, name))
        open_type = name
    return spans


def spans_of_tags(tags: Sequence[str]) -> list[Span]:
    """Spans of words by number, from tags of any scheme: IOB1, IOB2 (BIO), BIOES, BILOU.

    Raises `ValueError` for a tag that is of none.
    """
    spans: list[Span] = []
    open_type = ""
    for number, tag in enumerate(tags):
        if tag == OUTSIDE:
            open_type = ""
            continue
        kind, dash, name = tag[:1], tag[1:2], tag[2:]
        if kind not in "BIESLUM" or dash not in ("-", "_") or not name:
            raise ValueError(tag)
        if kind in "IELM" and name == open_type:
            spans[-1] = (spans[-1][0], number + 1, name)
        else:
            spans.append((number, number + 1, name))
        open_type = "" if kind in "ESLU" else name
    return spans


# --- units ---------------------------------------------------------------------------------------


def token_units(places: Sequence[Placed]) -> list[Unit]:
    """A unit for each token; a character that several share (its bytes) goes to the last one."""
    units: list[Unit] = []
    for number, (_, begin, end) in enumerate(places):
        if begin >= end:
            continue
        if units and begin < units[-1].end:
            before = units.pop()
            end = max(end, before.end)
            if before.begin < begin:
                units.append(Unit(before.begin, begin, before.token))
        units.append(Unit(begin, end, number))
    return units


def word_units(
    places: Sequence[Placed], words: Sequence[tuple[int, int]], *, last: bool = False
) -> list[Unit]:
    """A unit for each word: its first token speaks for it, or its last.

    A word that the tokenizer drops leaves its say to the token before it.
    """
    units: list[Unit] = []
    at = 0
    for begin, end in words:
        while at < len(places) and places[at][2] <= begin:
            at += 1
        stop = at
        while stop < len(places) and places[stop][1] < end:
            stop += 1
        inside = [n for n in range(at, stop) if places[n][1] < places[n][2]]
        if inside:
            token = inside[-1 if last else 0]
        else:
            token = min(max(0, at - 1), len(places) - 1)
        units.append(Unit(begin, end, token))
    return units


def words_of(text: str) -> list[tuple[int, int]]:
    """Where the words of a text in a language with spaces stand; punctuation is apart."""
    return [match.span() for match in _WORDS.finditer(text)]


def joined(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """A sentence from its words, and where in it they stand.

    With spaces; without them where most words are of a script that has none (Japanese, Chinese,
    Thai), but for two neighbours of another script.
    """
    dense = 2 * sum(bool(_SPACELESS.search(word)) for word in words) > len(words)
    text, places = "", list[tuple[int, int]]()
    for word in words:
        # Between Latin words of a Japanese sentence there is a space; signs close up to words.
        alone = bool(text) and text[-1].isascii() and word[:1].isascii()
        if text and (not dense or (alone and text[-1].isalnum() and word[:1].isalnum())):
            text += " "
        places.append((len(text), len(text) + len(word)))
        text += word
    return text, places


# --- long texts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Tokens [start, stop) that the model reads at once, and of which tokens it has the say."""

    start: int
    stop: int
    first: int
    last: int  # not included


def windows(tokens: int, room: int, overlap: float) -> list[Window]:
    """Windows of at most `room` tokens, of which neighbours share about the share `overlap`.

    Of what two share, each has the say over the half that lies deeper in it.
    """
    if tokens <= room:
        return [Window(0, tokens, 0, tokens)]
    step = max(1, room - round(room * overlap))
    starts = [*range(0, tokens - room, step), tokens - room]
    middles = [(b + a + room) // 2 for a, b in pairwise(starts)]
    borders = [0, *middles, tokens]
    return [
        Window(start, start + room, first, last)
        for start, first, last in zip(starts, borders, borders[1:], strict=False)
    ]
