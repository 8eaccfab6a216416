"""Runs a tiny training again and again and kills it each time: a program, not a test.

    python -m tests.train.killed_runs FOLDER KILLS SEED

PyTorch is imported once; every run is a fork that resumes, trains, and writes a checkpoint at each
step, so that it spends most of its time in writing. It says over a pipe what it is about to do; the
parent lets it come to a random place, waits a random while, and sends SIGKILL. Whatever the moment,
all that is left must be whole, and equal to the same step of a run that nobody disturbed. When a
run has reached its end, the next one begins from nothing.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot  # noqa: F401 - imported before the forks, not in each of them
import tensorboardX  # noqa: F401
import torch
import torch._dynamo  # what the first step of an optimiser would import
from safetensors.torch import load_file

from llm_from_scratch.core.device import gemm_rate
from llm_from_scratch.core.files import ASIDE
from llm_from_scratch.train import loop as loop_module
from llm_from_scratch.train import pretrain as pretrain_module
from llm_from_scratch.train.checkpoint import step_folders
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.settings import PretrainConfig
from tests.train.helpers import config, with_train

STEPS = 24
FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors")


def settings(folder: Path) -> PretrainConfig:
    tiny = config(folder, model={"d_model": 8, "n_layers": 1}, data={"seq_len": 8})
    return with_train(tiny, max_steps=STEPS, checkpoint_every=1, eval_every=5, eval_tokens=64)


def fork(work: Callable[[], object]) -> int:
    """Do `work` in a child with one thread of its own; returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    os._exit(1)


