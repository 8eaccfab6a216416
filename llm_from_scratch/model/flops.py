"""What a model consists of and how much arithmetic it does, from its config alone.

`weights_of` lists every weight tensor once. All else follows from the list: the number of
parameters, their bytes, and the FLOPs, which are two (a multiplication and an addition) for each
weight of a matrix that a token is multiplied with.

What is counted: the products of matrices, those of queries with keys and of attention's weights
with values among them, as they are carried out, so that what a mask hides is counted; `hidden` says
how much that is. Norms, rotations, softmax and activation functions are left out: they are less
than one operation in a hundred. The backward pass does two products for each one of the forward
pass (PaLM, arXiv:2204.02311, appendix B); kernels that compute scores once more in the backward
pass to spare memory do work that is not counted, as is usual for MFU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig

AnyConfig = ModelConfig | EncoderDecoderConfig

# What is multiplied with a matrix: each token, those tokens that a router sends, each token of the
# source, one token of a text, each position whose next token is asked for; or nothing (a table, a
# norm, a bias).
TOKEN, VISIT, SOURCE, TEXT, LOGITS, NOTHING = (
    "token", "visit", "source", "text", "logits", "nothing",
)  # fmt: skip


@dataclass(frozen=True)
class Weight:
    """A weight tensor, or `count` of them, one in each of so many blocks (`*` in the name)."""

    part: str
    name: str
    shape: tuple[int, ...]
    count: int = 1
    times: str = NOTHING

    @property
    def numel(self) -> int:
        """The numbers in all `count` of them."""
        return self.count * prod(self.shape)


# --- the weights ---------------------------------------------------------------------------------


def weights_of(config: AnyConfig) -> list[Weight]:
    """Every trained tensor, tied ones once, with the name and shape that the model gives it."""
    if isinstance(config, ModelConfig):
        return list(_decoder(config) if config.causal else _encoder(config))
    found = [replace(w, name=f"encoder.{w.name}") for w in _encoder(config.encoder)]
    for weight in _decoder(config.decoder):
        if weight.name != "embedding.weight" or not config.share_embeddings:
            found.append(replace(weight, name=f"decoder.{weight.name}"))
    if config.logits_bias:
        found.append(Weight("head", "logits_bias", (config.vocab_size,)))
    return found


def _decoder(config: ModelConfig) -> Iterator[Weight]:
    yield from _stack(config)
    if not config.tie_embeddings:
        yield Weight("head", "head.weight", (config.vocab_size, config.d_model), 1, LOGITS)


def _encoder(config: ModelConfig) -> Iterator[Weight]:
    yield from _stack(config)
    if config.pooler:
        yield from _linear("pooler", "pooler", config.d_model, config.d_model, True, 1, TEXT)


def _stack(config: ModelConfig) -> Iterator[Weight]:
    m, every = config.d_model, config.n_layers
    yield Weight("embedding", "embedding.weight", (config.vocab_size, m))
    if config.position == "learned":
        rows = config.max_seq_len + config.position_offset
        yield Weight("positions", "positions.weight", (rows, m))
    if config.relative_buckets:
        yield Weight("positions", "relative_bias.weight", (config.relative_buckets, config.n_heads))
    if config.n_segments:
        yield Weight("segments", "segments.weight", (config.n_segments, m))
    norms = {"embedding_norm": int(config.embedding_norm), "final_norm": int(config.final_norm)}
    norms["blocks.*.attention_norm"] = every - (not config.first_norm)
    norms["blocks.*.feed_forward_norm"] = every
    if config.residual == "sandwich":
        norms["blocks.*.attention_end_norm"] = norms["blocks.*.feed_forward_end_norm"] = every
    if config.cross_attention:
        norms["blocks.*.cross_norm"] = every
    for name, count in norms.items():
        if count:
            yield from _norm(config, name, m, count)
    yield from _attention(config, "attention", "attention", TOKEN)
    if config.cross_attention:
        yield from _attention(config, "cross-attention", "cross", SOURCE)
    yield from _feed_forwards(config)


def _linear(
    part: str, name: str, inputs: int, outputs: int, bias: bool, count: int, times: str
) -> Iterator[Weight]:
    yield Weight(part, f"{name}.weight", (outputs, inputs), count, times)
    if bias:
        yield Weight(part, f"{name}.bias", (outputs,), count)


def _norm(config: ModelConfig, name: str, width: int, count: int) -> Iterator[Weight]:
    yield Weight("norms", f"{name}.weight", (width,), count)
    if config.norm == "layer":
        yield Weight("norms", f"{name}.bias", (width,), count)


def _attention(config: ModelConfig, part: str, module: str, keys_of: str) -> Iterator[Weight]:
    """Queries and outputs of every token, keys and values of every token or of the source's."""
    m, every, bias = config.d_model, config.n_layers, config.attention_bias
    wide, narrow = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    here = f"blocks.*.{module}"
    yield from _linear(part, f"{here}.q", m, wide, bias, every, TOKEN)
    yield from _linear(part, f"{here}.k", m, narrow, bias, every, keys_of)
    yield from _linear(part, f"{here}.v", m, narrow, bias, every, keys_of)
    yield from _linear(part, f"{here}.o", wide, m, config.output_bias, every, TOKEN)
    if config.qk_norm is not None:
        whole, d = config.qk_norm == "all", config.head_dim
        yield from _norm(config, f"{here}.q_norm", wide if whole else d, every)
        yield from _norm(config, f"{here}.k_norm", narrow if whole else d, every)


