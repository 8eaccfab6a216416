"""What a run leaves behind, when it stops, and what it refuses."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm_from_scratch.core import files
from llm_from_scratch.core.config import from_dict, read_yaml
from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.core.runlog import read_metrics
from llm_from_scratch.data.loader import Batch, PackedTokens
from llm_from_scratch.data.shards import TokenStore
from llm_from_scratch.train import loop as loop_module
from llm_from_scratch.train.loop import Hooks, Loop
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.pretrain import NextToken, pretrain
from llm_from_scratch.train.settings import PretrainConfig, TrainSettings
from llm_from_scratch.weights.folder import load_folder
from tests.train.helpers import RaggedSource, config, text, tiny_model, with_train


def test_a_run_leaves_every_file_of_the_design(tmp_path: Path) -> None:
    run = pretrain(config(tmp_path), quiet=True)
    for name in (
        "config.yaml", "metrics.jsonl", "summary.json", "environment.json", "loss.png",
        "samples.md", "model/config.json", "model/model.safetensors", "model/tokenizer.json",
        "model/tokenizer_config.json", "model/generation_config.json", "model/README.md",
        "checkpoints/step-8/model.safetensors",
    ):  # fmt: skip
        assert (run.folder / name).stat().st_size > 0, name
    assert list(run.folder.glob("events.out.tfevents.*"))
    assert not list(run.folder.rglob(files.ASIDE + "*"))
    assert not [
        p
        for p in run.folder.rglob("*")
        if p.suffix in (".pt", ".bin", ".pkl") and "tokens" not in p.parts
    ]
    summary = json.loads((run.folder / "summary.json").read_text())
    for name in (
        "steps", "tokens", "parameters", "seconds", "tokens_per_second", "mfu", "val_loss",
        "best_val_loss", "bits_per_byte",
    ):  # fmt: skip
        assert math.isfinite(summary[name]), name
    assert summary["steps"] == 8
    assert summary["tokens"] == 8 * 4 * 16
    model, tokenizer = load_folder(run.folder / "model")
    assert tokenizer is not None
    assert summary["parameters"] == sum(p.numel() for p in model.parameters())
    assert "## Step 8" in (run.folder / "samples.md").read_text()


def test_config_yaml_repeats_the_run(tmp_path: Path) -> None:
    first = pretrain(config(tmp_path), quiet=True)
    saved = from_dict(PretrainConfig, read_yaml(first.folder / "config.yaml"))
    values = {**read_yaml(first.folder / "config.yaml"), "out": str(tmp_path / "again")}
    second = pretrain(from_dict(PretrainConfig, values), quiet=True)
    assert saved.train.precision == "fp32"
    assert second.summary["bits_per_byte"] == first.summary["bits_per_byte"]


def test_tensorboard_reads_the_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = pretrain(config(tmp_path), quiet=True)
    events = accumulator.EventAccumulator(str(run.folder))
    events.Reload()
    written = [(r["step"], r["loss"]) for r in read_metrics(run.folder) if "loss" in r]
    read = [(e.step, e.value) for e in events.Scalars("loss")]
    assert [s for s, _ in read] == [s for s, _ in written]
    assert [v for _, v in read] == pytest.approx([v for _, v in written], rel=1e-6)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run = pretrain(
        config(tmp_path, train={"checkpoint_every": 2, "keep_checkpoints": 3}), quiet=True
    )
    names = sorted(p.name for p in (run.folder / "checkpoints").iterdir())
    assert names == ["step-4", "step-6", "step-8"]


def test_a_step_is_saved_once_and_a_kill_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    real = loop_module.save_checkpoint

    def counting(folder: Path, step: int, *rest: object) -> Path:
        saved.append(step)
        return real(folder, step, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop_module, "save_checkpoint", counting)
    stopped = config(tmp_path, train={"stop_after": 4, "checkpoint_every": 4})
    pretrain(stopped, quiet=True)
    assert saved == [4]
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-4").rename(checkpoints / f"{files.ASIDE}step-4{files.OLD}99")
    pretrain(with_train(stopped, stop_after=None), resume=True, quiet=True)
    assert saved == [4, 8]
    steps = [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r]
    assert steps == list(range(1, 9))


def test_resume_refuses_a_contradiction_and_an_empty_folder(tmp_path: Path) -> None:
    stopped = config(tmp_path, train={"stop_after": 4})
    pretrain(stopped, quiet=True)
    with pytest.raises(UserError, match=r"train\.max_steps is 9, but .* started with 8"):
        pretrain(with_train(stopped, max_steps=9), resume=True, quiet=True)
    only_out = from_dict(PretrainConfig, {"out": stopped.out})
    assert pretrain(only_out, resume=True, quiet=True).summary["steps"] == 8
    with pytest.raises(UserError, match="holds no run to resume"):
        pretrain(from_dict(PretrainConfig, {"out": str(tmp_path / "x")}), resume=True, quiet=True)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(stopped, quiet=True)


def test_sampling_and_evaluating_do_not_disturb_training(tmp_path: Path) -> None:
    results = []
    for name, every in (("often", 1), ("never", 0)):
        (tmp_path / name).mkdir()
        often = {"sample_every": every, "eval_every": every, "checkpoint_every": every}
        run = pretrain(config(tmp_path / name, train=often), quiet=True)
        results.append([r["loss"] for r in read_metrics(run.folder) if "loss" in r])
    assert results[0] == results[1]


class Exploding:
    """A method whose loss is not a number from the third step on."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self, model: torch.nn.Module, batch: Batch) -> LossSum:
        self.calls += 1
        result = NextToken().step(model, batch)
        factor = math.nan if self.calls >= 3 else 1.0
        return LossSum(result.loss_sum * factor, result.count)


