"""OLMo 2 (arXiv:2501.00656): Llama, its norms behind the branches; QK-norm over all heads."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import BLOCK, LLAMA, SETTINGS
from llm_from_scratch.weights.families.qwen3 import QK_NORM
from llm_from_scratch.weights.families.settings import Heads, flag, with_defaults
from llm_from_scratch.weights.families.table import named, rules

NORMS = {
    "post_attention_layernorm": "attention_norm",
    "post_feedforward_layernorm": "feed_forward_norm",
}
MATRICES = {theirs: ours for theirs, ours in BLOCK.items() if not theirs.endswith("layernorm")}

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    title="OLMo 2",
    classes=named("Olmo2", "lm", "base", "classification"),
    constants={"residual": "branch_end", "qk_norm": "all"},
    settings=(
        *with_defaults(SETTINGS, Heads(dim=None), vocab_size=50304, rms_norm_eps=1e-5),
        flag("attention_bias", "attention_bias output_bias", False),
    ),
    tensors=(
        *LLAMA.tensors[:3],
        *rules("model.layers.{}.", "blocks.{}.", {**NORMS, **MATRICES, **QK_NORM}),
    ),
    required={},
    unused={},
)
