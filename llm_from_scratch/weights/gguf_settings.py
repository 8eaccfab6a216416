"""The metadata keys of a GGUF file's architecture, in groups, each read into our config and back.

They are groups as those of `families/settings.py`, over another set of names. A key that begins
with a dot is none of the file's: it stands for a fact that the tensors say (`facts`), such as
`.output` for "the head is stored", because GGUF has no key for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.model.config import ExpertsConfig, ModelConfig, RopeScaling
from llm_from_scratch.weights.config_json import MOST_EXPERTS, Fields
from llm_from_scratch.weights.families.rotary import ramp, stretch
from llm_from_scratch.weights.families.settings import Group

# Keys of any architecture that do not change what it computes.
UNUSED = (
    "vocab_size", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout",
    "expert_gating_func", "classifier.output_labels",
)  # fmt: skip


# How one vector is made of a text's states, where the model is for embeddings: enum
# llama_pooling_type.
POOLING_TYPES = {1: "mean", 2: "cls", 3: "last"}


def not_in_use(value: Any) -> bool:
    """Whether the value of an unknown key is what nobody sets: 0, a factor of 1.0, "none"."""
    return value in (None, False, 0, "", "none", []) or (isinstance(value, float) and value == 1.0)


class Keys(Fields):
    """The metadata of one architecture by the names that follow `llama.` (or another) in the file.

    Numbers that are stored as fp32 read 9.99999974e-06 for 1e-5: here they are the shortest number
    that means the same fp32.
    """

    def __init__(self, values: Mapping[str, Any], architecture: str, where: str) -> None:
        short = {key: shortest(value) for key, value in values.items()}
        super().__init__(short, {}, where)
        self.architecture = architecture

    def refuse(self, name: str, must: str) -> UserError:
        value = shown(self.values.get(name))
        return UserError(
            f"{self.where}: '{self.architecture}.{name}' is {value}; it must be {must}."
        )


def shortest(value: Any) -> Any:
    """A float as the shortest number that means the same in fp32; anything else as it is."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


@dataclass
class Stored(Group):
    """A flag that is a tensor's being there; `ours` may name several fields of our config."""

    fact: str
    ours: str
    there: bool = True

    def __post_init__(self) -> None:
        self.fields = {self.fact: False}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(self.ours.split(), fields.values[self.fact] == self.there)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.fact: getattr(config, self.ours.split()[0]) == self.there}


@dataclass
class Rows(Group):
    """A size that is a tensor's number of rows."""

    fact: str
    ours: str

    def __post_init__(self) -> None:
        self.fields = {self.fact: 0}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        return {self.ours: fields.values[self.fact]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.fact: getattr(config, self.ours)}


@dataclass
class HeadKeys(Group):
    """Numbers of heads and their width.

    `wide`: heads may be wider or narrower than d_model / heads. `partial`: rotary positions may
    turn a part of each head. `turned`: there are rotary positions at all.
    """

    wide: bool = True
    partial: bool = False
    turned: bool = True

    def __post_init__(self) -> None:
        names = ["head_count", "head_count_kv", "key_length", "value_length"]
        self.fields = {f"attention.{name}": None for name in names}
        if self.turned:
            self.fields["rope.dimension_count"] = None

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        heads, kv = "attention.head_count", "attention.head_count_kv"
        width, values = "attention.key_length", "attention.value_length"
        if fields.values.get(kv) is None:
            fields.values[kv] = fields.integer(heads)
        fields.share(heads, kv)
        if fields.values.get(width) is None:
            fields.values[width] = fields.share("embedding_length", heads)
        d = fields.integer(width)
        if not self.wide and d * fields.integer(heads) != fields.integer("embedding_length"):
            raise fields.refuse(width, "'embedding_length' divided by the number of heads")
        if fields.values.get(values, d) not in (d, None):
            raise fields.refuse(values, f"the width of a key, {d}")
        found: dict[str, Any] = {"n_heads": fields.integer(heads), "head_dim": d}
        found["n_kv_heads"] = fields.integer(kv)
        if self.turned:
            found["rope_share"] = self._share(fields, d)
        return found

    def _share(self, fields: Fields, d: int) -> float:
        name = "rope.dimension_count"
        if fields.values.get(name) is None:
            return 1.0
        turned = fields.integer(name)
        if turned > d or turned % 2 or (turned != d and not self.partial):
            raise fields.refuse(name, f"the width of a head, {d}")
        share = turned / d
        return share if int(d * share) == turned else math.nextafter(share, 1.0)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values: dict[str, Any] = {
            "attention.head_count": config.n_heads,
            "attention.head_count_kv": config.n_kv_heads,
        }
        if self.wide or config.head_dim * config.n_heads != config.d_model:
            values["attention.key_length"] = values["attention.value_length"] = config.head_dim
        if self.turned:
            values["rope.dimension_count"] = config.rope_dim
        return values


