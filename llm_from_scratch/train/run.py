"""The life of a run folder, whatever is trained in it: begun, resumed, carried out, described.

    begin -> config.yaml, environment.json -> loop -> summary.json, loss.png, model/README.md

config.yaml is written last of what comes before the first step, so a folder without one holds no
run. What a method prepares (token shards, split rows) is written before it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from llm_from_scratch.core.config import from_dict, read_yaml, to_dict, to_yaml
from llm_from_scratch.core.device import environment, pick_device, pick_precision
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import remove_asides, writable_folder, write_aside
from llm_from_scratch.core.runlog import LiveLine, write_json
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.parallel import World, join_world, leave_world, wait_for_all
from llm_from_scratch.train.settings import TrainSettings

IDENTITY_FREE = ("stop_after",)  # train settings that do not change what a run computes


class RunConfig(Protocol):
    """What the settings of every kind of run have in common."""

    @property
    def out(self) -> str: ...

    @property
    def train(self) -> TrainSettings: ...


C = TypeVar("C", bound=RunConfig)


@dataclass
class Run:
    """A finished or interrupted run."""

    folder: Path
    config: Any
    summary: dict[str, Any]
    interrupted: bool = False
    as_asked: bool = False  # interrupted by train.stop_after

    @property
    def exit_code(self) -> int:
        """What a command ends with: 0, or 130 after Ctrl-C."""
        return 130 if self.interrupted and not self.as_asked else 0


class Work(Protocol):
    """A kind of run: what it prepares, the loop that it makes, and what it says at the end."""

    command: str
    """The command without `--out` and `--resume`, to be shown to people."""
    preparation: tuple[str, ...]
    """What `prepare` leaves in the folder before config.yaml is there."""

    def prepare(self, config: Any, folder: Path, line: LiveLine) -> tuple[Any, dict[str, Any]]:
        """A new run: (the settings as they are settled, hashes for environment.json by name)."""

    def reopen(self, config: Any, folder: Path, line: LiveLine) -> None:
        """A resumed run, or another process of a new one: take up what `prepare` left."""

    def make_loop(self, config: Any, folder: Path, quiet: bool) -> Loop:
        """The loop, with its model."""

    def finish(
        self, config: Any, folder: Path, loop: Loop, line: LiveLine, summary: dict[str, Any]
    ) -> None:
        """Add to summary.json's figures, and write what else a finished run has to show."""


def carry_out(
    work: Work, config: C, *, resume: bool, quiet: bool, given: dict[str, Any] | None
) -> Run:
    """Begin or resume the run in `config.out`, and train to its end.

    With `resume`, config.yaml in that folder decides; what was asked for besides must not
    contradict it: `given` (nested, as from the flags), or whatever in `config` is no default.
    Raises `UserError` before any work for settings that cannot be, `RunError` for what fails later.
    """
    line = LiveLine(quiet=quiet)
    if not config.out:
        raise UserError("No run folder was given; name one with --out.")
    folder = Path(config.out)
    world = join_world(pick_device(config.train.device))
    if resume:
        if world.main and folder.is_dir():
            remove_asides(folder)
        config = resumed_config(folder, config, given)
        work.reopen(config, folder, line)
    elif world.main:
        config = begin(work, config, folder, line)
        wait_for_all(world)
    else:
        wait_for_all(world)
        config = resumed_config(folder, config, {})
        work.reopen(config, folder, line)
    loop = work.make_loop(config, folder, quiet)
    if resume and (step := loop.resume()):
        line.say(f"Resuming after step {step}.")
    progress = loop.train()
    if loop.interrupted:
        line.say(f"Saved at step {progress.step}. To go on: {work.command} --out {folder} --resume")
        # Stopped where it was told to stop is not the same as stopped by Ctrl-C.
        asked = config.train.stop_after is not None and progress.step >= config.train.stop_after
        return Run(folder, config, {}, interrupted=True, as_asked=asked)
    summary = _finish(work, config, folder, loop, line, world)
    leave_world()
    return Run(folder, config, summary)


def _finish(
    work: Work, config: Any, folder: Path, loop: Loop, line: LiveLine, world: World
) -> dict[str, Any]:
    if not world.main:
        return {}
    summary = measured(loop)
    work.finish(config, folder, loop, line, summary)
    write_json(folder / "summary.json", summary)
    remove_asides(folder)
    return summary


def measured(loop: Loop) -> dict[str, Any]:
    """What the loop knows of a run: how much was done, in which time."""
    p = loop.progress
    rate = p.tokens / p.seconds if p.seconds else math.nan
    figures: dict[str, Any] = {
        "steps": p.step,
        "tokens": p.tokens,
        "parameters": sum(parameter.numel() for parameter in loop.model.parameters()),
        "seconds": round(p.seconds, 2),
        "tokens_per_second": round(rate, 1),
    }
    if loop.peak_flops:
        figures["mfu"] = round(loop.utilisation(rate), 4)
    return figures


