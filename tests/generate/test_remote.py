"""`RemoteChat` against a real server on loopback: what is sent, what is read, what is said."""

from __future__ import annotations

import email.utils
import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate import remote
from llm_from_scratch.generate.address import checked_address
from llm_from_scratch.generate.chat import ChatPiece, Logprob, PromptTooLong, Usage
from llm_from_scratch.generate.conversation import Conversation
from llm_from_scratch.generate.remote import RemoteChat
from llm_from_scratch.generate.sampling import SamplingSettings
from tests.generate.stub_server import (
    DONE,
    USAGE,
    Answer,
    Stub,
    as_json,
    delta,
    events,
    reply,
    serving,
    told,
)

HELLO = [{"role": "user", "content": "Hello"}]
KEY = "sk-secret-0123456789"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("SCRATCHLM_API_KEY", raising=False)
    with serving() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(remote, "sleep", slept.append)
    return slept


@pytest.fixture
def chat(stub: Stub, waits: list[float]) -> Iterator[RemoteChat]:
    with RemoteChat(stub.address, "tiny", timeout=20.0) as opened:
        yield opened  # type: ignore[misc]


def shown(pieces: list[ChatPiece]) -> list[str]:
    return [piece.text for piece in pieces]


# ------------------------------------------------------------------------- what is sent


def test_only_what_is_asked_for_is_sent(chat: RemoteChat, stub: Stub) -> None:
    stub.add(reply("Hi."))
    answer = chat.reply(HELLO)
    assert (answer.text, answer.finish_reason, answer.usage) == ("Hi.", "stop", Usage(7, 3))
    assert answer.logprobs is None
    assert answer.result is None
    (request,) = stub.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.body == {
        "model": "tiny", "messages": HELLO, "max_tokens": 128, "temperature": 0.8,
    }  # fmt: skip
    assert "Authorization" not in request.headers


def test_every_setting_has_its_name_in_the_protocol(chat: RemoteChat, stub: Stub) -> None:
    stub.add(reply('{"a": 1}'))
    schema = {"type": "object"}
    chat.reply(
        HELLO, max_new_tokens=9, temperature=0.0, top_k=4, top_p=0.5, min_p=0.1, seed=3,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.3, stop=("a", "b"),
        logit_bias={5: -100}, logprobs=2, json_schema=json.dumps(schema),
    )  # fmt: skip
    assert stub.requests[0].body == {
        "model": "tiny", "messages": HELLO, "max_tokens": 9, "temperature": 0.0, "top_k": 4,
        "top_p": 0.5, "min_p": 0.1, "seed": 3, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "stop": ["a", "b"], "logit_bias": {"5": -100.0},
        "logprobs": True, "top_logprobs": 2,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "setting",
    [
        {"prompt_logprobs": 0}, {"num_beams": 2, "temperature": 0.0},
    ],
)  # fmt: skip
def test_what_a_server_cannot_be_asked_is_refused(
    chat: RemoteChat, stub: Stub, setting: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=f"{next(iter(setting))} is nothing that can be asked"):
        chat.stream(HELLO, **setting)
    with pytest.raises(UserError, match="json_schema is not valid JSON"):
        chat.stream(HELLO, json_schema="{")
    with pytest.raises(UserError, match=r"^Conversation 2 of 2: Message 1"):
        chat.replies([HELLO, [{"role": "user"}]])
    assert stub.requests == []


@pytest.mark.parametrize(
    ("setting", "good"),
    [({"choice": ["yes", " no"]}, "no"), ({"regex": r"\d+"}, "42"), ({"regex": r"\p{L}"}, "?")],
)
def test_a_form_that_a_server_ignores_is_noticed(
    chat: RemoteChat, stub: Stub, setting: dict[str, Any], good: str
) -> None:
    """Not every server knows these settings; what they then answer is an error."""
    stub.add(reply(good), reply("maybe", finish_reason="length"))
    assert chat.reply(HELLO, **setting).text == good
    assert chat.reply(HELLO, **setting).text == "maybe"
    name, value = next(iter(setting.items()))
    assert stub.requests[0].body[name] == value
    if good == "?":  # a pattern of another dialect cannot be looked at here
        return
    stub.add(reply("maybe"), reply("maybe"))
    with pytest.raises(RunError, match=f"no notice of {name}: it answers 'maybe'"):
        chat.reply(HELLO, **setting)
    with pytest.raises(RunError, match=f"no notice of {name}"):
        list(chat.stream(HELLO, **setting))


