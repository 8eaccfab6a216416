"""The bodies of everything but chats."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llm_from_scratch.serve.openai.chat_schema import Messages, Tool
from llm_from_scratch.serve.openai.fields import (
    LARGEST,
    MOST_TOP,
    TOKENS,
    Body,
    Ignored,
    Reply,
    TokenLogprob,
    Usage,
    Writing,
    examples,
)
from llm_from_scratch.serve.openai.inputs import Input, Prompt

# ------------------------------------------------------------------------- completions


class CompletionRequest(Writing):
    """Texts to continue."""

    model_config = examples(
        {"prompt": "Once upon a time", "max_tokens": 20},
        {"prompt": ["Once", "Twice"], "n": 2, "stream": True, "logprobs": 2, "max_tokens": 5},
        {"prompt": [70, 71], "stream": True, "return_token_ids": True, "logprobs": 0},
        {"prompt": "Once", "echo": True, "logprobs": 1, "max_tokens": 0},
    )
    REFUSED = {  # noqa: RUF012
        "suffix": "this server continues texts and fills no gaps in them; leave it out.",
    }
    prompt: Prompt = ""
    max_tokens: int | None = Field(
        None, ge=0, description="New tokens at most; with 0 and echo, the prompt alone."
    )
    echo: bool | None = Field(None, description="Whether the answer begins with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_TOP, description="Of how many of the likeliest tokens in each place."
    )
    best_of: int | None = Field(None, ge=1, description="The same as n, if given.")


class CompletionLogprobs(Reply):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]
    content: list[TokenLogprob] | None = Field(
        None, description="The same as chats give it, with return_token_ids."
    )


class CompletionChoice(Reply):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(Reply):
    """Continued texts; a chunk of a stream looks the same."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    system_fingerprint: str
    prompt_token_ids: list[int] | None = Field(None, description="With return_token_ids.")


# ------------------------------------------------------------------------- embeddings


class EmbeddingRequest(Body):
    """Texts to embed."""

    model_config = examples(
        {"input": "Once upon a time"},
        {"input": ["Once", "Twice"], "encoding_format": "base64", "dimensions": 8},
        {"input": [[70, 71], [72]]},
    )
    model: str | None = Field(None, description="The first embedder if not given.")
    input: Input
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(
        None, ge=1, description="Only so many of the first numbers, scaled to length 1 again."
    )
    user: Ignored = None


class Embedding(Reply):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(
        description="Numbers, or the base64 of 32-bit floats, the lowest byte first."
    )


class EmbeddingUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class Embeddings(Reply):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


# ------------------------------------------------------------------------- models and tokens


class ModelEntry(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["writer", "embedder"]
    max_model_len: int = Field(description="Tokens of its context.")


class ModelList(Reply):
    object: Literal["list"]
    data: list[ModelEntry]


class TokenizeRequest(Body):
    """A text or a conversation to make tokens of."""

    model_config = examples(
        {"prompt": "Once upon a time", "return_token_strs": True},
        {"messages": [{"role": "user", "content": "Hello"}]},
    )
    model: str | None = None
    prompt: str | None = Field(None, description="A text; or else give messages.")
    messages: Messages | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether a text gets what belongs around it, such as a bos token (true)."
    )
    return_token_strs: bool | None = Field(None, description="Whether each token's text is given.")


class Tokens(Reply):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Tokens to make a text of."""

    model_config = examples({"tokens": [70, 71]})
    model: str | None = None
    tokens: Annotated[list[int], Field(json_schema_extra=TOKENS)]


class Text(Reply):
    prompt: str


class TutorialRequest(Body):
    """A text to continue."""

    model_config = examples({"text": "Once upon a time"})
    text: str
    max_new_tokens: int | None = Field(None, ge=1, description="50 if not given.")
    temperature: float | None = Field(None, ge=0, description="0.8 if not given.")
    seed: int | None = Field(None, ge=0, le=LARGEST)


class TutorialReply(Reply):
    generated_text: str = Field(description="The text and its continuation.")
