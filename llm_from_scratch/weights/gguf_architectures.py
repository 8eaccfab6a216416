"""What llama.cpp calls things: one table per architecture of a GGUF file, for reading and writing.

An architecture corresponds to a family of `families/`; its table says the metadata keys that mean
fields of our config and the names of the tensors. A model can be written as an architecture that
reads back as what was written; llama.cpp has no keys for the rest, so the rest is refused.

Conventions of llama.cpp's converters: of `llama` the rows of Q and K are interleaved (layout
"turned"); Gemma's norms are stored with the one added that our `rms_plus_one` adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from llm_from_scratch.core.errors import UserError, shown
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.weights.families.gpt2 import LAYER_NORM_AND_BIASES
from llm_from_scratch.weights.families.settings import Choice, Group, maybe, number, size
from llm_from_scratch.weights.families.table import Entry, Rule, rules
from llm_from_scratch.weights.gguf_settings import (
    UNUSED,
    ExpertKeys,
    HeadKeys,
    Keys,
    RopeKeys,
    Rows,
    ScoreWidth,
    Stored,
    WindowKeys,
    not_in_use,
    shortest,
)


@dataclass(frozen=True)
class Architecture:
    """What one architecture calls things.

    `constants` are the fields of `ModelConfig` that all its models share. `stored_head`: llama.cpp
    wants the head stored even where it is the embedding.
    """

    name: str
    family: str
    constants: dict[str, Any]
    settings: tuple[Group, ...]
    tensors: tuple[Rule, ...]
    stored_head: bool = False
    required: Mapping[str, Any] = field(default_factory=lambda: {"attention.causal": True})

    def read(self, keys: Keys) -> ModelConfig:
        """The config that the metadata describes; `UserError` names the key that does not fit."""
        known = {key: value for group in self.settings for key, value in group.fields.items()}
        for name, default in known.items():
            if keys.values.get(name) is None:
                keys.values[name] = default
        for name, value in keys.values.items():
            if name in self.required and value != self.required[name]:
                raise keys.refuse(name, f"{self.required[name]}; other values are not supported")
            listed = {*known, *UNUSED, *self.required}
            if not name.startswith(".") and name not in listed and not not_in_use(value):
                raise keys.refuse(name, "left out; this setting is not supported")
        found: dict[str, Any] = {}
        for group in self.settings:
            found |= group.read(keys, found)
        try:
            return ModelConfig(**{"family": self.family, **self.constants, **found})
        except UserError as error:  # values that are sound alone, but not together
            raise UserError(f"{keys.where}: {error}") from error

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The inverse of `read`: keys without the architecture's name, and facts."""
        values: dict[str, Any] = {}
        for group in self.settings:
            values |= group.write(config)
        return values

    def entries(self, config: ModelConfig, parameters: Mapping[str, Any]) -> Iterator[Entry]:
        """Every stored tensor of a model with these parameters."""
        for rule in self.tensors:
            yield from rule.entries(parameters, config.n_layers, 0)


WHOLE = rules("", "", {
    "token_embd": "embedding", "output_norm": "final_norm", "output": "head",
})  # fmt: skip
QKV = {"attn_q": "attention.q", "attn_k": "attention.k", "attn_v": "attention.v"}
OUTPUT = {"attn_output": "attention.o"}
BRANCHES = {**OUTPUT, "ffn_up": "feed_forward.up", "ffn_down": "feed_forward.down"}
GATE = {"ffn_gate": "feed_forward.gate"}
PRE_NORMS = {"attn_norm": "attention_norm", "ffn_norm": "feed_forward_norm"}
QK_NORMS = {"attn_q_norm": "attention.q_norm", "attn_k_norm": "attention.k_norm"}
FUSED = {"attn_qkv": "attention.q attention.k attention.v"}


def block(*modules: dict[str, str], layout: str = "plain", exact: bool = False) -> tuple[Rule, ...]:
    """Rules for the modules of one block: their name -> ours."""
    every = {theirs: ours for part in modules for theirs, ours in part.items()}
    return rules("blk.{}.", "blocks.{}.", every, layout, exact)


SIZES = (
    Rows(".token_embd", "vocab_size"),
    size("block_count", "n_layers", None),
    size("embedding_length", "d_model", None),
    size("feed_forward_length", "d_ff", None),
    size("context_length", "max_seq_len", None),
)
RMS_EPS = number("attention.layer_norm_rms_epsilon", "norm_eps", None)
LAYER_EPS = number("attention.layer_norm_epsilon", "norm_eps", None)
TIED = Stored(".output", "tie_embeddings", there=False)
QKV_BIAS = Stored(".attn_q.bias", "attention_bias")

