"""A conversation: the turns so far, and the next answer as a stream."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

from llm_from_scratch.generate.chat import (
    Chat,
    ChatPiece,
    PromptTooLong,
    Reply,
    chat_settings,
    settings_fields,
)
from llm_from_scratch.generate.settings import SamplingSettings


class Conversation:
    """Keeps the turns and asks a `Chat` for the next one.

    Attributes:
        messages: the turns so far, without the system message.
        system: what the model is told first; None or "" for nothing.
        forgotten: how many messages had to be dropped for the last answer; known as soon as its
            first piece is there.
        reply: the last answer's `Reply`; None where it was interrupted.
    """

    def __init__(
        self,
        chat: Chat,
        settings: SamplingSettings | None = None,
        *,
        system: str | None = None,
    ) -> None:
        self.chat = chat
        self.settings = settings or SamplingSettings()
        chat_settings(settings_fields(self.settings))
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self.reply: Reply | None = None
        self._turns = 0

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.messages = []
        self.forgotten = 0
        self._turns = 0

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece.

        Whatever has come when the stream ends, breaks off or is closed becomes the assistant's
        turn. The oldest turns are dropped where they would leave no room for an answer. A message
        that does not fit at all is a `UserError`, and the conversation stays as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        kept = self._fit(asked)
        self.reply = None
        self.forgotten = len(asked) - len(kept)
        pieces = self._stream(kept)

        def answer() -> Generator[str, None, None]:
            nonlocal kept, pieces
            said = ""
            while True:
                try:
                    with closing(pieces):
                        for piece in pieces:
                            self.reply = piece.reply
                            said += piece.text
                            if piece.text:
                                yield piece.text
                    return
                except PromptTooLong:
                    # Only a server's own count can say so this late.
                    if said or len(kept) == 1:
                        raise
                    kept = kept[2:]
                    self.forgotten = len(asked) - len(kept)
                    pieces = self._stream(kept)
                finally:
                    if said.strip():
                        self.messages = [*kept, {"role": "assistant", "content": said.rstrip()}]
                        self._turns += 1

        return answer()

    def _stream(self, messages: list[dict[str, str]]) -> Generator[ChatPiece, None, None]:
        settings = self.settings
        if settings.seed is not None:  # or every answer would be drawn with the same numbers
            settings = replace(settings, seed=settings.seed + self._turns)
        return self.chat.stream(self._with_system(messages), **settings_fields(settings))

    def _with_system(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + messages

    def _fit(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """As many of the newest messages as leave room for an answer; the last in any case."""
        context = self.chat.context
        if context is None:
            return messages
        room = context - min(self.settings.max_new_tokens, context // 4)
        while len(messages) > 1 and (self.chat.count(self._with_system(messages)) or 0) > room:
            messages = messages[2:]  # a question and its answer, so that the roles alternate
        return messages
