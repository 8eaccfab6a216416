"""A large vocabulary costs its weights, and hardly any memory besides: sft, dpo and grpo.

Two whole steps of the loop, of which the second is watched tensor by tensor. What counts is the
peak above weights, gradients and the optimiser's state.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm_from_scratch.core.config import from_dict
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.presets import ModelSettings, resolve
from llm_from_scratch.text.chat import ChatTokens
from llm_from_scratch.train.loop import Loop
from llm_from_scratch.train.methods import method_named
from llm_from_scratch.train.pairs import Pair
from tests.model.live import Live

ROWS, LENGTH = 8, 96
SMALL, LARGE = 1_000, 150_000


def drawn(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SMALL, (count,), generator=generator).tolist()


def batch_of(name: str, method: Any) -> Any:
    """Eight rows of 96 tokens, of which the last 64 are learnt from."""
    mask = [0] * (LENGTH - 64) + [1] * 64
    rows = [drawn(LENGTH, seed) for seed in range(ROWS)]
    if name == "sft":
        return method.collate([ChatTokens(row, mask) for row in rows])
    if name == "dpo":
        pairs = zip(rows[::2], rows[1::2], strict=True)
        return method.collate([Pair(pair, (mask, mask)) for pair in pairs])
    from llm_from_scratch.train.rollouts import Rollout

    written = torch.full((ROWS * 64,), -1.0)
    rollout = Rollout(
        torch.tensor(rows).flatten(), torch.full((ROWS,), LENGTH), torch.full((ROWS,), LENGTH - 64),
        written, written, torch.linspace(-1, 1, ROWS), torch.ones(ROWS), torch.zeros(ROWS, 5),
    )  # fmt: skip
    return rollout.batch(range(ROWS))


def peak(name: str, vocab_size: int) -> int:
    """Bytes above weights, gradients and states at the fullest moment of a step."""
    cls = method_named(name)
    settings = {
        "train": {"batch_size": ROWS, "max_steps": 2, "precision": "fp32", "device": "cpu"},
    }  # fmt: skip
    config = from_dict(cls.Config, settings)
    method: Any = cls(config)
    shape = ModelSettings(d_model=32, n_layers=24, n_heads=4)
    model = Decoder(resolve(shape, vocab_size, LENGTH))
    model.initialise(0)
    batch = batch_of(name, method)
    if name == "grpo":
        method.verifiers = {}
    source = SimpleNamespace(batch=lambda start, count: batch)
    loop = Loop(model, method, source, config.train, device=torch.device("cpu"), quiet=True)
    loop.step()
    states = [t for o in loop.optimizers for state in o.state.values() for t in state.values()]
    gradients = sum(p.nbytes for p in model.parameters())
    with Live([*model.parameters(), *model.buffers(), *states]) as live:
        loop.step()
    return live.peak - gradients


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_memory_hardly_grows_with_the_vocabulary(name: str) -> None:
    small, large = peak(name, SMALL), peak(name, LARGE)
    print(f"{name}: {small / 2**20:.1f} MiB and {large / 2**20:.1f} MiB, {large / small:.3f}")
    assert large <= 1.3 * small
