"""The parts of a decoder, smallest first: linear, norms, positions, attention, feed-forward.

Axes: b batch, t time (queries), s source positions (keys), h query heads, k key-value heads,
d features of one head, m features of the model. `q_bhtd` is a tensor with these four axes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.model.cache import LayerCache
from llm_from_scratch.model.config import ModelConfig, RopeScaling


class Linear(nn.Linear):
    """y = x W^T + b, computed in the dtype of x.

    Weights stay in the precision in which the optimiser needs them (fp32); the product runs in the
    precision of the activations. This one line replaces autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in fp32 (Zhang & Sennrich, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (x32 * self.weight.float()).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / std * weight + bias over the last axis, in fp32 (arXiv:1607.06450)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        shape = self.weight.shape
        y = F.layer_norm(x.float(), shape, self.weight.float(), self.bias.float(), self.eps)
        return y.to(x.dtype)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The norm that the config names, over `width` features."""
    return (RMSNorm if config.norm == "rms" else LayerNorm)(width, config.norm_eps)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """The fixed table (length, d_model) of Attention Is All You Need (arXiv:1706.03762, 3.5).

    Even features are sines, odd ones cosines, with wavelengths from 2 pi to 10,000 * 2 pi.
    """
    position_t1 = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10_000.0) / d_model))
    table = torch.zeros(length, d_model)
    table[:, 0::2] = torch.sin(position_t1 * rate)
    table[:, 1::2] = torch.cos(position_t1 * rate)[:, : d_model // 2]
    return table


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each of the head_dim / 2 pairs (RoFormer, arXiv:2104.09864)."""
    # As a reciprocal: bit for bit what others compute, which counts thousands of positions on.
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # over the old context
    width = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / width).clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rope_table(config: ModelConfig) -> Tensor:
    """(max_seq_len, 2, head_dim): for each position the cosines and sines of its angles."""
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = torch.arange(config.max_seq_len).float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def rotate(x_bhtd: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn each pair (feature i, feature i + d/2) by its position's angle.

    `cos_sin` is (t, 2, d), or (b, t, 2, d) where rows have their own positions.
    """
    cos, sin = cos_sin.to(x_bhtd.dtype).unbind(-2)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x_bhtd.chunk(2, dim=-1)
    return x_bhtd * cos + torch.cat([-second, first], dim=-1) * sin


def attend_by_hand(q_bhtd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, spelled out: the twin to read of `attend`.

    `mask` is boolean, True where a query may look, and broadcasts to (b, h, t, s).
    """
    scores = q_bhtd @ k_bhsd.transpose(-2, -1) / math.sqrt(q_bhtd.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v_bhsd


SHORT = 512  # positions up to which plain products beat the fused kernel in bf16 on a CPU


def attend_short(
    q_bhtd: Tensor, k_bhsd: Tensor, v_bhsd: Tensor, mask: Tensor | None, dropout: float
) -> Tensor:
    """`attend_by_hand` in three products, causal without a mask.

    PyTorch's fused kernel for the CPU works in fp32 inside and saves memory that short contexts do
    not need; in bf16 these products are 2 to 4 times as fast forward and backward.
    """
    b, h, t, d = q_bhtd.shape
    s = k_bhsd.shape[2]
    k_ds = k_bhsd.reshape(b * h, s, d).transpose(1, 2)
    if mask is None:
        hide = q_bhtd.new_full((t, s), float("-inf")).triu_(1)
        scores = torch.baddbmm(hide, q_bhtd.reshape(b * h, t, d), k_ds, alpha=d**-0.5)
    else:
        hide = q_bhtd.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
        scores = torch.bmm(q_bhtd.reshape(b * h, t, d) * d**-0.5, k_ds).view(b, h, t, s) + hide
    weights = F.dropout(scores.softmax(dim=-1), dropout).view(b * h, t, s)
    return torch.bmm(weights, v_bhsd.reshape(b * h, s, d)).view(b, h, t, d)


def attend(
    q_bhtd: Tensor,
    k_bksd: Tensor,
    v_bksd: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Grouped-query attention on PyTorch's fused kernel: (b, h, t, d).

    `causal` without a mask means that t == s and position i sees positions up to i. Each key-value
    head serves h / k query heads (arXiv:2305.13245).
    """
    b, h, t, d = q_bhtd.shape
    k = k_bksd.shape[1]
    if t == 1 and h != k and not causal:
        # One new token: the h / k queries of a group share their keys, so they can stand on the
        # time axis. Nothing is copied, which is what makes decoding with few key-value heads fast.
        grouped = q_bhtd.reshape(b, k, h // k, d)
        return F.scaled_dot_product_attention(grouped, k_bksd, v_bksd, mask).reshape(b, h, t, d)
    if h != k:
        k_bksd = k_bksd.repeat_interleave(h // k, dim=1)
        v_bksd = v_bksd.repeat_interleave(h // k, dim=1)
    short = t > 1 and k_bksd.shape[2] <= SHORT and (causal or mask is not None)
    if short and q_bhtd.dtype == torch.bfloat16 and q_bhtd.device.type == "cpu":
        return attend_short(q_bhtd, k_bksd, v_bksd, mask, dropout)
    return F.scaled_dot_product_attention(
        q_bhtd, k_bksd, v_bksd, mask, dropout_p=dropout, is_causal=causal
    )


class Attention(nn.Module):
    """Queries look at keys and take a weighted sum of values, in n_heads subspaces at once."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        m, d, bias = config.d_model, config.head_dim, config.attention_bias
        self.q = Linear(m, config.n_heads * d, bias=bias)
        self.k = Linear(m, config.n_kv_heads * d, bias=bias)
        self.v = Linear(m, config.n_kv_heads * d, bias=bias)
        self.o = Linear(config.n_heads * d, m, bias=bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(d, config.norm_eps)
            self.k_norm = RMSNorm(d, config.norm_eps)

    def forward(
        self,
        x_btm: Tensor,
        cos_sin: Tensor | None,
        mask: Tensor | None,
        causal: bool,
        cache: LayerCache | None,
    ) -> Tensor:
        b, t, _ = x_btm.shape
        d = self.config.head_dim
        q_bhtd = self.q(x_btm).view(b, t, -1, d).transpose(1, 2)
        k_bktd = self.k(x_btm).view(b, t, -1, d).transpose(1, 2)
        v_bktd = self.v(x_btm).view(b, t, -1, d).transpose(1, 2)
        if self.config.qk_norm:
            q_bhtd, k_bktd = self.q_norm(q_bhtd), self.k_norm(k_bktd)
        if cos_sin is not None:
            q_bhtd, k_bktd = rotate(q_bhtd, cos_sin), rotate(k_bktd, cos_sin)
        if cache is not None:
            k_bktd, v_bktd = cache.append(k_bktd, v_bktd)
        dropout = self.config.dropout if self.training else 0.0
        y_bhtd = attend(q_bhtd, k_bktd, v_bktd, mask, causal=causal, dropout=dropout)
        return self.o(y_bhtd.transpose(1, 2).reshape(b, t, -1))


class FeedForward(nn.Module):
    """Each position on its own: widen, bend, narrow.

    Gated (SwiGLU and its kin, arXiv:2002.05202): down(activation(gate(x)) * up(x)); otherwise
    down(activation(up(x))).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        m, f, bias = config.d_model, config.d_ff, config.feed_forward_bias
        if config.gated:
            self.gate = Linear(m, f, bias=bias)
        self.up = Linear(m, f, bias=bias)
        self.down = Linear(f, m, bias=bias)

    def activate(self, x: Tensor) -> Tensor:
        match self.config.activation:
            case "silu":
                return F.silu(x)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
        return F.relu(x)

    def forward(self, x_btm: Tensor) -> Tensor:
        if self.config.gated:
            return self.down(self.activate(self.gate(x_btm)) * self.up(x_btm))
        return self.down(self.activate(self.up(x_btm)))
