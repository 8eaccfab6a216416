"""The decoder-only transformer: GPT-2, Llama and Qwen3 are this file under different configs.

Read it from top to bottom: a block mixes positions (attention) and then works on each of them alone
(feed-forward); the decoder embeds tokens, runs the blocks and turns the last state into logits.

Axes: b batch, t time, m features of the model, v vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.cache import KVCache, LayerCache
from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.layers import (
    Attention,
    FeedForward,
    Linear,
    make_norm,
    rope_table,
    sinusoidal_positions,
)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (pre-norm residual block)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = make_norm(config, config.d_model)
        self.attention = Attention(config)
        self.feed_forward_norm = make_norm(config, config.d_model)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_btm: Tensor,
        cos_sin: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: LayerCache | None,
    ) -> Tensor:
        y_btm = self.attention(self.attention_norm(x_btm), cos_sin, mask, causal, cache)
        x_btm = x_btm + F.dropout(y_btm, self.dropout, self.training)
        y_btm = self.feed_forward(self.feed_forward_norm(x_btm))
        return x_btm + F.dropout(y_btm, self.dropout, self.training)


class Decoder(nn.Module):
    """Token ids in, next-token logits out.

    `compute_dtype` is the precision of the activations; None means that of the weights. Training
    keeps fp32 weights and computes in bf16 where that is faster.
    """

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = make_norm(config, config.d_model)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        if not self.embedding.weight.is_meta:  # else whoever brings the weights calls it
            self.make_tables()

    def make_tables(self) -> None:
        """(Re)compute the position table, which is not a weight and is never saved."""
        table = None
        if self.config.position == "rope":
            table = rope_table(self.config)
        elif self.config.position == "sinusoidal":
            table = sinusoidal_positions(self.config.max_seq_len, self.config.d_model)
        self.register_buffer("table", table, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Draw fresh weights: normal(0, init_std), and less for what writes into the residual.

        The 2 * n_layers residual writes add up, so their variance is divided by that number
        (Radford et al. 2019). Norms start at one, biases at zero.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
                continue
            std = self.config.init_std
            if name.endswith(("attention.o.weight", "feed_forward.down.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        document_ids_bt: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits (b, t, v) of the token that follows each position."""
        return self.logits(self.hidden(tokens_bt, document_ids_bt=document_ids_bt, cache=cache))

    def logits(self, hidden_btm: Tensor) -> Tensor:
        """Scores of every vocabulary entry: (..., m) -> (..., v)."""
        return self.head(hidden_btm)

    def hidden(
        self,
        tokens_bt: Tensor,
        *,
        document_ids_bt: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The final, normed state of each position: (b, t, m).

        `document_ids_bt` numbers the documents packed into each row: tokens see only their own
        document, whose positions count from 0. With a `cache`, tokens continue what it holds.
        """
        t = tokens_bt.shape[1]
        if cache is not None:
            cache.start(t)
        elif t > self.config.max_seq_len:
            raise UserError(
                f"{t} tokens were given, but the model's context is {self.config.max_seq_len} "
                "tokens. Give a shorter text."
            )
        positions, mask, causal = look_back(tokens_bt, document_ids_bt, cache)
        x_btm = self.embedding(tokens_bt)
        cos_sin = None
        if self.config.position == "rope":
            cos_sin = self.table[positions]
        elif self.config.position == "learned":
            x_btm = x_btm + self.positions(positions)
        else:
            x_btm = x_btm * math.sqrt(self.config.d_model) + self.table[positions]
        x_btm = x_btm.to(self.compute_dtype or x_btm.dtype)
        x_btm = F.dropout(x_btm, self.config.dropout, self.training)
        for index, block in enumerate(self.blocks):
            layer_cache = cache.layer(index) if cache is not None else None
            x_btm = block(x_btm, cos_sin, mask, causal, layer_cache)
        if cache is not None:
            cache.finish()
        return self.final_norm(x_btm)


def look_back(
    tokens_bt: Tensor, document_ids_bt: Tensor | None, cache: KVCache | None
) -> tuple[Tensor, Tensor | None, bool]:
    """Who sees whom: positions (t,) or (b, t), a boolean mask or None, and "plainly causal".

    No mask is built where the kernel can do without one; that is the fast path.
    """
    t = tokens_bt.shape[1]
    steps = torch.arange(t, device=tokens_bt.device)
    if cache is not None:
        positions = cache.positions()
        if cache.length == 0:
            return positions, None, t > 1
        if cache.length is not None and t == 1:
            return positions, None, False
        return positions, cache.visible(positions), False
    if document_ids_bt is None:
        return steps, None, True
    same = document_ids_bt[:, :, None] == document_ids_bt[:, None, :]
    mask = same & (steps[:, None] >= steps[None, :])
    # A token's position is the number of earlier tokens of its document in this row.
    return mask.sum(-1) - 1, mask[:, None], False
