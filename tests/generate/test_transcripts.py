"""Conversations in files: what was kept is read again, and nothing else is harmed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.transcripts import add_conversation, read_conversations


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def test_conversations_gather_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "talk.jsonl"
    assert add_conversation(path, turns("こんにちは\n二行目", "はい")) == 1
    assert add_conversation(path, turns("Hello", "Hi")) == 2
    # The last one has gone on: it is there once.
    assert add_conversation(path, turns("Hello", "Hi", "And?", "Yes.")) == 2
    assert add_conversation(path, turns("Hello", "Hi")) == 3
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"messages": turns("こんにちは\n二行目", "はい")}
    assert "こんにちは" in lines[0]
    assert read_conversations(path)[1:] == [
        turns("Hello", "Hi", "And?", "Yes."),
        turns("Hello", "Hi"),
    ]


def test_lines_of_others_stay_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    line = '{"source": 7,  "messages": [{"role": "user", "content": "x"}]}'
    path.write_text("\ufeff" + line + "\r\n\n", encoding="utf-8")
    assert add_conversation(path, turns("Hello", "Hi")) == 2
    assert path.read_text().splitlines()[0] == line


def test_half_a_character_is_none(tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a\\ud800b"}]}\n')
    assert read_conversations(path) == [turns("a\ufffdb")]
    add_conversation(path, turns("\udc80"))
    assert read_conversations(path)[1] == turns("\ufffd")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "has no conversations"),
        (b"\xff\n", "is not UTF-8 text"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\nhello\n', "line 2: each line must be"),
        (b"[1]\n", "line 1: each line must be"),
        (b'{"messages": "x"}\n', "line 1: each line must be"),
        (b'{"messages": []}\n', "line 1: The conversation has no messages"),
        (b'{"messages": [{"role": "gpt", "content": "x"}]}\n', "Did you mean 'assistant'"),
        (b"[" * 200_000 + b"\n", "line 1: each line must be"),
        (b'{"messages": [' + b"9" * 5000 + b"]}\n", "line 1: each line must be"),
    ],
)
def test_what_is_no_file_of_conversations_is_refused_and_kept(
    tmp_path: Path, data: bytes, says: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says):
        read_conversations(path)
    if data:
        with pytest.raises(UserError, match=says):
            add_conversation(path, turns("Hello", "Hi"))
        assert path.read_bytes() == data


def test_what_is_no_file_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="There is no file"):
        read_conversations(tmp_path / "nothing")
    with pytest.raises(UserError, match="There is no file"):
        add_conversation(tmp_path, turns("Hello"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # reading it would never end
        with pytest.raises(UserError, match="There is no file"):
            read_conversations(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot be used"):
        add_conversation("a\0b", turns("Hello"))
    monkeypatch.setattr("llm_from_scratch.generate.transcripts.LIMIT", 3)
    (tmp_path / "large").write_text("1234")
    with pytest.raises(UserError, match="is larger than"):
        read_conversations(tmp_path / "large")
