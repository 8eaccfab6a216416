"""Optimisers: AdamW with decay groups, and Muon for the matrices inside the blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def orthogonalise(g_nij: Tensor, steps: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Push the singular values of each matrix of a stack towards 1 (quintic Newton-Schulz).

    The polynomial a X + b (X X^T) X + c (X X^T)^2 X with these coefficients (K. Jordan, Muon, 2024)
    brings singular values above about 0.05 into 0.6 to 1.25 in five steps, without an SVD; smaller
    ones grow by a factor of 3.4 a step.
    Rounding does no harm, so `dtype` may be bf16 where that is faster.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (g_nij / (g_nij.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).to(g_nij.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a matrix learns equally fast.

    The update is scaled by 0.2 sqrt(max(rows, columns)), which gives it the size of an AdamW
    update, so that one learning rate and one weight decay serve both (Moonlight, arXiv:2502.16982).
    Only for matrices and stacks of them (experts); those of one shape are worked on together.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.dtype = dtype
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    assert parameter.grad is not None
                    state = self.state[parameter]
                    if not state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    # Nesterov: look one step ahead along the momentum.
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                stacked = orthogonalise(torch.stack(updates), dtype=self.dtype)
                size = 0.2 * max(shape[-2:]) ** 0.5
                for parameter, update in zip(parameters, stacked, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * size)


def decays(name: str, parameter: Tensor) -> bool:
    """Matrices and embeddings shrink; norms and biases do not."""
    return parameter.dim() >= 2


def make_optimizers(
    model: nn.Module,
    *,
    kind: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    muon_learning_rate: float | None = None,
    muon_momentum: float = 0.95,
    muon_dtype: torch.dtype = torch.float32,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a run; their groups carry `peak_lr`, which the schedule multiplies."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices: list[Tensor] = []
    if kind == "muon":
        # The matrices of all experts lie in one tensor with three axes.
        matrices = [p for n, p in named if p.dim() in (2, 3) and "blocks." in n]
    chosen = {id(p) for p in matrices}
    rest = [(n, p) for n, p in named if id(p) not in chosen]
    groups = [
        {"params": [p for n, p in rest if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in rest if not decays(n, p)], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for _, p in named)
    result: list[torch.optim.Optimizer] = []
    if kept := [g for g in groups if g["params"]]:
        result.append(torch.optim.AdamW(kept, lr=learning_rate, betas=betas, fused=fused))
    if matrices:
        rate = muon_learning_rate or learning_rate
        result.append(Muon(matrices, rate, muon_momentum, weight_decay, muon_dtype))
    for optimizer in result:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return result
