"""What a model keeps in memory, from its config alone: its cache, and what training holds.

`activation_bytes` is an inventory: each line below stands for a tensor that some operation of the
forward pass saves because its derivative needs it. A product of two things needs both; a sum needs
neither; softmax, tanh and relu need their result. Nothing else is held once the pass is over.

Axes: b batch, t time (queries), s source positions (keys), h query heads, k key-value heads,
d features of one head, m features of the model, f of the feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llm_from_scratch.model.attend import SHORT
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.inventory import (
    VISIT,
    AnyConfig,
    expert_layers,
    looks_at_source_alone,
    parameter_count,
    weights_of,
)

if TYPE_CHECKING:
    from llm_from_scratch.model.heads import HeadConfig

FP32, INT64 = 4, 8  # bytes


def add_up(*parts: dict[str, float]) -> dict[str, float]:
    """The sums of equally named parts."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


# --- inference -----------------------------------------------------------------------------------


def short_path(dtype: torch.dtype, device: str, length: int) -> bool:
    """Whether `attend` writes the scores down (`attend_short`), if it has a mask or is causal."""
    return dtype == torch.bfloat16 and device == "cpu" and length <= SHORT


def kv_cache_bytes(
    config: AnyConfig, batch: int, capacity: int, dtype: torch.dtype, source: int = 0
) -> int:
    """The keys and values of `KVCache`, and of cross-attention to `source` positions.

    Encoders keep none.
    """
    if isinstance(config, EncoderDecoderConfig):
        config = config.decoder
    elif not config.causal:
        return 0
    positions = capacity + (source if config.cross_attention else 0)
    per_position = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return batch * positions * per_position * dtype.itemsize


def working_bytes(
    config: AnyConfig, batch: int, length: int, dtype: torch.dtype, device: str = "cpu"
) -> float:
    """About what reading `batch` texts of `length` tokens takes for a moment, besides the cache.

    An estimate: the fullest moment of one block, and the logits of each text's last position.
    """
    if isinstance(config, EncoderDecoderConfig):
        return max(
            working_bytes(stack, batch, length, dtype, device)
            for stack in (config.encoder, config.decoder)
        )
    m, e = config.d_model, dtype.itemsize
    wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    half = FP32 if e < FP32 else 0  # norms work on a copy in fp32
    scores = config.n_heads * length * e
    if config.attention_softcap is not None:
        mixing = 3 * scores + 5 * wide * e
    elif short_path(dtype, device, length) and not config.relative_buckets:
        mixing = 2 * scores + 5 * wide * e
    else:
        mixing = 4 * wide * e
    moments = [
        2 * m * e + mixing,
        2 * m * e + ((4 if config.position == "rope" else 1) * wide + 2 * narrow) * e,
        2 * m * e + 2 * m * FP32 + m * half,
        (3 * m + (3 if config.gated else 2) * config.d_ff) * e,
    ]
    if config.qk_norm is not None:
        moments.append(2 * m * e + wide * (e + 2 * FP32 + half))
    if config.experts is not None:
        moments.append((2 + 4 * config.experts.n_active) * m * e)
    shared = length * 2 * config.rope_dim * FP32 if config.position == "rope" else 0  # angles
    if config.window_layers or not config.causal:
        shared += 10 * length * length  # distances and truth values
    if config.relative_buckets:  # a bias, and the same where nothing is hidden
        shared += (1 + batch) * config.n_heads * length * length * e
    logits = batch * config.vocab_size * (e + FP32) if config.causal else 0
    # Before the first block: distances become buckets, in several tables of whole numbers.
    before = 56 * batch * length * length if config.relative_buckets else 0
    return max(batch * length * max(moments) + shared, before) + logits


def inference_memory(
    config: AnyConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    device: str = "cpu",
    head: HeadConfig | None = None,
) -> dict[str, float]:
    """Part -> bytes while `batch` texts of `context` tokens are read, and written on from.

    Weights and cache are exact, `working` is an estimate. Under a head nothing is written.
    """
    parts = {"weights": float(parameter_count(config, head) * dtype.itemsize)}
    cache = 0 if head is not None else kv_cache_bytes(config, batch, context, dtype, context)
    if cache:
        parts["KV cache"] = cache
    return {**parts, "working": working_bytes(config, batch, context, dtype, device)}


