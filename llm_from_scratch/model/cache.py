"""The key-value cache: what attention has already computed, kept for the next token.

Memory is one pool of pages. A page holds the keys and values of `page_size` consecutive positions,
and each row of a batch has a table of its pages, as a process has of its memory (PagedAttention,
arXiv:2309.06180). Rows may therefore begin and end at any time without anything being moved, and
may share pages: a prefix that many texts have in common is there once.

`KVCache` is the view of one pass on its rows. Rows may have different lengths (a batch of unequal
prompts is padded on the right): each writes at its own end, and what lies behind a row's end is
never looked at.

Axes: b rows, k key-value heads, s positions, d features of one head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.config import ModelConfig


class PagePool:
    """Keys and values of all layers: (n_layers, n_kv_heads, slots, head_dim) each.

    A slot is one position; page p is the slots from p * page_size on. In int8 a key is stored as
    its 127 steps and their size: `scales` (2, n_layers, n_kv_heads, slots) in fp32. Bytes taken:
    2 * n_layers * n_kv_heads * slots * (head_dim * bytes of dtype, + 4 in int8).
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_size = page_size
        self.pages = pages
        shape = (config.n_layers, config.n_kv_heads, pages * page_size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            self.scales = torch.zeros((2, *shape[:3]), dtype=torch.float32, device=device)

    @property
    def nbytes(self) -> int:
        scales = 0 if self.scales is None else self.scales.nbytes
        return self.keys.nbytes + self.values.nbytes + scales

    def copy_page(self, source: int, target: int) -> None:
        """Give a row its own copy of a page that it shares and is about to write to."""
        old = slice(source * self.page_size, (source + 1) * self.page_size)
        new = slice(target * self.page_size, (target + 1) * self.page_size)
        for part in (self.keys, self.values, *([] if self.scales is None else [*self.scales])):
            part[:, :, new] = part[:, :, old]


class KVCache:
    """The rows of a pass and where their keys and values are.

    Made directly, it has a pool of its own in which every row has one page of `capacity` positions.
    `KVCache.over` is the view of an engine on rows in a shared pool. `lengths` holds how many
    positions of each row are filled.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int = 1,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        capacity = capacity or config.max_seq_len
        if capacity > config.max_seq_len:
            raise UserError(
                f"A cache of {capacity} positions was asked for, but the model's context is "
                f"{config.max_seq_len} tokens."
            )
        pool = PagePool(config, batch, capacity, dtype, device)
        self._look_at(pool, [[row] for row in range(batch)], [0] * batch)

    @classmethod
    def over(
        cls, pool: PagePool, tables: Sequence[Sequence[int]], lengths: Sequence[int], room: int
    ) -> KVCache:
        """A view on rows of `pool` for a pass of at most `room` tokens.

        Page 0 stands in where a table is too short: what padding writes there, nobody reads.
        """
        cache = cls.__new__(cls)
        longest = max(len(table) for table in tables)
        longest = max(longest, -(-(max(lengths) + room) // pool.page_size))
        filled = [[*table, *[0] * (longest - len(table))] for table in tables]
        cache._look_at(pool, filled, lengths)
        return cache

    def _look_at(self, pool: PagePool, tables: list[list[int]], lengths: Sequence[int]) -> None:
        device = pool.keys.device
        self.pool = pool
        self.tables = tables
        self.capacity = len(tables[0]) * pool.page_size if tables else pool.page_size
        first = torch.tensor(tables, dtype=torch.long, device=device) * pool.page_size
        inside = torch.arange(pool.page_size, device=device)
        self.slots = (first[..., None] + inside).view(len(tables), self.capacity)
        self._step = regular_step(tables)
        self.set_lengths(torch.tensor(lengths, dtype=torch.long, device=device))
        self._new = 0
        self._written: Tensor | None = None
        # Of an encoder-decoder: each layer's keys and values of the source, and who may see it.
        self.source: list[tuple[Tensor, Tensor] | None] = [None] * len(pool.keys)
        self.source_mask: Tensor | None = None

    def set_lengths(self, lengths: Tensor) -> None:
        """Cut each row to its length; used after a padded prompt, and to take tokens back."""
        self.lengths = lengths.to(self.slots.device, torch.long)
        values = self.lengths.tolist()
        self.longest = max(values, default=0)
        # The common length, or None where rows differ.
        self.length: int | None = values[0] if len(set(values)) == 1 else None

    def select(self, rows: Tensor) -> None:
        """Keep only the rows with these numbers, (n,) int64: the others leave the batch."""
        source, mask = self.source, self.source_mask
        tables = [self.tables[row] for row in rows.tolist()]
        self._look_at(self.pool, tables, self.lengths[rows].tolist())
        self.source = [None if pair is None else (pair[0][rows], pair[1][rows]) for pair in source]
        self.source_mask = None if mask is None else mask[rows]

    def start(self, t: int) -> None:
        """Announce t new positions; the layers append them, `finish` makes them count."""
        if self.longest + t > self.capacity:
            raise UserError(
                f"The context is full: {self.longest} + {t} tokens do not fit into "
                f"{self.capacity}. Give a shorter prompt or ask for fewer new tokens."
            )
        self._new = t
        if self.length is None or self._step is None:
            new = torch.arange(t, device=self.slots.device)
            self._written = self.slots.gather(1, self.lengths[:, None] + new)

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


def regular_step(tables: Sequence[Sequence[int]]) -> int | None:
    """The pages from one row's beginning to the next one's, if all rows lie alike in the pool.

    Then a batch is a view of the pool and nothing has to be gathered: one row whose pages follow
    one another, or rows that each have a page of their own. None otherwise.
    """
    if not tables:
        return None
    for table in tables:
        if any(page != table[0] + i for i, page in enumerate(table)):
            return None
    first = [table[0] for table in tables]
    steps = {after - before for before, after in pairwise(first)} or {0}
    step = steps.pop()
    return None if steps or step < 0 else step


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
        pool = self.cache.pool
        if pool.scales is None:
            keys = self._keep(pool.keys[self.index], k_bktd)
            return keys, self._keep(pool.values[self.index], v_bktd)
        keys = self._keep_in_steps(pool.keys[self.index], pool.scales[0, self.index], k_bktd)
        values = self._keep_in_steps(pool.values[self.index], pool.scales[1, self.index], v_bktd)
        return keys, values

    def _keep_in_steps(self, stored: Tensor, scales: Tensor, new_bktd: Tensor) -> Tensor:
        """As `_keep`, in int8: the largest feature of a key becomes 127."""
        scale = new_bktd.float().abs().amax(-1, keepdim=True) / 127
        steps = (new_bktd.float() / scale.clamp(min=1e-30)).round().to(torch.int8)
        sizes = self._keep(scales[..., None], scale)
        return (self._keep(stored, steps).float() * sizes).to(new_bktd.dtype)

    def _keep(self, stored_ksd: Tensor, new_bktd: Tensor) -> Tensor:
        """Write into one layer's keys or values, (k, slots, d); return those of the rows."""
        cache = self.cache
        b, _, t, d = new_bktd.shape
        end = cache.longest + t
        view = None
        if cache._step is not None:
            size = cache.pool.page_size
            start = stored_ksd.storage_offset() + cache.tables[0][0] * size * d
            strides = (cache._step * size * d, stored_ksd.stride(0), d, 1)
            view = stored_ksd.as_strided((b, stored_ksd.shape[0], end, d), strides, start)
        if view is not None and cache.length is not None:
            view[:, :, cache.length : end] = new_bktd
        else:
            assert cache._written is not None
            stored_ksd[:, cache._written] = new_bktd.transpose(0, 1).to(stored_ksd.dtype)
        if view is None:
            view = stored_ksd[:, cache.slots[:, :end]].transpose(0, 1)
        return view if view.dtype == torch.int8 else view.to(new_bktd.dtype)