LLAMA = Architecture(
    name="llama",
    family="llama",
    constants={},
    settings=(
        *SIZES, HeadKeys(), RMS_EPS, RopeKeys(factors=True), TIED, QKV_BIAS,
        Stored(".attn_output.bias", "output_bias"),
        Stored(".ffn_up.bias", "feed_forward_bias"),
    ),
    tensors=(
        *WHOLE, *block({"attn_q": "attention.q", "attn_k": "attention.k"}, layout="turned"),
        *block({"attn_v": "attention.v"}, BRANCHES, GATE, PRE_NORMS),
    ),
)  # fmt: skip

QWEN2 = Architecture(
    name="qwen2",
    family="qwen2",
    constants={},
    settings=(*SIZES, HeadKeys(wide=False), RMS_EPS, RopeKeys(), TIED, QKV_BIAS),
    tensors=(*WHOLE, *block(QKV, BRANCHES, GATE, PRE_NORMS)),
)

QWEN3 = Architecture(
    name="qwen3",
    family="qwen3",
    constants={"qk_norm": "head"},
    settings=(*SIZES, HeadKeys(), RMS_EPS, RopeKeys(), TIED, QKV_BIAS),
    tensors=(*WHOLE, *block(QKV, BRANCHES, GATE, PRE_NORMS, QK_NORMS)),
)

QWEN3_MOE = Architecture(
    name="qwen3moe",
    family="qwen3_moe",
    constants={"qk_norm": "head"},
    settings=(*QWEN3.settings, ExpertKeys()),
    tensors=(
        *WHOLE,
        *block(QKV, OUTPUT, PRE_NORMS, QK_NORMS),
        *block({"ffn_gate_inp": "feed_forward.router"}),
        *block({
            "ffn_gate_exps.weight": "feed_forward.gate", "ffn_up_exps.weight": "feed_forward.up",
            "ffn_down_exps.weight": "feed_forward.down",
        }, exact=True),
    ),
)  # fmt: skip

GEMMA2 = Architecture(
    name="gemma2",
    family="gemma2",
    constants={
        "norm": "rms_plus_one", "residual": "sandwich", "scale_embedding": True,
        "activation": "gelu_tanh",
    },
    settings=(
        *SIZES, HeadKeys(), RMS_EPS, RopeKeys(), QKV_BIAS, ScoreWidth(large=46),
        maybe("attn_logit_softcapping", "attention_softcap", 50.0),
        maybe("final_logit_softcapping", "logit_softcap", 30.0),
        WindowKeys(every=2, default=4096),
    ),
    tensors=(
        *WHOLE[:2],
        *block(QKV, BRANCHES, GATE, PRE_NORMS, {
            "post_attention_norm": "attention_end_norm", "post_ffw_norm": "feed_forward_end_norm",
        }),
    ),
)  # fmt: skip

GEMMA3 = Architecture(
    name="gemma3",
    family="gemma3_text",
    constants={**GEMMA2.constants, "qk_norm": "head"},
    settings=(
        *SIZES, HeadKeys(), RMS_EPS, RopeKeys(local=True), TIED, QKV_BIAS, ScoreWidth(large=62),
        maybe("final_logit_softcapping", "logit_softcap", None),
        WindowKeys(every=6),
    ),
    tensors=(*GEMMA2.tensors, *WHOLE[2:], *block(QK_NORMS)),
)  # fmt: skip

GPT2 = Architecture(
    name="gpt2",
    family="gpt2",
    constants={**LAYER_NORM_AND_BIASES, "position": "learned", "activation": "gelu_tanh"},
    settings=(*SIZES, HeadKeys(wide=False, turned=False), LAYER_EPS, TIED),
    tensors=(
        *WHOLE, *rules("", "", {"position_embd": "positions"}), *block(FUSED, BRANCHES, PRE_NORMS),
    ),
)  # fmt: skip

GPT_NEOX = Architecture(
    name="gptneox",
    family="gpt_neox",
    constants={**LAYER_NORM_AND_BIASES, "activation": "gelu"},
    settings=(
        *SIZES, HeadKeys(wide=False, partial=True), LAYER_EPS, RopeKeys(), TIED,
        Choice("use_parallel_residual", "residual", True, {True: "parallel", False: "pre"}),
    ),
    tensors=(*WHOLE, *block(FUSED, BRANCHES, PRE_NORMS)),
    stored_head=True,
)  # fmt: skip

