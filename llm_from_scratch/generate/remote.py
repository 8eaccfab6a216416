"""`RemoteChat`: a model at an OpenAI-compatible address (https://platform.openai.com/docs/api-reference/chat).

What a server says is a stranger's word: it is read up to a limit, checked before it is used, and
shown without control characters and without the key.
"""

from __future__ import annotations

import email.utils
import math
import random
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from typing import Any

import httpx2

from llm_from_scratch import __version__
from llm_from_scratch.core.errors import RunError, UserError, nearest
from llm_from_scratch.generate.address import checked_address, checked_key, is_loopback
from llm_from_scratch.generate.chat import (
    KEY_VARIABLE,
    Chat,
    ChatPiece,
    PromptTooLong,
    Reply,
    chat_settings,
    numbered,
)
from llm_from_scratch.generate.protocol import (
    LENGTHS,
    TOO_LONG,
    BrokenAnswer,
    Growing,
    check_form,
    error_in,
    parse,
    request_body,
    whole_reply,
)
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.text.chat import Message
from llm_from_scratch.weights.catalogue import to_stderr

LIMIT = 32 * 2**20  # bytes of one answer
BUSY = (429, 502, 503, 504)  # passing troubles: worth another try
LONGEST_WAIT = 60.0  # seconds; who is told to wait longer decides that himself
CONNECT_TIMEOUT = 10.0
sleep = time.sleep


