"""GPTQ: round one input's weights after the other, and let the rest make up for the error.

What counts is not how far each weight moves but how far the outputs do. For one output with weights
w and inputs x, the squared error over the calibration text is (w - q) H (w - q)^T with H = sum of
x x^T. Once one weight is fixed, the best correction of those that are still free follows from the
inverse of H (arXiv:2210.17323). Three things make that quick and stable: all outputs share H, so
they are rounded together; what is needed of the inverse is one Cholesky factor, computed once; and
corrections reach the far columns block by block.

The columns with the strongest inputs come first, as long as many others can still make up for them
("act-order"). Groups stay what they are in the matrix, with their scales chosen beforehand, so that
the format does not change.

Axes: o outputs, i inputs, g groups, n inputs of one group, c columns of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_from_scratch.core.errors import RunError
from llm_from_scratch.quant.rtn import Grouped, search_scales

COLUMNS = 128  # rounded before their corrections go to all that follow
DAMPING = 0.01  # of H's mean diagonal, added to it


def quantize_gptq(
    weight_oi: Tensor,
    hessian_ii: Tensor,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
    damping: float = DAMPING,
    act_order: bool = True,
) -> Grouped:
    """A matrix as integers in groups that keep x W^T as it is on the calibration text.

    Args:
        weight_oi: the matrix. It is not changed.
        hessian_ii: the sum (or mean) of x x^T over the calibration tokens, fp32.
        bits, group_size, symmetric, scale_dtype: as in `rtn.quantize_rtn`.
        damping: added to the diagonal, as a share of its mean: the less text, the more it takes.
        act_order: whether the columns with the strongest inputs are rounded first.
    """
    w_oi = weight_oi.detach().float().clone()
    importance_i = hessian_ii.diagonal().float()
    size = group_size or w_oi.shape[1]
    scales_og, zeros_og = search_scales(
        w_oi.unflatten(1, (-1, size)), bits, symmetric=symmetric, scale_dtype=scale_dtype,
        importance_i=importance_i + importance_i.mean().clamp(min=1e-30) * damping,
    )  # fmt: skip
    order = torch.arange(len(importance_i), device=w_oi.device)
    if act_order:
        order = importance_i.argsort(descending=True, stable=True)
    factor_ii = _inverse_factor(hessian_ii[order][:, order], damping)
    codes_oi = torch.empty_like(w_oi, dtype=torch.uint8)
    columns_oi = w_oi[:, order]
    scales, zeros = scales_og.float(), zeros_og.float()
    for start in range(0, len(order), COLUMNS):
        end = min(start + COLUMNS, len(order))
        block_oc, errors_oc = columns_oi[:, start:end], []
        for c in range(end - start):
            place = order[start + c]
            scale, zero = scales[:, place // size], zeros[:, place // size]
            codes = (block_oc[:, c] / scale + zero).round_().clamp_(0, 2**bits - 1)
            codes_oi[:, place] = codes.to(torch.uint8)
            row = factor_ii[start + c, start + c : end]
            error = (block_oc[:, c] - (codes - zero) * scale) / row[0]
            block_oc[:, c:] -= error[:, None] * row
            errors_oc.append(error)
        columns_oi[:, end:] -= torch.stack(errors_oc, 1) @ factor_ii[start:end, end:]
    return Grouped(codes_oi, scales_og, None if symmetric else zeros_og.to(torch.uint8), bits)


def _inverse_factor(hessian_ii: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of H's inverse; more is added to the diagonal where it fails."""
    exact = hessian_ii.double()
    diagonal = exact.diagonal()
    mean = diagonal.mean()
    if not torch.isfinite(mean):
        raise RunError("The calibration text gives activations that are not finite.")
    mean = mean if mean > 0 else torch.ones_like(mean)
    for power in range(6):
        damped = exact + torch.eye(len(exact), device=exact.device).double() * (
            mean * damping * 10**power
        )
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return factor.float()
    raise RunError(
        "The inputs of a matrix on the calibration text cannot be inverted; give more text, or use "
        "--method rtn."
    )
