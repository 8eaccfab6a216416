"""Examples by number: whatever a method learns from, in an order that is shuffled every epoch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from llm_from_scratch.core.errors import UserError

Item = TypeVar("Item")


class Examples(Generic[Item]):
    """Examples by number, shuffled anew in each epoch, and put together by `collate`.

    Which example is number i depends on (examples, seed, i) alone: a resumed run sees the same
    ones.
    """

    def __init__(
        self, items: Sequence[Item], collate: Callable[[list[Item]], Any], seed: int = 0
    ) -> None:
        if not items:
            raise UserError("There is no example to learn from; give at least one.")
        self.items, self.collate, self.seed = items, collate, seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        """Examples per epoch."""
        return len(self.items)

    def batch(self, start: int, count: int) -> Any:
        """Examples number `start` to `start + count - 1` (from 0, over all epochs)."""
        return self.collate([self.item(number) for number in range(start, start + count)])

    def item(self, number: int) -> Item:
        """Example `number` of the endless order."""
        epoch, place = divmod(number, len(self.items))
        return self.items[self._order(epoch)[place]]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            # Raw bits and a stable sort are promised to be the same in every version of numpy.
            bits = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, epoch]))
            order = np.argsort(bits.random_raw(len(self.items)), kind="stable")
            self._orders = {epoch: order.tolist()}  # a batch seldom lies across two epochs
        return self._orders[epoch]
