"""Tools: templates are told of them in their form or in ours; calls are read as they come."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.tool_calls import Said, ToolReader
from llm_from_scratch.text.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    ToolForm,
    call_schema,
    encode_tool_prompt,
    toolbox,
)
from llm_from_scratch.text.training import train_tokenizer
from tests.text import tool_templates as templates

PLACE = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "天気", "parameters": PLACE, "strict": True},
}
ASKED = [{"role": "user", "content": "Rain in Nara?"}]
CALLED = [
    *ASKED,
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [
            {
                "id": f"call_{city}",
                "type": "function",
                "function": {"name": "weather", "arguments": json.dumps({"city": city})},
            }
            for city in ("Nara", "Uji")
        ],
    },
    {"role": "tool", "tool_call_id": "call_Nara", "content": "rain"},
    {"role": "tool", "tool_call_id": "call_Uji", "content": "sun"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Rain in Nara? " * 9], vocab_size=300)


def prompt(tokenizer: Tokenizer, template: str, messages: Any, tools: Any = ()) -> str:
    return tokenizer.decode(encode_tool_prompt(tokenizer, messages, tools, template=template))


# ------------------------------------------------------------------------- telling


@pytest.mark.parametrize(
    ("template", "form", "native"),
    [
        (templates.HERMES, HERMES, True),
        (templates.LLAMA, LLAMA, True),
        (templates.MISTRAL, MISTRAL, True),
        (templates.GEMMA, HERMES, False),
        ("{% for m in messages %}{{ m.content }}{% endfor %} the tools <tool_call>", HERMES, False),
        ("{% if tools %}<|unheard_of|>{{ tools }}{% endif %}", HERMES, False),
        ("{% if tools %}<tool_call><function=name>{{ tools }}{% endif %}", HERMES, False),
    ],
)
def test_a_template_says_which_form_it_knows(template: str, form: ToolForm, native: bool) -> None:
    found = toolbox(template)
    assert (found.form, found.native) == (form, native)


def test_a_template_that_knows_tools_is_told_of_them(tokenizer: Tokenizer) -> None:
    text = prompt(tokenizer, templates.HERMES, CALLED, [WEATHER])
    function = {key: value for key, value in WEATHER["function"].items() if key != "strict"}
    described = {"type": "function", "function": function}
    assert json.dumps(described, ensure_ascii=False) in text
    # Arguments come as JSON text, and templates want them as objects.
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Nara"}}\n</tool_call>' in text
    assert "<tool_response>\nsun\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")
    with pytest.raises(UserError, match="Message 2 has a tool call without the name"):
        prompt(tokenizer, templates.HERMES, [*ASKED, {"role": "assistant", "tool_calls": [{}]}])


def test_ids_have_the_length_that_a_template_wants(tokenizer: Tokenizer) -> None:
    text = prompt(tokenizer, templates.MISTRAL, CALLED, [WEATHER])
    ids = [part.partition('"')[0] for part in text.split('"id": "')[1:]]
    answered = [part.partition('"')[0] for part in text.split('"call_id": "')[1:]]
    assert ids == answered
    assert all(len(one) == 9 and one.isalnum() for one in ids) and ids[0] != ids[1]


def test_without_tools_a_template_sees_none(tokenizer: Tokenizer) -> None:
    assert "Respond in" not in prompt(tokenizer, templates.LLAMA, ASKED)
    nulls = [{**ASKED[0], "tool_calls": None, "name": None}]
    assert prompt(tokenizer, templates.LLAMA, nulls) == prompt(tokenizer, templates.LLAMA, ASKED)


def test_other_templates_are_told_in_a_system_message(tokenizer: Tokenizer) -> None:
    text = prompt(tokenizer, "chatml", CALLED, [WEATHER])
    head, _, rest = text.partition("<|im_end|>")
    assert head.startswith("<|im_start|>system\nYou can call functions.")
    assert '"name": "weather"' in head and "天気" in head and "strict" not in head
    assert rest == (
        "\n<|im_start|>user\nRain in Nara?<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Nara"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Uji"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n"
        "<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )
    said = [{"role": "system", "content": "Be kind."}, *ASKED]
    joined = prompt(tokenizer, "chatml", said, [WEATHER])
    assert joined.startswith("<|im_start|>system\nBe kind.\n\nYou can call functions.")
    assert joined.count("<|im_start|>system") == 1


def test_a_template_without_system_messages_is_told_by_the_user(tokenizer: Tokenizer) -> None:
    text = prompt(tokenizer, templates.GEMMA, CALLED, [WEATHER])
    assert text.startswith("<start_of_turn>user\nYou can call functions.")
    assert "just answer.\n\nRain in Nara?<end_of_turn>" in text


# ------------------------------------------------------------------------- reading


def read(form: ToolForm, text: str, sizes: Any = (10**6,), **options: Any) -> tuple[str, list[Any]]:
    """All the text, and the calls as [name, arguments], of an answer that came in such pieces."""
    reader, said, place, turn = ToolReader(form, ["weather", "f"], **options), [], 0, 0
    while place < len(text):
        size = sizes[turn % len(sizes)]
        said += reader.push(text[place : place + size])
        place, turn = place + size, turn + 1
    said += reader.finish()
    calls: list[Any] = []
    for one in said:
        assert one != Said()
        if one.name is not None:
            assert one.call == len(calls)
            calls.append([one.name, ""])
        if one.call is not None:
            calls[one.call][1] += one.arguments
    assert reader.calls == len(calls)
    return "".join(one.text for one in said), calls


ANSWERS: list[tuple[ToolForm, str, str, list[Any]]] = [
    (
        HERMES,
        'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "N}a\\"{r<a", '
        '"days": [1, {"x": 2}]}}\n</tool_call>\n<tool_call>{"arguments": {}, "name": "f"}'
        "</tool_call>\n",
        "Let me see.",
        [["weather", '{"city": "N}a\\"{r<a", "days": [1, {"x": 2}]}'], ["f", "{}"]],
    ),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}', "", [["f", '{"a": 1}']]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {}}</tool_call> So.', "So.", [["f", "{}"]]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": ', "", [["f", '{"a": ']]),
    (HERMES, 'A <tool_call>{"name": "g", "arguments": {}}', "", []),
    (HERMES, "A <tool_call>no JSON</tool_call> <tool", "", []),
    (HERMES, '<tool_call>{"name": ["f"], "arguments": {}}', "", []),
    (HERMES, '<tool_call>{"name": "f"', "", []),
    (HERMES, '{"name": "f", "arguments": {}}', "", []),
    (
        LLAMA,
        '{"name": "f", "parameters": {"a": "x"}}; {"name": "f", "parameters": {"a": "y"}}',
        "",
        [["f", '{"a": "x"}'], ["f", '{"a": "y"}']],
    ),
    (
        LLAMA,
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}',
        "",
        [["f", '{"a": 1}']],
    ),
    (LLAMA, '{"a": 1}', "", []),
    (LLAMA, 'Such as {"name": "f", "parameters": {}}', "", []),
    (
        MISTRAL,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": [1]}}, {"name": "weather", '
        '"arguments": {}, "id": "123456789"}]',
        "",
        [["f", '{"a": [1]}'], ["weather", "{}"]],
    ),
    (
        MISTRAL,
        'Well[TOOL_CALLS]f[CALL_ID]abc[ARGS]{"a": {"b": 1}}[TOOL_CALLS]weather{"city": "x"}',
        "Well",
        [["f", '{"a": {"b": 1}}'], ["weather", '{"city": "x"}']],
    ),
    (MISTRAL, '[TOOL_CALLS]g[ARGS]{"a": 1}', "", []),
]


@pytest.mark.parametrize(("form", "answer", "text", "calls"), ANSWERS)
@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_calls_are_read_however_they_come(
    form: ToolForm, answer: str, text: str, calls: list[Any], size: int
) -> None:
    # What is no call of a known function is text, unchanged.
    assert read(form, answer, (size,)) == (text if calls else answer, calls)


def test_a_call_is_told_as_soon_as_it_is_known() -> None:
    reader = ToolReader(HERMES, ["f"])
    assert reader.push("Yes <tool") == [Said("Yes")]
    assert reader.push('_call>{"name": "f"') == []
    assert reader.push(", ") == [Said(call=0, name="f")]
    assert reader.push('"arguments": {"a": ') == [Said(call=0, arguments='{"a": ')]
    assert reader.push("1}}") == [Said(call=0, arguments="1}")]
    assert reader.push("\n</tool_call>") == reader.finish() == []


def test_text_is_not_held_back_longer_than_needed() -> None:
    reader = ToolReader(HERMES, ["f"])
    assert reader.push("a < b") == [Said("a < b")]
    assert reader.push(" <") == []
    assert reader.push("=") == [Said(" <=")]


def test_forced_and_single_calls() -> None:
    body = '{"name": "f", "arguments": {"a": 1}}'
    for form in (HERMES, LLAMA, MISTRAL):
        named = body.replace("arguments", form.arguments)
        assert read(form, named, (3,), forced=True) == ("", [["f", '{"a": 1}']])
    twice = f"<tool_call>{body}</tool_call><tool_call>{body}</tool_call> and so on"
    assert read(HERMES, twice, (4,), single=True) == ("", [["f", '{"a": 1}']])


pieces = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "{", "}", '"', "\\", ":", ",", "[",
        "]", '{"name": "f"', '"arguments": ', "f", "x", " ", "\n", "<", "<tool", ", ", "{}", "あ",
    ]
)  # fmt: skip


@given(st.lists(pieces, max_size=25), st.lists(st.integers(1, 6), min_size=1, max_size=4))
@example(["[TOOL_CALLS]", "f", "[", "x", "{"], [1])
def test_the_pieces_change_nothing(parts: list[str], sizes: list[int]) -> None:
    """However an answer comes, the same is read; and where nothing is called, it is all text."""
    answer = "".join(parts)
    for form in (HERMES, LLAMA, MISTRAL):
        whole = read(form, answer)
        assert read(form, answer, sizes) == whole
        if not whole[1]:
            assert whole[0] == answer


# ------------------------------------------------------------------------- calls that must come


def test_the_schema_of_a_call_keeps_the_schemas_of_the_arguments() -> None:
    tree: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {
            "root": {"$ref": "#/$defs/node"},
            "default": {"$ref": "#/$defs/node"},
            "note": {"const": {"$ref": "#/$defs/node"}},
        },
        "required": ["root"],
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/node"}},
                "additionalProperties": False,
            }
        },
    }
    tools = [WEATHER, {"type": "function", "function": {"name": "tree", "parameters": tree}}]
    for form in (HERMES, LLAMA):
        schema = call_schema([*tools, {"function": {"name": "now"}}], form)
        good = [
            {"name": "weather", form.arguments: {"city": "Nara"}},
            {"name": "tree", form.arguments: {"root": {"next": {"next": {}}}, "default": {}}},
            {"name": "tree", form.arguments: {"root": {}, "note": {"$ref": "#/$defs/node"}}},
            {"name": "now", form.arguments: {}},
        ]
        wrong = [
            {"name": "weather", form.arguments: {}},
            {"name": "tree", form.arguments: {"root": {"next": 1}}},
            {"name": "tree", form.arguments: {"root": {}, "default": 1}},
            {"name": "now", form.arguments: []},
            {"name": "then", form.arguments: {}},
        ]
        for one in good:
            jsonschema.validate(one, schema)
        for bad in wrong:
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(bad, schema)
