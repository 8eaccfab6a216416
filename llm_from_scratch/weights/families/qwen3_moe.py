"""Qwen3's mixtures of experts: Qwen3 with experts in the place of (most) feed-forwards."""

from dataclasses import replace

from llm_from_scratch.weights.families.llama import SETTINGS
from llm_from_scratch.weights.families.qwen3 import QWEN3
from llm_from_scratch.weights.families.settings import (
    Heads,
    Mixture,
    Windows,
    flag,
    with_defaults,
)  # fmt: skip
from llm_from_scratch.weights.families.table import DECODER, named, rules

EXPERTS = {
    "mlp.experts.{e}.gate_proj.weight": "feed_forward.gate",
    "mlp.experts.{e}.up_proj.weight": "feed_forward.up",
    "mlp.experts.{e}.down_proj.weight": "feed_forward.down",
}

QWEN3_MOE = replace(
    QWEN3,
    name="qwen3_moe",
    title="Qwen3 (mixture of experts)",
    classes=named("Qwen3Moe", *DECODER),
    settings=(
        *with_defaults(
            SETTINGS,
            Heads(kv_default=4),
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            max_position_embeddings=32768,
        ),
        flag("attention_bias", "attention_bias output_bias", False),
        Windows(default=4096, types=False, switch="use_sliding_window"),
        Mixture(),
    ),
    tensors=(
        *QWEN3.tensors,
        *rules("model.layers.{}.", "blocks.{}.", {"mlp.gate": "feed_forward.router"}),
        *rules("model.layers.{}.", "blocks.{}.", EXPERTS, exact=True),
    ),
    required={"mlp_bias": False},
    unused={
        "max_window_layers": "the class gives the window to all layers or to none",
        "output_router_logits": "whether training adds the balance loss, whose weight is read",
    },
)
