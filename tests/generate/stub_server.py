"""A small HTTP server on loopback that answers what a test has written down for it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """`chunks` go out one by one; then the answer ends, is "cut", falls silent or never ends."""

    chunks: Sequence[bytes] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    then: str = "end"  # end | cut | silent | endless


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Stub:
    """The server: `answers` are used up in turn, `requests` are what came."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.by_content: dict[str, Answer] = {}  # the last message's content -> answer
        self.requests: list[Request] = []
        self.released = threading.Event()  # ends what is silent
        self.client_left = threading.Event()
        self.address = ""

    def add(self, *answers: Answer) -> None:
        self.answers += answers

    def take(self, request: Request) -> Answer:
        self.requests.append(request)
        if isinstance(request.body, dict) and self.by_content:
            return self.by_content[request.body["messages"][-1]["content"]]
        return self.answers.pop(0)


def as_json(value: Any, status: int = 200, **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return Answer([data], status, {"Content-Type": "application/json", **named})


def reply(text: str, **more: Any) -> Answer:
    """A whole answer as OpenAI gives it."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, **more}
    choice.setdefault("finish_reason", "stop")
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return as_json({"object": "chat.completion", "choices": [choice], "usage": usage})


def delta(text: str | None, reason: str | None = None) -> bytes:
    content = {"role": "assistant"} if text is None else {"content": text}
    choice = {"index": 0, "delta": content, "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}\n\n'
DONE = b"data: [DONE]\n\n"


def events(*chunks: bytes, then: str = "end", content_type: str = "text/event-stream") -> Answer:
    return Answer(chunks, headers={"Content-Type": content_type}, then=then)


def told(text: str) -> Answer:
    """A streamed answer in one piece."""
    return events(delta(None), delta(text), delta("", "stop"), USAGE, DONE)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def answer(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.loads(data) if data else None
        said = self.stub.take(Request(self.command, self.path, dict(self.headers), body))
        if said.status == 0:  # hang up without a word
            self.close_connection = True
            return
        self.send_response(said.status)
        for name, value in said.headers.items():
            self.send_header(name, value)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in said.chunks:
            self.send_chunk(chunk)
        if said.then == "silent":
            self.stub.released.wait(60)
        while said.then == "endless" and self.send_chunk(said.chunks[-1]):
            pass
        if said.then == "end":
            self.wfile.write(b"0\r\n\r\n")
        else:
            self.close_connection = True

    def send_chunk(self, chunk: bytes) -> bool:
        """Whether somebody still listens."""
        try:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            self.wfile.flush()
        except OSError:
            self.stub.client_left.set()
            return False
        return not self.stub.released.is_set()

    do_GET = do_POST = answer

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: Any) -> None:
        """Clients may leave when they like; what a test waits for it will miss."""


@contextmanager
def serving() -> Iterator[Stub]:
    """A stub that answers in a thread of its own."""
    stub = Stub()
    server = Server(("127.0.0.1", 0), type("Bound", (Handler,), {"stub": stub}))
    stub.address = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield stub
    finally:
        stub.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
