"""Attention as a ladder: one head, several heads, shared keys, a window, and all that models add.

Each rung is one idea more than the one below and runs in plain loops. The model does not run it: it
runs `layers.Attention`, and a test holds every rung equal to that, in values and in gradients.

Axes: b batch, t time (the positions that look), s source (those that are looked at; here the same
text), h query heads, k key-value heads, d features of one head, m features of the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.model.decoder import Stack
from llm_from_scratch.model.layers import Attention
from llm_from_scratch.model.positions import rotate
from llm_from_scratch.model.sight import Sight

# --- who may look at whom: True where t may look at s --------------------------------------------


def backwards(t: int) -> Tensor:
    """(t, s): every position may look at itself and at what was before it, never ahead."""
    return torch.ones(t, t, dtype=torch.bool).tril()


def nearby(t: int, width: int) -> Tensor:
    """(t, s): at itself and at the `width` - 1 positions before it: a sliding window."""
    steps = torch.arange(t)
    back = steps[:, None] - steps[None, :]
    return (back >= 0) & (back < width)


def same_text(numbers_bt: Tensor) -> Tensor:
    """(b, t, s): at positions of the same number: the same document, or text and not padding."""
    return numbers_bt[:, :, None] == numbers_bt[:, None, :]


# --- first rung: one head ------------------------------------------------------------------------


def look(q_btd: Tensor, k_bsd: Tensor, may_look: Tensor) -> Tensor:
    """How much of each s every t takes: (b, t, s), none negative, rows sum to 1.

    Each query is compared with each key by their product. sqrt(d) keeps the products of wide heads
    from being so large that the softmax sees one key only.
    """
    scores_bts = q_btd @ k_bsd.transpose(1, 2) / math.sqrt(q_btd.shape[-1])
    return scores_bts.masked_fill(~may_look, -math.inf).softmax(-1)


def one_head(x_btm: Tensor, q_dm: Tensor, k_dm: Tensor, v_dm: Tensor, may_look: Tensor) -> Tensor:
    """Every position asks (q), shows a label (k) and gives to those who look (v): (b, t, d)."""
    q_btd, k_bsd, v_bsd = x_btm @ q_dm.T, x_btm @ k_dm.T, x_btm @ v_dm.T
    return look(q_btd, k_bsd, may_look) @ v_bsd


# --- second rung: several heads ------------------------------------------------------------------


@dataclass
class HeadWeights:
    """The four matrices of an attention layer, with an axis for the heads."""

    q_hdm: Tensor
    k_kdm: Tensor
    v_kdm: Tensor
    o_mhd: Tensor

    @classmethod
    def of(cls, attention: Attention) -> HeadWeights:
        """Views of a layer's weights: what it stores as one matrix is that of all heads stacked."""
        d = attention.config.head_dim
        q, k, v = (
            part.weight.unflatten(0, (-1, d)) for part in (attention.q, attention.k, attention.v)
        )
        return cls(q, k, v, attention.o.weight.unflatten(1, (-1, d)))


def several_heads(x_btm: Tensor, weights: HeadWeights, may_look: Tensor) -> Tensor:
    """Heads look side by side, each in a narrow space of its own; what they found is added up.

    One head takes one weighted mean. A verb that needs its subject and its object at once needs
    two. (Joining the heads' outputs and multiplying once by o is the same sum.)
    """
    y_btm = torch.zeros_like(x_btm)
    for h in range(len(weights.q_hdm)):
        y_btd = one_head(x_btm, weights.q_hdm[h], weights.k_kdm[h], weights.v_kdm[h], may_look)
        y_btm = y_btm + y_btd @ weights.o_mhd[:, h].T
    return y_btm


# --- third rung: shared keys and values ----------------------------------------------------------


def grouped_heads(x_btm: Tensor, weights: HeadWeights, may_look: Tensor) -> Tensor:
    """Neighbouring query heads share one key-value head (arXiv:2305.13245).

    They ask different questions of the same labels. While writing, keys and values are all that is
    kept of the past, so that the cache shrinks by the size of a group.
    """
    group = len(weights.q_hdm) // len(weights.k_kdm)
    y_btm = torch.zeros_like(x_btm)
    for h in range(len(weights.q_hdm)):
        k = h // group
        y_btd = one_head(x_btm, weights.q_hdm[h], weights.k_kdm[k], weights.v_kdm[k], may_look)
        y_btm = y_btm + y_btd @ weights.o_mhd[:, h].T
    return y_btm


# --- fourth rung: a window -----------------------------------------------------------------------


def sliding_heads(x_btm: Tensor, weights: HeadWeights, may_look: Tensor, width: int) -> Tensor:
    """The same, but nobody looks further back than a window (arXiv:2004.05150, 2310.06825).

    Work and cache no longer grow with the square of the text. What is further back arrives by
    stages: through n such layers a position hears of n * (width - 1) positions before it.
    """
    return grouped_heads(x_btm, weights, may_look & nearby(x_btm.shape[1], width))


# --- last rung: what else models add -------------------------------------------------------------


def in_full(
    attention: Attention,
    x_btm: Tensor,
    may_look: Tensor,
    cos_sin: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All that `Attention` does: its output (b, t, m), and who looked at whom, (b, h, t, s).

    Biases, norms on queries and keys (which keep scores from growing in training), rotary angles
    `cos_sin` or a `bias` on the scores (1 or b, h, t, s), which make them depend on distance,
    another scale, and a soft-cap, which presses scores into (-cap, cap), so that no key can take
    everything.
    """
    config = attention.config
    q_bhtd, k_bksd = attention.queries_keys(x_btm)
    v_bksd = attention.split(attention.v(x_btm))
    if cos_sin is not None:
        q_bhtd, k_bksd = rotate(q_bhtd, cos_sin), rotate(k_bksd, cos_sin)
    group = config.n_heads // config.n_kv_heads
    looked, taken = [], []
    for h in range(config.n_heads):
        scores_bts = q_bhtd[:, h] @ k_bksd[:, h // group].transpose(1, 2) * attention.scale
        if config.attention_softcap is not None:
            scores_bts = (scores_bts / config.attention_softcap).tanh() * config.attention_softcap
        if bias is not None:
            scores_bts = scores_bts + bias[:, h]
        looked.append(scores_bts.masked_fill(~may_look, -math.inf).softmax(-1))
        taken.append(looked[-1] @ v_bksd[:, h // group])
    return attention.o(torch.cat(taken, -1)), torch.stack(looked, 1)


@torch.no_grad()
def who_looks_at_whom(model: Stack, tokens_bt: Tensor) -> list[Tensor]:
    """The attention weights of every layer of a model while it reads, (b, h, t, s) each.

    Fused kernels never have them; here they are computed once more by `in_full`.
    """
    seen: list[Tensor] = []

    def note(attention: Attention, inputs: tuple[Tensor, Sight, None]) -> None:
        x_btm, sight, _ = inputs
        mask, causal, cos_sin = sight.of(attention.window)
        t = x_btm.shape[1]
        may_look = backwards(t) if causal else torch.ones(t, t, dtype=torch.bool)
        bias = mask if sight.bias is not None else None  # with -infinity where nothing is seen
        if mask is not None and bias is None:
            may_look = mask[:, 0] if mask.dim() == 4 else mask
        seen.append(in_full(attention, x_btm, may_look.to(x_btm.device), cos_sin, bias)[1])

    layers = [part for part in model.modules() if isinstance(part, Attention)]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        model(tokens_bt)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