def largest(fits: Callable[[int], bool], most: int = 1 << 24) -> int:
    """The largest number up to `most` that fits, as all smaller ones do; 0 if none does."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# --- training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """One forward pass of training.

    `compute` is the precision of activations, `weights` that of the parameters. `masked` says that
    rows hold padding or several documents, so that no pass can do without a mask. `source` is the
    number of positions that cross-attention looks at.
    """

    batch: int
    length: int
    compute: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32
    device: str = "cpu"
    masked: bool = False
    source: int = 0
    source_masked: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def size(self) -> int:
        """Bytes of one number of an activation."""
        return self.compute.itemsize

    @property
    def noise(self) -> int:
        """Bytes that dropout keeps per number: a factor on the CPU, a truth value elsewhere."""
        return self.size if self.device == "cpu" else 1


def activation_bytes(
    config: AnyConfig, run: Pass, head: HeadConfig | None = None
) -> dict[str, float]:
    """Part -> bytes held for the backward pass, from the ids to the last states or scores.

    Weights are not in it, but the experts' copies in `run.compute` are. What the logits and the
    loss hold comes on top of it. A model under a `head` reads `run.length` tokens, with both of its
    stacks where the head needs both.
    """
    if head is not None:
        return _headed(config, run, head)
    if isinstance(config, EncoderDecoderConfig):
        reads = Pass(**{**vars(run), "length": run.source, "masked": run.source_masked})
        return add_up(activation_bytes(config.encoder, reads), _stack_held(config.decoder, run))
    return _stack_held(config, run)


def _headed(config: AnyConfig, run: Pass, head: HeadConfig) -> dict[str, float]:
    """The model under a head, and the head: its dense layer, its norm and its last matrix."""
    stack = config
    if isinstance(stack, EncoderDecoderConfig):
        stack = stack.encoder if looks_at_source_alone(head) else stack.decoder
    if stack is config or looks_at_source_alone(head):
        held = _stack_held(stack, run)
    else:  # the decoder reads the text as well, behind a mask over the source alone
        both = {"source": run.length, "source_masked": run.masked, "masked": False}
        held = activation_bytes(config, Pass(**{**vars(run), **both}))
    if head.kind == "embedding":
        return held
    style, m = head.style, stack.d_model
    each = head.kind in ("token_classification", "masked_lm")
    rows = run.tokens if each else run.batch
    total = float(rows * m * run.size)  # what the last matrix is multiplied with
    if stack.dropout if style.dropout is None else style.dropout:
        total += (2 if style.dropout_first else 1) * rows * m * run.noise
    if style.dense:
        total += 2 * rows * m * run.size
    if style.norm:
        total += _norm(stack, rows, m)
    return add_up(held, {"head": total})


def _stack_held(config: ModelConfig, run: Pass) -> dict[str, float]:
    layers, own = config.n_layers, expert_layers(config)
    held = add_up(
        {"embedding": _embedding(config, run)},
        {"norms": _norms(config, run)},
        {"attention": _attention(config, run)},
        {"feed-forward": (layers - own) * _feed_forward(config, run)},
        {"experts": own * _experts(config, run)},
        {"copies of weights": _copies(config, run)},
    )
    if config.dropout:
        branches = layers * (3 if config.cross_attention else 2) + 1
        held["dropout"] = branches * run.tokens * config.d_model * run.noise
    return {name: value for name, value in held.items() if value}


def _embedding(config: ModelConfig, run: Pass) -> float:
    """Ids and positions as lookups keep them, and the angles of rotary positions."""
    total = float(run.tokens * INT64)
    rows = run.tokens if run.masked else run.length  # documents have positions of their own
    if config.position == "learned":
        total += rows * INT64
    if config.relative_buckets:
        total += rows * run.length * INT64
    if config.position == "rope":
        tables = 1 if config.local_rope_theta is None else 2
        # In fp32 all layers share a table; else queries and keys of each cast their own.
        casts = 2 * config.n_layers if run.compute != torch.float32 else tables
        total += casts * rows * 2 * config.rope_dim * run.size
    return total


def _norm(config: ModelConfig, rows: int, width: int, *, shared: bool = False) -> float:
    """Norms compute in fp32: their input (a copy of it in half precision), and what they divide by.

    RMSNorm is written out, so the normed values wait for the product with the weight as well.
    """
    given = 0 if shared else rows * width * FP32
    if config.norm.startswith("layer"):
        return given + 2 * rows * FP32
    return given + rows * FP32 + rows * width * FP32 + (width * FP32 if "one" in config.norm else 0)


def _norms(config: ModelConfig, run: Pass) -> float:
    n, m, layers = run.tokens, config.d_model, config.n_layers
    outside = int(config.embedding_norm) + int(config.final_norm)
    in_blocks = 2 * layers - (not config.first_norm)
    if config.residual == "sandwich":
        in_blocks += 2 * layers
    if config.cross_attention:
        in_blocks += layers
    total = (outside + in_blocks) * _norm(config, n, m)
    if config.residual == "parallel" and run.compute == torch.float32:
        # Both norms of a block keep the same x.
        total -= layers * n * m * FP32
    if config.qk_norm is not None:
        for heads in (config.n_heads, config.n_kv_heads):
            whole = config.qk_norm == "all"
            rows, width = (n, heads * config.head_dim) if whole else (n * heads, config.head_dim)
            total += layers * _norm(config, rows, width)
    return total


def _attention(config: ModelConfig, run: Pass) -> float:
    n, m, layers = run.tokens, config.d_model, config.n_layers
    windowed = sum(layer < layers for layer in config.window_layers)
    total = float(layers * n * m * run.size)  # what queries, keys and values are made of
    for window, count in ((False, layers - windowed), (True, windowed)):
        total += count * _mixed(config, run, window)
    if config.cross_attention:
        total += layers * (n * m * run.size + _mixed(config, run, False, across=True))
        total += run.batch * run.source * m * run.size  # the encoded source, the same for all
    return total


def _mixed(config: ModelConfig, run: Pass, window: bool, across: bool = False) -> float:
    """What the weighted sum of values holds, by the way in which it is computed (see `attend`)."""
    b, t, e = run.batch, run.length, run.size
    s = run.source if across else t
    wide = config.n_heads * config.head_dim
    masked = run.source_masked if across else run.masked
    bias = bool(config.relative_buckets) and not across
    cut = window and config.window is not None and t > config.window
    mask = (b if masked else 1) * (1 if across else t) * s if masked or cut or bias else 0
    queries, keys_values, scores = b * t * wide, 2 * b * s * wide, b * config.n_heads * t * s
    softmax = 3 * scores if config.dropout else scores  # dropout: also the noise and the result
    if config.attention_softcap is not None:
        mask = mask or t * s  # spelled out where a kernel would do without
        return (2 * queries + keys_values + scores + softmax) * e + mask
    causal = config.causal and not across
    short = t > 1 and not bias and (causal or mask > 0)
    if short and short_path(run.compute, run.device, s):
        return (2 * queries + keys_values + softmax) * e
    if run.device == "mps" or (run.device == "cpu" and (config.dropout or bias)):
        # The kernel that never writes the scores down does not serve these.
        hiding = mask if bias and (masked or causal) else 0  # where the bias becomes -infinity
        return (queries + keys_values + softmax) * FP32 + queries * e + hiding
    partly = config.position == "rope" and config.rope_dim < config.head_dim and not across
    return ((3 if partly else 2) * queries + keys_values + mask) * e + b * t * config.n_heads * FP32


def _bent(config: ModelConfig) -> int:
    """How many tensors of a feed-forward's width are held: before and after each product."""
    before = 0 if config.activation in ("relu", "tanh") else 1  # told by the result
    return before + (3 if config.gated else 1)


def _feed_forward(config: ModelConfig, run: Pass) -> float:
    return run.tokens * (config.d_model + _bent(config) * config.d_ff) * run.size


def _experts(config: ModelConfig, run: Pass) -> float:
    if config.experts is None:
        return 0
    e, m, settings = run.size, config.d_model, config.experts
    router = m * e + settings.n_experts * FP32 + settings.n_active * INT64
    if settings.normalise:
        router += (1 + settings.n_active) * FP32
    # Of a visit: its token and place, what goes in, what comes out before and after its weight.
    visit = 2 * INT64 + (3 * m + _bent(config) * settings.d_ff + 1) * e
    return run.tokens * (router + settings.n_active * visit)


def _copies(config: ModelConfig, run: Pass) -> float:
    """The experts' matrices in the precision of the activations wait for the backward pass as well.

    Those of other layers are made again then (`mixed.product`).
    """
    if run.compute == run.weights or config.experts is None:
        return 0
    visits = run.tokens * config.experts.n_active
    visited = min(1.0, visits / config.experts.n_experts)
    return sum(w.numel * visited * run.size for w in weights_of(config) if w.times == VISIT)
