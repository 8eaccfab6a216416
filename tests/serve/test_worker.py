"""The thread that computes: what it writes, how it shares itself, what happens when it fails."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.generate.texts import Piece, Result
from llm_from_scratch.serve.limits import Limits
from llm_from_scratch.serve.models import ServedModel
from llm_from_scratch.serve.orders import Watch
from llm_from_scratch.serve.worker import Busy, TooLong, Worker
from llm_from_scratch.text.tokenizer import Tokenizer

Writer = Callable[..., ServedModel]
PATIENCE = 60.0


def settings(**fields: Any) -> SamplingSettings:
    return SamplingSettings(**{"max_new_tokens": 12, "seed": 1, **fields})


@pytest.fixture
def hire() -> Iterator[Callable[..., Worker]]:
    """hire(served, ...) is a worker that works for these models until the test is over."""
    hired: list[Worker] = []

    def make(*models: ServedModel, limits: Limits | None = None, **options: Any) -> Worker:
        worker = Worker({one.name: one for one in models}, limits or Limits(), **options)
        hired.append(worker)
        worker.start()
        return worker

    yield make
    for worker in hired:
        assert worker.stop()


async def read(worker: Worker, prompt: list[int], name: str = "tiny", **fields: Any) -> list[Piece]:
    return [piece async for piece in worker.write(name, [prompt], settings(**fields))]


def text_of(pieces: list[Piece], row: int = 0, choice: int = 0) -> str:
    return "".join(piece.text for piece in pieces if (piece.row, piece.choice) == (row, choice))


def run(work: Awaitable[Any]) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await work

    return asyncio.run(limited())


class Paused:
    """An engine's step that waits for a permit; `done` counts the steps that were taken."""

    def __init__(self, served: ServedModel) -> None:
        assert served.engine is not None
        self.step = served.engine.step
        self.permits = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.done = 0
        served.engine.step = self  # type: ignore[method-assign]

    def __call__(self) -> list[Piece]:
        self.asked.release()
        assert self.permits.acquire(timeout=PATIENCE)
        self.done += 1
        return self.step()

    def wait(self) -> None:
        """Wait until the worker wants to take a step."""
        assert self.asked.acquire(timeout=PATIENCE)


def test_answers_are_those_of_the_model_alone(
    writer: Writer, hire: Callable[..., Worker], tokenizer: Tokenizer
) -> None:
    served = writer()
    worker = hire(served)
    prompts = [tokenizer.encode(text) for text in ("Once", "むかし", "The king", "Once upon")]

    async def all_at_once() -> list[list[Piece]]:
        asked = [read(worker, prompt, seed=i, n=2) for i, prompt in enumerate(prompts)]
        return await asyncio.gather(*asked)

    answers = run(all_at_once())
    for i, (prompt, pieces) in enumerate(zip(prompts, answers, strict=True)):
        alone = complete(served.model, tokenizer, [prompt], max_new_tokens=12, seed=i, n=2)
        found = {piece.choice: piece.result for piece in pieces if piece.result is not None}
        for result in alone:
            assert found[result.choice].tokens == result.tokens
            assert text_of(pieces, 0, result.choice) == result.text
    desk = worker.desks["tiny"]
    assert worker.idle and desk.texts == 0 and desk.engine.engine.pages.held == 0
    assert desk.tokens_written == 8 * 12
    assert desk.tokens_read == sum(map(len, prompts))


def test_rows_are_the_places_of_the_prompts(
    writer: Writer, hire: Callable[..., Worker], tokenizer: Tokenizer
) -> None:
    served = writer()
    worker = hire(served)
    prompts = [tokenizer.encode("The end"), tokenizer.encode("Once")]

    async def both() -> list[Piece]:
        return [piece async for piece in worker.write("tiny", prompts, settings(temperature=0.0))]

    async def twice() -> list[Piece]:
        await both()
        return await both()

    pieces = run(twice())
    alone = complete(served.model, tokenizer, prompts, max_new_tokens=12, temperature=0.0)
    assert [text_of(pieces, row) for row in (0, 1)] == [result.text for result in alone]


