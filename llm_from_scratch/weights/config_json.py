"""config.json <-> `ModelConfig`, one pair of functions per family; `families.py` has the tables.

Every value is checked as it is read, and refused by the name it has in the file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig, RopeScaling

# No published model has sizes beyond these; a broken file easily has.
LARGEST = 1 << 24
MOST_LAYERS = 4096
# Rotary angles are tables over all positions, whatever the size of the file that announces them.
MOST_POSITIONS = 1 << 20
MOST_ANGLES = MOST_POSITIONS * 128  # positions times features of a head: 1 GiB of table

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
        return UserError(f"{self.where}: '{name}' is {self.values.get(name)!r}; it must be {must}.")

    def integer(self, name: str, largest: int = LARGEST) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise self.refuse(name, f"a whole number from 1 to {largest:,}")
        return value

    def positions(self, name: str, head_dim: int = 1) -> int:
        """A context's length, for whose every position `head_dim` angles will be tabled."""
        return self.integer(name, min(MOST_POSITIONS, max(MOST_ANGLES // head_dim, 1)))

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

    def activation(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise self.refuse(name, "one of " + ", ".join(ACTIVATIONS))
        return ACTIVATIONS[value]

    def share(self, whole: str, parts: str) -> int:
        """`whole` / `parts`, which must be a whole number."""
        if self.integer(whole) % self.integer(parts):
            raise self.refuse(whole, f"a multiple of '{parts}' ({self.integer(parts)})")
        return self.integer(whole) // self.integer(parts)


def check_sizes(config: ModelConfig, where: str) -> None:
    """Raise `UserError` for an architecture with larger numbers than a config.json may have."""
    fields = Fields(dataclasses.asdict(config), {}, where)
    fields.integer("n_layers", MOST_LAYERS)
    fields.positions("max_seq_len", config.head_dim)
    for name in ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"):
        fields.integer(name)


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """(theta, scaling) from `rope_parameters`, or from the older `rope_theta`, `rope_scaling`."""
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    table = fields.values.get(name) or {}
    if not isinstance(table, dict) or any(isinstance(value, dict) for value in table.values()):
        raise fields.refuse(name, "one table of rotary settings for all layers")
    inner = Fields(
        table, {"rope_theta": fields.values.get("rope_theta", 10_000.0)}, f"{fields.where}: {name}"
    )
    theta = inner.number("rope_theta")
    if theta <= 0:
        raise inner.refuse("rope_theta", "above 0")
    if table.get("partial_rotary_factor", 1.0) != 1.0:
        raise inner.refuse("partial_rotary_factor", "1.0 (a part of the features is not supported)")
    key = "rope_type" if "rope_type" in table else "type"
    kind = table.get(key, "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise inner.refuse(key, "'default' or 'llama3'; other scalings are not supported")
    if "original_max_position_embeddings" not in table:
        inner.values["original_max_position_embeddings"] = fields.integer("max_position_embeddings")
    scaling = RopeScaling(
        factor=inner.number("factor"),
        low_freq_factor=inner.number("low_freq_factor"),
        high_freq_factor=inner.number("high_freq_factor"),
        original_max_seq_len=inner.integer("original_max_position_embeddings"),
    )
    if scaling.factor < 1 or scaling.high_freq_factor <= scaling.low_freq_factor:
        raise inner.refuse("factor", "at least 1, and high_freq_factor above low_freq_factor")
    return theta, scaling


def read_llama(fields: Fields) -> ModelConfig:
    """LlamaForCausalLM."""
    heads = fields.integer("num_attention_heads")
    if fields.values.get("num_key_value_heads") is None:
        fields.values["num_key_value_heads"] = heads
    if fields.values.get("head_dim") is None:
        fields.values["head_dim"] = fields.share("hidden_size", "num_attention_heads")
    fields.share("num_attention_heads", "num_key_value_heads")
    if fields.integer("head_dim") % 2:
        raise fields.refuse("head_dim", "even, because rotary positions turn pairs of features")
    theta, scaling = _rope(fields)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=fields.integer("hidden_size"),
        n_layers=fields.integer("num_hidden_layers", MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=fields.integer("num_key_value_heads"),
        head_dim=fields.integer("head_dim"),
        d_ff=fields.integer("intermediate_size"),
        max_seq_len=fields.positions("max_position_embeddings", fields.integer("head_dim")),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=fields.flag("attention_bias"),
        activation=fields.activation("hidden_act"),
        feed_forward_bias=fields.flag("mlp_bias"),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        dropout=_dropout(fields, "attention_dropout"),
        init_std=fields.number("initializer_range"),
    )


def _dropout(fields: Fields, name: str) -> float:
    value = fields.number(name)
    if value >= 1:
        raise fields.refuse(name, "below 1")
    return value


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_llama`, in the new and the old layout of the rotary fields."""
    rope: dict[str, Any] = {"rope_type": "default"}
    if (scaling := config.rope_scaling) is not None:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "gelu_pytorch_tanh"
        if config.activation == "gelu_tanh"
        else config.activation,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        # Both layouts: version 5 of transformers reads the first, everything older the others.
        "rope_parameters": {"rope_theta": config.rope_theta, **rope},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else rope,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.dropout,
        "mlp_bias": config.feed_forward_bias,
    }


def read_qwen3(fields: Fields) -> ModelConfig:
    """Qwen3ForCausalLM: Llama with QK-norm, whose sliding windows must not be in use."""
    layers = fields.integer("num_hidden_layers", MOST_LAYERS)
    window = fields.values.get("sliding_window") if fields.flag("use_sliding_window") else None
    if window is not None and fields.values.get("layer_types") is None:
        first = fields.values["max_window_layers"]
        if not isinstance(first, int) or first < layers:
            raise fields.refuse("sliding_window", "null: sliding-window attention is not supported")
    kinds = fields.values.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise fields.refuse("layer_types", "'full_attention' for every layer")
    return replace(read_llama(fields), qk_norm=True)


def write_qwen3(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_qwen3`."""
    values = write_llama(config)
    del values["mlp_bias"]
    return {**values, "use_sliding_window": False, "sliding_window": None}


GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def read_gpt2(fields: Fields) -> ModelConfig:
    """GPT2LMHeadModel."""
    for ours, theirs in GPT2_ALIASES.items():
        if ours in fields.values:
            fields.values[theirs] = fields.values[ours]
    heads, width = fields.integer("n_head"), fields.integer("n_embd")
    inner = fields.integer("n_inner") if fields.values.get("n_inner") is not None else 4 * width
    for name in ("embd_pdrop", "attn_pdrop"):
        _dropout(fields, name)
    return ModelConfig(
        vocab_size=fields.integer("vocab_size"),
        d_model=width,
        n_layers=fields.integer("n_layer", MOST_LAYERS),
        n_heads=heads,
        n_kv_heads=heads,
        head_dim=fields.share("n_embd", "n_head"),
        d_ff=inner,
        max_seq_len=fields.positions("n_positions"),
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon"),
        position="learned",
        attention_bias=True,
        activation=fields.activation("activation_function"),
        gated=False,
        feed_forward_bias=True,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        # One value stands for the three, which published models have equal; it acts in training.
        dropout=_dropout(fields, "resid_pdrop"),
        init_std=fields.number("initializer_range"),
    )


def write_gpt2(config: ModelConfig) -> dict[str, Any]:
    """The inverse of `read_gpt2`."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new"
        if config.activation == "gelu_tanh"
        else config.activation,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embeddings,
    }
