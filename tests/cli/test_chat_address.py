"""`scratchlm chat` with a model at an address: the same talk, told by a server."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from llm_from_scratch.cli.main import run
from llm_from_scratch.core.errors import RunError, UserError
from tests.generate.stub_server import Stub, as_json, delta, events, serving, told


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("SCRATCHLM_API_KEY", raising=False)
    with serving() as server:
        yield server


def chat(monkeypatch: pytest.MonkeyPatch, lines: str, *arguments: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    return run(["chat", *arguments])


def test_lines_are_answered_by_the_server(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = events(delta("never "), delta("ending", "length"))
    stub.add(as_json({"data": [{"id": "tiny"}]}), told("東京です。"), cut)
    flags = ["--system", "Be brief.", "--max_new_tokens", "9"]
    assert chat(monkeypatch, "Capital?\nAnd?\n", stub.address, *flags) == 0
    captured = capsys.readouterr()
    assert captured.out == "東京です。\nnever ending\n"
    assert f"tiny at {stub.address}" in captured.err
    assert "The answer was cut off" in captured.err
    body = stub.requests[-1].body
    assert [message["content"] for message in body["messages"]] == [
        "Be brief.", "Capital?", "東京です。", "And?",
    ]  # fmt: skip
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("tiny", 9, 0.0)
    assert "seed" not in body


def test_a_form_is_asked_for_and_looked_at(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.add(told("bb"))
    with pytest.raises(RunError, match="takes no notice of regex: it answers 'bb'"):
        chat(monkeypatch, "Hello\n", stub.address, "--model", "tiny", "--regex", "a+")
    assert stub.requests[0].body["regex"] == "a+"


def test_json_and_what_is_told_there(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.add(told("Hi."), as_json({"error": "no such thing"}, 400))
    arguments = [stub.address, "--model", "tiny", "--json", "--seed", "3"]
    assert chat(monkeypatch, "Hello\nWhat?\n", *arguments) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {
        "message": "Hello", "answer": "Hi.", "finish_reason": "stop", "prompt_tokens": 5,
        "new_tokens": 2,
    }  # fmt: skip
    assert "refuses the request (400: no such thing)" in second["error"]
    assert [request.body["seed"] for request in stub.requests] == [3, 4]


def test_a_server_that_fails_ends_what_is_piped(
    stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.add(as_json({}, 500))
    with pytest.raises(RunError, match=r"failed \(500\)"):
        chat(monkeypatch, "Hello\n", stub.address, "--model", "tiny")


def test_who_sits_at_the_terminal_may_ask_again(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stub.add(as_json({}, 500), told("Here I am."))
    monkeypatch.setattr("sys.stdin", Terminal())
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("Hello\rHello\r\x04")
        assert run(["chat", stub.address, "--model", "tiny", "--no_history"]) == 0
    captured = capsys.readouterr()
    assert "failed (500)" in captured.err
    assert "Here I am." in captured.out


def test_flags_of_the_other_kind_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for flags, sentence in (
        (["http://127.0.0.1:9/v1", "--device", "cpu"], "--device is for a model on this machine"),
        (["http://127.0.0.1:9/v1", "--dtype", "bf16"], "--dtype is for a model on this machine"),
        (["somewhere", "--model", "tiny"], "--model names a model of a server"),
    ):
        with pytest.raises(UserError, match=sentence):
            chat(monkeypatch, "Hello\n", *flags)
