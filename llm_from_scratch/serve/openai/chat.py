"""POST /v1/chat/completions: answers to conversations, whole or in events, and calls of tools."""

from __future__ import annotations

import secrets
import string
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from uuid import uuid4

from anyio.to_thread import run_sync
from fastapi import APIRouter
from starlette.responses import Response

from llm_from_scratch import __version__
from llm_from_scratch.generate.chat import protocol_reason
from llm_from_scratch.generate.texts import Piece
from llm_from_scratch.serve.openai.chat_plan import Plan, plan_of
from llm_from_scratch.serve.openai.chat_schema import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
)
from llm_from_scratch.serve.openai.events import EventStream, answer, or_events
from llm_from_scratch.serve.openai.fields import usage_of
from llm_from_scratch.serve.openai.logprobs import chat_entries
from llm_from_scratch.serve.openai.settings import naming
from llm_from_scratch.serve.service import Service

FINGERPRINT = f"scratchlm-{__version__}"


class _Choice:
    """One answer as it is written.

    Attributes:
        deltas: what came with the last piece, as it stands in chunks.
        heard: log-probabilities that did not go out yet.
        reason: why the answer ended; None until it has.
        written: how many tokens it has.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reader = plan.reader()
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.deltas: list[dict[str, Any]] = []
        self.heard: list[dict[str, Any]] = []
        self.reason: str | None = None
        self.written = 0
        self._visible = False
        self._told = 0

    def take(self, piece: Piece) -> None:
        """Take in a piece; what may be shown then stands in `deltas` and `heard`."""
        self.deltas = []
        if self.reason is not None:  # it ended with its first call
            return
        result = piece.result
        found = piece.logprobs if result is None else (result.logprobs or [])[self._told :]
        self._told += len(found)
        self.heard += chat_entries(self.plan.written, found, self.plan.with_ids)
        self.written = self.written + len(piece.tokens) if result is None else len(result.tokens)
        # Some templates leave the space after their header to the model.
        text = piece.text if self._visible else piece.text.lstrip()
        self._visible |= bool(text)
        if self.reader is None:
            self._say(text)
        else:
            self._read(text, last=result is not None)
        if result is not None or (self.reader is not None and self.reader.over):
            reason = "stop" if result is None else protocol_reason(result.finish_reason)
            self.reason = "tool_calls" if self.calls and reason == "stop" else reason

    def _say(self, text: str) -> None:
        if text:
            self.text += text
            self.deltas.append({"content": text})

    def _read(self, text: str, *, last: bool) -> None:
        assert self.reader is not None
        for said in [*self.reader.push(text), *(self.reader.finish() if last else [])]:
            if said.call is None:
                self._say(said.text)
                continue
            delta: dict[str, Any] = {"index": said.call, "function": {"arguments": said.arguments}}
            if said.name is not None:
                called = {"name": said.name, "arguments": said.arguments}
                call = {"id": self._new_id(), "type": "function", "function": called}
                self.calls.append(call)
                delta = {"index": said.call, **call, "function": dict(called)}
            else:
                self.calls[said.call]["function"]["arguments"] += said.arguments
            self.deltas.append({"tool_calls": [delta]})

    def _new_id(self) -> str:
        length = self.plan.form.id_length
        letters = string.ascii_letters + string.digits
        drawn = "".join(secrets.choice(letters) for _ in range(length or 24))
        return drawn if length else f"call_{drawn}"

    @property
    def message(self) -> dict[str, Any]:
        """The whole answer."""
        content = None if self.calls and not self.text else self.text
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        return {**message, "tool_calls": self.calls} if self.calls else message


class _Answers:
    """The answers to one request."""

    def __init__(self, plan: Plan, object_: str) -> None:
        self.plan = plan
        self.choices = [_Choice(plan) for _ in range(plan.settings.n)]
        self.frame: dict[str, Any] = {
            "id": f"chatcmpl-{uuid4().hex}",
            "object": object_,
            "created": int(time.time()),
            "model": plan.served.name,
            "system_fingerprint": FINGERPRINT,
        }

    @property
    def over(self) -> bool:
        return all(choice.reason is not None for choice in self.choices)

    @property
    def usage(self) -> dict[str, int]:
        return usage_of(len(self.plan.prompt), sum(choice.written for choice in self.choices))

    def logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        """What was heard since the last time; None where it was not asked for."""
        if self.plan.settings.logprobs is None:
            return None
        heard, choice.heard = choice.heard, []
        return {"content": heard, "refusal": None}


async def _whole(plan: Plan, pieces: AsyncGenerator[Piece, None]) -> dict[str, Any]:
    answers = _Answers(plan, "chat.completion")
    async with aclosing(pieces):
        async for piece in pieces:
            answers.choices[piece.choice].take(piece)
            if answers.over:
                break
    whole = {
        **answers.frame,
        "choices": [
            {
                "index": index,
                "message": choice.message,
                "logprobs": answers.logprobs(choice),
                "finish_reason": choice.reason,
            }
            for index, choice in enumerate(answers.choices)
        ],
        "usage": answers.usage,
    }
    return {**whole, "prompt_token_ids": plan.prompt} if plan.with_ids else whole


async def _chunks(
    plan: Plan, pieces: AsyncGenerator[Piece, None], with_usage: bool
) -> AsyncGenerator[dict[str, Any], None]:
    answers = _Answers(plan, "chat.completion.chunk")
    frame = {**answers.frame, **({"usage": None} if with_usage else {})}

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, heard: Any = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": heard, "finish_reason": reason}
        return {**frame, "choices": [choice]}

    async with aclosing(pieces):
        for index in range(len(answers.choices)):
            begin = {"role": "assistant", "content": None if plan.forced else "", "refusal": None}
            first = chunk(index, begin)
            yield {**first, "prompt_token_ids": plan.prompt} if plan.with_ids else first
        async for piece in pieces:
            choice = answers.choices[piece.choice]
            if choice.reason is not None:
                continue
            choice.take(piece)
            for delta in choice.deltas:
                heard = answers.logprobs(choice) if choice.heard else None
                yield chunk(piece.choice, delta, None, heard)
            if choice.reason is not None:
                if choice.heard:
                    yield chunk(piece.choice, {"content": ""}, None, answers.logprobs(choice))
                yield chunk(piece.choice, {}, choice.reason)
            if answers.over:
                break
    if with_usage:
        yield {**answers.frame, "choices": [], "usage": answers.usage}


def router(service: Service) -> APIRouter:
    api = APIRouter(tags=["openai"])

    @api.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=or_events(ChatCompletionChunk),
    )
    async def chat_completions(body: ChatRequest) -> Response:
        """Answer a conversation."""
        served = service.model(body.model, "writer")
        # Off the event loop: a long text takes its time.
        plan = await run_sync(plan_of, served, body, service.limits.max_new_tokens)
        with naming("messages", "tools" if plan.forced else "response_format"):
            pieces = service.worker.write(served.name, [plan.prompt], plan.settings)
            await pieces.accepted()
        if body.stream:
            return EventStream(_chunks(plan, pieces, body.wants_usage))
        return answer(await _whole(plan, pieces))

    return api
