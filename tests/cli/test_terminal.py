"""`scratchlm chat` as a person has it: at a terminal, with keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_from_scratch.text.chat import check_messages
from tests.generate.stub_server import Stub, delta, events, serving, told

pytest.importorskip("pty", reason="there are no pseudo-terminals here")
from tests.cli.pseudo_terminal import (
    ALT_ENTER,
    CTRL_C,
    CTRL_D,
    ENTER,
    PROMPT,
    TAB,
    UP,
    at_terminal,
)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stub]:
    monkeypatch.delenv("SCRATCHLM_API_KEY", raising=False)
    monkeypatch.setenv("SCRATCHLM_CACHE", str(tmp_path / "cache"))
    with serving() as server:
        yield server


def asked(stub: Stub) -> list[str]:
    """What the messages of the last request say."""
    return [message["content"] for message in stub.requests[-1].body["messages"]]


def test_a_talk(stub: Stub, tmp_path: Path) -> None:
    answers = ["Erstens.", "Zweitens.", "三番目。", "Viertens.", "Fünftens."]
    stub.add(*map(told, answers))
    with at_terminal("chat", stub.address, "--model", "tiny") as terminal:
        terminal.expect("tiny at http://127.0.0.1")
        terminal.expect(PROMPT)
        terminal.type("one" + ALT_ENTER + "two\\" + ENTER + "three" + ENTER)
        terminal.expect("Erstens.")
        assert asked(stub) == ["one\ntwo\nthree"]
        terminal.expect(PROMPT)
        terminal.paste("def f():\r\n    return 1\n")
        terminal.type("What is it?" + ENTER)
        terminal.expect("Zweitens.")
        assert asked(stub)[-1] == "def f():\n    return 1\nWhat is it?"
        terminal.expect(PROMPT)
        terminal.type("/reg" + TAB)
        terminal.expect("/regenerate")
        terminal.type(ENTER)
        terminal.expect("三番目。")
        assert len(asked(stub)) == 3
        terminal.expect(PROMPT)
        terminal.type("/edit 1" + ENTER)
        terminal.expect("/edit 1 one")
        terminal.type(" four" + ENTER)
        terminal.expect("Viertens.")
        assert asked(stub) == ["one\ntwo\nthree four"]
        terminal.expect(PROMPT)
        terminal.type("/set temp" + TAB)
        terminal.expect("temperature")
        terminal.type(" 0.5" + ENTER)
        terminal.expect("0.5\n")
        terminal.expect(PROMPT)
        terminal.type("//path" + ENTER)
        terminal.expect("Fünftens.")
        assert asked(stub)[-1] == "/path"
        assert stub.requests[-1].body["temperature"] == 0.5
        terminal.expect(PROMPT)
        terminal.type(f"/export {tmp_path}/talk.jsonl" + ENTER)
        terminal.expect("has one conversation now")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    (line,) = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    messages = check_messages(json.loads(line)["messages"])
    assert [message["content"] for message in messages[2:]] == ["/path", "Fünftens."]


def test_what_was_typed_is_there_in_the_next_session(stub: Stub, tmp_path: Path) -> None:
    history = tmp_path / "cache" / "chat_history.jsonl"
    stub.add(*map(told, ["One.", "Two.", "Three."]))
    words = ("chat", stub.address, "--model", "tiny")
    with at_terminal(*words) as terminal:
        terminal.expect(PROMPT)
        terminal.type("猫は\\" + ENTER + "どこ？" + ENTER)
        terminal.expect("One.")
        terminal.expect(PROMPT)
        terminal.type("/quit" + ENTER)
        assert terminal.end() == 0
    assert history.stat().st_mode & 0o777 == 0o600
    before = history.read_bytes()
    with at_terminal(*words, "--no_history") as terminal:
        terminal.expect(PROMPT)
        terminal.type(UP + "new" + ENTER)
        terminal.expect("Two.")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert asked(stub) == ["new"]
    assert history.read_bytes() == before
    with at_terminal(*words) as terminal:
        terminal.expect(PROMPT)
        terminal.type(UP + UP + UP + "!" + ENTER)  # over /quit, and the lines of the message
        terminal.expect("Three.")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0
    assert asked(stub)[0].replace("!", "") == "猫は\nどこ？"


def test_ctrl_c_stops_an_answer_and_no_more(stub: Stub) -> None:
    endless = events(delta("ever and "), then="endless")
    silent = events(delta("Well"), then="silent")
    hostile = told("\x1b]0;title\x07\x1b[2Jred")
    stub.add(endless, silent, hostile)
    with at_terminal("chat", stub.address, "--model", "tiny", "--no_history") as terminal:
        terminal.expect(PROMPT)
        terminal.type("Sing" + ENTER)
        terminal.expect("ever and ever and ")
        terminal.type(CTRL_C)
        terminal.expect("(stopped)")
        assert stub.client_left.wait(30)
        terminal.expect(PROMPT)
        terminal.type("Wait" + ENTER)
        terminal.expect("Well")
        terminal.type(CTRL_C)
        terminal.expect("(stopped)")
        assert asked(stub)[1].startswith("ever and ever and")  # what had come is part of the talk
        terminal.expect(PROMPT)
        terminal.type("half a mess" + CTRL_C)
        terminal.expect("Ctrl-D or /quit leaves")
        terminal.expect(PROMPT)
        terminal.type("Paint" + ENTER)
        terminal.expect("␛]0;title␇␛[2Jred")  # and not the terminal
        terminal.expect(PROMPT)
        terminal.type("/history" + ENTER)
        terminal.expect("1> Sing")
        terminal.expect("3> Paint")
        terminal.expect(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.end() == 0


def test_a_talk_at_an_address_waits_for_no_pytorch(stub: Stub) -> None:
    code = (
        "import sys\nfrom llm_from_scratch.cli.main import run\n"
        f"assert run(['chat', '{stub.address}', '--model', 'tiny', '--stop', 'x']) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    stub.add(told("Here."))
    done = subprocess.run(
        [sys.executable, "-c", code], input="Hello\n", capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Here.\n"
