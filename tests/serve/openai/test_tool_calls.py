"""Tools through OpenAI's own client: calls that a model may write, and calls that it must."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import jsonschema
import pytest

from llm_from_scratch.serve.models import ServedModel

ASKED: list[Any] = [{"role": "user", "content": "Rain?"}]


def function(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


DAYS = {"type": "integer", "minimum": 1, "maximum": 9}
WEATHER = function("weather", city={"enum": ["Nara", "京都"]}, days=DAYS)
TIME = function("time", zone={"$ref": "#/$defs/zone"})
TIME["function"]["parameters"]["$defs"] = {"zone": {"enum": ["JST", "UTC"]}}
TOOLS = [WEATHER, TIME]
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}


def call(name: str, arguments: dict[str, Any]) -> str:
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def test_text_and_calls(client: Any, tell: Callable[[str], str]) -> None:
    """The same whole and streamed: text first, then each call with its id, name and arguments."""
    said = "See:\n" + call("weather", {"city": "京都", "days": 2}) + "\n" + call("time", {})
    asked: dict[str, Any] = {"messages": ASKED, "tools": TOOLS, "max_tokens": 300}
    (choice,) = client.chat.completions.create(model=tell(said), **asked).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content == "See:"
    calls: Any = choice.message.tool_calls
    assert [(one.type, one.function.name) for one in calls] == [
        ("function", "weather"), ("function", "time"),
    ]  # fmt: skip
    assert json.loads(calls[0].function.arguments) == {"city": "京都", "days": 2}
    assert calls[1].function.arguments == "{}"
    assert calls[0].id != calls[1].id and all(one.id.startswith("call_") for one in calls)

    chunks = list(client.chat.completions.create(model=tell(said), **asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant" and deltas[0].content == ""
    assert "".join(delta.content or "" for delta in deltas) == "See:"
    parts = [part for delta in deltas for part in delta.tool_calls or ()]
    first = next(i for i, delta in enumerate(deltas) if delta.tool_calls)
    assert all(not delta.content for delta in deltas[first:])
    for index, whole in enumerate(calls):
        begin, *rest = [part for part in parts if part.index == index]
        assert begin.id and begin.type == "function"
        assert begin.function is not None and begin.function.name == whole.function.name
        assert all((part.id, part.type, part.function.name) == (None, None, None) for part in rest)
        arguments = "".join(part.function.arguments for part in (begin, *rest))
        assert arguments == whole.function.arguments
        if index == 0:
            assert len(rest) > 3  # they come as they are written
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_what_is_no_call(client: Any, tell: Callable[[str], str]) -> None:
    for said in (call("wether", {}), "<tool_call>Nara</tool_call>", "1 < 2, <tool"):
        (choice,) = client.chat.completions.create(
            model=tell(said), messages=ASKED, tools=TOOLS, max_tokens=300
        ).choices
        assert (choice.message.content, choice.finish_reason) == (said, "stop")
        assert choice.message.tool_calls is None
    said = call("weather", {})
    for more in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        (choice,) = client.chat.completions.create(
            model=tell(said), messages=ASKED, max_tokens=300, **more
        ).choices
        assert choice.message.content == said


def test_calls_that_are_cut_and_single_calls(client: Any, tell: Callable[[str], str]) -> None:
    said = call("weather", {"city": "Nara", "days": 1})
    asked: Any = {"messages": ASKED, "tools": TOOLS, "logprobs": True}
    (choice,) = client.chat.completions.create(model=tell(said), **asked, max_tokens=55).choices
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments.startswith('{"city": "Na')
    answer = client.chat.completions.create(
        model=tell(said + said), **asked, parallel_tool_calls=False
    )
    (choice,) = answer.choices
    assert len(choice.message.tool_calls) == 1 and choice.finish_reason == "tool_calls"
    assert answer.usage.completion_tokens == len(choice.logprobs.content) < 90
    stream = client.chat.completions.create(
        model=tell(said + said), **asked, parallel_tool_calls=False, stream=True
    )
    *_, last = stream
    assert last.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("name", ["tiny", "hermes", "mistral"])
def test_calls_that_must_come(name: str, client: Any) -> None:
    """Even an untrained model then calls a function with arguments of its schema."""
    asked: dict[str, Any] = {"model": name, "messages": ASKED, "tools": TOOLS, "seed": 2}
    for choice, names in (
        ("required", {"weather", "time"}),
        ({"type": "function", "function": {"name": "time"}}, {"time"}),
    ):
        (whole,) = client.chat.completions.create(**asked, tool_choice=choice).choices
        assert whole.finish_reason == "tool_calls" and whole.message.content is None
        (called,) = whole.message.tool_calls
        assert called.function.name in names
        jsonschema.validate(json.loads(called.function.arguments), SCHEMAS[called.function.name])
        assert len(called.id) == 9 if name == "mistral" else called.id.startswith("call_")
    with client.chat.completions.stream(**asked, tool_choice="required", n=2) as stream:
        final = stream.get_final_completion()
    for one in final.choices:
        (called,) = one.message.tool_calls
        jsonschema.validate(json.loads(called.function.arguments), SCHEMAS[called.function.name])


@pytest.mark.parametrize("name", ["tiny", "hermes", "mistral"])
def test_calls_and_results_go_back_into_the_template(
    name: str, http: httpx2.Client, models: dict[str, ServedModel]
) -> None:
    arguments = '{"city": "Nara", "days": 1}'
    called = {
        "id": "x",
        "type": "function",
        "function": {"name": "weather", "arguments": arguments},
    }
    messages = [
        *ASKED,
        # As the client's model_dump() gives it.
        {"role": "assistant", "content": None, "refusal": None, "audio": None,
         "function_call": None, "annotations": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "x", "content": [{"type": "text", "text": "雨"}]},
    ]  # fmt: skip
    body = {"model": name, "messages": messages, "tools": TOOLS, "max_tokens": 2}
    answer = http.post("/v1/chat/completions", json={**body, "return_token_ids": True})
    assert answer.status_code == 200, answer.text
    ids = answer.json()["prompt_token_ids"]
    text = models[name].tokenizer.decode(ids)
    assert '{"name": "weather", "arguments": ' + arguments in text and "雨" in text
    del body["max_tokens"]
    assert http.post("/v1/tokenize", json=body).json()["tokens"] == ids


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tool_choice": "always"}, "tool_choice", "must be 'none', 'auto', 'required' or"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "must be 'none'"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "wether"}}},
        "tool_choice",
        "Did you mean 'weather'",
    ),
    ({"tools": [WEATHER, WEATHER]}, "tools", "Two tools are called 'weather'"),
    ({"tools": [{"type": "custom"}]}, "tools.0.type", "'function'"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name", ""),
    ({"response_format": {"type": "json_object"}}, "response_format", "and tools are given"),
    ({"regex": "a"}, "regex", "and tools are given together"),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
            ]
        },
        "tools.0.function.parameters",
        "must be 'object'",
    ),
    (
        {
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "f",
                        "parameters": {"properties": {"a": {"type": "dog"}}},
                    },
                }
            ],
            "tool_choice": "required",
        },
        "tools",
        "JSON schema is wrong",
    ),
    (
        {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "messages.1.tool_calls.0.function",
        "Field required",
    ),
]


@pytest.mark.parametrize(("fields", "param", "words"), WRONG)
def test_what_is_wrong(fields: dict[str, Any], param: str, words: str, http: httpx2.Client) -> None:
    body = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "stream": True, **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and words in error["message"]
