"""NF4: four bits as places on a curve that fits normally distributed weights.

The sixteen values are quantiles of the normal distribution, scaled to [-1, 1], with an exact zero;
64 weights in a row share the largest magnitude among them, by which they are divided (QLoRA,
arXiv:2305.14314, appendix E). Values, blocks and rounding are those of the bitsandbytes library.

Axes: o outputs, i inputs, g blocks of 64 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.quant.tiles import NF4_VALUES

BLOCK = 64


@dataclass(frozen=True)
class NF4Blocks:
    """A matrix in NF4: w = value[code] * absmax. Codes are uint8 from 0 to 15, absmax is fp32."""

    codes_oi: Tensor
    absmax_og: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes_oi.shape

    @property
    def bits_per_weight(self) -> float:
        """The blocks' magnitudes included."""
        return 4 + 32 / BLOCK

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) that the codes stand for."""
        values = torch.tensor(NF4_VALUES, device=self.codes_oi.device)
        w_ogn = values[self.codes_oi.int()].unflatten(1, (-1, BLOCK))
        return (w_ogn * self.absmax_og[..., None]).flatten(1).to(dtype)


def quantize_nf4(weight_oi: Tensor) -> NF4Blocks:
    """A matrix whose number of inputs is a multiple of 64, rounded to the nearest values."""
    w_ogn = weight_oi.detach().float().unflatten(1, (-1, BLOCK))
    absmax_og = w_ogn.abs().amax(-1)
    values = torch.tensor(NF4_VALUES, device=weight_oi.device)
    between = (values[1:] + values[:-1]) / 2
    largest = torch.where(absmax_og == 0, 1.0, absmax_og)
    codes = torch.bucketize(w_ogn * (1 / largest)[..., None], between)
    return NF4Blocks(codes.flatten(1).to(torch.uint8), absmax_og)
