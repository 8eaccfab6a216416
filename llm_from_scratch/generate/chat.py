"""`Chat`: the one way to ask for an answer, of a model of ours or at an OpenAI-compatible address.

Judges, data making and agents are written against `Chat`; `open_chat` opens whatever a name or an
address stands for. Settings are the fields of `SamplingSettings`, with the same defaults on both
sides, so that one model can take the place of another without a change.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.settings import SamplingSettings, make_settings
from llm_from_scratch.text.chat import Message, encode_chat_prompt, stop_strings

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from llm_from_scratch.generate.requests import Writer
    from llm_from_scratch.generate.sampling import TokenLogprobs
    from llm_from_scratch.generate.texts import Piece, Result, TextEngine
    from llm_from_scratch.text.tokenizer import Tokenizer

KEY_VARIABLE = "SCRATCHLM_API_KEY"


class PromptTooLong(UserError):
    """The messages have more tokens than the model's context; with fewer it may go."""


@dataclass(frozen=True)
class Usage:
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Logprob:
    """One token of an answer: its text, its natural log-probability, and the likeliest in its
    place with theirs. A token that is part of a character shows as the replacement character."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reply:
    """An answer.

    `text` begins with its first visible character. `finish_reason` is "stop" (the model ended, or
    wrote a stop string), "length" (`max_new_tokens` or the context was used up), or what else a
    server says. `usage` is None where a server does not tell it, `logprobs` where they were not
    asked for. `result` is our own engine's account; None from an address.
    """

    text: str
    finish_reason: str
    usage: Usage | None = None
    logprobs: tuple[Logprob, ...] | None = None
    result: Result | None = None


@dataclass(frozen=True)
class ChatPiece:
    """More text of an answer; the last piece, whose text may be empty, has the whole `reply`."""

    text: str
    reply: Reply | None = None


class Chat(ABC):
    """Somebody who answers conversations. Usable in a `with` statement, which closes it.

    Attributes:
        name: which model answers.
        context: how many tokens messages and answer may have together; None where that is not
            known beforehand.
    """

    name: str
    context: int | None = None

    @abstractmethod
    def stream(
        self, messages: Sequence[Message], **settings: Any
    ) -> Generator[ChatPiece, None, None]:
        """The answer to one conversation, piece by piece. It may be closed early.

        Wrong messages and settings are a `UserError` here, not at the first piece.
        """

    @abstractmethod
    def replies(self, conversations: Sequence[Sequence[Message]], **settings: Any) -> list[Reply]:
        """The answers to many conversations, worked on together, in their order.

        Conversation number i (from 0) is answered with `seed` + i. Where one cannot be answered,
        the error names it, and the others are given up.
        """

    def reply(self, messages: Sequence[Message], **settings: Any) -> Reply:
        """The whole answer to one conversation."""
        return self.replies([messages], **settings)[0]

    def count(self, messages: Sequence[Message]) -> int | None:
        """How many tokens the messages are for the model; None where only the server knows."""
        return None

    def close(self) -> None:  # noqa: B027  (most hold nothing)
        """Give back what is held, such as connections."""

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def chat_settings(settings: dict[str, Any]) -> SamplingSettings:
    """The settings of one answer, checked."""
    made = make_settings(**settings)
    if made.n != 1:
        raise UserError(
            f"n is {made.n}, but a chat gives one answer to each conversation; for several, give "
            "the conversation several times to `replies`."
        )
    return made


def settings_fields(settings: SamplingSettings) -> dict[str, Any]:
    """The settings as keyword arguments."""
    return {one.name: getattr(settings, one.name) for one in dataclasses.fields(settings)}


def numbered(error: UserError | RunError, index: int, count: int) -> UserError | RunError:
    """The error with the number of the conversation, where there are several."""
    return error if count == 1 else type(error)(f"Conversation {index + 1} of {count}: {error}")


def can_converse(model: Writer, tokenizer: Tokenizer, template: str | None = None) -> bool:
    """Whether a model can be asked for an answer: translators and their like cannot."""
    from llm_from_scratch.model.encoder_decoder import EncoderDecoder

    return not isinstance(model, EncoderDecoder) or bool(template or tokenizer.chat_template)


def protocol_reason(finish_reason: str) -> str:
    """Why a text ended, in the words of OpenAI's protocol: "stop" or "length"."""
    return "stop" if finish_reason == "stop_string" else finish_reason


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """What one token adds to a text; the replacement character for a part of a character."""
    if tokenizer.bytes_rule.exact:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")
    return tokenizer.decode([token])


