"""The encoder-decoder: one stack reads the source, the other writes the target while looking at it.

The original Transformer (arXiv:1706.03762), T5 (arXiv:1910.10683), BART (arXiv:1910.13461) and
Marian (arXiv:1804.00344) are this file under different configs.

Axes: b batch, s source positions, t target positions, m features of the model, v vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder import Encoder


class EncoderDecoder(nn.Module):
    """Source ids and target ids in, logits of each next target token out."""

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder)
        self.decoder = Decoder(config.decoder)
        if config.logits_bias:
            self.logits_bias = nn.Parameter(torch.zeros(config.decoder.vocab_size))
        self.tie()

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The precision of the activations of both stacks; None means that of the weights."""
        return self.encoder.compute_dtype  # the decoder may be gone: see `tie`

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype | None) -> None:
        self.encoder.compute_dtype = self.decoder.compute_dtype = dtype

    def initialise(self, seed: int) -> None:
        """Draw fresh weights for both stacks, as `Stack.initialise` does."""
        self.encoder.initialise(seed)
        self.decoder.initialise(seed + 1)

    def tie(self) -> None:
        """Let matrices that are one be one; called again once real weights stand in."""
        if hasattr(self, "logits_bias"):
            self.logits_bias.requires_grad_(False)
        if not isinstance(self.decoder, Decoder):
            return  # a head that looks at the source alone took it away
        if self.config.share_embeddings:
            self.decoder.embedding.weight = self.encoder.embedding.weight
        if self.config.decoder.tie_embeddings:
            self.decoder.head.weight = self.decoder.embedding.weight

    def forward(
        self,
        source_bs: Tensor,
        target_bt: Tensor,
        *,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (b, t, v) of the target token that follows each position.

        The masks, (b, s) and (b, t), are 1 for text and 0 for padding.
        """
        encoded = self.encoder(source_bs, attention_mask=attention_mask)
        return self.logits(
            self.hidden(target_bt, encoded, attention_mask=attention_mask, target_mask=target_mask)
        )

    def hidden(
        self,
        target_bt: Tensor,
        encoded_bsm: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The decoder's last states (b, t, m), given what the encoder made of the source.

        A cache keeps what it needs of the source: from the second call on `encoded_bsm` and
        `attention_mask` are left out.
        """
        return self.decoder.hidden(
            target_bt,
            document_ids_bt=target_mask,
            cache=cache,
            source_bsm=encoded_bsm,
            source_mask_bs=attention_mask,
        )

    def logits(self, hidden_btm: Tensor) -> Tensor:
        """Scores of every vocabulary entry: (..., m) -> (..., v)."""
        logits = self.decoder.logits(hidden_btm)
        return logits + self.logits_bias if self.config.logits_bias else logits
