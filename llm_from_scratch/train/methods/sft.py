"""Supervised fine-tuning: a model learns to write the answers of conversations.

Axes: b batch, t time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED, Batch
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.chat import ChatTokens, encode_chat
from llm_from_scratch.train.losses import LossSum, next_token_loss_sum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome
from llm_from_scratch.weights.assemble import Model


@dataclass(frozen=True)
class SftSettings:
    """How conversations are read."""

    template: str | None = None
    """The chat template: a name, or Jinja; default the model's own."""
    loss_on: str = "answers"
    """answers (the assistant's words alone) or all tokens."""

    def __post_init__(self) -> None:
        if self.loss_on not in ("answers", "all"):
            raise UserError(f"sft.loss_on is '{self.loss_on}'; it must be answers or all.")


@dataclass(frozen=True)
class SftConfig(FinetuneConfig):
    """A complete run of `finetune sft`."""

    method: str = "sft"
    sft: SftSettings = field(default_factory=SftSettings)


class Sft(FinetuneMethod):
    """Cross-entropy of each next token of the answers."""

    Config = SftConfig
    config: SftConfig

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        if "messages" not in values:
            raise BadRow("has no 'messages'.")
        return {"messages": values["messages"]}

    def text_of(self, values: dict[str, Any]) -> str:
        return "\n".join(message["content"] for message in values["messages"])

    def open(self) -> Model:
        model = self.open_with()
        self.limit = self.longest(model)
        return model

    def encode(self, values: dict[str, Any]) -> ChatTokens:
        tokens = encode_chat(self.tokenizer, values["messages"], template=self.config.sft.template)
        if len(tokens.ids) > self.limit:
            raise BadRow(f"has {len(tokens.ids)} tokens, more than {self.limit}; cut it.")
        return tokens

    def collate(self, items: list[ChatTokens]) -> Batch:
        longest = max(len(item.ids) for item in items)
        ids, targets = [], []
        for item in items:
            room = longest - len(item.ids)
            on = item.mask if self.config.sft.loss_on == "answers" else [1] * len(item.ids)
            wanted = [i if m else IGNORED for i, m in zip(item.ids, on, strict=True)]
            ids.append([*item.ids, *[0] * room])
            targets.append([*wanted, *[IGNORED] * room])
        tokens = torch.tensor(ids)
        return Batch(tokens[:, :-1], torch.tensor(targets)[:, 1:])

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens, document_ids_bt=batch.document_ids)
        loss_sum = next_token_loss_sum(model, hidden, batch.targets)
        return LossSum(loss_sum, (batch.targets != IGNORED).sum(), tokens=batch.tokens.numel())

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        return Outcome()
