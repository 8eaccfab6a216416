"""How one stored tensor holds one or several of our parameters; see `families.Entry`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from llm_from_scratch.weights.families.table import Entry


def stored_shape(entry: Entry, shapes: Sequence[torch.Size]) -> tuple[int, ...]:
    """The shape that the stored tensor must have, given those of our parameters."""
    first = tuple(shapes[0])
    if entry.index is not None:
        return first[1:]
    if entry.layout == "row":
        return (1, *first)
    shape = (sum(shape[0] for shape in shapes), *first[1:])
    return shape[::-1] if entry.layout == "transposed" else shape


def take_apart(
    stored: Tensor, entry: Entry, shapes: Sequence[torch.Size], heads: int
) -> Iterator[Tensor]:
    """Our parameters, as views of the stored tensor."""
    if entry.layout == "transposed":
        stored = stored.t()
    if entry.layout == "row":
        stored = stored[0]
    if entry.layout == "by_head":
        # (h, parts, d, ...): the parts of the first head, those of the second, ...
        split = stored.unflatten(0, (heads, len(shapes), -1))
        yield from (part.flatten(0, 1) for part in split.unbind(1))
        return
    yield from stored.split([shape[0] for shape in shapes]) if len(shapes) > 1 else (stored,)


def put_together(entry: Entry, parts: Sequence[Tensor], heads: int) -> Tensor:
    """The inverse of `take_apart`: the tensor to store, contiguous."""
    if entry.index is not None:
        return parts[0][entry.index].contiguous()
    if entry.layout == "by_head":
        split = [part.unflatten(0, (heads, -1)) for part in parts]
        return torch.stack(split, dim=1).flatten(0, 2).contiguous()
    stored = torch.cat(list(parts)) if len(parts) > 1 else parts[0]
    if entry.layout == "row":
        stored = stored[None]
    return (stored.t() if entry.layout == "transposed" else stored).contiguous()
