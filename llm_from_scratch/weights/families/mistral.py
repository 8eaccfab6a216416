"""Mistral (arXiv:2310.06825): Llama without biases, with a sliding window in every layer."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import LLAMA, SETTINGS
from llm_from_scratch.weights.families.settings import Heads, Windows, with_defaults
from llm_from_scratch.weights.families.table import DECODER, named

MISTRAL = replace(
    LLAMA,
    name="mistral",
    title="Mistral",
    classes=named("Mistral", *DECODER),
    settings=(
        *with_defaults(
            SETTINGS, Heads(kv_default=8), intermediate_size=14336, max_position_embeddings=131072
        ),
        Windows(default=4096, types=False),
    ),
    required={},
    unused={},
)
