"""What every request passes: hosts, keys, bodies, headers, the log, and clients that go away."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from llm_from_scratch.serve.guard import Connection, Watchman, host_of
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.service import Service, make_service
from tests.serve.servers import Running

Start = Callable[..., Running]
PATIENCE = 60.0


@pytest.fixture
def bare() -> Callable[..., Service]:
    """A service without models: the guards need none."""
    return lambda limits=None, **options: make_service({}, limits, **options)


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error, which is in OpenAI's shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"] and body["error"]["type"]
    found: dict[str, Any] = body["error"]
    return found


def said(address: str, request: bytes) -> bytes:
    """What comes back for these bytes, until the server closes the connection."""
    host, _, port = address.removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        connection.sendall(request)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def test_security_headers_are_on_every_answer(bare: Callable[..., Service], start: Start) -> None:
    address = start(bare()).address
    for path in ("/healthz", "/nowhere", "/page/nothing.js", "/metrics"):
        headers = httpx2.get(address + path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self'; ") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY"
        assert "server" not in headers and "access-control-allow-origin" not in headers
    assert httpx2.get(f"{address}/nowhere").headers["cache-control"] == "no-store"
    assert httpx2.get(f"{address}/page/nothing.js").headers["cache-control"] == "no-cache"


def test_unknown_addresses_and_methods(bare: Callable[..., Service], start: Start) -> None:
    address = start(bare()).address
    answer = httpx2.get(f"{address}/v2/nothing")
    assert answer.status_code == 404 and error_of(answer)["type"] == "invalid_request_error"
    answer = httpx2.delete(f"{address}/healthz")
    assert answer.status_code == 405 and error_of(answer)
    assert "GET" in answer.headers["allow"]


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost:8000", "localhost"),
        ("LOCALHOST", "localhost"),
        ("127.0.0.1", "127.0.0.1"),
        ("[::1]:8000", "::1"),
        ("[::1]", "::1"),
        ("localhost.:80", "localhost"),
        ("evil.example:8000", "evil.example"),
        ("2001:DB8::1", "2001:db8::1"),  # as in --allowed_hosts
        ("", ""),
    ],
)
def test_the_name_in_a_header_host(host: str, name: str) -> None:
    assert host_of(host) == name


def test_only_known_hosts_are_answered(bare: Callable[..., Service], start: Start) -> None:
    address = start(bare(hosts=("localhost", "127.0.0.1", "::1", "box.lan"))).address
    for host in ("localhost:1", "127.0.0.1", "[::1]:80", "box.lan"):
        assert httpx2.get(f"{address}/healthz", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        answer = httpx2.get(f"{address}/healthz", headers={"Host": host})
        assert answer.status_code == 421 and error_of(answer)["code"] == "unknown_host"


def test_keys(bare: Callable[..., Service], start: Start) -> None:
    address = start(bare(keys=("first-key", "second-key"))).address
    for path in ("/metrics", "/openapi.json", "/v1/models", "/api/page", "/pages", "/docsx"):
        for wrong in (None, "Bearer wrong", "Basic first-key", "Bearer first-ke", "Bearer"):
            given = {} if wrong is None else {"Authorization": wrong}
            answer = httpx2.get(address + path, headers=given)
            assert answer.status_code == 401, (path, wrong)
            assert error_of(answer)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        for key in ("first-key", "second-key"):
            answer = httpx2.get(address + path, headers={"Authorization": f"Bearer {key}"})
            assert answer.status_code != 401
    for path in ("/", "/healthz", "/page/nothing.js", "/docs/en/nothing"):
        assert httpx2.get(address + path).status_code != 401
    # What is compared are bytes, whatever somebody sends.
    odd = b"GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n"
    assert said(address, odd + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None, "json"])
def test_bodies_must_be_json(kind: str | None, bare: Callable[..., Service], start: Start) -> None:
    """Else a form on another web page could post to this server unseen."""
    address = start(bare()).address
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx2.post(f"{address}/v1/chat/completions", content=b"{}", headers=headers)
    assert answer.status_code == 415 and "application/json" in error_of(answer)["message"]


def test_bodies_have_a_limit(bare: Callable[..., Service], start: Start) -> None:
    address = start(bare(Limits(max_body=1000))).address

    def chunks(count: int) -> Any:
        yield from [b"x" * 100] * count

    json = {"Content-Type": "application/json"}
    for content, refused in (
        (b"x" * 1000, False),
        (b"x" * 1001, True),
        (b"x" * 5_000_000, True),
        (chunks(10), False),
        (chunks(11), True),
        (chunks(5_000), True),
    ):
        answer = httpx2.post(f"{address}/v1/nothing", content=content, headers=json)
        assert (answer.status_code == 413) == refused
        assert not refused or "1,000 bytes" in error_of(answer)["message"]


@pytest.mark.parametrize("more", [b"", b"Expect: 100-continue\r\n"])
def test_a_body_that_is_far_too_large_is_not_waited_for(
    more: bytes, bare: Callable[..., Service], start: Start
) -> None:
    address = start(bare(Limits(max_body=1000))).address
    size = b"2000" if more else b"9" * 18
    head = b"POST /x HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    assert said(address, head + size + b"\r\n" + more + b"\r\n").startswith(b"HTTP/1.1 413 ")


def test_other_pages_may_ask_only_if_they_were_named(
    bare: Callable[..., Service], start: Start
) -> None:
    address = start(bare(origins=("https://good.example",), keys=("secret",))).address
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type, x-stainless-lang",
    }
    for origin, allowed in (("https://good.example", True), ("https://evil.example", False)):
        answer = httpx2.options(f"{address}/v1/x", headers={"Origin": origin, **asks})
        assert (answer.status_code == 200) == allowed
        assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
    answer = httpx2.get(f"{address}/v1/x", headers={"Origin": "https://good.example"})
    assert answer.status_code == 401  # and the page may read why
    assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_draining(bare: Callable[..., Service], start: Start) -> None:
    running = start(bare(), grace=60.0)
    assert httpx2.get(f"{running.address}/healthz").json() == {"status": "ok"}
    running.service.in_flight += 1  # as if an answer were under way
    running.server.ask_to_end()
    answer = httpx2.get(f"{running.address}/healthz")
    assert answer.status_code == 503 and answer.json() == {"status": "draining"}
    answer = httpx2.get(f"{running.address}/v1/models")
    assert answer.status_code == 503 and error_of(answer)["code"] == "shutting_down"
    assert int(answer.headers["retry-after"]) > 0
    assert httpx2.get(f"{running.address}/metrics").status_code == 200


def test_the_log_and_the_metrics_have_no_secrets(
    bare: Callable[..., Service], start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="scratchlm.access")
    running = start(bare(keys=("secret-key",)))
    key = {"Authorization": "Bearer secret-key", "Content-Type": "application/json"}
    address = running.address
    httpx2.post(f"{address}/v1/nothing?q=secret-query", content=b'"secret-text"', headers=key)
    httpx2.get(f"{address}/made%0Aup%1b[31m", headers=key)
    httpx2.request("BREW", f"{address}/healthz", headers=key)
    page = httpx2.get(f"{address}/metrics", headers=key).text
    lines = [record.getMessage() for record in caplog.records if record.name == "scratchlm.access"]
    assert "POST /v1/nothing 404 " in lines[0]
    assert lines[1].startswith("GET /made\\nup\\x1b[31m 404 ")
    assert lines[2].startswith("other /healthz 405 ")
    assert "secret" not in page and not any("secret" in line for line in lines)
    assert 'scratchlm_requests_total{method="GET",route="other",status="404"} 1.0' in page


# ------------------------------------------------------------------- one request, by hand


def scope_of(path: str = "/x", **headers: str) -> Scope:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "method": "POST", "path": path, "headers": pairs}


class Client:
    """A client whose messages come when the test says so."""

    def __init__(self, *messages: Message) -> None:
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        for message in messages:
            self.messages.put_nowait(message)

    async def receive(self) -> Message:
        return await self.messages.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    @property
    def status(self) -> int | None:
        starts = [one["status"] for one in self.sent if one["type"] == "http.response.start"]
        return starts[0] if starts else None


BODY = {"type": "http.request", "body": b"{}", "more_body": False}


def run(work: Any) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await work

    return asyncio.run(limited())


def test_a_client_that_leaves_stops_the_work(bare: Callable[..., Service]) -> None:
    seen: list[str] = []
    begun = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    async def work() -> Client:
        client, service = Client(BODY), bare()
        guarded = Watchman(Connection(app, service), service)
        task = asyncio.create_task(guarded(scope_of(), client.receive, client.send))
        await begun.wait()
        assert service.in_flight == 1
        client.leave()
        await task
        assert service.in_flight == 0
        assert b'status="499"' in service.metrics.page()
        return client

    assert run(work()).sent == []
    assert seen == ["cancelled"]


def test_the_work_behind_an_answer_is_not_stopped(bare: Callable[..., Service]) -> None:
    """When the answer is out, servers report the connection's end in the same words."""
    seen: list[str] = []

    async def work() -> None:
        client, service = Client(BODY), bare()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await PlainTextResponse("done")(scope, receive, send)
            client.leave()
            for _ in range(5):
                await asyncio.sleep(0)
            assert (await receive())["type"] == "http.request"
            assert (await receive())["type"] == "http.disconnect"
            seen.append("finished")

        await Connection(app, service)(scope_of(), client.receive, client.send)

    run(work())
    assert seen == ["finished"]