@dataclass
class RopeKeys(Group):
    """Rotary positions. `factors`: stretched as in Llama 3, by a tensor of divisors (a fact).

    `local`: layers with a window have their own base.
    """

    factors: bool = False
    local: bool = False

    def __post_init__(self) -> None:
        names = ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
        self.fields = {f"rope.scaling.{name}": None for name in names}
        self.fields |= {"rope.freq_base": None, "rope.scale_linear": None, ".rope_freqs": None}
        if self.local:
            self.fields["rope.freq_base_swa"] = None

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        values = fields.values
        found: dict[str, Any] = {}
        for name, ours in (("", "rope_theta"), ("_swa", "local_rope_theta")):
            if name and not self.local:
                continue
            key = f"rope.freq_base{name}"
            if values.get(key) is None:
                values[key] = 10_000.0
            found[ours] = fields.number(key)
            if found[ours] <= 0:
                raise fields.refuse(key, "above 0")
        scaling = self._scaling(fields)
        if values.get(".rope_freqs") is not None:
            if scaling is not None or not self.factors:
                raise fields.refuse("rope.scaling.type", "'none' beside the tensor 'rope_freqs'")
            scaling = values[".rope_freqs"]
        return {**found, "rope_scaling": scaling}

    def _scaling(self, fields: Fields) -> RopeScaling | None:
        values, prefix = fields.values, "rope.scaling."
        kind = values.get(f"{prefix}type") or "linear"
        factor = values.get(f"{prefix}factor") or values.get("rope.scale_linear")
        if kind == "none" or (kind == "linear" and factor in (None, 0, 1)):
            return None
        if kind not in ("linear", "yarn"):
            raise fields.refuse(f"{prefix}type", "'none', 'linear' or 'yarn'")
        values[f"{prefix}factor"] = factor
        if kind == "linear":
            return RopeScaling("linear", stretch(fields, f"{prefix}factor"))
        for name, default in (("fast", 32.0), ("slow", 1.0)):
            if values.get(f"{prefix}yarn_beta_{name}") is None:
                values[f"{prefix}yarn_beta_{name}"] = default
        if values.get(f"{prefix}original_context_length") is None:
            values[f"{prefix}original_context_length"] = fields.integer("context_length")
        names = ("factor", "yarn_beta_slow", "yarn_beta_fast", "original_context_length")
        return ramp(fields, "yarn", *(f"{prefix}{name}" for name in names))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        values: dict[str, Any] = {"rope.freq_base": float(config.rope_theta)}
        if self.local and config.local_rope_theta is not None:
            values["rope.freq_base_swa"] = float(config.local_rope_theta)
        scaling = config.rope_scaling
        if scaling is None:
            return values
        if scaling.kind == "llama3":
            return {**values, ".rope_freqs": scaling if self.factors else None}
        values["rope.scaling.type"] = scaling.kind
        values["rope.scaling.factor"] = float(scaling.factor)
        if scaling.kind == "yarn":
            # The betas have keys, which llama.cpp does not look at: left out, others are refused.
            values["rope.scaling.original_context_length"] = scaling.original_max_seq_len
        return values


@dataclass
class WindowKeys(Group):
    """Which layers see a window only; all but the last of each `every` where the file is silent."""

    every: int
    default: int | None = None

    def __post_init__(self) -> None:
        self.fields = {"attention.sliding_window": None, "attention.sliding_window_pattern": None}

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        name, pattern = "attention.sliding_window", "attention.sliding_window_pattern"
        if fields.values.get(name) is None:
            fields.values[name] = self.default
        kinds, n = fields.values.get(pattern), known["n_layers"]
        if not fields.values[name]:
            return {}
        if isinstance(kinds, list):
            if len(kinds) != n:
                raise fields.refuse(pattern, f"one value for each of {n} layers")
            layers = tuple(i for i, slides in enumerate(kinds) if slides)
        else:
            fields.values[pattern] = kinds or self.every
            every = fields.integer(pattern)
            layers = tuple(i for i in range(n) if i % every < every - 1)
        return {"window": fields.integer(name) if layers else None, "window_layers": layers}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config.window is None:
            # Where silence means a window, one as wide as the context says that there is none.
            wide = {"attention.sliding_window": config.max_seq_len}
            return {} if self.default is None else wide
        slides = [layer in config.window_layers for layer in range(config.n_layers)]
        values: dict[str, Any] = {"attention.sliding_window": config.window}
        if slides != [i % self.every < self.every - 1 for i in range(config.n_layers)]:
            values["attention.sliding_window_pattern"] = slides
        return values


@dataclass
class ScoreWidth(Group):
    """Gemma's scores are divided by the root of the head's width, but for its largest models."""

    large: int  # the number of layers by which llama.cpp knows them

    fields = {}  # noqa: RUF012 - as in every group

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        if known["n_layers"] == self.large:
            return {"attention_width": known["d_model"] // known["n_heads"]}
        return {"attention_width": known["head_dim"]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


class ExpertKeys(Group):
    """Experts in every layer."""

    fields = dict.fromkeys(("expert_count", "expert_used_count", "expert_feed_forward_length"))

    def read(self, fields: Fields, known: dict[str, Any]) -> dict[str, Any]:
        if fields.integer("expert_count", MOST_EXPERTS) < fields.integer("expert_used_count"):
            raise fields.refuse("expert_used_count", "at most 'expert_count'")
        experts = ExpertsConfig(
            n_experts=fields.integer("expert_count"),
            n_active=fields.integer("expert_used_count"),
            d_ff=fields.integer("expert_feed_forward_length"),
            layers=tuple(range(known["n_layers"])),
        )
        return {"experts": experts}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        if config.experts is None:
            return {}
        return {
            "expert_count": config.experts.n_experts,
            "expert_used_count": config.experts.n_active,
            "expert_feed_forward_length": config.experts.d_ff,
        }
