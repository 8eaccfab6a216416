"""The product of activations in half precision with weights in fp32, without keeping the copy.

Autograd would keep each layer's half-precision copy of its weights until the gradients are there:
half the size of the model once more. Here it is made again, which costs little beside the product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_oi: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_oi)
        return F.linear(x, weight_oi.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight_oi = ctx.saved_tensors
        slope = grads[0]
        d_x = slope @ weight_oi.to(slope.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_x, None
        d_weight = slope.flatten(0, -2).T @ x.flatten(0, -2)
        return d_x, d_weight.to(weight_oi.dtype)


def product(x: Tensor, weight_oi: Tensor, bias_o: Tensor | None) -> Tensor:
    """x (..., i) times the transpose of the weights (o, i), and the bias, in the precision of x."""
    bias_o = None if bias_o is None else bias_o.to(x.dtype)
    if x.dtype == weight_oi.dtype or not torch.is_grad_enabled():
        return F.linear(x, weight_oi.to(x.dtype), bias_o)
    y: Tensor = _Product.apply(x, weight_oi)
    return y if bias_o is None else y + bias_o
