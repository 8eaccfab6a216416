"""BART (arXiv:1910.13461): the first Transformer with learned positions and a norm behind them."""

from llm_from_scratch.weights.families.gpt2 import LAYER_NORM_AND_BIASES
from llm_from_scratch.weights.families.settings import (
    Heads,
    Other,
    Setting,
    activation,
    dropout,
    flag,
    number,
    of,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import Family, Rule, named, pair_heads, rules

SETTINGS = (
    size("d_model", "d_model", 1024, "hidden_size"),
    *of("encoder", size("encoder_layers", "n_layers", 12, "num_hidden_layers"),
        size("encoder_ffn_dim", "d_ff", 4096),
        Heads("d_model", "encoder_attention_heads", 16, None, dim=None, even=False,
              aliases=("num_attention_heads",))),
    *of("decoder", size("decoder_layers", "n_layers", 12), size("decoder_ffn_dim", "d_ff", 4096),
        Heads("d_model", "decoder_attention_heads", 16, None, dim=None, even=False)),
    size("max_position_embeddings", "max_seq_len", 1024),
    activation("activation_function", "gelu"),
    dropout("dropout", 0.1), Other({"attention_dropout": 0.0}),
    number("init_std", "init_std", 0.02), flag("scale_embedding", "scale_embedding", False),
    *of("pair", Setting("decoder_start_token_id", "start_id", 2, "token_id"),
        Setting("forced_bos_token_id", "first_id", None, "maybe_token_id"),
        Setting("forced_eos_token_id", "end_id", 2, "maybe_token_id")),
)  # fmt: skip
BLOCK = {
    **{f"{theirs}.{part}_proj": f"{ours}.{part[0]}" for part in ("q", "k", "v", "out")
       for theirs, ours in (("self_attn", "attention"), ("encoder_attn", "cross"))},
    "self_attn_layer_norm": "attention_norm", "encoder_attn_layer_norm": "cross_norm",
    "fc1": "feed_forward.up", "fc2": "feed_forward.down", "final_layer_norm": "feed_forward_norm",
}  # fmt: skip
SIDES = ("encoder", "decoder")
STACK = {f"layers.{{}}.{theirs}": f"blocks.{{}}.{ours}" for theirs, ours in BLOCK.items()}
STACK |= {"embed_positions": "positions", "layernorm_embedding": "embedding_norm"}

BART = Family(
    name="bart", title="BART", kind="encoder-decoder", prefix="model.", heads=pair_heads(),
    classes=named("Bart", "base", "classification", lm="BartForConditionalGeneration"),
    constants={**LAYER_NORM_AND_BIASES, "residual": "post", "final_norm": False,
               "position": "learned", "position_offset": 2, "embedding_norm": True},
    pair={"logits_bias": True},
    settings=(size("vocab_size", "vocab_size", 50265), *SETTINGS),
    tensors=(*rules("", "", {"model.shared": "encoder.embedding", "lm_head": "decoder.head"}),
             *rules("model.encoder.", "encoder.", STACK),
             *rules("model.decoder.", "decoder.", STACK),
             Rule("final_logits_bias", ("logits_bias",), "row", exact=True, optional=True)),
    required={"tie_word_embeddings": True, "normalize_before": False, "extra_pos_embeddings": 2,
              "normalize_embedding": True, "add_bias_logits": False,
              "add_final_layer_norm": False, "static_position_embeddings": False},
    unused=dict.fromkeys(("encoder_layerdrop", "decoder_layerdrop", "activation_dropout"),
                         "acts in training only; here there is none"),
    copies={f"model.{side}.embed_tokens.weight": "model.shared.weight" for side in SIDES},
)  # fmt: skip