def _feed_forwards(config: ModelConfig) -> Iterator[Weight]:
    m, f, bias, here = (
        config.d_model,
        config.d_ff,
        config.feed_forward_bias,
        "blocks.*.feed_forward",
    )
    dense = config.n_layers - expert_layers(config)
    if dense:
        part = "feed-forward"
        if config.gated:
            yield from _linear(part, f"{here}.gate", m, f, bias, dense, TOKEN)
        yield from _linear(part, f"{here}.up", m, f, bias, dense, TOKEN)
        yield from _linear(part, f"{here}.down", f, m, bias, dense, TOKEN)
    if config.experts is not None and expert_layers(config):
        e, wide, count = config.experts.n_experts, config.experts.d_ff, expert_layers(config)
        yield from _linear("router", f"{here}.router", m, e, False, count, TOKEN)
        for name, shape in (
            ("gate", (e, wide, m)),
            ("up", (e, wide, m)),
            ("down", (e, m, wide)),
        ):
            yield Weight("experts", f"{here}.{name}", shape, count, VISIT)


def expert_layers(config: ModelConfig) -> int:
    """How many blocks have experts in the place of one feed-forward."""
    return 0 if config.experts is None else sum(n < config.n_layers for n in config.experts.layers)


def parameter_count(config: AnyConfig) -> int:
    """Trained numbers, every embedding included, tied matrices once."""
    return sum(weight.numel for weight in weights_of(config))


def parameters_by_part(config: AnyConfig) -> dict[str, int]:
    """Part -> trained numbers in it, in the order in which a token passes them."""
    parts: dict[str, int] = {}
    for weight in weights_of(config):
        parts[weight.part] = parts.get(weight.part, 0) + weight.numel
    return parts


def active_parameter_count(config: AnyConfig) -> int:
    """The parameters that one token meets: of the experts only those that it is sent to."""
    stacks = [config] if isinstance(config, ModelConfig) else [config.encoder, config.decoder]
    idle = 0
    for stack in stacks:
        for weight in _stack(stack):
            idle += weight.numel if weight.times == VISIT else 0
            idle -= round(_multiplied(weight, stack)) if weight.times == VISIT else 0
    return parameter_count(config) - idle


