"""The run folder's own records: metrics.jsonl, TensorBoard events, the live line, loss.png."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import explain_os_error, write_aside


def write_json(path: Path, value: Any) -> None:
    with write_aside(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """The content of a run folder's JSON file, or a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"There is no {path}: the run folder is incomplete. Start a new run."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is damaged and cannot be read as JSON ({error}). Start a new run."
        ) from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a half-written last line (a kill) is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


class RunLog:
    """Appends to metrics.jsonl and the TensorBoard events of one run folder.

    A resumed run starts at `resumed_step`: later records, written by the interrupted process after
    its last checkpoint, are dropped, so that every step stands there exactly once.
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        self.folder = folder
        kept = [r for r in read_metrics(folder) if r["step"] <= resumed_step]
        with write_aside(folder / "metrics.jsonl") as file:
            for record in kept if resumed_step else []:
                file.write(json.dumps(record) + "\n")
        try:
            self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise explain_os_error(error, folder) from error
        self._events: Any = None
        self._purge = resumed_step + 1 if resumed_step else None

    def write(self, step: int, **values: float) -> None:
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            if self._events is None:
                from tensorboardX import SummaryWriter

                self._events = SummaryWriter(str(self.folder), purge_step=self._purge)
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        except OSError as error:
            raise explain_os_error(error, self.folder / "metrics.jsonl") from error

    def close(self) -> None:
        # On a full disk closing fails, too; the error that stopped the run is the one to show.
        with contextlib.suppress(OSError):
            self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()


def clock(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class LiveLine:
    """One line that is rewritten in a terminal, and repeated now and then in a file or pipe."""

    def __init__(self, quiet: bool = False, every_s: float = 10.0) -> None:
        self.quiet = quiet or bool(os.environ.get("SCRATCHLM_QUIET"))
        self.terminal = sys.stderr.isatty()
        self.every_s = 0.2 if self.terminal else every_s
        self._last = -float("inf")
        self._width = 0

    def show(self, text: str, force: bool = False) -> None:
        now = time.monotonic()
        if self.quiet or (not force and now - self._last < self.every_s):
            return
        self._last = now
        if self.terminal:
            sys.stderr.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.quiet:
            return
        if self.terminal and self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            self._width = 0
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self.terminal and self._width and not self.quiet:
            sys.stderr.write("\n")
            self._width = 0


def plot_losses(folder: Path, title: str) -> Path:
    """loss.png: training loss (thin: each step, thick: smoothed) and validation loss, in nats."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = read_metrics(folder)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9db8d9", linewidth=0.6, label="training, each step")
        smooth, mean = [], 0.0
        for number, loss in enumerate(losses):  # a plain mean at first, then over about 50 steps
            mean += (loss - mean) / min(number + 1, 25)
            smooth.append(mean)
        axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    if val:
        steps, losses = zip(*val, strict=True)
        axes.plot(steps, losses, "o-", color="#c8501e", linewidth=1.8, ms=4, label="validation")
        axes.annotate(
            f"{losses[-1]:.3f}", (steps[-1], losses[-1]), (4, 6), textcoords="offset points"
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    with write_aside(path, "wb") as file:
        figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return path