def test_the_newer_name_of_the_limit(chat: RemoteChat, stub: Stub) -> None:
    error = {
        "message": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        "code": "unsupported_parameter",
    }
    stub.add(as_json({"error": error}, 400), reply("one"), reply("two"))
    assert [chat.reply(HELLO).text, chat.reply(HELLO).text] == ["one", "two"]
    assert [sorted(request.body)[0] for request in stub.requests] == [
        "max_tokens", "max_completion_tokens", "max_completion_tokens",
    ]  # fmt: skip


def test_the_newer_name_found_out_by_another_thread(
    chat: RemoteChat, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = chat._client.send

    def meanwhile(*arguments: Any, **more: Any) -> Any:
        chat._limit_name = "max_completion_tokens"
        return send(*arguments, **more)

    monkeypatch.setattr(chat._client, "send", meanwhile)
    error = {"message": "Use 'max_completion_tokens' instead."}
    stub.add(as_json({"error": error}, 400), reply("one"))
    assert chat.reply(HELLO).text == "one"


def test_many_conversations_keep_their_order(chat: RemoteChat, stub: Stub) -> None:
    names = [f"number {i}" for i in range(20)]
    stub.by_content = {name: reply(name.upper()) for name in names}
    conversations = [[{"role": "user", "content": name}] for name in names]
    replies = chat.replies(conversations, seed=100)
    assert [one.text for one in replies] == [name.upper() for name in names]
    seeds = {r.body["messages"][0]["content"]: r.body["seed"] for r in stub.requests}
    assert seeds == {name: 100 + i for i, name in enumerate(names)}
    assert chat.replies([]) == []
    stub.by_content["number 7"] = as_json({"error": {"message": "too rude"}}, 400)
    with pytest.raises(UserError, match=r"Conversation 8 of 20: .*refuses .*\(400: too rude\)"):
        chat.replies(conversations)


# ------------------------------------------------------------------------- what is read


def test_pieces_come_as_they_are_sent(chat: RemoteChat, stub: Stub) -> None:
    stub.add(
        events(
            b": a comment\n\n", delta(None), delta("\n"), delta(" Once"), delta(" upon"),
            delta("", "length"), USAGE, DONE,
        )
    )  # fmt: skip
    pieces = list(chat.stream(HELLO))
    assert shown(pieces) == ["Once", " upon", ""]
    last = pieces[-1].reply
    assert last is not None
    assert (last.text, last.finish_reason, last.usage) == ("Once upon", "length", Usage(5, 2))
    assert all(piece.reply is None for piece in pieces[:-1])
    assert stub.requests[0].body["stream"] is True
    assert stub.requests[0].body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("content_type", ["text/event-stream", "text/event-stream; charset=latin1"])
def test_characters_and_lines_split_between_chunks(
    chat: RemoteChat, stub: Stub, content_type: str
) -> None:
    data = delta("むかし🙂") + delta("、王様", "stop") + DONE
    data = data.replace(b"\n", b"\r\n")
    single = [data[i : i + 1] for i in range(len(data))]
    stub.add(events(*single, content_type=content_type))
    assert shown(list(chat.stream(HELLO))) == ["むかし🙂", "、王様", ""]


def test_an_end_without_done_and_a_done_without_reason(chat: RemoteChat, stub: Stub) -> None:
    stub.add(events(delta("a", "stop")), events(delta("b"), DONE))
    for text in "ab":
        last = list(chat.stream(HELLO))[-1].reply
        assert last is not None
        assert (last.text, last.finish_reason, last.usage) == (text, "stop", None)


def test_a_server_that_does_not_stream(chat: RemoteChat, stub: Stub) -> None:
    stub.add(reply(" All at once."))
    (piece,) = chat.stream(HELLO)
    assert piece.reply is not None
    assert piece.text == piece.reply.text == "All at once."


def test_logprobs_whole_and_streamed(chat: RemoteChat, stub: Stub) -> None:
    row = {
        "token": "a", "logprob": -0.5, "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}],
    }  # fmt: skip
    wanted = Logprob("a", -0.5, (("a", -0.5), ("b", -1.5)))
    stub.add(reply("a", logprobs={"content": [row]}))
    assert chat.reply(HELLO, logprobs=2).logprobs == (wanted,)
    choice = {"delta": {"content": "a"}, "logprobs": {"content": [row]}}
    chunk = b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"
    stub.add(events(chunk, chunk, delta("", "stop"), DONE))
    last = list(chat.stream(HELLO, logprobs=2))[-1].reply
    assert last is not None
    assert last.logprobs == (wanted, wanted)


def test_an_answer_that_nobody_reads_on_is_given_up(chat: RemoteChat, stub: Stub) -> None:
    stub.add(events(delta("on and on "), then="endless"))
    pieces = chat.stream(HELLO)
    assert next(pieces).text == "on and on "
    pieces.close()
    assert stub.client_left.wait(30)


# ------------------------------------------------------------------------- what goes wrong


def test_a_stream_that_is_cut(chat: RemoteChat, stub: Stub) -> None:
    for answer in (
        events(delta("Once"), then="cut"),
        events(delta("Once"), delta("upon")[:20], then="cut"),
        events(delta("Once")),
    ):
        stub.add(answer)
        heard = []
        with pytest.raises(RunError, match="the answer broke off before its end"):
            for piece in chat.stream(HELLO):
                heard.append(piece.text)
        assert heard == ["Once"]
    stub.add(Answer([b'{"choices": ['], headers={"Content-Type": "application/json"}, then="cut"))
    with pytest.raises(RunError, match="the answer broke off before its end"):
        chat.reply(HELLO)


def test_a_silent_server_is_given_up(stub: Stub) -> None:
    with RemoteChat(stub.address, "tiny", timeout=0.2) as chat:
        stub.add(events(delta("Once"), then="silent"), Answer(then="silent"))
        heard = []
        with pytest.raises(RunError, match=r"has been silent for 0\.2 seconds"):
            for piece in chat.stream(HELLO):
                heard.append(piece.text)
        assert heard == ["Once"]
        with pytest.raises(RunError, match="has been silent"):
            chat.reply(HELLO)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (events(b'data: {"error": {"message": "overloaded"}}\n\n'), ": overloaded.$"),
        (events(b"data: {\n\n"), "the answer is not JSON"),
        (events(b"data: [1]\n\n"), "the answer is no JSON object"),
        (events(b"data: \xff\n\n"), "the answer is not JSON"),
        (events(b'data: {"choices": 3}\n\n'), "choices are no list"),
        (events(b'data: {"choices": [{"delta": {"content": 3}}]}\n\n'), "content is no text: 3"),
        (events(b'data: {"choices": [{"delta": 3}]}\n\n'), "content is no text: 3"),
        (
            events(b'data: {"choices": [{"logprobs": {"content": [3]}}]}\n\n'),
            "logprobs cannot be read",
        ),
        (
            events(
                b'data: {"choices": [{"logprobs": {"content": [{"token": "a", "logprob": 1'
                + b"0" * 400
                + b"}]}}]}\n\n"
            ),
            "logprobs cannot be read",
        ),
        (as_json(b"<html>hello</html>"), "the answer is not JSON: '<html>"),
        (as_json(b"[" * 100_000), "the answer is not JSON"),
        (as_json({}), "the answer has no message"),
        (as_json({"choices": [{}]}), "the answer has no message"),
        (as_json({"object": "error", "message": "no luck"}), ": no luck.$"),
    ],
)
def test_answers_that_are_none(chat: RemoteChat, stub: Stub, answer: Answer, sentence: str) -> None:
    stub.add(answer)
    with pytest.raises(RunError, match=sentence):
        list(chat.stream(HELLO))


