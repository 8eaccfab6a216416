"""From the body of a chat request to what the engine is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_from_scratch.core.errors import nearest, shown
from llm_from_scratch.generate.chat import can_converse
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.openai.chat_schema import MOST_TOOLS, ChatRequest, Tool, plain
from llm_from_scratch.serve.openai.settings import LARGEST_FORM, check_size, naming, settings_of
from llm_from_scratch.text.chat import stop_strings, template_of
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.text.tool_calls import ToolReader
from llm_from_scratch.text.tools import ToolForm, call_schema, encode_tool_prompt, toolbox


@dataclass(frozen=True)
class Plan:
    """What is written for a chat request, and how it is read.

    Attributes:
        tools: the functions that the answer may call.
        forced: whether it must call one: the prompt then ends where a call has begun.
        written: the tokenizer of the answer.
    """

    served: ServedModel
    prompt: list[int]
    settings: SamplingSettings
    form: ToolForm
    tools: tuple[str, ...]
    forced: bool
    single: bool
    with_ids: bool
    written: Tokenizer

    def reader(self) -> ToolReader | None:
        """A reader for one answer; None where nothing can be called."""
        if not self.tools:
            return None
        return ToolReader(self.form, self.tools, forced=self.forced, single=self.single)


def plan_of(served: ServedModel, body: ChatRequest, most: int) -> Plan:
    """The plan for a request. Raises `ApiError` for what is wrong with it, naming the field."""
    tokenizer, template = served.tokenizer, served.template
    if not can_converse(served.model, tokenizer, template):  # type: ignore[arg-type]
        raise ApiError(
            400,
            f"The model {shown(served.name)} makes one text of another, such as a translation, and "
            "holds no conversation; send the text to /v1/completions.",
            param="model",
        )
    tools, must = _chosen_tools(body)
    told = [tool.model_dump(exclude_none=True) for tool in tools]
    box = toolbox(template_of(tokenizer, template))
    form: dict[str, Any] = {}
    if must:
        form = {"json_schema": call_schema(told, box.form)}
    elif body.response_format is not None and body.response_format.type != "text":
        form = {"json_schema": _schema(body)}
    if form:
        size = len(json.dumps(form["json_schema"]))
        check_size("tools" if must else "response_format", "characters", size, LARGEST_FORM)
    with naming("messages"):
        prompt = encode_tool_prompt(tokenizer, plain(body.messages), told, template=template)
    if must:
        prompt += tokenizer.encode(box.form.begin, special=True)
    settings = settings_of(
        body,
        _limit(body) or most,
        stop=(*(body.stop or ()), *stop_strings(tokenizer, template)),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        **form,
    )
    return Plan(
        served=served,
        prompt=prompt,
        settings=settings,
        form=box.form,
        tools=tuple(tool.function.name for tool in tools),
        forced=must,
        single=body.parallel_tool_calls is False or box.form.single,
        with_ids=bool(body.return_token_ids),
        written=tokenizer.target,
    )


def _limit(body: ChatRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise ApiError(
            400, f"max_tokens is {old} and max_completion_tokens {new}; give one of them.",
            param="max_tokens",
        )  # fmt: skip
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(
            400, "top_logprobs is given, but logprobs is not true; set it, or leave both out.",
            param="top_logprobs",
        )  # fmt: skip
    return new if new is not None else old


def _schema(body: ChatRequest) -> Mapping[str, Any]:
    """The JSON schema of a response_format."""
    wanted = body.response_format
    assert wanted is not None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None or wanted.json_schema.schema_ is None:
        raise ApiError(
            400,
            "response_format is of the type json_schema, but has no json_schema.schema; give one, "
            "or take the type json_object.",
            param="response_format.json_schema",
        )
    return wanted.json_schema.schema_


def _chosen_tools(body: ChatRequest) -> tuple[list[Tool], bool]:
    """The functions that may be called, and whether one must be."""
    tools = body.tools or []
    check_size("tools", "entries", len(tools), MOST_TOOLS)
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(400, f"Two tools are called {shown(twice)}; rename one.", param="tools")
    choice = body.tool_choice
    if choice is None or choice == "auto":
        must = False
    elif choice == "none":
        return [], False
    elif choice == "required":
        must = True
    else:
        name = _named(choice)
        if name not in names:
            raise ApiError(
                400,
                f"tool_choice wants the function {shown(name)}, which is not among the tools."
                + nearest(name, names),
                param="tool_choice",
            )
        tools, must = [tools[names.index(name)]], True
    if must and not tools:
        raise ApiError(400, "tool_choice wants a call, but there are no tools.", param="tools")
    _check_forms(body, tools, must)
    return tools, must


def _named(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise ApiError(
            400,
            f"tool_choice is {shown(choice)}; it must be 'none', 'auto', 'required' or "
            "{'type': 'function', 'function': {'name': NAME}}.",
            param="tool_choice",
        )
    return name


def _check_forms(body: ChatRequest, tools: list[Tool], must: bool) -> None:
    """A call has its own form, and there can be one only."""
    if not tools:
        return
    wanted = body.response_format
    others = {
        "response_format": wanted is not None and wanted.type != "text" and not must,
        "regex": body.regex is not None,
        "choice": body.choice is not None,
    }
    for name, given in others.items():
        if given:
            raise ApiError(
                400,
                f"{name} and tools are given together, but an answer of a set form could never be "
                "a call. Leave one of them out, or set tool_choice to 'none'.",
                param=name,
            )
    for place, tool in enumerate(tools):
        kind = (tool.function.parameters or {}).get("type", "object")
        if kind != "object":
            raise ApiError(
                400,
                f"The parameters of {tool.function.name} are of the type {shown(kind)}; arguments "
                "have names, so the type must be 'object'.",
                param=f"tools.{place}.function.parameters",
            )
