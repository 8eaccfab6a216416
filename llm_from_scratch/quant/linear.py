"""Layers whose weights stay quantised: they stand where a Linear or an Embedding stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_from_scratch.quant.packed import PackedWeight


class QuantLinear(nn.Module):
    """y = x W^T + b with a packed W; gradients reach x, not W.

    Not a parameter and not in the state dict: the weight is saved by its format's own writer.
    """

    def __init__(self, packed: PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.packed = packed
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        y = self.packed.linear(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, (out_features, in_features)."""
        return self.packed.dequantize(dtype)

    def extra_repr(self) -> str:
        return f"{self.packed!r}, bias={self.bias is not None}"


class QuantEmbedding(nn.Module):
    """Rows of a packed matrix, looked up by id: (...) int64 -> (..., in_features) of `dtype`.

    A tied head shares the matrix: `QuantLinear(embedding.packed)`.
    """

    def __init__(self, packed: PackedWeight, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.packed = packed
        self.dtype = dtype
        self.num_embeddings = packed.out_features
        self.embedding_dim = packed.in_features

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.packed.rows(ids.reshape(-1))
        return rows.view(*ids.shape, -1).to(self.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table as numbers, (num_embeddings, embedding_dim)."""
        return self.packed.dequantize(dtype)

    def extra_repr(self) -> str:
        return repr(self.packed)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` ("blocks.0.attention.q") stands in `model`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
