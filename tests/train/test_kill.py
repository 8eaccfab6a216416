"""Interrupting and killing real processes: nothing is lost that was saved, and nothing is half."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_from_scratch.core.config import to_yaml
from llm_from_scratch.core.files import remove_asides
from tests.train.helpers import config, with_train

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "SCRATCHLM_QUIET"},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "MPLBACKEND": "Agg",
    "OBJC_DISABLE_INITIALIZE_FORK_SAFETY": "YES",  # macOS: the forks are of one thread
}
pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals and forks of Linux and macOS")


def scratchlm(words: list[str]) -> list[str]:
    return [sys.executable, "-m", "llm_from_scratch", *words]


def write_config(folder: Path) -> Path:
    """A run in a folder of its own, with steps enough to be interrupted in."""
    folder.mkdir()
    settings = with_train(config(folder), max_steps=150, checkpoint_every=0, eval_every=0)
    path = folder / "settings.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    return path


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "run" / "checkpoints" / "step-150"
    names = ("model", "optimizer", "rng")
    return {f"{n}.{k}": v for n in names for k, v in load_file(path / f"{n}.safetensors").items()}


def test_an_interrupted_run_says_how_to_go_on_and_ends_the_same(tmp_path: Path) -> None:
    whole = write_config(tmp_path / "whole")
    command = scratchlm(["pretrain", "--config", str(whole)])
    subprocess.run(command, check=True, env=ENVIRONMENT, timeout=300, capture_output=True)

    stopped = write_config(tmp_path / "stopped")
    command = scratchlm(["pretrain", "--config", str(stopped)])
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)  # what Ctrl-C sends
    said = process.stderr.read()
    assert process.wait(timeout=300) == 130
    assert "Traceback" not in said
    saved = re.search(r"Saved at step (\d+)\. To go on: scratchlm (.+)\n", said)
    assert saved, said
    assert 1 <= int(saved[1]) < 150
    folders = list((tmp_path / "stopped" / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == [f"step-{saved[1]}"]

    again = scratchlm(shlex.split(saved[2]))
    done = subprocess.run(again, env=ENVIRONMENT, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Resuming after step {saved[1]}." in done.stderr
    first, second = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "stopped")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_that_lost_its_place_is_put_back(tmp_path: Path) -> None:
    """A kill between the two renames of `folder_aside` leaves the old folder beside its place."""
    names = (".aside-model.old-7", ".aside-model.x1", "kept", ".aside-kept.old-7")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "from").write_text(name)
    remove_asides(tmp_path)
    assert {p.name: (p / "from").read_text() for p in tmp_path.iterdir()} == {
        "model": ".aside-model.old-7",
        "kept": "kept",
    }


def kill(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Run the program of `killed_runs.py`, which checks what is left after every kill."""
    command = [sys.executable, "-m", "tests.train.killed_runs", str(folder), str(kills), str(seed)]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, timeout=3000, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts: dict[str, int] = json.loads(done.stdout)
    assert counts["kills"] == kills
    assert counts["inside_a_write"] >= 1
    assert counts["resumed"] >= 1
    assert counts["finished"] >= 1
    return counts


def test_twenty_kills_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    kill(tmp_path, 20, seed=1)


@pytest.mark.full
def test_a_thousand_kills_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    counts = kill(tmp_path, 1000, seed=2)
    assert counts["inside_a_write"] >= 50
