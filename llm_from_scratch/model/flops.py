"""How much arithmetic a decoder does: the numerator of MFU (model FLOPs utilisation)."""

from __future__ import annotations

from llm_from_scratch.model.config import ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Trained numbers, every embedding included, tied matrices once."""
    m, d = config.d_model, config.head_dim
    norm = m * (2 if config.norm == "layer" else 1)
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * d
    attention = m * heads
    if config.attention_bias:
        attention += heads - config.n_heads * d
    if config.output_bias:
        attention += m
    if config.qk_norm:
        attention += 2 * d
    wide = 2 if config.gated else 1
    feed_forward = (wide + 1) * m * config.d_ff
    if config.feed_forward_bias:
        feed_forward += wide * config.d_ff + m
    embeddings = config.vocab_size * m * (1 if config.tie_embeddings else 2)
    if config.position == "learned":
        embeddings += config.max_seq_len * m
    return config.n_layers * (2 * norm + attention + feed_forward) + norm + embeddings


def forward_flops_per_token(config: ModelConfig, context: int) -> float:
    """Multiplications and additions for one token that sees `context` tokens.

    2 per weight of every matrix product, and 4 * heads * head_dim per token looked at for the two
    products of attention (PaLM, arXiv:2204.02311, appendix B; no discount for the causal half).
    """
    m, d = config.d_model, config.head_dim
    attention = m * (2 * config.n_heads + 2 * config.n_kv_heads) * d
    feed_forward = (3 if config.gated else 2) * m * config.d_ff
    matrices = config.n_layers * (attention + feed_forward) + m * config.vocab_size
    return 2.0 * matrices + 4.0 * config.n_layers * config.n_heads * d * context


def training_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Forward once and backward twice as much."""
    return 3.0 * forward_flops_per_token(config, seq_len)
