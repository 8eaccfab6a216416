"""The losses of group-relative policy optimisation, as sums over the tokens of completions.

With r_t the probability of token t now, divided by that when it was written, A the advantage of its
completion, and q the reference model:

    l_t = -min(r_t A, clip(r_t, 1 - low, 1 + high) A) + kl * (q_t/p_t - log(q_t/p_t) - 1)

Three ways to add them up, over n completions of lengths T_i:

    grpo      1/n sum_i 1/T_i sum_t l_t        DeepSeekMath, arXiv:2402.03300
    dr_grpo   1/n sum_i 1/max sum_t l_t        Dr. GRPO, arXiv:2503.20783: no length is favoured
    dapo      sum_i sum_t l_t / sum_i T_i      DAPO, arXiv:2503.14476: every token counts the same

Each is a weight per completion, so that the loop can divide once, by n.

Axes: b completion, t time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a group's standard deviation
LOSSES = ("grpo", "dr_grpo", "dapo")


@dataclass(frozen=True)
class PolicySums:
    """What each completion gives (b,): its loss with gradients, and means over its tokens."""

    loss: Tensor
    policy_loss: Tensor
    kl: Tensor
    clip_low: Tensor
    clip_high: Tensor


def advantages(rewards: Tensor, size: int, scale: bool) -> tuple[Tensor, Tensor]:
    """(advantage of each completion, standard deviation of its group), both like `rewards` (b,).

    `size` completions after each other are a group: its mean is taken off, and with `scale` what
    remains is divided by its standard deviation. Where all rewards are alike there is no advantage.
    """
    grouped = rewards.view(-1, size)
    std = grouped.std(1, keepdim=True)
    above = grouped - grouped.mean(1, keepdim=True)
    # The mean of equal numbers can miss them by a rounding error, which the division would blow up.
    same = (grouped == grouped[:, :1]).all(1, keepdim=True)
    above, std = above.masked_fill(same, 0.0), std.masked_fill(same, 0.0)
    found = above / (std + EPSILON) if scale else above
    return found.flatten(), std.expand_as(grouped).flatten()


def completion_weights(kind: str, lengths: Tensor, longest: int) -> Tensor:
    """What the token losses of each completion are multiplied by (b,), for all of a rollout.

    `lengths` counts the tokens of each, `longest` is how many may be written.
    """
    if kind == "grpo":
        return 1.0 / lengths.clamp(min=1)
    if kind == "dr_grpo":
        return torch.full_like(lengths, 1.0 / longest, dtype=torch.float32)
    assert kind == "dapo"
    return torch.full_like(lengths, len(lengths) / max(1, int(lengths.sum())), dtype=torch.float32)


def policy_sums(
    logprobs_bt: Tensor,
    old_bt: Tensor,
    reference_bt: Tensor | None,
    advantages_b: Tensor,
    weights_b: Tensor,
    written_bt: Tensor,
    *,
    low: float,
    high: float,
    kl: float,
) -> PolicySums:
    """The loss of each completion.

    `logprobs_bt` are those of the model as it is, `old_bt` those with which the tokens were drawn,
    `reference_bt` the reference model's (None without one); `written_bt` is 1 where a token is the
    model's own. `kl` is what the divergence from the reference is multiplied by (the estimator k3
    of http://joschu.net/blog/kl-approx.html, which is never negative).
    """
    mask = written_bt.to(logprobs_bt.dtype)
    count_b = mask.sum(1).clamp(min=1)
    ratio = (logprobs_bt - old_bt).exp()
    a_b1 = advantages_b[:, None]
    policy_bt = -torch.minimum(ratio * a_b1, ratio.clamp(1 - low, 1 + high) * a_b1)
    loss_bt = policy_bt
    kl_bt = torch.zeros_like(policy_bt)
    if reference_bt is not None:
        apart = reference_bt - logprobs_bt
        kl_bt = apart.exp() - apart - 1
        loss_bt = policy_bt + kl * kl_bt

    def mean(x_bt: Tensor) -> Tensor:
        return ((x_bt * mask).sum(1) / count_b).detach()

    return PolicySums(
        loss=(loss_bt * mask).sum(1) * weights_b,
        policy_loss=((policy_bt * mask).sum(1) * weights_b).detach(),
        kl=mean(kl_bt),
        clip_low=mean(((ratio < 1 - low) & (a_b1 < 0)).float()),
        clip_high=mean(((ratio > 1 + high) & (a_b1 > 0)).float()),
    )
