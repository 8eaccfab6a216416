"""What every request passes before a route sees it, as plain ASGI.

From the outside in: the log and the metrics, security headers, the name by which the server was
called, keys, and the body with its limits. The innermost watches the connection: a client that is
gone stops whatever is done for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_from_scratch.serve import errors
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.service import Service

log = logging.getLogger("scratchlm.access")

OPEN = ("/", "/healthz", "/favicon.ico", "/page", "/docs")  # no key is asked for
ALWAYS = ("/healthz", "/metrics")  # answered while the server shuts down
LOOPBACK = ("localhost", "127.0.0.1", "::1")
CROWD = 2000  # requests that are answered at once
BODY_SECONDS = 60.0  # in which a body must have come
OVERFLOW = 64 << 20  # bytes above the limit that are read, and forgotten, so that it can be said

POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
GONE = 499  # in the log, of a request whose client went before there was an answer


def headers_for(path: str) -> list[tuple[bytes, bytes]]:
    """What is added to every answer. Pages may be kept, but are asked for again; answers not."""
    keep = b"no-cache" if is_open(path) else b"no-store"
    return [*HEADERS, (b"cache-control", keep)]


class Watchman:
    """Counts and logs every request; the log names neither keys nor texts, nor queries."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name.lower() for name, _ in message["headers"]}
                new = [pair for pair in headers_for(scope["path"]) if pair[0] not in given]
                message = {**message, "headers": [*message["headers"], *new]}
            await send(message)

        counted = scope["path"] not in ALWAYS
        self.service.in_flight += counted
        try:
            await self.app(scope, receive, watched)
        except Exception as error:
            if status:  # it is too late for another answer: the connection is cut
                raise
            errors.log.exception("A request met an error.")
            await errors.as_api_error(error).response()(scope, receive, watched)
        finally:
            self.service.in_flight -= counted
            self._note(scope, status or GONE, time.monotonic() - began)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        metrics, route = self.service.metrics, route_of(scope)
        method = scope["method"] if scope["method"] in METHODS else "other"
        metrics.requests.labels(method, route, str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        path = ascii(scope["path"])[1:-1][:200]
        level = logging.DEBUG if route in ALWAYS else logging.INFO
        log.log(level, "%s %s %d %.0f ms", method, path, status, seconds * 1000)


def route_of(scope: Scope) -> str:
    """The route as it was declared, so that names in addresses make no new figures."""
    path = getattr(scope.get("route"), "path", None)
    if isinstance(path, str):
        return path or "/"
    return "/page" if scope["path"].startswith("/page/") else "other"


class Gate:
    """Refuses requests by their headers, and all but the watched ones while the server drains."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service
        self.digests = [hashlib.sha256(key.encode()).digest() for key in service.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self._problem(scope)
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _problem(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        hosts = self.service.hosts
        if hosts is not None and host_of(headers.get("host", "")) not in hosts:
            return ApiError(
                421,
                "This server does not go by the name in the header Host; it is started with "
                "--allowed_hosts NAME to do so.",
                code="unknown_host",
            )
        if self.service.draining and path not in ALWAYS:
            return ApiError(
                503, "The server is shutting down.", code="shutting_down",
                headers={"Retry-After": "10"},
            )  # fmt: skip
        if self.service.in_flight > CROWD:
            return ApiError(
                429, "Too many requests at once; try again later.", code="rate_limit_exceeded",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        if self.digests and not is_open(path) and not self._knows(headers):
            return ApiError(
                401,
                "No valid API key came with the request; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                return ApiError(
                    415, "The body must be JSON; send 'Content-Type: application/json'."
                )
        return None

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
        # Every key is compared, each in constant time: how long it takes says nothing about them.
        same = [hmac.compare_digest(digest, known) for known in self.digests]
        return scheme.lower() == "bearer" and any(same)


def is_open(path: str) -> bool:
    """Whether a path is for everybody: the page asks for the key itself."""
    return path in OPEN or path.startswith(("/page/", "/docs/"))


def host_of(header: str) -> str:
    """The name in a header Host, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    if header.count(":") > 1:  # an IPv6 address as people write it, without a port
        return header.lower()
    return header.partition(":")[0].lower().rstrip(".")


class Connection:
    """Reads the body up to the limit, and stops the work for a client that has gone."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._read(scope, receive)
        except TimeoutError:
            problem = ApiError(408, "The body did not come in time.")
            await problem.response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is not None:
            await self._answer(scope, body, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client went before it had come."""
        limit, headers = self.service.limits.max_body, Headers(scope=scope)
        said = headers.get("content-length", "")
        size = int(said[:20]) if said.isdecimal() else 0
        refusal = ApiError(
            413, f"The body is larger than {limit:,} bytes, the limit of this server.",
            headers={"Connection": "close"},
        )  # fmt: skip
        if size > limit and (size > OVERFLOW or "expect" in headers):
            raise refusal
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > OVERFLOW:
                raise refusal
            else:  # a client that is still sending would not hear the answer
                parts.clear()
            if not message.get("more_body", False):
                if size > limit:
                    raise refusal
                return b"".join(parts)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        gone, sent_all = asyncio.Event(), False
        given = False

        async def told() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def noted(message: Message) -> None:
            nonlocal sent_all
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                sent_all = True
            await send(message)

        async def watch(work: asyncio.Task[Any]) -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()
            if not sent_all:  # else the connection is at its end because the answer is
                work.cancel()

        work = asyncio.create_task(_run(self.app, scope, told, noted))
        watcher = asyncio.create_task(watch(work))
        try:
            await work
        except asyncio.CancelledError:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            if not gone.is_set():  # not the client, but the server wants to end
                raise
        finally:
            watcher.cancel()


async def _run(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    await app(scope, receive, send)