class RemoteChat(Chat):
    """A model that a server answers for.

    Args:
        base_url: such as `http://127.0.0.1:8000/v1`; without a path, `/v1` is added.
        model: the server's name of the model; None where it has only one.
        api_key: None takes the environment variable SCRATCHLM_API_KEY, if there is one.
        timeout: seconds of silence after which an answer is given up.
        retries: how often a request is sent again after a passing trouble (429, 502, 503, 504, a
            connection that was dropped before an answer began), as late as the server asks for.
        concurrency: how many conversations of `replies` are asked at once.
        report: told where the key would travel unencrypted.

    Raises `UserError` for what was asked wrongly (the address, the key, the model's name, a
    setting that the protocol does not have), `RunError` where the server or the way to it fails.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 600.0,
        retries: int = 2,
        *,
        concurrency: int = 8,
        report: Callable[[str], None] = to_stderr,
    ) -> None:
        self.address, host = checked_address(base_url)
        if timeout <= 0 or retries < 0 or concurrency < 1:
            raise UserError(
                f"timeout is {timeout:g}, retries {retries} and concurrency {concurrency}; the "
                "timeout must be above 0, the others at least 0 and 1."
            )
        self.timeout, self.retries, self.concurrency = timeout, retries, concurrency
        self._key = checked_key(api_key)
        headers = {"User-Agent": f"scratchlm/{__version__}", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
            if self.address.startswith("http:") and not is_loopback(host):
                report(
                    f"The key goes to {host} unencrypted: everybody on the way can read it. "
                    "Use an address with https if there is one."
                )
        self._client = httpx2.Client(
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_TIMEOUT), pool=None),
            limits=httpx2.Limits(
                max_connections=concurrency, max_keepalive_connections=concurrency
            ),
            trust_env=not is_loopback(host),  # no proxy leads back to this machine
        )
        self._limit_name = "max_tokens"
        self.name = "" if model is None else model
        if model is None:
            self.name = self._only_model()

    def __repr__(self) -> str:
        return f"RemoteChat({self.address!r}, {self.name!r})"

    def close(self) -> None:
        self._client.close()

    def models(self) -> list[str]:
        """The names of the models that the server has."""
        with self._explaining(), closing(self._send("GET", "/models")) as response:
            rows = parse(self._body_of(response)).get("data")
            if not isinstance(rows, list):
                raise BrokenAnswer("the server does not say which models it has; name one")
        return [row["id"] for row in rows if isinstance(row, dict) and type(row.get("id")) is str]

    def _only_model(self) -> str:
        found = self.models()
        if len(found) == 1:
            return found[0]
        some = ", ".join(map(self._shown, found[:8])) + (", ..." if len(found) > 8 else "")
        raise UserError(
            f"{self.address} has {len(found) or 'no'} models"
            + (
                f" ({some}); say which one: --model NAME, or model= in Python."
                if found
                else "; load one there first."
            )
        )

    def stream(
        self, messages: Sequence[Message], **settings: Any
    ) -> Generator[ChatPiece, None, None]:
        made = chat_settings(settings)
        body = request_body(self.name, messages, made, stream=True)

        def pieces() -> Generator[ChatPiece, None, None]:
            with closing(self._send("POST", "/chat/completions", body)) as response:
                kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind != "text/event-stream":  # a server that does not stream
                    reply = whole_reply(parse(self._body_of(response)))
                    check_form(made, reply)
                    yield ChatPiece(reply.text, reply)
                    return
                with self._listening():
                    for piece in self._events(response):
                        if piece.reply is not None:
                            check_form(made, piece.reply)
                        yield piece

        return self._explained(pieces())

    def replies(self, conversations: Sequence[Sequence[Message]], **settings: Any) -> list[Reply]:
        made = chat_settings(settings)
        bodies = []
        for index, messages in enumerate(conversations):
            try:
                body = request_body(self.name, messages, made, stream=False)
            except UserError as error:
                raise numbered(error, index, len(conversations)) from error
            if made.seed is not None:
                body["seed"] = made.seed + index
            bodies.append(body)
        if len(bodies) == 1:
            return [self._whole(bodies[0], made)]
        pool = ThreadPoolExecutor(max_workers=self.concurrency)
        try:
            waiting = [pool.submit(self._whole, body, made) for body in bodies]
            replies = []
            for index, future in enumerate(waiting):
                try:
                    replies.append(future.result())
                except (UserError, RunError) as error:
                    raise numbered(error, index, len(bodies)) from error
            return replies
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    # --------------------------------------------------------------------- requests

    def _whole(self, body: dict[str, Any], settings: SamplingSettings) -> Reply:
        with (
            self._explaining(),
            closing(self._send("POST", "/chat/completions", body)) as response,
        ):
            reply = whole_reply(parse(self._body_of(response)))
            check_form(settings, reply)
            return reply

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        """A response that says yes and waits to be read, or the error as a sentence."""
        attempt = 0
        while True:
            if body is not None:
                body = {self._limit_name if k in LENGTHS else k: v for k, v in body.items()}
            request = self._client.build_request(method, self.address + path, json=body)
            wait: float | None = min(0.5 * 2**attempt, 8.0) * random.uniform(0.75, 1.25)
            failure: UserError | RunError
            try:
                response = self._client.send(request, stream=True)
            except httpx2.TransportError as error:
                failure = self._unreachable(error)
                if not isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError):
                    wait = None
            else:
                if response.is_success:
                    return response
                with closing(response):
                    said = self._what_it_says(response)
                if body is not None and self._other_limit(response.status_code, said, body):
                    continue
                failure = self._refused(response, said)
                wait = self._wait(response, wait) if response.status_code in BUSY else None
            if wait is None or wait > LONGEST_WAIT or attempt >= self.retries:
                raise failure
            sleep(wait)
            attempt += 1

    def _other_limit(self, status: int, said: str, body: dict[str, Any]) -> bool:
        """Whether the server wants the limit under its newer name, as OpenAI's newer models do.

        What counts is the name in this request: several may be under way when it is found out.
        """
        if status != 400 or LENGTHS[1] not in said or LENGTHS[1] in body:
            return False
        self._limit_name = LENGTHS[1]
        return True

    def _body_of(self, response: httpx2.Response) -> bytes:
        """The whole body, read within the limit."""
        parts, size = [], 0
        with self._listening():
            for part in response.iter_bytes():
                parts.append(part)
                size += len(part)
                if size > LIMIT:
                    raise RunError(f"{self.address} sends more than an answer can be; given up.")
        return b"".join(parts)

    def _events(self, response: httpx2.Response) -> Iterator[ChatPiece]:
        response.encoding = "utf-8"  # whatever the header says: events have no other
        growing = Growing()
        for event in httpx2.EventSource(response, max_event_size=LIMIT):
            if event.data.strip() == "[DONE]":
                growing.reason = growing.reason or "stop"
                break
            text = growing.push(parse(event.data))
            if growing.size > LIMIT:
                raise RunError(f"{self.address} sends more than an answer can be; given up.")
            if text:
                yield ChatPiece(text)
        if growing.reason is None:
            raise BrokenAnswer("the answer broke off before its end")
        yield ChatPiece("", growing.reply())

    # --------------------------------------------------------------------- sentences

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """What goes wrong on the way, once an answer has begun, as sentences."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise RunError(self._silent()) from error
        except (httpx2.TransportError, httpx2.DecodingError) as error:
            raise RunError(
                f"{self.address}: the answer broke off before its end ({self._shown(error)}); "
                "ask again."
            ) from error

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """What an answer breaks of the protocol, as a sentence."""
        try:
            yield
        except BrokenAnswer as error:
            raise RunError(f"{self.address}: {self._shown(error)}.") from error

    def _explained(
        self, pieces: Generator[ChatPiece, None, None]
    ) -> Generator[ChatPiece, None, None]:
        with self._explaining(), closing(pieces):
            yield from pieces

    def _shown(self, said: object) -> str:
        """A server's words for a sentence of ours: one line, printable, short, without the key."""
        text = " ".join(str(said).split())
        if self._key:
            text = text.replace(self._key, "***")
        text = "".join(c for c in text if c.isprintable())
        return text[:297] + "..." if len(text) > 300 else text.rstrip(".")

    def _silent(self) -> str:
        return (
            f"{self.address} has been silent for {self.timeout:g} seconds; ask for a shorter "
            "answer, or allow a longer timeout."
        )

    def _unreachable(self, error: httpx2.TransportError) -> RunError:
        if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
            return RunError(
                f"Nobody answers at {self.address} ({self._shown(error) or 'no connection'}); "
                "start the server, or correct the address."
            )
        if isinstance(error, httpx2.TimeoutException):
            return RunError(self._silent())
        return RunError(
            f"{self.address} dropped the connection without an answer ({self._shown(error)}); "
            "see whether an OpenAI-compatible server runs there."
        )

    def _what_it_says(self, response: httpx2.Response) -> str:
        """The error message in a response, or the beginning of whatever else it holds."""
        data = b""
        with suppress(httpx2.TransportError, httpx2.DecodingError):
            for part in response.iter_bytes():
                data += part
                if len(data) > 2**16:
                    break
        try:
            return self._shown(error_in(parse(data)))
        except BrokenAnswer:
            text = data.decode("utf-8", errors="replace")
            return "" if text.lstrip().startswith("<") else self._shown(text)

    def _refused(self, response: httpx2.Response, said: str) -> UserError | RunError:
        status = response.status_code
        because = f": {said}" if said else ""
        if status in (401, 403):
            had = f"does not accept the key of {KEY_VARIABLE}" if self._key else "wants a key"
            return UserError(
                f"{self.address} {had} ({status}{because}); set the environment variable "
                f"{KEY_VARIABLE} to one that it knows."
            )
        if status == 404:
            return self._missing(response, because)
        if status == 429:
            wait = self._wait(response, None)
            later = "later" if wait is None else f"in {wait:.0f} seconds"
            return RunError(f"{self.address} is asked too often (429{because}); try again {later}.")
        if status >= 500:
            return RunError(f"{self.address} failed ({status}{because}); see what it reports.")
        if status < 400:
            to = self._shown(response.headers.get("location", "nowhere"))
            return UserError(f"{self.address} points to another address ({status}: {to}).")
        if status in (400, 413) and TOO_LONG.search(said):
            return PromptTooLong(f"{self.address}: the messages do not fit ({said}).")
        return UserError(f"{self.address} refuses the request ({status}{because}).")

    def _missing(self, response: httpx2.Response, because: str) -> UserError:
        path = response.request.url.path
        if path.endswith("/models") or "model" not in because.lower():
            return UserError(
                f"There is no {path} at this server (404{because}); the address of an "
                "OpenAI-compatible server usually ends in /v1."
            )
        near = ""
        with suppress(UserError, RunError, BrokenAnswer):
            known = self.models()
            near = nearest(self.name, known) or f" It has {', '.join(known[:5])}."
        return UserError(f"{self.address} has no model '{self.name}'. {self._shown(near)}".rstrip())

    def _wait(self, response: httpx2.Response, otherwise: float | None) -> float | None:
        """Seconds until the next try; None where there shall be none."""
        asked = response.headers.get("retry-after", "").strip()
        if not asked:
            return otherwise
        try:
            seconds = float(asked)
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
            except (ValueError, TypeError, OverflowError):
                return otherwise
        return max(seconds, 0.0) if math.isfinite(seconds) else otherwise
