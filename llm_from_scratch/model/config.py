"""What a decoder is, as one frozen dataclass: everything that decides shapes and arithmetic.

GPT-2, Llama and Qwen3 are the same code under different values of these fields;
`weights/families.py` holds the table that turns a Hugging Face `config.json` into one of these and
back.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_from_scratch.core.errors import UserError, nearest

NORMS = ("rms", "layer")
POSITIONS = ("rope", "learned", "sinusoidal")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies to a longer context.

    Frequencies whose wavelength exceeds `original_max_seq_len / low_freq_factor` are divided by
    `factor`, those below `original_max_seq_len / high_freq_factor` are kept, and those between are
    blended (The Llama 3 Herd of Models, arXiv:2407.21783; `rope_type: llama3` in config.json).
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a `Decoder`. Widths are numbers of features, lengths are in tokens."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    norm: str = "rms"
    norm_eps: float = 1e-5
    position: str = "rope"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    activation: str = "silu"
    gated: bool = True
    feed_forward_bias: bool = False
    tie_embeddings: bool = True
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.d_ff < 1 or self.max_seq_len < 1:
            raise UserError("model.d_ff and model.max_seq_len must be at least 1.")
        if self.n_heads % self.n_kv_heads:
            raise UserError(
                f"model.n_heads ({self.n_heads}) is not a multiple of model.n_kv_heads "
                f"({self.n_kv_heads}); each key-value head serves a whole group of query heads."
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.head_dim is {self.head_dim}; rotary positions need an even number."
            )
        if self.rope_theta <= 0 or self.init_std <= 0:
            raise UserError(
                f"model.rope_theta is {self.rope_theta} and model.init_std {self.init_std}; "
                "both must be above 0."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1).")
        for name, value, choices in (
            ("norm", self.norm, NORMS),
            ("position", self.position, POSITIONS),
            ("activation", self.activation, ACTIVATIONS),
        ):
            if value not in choices:
                raise UserError(
                    f"model.{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )
