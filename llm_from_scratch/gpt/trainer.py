"""Training a GPT: the loop of `llm_from_scratch.train.loop`, under the names of a textbook.

The loop does the work (warm-up and cosine, accumulation, clipping, evaluation, Ctrl-C). Here are
only the two things it asks for: batches by number, and the loss of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm_from_scratch.core.device import pick_device, pick_precision, rng_state, set_rng_state
from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.gpt.checkpoint import (
    MODEL,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from llm_from_scratch.gpt.config import GPTConfig
from llm_from_scratch.train.checkpoint import optimizer_tensors, restore_optimizers
from llm_from_scratch.train.loop import Hooks, Loop, Progress
from llm_from_scratch.train.losses import LossSum, cross_entropy_sum
from llm_from_scratch.train.settings import TrainSettings

OPTIMIZER = "optimizer_state_dict."
BETAS = (0.9, 0.95)

Batch = tuple[Tensor, Tensor]


class LoaderSource:
    """The batches of a DataLoader by number, over all epochs.

    The order of an epoch depends on the loader's seed and the epoch's number alone, so that a
    resumed run sees what the uninterrupted one would have seen.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        if len(loader) == 0:
            raise UserError("The training loader is empty: give more text or a smaller batch_size.")
        self.loader = loader
        own = loader.generator
        self.seed = torch.initial_seed() if own is None else own.initial_seed()
        self._next = -1  # the number of the batch that `_batches` yields next
        self._batches: Iterator[Batch] = iter(())

    def batch(self, start: int, count: int) -> Batch:
        """Batch number `start`, from 0; `count` is 1, as the unit of the loop is a whole batch."""
        assert count == 1
        epoch, place = divmod(start, len(self.loader))
        if place == 0 or start != self._next:
            self._batches = itertools.islice(self._open(epoch), place, None)
        self._next = start + 1
        return next(self._batches)

    def forget(self) -> None:
        """Open the epoch anew at the next batch, because the seed has changed."""
        self._next = -1

    def _open(self, epoch: int) -> Iterator[Batch]:
        """One epoch in its own order, without touching the generator that dropout draws from."""
        seed = (self.seed + epoch) % 2**63
        own = self.loader.generator
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            if own is not None:
                own.manual_seed(seed)
            batches = iter(self.loader)
            first = next(batches)  # draws the order of the epoch
            if own is not None:
                own.manual_seed(self.seed)
        return itertools.chain([first], batches)


class GivenBatch:
    """The one batch of `train_step`."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def batch(self, start: int, count: int) -> Batch:
        """That batch."""
        return self.x, self.y


class NextToken:
    """The method: summed cross-entropy of each next token, in bf16 if `amp` says so."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.amp = False

    def step(self, model: nn.Module, batch: Batch) -> LossSum:
        """x, y (b, t) -> the loss over the targets that are not -100."""
        x, y = batch
        amp = torch.autocast(self.device.type, torch.bfloat16) if self.amp else nullcontext()
        with amp:
            logits, _ = model(x)
        return LossSum(cross_entropy_sum(logits, y), int((y != IGNORED).sum()))


