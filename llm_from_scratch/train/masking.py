"""Which tokens an encoder must guess: BERT's game of hidden words (Devlin et al. 2019, 1810.04805).

Of a text's tokens a share is asked for. Of these four in five are hidden behind the mask token, one
in ten is replaced by any other token, and one in ten stays: since the model cannot know which of
the tokens that it sees are false, it must keep an opinion about all of them.

What is hidden in a text depends on (seed, number) alone: not on the batch, and not on what came
before, so that a resumed run hides the same words.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.text.tokenizer import Tokenizer

HIDDEN, REPLACED = 0.8, 0.1  # shares of the tokens that are asked for
LONGEST_WORD = 8  # tokens; where nothing is spaced, a "word" ends here


@dataclass(frozen=True)
class Masking:
    """The rules for one vocabulary.

    ordinary: (n,) the ids of which a false token is drawn; special: (v,) whether a token is never
    asked for; goes_on: (v,) whether a token is a later part of a word.
    """

    share: float
    whole_words: bool
    mask_id: int
    ordinary: npt.NDArray[np.int64]
    special: npt.NDArray[np.bool_]
    goes_on: npt.NDArray[np.bool_]

    def hide(self, ids: list[int], seed: int, number: int) -> tuple[list[int], list[int]]:
        """(what the model sees, what it must guess; -100 where nothing is asked).

        At least one token is asked for, unless all are special.
        """
        row = np.asarray(ids, np.int64)
        # Raw bits are promised to be the same in every version of numpy.
        bits = np.random.PCG64(np.random.SeedSequence([seed % 2**64, number]))
        draws = (bits.random_raw(3 * len(row)) >> np.uint64(11)).astype(np.float64) / 2.0**53
        order, fate, other = draws.reshape(3, len(row))
        asked = self._asked(row, order)
        hidden = asked & (fate < HIDDEN)
        replaced = asked & (fate >= HIDDEN) & (fate < HIDDEN + REPLACED)
        seen = np.where(hidden, self.mask_id, row)
        seen[replaced] = self.ordinary[(other[replaced] * len(self.ordinary)).astype(np.int64)]
        return seen.tolist(), np.where(asked, row, IGNORED).tolist()

    def _asked(
        self, row: npt.NDArray[np.int64], order: npt.NDArray[np.float64]
    ) -> npt.NDArray[np.bool_]:
        """The tokens, or all tokens of the words, that come first in a drawn order."""
        plain = np.flatnonzero(~self.special[row])
        asked = np.zeros(len(row), np.bool_)
        if not len(plain):
            return asked
        wanted = max(1, round(self.share * len(plain)))
        if not self.whole_words:
            asked[plain[np.argsort(order[plain], kind="stable")[:wanted]]] = True
            return asked
        words = self.words(row, plain)
        for place in np.argsort(order[[word[0] for word in words]], kind="stable"):
            count = int(asked.sum())
            # A word that leads too far over the mark is left out, unless it is the first.
            if count and count + len(words[place]) > wanted:
                continue
            asked[words[place]] = True
            if count + len(words[place]) >= wanted:
                break
        return asked

    def words(
        self, row: npt.NDArray[np.int64], plain: npt.NDArray[np.int64]
    ) -> list[npt.NDArray[np.int64]]:
        """The places in `plain` by words: a token that goes on belongs to the one before it."""
        found: list[list[int]] = []
        for place in plain.tolist():
            last = found[-1] if found else []
            near = bool(last) and last[-1] == place - 1 and len(last) < LONGEST_WORD
            if near and self.goes_on[row[place]]:
                last.append(place)
            else:
                found.append([place])
        return [np.asarray(word, np.int64) for word in found]


def masking_for(tokenizer: Tokenizer, share: float, whole_words: bool) -> Masking:
    """The rules for a tokenizer; `UserError` for one without a token to hide words behind."""
    if tokenizer.mask_id is None:
        raise UserError(
            "The model's tokenizer has no mask token, so nothing can be hidden; take an encoder "
            "such as BERT, or train a decoder on with scratchlm pretrain."
        )
    tokens = tokenizer.tokens
    special = np.zeros(len(tokens), np.bool_)
    special[[number for number in tokenizer.special_tokens.values() if number < len(tokens)]] = True
    special |= np.array([token is None for token in tokens])
    return Masking(
        share, whole_words, tokenizer.mask_id, np.flatnonzero(~special), special,
        np.array([goes_on(token or "", tokenizer.kind) for token in tokens]),
    )  # fmt: skip


def goes_on(token: str, kind: str) -> bool:
    """Whether a token of the vocabulary is a later part of a word.

    WordPiece says so (`##`). In the others a word begins with a space, written as a letter of its
    own, and whatever is neither letter nor digit stands alone.
    """
    if kind == "wordpiece":
        return token.startswith("##")
    return bool(token) and token[0] not in "Ġ▁ " and token[0].isalnum()
