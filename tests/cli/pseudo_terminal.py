"""A program at a real pseudo-terminal, as a person has it: keys go in, what is shown comes out."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager

PROMPT = "\n>"
ENTER, ALT_ENTER, TAB, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\t", "\x1b[A", "\x03", "\x04"
PATIENCE = 60.0  # seconds until something that never comes is given up
ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[()].|[=>78])")

# The terminal becomes the one whose Ctrl-C this process hears.
CHILD = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    "from llm_from_scratch.cli.main import main; main()"
)


class PseudoTerminal:
    """What runs there. `shown` is everything it has written, without control sequences."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self.master = master
        self.process = process
        self.raw = b""
        self.seen = 0  # how much of `shown` earlier calls of `expect` have met

    @property
    def shown(self) -> str:
        return ESCAPES.sub("", self.raw.decode("utf-8", errors="replace")).replace("\r", "")

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def paste(self, text: str) -> None:
        """As a terminal marks what was pasted."""
        self.type(f"\x1b[200~{text}\x1b[201~")

    def expect(self, text: str) -> str:
        """Wait until `text` is shown, behind what was met before; what stands in front of it."""
        deadline = time.monotonic() + PATIENCE
        while (place := self.shown.find(text, self.seen)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} never came; shown was:\n{self.shown}")
        before, self.seen = self.shown[self.seen : place], place + len(text)
        return before

    def end(self) -> int:
        """Wait for the end; the exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._read(deadline):
            pass
        return self.process.wait(timeout=PATIENCE)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(deadline - time.monotonic(), 0))
        if not ready or time.monotonic() > deadline:  # a flood is always ready
            return False
        try:
            data = os.read(self.master, 65536)
        except OSError:  # Linux: the program has ended
            return False
        self.raw += data
        return bool(data)


@contextmanager
def at_terminal(*words: str, **environment: str) -> Iterator[PseudoTerminal]:
    """`scratchlm WORDS` at a terminal of 200 columns."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    known = {
        "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1",  # nobody here says where the cursor is
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, **known, **environment},
        start_new_session=True,
    )
    os.close(slave)
    try:
        yield PseudoTerminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
