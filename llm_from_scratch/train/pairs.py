"""Pairs of answers as tensors, and the log-probabilities that a model gave them before training.

Axes: b pairs (2b rows: all chosen, then all rejected), t time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED


@dataclass
class Pair:
    """Both answers with their prompt: ids, and which of them belong to the answer.

    `reference` holds the reference log-probabilities of the answers' tokens, chosen and rejected.
    """

    ids: tuple[list[int], list[int]]
    masks: tuple[list[int], list[int]]
    reference: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return max(map(len, self.ids))


@dataclass
class PairBatch:
    """Rows 0..b-1 hold the chosen answers, rows b..2b-1 the rejected ones of the same pairs.

    tokens, targets: (2b, t) ids, as in `data.loader.Batch`; reference: (2b, t) log-probabilities
    of the targets under the model as it was; read: tokens without padding.
    """

    tokens: Tensor
    targets: Tensor
    reference: Tensor
    read: int

    @property
    def mask(self) -> Tensor:
        """(2b, t): where the answers' tokens are targets."""
        return self.targets != IGNORED


def pad_pairs(items: Sequence[Pair]) -> PairBatch:
    """Pairs as one batch, padded behind their ends."""
    longest = max(map(len, items)) - 1
    tokens = torch.zeros(2 * len(items), longest, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    reference = torch.zeros(tokens.shape)
    for side in range(2):
        for row, item in enumerate(items, side * len(items)):
            ids, mask = torch.tensor(item.ids[side]), torch.tensor(item.masks[side]).bool()
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:].masked_fill(~mask[1:], IGNORED)
            if item.reference is not None:
                reference[row, : len(ids) - 1][mask[1:]] = item.reference[side]
    read = sum(len(ids) - 1 for item in items for ids in item.ids)
    return PairBatch(tokens, targets, reference, read)


# --- the reference in the run folder -------------------------------------------------------------


def keep(items: dict[str, list[Pair]], path: Path) -> None:
    """Store the reference log-probabilities: per part and side one long row of numbers."""
    tensors = {}
    for part, pairs in items.items():
        for side, name in enumerate(("chosen", "rejected")):
            rows = [pair.reference[side] for pair in pairs if pair.reference is not None]
            tensors[f"{part}.{name}"] = torch.cat(rows) if rows else torch.zeros(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}")
    save_file(tensors, aside)
    aside.replace(path)


def take_up(items: dict[str, list[Pair]], path: Path) -> None:
    """Give the pairs of a resumed run what `keep` stored."""
    try:
        tensors = load_file(path)
        for part, pairs in items.items():
            sizes = [[sum(pair.masks[side][1:]) for pair in pairs] for side in range(2)]
            sides = [
                tensors[f"{part}.{name}"].split(sizes[side])
                for side, name in enumerate(("chosen", "rejected"))
            ]
            for pair, chosen, rejected in zip(pairs, *sides, strict=True):
                pair.reference = (chosen, rejected)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path}, the reference log-probabilities, is missing or damaged ({error}). Start a "
            "new run."
        ) from error
