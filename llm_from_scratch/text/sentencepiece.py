"""Encoding exactly as the sentencepiece package does, from a `.model` file.

The models that are run through `tokenizers` from the start (T5, Llama, ...) have their own habits
and become a `tokenizer.json` (`classes.py`). Marian and some Japanese BERTs are run through
sentencepiece itself. Here its steps are taken one by one: normalise, mark the spaces, cut.

Paper: Kudo & Richardson 2018, arXiv:1808.06226.
"""

from __future__ import annotations

from array import array
from functools import cached_property

import regex
import tokenizers

from llm_from_scratch.text.backend import Placed, open_backend, run_backend, run_with_places
from llm_from_scratch.text.charsmap import Charsmap
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.pretokenize import special_splitter
from llm_from_scratch.text.sentencepiece_model import SentencePieceModel
from llm_from_scratch.text.sentencepiece_spec import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    sentencepiece_spec,
)
from llm_from_scratch.text.unigram import UNKNOWN_PENALTY

FARTHEST = 100_000.0
_SPACES = regex.compile(" {2,}")


class SentencePiece:
    """Cuts text into the pieces of `model`; control pieces such as `</s>` never come out of it."""

    def __init__(self, model: SentencePieceModel) -> None:
        self.model = model
        self._charsmap = Charsmap(model.charsmap) if model.charsmap else None
        typed = zip(model.pieces, model.types, strict=True)
        self._symbols = special_splitter([p for p, kind in typed if kind == USER_DEFINED])
        self._unigram = _Unigram(model) if model.kind == "unigram" else None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of the pieces, by their place in the file."""
        prepared = [self.prepare(text) for text in texts]
        if self._unigram is None:
            return run_backend(self._merges, prepared)
        return [[number for number, _, _ in self._unigram.cut(text)] for text in prepared]

    def pieces_batch(self, texts: list[str]) -> list[list[str]]:
        """The pieces as texts; what is unknown as it stands, a run of it as one."""
        prepared = [self.prepare(text) for text in texts]
        if self._unigram is None:
            found = run_with_places(self._merges, prepared)
        else:
            found = [self._unigram.cut(text) for text in prepared]
        unknown = self.model.unk_id
        return [
            [text[a:b] if number == unknown else self.model.pieces[number] for number, a, b in row]
            for text, row in zip(prepared, found, strict=True)
        ]

    @cached_property
    def _merges(self) -> tokenizers.Tokenizer:
        return open_backend(_merges_spec(self.model), special=False)

    def prepare(self, text: str) -> str:
        """`text` normalised, with `▁` for spaces: what the pieces of a text, joined, are."""
        model = self.model
        if self._charsmap:  # what a user defined stays as it is
            parts = self._symbols(text)
            parts[::2] = map(self._charsmap.normalise, parts[::2])
            text = "".join(parts)
        if model.remove_extra_whitespaces:
            text = _SPACES.sub(" ", text.strip(" "))
        if not text:
            return ""
        if model.add_dummy_prefix:
            text = text + " " if model.space_after else " " + text
        if not model.escape_whitespaces:
            return text
        text = text.replace(" ", SPACE)
        if model.remove_extra_whitespaces and not model.space_after:
            return text.rstrip(SPACE)
        return text


class _Unigram:
    """The cut with the highest sum of scores, as sentencepiece adds them up: in 32 bits.

    In a row of equal characters many cuts are equally good, and rounding decides between them.
    """

    def __init__(self, model: SentencePieceModel) -> None:
        normal = [s for s, t in zip(model.scores, model.types, strict=True) if t == NORMAL]
        self.unknown = model.unk_id
        self.unknown_score = array("f", [min(normal, default=0.0) - UNKNOWN_PENALTY])[0]
        self.scores = list(model.scores)
        # Every piece and every beginning of one: its id, or -1.
        self.beginnings: dict[str, int] = {}
        self.bytes: dict[int, int] = {}
        for number, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True)):
            if kind == BYTE:
                self.bytes[int(piece[3:5], 16)] = number
            elif kind in (NORMAL, USER_DEFINED):
                for end in range(1, len(piece)):
                    self.beginnings.setdefault(piece[:end], -1)
                self.beginnings[piece] = number
            if kind == USER_DEFINED:  # always preferred, the longest above all
                self.scores[number] = array("f", [0.1 * (len(piece.encode()) - 1)])[0]

    def cut(self, text: str) -> list[Placed]:
        size = len(text)
        best = array("f", bytes(4 * (size + 1)))
        rounded = array("f", [0.0])  # what is stored here comes back with 32 bits
        came_from, ids = [-1] * (size + 1), [self.unknown] * (size + 1)
        frontier = 0
        for start in range(size):
            if abs(best[start]) > FARTHEST:  # sums begin anew before they lose digits
                offset = best[start]
                for i in range(start, frontier + 1):
                    if i == start or came_from[i] >= 0:
                        best[i] -= offset
            here, single = best[start], False
            end = start
            while end < size:
                end += 1
                number = self.beginnings.get(text[start:end])
                if number is None:
                    break
                if number < 0:
                    continue
                single = single or end == start + 1
                frontier = max(frontier, end)
                rounded[0] = self.scores[number] + here
                if came_from[end] < 0 or rounded[0] > best[end]:
                    best[end], came_from[end], ids[end] = rounded[0], start, number
            if not single:
                rounded[0] = self.unknown_score + here
                end = start + 1
                frontier = max(frontier, end)
                if came_from[end] < 0 or rounded[0] > best[end]:
                    best[end], came_from[end], ids[end] = rounded[0], start, self.unknown
        return self._path(text, came_from, ids)

    def _path(self, text: str, came_from: list[int], ids: list[int]) -> list[Placed]:
        """The ids of the best cut; what is unknown is spelt in bytes, or one id for each run."""
        found: list[Placed] = []  # from the end
        end = len(text)
        while end:
            start, number = came_from[end], ids[end]
            if number == self.unknown and self.bytes:
                data = text[start:end].encode()
                found += [(self.bytes.get(byte, number), start, end) for byte in reversed(data)]
            elif number == self.unknown and found and found[-1][0] == number:
                found[-1] = (number, start, found[-1][2])
            else:
                found.append((number, start, end))
            end = start
        return found[::-1]


def _merges_spec(model: SentencePieceModel) -> Spec:
    """A specification that cuts what `SentencePiece.prepare` returns into the pieces of a BPE."""
    names = [
        f"\0{number}\0" if kind in (CONTROL, UNKNOWN, UNUSED) else piece  # found in no text
        for number, (piece, kind) in enumerate(zip(model.pieces, model.types, strict=True))
    ]
    spec = sentencepiece_spec(names, model.scores, model.types, kind="bpe")
    added = [token for token in spec["added_tokens"] if token["content"][0] != "\0"]
    return {**spec, "normalizer": None, "pre_tokenizer": None, "added_tokens": added}
