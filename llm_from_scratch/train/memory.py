"""What training a model keeps in memory, part by part, from its config alone.

Weights, gradients and the optimiser's state are exact; activations and logits are an inventory of
what the backward pass waits for; what a part needs only while it is at work is an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.inventory import AnyConfig, Weight, parameter_count, weights_of
from llm_from_scratch.model.memory import FP32, INT64, Pass, activation_bytes
from llm_from_scratch.train.losses import CHUNK, is_chunked

if TYPE_CHECKING:
    from llm_from_scratch.model.heads import HeadConfig


def _by_muon(weight: Weight, kind: str) -> bool:
    """Whether Muon moves this weight (see `make_optimizers`)."""
    return kind == "muon" and len(weight.shape) in (2, 3) and "blocks." in weight.name


def optimizer_bytes(config: AnyConfig, kind: str, head: HeadConfig | None = None) -> int:
    """State of the optimisers: AdamW has two moments and a counter per tensor, Muon a momentum."""
    total = 0
    for weight in weights_of(config, head):
        if weight.trained and _by_muon(weight, kind):
            total += weight.numel * FP32
        elif weight.trained:
            total += weight.numel * 2 * FP32 + weight.count * FP32
    return total


def optimizer_work_bytes(config: AnyConfig, kind: str, compute: torch.dtype) -> float:
    """About what a step of Muon takes for a moment: it works on all matrices of a shape at once.

    These are there as updates and stacked (fp32), and, in the precision of the products, as the
    iterate and the three terms of the next one; beside them three squares of the smaller side.
    """
    alike: dict[tuple[int, ...], list[float]] = {}
    for weight in weights_of(config):
        if _by_muon(weight, kind):
            bytes_of_one = prod(weight.shape) * (2 * FP32 + 4 * compute.itemsize)
            squares = 3 * prod(weight.shape[:-2]) * min(weight.shape[-2:]) ** 2 * compute.itemsize
            alike.setdefault(weight.shape, []).append(weight.count * (bytes_of_one + squares))
    return max((sum(group) for group in alike.values()), default=0.0)


def loss_bytes(config: AnyConfig, run: Pass, head: HeadConfig | None = None) -> tuple[float, float]:
    """(held for the backward pass, at work for a moment) by the logits and the cross-entropy.

    In chunks, gradients are known at once: those of the last states and of the matrix are held, and
    logits exist for one chunk. Otherwise the log-probabilities of all tokens are held. An encoder
    has no logits of its own, and those of a head over a handful of labels do not count.
    """
    stack = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    n, v, m = run.tokens, stack.vocab_size, stack.d_model
    if head is not None:
        table = float(n * v * FP32) if head.kind == "masked_lm" else 0.0
        return table, 2 * table
    if not stack.causal:
        return 0.0, 0.0
    if is_chunked(config):
        alive = 16 if n > CHUNK else 12  # the last chunk's tables go when the next ones are there
        work = alive * min(n, CHUNK) * v + v * m * max(FP32, 2 * run.size)
        return n * m * run.size + v * m * FP32, work
    held = n * m * run.size + n * INT64 + n * v * FP32
    if stack.logit_softcap is not None:
        held += n * v * run.size
    return held, 2 * n * v * FP32


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes by part. Weights and their gradients are fp32; `activations` has parts of its own.

    `logits` is what logits and loss hold and what they have at work. `backward_work` and
    `optimizer_work` are what the backward pass and the optimiser's step take for a moment.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, float]
    logits_held: float
    logits_work: float
    backward_work: float
    optimizer_work: float

    @property
    def logits(self) -> float:
        return self.logits_held + self.logits_work

    @property
    def total(self) -> float:
        """What is there at most at once, give or take what is only estimated.

        An upper bound: in a step of one micro-batch, activations go as gradients come. When the
        optimiser works, the activations are gone.
        """
        passes = sum(self.activations.values()) + self.logits_held
        passes += max(self.logits_work, self.backward_work)
        kept = self.weights + self.gradients + self.optimizer
        return kept + max(passes, self.optimizer_work)


def training_memory(
    config: AnyConfig, run: Pass, optimizer: str = "adamw", head: HeadConfig | None = None
) -> TrainingMemory:
    """One training step of `run.batch` sequences at once (a micro-batch)."""
    held, work = loss_bytes(config, run, head)
    stack = config.decoder if isinstance(config, EncoderDecoderConfig) else config
    return TrainingMemory(
        weights=parameter_count(config, head) * FP32,
        gradients=parameter_count(config, head, trained=True) * FP32,
        optimizer=optimizer_bytes(config, optimizer, head),
        activations=activation_bytes(config, run, head),
        logits_held=held,
        logits_work=work,
        backward_work=3.0 * run.tokens * stack.d_model * FP32,  # the last norm's
        optimizer_work=optimizer_work_bytes(config, optimizer, run.compute),
    )
