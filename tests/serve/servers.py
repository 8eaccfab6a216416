"""Real servers for tests: in a thread of this process, or as a process of their own."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import httpx2

from llm_from_scratch.serve.run import Server, address_of, bind, listen
from llm_from_scratch.serve.service import Service

PATIENCE = 120.0  # seconds; nothing is measured, but nothing may hang either


@dataclass
class Running:
    """A server in a thread: its address (`http://127.0.0.1:PORT`) and what it is made of."""

    address: str
    service: Service
    server: Server


@contextlib.contextmanager
def running(service: Service, *, grace: float = 30.0) -> Iterator[Running]:
    """Serve on a free port from a thread, and end the server afterwards."""
    bound = bind("127.0.0.1", 0)
    address = address_of(bound)
    listen(bound)
    ready = threading.Event()
    server = Server(service, grace, ready.set)
    thread = threading.Thread(target=server.run, args=([bound],), name="server")
    thread.start()
    try:
        assert ready.wait(PATIENCE), "the server did not start"
        yield Running(address, service, server)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(PATIENCE)
        service.worker.stop()
        assert not thread.is_alive(), "the server did not end"


@dataclass
class Process:
    """`scratchlm serve` as a process; `lines` are what it writes to standard error."""

    address: str
    process: subprocess.Popen[str]
    lines: queue.Queue[str]

    def wait_for(self, pattern: str) -> str:
        """The next line on standard error in which the pattern is found."""
        while True:
            line = self.lines.get(timeout=PATIENCE)
            if re.search(pattern, line):
                return line

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's values with these labels (others may differ)."""
        return metric(self.address, name, **labels)


@contextlib.contextmanager
def process(arguments: Sequence[str], **environment: str) -> Iterator[Process]:
    """`scratchlm serve ARGUMENTS --port 0` until the end of the block, which may end it itself."""
    command = [sys.executable, "-m", "llm_from_scratch", "serve", *arguments, "--port", "0"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    lines: queue.Queue[str] = queue.Queue()
    assert child.stdout is not None and child.stderr is not None
    reader = threading.Thread(target=_read, args=(child.stderr, lines), daemon=True)
    reader.start()
    try:
        first = child.stdout.readline()
        found = re.fullmatch(r"Page: (http://\S+?)/\n", first)
        assert found is not None, (first, child.poll(), list(lines.queue))
        yield Process(found[1], child, lines)
    finally:
        if child.poll() is None:
            child.kill()
        child.wait(PATIENCE)
        reader.join(PATIENCE)
        child.stdout.close()
        child.stderr.close()


def _read(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)


def metric(address: str, name: str, **labels: str) -> float:
    """The sum of a metric's values with these labels (others may differ), read from /metrics."""
    total = 0.0
    for line in httpx2.get(f"{address}/metrics").text.splitlines():
        head, _, value = line.rpartition(" ")
        if head.partition("{")[0] == name and all(f'{k}="{v}"' in head for k, v in labels.items()):
            total += float(value)
    return total
