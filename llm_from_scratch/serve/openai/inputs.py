"""Fields that hold texts or token ids, one or many: `prompt` and `input`."""

from __future__ import annotations

from typing import Annotated, Any

from llm_from_scratch.core.errors import shown
from llm_from_scratch.serve.errors import ApiError
from llm_from_scratch.serve.openai.fields import TEXTS, TOKENS, described

MOST = 2048  # texts in one request, as at OpenAI
KINDS = f"A text or token ids, or up to {MOST} of them."


def input_schema(text: str, *, nullable: bool) -> Any:
    """How such a field is described."""
    rows = {"type": "array", "items": {**TOKENS, "minItems": 1}, "minItems": 1}
    kinds = [
        {"type": "string"},
        {**TEXTS, "minItems": 1},
        {**TOKENS, "minItems": 1},
        rows,
        *([{"type": "null"}] if nullable else []),
    ]
    return described({"anyOf": kinds}, text)


Prompt = Annotated[Any, input_schema(KINDS, nullable=True)]
Input = Annotated[Any, input_schema(KINDS, nullable=False)]


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def rows_of(value: Any, name: str) -> list[str | list[int]]:
    """The texts and lists of ids in a field; `ApiError` says what is wrong with it."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    problem = f"is {shown(value)}; it must be a text, token ids, or a list of either"
    if isinstance(value, list) and value:
        strange = [i for i, one in enumerate(value) if not (isinstance(one, str) or _is_ids(one))]
        if len(value) > MOST:
            problem = f"has {len(value)} entries; at most {MOST} can be sent at once"
        elif strange:
            problem = (
                f"has {shown(value[strange[0]])} at place {strange[0]}; there must be texts, or "
                "lists of token ids that are not empty"
            )
        elif len({isinstance(one, str) for one in value}) > 1:
            problem = "mixes texts and lists of token ids; send them apart"
        else:
            return list(value)
    raise ApiError(400, f"{name} {problem}.", param=name)
