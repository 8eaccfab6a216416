"""Sizes: named ones that people know, and one dial (`depth`) from which the rest follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.model.config import ExpertsConfig, ModelConfig, RopeScaling

BIASES = {"attention_bias": True, "output_bias": True, "feed_forward_bias": True}
QK_NORM = {"qk_norm": "head", "norm_eps": 1e-6}
GEMMA = {
    "norm": "rms_plus_one",
    "norm_eps": 1e-6,
    "residual": "sandwich",
    "scale_embedding": True,
    "activation": "gelu_tanh",
}
# What each family that can be trained from scratch adds to the plain fields. That its class can
# express it is what the tables in weights/families/ are asked by a test.
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": QK_NORM,
    "qwen3_moe": QK_NORM,
    "qwen2": {"attention_bias": True, "norm_eps": 1e-6},
    "mistral": {},
    "olmo2": {"residual": "branch_end", "qk_norm": "all"},
    "gemma2": {**GEMMA, "attention_softcap": 50.0, "logit_softcap": 30.0},
    "gemma3_text": {**GEMMA, "qk_norm": "head", "local_rope_theta": 10_000.0},
    "gpt2": {
        "norm": "layer",
        "position": "learned",
        "activation": "gelu_tanh",
        "gated": False,
        **BIASES,
    },
    "gpt_neox": {
        "norm": "layer",
        "residual": "parallel",
        "activation": "gelu",
        "gated": False,
        **BIASES,
    },
}
MIXTURES = ("qwen3_moe",)
# Which families have layers with a window: all but each so-manieth one.
WINDOWED = {"mistral": math.inf, "gemma2": 2, "gemma3_text": 6}


def _sizes(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, max_seq_len: int
) -> dict[str, int]:
    return locals()


LLAMA3_SCALING = RopeScaling(factor=32.0)

# name -> (family, fields). Vocabulary sizes are those of the published models; a model that is
# trained from scratch takes its tokenizer's instead.
PRESETS: dict[str, tuple[str, dict[str, object]]] = {
    "nano-char": ("gpt2", {"vocab_size": 65, **_sizes(128, 4, 4, 4, 512, 64)}),
    "gpt2-10m": ("gpt2", {"vocab_size": 65, **_sizes(384, 6, 6, 6, 1536, 256)}),
    "gpt2": ("gpt2", {"vocab_size": 50257, **_sizes(768, 12, 12, 12, 3072, 1024)}),
    "gpt2-medium": ("gpt2", {"vocab_size": 50257, **_sizes(1024, 24, 16, 16, 4096, 1024)}),
    "gpt2-large": ("gpt2", {"vocab_size": 50257, **_sizes(1280, 36, 20, 20, 5120, 1024)}),
    "gpt2-xl": ("gpt2", {"vocab_size": 50257, **_sizes(1600, 48, 25, 25, 6400, 1024)}),
    "stories15m": (
        "llama",
        {"vocab_size": 32000, **_sizes(288, 6, 6, 6, 768, 256)},
    ),
    "smollm2-135m": (
        "llama",
        {"vocab_size": 49152, **_sizes(576, 30, 9, 3, 1536, 8192), "rope_theta": 100_000.0},
    ),
    "smollm2-360m": (
        "llama",
        {"vocab_size": 49152, **_sizes(960, 32, 15, 5, 2560, 8192), "rope_theta": 100_000.0},
    ),
    "llama-3.2-1b": (
        "llama",
        {
            "vocab_size": 128256,
            **_sizes(2048, 16, 32, 8, 8192, 131072),
            "rope_theta": 500_000.0,
            "rope_scaling": LLAMA3_SCALING,
        },
    ),
    "llama-3.2-3b": (
        "llama",
        {
            "vocab_size": 128256,
            **_sizes(3072, 28, 24, 8, 8192, 131072),
            "rope_theta": 500_000.0,
            "rope_scaling": LLAMA3_SCALING,
        },
    ),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            **_sizes(1024, 28, 16, 8, 3072, 40960),
            "head_dim": 128,
            "rope_theta": 1e6,
        },
    ),
    "qwen3-1.7b": (
        "qwen3",
        {
            "vocab_size": 151936,
            **_sizes(2048, 28, 16, 8, 6144, 40960),
            "head_dim": 128,
            "rope_theta": 1e6,
        },
    ),
}


@dataclass(frozen=True)
class ModelSettings:
    """The `model` part of a run: a preset or a depth, and whatever differs from it."""

    family: str = "llama"
    """What it is saved as: llama, qwen3, qwen3_moe (experts), gpt2, mistral, gemma3_text, ..."""
    preset: str | None = None
    """A size that people know, such as gpt2 or smollm2-135m; the fields below override it."""
    depth: int = 4
    """One dial: width, heads and feed-forward follow from the number of layers."""
    d_model: int | None = None
    """Width of the residual stream; default 64 per layer."""
    n_layers: int | None = None
    """Number of blocks; default depth."""
    n_heads: int | None = None
    """Query heads; default one per 64 features."""
    n_kv_heads: int | None = None
    """Key-value heads (grouped-query attention); default as many as query heads."""
    head_dim: int | None = None
    """Features per head; default d_model / n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward; default 8/3 of d_model (4 if not gated), rounded up to 32."""
    window: int | None = None
    """Tokens that the layers of a mistral see (of a gemma2 half, of a gemma3_text five in six)."""
    n_experts: int | None = None
    """Experts in each block of a qwen3_moe; default 8."""
    n_active: int | None = None
    """Experts that each token visits; default 2."""
    expert_d_ff: int | None = None
    """Width of one expert; default d_ff / n_active, rounded up to 32."""
    balance: float | None = None
    """Weight of the experts' load-balancing loss; default 0.01."""
    max_seq_len: int | None = None
    """Longest context in tokens; default data.seq_len."""
    rope_theta: float | None = None
    """Base of the rotary frequencies; default 10,000."""
    tie_embeddings: bool = True
    """Whether the output matrix is the embedding matrix."""
    dropout: float = 0.0
    """Share of activations dropped while training."""
    init_std: float = 0.02
    """Standard deviation of fresh weights."""


SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff")
MIXTURE = ("n_experts", "n_active", "expert_d_ff", "balance")


def _round_up(value: float, multiple: int) -> int:
    return int(-(-value // multiple) * multiple)


def _family(settings: ModelSettings) -> tuple[str, dict[str, object]]:
    """The family and the preset's fields."""
    if settings.preset is not None and settings.preset not in PRESETS:
        raise UserError(
            f"model.preset '{settings.preset}' is not known; there are {', '.join(PRESETS)}."
            + nearest(settings.preset, PRESETS)
        )
    if settings.family not in FAMILIES:
        raise UserError(
            f"model.family '{settings.family}' is not known; there are {', '.join(FAMILIES)}."
            + nearest(settings.family, FAMILIES)
        )
    if settings.preset is None:
        return settings.family, {}
    family, fields = PRESETS[settings.preset]
    if settings.family not in (family, ModelSettings.family):
        raise UserError(
            f"model.preset '{settings.preset}' is of the family {family}, but model.family "
            f"says {settings.family}. Leave one of the two out."
        )
    return family, fields


def _sizes_given(settings: ModelSettings, fields: dict[str, object]) -> dict[str, int]:
    """The sizes that the preset and the settings fix; the settings win."""
    given: dict[str, int] = {}
    for name in ("depth", *SIZES, "window", *MIXTURE[:3]):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"model.{name} is {value}; it must be at least 1.")
        if value is not None and name in SIZES:
            given[name] = value
    sizes = {name: value for name, value in fields.items() if name in SIZES} | given
    # A changed width or head count changes what was derived from it.
    if "n_heads" in given and "n_kv_heads" not in given:
        sizes.pop("n_kv_heads", None)
    if "d_model" in given and "d_ff" not in given:
        sizes.pop("d_ff", None)
    return sizes  # type: ignore[return-value]


def _windows(settings: ModelSettings, family: str, n: int) -> tuple[int, ...]:
    """Which of n blocks see a window only."""
    if settings.window is None:
        return ()
    if family not in WINDOWED:
        raise UserError(
            f"model.window is given, but a {family} is trained without. Leave it out, or set "
            f"model.family to one of {', '.join(WINDOWED)}."
        )
    # The last of each so many sees everything.
    return tuple(layer for layer in range(n) if (layer + 1) % WINDOWED[family])


def _experts(settings: ModelSettings, family: str, d_ff: int, n: int) -> ExpertsConfig | None:
    """The mixture in each of n blocks, where the family has one."""
    if family not in MIXTURES:
        for name in MIXTURE:
            if getattr(settings, name) is not None:
                raise UserError(
                    f"model.{name} is given, but a {family} has no experts. Leave it out, or set "
                    f"model.family to {' or '.join(MIXTURES)}."
                )
        return None
    e, active = settings.n_experts or 8, settings.n_active or 2
    balance = 0.01 if settings.balance is None else settings.balance
    if not 0 <= balance < math.inf:
        raise UserError(f"model.balance is {balance}; it must be a number that is not negative.")
    return ExpertsConfig(
        n_experts=e,
        n_active=active,
        d_ff=settings.expert_d_ff or _round_up(d_ff / active, 32),
        balance=balance,
        layers=tuple(range(n)),
    )


def resolve(settings: ModelSettings, vocab_size: int, seq_len: int) -> ModelConfig:
    """The complete architecture that the settings mean, for a vocabulary and a training length."""
    family, fields = _family(settings)
    sizes = _sizes_given(settings, fields)
    n_layers = sizes.get("n_layers", settings.depth)
    d_model = sizes.get("d_model", 64 * n_layers)
    n_heads = sizes.get("n_heads", max(1, d_model // 64))
    if "head_dim" not in sizes and d_model % n_heads:
        raise UserError(
            f"model.d_model ({d_model}) is not a multiple of model.n_heads ({n_heads}); "
            "change one of them or give model.head_dim."
        )
    gated = FAMILIES[family].get("gated", True)
    d_ff = sizes.get("d_ff", _round_up(d_model * 8 / 3, 32) if gated else 4 * d_model)
    max_seq_len = settings.max_seq_len or seq_len
    if max_seq_len < seq_len:
        raise UserError(
            f"data.seq_len ({seq_len}) is longer than model.max_seq_len ({max_seq_len}); "
            "lower the first or raise the second."
        )
    config = ModelConfig(
        family=family,
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=sizes.get("n_kv_heads", n_heads),
        head_dim=sizes.get("head_dim", d_model // n_heads),
        d_ff=d_ff,
        max_seq_len=max_seq_len,
        window=settings.window,
        window_layers=_windows(settings, family, n_layers),
        experts=_experts(settings, family, d_ff, n_layers),
        tie_embeddings=settings.tie_embeddings,
        dropout=settings.dropout,
        init_std=settings.init_std,
        **FAMILIES[family],  # type: ignore[arg-type]
    )
    if family.startswith("gemma"):  # the class wants to be told what others take for granted
        config = replace(config, attention_width=config.head_dim)
    theta = settings.rope_theta
    if theta is None:
        theta = fields.get("rope_theta", config.rope_theta)  # type: ignore[assignment]
    scaling = fields.get("rope_scaling")
    return replace(config, rope_theta=theta, rope_scaling=scaling)  # type: ignore[arg-type]
