"""What `train/memory.py` says that training takes is what it takes, tensor by tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import human_bytes
from llm_from_scratch.data.loader import Batch
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.inventory import AnyConfig, parameter_count
from llm_from_scratch.model.memory import Pass
from llm_from_scratch.train.losses import CHUNK, is_chunked
from llm_from_scratch.train.memory import (
    loss_bytes,
    optimizer_bytes,
    optimizer_work_bytes,
    training_memory,
)
from llm_from_scratch.train.optim import make_optimizers
from llm_from_scratch.train.pretrain import NextToken, refuse_too_large
from llm_from_scratch.train.seq2seq import Seq2Seq, Seq2SeqBatch
from tests.model.architectures import ARCHITECTURES, ids, make, without_dropout
from tests.model.live import Live
from tests.model.test_accounting import held

DECODERS = [n for n, c in ARCHITECTURES.items() if isinstance(c, ModelConfig) and c.causal]
PAIRS = [n for n, c in ARCHITECTURES.items() if isinstance(c, EncoderDecoderConfig)]


def optimizers_of(model: nn.Module, kind: str, compute: torch.dtype) -> list[Any]:
    """As the loop makes them."""
    return make_optimizers(
        model, kind=kind, learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95),
        muon_dtype=compute,
    )  # fmt: skip


def fill_gradients(model: nn.Module) -> int:
    """Zero gradients, as the loop gives them to whatever the loss does not reach; their bytes."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return sum(p.grad.nbytes for p in trained if p.grad is not None)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_gradients_and_states_are_exact(name: str, kind: str) -> None:
    config = ARCHITECTURES[name]
    model = make(config)
    memory = training_memory(config, Pass(1, 8), kind)
    assert memory.weights == sum(p.nbytes for p in model.parameters())
    assert memory.gradients == fill_gradients(model)
    optimizers = optimizers_of(model, kind, torch.float32)
    for optimizer in optimizers:
        optimizer.step()
    states = (state for optimizer in optimizers for state in optimizer.state.values())
    real = sum(value.nbytes for state in states for value in state.values())
    assert memory.optimizer == optimizer_bytes(config, kind) == real


def batch_for(config: AnyConfig, b: int, t: int) -> Any:
    """A batch as the methods take them."""
    tokens = ids(config, b, t)
    if isinstance(config, EncoderDecoderConfig):
        return Seq2SeqBatch(tokens, torch.ones_like(tokens), tokens)
    return Batch(tokens, tokens)


def loss_of(model: nn.Module, config: AnyConfig, b: int, t: int) -> torch.Tensor:
    method: Any = Seq2Seq() if isinstance(config, EncoderDecoderConfig) else NextToken()
    return method.step(model, batch_for(config, b, t)).loss_sum


def run_of(config: AnyConfig, b: int, t: int, compute: torch.dtype) -> Pass:
    if isinstance(config, EncoderDecoderConfig):
        return Pass(b, t, compute, source=t, source_masked=True)
    return Pass(b, t, compute)


def with_vocabulary(config: AnyConfig, size: int) -> AnyConfig:
    if isinstance(config, EncoderDecoderConfig):
        stacks = (replace(stack, vocab_size=size) for stack in (config.encoder, config.decoder))
        return replace(config, **dict(zip(("encoder", "decoder"), stacks, strict=True)))
    return replace(config, vocab_size=size)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [71, 1024, 1025])
@pytest.mark.parametrize("name", [*DECODERS, *PAIRS])
def test_a_step_holds_activations_and_logits(
    name: str, vocab_size: int, compute: torch.dtype
) -> None:
    config = with_vocabulary(without_dropout(ARCHITECTURES[name]), vocab_size)
    model, run = make(config, compute), run_of(config, 2, 24, compute)
    real = held(model, lambda: loss_of(model, config, 2, 24))
    memory = training_memory(config, run)
    assert sum(memory.activations.values()) + memory.logits_held == pytest.approx(real, rel=0.01)


def test_chunks_are_those_of_the_loss() -> None:
    softcapped = ARCHITECTURES["gemma2"]
    assert isinstance(softcapped, ModelConfig)
    assert not is_chunked(replace(softcapped, vocab_size=5000))
    # Chunks of a known size: more tokens than one chunk do not take more.
    config = ARCHITECTURES["llama-d192"]
    assert 640 < CHUNK < 2 * 640
    one, many = (loss_bytes(config, Pass(b, 640))[1] for b in (2, 40))
    assert one == many


def test_scaled_logits_come_in_chunks_of_the_same_loss() -> None:
    config = without_dropout(with_vocabulary(ARCHITECTURES["llama-d192"], 1500))
    assert isinstance(config, ModelConfig)
    config = replace(config, scale_logits=True)
    assert is_chunked(config)
    model = make(config)
    chunked, plain = (loss_of(model.train(on), config, 2, 24) for on in (True, False))
    torch.testing.assert_close(chunked, plain, rtol=1e-5, atol=0)
    real = held(model.train(), lambda: loss_of(model, config, 2, 24))
    memory = training_memory(config, run_of(config, 2, 24, torch.float32))
    assert sum(memory.activations.values()) + memory.logits_held == pytest.approx(real, rel=0.01)


CASES = [
    ("llama-d192", "muon", torch.float32, 2, 64),
    ("llama-d192", "adamw", torch.bfloat16, 4, 400),
    ("gpt2-d192", "muon", torch.bfloat16, 2, 64),
    ("gpt2-d192", "adamw", torch.float32, 4, 400),
    ("qwen3_moe", "muon", torch.float32, 8, 64),
    ("gemma2", "adamw", torch.float32, 8, 64),
    ("qwen3", "adamw", torch.bfloat16, 8, 64),
    ("marian", "muon", torch.float32, 8, 64),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_total_bounds_the_fullest_moment(case: Any) -> None:
    name, kind, compute, b, t = case
    config = ARCHITECTURES[name]
    with Live() as live:
        model = make(config, compute)
        optimizers = optimizers_of(model, kind, compute)
        for _ in range(2):  # from the second step on the optimisers have their state
            live.peak = live.now
            loss_of(model, config, b, t).backward()
            fill_gradients(model)
            before = live.now
            passes, live.peak = live.peak, live.now
            for optimizer in optimizers:
                optimizer.step()
            work = live.peak - before
            steps = live.peak
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
    memory = training_memory(config, run_of(config, b, t, compute), kind)
    real = max(passes, steps)
    # At the fullest moment of a pass there are no gradients yet, unless it is not the first one.
    assert memory.total - memory.gradients <= 1.08 * real
    assert memory.total >= 0.97 * real
    if kind == "muon":
        assert optimizer_work_bytes(config, kind, compute) == pytest.approx(work, rel=0.15)


def test_an_optimiser_that_is_forgotten_is_noticed() -> None:
    config = ARCHITECTURES["llama-d192"]
    assert optimizer_bytes(config, "muon") < optimizer_bytes(config, "adamw")
    assert optimizer_bytes(config, "adamw") > 8 * parameter_count(config)
    assert optimizer_work_bytes(config, "adamw", torch.float32) == 0


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_pretraining_refuses_what_cannot_fit(kind: str) -> None:
    """By this account: what is there before a single token is."""
    config = ARCHITECTURES["llama"]
    model = make(config, torch.float32)
    needed = 2 * sum(p.nbytes for p in model.parameters()) + optimizer_bytes(config, kind)
    refuse_too_large(config, kind, None)
    refuse_too_large(config, kind, needed)
    with pytest.raises(UserError, match=f"takes at least {human_bytes(needed)}, but there are"):
        refuse_too_large(config, kind, needed - 1)
