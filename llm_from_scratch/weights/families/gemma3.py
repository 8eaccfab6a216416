"""Gemma 3 (arXiv:2503.19786), its text models: Gemma 2 with QK-norm for the soft-cap."""

from dataclasses import replace

from llm_from_scratch.weights.families.gemma2 import COMMON, GEMMA2, GEMMA_SETTINGS
from llm_from_scratch.weights.families.qwen3 import QK_NORM
from llm_from_scratch.weights.families.rotary import LayeredRope, Rope
from llm_from_scratch.weights.families.settings import Windows, with_defaults
from llm_from_scratch.weights.families.table import named, rules

GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    title="Gemma 3 (text)",
    classes=named("Gemma3Text", "base", "classification", lm="Gemma3ForCausalLM"),
    constants={**GEMMA2.constants, "qk_norm": "head"},
    settings=(
        *with_defaults(
            tuple(group for group in GEMMA_SETTINGS if not isinstance(group, Rope)),
            vocab_size=262208,
            max_position_embeddings=131072,
        ),
        *COMMON,
        LayeredRope(1_000_000.0, 10_000.0, "rope_theta", "rope_local_base_freq"),
        Windows(default=4096, every=6, old_every=("sliding_window_pattern",)),
    ),
    tensors=(*GEMMA2.tensors, *rules("model.layers.{}.", "blocks.{}.", QK_NORM)),
    required={
        "use_bidirectional_attention": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
    unused={
        **GEMMA2.unused,
        "_sliding_window_pattern": "written by the class, but never read; layer_types says it",
    },
)
