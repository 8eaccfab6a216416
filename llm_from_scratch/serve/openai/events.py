"""Answers that come in events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llm_from_scratch.serve.errors import as_api_error
from llm_from_scratch.serve.openai.fields import ErrorReply

log = logging.getLogger("scratchlm.serve")

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


# Line ends to Python's splitlines(), by which many clients read events, but not to JSON.
LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def to_json(value: Any) -> bytes:
    """Compact JSON in one line; what clean() let through can always be written."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return (text if text.isascii() else text.translate(LINE_ENDS)).encode()


def answer(value: Any) -> Response:
    """An answer in one piece."""
    return Response(to_json(value), media_type="application/json")


class EventStream(StreamingResponse):
    """The chunks as events, then [DONE]; an error in the middle is an event as well.

    However it ends, the chunks are closed, so that nobody goes on writing.
    """

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None]) -> None:
        self.chunks = chunks
        super().__init__(self._events(), media_type="text/event-stream", headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.chunks):
            await super().__call__(scope, receive, send)

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self.chunks:
                yield b"data: " + to_json(chunk) + b"\n\n"
        except Exception as error:
            found = as_api_error(error)
            if found.status >= 500:
                log.error("An answer broke off.", exc_info=error)
            yield b"data: " + to_json(found.body) + b"\n\n"
            return
        yield b"data: [DONE]\n\n"


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """A schema that needs no others: what it refers to stands in their place."""
    if isinstance(schema, list):
        return [_inlined(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].removeprefix("#/$defs/")], parts)
    return {key: _inlined(value, parts) for key, value in schema.items() if key != "$defs"}


def or_events(chunk: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What a route says of its answers besides their JSON: that they can come as events."""
    schema = chunk.model_json_schema(mode="serialization")
    error = ErrorReply.model_json_schema(mode="serialization")
    parts = {**schema.get("$defs", {}), **error.get("$defs", {})}
    content = {"anyOf": [_inlined(schema, parts), _inlined(error, parts)]}
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": content}
    event = {
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    description = "The answer; with stream, events that each hold a part of it, and [DONE]."
    return {
        200: {
            "description": description,
            "content": {"text/event-stream": {"itemSchema": event}},
        }
    }
