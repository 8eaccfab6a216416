"""Gemma 2 (arXiv:2408.00118): norms on both sides of each branch, windows, soft-capped scores."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import BLOCK, LLAMA, SETTINGS
from llm_from_scratch.weights.families.settings import (
    Heads,
    Windows,
    activation,
    flag,
    maybe,
    size,
    with_defaults,
)  # fmt: skip
from llm_from_scratch.weights.families.table import DECODER, named, rules

GEMMA_SETTINGS = with_defaults(
    tuple(group for group in SETTINGS if "hidden_act" not in group.fields),
    Heads(default=8, kv_default=4, dim_default=256),
    vocab_size=256000,
    hidden_size=2304,
    intermediate_size=9216,
    num_hidden_layers=26,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
COMMON = (
    activation("hidden_activation", "gelu_pytorch_tanh"),
    flag("attention_bias", "attention_bias output_bias", False),
    size("query_pre_attn_scalar", "attention_width", 256),
)
SANDWICH = {
    **BLOCK,
    "post_attention_layernorm": "attention_end_norm",
    "pre_feedforward_layernorm": "feed_forward_norm",
    "post_feedforward_layernorm": "feed_forward_end_norm",
}

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    title="Gemma 2",
    classes=named("Gemma2", *DECODER),
    constants={"norm": "rms_plus_one", "residual": "sandwich", "scale_embedding": True},
    settings=(
        *GEMMA_SETTINGS,
        *COMMON,
        maybe("attn_logit_softcapping", "attention_softcap", 50.0),
        maybe("final_logit_softcapping", "logit_softcap", 30.0),
        Windows(default=4096, every=2),
    ),
    tensors=(*LLAMA.tensors[:3], *rules("model.layers.{}.", "blocks.{}.", SANDWICH)),
    required={"use_bidirectional_attention": False},
    unused={
        "hidden_act": "an older name; hidden_activation is read",
        "sliding_window_size": "an older name; sliding_window is read",
    },
)