class StepLine(LiveLine):
    """Shows one line in every so many steps, and keeps it; 0 shows none."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.steps = every, 0

    def show(self, text: str, force: bool = False) -> None:
        """Called by the loop once per step."""
        self.steps += 1
        if self.every > 0 and self.steps % self.every == 0:
            self.say(text)


class GPTTrainer:
    """Trains `model` on the (x, y) batches of `train_loader`; moves it to `device`.

    The learning rate rises linearly over `warmup_steps` and falls along half a cosine to 0 at
    `max_steps`. `device` None takes cuda, mps or cpu, in this order. Attributes are named after the
    arguments; `optimizer` and `scheduler` are PyTorch's, `step` counts the steps done.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        warmup_steps: int = 1000,
        max_steps: int = 10000,
        grad_clip: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        self.device = pick_device("auto" if device is None else str(device))
        self.model = model.to(self.device)
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps
        self.grad_clip = grad_clip
        # Further settings, which `from_config` takes from a GPTConfig.
        self.gradient_accumulation_steps = 1
        self.use_amp = False
        self.eval_steps = 10
        self.save_interval = 0
        self.checkpoint_path: str | None = None
        self._earlier: dict[str, list[float]] = {"train_losses": [], "val_losses": []}
        self._source = LoaderSource(train_loader)
        self._method = NextToken(self.device)
        self._loop = Loop(
            self.model, self._method, self._source, self._settings(), device=self.device
        )
        self.configure_optimizer(learning_rate, weight_decay)

    @classmethod
    def from_config(
        cls,
        model: nn.Module,
        train_loader: DataLoader[Any],
        val_loader: DataLoader[Any] | None,
        config: GPTConfig,
        device: torch.device | str | None = None,
        checkpoint_path: str | None = None,
    ) -> GPTTrainer:
        """The trainer that a config describes; every `save_interval` steps it saves itself.

        `config.use_amp` computes in bf16 where the device gains from it. `train` takes
        `config.eval_interval` from its caller, as always.
        """
        trainer = cls(
            model, train_loader, val_loader, config.learning_rate, config.weight_decay,
            config.warmup_steps, config.max_steps, config.grad_clip, device,
        )  # fmt: skip
        trainer.gradient_accumulation_steps = config.gradient_accumulation_steps
        trainer.use_amp = config.use_amp
        trainer.eval_steps = config.eval_steps
        trainer.save_interval = config.save_interval
        trainer.checkpoint_path = checkpoint_path
        return trainer

    def _settings(self, eval_every: int = 0, accumulate: int = 1) -> TrainSettings:
        """This trainer in the loop's terms, where a "sequence" is one batch of the loader."""
        return TrainSettings(
            max_steps=self.max_steps,
            batch_size=accumulate,
            micro_batch_size=1,
            learning_rate=self.learning_rate,
            seed=torch.initial_seed() % 2**63,  # dropout follows the user's torch.manual_seed
            warmup_steps=self.warmup_steps,
            schedule="cosine",
            optimizer="adamw",
            weight_decay=self.weight_decay,
            beta1=BETAS[0],
            beta2=BETAS[1],
            grad_clip=self.grad_clip,
            eval_every=eval_every,
            sample_every=self.save_interval,
        )

    @property
    def step(self) -> int:
        """Optimiser steps done so far."""
        return self._loop.progress.step

    def configure_optimizer(
        self, learning_rate: float, weight_decay: float
    ) -> torch.optim.Optimizer:
        """A fresh AdamW; biases, norms and embeddings do not decay. Also sets the scheduler."""
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            spared = any(part in name for part in ("bias", "ln", "embedding"))
            (kept if spared else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": weight_decay, "peak_lr": learning_rate},
            {"params": kept, "weight_decay": 0.0, "peak_lr": learning_rate},
        ]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=fused)
        self._loop.settings = self._settings()
        self._loop.optimizers = [self.optimizer]
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: self._loop.learning_rate_share(step)
        )
        # The scheduler follows the optimiser by itself, whoever makes the steps.
        self.optimizer.register_step_post_hook(lambda *_: self.scheduler.step())
        return self.optimizer

    def get_lr(self, step: int) -> float:
        """The learning rate of step `step` (from 0), as it is applied, warm-up included."""
        self._loop.settings = self._settings()
        return self.learning_rate * self._loop.learning_rate_share(step)

    def _val_batches(self, count: int) -> Iterator[Batch]:
        with torch.random.fork_rng(devices=[]):  # iter() draws a number that dropout is to have
            batches = iter(self.val_loader or ())
        return itertools.islice(batches, count)

    def evaluate(self, max_batches: int = 10) -> float:
        """Mean loss over the first validation batches, in nats; inf when there are none.

        Every target counts the same, also those of a smaller last batch. Dropout is off meanwhile.
        """
        was_training = self.model.training
        self._loop.hooks = Hooks(val_batches=lambda: self._val_batches(max_batches))
        loss = self._loop.evaluate()["val_loss"]
        self.model.train(was_training)
        return loss

    def train_step(self, x: Tensor, y: Tensor) -> float:
        """One optimiser step on a batch of one's own; returns its loss before the step."""
        self.model.train()
        self._loop.settings = self._settings()
        self._method.amp = self._amp()
        self._loop.source = GivenBatch(x, y)
        return self._loop.step()["loss"]

    def _amp(self) -> bool:
        return self.use_amp and pick_precision("auto", self.device) == "bf16"

    def train(self, log_interval: int = 100, eval_interval: int = 500) -> dict[str, list[float]]:
        """Train from `step` to `max_steps`; the losses of all steps and of all evaluations.

        Evaluates every `eval_interval` steps (0: never) and after the last one. Ctrl-C ends it
        after the step at hand; called again, it goes on from there.
        """
        loop = self._loop
        loop.settings = self._settings(eval_interval, self.gradient_accumulation_steps)
        loop.source = self._source
        loop.line = StepLine(log_interval)
        loop.interrupted = False
        self._method.amp = self._amp()
        saves = self.save_interval > 0 and self.checkpoint_path is not None
        loop.hooks = Hooks(
            val_batches=(lambda: self._val_batches(self.eval_steps)) if self.val_loader else None,
            sample=self._save_itself if saves else None,
        )
        if log_interval > 0:
            count = sum(p.numel() for p in self.model.parameters())
            loop.line.say(f"{count:,} parameters on {self.device}")
        loop.train()
        if loop.interrupted:
            loop.line.say(f"Interrupted after step {self.step}: call train() again to go on.")
        done = {"train_losses": loop.progress.train_losses, "val_losses": loop.progress.val_losses}
        return {name: self._earlier[name] + losses for name, losses in done.items()}

    def _save_itself(self, model: nn.Module, step: int) -> None:
        assert self.checkpoint_path is not None
        self.save_checkpoint(self.checkpoint_path)

    def save_checkpoint(self, path: str) -> None:
        """Write everything that training depends on, as safetensors whatever the name."""
        progress = self._loop.progress
        tensors = {MODEL + name: value for name, value in self.model.state_dict().items()}
        for name, value in optimizer_tensors([self.optimizer]).items():
            tensors[OPTIMIZER + name] = value
        for name, value in rng_state(self.device).items():
            tensors["rng." + name] = value
        for name in ("train_losses", "val_losses"):
            losses = self._earlier[name] + getattr(progress, name)
            tensors[name] = torch.tensor(losses, dtype=torch.float64)
        names = (
            "learning_rate", "weight_decay", "warmup_steps", "max_steps", "grad_clip",
            "gradient_accumulation_steps",
        )  # fmt: skip
        state = {
            "step": progress.step,
            "progress": progress.to_state(),
            "data_seed": self._source.seed,
            "sizes": getattr(self.model, "sizes", {}),
            "trainer": {name: getattr(self, name) for name in names},
        }
        write_checkpoint(path, tensors, state)

    def load_checkpoint(self, path: str) -> None:
        """Go on where a checkpoint was saved: weights, optimiser, step, data order and dropout.

        The trainer's settings stay as they were given. A pickle, a damaged file and the checkpoint
        of another model are each a `UserError`.
        """
        tensors, state = read_checkpoint(path)
        load_weights(self.model, tensors, path)
        moments = {k.removeprefix(OPTIMIZER): v for k, v in tensors.items() if OPTIMIZER in k}
        restore_optimizers([self.optimizer], moments)
        self._loop.progress = Progress()
        self._loop.progress.restore(state["progress"])
        self._earlier = {name: tensors[name].tolist() for name in self._earlier}
        self._source.seed = state["data_seed"]
        self._source.forget()
        self.scheduler.last_epoch = self.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.get_lr(self.step)
        rng = {k.removeprefix("rng."): v for k, v in tensors.items() if k.startswith("rng.")}
        set_rng_state(rng, self.device)
