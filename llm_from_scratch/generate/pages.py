"""Who holds which page of the key-value cache, and which texts begin with the same pages.

A page that is full never changes again, so any text that begins with the same tokens may look at
it: a system prompt that every request brings along is computed once. Pages that nobody holds any
more keep what they hold until the room is needed; the one that was used longest ago goes first.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence

ROOT = 0  # the serial number of the empty text


class Pages:
    """The pages 1 to count - 1 of a pool; page 0 is where padding writes."""

    def __init__(self, count: int, page_size: int) -> None:
        self.page_size = page_size
        self.count = count
        self._holders = [0] * count
        self._free = list(range(1, count))  # a heap: low numbers first, so that texts lie together
        self._is_free = [False] + [True] * (count - 1)
        self._n_free = count - 1
        # A full page's text is known by the serial number of the pages before it and its own
        # tokens. Serial numbers are never used twice, so what followed a forgotten page is lost.
        self._by_text: dict[tuple[int, tuple[int, ...]], int] = {}
        self._text_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._serials: dict[int, int] = {}
        self._last_serial = ROOT
        self._idle: OrderedDict[int, None] = OrderedDict()  # known, held by nobody; oldest first

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return self._n_free + len(self._idle)

    @property
    def held(self) -> int:
        """How many pages somebody holds."""
        return self.count - 1 - self.available

    def take(self, after: int | None = None) -> int | None:
        """A page for one holder, the one behind `after` if it is free; None if there is none."""
        if after is not None and after + 1 < self.count and self._is_free[after + 1]:
            page = after + 1
        elif self._n_free:
            page = heapq.heappop(self._free)
            while not self._is_free[page]:  # it was taken out of turn, as a successor
                page = heapq.heappop(self._free)
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
            self._holders[page] = 1
            return page
        else:
            return None
        self._is_free[page] = False
        self._n_free -= 1
        self._holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page that is there."""
        self._idle.pop(page, None)
        self._holders[page] += 1

    def release(self, page: int) -> None:
        """One holder less; without any, its memory can be taken."""
        self._holders[page] -= 1
        if self._holders[page]:
            return
        if page in self._serials:
            self._idle[page] = None
        else:
            self._is_free[page] = True
            self._n_free += 1
            heapq.heappush(self._free, page)
            if len(self._free) > 2 * self.count:  # without those that were taken out of turn
                self._free = [page for page, free in enumerate(self._is_free) if free]

    def remember(self, parent: int, tokens: Sequence[int], page: int) -> int:
        """Make a full page known to texts that begin alike; its text's serial number.

        `parent` is the serial number of the text before it, `ROOT` at the beginning.
        """
        text = (parent, tuple(tokens))
        known = self._by_text.get(text)
        if known is not None:  # another row computed the same; its page is the one to be shared
            return self._serials[known]
        self._last_serial += 1
        self._by_text[text], self._text_of[page] = page, text
        self._serials[page] = self._last_serial
        return self._last_serial

    def find(self, tokens: Sequence[int], root: int = ROOT) -> tuple[list[int], int]:
        """The known pages with which a text begins, now held, and their serial number.

        At least one token is left over: its logits have to be computed. Texts that are read by
        different models (adapters) have different roots, each a number below `ROOT`.
        """
        pages: list[int] = []
        serial, size = root, self.page_size
        for start in range(0, len(tokens) - size, size):
            page = self._by_text.get((serial, tuple(tokens[start : start + size])))
            if page is None:
                break
            self.hold(page)
            pages.append(page)
            serial = self._serials[page]
        return pages, serial

    def forget(self) -> None:
        """Let no text be found any more: the weights have changed. Who holds a page keeps it."""
        for page in list(self._serials):
            self._forget(page)
        idle, self._idle = self._idle, OrderedDict()
        for page in idle:
            self._is_free[page] = True
            self._n_free += 1
            heapq.heappush(self._free, page)

    def _forget(self, page: int) -> None:
        del self._by_text[self._text_of.pop(page)]
        del self._serials[page]
