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
    seen: list[list[str]] = []

    class Listening(LocalChat):
        def stream(self, messages: Any, **settings: Any) -> Any:
            seen.append([message["content"] for message in messages])
            return super().stream(messages, **settings)

    model = scripted("king<|endoftext|>", max_seq_len=100)
    conversation = Conversation(Listening(model, tokenizer), GREEDY, system="S")
    forgotten = []
    for number in range(12):
        model.steps = 0
        assert ask(conversation, f"There was {number}") == "king"
        forgotten.append(conversation.forgotten)
        messages = conversation.messages
        assert [m["role"] for m in messages] == ["user", "assistant"] * (number + 1)
        assert seen[-1] == ["S", *(m["content"] for m in messages[forgotten[-1] : -1])]
    assert forgotten[0] == 0
    assert forgotten == sorted(forgotten)
    assert 12 < forgotten[-1] <= 22
    assert conversation.questions == [f"There was {number}" for number in range(12)]
    # An earlier question asked anew needs less room, so that all before it is seen again.
    model.steps = 0
    "".join(conversation.edit("There was", 2))
    assert conversation.forgotten == 0
    assert seen[-1] == ["S", "There was 0", "king", "There was"]


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


def test_a_question_is_answered_anew(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted(" one<|endoftext|> two<|endoftext|> three<|endoftext|>", max_seq_len=200)
    conversation = Conversation(LocalChat(model, tokenizer), GREEDY)
    with pytest.raises(UserError, match="Nothing has been asked yet"):
        conversation.regenerate()
    assert ask(conversation, "Say") == "one"
    assert "".join(conversation.regenerate()) == "two"
    assert conversation.messages == [
        {"role": "user", "content": "Say"},
        {"role": "assistant", "content": "two"},
    ]
    pieces = conversation.regenerate()
    pieces.close()  # before it has begun
    assert conversation.messages[-1]["content"] == "two"


def test_a_question_that_got_no_answer_can_be_asked_again(
    scripted: Say, tokenizer: Tokenizer
) -> None:
    model = scripted("a<|endoftext|>b<|endoftext|>c<|endoftext|>", max_seq_len=200)
    conversation = Conversation(LocalChat(model, tokenizer), GREEDY)
    assert conversation.last_question == ""
    ask(conversation, "one")
    conversation.ask("two").close()
    assert conversation.last_question == "two"
    assert conversation.questions == ["one"]
    assert "".join(conversation.regenerate()) == "b"
    assert [m["content"] for m in conversation.messages] == ["one", "a", "two", "b"]
    conversation.edit("ONE", 1).close()
    assert "".join(conversation.regenerate()) == "c"
    assert [m["content"] for m in conversation.messages] == ["ONE", "c"]
    conversation.ask("lost").close()
    conversation.reset()
    with pytest.raises(UserError, match="Nothing has been asked yet"):
        conversation.regenerate()


def test_every_answer_has_its_own_seed(scripted: Say, tokenizer: Tokenizer) -> None:
    seeds = []

    class Listening(LocalChat):
        def stream(self, messages: Any, **settings: Any) -> Any:
            seeds.append(settings["seed"])
            return super().stream(messages, **settings)

    chat = Listening(scripted("king<|endoftext|>" * 9, max_seq_len=200), tokenizer)
    settings = SamplingSettings(max_new_tokens=9, temperature=0.5, seed=2**63 - 1)
    conversation = Conversation(chat, settings)
    ask(conversation, "Hello")
    "".join(conversation.regenerate())
    "".join(conversation.edit("Hi"))
    assert seeds == [2**63 - 1, 0, 1]


def test_an_earlier_question_is_asked_otherwise(scripted: Say, tokenizer: Tokenizer) -> None:
    model = scripted("a<|endoftext|>b<|endoftext|>c<|endoftext|>d<|endoftext|>", max_seq_len=200)
    conversation = Conversation(LocalChat(model, tokenizer), GREEDY)
    ask(conversation, "one")
    ask(conversation, "two")
    for number in (0, 3):
        with pytest.raises(UserError, match=f"no question {number}; .* has 2 questions"):
            conversation.edit("x", number)
    assert "".join(conversation.edit("TWO")) == "c"
    assert [m["content"] for m in conversation.messages] == ["one", "a", "TWO", "c"]
    assert "".join(conversation.edit("ONE", 1)) == "d"
    assert [m["content"] for m in conversation.messages] == ["ONE", "d"]


def test_a_conversation_goes_out_and_comes_back(scripted: Say, tokenizer: Tokenizer) -> None:
    def new() -> Conversation:
        model = scripted("king<|endoftext|>" * 3, max_seq_len=200)
        return Conversation(LocalChat(model, tokenizer), GREEDY, system="Be kind.")

    conversation, other = new(), new()
    with pytest.raises(UserError, match="Nothing has been said yet"):
        conversation.export()
    ask(conversation, "Hello")
    kept = conversation.export()
    assert kept == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "king"},
    ]
    other.system = None
    other.load(kept)
    assert (other.system, other.messages) == ("Be kind.", conversation.messages)
    assert ask(other, "And?") == "king"
    assert len(conversation.messages) == 2
    other.load([{"role": "user", "content": "Unanswered"}])
    assert other.system is None
    assert "".join(other.regenerate()) == "king"
    before = list(other.messages)
    for wrong, says in (
        ([{"role": "system", "content": "S"}], "so nothing was asked"),
        ([{"role": "human", "content": "S"}], "Did you mean 'user'"),
    ):
        with pytest.raises(UserError, match=says):
            other.load(wrong)
    assert other.messages == before


def test_an_engine_that_was_interrupted_in_a_step_is_not_asked_again(
    scripted: Say, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scripted("Once upon a time there was a king.<|endoftext|>" * 2, max_seq_len=200)
    chat = LocalChat(model, tokenizer)
    conversation = Conversation(chat, GREEDY)
    engine = chat.engine
    pieces = conversation.ask("Hello")
    heard = next(pieces)

    def interrupted() -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    assert conversation.messages[-1] == {"role": "assistant", "content": heard.rstrip()}
    model.steps = 0
    assert ask(conversation, "Again") == "Once upon a time there was a king."
    assert chat.engine is not engine
