"""The bodies of /v1/chat/completions: what may be asked, and what is answered."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.openai.fields import (
    MOST_TOP,
    Ignored,
    Part,
    Reply,
    TokenLogprob,
    Usage,
    Writing,
    described,
    examples,
)
from llm_from_scratch.text.chat import check_messages

MOST_MESSAGES, MOST_TOOLS = 2048, 128  # as at OpenAI
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Open(BaseModel):
    """An object within a message; a chat template may read further fields."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class TextPart(Open):
    type: Literal["text"]
    text: str


class WantedFunction(Open):
    name: str
    arguments: str | dict[str, Any] | None = Field(None, description="JSON.")


class EarlierCall(Open):
    id: str | None = None
    type: Literal["function"] | None = None
    function: WantedFunction


class Message(Open):
    """One message of a conversation."""

    role: Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[EarlierCall] | None = None
    tool_call_id: str | None = None


def _check(messages: Any) -> Any:
    """Say in a sentence which message is wrong; what is left is for the types to find."""
    if isinstance(messages, list) and len(messages) > MOST_MESSAGES:
        raise ApiError(
            400, f"There are {len(messages)} messages; at most {MOST_MESSAGES} can be sent.",
            param="messages",
        )  # fmt: skip
    try:
        check_messages(messages)
    except UserError as error:
        raise ApiError(400, str(error), param="messages") from error
    return messages


Messages = Annotated[
    list[Message],
    BeforeValidator(_check),
    Field(min_length=1, description=f"The conversation: up to {MOST_MESSAGES} messages."),
]
CHOICE = {
    "anyOf": [
        {"type": "string", "enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {
                "type": {"const": "function"},
                "function": {
                    "type": "object",
                    "properties": {"name": {"type": "string"}},
                    "required": ["name"],
                },
            },
            "required": ["type", "function"],
        },
        {"type": "null"},
    ]
}


class Function(Part):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="A JSON schema of the arguments, which are an object."
    )
    strict: bool | None = None


class Tool(Part):
    """A function that the model may call."""

    type: Literal["function"]
    function: Function


class JsonSchema(Part):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, serialize_by_alias=True
    )
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALLED = {
    "role": "assistant",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Nara"}'},
        }
    ],
}


class ChatRequest(Writing):
    """A conversation to answer."""

    model_config = examples(
        HELLO,
        {**HELLO, "n": 2, "seed": 1, "logprobs": True, "top_logprobs": 3, "stop": ["\n", "!"]},
        {**HELLO, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0},
        {**HELLO, "stream": True, "logprobs": True, "return_token_ids": True},
        {**HELLO, "response_format": {"type": "json_object"}},
        {**HELLO, "tools": [WEATHER], "tool_choice": "required"},
        {**HELLO, "tools": [WEATHER], "tool_choice": "required", "stream": True},
        {
            "messages": [
                *HELLO["messages"],  # type: ignore[misc]
                CALLED,
                {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
            ],
            "tools": [WEATHER],
            "max_tokens": 20,
        },
    )
    REFUSED = {  # noqa: RUF012
        "functions": "functions are given as tools now: tools=[{'type': 'function', ...}].",
        "function_call": "this is called tool_choice now.",
        "audio": "this server writes text only.",
        "moderation": "this server judges no contents.",
        "web_search_options": "this server searches nothing; give it a tool that does.",
    }
    messages: Messages
    max_completion_tokens: int | None = Field(
        None, ge=1, description="The newer name of max_tokens."
    )
    logprobs: bool | None = Field(
        None, description="Whether to give the log-probability of each token."
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP, description="Of how many of the likeliest in its place, too."
    )
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, description=f"Up to {MOST_TOOLS}.")
    tool_choice: Annotated[
        Any, described(CHOICE, "Whether a function is called: as the model likes, never, always.")
    ] = None
    parallel_tool_calls: bool | None = Field(
        None, description="False: the answer ends with its first call."
    )
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prediction: Ignored = None


# ------------------------------------------------------------------------- answers


class CalledFunction(Reply):
    name: str
    arguments: str = Field(description="JSON.")


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = Field(None, description="Where functions are called.")


class Logprobs(Reply):
    content: list[TokenLogprob] | None
    refusal: None


FinishReason = Literal["stop", "length", "tool_calls"]


class Choice(Reply):
    index: int
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: FinishReason


class ChatCompletion(Reply):
    """An answer, or `n` of them."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")


class FunctionDelta(Reply):
    name: str | None = None
    arguments: str


class ToolCallDelta(Reply):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: Logprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(Reply):
    """What one event of a stream holds."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(None, description="In the last chunk, with include_usage.")
    system_fingerprint: str
    prompt_token_ids: list[int] | None = None


def plain(messages: list[Message]) -> list[dict[str, Any]]:
    """The messages as they were sent."""
    return [message.model_dump(exclude_unset=True) for message in messages]
