"""Conversations in all their shapes become messages; what is none is said, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.data.chats import conversation_of
from llm_from_scratch.data.records import BadRow, BadRows, read_rows
from llm_from_scratch.generate.transcripts import add_conversation

USER = {"role": "user", "content": "Name a cat."}
BOT = {"role": "assistant", "content": "Tama."}
FRAME = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n### Response:\n"
)


def messages(values: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = conversation_of(values)["messages"]
    return found


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, BOT]},
        {"messages": json.dumps([USER, BOT])},  # a table's cell
        {"messages": [USER, BOT, {"role": "user", "content": "Thanks!"}]},
        {
            "conversations": [
                {"from": "human", "value": "Name a cat."},
                {"from": "gpt", "value": "Tama."},
            ]
        },
        {"conversation": [USER, BOT]},
        {"instruction": "Name a cat.", "input": "", "output": "Tama."},
        {"instruction": "Name a cat.", "output": "Tama.", "text": "something else"},
        {"instruction": "Name a cat.", "input": None, "chosen": "Tama.", "rejected": "Pochi."},
        {"prompt": "Name a cat.", "response": "Tama."},
        {"prompt": "Name a cat.", "completion": "Tama."},
        {"prompt": [USER], "completion": [BOT]},
        {"question": "Name a cat.", "answer": "Tama."},
        {"prompt": FRAME.format("", "Name a cat."), "response": "Tama."},
        {
            "utterances": [
                {"interlocutor_id": "A", "text": "Name a cat."},
                {"interlocutor_id": "B", "text": "Tama."},
                {"interlocutor_id": "A", "text": "Thanks!"},
            ]
        },
    ],
)
def test_every_shape_becomes_messages(values: dict[str, Any]) -> None:
    assert messages(values) == [USER, BOT]


def test_parts_of_a_request_are_kept_apart_for_the_template_that_shows_them() -> None:
    row = {"instruction": "Sort.", "input": "b a", "output": "a b", "system": "Be brief."}
    first, request, answer = messages(row)
    assert first == {"role": "system", "content": "Be brief."}
    assert request["content"] == "Sort.\n\nb a"
    assert (request["instruction"], request["input"]) == ("Sort.", "b a")
    assert answer["content"] == "a b"
    framed = FRAME.format(", paired with an input", "Sort.\n\n### Input:\nb a")
    assert messages({"prompt": framed, "response": "a b"})[0] == request


def test_what_one_speaker_says_in_a_row_is_one_message_and_tools_are_kept() -> None:
    talk = [("A", "Hi."), ("A", "You?"), ("B", "Hi!"), ("B", "Fine.")]
    row = {"utterances": [{"interlocutor_id": who, "text": text} for who, text in talk]}
    assert [m["content"] for m in messages(row)] == ["Hi.\nYou?", "Hi!\nFine."]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    assert conversation_of({"messages": [USER, BOT], "tools": tools})["tools"] == tools
    assert "tools" not in conversation_of({"messages": [USER, BOT], "tools": []})
    assert messages({"prompt": "a\ud800b", "response": "c"})[0]["content"] == "a�b"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"x": 1}, "has no conversation \\(its fields: x\\)"),
        ({"instruction": "a", "output": " "}, "empty 'output'"),
        ({"instruction": "a"}, "no field 'output'"),
        ({"instruction": "", "output": "b"}, "empty 'instruction'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "'input' that is no text"),
        ({"prompt": "a"}, "none of response"),
        ({"prompt": "a", "response": 3}, "is no text"),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": []}, "has no messages"),
        ({"messages": [USER]}, "no message of the assistant"),
        ({"messages": [BOT]}, "nothing that is answered"),
        ({"messages": [USER, {**BOT, "content": ""}]}, "empty answer \\(message 2\\)"),
        ({"messages": [{**USER, "role": "human"}, BOT]}, "Did you mean 'user'"),
        ({"messages": [{**USER, "role": "robot"}, BOT]}, "role 'robot'"),
        ({"conversations": [{"from": "human", "value": 3}, "x"]}, "turn 2"),
        ({"utterances": [{"text": "a", "speaker": s} for s in "abc"]}, "more than two speakers"),
        ({"utterances": [{"text": 3}]}, "without a text"),
    ],
)
def test_what_is_no_conversation_is_said(values: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow, match=said):
        conversation_of(values)


def test_what_a_chat_exports_is_read(tmp_path: Path) -> None:
    add_conversation(tmp_path / "talk.jsonl", [USER, BOT])
    rows = list(read_rows(tmp_path / "talk.jsonl", BadRows()))
    assert [messages(row.values) for row in rows] == [[USER, BOT]]


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("instruction-data/instruction-data.json", 1100),
        ("alpaca-tiny/alpaca_tiny.json", 100),
        ("dolly-hhrlhf-small/dolly_hhrlhf_train_small.jsonl", 1000),
        ("ja-instruct-derived/ja_instruct_derived.jsonl.gz", 3000),
        ("real-persona-chat/dialogues_600.jsonl.gz", 600),
    ],
)
def test_real_files(data_dir: Path, file: str, count: int) -> None:
    read, unused = 0, []
    for row in read_rows(data_dir / file, BadRows()):
        try:
            found = messages(row.values)
            assert found[-1]["role"] == "assistant" and "### Response" not in found[0]["content"]
            read += 1
        except BadRow as error:
            unused.append(f"{row.place} {error}")
    assert read + len(unused) == count
    assert len(unused) <= 0.01 * count, unused[:3]
