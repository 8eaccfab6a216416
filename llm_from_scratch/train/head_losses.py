"""What a head's scores are compared with, and how: one right label, several, or a number.

As everywhere, a loss is a sum with its count, and the loop divides. Axes: b batch, n labels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.model.heads import HeadConfig
from llm_from_scratch.train.losses import LossSum, cross_entropy_sum


def problem_of(head: HeadConfig, labels: Tensor) -> str:
    """The kind of question that the labels answer; where the head does not say, as they suggest.

    One output is a regression; whole numbers name the one right label, and others say of each label
    whether it holds. Heads that do not label a whole text always look for the one right answer.
    """
    if head.kind != "classification":
        return "single_label_classification"
    if head.problem_type is not None:
        return head.problem_type
    if len(head.labels) == 1:
        return "regression"
    one = not labels.dtype.is_floating_point
    return "single_label_classification" if one else "multi_label_classification"


def head_loss(scores: Tensor, labels: Tensor, head: HeadConfig) -> LossSum:
    """The summed loss of a head's scores.

    One right answer: `labels` hold its number, or -100 where nothing is asked, in the shape of the
    scores without their last axis; the loss is the cross-entropy in nats. Several: 0 or 1 for each
    score, and the cross-entropy of each. Regression: a number for each score, and the squared
    error. The last two count every score. Raises `UserError` for labels that do not fit the scores.
    """
    problem = problem_of(head, labels)
    if problem == "single_label_classification":
        _check_numbers(scores, labels)
        return LossSum(cross_entropy_sum(scores, labels), int((labels != IGNORED).sum()))
    if problem == "regression" and labels.numel() == scores.numel():
        labels = labels.view_as(scores)
    if labels.shape != scores.shape:
        raise UserError(
            f"The labels have the shape {tuple(labels.shape)}, the scores {tuple(scores.shape)}; "
            "give one label for each score."
        )
    loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    return LossSum(loss(scores.float(), labels.float(), reduction="sum"), scores.numel())


def _check_numbers(scores: Tensor, labels: Tensor) -> None:
    """Whether each label is the number of one of the scores, or -100."""
    if labels.shape != scores.shape[:-1] or labels.dtype.is_floating_point:
        raise UserError(
            f"The labels have the shape {tuple(labels.shape)} and the type {labels.dtype}, the "
            f"scores the shape {tuple(scores.shape)}; give one whole number for each row of scores."
        )
    wrong = labels[((labels < 0) | (labels >= scores.shape[-1])) & (labels != IGNORED)]
    if len(wrong):
        raise UserError(
            f"A label is {int(wrong[0])}, but there are {scores.shape[-1]} scores: give numbers "
            f"from 0 to {scores.shape[-1] - 1}, or {IGNORED} where nothing is asked."
        )
