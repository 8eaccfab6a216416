"""MPNet (arXiv:2004.09297): RoBERTa with a learned bias for each distance between two tokens."""

from dataclasses import replace

from llm_from_scratch.weights.families.bert import BLOCK, EMBEDDINGS, POST_NORM, SETTINGS
from llm_from_scratch.weights.families.roberta import ROBERTA
from llm_from_scratch.weights.families.settings import PositionsBehindPadding, with_defaults
from llm_from_scratch.weights.families.table import ENCODER, named, rules

ATTENTION = {f"attention.attn.{x}": f"attention.{x}" for x in "qkvo"}
OTHERS = {name: ours for name, ours in BLOCK.items() if not name.startswith("attention.")}

MPNET = replace(
    ROBERTA,
    name="mpnet",
    title="MPNet",
    prefix="mpnet.",
    classes=named("MPNet", *ENCODER),
    # The class has a field for the number of buckets, but computes with 32 whatever it says.
    constants={**POST_NORM, "relative_buckets": 32},
    settings=(*with_defaults(SETTINGS, vocab_size=30527), PositionsBehindPadding(pad=1)),
    tensors=(
        *rules("mpnet.embeddings.", "", EMBEDDINGS),
        *rules("mpnet.encoder.", "", {"relative_attention_bias": "relative_bias"}),
        *rules("mpnet.pooler.", "", {"dense": "pooler"}),
        *rules("mpnet.encoder.layer.{}.", "blocks.{}.", {**ATTENTION, **OTHERS}),
        *rules("mpnet.encoder.layer.{}.", "blocks.{}.", {"attention.LayerNorm": "attention_norm"}),
    ),
    heads={
        **ROBERTA.heads,
        "classification": replace(ROBERTA.heads["classification"], settings=()),
        "token_classification": replace(ROBERTA.heads["token_classification"], settings=()),
    },
    required={"relative_attention_num_buckets": 32},
)
