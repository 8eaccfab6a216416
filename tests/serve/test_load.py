"""A server under load: nothing is lost, nobody gets another's answer, and memory stays as it is."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.folder import load_folder
from tests.serve.load import Clients, Question, Tally, make_questions
from tests.serve.servers import Process, process

SECONDS = 60.0  # of load in `make test-full`
WARM_UP = 0.25  # of the time, in which memory may grow
GROWTH = 8 * 2**20  # bytes that the process may have more at the end than after its warm-up
# How many clients ask, and how many texts are written at once and may wait: fewer than are asked.
FEW, MANY = (16, 3, 1), (64, 24, 16)


@pytest.fixture(scope="module")
def questions(model_folder: str) -> list[Question]:
    model, tokenizer = load_folder(Path(model_folder))
    assert isinstance(model, Decoder) and isinstance(tokenizer, Tokenizer)
    return make_questions("tiny", model.eval(), tokenizer, count=48, seed=5)


@contextmanager
def serving(model_folder: str, running: int, queue: int) -> Iterator[Process]:
    """The server, which must end as it should when it is asked to."""
    limits = ["--max_running", str(running), "--max_queue", str(queue), "--cache_tokens", "2048"]
    with process([model_folder, *limits]) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@dataclass
class Watcher:
    """Looks at the server from outside while the clients ask."""

    server: Process
    waiting: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    async def watch(self, clients: Clients, seconds: float, pause: float) -> None:
        """Look for so long, then let the clients stop."""
        clock = asyncio.get_running_loop().time
        end = clock() + seconds
        process = psutil.Process(self.server.process.pid)
        async with httpx2.AsyncClient(base_url=self.server.address, timeout=60) as client:
            while clock() < end:
                page = (await client.get("/metrics")).text
                self.waiting.append(_value(page, "scratchlm_waiting_texts"))
                self.running.append(_value(page, "scratchlm_running_texts"))
                self.memory.append(process.memory_info().rss)
                await asyncio.sleep(pause)
        clients.stop = True


def _value(page: str, name: str) -> float:
    lines = [line for line in page.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def check(tally: Tally, watcher: Watcher, most: int) -> None:
    """What must hold however long the load lasted; `most` texts were let in at once."""
    assert not tally.wrong, "\n".join(tally.wrong[:10])
    assert set(tally.statuses) <= {200, 429}, tally.statuses
    assert tally.answered + tally.left == tally.asked
    assert tally.statuses[429] == tally.refused > 0, "the queue was never full"
    assert tally.left > 0
    assert max(watcher.running) <= most and max(watcher.waiting) <= most
    for name in ("running_texts", "waiting_texts", "cache_pages_held"):
        looks = (watcher.server.metric(f"scratchlm_{name}") for _ in range(1000))
        assert any(value == 0 for value in looks), f"{name} does not come down to 0"


async def load(
    clients: Clients, watcher: Watcher, seconds: float, pause: float, each: int | None = None
) -> Tally:
    """Let the clients ask for so long, or until each has had so many turns."""
    async with asyncio.TaskGroup() as group:
        looking = group.create_task(watcher.watch(clients, seconds, pause))
        tally = await clients.run(each)
        looking.cancel()
    return tally


def test_a_few_busy_seconds(model_folder: str, questions: list[Question]) -> None:
    """Each client asks four times."""
    count, *limits = FEW
    with serving(model_folder, *limits) as server:
        clients, watcher = Clients(server.address, questions, count, seed=1), Watcher(server)
        tally = asyncio.run(load(clients, watcher, SECONDS, 0.02, each=4))
        assert tally.asked == 4 * count
        check(tally, watcher, sum(limits))


@pytest.mark.full
def test_a_minute_with_64_clients(model_folder: str, questions: list[Question]) -> None:
    count, *limits = MANY
    with serving(model_folder, *limits) as server:
        clients, watcher = Clients(server.address, questions, count, seed=2), Watcher(server)
        tally = asyncio.run(load(clients, watcher, SECONDS, 0.5))
        check(tally, watcher, sum(limits))
        assert tally.answered > count
    warm = int(len(watcher.memory) * WARM_UP)
    grown = max(watcher.memory[-warm:]) - max(watcher.memory[:warm])
    assert grown <= GROWTH, [round(size / 2**20) for size in watcher.memory]
