"""What the bodies of requests have in common: strict types, no unknown fields, the fields that say
how to write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from llm_from_scratch.core.errors import nearest, shown
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.text.tokenizer import without_surrogates

DEEPEST = 64  # levels of JSON in a body: more than any schema needs, less than Python can walk
MOST_TOP = 20  # alternatives for each token
LONGEST_NGRAM = 256  # tokens; all n-grams of a text are kept in memory
LARGEST = 2**63 - 1


def clean(value: Any, depth: int = DEEPEST) -> Any:
    """JSON that can be walked and written again: not too deep, no halves of surrogate pairs."""
    if isinstance(value, str):
        return without_surrogates(value)
    if isinstance(value, float) and value.is_integer():  # to JSON, 2.0 is an integer
        return int(value)
    if not isinstance(value, list | dict):
        return value
    if depth == 0:
        raise ApiError(400, f"The body nests more than {DEEPEST} levels deep; make it flatter.")
    if isinstance(value, dict):
        return {without_surrogates(k): clean(item, depth - 1) for k, item in value.items()}
    if all(type(item) is int for item in value):  # token ids, of which there may be very many
        return value
    return [clean(item, depth - 1) for item in value]


class Body(BaseModel):
    """The body of a request. Fields that do not exist are refused, with the nearest that does."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )
    REFUSED: ClassVar[Mapping[str, str]] = {}  # fields of OpenAI's that cannot be had here, and why

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, item in clean(value).items():
            if name in cls.REFUSED:
                if item is not None:
                    raise ApiError(400, f"{name}: {cls.REFUSED[name]}", param=name)
            elif name not in cls.model_fields:
                raise ApiError(
                    400, f"There is no field {shown(name)} here.{nearest(name, cls.model_fields)}",
                    param=name, code="unknown_parameter",
                )  # fmt: skip
            else:
                kept[name] = item
        return kept


def examples(*bodies: dict[str, Any]) -> ConfigDict:
    """The settings of a body that is described with these examples."""
    return ConfigDict(json_schema_extra={"examples": list(bodies)})


class Part(BaseModel):
    """An object within a body: strict types, unknown fields refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Reply(BaseModel):
    """What is sent back; it describes the answers, which are written as plain JSON."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Reply):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Reply):
    """Every error."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "The request is refused; the message says why."},
    "5XX": {"model": ErrorReply, "description": "The server fails, or is shutting down."},
}


def described(schema: dict[str, Any], text: str = "") -> Any:
    """A field that takes several kinds of values, which its route tells apart in a sentence."""
    return WithJsonSchema({**schema, "description": text} if text else schema)


TOKENS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}


def _stops(value: Any) -> Any:
    """A single string is a list of one."""
    return [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=4),
    BeforeValidator(_stops),
    described(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {**TEXTS, "items": {"type": "string", "minLength": 1}, "maxItems": 4},
            ]
        },
        "Up to four texts at which the answer ends; they are no part of it.",
    ),
]
Ignored = Annotated[Any, Field(description="Taken and without effect.")]


class StreamOptions(Part):
    include_usage: bool | None = Field(
        None, description="Whether a last chunk says how many tokens were read and written."
    )
    include_obfuscation: Ignored = None


class Writing(Body):
    """How to write: OpenAI's settings, and some that most other servers know as well."""

    model: str | None = Field(None, description="The first of this server's models if not given.")
    stream: bool | None = Field(None, description="Whether the answer comes in events, as written.")
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(
        None, ge=1, description="New tokens at most; if not given, as many as fit."
    )
    temperature: float | None = Field(
        None, ge=0, description="0 takes the likeliest token each time; 1 if not given."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128, description="How many answers.")
    stop: Stops | None = None
    seed: int | None = Field(
        None, ge=-LARGEST - 1, le=LARGEST, description="The same seed gives the same answer."
    )
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    logit_bias: dict[str, float] | None = Field(
        None, description="Token id -> number from -100 to 100 that is added to its logit."
    )
    top_k: int | None = Field(None, ge=0, le=LARGEST)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    no_repeat_ngram: int | None = Field(None, ge=0, le=LONGEST_NGRAM)
    regex: str | None = Field(None, description="A pattern that the whole answer matches.")
    choice: list[str] | None = Field(
        None, min_length=1, description="The answer is one of these texts."
    )
    return_token_ids: bool | None = Field(
        None,
        description="Adds the ids of the prompt, and to log-probabilities those of their tokens.",
    )
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer ends with a chunk that counts the tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class Usage(Reply):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(Reply):
    token: str
    logprob: float
    bytes: list[int] | None
    token_id: int | None = Field(None, description="With return_token_ids.")


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


def usage_of(read: int, written: int) -> dict[str, int]:
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }
