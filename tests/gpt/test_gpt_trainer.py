"""GPTTrainer: the project's loop under the names of a textbook."""

from __future__ import annotations

import inspect
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.gpt import (
    GPT,
    GPTConfig,
    GPTTrainer,
    SimpleTokenizer,
    create_dataloaders,
    load_gpt,
)
from llm_from_scratch.gpt.checkpoint import read_checkpoint, write_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCHLM_QUIET", "1")


def make(dropout: float = 0.1, **changes: object) -> GPTTrainer:
    torch.manual_seed(3)
    tokenizer = SimpleTokenizer(TEXT)
    model = GPT(tokenizer.vocab_size, 16, 2, 2, 8, dropout)
    loaders = create_dataloaders(TEXT, tokenizer, 8, 16, seed=1)
    settings = {"learning_rate": 1e-2, "warmup_steps": 4, "max_steps": 12, "device": "cpu"}
    return GPTTrainer(model, *loaders, **{**settings, **changes})  # type: ignore[arg-type]


def weights(trainer: GPTTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_signature_and_attributes() -> None:
    parameters = inspect.signature(GPTTrainer).parameters
    assert {name: p.default for name, p in parameters.items() if p.default is not p.empty} == {
        "learning_rate": 3e-4, "weight_decay": 0.1, "warmup_steps": 1000, "max_steps": 10000,
        "grad_clip": 1.0, "device": None,
    }  # fmt: skip
    assert list(parameters)[:3] == ["model", "train_loader", "val_loader"]
    trainer = make()
    for name in (
        "model", "train_loader", "val_loader", "max_steps", "warmup_steps", "grad_clip", "device",
        "optimizer", "scheduler",
    ):  # fmt: skip
        assert hasattr(trainer, name)
    train = inspect.signature(GPTTrainer.train).parameters
    assert (train["log_interval"].default, train["eval_interval"].default) == (100, 500)
    assert inspect.signature(GPTTrainer.evaluate).parameters["max_batches"].default == 10


def test_training_lowers_both_losses() -> None:
    trainer = make(max_steps=60, learning_rate=2e-2)
    losses = trainer.train(log_interval=20, eval_interval=20)
    assert set(losses) == {"train_losses", "val_losses"}
    assert len(losses["train_losses"]) == 60 and len(losses["val_losses"]) == 3
    assert losses["train_losses"][0] == pytest.approx(math.log(28), abs=0.3)
    assert losses["train_losses"][-1] < 2.0 and losses["val_losses"][-1] < 2.0
    assert trainer.step == 60
    assert trainer.train() == losses  # nothing is left to do


def test_warm_up_reaches_the_optimizer() -> None:
    trainer = make()
    applied: list[float] = []
    trainer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: applied.append(optimizer.param_groups[0]["lr"])
    )
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 4)
    trainer.train(log_interval=0, eval_interval=0)
    assert applied == pytest.approx([trainer.get_lr(step) for step in range(12)])
    assert applied[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert applied[4:] == sorted(applied[4:], reverse=True) and 0 < applied[-1] < 1e-2 / 20
    assert trainer.scheduler.get_last_lr()[0] == trainer.optimizer.param_groups[0]["lr"]


def test_optimizer_groups() -> None:
    trainer = make(weight_decay=0.3)
    decayed, kept = trainer.optimizer.param_groups
    assert decayed["betas"] == kept["betas"] == (0.9, 0.95)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    spared = {id(p) for p in kept["params"]}
    for name, parameter in trainer.model.named_parameters():
        without = any(part in name for part in ("bias", "ln", "embedding"))
        assert (id(parameter) in spared) == without, name
    trainer.configure_optimizer(1e-3, 0.0)
    assert trainer.get_lr(3) == pytest.approx(1e-3)


def test_a_step_is_the_textbooks_step() -> None:
    """Against the same step written with PyTorch's own AdamW: same loss, same weights."""
    trainer = make(dropout=0.0, grad_clip=0.1)
    twin = GPT(**trainer.model.sizes)
    twin.load_state_dict(trainer.model.state_dict())
    named = dict(twin.named_parameters())
    spared = [n for n in named if any(part in n for part in ("bias", "ln", "embedding"))]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if n not in spared], "weight_decay": 0.1},
            {"params": [named[n] for n in spared], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    x, y = next(iter(trainer.train_loader))
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = trainer.get_lr(step)
        _, loss = twin(x, y)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        assert trainer.train_step(x, y) == pytest.approx(loss.item(), rel=1e-5)
    assert trainer.step == 3
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], atol=1e-5), name