def test_a_client_that_leaves_while_it_sends(bare: Callable[..., Service]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("the request never came")

    async def work() -> list[Message]:
        client = Client({"type": "http.request", "body": b"{", "more_body": True})
        client.leave()
        await Connection(app, bare())(scope_of(), client.receive, client.send)
        return client.sent

    assert run(work()) == []


def test_a_body_that_does_not_come(
    bare: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_from_scratch.serve.guard.BODY_SECONDS", 0.01)

    async def work() -> int | None:
        client = Client()
        await Connection(PlainTextResponse("x"), bare())(scope_of(), client.receive, client.send)
        return client.status

    assert run(work()) == 408


def test_an_unforeseen_error_is_told_without_its_insides(
    bare: Callable[..., Service], caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("secret insides")

    async def work() -> Client:
        client, service = Client(BODY), bare()
        await Watchman(app, service)(scope_of(), client.receive, client.send)
        return client

    client = run(work())
    assert client.status == 500
    assert b"secret" not in client.sent[1]["body"] and b"server_error" in client.sent[1]["body"]
    assert "secret insides" in caplog.text


def test_too_many_requests_at_once(bare: Callable[..., Service], start: Start) -> None:
    running = start(bare())
    running.service.in_flight = 5000
    answer = httpx2.get(f"{running.address}/v1/models")
    assert answer.status_code == 429 and "retry-after" in answer.headers
    running.service.in_flight = 0


def test_which_model_is_meant(
    writer: Callable[..., ServedModel], bare: Callable[..., Service]
) -> None:
    from llm_from_scratch.serve.errors import ApiError

    served = writer()
    service = make_service({"tiny": served})
    assert service.model(None) is service.model("") is service.model("tiny", "writer") is served
    for name, kind, status in (
        ("tini", None, 404),
        ("tiny", "embedder", 400),
        ("", "embedder", 404),
    ):
        with pytest.raises(ApiError) as refused:
            service.model(name, kind)
        assert refused.value.status == status
    with pytest.raises(ApiError, match="Did you mean 'tiny'") as refused:
        service.model("tini\ud800")
    assert refused.value.code == "model_not_found"
    assert b"?" in refused.value.response().body
    with pytest.raises(ApiError):
        bare().model(None)