def test_a_loss_that_is_no_number_stops_before_the_weights_change() -> None:
    model = tiny_model()
    loop = Loop(
        model, Exploding(), RaggedSource(), TrainSettings(batch_size=2, max_steps=9),
        device=torch.device("cpu"), quiet=True,
    )  # fmt: skip
    with pytest.raises(RunError, match="not a number at step 3"):
        loop.train()
    assert loop.progress.step == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_batch_without_targets_is_named() -> None:
    class Masked(RaggedSource):
        def batch(self, start: int, count: int) -> Batch:
            batch = super().batch(start, count)
            batch.targets[:] = -100
            return batch

    loop = Loop(
        tiny_model(), NextToken(), Masked(), TrainSettings(batch_size=2),
        device=torch.device("cpu"), quiet=True,
    )  # fmt: skip
    with pytest.raises(RunError, match="no token to learn from"):
        loop.train()


def test_early_stop_keeps_the_best_model() -> None:
    """Validation on noise gets worse: the loop stops and says which step was best."""
    saved: list[torch.Tensor] = []
    source = RaggedSource()
    noise = RaggedSource().batch(1000, 8)

    def keep(model: torch.nn.Module) -> None:
        saved.append(model.head.weight.detach().clone())  # type: ignore[union-attr]

    loop = Loop(
        tiny_model(), NextToken(), source,
        TrainSettings(batch_size=8, max_steps=200, eval_every=5, patience=2, learning_rate=0.03),
        device=torch.device("cpu"), quiet=True,
        hooks=Hooks(val_batches=lambda: [noise], save_best=keep),
    )  # fmt: skip
    progress = loop.train()
    assert progress.stopped_early
    assert progress.step < 200
    assert progress.val_losses[progress.best_step // 5 - 1] == progress.best_val_loss
    assert min(progress.val_losses) == progress.best_val_loss
    gains = [
        v for i, v in enumerate(progress.val_losses) if v < min(progress.val_losses[:i] or [9])
    ]
    assert len(saved) == len(gains)
    assert not torch.equal(saved[-1], loop.model.head.weight)  # the best is not the last


def test_training_learns(tmp_path: Path) -> None:
    """From a uniform guess (ln 300 = 5.7 nats) to less than half of it on repeating text."""
    (tmp_path / "text.txt").write_text("one two three four five six seven eight\n" * 200)
    run = pretrain(
        config(tmp_path, train={"max_steps": 60, "learning_rate": 0.01}, model={"dropout": 0.0}),
        quiet=True,
    )
    assert run.summary["val_loss"] < 2.5


def test_full_disk_is_one_sentence_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = os.fsync, [0]

    def full_after_the_first_checkpoint(handle: int) -> None:
        if list(tmp_path.glob("run/checkpoints/step-2")):
            count[0] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full_after_the_first_checkpoint)
    with pytest.raises(RunError, match="The disk is full"):
        pretrain(config(tmp_path, train={"checkpoint_every": 2, "eval_every": 0}), quiet=True)
    assert count[0]
    names = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["step-2"]


