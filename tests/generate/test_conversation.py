"""Conversations: turns are kept, old ones dropped in time, interrupted ones kept as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.chat import LocalChat
from llm_from_scratch.generate.conversation import Conversation
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.text.tokenizer import Tokenizer

Say = Callable[..., Any]
GREEDY = SamplingSettings(max_new_tokens=60, temperature=0.0)


def ask(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_turns_are_kept_and_begin_without_a_space(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted(" Once upon a time.\nUser: no" + " むかし。<|endoftext|>", max_seq_len=300)
    conversation = Conversation(LocalChat(model, tokenizer), GREEDY, system="Be kind.")
    assert ask(conversation, "Hello") == "Once upon a time."
    assert conversation.reply is not None
    assert conversation.reply.finish_reason == "stop"
    assert conversation.reply.result is not None
    assert conversation.reply.result.finish_reason == "stop_string"
    model.steps = len(tokenizer.encode(" Once upon a time.\nUser: no"))
    assert ask(conversation, "And?") == "むかし。"
    assert conversation.reply.finish_reason == "stop"
    assert [message["content"] for message in conversation.messages] == [
        "Hello", "Once upon a time.", "And?", "むかし。",
    ]  # fmt: skip
    assert conversation.forgotten == 0
    conversation.reset()
    assert conversation.messages == []
    assert conversation.system == "Be kind."


def test_the_oldest_turns_make_room(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted("king<|endoftext|>", max_seq_len=100)
    conversation = Conversation(LocalChat(model, tokenizer), GREEDY, system="S")
    forgotten = []
    for number in range(12):
        model.steps = 0
        assert ask(conversation, f"There was {number}") == "king"
        forgotten.append(conversation.forgotten)
        messages = conversation.messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert messages[-2]["content"] == f"There was {number}"
    assert forgotten[0] == 0
    assert set(forgotten[-5:]) <= {0, 2, 4}
    assert any(forgotten)


def test_a_message_that_never_fits_changes_nothing(scripted: Say, tokenizer: Tokenizer) -> None:
    conversation = Conversation(
        LocalChat(scripted("k<|endoftext|>", max_seq_len=64), tokenizer), GREEDY
    )
    ask(conversation, "Hi")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"message has \d+ tokens .* context is 64"):
        conversation.ask("漢" * 40)
    assert conversation.messages == before


def test_a_stopped_answer_is_kept_as_far_as_it_came(scripted: Say, tokenizer: Tokenizer) -> None:
    conversation = Conversation(
        LocalChat(scripted("Once upon a time there was a king.", max_seq_len=200), tokenizer),
        GREEDY,
    )
    pieces = conversation.ask("Tell me")
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": heard.rstrip()}
    assert conversation.reply is None


def test_an_empty_answer_leaves_no_turn(scripted: Say, tokenizer: Tokenizer) -> None:
    conversation = Conversation(
        LocalChat(scripted("<|endoftext|>", max_seq_len=64), tokenizer), GREEDY
    )
    assert ask(conversation, "Hello") == ""
    assert conversation.messages == []
