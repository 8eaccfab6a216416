"""Text from the engine: many requests in tokens become many streams of text.

Every text's tokens turn into text as they come, never half a character and never a piece of a stop
string. A text that has met its stop string leaves the engine at once.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.constraint import make_constraint
from llm_from_scratch.generate.engine import Engine, requests_of
from llm_from_scratch.generate.requests import NewToken, Request, Writer
from llm_from_scratch.generate.sampling import SamplingSettings, TokenLogprobs
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.stream import StreamDecoder, unsure_end
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.tools import MARKS

LONGEST_CHARACTER = 4  # bytes of UTF-8, and so the most tokens that it can be made of


@dataclass(frozen=True)
class Result:
    """A finished continuation.

    `tokens` are the new ids without the end token; where a stop string cut the text they reach
    behind it. `finish_reason` is "stop" (an end token), "stop_string" or "length".
    `tokens_per_second` counts new tokens over the whole time, the reading of the prompt included;
    texts that are written together share that time. `choice` counts the texts of one prompt.
    `logprobs` has one entry for each of `tokens`, `prompt_logprobs` (with choice 0) one for each
    token of the prompt but the first; None where they were not asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    seconds: float
    seconds_to_first_token: float
    tokens_per_second: float
    choice: int = 0
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True)
class Piece:
    """More text for a request; `result` comes with its last piece, whose text may be empty.

    `row` is the number of the request or the place of the prompt, `choice` counts its texts.
    `tokens` (and their `logprobs`, where they were asked for) are those written since the piece
    before, also where their text is still held back: those of all pieces are the result's.
    `prompt_logprobs` comes with the first piece of the first text, where it was asked for.
    """

    row: int
    text: str
    result: Result | None = None
    choice: int = 0
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: list[TokenLogprobs] | None = None


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
        keep = 0 if last else unsure_end(self.held, self.stop)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown


class _Text:
    """One text as it grows. `before` are the tokens that stand in front of it, as far back as a
    character reaches."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        before: Sequence[int],
        stop_ids: Collection[int],
    ) -> None:
        settings = request.settings
        self.prompt_tokens = len(request.prompt)
        self.stop_ids = stop_ids
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if settings.logprobs is None else []
        self.prompt_logprobs: list[TokenLogprobs] | None = None
        self.text = ""
        self.began = time.perf_counter()
        self.first: float | None = None
        self.told = 0  # how many tokens went out with pieces
        self.told_prompt = False
        self.decoder = StreamDecoder(tokenizer, skip_special=True)
        # A call of a tool would not be seen without the control token with which it begins.
        self.decoder.hidden -= {tokenizer.special_tokens.get(mark) for mark in MARKS}
        self.buffer = StopBuffer(settings.stop)
        # Some vocabularies drop the space in front of a text's first token. The continuation is
        # no first token, and a prompt of ids may end inside a character, so the decoder is shown
        # where it continues from.
        if tokenizer.bytes_rule.exact and before[-1] not in self.decoder.hidden:
            for token in before:
                self.decoder.push(token)

    def push(self, new: NewToken) -> Piece | None:
        """Take in one token; what may be shown now, with a result where the text ends with it."""
        if self.first is None:
            self.first = time.perf_counter() - self.began
        self.prompt_logprobs = new.prompt_logprobs or self.prompt_logprobs
        text = ""
        if new.token not in self.stop_ids:
            self.tokens.append(new.token)
            if self.logprobs is not None and new.logprobs is not None:
                self.logprobs.append(new.logprobs)
            text = self.buffer.push(self.decoder.push(new.token))
        reason = new.finish_reason
        if reason is not None:
            text += self.buffer.push(self.decoder.flush(), last=True)
        if self.buffer.stopped:
            reason = "stop_string"
        self.text += text
        if reason is None:
            return self._piece(new, text, None) if text else None
        return self._piece(new, text, self._result(reason, new.choice))

    def cut(self, request: int, choice: int) -> Piece:
        """End the text here, with what it has."""
        text = self.buffer.push(self.decoder.flush(), last=True)
        self.text += text
        return self._piece(NewToken(request, choice, 0), text, self._result("length", choice))

    def _piece(self, new: NewToken, text: str, result: Result | None) -> Piece:
        piece = Piece(
            row=new.request,
            text=text,
            result=result,
            choice=new.choice,
            tokens=tuple(self.tokens[self.told :]),
            logprobs=tuple((self.logprobs or [])[self.told :]),
            prompt_logprobs=None if self.told_prompt else self.prompt_logprobs,
        )
        self.told, self.told_prompt = len(self.tokens), True
        return piece

    def _result(self, reason: str, choice: int) -> Result:
        seconds = time.perf_counter() - self.began
        return Result(
            text=self.text,
            tokens=self.tokens,
            finish_reason=reason,
            prompt_tokens=self.prompt_tokens,
            seconds=seconds,
            seconds_to_first_token=self.first or seconds,
            tokens_per_second=len(self.tokens) / seconds if seconds > 0 else 0.0,
            choice=choice,
            logprobs=self.logprobs,
            prompt_logprobs=self.prompt_logprobs,
        )


class TextEngine:
    """An `Engine` whose requests are answered in text.

    Prompts are token ids (`encode_for` in generate.py makes them). Takes what `Engine` takes.
    """

    def __init__(self, model: Writer, tokenizer: Tokenizer, **options: Any) -> None:
        self.engine = Engine(model, **options)
        self.tokenizer = tokenizer
        self.pair = model.config if isinstance(model, EncoderDecoder) else None
        self._texts: dict[int, dict[int, _Text]] = {}
        self._held: dict[int, list[Piece]] = {}  # what came while another stream was being read

    @property
    def busy(self) -> bool:
        """Whether anything is still to be written."""
        return self.engine.busy

    def submit(
        self,
        prompt: Sequence[int],
        settings: SamplingSettings,
        adapter: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> int:
        """Put a request into the queue; its number. Raises `UserError` for an impossible one.

        `adapter` as in `Request`; `tokenizer` is the adapter's own, where it has one: texts may end
        at other tokens than the base's.
        """
        written = tokenizer or self.tokenizer
        stop_ids = frozenset(written.stop_ids)
        if self.pair is not None:
            written = written.target
            stop_ids |= set() if self.pair.end_id is None else {self.pair.end_id}
        before = prompt[-LONGEST_CHARACTER:] if self.pair is None else [self.pair.start_id]
        constraint = make_constraint(
            settings, written, stop_ids=stop_ids, previous=before[-1] if before else None
        )
        request = Request(prompt, settings, stop_ids, constraint, adapter)
        number = self.engine.submit(request)
        self._texts[number] = {
            choice: _Text(written, request, before, stop_ids) for choice in range(settings.n)
        }
        return number

    def cancel(self, number: int) -> None:
        """Stop writing; what the request held is free at once."""
        self.engine.cancel(number)
        self._texts.pop(number, None)
        self._held.pop(number, None)

    def end(self, number: int) -> list[Piece]:
        """Stop writing, and keep what there is: the last piece of each unfinished text."""
        pieces = [text.cut(number, choice) for choice, text in self._texts.get(number, {}).items()]
        self.cancel(number)
        return pieces

    def stream(
        self, prompts: Sequence[Sequence[int]], settings: SamplingSettings
    ) -> Generator[Piece, None, None]:
        """Continue prompts together; `row` of a piece is the place of its prompt.

        Prompts are checked before the first piece is asked for. Closing the generator cancels
        what is not finished. Several streams may be read in turns.
        """
        place_of: dict[int, int] = {}
        try:
            for place, request in enumerate(requests_of(prompts, settings)):
                place_of[self.submit(request.prompt, request.settings)] = place
        except UserError:
            for number in place_of:
                self.cancel(number)
            raise
        pieces = self._pieces(place_of)
        next(pieces)  # from here on, closing it or forgetting it cancels
        return pieces

    def _pieces(self, place_of: dict[int, int]) -> Generator[Piece, None, None]:
        try:
            yield Piece(-1, "")
            while True:
                mine = [piece for number in place_of for piece in self._held.pop(number, [])]
                for piece in mine:
                    yield replace(piece, row=place_of[piece.row])
                if mine:  # while they were being read, more may have come
                    continue
                if self._texts.keys().isdisjoint(place_of):
                    return
                for piece in self.step():
                    self._held.setdefault(piece.row, []).append(piece)
        finally:
            for number in place_of:
                self.cancel(number)

    def step(self) -> list[Piece]:
        """One pass of the model: the text that it completed."""
        pieces = []
        for new in self.engine.step():
            texts = self._texts.get(new.request, {})
            text = texts.get(new.choice)
            if text is None:  # it met its stop string, and this token came in the same step
                continue
            piece = text.push(new)
            if piece is None:
                continue
            pieces.append(piece)
            if piece.result is not None:
                if new.finish_reason is None:
                    self.engine.cancel(new.request, new.choice)
                del texts[new.choice]
                if not texts:
                    del self._texts[new.request]
        for number in self._texts.keys() - self.engine.runs.keys():
            del self._texts[number]  # beams found fewer texts than were asked for
        return pieces