def test_unwritable_folder_empty_and_short_corpus_are_sentences(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    good = config(tmp_path)
    with pytest.raises(UserError, match="Choose another"):
        pretrain(from_dict(PretrainConfig, {"out": str(blocked / "run"), "data": {"paths": ["."]}}))
    for content, match in (("", "text"), ("short", "short")):
        source = tmp_path / "s.txt"
        source.write_text(content)
        bad = from_dict(
            PretrainConfig,
            {"out": str(tmp_path / f"r{len(content)}"), "data": {"paths": [str(source)]}},
        )
        with pytest.raises(UserError, match=match):
            pretrain(bad, quiet=True)
    with pytest.raises(UserError, match="No text was given"):
        pretrain(from_dict(PretrainConfig, {"out": str(tmp_path / "n")}), quiet=True)
    assert good.out


def test_character_run_is_saved_without_unused_entries(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(text(800))
    run = pretrain(config(tmp_path, tokenizer={"kind": "char"}), quiet=True)
    _, tokenizer = load_folder(run.folder / "model")
    assert tokenizer is not None
    assert tokenizer.vocab_size == len(set(text(800)))


def test_compile_without_a_compiler_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    settings = TrainSettings(batch_size=4, max_steps=1, compile=True)
    loop = Loop(tiny_model(), NextToken(), RaggedSource(), settings, device=torch.device("cpu"))
    loop.train()
    assert "needs a C++ compiler" in capsys.readouterr().err
    assert loop.progress.step == 1


@pytest.mark.full
def test_compiled_steps_learn_what_plain_steps_learn() -> None:
    losses = []
    for compile_it in (False, True):
        settings = TrainSettings(batch_size=4, max_steps=5, compile=compile_it, warmup_steps=0)
        loop = Loop(
            tiny_model(), NextToken(), RaggedSource(), settings,
            device=torch.device("cpu"), quiet=True,
        )  # fmt: skip
        losses.append(loop.train().train_losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_epochs_decide_the_steps(tmp_path: Path) -> None:
    short = config(tmp_path, train={"epochs": 0.5})
    run = pretrain(short, quiet=True)
    saved = from_dict(PretrainConfig, read_yaml(run.folder / "config.yaml"))
    windows = len(PackedTokens(TokenStore.open(run.folder / "tokens" / "train"), 16, 3))
    assert saved.train.max_steps == run.summary["steps"] == math.ceil(0.5 * windows / 4)
    again = PretrainConfig(out=str(run.folder))
    assert pretrain(again, resume=True, quiet=True).summary["steps"] == saved.train.max_steps


class Measured:
    """A method with a metric, and a source that remembers what it has given out."""

    def __init__(self) -> None:
        self.given = torch.zeros(1)
        self.rows = RaggedSource()

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        result = NextToken().step(model, batch)
        known = (batch.targets != -100).sum()
        return LossSum(result.loss_sum, result.count, {"known": 2.0 * known})

    def batch(self, start: int, count: int) -> Batch:
        self.given += count
        return self.rows.batch(start, count)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return {"given": self.given}

    def restore_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        self.given.copy_(tensors["given"])


def test_validation_metrics_and_a_sources_state(tmp_path: Path) -> None:
    def loop(steps: int) -> tuple[Loop, Measured]:
        method = Measured()
        hooks = Hooks(
            val_batches=lambda: [method.rows.batch(100, 4), method.rows.batch(104, 3)],
            val_figures=lambda model: {"val_extra": 0.25},
        )
        settings = TrainSettings(max_steps=4, batch_size=4, stop_after=steps, eval_every=2)
        device = torch.device("cpu")
        return Loop(
            tiny_model(), method, method, settings, device=device, folder=tmp_path, hooks=hooks,
            quiet=True,
        ), method  # fmt: skip

    first, _ = loop(2)
    first.train()
    second, method = loop(4)
    assert second.resume() == 2 and method.given.item() == 8
    second.train()
    assert method.given.item() == 16
    found = [record for record in read_metrics(tmp_path) if "val_loss" in record]
    assert [record["step"] for record in found] == [2, 4]
    assert all(r["val_known"] == 2.0 and r["val_extra"] == 0.25 for r in found)
    assert all(r["known"] == 2.0 for r in read_metrics(tmp_path) if "loss" in r)


def test_what_is_frozen_is_not_in_the_checkpoints(tmp_path: Path) -> None:
    model = tiny_model()
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.detach().clone()
    settings = TrainSettings(max_steps=2, batch_size=4)
    device = torch.device("cpu")
    Loop(
        model, NextToken(), RaggedSource(), settings, device=device, folder=tmp_path, quiet=True
    ).train()
    stored = load_file(tmp_path / "checkpoints" / "step-2" / "model.safetensors")
    assert "embedding.weight" not in stored and "final_norm.weight" in stored
    assert torch.equal(model.embedding.weight, before)
