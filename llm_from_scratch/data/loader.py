"""Packed sequences from a token store: random access by number, so a cursor is one integer.

The stream of a store is cut into windows of `seq_len` inputs. Which window is sequence number `i`
is a pure function of (store, seq_len, seed, i): there is no state to save, resuming is starting
at another number, and data-parallel ranks just ask for different numbers.

Targets are the inputs moved on by one. A target that would be the first token of another document
is IGNORED, and a batch says with `document_ids` which inputs may see each other when a row holds
more than one document (Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination", arXiv:2107.02027).

Legend: `_bt` (batch, time).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.shards import TokenStore

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index

Int64 = npt.NDArray[np.int64]


@dataclasses.dataclass
class Batch:
    """What a training step sees.

    tokens: (batch, time) int64 ids.
    targets: (batch, time) int64 ids of the following tokens; -100 where there is no loss.
    document_ids: (batch, time) int64, equal where two inputs are of the same document (counted
        from 0 in each row), or None if every row lies within one document.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    document_ids: torch.Tensor | None = None


class PackedTokens:
    """The endless, per-epoch shuffled order of a store's windows.

    An epoch has `len(self)` sequences in which every token (but the first of each document) is
    a target exactly once. Each epoch cuts the stream at another phase: its first window counts
    only its first `phase` targets and its last one only what is left, so that all tokens are used
    in every epoch and no token stands always at the same place of its window.

    Args:
        store: the tokens.
        seq_len: inputs per sequence.
        seed: of the shuffling.
        shuffle: False gives the windows in the order of the text, the same in every epoch.

    Raises:
        UserError: the store is shorter than one sequence and its last target.
    """

    def __init__(self, store: TokenStore, seq_len: int, seed: int, shuffle: bool = True) -> None:
        if seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1, not {seq_len}.")
        if len(store) < seq_len + 1:
            raise UserError(
                f"The text is shorter than the context: {store.name} has {len(store):,} tokens, "
                f"but one sequence needs {seq_len + 1:,} (data.seq_len {seq_len:,} and one "
                f"target); give more text or set --data.seq_len to at most {len(store) - 1:,}."
            )
        self.store, self.seq_len, self.seed, self.shuffle = store, seq_len, seed, shuffle
        self._predictable = len(store) - 1  # every token but the stream's first
        windows = -(-self._predictable // seq_len)
        rest = self._predictable - (windows - 1) * seq_len  # 1..seq_len targets in the last one
        # `windows` of them cover the stream with any phase in rest..seq_len, one more with any in
        # 1..rest-1. The wider range is taken, so at least half of all phases are ever used.
        if not shuffle or windows == 1 or rest <= seq_len // 2 or rest == 1:
            self._windows, self._phases = windows, (rest, seq_len)
        else:
            self._windows, self._phases = windows + 1, (1, rest - 1)
        self._orders: dict[int, tuple[int, Int64]] = {}

    def __len__(self) -> int:
        """Sequences per epoch."""
        return self._windows

    def batch(self, start: int, count: int) -> Batch:
        """Sequences number `start` to `start + count - 1` (from 0, over all epochs)."""
        cuts = np.empty((count, 2), dtype=np.int64)
        row = 0
        while row < count:
            epoch, number = divmod(start + row, self._windows)
            phase, order = self._order(epoch)
            rows = min(count - row, self._windows - number)
            window = order[number : number + rows]
            # Window k has the targets (phase + (k-1) * seq_len, phase + k * seq_len].
            cuts[row : row + rows, 1] = window * self.seq_len + phase
            row += rows
        cuts[:, 0] = cuts[:, 1] - self.seq_len
        np.clip(cuts, 0, self._predictable, out=cuts)
        # The first and the last window are as long as the others; what another window counts is
        # IGNORED in them.
        begins = np.minimum(cuts[:, 0], self._predictable - self.seq_len)
        return make_batch(self.store, begins, self.seq_len, cuts[:, 0], cuts[:, 1])

    def _order(self, epoch: int) -> tuple[int, Int64]:
        """The phase of an epoch and its permutation of windows, from the cache or made."""
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a batch may lie across two epochs, seldom more
                self._orders.clear()
            self._orders[epoch] = self._make_order(epoch)
        return self._orders[epoch]

    def _make_order(self, epoch: int) -> tuple[int, Int64]:
        if not self.shuffle:
            return self.seq_len, np.arange(self._windows)
        # Raw bits and a stable sort: unlike Generator.permutation, both are promised by numpy to
        # be the same in every version, and so is a resumed run.
        bits = np.random.PCG64(np.random.SeedSequence([self.seed % 2**64, epoch]))
        low, high = self._phases
        phase = low + int(bits.random_raw()) % (high - low + 1)
        return phase, np.argsort(bits.random_raw(self._windows), kind="stable")


def evaluation_batches(
    store: TokenStore, seq_len: int, batch_size: int, stride: int | None = None
) -> Iterator[Batch]:
    """Every token of the stream as a target exactly once, in order.

    The first token of each document has nothing before it and is no target. With `stride` below
    `seq_len` the windows overlap: each new window counts only the `stride` tokens that the one
    before did not reach, and these see at least `seq_len - stride` tokens of context. The last
    window may be shorter: it is filled up with id 0 at its end, where there is no target, so a
    stream shorter than `seq_len` is fine too.

    Raises `UserError` for a stride outside of 1..seq_len and for a stream without a target.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise UserError(f"The stride must be between 1 and seq_len ({seq_len}), not {stride}.")
    predictable = len(store) - 1
    if predictable < 1:
        raise UserError(f"{store.name} has {len(store)} token: evaluation needs at least 2.")
    begins = np.arange(0, max(1, predictable - seq_len + stride), stride, dtype=np.int64)
    counted_to = np.minimum(begins + seq_len, predictable)
    counted_from = np.concatenate([[0], counted_to[:-1]])
    for row in range(0, len(begins), batch_size):
        rows = slice(row, row + batch_size)
        yield make_batch(store, begins[rows], seq_len, counted_from[rows], counted_to[rows])


def make_batch(
    store: TokenStore, begins: Int64, seq_len: int, counted_from: Int64, counted_to: Int64
) -> Batch:
    """Windows that begin at `begins`; row r counts the targets in (counted_from, counted_to].

    All four are positions in the stream. Targets outside of that range, targets that are the first
    token of a document, and everything behind the stream's end are IGNORED.
    """
    length = seq_len + 1
    window_bt = np.zeros((len(begins), length), dtype=np.int64)
    for row, begin in enumerate(begins.tolist()):
        piece = store.slice(begin, begin + length)
        window_bt[row, : len(piece)] = piece
    tokens_bt, targets_bt = window_bt[:, :-1], window_bt[:, 1:].copy()

    for row in np.flatnonzero((counted_from > begins) | (counted_to < begins + seq_len)).tolist():
        targets_bt[row, : counted_from[row] - begins[row]] = IGNORED
        targets_bt[row, counted_to[row] - begins[row] :] = IGNORED

    document_ids = None
    first = np.searchsorted(store.starts, begins, side="right")
    last = np.searchsorted(store.starts, begins + seq_len, side="right")
    crossing = np.flatnonzero(last > first).tolist()
    if crossing:
        ids_bt = np.zeros(tokens_bt.shape, dtype=np.int64)
        for row in crossing:
            places = store.starts[first[row] : last[row]] - begins[row]  # 1..seq_len
            targets_bt[row, places - 1] = IGNORED
            ids_bt[row, places[places < seq_len]] = 1
        if ids_bt.any():
            document_ids = torch.from_numpy(np.cumsum(ids_bt, axis=1))
    return Batch(
        torch.from_numpy(np.ascontiguousarray(tokens_bt)),
        torch.from_numpy(targets_bt),
        document_ids,
    )
