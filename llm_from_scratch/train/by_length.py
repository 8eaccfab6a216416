"""Examples in an order that puts texts of like length into one batch: less padding to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llm_from_scratch.train.examples import Examples, Item

WINDOW = 16  # batches among which examples are exchanged


class ByLength(Examples[Item]):
    """`Examples` whose batches hold examples of like length (`len`).

    The shuffled order of an epoch is cut into windows of 16 batches. Within a window examples are
    sorted by length, and its batches then stand in an order that is as shuffled as before. As in
    `Examples`, which example is number i depends on nothing but (examples, seed, i).
    """

    def __init__(
        self,
        items: Sequence[Item],
        collate: Callable[[list[Item]], Any],
        seed: int = 0,
        batch_size: int = 1,
    ) -> None:
        super().__init__(items, collate, seed)
        self.batch_size = batch_size
        self._sorted: dict[int, list[int]] = {}

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._sorted:
            order = super()._order(epoch)
            # A batch may lie across two epochs: those of this one begin behind it.
            begun = -epoch * len(order) % self.batch_size
            width = self.batch_size * WINDOW
            found = order[:begun]
            for start in range(begun, len(order), width):
                found += self._by_length(order[start : start + width])
            self._sorted = {epoch: found}
        return self._sorted[epoch]

    def _by_length(self, window: list[int]) -> list[int]:
        size = self.batch_size
        place = {number: at for at, number in enumerate(window)}
        by_length = sorted(window, key=lambda number: (len(self.items[number]), place[number]))  # type: ignore[arg-type]
        batches = [by_length[i : i + size] for i in range(0, len(window), size)]
        last = batches.pop() if len(batches[-1]) < size else []
        # Each batch comes where the example in its middle was.
        batches.sort(key=lambda batch: place[batch[size // 2]])
        return [number for batch in batches for number in batch] + last
