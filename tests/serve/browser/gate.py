"""A model that takes its steps when the test says so: streams stand still to be looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from llm_from_scratch.generate.engine import Engine
from llm_from_scratch.generate.requests import Feed


class Gate:
    """A runner in front of the engine's own; it is open until `hold` is called.

    `taken` counts the passes of the model. The first pass of a short prompt brings the first token,
    so after `hold(4)` a new answer has four.
    """

    def __init__(self, engine: Engine) -> None:
        self.inner = engine.runner
        self.pool = engine.runner.pool
        self.leave = engine.runner.leave
        self.changed = threading.Condition()
        self.left: int | None = None
        self.taken = 0
        engine.runner = self

    def run(self, feeds: Sequence[Feed]) -> Tensor:
        with self.changed:
            if not self.changed.wait_for(lambda: self.left is None or self.left > 0, timeout=60):
                raise TimeoutError("the test held the model and forgot it")
            if self.left is not None:
                self.left -= 1
            self.taken += 1
        return self.inner.run(feeds)

    def hold(self, after: int = 0) -> None:
        """Let `after` more passes through, then none."""
        with self.changed:
            self.left = after
            self.changed.notify_all()

    def open(self) -> None:
        with self.changed:
            self.left = None
            self.changed.notify_all()

    def give(self, passes: int, until: Callable[[], bool]) -> None:
        """Let passes through one by one until something holds; fails if so many are too few."""
        for _ in range(passes):
            before = self.taken
            self.hold(after=1)
            wait_until(lambda before=before: until() or self.taken > before)
        wait_until(until)


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread brings about; nothing tells when, so it is looked at often."""
    pause = threading.Event()
    for _ in range(int(seconds * 100)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")
