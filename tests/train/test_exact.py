"""Resumed equals uninterrupted, accumulated equals big batch, two processes equal one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_from_scratch.core.runlog import read_metrics
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.pretrain import NextToken, pretrain
from llm_from_scratch.train.settings import TrainSettings
from tests.train.helpers import RaggedSource, config, tiny_model, with_train


def checkpoint_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / "run" / "checkpoints" / f"step-{step}"
    tensors = {}
    for name in ("model", "optimizer", "rng"):
        for key, value in load_file(path / f"{name}.safetensors").items():
            tensors[f"{name}.{key}"] = value
    return tensors


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_resumed_run_equals_straight_run_bitwise(
    tmp_path: Path, optimizer: str, schedule: str
) -> None:
    settings = {"optimizer": optimizer, "schedule": schedule}
    straight, halved = tmp_path / "a", tmp_path / "b"
    for folder in (straight, halved):
        folder.mkdir()
    whole = config(straight, train=settings)
    pretrain(whole, quiet=True)
    half = config(halved, train={**settings, "stop_after": 5})
    assert pretrain(half, quiet=True).interrupted
    again = pretrain(with_train(half, stop_after=None), resume=True, quiet=True)
    assert not again.interrupted
    first, second = checkpoint_tensors(straight, 8), checkpoint_tensors(halved, 8)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    states = [
        json.loads((f / "run/checkpoints/step-8/state.json").read_text())
        for f in (straight, halved)
    ]
    for state in states:
        state.pop("seconds")
    assert states[0] == states[1]
    losses = [
        [(r["step"], r["loss"]) for r in read_metrics(f / "run") if "loss" in r]
        for f in (straight, halved)
    ]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == list(range(1, 9))
    best = [load_file(f / "run/model/model.safetensors") for f in (straight, halved)]
    assert all(torch.equal(best[0][k], best[1][k]) for k in best[0])


def gradients_of(batch_size: int, micro: int) -> tuple[float, list[torch.Tensor]]:
    model = tiny_model()
    settings = TrainSettings(batch_size=batch_size, micro_batch_size=micro)
    loop = Loop(
        model, NextToken(), RaggedSource(), settings, device=torch.device("cpu"), quiet=True
    )
    model.train()
    sums = loop.gradients(0)
    assert sums.count == 2 * (1 + 12 + 3 + 7)
    return sums.loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    largest = max(g.abs().max().item() for g in first)
    assert largest > 1e-3
    for a, b in zip(first, second, strict=True):
        assert (a - b).abs().max().item() <= 1e-6 * largest


@pytest.mark.parametrize("micro", [4, 2, 1, 3])
def test_accumulation_equals_the_big_batch(micro: int) -> None:
    loss, whole = gradients_of(8, 8)
    other_loss, parts = gradients_of(8, micro)
    assert other_loss == pytest.approx(loss, abs=1e-6 * loss)
    assert_same(whole, parts)


TWO = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.parallel import leave_world
from llm_from_scratch.train.pretrain import NextToken
from llm_from_scratch.train.settings import TrainSettings
from tests.train.helpers import RaggedSource, tiny_model
torch.set_num_threads(1)
model = tiny_model()
loop = Loop(model, NextToken(), RaggedSource(), TrainSettings(batch_size=8, micro_batch_size=3),
            device=torch.device("cpu"), quiet=True)
model.train()
loss = loop.gradients(0).loss
if loop.world.main:
    torch.save({"loss": loss, "grads": [p.grad for p in model.parameters()]}, sys.argv[2])
leave_world()
"""


def torchrun(*arguments: str) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
        *arguments,
    ]  # fmt: skip


def test_two_processes_equal_one(tmp_path: Path) -> None:
    script, out = tmp_path / "two.py", tmp_path / "grads.pt"
    script.write_text(TWO)
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(
        torchrun(str(script), root, str(out)), check=True, env=env, timeout=300, capture_output=True
    )
    loss, whole = gradients_of(8, 8)
    both = torch.load(out, weights_only=True)
    assert both["loss"] == pytest.approx(loss, abs=1e-6 * loss)
    assert_same(whole, both["grads"])


FLAGS = (
    "--train.max_steps 4 --train.eval_every 0 --train.batch_size 4 --train.precision fp32 "
    "--train.seed 3 --train.warmup_steps 2 --data.seq_len 16 --data.val_fraction 0.1 "
    "--tokenizer.vocab_size 300 --model.d_model 16 --model.n_layers 2 --model.n_heads 2"
).split()


def train_in_two(folder: Path, *flags: str) -> Path:
    """A run of two processes on the tiny text, into folder/run."""
    folder.mkdir(exist_ok=True)
    config(folder)  # writes the text
    run = folder / "run"
    data = [] if "--resume" in flags else ["--data", str(folder / "text.txt"), *FLAGS]
    command = torchrun("-m", "llm_from_scratch", "pretrain", "--out", str(run), *data, *flags)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, timeout=300, capture_output=True)
    return run


def test_two_processes_train_like_one_and_resume_bitwise(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    no_dropout = {"model": {"dropout": 0.0}, "train": {"max_steps": 4, "eval_every": 0}}
    one = pretrain(config(tmp_path / "one", **no_dropout), quiet=True)
    two = train_in_two(tmp_path / "two")
    summary = json.loads((two / "summary.json").read_text())
    assert summary["val_loss"] == pytest.approx(one.summary["val_loss"], abs=1e-4)
    assert summary["tokens"] == one.summary["tokens"]
    train_in_two(tmp_path / "halved", "--train.stop_after", "2", "--model.dropout", "0.1")
    train_in_two(tmp_path / "halved", "--resume")
    train_in_two(tmp_path / "straight", "--model.dropout", "0.1")
    first, second = (checkpoint_tensors(tmp_path / n, 4) for n in ("straight", "halved"))
    assert first.keys() == second.keys()
    assert {name.split(".")[1] for name in first if name.startswith("rng")} == {"0", "1"}
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
