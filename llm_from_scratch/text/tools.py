"""Tool calls: how a model is told which functions it may call, and in which form it calls them.

Many chat templates know tools: they are given the functions as the variable `tools`, and turn
calls and results in a conversation into text themselves. Three forms of a call are in common use,
and are told apart by what the template says:

    hermes   <tool_call>{"name": "weather", "arguments": {"city": "Nara"}}</tool_call>
             (Hermes, Qwen 2.5, Qwen 3 and many more)
    llama    {"name": "weather", "parameters": {"city": "Nara"}}
             (Llama 3.1 to 3.3, sometimes behind <|python_tag|>)
    mistral  [TOOL_CALLS][{"name": "weather", "arguments": {"city": "Nara"}}]
             (Mistral; its newer models write [TOOL_CALLS]weather[ARGS]{"city": "Nara"})

Where a template knows no tools, or another form, the functions are described in a system message
of ours, and calls and results are plain text in the first form. `tool_calls.py` reads the answers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.text.chat import Message, check_messages, encode_chat_prompt, template_of
from llm_from_scratch.text.tokenizer import Tokenizer

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

SYSTEM = """\
You can call functions. They are described here as JSON, one in each line:
<tools>
{tools}
</tools>
To call one, answer with its name and its arguments as JSON between these two marks, and stop there:
<tool_call>
{{"name": "the name of the function", "arguments": {{"the name of an argument": "its value"}}}}
</tool_call>
What it gives then comes between <tool_response> and </tool_response>. Where none is needed, \
just answer."""


@dataclass(frozen=True)
class ToolForm:
    """How calls stand in a text.

    Attributes:
        opens: the marks with which calls begin; what stands before them is an ordinary answer.
        begin: what comes before the JSON of a call, as the model is used to writing it.
        closes: the marks that may follow a call.
        arguments: the name of the arguments in the JSON.
        bare: whether an answer that begins with `{` is a call as well.
        id_length: how long a call's id has to be; None where any will do.
        single: whether there can be one call only in an answer.
    """

    name: str
    opens: tuple[str, ...]
    begin: str
    closes: tuple[str, ...] = ()
    arguments: str = "arguments"
    bare: bool = False
    id_length: int | None = None
    single: bool = False


HERMES = ToolForm("hermes", ("<tool_call>",), "<tool_call>\n", ("</tool_call>",))
LLAMA = ToolForm("llama", ("<|python_tag|>",), "", arguments="parameters", bare=True, single=True)
MISTRAL = ToolForm("mistral", ("[TOOL_CALLS]",), "[TOOL_CALLS][", id_length=9)
FORMS = (HERMES, LLAMA, MISTRAL)
# Control tokens without which a call could not be seen in a text: they are shown in answers.
MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")


@dataclass(frozen=True)
class Toolbox:
    """The form in which a model calls tools, and whether its template tells it of them."""

    form: ToolForm
    native: bool


@lru_cache(maxsize=64)
def toolbox(template: str) -> Toolbox:
    """What a chat template (Jinja) says about tools."""
    if re.search(r"\{[%{](?:(?![%}]\}).)*\btools\b", template, re.DOTALL):
        if "[TOOL_CALLS]" in template:
            return Toolbox(MISTRAL, True)
        if "<tool_call>" in template and "<function=" not in template:
            return Toolbox(HERMES, True)
        if '"parameters":' in template and "<tool_call>" not in template:
            return Toolbox(LLAMA, True)
    return Toolbox(HERMES, False)


def encode_tool_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    *,
    template: str | None = None,
) -> list[int]:
    """The ids after which the model writes its answer, or its calls of `tools`.

    `messages` are OpenAI's: those of the assistant may have `tool_calls`, whose arguments are JSON
    text, and results come from the role "tool" with the `tool_call_id` of the call. Raises
    `UserError` for messages that make no sense or that the template refuses.
    """
    jinja = template_of(tokenizer, template)
    box = toolbox(jinja)
    prepared = _prepared(check_messages(messages), box.form)
    if not (tools or any(one["role"] == "tool" or "tool_calls" in one for one in prepared)):
        return encode_chat_prompt(tokenizer, prepared, template=template)
    told = [_described(tool) for tool in tools]
    if box.native:
        return encode_chat_prompt(tokenizer, prepared, template=template, tools=told or None)
    spoken = _as_text(prepared)
    if not told:
        return encode_chat_prompt(tokenizer, spoken, template=template)
    said = SYSTEM.format(tools="\n".join(_json(tool) for tool in told))
    try:
        return encode_chat_prompt(tokenizer, _with_system(spoken, said), template=template)
    except UserError:  # templates such as Gemma 2's know no system message
        return encode_chat_prompt(tokenizer, _before_first(spoken, said), template=template)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _described(tool: Tool) -> dict[str, Any]:
    """A tool as templates expect it: what is not set is not there."""
    function = {
        key: value
        for key, value in tool["function"].items()
        if value is not None and key != "strict"  # a promise to the caller, not to the model
    }
    return {"type": "function", "function": function}


def _prepared(messages: list[dict[str, Any]], form: ToolForm) -> list[dict[str, Any]]:
    """The messages as templates expect them: arguments as objects, results with the name of the
    function, ids of the length that the form wants, and nothing that is None."""
    names: dict[str, str] = {}
    prepared = []
    for number, message in enumerate(messages, 1):
        kept = {key: value for key, value in message.items() if value is not None}
        kept["content"] = message["content"] or ""
        if not kept.get("tool_calls"):
            kept.pop("tool_calls", None)
        else:
            kept["tool_calls"] = [_call(call, number, form) for call in kept["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in kept["tool_calls"]}
        if kept["role"] == "tool":
            kept["tool_call_id"] = _id(str(kept.get("tool_call_id", "")), form)
            kept.setdefault("name", names.get(kept["tool_call_id"], ""))
        prepared.append(kept)
    return prepared


def _call(call: Any, number: int, form: ToolForm) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(
            f"Message {number} has a tool call without the name of a function; it must be such as "
            '{"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}.'
        )
    arguments = function.get("arguments") or "{}"
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # an answer may have been cut in its middle
            arguments = json.loads(arguments)
    return {
        "id": _id(str(call.get("id", "")), form),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _id(given: str, form: ToolForm) -> str:
    """An id of the length that the form wants, always the same for the same one."""
    if form.id_length is None or (len(given) == form.id_length and given.isalnum()):
        return given
    return hashlib.sha256(given.encode("utf-8", "replace")).hexdigest()[: form.id_length]


def call_text(name: str, arguments: Any) -> str:
    """A call as text in the first form."""
    return f"<tool_call>\n{_json({'name': name, 'arguments': arguments})}\n</tool_call>"


def _as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls and results as text of the assistant and of the user; results in a row are one turn."""
    spoken: list[dict[str, Any]] = []
    results = False  # whether the last turn is one of results
    for message in messages:
        content = message["content"]
        if message["role"] == "tool":
            content = f"<tool_response>\n{content}\n</tool_response>"
            if results:
                spoken[-1]["content"] += "\n" + content
            else:
                spoken.append({"role": "user", "content": content})
            results = True
            continue
        results = False
        calls = [
            call_text(call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls", ())
        ]
        text = "\n".join([*([content] if content else []), *calls])
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        spoken.append({**rest, "content": text})
    return spoken


def _with_system(messages: list[dict[str, Any]], said: str) -> list[dict[str, Any]]:
    first = messages[0]
    if first["role"] in ("system", "developer"):
        joined = f"{first['content']}\n\n{said}" if first["content"] else said
        return [{**first, "content": joined}, *messages[1:]]
    return [{"role": "system", "content": said}, *messages]


def _before_first(messages: list[dict[str, Any]], said: str) -> list[dict[str, Any]]:
    """What a system message would say, in front of what the user says first."""
    place = next((i for i, one in enumerate(messages) if one["role"] == "user"), 0)
    first = messages[place]
    joined = {**first, "content": f"{said}\n\n{first['content']}"}
    return [*messages[:place], joined, *messages[place + 1 :]]


# ------------------------------------------------------------------------- calls that must come


def call_schema(tools: Sequence[Tool], form: ToolForm) -> dict[str, Any]:
    """A JSON schema for one call of one of the tools, with arguments that its own schema allows."""
    kinds = []
    for number, tool in enumerate(tools):
        function = tool["function"]
        place = f"#/anyOf/{number}/properties/{form.arguments}"
        arguments = {"type": "object", **(function.get("parameters") or {"properties": {}})}
        kinds.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    form.arguments: _moved(arguments, place),
                },
                "required": ["name", form.arguments],
                "additionalProperties": False,
            }
        )
    return {"anyOf": kinds}


# Under these a "$ref" is a value like any other; under those stand names, each with a schema.
VALUES = ("const", "enum", "default", "example", "examples")
NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def _moved(schema: Any, place: str, *, names: bool = False) -> Any:
    """A schema whose references within itself still hold once it stands at `place`."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for key, value in schema.items():
        if names:
            moved[key] = _moved(value, place)
        elif key == "$ref" and isinstance(value, str) and value.startswith("#"):
            moved[key] = place + value[1:]
        elif key in VALUES:
            moved[key] = value
        elif key != "$schema":  # that belongs at the top of a schema only
            moved[key] = _moved(value, place, names=key in NAMES)
    return moved
