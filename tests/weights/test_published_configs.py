"""config.json files as they are published: older layouts, and fields that only the hub knows.

The tests of parity see files that the newest version of the reference library wrote. Those that
people download were written by many versions, and by hand. `published_configs.jsonl` has the fields
and values of well-known models, one per line.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3TextConfig

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.weights.families import FAMILIES, config_fields, family_of, read_config

LINES = (Path(__file__).parent / "published_configs.jsonl").read_text(encoding="utf-8").splitlines()
CONFIGS: dict[str, dict[str, Any]] = {
    entry["name"]: entry["config"] for entry in map(json.loads, LINES)
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_is_read_and_written_back(name: str) -> None:
    values = CONFIGS[name]
    family, config = read_config(values, "config.json")
    assert family.name == values["model_type"]
    assert family_of(config) is family
    again = {**config_fields(family, config), "model_type": family.name}
    for kept in ("pad_token_id", "architectures", "is_encoder_decoder"):
        if kept in values:
            again[kept] = values[kept]
    assert read_config(again, "config.json")[1] == config


def test_every_family_has_one() -> None:
    assert {values["model_type"] for values in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama3.2", {"rope_theta": 500_000.0, "max_seq_len": 131072, "head_dim": 64}),
        ("pythia", {"rope_share": 0.25, "residual": "parallel"}),
        ("rinna-neox", {"rope_share": 1.0, "residual": "pre"}),
        ("mistral-v0.3", {"window": None}),
        ("qwen2.5", {"window": None, "attention_bias": True, "output_bias": False}),
        (
            "gemma2",
            {"window": 4096, "window_layers": tuple(range(0, 26, 2)), "logit_softcap": 30.0},
        ),
        ("gemma3-270m", {"window": 512, "local_rope_theta": 10_000.0, "rope_theta": 1e6}),
        ("bge-m3", {"max_seq_len": 8192, "position_offset": 2}),
        ("modernbert", {"window": 64, "rope_theta": 160_000.0, "local_rope_theta": 10_000.0}),
    ],
)
def test_older_names_mean_what_they_meant(name: str, fields: dict[str, Any]) -> None:
    config = read_config(CONFIGS[name], "config.json")[1]
    assert {field: getattr(config, field) for field in fields} == fields


def test_the_experts_of_a_published_mixture() -> None:
    config = read_config(CONFIGS["Qwen3-30B-A3B"], "config.json")[1]
    assert config.experts.n_experts == 128 and config.experts.n_active == 8
    assert config.experts.layers == tuple(range(48)) and config.window is None


def test_both_stacks_of_a_published_pair() -> None:
    config = read_config(CONFIGS["opus"], "config.json")[1]
    assert isinstance(config, EncoderDecoderConfig)
    assert config.start_id == 59513 and config.end_id == 0
    assert config.encoder.activation == "silu" and config.decoder.position == "sinusoidal"


@pytest.mark.parametrize(
    ("fields", "full"),
    [
        ({}, (5,)),
        ({"sliding_window_pattern": 2}, (1, 3, 5)),
        ({"_sliding_window_pattern": 2}, (5,)),
    ],
)
def test_the_windows_of_a_gemma_3_without_a_list(
    fields: dict[str, int], full: tuple[int, ...]
) -> None:
    """The reference reads one of the two names; the other it only writes."""
    values = {"model_type": "gemma3_text", "num_hidden_layers": 6, **fields}
    config = read_config(values, "config.json")[1]
    assert isinstance(config, ModelConfig)
    assert tuple(i for i in range(6) if i not in config.window_layers) == full
    theirs = Gemma3TextConfig(**values).layer_types
    assert [i in full for i in range(6)] == [kind == "full_attention" for kind in theirs]


def test_the_pictures_model_is_not_taken_for_the_text_model() -> None:
    with pytest.raises(UserError, match="'model_type' is 'gemma3'"):
        read_config({"model_type": "gemma3", "text_config": {}}, "config.json")
