"""GPT-NeoX and Pythia (arXiv:2204.06745, 2304.01373): both branches at once, a quarter turned."""

from llm_from_scratch.weights.families.gpt2 import LAYER_NORM_AND_BIASES
from llm_from_scratch.weights.families.rotary import Rope
from llm_from_scratch.weights.families.settings import (
    Choice,
    Heads,
    Other,
    activation,
    dropout,
    flag,
    number,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import DECODER, OLDER_HEADS, Family, named, rules

BIASES = "attention_bias output_bias"
BLOCK = {
    "input_layernorm": "attention_norm",
    "attention.dense": "attention.o",
    "post_attention_layernorm": "feed_forward_norm",
    "mlp.dense_h_to_4h": "feed_forward.up",
    "mlp.dense_4h_to_h": "feed_forward.down",
}

GPT_NEOX = Family(
    name="gpt_neox",
    title="GPT-NeoX, Pythia",
    kind="decoder",
    prefix="gpt_neox.",
    classes=named("GPTNeoX", *DECODER),
    constants={k: v for k, v in LAYER_NORM_AND_BIASES.items() if k not in BIASES.split()},
    settings=(
        size("vocab_size", "vocab_size", 50432),
        size("hidden_size", "d_model", 6144),
        size("num_hidden_layers", "n_layers", 44),
        Heads(default=64, kv=None, dim=None),
        size("intermediate_size", "d_ff", 24576),
        size("max_position_embeddings", "max_seq_len", 2048),
        activation("hidden_act", "gelu"),
        number("layer_norm_eps", "norm_eps", 1e-5),
        number("initializer_range", "init_std", 0.02),
        flag("tie_word_embeddings", "tie_embeddings", False),
        flag("attention_bias", BIASES, True),
        Choice("use_parallel_residual", "residual", True, {True: "parallel", False: "pre"}),
        Rope(share=0.25, old_theta="rotary_emb_base", old_share="rotary_pct"),
        dropout("hidden_dropout"),
        Other({"attention_dropout": 0.0}),
    ),
    tensors=(
        *rules("gpt_neox.", "", {"embed_in": "embedding", "final_layer_norm": "final_norm"}),
        *rules("", "", {"embed_out": "head"}),
        *rules("gpt_neox.layers.{}.", "blocks.{}.", BLOCK),
        *rules("gpt_neox.layers.{}.attention.", "blocks.{}.", {
            "query_key_value": "attention.q attention.k attention.v",
        }, layout="by_head"),
    ),
    heads=OLDER_HEADS,
    surplus=("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
)  # fmt: skip
