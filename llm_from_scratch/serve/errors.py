"""Every error as OpenAI's protocol has it: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.serve.orders import Busy, TooLong

log = logging.getLogger("scratchlm.serve")

REQUEST = "invalid_request_error"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. `code` is the protocol's short name for it, `param` the field."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.type = type or TYPES.get(status, REQUEST if status < 500 else "server_error")
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer, or of an event in a stream that has begun."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """The answer itself. What cannot be written as UTF-8, such as half a pair, becomes "?"."""
        text = json.dumps(self.body, ensure_ascii=False).encode("utf-8", "replace")
        return Response(text, self.status, self.headers, "application/json")


def as_api_error(error: Exception) -> ApiError:
    """What a client is told about an error; of an unforeseen one no more than that it happened."""
    match error:
        case ApiError():
            return error
        case TooLong():
            return ApiError(400, str(error), code="context_length_exceeded")
        case UserError():
            return ApiError(400, str(error))
        case Busy():
            after = {"Retry-After": str(error.after)}
            if error.closing:
                return ApiError(503, str(error), code="shutting_down", headers=after)
            return ApiError(429, str(error), code="rate_limit_exceeded", headers=after)
        case RunError():
            return ApiError(500, str(error))
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            return _of_http(error)
    return ApiError(500, "The server made a mistake; its log says more.")


def _of_http(error: HTTPException) -> ApiError:
    messages = {404: "There is nothing at this address.", 405: "This address takes no such method."}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, headers=error.headers)


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    first: Mapping[str, Any] = (
        errors[0] if errors else {"loc": (), "msg": "the request cannot be read"}
    )
    if first.get("type") == "json_invalid":
        reason, place = first["ctx"]["error"], first["loc"][-1]
        return ApiError(400, f"The body is not JSON: {reason} (character {place}).")
    place = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path"))
    reason = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
    message = f"{place}: {reason}." if place else f"{reason}."
    return ApiError(400, message, param=place or None)


def install(app: FastAPI) -> None:
    """Let the app answer all foreseen errors in this shape; `guard.Watchman` does the others."""

    async def answer(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    kinds: tuple[type[Exception], ...] = (
        ApiError, UserError, RunError, Busy, HTTPException, RequestValidationError,
    )  # fmt: skip
    for kind in kinds:
        app.add_exception_handler(kind, answer)
