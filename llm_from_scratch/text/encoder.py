"""Encoding in plain Python, to read: the ids of `Tokenizer.encode`, step by step.

Text is cut at added tokens; each stretch between them is normalised and cut into words; each word
becomes tokens: by replaying merges on its bytes, by the most probable cut (Unigram), or the longest
piece first (WordPiece). This reads the vocabularies that this course trains: byte-level BPE,
Unigram, WordPiece and characters.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Container
from functools import partial
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
from llm_from_scratch.text.unigram import UNKNOWN_PENALTY, viterbi
from llm_from_scratch.text.unigram_spec import BYTES
from llm_from_scratch.text.wordpiece import LONGEST_WORD, normalize, words_of
from llm_from_scratch.text.wordpiece import encode_word as encode_wordpiece

Cut = Callable[[str], list[str]]  # a stretch of text to the words in it
Change = Callable[[str], str]
WordEncoder = Callable[[str], list[int]]


class ReadableEncoder:
    """Encodes as `spec` (the content of a `tokenizer.json`) says."""

    def __init__(self, spec: Spec) -> None:
        self.encode_word = _word_encoder(spec)
        self.added = {token["content"]: token for token in spec.get("added_tokens", [])}
        self.change = _change(spec.get("normalizer"))
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
        words = [self.change(text)]
        for cut in self.cuts:
            words = [piece for word in words for piece in cut(word)]
        ids: list[int] = []
        for word in words:
            if word not in self.known:
                self.known[word] = self.encode_word(word)
            ids += self.known[word]
        return ids


# ------------------------------------------------------------------------- words to ids


def _word_encoder(spec: Spec) -> WordEncoder:
    model = spec["model"]
    special = {token["content"] for token in spec.get("added_tokens", []) if token["special"]}
    if model.get("type") == "Unigram":
        return _unigram(model, special)
    if model.get("type") == "WordPiece":
        return _wordpiece(model, special)
    if "merges" in model and is_byte_level(spec):
        return _byte_pairs(model)
    if "merges" in model and not model["merges"]:
        return _characters(model)
    raise UserError(
        "The readable encoder knows byte-level BPE, Unigram, WordPiece and characters only: use "
        "Tokenizer for this vocabulary."
    )


def _byte_pairs(model: dict[str, Any]) -> WordEncoder:
    vocab: dict[str, int] = model["vocab"]
    pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
    ranks: dict[Merge, int] = {}
    for left, right in pairs:
        ranks[from_letters(left), from_letters(right)] = len(ranks)

    def encode(word: str) -> list[int]:
        data = word.encode()
        if model.get("ignore_merges") and (letters := to_letters(data)) in vocab:
            return [vocab[letters]]
        return [vocab[to_letters(token)] for token in encode_word(data, ranks)]

    return encode


def _characters(model: dict[str, Any]) -> WordEncoder:
    """A character vocabulary has nothing to merge."""
    vocab: dict[str, int] = model["vocab"]
    token = model.get("unk_token")
    unknown = [] if token is None else [vocab[token]]
    return lambda word: [i for c in word for i in ([vocab[c]] if c in vocab else unknown)]


def _unigram(model: dict[str, Any], special: Container[str]) -> WordEncoder:
    entries = list(enumerate(model["vocab"]))
    unknown = min(score for _, (_, score) in entries) - UNKNOWN_PENALTY
    # Special tokens stand in the vocabulary, but ordinary text never becomes one.
    number = model.get("unk_id")
    entries = [(i, e) for i, e in entries if e[0] not in special or i == number]
    scores = {piece: float(score) for _, (piece, score) in entries}
    ids = {piece: i for i, (piece, _) in entries}
    longest = max(map(len, scores))
    by_bytes = model.get("byte_fallback") and all(name in ids for name in BYTES)
    best = partial(
        viterbi,
        scores=scores,
        longest=longest,
        unknown=unknown,
        unknown_piece="" if number is None else model["vocab"][number][0],
    )

    def encode(word: str) -> list[int]:
        found: list[int] = []
        for piece in best(word):
            if piece in ids:
                found.append(ids[piece])
            elif by_bytes:
                found += [ids[BYTES[byte]] for byte in piece.encode()]
            else:
                found += [] if number is None else [number]
        return found

    return encode


def _wordpiece(model: dict[str, Any], special: Container[str]) -> WordEncoder:
    name = model["unk_token"]
    vocab = {t: i for t, i in model["vocab"].items() if t not in special or t == name}
    longest = model.get("max_input_chars_per_word", LONGEST_WORD)
    unknown = [vocab[name]]

    def encode(word: str) -> list[int]:
        pieces = encode_wordpiece(word, vocab, longest)
        return unknown if pieces is None else [vocab[piece] for piece in pieces]

    return encode


# ------------------------------------------------------------------------- text to words


def _change(normalizer: dict[str, Any] | None) -> Change:
    if normalizer is None:
        return lambda text: text
    kind = normalizer["type"]
    if kind in ("NFC", "NFD", "NFKC", "NFKD"):
        return partial(unicodedata.normalize, kind)
    if kind == "BertNormalizer":
        return partial(
            normalize,
            clean=normalizer.get("clean_text", True),
            chinese_apart=normalizer.get("handle_chinese_chars", True),
            strip_accents=normalizer.get("strip_accents"),
            lowercase=normalizer.get("lowercase", True),
        )
    raise UserError(
        f"The readable encoder does not know the normalizer {kind}: use Tokenizer for this "
        "vocabulary."
    )


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
    if pre_tokenizer["type"] == "BertPreTokenizer":
        return [words_of]
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
