"""Losses are sums with counts; the loop divides once, by the global count.

That is why gradient accumulation, packing and data parallelism change nothing: a mean of means is
not a mean, a sum of sums is a sum.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.model.config import EncoderDecoderConfig, ModelConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.model.experts import balance_losses, experts_of, routings, visit_shares

CHUNK = 1024  # tokens at a time in `chunked_cross_entropy_sum`
CHUNKED_FROM = 1024  # entries of the vocabulary above which training takes it


@dataclass
class LossSum:
    """The loss summed over `count` targets, and further sums to be divided by the same count.

    `count` is a number or a tensor with one; a tensor spares the device a stop per micro-batch. A
    metric of several numbers is logged as the smallest and the largest of them. `tokens` is how
    many tokens the model read, padding left out, where they are not as many as the targets.
    """

    loss_sum: Tensor
    count: int | Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    tokens: int | None = None


class Sums:
    """What the steps of one batch, or of a validation set, add up to."""

    def __init__(self) -> None:
        self.totals = torch.zeros(3, dtype=torch.float64)  # loss, targets, tokens
        self.metrics: dict[str, Tensor] = {}

    def add(self, result: LossSum) -> None:
        """One more micro-batch."""
        count = float(result.count)
        parts = [
            result.loss_sum.item(),
            count,
            float(count if result.tokens is None else result.tokens),
        ]
        self.totals += torch.tensor(parts, dtype=torch.float64)
        for name, value in result.metrics.items():
            before = self.metrics.get(name, torch.zeros(()))
            self.metrics[name] = before + value.detach().cpu()

    def tensors(self) -> list[Tensor]:
        """All sums, in an order that every process has."""
        return [self.totals, *(self.metrics[name] for name in sorted(self.metrics))]

    @property
    def count(self) -> float:
        return self.totals[1].item()

    @property
    def tokens(self) -> int:
        return int(self.totals[2])

    @property
    def loss(self) -> float:
        return self.totals[0].item() / self.count

    def metric_means(self) -> dict[str, float]:
        """What is logged of the metrics: of several numbers, the smallest and the largest."""
        found: dict[str, float] = {}
        for name in sorted(self.metrics):
            value = self.metrics[name] / self.count
            if value.numel() == 1:
                found[name] = value.item()
            else:
                found |= {f"{name}_min": value.min().item(), f"{name}_max": value.max().item()}
        return found


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum log softmax(logits)[target], in nats, over the targets that are not -100.

    logits (..., v), targets (...). Computed in fp32.
    """
    return F.cross_entropy(
        logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )


def with_balance(result: LossSum, model: nn.Module, targets_bt: Tensor) -> LossSum:
    """A training step's loss with the load-balancing loss of the model's experts, if it has any.

    The balance of a text is a product of two means over its tokens and no sum over them. It is
    therefore taken row by row, as in DeepSeek-V2 (arXiv:2405.04434, 2.2.3), and each row's stands
    for all of its targets: the mean over targets does not depend on how rows are put into batches.
    The metrics are `balance` and `expert_share`, each expert's share of the visits in each layer.
    """
    experts, found = experts_of(model), routings(model)
    if not experts:
        return result
    targets_b = (targets_bt != IGNORED).sum(-1)
    balance = (balance_losses(found) * targets_b).sum()
    shares_le = torch.stack([(visit_shares(r) * targets_b[:, None]).sum(0) for r in found])
    metrics = {**result.metrics, "balance": balance.detach(), "expert_share": shares_le}
    loss_sum = result.loss_sum + experts[0].settings.balance * balance
    return LossSum(loss_sum, result.count, metrics, result.tokens)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Head and cross-entropy in one: logits live only for one chunk of tokens at a time.

    The gradient of a chunk's logits is softmax - onehot, so it is known in the forward pass; both
    products with it are made at once and the logits are dropped.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        w = weight.to(hidden.dtype)
        total = hidden.new_zeros((), dtype=torch.float32)
        d_hidden = torch.zeros_like(hidden)
        d_weight = torch.zeros_like(weight)
        for start in range(0, hidden.shape[0], chunk):
            part, target = hidden[start : start + chunk], targets[start : start + chunk]
            kept = target != IGNORED
            logits = (part @ w.T).float()
            logprobs = logits.log_softmax(-1)
            safe = target.clamp_min(0)[:, None]
            total -= (logprobs.gather(1, safe)[:, 0] * kept).sum()
            slope = logprobs.exp_()
            slope.scatter_add_(1, safe, torch.full_like(slope[:, :1], -1.0))
            slope = (slope * kept[:, None]).to(hidden.dtype)
            d_hidden[start : start + chunk] = slope @ w
            d_weight += (slope.T @ part).to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        return d_hidden * scale.to(d_hidden.dtype), d_weight * scale.to(d_weight.dtype), None, None


def chunked_cross_entropy_sum(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = CHUNK
) -> Tensor:
    """`cross_entropy_sum(hidden @ weight.T, targets)` without ever holding all logits.

    hidden (..., m), weight (v, m), targets (...): memory for logits is chunk * v instead of all
    tokens * v.
    """
    flat = hidden.flatten(0, -2)
    return _ChunkedCrossEntropy.apply(flat, weight, targets.flatten(), chunk)  # type: ignore[no-any-return]


def is_chunked(config: ModelConfig | EncoderDecoderConfig) -> bool:
    """Whether training takes the logits of such a model a chunk of tokens at a time.

    For many tokens of a large vocabulary, where logits are no more than a product with a matrix.
    """
    if isinstance(config, EncoderDecoderConfig):
        plain = config.decoder.logit_softcap is None and not config.logits_bias
    else:
        plain = config.logit_softcap is None
    return plain and config.vocab_size > CHUNKED_FROM


def next_token_loss_sum(
    model: Decoder | EncoderDecoder, hidden_btm: Tensor, targets_bt: Tensor
) -> Tensor:
    """`cross_entropy_sum` of the logits that the model makes of its last states.

    A model in training saves the memory of the logits where it can.
    """
    if not (model.training and is_chunked(model.config)):
        return cross_entropy_sum(model.logits(hidden_btm), targets_bt)
    writer = model.decoder if isinstance(model, EncoderDecoder) else model
    if writer.config.scale_logits:
        hidden_btm = hidden_btm * writer.config.d_model**-0.5
    return chunked_cross_entropy_sum(hidden_btm, writer.head.weight, targets_bt)
