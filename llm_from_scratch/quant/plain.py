"""The plain twins of the small kernels in kernels.py, to read and to test against.

Same names, same arguments, in PyTorch. Letters: n rows (tokens), m features of the model, h query
heads, k key-value heads, d features of a head, s slots of the cache, t texts, p pages.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_from_scratch.model.attend import attend_by_hand
from llm_from_scratch.model.positions import rotate

PAGE = 16  # positions that lie together in the pool


def rms_norm(x_nm: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """x / rms(x) * weight, or * (1 + weight)."""
    x_nm = x_nm * torch.rsqrt(x_nm.square().mean(-1, keepdim=True) + eps)
    return x_nm * (1.0 + weight if plus_one else weight)


def rope(x_nhd: Tensor, cos_sin_n2d: Tensor) -> None:
    """Turn queries or keys in place by their positions' angles."""
    x_nhd.copy_(rotate(x_nhd.transpose(0, 1), cos_sin_n2d).transpose(0, 1))


def kv_write(
    k_nkd: Tensor,
    v_nkd: Tensor,
    keys_ksd: Tensor,
    values_ksd: Tensor,
    slots_n: Tensor,
    key_scales_ks: Tensor | None = None,
    value_scales_ks: Tensor | None = None,
) -> None:
    """Put keys and values of n positions into the pool."""
    for new, pool, scales in (
        (k_nkd, keys_ksd, key_scales_ks),
        (v_nkd, values_ksd, value_scales_ks),
    ):
        new_knd = new.transpose(0, 1)
        if scales is not None:
            most = new_knd.abs().amax(-1)
            scales[:, slots_n.long()] = most / 127
            new_knd = (new_knd * torch.where(most > 0, 127 / most, 0.0)[..., None]).round()
        pool[:, slots_n.long()] = new_knd.to(pool.dtype)


def attend(
    q_nhd: Tensor,
    keys_ksd: Tensor,
    values_ksd: Tensor,
    pages_tp: Tensor,
    text_n: Tensor,
    position_n: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    key_scales_ks: Tensor | None = None,
    value_scales_ks: Tensor | None = None,
) -> Tensor:
    """Each query looks at its text's positions up to its own, gathered from the pages."""
    out = torch.empty_like(q_nhd)
    group = q_nhd.shape[1] // keys_ksd.shape[0]
    for i, position in enumerate(position_n.tolist()):
        first = max(0, position - window + 1) if window else 0
        seen = torch.arange(first, position + 1)
        slots = pages_tp[text_n[i].long(), seen // PAGE].long() * PAGE + seen % PAGE
        k_ksd, v_ksd = keys_ksd[:, slots].float(), values_ksd[:, slots].float()
        if key_scales_ks is not None and value_scales_ks is not None:
            k_ksd = k_ksd * key_scales_ks[:, slots, None]
            v_ksd = v_ksd * value_scales_ks[:, slots, None]
        y_1h1d = attend_by_hand(
            q_nhd[i][None, :, None],
            k_ksd.repeat_interleave(group, 0)[None],
            v_ksd.repeat_interleave(group, 0)[None],
            None,
            scale=scale,
            softcap=softcap or None,
        )
        out[i] = y_1h1d[0, :, 0]
    return out


def gated(gate_nf: Tensor, up_nf: Tensor, kind: str) -> Tensor:
    """activation(gate) * up."""
    return (F.silu(gate_nf) if kind == "silu" else F.gelu(gate_nf, approximate="tanh")) * up_nf
