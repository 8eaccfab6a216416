"""GPT-2 (Radford et al. 2019): learned positions, layer norms, biases everywhere."""

from llm_from_scratch.weights.families.settings import (
    Heads,
    Other,
    activation,
    dropout,
    flag,
    number,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import DECODER, OLDER_HEADS, Family, named, rules

LAYER_NORM_AND_BIASES = {
    "norm": "layer", "gated": False,
    "attention_bias": True, "output_bias": True, "feed_forward_bias": True,
}  # fmt: skip
BLOCK = {
    "ln_1": "attention_norm", "ln_2": "feed_forward_norm",
    "attn.c_attn": "attention.q attention.k attention.v", "attn.c_proj": "attention.o",
    "mlp.c_fc": "feed_forward.up", "mlp.c_proj": "feed_forward.down",
}  # fmt: skip

GPT2 = Family(
    name="gpt2",
    title="GPT-2",
    kind="decoder",
    prefix="transformer.",
    classes=named("GPT2", *DECODER, lm="GPT2LMHeadModel"),
    constants={**LAYER_NORM_AND_BIASES, "position": "learned"},
    settings=(
        size("vocab_size", "vocab_size", 50257),
        size("n_positions", "max_seq_len", 1024, "max_position_embeddings"),
        size("n_embd", "d_model", 768, "hidden_size"),
        size("n_layer", "n_layers", 12, "num_hidden_layers"),
        Heads("n_embd", "n_head", 12, None, dim=None, even=False, aliases=("num_attention_heads",)),
        size("n_inner", "d_ff", None),
        activation("activation_function", "gelu_new"),
        dropout("resid_pdrop", 0.1),
        Other({"embd_pdrop": 0.1, "attn_pdrop": 0.1}),
        number("layer_norm_epsilon", "norm_eps", 1e-5),
        number("initializer_range", "init_std", 0.02),
        flag("tie_word_embeddings", "tie_embeddings", True),
    ),
    tensors=(
        *rules("transformer.", "", {"wte": "embedding", "wpe": "positions", "ln_f": "final_norm"}),
        *rules("", "", {"lm_head": "head"}),
        *rules("transformer.h.{}.", "blocks.{}.", BLOCK, layout="transposed"),
    ),
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    unused={
        "n_ctx": "an older name of n_positions",
        "reorder_and_upcast_attn": "the same sums in another order and precision",
        **{f"summary_{name}": "belongs to the double-heads model" for name in
           ("type", "use_proj", "activation", "proj_to_labels", "first_dropout")},
    },
    heads=OLDER_HEADS,
    surplus=(".attn.bias", ".attn.masked_bias"),
)  # fmt: skip
