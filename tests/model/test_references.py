"""The reference models themselves: no two of their sizes are equal, or a swapped axis would fit."""

from __future__ import annotations

from collections import Counter

import pytest
import transformers

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.weights.families import read_config
from tests.model.references import REFERENCES
from tests.model.references_encoders import ENCODERS
from tests.model.references_seq2seq import SEQ2SEQ

# The classes whose heads share d_model among them: their query matrices are square.
SHARED_OUT = {
    "gpt2", "gpt_neox", "qwen2", "olmo2", *ENCODERS, "bart", "marian",
}  # fmt: skip


def config_of(family: str) -> ModelConfig | EncoderDecoderConfig:
    """What the reference's config says of the tiny model."""
    classes = {
        name: (config, values) for name, (config, _, values) in {**REFERENCES, **SEQ2SEQ}.items()
    }
    classes |= {name: (f"{stem}Config", values) for name, (stem, values) in ENCODERS.items()}
    name, values = classes[family]
    return read_config(getattr(transformers, name)(**values).to_dict(), "config.json")[1]


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The lengths of all axes that a tensor in the model can have."""
    sizes = {
        "vocab_size": config.vocab_size, "d_model": config.d_model, "d_ff": config.d_ff,
        "n_layers": config.n_layers, "n_heads": config.n_heads, "head_dim": config.head_dim,
    }  # fmt: skip
    if config.family not in SHARED_OUT:
        sizes["all heads"] = config.n_heads * config.head_dim
    if config.n_kv_heads != config.n_heads:
        sizes |= {
            "n_kv_heads": config.n_kv_heads, "all kv heads": config.n_kv_heads * config.head_dim
        }  # fmt: skip
    if config.position in ("rope", "learned", "sinusoidal"):
        sizes["positions"] = config.max_seq_len + config.position_offset
    if config.rope_share < 1:
        sizes["rope_dim"] = config.rope_dim
    if config.relative_buckets:
        sizes["relative_buckets"] = config.relative_buckets
    if config.n_segments > 1:
        sizes["n_segments"] = config.n_segments
    if config.experts is not None:
        experts = config.experts
        sizes |= {
            "n_experts": experts.n_experts, "n_active": experts.n_active,
            "experts' d_ff": experts.d_ff,
        }  # fmt: skip
    return sizes


@pytest.mark.parametrize("family", [*REFERENCES, *ENCODERS, *SEQ2SEQ])
def test_no_two_sizes_are_equal(family: str) -> None:
    config = config_of(family)
    stacks = [config]
    if isinstance(config, EncoderDecoderConfig):
        stacks = [config.encoder, config.decoder]
        for size in ("n_layers", "d_ff", "n_heads", "head_dim"):  # unless the class has but one
            one = family in ("t5", "mt5") and size != "n_layers"
            assert (getattr(stacks[0], size) == getattr(stacks[1], size)) == one, size
    for stack in stacks:
        assert isinstance(stack, ModelConfig)
        sizes = sizes_of(stack)
        twice = [size for size, count in Counter(sizes.values()).items() if count > 1]
        assert not {name: size for name, size in sizes.items() if size in twice}
        square = stack.n_heads * stack.head_dim == stack.d_model
        assert square == (family in SHARED_OUT)