class LocalChat(Chat):
    """A model on this machine. `template` takes the place of the model's own chat template: Jinja,
    or the name of one that is built in (text/chat_template.py). `options` are those of `Engine`."""

    def __init__(
        self,
        model: Writer,
        tokenizer: Tokenizer,
        template: str | None = None,
        *,
        name: str = "this model",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        from llm_from_scratch.model.encoder_decoder import EncoderDecoder

        if not can_converse(model, tokenizer, template):
            raise UserError(
                "This model makes one text of another, such as a translation, and holds no "
                "conversation; give it the text with `scratchlm generate`, without --chat."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.written = tokenizer.target if isinstance(model, EncoderDecoder) else tokenizer
        self.template = template
        self.name = name
        self.options = dict(options or {})
        self.context = model.config.max_seq_len
        self._engine: TextEngine | None = None

    @property
    def engine(self) -> TextEngine:
        """What writes the answers; it remembers what earlier turns have computed."""
        from llm_from_scratch.generate.texts import TextEngine

        if self._engine is None:
            self._engine = TextEngine(
                self.model, self.tokenizer, **{"max_running": 1, **self.options}
            )
        return self._engine

    def close(self) -> None:
        self._engine = None

    def stream(
        self, messages: Sequence[Message], **settings: Any
    ) -> Generator[ChatPiece, None, None]:
        prompt = self._encode(messages)
        pieces = self.engine.stream([prompt], self._settings(settings))

        def answer() -> Generator[ChatPiece, None, None]:
            said = ""
            with closing(pieces):
                while (piece := self._next(pieces)) is not None:
                    # Some templates leave the space after their header to the model.
                    text = piece.text if said else piece.text.lstrip()
                    said += text
                    reply = None if piece.result is None else self._reply(piece.result)
                    if text or reply:
                        yield ChatPiece(text, reply)

        return answer()

    def _next(self, pieces: Iterator[Piece]) -> Piece | None:
        """The next piece, or None behind the last."""
        try:
            return next(pieces, None)
        except KeyboardInterrupt:  # somewhere in a step: nobody knows how far its books are kept
            self._engine = None
            raise

    def replies(self, conversations: Sequence[Sequence[Message]], **settings: Any) -> list[Reply]:
        from llm_from_scratch.generate.generate import complete

        made = self._settings(settings)
        prompts = []
        for index, messages in enumerate(conversations):
            try:
                prompts.append(self._encode(messages))
            except UserError as error:
                raise numbered(error, index, len(conversations)) from error
        if not prompts:
            return []
        fields = settings_fields(made)
        results = complete(self.model, self.tokenizer, prompts, self.options, **fields)
        return [self._reply(result) for result in results]

    def count(self, messages: Sequence[Message]) -> int:
        return len(encode_chat_prompt(self.tokenizer, messages, template=self.template))

    def _encode(self, messages: Sequence[Message]) -> list[int]:
        prompt = encode_chat_prompt(self.tokenizer, messages, template=self.template)
        if len(prompt) > self.model.config.max_seq_len:
            what = "message has" if len(messages) == 1 else "messages have"
            raise PromptTooLong(
                f"The {what} {len(prompt)} tokens with what stands around, but the model's context "
                f"is {self.context} tokens. Give less text."
            )
        return prompt

    def _settings(self, settings: dict[str, Any]) -> SamplingSettings:
        made = chat_settings(settings)
        ends = stop_strings(self.tokenizer, self.template)
        return dataclasses.replace(made, stop=(*made.stop, *ends))

    def _reply(self, result: Result) -> Reply:
        found = result.logprobs
        return Reply(
            text=result.text.lstrip(),
            finish_reason=protocol_reason(result.finish_reason),
            usage=Usage(result.prompt_tokens, len(result.tokens)),
            logprobs=None if found is None else tuple(map(self._logprob, found)),
            result=result,
        )

    def _logprob(self, found: TokenLogprobs) -> Logprob:
        top = tuple((token_text(self.written, token), logprob) for token, logprob in found.top)
        return Logprob(token_text(self.written, found.token), found.logprob, top)


def is_address(name: str) -> bool:
    """Whether a MODEL is an address, where an OpenAI-compatible server answers."""
    return str(name).lower().startswith(("http://", "https://"))


def open_chat(
    target: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    timeout: float | None = None,
    retries: int | None = None,
    template: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | None = None,
) -> Chat:
    """The chat that a MODEL of this machine, or the address of a server, stands for.

    For an address, such as `http://127.0.0.1:8000/v1`: `model`, `api_key`, `timeout` and `retries`
    as in `RemoteChat`. For a MODEL: `template` as in `LocalChat`, `dtype` and `device` as in
    `llm.load`. Settings of the other kind are a `UserError`.
    """
    remote = {"model": model, "api_key": api_key, "timeout": timeout, "retries": retries}
    local = {"template": template, "dtype": dtype, "device": device}
    for name, value in (local if is_address(target) else remote).items():
        if value is not None:
            raise UserError(
                f"'{name}' belongs to a model on this machine, and {target} is an address."
                if is_address(target)
                else f"'{name}' belongs to the address of a server, and '{target}' is none; "
                "an address begins with http:// or https://."
            )
    if is_address(target):
        from llm_from_scratch.generate.remote import RemoteChat

        given = {name: value for name, value in remote.items() if value is not None}
        return RemoteChat(target, **given)  # type: ignore[arg-type]
    from llm_from_scratch.generate.requests import as_writer
    from llm_from_scratch.weights.sources import load

    loaded, tokenizer = load(target, dtype=dtype, device=device or "auto")
    return LocalChat(as_writer(loaded), tokenizer, template, name=target)
