"""Pruning: which weights may be zero.

Magnitude: the smallest. Wanda (arXiv:2306.11695): those whose product with the usual size of their
input is smallest, compared within each output; a small weight on a strong input matters. Both also
in the pattern 2:4, two zeros in every four inputs in a row, which some hardware skips.

Axes: o outputs, i inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("unstructured", "2:4")


def keep_mask(
    weight_oi: Tensor,
    sparsity: float = 0.5,
    *,
    pattern: str = "unstructured",
    input_squares_i: Tensor | None = None,
) -> Tensor:
    """Which weights stay: a bool tensor like `weight_oi`.

    Args:
        weight_oi: the matrix.
        sparsity: the share that goes. The pattern "2:4" is always one half.
        pattern: "unstructured" or "2:4".
        input_squares_i: the mean square of each input over some text: Wanda. None: magnitude.
    """
    score_oi = weight_oi.detach().float().abs()
    if input_squares_i is not None:
        score_oi = score_oi * input_squares_i.float().sqrt()
    if pattern == "2:4":
        quads = score_oi.unflatten(1, (-1, 4))
        # Sorting is stable, so of equal scores the first stay: always exactly two.
        best = quads.argsort(dim=-1, descending=True, stable=True)[..., :2]
        return torch.zeros_like(quads, dtype=torch.bool).scatter_(-1, best, True).flatten(1)
    # Wanda compares within an output, where the inputs' sizes are the same; magnitude everywhere.
    rows = score_oi if input_squares_i is not None else score_oi.view(1, -1)
    gone = round(rows.shape[1] * sparsity)
    weakest = rows.argsort(dim=-1, stable=True)[:, :gone]
    mask = torch.ones_like(rows, dtype=torch.bool).scatter_(-1, weakest, False)
    return mask.view(score_oi.shape)
