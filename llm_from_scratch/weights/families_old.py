"""One table per family: how a Hugging Face folder says what our `Decoder` is.

A family is a model class of the `transformers` library. Its table holds two translations, each
usable in both directions: `config.json` <-> `ModelConfig`, and the names of the stored tensors <->
the names of our parameters. Every field of the class's config is either translated, held to the
one value we can express (`required`), or listed in `unused` with the reason; a test compares the
tables with the classes themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.presets import FAMILIES as ARCHITECTURES
from llm_from_scratch.weights.config_json import (
    Fields,
    read_gpt2,
    read_llama,
    read_qwen3,
    write_gpt2,
    write_llama,
    write_qwen3,
)

# Fields of every config class that do not change what a decoder computes.
UNUSED_EVERYWHERE = {
    "_name_or_path": "where the folder came from",
    "architectures": "heads other than the language model's are read from the tensors",
    "bos_token_id": "belongs to the tokenizer",
    "chunk_size_feed_forward": "trades memory for time, not values",
    "dtype": "the tensors say their type themselves",
    "eos_token_id": "belongs to the tokenizer and generation_config.json",
    "id2label": "belongs to classification heads",
    "label2id": "belongs to classification heads",
    "model_type": "chooses the table",
    "output_attentions": "changes what is returned, not what is computed",
    "output_hidden_states": "changes what is returned, not what is computed",
    "pad_token_id": "belongs to the tokenizer",
    "problem_type": "belongs to classification heads",
    "return_dict": "changes what is returned, not what is computed",
    "transformers_version": "who wrote the file",
    "use_cache": "caching is the caller's decision",
}
# Fields with one value that we can express; any other would change what the model computes.
REQUIRED_EVERYWHERE = {
    "is_encoder_decoder": False,
    "quantization_config": None,
    "add_cross_attention": False,
    "partial_rotary_factor": 1.0,
}


@dataclass(frozen=True)
class Entry:
    """One stored tensor: our parameters stacked along their outputs, transposed where it says."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Family:
    """What one model class calls things. `defaults` are the class's own, for fields left out."""

    name: str
    architecture: str
    prefix: str
    defaults: dict[str, Any]
    required: dict[str, Any]
    unused: dict[str, str]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    whole: tuple[tuple[str, str], ...]  # (their module, ours) outside the blocks
    block: tuple[tuple[str, tuple[str, ...]], ...]  # the same inside one block
    block_prefix: str
    transposed: bool  # the block's matrices are stored as (inputs, outputs)
    surplus: tuple[str, ...]  # endings of stored tensors that are not weights

    def entries(self, config: ModelConfig, parameters: Collection[str]) -> Iterator[Entry]:
        """Every stored tensor, given the names of our parameters (biases exist or do not)."""
        for theirs, ours in self.whole:
            if theirs == "lm_head" and config.tie_embeddings:
                continue
            for kind in ("weight", "bias"):
                if f"{ours}.{kind}" in parameters:
                    yield Entry(f"{theirs}.{kind}", (f"{ours}.{kind}",))
        for index in range(config.n_layers):
            for theirs, names in self.block:
                for kind in ("weight", "bias"):
                    mine = tuple(f"blocks.{index}.{name}.{kind}" for name in names)
                    if mine[0] in parameters:
                        matrix = kind == "weight" and not theirs.startswith("ln_")
                        yield Entry(
                            f"{self.block_prefix}{index}.{theirs}.{kind}",
                            mine,
                            self.transposed and matrix,
                        )


_LLAMA_WHOLE = (
    ("model.embed_tokens", "embedding"),
    ("model.norm", "final_norm"),
    ("lm_head", "head"),
)
_LLAMA_BLOCK = (
    ("input_layernorm", ("attention_norm",)),
    ("self_attn.q_proj", ("attention.q",)),
    ("self_attn.k_proj", ("attention.k",)),
    ("self_attn.v_proj", ("attention.v",)),
    ("self_attn.o_proj", ("attention.o",)),
    ("self_attn.q_norm", ("attention.q_norm",)),
    ("self_attn.k_norm", ("attention.k_norm",)),
    ("post_attention_layernorm", ("feed_forward_norm",)),
    ("mlp.gate_proj", ("feed_forward.gate",)),
    ("mlp.up_proj", ("feed_forward.up",)),
    ("mlp.down_proj", ("feed_forward.down",)),
)
_LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "head_dim": None,
}

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    defaults=_LLAMA_DEFAULTS,
    required={"rope_interleaved": False},
    unused={"pretraining_tp": "how the sums were split in training; same values"},
    read=read_llama,
    write=write_llama,
    whole=_LLAMA_WHOLE,
    block=_LLAMA_BLOCK,
    block_prefix="model.layers.",
    transposed=False,
    surplus=("rotary_emb.inv_freq",),
)

