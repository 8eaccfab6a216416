"""Chats through OpenAI's own client: the same answers as without a server, in all its forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import httpx2
import pytest
from openai import (
    APIError,
    APIStatusError,
    BadRequestError,
    InternalServerError,
    LengthFinishReasonError,
    NotFoundError,
)
from pydantic import BaseModel, Field

from llm_from_scratch.generate.chat import LocalChat, open_chat
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.chat_schema import ChatCompletion, ChatCompletionChunk
from llm_from_scratch.serve.openai.events import to_json

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
KING: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "むかし?"}]},
]
DRAWN: dict[str, Any] = {"temperature": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def local(models: dict[str, ServedModel]) -> dict[str, LocalChat]:
    return {
        name: LocalChat(models[name].model, models[name].tokenizer)  # type: ignore[arg-type]
        for name in ("tiny", "plain")
    }


@pytest.mark.parametrize("name", ["tiny", "plain"])
@pytest.mark.parametrize("messages", [HELLO, KING], ids=["hello", "king"])
def test_an_answer_is_the_one_that_the_model_gives(
    name: str, messages: list[Any], client: Any, local: dict[str, LocalChat]
) -> None:
    extra = {"top_k": 40, "min_p": 0.001, "repetition_penalty": 1.1, "no_repeat_ngram": 5}
    same: dict[str, Any] = {
        **DRAWN, "top_p": 0.95, "presence_penalty": 0.2, "frequency_penalty": 0.1, "stop": ["zz"],
    }  # fmt: skip
    ours = local[name].reply(messages, max_new_tokens=20, logit_bias={70: 2.0}, **same, **extra)
    theirs = client.chat.completions.create(
        model=name, messages=messages, max_tokens=20, extra_body=extra, logit_bias={"70": 2}, **same
    )
    assert theirs.object == "chat.completion" and theirs.model == name
    (choice,) = theirs.choices
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert choice.message.content == ours.text and choice.finish_reason == ours.finish_reason
    assert theirs.usage is not None and ours.usage is not None
    assert theirs.usage.prompt_tokens == ours.usage.prompt_tokens
    assert theirs.usage.completion_tokens == ours.usage.completion_tokens
    assert theirs.usage.total_tokens == sum(
        (ours.usage.prompt_tokens, ours.usage.completion_tokens)
    )


def test_our_own_client_is_answered_as_if_the_model_were_here(
    api: Any, local: dict[str, LocalChat]
) -> None:
    settings: dict[str, Any] = {**DRAWN, "max_new_tokens": 15, "logprobs": 2, "stop": ("e", "い")}
    with open_chat(f"{api.address}/v1", model="plain") as remote:
        ours, theirs = local["plain"].reply(HELLO, **settings), remote.reply(HELLO, **settings)
        assert theirs.result is None and ours.logprobs is not None
        assert (theirs.text, theirs.finish_reason, theirs.usage) == (
            ours.text, ours.finish_reason, ours.usage,
        )  # fmt: skip
        assert theirs.logprobs is not None
        assert [one.text for one in theirs.logprobs] == [one.text for one in ours.logprobs]
        assert [one.logprob for one in theirs.logprobs] == pytest.approx(
            [one.logprob for one in ours.logprobs], abs=1e-5
        )
        pieces = list(remote.stream(HELLO, **settings))
        last = pieces[-1].reply
        assert last is not None and "".join(one.text for one in pieces) == last.text == ours.text
        assert (last.usage, last.logprobs) == (theirs.usage, theirs.logprobs)
        several = remote.replies([HELLO, KING], **settings)
        assert [one.text for one in several] == [
            one.text for one in local["plain"].replies([HELLO, KING], **settings)
        ]
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        found = remote.reply(HELLO, json_schema={**schema, "additionalProperties": False})
        assert json.loads(found.text)["a"] in (1, 2)


def test_a_stream_says_the_same_as_a_whole_answer(client: Any) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": KING, "max_tokens": 16, "n": 3, "logprobs": True,
        "top_logprobs": 2, **DRAWN,
    }  # fmt: skip
    whole = client.chat.completions.create(**asked)
    assert len({choice.message.content for choice in whole.choices}) == 3
    again = client.chat.completions.create(**asked)
    assert [one.message for one in again.choices] == [one.message for one in whole.choices]
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    for choice in whole.choices:
        mine = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        first, *middle, last = mine
        assert (first.delta.role, first.delta.content) == ("assistant", "")
        assert all(one.delta.role is None for one in middle)
        assert "".join(one.delta.content or "" for one in middle) == choice.message.content
        assert [one.finish_reason for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert last.finish_reason == choice.finish_reason and last.delta.content is None
        heard = [e for one in mine if one.logprobs for e in one.logprobs.content or ()]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert [one.bytes for one in heard] == [one.bytes for one in choice.logprobs.content]
        assert [one.logprob for one in heard] == pytest.approx(
            [one.logprob for one in choice.logprobs.content], abs=1e-4
        )
        assert all(len(one.top_logprobs) == 2 for one in heard)


def test_the_tokens_of_an_answer(client: Any, models: dict[str, ServedModel]) -> None:
    """Their bytes put together are the text, and with their ids one can go on from any of them."""
    raw = client.chat.completions.with_raw_response.create(
        model="tiny", messages=HELLO, max_tokens=12, logprobs=True, top_logprobs=3, temperature=0,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    body = json.loads(raw.text)
    assert raw.headers["content-type"] == "application/json"
    ChatCompletion.model_validate(body, strict=True)
    tokenizer = models["tiny"].tokenizer
    entries = body["choices"][0]["logprobs"]["content"]
    spelled = bytes(byte for entry in entries for byte in entry["bytes"])
    text = body["choices"][0]["message"]["content"]
    assert spelled.decode("utf-8", "replace").lstrip() == text
    for entry in entries:
        assert bytes(entry["bytes"]) == tokenizer.token_bytes(entry["token_id"])
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token_id"] == entry["token_id"]  # the likeliest was taken
    ids = body["prompt_token_ids"] + [entry["token_id"] for entry in entries[:5]]
    rest = client.completions.with_raw_response.create(
        model="tiny", prompt=ids, max_tokens=7, temperature=0, logprobs=3,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    going_on = json.loads(rest.text)["choices"][0]["logprobs"]["content"]
    assert [one["token_id"] for one in going_on] == [one["token_id"] for one in entries[5:]]
    plain = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=2, logprobs=True, temperature=0
    )
    found = plain.choices[0].logprobs
    assert found is not None and found.content is not None
    assert found.content[0].top_logprobs == [] and not hasattr(found.content[0], "token_id")


def test_where_an_answer_ends(client: Any, tell: Callable[[str], str]) -> None:
    def ask(text: str, **more: Any) -> tuple[str | None, str]:
        (choice,) = client.chat.completions.create(model=tell(text), messages=HELLO, **more).choices
        return choice.message.content, choice.finish_reason

    assert ask("Once upon a time") == ("Once upon a time", "stop")
    assert ask(" \n Once upon", stop=" up") == ("Once", "stop")
    assert ask("a1 b2 c3", stop=["x", "c3", "2 c", "y"]) == ("a1 b", "stop")
    assert ask("abcdefgh", max_completion_tokens=3) == ("abc", "length")
    assert ask("王様", max_tokens=300) == ("王様", "stop")


def test_events_on_the_wire(http: httpx2.Client, tell: Callable[[str], str]) -> None:
    name = tell("A\r\n\u2028 王")
    answer = http.post(
        "/v1/chat/completions", json={"model": name, "messages": HELLO, "stream": True}
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    *events, done, end = answer.content.split(b"\n\n")
    assert (done, end) == (b"data: [DONE]", b"")
    said = ""
    for event in events:
        assert event.startswith(b"data: {") and b"\n" not in event
        chunk = ChatCompletionChunk.model_validate_json(event[6:])
        said += chunk.choices[0].delta.content or ""
    assert said == "A\r\n\u2028 王"


# ------------------------------------------------------------------------- the form of an answer


class Animal(BaseModel):
    name: str = Field(max_length=5)
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=9)


class Farm(BaseModel):
    place: Literal["Nara", "奈良"]
    animals: list[Animal] = Field(max_length=2)


def test_structured_output(client: Any) -> None:
    """Whatever an untrained model draws."""
    asked: dict[str, Any] = {"model": "tiny", "messages": KING, "response_format": Farm, "seed": 1}
    farm = client.chat.completions.parse(**asked).choices[0].message.parsed
    assert isinstance(farm, Farm)
    with client.chat.completions.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == farm
    with pytest.raises(LengthFinishReasonError):
        client.chat.completions.parse(**asked, max_tokens=3)


def test_other_forms(client: Any) -> None:
    def ask(**more: Any) -> str:
        answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=1, **more)
        return answer.choices[0].message.content or ""

    found = ask(response_format={"type": "json_object"}, max_tokens=40, temperature=0.3)
    assert found.startswith("{")
    assert ask(response_format={"type": "text"}, max_tokens=2)
    assert ask(extra_body={"choice": ["はい", "いいえ"]}) in ("はい", "いいえ")
    day = ask(extra_body={"regex": r"20\d\d-[01]\d"})
    assert len(day) == 7 and day[4] == "-"


# ------------------------------------------------------------------------- asked wrongly


def tool_called(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 129}, "n", "less than or equal to 128"),
    ({"n": 100}, "n", "room for 40"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": [""]}, "stop.0", "at least 1"),
    ({"logit_bias": {"9999": 1}}, "logit_bias", "vocabulary ends at"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "token id"),
    ({"top_logprobs": 2}, "top_logprobs", "logprobs is not true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "give one of them"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
    ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
    ({"functions": []}, "functions", "given as tools now"),
    ({"response_format": {"type": "json"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "no json_sch"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "dog"}}}},
        "response_format",
        "JSON schema is wrong",
    ),
    ({"regex": "("}, "regex", "pattern"),
    ({"regex": "a" * 300_000}, "regex", "at most 262,144"),
    ({"choice": ["a"] * 1025}, "choice", "at most 1,024"),
    ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "at most 1,024"),
    ({"no_repeat_ngram": 257}, "no_repeat_ngram", "less than or equal to 256"),
    ({"messages": HELLO * 2049}, "messages", "at most 2048"),
    ({"tools": [tool_called(f"f{i}") for i in range(129)]}, "tools", "at most 128"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": {"enum": ["a" * 300_000]}},
            }
        },
        "response_format",
        "at most 262,144",
    ),
    ({"regex": "a", "choice": ["b"]}, "regex", "one form only"),
    ({"tool_choice": "required"}, "tools", "there are no tools"),
    ({"messages": []}, "messages", "no messages"),
    ({"messages": "Hello"}, "messages", "list of messages"),
    ({"messages": [{"role": "gpt", "content": "x"}]}, "messages", "Did you mean 'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages", "no content"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "only text parts",
    ),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_sent(
    fields: dict[str, Any], param: str, words: str, stream: bool, http: httpx2.Client
) -> None:
    if stream and "stream_options" in fields:
        pytest.skip("then it is right")
    body = {"model": "tiny", "messages": HELLO, "stream": stream, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param and words in error["message"]


def test_errors_become_the_clients_exceptions(client: Any) -> None:
    with pytest.raises(NotFoundError, match="Did you mean 'tiny'") as missing:
        client.chat.completions.create(model="tinny", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(BadRequestError, match="maximum context length is 200") as long:
        client.chat.completions.create(
            model="plain", messages=[{"role": "user", "content": "漢" * 90}]
        )
    assert (long.value.code, long.value.param) == ("context_length_exceeded", "messages")
    with pytest.raises(BadRequestError, match="embeds texts and writes none"):
        client.chat.completions.create(model="vectors", messages=HELLO)
    with pytest.raises(BadRequestError, match="holds no conversation"):
        client.chat.completions.create(model="pair", messages=HELLO)
    with pytest.raises(APIStatusError) as nothing:
        client.get("/nothing", cast_to=object)
    assert nothing.value.status_code == 404


@pytest.mark.parametrize("body", [b"{", b"[]", b"null", b"\xff", b'{"messages": ' + b"[" * 9000])
def test_bodies_that_are_no_request(body: bytes, http: httpx2.Client) -> None:
    answer = http.post(
        "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] and error["param"] is None
    assert body != b"{" or error["message"].startswith("The body is not JSON: ")


def test_an_answer_that_breaks_off(client: Any, tell: Callable[..., str]) -> None:
    """As an error before it begins, and in the middle as an event; insides stay inside."""
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 30}
    with pytest.raises(InternalServerError, match="server's log says more") as broken:
        client.chat.completions.create(model=tell("abcdefgh", fails_at=3), **asked)
    assert "secret" not in broken.value.message
    stream = client.chat.completions.create(
        model=tell("abcdefgh", fails_at=3), **asked, stream=True
    )
    said = ""
    with pytest.raises(APIError, match="server's log says more") as broken_off:
        for chunk in stream:
            said += chunk.choices[0].delta.content or ""
    assert said == "abc" and broken_off.value.type == "server_error"
    (choice,) = client.chat.completions.create(model=tell("abc"), **asked).choices
    assert choice.message.content == "abc"  # the server goes on


def test_an_event_is_one_line_for_every_client() -> None:
    """Python's splitlines(), by which many read, knows more line ends than events do."""
    text = "a\x85b\u2028c\u2029d\ne あ\x1c"
    written = to_json({"content": text}).decode()
    assert len(written.splitlines()) == 1 and "あ" in written
    assert json.loads(written) == {"content": text}


def test_json_that_is_odd_is_no_trouble(http: httpx2.Client) -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    answer = http.post("/v1/chat/completions", json={"messages": HELLO, "metadata": deep})
    assert answer.status_code == 400 and "64 levels" in answer.json()["error"]["message"]
    half = '{"messages": [{"role": "user", "content": "\\ud83d"}], "max_tokens": 1, "user": null}'
    answer = http.post(
        "/v1/chat/completions", content=half, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200
