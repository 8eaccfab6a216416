"""Qwen3 (arXiv:2505.09388): Llama with a norm on each head's queries and keys."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import LLAMA, SETTINGS
from llm_from_scratch.weights.families.settings import Heads, Windows, flag, with_defaults
from llm_from_scratch.weights.families.table import DECODER, named, rules

QK_NORM = {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    title="Qwen3 (dense)",
    classes=named("Qwen3", *DECODER),
    constants={"qk_norm": "head"},
    settings=(
        *with_defaults(
            SETTINGS,
            Heads(kv_default=32, dim_default=128),
            vocab_size=151936,
            intermediate_size=22016,
            max_position_embeddings=32768,
        ),
        flag("attention_bias", "attention_bias output_bias", False),
        Windows(default=4096, switch="use_sliding_window", first="max_window_layers"),
    ),
    tensors=(*LLAMA.tensors, *rules("model.layers.{}.", "blocks.{}.", QK_NORM)),
    required={"mlp_bias": False},
    unused={},
)
