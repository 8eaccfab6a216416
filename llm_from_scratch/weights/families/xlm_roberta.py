"""XLM-RoBERTa (arXiv:1911.02116): RoBERTa for a hundred languages."""

from dataclasses import replace

from llm_from_scratch.weights.families.roberta import ROBERTA
from llm_from_scratch.weights.families.settings import with_defaults
from llm_from_scratch.weights.families.table import ENCODER, named

XLM_ROBERTA = replace(
    ROBERTA,
    name="xlm-roberta",
    title="XLM-RoBERTa",
    classes=named("XLMRoberta", *ENCODER),
    settings=with_defaults(ROBERTA.settings, vocab_size=30522),
)
