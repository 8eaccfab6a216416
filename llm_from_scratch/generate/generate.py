"""Text in, text out: what `scratchlm generate`, `llm.generate` and the training samples call.

`stream` is the one path: it runs `tokens.Generation` and turns every row's tokens into text as
they come, never half a character and never a piece of a stop string.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.tokens import Generation, NewToken, Writer, generate_tokens
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.inputs import put_around
from llm_from_scratch.text.stream import StreamDecoder
from llm_from_scratch.text.tokenizer import Tokenizer

__all__ = [
    "Piece",
    "Result",
    "SamplingSettings",
    "complete",
    "encode_for",
    "encode_prompt",
    "encode_source",
    "generate",
    "generate_tokens",
    "make_settings",
    "stream",
]


@dataclass(frozen=True)
class Result:
    """A finished continuation.

    `tokens` are the new ids without the end token; where a stop string cut the text they reach
    behind it. `finish_reason` is "stop" (an end token), "stop_string" or "length".
    `tokens_per_second` counts new tokens over the whole time, the reading of the prompt included;
    rows of a batch share that time.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    seconds: float
    seconds_to_first_token: float
    tokens_per_second: float


@dataclass(frozen=True)
class Piece:
    """More text for one row; `result` comes with its last piece, whose text may be empty."""

    row: int
    text: str
    result: Result | None = None


class StopBuffer:
    """Text on its way out, held back as long as it could still become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = tuple(stop)
        self.held = ""
        self.stopped = False

    def push(self, text: str, *, last: bool = False) -> str:
        """What may be shown now that `text` has come; with `last`, everything that is left."""
        if self.stopped:
            return ""
        self.held += text
        found = [place for stop in self.stop if (place := self.held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self.held = self.held[: min(found)], ""
            return shown
        keep = 0 if last else self._unsure()
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def _unsure(self) -> int:
        """The length of the longest end of the text with which some stop string begins."""
        longest = max((len(stop) for stop in self.stop), default=1) - 1
        for size in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-size:]) for stop in self.stop):
                return size
        return 0


class _Row:
    """One prompt's text as it grows."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        beginning: Sequence[int],
        settings: SamplingSettings,
        stop_ids: Collection[int],
    ) -> None:
        self.prompt_tokens = len(prompt)
        self.stop_ids = stop_ids
        self.tokens: list[int] = []
        self.text = ""
        self.began = 0.0
        self.first: float | None = None
        self.decoder = StreamDecoder(tokenizer, skip_special=True)
        self.buffer = StopBuffer(settings.stop)
        # Some vocabularies drop the space in front of a text's first token. The continuation is
        # no first token, so the decoder is shown where it continues from.
        if tokenizer.bytes_rule.exact and beginning[-1] not in self.decoder.hidden:
            self.decoder.push(beginning[-1])

    def push(self, new: NewToken) -> Piece:
        """Take in one token; the piece has a result where the row ends with it."""
        if self.first is None:
            self.first = time.perf_counter() - self.began
        text = ""
        if new.token not in self.stop_ids:
            self.tokens.append(new.token)
            text = self.buffer.push(self.decoder.push(new.token))
        reason = new.finish_reason
        if reason is not None:
            text += self.buffer.push(self.decoder.flush(), last=True)
        if self.buffer.stopped:
            reason = "stop_string"
        self.text += text
        return Piece(new.row, text, None if reason is None else self._result(reason))

    def _result(self, reason: str) -> Result:
        seconds = time.perf_counter() - self.began
        return Result(
            text=self.text,
            tokens=self.tokens,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            seconds=seconds,
            seconds_to_first_token=self.first or seconds,
            tokens_per_second=len(self.tokens) / seconds if seconds > 0 else 0.0,
        )


def make_settings(**settings: Any) -> SamplingSettings:
    """`SamplingSettings` from keyword arguments; an unknown one is named, with the nearest."""
    known = [field.name for field in dataclasses.fields(SamplingSettings)]
    for name in settings:
        if name not in known:
            raise UserError(
                f"'{name}' is no sampling setting; there are {', '.join(known)}."
                + nearest(name, known)
            )
    return SamplingSettings(**settings)


def wants_bos(tokenizer: Tokenizer) -> bool:
    """Whether texts of this tokenizer begin with its bos token (as its model was trained)."""
    return put_around(tokenizer)[0]


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids to start from. Text is a user's text: control tokens in it stay ordinary text.

    The bos token is put in front where the tokenizer asks for it. An empty prompt is the beginning
    of a document: bos, or the eos token that ended the document before.
    """
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    ids = tokenizer.encode(prompt)
    if wants_bos(tokenizer) and tokenizer.bos_id is not None:
        return [tokenizer.bos_id, *ids]
    if ids:
        return ids
    for start in (tokenizer.bos_id, tokenizer.eos_id):
        if start is not None:
            return [start]
    raise UserError(
        "The prompt is empty and this tokenizer has no token that begins a text; give at least "
        "one character."
    )


def encode_source(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids that an encoder reads: a text with the special tokens that belong around it."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    return tokenizer.encode_inputs([prompt]).ids[0]


def encode_for(model: Writer, tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids of a prompt: the beginning for a decoder, the source for an encoder-decoder."""
    encode = encode_source if isinstance(model, EncoderDecoder) else encode_prompt
    return encode(tokenizer, prompt)


def stream(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
) -> Generator[Piece, None, None]:
    """Continue prompts (token ids) together and yield text as soon as it is certain.

    An encoder-decoder takes them as sources and writes their targets. Prompts are checked before
    the first piece is asked for. The generator may be closed early.
    """
    generation = Generation(model, prompts, settings, tokenizer.stop_ids)
    written = tokenizer.target if isinstance(model, EncoderDecoder) else tokenizer
    rows = [
        _Row(written, prompt, beginning, settings, generation.stop_ids)
        for prompt, beginning in zip(prompts, generation.beginnings, strict=True)
    ]

    def pieces() -> Generator[Piece, None, None]:
        for row in rows:
            row.began = time.perf_counter()
        while generation.rows:
            for new in generation.step():
                piece = rows[new.row].push(new)
                if piece.result is not None:
                    generation.drop([new.row])
                if piece.text or piece.result is not None:
                    yield piece

    return pieces()


def complete(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    **settings: Any,
) -> list[Result]:
    """Continue several prompts (texts or token ids) as one batch; results in their order.

    An encoder-decoder reads each prompt as a source and writes its target. Takes the fields of
    `SamplingSettings`. Prompt number i (from 0) is seeded with `seed` + i.
    """
    ids = [encode_for(model, tokenizer, prompt) for prompt in prompts]
    done: dict[int, Result] = {}
    for piece in stream(model, tokenizer, ids, make_settings(**settings)):
        if piece.result is not None:
            done[piece.row] = piece.result
    return [done[row] for row in range(len(ids))]


def generate(
    model: Writer, tokenizer: Tokenizer, prompt: str | Sequence[int], **settings: Any
) -> Iterator[str]:
    """The continuation of a prompt, piece by piece, without the prompt itself.

    An encoder-decoder reads the prompt as a source and writes its target.

    >>> for piece in generate(model, tokenizer, "Once upon a time", temperature=0.8, seed=1):
    ...     print(piece, end="")

    Takes the fields of `SamplingSettings`; wrong ones raise `UserError` here, not at the first
    piece.
    """
    ids = encode_for(model, tokenizer, prompt)
    pieces = stream(model, tokenizer, [ids], make_settings(**settings))
    return (piece.text for piece in pieces if piece.text)
