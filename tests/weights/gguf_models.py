"""Small random models of every GGUF architecture, odd in every setting that a file can express."""

from __future__ import annotations

from typing import Any

import torch

from llm_from_scratch.model.config import ExpertsConfig, ModelConfig, RopeScaling
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder

BASE: dict[str, Any] = {
    "vocab_size": 270, "d_model": 96, "n_layers": 7, "n_heads": 6, "n_kv_heads": 2, "head_dim": 16,
    "d_ff": 160, "max_seq_len": 64, "norm_eps": 3e-5, "rope_theta": 20_000.0,
}  # fmt: skip
WIDE = {"head_dim": 32}  # times the number of heads it is not d_model
EQUAL = {"n_kv_heads": 6}
LAYER_NORM = {
    "norm": "layer", "gated": False, "attention_bias": True, "output_bias": True,
    "feed_forward_bias": True,
}  # fmt: skip
GEMMA = {
    **WIDE, "norm": "rms_plus_one", "residual": "sandwich", "scale_embedding": True,
    "activation": "gelu_tanh", "attention_width": 32, "window": 8,
}  # fmt: skip
GEMMA3 = {
    **GEMMA, "family": "gemma3_text", "qk_norm": "head", "rope_theta": 1e6, "local_rope_theta": 2e4
}  # fmt: skip
LEARNED = {**EQUAL, **LAYER_NORM, "position": "learned", "rope_theta": 10_000.0}
BERT = {
    **LEARNED, "family": "bert", "activation": "gelu", "residual": "post", "causal": False,
    "embedding_norm": True, "final_norm": False,
}  # fmt: skip
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {
        **WIDE, "attention_bias": True, "output_bias": True, "feed_forward_bias": True,
        "tie_embeddings": False,
    },
    "llama-stretched": {**WIDE, "rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "llama-linear": {"rope_scaling": RopeScaling("linear", 4.0)},
    "llama-yarn": {"rope_scaling": RopeScaling("yarn", 4.0, 1.0, 32.0, 16)},
    "mistral": {"family": "mistral", "tie_embeddings": False},
    "qwen2": {"family": "qwen2", "attention_bias": True},
    "qwen3": {**WIDE, "family": "qwen3", "qk_norm": "head", "tie_embeddings": False},
    "qwen3moe": {
        **WIDE, "family": "qwen3_moe", "qk_norm": "head",
        "experts": ExpertsConfig(5, 2, 64, layers=tuple(range(7))),
    },
    "gemma2": {
        **GEMMA, "family": "gemma2", "attention_softcap": 40.0, "logit_softcap": 20.0,
        "window_layers": (0, 2, 4, 6),
    },
    "gemma3": {**GEMMA3, "window_layers": (0, 1, 2, 3, 4, 6)},
    "gemma3-odd": {
        **GEMMA3, "window_layers": (1, 2, 6), "rope_scaling": RopeScaling("linear", 8.0),
        "tie_embeddings": False,
    },
    "gpt2": {**LEARNED, "family": "gpt2", "activation": "gelu_tanh"},
    "gptneox": {
        **EQUAL, **LAYER_NORM, "family": "gpt_neox", "activation": "gelu", "residual": "parallel",
        "rope_share": 0.25, "tie_embeddings": False,
    },
    "gptneox-pre": {
        **EQUAL, **LAYER_NORM, "family": "gpt_neox", "activation": "gelu", "rope_share": 0.5,
    },
    "olmo2": {
        "family": "olmo2", "residual": "branch_end", "qk_norm": "all", "tie_embeddings": False,
    },
    "olmo2-tied": {"family": "olmo2", "residual": "branch_end", "qk_norm": "all"},
    "bert": {**BERT, "n_segments": 2},
    "bert-offset": {**BERT, "position_offset": 2},  # as RoBERTa counts
}  # fmt: skip
# llama.cpp looks GELU up in a table of half-precision numbers.
BENT = ("gemma", "gpt", "bert")


def architecture_of_case(name: str) -> str:
    return {"mistral": "llama"}.get(name, name.partition("-")[0])


def make(name: str, **changes: Any) -> Decoder | Encoder:
    """A model with every parameter random, norms and biases away from 0 and 1."""
    config = ModelConfig(**{**BASE, **MODELS[name], **changes})
    model = (Decoder if config.causal else Encoder)(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn * 0.12)
            elif key.endswith("norm.weight") and config.norm != "rms_plus_one":
                parameter.copy_(1.0 + drawn * 0.2)
            else:
                parameter.copy_(0.1 + drawn * 0.2)
    return model


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randint(0, 270, (1, count), generator=torch.Generator().manual_seed(1))
