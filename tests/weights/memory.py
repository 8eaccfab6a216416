"""How much memory loading takes: anonymous resident memory of a process that does nothing else.

What is mapped from a file does not count, for the system may drop it at any time. The process looks
itself whenever a parameter takes its place, which is when one tensor is there twice; and it is
looked at from outside all the while, so that looking takes none of its memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")

# Loads a small model, for then what the libraries need themselves is there; says so, waits for a
# word, and loads the large one.
PROGRAM = """
import json, sys, torch
from llm_from_scratch.weights import folder, gguf_load
from llm_from_scratch.weights.sources import as_dtype

torch.set_num_threads(1)
highest = 0

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watched(put):
    def put_and_look(*args):
        global highest
        put(*args)
        highest = max(highest, anonymous())
    return put_and_look

def load(path, dtype):
    own = gguf_load.load_gguf if path.endswith(".gguf") else folder.load_folder
    return own(path, dtype)

small, large, dtype = sys.argv[1:]
load(small, as_dtype(dtype))
folder.put, gguf_load.put = watched(folder.put), watched(gguf_load.put)
print(anonymous(), flush=True)
input()
model, tokenizer = load(large, as_dtype(dtype))
highest = max(highest, anonymous())
words = 0 if tokenizer is None else tokenizer.vocab_size
weights = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps({"weights": weights, "highest": highest, "words": words}))
"""


@dataclass(frozen=True)
class Loaded:
    """Bytes of the weights, bytes that loading took at most, entries of the tokenizer."""

    weights: int
    taken: int
    words: int

    def assert_little_more_than_the_weights(self) -> None:
        assert 0.9 < self.taken / self.weights <= 1.15, self


def load_and_look(large: Path, small: Path, dtype: str) -> Loaded:
    """Load `large` in a process of its own, after `small` of the same kind; `dtype` as "bf16"."""
    command = [sys.executable, "-c", PROGRAM, str(small), str(large), dtype]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
        assert child.stdout is not None
        before = child.stdout.readline()
        seen, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(child.pid, seen, done))
        watcher.start()
        try:
            said, errors = child.communicate("go\n", timeout=300)
        finally:
            done.set()
            watcher.join()
    assert child.returncode == 0, errors
    found = json.loads(said)
    taken = max(found["highest"], *seen) - int(before)
    return Loaded(found["weights"], taken, found["words"])


def _watch(process: int, seen: list[int], done: threading.Event) -> None:
    while not done.wait(0.001):
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        seen += [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")]
