"""How a model knows the order of tokens: rotary angles, sinusoids, learned distances.

Axes: b batch, h heads, t time (queries), s source positions (keys), d features of one head, m
features of the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_from_scratch.model.config import ModelConfig, RopeScaling


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each of the width / 2 pairs (RoFormer, arXiv:2104.09864)."""
    # As a reciprocal: bit for bit what others compute, which counts thousands of positions on.
    frequencies = 1.0 / theta ** (torch.arange(0, width, 2).float() / width)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        keep = _yarn_kept(width, theta, scaling)
        return frequencies / scaling.factor * (1 - keep) + frequencies * keep
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # over the old context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _yarn_kept(width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each pair's frequency YaRN keeps: a ramp over the pairs, 1 where they are fast.

    The pair that turns r times over the original context has the number
    width * log(original / (2 pi r)) / (2 log theta).
    """

    def pair(turns: float) -> float:
        ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.high_freq_factor)), 0)
    high = min(math.ceil(pair(scaling.low_freq_factor)), width - 1)
    ramp = (torch.arange(width // 2).float() - low) / max(high - low, 0.001)
    return 1 - ramp.clamp(0.0, 1.0)


def rope_loudness(scaling: RopeScaling | None) -> float:
    """What YaRN multiplies cosines and sines by: the scores' spread falls in a longer context."""
    if scaling is None or scaling.kind != "yarn" or scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0


def angles(positions: Tensor, frequencies: Tensor, loudness: float = 1.0) -> Tensor:
    """Cosines and sines for positions (t,) or (b, t): (..., 2, d), each pair's angle twice."""
    turned = positions[..., None].float() * frequencies
    turned = torch.cat([turned, turned], dim=-1)
    table = torch.stack([turned.cos(), turned.sin()], dim=-2)
    return table if loudness == 1.0 else table * loudness


def rotate(x_bhtd: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn each pair (feature i, feature i + d/2) by its position's angle.

    `cos_sin` is (t, 2, d), or (b, t, 2, d) where rows have their own positions. Features beyond its
    d pass unturned.
    """
    cos, sin = cos_sin.to(x_bhtd.dtype).unbind(-2)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    d = cos.shape[-1]
    if d < x_bhtd.shape[-1]:
        return torch.cat([rotate(x_bhtd[..., :d], cos_sin), x_bhtd[..., d:]], dim=-1)
    first, second = x_bhtd.chunk(2, dim=-1)
    return x_bhtd * cos + torch.cat([-second, first], dim=-1) * sin


def doubled(x: Tensor) -> Tensor:
    """x in double precision, on the CPU if its device has none (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def sinusoidal_positions(positions: Tensor, d_model: int) -> Tensor:
    """The fixed vectors (..., d_model) of Attention Is All You Need (arXiv:1706.03762, 3.5).

    Sines in the first half of the features, cosines in the second, with wavelengths from 2 pi to
    10,000 * 2 pi. (The paper takes turns, sine, cosine, sine, ...: the same up to the order of the
    features; this order is Marian's.)
    """
    # In double precision, as the stored tables of others were computed.
    places = doubled(positions)
    pair = torch.arange(d_model, device=places.device).double() // 2 * 2
    angle = places[..., None] / 10_000.0 ** (pair / d_model)
    table = torch.cat([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1)
    return table.float().to(positions.device)


def relative_buckets(distances: Tensor, config: ModelConfig) -> Tensor:
    """The bucket of each distance (key's position - query's), int64 of the same shape.

    Near distances have a bucket each, far ones share one per power (T5, arXiv:1910.10683, 2.1). A
    causal stack looks back only; others spend half of the buckets on looking ahead.
    """
    buckets = config.relative_buckets
    ahead = torch.zeros_like(distances)
    if config.causal:
        away = (-distances).clamp(min=0)
    else:
        buckets //= 2
        ahead = (distances > 0).long() * buckets
        away = distances.abs()
    exact = buckets // 2
    ratio = (away.float().clamp(min=1) / exact).log() / math.log(config.relative_distance / exact)
    far = exact + (ratio * (buckets - exact)).long()
    return ahead + torch.where(away < exact, away, far.clamp(max=buckets - 1))