def test_wrong_requests_are_refused_before_the_first_piece(
    writer: Writer, hire: Callable[..., Worker]
) -> None:
    worker = hire(writer())

    async def ask() -> None:
        with pytest.raises(TooLong, match="maximum context length is 512 tokens"):
            worker.write("tiny", [[1] * 513], settings())
        with pytest.raises(UserError, match="queue has room for 320"):
            worker.write("tiny", [[1]], settings(n=321))
        wrong = worker.write("tiny", [[1], [10_000]], settings())
        with pytest.raises(UserError, match="token id 10000"):
            await wrong.accepted()
        with pytest.raises(UserError, match="logit_bias"):
            await anext(worker.write("tiny", [[1]], settings(logit_bias={9999: 1.0})))
        assert len(await read(worker, [1])) > 0

    run(ask())
    assert worker.idle


def test_a_full_queue_is_said(writer: Writer, hire: Callable[..., Worker]) -> None:
    served = writer()
    paused = Paused(served)
    worker = hire(served, limits=Limits(max_running=1, max_queue=2))

    async def crowd() -> None:
        asked = [worker.write("tiny", [[1]], settings()) for _ in range(3)]
        with pytest.raises(Busy) as refused:
            worker.write("tiny", [[1]], settings())
        assert refused.value.after >= 1 and not refused.value.closing
        await asyncio.to_thread(paused.wait)
        await asked[0].aclose()
        paused.permits.release(1000)
        assert len([piece async for piece in asked[1]]) > 0
        assert len([piece async for piece in asked[2]]) > 0
        assert len(await read(worker, [1])) > 0

    run(crowd())
    assert worker.idle


@pytest.mark.parametrize("how", ["close", "cancel", "forget"])
def test_nobody_listening_stops_the_work_within_one_step(
    how: str, writer: Writer, hire: Callable[..., Worker]
) -> None:
    served = writer()
    paused = Paused(served)
    worker = hire(served)

    async def leave() -> None:
        writing = worker.write("tiny", [[1]], settings(max_new_tokens=400))
        await asyncio.to_thread(paused.wait)
        if how == "close":
            async with aclosing(writing):
                pass
        elif how == "cancel":
            reading = asyncio.create_task(anext(writing))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        del writing
        gc.collect()
        paused.permits.release(1000)
        await worker.do(lambda: None)  # behind the step that was being taken
        await worker.do(lambda: None)

    run(leave())
    assert paused.done == 1
    assert worker.idle and served.engine.engine.pages.held == 0


def test_a_sleeping_worker_takes_no_steps(writer: Writer, hire: Callable[..., Worker]) -> None:
    worker = hire(writer())
    turns = 0
    turn = worker._turn

    def counted() -> None:
        nonlocal turns
        turns += 1
        turn()

    worker._turn = counted  # type: ignore[method-assign]

    async def work() -> None:
        await read(worker, [1], max_new_tokens=3)
        before = turns
        for _ in range(5):
            await asyncio.sleep(0.01)
        assert turns == before
        await read(worker, [1], max_new_tokens=3)

    run(work())


def test_models_step_in_turns(writer: Writer, hire: Callable[..., Worker]) -> None:
    models = [replace(writer(), name=name) for name in ("a", "b", "c")]
    order: list[str] = []
    for served in models:
        step = served.engine.step

        def noted(name: str = served.name, step: Callable[[], list[Piece]] = step) -> list[Piece]:
            order.append(name)
            return step()

        served.engine.step = noted  # type: ignore[method-assign]
    worker = Worker({served.name: served for served in models}, Limits())

    async def ask() -> None:
        asked = [read(worker, [1], name=name, max_new_tokens=5) for name in ("a", "a", "b", "c")]
        tasks = [asyncio.create_task(one) for one in asked]
        await asyncio.sleep(0)
        worker.start()
        await asyncio.gather(*tasks)

    run(ask())
    assert worker.stop()
    assert "".join(order) == "abc" * 5


