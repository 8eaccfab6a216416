"""The encoder-decoder transformer to read: attention head by head, post-norm, as in the paper."""

from llm_from_scratch.transformer.attention import (
    AttentionHead,
    DotProductAttention,
    MultiHeadAttention,
    ScaledDotProductAttention,
)
from llm_from_scratch.transformer.convert import to_encoder_decoder
from llm_from_scratch.transformer.transformer import (
    Decoder,
    DecoderBlock,
    Encoder,
    EncoderBlock,
    Transformer,
)
from llm_from_scratch.transformer.utils import (
    LayerNorm,
    PositionalEncoding,
    create_padding_mask,
    create_subsequent_mask,
    layer_norm,
    sinusoidal_position_encoding,
)

__all__ = [
    "AttentionHead",
    "Decoder",
    "DecoderBlock",
    "DotProductAttention",
    "Encoder",
    "EncoderBlock",
    "LayerNorm",
    "MultiHeadAttention",
    "PositionalEncoding",
    "ScaledDotProductAttention",
    "Transformer",
    "create_padding_mask",
    "create_subsequent_mask",
    "layer_norm",
    "sinusoidal_position_encoding",
    "to_encoder_decoder",
]