def test_an_answer_without_end_is_given_up(
    chat: RemoteChat, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LIMIT", 1000)
    silent = {"delta": {}, "logprobs": {"content": [{"token": "a", "logprob": -1}] * 9}}
    for answer in (
        events(delta("more " * 9), then="endless"),
        events(b"data: " + json.dumps({"choices": [silent]}).encode() + b"\n\n", then="endless"),
        events(b"data: no line end ", then="endless"),
        Answer([b"{" * 100], headers={"Content-Type": "application/json"}, then="endless"),
    ):
        stub.add(answer)
        with pytest.raises(RunError, match=r"more than an answer can be|exceeded the 1000 byte"):
            list(chat.stream(HELLO))


OPENAI_404 = {"error": {"message": "The model `tiny` does not exist", "code": "model_not_found"}}


@pytest.mark.parametrize(
    ("answer", "kind", "sentence"),
    [
        (as_json({"error": "no"}, 401), UserError, r"wants a key \(401: no\); set the environment"),
        (as_json({}, 403), UserError, r"wants a key \(403\); set the environment variable SCRATCH"),
        (as_json({"detail": "Not Found"}, 404), UserError, "There is no /v1/chat/completions at"),
        (
            as_json({"detail": [{"msg": "bad"}]}, 422),
            UserError,
            r"refuses the request \(422: .*bad",
        ),
        (as_json(b"<p>" + b"x" * 999, 400), UserError, r"refuses the request \(400\)\.$"),
        (as_json(b"plain\x1b[31m words", 400), UserError, r"\(400: plain\[31m words\)"),
        (as_json({"error": {"message": "x" * 900}}, 400), UserError, r"\(400: x{297}\.{3}\)"),
        (as_json({}, 307, Location="http://b/"), UserError, r"points to another .*307: http://b/"),
        (as_json({}, 500), RunError, r"failed \(500\); see what it reports"),
        (
            as_json({"error": {"message": "This model's maximum context length is 8"}}, 400),
            PromptTooLong,
            "the messages do not fit .*maximum context length is 8",
        ),
    ],
)
def test_refusals_are_sentences(
    chat: RemoteChat, stub: Stub, answer: Answer, kind: type[Exception], sentence: str
) -> None:
    stub.add(answer, answer)
    for ask in (lambda: chat.reply(HELLO), lambda: list(chat.stream(HELLO))):
        with pytest.raises(kind, match=sentence) as error:
            ask()
        assert "\n" not in str(error.value)
        assert str(error.value).startswith(stub.address) or "There is no /v1" in str(error.value)
    assert len(stub.requests) == 2


def test_the_nearest_model_is_named(chat: RemoteChat, stub: Stub) -> None:
    models = {"data": [{"id": "tinny"}, {"id": "large"}]}
    stub.add(as_json(OPENAI_404, 404), as_json(models))
    with pytest.raises(UserError, match=r"has no model 'tiny'\. Did you mean 'tinny'\?$"):
        chat.reply(HELLO)
    stub.add(as_json(OPENAI_404, 404), as_json({"data": [{"id": "large"}]}))
    with pytest.raises(UserError, match=r"has no model 'tiny'\. It has large\.?$"):
        chat.reply(HELLO)
    stub.add(as_json(OPENAI_404, 404), as_json({}, 500))
    with pytest.raises(UserError, match=r"has no model 'tiny'\.$"):
        chat.reply(HELLO)


def test_passing_troubles_are_waited_out(chat: RemoteChat, stub: Stub, waits: list[float]) -> None:
    busy = as_json({"error": {"message": "slow down"}}, 429, Retry_After="7")
    stub.add(busy, as_json({}, 503), reply("at last"))
    assert chat.reply(HELLO).text == "at last"
    assert waits[0] == 7.0
    assert 0.5 < waits[1] < 1.5
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    stub.add(
        as_json({}, 429, Retry_After=date), as_json({}, 429, Retry_After="x"), told("streamed")
    )
    assert shown(list(chat.stream(HELLO)))[0] == "streamed"
    stub.add(as_json({}, 429, Retry_After="nan"), reply("a number"))
    assert chat.reply(HELLO).text == "a number"
    assert waits.pop() < 1.5
    assert 20 < waits[2] <= 30
    assert waits[3] < 1.5
    stub.add(busy, busy, busy)
    with pytest.raises(RunError, match=r"asked too often \(429: slow down\); try again in 7 sec"):
        chat.reply(HELLO)
    assert len(waits) == 6
    stub.add(as_json({}, 429, Retry_After="86400"))
    with pytest.raises(RunError, match="try again in 86400 seconds"):
        chat.reply(HELLO)
    assert len(waits) == 6


def test_a_dropped_connection_is_tried_again(
    chat: RemoteChat, stub: Stub, waits: list[float]
) -> None:
    stub.add(Answer(status=0), reply("back"))
    assert chat.reply(HELLO).text == "back"
    stub.add(*[Answer(status=0)] * 3)
    with pytest.raises(RunError, match="dropped the connection without an answer"):
        chat.reply(HELLO)
    assert len(waits) == 3


def test_nobody_there() -> None:
    with socket.socket() as held:  # bound and not listening: connections are refused
        held.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        chat = RemoteChat(address, "tiny")
        for ask in (lambda: chat.reply(HELLO), lambda: list(chat.stream(HELLO))):
            with pytest.raises(RunError, match=f"^Nobody answers at {address} .*start the server"):
                ask()
        with pytest.raises(RunError, match="Nobody answers"):
            RemoteChat(address)


# ------------------------------------------------------------------------- addresses and keys


@pytest.mark.parametrize(
    ("given", "address", "host"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1", "localhost"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1", "localhost"),
        ("https://a.org/api/v1/chat/completions", "https://a.org/api/v1", "a.org"),
        ("http://[::1]:80/x", "http://[::1]:80/x", "::1"),
    ],
)
def test_addresses(given: str, address: str, host: str) -> None:
    assert checked_address(given) == (address, host)


