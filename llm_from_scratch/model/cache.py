"""The static key-value cache: what attention has already computed, kept for the next token.

Memory is taken once, for `capacity` positions of `batch` rows. Rows may have different lengths (a
batch of unequal prompts is padded on the right): each row writes at its own end, and what lies
behind a row's end is never looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig


class KVCache:
    """Keys and values of all layers, (batch, n_kv_heads, capacity, head_dim) each.

    `lengths` holds how many positions of each row are filled. Bytes taken:
    2 * n_layers * batch * n_kv_heads * capacity * head_dim * bytes of dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity or config.max_seq_len
        if self.capacity > config.max_seq_len:
            raise UserError(
                f"A cache of {self.capacity} positions was asked for, but the model's context is "
                f"{config.max_seq_len} tokens."
            )
        shape = (config.n_layers, batch, config.n_kv_heads, self.capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.length: int | None = 0  # the common length, or None where rows differ
        self.longest = 0
        self._new = 0
        # Of an encoder-decoder: each layer's keys and values of the source, and who may see it.
        self.source: list[tuple[Tensor, Tensor] | None] = [None] * config.n_layers
        self.source_mask: Tensor | None = None

    def set_lengths(self, lengths: Tensor) -> None:
        """Cut each row to its length; used after a padded prompt, and to take tokens back."""
        self.lengths = lengths.to(self.lengths)
        values = self.lengths.tolist()
        self.longest = max(values, default=0)
        self.length = values[0] if len(set(values)) == 1 else None

    def select(self, rows: Tensor) -> None:
        """Keep only the rows with these numbers, (n,) int64: the others leave the batch."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.source = [
            None if pair is None else (pair[0][rows], pair[1][rows]) for pair in self.source
        ]
        self.source_mask = None if self.source_mask is None else self.source_mask[rows]
        self.set_lengths(self.lengths[rows])

    def start(self, t: int) -> None:
        """Announce t new positions; the layers append them, `finish` makes them count."""
        if self.longest + t > self.capacity:
            raise UserError(
                f"The context is full: {self.longest} + {t} tokens do not fit into "
                f"{self.capacity}. Give a shorter prompt or ask for fewer new tokens."
            )
        self._new = t

    def finish(self) -> None:
        self.lengths = self.lengths + self._new
        self.longest += self._new
        if self.length is not None:
            self.length += self._new
        self._new = 0

    def positions(self) -> Tensor:
        """The positions of the announced tokens: (t,) where rows agree, else (batch, t)."""
        new = torch.arange(self._new, device=self.lengths.device)
        return new + self.length if self.length is not None else self.lengths[:, None] + new

    def visible(self, positions: Tensor, window: int | None = None) -> Tensor:
        """Boolean (1 or batch, 1, t, s): a token at position p sees the positions up to p.

        With a `window`, only the last that many of these.
        """
        back = positions[..., None] - torch.arange(
            self.longest + self._new, device=positions.device
        )
        seen = back >= 0 if window is None else (back >= 0) & (back < window)
        return seen[None, None] if seen.dim() == 2 else seen[:, None]

    def layer(self, index: int) -> LayerCache:
        return LayerCache(self, index)


class LayerCache:
    """One layer's view of the cache."""

    def __init__(self, cache: KVCache, index: int) -> None:
        self.cache = cache
        self.index = index

    def look_across(self, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The source's keys and values: made at the first call, then kept."""
        pair = self.cache.source[self.index]
        if pair is None:
            pair = self.cache.source[self.index] = make()
        return pair

    def append(self, k_bktd: Tensor, v_bktd: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values; return all that may be looked at, (b, k, s, d) each."""
        cache = self.cache
        keys, values = cache.keys[self.index], cache.values[self.index]
        t = k_bktd.shape[2]
        if cache.length is not None:
            keys[:, :, cache.length : cache.length + t] = k_bktd
            values[:, :, cache.length : cache.length + t] = v_bktd
        else:
            row = torch.arange(keys.shape[0], device=keys.device)[:, None]
            where = cache.lengths[:, None] + torch.arange(t, device=keys.device)
            keys[row, :, where] = k_bktd.transpose(1, 2).to(keys.dtype)
            values[row, :, where] = v_bktd.transpose(1, 2).to(values.dtype)
        end = cache.longest + t
        return keys[:, :, :end].to(k_bktd.dtype), values[:, :, :end].to(v_bktd.dtype)
