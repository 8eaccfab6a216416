"""SentencePiece's normalisation: rules compiled into a trie, applied by the longest match.

A `.model` file does not say "NFKC"; it holds the result, a table of some 200,000 rules such as
`ｱ` -> `ア` or `か` + `゛` -> `が`, so that every program normalises alike whatever version of
Unicode it has. The table is a double array (Aoe 1989): a trie in one row of numbers, in which the
child of a node by a byte stands at a place computed from both. Nothing of it is unpacked; what a
character or a pair of characters becomes is looked up when it is first met.

The `tokenizers` package has a step `Precompiled` with the same table, but it asks the trie for
whole grapheme clusters; on text with combining marks the two differ now and then.
"""

from __future__ import annotations

import array
import itertools
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import regex

from llm_from_scratch.core.errors import UserError


def charsmap_parts(blob: bytes) -> tuple[array.array[int], bytes]:
    """The units of the double array, and the replacements, each ended by a zero byte.

    Raises `UserError` unless every step from every unit stays inside: nothing that walks through
    the table, this module or the `tokenizers` package, has to look out for its ends.
    """
    if len(blob) < 4:
        raise _refuse("it is too short")
    (size,) = struct.unpack_from("<I", blob)
    if size % 1024 or not size or 4 + size >= len(blob) or blob[-1] != 0:
        raise _refuse("its parts have no sound length")
    texts = blob[4 + size :]
    units = np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64)
    values = units[units >> 31 == 1] & 0x7FFFFFFF
    nodes = np.flatnonzero(units >> 31 == 0)
    children = nodes ^ _offset(units[nodes])
    begins = np.flatnonzero(np.frombuffer(b"\0" + texts[:-1], np.uint8) == 0)
    if (children >= len(units)).any() or not np.isin(values, begins).all():
        raise _refuse("a rule leads nowhere")
    if not (units[children[units[nodes] & 256 > 0]] >> 31 == 1).all():
        raise _refuse("a rule has no replacement")
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise _refuse("a replacement is not UTF-8") from None
    plain = array.array("I", units.astype(np.uint32).tobytes())
    return plain, texts


def _offset(unit: Any) -> Any:
    """From a unit of Darts-clone (or an array of them) to its children.

    It has 32 bits: the offset (10-30, scaled by bit 9), whether a key ends here (8) and the byte by
    which its parent leads here (0-7). The value of a key is a unit of its own, the child by byte 0,
    with bit 31 set. Children differ in the lowest 8 bits of their place only.
    """
    return (unit >> 10 & 0x1FFFFF) << ((unit & 512) >> 6)


class Charsmap:
    """The rules of a `precompiled_charsmap`; `UserError` for bytes that are no such table."""

    def __init__(self, blob: bytes) -> None:
        self._units, self._texts = charsmap_parts(blob)
        self._singles = _Singles(self)
        self._joins: dict[tuple[str, str], bool] = {}

    def normalise(self, text: str) -> str:
        """`text` with the rules applied once, from left to right, the longest first."""
        # Rules of several characters are rare in text (combining marks, Hangul in letters).
        pairs = [pair for pair in set(itertools.pairwise(text)) if self._may_join(pair)]
        if not pairs:
            return text.translate(self._singles)
        begin = regex.compile(
            "|".join(regex.escape(a) + f"(?={regex.escape(b)})" for a, b in pairs)
        )
        done: list[str] = []
        start = at = 0  # everything before `start` is done
        while found := begin.search(text, at):
            length, new = self.longest_rule(text[found.start() : found.start() + 32])
            if length < 2:
                at = found.start() + 1
                continue
            done += (text[start : found.start()].translate(self._singles), new)
            start = at = found.start() + length
        done.append(text[start:].translate(self._singles))
        return "".join(done)

    def longest_rule(self, text: str) -> tuple[int, str]:
        """Of the rules for a beginning of `text` the longest: its characters and its replacement.

        (0, "") where there is none.
        """
        data = text.encode()
        size, value = 0, -1
        for depth, node in enumerate(self._path(data)):
            if self._units[node] & 256 and depth:
                size, value = depth, self._units[node ^ _offset(self._units[node])]
        if not size:
            return 0, ""
        place = value & 0x7FFFFFFF
        try:
            length = len(data[:size].decode())
        except UnicodeDecodeError:
            raise _refuse("a rule ends inside a character") from None
        return length, self._texts[place : self._texts.index(0, place)].decode()

    def _may_join(self, pair: tuple[str, str]) -> bool:
        """Whether some rule begins with these two characters."""
        found = self._joins.get(pair)
        if found is None:
            data = "".join(pair).encode()
            found = self._joins[pair] = sum(1 for _ in self._path(data)) == len(data) + 1
        return found

    def _path(self, data: bytes) -> Iterator[int]:
        """The root and the nodes that the bytes lead to, as far as there are some."""
        node = 0
        yield node
        for byte in data:
            node ^= _offset(self._units[node]) ^ byte
            if not byte or self._units[node] & 0x800000FF != byte:
                return
            yield node


class _Singles(dict[int, str]):
    """What single characters become, for `str.translate`; filled as they are met."""

    def __init__(self, charsmap: Charsmap) -> None:
        self.charsmap = charsmap

    def __missing__(self, number: int) -> str:
        length, new = self.charsmap.longest_rule(chr(number))
        self[number] = new if length else chr(number)
        return self[number]


def _refuse(why: str) -> UserError:
    return UserError(
        f"The normalisation table of this tokenizer (precompiled_charsmap) is broken: {why}. Fetch "
        "the tokenizer again."
    )