@pytest.mark.parametrize(
    "wrong",
    ["http://", "http://a:b/v1", "http://a:99999/v1", "ftp://a/v1", "http://a/v1?x=p@",
     "http://a/v1#x", "http://[::1/v1", "http://u:p@a/v1", "http://a b/v1", "http://a/\x00"],
)  # fmt: skip
def test_wrong_addresses_are_sentences(wrong: str) -> None:
    with pytest.raises(UserError, match="address") as error:
        RemoteChat(wrong, "m")
    assert "p@" not in str(error.value)


def test_the_only_model_is_taken(stub: Stub) -> None:
    stub.add(as_json({"data": [{"id": "the-one"}]}))
    assert RemoteChat(stub.address).name == "the-one"
    assert stub.requests[0].path == "/v1/models"
    stub.add(as_json({"data": [{"id": "a"}, {"id": "b"}]}), as_json({"data": []}), as_json({}))
    with pytest.raises(UserError, match=r"has 2 models \(a, b\); say which one"):
        RemoteChat(stub.address)
    with pytest.raises(UserError, match="has no models; load one there first"):
        RemoteChat(stub.address)
    with pytest.raises(RunError, match="does not say which models it has"):
        RemoteChat(stub.address)
    stub.add(as_json({"detail": "Not Found"}, 404))
    with pytest.raises(UserError, match="There is no /v1/models at this server"):
        RemoteChat(stub.address)


