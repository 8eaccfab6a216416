"""Marian (opus-mt): SentencePiece for each language, and one table of ids for both.

The class is `MarianTokenizer`; its files are `source.spm`, `target.spm` and `vocab.json`. The order
of the pieces in the models means nothing: ids are the table's. A text may begin with the language
to translate into, such as `>>jpn<<`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tokenizers

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.text.checks import REMEDY, Config, Spec, check_ids
from llm_from_scratch.text.classes import TokenizerClass, add_special
from llm_from_scratch.text.inputs import template
from llm_from_scratch.text.sentencepiece import SentencePiece
from llm_from_scratch.text.sentencepiece_model import parse_sentencepiece, sentencepiece_bytes
from llm_from_scratch.text.sentencepiece_spec import SPACE

CLASS = "MarianTokenizer"
FILES = ("source.spm", "target.spm", "vocab.json")
ROLES = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
Model = tuple[Path, bytes]  # a .spm file


class Marian:
    """One language of a pair: its SentencePiece model and the table of ids.

    `others` has the model and the table of the other language, which may be the same table.
    """

    name = CLASS

    def __init__(
        self, model: Model, vocab: dict[str, int], config: Config, others: tuple[Model, Any]
    ) -> None:
        self.model, self.vocab, self.config, self.others = model, vocab, config, others
        self.pieces = SentencePiece(parse_sentencepiece(model[1], model[0]))
        self.unknown = vocab[config["unk_token"]]
        self.state = {"class": CLASS, "model": hashlib.sha256(model[1]).hexdigest()}

    def encode(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        languages, rest = [], []
        for text in texts:
            end = text.find("<<") + 2 if text.startswith(">>") and "<<" in text else 0
            languages.append([self.vocab.get(text[:end], self.unknown)] if end else [])
            rest.append(text[end:])
        # The table may know what the model does not: it has the other language's characters.
        found = self.pieces.pieces_batch(rest)
        return [
            before + [self.vocab.get(piece, self.unknown) for piece in row]
            for before, row in zip(languages, found, strict=True)
        ]

    def files(self, tokens: list[str | None]) -> dict[str, bytes]:
        (_, other), table = self.others
        files = {"source.spm": self.model[1], "target.spm": other, "vocab.json": _json(self.vocab)}
        if table is not self.vocab:
            files["target_vocab.json"] = _json(table)
        return files

    def target(self) -> tuple[Spec, Marian]:
        model, vocab = self.others
        front = Marian(model, vocab, self.config, (self.model, self.vocab))
        return front.spec(), front

    def spec(self) -> Spec:
        """The table as the tokens of a Unigram model, for all but the way from text to ids."""
        scores = dict(zip(self.pieces.model.pieces, self.pieces.model.scores, strict=True))
        tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always"}
        spec: Spec = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {**step, "split": True},
            "post_processor": None,
            "decoder": {**step, "split": True},
            "model": {
                "type": "Unigram",
                "unk_id": self.unknown,
                "vocab": [[token, scores.get(token, 0.0)] for token in tokens],
                "byte_fallback": False,
            },
        }
        add_special(spec, TokenizerClass("pieces", lambda files, config: spec), self.config)
        end = {"eos": self.config["eos_token"]}
        spec["post_processor"] = template("A eos", "A B eos", end, self.vocab, False)
        return spec


def read_marian(folder: Path, config: Config) -> tuple[Spec, Config, Marian]:
    """Specification, completed config and front of a folder of the class."""
    config = {**ROLES, "tokenizer_class": CLASS} | {
        k: v for k, v in config.items() if v is not None
    }
    vocab = _read_table(folder / FILES[2], config)
    table = vocab
    if config.get("separate_vocabs"):
        table = _read_table(folder / "target_vocab.json", config)
    source, target = ((folder / name, sentencepiece_bytes(folder / name)) for name in FILES[:2])
    front = Marian(source, vocab, config, (target, table))
    return front.spec(), config, front


def _read_table(path: Path, config: Config) -> dict[str, int]:
    vocab = check_ids(read_json_object(path, REMEDY), path)
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(
            f"{path} must give the ids from 0 to {len(vocab) - 1}, once each; {REMEDY}."
        )
    if config["unk_token"] not in vocab:
        raise UserError(f"{path} has no token '{config['unk_token']}' for the unknown; {REMEDY}.")
    return vocab


def _json(table: dict[str, int]) -> bytes:
    return (json.dumps(table, ensure_ascii=False, indent=2) + "\n").encode()
