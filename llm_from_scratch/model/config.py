"""What a stack of blocks is, as one frozen dataclass: all that decides shapes and arithmetic.

Every family is the same code under different values of these fields. `weights/families/` holds one
table per family that turns a Hugging Face `config.json` into one of these and back.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_from_scratch.core.errors import UserError, nearest

NORMS = ("rms", "rms_plus_one", "layer", "layer_no_bias")
RESIDUALS = ("pre", "post", "sandwich", "branch_end", "parallel")
POSITIONS = ("rope", "learned", "sinusoidal", "none")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
SCALINGS = ("llama3", "linear", "yarn")
# No published model has sizes beyond this; a broken file or a slip of the hand easily has.
LARGEST_SIZE = 1 << 24


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched to a longer context; `rope_type` in config.json.

    `linear` divides all frequencies by `factor` (position interpolation, arXiv:2306.15595). In
    `llama3` (arXiv:2407.21783) those whose wavelength exceeds `original_max_seq_len /
    low_freq_factor` are divided, those below `original_max_seq_len / high_freq_factor` kept, and
    those between blended. `yarn` (arXiv:2309.00071) keeps what turns more than `high_freq_factor`
    (its beta_fast) times over the original context, divides what turns less than `low_freq_factor`
    (beta_slow) times, and makes up for flatter attention by a factor on the angles' table.
    """

    kind: str = "llama3"
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of some feed-forwards (arXiv:1701.06538, 2101.03961)."""

    n_experts: int
    n_active: int
    """Experts that each token is sent to."""
    d_ff: int
    """Width of one expert."""
    normalise: bool = True
    """Whether the weights of the chosen experts are made to sum to one."""
    balance: float = 0.001
    """Weight of the load-balancing loss in training."""
    layers: tuple[int, ...] = ()
    """The numbers of the blocks that have experts."""

    def __post_init__(self) -> None:
        for name in ("n_experts", "n_active", "d_ff"):
            if getattr(self, name) < 1:
                raise UserError(f"experts.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.n_active > self.n_experts:
            raise UserError(
                f"experts.n_active ({self.n_active}) is more than n_experts ({self.n_experts})."
            )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a stack of blocks. Widths are numbers of features, lengths in tokens."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    family: str = "llama"
    """The table in `weights/families/` by which the model is saved."""
    norm: str = "rms"
    """`rms_plus_one` multiplies by 1 + weight (Gemma); `layer_no_bias` is a layer norm without."""
    norm_eps: float = 1e-5
    residual: str = "pre"
    """Where the norms stand: see `Block`."""
    final_norm: bool = True
    first_norm: bool = True
    """False: the first block's attention takes its input as it is (ModernBERT)."""
    position: str = "rope"
    position_offset: int = 0
    """Learned positions count from here (2 in RoBERTa and BART)."""
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rope_share: float = 1.0
    """The share of each head's features that rotary positions turn."""
    local_rope_theta: float | None = None
    """The base in layers with a window, where it differs (Gemma 3, ModernBERT)."""
    relative_buckets: int = 0
    """Above 0: a learned bias on the scores per bucketed distance (T5, arXiv:1910.10683, MPNet)."""
    relative_distance: int = 128
    """The distance from which on all are in the last bucket."""
    causal: bool = True
    window: int | None = None
    """In `window_layers` a token sees this many tokens, itself included (causal), or those at
    most this far away (not causal)."""
    window_layers: tuple[int, ...] = ()
    cross_attention: bool = False
    """Whether each block also looks at an encoded source."""
    qk_norm: str | None = None
    """Norm on queries and keys: "head" (each head by itself) or "all" (all heads together)."""
    attention_width: float | None = None
    """Scores are divided by its square root; None: head_dim."""
    attention_softcap: float | None = None
    """Scores become softcap * tanh(scores / softcap) (Gemma 2)."""
    logit_softcap: float | None = None
    attention_bias: bool = False
    """Biases of the query, key and value matrices."""
    output_bias: bool = False
    """The bias of attention's output matrix."""
    activation: str = "silu"
    gated: bool = True
    feed_forward_bias: bool = False
    experts: ExpertsConfig | None = None
    n_segments: int = 0
    """Above 0: learned embeddings of the segments (the first and second text of a pair)."""
    embedding_norm: bool = False
    scale_embedding: bool = False
    """Whether embeddings are multiplied by sqrt(d_model)."""
    scale_logits: bool = False
    """Whether the last states are divided by sqrt(d_model) (T5)."""
    pooler: bool = False
    """Whether a dense layer and a tanh stand on the first token's state (BERT)."""
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
        if self.position == "rope" and (self.rope_dim % 2 or not 0 < self.rope_share <= 1):
            raise UserError(
                f"model.head_dim is {self.head_dim} and model.rope_share {self.rope_share}; "
                "rotary positions need an even number of features."
            )
        if self.rope_theta <= 0 or self.init_std <= 0:
            raise UserError(
                f"model.rope_theta is {self.rope_theta} and model.init_std {self.init_std}; "
                "both must be above 0."
            )
        if self.local_rope_theta is not None and self.local_rope_theta <= 0:
            raise UserError(
                f"model.local_rope_theta is {self.local_rope_theta}; it must be above 0."
            )
        if self.rope_theta == 1 and getattr(self.rope_scaling, "kind", None) == "yarn":
            raise UserError("model.rope_theta is 1.0; with YaRN it must be another number.")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}; it must be in [0, 1).")
        if self.window_layers and (self.window is None or self.window < 1):
            raise UserError(f"model.window is {self.window}; it must be at least 1.")
        if self.relative_buckets and (
            self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2
        ):
            raise UserError(
                f"model.relative_buckets is {self.relative_buckets} and model.relative_distance "
                f"{self.relative_distance}; there must be at least 4 buckets, and the distance "
                "must be more than half their number."
            )
        for name, value, choices in (
            ("norm", self.norm, NORMS),
            ("residual", self.residual, RESIDUALS),
            ("position", self.position, POSITIONS),
            ("activation", self.activation, ACTIVATIONS),
            ("qk_norm", self.qk_norm or "head", ("head", "all")),
            ("rope_scaling.kind", getattr(self.rope_scaling, "kind", "linear"), SCALINGS),
        ):
            if value not in choices:
                raise UserError(
                    f"model.{name} is '{value}'; it must be one of {', '.join(choices)}."
                    + nearest(value, choices)
                )

    @property
    def rope_dim(self) -> int:
        """How many features of each head rotary positions turn."""
        return int(self.head_dim * self.rope_share)


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Two stacks of one model: the encoder reads the source, the decoder writes the target."""

    encoder: ModelConfig
    decoder: ModelConfig
    start_id: int
    """The token that every target begins with."""
    first_id: int | None = None
    """The token that a target is made to begin with, behind the start token (some BARTs)."""
    end_id: int | None = None
    """The token that a target of the greatest length is made to end with (BART, Marian)."""
    writes_start: bool = True
    """Whether the start token may come again (not in Marian, where it is the padding)."""
    share_embeddings: bool = True
    """Whether encoder and decoder have one embedding matrix."""
    logits_bias: bool = False
    """Whether a fixed bias is added to the logits (BART, Marian)."""

    def __post_init__(self) -> None:
        source, target = self.encoder, self.decoder
        if source.d_model != target.d_model:
            raise UserError(
                f"The encoder's d_model is {source.d_model}, the decoder's {target.d_model}; they "
                "must be equal."
            )
        if self.share_embeddings and source.vocab_size != target.vocab_size:
            raise UserError(
                f"The encoder's vocab_size is {source.vocab_size}, the decoder's "
                f"{target.vocab_size}; where the embeddings are shared they must be equal."
            )
        for name in ("start_id", "first_id", "end_id"):
            token: int | None = getattr(self, name)
            if token is not None and not 0 <= token < target.vocab_size:
                raise UserError(
                    f"{name} is {token}, but the decoder's vocabulary ends at "
                    f"{target.vocab_size - 1}."
                )

    @property
    def family(self) -> str:
        return self.decoder.family

    @property
    def max_seq_len(self) -> int:
        """The longest source, in tokens."""
        return self.encoder.max_seq_len

    @property
    def vocab_size(self) -> int:
        """The number of entries that the decoder chooses from."""
        return self.decoder.vocab_size
