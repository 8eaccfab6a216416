"""A chain of tags: which may follow which, which follow often, and the best one as a whole.

A tagger scores each position alone. A linear-chain conditional random field (Lafferty et al. 2001;
on top of a neural network: Lample et al. 2016, arXiv:1603.01360) adds a score for each pair of
neighbours and looks at all paths at once:

    log p(tags) = score(tags) - log sum over all paths of exp(score(path))

The sum over n^u paths takes u steps (the forward algorithm), the best of them as well (Viterbi).
Paths against the rules of BIO (I-PER after O) do not exist: they have the score minus infinity.
Without learnt scores the same chain decodes a plain tagger.

Axes: b batch, u units, n tags (k: those of the unit before).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NEVER = -1e4  # as good as minus infinity in fp32, without 0 * inf in gradients
# Adam's steps are of one size for all; those of a fine-tuned model's are too small for scores that
# begin at zero. What is stored is divided by this, so that the scores learn as many times faster.
SPEED = 50.0


def legal(labels: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(which tags may begin a text (n,), which may follow which (k, n)), boolean.

    I-X follows B-X and I-X alone; everything else may stand anywhere. So may I-X where there is no
    B-X among the labels.
    """
    inner = [label.startswith("I-") and f"B-{label[2:]}" in labels for label in labels]
    begins = ~torch.tensor(inner)
    table = begins.repeat(len(labels), 1)
    for k, before in enumerate(labels):
        for n, label in enumerate(labels):
            if inner[n] and before[:2] in ("B-", "I-"):
                table[k, n] = before[2:] == label[2:]
    return begins, table


class Chain(nn.Module):
    """The scores of a tag's beginning, of a pair of neighbours and of an end; learnt or zero."""

    legal_start: Tensor
    legal_table: Tensor

    def __init__(self, labels: Sequence[str], *, learnt: bool) -> None:
        super().__init__()
        self.learnt = learnt
        begins, table = legal(labels)
        self.register_buffer("legal_start", begins, persistent=False)
        self.register_buffer("legal_table", table, persistent=False)
        if learnt:
            n = len(labels)
            self.start = nn.Parameter(torch.zeros(n))
            self.table = nn.Parameter(torch.zeros(n, n))
            self.end = nn.Parameter(torch.zeros(n))

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of beginning (n,), of following (k, n) and of ending (n,), in fp32."""
        if self.learnt:
            start_n, table_kn, end_n = (
                x.float() * SPEED for x in (self.start, self.table, self.end)
            )
        else:
            table_kn = torch.zeros(self.legal_table.shape, device=self.legal_table.device)
            start_n, end_n = table_kn[0], table_kn[0]
        return (
            start_n.masked_fill(~self.legal_start, NEVER),
            table_kn.masked_fill(~self.legal_table, NEVER),
            end_n,
        )

    @torch.no_grad()
    def set_scores(self, start_n: Tensor, table_kn: Tensor, end_n: Tensor) -> None:
        """Take up learnt scores (those of what is against the rules do not count)."""
        for parameter, value in (
            (self.start, start_n), (self.table, table_kn), (self.end, end_n),
        ):  # fmt: skip
            parameter.copy_(value.to(parameter) / SPEED)

    def loss_sum(self, scores_bun: Tensor, tags_bu: Tensor, mask_bu: Tensor) -> Tensor:
        """-log p of the right tags in nats, summed over the rows.

        `mask_bu` is true for units, which stand at the beginning of each row.
        """
        gold_b = self.path_score(scores_bun, tags_bu, mask_bu)
        return (self.log_partition(scores_bun, mask_bu) - gold_b).sum()

    def path_score(self, scores_bun: Tensor, tags_bu: Tensor, mask_bu: Tensor) -> Tensor:
        """The score of one path for each row: (b,)."""
        start_n, table_kn, end_n = self.scores()
        tags_bu = tags_bu.where(mask_bu, 0)
        own_bu = scores_bun.float().gather(2, tags_bu[..., None])[..., 0]
        steps_bu = table_kn[tags_bu[:, :-1], tags_bu[:, 1:]]
        score_b = (own_bu * mask_bu).sum(1) + (steps_bu * mask_bu[:, 1:]).sum(1)
        last_b = tags_bu.gather(1, (mask_bu.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
        return (score_b + start_n[tags_bu[:, 0]] + end_n[last_b]) * mask_bu[:, 0]

    def log_partition(self, scores_bun: Tensor, mask_bu: Tensor) -> Tensor:
        """The logarithm of the sum over all paths, for each row: (b,)."""
        start_n, table_kn, end_n = self.scores()
        scores_bun = scores_bun.float()
        alpha_bn = start_n + scores_bun[:, 0]
        for u in range(1, scores_bun.shape[1]):
            following_bn = (alpha_bn[:, :, None] + table_kn).logsumexp(1) + scores_bun[:, u]
            alpha_bn = torch.where(mask_bu[:, u, None], following_bn, alpha_bn)
        return (alpha_bn + end_n).logsumexp(1) * mask_bu[:, 0]

    def marginals(self, scores_bun: Tensor, mask_bu: Tensor) -> Tensor:
        """p(tag) at each unit, over all paths: (b, u, n). Zero behind the mask.

        The derivative of the log-partition by a score is the probability of what it scores.
        """
        with torch.enable_grad():
            given = scores_bun.detach().float().requires_grad_()
            total = self.log_partition(given, mask_bu).sum()
            (found,) = torch.autograd.grad(total, given)
        return found

    @torch.no_grad()
    def best(self, scores_bun: Tensor, mask_bu: Tensor) -> list[list[int]]:
        """The tags of the best legal path of each row (Viterbi), as long as its mask."""
        start_n, table_kn, end_n = self.scores()
        scores_bun = scores_bun.float()
        alpha_bn = start_n + scores_bun[:, 0]
        came_from: list[Tensor] = []
        stay_n = torch.arange(len(start_n), device=start_n.device)
        for u in range(1, scores_bun.shape[1]):
            best_bn, from_bn = (alpha_bn[:, :, None] + table_kn).max(1)
            here = mask_bu[:, u, None]
            alpha_bn = torch.where(here, best_bn + scores_bun[:, u], alpha_bn)
            came_from.append(torch.where(here, from_bn, stay_n))
        tag_b = (alpha_bn + end_n).argmax(1)
        path = [tag_b]
        for from_bn in reversed(came_from):
            tag_b = from_bn.gather(1, tag_b[:, None])[:, 0]
            path.append(tag_b)
        tags_bu = torch.stack(path[::-1], dim=1).tolist()
        lengths = mask_bu.sum(1).tolist()
        return [row[:length] for row, length in zip(tags_bu, lengths, strict=True)]
