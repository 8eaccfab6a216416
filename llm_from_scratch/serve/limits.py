"""What a server lets its clients use up."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from llm_from_scratch.core.errors import UserError


@dataclass(frozen=True)
class Limits:
    """The limits of a server; every field is a flag of `scratchlm serve`.

    Attributes:
        max_body: bytes of a request's body.
        max_new_tokens: tokens of one text; a request for more is given so many.
        max_queue: texts that wait for each model beside those that it is writing.
        max_seconds: how long a request may take, waiting included; a text then ends with what it
            has.
        max_running: texts that each model writes at once.
        cache_tokens: tokens for which each model has room in its cache of keys and values; None:
            what `models.cache_room` finds sensible.
    """

    max_body: int = 4 << 20
    max_new_tokens: int = 4096
    max_queue: int = 256
    max_seconds: float = 600.0
    max_running: int = 64
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "max_queue" else 1
            if value is not None and not least <= value < math.inf:
                raise UserError(f"{field.name} is {value}; it must be at least {least}.")
