"""Who looks at whom in one pass through a model, worked out once for all of its layers.

Axes: b batch, t time (queries), s source positions (keys). A mask is boolean and True where a query
may look; it broadcasts to (b, heads, t, s).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.apart import Apart, apart
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import ModelConfig


@dataclass
class Sight:
    """What the tokens of a pass see. `mask` None and `causal`: everything up to themselves."""

    positions: Tensor  # (t,), or (b, t) where rows differ
    mask: Tensor | None
    causal: bool
    window_mask: Tensor | None  # the same two for layers with a window
    window_causal: bool
    angles: Tensor | None = None  # (..., 2, d): cosines and sines of the positions
    window_angles: Tensor | None = None
    bias: Tensor | None = None  # (1 or b, h, t, s): added to the scores
    source: Tensor | None = None  # (b, s, m): the encoded source that cross-attention looks at
    source_mask: Tensor | None = None  # (b, 1, 1, s)
    apart: Apart | None = None  # packed documents in rows of their own, which the masks are for

    @property
    def longest(self) -> int:
        """Tokens of the longest text in sight."""
        if self.apart is not None:
            return self.apart.longest
        rows_differ = self.positions.dim() == 2 and self.positions.numel() > 0
        return int(self.positions.max()) + 1 if rows_differ else self.positions.shape[-1]

    def of(self, window: bool) -> tuple[Tensor | None, bool, Tensor | None]:
        """(mask, causal, angles) for a layer with or without a window.

        A bias makes the mask a tensor of numbers to add: minus infinity where nothing is seen.
        """
        mask, causal = (
            (self.window_mask, self.window_causal) if window else (self.mask, self.causal)
        )
        if self.bias is not None:
            mask = self.bias if mask is None else self.bias.masked_fill(~mask, float("-inf"))
        turned = self.window_angles if window and self.window_angles is not None else self.angles
        return mask, causal, turned

    def look_across(
        self, source_bsm: Tensor | None, mask_bs: Tensor | None, cache: KVCache | None
    ) -> None:
        """Let cross-attention see an encoded source; a cache remembers where it is padding."""
        self.source = source_bsm
        if mask_bs is not None:
            self.source_mask = mask_bs[:, None, None].bool()
        if cache is not None and source_bsm is not None:
            cache.source_mask = self.source_mask
        elif cache is not None:
            self.source_mask = cache.source_mask


def look(
    config: ModelConfig, tokens_bt: Tensor, documents_bt: Tensor | None, cache: KVCache | None
) -> Sight:
    """Positions and masks of a pass.

    `documents_bt` numbers the documents packed into each row: tokens see only their own, whose
    positions count from 0. Padding is such a document. No mask is built where the kernel can do
    without one; that is the fast path. Raises `UserError` for documents with a cache, whose rows
    are one text each.
    """
    if cache is not None:
        if documents_bt is not None:
            raise UserError(
                "A cache and a mask (or numbers of documents) were given together: leave the mask "
                "out, pad on the right, and tell the cache where texts end by `set_lengths`."
            )
        return _look_into_cache(config, tokens_bt.shape[1], cache)
    if documents_bt is not None and config.causal and not config.relative_buckets:
        rows = apart(documents_bt)
        if rows is not None:
            return _look_apart(config, rows)
    steps = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
    windowed = config.window is not None and len(steps) > config.window
    spelled_out = config.causal and config.relative_buckets > 0  # a bias stands on its mask
    if documents_bt is None and not windowed and not spelled_out:
        return Sight(steps, None, config.causal, None, config.causal)
    back = steps[:, None] - steps[None, :]  # how far behind the query a key lies
    positions, mask, causal = steps, None, config.causal
    if documents_bt is not None:
        same = documents_bt[:, :, None] == documents_bt[:, None, :]
        # A token's position is the number of earlier tokens of its document in this row.
        positions = (same & (back > 0)).sum(-1)
        mask = (same & (back >= 0) if config.causal else same)[:, None]
        causal = False
    elif spelled_out:
        mask, causal = back >= 0, False
    if config.window is None or not windowed:
        return Sight(positions, mask, causal, mask, causal)
    near = back < config.window if config.causal else back.abs() <= config.window
    if mask is not None:
        return Sight(positions, mask, causal, mask & near, False)
    seen = near & (back >= 0) if config.causal else near
    return Sight(positions, mask, causal, seen, False)


def _look_apart(config: ModelConfig, rows: Apart) -> Sight:
    """Documents in rows of their own need a mask for their windows alone."""
    if config.window is None or rows.longest <= config.window:
        return Sight(rows.positions, None, True, None, True, apart=rows)
    steps = torch.arange(rows.longest, device=rows.back.device)
    back = steps[:, None] - steps[None, :]
    seen = (back >= 0) & (back < config.window)
    return Sight(rows.positions, None, True, seen, False, apart=rows)


def _look_into_cache(config: ModelConfig, t: int, cache: KVCache) -> Sight:
    positions = cache.positions()
    total = cache.longest + t
    windowed = config.window is not None and total > config.window
    mask, causal = None, False
    if cache.length == 0 and not config.relative_buckets:
        causal = t > 1
    elif cache.length is None or t > 1:
        mask = cache.visible(positions)
    if not windowed:
        return Sight(positions, mask, causal, mask, causal)
    return Sight(positions, mask, causal, cache.visible(positions, config.window), False)