def test_evaluate() -> None:
    trainer = make()
    trainer.model.train()
    loss = trainer.evaluate(max_batches=2)
    assert trainer.model.training
    trainer.model.eval()
    assert trainer.evaluate(2) == loss and not trainer.model.training  # no dropout in it
    batches = [batch for batch, _ in zip(trainer.val_loader, range(2), strict=False)]
    parts = [(trainer.model(x, y)[1].item(), y.numel()) for x, y in batches]
    mean = sum(value * count for value, count in parts) / sum(count for _, count in parts)
    assert loss == pytest.approx(mean)
    assert trainer.evaluate(max_batches=0) == math.inf


def test_evaluations_and_lone_evaluate_do_not_change_training() -> None:
    one = make()
    one.train(log_interval=0, eval_interval=0)
    two = make()
    two.evaluate()
    two.train(log_interval=0, eval_interval=2)
    assert_equal(weights(one), weights(two))


@pytest.mark.parametrize("at", [5, 9])
def test_resumed_is_uninterrupted(tmp_path: Path, at: int) -> None:
    straight = make(max_steps=40)
    everything = straight.train(log_interval=0, eval_interval=10)

    first = make(max_steps=40)
    first.save_interval, first.checkpoint_path = at, str(tmp_path / "gpt.pt")

    class Stop(Exception):
        pass

    saved = first.save_checkpoint

    def save_and_stop(path: str) -> None:
        saved(path)
        raise Stop

    first.save_checkpoint = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stop):
        first.train(log_interval=0, eval_interval=10)

    torch.manual_seed(99)  # another process would stand anywhere
    second = make(max_steps=40)
    torch.manual_seed(123)
    second.load_checkpoint(str(tmp_path / "gpt.pt"))
    assert second.step == at
    resumed = second.train(log_interval=0, eval_interval=10)
    assert resumed == everything
    assert_equal(weights(second), weights(straight))


def test_the_epoch_ends_and_the_next_has_another_order() -> None:
    trainer = make()
    source, n = trainer._source, len(trainer.train_loader)
    numbers = [0, 1, n - 1, n, n + 1, 2, 0]
    batches = {number: source.batch(number, 1)[0] for number in numbers}
    assert torch.equal(source.batch(n, 1)[0], batches[n])
    assert torch.equal(source.batch(1, 1)[0], batches[1])
    assert not torch.equal(batches[0], batches[n])


def test_checkpoint_is_safetensors_whatever_its_name(tmp_path: Path) -> None:
    trainer = make()
    trainer.train(log_interval=0, eval_interval=6)
    path = tmp_path / "deep" / "gpt_checkpoint.pt"
    trainer.save_checkpoint(str(path))
    assert [entry.name for entry in path.parent.iterdir()] == ["gpt_checkpoint.pt"]
    tensors = load_file(path)
    assert torch.equal(
        tensors["model_state_dict.head.weight"], trainer.model.state_dict()["head.weight"]
    )
    assert tensors["train_losses"].shape == (12,) and tensors["val_losses"].shape == (2,)
    model = load_gpt(path)
    assert not model.training and model.sizes == trainer.model.sizes
    assert_equal(model.state_dict(), weights(trainer))


