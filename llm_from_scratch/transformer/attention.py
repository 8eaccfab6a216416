"""Attention, one idea per class: compare, scale and mask, project, and do it several times at once.

Axes: b batch, t queries, s keys, k query/key features and v value features of one head, m features
of the model. In a mask True means "may not be seen"; its shape broadcasts to (b, t, s).

Every head owns three small `Linear` layers, so that formulas and weights can be read head by head.
`llm_from_scratch.model.layers.Attention` is the same made fast. Run this file to see the shapes.
"""

import math

import torch
from torch import Tensor, nn

Mask = Tensor | None


class DotProductAttention(nn.Module):
    """softmax(q k^T) v: every query takes a mixture of the values whose keys resemble it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (b, t, k), key (b, s, k), value (b, s, v) -> (b, t, v)."""
        scores_bts = torch.bmm(query, key.transpose(1, 2))
        return torch.bmm(scores_bts.softmax(dim=-1), value)


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(k)) v: scores kept at standard deviation 1 do not saturate it."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
        """query (b, t, k), key (b, s, k), value (b, s, v) -> (b, t, v)."""
        scores_bts = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(query.shape[-1])
        if mask is None:
            return torch.bmm(scores_bts.softmax(dim=-1), value)
        weights_bts = scores_bts.masked_fill(mask, float("-inf")).softmax(dim=-1)
        # A query that may see nothing at all would be 0 / 0: it gets a zero vector instead.
        return torch.bmm(weights_bts.masked_fill(mask, 0.0), value)


class AttentionHead(nn.Module):
    """One head: project queries, keys and values into a small space of its own, then attend."""

    def __init__(self, d_k: int, d_v: int, d_model: int) -> None:
        super().__init__()
        self.linear_q = nn.Linear(d_model, d_k)
        self.linear_k = nn.Linear(d_model, d_k)
        self.linear_v = nn.Linear(d_model, d_v)
        self.attention = ScaledDotProductAttention()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
        """query (b, t, m), key and value (b, s, m) -> (b, t, v)."""
        q, k, v = self.linear_q(query), self.linear_k(key), self.linear_v(value)
        return self.attention(q, k, v, mask=mask)


class MultiHeadAttention(nn.Module):
    """`n_heads` heads look for different things; `linear_o` brings their findings together.

    With d_k = d_v = d_model / n_heads, all heads together cost as much as one of full width.
    """

    def __init__(self, n_heads: int, d_k: int, d_v: int, d_model: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(AttentionHead(d_k, d_v, d_model) for _ in range(n_heads))
        self.linear_o = nn.Linear(n_heads * d_v, d_model)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask = None) -> Tensor:
        """query (b, t, m), key and value (b, s, m) -> (b, t, m)."""
        found = [head(query, key, value, mask) for head in self.heads]
        return self.linear_o(torch.cat(found, dim=-1))


if __name__ == "__main__":
    x_btm = torch.randn(2, 5, 32)
    print("one head:", tuple(AttentionHead(8, 8, 32)(x_btm, x_btm, x_btm).shape))
    print("four heads:", tuple(MultiHeadAttention(4, 8, 8, 32)(x_btm, x_btm, x_btm).shape))
