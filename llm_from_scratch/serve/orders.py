"""What the worker works on: orders, the desk of each model, and what comes back from them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.texts import Piece, Result, TextEngine
from llm_from_scratch.serve.models import ServedModel

ACCEPTED = Piece(-1, "")  # goes ahead of a request's pieces


class Busy(Exception):
    """There is no place for another request now; `after` is when to ask again, in seconds."""

    def __init__(self, message: str, after: int = 1, *, closing: bool = False) -> None:
        super().__init__(message)
        self.after = after
        self.closing = closing


class TooLong(UserError):
    """A prompt does not fit into the model's context."""


class Watch:
    """Who wants to know how the work goes; the worker's thread calls it."""

    def first_token(self, model: str, seconds: float) -> None:
        """A request has its first piece, so long after it came."""

    def text(self, model: str, result: Result) -> None:
        """A text is finished."""


@dataclass(eq=False)
class Order:
    """One call of `write`. `rows` gives the place of each prompt by its number in the engine.

    `name` is the model that was asked for, `adapter` what it is written with at the desk's model.
    """

    desk: Desk
    prompts: Sequence[Sequence[int]]
    settings: SamplingSettings
    loop: asyncio.AbstractEventLoop
    came: float
    deadline: float
    texts: int
    name: str
    adapter: str | None = None
    pieces: asyncio.Queue[Piece | Exception | None] = field(default_factory=asyncio.Queue)
    rows: dict[int, int] = field(default_factory=dict)
    begun: bool = False
    over: bool = False


class Desk:
    """One model with the orders that it works on.

    `texts` counts the texts that were let in and are not finished, under the worker's lock.
    """

    def __init__(self, served: ServedModel) -> None:
        self.served = served
        self.orders: dict[Order, None] = {}  # in the order of their coming, and so of deadlines
        self.by_number: dict[int, Order] = {}
        self.texts = 0
        self.steps = 0
        self.tokens_read = 0
        self.tokens_written = 0

    @property
    def engine(self) -> TextEngine | None:
        return self.served.engine

    @property
    def busy(self) -> bool:
        engine = self.engine
        return engine is not None and engine.busy

    @property
    def running(self) -> int:
        """How many texts are being written."""
        engine = self.engine  # another thread may be making it anew
        return 0 if engine is None else len(engine.engine.running)

    @property
    def waiting(self) -> int:
        """How many texts are waiting to be begun."""
        return max(0, self.texts - self.running)

    def late(self, now: float) -> Iterator[Order]:
        """The orders whose time is over; they came in the order of their deadlines."""
        for order in list(self.orders):
            if order.deadline > now:
                return
            yield order


class Writing(AsyncGenerator[Piece, None]):
    """The pieces of a request, as they come. Closing it, or forgetting it, stops the work."""

    def __init__(self, order: Order, cancel: Callable[[Order], None]) -> None:
        self._order = order
        self._cancel = cancel
        self._ended = False
        self._accepted = False

    async def accepted(self) -> None:
        """Wait until the engine has taken the request; raises `UserError` where it refuses it.

        The first piece says the same, but comes only when there is something to say.
        """
        if not self._accepted:
            self._accepted = await self._next() is ACCEPTED

    async def asend(self, value: None) -> Piece:
        await self.accepted()
        return await self._next()

    async def _next(self) -> Piece:
        if self._ended:
            raise StopAsyncIteration
        try:
            item = await self._order.pieces.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if isinstance(item, Piece):
            return item
        self._ended = True
        if item is None:
            raise StopAsyncIteration
        raise item

    async def athrow(self, *error: Any) -> Piece:
        self._close()
        raise error[0]

    async def aclose(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._cancel(self._order)

    def __del__(self) -> None:
        self._close()
