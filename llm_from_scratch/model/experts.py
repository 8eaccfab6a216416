"""A mixture of experts: many feed-forwards, of which each token visits the few a router chooses.

The model knows as much as all experts together and computes as much as the chosen ones (Shazeer et
al., arXiv:1701.06538; Switch Transformers, arXiv:2101.03961; Qwen3, arXiv:2505.09388).

Axes: n tokens (batch and time together), e experts, a experts active per token, f features of an
expert, m features of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.model.config import ModelConfig
from llm_from_scratch.model.layers import Linear, activate


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

    def forward(self, x_btm: Tensor) -> Tensor:
        x_nm = x_btm.flatten(0, -2)
        self.routing = routing = route(self.router(x_nm), self.settings.n_active)
        weights_na = routing.weights_na
        if self.settings.normalise:
            weights_na = weights_na / weights_na.sum(-1, keepdim=True)
        weights_na = weights_na.to(x_nm.dtype)
        y_nm = torch.zeros_like(x_nm)
        # Token by token the visits of an expert lie apart; sorted by expert, they are one block.
        order = routing.chosen_na.flatten().argsort(stable=True)
        visits = torch.bincount(routing.chosen_na.flatten(), minlength=self.settings.n_experts)
        start = 0
        for expert, count in enumerate(visits.tolist()):
            if count == 0:
                continue  # nobody came: nothing is computed
            here = order[start : start + count]
            start += count
            token = here // self.settings.n_active
            visit = self.expert(x_nm[token], expert) * weights_na.flatten()[here, None]
            y_nm = y_nm.index_add(0, token, visit)
        return y_nm.view_as(x_btm)

    def expert(self, x_nm: Tensor, number: int) -> Tensor:
        """One expert's feed-forward: (n, m) -> (n, m)."""
        gate, up, down = (w[number].to(x_nm.dtype) for w in (self.gate, self.up, self.down))
        bent = activate(F.linear(x_nm, gate), self.config)
        return F.linear(bent * F.linear(x_nm, up), down)


@dataclass
class Routing:
    """What a router decided: probabilities (n, e), the chosen experts and their weights (n, a)."""

    probabilities_ne: Tensor
    chosen_na: Tensor
    weights_na: Tensor


def route(logits_ne: Tensor, n_active: int) -> Routing:
    """Send each token to its `n_active` likeliest experts."""
    probabilities = logits_ne.float().softmax(-1)
    weights, chosen = probabilities.topk(n_active, dim=-1)
    return Routing(probabilities, chosen, weights)
