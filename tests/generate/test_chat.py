"""`LocalChat`: whole, streamed and many answers are the same; wrong ones are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.chat import LocalChat, PromptTooLong, Reply, is_address, open_chat
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import save_folder

Say = Callable[..., Any]
HELLO = [{"role": "user", "content": "Hello"}]
KING = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "むかし?"},
]


@pytest.fixture(scope="module")
def chat(make: Callable[..., Decoder], tokenizer: Tokenizer) -> LocalChat:
    return LocalChat(make(vocab_size=tokenizer.vocab_size, max_seq_len=120), tokenizer)


def bare(reply: Reply) -> tuple[Any, ...]:
    """A reply without the times in its result."""
    assert reply.result is not None
    return reply.text, reply.finish_reason, reply.usage, reply.result.tokens


def test_streamed_equals_whole_equals_batched(chat: LocalChat) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "seed": 5}
    pieces = list(chat.stream(HELLO, **settings))
    last = pieces[-1].reply
    assert last is not None
    assert all(piece.reply is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == last.text
    assert last.usage is not None
    assert last.usage.prompt_tokens == chat.count(HELLO)
    assert last.usage.completion_tokens == 12
    assert last.finish_reason == "length"
    assert bare(chat.reply(HELLO, **settings)) == bare(last)
    second = chat.reply(KING, **{**settings, "seed": 6})
    both = chat.replies([HELLO, KING], **settings)
    assert [bare(one) for one in both] == [bare(last), bare(second)]
    assert chat.replies([]) == []


def test_logprobs_are_of_texts(chat: LocalChat) -> None:
    answer = chat.reply(HELLO, max_new_tokens=4, temperature=0.0, logprobs=2)
    assert answer.logprobs is not None
    assert answer.result is not None
    assert len(answer.logprobs) == len(answer.result.tokens) == 4
    for one, token in zip(answer.logprobs, answer.result.tokens, strict=True):
        assert one.text == chat.tokenizer.decode([token]) == one.top[0][0]
        assert one.logprob == one.top[0][1] > one.top[1][1]
    assert chat.reply(HELLO, max_new_tokens=4).logprobs is None


def test_an_answer_ends_where_the_template_ends_it(scripted: Say, tokenizer: Tokenizer) -> None:
    said = " Once upon a time.\nUser: no"
    chat = LocalChat(scripted(said, max_seq_len=200), tokenizer)
    answer = chat.reply(HELLO, max_new_tokens=60, temperature=0.0)
    assert (answer.text, answer.finish_reason) == ("Once upon a time.", "stop")
    chat = LocalChat(scripted(said, max_seq_len=200), tokenizer)
    answer = chat.reply(HELLO, max_new_tokens=60, temperature=0.0, stop="upon")
    assert answer.text == "Once "


def test_what_is_wrong_is_named_before_anything_is_computed(chat: LocalChat) -> None:
    with pytest.raises(UserError, match=r"'temprature' is no sampling setting.* 'temperature'"):
        chat.stream(HELLO, temprature=1.0)
    with pytest.raises(UserError, match="n is 2, but a chat gives one answer"):
        chat.reply(HELLO, n=2)
    with pytest.raises(UserError, match=r"known are system.*Did you mean 'assistant'"):
        chat.stream([{"role": "gpt", "content": "x"}])
    with pytest.raises(UserError, match=r"^Conversation 2 of 3: Message 1 \(user\) has no content"):
        chat.replies([HELLO, [{"role": "user"}], HELLO])
    long = [{"role": "user", "content": "漢" * 80}]
    with pytest.raises(PromptTooLong, match=r"^The message has \d+ tokens .*context is 120"):
        chat.stream(long)
    with pytest.raises(PromptTooLong, match=r"^Conversation 2 of 2: The messages have \d+ tokens"):
        chat.replies([HELLO, KING[:1] + long])


def test_a_name_and_an_address_open_the_same_thing(
    chat: LocalChat, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_folder(chat.model, tokenizer, tmp_path / "model")
    with open_chat(str(tmp_path / "model"), template="plain", device="cpu") as opened:
        assert isinstance(opened, LocalChat)
        assert opened.name.endswith("model")
        assert opened.context == 120
        few: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0.0}
        assert opened.reply(HELLO, **few).text == chat.reply(HELLO, **few).text
    with open_chat("http://127.0.0.1:9", model="m") as remote:
        assert remote.name == "m"
        assert remote.context is None
    assert is_address("HTTPS://example.org/v1")
    assert not is_address("org/name")
    with pytest.raises(UserError, match="'model' belongs to the address of a server, and 'x' is"):
        open_chat("x", model="m")
    with pytest.raises(UserError, match=r"'device' belongs to a model on this machine, and http:"):
        open_chat("http://127.0.0.1:9/v1", device="cpu")


def test_a_later_turn_computes_only_what_is_new(chat: LocalChat) -> None:
    """The conversation so far is found in the engine's pages."""
    messages = [{"role": "user", "content": "long, " * 12}]
    first = list(chat.stream(messages, max_new_tokens=9, temperature=0.0))[-1].reply
    assert first is not None
    run, read = chat.engine.engine.runner.run, []
    chat.engine.engine.runner.run = lambda feeds: (
        read.extend(len(feed.tokens) for feed in feeds) or run(feeds)  # type: ignore[assignment]
    )
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "more"}]
    second = list(chat.stream(messages, max_new_tokens=4, temperature=0.0))[-1].reply
    assert second is not None and second.usage is not None
    assert sum(read) < second.usage.prompt_tokens / 2
    assert second.text == LocalChat(chat.model, chat.tokenizer).reply(
        messages, max_new_tokens=4, temperature=0.0
    ).text  # fmt: skip


def test_streams_can_be_read_in_turns_and_given_up(chat: LocalChat) -> None:
    alone = [chat.reply(HELLO, max_new_tokens=n, temperature=0.0).text for n in (9, 7)]
    one = chat.stream(HELLO, max_new_tokens=9, temperature=0.0)
    two = chat.stream(HELLO, max_new_tokens=7, temperature=0.0)
    given_up = chat.stream(HELLO, max_new_tokens=30, temperature=0.0)
    del given_up
    found = ["", ""]
    streams = [one, two]
    while streams:
        for number, pieces in enumerate((one, two)):
            piece = next(pieces, None)
            found[number] += "" if piece is None else piece.text
            if piece is None and pieces in streams:
                streams.remove(pieces)
    assert found == alone
    assert chat.engine.engine.pages.held == 0 and not chat.engine.busy
