"""RoBERTa (arXiv:1907.11692): BERT, its positions counted from behind the padding's."""

from dataclasses import replace

from llm_from_scratch.model.heads import HeadStyle
from llm_from_scratch.weights.families.bert import BERT, CLASSIFIER, DROPOUT, SEGMENTS, SETTINGS
from llm_from_scratch.weights.families.settings import PositionsBehindPadding, with_defaults
from llm_from_scratch.weights.families.table import ENCODER, HeadTable, Rule, named, rules


def behind(prefix: str) -> tuple[Rule, ...]:
    """BERT's tensors behind another prefix."""
    return tuple(replace(rule, theirs=prefix + rule.theirs[5:]) for rule in BERT.tensors)


LM = {"lm_head.dense": "dense", "lm_head.layer_norm": "norm", "lm_head.decoder": "out"}
# The label's matrix stands on a dense layer here, and not on the pooler.
ON_DENSE = HeadStyle(dense=True, activation="tanh", dropout_first=True)
DENSE = rules("classifier.", "", {"dense": "dense", "out_proj": "out"})

ROBERTA = replace(
    BERT,
    name="roberta",
    title="RoBERTa",
    prefix="roberta.",
    classes=named("Roberta", *ENCODER),
    settings=(
        *with_defaults(SETTINGS, vocab_size=50265),
        SEGMENTS,
        PositionsBehindPadding(),
    ),
    tensors=behind("roberta."),
    heads={
        "classification": HeadTable(ON_DENSE, DENSE, DROPOUT),
        "token_classification": HeadTable(HeadStyle(), CLASSIFIER, DROPOUT),
        "multiple_choice": HeadTable(HeadStyle(pooling="pooler"), CLASSIFIER),
        "masked_lm": HeadTable(
            HeadStyle(dense=True, activation="gelu", norm=True, dropout=0.0),
            rules("", "", LM),
            copies={"lm_head.bias": "lm_head.decoder.bias"},
        ),
    },
    unused={},
    other_heads=("qa_outputs.",),
)
