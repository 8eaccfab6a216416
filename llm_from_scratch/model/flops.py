"""How much arithmetic a model does, from its config alone: the numerator of MFU.

Two FLOPs (a multiplication and an addition) for each weight of a matrix that a token is multiplied
with. What is counted: the products of matrices, those of queries with keys and of attention's
weights with values among them, as they are carried out, so that what a mask hides is counted;
`hidden` says how much that is. Norms, rotations, softmax and activation functions are left out:
they are less than one operation in a hundred. The backward pass does two products for each one of
the forward pass (PaLM, arXiv:2204.02311, appendix B); kernels that compute scores once more in the
backward pass to spare memory do work that is not counted, as is usual for MFU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.inventory import (
    SOURCE,
    TEXT,
    TOKEN,
    VISIT,
    AnyConfig,
    looks_at_source_alone,
    multiplied,
    parameter_count,
    stack_weights,
    weights_of,
)

if TYPE_CHECKING:
    from llm_from_scratch.model.heads import HeadConfig

__all__ = [
    "Flops", "decode_flops", "forward_flops_per_token", "head_flops", "parameter_count",
    "prefill_flops", "seen_pairs", "stack_flops", "training_flops", "training_flops_per_token",
]  # fmt: skip


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
    products = 2.0 * sum(
        multiplied(w, config) * rounds.get(w.times, 0) for w in stack_weights(config)
    )
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


def prefill_flops(config: AnyConfig, n: int, head: HeadConfig | None = None) -> Flops:
    """Reading n tokens: a prompt with the logits of its last position, a text, or a source.

    An encoder-decoder reads a source of n tokens and computes what every later step asks of it, the
    keys and values of cross-attention. With a `head`, a text is read and answered.
    """
    if head is not None:
        return _answer_flops(config, n, head)
    if isinstance(config, EncoderDecoderConfig):
        read = stack_flops(config.encoder, n, n)
        return read + stack_flops(config.decoder, 0, 0, new_source=n)
    if config.causal:
        return stack_flops(config, n, n) + head_flops(config, 1)
    pooled = 2.0 * config.d_model**2 if config.pooler else 0.0
    return stack_flops(config, n, n) + Flops(0, pooled, 0.0)


def _answer_flops(config: AnyConfig, n: int, head: HeadConfig) -> Flops:
    """A text of n tokens through the model under a head, and through the head."""
    if isinstance(config, ModelConfig):
        stack, work = config, stack_flops(config, n, n)
    else:
        stack, work = config.encoder, stack_flops(config.encoder, n, n)
        if not looks_at_source_alone(head):  # the decoder reads the same text
            stack = config.decoder
            read = stack_flops(stack, n, n, source=n, new_source=n)
            work = replace(work + read, tokens=n)
    if head.kind == "masked_lm":
        work += head_flops(stack, n)
    rounds = {TOKEN: n, TEXT: 1}
    for weight in weights_of(config, head):
        pooler = weight.part == "pooler" and head.style.pooling == "pooler"
        if (weight.part == "head" or pooler) and weight.times in rounds:
            work += Flops(0, 2.0 * weight.numel * rounds[weight.times], 0.0)
    return work


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


def training_flops(config: AnyConfig, n: int, head: HeadConfig | None = None) -> Flops:
    """Forward and backward over n tokens (of a source and of a target), logits of all positions."""
    if head is not None:
        return _answer_flops(config, n, head).times(3.0)
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
