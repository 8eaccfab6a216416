"""One pass of a model for many texts at once, each with its own length and its own pages.

`PlainRunner` works for every model on every device: it puts what is alike into rectangles and calls
the model as anyone would. `fast.py` has its twin for the processors that kernels are built for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as Many
from typing import Protocol

import torch
from torch import Tensor

from llm_from_scratch.generate.requests import Feed, Sequence, Writer, writing_stack
from llm_from_scratch.model.adapters import rows_with
from llm_from_scratch.model.cache import KVCache, PagePool
from llm_from_scratch.model.decoder import Block
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.lora import switch_of


class Runner(Protocol):
    """What an engine needs of a model."""

    pool: PagePool

    def run(self, feeds: Many[Feed]) -> Tensor:
        """The logits (sum of the feeds' `want`, vocab) in fp32, feed after feed.

        Keys and values of the tokens are written into the sequences' pages, which have room.
        """

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""


def padded(rows: Many[Many[int]], device: torch.device) -> Tensor:
    """(rows, longest) ids; what stands behind a row's end is never looked at."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def rectangles(feeds: Many[Feed]) -> Iterator[list[int]]:
    """Places of the feeds that can go through the model as one batch.

    Continued texts must bring equally many tokens. New texts are padded to the longest, but not by
    more than a third, as padding costs what text does.
    """
    groups: dict[tuple[bool, int], list[int]] = {}
    for place in sorted(range(len(feeds)), key=lambda place: -len(feeds[place].tokens)):
        feed, t = feeds[place], len(feeds[place].tokens)
        fresh = feed.sequence.cached == 0
        room = next((key for key in groups if key == (fresh, t) or (fresh and fits(key, t))), None)
        groups.setdefault(room or (fresh, t), []).append(place)
    yield from groups.values()


def fits(key: tuple[bool, int], t: int) -> bool:
    fresh, longest = key
    return fresh and 3 * t >= 2 * longest


class PlainRunner:
    """Any decoder or encoder-decoder, through its own `forward` in PyTorch."""

    def __init__(self, model: Writer, pool: PagePool) -> None:
        self.model = model
        self.pool = pool
        self.switch = switch_of(model)
        self._company: list[Sequence] = []  # whose sources the two below are, row by row
        self._sources: list[tuple[Tensor, Tensor] | None] = []
        self._source_mask: Tensor | None = None

    @torch.inference_mode()
    def run(self, feeds: Many[Feed]) -> Tensor:
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            wanted: list[Tensor | None] = [None] * len(feeds)
            for places in rectangles(feeds):
                group = [feeds[place] for place in places]
                for place, feed, hidden in zip(places, group, self._hidden(group), strict=True):
                    end = len(feed.tokens)
                    wanted[place] = hidden[end - feed.want : end]
            hidden_nm = torch.cat([one for one in wanted if one is not None])
            with self._adapters([feed.sequence for feed in feeds for _ in range(feed.want)]):
                return self.model.logits(hidden_nm).float()
        finally:
            if was_training:
                self.model.train()

    def leave(self, sequence: Sequence) -> None:
        """Let go of the sources that it was among."""
        if sequence in self._company:
            self._company, self._sources, self._source_mask = [], [], None

    def _hidden(self, feeds: list[Feed]) -> Tensor:
        """The last states of a rectangle, (b, t, m)."""
        longest = max(len(feed.tokens) for feed in feeds)
        sequences = [feed.sequence for feed in feeds]
        cache = KVCache.over(
            self.pool, [s.table for s in sequences], [s.cached for s in sequences], room=longest
        )
        if isinstance(self.model, EncoderDecoder):
            self._gather_sources(sequences)
            cache.source, cache.source_mask = list(self._sources), self._source_mask
        tokens_bt = padded([feed.tokens for feed in feeds], self.pool.keys.device)
        with self._adapters(sequences):
            return self.model.hidden(tokens_bt, cache=cache)

    def _adapters(self, sequences: Many[Sequence]) -> contextlib.AbstractContextManager[None]:
        """Each row of a batch goes through the adapter of its request."""
        if self.switch is None:
            return contextlib.nullcontext()
        names = [sequence.request.adapter or None for sequence in sequences]
        return rows_with(self.switch, names, self.pool.keys.device)

    def _gather_sources(self, sequences: list[Sequence]) -> None:
        """What cross-attention looks at, as one batch; made anew only when the company changes."""
        self._read(sequences)
        if sequences == self._company:
            return
        self._company = sequences
        sources = [one.source for one in sequences if one.source is not None]
        lengths = torch.tensor([source[0][0].shape[1] for source in sources])
        longest = int(lengths.max())
        self._sources = []
        for layers in zip(*sources, strict=True):
            k, v = (
                torch.nn.utils.rnn.pad_sequence(
                    [one[part].transpose(0, 1) for one in layers], batch_first=True
                ).transpose(1, 2)
                for part in (0, 1)
            )
            self._sources.append((k, v))
        self._source_mask = None
        if bool((lengths < longest).any()):
            mask_bs = torch.arange(longest) < lengths[:, None]
            self._source_mask = mask_bs[:, None, None].to(self.pool.keys.device)

    def _read(self, sequences: list[Sequence]) -> None:
        """Let the encoder read the sources that are new, and keep each layer's keys and values.

        The texts of one request have one source.
        """
        model = self.model
        assert isinstance(model, EncoderDecoder)
        known = {one.number: one.source for one in sequences if one.source is not None}
        first = {one.number: one for one in reversed(sequences) if one.number not in known}
        new = {number: one.request.prompt for number, one in first.items()}
        if new:
            device = self.pool.keys.device
            lengths = torch.tensor([len(source) for source in new.values()], device=device)
            source_bs = padded(list(new.values()), device)
            mask_bs = torch.arange(source_bs.shape[1], device=device) < lengths[:, None]
            whole = bool(mask_bs.all())
            blocks = [block for block in writing_stack(model).blocks if isinstance(block, Block)]
            with self._adapters(list(first.values())):
                encoded_bsm = model.encoder(source_bs, attention_mask=None if whole else mask_bs)
                pairs = [block.cross.source_keys_values(encoded_bsm) for block in blocks]
            for row, (number, source) in enumerate(new.items()):
                s = len(source)
                known[number] = [(k[row, :, :s].clone(), v[row, :, :s].clone()) for k, v in pairs]
        for one in sequences:
            one.source = known[one.number]
