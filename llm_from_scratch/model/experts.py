"""A mixture of experts: many feed-forwards, of which each token visits the few a router chooses.

The model knows as much as all experts together and computes as much as the chosen ones (Shazeer et
al., arXiv:1701.06538; Switch Transformers, arXiv:2101.03961; Qwen3, arXiv:2505.09388). Nothing is
dropped: an expert takes all who come. That not all come to one is what the load-balancing loss is
for.

Axes: b batch, t time, n tokens (batch and time together), e experts, a experts active per token, v
visits (a per token), f features of an expert, m features of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.layers import Linear, activate


@dataclass
class Routing:
    """What a router decided for the tokens of a pass.

    Probabilities (..., e), the chosen experts' numbers and their weights (..., a); the leading axes
    are those of the tokens, (b, t).
    """

    probabilities: Tensor
    chosen: Tensor
    weights: Tensor


def route(logits: Tensor, n_active: int, normalise: bool) -> Routing:
    """Send each token to its `n_active` likeliest experts. logits (..., e).

    With `normalise` the weights of the chosen ones are made to sum to one.
    """
    probabilities = logits.float().softmax(-1)
    weights, chosen = probabilities.topk(n_active, dim=-1)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(probabilities, chosen, weights)


class Experts(nn.Module):
    """`n_experts` gated feed-forwards behind a router.

    The matrices of all experts lie in one tensor each: gate and up (e, f, m), down (e, m, f).
    `routing` holds what the router decided in the last pass, for the load-balancing loss and for
    reports; it is None before.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.experts is not None
        self.config = config
        self.settings = config.experts
        e, f, m = config.experts.n_experts, config.experts.d_ff, config.d_model
        self.router = Linear(m, e, bias=False)
        self.gate = nn.Parameter(torch.empty(e, f, m))
        self.up = nn.Parameter(torch.empty(e, f, m))
        self.down = nn.Parameter(torch.empty(e, m, f))
        self.routing: Routing | None = None
        if not self.gate.is_meta:
            for weight in (self.gate, self.up, self.down):
                nn.init.normal_(weight, std=config.init_std)

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has not passed anything yet (and a graph cannot be copied).
        return {**self.__dict__, "routing": None}

    def route(self, x: Tensor) -> Routing:
        """The router's choice for tokens (..., m)."""
        return route(self.router(x), self.settings.n_active, self.settings.normalise)

    def forward(self, x_btm: Tensor) -> Tensor:
        self.routing = routing = self.route(x_btm)
        x_nm = x_btm.flatten(0, -2)
        expert_v = routing.chosen.flatten()
        # Token by token the visits of an expert lie apart; sorted by expert, they are one block,
        # and each expert needs one product per matrix, however many tokens came.
        order = expert_v.argsort(stable=True)
        counts = torch.bincount(expert_v, minlength=self.settings.n_experts).tolist()
        token_v = order // self.settings.n_active
        gates, ups, downs = self.by_expert()
        done = [
            self.feed_forward(x_vm, gates[e], ups[e], downs[e])
            for e, x_vm in enumerate(x_nm[token_v].split(counts))
            if counts[e]  # nobody came: nothing is computed
        ]
        weight_v = routing.weights.flatten()[order].to(x_nm.dtype)
        y_vm = (torch.cat(done) if done else x_nm[:0]) * weight_v[:, None]
        return torch.zeros_like(x_nm).index_add_(0, token_v, y_vm).view_as(x_btm)

    def by_expert(self) -> list[Sequence[Tensor] | Tensor]:
        """Gate, up and down such that [e] gives one expert's matrix."""
        weights = (self.gate, self.up, self.down)
        if torch.is_grad_enabled():
            # The gradient of weight[e] is a tensor of all experts, zero but for one; that of all of
            # `unbind` is one stack.
            return [weight.unbind() for weight in weights]
        return [*weights]

    def feed_forward(self, x_vm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """One expert's work for those who came to it: (v, m) -> (v, m)."""
        gate, up, down = (weight.to(x_vm.dtype) for weight in (gate, up, down))
        gated = activate(F.linear(x_vm, gate), self.config.activation)
        return F.linear(gated * F.linear(x_vm, up), down)


def mix_by_hand(experts: Experts, x_btm: Tensor) -> Tensor:
    """What `Experts` computes, one token at a time: the twin to read.

    y = sum over the chosen e of weight_e * expert_e(x).
    """
    routing = experts.route(x_btm)
    chosen_na, weights_na = routing.chosen.flatten(0, -2), routing.weights.flatten(0, -2)
    y_nm = []
    for x_m, chosen_a, weights_a in zip(x_btm.flatten(0, -2), chosen_na, weights_na, strict=True):
        y_m = torch.zeros_like(x_m)
        for e, weight in zip(chosen_a.tolist(), weights_a, strict=True):
            gate, up, down = experts.gate[e], experts.up[e], experts.down[e]
            y_m = y_m + weight * experts.feed_forward(x_m[None], gate, up, down)[0]
        y_nm.append(y_m)
    return torch.stack(y_nm).view_as(x_btm)


def experts_of(model: nn.Module) -> list[Experts]:
    """The mixtures in a model, first block first."""
    return [part for part in model.modules() if isinstance(part, Experts)]


def routings(model: nn.Module) -> list[Routing]:
    """What the routers of a model decided in its last pass, first block first."""
    return [part.routing for part in experts_of(model) if part.routing is not None]


def visit_shares(routing: Routing, mask_bt: Tensor | None = None) -> Tensor:
    """The share of each row's visits that each expert got: (b, e), rows sum to 1.

    Tokens whose mask is 0 do not count.
    """
    b, _, e = routing.probabilities.shape
    counts = torch.ones_like(routing.chosen, dtype=torch.float32)
    if mask_bt is not None:
        counts = counts * mask_bt[..., None]
    visits = counts.new_zeros(b, e).scatter_add_(1, routing.chosen.flatten(1), counts.flatten(1))
    return visits / visits.sum(-1, keepdim=True).clamp(min=1)


def balance_losses(
    routings: Sequence[Routing], mask_bt: Tensor | None = None, pooled: bool = False
) -> Tensor:
    """The load-balancing loss of each row: (b,), about a where visits are even, more where not.

    e * sum over experts of f * P, with f the visits per token that an expert got and P the mean
    probability that the router gave it, over the row's tokens whose mask is not 0 (Switch
    Transformers, arXiv:2101.03961, equations 4 to 6); the mean over the layers. Only P has a
    gradient: it draws probability away from the experts that are visited most.

    `pooled` takes f and P over all layers together, as `transformers` does. Expert 3 of one layer
    has nothing to do with expert 3 of the next, so that one may starve while the other is crowded.
    """
    b, t, e = routings[0].probabilities.shape
    kept_bt = routings[0].probabilities.new_ones(b, t) if mask_bt is None else mask_bt.float()
    tokens_b1 = kept_bt.sum(-1, keepdim=True).clamp(min=1)
    share_lbe = torch.stack([visit_shares(r, mask_bt) for r in routings])
    mean_lbe = torch.stack(
        [(r.probabilities * kept_bt[..., None]).sum(1) / tokens_b1 for r in routings]
    )
    if pooled:
        share_lbe, mean_lbe = share_lbe.mean(0, keepdim=True), mean_lbe.mean(0, keepdim=True)
    n_active = routings[0].chosen.shape[-1]
    return e * n_active * (share_lbe * mean_lbe).sum(-1).mean(0)
