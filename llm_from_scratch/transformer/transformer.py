"""The encoder-decoder transformer of "Attention Is All You Need" (arXiv:1706.03762), to be read.

The encoder reads the source, every position seeing all others. The decoder writes the target: each
position sees the target up to itself and, through a second attention, the whole encoded source.
Norms come after the residual sum (post-norm), the feed-forward uses ReLU, there is no dropout.

Axes: b batch, s source positions, t target positions, m features of the model. Masks are True where
attention is forbidden; `create_padding_mask` and `create_subsequent_mask` in `utils.py` make them.
"""

import torch
from torch import Tensor, nn

from llm_from_scratch.transformer.attention import Mask, MultiHeadAttention
from llm_from_scratch.transformer.utils import LayerNorm, PositionalEncoding, create_subsequent_mask


def feed_forward(d_model: int, d_ff: int) -> nn.Sequential:
    """Each position on its own: widen, cut off below zero, narrow."""
    return nn.Sequential(nn.Linear(d_model, d_ff), nn.ReLU(), nn.Linear(d_ff, d_model))


class EncoderBlock(nn.Module):
    """Look around, then think: norm(x + attention(x)), norm(x + feed_forward(x))."""

    def __init__(self, d_model: int, n_heads: int, d_k: int, d_v: int, d_ff: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(n_heads, d_k, d_v, d_model)
        self.layer_norm1 = LayerNorm(d_model)
        self.feed_forward = feed_forward(d_model, d_ff)
        self.layer_norm2 = LayerNorm(d_model)

    def forward(self, x: Tensor, src_padding_mask: Mask = None) -> Tensor:
        """x (b, s, m), mask (b, 1, s) -> (b, s, m)."""
        x = self.layer_norm1(x + self.attention(x, x, x, mask=src_padding_mask))
        return self.layer_norm2(x + self.feed_forward(x))


class DecoderBlock(nn.Module):
    """Look back at the target, look across at the source, then think."""

    def __init__(self, d_model: int, n_heads: int, d_k: int, d_v: int, d_ff: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(n_heads, d_k, d_v, d_model)
        self.layer_norm1 = LayerNorm(d_model)
        self.attention_source_target = MultiHeadAttention(n_heads, d_k, d_v, d_model)
        self.layer_norm2 = LayerNorm(d_model)
        self.feed_forward = feed_forward(d_model, d_ff)
        self.layer_norm3 = LayerNorm(d_model)

    def forward(
        self, x: Tensor, encoder_output: Tensor,
        tgt_mask: Mask = None, src_tgt_padding_mask: Mask = None,
    ) -> Tensor:  # fmt: skip
        """x (b, t, m), encoder_output (b, s, m), masks (b or 1, t or 1, t) and (b, 1, s)."""
        x = self.layer_norm1(x + self.attention(x, x, x, mask=tgt_mask))
        source = (encoder_output, encoder_output)
        x = self.layer_norm2(x + self.attention_source_target(x, *source, src_tgt_padding_mask))
        return self.layer_norm3(x + self.feed_forward(x))


class Stack(nn.Module):
    """What encoder and decoder share: embedded tokens, their positions, and a pile of blocks."""

    block: type[EncoderBlock] | type[DecoderBlock]

    def __init__(
        self, vocabulary_size: int, max_sequence_len: int, d_model: int, n_blocks: int,
        n_heads: int, d_k: int, d_v: int, d_ff: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, d_model)
        # `pe` multiplies by sqrt(m): so words and positions start equally loud.
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.pe = PositionalEncoding(d_model, max_sequence_len)
        self.blocks = nn.ModuleList(
            self.block(d_model, n_heads, d_k, d_v, d_ff) for _ in range(n_blocks)
        )


class Encoder(Stack):
    """Token ids -> one vector per source token, each in the light of all others."""

    block = EncoderBlock

    def forward(self, x: Tensor, src_padding_mask: Mask = None) -> Tensor:
        """x (b, s) ids, mask (b, 1, s) -> (b, s, m)."""
        x = self.pe(self.embedding(x))
        for block in self.blocks:
            x = block(x, src_padding_mask)
        return x


class Decoder(Stack):
    """Token ids and the encoded source -> one vector per target position."""

    block = DecoderBlock

    def forward(
        self, x: Tensor, encoder_output: Tensor,
        tgt_mask: Mask = None, src_tgt_padding_mask: Mask = None,
    ) -> Tensor:  # fmt: skip
        """x (b, t) ids, encoder_output (b, s, m), masks as in `DecoderBlock` -> (b, t, m)."""
        x = self.pe(self.embedding(x))
        for block in self.blocks:
            x = block(x, encoder_output, tgt_mask, src_tgt_padding_mask)
        return x


class Transformer(nn.Module):
    """Source ids and target ids in, logits of each next target token out."""

    def __init__(
        self, src_vocab_size: int, tgt_vocab_size: int, max_sequence_len: int, d_model: int,
        n_blocks: int, n_heads: int, d_k: int, d_v: int, d_ff: int,
    ) -> None:  # fmt: skip
        super().__init__()
        sizes = (max_sequence_len, d_model, n_blocks, n_heads, d_k, d_v, d_ff)
        self.max_sequence_len = max_sequence_len
        self.encoder = Encoder(src_vocab_size, *sizes)
        self.decoder = Decoder(tgt_vocab_size, *sizes)
        self.linear = nn.Linear(d_model, tgt_vocab_size, bias=False)

    def forward(
        self, src: Tensor, tgt: Tensor,
        src_mask: Mask = None, tgt_mask: Mask = None, src_tgt_mask: Mask = None,
    ) -> Tensor:  # fmt: skip
        """src (b, s) and tgt (b, t) ids -> logits (b, t, tgt_vocab_size).

        A mask that is None forbids nothing. To train, give `create_subsequent_mask(t)` (joined
        with the target's padding mask) as `tgt_mask`: without it the decoder reads the answer.
        """
        encoder_output = self.encoder(src, src_mask)
        return self.linear(self.decoder(tgt, encoder_output, tgt_mask, src_tgt_mask))

    @torch.no_grad()
    def inference(
        self, src: Tensor, bos_token: int, eos_token: int,
        max_new_tokens: int = 20, src_mask: Mask = None,
    ) -> Tensor:  # fmt: skip
        """Write the target greedily: (b, s) ids -> (b, at most 1 + max_new_tokens) ids.

        Each row starts with `bos_token`; one that has ended is filled up with `eos_token`. At most
        `max_sequence_len` tokens are written. `src_mask` (b, 1, s) hides the source's padding. The
        causal mask of training stays on: without it earlier states would change as the text grows.
        """
        encoder_output = self.encoder(src, src_mask)
        tokens = torch.full((src.shape[0], 1), bos_token, dtype=torch.long, device=src.device)
        ended = torch.zeros(src.shape[0], dtype=torch.bool, device=src.device)
        for _ in range(min(max_new_tokens, self.max_sequence_len)):
            causal = create_subsequent_mask(tokens.shape[1], src.device)
            state = self.decoder(tokens, encoder_output, causal, src_mask)
            best = self.linear(state[:, -1]).argmax(dim=-1).masked_fill(ended, eos_token)
            tokens = torch.cat([tokens, best[:, None]], dim=1)
            ended |= best == eos_token
            if ended.all():
                break
        return tokens
