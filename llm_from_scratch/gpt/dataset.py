"""Training windows cut out of one long text."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from llm_from_scratch.core.errors import UserError

Window = tuple[Tensor, Tensor]


class Encoder(Protocol):
    """All that is asked of a tokenizer here."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""


class TextDataset(Dataset[Window]):
    """Window number i: tokens i..i+block_size-1 as input, each one's successor as its target.

    Raises `UserError` for a text that is too short for one window and its last target.
    """

    def __init__(self, text: str, tokenizer: Encoder, block_size: int = 128) -> None:
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.tokens = tokenizer.encode(text)
        if block_size < 1 or len(self.tokens) <= block_size:
            raise UserError(
                f"The text has {len(self.tokens)} tokens, but a block_size of {block_size} needs "
                f"{block_size + 1} and at least 2: give more text or another block_size."
            )
        self._ids = torch.tensor(self.tokens, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.tokens) - self.block_size

    def __getitem__(self, i: int) -> Window:
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} of {len(self)}")
        window = self._ids[i : i + self.block_size + 1]
        return window[:-1], window[1:]


def create_dataloaders(
    text: str,
    tokenizer: Encoder,
    block_size: int = 128,
    batch_size: int = 64,
    train_split: float = 0.9,
    num_workers: int = 0,
    seed: int = 0,
) -> tuple[DataLoader[Window], DataLoader[Window]]:
    """Loaders of (x, y) batches, each (batch, block_size) int64, for training and validation.

    The first `train_split` of the text is for training, the rest for validation, so that no
    validation window shares a token with a training window; a rest shorter than one window is made
    long enough for one. Training windows start at every token and come in an order that `seed`
    decides; validation windows stand side by side, so that each target counts once. A
    `train_split` of 1 leaves the validation loader empty.
    """
    if not 0.0 < train_split <= 1.0:
        raise UserError(f"train_split is {train_split}; it must be above 0 and at most 1.")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1.")
    dataset = TextDataset(text, tokenizer, block_size)
    tokens = len(dataset.tokens)
    cut = int(train_split * tokens)
    if train_split < 1.0:
        cut = min(cut, tokens - (block_size + 1))
    if cut <= block_size:
        raise UserError(
            f"The text has {tokens} tokens, too few to cut windows of block_size {block_size} for "
            "training and for validation from it: give more text or a smaller block_size."
        )
    train = Subset(dataset, range(cut - block_size))
    val = Subset(dataset, range(cut, tokens - block_size, block_size))
    pin = torch.cuda.is_available()
    return (
        DataLoader(
            train, batch_size, shuffle=True, num_workers=num_workers, pin_memory=pin,
            generator=torch.Generator().manual_seed(seed),
        ),
        DataLoader(val, batch_size, num_workers=num_workers, pin_memory=pin),
    )  # fmt: skip
