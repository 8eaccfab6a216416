"""DistilBERT (arXiv:1910.01108): BERT with half the blocks, no segment embeddings, no pooler."""

from dataclasses import replace

from llm_from_scratch.model.heads import HeadStyle
from llm_from_scratch.weights.families.bert import BERT, CLASSIFIER, EMBEDDINGS, POST_NORM
from llm_from_scratch.weights.families.settings import (
    Heads,
    Other,
    activation,
    dropout,
    flag,
    number,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import ENCODER, HeadTable, named, rules

BLOCK = {
    "attention.q_lin": "attention.q", "attention.k_lin": "attention.k",
    "attention.v_lin": "attention.v", "attention.out_lin": "attention.o",
    "sa_layer_norm": "attention_norm", "ffn.lin1": "feed_forward.up",
    "ffn.lin2": "feed_forward.down", "output_layer_norm": "feed_forward_norm",
}  # fmt: skip
LM = {"transform": "dense", "layer_norm": "norm", "projector": "out"}
ON_DENSE = HeadTable(
    HeadStyle(dense=True, activation="relu"),
    rules("", "", {"pre_classifier": "dense", "classifier": "out"}),
    (dropout("seq_classif_dropout", 0.2),),
)

DISTILBERT = replace(
    BERT,
    name="distilbert", title="DistilBERT", prefix="distilbert.",
    classes=named("DistilBert", *ENCODER),
    constants={**POST_NORM, "norm_eps": 1e-12},
    settings=(
        size("vocab_size", "vocab_size", 30522),
        size("dim", "d_model", 768, "hidden_size"),
        size("n_layers", "n_layers", 6, "num_hidden_layers"),
        Heads("dim", "n_heads", 12, None, dim=None, even=False, aliases=("num_attention_heads",)),
        size("hidden_dim", "d_ff", 4 * 768),
        size("max_position_embeddings", "max_seq_len", 512),
        activation("activation", "gelu"),
        dropout("dropout", 0.1),
        Other({"attention_dropout": 0.1}),
        number("initializer_range", "init_std", 0.02),
        flag("tie_word_embeddings", "tie_embeddings", True),
    ),
    tensors=(*rules("distilbert.embeddings.", "", EMBEDDINGS),
             *rules("distilbert.transformer.layer.{}.", "blocks.{}.", BLOCK)),
    heads={**dict.fromkeys(("classification", "multiple_choice"), ON_DENSE),
           "token_classification": HeadTable(HeadStyle(), CLASSIFIER),
           "masked_lm": HeadTable(HeadStyle(dense=True, norm=True, dropout=0.0),
                                  rules("vocab_", "", LM))},
    required={},
    unused={"qa_dropout": "acts in the training of heads that we do not have",
            "sinusoidal_pos_embds": "how fresh positions are drawn; they are stored either way",
            "tie_weights_": "an older name of tie_word_embeddings, always true"},
    other_heads=("qa_outputs.",),
)  # fmt: skip
