"""OpenAI's chat protocol: requests to write, answers to read (the client's side).

https://platform.openai.com/docs/api-reference/chat. An answer is checked before it is used;
whatever it breaks of the protocol is a `BrokenAnswer`.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.generate.chat import Logprob, Reply, Usage
from llm_from_scratch.text.chat import Message, check_messages

if TYPE_CHECKING:
    from llm_from_scratch.generate.settings import SamplingSettings

# What limits an answer's length: the name that every server knows, and OpenAI's newer one.
LENGTHS = ("max_tokens", "max_completion_tokens")
# Sent only where they differ from what changes nothing. Those from top_k on are not OpenAI's own.
# vLLM, SGLang, llama.cpp and others know some of them, `scratchlm serve` all.
UNCHANGING = {
    "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {},
    "seed": None, "stop": (), "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "no_repeat_ngram": 0, "regex": None, "choice": (),
}  # fmt: skip
# Said in other words. What else a request may ask of our own engine, no server understands.
REWORDED = ("max_new_tokens", "temperature", "logprobs", "json_schema")
# What OpenAI, vLLM, llama.cpp and others say where a prompt is longer than the context.
TOO_LONG = re.compile(
    r"context[_ ]length|context (?:size|window)|maximum context|prompt is too long", re.IGNORECASE
)


class BrokenAnswer(Exception):
    """An answer that is not what the protocol says; the message goes into a sentence."""


def request_body(
    model: str, messages: Sequence[Message], settings: SamplingSettings, *, stream: bool
) -> dict[str, Any]:
    """The JSON of a request. `UserError` for wrong messages, and settings that it cannot carry."""
    body: dict[str, Any] = {
        "model": model,
        "messages": check_messages(messages),
        LENGTHS[0]: settings.max_new_tokens,
        "temperature": settings.temperature,
    }
    plain = type(settings)()
    for name in (field.name for field in dataclasses.fields(settings)):
        changed = getattr(settings, name) != getattr(plain, name)
        if changed and name not in UNCHANGING and name not in REWORDED:
            raise UserError(
                f"{name} is nothing that can be asked of a server (OpenAI's chat protocol does not "
                "have it); leave it out, or take a model on this machine."
            )
    for name, unchanging in UNCHANGING.items():
        value = getattr(settings, name)
        if value != unchanging:
            body[name] = list(value) if isinstance(value, tuple) else value
    if settings.logprobs is not None:
        body["logprobs"] = True
        body["top_logprobs"] = settings.logprobs
    if settings.json_schema is not None:
        schema = {"name": "answer", "schema": _schema(settings.json_schema), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    if stream:
        body["stream"] = True
        body["stream_options"] = {"include_usage": True}
    return body


def _schema(schema: Any) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise UserError(f"json_schema is not valid JSON ({error}); correct it.") from error


# ------------------------------------------------------------------------- answers


def check_form(settings: SamplingSettings, reply: Reply) -> None:
    """A server that does not know `regex` or `choice` may ignore them, but not unnoticed."""
    if reply.finish_reason != "stop" or settings.stop:  # what was cut has no form
        return
    text = reply.text.strip()
    kept = not settings.choice or text in [one.strip() for one in settings.choice]
    if settings.regex is not None:
        with suppress(re.error):  # a pattern that only the server's engine understands
            pattern = re.compile(settings.regex)
            kept = any(pattern.fullmatch(f"{space}{reply.text}") for space in ("", " ", "\n"))
    if not kept:
        name = "choice" if settings.choice else "regex"
        raise BrokenAnswer(f"the server takes no notice of {name}: it answers {shown(text)}")


def parse(data: bytes | str) -> dict[str, Any]:
    """The JSON object that a server sent."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):  # UTF-8 errors are ValueErrors
        text = data if isinstance(data, str) else data[:200].decode("utf-8", errors="replace")
        raise BrokenAnswer(f"the answer is not JSON: {shown(text)}") from None
    if not isinstance(found, dict):
        raise BrokenAnswer(f"the answer is no JSON object: {shown(found)}")
    return found