def test_checkpoints_that_cannot_be_loaded(tmp_path: Path) -> None:
    trainer = make()
    before = weights(trainer)

    def refused(path: Path, said: str) -> None:
        with pytest.raises(UserError, match=said):
            trainer.load_checkpoint(str(path))
        assert_equal(weights(trainer), before)

    refused(tmp_path / "none.pt", "cannot be read")
    torch.save({"model_state_dict": {}}, tmp_path / "zip.pt")
    refused(tmp_path / "zip.pt", "is a pickle")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "old.pt", "is a pickle")
    save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    refused(tmp_path / "foreign.safetensors", "no training state")
    (tmp_path / "text.pt").write_text("hello, this is not a checkpoint at all")
    refused(tmp_path / "text.pt", "not a safetensors file")
    trainer.save_checkpoint(str(tmp_path / "whole.pt"))
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "half.pt", "truncated")
    other = GPT(30, 16, 2, 2, 8)
    GPTTrainer(other, trainer.train_loader, None, device="cpu").save_checkpoint(
        str(tmp_path / "other.pt")
    )
    refused(tmp_path / "other.pt", "belongs to another model")


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    """A safetensors file begins with its header's length, which may look like a pickle's mark."""
    path = tmp_path / "state.pt"
    for room in range(0, 300, 8):
        write_checkpoint(path, {"a": torch.zeros(2)}, {"step": 3, "text": " " * room})
        assert read_checkpoint(path)[1]["step"] == 3
        if path.read_bytes()[:1] == b"\x80":
            return
    pytest.fail("no header had the length looked for")


def test_every_field_of_the_config_is_used(tmp_path: Path) -> None:
    tokenizer = SimpleTokenizer(TEXT)
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size, n_embd=16, n_layer=1, n_head=2, block_size=8, dropout=0.0,
        batch_size=4, learning_rate=1e-2, weight_decay=0.2, max_steps=6, warmup_steps=2,
        gradient_accumulation_steps=3, grad_clip=0.5, use_amp=False, eval_steps=2,
        eval_interval=3, save_interval=4,
    )  # fmt: skip
    loaders = create_dataloaders(TEXT, tokenizer, config.block_size, config.batch_size)
    path = tmp_path / "gpt.safetensors"
    trainer = GPTTrainer.from_config(
        GPT.from_config(config), *loaders, config, "cpu", checkpoint_path=str(path)
    )
    losses = trainer.train(log_interval=0, eval_interval=config.eval_interval)
    assert len(losses["train_losses"]) == 6 and len(losses["val_losses"]) == 2
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.2
    assert trainer._source._next == 18  # 6 steps of 3 batches
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        state = json.loads(stored.metadata()["llm_from_scratch.gpt"])
    assert state["step"] == 6 and state["trainer"]["gradient_accumulation_steps"] == 3


def test_accumulation_is_one_big_batch() -> None:
    """Three batches in one step: the gradient of the mean over all their targets."""
    trainer = make(dropout=0.0, grad_clip=0.0)
    trainer.gradient_accumulation_steps = 3
    model = GPT(**trainer.model.sizes)
    model.load_state_dict(trainer.model.state_dict())
    batches = [trainer._source.batch(number, 1) for number in range(3)]
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    _, expected = model(x, y)
    losses = trainer.train(log_interval=0, eval_interval=0)
    assert losses["train_losses"][0] == pytest.approx(expected.item(), rel=1e-5)


def test_amp_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    import llm_from_scratch.gpt.trainer as module

    monkeypatch.setattr(module, "pick_precision", lambda name, device: "bf16")
    exact, rough = make(dropout=0.0), make(dropout=0.0)
    rough.use_amp = True
    one = exact.train(log_interval=0, eval_interval=0)["train_losses"]
    two = rough.train(log_interval=0, eval_interval=0)["train_losses"]
    assert one != two and one == pytest.approx(two, abs=0.1)


def test_without_validation_and_without_data() -> None:
    trainer = make()
    trainer.val_loader = None
    assert trainer.evaluate() == math.inf
    assert trainer.train(log_interval=0)["val_losses"] == []
    _, empty = create_dataloaders(TEXT, SimpleTokenizer(TEXT), 8, 16, train_split=1.0)
    with pytest.raises(UserError, match="training loader is empty"):
        GPTTrainer(trainer.model, empty, None)


def test_prints_every_so_many_steps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SCRATCHLM_QUIET")
    make().train(log_interval=5, eval_interval=0)
    lines = capsys.readouterr().err.splitlines()
    assert "parameters on cpu" in lines[0]
    assert [line.split("/")[0] for line in lines if "/12" in line] == ["step 5", "step 10"]
