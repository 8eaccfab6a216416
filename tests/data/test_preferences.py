"""Preference rows of every shape become one; what is no pair is refused with a remedy."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.data.chats import conversation_of
from llm_from_scratch.data.preferences import preference_of
from llm_from_scratch.data.records import BadRow

ASK = [{"role": "user", "content": "Why?"}]
WANTED = {"prompt": ASK, "chosen": "Because.", "rejected": "No."}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        {"prompt": ASK, "chosen": "Because.", "rejected": "No."},
        {"prompt": ASK, "chosen": [answer("Because.")], "rejected": [answer("No.")]},
        {"prompt": ASK, "chosen": answer("Because."), "rejected": answer("No.")},
        {"chosen": [*ASK, answer("Because.")], "rejected": [*ASK, answer("No.")]},
        {
            "instruction": "Why?",
            "input": "",
            "output": "x",
            "chosen": "Because.",
            "rejected": "No.",
        },
        {
            "chosen": "\n\nHuman: Why?\n\nAssistant: Because.",
            "rejected": "\n\nHuman: Why?\n\nAssistant: No.",
        },
        {"prompt": "\n\nHuman: Why?\n\nAssistant:", "chosen": "Because.", "rejected": "No."},
        {"question": "Why?", "response_j": "Because.", "response_k": "No."},
    ],
)
def test_every_shape_gives_the_same_pair(row: dict[str, Any]) -> None:
    assert preference_of(row) == WANTED


def test_dialogues_keep_their_turns_and_paragraphs() -> None:
    before = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHow are you?\n\nHuman: Human: is a word"
    row = {"chosen": f"{before}\n\nAssistant: Yes.", "rejected": f"{before}\n\nAssistant: So?"}
    assert preference_of(row)["prompt"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello.\n\nHow are you?"},
        {"role": "user", "content": "Human: is a word"},
    ]


@pytest.mark.parametrize(
    "asked",
    [
        {"instruction": "Turn it round.", "input": "abc"},
        {"instruction": "Say it.", "system": "Be brief."},
        {"prompt": "Why?", "system": "Be brief."},
    ],
)
def test_a_prompt_is_what_sft_learnt_to_answer(asked: dict[str, Any]) -> None:
    pair = preference_of({**asked, "chosen": "good", "rejected": "bad"})
    learnt = conversation_of({**asked, "output": "good"})["messages"]
    assert [*pair["prompt"], answer("good")] == learnt


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "a", "chosen": "b"}, "no field 'rejected' (its fields: prompt, chosen)"),
        ({}, "no field 'chosen' (its fields: none)"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "nothing in 'chosen'"),
        ({"prompt": "a", "chosen": " ", "rejected": "b"}, "an empty 'chosen'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b "}, "the same text in 'chosen' and"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "an empty 'prompt'"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "'prompt', which is no text"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "no conversation in 'chosen'"),
        ({"prompt": "a", "chosen": ASK, "rejected": "c"}, "not one message of the assistant"),
        ({"chosen": "b", "rejected": "c"}, "a 'chosen' without its prompt"),
        (
            {"chosen": "Human: a\n\nAssistant: b", "rejected": "Human: z\n\nAssistant: c"},
            "answers to different conversations",
        ),
        (
            {"chosen": "Human: a\n\nHuman: b", "rejected": "Human: a\n\nAssistant: c"},
            "two turns of one speaker in a row in 'chosen' (turn 1)",
        ),
        ({"instruction": "", "chosen": "b", "rejected": "c"}, "an empty 'instruction'"),
        ({"instruction": "a", "input": 3, "chosen": "b", "rejected": "c"}, "'input' that is no"),
        (
            {"prompt": [*ASK, answer("x")], "chosen": "b", "rejected": "c"},
            "does not end with a message to be answered",
        ),
        ({"question": "a", "response_j": "b"}, "no field 'response_k'"),
        ({"question": "a", "response_j": "b", "response_k": "b"}, "in 'response_j' and"),
    ],
)
def test_what_is_no_pair_is_said_in_a_sentence(row: dict[str, Any], part: str) -> None:
    with pytest.raises(BadRow) as caught:
        preference_of(row)
    assert part in str(caught.value)
    assert str(caught.value).endswith(".")


def outcome(rows: list[dict[str, Any]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for row in rows:
        try:
            preference_of(row)
            found["good"] += 1
        except BadRow as error:
            found[str(error).split(" (")[0][:30]] += 1
    return found


def test_real_files_are_read_whole(data_dir: Path) -> None:
    text = (data_dir / "instruction-preference/instruction-data-with-preference.json").read_text()
    assert outcome(json.loads(text)) == {"good": 1094, "has the same text in 'chosen' ": 6}
    text = (data_dir / "stackexchange-paired-tiny/stack_exchange_paired_tiny.json").read_text()
    assert outcome(json.loads(text)) == {"good": 25}
    with gzip.open(data_dir / "hh-rlhf/harmless-base-test_first1500.jsonl.gz", "rt") as file:
        found = outcome([json.loads(line) for line in file])
    assert found == {
        "good": 1492, "has an empty 'chosen'; fill it": 4, "has two turns of one speaker i": 4,
    }  # fmt: skip