def error_in(answer: dict[str, Any]) -> str:
    """The words with which an answer says that something failed; "" where it does not.

    OpenAI and most others: {"error": {"message", "code"}}; also {"error": "..."}, FastAPI's
    {"detail": ...}, and {"object": "error", "message": ...}.
    """
    error = answer.get("error") or answer.get("detail")
    if error is None and answer.get("object") == "error":
        error = answer
    if isinstance(error, dict):
        code = error.get("code")
        message = str(error.get("message") or error)
        return f"{message} ({code})" if isinstance(code, str) and code not in message else message
    return "" if error is None else str(error)


def _first_choice(answer: dict[str, Any]) -> dict[str, Any] | None:
    """The answer's only choice; None in a chunk without one, such as that with the usage."""
    if said := error_in(answer):
        raise BrokenAnswer(said)
    choices = answer.get("choices")
    if choices == [] or choices is None:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise BrokenAnswer(f"the answer's choices are no list of objects: {shown(choices)}")
    return choices[0]


def _text_of(message: Any) -> str:
    """The content of a message or of a delta; what a model refuses to say is said there, too."""
    if message is None:
        return ""
    content = message.get("content") if isinstance(message, dict) else message
    if content is None and isinstance(message, dict):
        content = message.get("refusal") or ""
    if not isinstance(content, str):
        raise BrokenAnswer(f"the answer's content is no text: {shown(content)}")
    return content


def _usage(answer: dict[str, Any]) -> Usage | None:
    usage = answer.get("usage")
    if not isinstance(usage, dict):
        return None
    read, written = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    return Usage(read, written) if type(read) is int and type(written) is int else None


def _logprobs(choice: dict[str, Any]) -> list[Logprob] | None:
    """The choice's log-probabilities, where it has some."""
    found = choice.get("logprobs")
    rows = found.get("content") if isinstance(found, dict) else None
    if rows is None:
        return None
    try:
        return [
            Logprob(
                str(row["token"]),
                float(row["logprob"]),
                tuple(
                    (str(one["token"]), float(one["logprob"]))
                    for one in row.get("top_logprobs") or ()
                ),
            )
            for row in rows
        ]
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise BrokenAnswer(f"the answer's logprobs cannot be read: {shown(rows)}") from error


def whole_reply(answer: dict[str, Any]) -> Reply:
    """The reply in an answer that came in one piece."""
    choice = _first_choice(answer)
    if choice is None or not isinstance(choice.get("message"), dict):
        raise BrokenAnswer(f"the answer has no message: {shown(answer)}")
    logprobs = _logprobs(choice)
    return Reply(
        text=_text_of(choice["message"]).lstrip(),
        finish_reason=str(choice.get("finish_reason") or "stop"),
        usage=_usage(answer),
        logprobs=None if logprobs is None else tuple(logprobs),
    )


class Growing:
    """A streamed answer as its chunks come.

    Attributes:
        reason: why it ended; None until it has.
        size: characters and log-probabilities so far.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.size = 0
        self._texts: list[str] = []
        self._usage: Usage | None = None
        self._logprobs: list[Logprob] | None = None

    def push(self, chunk: dict[str, Any]) -> str:
        """What may be shown now that `chunk` has come."""
        choice = _first_choice(chunk)
        self._usage = _usage(chunk) or self._usage
        if choice is None:
            return ""
        if choice.get("finish_reason"):
            self.reason = str(choice["finish_reason"])
        if (logprobs := _logprobs(choice)) is not None:
            self._logprobs = self._logprobs or []
            self._logprobs += logprobs
            self.size += sum(1 + len(one.top) for one in logprobs)
        text = _text_of(choice.get("delta"))
        if not self._texts:
            text = text.lstrip()
        if text:
            self._texts.append(text)
            self.size += len(text)
        return text

    def reply(self) -> Reply:
        return Reply(
            text="".join(self._texts),
            finish_reason=self.reason or "stop",
            usage=self._usage,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
        )