# --- the arithmetic ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """Multiplications and additions of one pass over one sequence.

    `tokens` is the number of positions by which `per_token` divides. Of `attention` the share
    `hidden` is spent on pairs of positions that a mask or a window hides.
    """

    tokens: int
    matrices: float
    attention: float
    logits: float = 0.0
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return self.matrices + self.attention + self.logits

    @property
    def per_token(self) -> float:
        return self.total / self.tokens

    def __add__(self, other: Flops) -> Flops:
        attention = self.attention + other.attention
        hidden = self.hidden * self.attention + other.hidden * other.attention
        return Flops(
            self.tokens + other.tokens,
            self.matrices + other.matrices,
            attention,
            self.logits + other.logits,
            hidden / attention if attention else 0.0,
        )

    def times(self, factor: float) -> Flops:
        """As many times the arithmetic, on as many tokens."""
        return replace(
            self,
            matrices=self.matrices * factor,
            attention=self.attention * factor,
            logits=self.logits * factor,
        )


def _multiplied(weight: Weight, config: ModelConfig) -> float:
    """How many numbers of a weight one token is multiplied with."""
    if weight.times == VISIT:
        assert config.experts is not None
        return weight.numel * config.experts.n_active / config.experts.n_experts
    return weight.numel


def seen_pairs(config: ModelConfig, window: bool, new: int, context: int) -> int:
    """How many (query, key) pairs no mask hides, of the last `new` of `context` positions."""
    reach = config.window if window and config.window is not None else None
    if not config.causal:
        if reach is None or context <= reach:
            return new * context
        return context * (2 * reach + 1) - reach * (reach + 1)  # near the ends less is in reach
    back = context if reach is None else min(reach, context)
    first = context - new + 1  # what the first of the new tokens would see without a window
    short = max(0, min(back, context) - first)  # tokens whose sight a window does not yet cut
    return short * (first + first + short - 1) // 2 + (new - short) * back


def stack_flops(
    config: ModelConfig, new: int, context: int, *, source: int = 0, new_source: int = 0
) -> Flops:
    """`new` tokens through the blocks, of `context` positions in all, without logits.

    With cross-attention they look at `source` positions, the keys of `new_source` of which are
    computed in this pass.
    """
    rounds = {TOKEN: new, VISIT: new, SOURCE: new_source}
    products = 2.0 * sum(_multiplied(w, config) * rounds.get(w.times, 0) for w in _stack(config))
    pair = 4.0 * config.n_heads * config.head_dim  # a query times a key, a weight times a value
    windowed = sum(layer < config.n_layers for layer in config.window_layers)
    own = pair * config.n_layers * new * context
    across = pair * config.n_layers * new * source if config.cross_attention else 0.0
    seen = pair * (
        (config.n_layers - windowed) * seen_pairs(config, False, new, context)
        + windowed * seen_pairs(config, True, new, context)
    )
    whole = own + across
    return Flops(new, products, whole, hidden=(own - seen) / whole if whole else 0.0)


def head_flops(config: ModelConfig, positions: int) -> Flops:
    """The logits of so many positions; no token is counted."""
    return Flops(0, 0.0, 0.0, 2.0 * config.d_model * config.vocab_size * positions)


def prefill_flops(config: AnyConfig, n: int) -> Flops:
    """Reading n tokens: a prompt with the logits of its last position, a text, or a source.

    An encoder-decoder reads a source of n tokens and computes what every later step asks of it, the
    keys and values of cross-attention.
    """
    if isinstance(config, EncoderDecoderConfig):
        read = stack_flops(config.encoder, n, n)
        return read + stack_flops(config.decoder, 0, 0, new_source=n)
    if config.causal:
        return stack_flops(config, n, n) + head_flops(config, 1)
    pooled = 2.0 * config.d_model**2 if config.pooler else 0.0
    return stack_flops(config, n, n) + Flops(0, pooled, 0.0)


def decode_flops(config: AnyConfig, n: int, source: int | None = None) -> Flops | None:
    """The n-th token, with n - 1 in the cache; None for encoders, which write nothing.

    An encoder-decoder looks at a source of `source` tokens as well, n by default.
    """
    if isinstance(config, EncoderDecoderConfig):
        step = stack_flops(config.decoder, 1, n, source=n if source is None else source)
        return step + head_flops(config.decoder, 1)
    if not config.causal:
        return None
    return stack_flops(config, 1, n) + head_flops(config, 1)


def training_flops(config: AnyConfig, n: int) -> Flops:
    """Forward and backward over n tokens (of a source and of a target), logits of all positions."""
    if isinstance(config, EncoderDecoderConfig):
        write = stack_flops(config.decoder, n, n, source=n, new_source=n)
        forward = stack_flops(config.encoder, n, n) + write + head_flops(config.decoder, n)
        return replace(forward.times(3.0), tokens=n)
    forward = stack_flops(config, n, n)
    return (forward + head_flops(config, n) if config.causal else forward).times(3.0)


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """One of `context` tokens that go through a decoder together, its logits included."""
    return (stack_flops(config, 1, context) + head_flops(config, 1)).total


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward once and backward twice as much."""
    return training_flops(config, seq_len).per_token
