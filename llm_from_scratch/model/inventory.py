"""What a model consists of, from its config alone: every weight tensor, listed once.

`weights_of` is the one place that knows. The number of parameters and their bytes, the FLOPs in
`flops.py` and the memory in `memory.py` follow from its list. No weight is made for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig

if TYPE_CHECKING:
    from llm_from_scratch.model.heads import HeadConfig

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
    trained: bool = True

    @property
    def numel(self) -> int:
        """The numbers in all `count` of them."""
        return self.count * prod(self.shape)


def weights_of(config: AnyConfig, head: HeadConfig | None = None) -> list[Weight]:
    """Every weight tensor, tied ones once, with the name and shape that the model gives it.

    With a `head`, those of the model under it (whose own output matrix it replaces) and its own.
    """
    if head is not None:
        under = [replace(w, name=f"backbone.{w.name}") for w in _under_head(config, head)]
        return [*under, *_head(config, head)]
    if isinstance(config, ModelConfig):
        return list(_decoder(config) if config.causal else _encoder(config))
    found = [replace(w, name=f"encoder.{w.name}") for w in _encoder(config.encoder)]
    for weight in _decoder(config.decoder):
        if weight.name != "embedding.weight" or not config.share_embeddings:
            found.append(replace(weight, name=f"decoder.{weight.name}"))
    if config.logits_bias:
        found.append(Weight("head", "logits_bias", (config.vocab_size,), trained=False))
    return found


def looks_at_source_alone(head: HeadConfig) -> bool:
    """Whether a head on an encoder-decoder takes the decoder away."""
    from llm_from_scratch.model.heads import HEADS

    return HEADS[head.kind].source_only


def _under_head(config: AnyConfig, head: HeadConfig) -> Iterator[Weight]:
    """What a head leaves of a model: no output matrix, no decoder or pooler without use for it."""
    pooled = head.kind == "embedding" or head.style.pooling == "pooler"
    for weight in weights_of(config):
        decoder = weight.name.startswith("decoder.") and looks_at_source_alone(head)
        if weight.part != "head" and not decoder and (pooled or weight.part != "pooler"):
            yield weight


def _head(config: AnyConfig, head: HeadConfig) -> Iterator[Weight]:
    """A head's own weights; see `ScoringHead`."""
    if head.kind == "embedding":
        return
    stack = config
    if isinstance(stack, EncoderDecoderConfig):
        stack = stack.encoder if looks_at_source_alone(head) else stack.decoder
    m, style, vocabulary = stack.d_model, head.style, head.kind == "masked_lm"
    times = TOKEN if head.kind in ("token_classification", "masked_lm") else TEXT
    outputs = {"masked_lm": stack.vocab_size, "multiple_choice": 1}.get(head.kind, len(head.labels))
    if style.dense:
        yield from _linear("head", "dense", m, m, style.dense_bias, 1, times)
    if style.norm:
        yield from _norm(stack, "norm", m, 1, "head")
    tied = vocabulary and isinstance(config, ModelConfig) and config.tie_embeddings
    for weight in _linear(
        "head", "out", m, outputs, style.bias, 1, LOGITS if vocabulary else times
    ):
        if not (tied and weight.name == "out.weight"):
            yield weight


def _decoder(config: ModelConfig) -> Iterator[Weight]:
    yield from stack_weights(config)
    if not config.tie_embeddings:
        yield Weight("head", "head.weight", (config.vocab_size, config.d_model), 1, LOGITS)


def _encoder(config: ModelConfig) -> Iterator[Weight]:
    yield from stack_weights(config)
    if config.pooler:
        yield from _linear("pooler", "pooler", config.d_model, config.d_model, True, 1, TEXT)


def stack_weights(config: ModelConfig) -> Iterator[Weight]:
    """The weights of a `Stack`: embeddings and blocks, without what stands on top of them."""
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


def _norm(
    config: ModelConfig, name: str, width: int, count: int, part: str = "norms"
) -> Iterator[Weight]:
    yield Weight(part, f"{name}.weight", (width,), count)
    if config.norm == "layer":
        yield Weight(part, f"{name}.bias", (width,), count)


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
    part, here = "feed-forward", "blocks.*.feed_forward"
    m, f, bias = config.d_model, config.d_ff, config.feed_forward_bias
    dense = config.n_layers - expert_layers(config)
    if dense:
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


def parameter_count(
    config: AnyConfig, head: HeadConfig | None = None, *, trained: bool = False
) -> int:
    """The numbers in all weights, every embedding included, tied matrices once.

    With `trained`, without those that training leaves as they are.
    """
    return sum(w.numel for w in weights_of(config, head) if w.trained or not trained)


def parameters_by_part(config: AnyConfig, head: HeadConfig | None = None) -> dict[str, int]:
    """Part -> the numbers in its weights."""
    parts: dict[str, int] = {}
    for weight in weights_of(config, head):
        parts[weight.part] = parts.get(weight.part, 0) + weight.numel
    return parts


def multiplied(weight: Weight, config: ModelConfig) -> float:
    """How many numbers of a weight one token is multiplied with; of experts, those it visits."""
    if weight.times == VISIT:
        assert config.experts is not None
        return weight.numel * config.experts.n_active / config.experts.n_experts
    return weight.numel


def active_parameter_count(config: AnyConfig, head: HeadConfig | None = None) -> int:
    """The parameters that one token meets: of the experts only those that it is sent to."""
    stacks = [config] if isinstance(config, ModelConfig) else [config.encoder, config.decoder]
    idle = sum(w.numel - multiplied(w, stack) for stack in stacks for w in stack_weights(stack))
    return parameter_count(config, head) - round(idle)
