"""Losses, schedules and optimisers, each against its formula or PyTorch's own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.train.losses import chunked_cross_entropy_sum, cross_entropy_sum
from llm_from_scratch.train.optim import Muon, make_optimizers, orthogonalise
from llm_from_scratch.train.schedule import learning_rate_share
from llm_from_scratch.train.settings import TrainSettings
from tests.train.helpers import tiny_model


@given(st.integers(1, 23), st.integers(1, 30), st.integers(0, 2**31))
def test_chunked_loss_and_gradients_equal_the_plain_ones(
    tokens: int, chunk: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 7, generator=g, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 7, generator=g).requires_grad_()
    targets = torch.randint(0, 11, (tokens,), generator=g)
    targets[torch.rand(tokens, generator=g) < 0.3] = -100
    plain = cross_entropy_sum(hidden @ weight.T, targets)
    expected = torch.autograd.grad(plain * 0.37, [hidden, weight])
    chunked = chunked_cross_entropy_sum(hidden, weight, targets, chunk)
    found = torch.autograd.grad(chunked * 0.37, [hidden, weight])
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-5)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cross_entropy_sum_is_a_sum_over_the_targets_that_count() -> None:
    logits = torch.randn(2, 3, 5)
    targets = torch.tensor([[1, -100, 4], [-100, 0, 2]])
    expected = -sum(
        logits[b, t].log_softmax(-1)[targets[b, t]] for b, t in ((0, 0), (0, 2), (1, 1), (1, 2))
    )
    assert cross_entropy_sum(logits, targets).item() == pytest.approx(float(expected), rel=1e-5)


def test_schedules_rise_stay_and_fall() -> None:
    wsd = [learning_rate_share(s, 100, 10, "wsd", 0.1, 0.3) for s in range(100)]
    assert wsd[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(wsd[10:71]) == {1.0}
    assert wsd[99] == pytest.approx(0.1 + 0.9 / 30)
    assert all(a > b for a, b in itertools.pairwise(wsd[70:]))
    cosine = [learning_rate_share(s, 100, 10, "cosine", 0.1, 0.3) for s in range(100)]
    assert cosine[10] == 1.0
    for step in (11, 54, 99):
        fall = 0.45 * (1 + math.cos(math.pi * (step - 10) / 90))
        assert cosine[step] == pytest.approx(0.1 + fall)
    no_jump = [learning_rate_share(s, 100, 50, "wsd", 0.0, 0.6) for s in range(100)]
    assert no_jump[48:52] == pytest.approx([0.98, 1.0, 1.0, 0.98])
    assert learning_rate_share(99, 100, 0, "constant", 0.1, 0.3) == 1.0
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        TrainSettings(schedule="cosin")


def test_decay_groups_leave_norms_and_biases_alone() -> None:
    model = tiny_model(family="gpt2", n_kv_heads=2)
    (adamw,) = make_optimizers(
        model, kind="adamw", learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)
    )
    decayed, plain = adamw.param_groups
    assert decayed["weight_decay"] == 0.1
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0.0
    assert all(p.dim() < 2 for p in plain["params"])
    count = len(decayed["params"]) + len(plain["params"])
    assert count == len(list(model.parameters()))


def test_muon_takes_the_matrices_of_the_blocks_only() -> None:
    model = tiny_model()
    adamw, muon = make_optimizers(
        model, kind="muon", learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.95)
    )
    assert isinstance(muon, Muon)
    chosen = {id(p) for g in muon.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in chosen) == (parameter.dim() == 2 and name.startswith("blocks."))
    assert len(chosen) + sum(len(g["params"]) for g in adamw.param_groups) == len(
        list(model.parameters())
    )


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 24, 5), (3, 5, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalise_brings_singular_values_near_one(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(g, steps=10, dtype=dtype))
    assert values.min() > 0.6
    assert values.max() < 1.35
    # The directions stay: <g, orthogonalised g> is about the sum of g's singular values.
    inner = (orthogonalise(g, steps=10) * g).sum()
    assert inner > 0.75 * torch.linalg.svdvals(g).sum()


def test_muon_stack_equals_one_by_one() -> None:
    torch.manual_seed(0)
    together = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [Muon(together, 0.02, 0.9, 0.1), *(Muon([p], 0.02, 0.9, 0.1) for p in alone)]
    for _ in range(3):
        for a, b in zip(together, alone, strict=True):
            a.grad = torch.randn(6, 4)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (4, 12)])
def test_muon_is_pytorchs_muon(shape: tuple[int, int]) -> None:
    """torch.optim.Muon with its Moonlight scaling is the same optimiser (it rounds to bf16)."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    before = ours.detach().clone()
    mine = Muon([ours], 0.02, 0.95, 0.1)
    peer = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        peer.step()
    moved = (theirs - before).norm()
    assert (ours - theirs).norm() < 0.03 * moved


def test_five_steps_bring_ordinary_singular_values_near_one() -> None:
    """What the docstring says of five steps, for the values that a gradient matrix has."""
    values = torch.linspace(0.05, 1.0, 12)
    u = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1))).Q
    v = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2))).Q
    found = torch.linalg.svdvals(orthogonalise(u @ values.diag() @ v.T))
    assert found.min() > 0.6
    assert found.max() < 1.25


def test_adamw_step_equals_the_formula() -> None:
    """One step of AdamW (arXiv:1711.05101) on a matrix: decoupled decay, bias-corrected moments."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
    (adamw,) = make_optimizers(
        model, kind="adamw", learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95)
    )
    weight = model[0].weight
    before = weight.detach().clone()
    loss = F.mse_loss(model(torch.ones(1, 3)), torch.tensor([[1.0, -1.0]]))
    loss.backward()
    grad = weight.grad.clone()
    adamw.step()
    expected = before * (1 - 0.01 * 0.1) - 0.01 * grad / (grad.abs() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-7)
