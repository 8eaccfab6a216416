"""From the fields of a request to `SamplingSettings`, with errors that name the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.serve.errors import ApiError, as_api_error
from llm_from_scratch.serve.openai.fields import Writing

SAME = (
    "temperature", "top_p", "n", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "no_repeat_ngram", "regex", "stop", "logit_bias", "choice",
)  # fmt: skip
# What a request calls a setting that is called otherwise here.
CALLED = {"max_new_tokens": "max_tokens", "json_schema": "response_format"}
LARGEST_FORM = 1 << 18  # characters of a pattern or a schema: all wait while it is made ready
SIZES = (
    ("logit_bias", "entries", 1024),
    ("choice", "entries", 1024),
    ("regex", "characters", LARGEST_FORM),
)
FIELDS = (*SAME, "seed", "logprobs", *CALLED)


@contextmanager
def naming(param: str | None = None, schema: str = "response_format") -> Iterator[None]:
    """Errors in here name a field: that which their sentence begins with, or `param`; those about
    a JSON schema name the field that it came from."""
    try:
        yield
    except UserError as error:
        found = as_api_error(error)
        first = re.match(r"\w+", found.message)
        word = first[0] if first else ""
        if word in FIELDS:
            found.message = CALLED.get(word, word) + found.message[len(word) :]
            found.param = CALLED.get(word, word)
        elif found.message.startswith("The JSON schema"):
            found.param = schema
        elif found.message.startswith("The request asks for"):
            found.param = "n"
        elif found.message.startswith("The pattern"):
            found.param = "regex"
        else:
            found.param = found.param or param
        raise found from error


def check_size(name: str, unit: str, size: int, most: int) -> None:
    """Refuse what would hold up all others. (No part of the OpenAPI description, whose readers
    would write examples of this size.)"""
    if size > most:
        raise ApiError(
            400, f"{name} has {size:,} {unit}; at most {most:,} can be sent.", param=name
        )


def settings_of(body: Writing, most: int, **more: Any) -> SamplingSettings:
    """The settings that a body asks for; `most` is how many tokens it gets without `max_tokens`.

    `more` are settings that do not stand in the body under their own name, or not all of them.
    """
    if body.stream_options is not None and not body.stream:
        raise ApiError(
            400, "stream_options is there, but stream is not true; leave one out or set the other.",
            param="stream_options",
        )  # fmt: skip
    given: dict[str, Any] = {
        name: value for name in SAME if (value := getattr(body, name)) is not None
    }
    for name, unit, limit in SIZES:
        check_size(name, unit, len(given.get(name, ())), limit)
    given.setdefault("temperature", 1.0)
    given["max_new_tokens"] = min(body.max_tokens or most, 2**31)
    given["seed"] = None if body.seed is None else body.seed % 2**63
    with naming():
        return SamplingSettings(**(given | more))
