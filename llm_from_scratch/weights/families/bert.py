"""BERT (arXiv:1810.04805): an encoder with a norm behind each branch and segment embeddings."""

from llm_from_scratch.model.heads import HeadStyle
from llm_from_scratch.weights.families.gpt2 import LAYER_NORM_AND_BIASES
from llm_from_scratch.weights.families.settings import (
    Heads,
    Other,
    Setting,
    activation,
    dropout,
    flag,
    number,
    size,
)  # fmt: skip
from llm_from_scratch.weights.families.table import ENCODER, Family, HeadTable, Rule, named, rules

POST_NORM = {**LAYER_NORM_AND_BIASES, "residual": "post", "final_norm": False, "causal": False,
             "position": "learned", "embedding_norm": True}  # fmt: skip
SIZES = (
    size("vocab_size", "vocab_size", 30522), size("hidden_size", "d_model", 768),
    size("num_hidden_layers", "n_layers", 12), size("intermediate_size", "d_ff", 3072),
    number("initializer_range", "init_std", 0.02),
    flag("tie_word_embeddings", "tie_embeddings", True),
)  # fmt: skip
SETTINGS = (
    *SIZES, Heads(default=12, kv=None, dim=None, even=False),
    activation("hidden_act", "gelu"), number("layer_norm_eps", "norm_eps", 1e-12),
    dropout("hidden_dropout_prob", 0.1), Other({"attention_probs_dropout_prob": 0.1}),
)  # fmt: skip
SEGMENTS = size("type_vocab_size", "n_segments", 2)
EMBEDDINGS = {"word_embeddings": "embedding", "position_embeddings": "positions",
              "token_type_embeddings": "segments", "LayerNorm": "embedding_norm"}  # fmt: skip
BLOCK = {
    "attention.self.query": "attention.q", "attention.self.key": "attention.k",
    "attention.self.value": "attention.v", "attention.output.dense": "attention.o",
    "attention.output.LayerNorm": "attention_norm", "intermediate.dense": "feed_forward.up",
    "output.dense": "feed_forward.down", "output.LayerNorm": "feed_forward_norm"}  # fmt: skip
CLASSIFIER = rules("", "", {"classifier": "out"})
DROPOUT = (Setting("classifier_dropout", "dropout", None, "maybe_share_of_one"),)
LM = {"transform.dense": "dense", "transform.LayerNorm": "norm", "decoder": "out"}

BERT = Family(
    name="bert", title="BERT, also Japanese", kind="encoder", prefix="bert.",
    classes=named("Bert", *ENCODER), constants=POST_NORM,
    settings=(*SETTINGS, SEGMENTS, size("max_position_embeddings", "max_seq_len", 512)),
    tensors=(*rules("bert.embeddings.", "", EMBEDDINGS), Rule("bert.pooler.dense", ("pooler",)),
             *rules("bert.encoder.layer.{}.", "blocks.{}.", BLOCK)),
    heads={**dict.fromkeys(("classification", "multiple_choice"),
                           HeadTable(HeadStyle(pooling="pooler"), CLASSIFIER, DROPOUT)),
           "token_classification": HeadTable(HeadStyle(), CLASSIFIER, DROPOUT),
           "masked_lm": HeadTable(HeadStyle(dense=True, norm=True, dropout=0.0),
                                  rules("cls.predictions.", "", LM),
                                  copies={"cls.predictions.bias": "cls.predictions.decoder.bias"})},
    required={"position_embedding_type": "absolute"},
    unused={"directionality": "a remark; all tokens see each other whatever it says",
            **dict.fromkeys(map("pooler_{}".format, ("fc_size", "num_attention_heads", "type",
                            "num_fc_layers", "size_per_head")), "for a pooler without a class")},
    surplus=("embeddings.position_ids", "embeddings.token_type_ids"),
    other_heads=("cls.seq_relationship.", "qa_outputs."),
)  # fmt: skip
