"""Asking a model with a head for labels: texts in, one row of scores for each question out.

A question is one text, a pair of texts, or several of these among which one is to be chosen; the
head sees each text or pair as a row, padded on the right.

Axes: b questions, r rows (as many as there are texts or pairs), t time, n labels or choices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import Head
from llm_from_scratch.text.inputs import parts_of
from llm_from_scratch.text.tokenizer import Tokenizer

BATCH = 32  # rows read at once where nothing is learnt
CHOICE = "choice"  # the label of a classifier that gives each of several texts one score


@dataclass(frozen=True)
class Line:
    """A text or a pair as the model reads it: ids, and for each of them its segment."""

    ids: list[int]
    segments: list[int]


@dataclass(frozen=True)
class Question:
    """One line, or one for each choice; `label` is what is wanted: a number of its kind."""

    lines: list[Line]
    label: float = 0

    def __len__(self) -> int:
        """Tokens that the model reads for it, each line as long as the longest."""
        return len(self.lines) * max(len(line.ids) for line in self.lines)


@dataclass
class QuestionBatch:
    """Lines (r, t) of b questions: ids, mask (1 text, 0 padding), segments; and b labels.

    `counts` (b,) says how many lines each question has; None where each has one.
    """

    tokens: Tensor
    mask: Tensor
    segments: Tensor
    labels: Tensor
    counts: Tensor | None = None


def line_of(
    tokenizer: Tokenizer, text: str, pair: str | None = None, max_length: int | None = None
) -> Line:
    """A text, or a pair, with the special tokens that belong around it, cut to `max_length`.

    Where a tokenizer puts nothing between two texts (most decoders), a line end stands there.
    """
    if pair is not None:
        parts = parts_of(tokenizer.rules.get("post_processor"), pair=True)
        texts = [number for number, (what, _) in enumerate(parts) if isinstance(what, str)]
        if texts[1] == texts[0] + 1:
            text, pair = f"{text}\n{pair}", None
    pairs = None if pair is None else [pair]
    found = tokenizer.encode_inputs([text], pairs, max_length=max_length)
    return Line(found.ids[0], found.segments[0])


def batch_of(questions: Sequence[Question], *, several: bool, numbers: bool) -> QuestionBatch:
    """Questions as tensors; `several` lines each, or one; labels as `numbers` or as counters."""
    lines = [line for question in questions for line in question.lines]
    longest = max(len(line.ids) for line in lines)

    def filled(rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])

    labels = torch.tensor(
        [question.label for question in questions], dtype=torch.float32 if numbers else torch.long
    )
    return QuestionBatch(
        filled([line.ids for line in lines]),
        filled([[1] * len(line.ids) for line in lines]),
        filled([line.segments for line in lines]),
        labels,
        torch.tensor([len(question.lines) for question in questions]) if several else None,
    )


def scores_of(model: Head, batch: QuestionBatch) -> Tensor:
    """(b, n): the scores of each question's labels, or of its choices.

    A question with fewer choices than another one has minus infinity behind them.
    """
    backbone = model.backbone
    # Padding on the right is out of sight of a decoder, which then needs no mask.
    seen = None if isinstance(backbone, Decoder) else batch.mask
    states_rtm = model.states(batch.tokens, seen, batch.segments)
    scores_rn = model.answer(states_rtm, batch.mask)
    if batch.counts is None:
        return scores_rn
    rows = scores_rn[:, 0].split(batch.counts.tolist())
    return pad_sequence(rows, batch_first=True, padding_value=float("-inf"))


@torch.no_grad()
def answer(
    model: Head,
    questions: Sequence[Question],
    *,
    several: bool = False,
    report: Callable[[int], Any] = lambda done: None,
) -> list[Tensor]:
    """The scores of each question (n,), in fp32 on the CPU, computed with questions of its length.

    `report` is told how many are done.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        here = order[start : start + BATCH]
        batch = batch_of([questions[n] for n in here], several=several, numbers=True)
        moved = {name: None if v is None else v.to(device) for name, v in vars(batch).items()}
        scores = scores_of(model, QuestionBatch(**moved)).float().cpu()  # type: ignore[arg-type]
        for number, row in zip(here, scores, strict=True):
            found[number] = row[: len(questions[number].lines)] if several else row
        report(len(found))
    return [found[number] for number in range(len(questions))]
