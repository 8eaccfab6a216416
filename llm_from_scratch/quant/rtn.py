"""Integers in groups, each rounded to the nearest: the plainest way to make weights small.

A matrix is cut along its inputs into groups. A group shares a scale (and perhaps a zero point), and
each weight keeps a small integer, its code:

    w = scale * (code - zero)

Rounding cannot be made better than to the nearest; the scale can. The largest weight of a group
decides how far apart the codes are, so it may pay to cut it off and to be more exact everywhere
else. `search_scales` tries. `gptq.py` also lets weights make up for each other's errors.

Axes: o outputs, i inputs, g groups, n inputs of one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
# How far the largest weight of a group may lie beyond the last code, in shares of itself.
_SHARES = tuple(1.0 - 0.025 * step for step in range(17))


@dataclass(frozen=True)
class Grouped:
    """A matrix as integers in groups: w = scale * (code - zero).

    `codes_oi` are uint8 from 0 to 2^bits - 1; `zeros_og` is the code that means 0 in each group, as
    uint8, and None where it is the middle, 2^(bits - 1), in all of them.
    """

    codes_oi: Tensor
    scales_og: Tensor
    zeros_og: Tensor | None
    bits: int

    @property
    def shape(self) -> torch.Size:
        return self.codes_oi.shape

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes_oi.shape[1] // self.scales_og.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Scales and zero points included."""
        shared = 8 * self.scales_og.itemsize + (0 if self.zeros_og is None else self.bits)
        return self.bits + shared / self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix (out, in) that the codes stand for."""
        codes_ogn = self.codes_oi.float().unflatten(1, (-1, self.group_size))
        zeros = 2 ** (self.bits - 1) if self.zeros_og is None else self.zeros_og[..., None].float()
        return ((codes_ogn - zeros) * self.scales_og[..., None].float()).flatten(1).to(dtype)

    def offsets(self) -> Tensor:
        """What a code of 0 means, (out, groups) in fp32: w = scale * code + offset."""
        zeros = 2 ** (self.bits - 1) if self.zeros_og is None else self.zeros_og.float()
        return self.scales_og.float() * -zeros


def fitting_group(in_features: int, group_size: int | None) -> int | None:
    """The largest usual group of at most `group_size` inputs that divides a matrix evenly.

    `group_size` None is the whole row. None comes back where no group fits.
    """
    if group_size is None:
        return in_features if in_features % min(GROUP_SIZES) == 0 else None
    fitting = [n for n in GROUP_SIZES if n <= group_size and in_features % n == 0]
    return max(fitting, default=None)


def quantize_rtn(
    weight_oi: Tensor,
    bits: int,
    group_size: int | None,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float32,
) -> Grouped:
    """A matrix rounded to the nearest codes. `group_size` None is one group for each output.

    With `symmetric`, code 2^(bits - 1) means 0 everywhere; else each group has a zero point of its
    own, which serves groups whose weights lie more on one side. The scales are rounded to
    `scale_dtype` before the codes are chosen.
    """
    w_ogn = weight_oi.detach().float().unflatten(1, (-1, group_size or weight_oi.shape[1]))
    scales, zeros = search_scales(w_ogn, bits, symmetric=symmetric, scale_dtype=scale_dtype)
    codes = _round(w_ogn, scales.float(), zeros.float(), bits)
    stored_zeros = None if symmetric else zeros.to(torch.uint8)
    return Grouped(codes.flatten(1).to(torch.uint8), scales, stored_zeros, bits)


def search_scales(
    w_ogn: Tensor,
    bits: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance_i: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scales in `scale_dtype` and zero points (both (o, g)) with the least squared error.

    `importance_i` weighs the inputs' errors. Tried are a range that holds every weight and ranges
    up to 40 % smaller. With 8 bits nothing is gained by that, and the whole range is taken.
    """
    top = 2**bits - 1
    lowest, highest = w_ogn.amin(-1), w_ogn.amax(-1)
    if symmetric:
        # The codes reach one step further below zero than above.
        reach = torch.maximum(lowest / -(top // 2 + 1), highest / (top // 2))
    else:
        lowest, highest = lowest.clamp_(max=0), highest.clamp_(min=0)
        reach = (highest - lowest) / top
    importance = 1.0 if importance_i is None else importance_i.view(w_ogn.shape[1:])
    best = torch.full_like(reach, torch.inf)
    scales = torch.ones_like(reach, dtype=scale_dtype)
    zeros = torch.full_like(reach, 2 ** (bits - 1))
    for share in _SHARES if bits < 8 else (1.0,):
        tried = _rounded_scale(reach * share, scale_dtype)
        middle = zeros if symmetric else (lowest * -share / tried.float()).round_().clamp_(0, top)
        codes = _round(w_ogn, tried.float(), middle, bits)
        off = (codes - middle[..., None]).mul_(tried.float()[..., None]).sub_(w_ogn)
        error = off.square_().mul_(importance).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        zeros = torch.where(better, middle, zeros)
    return scales, zeros


def _rounded_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As it is stored; a group of zeros has the scale 1, and nothing becomes 0 or infinite."""
    info = torch.finfo(dtype)
    rounded = scale.clamp(max=info.max).to(dtype)
    return torch.where(rounded < info.tiny, torch.ones_like(rounded), rounded)


def _round(w_ogn: Tensor, scales_og: Tensor, zeros_og: Tensor, bits: int) -> Tensor:
    """The nearest codes, as fp32."""
    scaled = w_ogn / scales_og[..., None]
    return scaled.add_(zeros_og[..., None]).round_().clamp_(0, 2**bits - 1)
