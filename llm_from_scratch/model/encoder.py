"""The encoder: every position sees all others, and a text becomes one vector per token.

BERT (arXiv:1810.04805), RoBERTa, DistilBERT, MPNet and ModernBERT are this file under different
configs; heads on top of it are in `heads.py`.

Axes: b batch, t time, m features of the model.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.decoder import Stack
from llm_from_scratch.model.layers import Linear


class Encoder(Stack):
    """Token ids in, one state per token out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.pooler:
            self.pooler = Linear(config.d_model, config.d_model)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        attention_mask: Tensor | None = None,
        segments_bt: Tensor | None = None,
    ) -> Tensor:
        """The last state of each position: (b, t, m).

        `attention_mask` (b, t) is 1 for text and 0 for padding, whose states mean nothing;
        `segments_bt` is 0 for the first text of a pair and 1 for the second.
        """
        self.check_length(tokens_bt.shape[1])
        sight = self.sight(tokens_bt, attention_mask, None)
        return self.run(self.embed(tokens_bt, sight.positions, segments_bt), sight, None)

    def add_pooler(self, seed: int) -> None:
        """Give it a pooler with fresh weights, unless it has one."""
        if self.config.pooler:
            return
        self.config = replace(self.config, pooler=True)
        self.pooler = Linear(self.config.d_model, self.config.d_model)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.empty(self.pooler.weight.shape).normal_(generator=generator)
        with torch.no_grad():
            self.pooler.weight.copy_(drawn * self.config.init_std)
            self.pooler.bias.zero_()
        self.pooler.to(self.embedding.weight)  # device and precision of the others

    def drop_pooler(self) -> None:
        """Take the pooler away, if there is one."""
        if self.config.pooler:
            self.config = replace(self.config, pooler=False)
            del self.pooler

    def pooled(self, hidden_btm: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """tanh of a dense layer on the first token's state, (b, m): BERT's view of a whole text."""
        return self.pooler(first_state(hidden_btm, attention_mask)).tanh()


def first_state(hidden_btm: Tensor, mask_bt: Tensor | None) -> Tensor:
    """The state of each row's first token that is no padding: (b, m)."""
    if mask_bt is None:
        return hidden_btm[:, 0]
    rows = torch.arange(len(hidden_btm), device=hidden_btm.device)
    return hidden_btm[rows, mask_bt.int().argmax(-1)]
