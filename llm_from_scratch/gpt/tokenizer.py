"""The simplest tokenizer there is: one number per character."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.formats import char_spec
from llm_from_scratch.text.tokenizer import Tokenizer


class SimpleTokenizer:
    """The sorted set of a text's characters, numbered from 0.

    Attributes: `vocab_size`, `char_to_idx` (character -> id), `idx_to_char` (id -> character).
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise UserError("The text is empty: give some text to learn the characters from.")
        characters = sorted(set(text))
        self.vocab_size = len(characters)
        self.char_to_idx = {character: i for i, character in enumerate(characters)}
        self.idx_to_char = dict(enumerate(characters))

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """The id of each character; one that is not in the vocabulary is a `UserError`."""
        try:
            return [self.char_to_idx[character] for character in text]
        except KeyError:
            place = next(i for i, c in enumerate(text) if c not in self.char_to_idx)
            raise UserError(
                f"The character {text[place]!r} (number {place + 1} of the text) is not in the "
                "vocabulary: leave it out, or make the tokenizer from a text that has it."
            ) from None

    def decode(self, tokens: Iterable[Any]) -> str:
        """The text of some ids: a list, a tensor, an array. An id without a character gives ""."""
        return "".join(self.idx_to_char.get(int(token), "") for token in tokens)

    def to_tokenizer(self) -> Tokenizer:
        """The same vocabulary, with the same ids, as the rest of the project takes it."""
        return Tokenizer.from_spec(char_spec(list(self.char_to_idx)))

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` into `folder`, as `transformers` reads it."""
        self.to_tokenizer().save(folder)

    @classmethod
    def load(cls, folder: Path | str) -> SimpleTokenizer:
        """Read what `save` wrote; a vocabulary that is not one of characters is a `UserError`."""
        tokenizer = Tokenizer.load(folder)
        tokens = [token for token in tokenizer.tokens if token is not None]
        if tokens != sorted(set("".join(tokens))):
            raise UserError(
                f"{folder} does not hold a plain character vocabulary: read it with "
                "llm_from_scratch.text.tokenizer.Tokenizer.load."
            )
        return cls("".join(tokens))
