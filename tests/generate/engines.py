"""Engines for tests, and a runner that can be listened to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from llm_from_scratch.generate.engine import Engine, requests_of, room_for
from llm_from_scratch.generate.requests import Feed, NewToken, Request, Writer
from llm_from_scratch.generate.sampling import SamplingSettings


def engine_for(
    model: Writer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    stop: Any = (),
    **options: Any,
) -> Engine:
    """An engine to which the prompts were given, in their order."""
    engine = Engine(model, **{"cache_tokens": room_for(model, prompts, settings), **options})
    for request in requests_of(prompts, settings, frozenset(stop)):
        engine.submit(request)
    return engine


def finish(engine: Engine, most: int = 2000) -> dict[tuple[int, int], list[NewToken]]:
    """All that is still to be written, by request and choice; nothing may then be held."""
    texts: dict[tuple[int, int], list[NewToken]] = {}
    for _ in range(most):
        if not engine.busy:
            break
        for new in engine.step():
            texts.setdefault((new.request, new.choice), []).append(new)
    assert not engine.busy, f"not done after {most} steps"
    assert_empty(engine)
    return texts


def assert_empty(engine: Engine) -> None:
    assert not engine.waiting and not engine.running and not engine.runs
    assert engine.pages.held == 0


def answers(
    model: Writer, request: Request, **options: Any
) -> dict[int, tuple[list[int], str | None]]:
    """Tokens and reason of each text of one request, with an engine to itself."""
    room = room_for(model, [request.prompt], request.settings)
    engine = Engine(model, **{"cache_tokens": room, **options})
    engine.submit(request)
    return {choice: said(new) for (_, choice), new in finish(engine).items()}


def said(new: list[NewToken]) -> tuple[list[int], str | None]:
    return [one.token for one in new], new[-1].finish_reason


class Listening:
    """A runner that keeps the logits that it gave, with the requests that they belong to.

    `read` counts the tokens that went through the model, `passes` how often it ran.
    """

    def __init__(self, engine: Engine) -> None:
        self.inner = engine.runner
        self.pool = engine.runner.pool
        self.leave = engine.runner.leave
        self.heard: list[tuple[list[int], torch.Tensor]] = []
        self.read = self.passes = 0

    def run(self, feeds: Sequence[Feed]) -> torch.Tensor:
        logits = self.inner.run(feeds)
        self.heard.append(([feed.sequence.number for feed in feeds], logits.clone()))
        self.read += sum(len(feed.tokens) for feed in feeds)
        self.passes += 1
        return logits


def listen(engine: Engine) -> Listening:
    engine.runner = listening = Listening(engine)
    return listening
