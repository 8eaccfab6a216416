"""The vocabulary and the merges of a specification, kept small until somebody asks for them.

As Python objects the quarter of a million tokens and half a million merges of a large vocabulary
take more memory than the weights of a small model. Here they are the JSON text that they came from:
the `tokenizers` package takes it as it is, and `json` makes the objects again.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError

BLOCK = 1 << 13  # entries that are turned into text at a time: no more than these are there twice


def unusable(reason: object, source: Path | str | None = None) -> UserError:
    """What is said of a specification that contradicts itself, perhaps with the file's name."""
    where = "" if source is None else f"{source}: "
    return UserError(f"{where}This tokenizer.json cannot be used: {reason}.")


class PackedModel:
    """The `model` of a specification.

    Attributes:
        rest: its fields but for the vocabulary and the merges.
        size: the entries of the vocabulary.
        top: the highest id in it; -1 where it is empty.
        unique: whether no two tokens have the same id.
        scored: whether the tokens have scores, as Unigram's do.
        merges: how many merges there are; None where the model has no list of them.

    Raises `UserError` where the entries of either have another type than theirs, or a merge makes
    what is not in the vocabulary.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        vocab, merges = model["vocab"], model.get("merges")
        self.merges = len(merges) if isinstance(merges, list) else None
        packed = ("vocab",) if self.merges is None else ("vocab", "merges")
        self.rest = {name: value for name, value in model.items() if name not in packed}
        self._order = list(model)
        self._scores: array[float] | None = None
        self._json: dict[str, bytes] = {}
        self.size, self.scored = len(vocab), isinstance(vocab, list)
        try:
            if isinstance(vocab, dict):
                ids = vocab.values()
                self.top, self.unique = max(ids, default=-1), len(set(ids)) == len(ids)
                self._json["vocab"] = b"{%s}" % b",".join(_blocks(vocab))
            else:
                self.top, self.unique = len(vocab) - 1, True
                self._pack_pieces(vocab)
            if isinstance(merges, list):
                if isinstance(vocab, dict):
                    check_merges(merges, vocab, bool(self.rest.get("continuing_subword_prefix")))
                self._json["merges"] = b"[%s]" % b",".join(_blocks(merges))
        except UserError:
            raise
        except (TypeError, ValueError, RecursionError) as error:
            raise unusable(error) from error

    def _pack_pieces(self, vocab: list[Any]) -> None:
        """Unigram: pairs of piece and score."""
        for entry in vocab:
            piece, score = entry
            if not isinstance(piece, str) or type(score) not in (int, float):
                raise ValueError(f"{[piece, score]!r:.60} is no piece with a score")
        unknown = self.rest.get("unk_id")
        if unknown is not None and not (isinstance(unknown, int) and 0 <= unknown < len(vocab)):
            raise ValueError(f"the unknown piece is number {unknown!r:.60} of {len(vocab)}")
        if all(type(score) is float for _, score in vocab):
            self._scores = array("d", (score for _, score in vocab))
            self._json["vocab"] = b"[%s]" % b",".join(_blocks([piece for piece, _ in vocab]))
        else:
            self._json["vocab"] = b"[%s]" % b",".join(_blocks(vocab))

    def vocab(self) -> Any:
        """A table of tokens and their ids, or (Unigram) a list of pieces and their scores."""
        found = json.loads(self._json["vocab"])
        if self._scores is None:
            return found
        return [[piece, score] for piece, score in zip(found, self._scores, strict=True)]

    def tokens(self) -> Iterator[tuple[str, int]]:
        """Every token of the vocabulary with its id."""
        found = json.loads(self._json["vocab"])
        if isinstance(found, dict):
            yield from found.items()
        else:
            for number, entry in enumerate(found):
                yield (entry if isinstance(entry, str) else entry[0]), number

    def pieces(self) -> list[tuple[str, float]]:
        """The pieces of a Unigram model and their scores."""
        if self._scores is not None:
            return list(zip(json.loads(self._json["vocab"]), self._scores, strict=True))
        return [(piece, float(score)) for piece, score in self.vocab()]

    def whole(self) -> dict[str, Any]:
        """The model as it was."""
        made: dict[str, Any] = {}
        for name in self._order:
            if name == "vocab":
                made[name] = self.vocab()
            else:
                made[name] = json.loads(self._json[name]) if name in self._json else self.rest[name]
        return made

    def text(self, rest: Mapping[str, Any]) -> bytes:
        """A `tokenizer.json` of this model; `rest` is the specification around it."""
        fields = {name: _text(value) for name, value in self.rest.items()} | self._json
        if self._scores is not None:
            fields["vocab"] = _text(self.vocab())
        parts = {name: _text(value) for name, value in rest.items()}
        parts["model"] = _table({name: fields[name] for name in self._order})
        return _table(parts)


def known_ids(added: Sequence[Mapping[str, Any]], vocab: Any) -> dict[str, int]:
    """Added tokens to which the `tokenizers` package is sure to give the ids that stand there.

    It goes by the vocabulary where that has the token, and else by its own count.
    """
    ids = {token["content"]: token["id"] for token in added}
    if "" in ids or len(ids) != len(added):
        return {}
    if isinstance(vocab, list):
        own = {piece: number for number, (piece, _) in enumerate(vocab) if piece in ids}
    else:
        own = {token: vocab[token] for token in ids if token in vocab}
    later = {token: number for token, number in ids.items() if token not in own}
    if list(later.values()) == list(range(len(vocab), len(vocab) + len(later))):
        own |= later
    return {token: number for token, number in own.items() if ids[token] == number}


def check_merges(merges: Sequence[Any], vocab: Mapping[str, int], prefix: bool = False) -> None:
    """Refuse what is no merge of two tokens into a third (where no `prefix` marks a second part).

    A merge is a pair, or a text of both with a space between.
    """
    for start in range(0, len(merges), BLOCK):
        block = merges[start : start + BLOCK]
        if prefix or not _all_fit(block, vocab):
            for merge in block:
                if isinstance(merge, str) and merge.startswith("#version"):  # of a merges.txt
                    continue
                pair = merge.split(" ") if isinstance(merge, str) else merge
                sound = isinstance(pair, list | tuple) and len(pair) == 2
                if not sound or not all(isinstance(part, str) for part in pair):
                    raise unusable(f"{merge!r:.60} is no merge of two tokens")
                if not {*pair, *(() if prefix else (pair[0] + pair[1],))} <= vocab.keys():
                    raise UserError(
                        f"The merge {' '.join(pair)!r:.60} does not fit the vocabulary: vocabulary "
                        "and merges must come from the same tokenizer."
                    )


def _all_fit(merges: Sequence[Any], vocab: Mapping[str, int]) -> bool:
    """Whether every merge makes a token; quickly, and False where this is not certain."""
    try:
        if isinstance(merges[0], str):
            text = "\n".join(merges)
            made: Iterable[str] = text.replace(" ", "").split("\n")
            pairs = text.count(" ") == len(merges)
        else:
            made = map("".join, merges)
            pairs = set(map(len, merges)) == {2} and {*map(type, merges)} <= {list, tuple}
        return pairs and all(map(vocab.__contains__, made))
    except TypeError:
        return False


def _blocks(entries: list[Any] | dict[str, int]) -> Iterator[bytes]:
    """The JSON text of a list or table without its brackets, some thousand entries at a time."""
    if isinstance(entries, dict):
        items = iter(entries.items())
        while block := dict(islice(items, BLOCK)):
            yield _text(block)[1:-1]
    else:
        for start in range(0, len(entries), BLOCK):
            yield _text(entries[start : start + BLOCK])[1:-1]


def _table(parts: Mapping[str, bytes]) -> bytes:
    return b"{%s}" % b",".join(b"%s:%s" % (_text(name), text) for name, text in parts.items())


def _text(value: Any) -> bytes:
    """`value` as JSON. Half a character, which JSON can spell, is refused as no text."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
