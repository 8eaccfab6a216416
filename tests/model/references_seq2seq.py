"""Tiny random encoder-decoders of the reference library; see `references.py`.

Encoder and decoder differ in everything in which they may: layers, heads, widths, vocabularies.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.model.references import NO_IDS, randomise

T5: dict[str, Any] = {
    **NO_IDS, "vocab_size": 71, "d_model": 36, "d_kv": 10, "d_ff": 52, "num_layers": 3,
    "num_decoder_layers": 2, "num_heads": 6, "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20, "dropout_rate": 0.1, "layer_norm_epsilon": 3e-4,
    "initializer_factor": 3.0, "feed_forward_proj": "relu", "is_encoder_decoder": True,
    "use_cache": True, "classifier_dropout": 0.1, "is_decoder": False, "decoder_start_token_id": 4,
}  # fmt: skip
BART: dict[str, Any] = {
    **NO_IDS, "vocab_size": 71, "max_position_embeddings": 48, "encoder_layers": 3,
    "encoder_ffn_dim": 52, "encoder_attention_heads": 5, "decoder_layers": 2,
    "decoder_ffn_dim": 44, "decoder_attention_heads": 4, "encoder_layerdrop": 0.1,
    "decoder_layerdrop": 0.1, "activation_function": "gelu", "d_model": 40, "dropout": 0.1,
    "attention_dropout": 0.1, "activation_dropout": 0.1, "init_std": 0.3, "scale_embedding": True,
    "use_cache": True, "is_encoder_decoder": True, "decoder_start_token_id": 4,
    "forced_eos_token_id": 5, "is_decoder": False, "tie_word_embeddings": True,
}  # fmt: skip

# model_type -> (config class, model class, every field of the config).
SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", {
        **T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": True,
    }),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**BART, "classifier_dropout": 0.1}),
    "marian": ("MarianConfig", "MarianMTModel", {
        **BART, "activation_function": "swish", "share_encoder_decoder_embeddings": False,
        "decoder_vocab_size": 67,
    }),
}  # fmt: skip

# Other values of the fields, each a model of its own.
SEQ2SEQ_VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ("t5", {"feed_forward_proj": "gated-silu", "num_decoder_layers": None}),
    ("mt5", {"feed_forward_proj": "relu"}),
    ("bart", {"scale_embedding": False, "activation_function": "gelu_new"}),
    ("marian", {"share_encoder_decoder_embeddings": True, "decoder_vocab_size": None}),
    ("marian", {"tie_word_embeddings": False, "scale_embedding": False}),
    ("marian", {"activation_function": "relu", "d_model": 60}),
]


def seq2seq_classes(family: str) -> tuple[Any, Any]:
    """The config class and the model class."""
    config, model, _ = SEQ2SEQ[family]
    return getattr(transformers, config), getattr(transformers, model)


def make_seq2seq(family: str, **changes: Any) -> PreTrainedModel:
    """A reference model whose parameters are all random, the logits' bias included."""
    config_class, model_class = seq2seq_classes(family)
    torch.manual_seed(7)
    model = randomise(model_class(config_class(**{**SEQ2SEQ[family][2], **changes})))
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.normal_()
    return model
