"""Low-rank detours around frozen layers: what stands in a layer's place once it has adapters.

    LoRA     y = W x + s B A x                    s = alpha / rank          (arXiv:2106.09685)
    rsLoRA   the same                             s = alpha / sqrt(rank)    (arXiv:2312.03732)
    DoRA     y = m / |W + s B A| (W x + s B A x)  m learns the rows' lengths (arXiv:2402.09353)

A wrapper keeps the layer as `base` and acts on anything with `in_features`, `out_features` and
`forward`, packed four-bit layers included (QLoRA, arXiv:2305.14314). One base may have several
adapters, by name: `Switch` says which of them acts, also row by row.

Axes: o outputs, i inputs, r rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT = "default"  # the name of an adapter that nobody named


class Switch:
    """Which adapter acts: `active` on all rows, or in `rows` pairs of a name and row numbers.

    One for all layers of a model. A name that a layer does not have, and None, is the base alone.
    """

    def __init__(self) -> None:
        self.active: str | None = DEFAULT
        self.rows: list[tuple[str | None, Tensor]] | None = None

    @property
    def on_all_rows(self) -> str | None:
        """The adapter of whoever takes a layer for one matrix, which it is not row by row."""
        assert self.rows is None, "a layer whose rows have different adapters is no one matrix"
        return self.active


class LowRank(nn.Module):
    """One adapter of one layer: A (r, i), B (o, r), and with DoRA the rows' lengths (o,)."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, dropout: float = 0.0,
        lengths: Tensor | None = None, rooted: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.rooted = rooted  # whether the scale is alpha over the rank's root, for those who save
        self.a = nn.Parameter(torch.zeros(rank, inputs, device=device))
        self.b = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.lengths = None if lengths is None else nn.Parameter(lengths.clone())
        self._known: tuple[Any, Tensor] | None = None

    @property
    def rank(self) -> int:
        return len(self.a)

    def product(self) -> Tensor:
        """s B A, (o, i), fp32: what the adapter adds to the matrix."""
        return self.scale * (self.b.float() @ self.a.float())

    def detour(self, z: Tensor) -> Tensor:
        """s B A z, in the precision of z."""
        low = F.linear(z, self.a.to(z.dtype))
        return F.linear(low, (self.b * self.scale).to(z.dtype))

    def stretch(self, layer: Adapted) -> Tensor:
        """m / |W + s B A| per output, (o,), fp32, around the layer's W. The lengths' own gradient
        is left out (section 4.3 of the paper): they are a constant of the step."""
        assert self.lengths is not None
        fresh = torch.is_grad_enabled()
        with torch.no_grad():
            key = layer.version(), version(self.a), version(self.b)
            if self._known is None or self._known[0] != key or fresh:
                changed = layer.whole().detach().float() + self.product()
                self._known = key, changed.norm(dim=1)
        return self.lengths / self._known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


def version(tensor: Tensor) -> int:
    """Changes with the tensor's values; those made for inference never change."""
    return 0 if tensor.is_inference() else tensor._version


class Adapted(nn.Module):
    """What wrappers of layers have in common: the base, its adapters and the switch."""

    def __init__(self, base: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleList()
        self.names: list[str] = []  # of the adapters; PyTorch would not let a part be called v1.5
        self.switch = switch

    def named(self, name: str | None) -> LowRank | None:
        """The adapter of that name, if this layer has it."""
        if name not in self.names:
            return None
        found = self.adapters[self.names.index(name)]
        assert isinstance(found, LowRank)
        return found

    def put(self, name: str, adapter: LowRank) -> None:
        """Add an adapter, in place of one of the same name."""
        if name in self.names:
            self.adapters[self.names.index(name)] = adapter
        else:
            self.names.append(name)
            self.adapters.append(adapter)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.switch.rows is None:
            adapter = self.named(self.switch.active)
            return y if adapter is None else self.changed(adapter, x, y)
        for name, rows_n in self.switch.rows:
            adapter = self.named(name)
            if adapter is not None:
                y[rows_n] = self.changed(adapter, x[rows_n], y[rows_n])
        return y

    def changed(self, adapter: LowRank, x: Tensor, y: Tensor) -> Tensor:
        """What becomes of the base's output y with the adapter."""
        raise NotImplementedError

    def whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """The base's matrix as numbers; of a packed one a fresh copy."""
        unpack = getattr(self.base, "dequantize", None)
        if unpack is not None:
            found: Tensor = unpack(dtype or torch.float32)
            return found
        weight: Any = self.base.weight
        return weight if dtype is None else weight.to(dtype)

    def version(self) -> int:
        """Changes with the base's matrix; a packed one never does."""
        weight = getattr(self.base, "weight", None)
        return version(weight) if isinstance(weight, Tensor) else 0

    def merged(self, name: str | None) -> Tensor:
        """The matrix with the adapter in it, fp32 and connected to the adapter's gradients."""
        adapter, weight = self.named(name), self.whole(torch.float32)
        if adapter is None:
            return weight
        changed = weight + self.product(adapter)
        if adapter.lengths is not None:
            changed = changed * adapter.stretch(self)[:, None]
        return changed

    def product(self, adapter: LowRank) -> Tensor:
        """What the adapter adds to the base's matrix, in that matrix's shape."""
        return adapter.product()

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer acts as, for whoever multiplies by it without the layer."""
        found = self.merged(self.switch.on_all_rows)
        return found.to(self.whole().dtype) if found.dtype != self.whole().dtype else found


class AdaptedLinear(Adapted):
    """A linear layer and its adapters."""

    def __init__(self, base: Any, switch: Switch) -> None:
        super().__init__(base, switch)
        self.in_features: int = base.in_features
        self.out_features: int = base.out_features

    @property
    def bias(self) -> Tensor | None:
        base: Any = self.base
        found: Tensor | None = base.bias
        return found

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix that the layer acts as."""
        return self.merged(self.switch.on_all_rows).to(dtype)

    def changed(self, adapter: LowRank, x: Tensor, y: Tensor) -> Tensor:
        z = F.dropout(x, adapter.dropout, self.training)
        low = adapter.detour(z)
        if adapter.lengths is None:
            return y + low
        stretch = adapter.stretch(self).to(y.dtype)
        if z is x:
            plain = y if self.bias is None else y - self.bias.to(y.dtype)
        else:  # the base is stretched by what it would give for the thinned input
            plain = F.linear(z, self.whole(z.dtype))
        return y + (stretch - 1) * plain + stretch * low

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"


class AdaptedEmbedding(Adapted):
    """An embedding and its adapters: A holds a short row for each entry, B widens it.

    `axes` are those of the entries of a batch: with fewer, all texts look up the same (positions).
    """

    def __init__(self, base: Any, switch: Switch, axes: int = 1) -> None:
        super().__init__(base, switch)
        self.num_embeddings: int = base.num_embeddings
        self.embedding_dim: int = base.embedding_dim
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        rows = self.switch.rows
        if rows is not None and x.dim() < self.axes:  # what all share differs from row to row now
            ones = [1] * (self.axes - 1 - x.dim())
            x = x.expand(sum(len(rows_n) for _, rows_n in rows), *ones, *x.shape)
        return super().forward(x)

    def changed(self, adapter: LowRank, x: Tensor, y: Tensor) -> Tensor:
        low = F.embedding(x, adapter.a.t())
        return y + F.linear(low, adapter.b * adapter.scale).to(y.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The table that the layer acts as."""
        return self.merged(self.switch.on_all_rows).to(dtype)

    def product(self, adapter: LowRank) -> Tensor:
        return adapter.product().t()
