"""Llama 2 and 3 (arXiv:2307.09288, 2407.21783), SmolLM2 and everything built like them."""

from llm_from_scratch.weights.families.rotary import Rope
from llm_from_scratch.weights.families.settings import (
    Heads,
    activation,
    dropout,
    flag,
    number,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import DECODER, Family, named, rules

SETTINGS = (
    size("vocab_size", "vocab_size", 32000),
    size("hidden_size", "d_model", 4096),
    size("intermediate_size", "d_ff", 11008),
    size("num_hidden_layers", "n_layers", 32),
    Heads(divides=True),
    size("max_position_embeddings", "max_seq_len", 2048),
    activation("hidden_act", "silu"),
    number("initializer_range", "init_std", 0.02),
    number("rms_norm_eps", "norm_eps", 1e-6),
    flag("tie_word_embeddings", "tie_embeddings", False),
    Rope(),
    dropout("attention_dropout"),
)
BLOCK = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.q",
    "self_attn.k_proj": "attention.k",
    "self_attn.v_proj": "attention.v",
    "self_attn.o_proj": "attention.o",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
}
TENSORS = (
    *rules("model.", "", {"embed_tokens": "embedding", "norm": "final_norm"}),
    *rules("", "", {"lm_head": "head"}),
    *rules("model.layers.{}.", "blocks.{}.", BLOCK),
)

LLAMA = Family(
    name="llama",
    title="Llama 2, Llama 3, SmolLM2",
    kind="decoder",
    prefix="model.",
    classes=named("Llama", *DECODER),
    settings=(
        *SETTINGS,
        flag("attention_bias", "attention_bias output_bias", False),
        flag("mlp_bias", "feed_forward_bias", False),
    ),
    tensors=TENSORS,
    required={"rope_interleaved": False},
    unused={"pretraining_tp": "how the sums were split in training; same values"},
    surplus=("rotary_emb.inv_freq",),
)
