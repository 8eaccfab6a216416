"""The commands of a talk, as lines that are piped in."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from llm_from_scratch.cli import terminal
from llm_from_scratch.cli.chat import reply
from llm_from_scratch.cli.commands import COMMANDS, OTHER_NAMES, printable, setting_names
from llm_from_scratch.cli.main import run
from tests.generate.stub_server import Stub, as_json, serving, told


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.delenv("SCRATCHLM_API_KEY", raising=False)
    with serving() as server:
        yield server


@pytest.fixture
def said(stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """What is written to standard error for some lines of input."""

    def talk(*lines: str, flags: tuple[str, ...] = ()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        assert run(["chat", stub.address, "--model", "tiny", *flags]) == 0
        return capsys.readouterr().err.partition("\n")[2]  # behind the greeting

    return talk


def test_help_names_every_command(said: Any) -> None:
    told_lines = said("/help").splitlines()
    assert [line.split()[0] for line in told_lines[: len(COMMANDS)]] == list(COMMANDS)
    assert set(OTHER_NAMES.values()) < set(COMMANDS)
    for name in OTHER_NAMES:
        assert name in "\n".join(told_lines)


def test_regenerate_and_edit(stub: Stub, said: Any) -> None:
    stub.add(*map(told, ["a", "b", "c", "d\ne"]))
    lines = ["one", "two", "/edit 1 ONE and all", "/regenerate", "/history"]
    shown = " 1> ONE and all\n    d\n    e\n"  # every line of a message stands under its first
    assert said(*lines, flags=("--seed", "7", "--temperature", "1")) == shown
    bodies = [request.body for request in stub.requests]
    assert [[m["content"] for m in body["messages"]] for body in bodies] == [
        ["one"], ["one", "a", "two"], ["ONE and all"], ["ONE and all"],
    ]  # fmt: skip
    assert [body["seed"] for body in bodies] == [7, 8, 9, 10]


def test_commands_answer_in_json(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.add(*map(told, ["a", "b", "c"]))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/regenerate\n/edit ONE\n"))
    assert run(["chat", stub.address, "--model", "tiny", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["message"], row["answer"]) for row in rows] == [
        ("one", "a"), ("one", "b"), ("ONE", "c"),
    ]  # fmt: skip


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(stub: Stub, said: Any) -> None:
    stub.add(told("still here"))
    found = said(
        "/regenerate", "/edit", "/edit 1 x", "/export", "/export talk.jsonl", "/load", "/load no",
        "/set warmth 3", "/set top_k many", "/set top_p 2", "/set stop 'x", "/set logit_bias 3",
        "/regenrate", "/history", "Hello",
    )  # fmt: skip
    assert found.splitlines() == [
        "(Nothing has been asked yet; ask something first.)",
        "(/edit needs the new text of the question: /edit [N] TEXT.)",
        "(Nothing has been asked yet; ask something first.)",
        "(/export needs the name of a file, such as talk.jsonl.)",
        "(Nothing has been said yet, so there is no conversation to keep.)",
        "(/load needs the name of a file, such as talk.jsonl.)",
        "(There is no file no; give one of conversations.)",
        "(There is no setting 'warmth'; /set lists them.)",
        "(top_k is 'many'; it must be a whole number.)",
        "(top_p is 2.0; it must be above 0 and at most 1 (off).)",
        "(stop has a quotation mark without its partner: 'x)",
        "(--logit_bias is '3'; it must be a token id and a number, ID=X.)",
        "(There is no command /regenrate; /help lists them. Did you mean '/regenerate'?)",
        "(Nothing has been said yet.)",
    ]
    assert len(stub.requests) == 1
    assert not Path("talk.jsonl").exists()


def test_settings_are_changed_and_told(stub: Stub, said: Any) -> None:
    stub.add(told("a"), told("aa"))
    found = said(
        "/set temperature 0.7", "/set --top-p .9", "/set stop \\n 'The end' x", "/set seed 4",
        "/set logit_bias 5=-2 6=1.5", "/set json_schema {}", "one",
        "/set temperature default", "/set stop none", "/set seed none", "/set json_schema none",
        "/set logit_bias none", "/set max_new_tokens", "/set regex a+", "two",
        flags=("--temperature", "0.25"),
    )  # fmt: skip
    lines = [line.split(None, 1) for line in found.splitlines()]
    assert lines == [
        ["temperature", "0.7"], ["top_p", "0.9"], ["stop", r"'\n' 'The end' 'x'"], ["seed", "4"],
        ["logit_bias", "5=-2 6=1.5"], ["json_schema", "{}"], ["temperature", "0.25"],
        ["stop", "none"], ["seed", "none"], ["json_schema", "none"], ["logit_bias", "none"],
        ["max_new_tokens", "512"], ["regex", "a+"],
    ]  # fmt: skip
    first, second = (request.body for request in stub.requests)
    assert (first["temperature"], first["top_p"], first["seed"]) == (0.7, 0.9, 4)
    assert first["stop"] == ["\n", "The end", "x"]
    assert first["logit_bias"] == {"5": -2, "6": 1.5}
    assert "response_format" in first
    assert {"stop", "seed", "logit_bias", "response_format"}.isdisjoint(second)


@pytest.fixture
def flags_of_settings(said: Any) -> list[str]:
    return [line.split()[0] for line in said("/set").splitlines()]


def test_every_setting_is_listed(flags_of_settings: list[str]) -> None:
    assert flags_of_settings == setting_names()
    assert {"temperature", "top_k", "choice"} < set(flags_of_settings)
    assert "num_beams" not in flags_of_settings


def test_a_conversation_is_kept_and_taken_up(stub: Stub, said: Any, tmp_path: Path) -> None:
    stub.add(*map(told, ["a", "b", "c", "d"]))
    path = tmp_path / "my talks.jsonl"
    found = said(
        "/system Be kind.", "one", f"/export {path}", "two", f"/export {path}", "/new", "three",
        f"/export {path}", f"/load {path} 1", "/history", f"/load {path} 3", f"/import {path}",
        "four",
    )  # fmt: skip
    assert found.splitlines()[1:] == [
        f"({path} has one conversation now)",
        f"({path} has one conversation now)",
        "(new conversation)",
        f"({path} has 2 conversations now)",
        "(conversation 1 of 2: 4 messages; /history shows them)",
        "   system: Be kind.",
        " 1> one",
        "    a",
        " 2> two",
        "    b",
        f"({path} has 2 conversations; there is no number 3.)",
        "(conversation 2 of 2: 2 messages; /history shows them)",
    ]
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    assert [[message["content"] for message in row] for row in rows] == [
        ["Be kind.", "one", "a", "two", "b"], ["Be kind.", "three", "c"],
    ]  # fmt: skip
    assert [m["content"] for m in stub.requests[-1].body["messages"]] == [
        "Be kind.", "three", "c", "four",
    ]  # fmt: skip


def test_an_unanswered_question_can_be_answered(stub: Stub, said: Any, tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Well?"}]}\n')
    stub.add(told("Yes."))
    assert "/regenerate answers the last" in said(f"/load {path}", "/regenerate")
    assert stub.requests[0].body["messages"] == [{"role": "user", "content": "Well?"}]


def test_models_at_an_address(stub: Stub, said: Any) -> None:
    listed = as_json({"data": [{"id": "tiny"}, {"id": "large\x1b"}]})
    stub.add(listed, listed, listed, told("a"))
    found = said("/models", "/models larg", "/models large\x1b", "Hello")
    assert found.splitlines() == [
        "* tiny", "  large␛", "(The server has no model 'larg'. Did you mean 'large␛'?)",
        "  tiny", "* large␛",
    ]  # fmt: skip
    assert stub.requests[-1].body["model"] == "large\x1b"


def test_nothing_of_a_model_steers_the_terminal() -> None:
    assert printable("a\tb\n\x1b[2J\x07\r\x7f\x9b語🙂") == "a\tb\n␛[2J␇␍␡\ufffd語🙂"


# --------------------------------------------------------------------- the prompt


def completions(text: str) -> list[str]:
    document = Document(text)
    found = terminal.CommandCompleter().get_completions(document, CompleteEvent())
    return [text[: len(text) + one.start_position] + one.text for one in found]


def test_completion(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl").touch()
    assert completions("/re") == ["/regenerate", "/reset"]
    assert set(completions("/")) == {*COMMANDS, *OTHER_NAMES}
    assert completions("/set top_") == ["/set top_k", "/set top_p"]
    assert completions("/set top_k 1") == []
    assert completions(f"/export {tmp_path}/ta") == [f"/export {tmp_path}/talk.jsonl"]
    assert completions("Hello /re") == completions("//re") == completions("/re\n") == []


def test_a_history_that_is_broken_or_forbidden_is_no_reason_to_fail(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history"
    terminal.PrivateHistory(path).store_string("a\nb")
    with path.open("ab") as file:
        file.write(b"\xff\xfe\n[1]\n" + b"[" * 100_000 + b"\n")
    terminal.PrivateHistory(path).store_string("\udcff")
    path.chmod(0o644)
    history = terminal.PrivateHistory(path)
    history.store_string("last")
    assert list(history.load_history_strings()) == ["last", "\udcff", "a\nb"]
    assert path.stat().st_mode & 0o777 == 0o600
    folder = terminal.PrivateHistory(tmp_path)  # a folder, so nothing can be kept there
    folder.store_string("x")
    assert list(folder.load_history_strings()) == []


def test_a_long_history_forgets_its_older_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "MOST_BYTES", 1000)
    history = terminal.PrivateHistory(tmp_path / "history")
    for number in range(200):
        history.store_string(f"{number:06}")
    found = list(history.load_history_strings())
    assert found == [f"{number:06}" for number in range(199, 199 - len(found), -1)]
    assert 40 < len(found) < 60
    assert len(history.path.read_bytes()) <= 500


def test_a_ctrl_c_that_a_library_swallows_still_stops_the_answer(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def pieces() -> Generator[str, None, None]:
        yield "one "
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        yield "two "
        yield "three"

    class Talk:
        forgotten, reply = 0, None

    before = signal.getsignal(signal.SIGINT)
    reply(Talk(), pieces)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    assert (out, err) == ("one two \n", "(stopped)\n")
    assert signal.getsignal(signal.SIGINT) == before
