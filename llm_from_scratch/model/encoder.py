"""The encoder: every position sees all others, and a text becomes one vector per token.

BERT (arXiv:1810.04805), RoBERTa, DistilBERT, MPNet and ModernBERT are this file under different
configs; heads on top of it are in `heads.py`.

Axes: b batch, t time, m features of the model.
"""

from __future__ import annotations

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

    def pooled(self, hidden_btm: Tensor) -> Tensor:
        """tanh of a dense layer on the first token's state, (b, m): BERT's view of a whole text."""
        return self.pooler(hidden_btm[:, 0]).tanh()