def test_jobs_run_between_steps(writer: Writer, hire: Callable[..., Worker]) -> None:
    served = writer()
    worker = hire(served)
    threads = set()

    def job() -> int:
        threads.add(threading.current_thread().name)
        return worker.desks["tiny"].steps

    async def work() -> list[int]:
        reading = asyncio.create_task(read(worker, [1], max_new_tokens=100, temperature=0.0))
        await asyncio.sleep(0)
        steps = [await worker.do(job) for _ in range(10)]
        await reading
        return steps

    steps = run(work())
    assert threads == {"worker"}
    # One job and one step in turns: neither waits for all of the other.
    assert steps == sorted(steps) and steps[-1] < 100


def test_what_a_job_raises_comes_back(writer: Writer, hire: Callable[..., Worker]) -> None:
    worker = hire(writer())

    def broken() -> None:
        raise ZeroDivisionError("of the job")

    async def work() -> int:
        with pytest.raises(ZeroDivisionError, match="of the job"):
            await worker.do(broken)
        return await worker.do(lambda: 7)

    assert run(work()) == 7


def test_a_job_that_nobody_waits_for_is_left_out(
    writer: Writer, hire: Callable[..., Worker]
) -> None:
    worker = hire(writer())
    begun, go, done = threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        assert go.wait(PATIENCE)

    async def work() -> None:
        held = asyncio.create_task(worker.do(first))
        await asyncio.to_thread(begun.wait, PATIENCE)
        second = asyncio.create_task(worker.do(lambda: done.append(2)))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        go.set()
        await held
        await worker.do(lambda: done.append(3))

    run(work())
    assert done == [3]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RunError("The output is not a number."), "The output is not a number."),
        (RuntimeError("CUDA error: secrets"), "The model failed while writing"),
    ],
)
def test_a_step_that_fails_is_told_to_all_and_survived(
    error: Exception, said: str, writer: Writer, hire: Callable[..., Worker], caplog: Any
) -> None:
    broken, sound = writer(), replace(writer(), name="other")
    worker = hire(broken, sound)
    old, calls = broken.engine, 0
    step = broken.engine.step

    def failing() -> list[Piece]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise error
        return step()

    broken.engine.step = failing  # type: ignore[method-assign]

    async def work() -> list[Any]:
        asked = [read(worker, [1], seed=i, max_new_tokens=50) for i in range(3)]
        asked.append(read(worker, [1], name="other", max_new_tokens=50))
        *failed, whole = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(one, RunError) and str(one).startswith(said) for one in failed)
        assert whole[-1].result is not None
        return await read(worker, [1])

    assert text_of(run(work())) != ""
    assert broken.engine is not old
    assert worker.idle


def test_a_model_whose_output_is_not_a_number(
    writer: Writer, hire: Callable[..., Worker], tokenizer: Tokenizer
) -> None:
    served = writer(tie_embeddings=False)
    weight = served.model.embedding.weight  # type: ignore[union-attr]
    poison = tokenizer.encode("🙂")
    with torch.no_grad():
        weight[poison[0]] = float("nan")
    worker = hire(served)

    async def work() -> list[Piece]:
        with pytest.raises(RunError, match="NaN"):
            await read(worker, poison)
        return await read(worker, [1], logit_bias={poison[0]: -100.0})

    assert run(work())[-1].result is not None


def test_an_engine_that_cannot_be_made_anew_is_tried_again(
    writer: Writer, hire: Callable[..., Worker]
) -> None:
    served = writer()
    make, tries = served.make_engine, 0

    def no_memory() -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise MemoryError
        return make()

    def fail() -> list[Piece]:
        raise RuntimeError("out of memory")

    served.make_engine = no_memory
    served.engine.step = fail  # type: ignore[method-assign]
    worker = hire(served)

    async def work() -> None:
        for _ in range(2):
            with pytest.raises(RunError):
                await read(worker, [1])
        assert len(await read(worker, [1])) > 0

    run(work())
    assert tries == 3 and worker.idle


