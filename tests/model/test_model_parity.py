"""Ours equals the reference library in fp32: logits and gradients, folders in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llm_from_scratch.model.config import RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.layers import rope_frequencies
from llm_from_scratch.weights.families import FAMILIES, REQUIRED_EVERYWHERE, UNUSED_EVERYWHERE
from llm_from_scratch.weights.folder import load_folder, save_folder

Pair = tuple[PreTrainedModel, Decoder]
Reference = Callable[..., PreTrainedModel]
Tokens = Callable[..., torch.Tensor]
CLASSES: dict[str, Any] = {"gpt2": GPT2Config, "llama": LlamaConfig, "qwen3": Qwen3Config}


def assert_same_logits(theirs: PreTrainedModel, ours: Decoder) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, ours.config.vocab_size, (2, 40), generator=generator)
    with torch.no_grad():
        wanted, got = theirs(tokens).logits, ours(tokens)
    assert wanted.std() > 0.1  # the comparison is of something
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)


def test_logits_of_their_folder(pair: Pair) -> None:
    assert_same_logits(*pair)


def test_logits_of_our_folder(pair: Pair, tmp_path: Path) -> None:
    _, ours = pair
    save_folder(ours, None, tmp_path / "model")
    back, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_logits(back.eval(), ours)
    # What the reference read from our config.json says the same to us.
    back.save_pretrained(tmp_path / "again")
    again, _ = load_folder(tmp_path / "again")
    assert again.config == ours.config


def test_gradients(pair: Pair, tokens_for: Tokens) -> None:
    theirs, ours = pair
    tokens = tokens_for(ours)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    theirs.zero_grad()
    ours.zero_grad()
    loss(theirs(tokens).logits).backward()
    loss(ours(tokens)).backward()
    family = FAMILIES[theirs.config.model_type]
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    entries = list(family.entries(ours.config, gradients))
    assert {entry.theirs for entry in entries} == set(wanted)
    for entry in entries:
        got = torch.cat([gradients[name] for name in entry.ours])  # type: ignore[misc]
        got = got.t() if entry.transposed else got
        scale = wanted[entry.theirs].abs().max()
        torch.testing.assert_close(got / scale, wanted[entry.theirs] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu"}),
        ("gpt2", {"activation_function": "gelu", "n_inner": None}),
        ("llama", {"tie_word_embeddings": True, "mlp_bias": False, "attention_bias": False}),
        ("llama", {"num_key_value_heads": None, "head_dim": None, "hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
        ("qwen3", {"attention_bias": False, "hidden_act": "silu", "num_key_value_heads": 1}),
        ("qwen3", {"tie_word_embeddings": False}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 9}),
    ],
)
def test_other_values_of_the_fields(
    family: str, changes: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    theirs = reference(family, **changes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert_same_logits(theirs, ours)
    save_folder(ours, None, tmp_path / "ours")
    assert_same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval(), ours)


def test_every_field_of_the_reference_is_known(
    family_values: tuple[str, dict[str, Any]], reference: Reference
) -> None:
    """A field that a new version adds is noticed: handle, require or list it, and set it here."""
    name, values = family_values
    family = FAMILIES[name]
    config = reference(name).config
    known = {*UNUSED_EVERYWHERE, *REQUIRED_EVERYWHERE, *family.defaults, *family.required}
    known |= set(family.unused)
    if name == "gpt2":
        known.add("rope_parameters")  # of the base class; GPT-2 has no rotary positions
    assert set(config.to_dict()) - known == set()
    inherited = {field.name for field in fields(PreTrainedConfig)}
    assert {field.name for field in fields(config)} - inherited <= set(values)
    assert all(reason for reason in family.unused.values())


def test_left_out_fields_have_the_defaults_of_the_class(
    family_values: tuple[str, dict[str, Any]],
) -> None:
    name, _ = family_values
    theirs = json.loads(CLASSES[name]().to_json_string(use_diff=False))
    for field, value in FAMILIES[name].defaults.items():
        # What the class fills in from other fields, or switches off because it is not in use.
        if value is not None and field in theirs and field != "sliding_window":
            assert theirs[field] == value, field


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_bfloat16_folder_keeps_its_precision(
    family: str, reference: Reference, tmp_path: Path
) -> None:
    reference(family).to(torch.bfloat16).save_pretrained(tmp_path)
    ours, _ = load_folder(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    wide, _ = load_folder(tmp_path, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same_logits(theirs.eval(), wide)


@pytest.mark.parametrize("theta", [10_000.0, 100_000.0, 500_000.0, 1e6])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rotary_frequencies_to_the_bit(theta: float, head_dim: int) -> None:
    """An error of one unit in the last place is an angle of 5e-4 after 8,000 positions."""
    rope = {"rope_type": "default", "rope_theta": theta}
    config = LlamaConfig(head_dim=head_dim, rope_parameters=rope, max_position_embeddings=131072)
    assert torch.equal(
        rope_frequencies(head_dim, theta, None), LlamaRotaryEmbedding(config).inv_freq
    )
    config.rope_parameters = {
        **rope, "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    torch.testing.assert_close(
        rope_frequencies(head_dim, theta, RopeScaling(factor=32.0)),
        LlamaRotaryEmbedding(config).inv_freq,
        rtol=3e-7,
        atol=0,
    )
