"""A conversation with a model: the turns so far, and the next answer as a stream."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import replace

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.generate import Result, stream
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.tokens import Writer
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.chat import encode_chat_prompt, stop_strings
from llm_from_scratch.text.tokenizer import Tokenizer


class Conversation:
    """Keeps the turns and asks the model for the next one.

    Attributes:
        messages: the turns so far, without the system message.
        system: what the model is told first; None or "" for nothing.
        forgotten: how many messages had to be dropped for the last answer.
        result: the last answer's `Result`; None where it was interrupted.
    """

    def __init__(
        self,
        model: Writer,
        tokenizer: Tokenizer,
        settings: SamplingSettings | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
    ) -> None:
        if isinstance(model, EncoderDecoder) and (template or tokenizer.chat_template) is None:
            raise UserError(
                "This model makes one text of another, such as a translation, and holds no "
                "conversation; give it the text with `scratchlm generate`, without --chat."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        settings = settings or SamplingSettings()
        self.settings = replace(settings, stop=(*settings.stop, *stop_strings(tokenizer, template)))
        self.system = system
        self.messages: list[dict[str, str]] = []
        self.forgotten = 0
        self.result: Result | None = None
        self._turns = 0

    def reset(self) -> None:
        """Forget the turns; the system message stays."""
        self.messages = []
        self.forgotten = 0
        self._turns = 0

    def ask(self, text: str) -> Generator[str, None, None]:
        """The answer to `text`, piece by piece.

        Whatever has come when the stream ends, is closed or is interrupted becomes the assistant's
        turn. The oldest turns are dropped where they would leave no room for an answer. A message
        that does not fit at all is a `UserError`, and the conversation stays as it was.
        """
        prompt, kept = self._fit([*self.messages, {"role": "user", "content": text}])
        self.forgotten = len(self.messages) + 1 - len(kept)
        self.result = None
        settings = self.settings
        if settings.seed is not None:  # or every answer would be drawn with the same numbers
            settings = replace(settings, seed=settings.seed + self._turns)
        pieces = stream(self.model, self.tokenizer, [prompt], settings)

        def answer() -> Generator[str, None, None]:
            said = ""
            try:
                with closing(pieces):
                    for piece in pieces:
                        self.result = piece.result
                        # Some templates leave the space after their header to the model.
                        shown = piece.text if said else piece.text.lstrip()
                        said += shown
                        if shown:
                            yield shown
            finally:
                if said.strip():
                    self.messages = [*kept, {"role": "assistant", "content": said.rstrip()}]
                    self._turns += 1

        return answer()

    def _fit(self, messages: list[dict[str, str]]) -> tuple[list[int], list[dict[str, str]]]:
        """The prompt's ids, and the messages of which it is made: as many as leave room."""
        context = self.model.config.max_seq_len
        room = context - min(self.settings.max_new_tokens, context // 4)
        first = [{"role": "system", "content": self.system}] if self.system else []
        while True:
            prompt = encode_chat_prompt(self.tokenizer, first + messages, template=self.template)
            if len(prompt) <= room or (len(messages) == 1 and len(prompt) <= context):
                return prompt, messages
            if len(messages) == 1:
                raise UserError(
                    f"The message has {len(prompt)} tokens with what stands around it, but the "
                    f"model's context is {context} tokens. Give a shorter one."
                )
            messages = messages[2:]  # a question and its answer, so that the roles alternate
