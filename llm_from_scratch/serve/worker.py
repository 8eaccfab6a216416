"""The one thread that computes: all models' engines step in turns, short jobs run in between.

PyTorch, the kernels and the engines have one caller, which shares nothing with the thread that
answers HTTP but an inbox and the pieces that go back through `loop.call_soon_threadsafe`. While
there is nothing to do the thread sleeps on a condition.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.engine import requests_of
from llm_from_scratch.generate.sampling import SamplingSettings
from llm_from_scratch.generate.texts import Piece, TextEngine
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.orders import ACCEPTED, Busy, Desk, Order, TooLong, Watch, Writing

T = TypeVar("T")
__all__ = ["Busy", "TooLong", "Watch", "Worker", "Writing"]

log = logging.getLogger("scratchlm.serve")
FULL = "Too many requests are waiting; try again later."


class Worker:
    """Writes texts for many clients with the models that it is given.

    `write`, `do` and the counts are for the threads of event loops; everything else happens in the
    worker's own thread.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], limits: Limits, watch: Watch | None = None
    ) -> None:
        self.limits = limits
        self.watch = watch or Watch()
        own: dict[int, Desk] = {}  # an adapter is written with at the desk of its base
        self.desks: dict[str, Desk] = {}
        for name, served in models.items():
            host = served if served.host is None else served.host
            self.desks[name] = own.setdefault(id(host), Desk(host))
        self._served = dict(models)
        self._turns = deque(desk for desk in own.values() if desk.served.kind == "writer")
        self._wake = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._outbox: list[tuple[Order, Piece | Exception | None]] = []
        self._stopping = False
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ from outside

    def start(self) -> None:
        """Begin to work."""
        if self._thread is None:
            self._stopping = False
            self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
            self._thread.start()

    def stop(self, seconds: float = 30.0) -> bool:
        """Give up what is unfinished and end the thread; whether it ended in time."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                return False
            self._thread = None
        return True

    @property
    def idle(self) -> bool:
        """Whether nothing is being done, and nothing waits to be."""
        with self._wake:
            waiting = self._inbox or self._jobs
            return not waiting and not any(desk.texts for desk in self.desks.values())

    def write(
        self, name: str, prompts: Sequence[Sequence[int]], settings: SamplingSettings
    ) -> Writing:
        """Continue prompts (token ids) with the model `name`; the pieces come as they are written.

        `row` of a piece is the place of its prompt. Raises `Busy` where the queue is full and
        `TooLong` for a prompt that does not fit; what else is wrong with a request is raised, as
        `UserError`, by `accepted` or in the place of the first piece. A `RunError` may come in the
        place of any.
        """
        desk = self.desks[name]
        context = desk.served.context
        for prompt in prompts:
            if len(prompt) > context:
                raise TooLong(
                    f"This model's maximum context length is {context} tokens, but the prompt has "
                    f"{len(prompt)} tokens. Give a shorter prompt."
                )
        if settings.max_new_tokens > self.limits.max_new_tokens:
            settings = replace(settings, max_new_tokens=self.limits.max_new_tokens)
        texts = len(prompts) * max(settings.n, settings.num_beams)
        self._let_in(desk, texts)
        now = time.monotonic()
        loop = asyncio.get_running_loop()
        order = Order(
            desk, prompts, settings, loop, now, now + self.limits.max_seconds, texts,
            name, self._served[name].adapter,
        )  # fmt: skip
        self._post(lambda: self._begin(order))
        return Writing(order, self.cancel)

    async def do(self, job: Callable[[], T]) -> T:
        """The result of a short job that the worker's thread does between two steps.

        Raises what the job raises, and `Busy` where too many wait.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def run() -> None:
            if future.cancelled():
                return
            try:
                if self._stopping:
                    raise _closing()
                result = job()
            except Exception as error:
                self._call(loop, _settle, future, None, error)
            else:
                self._call(loop, _settle, future, result, None)

        with self._wake:
            if self._stopping:
                raise _closing()
            if len(self._jobs) > self.limits.max_queue:
                raise Busy(FULL)
            self._jobs.append(run)
            self._wake.notify()
        return await future

    def cancel(self, order: Order) -> None:
        """Stop writing for an order that nobody listens to any more, within one step."""
        if not order.over:
            self._post(lambda: self._end(order))

    def end_all(self) -> None:
        """End every text now, with what it has."""

        def cut() -> None:
            for order in self._orders():
                self._cut(order, _closing())

        self._post(cut)

    # ------------------------------------------------------------------ letting in

    def _let_in(self, desk: Desk, texts: int) -> None:
        """Count the texts of an order among the model's, if there is room in the queue."""
        room = self.limits.max_running + self.limits.max_queue
        if texts > room:
            raise UserError(
                f"The request asks for {texts} texts at once, but this server's queue has room for "
                f"{room}. Ask for fewer at a time."
            )
        with self._wake:
            if self._stopping:
                raise _closing()
            if desk.texts + texts > room:
                after = min(60, 1 + desk.waiting // self.limits.max_running)
                raise Busy(FULL, after)
            desk.texts += texts

    def _post(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._inbox.append(call)
            self._wake.notify()

    # ------------------------------------------------------------------ the worker's thread

    def _work(self) -> None:
        while True:
            with self._wake:
                while not (self._inbox or self._jobs or self._stopping or self._any_busy()):
                    self._wake.wait()
                calls, self._inbox = [*self._inbox], deque()
                if self._stopping:
                    break
                if self._jobs:
                    calls.append(self._jobs.popleft())
            for call in [*calls, self._flush, self._turn, self._flush]:
                try:
                    call()
                except Exception:  # a mistake of ours must not end the thread that all wait for
                    log.exception("The worker met an error.")
            del calls, call  # what they hold is not needed while the thread sleeps
        for call in [*calls, *self._jobs]:  # each learns that the end has come
            call()
        self._jobs.clear()
        for order in self._orders():
            self._end(order, _closing())
        self._flush()

    def _any_busy(self) -> bool:
        return any(desk.busy for desk in self._turns)

    def _orders(self) -> list[Order]:
        return [order for desk in self._turns for order in desk.orders]

    def _begin(self, order: Order) -> None:
        """Hand an order to its engine, all of it or nothing."""
        desk = order.desk
        desk.orders[order] = None
        try:
            if self._stopping:
                raise _closing()
            engine = self._engine(desk)
            tokenizer = self._served[order.name].tokenizer
            for row, request in enumerate(requests_of(order.prompts, order.settings)):
                number = engine.submit(request.prompt, request.settings, order.adapter, tokenizer)
                order.rows[number] = row
                desk.by_number[number] = order
        except (UserError, Busy) as error:
            self._end(order, error)
        except Exception as error:
            self._end(order, RunError(_explained(error)))
        else:
            desk.tokens_read += sum(map(len, order.prompts))
            self._tell(order, ACCEPTED)

    def _engine(self, desk: Desk) -> TextEngine:
        if desk.served.engine is None:
            if desk.served.make_engine is None:
                raise UserError(f"The model '{desk.served.name}' writes no texts.")
            desk.served.engine = desk.served.make_engine()
        return desk.served.engine

    def _turn(self) -> None:
        """One step of the next model that has something to write."""
        for _ in range(len(self._turns)):
            desk = self._turns[0]
            self._turns.rotate(-1)
            if desk.busy:
                self._step(desk)
                return

    def _step(self, desk: Desk) -> None:
        engine = desk.engine
        assert engine is not None
        try:
            pieces = engine.step()
        except Exception as error:
            said = _explained(error)
            traceback.clear_frames(error.__traceback__)  # they hold the engine
            del engine
            self._fail(desk, said)
            return
        desk.steps += 1
        for piece in pieces:
            self._pass_on(desk, piece)
        for number in desk.by_number.keys() - engine.engine.runs.keys():
            order = desk.by_number.pop(number)
            del order.rows[number]
            if not order.rows:
                self._end(order)
        for order in desk.late(time.monotonic()):
            self._cut(order, Busy("The request waited too long for its turn; try again later."))

    def _pass_on(self, desk: Desk, piece: Piece) -> None:
        order = desk.by_number.get(piece.row)
        if order is None:
            return
        name = order.name
        if not order.begun:
            order.begun = True
            self.watch.first_token(name, time.monotonic() - order.came)
        desk.tokens_written += len(piece.tokens)
        if piece.result is not None:
            self.watch.text(name, piece.result)
        self._tell(order, replace(piece, row=order.rows[piece.row]))

    def _fail(self, desk: Desk, said: str) -> None:
        """A step went wrong: nobody knows what the engine holds, so all begins anew."""
        desk.served.engine = None
        desk.by_number.clear()
        for order in list(desk.orders):
            order.rows.clear()
            self._end(order, RunError(said))
        gc.collect()  # the old engine's memory is free before the new one takes its own
        with contextlib.suppress(Exception):  # else the next order tries again, and is told
            self._engine(desk)

    def _cut(self, order: Order, nothing: Busy) -> None:
        """End the texts of an order with what they have; `nothing` is said where that is none."""
        engine = order.desk.engine
        assert engine is not None
        pieces = [piece for number in order.rows for piece in engine.end(number)]
        if order.begun or any(piece.tokens for piece in pieces):
            for piece in pieces:
                self._pass_on(order.desk, piece)
            self._end(order)
        else:
            self._end(order, nothing)

    def _end(self, order: Order, error: Exception | None = None) -> None:
        """Nothing more comes for this order; what it still holds is free."""
        if order.over:
            return
        order.over = True
        desk = order.desk
        for number in order.rows:
            desk.by_number.pop(number, None)
            if desk.engine is not None:
                desk.engine.cancel(number)
        order.rows.clear()
        desk.orders.pop(order, None)
        with self._wake:
            desk.texts -= order.texts
        self._tell(order, error)

    # ------------------------------------------------------------------ back to the event loops

    def _tell(self, order: Order, item: Piece | Exception | None) -> None:
        self._outbox.append((order, item))

    def _flush(self) -> None:
        """Hand over what came in this turn, with one call for each event loop."""
        outbox, self._outbox = self._outbox, []
        loops = {order.loop for order, _ in outbox}
        for loop in loops:
            self._call(loop, _put_all, [one for one in outbox if one[0].loop is loop])

    def _call(self, loop: asyncio.AbstractEventLoop, call: Any, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(call, *arguments)


def _put_all(items: list[tuple[Order, Piece | Exception | None]]) -> None:
    for order, item in items:
        order.pieces.put_nowait(item)


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _explained(error: Exception) -> str:
    """What clients are told about an error of the engine; the log has the rest."""
    if isinstance(error, RunError):
        return str(error)
    log.error("The engine failed.", exc_info=error)
    return "The model failed while writing; the server's log says more."


def _closing() -> Busy:
    return Busy("The server is shutting down.", 10, closing=True)
