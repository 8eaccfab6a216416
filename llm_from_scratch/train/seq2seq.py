"""Teaching an encoder-decoder: from pairs of texts, the second given the first.

The decoder sees the target moved on by one behind the start token, and learns at each place which
token comes next (teacher forcing; Sutskever et al., arXiv:1409.3215).

Axes: b batch, s source positions, t target positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.train.losses import LossSum, next_token_loss_sum

Ids = Sequence[int]


@dataclass
class Seq2SeqBatch:
    """Sources and what is to be written for them.

    source: (b, s) ids; source_mask: (b, s), 1 for text and 0 for padding; labels: (b, t) ids, -100
    (IGNORED) where there is no loss, as behind the end of a text.
    """

    source: Tensor
    source_mask: Tensor
    labels: Tensor


def pad_pairs(pairs: Sequence[tuple[Ids, Ids]], end_id: int | None = None) -> Seq2SeqBatch:
    """Pairs of source and target ids as one batch; `end_id` is put behind each target."""
    end = [] if end_id is None else [end_id]
    sources = [list(source) for source, _ in pairs]
    targets = [[*target, *end] for _, target in pairs]
    if not all(sources) or not all(targets):
        raise UserError("A pair has no source or no target; leave it out.")

    def filled(rows: list[list[int]], by: int) -> Tensor:
        longest = max(map(len, rows))
        return torch.tensor([row + [by] * (longest - len(row)) for row in rows])

    mask = filled([[1] * len(source) for source in sources], 0)
    return Seq2SeqBatch(filled(sources, 0), mask, filled(targets, IGNORED))


def decoder_input(labels_bt: Tensor, start_id: int) -> Tensor:
    """What the decoder sees while it is to write the labels: (b, t).

    The labels moved on by one behind the start token, which also stands where there is no label.
    """
    start_b1 = labels_bt.new_full((len(labels_bt), 1), start_id)
    moved_bt = torch.cat([start_b1, labels_bt[:, :-1]], dim=1)
    return moved_bt.masked_fill(moved_bt == IGNORED, start_id)


class Seq2Seq:
    """Cross-entropy of each next target token, given the source and the target before it."""

    def step(self, model: nn.Module, batch: Seq2SeqBatch) -> LossSum:
        assert isinstance(model, EncoderDecoder)
        seen = decoder_input(batch.labels, model.config.start_id)
        encoded = model.encoder(batch.source, attention_mask=batch.source_mask)
        hidden = model.hidden(seen, encoded, attention_mask=batch.source_mask)
        loss_sum = next_token_loss_sum(model, hidden, batch.labels)
        count = (batch.labels != IGNORED).sum()
        return LossSum(loss_sum, count, tokens=int(batch.source_mask.sum() + count))
