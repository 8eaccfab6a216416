"""The values of a config.json, checked as they are read and refused by the name they have there.

`families/` holds the tables that say what the fields mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.model.config import LARGEST_SIZE, ModelConfig
from llm_from_scratch.model.inventory import AnyConfig, weights_of

# No published model has sizes beyond these; a broken file easily has.
LARGEST = LARGEST_SIZE
MOST_LAYERS = 4096
MOST_EXPERTS = 4096
LARGEST_WEIGHT = 1 << 40  # numbers in one tensor

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


class Fields:
    """The values of one config.json, with the class's defaults, checked as they are asked for."""

    def __init__(self, values: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
        self.values = {**defaults, **values}
        self.where = where

    def refuse(self, name: str, must: str) -> UserError:
        value = shown(self.values.get(name))
        return UserError(f"{self.where}: '{name}' is {value}; it must be {must}.")

    def integer(self, name: str, largest: int = LARGEST) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise self.refuse(name, f"a whole number from 1 to {largest:,}")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
            raise self.refuse(name, "a number that is not negative")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def token_id(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST:
            raise self.refuse(name, f"a token's id, from 0 to {LARGEST:,}")
        return value

    def maybe_token_id(self, name: str) -> int | None:
        """A token's id, or None for null."""
        return None if self.values.get(name) is None else self.token_id(name)

    def activation(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(name, "one of " + ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def maybe_number(self, name: str) -> float | None:
        """A number above 0, or None for null."""
        if self.values.get(name) is None:
            return None
        if self.number(name) == 0:
            raise self.refuse(name, "above 0, or null")
        return self.number(name)

    def share_of_one(self, name: str) -> float:
        """A number from 0 to below 1, such as a dropout."""
        value = self.number(name)
        if value >= 1:
            raise self.refuse(name, "below 1")
        return value

    def maybe_share_of_one(self, name: str) -> float | None:
        """The same, or None for null."""
        return None if self.values.get(name) is None else self.share_of_one(name)

    def share(self, whole: str, parts: str) -> int:
        """`whole` / `parts`, which must be a whole number."""
        if self.integer(whole) % self.integer(parts):
            raise self.refuse(whole, f"a multiple of '{parts}' ({self.integer(parts)})")
        return self.integer(whole) // self.integer(parts)


def check_sizes(config: ModelConfig, where: str) -> None:
    """Raise `UserError` for an architecture with larger numbers than a config.json may have."""
    fields = Fields(dataclasses.asdict(config), {}, where)
    fields.integer("n_layers", MOST_LAYERS)
    for name in ("max_seq_len", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
        fields.integer(name)
    if config.experts is not None:
        experts = Fields(dataclasses.asdict(config.experts), {}, where)
        experts.integer("n_experts", MOST_EXPERTS)
        experts.integer("d_ff")
    check_weights(config, where)


def check_weights(config: AnyConfig, where: str) -> None:
    """Raise `UserError` where sizes that are sound alone make a tensor of absurd size together."""
    for weight in weights_of(config):
        if math.prod(weight.shape) > LARGEST_WEIGHT:
            shape = " x ".join(f"{size:,}" for size in weight.shape)
            raise UserError(
                f"{where}: its sizes make '{weight.name}' a tensor of {shape} numbers, which no "
                "model has; copy the file anew."
            )
