"""Marian (arXiv:1804.00344): the original Transformer (arXiv:1706.03762) for translation."""

from dataclasses import replace

from llm_from_scratch.weights.families.bart import BART, SETTINGS
from llm_from_scratch.weights.families.pairs import Sharing
from llm_from_scratch.weights.families.settings import (
    Setting,
    flag,
    of,
    size,
    with_defaults,
)  # fmt: skip
from llm_from_scratch.weights.families.table import rules

OTHERS = {name: value for name, value in BART.constants.items() if "embedding" not in name}
OWN = {"encoder.embed_tokens": "encoder.embedding", "decoder.embed_tokens": "decoder.embedding"}

MARIAN = replace(
    BART,
    name="marian",
    title="Marian, the original Transformer",
    classes={"lm": "MarianMTModel"},
    constants={**OTHERS, "position": "sinusoidal", "position_offset": 0},
    pair={"logits_bias": True, "writes_start": False},
    settings=(
        *of("encoder", size("vocab_size", "vocab_size", 58101)),
        *of("decoder", Setting("decoder_vocab_size", "vocab_size", None, like="vocab_size")),
        *with_defaults(SETTINGS, decoder_start_token_id=58100, forced_eos_token_id=0),
        *of("decoder", flag("tie_word_embeddings", "tie_embeddings", True)),
        Sharing(),
    ),
    tensors=(*rules("model.", "", OWN, beside="decoder.embedding"), *BART.tensors),
    required={
        "normalize_before": False,
        "normalize_embedding": False,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
        "static_position_embeddings": True,
    },
    unused={**BART.unused, "extra_pos_embeddings": "for learned positions; there are none"},
    surplus=("coder.embed_positions.weight",),
)
