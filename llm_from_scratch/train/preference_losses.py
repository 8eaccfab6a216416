"""What a pair of answers teaches: losses over the log-probabilities that a model gives to both.

With c and r the log-probabilities of the chosen and the rejected answer, each less that under the
reference model (the model as it was), and |y| an answer's tokens:

    dpo     -log sigmoid(beta (c - r))                      Rafailov et al., arXiv:2305.18290
    ipo     (c / |y_c| - r / |y_r| - 1 / (2 beta))^2        Azar et al., arXiv:2310.12036
    simpo   -log sigmoid(beta (c / |y_c| - r / |y_r|) - gamma)    Meng et al., arXiv:2405.14734;
            without a reference: c and r are the model's own

Each is minus the logarithm of a probability or a distance in the *rewards* of the two answers: what
the model thinks of an answer, up to a constant of the prompt.

Axes: b pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

LOSSES = ("dpo", "ipo", "simpo")


@dataclass(frozen=True)
class Likelihood:
    """Answers, one per pair: log-probability (b,), the same under the reference, tokens."""

    logprob: Tensor
    reference: Tensor
    length: Tensor

    @property
    def ratio(self) -> Tensor:
        """log p / p_reference of the whole answer."""
        return self.logprob - self.reference


@dataclass(frozen=True)
class PairLoss:
    """Of each pair (b,): the loss with gradients, and the rewards of both answers without."""

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor


def pair_loss(
    kind: str,
    chosen: Likelihood,
    rejected: Likelihood,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
) -> PairLoss:
    """The loss of each pair by one of `LOSSES`.

    `label_smoothing` is the probability that a pair is the wrong way round: the loss is what is
    expected then (conservative DPO, E. Mitchell 2023). The rewards are beta times what the loss
    compares: whole answers for dpo, means over their tokens for ipo and simpo.
    """
    if kind == "dpo":
        rewards = [beta * side.ratio for side in (chosen, rejected)]
    elif kind == "ipo":
        rewards = [beta * side.ratio / side.length for side in (chosen, rejected)]
    else:
        rewards = [beta * side.logprob / side.length for side in (chosen, rejected)]
    margin = rewards[0] - rewards[1]
    if kind == "ipo":
        loss = (margin / beta - 1 / (2 * beta)) ** 2
    else:
        above = margin - gamma if kind == "simpo" else margin
        right, wrong = F.logsigmoid(above), F.logsigmoid(-above)
        loss = -(1 - label_smoothing) * right - label_smoothing * wrong
    return PairLoss(loss, rewards[0].detach(), rewards[1].detach())


def drift(logprobs_bt: Tensor, reference_bt: Tensor) -> Tensor:
    """How far each token's probability is from the reference's: (b, t), at least 0, no gradient.

    q/p - log(q/p) - 1 for the reference's q and the model's p, whose mean over tokens that the
    model itself writes is the Kullback-Leibler divergence (J. Schulman's third estimator, 2020).
    Over given answers it is none, but likewise 0 only where nothing changed.
    """
    gap = (reference_bt - logprobs_bt).detach()
    return gap.exp() - gap - 1
