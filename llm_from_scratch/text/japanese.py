"""Japanese BERT: MeCab finds the words, then WordPiece, characters or SentencePiece cut them.

The class is `BertJapaneseTokenizer`. Its vocabulary is a `vocab.txt` (or `spiece.model`), and what
comes before it stands in `tokenizer_config.json`.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.backend import Placed, run_backend, run_with_places
from llm_from_scratch.text.checks import Config, Spec
from llm_from_scratch.text.classes import BERT, add_special, plain_pieces
from llm_from_scratch.text.formats import added_token
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.mecab import MeCab
from llm_from_scratch.text.sentencepiece import SentencePiece
from llm_from_scratch.text.sentencepiece_model import parse_sentencepiece, sentencepiece_bytes
from llm_from_scratch.text.sentencepiece_spec import SPACE
from llm_from_scratch.text.wordpiece_spec import (
    CONTINUES,
    read_vocab_txt,
    wordpiece_spec,
    write_vocab_txt,
)

CLASS = "BertJapaneseTokenizer"
SUBWORDS = ("wordpiece", "character", "sentencepiece")


class JapaneseWords:
    """NFKC, MeCab, lower case if asked for: the words that a vocabulary then cuts."""

    name = CLASS

    def __init__(self, config: Config, where: object) -> None:
        options = _mecab_options(config, where)
        self.lower = bool(config.get("do_lower_case", False))
        self.normalise = bool(options.get("normalize_text", True))
        self.subwords = _one_of(config, "subword_tokenizer_type", SUBWORDS, "wordpiece", where)
        dictionary = str(options.get("mecab_dic", "unidic_lite"))
        self.state: dict[str, Any] = {
            "class": CLASS,
            "dictionary": dictionary,
            "lower": self.lower,
            "normalise": self.normalise,
            "subwords": self.subwords,
        }
        self.mecab = MeCab(dictionary)

    def words(self, text: str) -> list[str]:
        """The words of a text; for a character vocabulary each character is one."""
        if self.normalise:
            text = unicodedata.normalize("NFKC", text)
        words = self.mecab.words(text)
        if self.lower:
            words = [word.lower() for word in words]
        if self.subwords == "character":
            return [character for w in words for character in unicodedata.normalize("NFKC", w)]
        # MeCab leaves the rarer kinds of white space inside of words.
        return [part for word in words for part in word.split()]

    def encode(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        return run_backend(backend, [self.words(text) for text in texts], words=True)

    def cut(self, backend: tokenizers.Tokenizer, words: list[str]) -> list[list[Placed]]:
        """The tokens of each word, and where in the word they stand."""
        return run_with_places(backend, words)

    def files(self, tokens: list[str | None]) -> dict[str, bytes]:
        return {"vocab.txt": write_vocab_txt(tokens).encode()}

    def target(self) -> None:
        return None


class JapanesePieces(JapaneseWords):
    """The same words, each cut by SentencePiece."""

    def __init__(self, config: Config, data: bytes, where: Path) -> None:
        super().__init__(config, where.parent)
        self.data = data
        self.pieces = SentencePiece(parse_sentencepiece(data, where))
        self.ids = {piece: number for number, piece in enumerate(self.pieces.model.pieces)}

    def words(self, text: str) -> list[str]:
        return [word.replace("``", '"').replace("''", '"') for word in super().words(text)]

    def encode(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        rows = [self.words(text) for text in texts]
        words = sorted({word for row in rows for word in row})
        ids_of = dict(zip(words, self._ids(words), strict=True))
        return [[i for word in row for i in ids_of[word]] for row in rows]

    def cut(self, backend: tokenizers.Tokenizer, words: list[str]) -> list[list[Placed]]:
        # Pieces are of the word as SentencePiece normalises it: each stands for all of the word.
        found = zip(words, self._ids(words), strict=True)
        return [[(i, 0, len(word)) for i in ids] for word, ids in found]

    def _ids(self, words: list[str]) -> list[list[int]]:
        return [
            [j for i in ids for j in self._comma_apart(i)]
            for ids in self.pieces.encode_batch(words)
        ]

    def _comma_apart(self, number: int) -> list[int]:
        """A piece such as `▁5,` is cut again without its comma, a habit taken over from ALBERT."""
        piece = self.pieces.model.pieces[number]
        if not (len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()):
            return [number]
        (names,) = self.pieces.pieces_batch([piece[:-1].replace(SPACE, "")])
        if piece[0] != SPACE and names[0][0] == SPACE:
            names = names[1:] if names[0] == SPACE else [names[0][1:], *names[1:]]
        unknown = self.pieces.model.unk_id
        return [self.ids.get(name, unknown) for name in [*names, ","]]

    def files(self, tokens: list[str | None]) -> dict[str, bytes]:
        return {"spiece.model": self.data}


def read_japanese(folder: Path, config: Config) -> tuple[Spec, Config, JapaneseWords]:
    """Specification, completed config and front of a folder of the class."""
    where = folder / "tokenizer_config.json"
    config = {**BERT.config, "tokenizer_class": CLASS} | {
        key: value for key, value in config.items() if value is not None
    }
    _one_of(config, "word_tokenizer_type", ("mecab",), "basic", where)
    for name in ("do_word_tokenize", "do_subword_tokenize"):
        _one_of(config, name, (True,), True, where)
    front: JapaneseWords
    if config.get("subword_tokenizer_type") == "sentencepiece":
        path = folder / "spiece.model"
        front = JapanesePieces(config, sentencepiece_bytes(path), path)
        spec = plain_pieces(front.pieces.model, config)
        roles = ("unk", "sep", "pad", "cls", "mask")
        missing = [config[f"{role}_token"] for role in roles]
        new = [token for token in dict.fromkeys(missing) if token not in front.ids]
        count = len(front.ids)
        spec["added_tokens"] = [
            added_token(token, count + i, special=True) for i, token in enumerate(new)
        ]
    else:
        front = JapaneseWords(config, where)
        vocab = read_vocab_txt(folder / "vocab.txt")
        spec = _words_spec(vocab, front.subwords, config["unk_token"])
    add_special(spec, BERT, config)
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    names = {role: config[f"{role}_token"] for role in ("cls", "sep")}
    spec["post_processor"] = template(str(BERT.single), BERT.pair, names, ids, True)
    return spec, config, front


def _words_spec(vocab: dict[str, int], subwords: str, unknown: str) -> Spec:
    """A spec for words that come cut and normalised."""
    spec = wordpiece_spec(vocab, unknown=unknown)
    if subwords == "character":
        spec["model"] = {"type": "WordLevel", "vocab": dict(vocab), "unk_token": unknown}
    decoder = {"type": "WordPiece", "prefix": CONTINUES, "cleanup": False}
    return {**spec, "normalizer": None, "pre_tokenizer": None, "decoder": decoder}


def _one_of(config: Config, name: str, known: tuple[Any, ...], default: Any, where: object) -> Any:
    value = config.get(name, default)
    if value not in known:
        raise UserError(
            f"{where}: '{name}' is {value!r:.60}; what can be read is "
            f"{' or '.join(map(repr, known))}."
        )
    return value


def _mecab_options(config: Config, where: object) -> dict[str, Any]:
    options = config.get("mecab_kwargs") or {}
    known = {"mecab_dic", "mecab_option", "normalize_text"}
    if not isinstance(options, dict) or set(options) - known:
        raise UserError(f"{where}: 'mecab_kwargs' is {options!r:.80}; known are {sorted(known)}.")
    # Options may name files of any kind on this machine for MeCab to open.
    if options.get("mecab_option") or options.get("mecab_dic", "unidic_lite") is None:
        raise UserError(
            f"{where}: 'mecab_kwargs' names a dictionary of the machine that it was made on; what "
            "can be read are dictionaries that are packages (mecab_dic: unidic_lite)."
        )
    return options
