"""What some families do to a text that no `tokenizer.json` can express.

A `Tokenizer` hands text to the `tokenizers` package. Japanese BERTs cut it into words with MeCab
first (`japanese.py`); Marian runs SentencePiece and looks its pieces up in a table of its own
(`marian.py`). Each is a *front*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import tokenizers

from llm_from_scratch.text.checks import Spec
from llm_from_scratch.text.pretokenize import special_splitter


class Front(Protocol):
    """How text becomes ids where a specification does not say it.

    Attributes:
        name: the class of `transformers` that does the same.
        state: what decides the ids beside the specification.
    """

    name: str
    state: dict[str, Any]

    def encode(self, backend: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
        """The ids of texts in which there is no special token; `backend` runs the spec's model."""
        ...

    def files(self, tokens: list[str | None]) -> dict[str, bytes]:
        """The vocabulary as that class reads it: names of files and their content."""
        ...

    def target(self) -> tuple[Spec, Front] | None:
        """Where a translator has other rules for the language it writes: those."""
        ...


def run_front(
    front: Front, backend: tokenizers.Tokenizer, texts: list[str], added: Mapping[str, int]
) -> list[list[int]]:
    """The ids of texts: of the tokens `added` as they stand, of what lies between by the front."""
    split = special_splitter(list(added))
    rows = [split(text) for text in texts]
    found = iter(front.encode(backend, [part for row in rows for part in row[::2]]))
    return [
        [i for n, part in enumerate(row) for i in ([added[part]] if n % 2 else next(found))]
        for row in rows
    ]
