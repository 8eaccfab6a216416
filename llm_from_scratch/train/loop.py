"""The training loop: the only one. A method brings its batches and its step; this does the rest.

One optimiser step:

    for each micro-batch:  method.step -> (loss sum, count);  loss_sum.backward()
    add gradients, sums and counts over the processes
    divide once by the global count;  clip;  set the learning rate;  step

Then, when they are due: evaluate, keep the best model, write samples, save a checkpoint. Everything
that the next step depends on is in the checkpoint, and the data cursor is the number of steps, so
that a resumed run repeats the uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from llm_from_scratch.core.device import gemm_rate, rng_state, set_rng_state, synchronise
from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.core.files import remove_asides
from llm_from_scratch.core.runlog import LiveLine, RunLog, clock
from llm_from_scratch.train.checkpoint import load_checkpoint, save_checkpoint, step_folders
from llm_from_scratch.train.losses import LossSum, Sums
from llm_from_scratch.train.optim import make_optimizers
from llm_from_scratch.train.parallel import (
    World,
    add_up,
    agree,
    gather,
    join_world,
    share,
    wait_for_all,
)
from llm_from_scratch.train.schedule import learning_rate_share
from llm_from_scratch.train.settings import TrainSettings


class Source(Protocol):
    """Training data by number: the same numbers always give the same sequences."""

    def batch(self, start: int, count: int) -> Any:
        """Sequences start..start+count-1 of the endless order."""


@runtime_checkable
class Stateful(Protocol):
    """A source that makes its data with the model (rollouts) and keeps it in the checkpoints."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What later batches depend on besides the weights and their numbers."""

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state_tensors` gave."""


class Method(Protocol):
    """What distinguishes one kind of training from another."""

    def step(self, model: nn.Module, batch: Any) -> LossSum:
        """The loss of a batch, as sum and count, connected to the model's gradients."""


@dataclass
class Hooks:
    """What a method may add to the loop; every one is optional.

    `val_batches` go through the method's step, and its metrics are logged as `val_...`;
    `val_figures` are logged besides, by the same rule. The best model is the one with the least
    `val_loss`, which either of the two may bring.
    """

    val_batches: Callable[[], Iterable[Any]] | None = None
    val_figures: Callable[[nn.Module], dict[str, float]] | None = None
    sample: Callable[[nn.Module, int], None] | None = None
    save_best: Callable[[nn.Module], None] | None = None
    flops_per_token: float = 0.0


@dataclass
class Progress:
    """The counters of a run; all of it goes into state.json."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_val_loss: float = math.inf
    best_step: int = 0
    evals_without_gain: int = 0
    val_loss: float = math.nan
    stopped_early: bool = False
    train_losses: list[float] = field(default_factory=list, repr=False)
    val_losses: list[float] = field(default_factory=list, repr=False)

    def to_state(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if not k.endswith("losses")}
        return {
            k: (None if isinstance(v, float) and not math.isfinite(v) else v)
            for k, v in state.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if value is not None and hasattr(self, name):
                setattr(self, name, value)


class Loop:
    """Trains `model` by `method` on `source`.

    With a `folder` the run is logged, checkpointed and resumable; without one (the teaching API, a
    benchmark) it only trains. `interrupted` tells afterwards whether it was stopped early.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        source: Source,
        settings: TrainSettings,
        *,
        device: torch.device,
        folder: Path | None = None,
        hooks: Hooks | None = None,
        quiet: bool = False,
    ) -> None:
        self.model = model
        self.method = method
        self.source = source
        self.settings = settings
        self.device = device
        self.folder = folder
        self.hooks = hooks or Hooks()
        self.world: World = join_world(device)
        self.progress = Progress()
        self.interrupted = False
        self._saved = 0  # the step of the newest checkpoint
        self.line = LiveLine(quiet=quiet or not self.world.main)
        self.optimizers = make_optimizers(
            model,
            kind=settings.optimizer,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=(settings.beta1, settings.beta2),
            muon_learning_rate=settings.muon_learning_rate,
            muon_dtype=getattr(model, "compute_dtype", None) or torch.float32,
        )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._run_step = compiled(method, device, self.line) if settings.compile else method.step
        self._log: RunLog | None = None
        self.peak_flops = 0.0
        self._seconds_here = 0.0  # without those of the processes that this one resumes

    # --- one step ----------------------------------------------------------------------------

    def learning_rate_share(self, step: int) -> float:
        s = self.settings
        return learning_rate_share(
            step, s.max_steps, s.warmup, s.schedule, s.min_learning_rate / s.learning_rate,
            s.decay_share,
        )  # fmt: skip

    def gradients(self, start: int) -> Sums:
        """Leave the gradient of the mean loss of one batch in the parameters.

        Returns what the steps on the sequences from `start` on gave, over all processes.
        """
        s = self.settings
        first, mine = share(start, s.batch_size, self.world)
        micro = s.micro_batch_size or max(1, s.batch_size)
        sums = Sums()
        for offset in range(0, mine, micro):
            batch = self.source.batch(first + offset, min(micro, mine - offset))
            result = self._run_step(self.model, to_device(batch, self.device))
            result.loss_sum.backward()
            sums.add(result)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        add_up([*grads, *sums.tensors()], self.world)
        if sums.count < 1:
            raise RunError(
                f"Step {self.progress.step + 1} has no token to learn from: every target of its "
                "batch is masked. Look at the data's loss mask."
            )
        torch._foreach_div_(grads, sums.count)
        return sums

    def step(self) -> dict[str, float]:
        """One optimiser step; raises before the weights change if the loss is not finite."""
        sums = self.gradients(self.progress.step * self.settings.batch_size)
        loss, metrics = sums.loss, sums.metric_means()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if not math.isfinite(loss) or not math.isfinite(norm.item()):
            raise RunError(
                f"The loss is not a number at step {self.progress.step + 1} (loss {loss}, gradient "
                f"norm {norm.item()}). {self.last_good()}Start a new run with a lower "
                "train.learning_rate."
            )
        if self.settings.grad_clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.settings.grad_clip, norm)
        rate = self.learning_rate_share(self.progress.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += sums.tokens
        rate_now = self.settings.learning_rate * rate
        return {"loss": loss, "learning_rate": rate_now, "grad_norm": norm.item(), **metrics}

    # --- the run -----------------------------------------------------------------------------

    def train(self) -> Progress:
        """Run to the end, to an interruption, to `stop_after` or to an early stop."""
        s = self.settings
        self.model.train()
        if self.progress.step == 0:  # a resumed run has the states of its checkpoint
            torch.manual_seed(s.seed + self.world.rank)  # what dropout draws from
        if self.folder is not None and self.world.main:
            self._log = RunLog(self.folder, self.progress.step)
        if self.hooks.flops_per_token and self.world.main:
            dtype = getattr(self.model, "compute_dtype", None) or torch.float32
            self.peak_flops = gemm_rate(self.device.type, dtype)
        try:
            with catch_interrupts(self.line) as interrupted:
                while self.progress.step < s.max_steps and not self.progress.stopped_early:
                    self._step_and_report()
                    last = self.progress.step == s.max_steps
                    self._when_due(last)
                    stop = agree(bool(interrupted), self.world)
                    if stop or (s.stop_after and self.progress.step >= s.stop_after and not last):
                        self.interrupted = True
                        self.save()
                        break
        finally:
            if self._log is not None:
                self._log.close()
            self.line.end()
        return self.progress

    def utilisation(self, tokens_per_second: float) -> float:
        """MFU: the share of the processes' measured peak rate that the model's FLOPs make up."""
        peak = self.peak_flops * self.world.size
        return tokens_per_second * self.hooks.flops_per_token / peak

    def _step_and_report(self) -> None:
        synchronise(self.device)
        start, before = time.perf_counter(), self.progress.tokens
        values = self.step()
        synchronise(self.device)
        seconds = time.perf_counter() - start
        p = self.progress
        p.seconds += seconds
        p.train_losses.append(values["loss"])
        rate = (p.tokens - before) / seconds
        values["tokens_per_second"] = rate
        text = f"step {p.step}/{self.settings.max_steps} | loss {values['loss']:.3f}"
        text += f" | {rate:,.0f} tokens/s"
        if self.peak_flops:
            values["mfu"] = self.utilisation(rate)
            text += f" | MFU {values['mfu']:.0%}"
        self._seconds_here += seconds
        left = (self.settings.max_steps - p.step) * self._seconds_here / len(p.train_losses)
        self.line.show(f"{text} | {clock(left)} left")
        if self._log is not None:
            self._log.write(p.step, **values)

    def _when_due(self, last: bool) -> None:
        s, step = self.settings, self.progress.step

        def due(every: int) -> bool:
            return last or (every > 0 and step % every == 0)

        looks = self.hooks.val_batches is not None or self.hooks.val_figures is not None
        if looks and due(s.eval_every):
            self._evaluate_and_keep_best()
            if s.patience and self.progress.evals_without_gain >= s.patience:
                self.line.say(f"No better validation loss for {s.patience} evaluations: stopping.")
                self.progress.stopped_early = True
                last = True
        if self.hooks.sample is not None and due(s.sample_every) and self.world.main:
            self.model.eval()
            self.hooks.sample(self.model, step)
            self.model.train()
        if due(s.checkpoint_every) or last:
            self.save()
        wait_for_all(self.world)

    def _evaluate_and_keep_best(self) -> None:
        p = self.progress
        found = self.evaluate()
        p.val_loss = found["val_loss"]
        p.val_losses.append(p.val_loss)
        if self._log is not None:
            self._log.write(p.step, **found)
        better = p.val_loss < p.best_val_loss
        self.line.say(
            f"step {p.step}: validation loss {p.val_loss:.4f}"
            + (" (best so far)" if better else "")
        )
        if better:
            p.best_val_loss, p.best_step, p.evals_without_gain = p.val_loss, p.step, 0
        else:
            p.evals_without_gain += 1
        keep = better or not self.settings.keep_best
        if keep and self.hooks.save_best is not None and self.world.main:
            self.hooks.save_best(self.model)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """`val_loss`, the mean over the validation batches in nats, and whatever else is measured.

        The loss is inf when there is nothing to measure it on.
        """
        self.model.eval()
        sums = Sums()
        for number, batch in enumerate(self.hooks.val_batches() if self.hooks.val_batches else ()):
            if number % self.world.size == self.world.rank:
                sums.add(self.method.step(self.model, to_device(batch, self.device)))
        add_up(sums.tensors(), self.world)
        found = {"val_loss": sums.loss if sums.count else math.inf}
        found |= {f"val_{name}": value for name, value in sums.metric_means().items()}
        if self.hooks.val_figures is not None:
            found |= self.hooks.val_figures(self.model)
        self.model.train()
        return found

    # --- checkpoints -------------------------------------------------------------------------

    def save(self) -> None:
        """Write checkpoints/step-N, once per step."""
        if self.folder is None or self._saved == self.progress.step:
            return
        self._saved = self.progress.step
        where = self.device if self.device.type == "cuda" else torch.device("cpu")
        own = rng_state(self.device)
        parts = {name: gather(state.to(where), self.world) for name, state in own.items()}
        if self.world.main:
            rng = [{k: v[r].cpu() for k, v in parts.items()} for r in range(self.world.size)]
            save_checkpoint(
                self.folder / "checkpoints", self.progress.step, self.model, self.optimizers, rng,
                self.progress.to_state(), self.settings.keep_checkpoints,
                self.source.state_tensors() if isinstance(self.source, Stateful) else {},
            )  # fmt: skip
        wait_for_all(self.world)

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one; return its step."""
        assert self.folder is not None
        if self.world.main:
            remove_asides(self.folder / "checkpoints")  # what a kill left half-way
        wait_for_all(self.world)
        found = step_folders(self.folder / "checkpoints")
        if not found:
            return 0
        step, path = found[-1]
        self._saved = step
        state, rng, own = load_checkpoint(path, self.model, self.optimizers)
        if len(rng) != self.world.size:
            raise UserError(
                f"{path} was written by {len(rng)} processes, but {self.world.size} resume it; "
                f"start torchrun with --nproc_per_node {len(rng)}."
            )
        self.progress.restore(state)
        if isinstance(self.source, Stateful):
            self.source.restore_tensors(own)
        set_rng_state(rng[self.world.rank], self.device)
        return step

    def last_good(self) -> str:
        found = step_folders(self.folder / "checkpoints") if self.folder else []
        return f"The last good checkpoint is {found[-1][1]}. " if found else ""


def compiled(
    method: Method, device: torch.device, line: LiveLine
) -> Callable[[nn.Module, Any], LossSum]:
    """The method's step through torch.compile, or as it is where that cannot work."""
    if device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        line.say(
            "train.compile needs a C++ compiler on the CPU; without one the steps run as usual."
        )
        return method.step
    return torch.compile(method.step)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch's tensors on the device; a batch is a dataclass, a tuple or a dict of tensors."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {k: to_device(v, device) for k, v in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(to_device(v, device) for v in batch)
    moved = {k: to_device(v, device) for k, v in vars(batch).items() if isinstance(v, Tensor)}
    return type(batch)(**{**vars(batch), **moved})


@contextmanager
def catch_interrupts(line: LiveLine) -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM only leave a note; a second Ctrl-C stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        if not line.quiet:  # print would not do: the signal may come in the middle of another one
            os.write(2, b"\nStopping after this step (once more to stop without saving) ...\n")

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
