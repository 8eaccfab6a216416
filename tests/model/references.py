"""Tiny random decoders of the reference library, nothing in them at a value that hides a mistake.

Every size differs from every other (`test_references.py`), so that a swapped axis cannot fit;
contexts of 40 tokens go past every window and past the original length of every stretched context.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 4.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 900.0, "factor": 3.0, "beta_fast": 4.0, "beta_slow": 0.5,
    "original_max_position_embeddings": 17,
}  # fmt: skip
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SLIDE, FULL = "sliding_attention", "full_attention"
# What every Llama-like class has.
COMMON: dict[str, Any] = {
    **NO_IDS, "vocab_size": 71, "hidden_size": 48, "intermediate_size": 52,
    "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "hidden_act": "silu", "max_position_embeddings": 51, "rms_norm_eps": 3e-4,
    "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
    "attention_dropout": 0.1, "initializer_range": 0.3, "use_cache": True,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    **{k: v for k, v in COMMON.items() if k != "hidden_act"}, "num_hidden_layers": 4,
    "head_dim": 10, "hidden_activation": "gelu_pytorch_tanh", "attention_bias": True,
    "query_pre_attn_scalar": 17, "sliding_window": 8, "tie_word_embeddings": True,
    "layer_types": [SLIDE, FULL, SLIDE, SLIDE], "use_bidirectional_attention": False,
}  # fmt: skip
QWEN_WINDOWS: dict[str, Any] = {
    "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1,
    "layer_types": [FULL, SLIDE, SLIDE],
}  # fmt: skip

# model_type -> (config class, model class, every field of the config).
REFERENCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {
        **NO_IDS, "vocab_size": 67, "n_positions": 48, "n_embd": 36, "n_layer": 3, "n_head": 4,
        "n_inner": 100, "activation_function": "gelu_new", "layer_norm_epsilon": 3e-4,
        "tie_word_embeddings": True, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1,
        "reorder_and_upcast_attn": False, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "initializer_range": 0.3, "use_cache": True, "summary_type": "cls_index",
        "summary_use_proj": True, "summary_activation": None, "summary_proj_to_labels": True,
        "summary_first_dropout": 0.1,
    }),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {
        **NO_IDS, "vocab_size": 67, "hidden_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "intermediate_size": 52, "max_position_embeddings": 51,
        "hidden_act": "gelu", "layer_norm_eps": 3e-4, "initializer_range": 0.3,
        "tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True,
        "hidden_dropout": 0.1, "attention_dropout": 0.1, "classifier_dropout": 0.1,
        "use_cache": True, "is_decoder": False,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5,
        },
    }),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {
        **COMMON, "head_dim": 10, "rope_parameters": LLAMA3_ROPE, "attention_bias": True,
        "mlp_bias": True, "pretraining_tp": 1,
    }),
    "mistral": ("MistralConfig", "MistralForCausalLM", {
        **COMMON, "head_dim": 10, "sliding_window": 8,
    }),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**COMMON, **QWEN_WINDOWS}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {
        **COMMON, **QWEN_WINDOWS, "num_attention_heads": 10, "num_key_value_heads": 5,
        "head_dim": 14, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True,
    }),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        **COMMON, "head_dim": 10, "attention_bias": True, "num_hidden_layers": 4,
        "decoder_sparse_step": 1, "mlp_only_layers": [1], "moe_intermediate_size": 24,
        "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True,
        "router_aux_loss_coef": 0.02, "output_router_logits": False, "use_sliding_window": True,
        "sliding_window": 8,
    }),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {
        **GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0,
    }),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        **GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
            SLIDE: {"rope_type": "default", "rope_theta": 70.0},
        },
    }),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**COMMON, "attention_bias": True}),
}  # fmt: skip

# Other values of the fields, each a model of its own.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu"}),
    ("gpt2", {"activation_function": "gelu", "n_inner": None}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_fast"}),
    ("llama", {"tie_word_embeddings": True, "mlp_bias": False, "attention_bias": False}),
    ("llama", {"num_key_value_heads": None, "head_dim": None, "hidden_act": "gelu"}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.5}}),
    ("llama", {"rope_parameters": YARN}),
    ("mistral", {"sliding_window": None, "head_dim": None}),
    ("qwen2", {"use_sliding_window": False, "layer_types": None, "tie_word_embeddings": True}),
    ("qwen2", {"rope_parameters": YARN}),
    ("qwen3", {"attention_bias": False, "hidden_act": "silu", "num_key_value_heads": 1}),
    ("qwen3", {"tie_word_embeddings": False, "layer_types": [FULL, SLIDE, FULL]}),
    ("qwen3_moe", {"norm_topk_prob": False, "use_sliding_window": False, "mlp_only_layers": []}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 1}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", {"layer_types": None, "attention_bias": False}),
    ("gemma3_text", {"layer_types": None, "num_hidden_layers": 7}),
    ("gemma3_text", {"rope_parameters": None, "attention_bias": False}),
    ("olmo2", {"tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 6}),
]  # fmt: skip


def reference_classes(family: str) -> tuple[Any, Any]:
    """The config class and the model class."""
    config, model, _ = REFERENCES[family]
    return getattr(transformers, config), getattr(transformers, model)


def make_reference(family: str, **changes: Any) -> PreTrainedModel:
    """A reference model whose parameters are all random: norms, biases and routers as well."""
    config_class, model_class = reference_classes(family)
    torch.manual_seed(7)
    config = config_class(**{**REFERENCES[family][2], **changes})
    config._experts_implementation = "eager"
    return randomise(model_class(config))


def randomise(model: PreTrainedModel) -> PreTrainedModel:
    """Draw what the class leaves at zero or one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4 + 0.7)
            elif name.endswith("mlp.gate.weight"):
                parameter.normal_(0.0, 0.5)
    return model.eval()