def begin(work: Work, config: C, folder: Path, line: LiveLine) -> C:
    """A new run folder with everything that is decided before the first step."""
    refuse_used_folder(folder, work.preparation, work.command)
    config = settle(config)
    fresh = not folder.exists()
    writable_folder(folder)
    try:
        config, hashes = work.prepare(config, folder, line)
    except BaseException:  # Ctrl-C, too: nothing half-made stays behind
        remove_preparation(folder, work.preparation)
        if fresh and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise
    train = dataclasses.replace(config.train, warmup_steps=config.train.warmup)
    config = with_train(config, train)
    stored = with_train(config, dataclasses.replace(train, stop_after=None))
    write_json(folder / "environment.json", {**environment(), **hashes})
    with write_aside(folder / "config.yaml") as file:
        file.write(to_yaml(stored))
    return config


def with_train(config: C, train: TrainSettings) -> C:
    """The settings of a run with another `train` part."""
    return dataclasses.replace(config, train=train)  # type: ignore[type-var]


def settle(config: C) -> C:
    """`auto` replaced by what it means here, so that config.yaml repeats the run."""
    device = pick_device(config.train.device)
    precision = pick_precision(config.train.precision, device)
    train = dataclasses.replace(config.train, device=str(device), precision=precision)
    return with_train(config, train)


def steps_of(train: TrainSettings, sequences: int) -> TrainSettings:
    """`train.epochs` as a number of steps, for so many training sequences."""
    if train.epochs is None:
        return train
    steps = max(1, math.ceil(train.epochs * sequences / train.batch_size))
    return dataclasses.replace(train, max_steps=steps)


# --- folders and resuming ------------------------------------------------------------------------


def refuse_used_folder(folder: Path, preparation: Sequence[str], command: str) -> None:
    """A run folder with something in it is never written over."""
    if (folder / "config.yaml").exists():
        raise UserError(
            f"{folder} already holds a run. Choose another --out, or go on with it: "
            f"{command} --out {folder} --resume"
        )
    if not folder.is_dir():
        return
    remove_asides(folder)
    left_behind = {*preparation, "environment.json"}
    if {entry.name for entry in folder.iterdir()} <= left_behind:
        remove_preparation(folder, preparation)  # a run that was killed before its first step
    if any(folder.iterdir()):
        raise UserError(f"The folder {folder} is not empty. Choose another --out.")


def remove_preparation(folder: Path, preparation: Sequence[str]) -> None:
    """Take away what `begin` writes before config.yaml."""
    for name in (*preparation, "environment.json"):
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def resumed_config(folder: Path, config: C, given: dict[str, Any] | None) -> C:
    """The saved settings; a given one that contradicts them is refused by name."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{folder} holds no run to resume: there is no {path}. Check --out, or start a run "
            "without --resume."
        )
    kind = type(config)
    saved = from_dict(kind, read_yaml(path))
    was, now, usual = (flatten(to_dict(c)) for c in (saved, config, kind()))
    asked = set(flatten(given)) if given is not None else {n for n in now if now[n] != usual[n]}
    for name in sorted(asked):
        value = now[name]
        settled = value == "auto" and name in ("train.device", "train.precision")
        free = name == "out" or name.removeprefix("train.") in IDENTITY_FREE or settled
        if not free and value != was[name]:
            raise UserError(
                f"--{name} is {value}, but the run in {folder} was started with {was[name]}. "
                "Leave the flag out to resume, or start a new run."
            )
    train = dataclasses.replace(saved.train, stop_after=config.train.stop_after)
    return dataclasses.replace(saved, out=str(folder), train=train)  # type: ignore[type-var]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'train': {'seed': 1}} -> {'train.seed': 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


# --- the model card ------------------------------------------------------------------------------


def write_card(
    folder: Path, summary: dict[str, Any], sentence: str, facts: Sequence[str], pipeline: str
) -> None:
    """model/README.md: what this model is, from what, how good, under which licence."""
    figures = "\n".join(
        f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in summary.items()
    )
    lines = "\n".join(f"- {fact}" for fact in facts)
    with write_aside(folder / "model" / "README.md") as file:
        file.write(
            f"---\nlibrary_name: transformers\npipeline_tag: {pipeline}\n---\n\n"
            f"# {folder.name}\n\n{sentence}\n\n{lines}\n\n"
            f"| figure | value |\n|---|---|\n{figures}\n"
        )
