"""Japanese words by MeCab, the morphological analyser that most Japanese BERTs were trained behind.

Japanese has no spaces; MeCab finds the cheapest path through all words of a dictionary that could
stand in a text (a Viterbi search with connection costs; Kudo et al. 2004). It comes with the
packages `fugashi` (the program) and `unidic-lite` (a dictionary), the extra `ja`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest

DICTIONARIES = ("unidic_lite", "unidic", "ipadic")
INSTALL = "pip install 'scratchlm[ja]'"
# MeCab keeps every candidate of a text in memory, and breaks down beyond half a million characters.
MOST = 100_000


class MeCab:
    """Cuts text into words; white space between them is dropped.

    Raises `UserError` where a package is missing; the message has the line that installs it.
    """

    def __init__(self, dictionary: str = "unidic_lite") -> None:
        if dictionary not in DICTIONARIES:
            raise UserError(
                f"The MeCab dictionary '{dictionary}' is not known: known are "
                f"{', '.join(DICTIONARIES)}.{nearest(dictionary, DICTIONARIES)}"
            )
        fugashi = _package("fugashi", INSTALL)
        install = INSTALL if dictionary == "unidic_lite" else f"pip install {dictionary}"
        folder = Path(_package(dictionary, install).DICDIR)
        if not folder.is_dir():  # `unidic` fetches its dictionary in a second step
            raise UserError(
                f"The package '{dictionary}' has no dictionary yet: run python -m {dictionary} "
                "download."
            )
        try:
            self._tagger: Any = fugashi.GenericTagger(f'-d "{folder}" -r "{folder / "mecabrc"}"')
        except RuntimeError as error:
            raise UserError(
                f"MeCab cannot open the dictionary '{dictionary}' in {folder}: install it again "
                f"({install})."
            ) from error

    def words(self, text: str) -> list[str]:
        """The words of `text`, in order."""
        return [str(word.surface) for part in _parts(text) for word in self._tagger(part)]


def _package(name: str, install: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"This tokenizer cuts Japanese with MeCab, for which the package '{name}' is missing: "
            f"{install}"
        ) from error


def _parts(text: str) -> Iterator[str]:
    """`text`, if it is very long, in parts that end at line ends where there are some."""
    start = 0
    while len(text) - start > MOST:
        end = text.rfind("\n", start, start + MOST) + 1 or start + MOST
        yield text[start:end]
        start = end
    yield text[start:]