OLMO2 = Architecture(
    name="olmo2",
    family="olmo2",
    constants={"residual": "branch_end", "qk_norm": "all"},
    settings=(
        *SIZES, HeadKeys(wide=False), RMS_EPS, RopeKeys(), TIED, QKV_BIAS, WindowKeys(every=4),
    ),
    tensors=(
        *WHOLE, *block(QKV, BRANCHES, GATE, QK_NORMS, {
            "post_attention_norm": "attention_norm", "post_ffw_norm": "feed_forward_norm",
        }),
    ),
    stored_head=True,
)  # fmt: skip

BERT = Architecture(
    name="bert",
    family="bert",
    constants={
        **LAYER_NORM_AND_BIASES, "position": "learned", "activation": "gelu", "residual": "post",
        "embedding_norm": True, "final_norm": False,
    },
    settings=(
        *SIZES, HeadKeys(wide=False, turned=False), LAYER_EPS, Rows(".token_types", "n_segments"),
        Choice("attention.causal", "causal", True, {False: False}),
    ),
    tensors=(
        *rules("", "", {
            "token_embd": "embedding", "position_embd": "positions", "token_types": "segments",
            "token_embd_norm": "embedding_norm",
        }),
        *block(QKV, BRANCHES, {
            "attn_output_norm": "attention_norm", "layer_output_norm": "feed_forward_norm",
        }),
    ),
    required={},
)  # fmt: skip

ARCHITECTURES = {
    table.name: table
    for table in (
        LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, GPT2, GPT_NEOX, OLMO2, BERT,
    )
}  # fmt: skip


def architecture_named(name: object, where: object) -> Architecture:
    """The table of a file's `general.architecture`."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{where}: 'general.architecture' is {shown(name)}; GGUF files of the architectures "
            f"{', '.join(ARCHITECTURES)} can be read. Take the model as a Hugging Face folder "
            "instead."
        )
    return ARCHITECTURES[name]


def architecture_of(config: ModelConfig) -> tuple[Architecture, dict[str, Any]]:
    """The architecture that can express `config`, and its keys; a `UserError` when none can.

    It expresses what it reads back as it was, but for what does not concern the model's answers
    (dropout, how it was initialised, BERT's pooler).
    """
    tables = sorted(ARCHITECTURES.values(), key=lambda table: table.family != config.family)
    wanted = _plain(config)
    for table in tables:
        try:
            values = table.write(config)
            back = table.read(Keys(values, table.name, "GGUF"))
        except (UserError, TypeError):
            continue
        if _plain(back) == wanted:
            return table, values
    raise UserError(
        f"None of the GGUF architectures {', '.join(ARCHITECTURES)} can express this model "
        f"({config.family}: {_reason(config)}); save it as a Hugging Face folder instead."
    )


def _plain(config: ModelConfig) -> ModelConfig:
    """`config` with one spelling for what computes the same, and without what a GGUF leaves out."""
    experts, layers = config.experts, config.window_layers
    rope = config.position == "rope"
    if config.local_rope_theta is None and (config.window or 0) >= config.max_seq_len:
        layers = ()  # a window as wide as the context is none
    plain = replace(
        config,
        family="",
        dropout=0.0,
        init_std=1.0,
        pooler=False,
        position_offset=0,
        window=config.window if layers else None,
        window_layers=layers,
        rope_theta=config.rope_theta if rope else 1.0,
        local_rope_theta=config.local_rope_theta if layers else None,
        rope_share=config.rope_dim / config.head_dim if rope else 1.0,
        attention_width=float(config.attention_width or config.head_dim),
        experts=None if experts is None else replace(experts, balance=0.0),
        tie_embeddings=config.tie_embeddings and config.causal,
    )
    # The file has fp32 numbers.
    return replace(plain, **{name: shortest(value) for name, value in vars(plain).items()})


def _reason(config: ModelConfig) -> str:
    """The first thing in which a model differs from its family's architecture (or the nearest)."""
    same = [table for table in ARCHITECTURES.values() if table.family == config.family]
    table = same[0] if same else LLAMA if config.causal else BERT
    try:
        back = table.read(Keys(table.write(config), table.name, "GGUF"))
    except (UserError, TypeError) as error:
        return str(error).removeprefix("GGUF: ").rstrip(".")
    mine, theirs = vars(_plain(config)), vars(_plain(back))
    name = next(name for name, value in mine.items() if value != theirs[name])
    return f"its {name} is {mine[name]!r}, but '{table.name}' can have {theirs[name]!r} only"
