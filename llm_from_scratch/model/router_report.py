"""Where a mixture's tokens go: how even the experts' loads are, how decided the routers.

Axes: l mixtures of the model, e experts, n tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.experts import experts_of, routings

WIDEST = 16  # experts whose shares fit into a line


@dataclass(frozen=True)
class RouterReport:
    """What the routers of a model did with some text.

    `visits_le` counts the tokens that each expert of each mixture saw, `choice_l` is the mean
    entropy of a router's probabilities for a token, in bits: log2(e) where it has no preference, 0
    where it is certain.
    """

    tokens: int
    n_active: int
    layers: tuple[int, ...]
    visits_le: Tensor
    choice_l: Tensor

    @property
    def shares_le(self) -> Tensor:
        """Each expert's share of its layer's visits; rows sum to 1, even is 1 / e."""
        return self.visits_le / self.visits_le.sum(-1, keepdim=True)

    @property
    def evenness_l(self) -> Tensor:
        """The entropy of the shares over its maximum: 1 for equal loads, 0 for one expert alone."""
        entropy = torch.special.entr(self.shares_le).sum(-1)
        return entropy / max(math.log(self.visits_le.shape[1]), 1e-9)

    @property
    def dropped(self) -> int:
        """Visits that were asked for and not made. There is no capacity here, so none is."""
        return self.tokens * self.n_active * len(self.layers) - int(self.visits_le.sum())

    def __str__(self) -> str:
        l, e = self.visits_le.shape
        head = "layer  least    most  unused  evenness  doubt, bits"
        lines = [
            f"{self.tokens:,} tokens to {self.n_active} of {e} experts each in {l} layers, "
            f"{self.dropped} visits dropped; an even share is {1 / e:.1%}",
            head + ("  shares in %" if e <= WIDEST else ""),
        ]
        for layer, share, even, choice in zip(
            self.layers, self.shares_le, self.evenness_l, self.choice_l, strict=True
        ):
            line = (
                f"{layer:5}  {share.min():5.1%}  {share.max():6.1%}  {int((share == 0).sum()):6}  "
                f"{even:8.3f}  {choice:11.2f}"
            )
            if e <= WIDEST:
                line += "  " + " ".join(f"{100 * part:.0f}" for part in share)
            lines.append(line)
        return "\n".join(lines)


@torch.no_grad()
def router_report(
    model: Decoder, batches: Iterable[Tensor | tuple[Tensor, Tensor]]
) -> RouterReport:
    """Run `batches` through the model and count who went where.

    A batch is token ids (b, t), alone or with a mask (b, t) that is 1 for text and 0 for padding,
    which does not count. Raises `UserError` for a model without experts, or without a token.
    """
    experts = experts_of(model)
    if not experts:
        raise UserError("The model has no experts, so there is nothing to report on its routers.")
    settings = experts[0].settings
    visits_le = torch.zeros(len(experts), settings.n_experts, dtype=torch.long)
    choice_l = torch.zeros(len(experts), dtype=torch.float64)
    tokens = 0
    training = model.training
    try:
        model.eval()
        for batch in batches:
            ids, mask = batch if isinstance(batch, tuple) else (batch, None)
            model.hidden(ids, document_ids_bt=mask)
            kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
            tokens += int(kept.sum())
            for number, routing in enumerate(routings(model)):
                chosen = routing.chosen[kept].flatten().cpu()
                visits_le[number] += chosen.bincount(minlength=settings.n_experts)
                entropy = torch.special.entr(routing.probabilities[kept]).sum() / math.log(2)
                choice_l[number] += entropy.cpu()
    finally:
        model.train(training)
    if tokens == 0:
        raise UserError("There is no token to report the routers' choices of: give some text.")
    layers = tuple(sorted(settings.layers))
    return RouterReport(tokens, settings.n_active, layers, visits_le, choice_l / tokens)