def test_the_time_limit_ends_a_text_with_what_it_has(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = writer(Limits(max_running=1))
    worker = Worker({"tiny": served}, Limits(max_seconds=100, max_running=1))
    step, steps = served.engine.step, 0

    class Clock:
        now = 1000.0
        monotonic = staticmethod(lambda: Clock.now)

    monkeypatch.setattr("llm_from_scratch.serve.worker.time", Clock)

    def slow() -> list[Piece]:
        nonlocal steps
        steps += 1
        Clock.now += 10.0
        return step()

    served.engine.step = slow  # type: ignore[method-assign]

    async def work() -> tuple[list[Piece], Any]:
        writes = asyncio.create_task(read(worker, [1], max_new_tokens=300, temperature=0.0))
        await asyncio.sleep(0)
        waits = asyncio.create_task(read(worker, [1]))
        await asyncio.sleep(0)
        worker.start()
        return tuple(await asyncio.gather(writes, waits, return_exceptions=True))  # type: ignore

    pieces, error = run(work())
    result = pieces[-1].result
    assert result.finish_reason == "length"
    assert 0 < len(result.tokens) == steps < 300
    assert text_of(pieces) == result.text
    assert [token for piece in pieces for token in piece.tokens] == result.tokens
    assert isinstance(error, Busy)
    assert worker.idle and worker.stop()


def test_more_tokens_than_the_limit_are_not_written(
    writer: Writer, hire: Callable[..., Worker]
) -> None:
    worker = hire(writer(), limits=Limits(max_new_tokens=7))
    result = run(read(worker, [1], max_new_tokens=100, temperature=0.0))[-1].result
    assert (len(result.tokens), result.finish_reason) == (7, "length")


def test_stopping_tells_everybody(writer: Writer) -> None:
    served = writer()
    paused = Paused(served)
    worker = Worker({"tiny": served}, Limits())
    worker.start()

    async def work() -> None:
        writing = asyncio.create_task(read(worker, [1], max_new_tokens=400))
        await asyncio.to_thread(paused.wait)
        late = asyncio.create_task(read(worker, [1]))
        job = asyncio.create_task(worker.do(lambda: 1))
        await asyncio.sleep(0)
        stopping = asyncio.create_task(asyncio.to_thread(worker.stop))
        while not worker._stopping:
            await asyncio.sleep(0)
        paused.permits.release(1000)
        for one in await asyncio.gather(writing, late, job, return_exceptions=True):
            assert isinstance(one, Busy) and one.closing
        assert await stopping
        with pytest.raises(Busy):
            worker.write("tiny", [[1]], settings())
        with pytest.raises(Busy):
            await worker.do(lambda: 1)

    run(work())
    assert worker.idle


def test_ending_all_keeps_what_there_is(writer: Writer, hire: Callable[..., Worker]) -> None:
    served = writer()
    worker = hire(served)

    async def work() -> Result:
        pieces = []
        async for piece in worker.write(
            "tiny", [[1]], settings(max_new_tokens=500, temperature=0.0)
        ):
            if not pieces:
                worker.end_all()
            pieces.append(piece)
        assert text_of(pieces) == pieces[-1].result.text
        return pieces[-1].result

    assert run(work()).finish_reason == "length"
    assert worker.idle


def test_the_watch_is_told(writer: Writer, hire: Callable[..., Worker]) -> None:
    told: list[tuple[Any, ...]] = []

    class Noting(Watch):
        def first_token(self, model: str, seconds: float) -> None:
            told.append(("first", model, seconds >= 0))

        def text(self, model: str, result: Result) -> None:
            told.append(("text", model, len(result.tokens)))

    worker = hire(writer(), watch=Noting())
    run(read(worker, [1], n=2, temperature=0.0))
    assert told == [("first", "tiny", True), ("text", "tiny", 12), ("text", "tiny", 12)]
