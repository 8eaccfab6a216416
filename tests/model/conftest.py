"""Tiny random models of the reference library, nothing in them at a value that hides a mistake."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.weights.folder import load_folder

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # the tests' 40 tokens go well past it
}
# Every size differs from every other, so that a swapped axis cannot fit.
REFERENCES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": 67, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 4,
        "n_inner": 100,
        "activation_function": "gelu_new", "layer_norm_epsilon": 3e-4, "tie_word_embeddings": True,
        "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "reorder_and_upcast_attn": False,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "initializer_range": 0.3,
        "use_cache": True, "summary_type": "cls_index", "summary_use_proj": True,
        "summary_activation": None,
        "summary_proj_to_labels": True, "summary_first_dropout": 0.1,
    },
    "llama": {
        "vocab_size": 71, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "hidden_act": "silu",
        "max_position_embeddings": 48, "rms_norm_eps": 3e-4, "tie_word_embeddings": False,
        "rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True,
        "attention_dropout": 0.1,
        "pretraining_tp": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        "initializer_range": 0.3, "use_cache": True,
    },
    "qwen3": {
        "vocab_size": 73, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3,
        "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "max_position_embeddings": 48, "rms_norm_eps": 3e-4, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 700.0}, "attention_bias": True,
        "attention_dropout": 0.1, "use_sliding_window": False, "sliding_window": None,
        "max_window_layers": 28, "layer_types": None, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": None, "initializer_range": 0.3, "use_cache": True,
    },
}  # fmt: skip
CLASSES: dict[str, tuple[Any, Any]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_reference(family: str, **changes: Any) -> PreTrainedModel:
    """A reference model whose parameters are all random: norms and biases as well."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**{**REFERENCES[family], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.7)
    return model.eval()


@pytest.fixture(scope="session", params=list(REFERENCES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[PreTrainedModel, Decoder]:
    """A reference model and ours, loaded from the folder that the reference wrote."""
    theirs = make_reference(request.param)
    folder: Path = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    ours, _ = load_folder(folder)
    return theirs, ours


def random_tokens(model: Decoder, batch: int = 2, length: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (batch, length), generator=generator)


# Helpers as fixtures: test modules in different folders cannot import each other's.


@pytest.fixture(scope="session")
def reference() -> Callable[..., PreTrainedModel]:
    return make_reference


@pytest.fixture(scope="session")
def tokens_for() -> Callable[..., torch.Tensor]:
    return random_tokens


@pytest.fixture(scope="session", params=list(REFERENCES))
def family_values(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A family's name and the config fields of its reference model."""
    return request.param, REFERENCES[request.param]