def test_the_key_is_sent_and_never_shown(
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("SCRATCHLM_API_KEY", f"{KEY}\n")
    stub.add(as_json({"error": {"message": f"Incorrect API key provided: {KEY}."}}, 401))
    chat = RemoteChat(stub.address, "tiny")
    with pytest.raises(UserError, match=r"does not accept the key of SCRATCHLM_API_KEY") as error:
        chat.reply(HELLO)
    assert stub.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    seen = [str(error.value), repr(error.value), repr(chat), str(vars(chat)["_client"])]
    captured = capsys.readouterr()
    seen += [caplog.text, captured.out, captured.err]
    assert all(KEY not in text for text in seen)
    with pytest.raises(UserError, match="The key has characters") as error:
        RemoteChat(stub.address, "tiny", api_key="秘密")
    assert "秘密" not in str(error.value)


def test_a_key_that_travels_in_the_open_is_told() -> None:
    told_of: list[str] = []
    for address in ("http://127.0.0.1:9", "http://localhost:9", "http://[::1]:9", "https://a.org"):
        RemoteChat(address, "m", KEY, report=told_of.append)
    RemoteChat("http://a.org", "m", "", report=told_of.append)
    assert told_of == []
    RemoteChat("http://192.0.2.7:8000", "m", KEY, report=told_of.append)
    assert len(told_of) == 1
    assert "192.0.2.7 unencrypted" in told_of[0]
    assert KEY not in told_of[0]


def test_no_proxy_stands_between_this_machine_and_itself(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    stub.add(reply("direct"))
    with RemoteChat(stub.address, "tiny") as chat:
        assert chat.reply(HELLO).text == "direct"


# ------------------------------------------------------------------------- conversations


def test_a_conversation_forgets_what_the_server_cannot_hold(chat: RemoteChat, stub: Stub) -> None:
    full = as_json({"error": {"message": "too long", "code": "context_length_exceeded"}}, 400)
    stub.add(told("one"), told("two"), full, told("three"), full, full, full, told("four"))
    conversation = Conversation(chat, SamplingSettings(seed=4), system="S")
    for question, answer in (("a", "one"), ("b", "two"), ("c", "three")):
        assert "".join(conversation.ask(question)) == answer
    assert conversation.forgotten == 2
    sent = [[m["content"] for m in r.body["messages"]] for r in stub.requests]
    assert sent[2:] == [["S", "a", "one", "b", "two", "c"], ["S", "b", "two", "c"]]
    assert [r.body["seed"] for r in stub.requests] == [4, 5, 6, 6]
    before = list(conversation.messages)
    with pytest.raises(UserError, match="do not fit"):
        list(conversation.ask("d" * 99))
    assert conversation.messages == before
    assert conversation.forgotten == 2  # and not more for a message that fits nowhere
    assert "".join(conversation.ask("d")) == "four"
    sent = [m["content"] for m in stub.requests[-1].body["messages"]]
    assert sent == ["S", "b", "two", "c", "three", "d"]


def test_what_came_before_a_break_is_kept(chat: RemoteChat, stub: Stub) -> None:
    stub.add(events(delta("Once upon "), then="cut"))
    conversation = Conversation(chat)
    with pytest.raises(RunError, match="broke off"):
        list(conversation.ask("Tell me"))
    assert conversation.messages[-1] == {"role": "assistant", "content": "Once upon"}
    assert conversation.reply is None