QWEN3 = replace(
    LLAMA,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        **_LLAMA_DEFAULTS,
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "layer_types": None,
    },
    # The class has no such field and builds its feed-forward without biases.
    required={"mlp_bias": False},
    unused={},
    read=read_qwen3,
    write=write_qwen3,
)

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    defaults={
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    required={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False},
    unused={
        "reorder_and_upcast_attn": "the same sums in another order and precision",
        "summary_type": "belongs to the double-heads model",
        "summary_use_proj": "belongs to the double-heads model",
        "summary_activation": "belongs to the double-heads model",
        "summary_proj_to_labels": "belongs to the double-heads model",
        "summary_first_dropout": "belongs to the double-heads model",
    },
    read=read_gpt2,
    write=write_gpt2,
    whole=(
        ("transformer.wte", "embedding"),
        ("transformer.wpe", "positions"),
        ("transformer.ln_f", "final_norm"),
        ("lm_head", "head"),
    ),
    block=(
        ("ln_1", ("attention_norm",)),
        ("attn.c_attn", ("attention.q", "attention.k", "attention.v")),
        ("attn.c_proj", ("attention.o",)),
        ("ln_2", ("feed_forward_norm",)),
        ("mlp.c_fc", ("feed_forward.up",)),
        ("mlp.c_proj", ("feed_forward.down",)),
    ),
    block_prefix="transformer.h.",
    transposed=True,
    surplus=(".attn.bias", ".attn.masked_bias"),
)

FAMILIES = {family.name: family for family in (GPT2, LLAMA, QWEN3)}


def family_named(model_type: object, where: str) -> Family:
    """The table of a config.json's `model_type`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UserError(
            f"{where}: 'model_type' is {model_type!r}; supported are {', '.join(FAMILIES)}."
            + nearest(str(model_type), FAMILIES)
        )
    return FAMILIES[model_type]


def read_config(values: Mapping[str, Any], where: str) -> tuple[Family, ModelConfig]:
    """The family and architecture that a config.json's content means.

    `where` names the file in errors. A value that we cannot express is refused by its field name.
    """
    family = family_named(values.get("model_type"), where)
    fields = Fields(values, family.defaults, where)
    for name, must in {**REQUIRED_EVERYWHERE, **family.required}.items():
        # null is what a field that was never set looks like.
        if fields.values.get(name, must) not in (must, None):
            remedy = f"{must!r}; other values are not supported for {family.name}"
            if name == "quantization_config":
                remedy = "left out: quantised folders cannot be read, take the original or a GGUF"
            raise fields.refuse(name, remedy)
    return family, family.read(fields)


def family_of(config: ModelConfig) -> Family:
    """The class that can express `config`; a `UserError` when none can."""
    for name, family in FAMILIES.items():
        marks: dict[str, Any] = {
            "norm": "rms",
            "position": "rope",
            "gated": True,
            "qk_norm": False,
            **ARCHITECTURES[name],
        }
        for free in ("norm_eps", "activation", "rope_theta"):
            marks.pop(free, None)
        if name == "qwen3":
            marks["feed_forward_bias"] = False
        if name == "gpt2":
            marks["n_kv_heads"] = config.n_heads
            marks["head_dim"] = config.d_model / config.n_heads
        if name == "llama" and config.d_model % config.n_heads:
            continue  # the class refuses such a width even where head_dim is given
        if all(getattr(config, key) == value for key, value in marks.items()):
            return family
    raise UserError(
        "No Hugging Face class can express this combination of norm, positions, heads and "
        f"feed-forward; use one of the families {', '.join(FAMILIES)} without changing these."
    )
