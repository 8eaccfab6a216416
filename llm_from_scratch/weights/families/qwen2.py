"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import LLAMA, SETTINGS
from llm_from_scratch.weights.families.settings import Heads, Windows, with_defaults
from llm_from_scratch.weights.families.table import DECODER, named

QWEN2_SETTINGS = with_defaults(
    SETTINGS,
    Heads(kv_default=32, dim=None),
    vocab_size=151936,
    intermediate_size=22016,
    max_position_embeddings=32768,
)

QWEN2 = replace(
    LLAMA,
    name="qwen2",
    title="Qwen2, Qwen2.5",
    classes=named("Qwen2", *DECODER),
    constants={"attention_bias": True},
    settings=(
        *QWEN2_SETTINGS,
        Windows(default=4096, switch="use_sliding_window", first="max_window_layers"),
    ),
    required={},
    unused={"use_mrope": "for pictures, which these models do not see"},
)