def finish(child: int) -> int:
    """Wait for a child; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def resumed(folder: Path, pipe: int) -> None:
    """What a child does: go on with the run, and tell the pipe about it."""
    save, resume = loop_module.save_checkpoint, Loop.resume

    def tell(what: str, step: int) -> None:
        os.write(pipe, f"{what} {step}\n".encode())

    def telling_save(path: Path, step: int, *rest: object) -> Path:
        tell("write", step)
        target = save(path, step, *rest)  # type: ignore[arg-type]
        tell("wrote", step)
        return target

    def telling_resume(self: Loop) -> int:
        step = resume(self)
        tell("resumed", step)
        return step

    loop_module.save_checkpoint = telling_save  # type: ignore[assignment]
    Loop.resume = telling_resume  # type: ignore[method-assign]
    pretrain_module.pretrain(settings(folder), resume=True, quiet=True)


class Child:
    """A forked run and what it has said so far."""

    def __init__(self, folder: Path) -> None:
        self.reading, writing = os.pipe()
        self.process = fork(lambda: resumed(folder, writing))
        os.close(writing)
        self.said: list[tuple[str, int]] = []
        self.rest = b""

    def listen(self, seconds: float | None) -> bool:
        """Take in what the child says next; False if it has ended or said nothing in time."""
        if not select.select([self.reading], [], [], seconds)[0]:
            return False
        data = os.read(self.reading, 1 << 16)
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.said += [(line.split()[0].decode(), int(line.split()[1])) for line in lines]
        return bool(data)

    def count(self, what: str) -> int:
        return sum(word == what for word, _ in self.said)

    def last(self, what: str) -> int:
        return max((step for word, step in self.said if word == what), default=0)


class Story:
    """All the kills of one program, and what was found after each."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.kills = self.asides = self.finished = self.steps_resumed = 0
        self.places: dict[str, int] = {}
        started = time.perf_counter()
        self.reference = folder / "reference"
        self.reference.mkdir()
        whole = with_train(settings(self.reference), keep_checkpoints=STEPS)
        child = fork(lambda: pretrain_module.pretrain(whole, quiet=True))
        assert finish(child) == 0
        # A step and its checkpoint take about this long here; delays are drawn from it.
        self.pause = (time.perf_counter() - started) / STEPS / 2
        steps = step_folders(self.reference / "run" / "checkpoints")
        assert [step for step, _ in steps] == list(range(1, STEPS + 1))
        self.expected = {step: self.load(path) for step, path in steps}

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        """Every tensor of a checkpoint; raises for a file that is not whole."""
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        assert path.name == f"step-{state['step']}"
        return {f"{n}:{k}": v for n in FILES for k, v in load_file(path / n).items()}

    def begin(self) -> Path:
        """A run of which nothing but its preparation is there."""
        run = self.folder / f"round-{self.finished}" / "run"
        run.parent.mkdir()
        shutil.copy(self.reference / "text.txt", run.parent)
        for name in ("tokenizer", "tokens"):
            shutil.copytree(self.reference / "run" / name, run / name)
        text = (self.reference / "run" / "config.yaml").read_text(encoding="utf-8")
        text = text.replace(f"keep_checkpoints: {STEPS}", "keep_checkpoints: 2")
        text = text.replace(str(self.reference), str(run.parent))
        (run / "config.yaml").write_text(text, encoding="utf-8")
        return run

    def round(self, kills: int) -> None:
        """One run, killed until it comes to its end (undisturbed once there were `kills`)."""
        run, newest = self.begin(), 0
        while True:
            child = Child(run.parent)
            killed = self.kills < kills and self.kill_somewhere(child)
            while child.listen(None):
                pass
            os.close(child.reading)
            code = finish(child.process)
            assert code == (-signal.SIGKILL if killed else 0), child.said
            if child.count("resumed"):
                assert child.last("resumed") == newest, "it did not go on where it was killed"
                self.steps_resumed += newest > 0
            newest = self.inspect(run, newest, child)
            if not killed:
                assert newest == STEPS
                assert (run / "summary.json").is_file()
                self.same_model(run)
                self.finished += 1
                shutil.rmtree(run.parent)
                return

    def kill_somewhere(self, child: Child) -> bool:
        """SIGKILL at a random moment; False if the child was through before it came."""
        writes = self.random.randint(0, 4)
        ended = False
        while child.count("write") < writes and not ended:
            ended = not child.listen(None)
        # None yet: somewhere in starting and resuming. Else: in this write or soon after it.
        wait_until = time.perf_counter() + self.random.uniform(0, self.pause)
        while not ended and (left := wait_until - time.perf_counter()) > 0:
            ended = not child.listen(left) and time.perf_counter() < wait_until
        if ended:
            return False
        os.kill(child.process, signal.SIGKILL)
        # A child that ended in the same instant was not killed.
        info = os.waitid(os.P_PID, child.process, os.WEXITED | os.WNOWAIT)
        if info is None or info.si_status != signal.SIGKILL:
            return False
        self.kills += 1
        return True

    def inspect(self, run: Path, newest: int, child: Child) -> int:
        """Everything that is left is whole and right; returns the newest step."""
        folder = run / "checkpoints"
        found = step_folders(folder)
        for step, path in found:
            tensors, expected = self.load(path), self.expected[step]
            assert tensors.keys() == expected.keys()
            assert all(torch.equal(tensors[name], expected[name]) for name in expected), path
        now = found[-1][0] if found else 0
        assert now >= max(newest, child.last("wrote")), "a finished checkpoint is gone"
        assert now <= max(newest, child.last("write"))
        asides = list(folder.glob(f"{ASIDE}*")) if folder.is_dir() else []
        self.asides += bool(asides)
        place = child.said[-1][0] if child.said else "start"
        self.places[place] = self.places.get(place, 0) + 1
        return now

    def same_model(self, run: Path) -> None:
        """The best model, which was written while being killed, too."""
        ours, theirs = (
            load_file(folder / "model" / "model.safetensors")
            for folder in (run, self.reference / "run")
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    gemm_rate("cpu", torch.float32)  # measured once, here
    story = Story(folder, seed)
    while story.kills < kills or not story.finished:
        story.round(kills)
    print(
        json.dumps(
            {
                "kills": story.kills,
                "inside_a_write": story.asides,
                "finished": story.finished,
                "resumed": story.steps_resumed,
                "last_words": story.places,
            }
        )
    )


if __name__ == "__main__":
    main()
