"""Servers as they are run: signals, clients that leave, and what is said at the start."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.run import address_of, bind, listen
from llm_from_scratch.serve.service import make_service
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import save_folder
from tests.generate.conftest import make_model
from tests.serve.servers import PATIENCE, Process, Running, process

posix = pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
LONG = 8000  # tokens of a text that is still being written when the test does something


@pytest.fixture(scope="module")
def long_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that can write for a while."""
    path: Path = tmp_path_factory.mktemp("served") / "long"
    model = make_model(vocab_size=tokenizer.vocab_size, max_seq_len=2 * LONG)
    save_folder(model, tokenizer, path)
    return str(path)


def ask(tokens: int, *, stream: bool = False, model: str = "") -> dict[str, Any]:
    """The body of a request whose text does not end before so many tokens."""
    ends = {str(token): -100 for token in range(3)}
    return {
        "model": model, "prompt": [5], "max_tokens": tokens, "stream": stream, "seed": 1,
        "logit_bias": ends,
    }  # fmt: skip


class Request:
    """A request to /v1/completions by hand, of which the last byte is sent later or never."""

    def __init__(self, address: str, body: dict[str, Any], key: str = "") -> None:
        host, _, port = address.removeprefix("http://").rpartition(":")
        self.connection = socket.create_connection((host, int(port)), timeout=PATIENCE)
        text = json.dumps(body).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        self.connection.sendall(head.encode() + text[:-1])
        self.rest = text[-1:]

    def complete(self) -> None:
        self.connection.sendall(self.rest)

    def answer(self) -> tuple[int, Any]:
        """The status and the JSON of the answer."""
        parts = []
        while part := self.connection.recv(65536):
            parts.append(part)
        head, _, body = b"".join(parts).partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()


def settle(server: Process, name: str, value: float) -> None:
    """Wait until a metric has this value."""
    give_up = threading.Event()
    timer = threading.Timer(PATIENCE, give_up.set)
    timer.start()
    while server.metric(name) != value:
        assert not give_up.is_set(), f"{name} is still {server.metric(name)}"
    timer.cancel()


def assert_refuses(server: Process) -> None:
    """Ask until the server says that it takes nothing new, and see how it says so."""
    while httpx2.get(f"{server.address}/healthz", timeout=60).status_code != 503:
        pass
    answer = httpx2.post(f"{server.address}/v1/completions", json=ask(1), timeout=60)
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "shutting_down"


def assert_ended(server: Process) -> None:
    assert server.process.wait(PATIENCE) == 0
    server.wait_for("has ended")
    assert not any("Traceback" in line for line in server.lines.queue)


@posix
def test_a_signal_lets_finish_what_was_begun(model_folder: str) -> None:
    with process([model_folder]) as server, Request(server.address, ask(40)) as request:
        settle(server, "scratchlm_requests_in_flight", 1)
        server.process.send_signal(signal.SIGTERM)
        assert_refuses(server)
        request.complete()
        status, body = request.answer()
        assert status == 200
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 40
        assert_ended(server)


@posix
def test_a_second_signal_ends_at_once(model_folder: str) -> None:
    with process([model_folder]) as server, Request(server.address, ask(40)):
        settle(server, "scratchlm_requests_in_flight", 1)
        server.process.send_signal(signal.SIGINT)
        assert_refuses(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


@pytest.fixture(scope="module")
def server(long_folder: str) -> Iterator[Process]:
    """A server that has nothing to do at its end, and therefore ends at once when it is asked."""
    with process([long_folder, "--max_new_tokens", str(LONG), "--cache_tokens", "20000"]) as it:
        yield it
        if sys.platform != "win32":
            with httpx2.Client(base_url=it.address) as client:  # an idle connection is no reason
                assert client.get("/healthz").status_code == 200
                it.process.send_signal(signal.SIGTERM)
                assert_ended(it)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_text(server: Process, stream: bool) -> None:
    before = server.metric("scratchlm_new_tokens_total")
    with Request(server.address, ask(LONG, stream=stream)) as request:
        request.complete()
        settle(server, "scratchlm_running_texts", 1)
    settle(server, "scratchlm_running_texts", 0)
    assert server.metric("scratchlm_new_tokens_total") - before < LONG
    assert server.metric("scratchlm_cache_pages_held") == 0
    steps = server.metric("scratchlm_steps_total")
    answer = httpx2.post(f"{server.address}/v1/completions", json=ask(3), timeout=60)
    assert answer.status_code == 200
    # Nothing was done in between: the next text begins where the count stood.
    assert server.metric("scratchlm_steps_total") <= steps + 4


def test_texts_that_outlast_the_grace_end_with_what_they_have(
    writer: Callable[..., ServedModel], start: Callable[..., Running]
) -> None:
    limits = Limits(cache_tokens=20_000, max_new_tokens=LONG)
    served = writer(limits, max_seq_len=2 * LONG)
    running = start(make_service({"tiny": served}, limits), grace=0.0)
    body = ask(LONG, stream=True)
    url = f"{running.address}/v1/completions"
    with httpx2.stream("POST", url, json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        running.server.ask_to_end()
        *_, last, end = lines
    assert end == "data: [DONE]"
    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_the_start_says_what_is_served(model_folder: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# mine\nfirst-key\n\nsecond-key\n")
    arguments = [f"mine={model_folder}", "--api_keys", str(keys), "--allowed_hosts", "box.lan"]
    with process(arguments, SCRATCHLM_API_KEYS="third-key") as server:
        server.wait_for(r"^mine: 0\.\d M parameters, float32 on cpu, context 512 tokens; its cache")
        for key in ("first-key", "second-key", "third-key"):
            authorised = {"Authorization": f"Bearer {key}", "Host": "box.lan"}
            answer = httpx2.get(f"{server.address}/v1/models", headers=authorised, timeout=60)
            assert [model["id"] for model in answer.json()["data"]] == ["mine"]
        assert httpx2.get(f"{server.address}/v1/models").status_code == 401
        evil = {"Host": "evil.example"}
        assert httpx2.get(f"{server.address}/", headers=evil).status_code == 421
        server.wait_for("GET / 421")
        assert not any("-key" in line for line in server.lines.queue)


def test_sockets() -> None:
    with bind("127.0.0.1", 0) as bound:
        listen(bound)
        port = bound.getsockname()[1]
        assert address_of(bound) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"Port {port} is in use already"):
            bind("127.0.0.1", port)
    for host in ("no.such.host.invalid", "192.0.2.1", "a" * 300, ""):
        with pytest.raises(UserError, match="no address of this machine"):
            bind(host, 0)
    with bind("0.0.0.0", 0) as bound:
        assert address_of(bound).startswith("http://127.0.0.1:")
