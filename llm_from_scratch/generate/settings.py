"""What a request may ask of the text to come: `SamplingSettings`, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest, shown


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose tokens, and when to stop.

    `temperature` 0 always takes the likeliest token. `top_k` 0, `top_p` 1, `min_p` 0,
    `repetition_penalty` 1, `presence_penalty` and `frequency_penalty` 0, `no_repeat_ngram` 0 and
    an empty `logit_bias` (token id -> number added to its logit) leave the model's distribution as
    it is. The repetition penalty and n-grams regard the prompt too, presence and frequency only
    the new text. With a `seed`, the same prompt gives the same text on the same model; None draws a
    fresh seed. `stop` holds strings at which the text ends (they are not part of it). `n` texts
    are written for each prompt.

    With `num_beams` the likeliest of so many texts side by side is looked for (temperature 0), and
    `n` of them are given; a `length_penalty` above 0 favours longer texts.

    `logprobs` k asks for the log-probability of every new token and of the k likeliest in its
    place, `prompt_logprobs` for the same of the prompt; None asks for none.

    At most one of `json_schema` (a dict, or JSON text), `regex` and `choice` says what form the
    text must have (generate/constraint.py).
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = field(default=None, hash=False)
    regex: str | None = None
    choice: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("stop", "choice"):
            value: Sequence[str] = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name, valid, remedy in RULES:
            value = getattr(self, name)
            try:
                fits = valid(value)
            except (TypeError, OverflowError):  # no number, or one beyond all floats
                fits = False
            if not fits:
                raise UserError(f"{name} is {shown(value)}; {remedy}.")
        if "" in self.stop:
            raise UserError("A stop string is empty; give at least one character or leave it out.")
        if self.num_beams > 1 and self.temperature != 0.0:
            raise UserError(
                f"num_beams is {self.num_beams} and temperature {self.temperature}; beam search "
                "looks for the likeliest text and draws nothing: set temperature to 0."
            )
        if 1 < self.num_beams < self.n:
            raise UserError(
                f"n is {self.n}, but num_beams is {self.num_beams}; as many texts as beams can be "
                "had."
            )
        forms = [name for name in ("json_schema", "regex", "choice") if _given(getattr(self, name))]
        if len(forms) > 1:
            raise UserError(
                f"{' and '.join(forms)} are set together; the text can have one form only."
            )

    @property
    def looks_back(self) -> bool:
        """Whether the choice of a token depends on the tokens before it, the model apart."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.no_repeat_ngram > 0
        )


def _given(value: object) -> bool:
    return value is not None and value != ()


def _count(value: int | None) -> bool:
    return value is None or value >= 0


PENALTY = "it must be from -100 to 100 (0 is off, at most 2 is usual)"
RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", lambda x: x >= 1, "it must be at least 1"),
    (
        "temperature",
        lambda x: 0.0 <= x < math.inf,
        "it must be 0 (always the likeliest token) or more",
    ),
    ("top_k", lambda x: x >= 0, "it must be 0 (off) or a number of tokens"),
    ("top_p", lambda x: 0.0 < x <= 1.0, "it must be above 0 and at most 1 (off)"),
    ("min_p", lambda x: 0.0 <= x <= 1.0, "it must be between 0 (off) and 1"),
    (
        "repetition_penalty",
        lambda x: 0.01 <= x <= 100.0,
        "it must be from 0.01 to 100 (1 is off, 1.1 is usual)",
    ),
    ("presence_penalty", lambda x: -100.0 <= x <= 100.0, PENALTY),
    ("frequency_penalty", lambda x: -100.0 <= x <= 100.0, PENALTY),
    ("no_repeat_ngram", lambda x: x >= 0, "it must be 0 (off) or a number of tokens"),
    ("seed", lambda x: x is None or 0 <= x < 2**63, "it must be from 0 to 2^63 - 1"),
    ("n", lambda x: 1 <= x <= 10_000, "it must be from 1 to 10,000"),
    ("num_beams", lambda x: 1 <= x <= 1000, "it must be from 1 (no beam search) to 1,000"),
    (
        "length_penalty",
        lambda x: -10.0 <= x <= 10.0,
        "it must be from -10 to 10 (1 is usual, 0 favours short texts)",
    ),
    ("logprobs", _count, "it must be 0 (the new token alone) or how many of the likeliest"),
    ("prompt_logprobs", _count, "it must be 0 (the token alone) or how many of the likeliest"),
)


def _bias(bias: Mapping[Any, Any]) -> dict[int, float]:
    """Ids and numbers, as JSON gives them too (where every key is a text)."""
    found: dict[int, float] = {}
    for token, value in bias.items():
        try:
            found[int(token)] = float(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise UserError(
                f"logit_bias has {shown(token)}: {shown(value)}; it must be a token id and a "
                "number, such as 42: -100."
            ) from error
        if int(token) < 0 or not -100.0 <= found[int(token)] <= 100.0:
            raise UserError(
                f"logit_bias has {shown(token)}: {shown(value)}; ids begin at 0, and the number "
                "must be from -100 (in effect never) to 100 (in effect always)."
            )
    return found


def make_settings(**settings: Any) -> SamplingSettings:
    """`SamplingSettings` from keyword arguments; an unknown one is named, with the nearest."""
    known = [one.name for one in fields(SamplingSettings)]
    for name in settings:
        if name not in known:
            raise UserError(
                f"'{name}' is no sampling setting; there are {', '.join(known)}."
                + nearest(name, known)
            )
    return SamplingSettings(**settings)


def check_bias(settings: SamplingSettings, vocab_size: int) -> None:
    """Refuse a bias for tokens that the model does not have."""
    if settings.logit_bias and (largest := max(settings.logit_bias)) >= vocab_size:
        raise UserError(
            f"logit_bias has the token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}."
        )
