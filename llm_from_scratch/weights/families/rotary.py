"""The fields of config.json that set rotary positions, in their newer and older layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_from_scratch.model.config import ModelConfig, RopeScaling
from llm_from_scratch.weights.config_json import Fields
from llm_from_scratch.weights.families.settings import FULL, SLIDING, Group

LEAST_TURNS = 1e-9  # over the old context: fewer are none


def stretch(fields: Fields, factor: str) -> float:
    """How many times longer the context becomes; `factor` is the field's name."""
    if fields.number(factor) < 1:
        raise fields.refuse(factor, "at least 1")
    return fields.number(factor)


def ramp(fields: Fields, kind: str, factor: str, low: str, high: str, original: str) -> RopeScaling:
    """A stretching by frequency, llama3's or YaRN's; the names are those of its fields."""
    times = stretch(fields, factor)
    if kind == "yarn" and fields.number(low) < LEAST_TURNS:
        raise fields.refuse(low, "above 0")
    if fields.number(high) <= fields.number(low):
        raise fields.refuse(high, f"above '{low}'")
    numbers = fields.number(low), fields.number(high)
    return RopeScaling(kind, times, *numbers, fields.integer(original))


def _base(fields: Fields) -> float:
    """The base of the frequencies; at 0 and below there are none."""
    if fields.number("rope_theta") <= 0:
        raise fields.refuse("rope_theta", "above 0")
    return fields.number("rope_theta")


def _scaling(fields: Fields, table: dict[str, Any], name: str) -> RopeScaling | None:
    """The stretching that one table of rotary settings asks for."""
    inner = Fields(table, {}, f"{fields.where}: {name}")
    key = "rope_type" if "rope_type" in table else "type"
    kind = table.get(key, "default")
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "yarn"):
        must = "'default', 'linear', 'llama3' or 'yarn'; other scalings are not supported"
        raise inner.refuse(key, must)
    known = {key, "type", "factor", "rope_theta", "partial_rotary_factor"}
    if kind == "linear":
        scaling = RopeScaling("linear", stretch(inner, "factor"))
    else:
        low, high = ("low_freq_factor", "high_freq_factor")
        if kind == "yarn":
            low, high = ("beta_slow", "beta_fast")
            inner.values = {low: 1.0, high: 32.0, **inner.values}
        original = "original_max_position_embeddings"
        if inner.values.get(original) is None:
            inner.values[original] = fields.integer("max_position_embeddings")
        known |= {low, high, original}
        scaling = ramp(inner, kind, "factor", low, high, original)
    for other, value in table.items():
        if other not in known and value is not None:
            raise inner.refuse(other, "left out; this setting is not supported")
    return scaling


def _scaling_json(scaling: RopeScaling | None) -> dict[str, Any]:
    """The inverse of `_scaling`."""
    if scaling is None:
        return {"rope_type": "default"}
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return values
    low, high = ("low_freq_factor", "high_freq_factor")
    if scaling.kind == "yarn":
        low, high = ("beta_slow", "beta_fast")
    original = {"original_max_position_embeddings": scaling.original_max_seq_len}
    return {**values, low: scaling.low_freq_factor, high: scaling.high_freq_factor, **original}


@dataclass
class Rope(Group):
    """Rotary settings: in one table since version 5 of transformers, in fields of their own before.

    `old_theta` and `old_share` are the older names of the base and of the share of the features.
    """

    theta: float = 10_000.0
    share: float | None = None  # the default share, for classes that know one
    old_theta: str = "rope_theta"
    old_share: str = "partial_rotary_factor"

    def __post_init__(self) -> None:
        self.fields = {"rope_parameters": None}
        self.old_names = (self.old_theta, "rope_scaling", self.old_share)

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
        table = fields.values.get(name) or {}
        if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
            raise fields.refuse(name, "one table of rotary settings for all layers")
        theta = fields.values.get(self.old_theta, self.theta)
        share = fields.values.get(self.old_share, self.share or 1.0)
        inner = Fields(
            table, {"rope_theta": theta, "partial_rotary_factor": share}, f"{fields.where}: {name}"
        )
        share = inner.number("partial_rotary_factor")
        if self.share is None and share != 1.0:
            raise inner.refuse("partial_rotary_factor", "1.0 (the class turns all features)")
        return {
            "rope_theta": _base(inner),
            "rope_scaling": _scaling(fields, table, name),
            "rope_share": share,
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling = _scaling_json(config.rope_scaling)
        share = {} if self.share is None else {"partial_rotary_factor": config.rope_share}
        old_share = {} if self.share is None else {self.old_share: config.rope_share}
        # Both layouts: version 5 of transformers reads the first, everything older the others.
        return {
            "rope_parameters": {"rope_theta": config.rope_theta, **share, **scaling},
            self.old_theta: config.rope_theta,
            "rope_scaling": None if config.rope_scaling is None else scaling,
            **old_share,
        }


@dataclass
class LayeredRope(Group):
    """Two sets of rotary settings: for full attention, and for layers with a window.

    `old_scaling`: whether the class takes the older field `rope_scaling` for full attention alone.
    """

    theta: float
    local_theta: float
    old_theta: str
    old_local: str
    old_scaling: bool = True

    def __post_init__(self) -> None:
        self.fields = {"rope_parameters": None}
        self.old_names = (self.old_theta, self.old_local, "rope_scaling")

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        tables = fields.values.get("rope_parameters") or {}
        if not isinstance(tables, dict) or any(
            not isinstance(tables.get(kind) or {}, dict) for kind in (FULL, SLIDING)
        ):
            raise fields.refuse("rope_parameters", f"a table for {FULL} and one for {SLIDING}")
        full = dict(tables.get(FULL) or fields.values.get("rope_scaling") or {})
        local = dict(tables.get(SLIDING) or {})
        full.setdefault("rope_theta", fields.values.get(self.old_theta, self.theta))
        local.setdefault("rope_theta", fields.values.get(self.old_local, self.local_theta))
        where = f"{fields.where}: rope_parameters"
        if _scaling(fields, local, "rope_parameters") is not None:
            raise fields.refuse("rope_parameters", f"'default' for {SLIDING}")
        return {
            "rope_theta": _base(Fields(full, {}, where)),
            "rope_scaling": _scaling(fields, full, "rope_parameters"),
            "local_rope_theta": _base(Fields(local, {}, where)),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling = _scaling_json(config.rope_scaling)
        local = config.local_rope_theta
        return {
            "rope_parameters": {
                FULL: {"rope_theta": config.rope_theta, **scaling},
                SLIDING: {"rope_theta": local, "rope_type": "default"},
            },
            self.old_theta: config.rope_theta,
            self.old_local: local,
            "rope_scaling": scaling if config.rope_scaling and self.old_scaling else None,
        }
