"""Encoding in plain Python, to read: the ids of `Tokenizer.encode`, step by step.

Text is cut at added tokens; each stretch between them is normalised and cut into words; each word
becomes bytes, and the merges are replayed on it. This reads byte-level BPE and character
vocabularies, which is what the models of this course use.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable
from typing import Any

import regex

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.bpe import Merge, encode_word
from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.formats import is_byte_level
from llm_from_scratch.text.pretokenize import (
    GPT2_PATTERN,
    from_letters,
    special_splitter,
    split_words,
    to_letters,
)
from llm_from_scratch.text.tokenizer import without_surrogates

Cut = Callable[[str], list[str]]  # a stretch of text to the words in it


class ReadableEncoder:
    """Encodes as `spec` (the content of a `tokenizer.json`) says."""

    def __init__(self, spec: Spec) -> None:
        model = spec["model"]
        self.byte_level = is_byte_level(spec)
        if "merges" not in model or not (self.byte_level or not model["merges"]):
            raise UserError(
                "The readable encoder knows byte-level BPE and characters only: use Tokenizer "
                "for this vocabulary."
            )
        self.vocab: dict[str, int] = model["vocab"]
        self.unknown: str | None = model.get("unk_token")
        self.whole_words = bool(model.get("ignore_merges"))
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        self.ranks: dict[Merge, int] = {}
        for left, right in pairs:
            self.ranks[from_letters(left), from_letters(right)] = len(self.ranks)
        self.added = {token["content"]: token for token in spec.get("added_tokens", [])}
        self.normal_form = _normal_form(spec.get("normalizer"))
        self.cuts = _cuts(spec.get("pre_tokenizer"))
        self.known: dict[str, list[int]] = {}  # words met before

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """The ids of `text`; special tokens in it are found only with `special=True`."""
        text = without_surrogates(text)
        found = [t for t, entry in self.added.items() if special or not entry["special"]]
        ids: list[int] = []
        for i, part in enumerate(special_splitter(found)(text)):
            if i % 2:
                ids.append(self.added[part]["id"])
            elif part:
                ids += self._encode_plain(part)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self.normal_form:
            text = unicodedata.normalize(self.normal_form, text)
        words = [text]
        for cut in self.cuts:
            words = [piece for word in words for piece in cut(word)]
        ids: list[int] = []
        for word in words:
            if word not in self.known:
                self.known[word] = self._encode_word(word) if self.byte_level else self._spell(word)
            ids += self.known[word]
        return ids

    def _encode_word(self, word: str) -> list[int]:
        data = word.encode()
        if self.whole_words and (letters := to_letters(data)) in self.vocab:
            return [self.vocab[letters]]
        return [self.vocab[to_letters(token)] for token in encode_word(data, self.ranks)]

    def _spell(self, word: str) -> list[int]:
        """A character vocabulary has nothing to merge."""
        unknown = [] if self.unknown is None else [self.vocab[self.unknown]]
        return [i for c in word for i in ([self.vocab[c]] if c in self.vocab else unknown)]


def _normal_form(normalizer: dict[str, Any] | None) -> Any:
    if normalizer is None:
        return None
    if normalizer["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
        raise UserError(
            f"The readable encoder does not know the normalizer {normalizer['type']}: use "
            "Tokenizer for this vocabulary."
        )
    return normalizer["type"]


def _cuts(pre_tokenizer: dict[str, Any] | None) -> list[Cut]:
    """The steps that cut text into words, in order."""
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [cut for part in pre_tokenizer["pretokenizers"] for cut in _cuts(part)]
    if pre_tokenizer["type"] == "ByteLevel":
        # Bytes come later, word by word; here it is a pattern and perhaps a leading space.
        cuts: list[Cut] = []
        if pre_tokenizer["add_prefix_space"]:
            cuts.append(lambda text: [text if text.startswith(" ") else " " + text])
        if pre_tokenizer.get("use_regex", True):
            cuts.append(lambda text: split_words(text, GPT2_PATTERN))
        return cuts
    if pre_tokenizer["type"] == "Digits" and pre_tokenizer["individual_digits"]:
        return [lambda text: split_words(text, r"\p{N}")]
    if pre_tokenizer["type"] == "Split" and pre_tokenizer["behavior"] == "Isolated":
        pattern = pre_tokenizer["pattern"]
        expression = pattern.get("Regex") or regex.escape(pattern["String"])
        return [lambda text: split_words(text, expression)]
    raise UserError(
        f"The readable encoder does not know the pre-tokenizer {pre_tokenizer['type']}: use "
        "Tokenizer for this vocabulary."
    )


def explain_word(word: str, ranks: dict[Merge, int]) -> list[list[bytes]]:
    """Every stage of encoding one word, from its bytes to its tokens: for a picture of BPE."""
    stages: list[list[bytes]] = []
    limit = -1
    while True:
        allowed = {pair: rank for pair, rank in ranks.items() if rank <= limit}
        stage = encode_word(word.encode(), allowed)
        if not stages or stage != stages[-1]:
            stages.append(stage)
        pairs = [ranks[p] for p in itertools.pairwise(stage) if p in ranks]
        higher = [rank for rank in pairs if rank > limit]
        if not higher:
            return stages
        limit = min(higher)
