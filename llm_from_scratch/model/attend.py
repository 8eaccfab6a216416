"""Attention's arithmetic, softmax(q k^T * scale) v: spelled out, and as fast as it goes.

Axes: b batch, t time (queries), s source positions (keys), h query heads, k key-value heads, d
features of one head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_by_hand(
    q_bhtd: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T * scale) v, spelled out: the twin to read of `attend`.

    `mask` broadcasts to (b, h, t, s): boolean, True where a query may look, or numbers to add.
    `scale` is 1 / sqrt(d) where it is None; `softcap` presses scores into (-softcap, softcap).
    """
    scores = q_bhtd @ k_bhsd.transpose(-2, -1) * (scale or q_bhtd.shape[-1] ** -0.5)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if mask is not None:
        bool_mask = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if bool_mask else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout) @ v_bhsd


SHORT = 512  # positions up to which plain products beat the fused kernel in bf16 on a CPU


def attend_short(
    q_bhtd: Tensor,
    k_bhsd: Tensor,
    v_bhsd: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None = None,
) -> Tensor:
    """`attend_by_hand` in three products, causal without a mask; what sees nothing becomes 0.

    PyTorch's fused kernel for the CPU works in fp32 inside and saves memory that short contexts do
    not need; in bf16 these products are 2 to 4 times as fast forward and backward.
    """
    b, h, t, d = q_bhtd.shape
    s = k_bhsd.shape[2]
    scale = scale or d**-0.5
    k_ds = k_bhsd.reshape(b * h, s, d).transpose(1, 2)
    if mask is None:
        hide = q_bhtd.new_full((t, s), float("-inf")).triu_(1)
        scores = torch.baddbmm(hide, q_bhtd.reshape(b * h, t, d), k_ds, alpha=scale)
    else:
        blind = ~mask.any(-1, keepdim=True)  # a softmax over nothing would be 0 / 0
        hide = q_bhtd.new_zeros(mask.shape).masked_fill_(~(mask | blind), float("-inf"))
        scores = torch.bmm(q_bhtd.reshape(b * h, t, d) * scale, k_ds).view(b, h, t, s) + hide
    weights = F.dropout(scores.softmax(dim=-1), dropout).view(b * h, t, s)
    y_bhtd = torch.bmm(weights, v_bhsd.reshape(b * h, s, d)).view(b, h, t, d)
    return y_bhtd if mask is None else y_bhtd.masked_fill_(blind, 0.0)


def attend(
    q_bhtd: Tensor,
    k_bksd: Tensor,
    v_bksd: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Grouped-query attention on PyTorch's fused kernel: (b, h, t, d).

    `causal` without a mask means that t == s and position i sees positions up to i. Each key-value
    head serves h / k query heads (arXiv:2305.13245).
    """
    b, h, t, d = q_bhtd.shape
    k = k_bksd.shape[1]
    if t == 1 and h != k and not causal and (mask is None or mask.shape[1] == 1):
        # One new token: the h / k queries of a group share their keys, so they can stand on the
        # time axis. Nothing is copied, which is what makes decoding with few key-value heads fast.
        grouped = q_bhtd.reshape(b, k, h // k, d)
        y = F.scaled_dot_product_attention(
            grouped, k_bksd, v_bksd, mask, dropout_p=dropout, scale=scale
        )
        return y.reshape(b, h, t, d)
    if h != k:
        k_bksd = k_bksd.repeat_interleave(h // k, dim=1)
        v_bksd = v_bksd.repeat_interleave(h // k, dim=1)
    short = t > 1 and k_bksd.shape[2] <= SHORT
    short = short and (causal if mask is None else mask.dtype == torch.bool)
    if short and q_bhtd.dtype == torch.bfloat16 and q_bhtd.device.type == "cpu":
        return attend_short(q_bhtd, k_bksd, v_bksd, mask, dropout, scale)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q_bhtd.dtype)
    return F.scaled_dot_product_attention(
        q_bhtd, k_bksd, v_bksd, mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
