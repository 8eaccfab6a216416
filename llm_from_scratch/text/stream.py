"""Text from tokens as they come, without ever showing half a character.

A byte-level token may end in the middle of a character: あ is three bytes and emoji are four, and
the bytes may come in different tokens. Decoding each token by itself would print `�`; here bytes
wait until their character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from llm_from_scratch.text.tokenizer import Tokenizer


class StreamDecoder:
    """`push` ids one at a time; what it returns, joined, is `tokenizer.decode` of them all.

    The last `flush` gives what is still waiting: nothing, unless the ids end inside a character.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False) -> None:
        self.tokenizer = tokenizer
        self.hidden = set(tokenizer.special_tokens.values()) if skip_special else set()
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next id begins a new text."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = self.tokenizer.bytes_rule.strip
        self._first = True
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a character is unfinished."""
        if token_id in self.hidden:
            return ""
        if not self.tokenizer.bytes_rule.exact:
            return self._difference(token_id)
        if self._first and self.tokenizer.bytes_rule.first_space:
            data = self.tokenizer.first_bytes(token_id)
        else:
            data = self.tokenizer.token_bytes(token_id)
        self._first = False
        while self._to_strip and data:
            if data[:1] == b" ":
                data = data[1:]
                self._to_strip -= 1
            else:
                self._to_strip = 0
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What was held back, with U+FFFD for bytes that are no text; ends the stream."""
        if self.tokenizer.bytes_rule.exact:
            rest = self._utf8.decode(b"", final=True)
        else:
            rest = self.tokenizer.decode(self._ids)[len(self._shown) :]
        self.reset()
        return rest

    def _difference(self, token_id: int) -> str:
        """For notations where a token's text depends on its neighbours: what decoding adds.

        The last word is held back, since a later token may still change it (WordPiece joins
        `do not` and `don 't` anew); what was shown is never taken back.
        """
        self._ids.append(token_id)
        text = self.tokenizer.decode(self._ids)
        safe = text[: max(text.rfind(" "), 0)]
        if not safe.startswith(self._shown):
            return ""
        new = safe[len(self._shown) :]
        self._shown = safe
        return new


def unsure_end(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of `text` with which one of the marks begins: what must be
    held back while it could still become that mark."""
    longest = max((len(mark) for mark in marks), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(mark.startswith(text[-size:]) for mark in marks):
            return size
    return 0
