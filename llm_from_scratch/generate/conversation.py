"""A conversation: the turns so far, and the next answer as a stream."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.chat import (
    Chat,
    ChatPiece,
    PromptTooLong,
    Reply,
    chat_settings,
    settings_fields,
)
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.text.chat import Message, check_messages


class Conversation:
    """Keeps the turns and asks a `Chat` for the next one.

    Attributes:
        messages: all turns so far, without the system message.
        system: what the model is told first; None or "" for nothing.
        forgotten: how many of the oldest messages were left out for the last answer, because the
            context is full; known as soon as its first piece is there.
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
        self.messages: list[dict[str, Any]] = []
        self.forgotten = 0
        self.reply: Reply | None = None
        self._unanswered: list[dict[str, Any]] = []  # up to a question that got no answer
        self._turns = 0

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.messages = []
        self.forgotten = 0
        self._unanswered = []
        self._turns = 0

    @property
    def questions(self) -> list[str]:
        """What the user has said, in order."""
        return [self.messages[place]["content"] or "" for place in self._places()]

    @property
    def last_question(self) -> str:
        """What `regenerate` asks; "" where there is nothing."""
        said = [m for m in self._unanswered or self.messages if m["role"] == "user"]
        return said[-1]["content"] or "" if said else ""

    def export(self) -> list[dict[str, Any]]:
        """The whole conversation, the system message first; `UserError` where there is none."""
        if not self.messages:
            raise UserError("Nothing has been said yet, so there is no conversation to keep.")
        return check_messages(self._with_system(self.messages))

    def load(self, messages: Sequence[Message]) -> None:
        """Go on with a conversation from elsewhere. Its system message takes the place of ours.

        Raises `UserError` for messages that are none, and for those that nobody asked anything in.
        """
        checked = check_messages(messages)
        if all(message["role"] != "user" for message in checked):
            raise UserError('No message has the role "user", so nothing was asked.')
        self.reset()
        first = checked[0]
        self.system = first["content"] if first["role"] == "system" else None
        self.messages = checked[1:] if first["role"] == "system" else checked

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece.

        Whatever has come when the stream ends, breaks off or is closed becomes the assistant's
        turn. The oldest turns are left out where they would leave no room for an answer. A message
        that does not fit at all is a `UserError`, and the conversation stays as it was.
        """
        # What was left out before stays so: the long past is not counted again at every turn.
        return self._answer([*self.messages, {"role": "user", "content": text}], self.forgotten)

    def regenerate(self) -> Generator[str, None, None]:
        """Another answer to the last question; it takes the old one's place once it has begun.

        With a seed it is drawn with other numbers. At temperature 0 it is the same again. The last
        question may be one that got no answer, because it was stopped or failed before.
        """
        if self._unanswered:
            return self._answer(self._unanswered)
        place = self._place(None)
        return self._answer(self.messages[: place + 1])

    def edit(self, text: str, number: int | None = None) -> Generator[str, None, None]:
        """The answer to `text` in the place of question `number` (from 1; None: the last).

        What was said after that question is gone once the answer has begun.
        """
        place = self._place(number)
        return self._answer([*self.messages[:place], {"role": "user", "content": text}])

    def _places(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "user"]

    def _place(self, number: int | None) -> int:
        places = self._places()
        if not places:
            raise UserError("Nothing has been asked yet; ask something first.")
        if number is not None and not 1 <= number <= len(places):
            has = "one question" if len(places) == 1 else f"{len(places)} questions"
            raise UserError(f"There is no question {number}; the conversation has {has}.")
        return places[-1 if number is None else number - 1]

    def _answer(self, asked: list[dict[str, Any]], without: int = 0) -> Generator[str, None, None]:
        """The answer to the last of `asked`, which become the conversation's messages with it.

        The model does not see the first `without`, and more of them where the context is full.
        """
        before = self.forgotten
        kept = self._fit(asked[without:])
        pieces = self._stream(kept)
        self.reply = None
        self.forgotten = len(asked) - len(kept)
        self._unanswered = asked

        def answer() -> Generator[str, None, None]:
            said = ""
            try:
                with closing(self._until_it_fits(asked, kept, pieces)) as coming:
                    for piece in coming:
                        self.reply = piece.reply
                        said += piece.text
                        if piece.text:
                            yield piece.text
            finally:
                if said or self.reply:
                    self._turns += 1
                else:  # refused, or broken off at once
                    self.forgotten = before
                if said.strip():
                    self._unanswered = []
                    self.messages = [*asked, {"role": "assistant", "content": said.rstrip()}]

        return answer()

    def _until_it_fits(
        self,
        asked: list[dict[str, Any]],
        kept: list[dict[str, Any]],
        pieces: Generator[ChatPiece, None, None],
    ) -> Generator[ChatPiece, None, None]:
        """The pieces, or those for fewer messages: only a server's own count can say so late."""
        while True:
            begun = False
            try:
                with closing(pieces):
                    for piece in pieces:
                        begun = True
                        yield piece
                return
            except PromptTooLong:
                shorter = _without_oldest(kept)
                if begun or len(shorter) == len(kept):
                    raise
                kept = shorter
                self.forgotten = len(asked) - len(kept)
                pieces = self._stream(kept)

    def _stream(self, messages: list[dict[str, Any]]) -> Generator[ChatPiece, None, None]:
        settings = self.settings
        if settings.seed is not None:  # or every answer would be drawn with the same numbers
            settings = replace(settings, seed=(settings.seed + self._turns) % 2**63)
        return self.chat.stream(self._with_system(messages), **settings_fields(settings))

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + messages

    def _fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As many of the newest messages as leave room for an answer; the last in any case."""
        context = self.chat.context
        if context is None:
            return messages
        room = context - min(self.settings.max_new_tokens, context // 4)
        while (self.chat.count(self._with_system(messages)) or 0) > room:
            shorter = _without_oldest(messages)
            if len(shorter) == len(messages):
                break
            messages = shorter
        return messages


def _without_oldest(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the oldest question and what belongs to it; all where there is no other question."""
    for place in range(1, len(messages)):
        if messages[place]["role"] == "user":
            return messages[place:]
    return messages
