"""Packed documents in attention: each brought into a row of its own, and back.

Several documents may lie one behind the other in a row (packing). With a mask over the whole row
attention would compute t x t scores to keep those within documents. Instead queries, keys and
values are moved to rows of one document each, padded to the longest; causal attention needs no mask
there, as padding comes last and nothing that counts sees it. Everything else in the model works on
the packed row, where there is no padding.

Axes: b batch, t time of the packed rows; n documents, l length of the longest; h heads, d features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Apart:
    """Where the tokens of packed rows stand among rows of one document each.

    there: (n * l,) for each place in the rows of documents its token in the packed ones, counted
        over all rows; 0 for padding. back: (b * t,) the other way. padding: places without a token.
    positions: (b, t) places within documents.
    """

    there: Tensor
    back: Tensor
    padding: Tensor
    positions: Tensor
    longest: int

    def split(self, x_bhtd: Tensor) -> Tensor:
        """(b, h, t, d) -> (n, h, l, d)."""
        rows = _Moved.apply(x_bhtd.transpose(1, 2).flatten(0, 1), self.there, self.back, None)
        found: Tensor = rows.unflatten(0, (-1, self.longest)).transpose(1, 2)
        return found

    def join(self, y_nlm: Tensor) -> Tensor:
        """(n, l, m) -> (b, t, m)."""
        rows = _Moved.apply(y_nlm.flatten(0, 1), self.back, self.there, self.padding)
        found: Tensor = rows.view(*self.positions.shape, -1)
        return found


class _Moved(torch.autograd.Function):
    """Rows x[there]; each row of x that counts is in the result once, so gradients move `back`.

    `unused` are the rows of x that the result does not have.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor, unused: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, unused)
        return x.index_select(0, there)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        back, unused = ctx.saved_tensors
        found = grads[0].index_select(0, back)
        return found if unused is None else found.index_fill_(0, unused, 0.0), None, None, None


def apart(documents_bt: Tensor) -> Apart | None:
    """How documents can be brought apart, or None where a mask over the rows does less work.

    That is where one document is far longer than the others, and where the numbers of a row neither
    rise nor fall, so that a document might not be in one piece.
    """
    b, t = documents_bt.shape
    steps = documents_bt.diff(dim=1)
    if not bool(((steps >= 0).all(1) | (steps <= 0).all(1)).all()):
        return None
    begins_bt = torch.ones_like(documents_bt, dtype=torch.bool)
    begins_bt[:, 1:] = steps != 0
    firsts = begins_bt.flatten().nonzero()[:, 0]
    ends = torch.cat([firsts[1:], firsts.new_tensor([b * t])])
    n, longest = len(firsts), int((ends - firsts).max())
    if n * longest**2 > b * t**2 or n * longest > 4 * b * t:
        return None
    number = begins_bt.flatten().cumsum(0) - 1
    tokens = torch.arange(b * t, device=documents_bt.device)
    positions = tokens - firsts[number]
    back = number * longest + positions
    there = torch.zeros(n * longest, dtype=torch.long, device=documents_bt.device)
    is_padding = torch.ones_like(there, dtype=torch.bool)
    there[back], is_padding[back] = tokens, False
    return Apart(there, back, is_padding.nonzero()[:, 0], positions.view(b, t), longest)
