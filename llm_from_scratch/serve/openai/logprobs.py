"""Log-probabilities in the protocol's two forms: that of chats, and that of completions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llm_from_scratch.generate.chat import token_text
from llm_from_scratch.generate.sampling import TokenLogprobs
from llm_from_scratch.text.tokenizer import Tokenizer

LEAST = -9999.0  # in the place of minus infinity, which JSON does not have


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LEAST


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; where a vocabulary does not say, those of its text."""
    if tokenizer.bytes_rule.exact:
        return tokenizer.token_bytes(token)
    return token_text(tokenizer, token).encode()


def chat_entries(
    tokenizer: Tokenizer, found: Sequence[TokenLogprobs], with_ids: bool
) -> list[dict[str, Any]]:
    """The entries of `logprobs.content`: each token with the likeliest in its place."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "token": token_text(tokenizer, token),
            "logprob": finite(logprob),
            "bytes": list(token_bytes(tokenizer, token)),
        }
        return {**shown, "token_id": token} if with_ids else shown

    return [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*pair) for pair in one.top]}
        for one in found
    ]


def name_of(tokenizer: Tokenizer, token: int) -> str:
    """A token in the form of completions: its text, or "bytes:\\xe3" where it is none."""
    data = token_bytes(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Offsets:
    """Where in a text each token begins, counted in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._place = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def begin(self, prompt: Sequence[int], length: int) -> None:
        """Start with a prompt of `length` characters. What its tokens have beyond these, such as a
        bos token, stands in front and counts nothing."""
        data = b"".join(token_bytes(self.tokenizer, token) for token in prompt)
        # A character that the prompt only begins counts when it is complete.
        whole = codecs.getincrementaldecoder("utf-8")("replace").decode(data)
        self._place = length - len(whole)

    def push(self, token: int) -> int:
        """The place of the next token: where it begins, or the character that it goes on with."""
        data = token_bytes(self.tokenizer, token)
        place = self._place
        self._place += len(self._utf8.decode(data))
        with suppress(UnicodeDecodeError):  # a whole text: pieces of characters stay in front
            place = self._place - len(data.decode())
        return max(place, 0)


def completion_logprobs(
    tokenizer: Tokenizer,
    found: Sequence[TokenLogprobs | int],
    offsets: Offsets,
    k: int,
    with_ids: bool,
) -> dict[str, Any]:
    """The `logprobs` of a completion.

    An entry that is a bare token id has no log-probability: the first token of a prompt.
    """
    logprobs: dict[str, Any] = {
        "tokens": [], "token_logprobs": [], "top_logprobs": [] if k else None, "text_offset": [],
    }  # fmt: skip
    for one in found:
        token = one if isinstance(one, int) else one.token
        logprobs["tokens"].append(name_of(tokenizer, token))
        logprobs["text_offset"].append(offsets.push(token))
        if isinstance(one, int):
            logprobs["token_logprobs"].append(None)
            if k:
                logprobs["top_logprobs"].append(None)
            continue
        logprobs["token_logprobs"].append(finite(one.logprob))
        if k:
            top = {name_of(tokenizer, token): finite(value) for token, value in one.top}
            top.setdefault(name_of(tokenizer, token), finite(one.logprob))
            logprobs["top_logprobs"].append(top)
    if with_ids:
        heard = [one for one in found if not isinstance(one, int)]
        logprobs["content"] = chat_entries(tokenizer, heard, True)
    return logprobs
