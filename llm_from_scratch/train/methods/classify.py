"""Classification: labels, numbers or choices for texts and for pairs of texts.

One method for four tasks, which differ in what a row wants:

    labels       one of several labels for a text, or for a pair of texts (inference, paraphrase)
    numbers      a number for a text or a pair (how similar are two sentences?)
    choices      the right one among several texts, each read together with the question

The head stands on whatever the model is: on the first token of an encoder, the last of a decoder,
the end of what an encoder-decoder has read (`model/heads.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.labelled import KINDS, LabelledFields
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.data.split import drawing_order
from llm_from_scratch.evaluate.classification_report import outcome_of_labels, outcome_of_numbers
from llm_from_scratch.evaluate.classifier import (
    CHOICE,
    Question,
    QuestionBatch,
    answer,
    batch_of,
    line_of,
    scores_of,
)
from llm_from_scratch.model.heads import Head, ScoringHead
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.losses import LossSum, cross_entropy_sum
from llm_from_scratch.train.methods.base import (
    FinetuneConfig,
    FinetuneMethod,
    Outcome,
    tuned,
)
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.families import FAMILIES
from llm_from_scratch.weights.sources import locate

MOST_LABELS = 10_000


@dataclass(frozen=True)
class ClassifySettings:
    """What a row holds, and what is wanted of it."""

    kind: str = "labels"
    """labels (one of several), numbers (a regression) or choices (the right text of several)."""
    text_field: str = "text"
    """Which field of a row holds the text, or the question that goes with the choices."""
    pair_field: str | None = None
    """Which field holds the second text, where a row is a pair."""
    label_field: str = "label"
    """Which field holds what is wanted."""
    choices_fields: tuple[str, ...] = ("choices",)
    """The field with the list of choices, or the fields with one choice each."""
    labels: tuple[str, ...] = ()
    """The labels in their order; default those of the training rows, sorted."""
    positive: str | None = None
    """Of two labels the one that test_f1 is about; default the last."""
    balance: bool = False
    """Draw as many rows of each label as the rarest has, before rows are divided."""
    cut: bool = False
    """Cut rows that are longer than the context, instead of leaving them out."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"classify.kind is '{self.kind}'; it must be one of {', '.join(KINDS)}."
                + nearest(self.kind, KINDS)
            )
        if self.kind != "labels" and (self.labels or self.balance or self.positive):
            raise UserError(
                f"classify.labels, positive and balance are for rows with labels, but "
                f"classify.kind is {self.kind}; leave them out."
            )
        if self.kind == "choices" and not self.choices_fields:
            raise UserError("classify.choices_fields is empty; name the field with the choices.")
        if len({*self.labels}) != len(self.labels) or len(self.labels) == 1:
            raise UserError("classify.labels must be different labels, at least two.")
        if self.positive is not None and self.labels and self.positive not in self.labels:
            raise UserError(
                f"classify.positive is '{self.positive}', which is not in classify.labels."
                + nearest(self.positive, self.labels)
            )


def classify_training() -> TrainSettings:
    """The usual way to train: a head that knows nothing bears larger steps."""
    return tuned(learning_rate=5e-5, batch_size=16)


@dataclass(frozen=True)
class ClassifyConfig(FinetuneConfig):
    """A complete run of `finetune classify`."""

    method: str = "classify"
    classify: ClassifySettings = field(default_factory=ClassifySettings)
    train: TrainSettings = field(default_factory=classify_training)


class Classify(FinetuneMethod):
    """Cross-entropy of the right label or choice, or the squared error of a number."""

    Config = ClassifyConfig
    config: ClassifyConfig
    pipeline = "text-classification"
    shows_before = True

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.settings = self.config.classify
        self.labels: tuple[str, ...] = self.settings.labels
        self.trained_on: Counter[str] = Counter()  # training rows of each label
        self.mean = 0.0
        s = self.settings
        self.fields = LabelledFields(
            s.text_field, s.pair_field, s.label_field, s.choices_fields, "classify."
        )

    # --- rows --------------------------------------------------------------------------------

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        row = self.fields.texts(values, choices=s.kind == "choices")
        row["label"] = self.fields.wanted(values, s.kind, row.get("choices", ()))
        if s.labels and row["label"] not in s.labels:
            raise BadRow(
                f"has the label '{row['label']}', which is not in classify.labels "
                f"({', '.join(s.labels)}).{nearest(row['label'], s.labels)}"
            )
        return row

    def text_of(self, values: dict[str, Any]) -> str:
        return "\n".join([values["text"], values.get("pair", ""), *values.get("choices", [])])

    def select(self, rows: list[Row]) -> list[Row]:
        if not self.settings.balance:
            return rows
        return balanced(rows, self.config.train.seed)

    def learn(self, rows: Sequence[Row]) -> None:
        if self.settings.kind == "numbers":
            self.mean = sum(row.values["label"] for row in rows) / max(1, len(rows))
            return
        self.trained_on = Counter(str(row.values["label"]) for row in rows)
        if self.settings.kind == "choices" or not rows:
            return
        found = sorted(self.trained_on)
        if len(found) < 2:
            raise UserError(
                f"All {len(rows):,} training rows (the first is {rows[0].place}) have the label "
                f"'{found[0]}'; a classifier needs at least two. Add rows of another label, or "
                "name the right column with --classify.label_field."
            )
        if len(found) > MOST_LABELS:
            raise UserError(
                f"The training rows have {len(found):,} different labels; if they are numbers, say "
                "--classify.kind numbers, or name the right column with --classify.label_field."
            )
        positive = self.settings.positive
        if positive is not None and positive not in found:
            raise UserError(
                f"classify.positive is '{positive}', but no training row has that label; there "
                f"are {', '.join(found)}.{nearest(positive, found)}"
            )
        if not self.settings.labels:
            self.labels = tuple(found)

    def check_against(self, values: dict[str, Any]) -> None:
        if self.settings.kind == "labels" and values["label"] not in self.trained_on:
            known = ", ".join(self.labels[:10])
            raise BadRow(
                f"has the label '{values['label']}', which no training row has (there are {known})"
                "; mend it, or add such rows to those that are learnt from."
            )

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        s, name = self.settings, self.config.model
        if s.kind == "numbers":
            model = self.open_with("regression")
            start_at(model, self.mean)
        elif s.kind == "labels":
            if not s.labels:
                self.labels = in_stored_order(name, self.labels)
            model = self.open_with("classification", self.labels)
            assert isinstance(model, Head)
            says = "single_label_classification"
            model.head_config = dataclasses.replace(model.head_config, problem_type=says)
        elif has_class(name, "multiple_choice"):
            model = self.open_with("multiple_choice")
        else:  # the same head under another name: one score for each text
            model = self.open_with("classification", [CHOICE])
        self.limit = self.longest(model)
        return model

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> Question:
        s = self.settings
        most = self.limit if s.cut else None
        seconds = values.get("choices") or [values.get("pair")]
        lines = [line_of(self.tokenizer, values["text"], second, most) for second in seconds]
        longest = max(len(line.ids) for line in lines)
        if longest > self.limit:
            raise BadRow(
                f"has {longest} tokens, more than {self.limit}; shorten it, raise "
                "--data.max_length if the model takes more, or let --classify.cut true cut it."
            )
        if longest == 0:
            raise BadRow("has no token that the model knows.")
        label = values["label"]
        return Question(lines, self.labels.index(label) if s.kind == "labels" else label)

    def collate(self, items: list[Question]) -> QuestionBatch:
        kind = self.settings.kind
        return batch_of(items, several=kind == "choices", numbers=kind == "numbers")

    def source(self, items: Sequence[Question]) -> ByLength[Question]:
        train = self.config.train
        return ByLength(items, self.collate, train.seed, train.batch_size)

    def val_batches(self, items: Sequence[Question]) -> Iterator[QuestionBatch]:
        return super().val_batches(sorted(items, key=len))

    def step(self, model: nn.Module, batch: QuestionBatch) -> LossSum:
        assert isinstance(model, Head)
        scores, count = scores_of(model, batch).float(), len(batch.labels)
        tokens = int(batch.mask.sum())
        if self.settings.kind == "numbers":
            error = scores[:, 0] - batch.labels
            return LossSum((error**2).sum(), count, {"mae": error.detach().abs().sum()}, tokens)
        right = (scores.argmax(-1) == batch.labels).sum()
        loss_sum = cross_entropy_sum(scores, batch.labels)
        return LossSum(loss_sum, count, {"accuracy": right}, tokens)

    # --- looking -----------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Question], line: LiveLine
    ) -> Outcome:
        assert isinstance(model, Head)
        kind = self.settings.kind
        scores = answer(
            model,
            items,
            several=kind == "choices",
            report=lambda done: line.show(f"Measuring: {done:,} of {len(items):,}"),
        )
        if kind == "numbers":
            figures, examples, sections = outcome_of_numbers(rows, [float(s[0]) for s in scores])
        else:
            probabilities = [score.softmax(-1).tolist() for score in scores]
            named = kind == "labels"
            figures, examples, sections = outcome_of_labels(
                rows,
                probabilities,
                self.labels if named else None,
                positive=self.positive if named else None,
                training=self.trained_on,
            )
        return Outcome(figures, examples, sections)

    @property
    def positive(self) -> int | None:
        """The number of the label that F1 is about, where there are two."""
        if self.settings.positive is not None:
            return self.labels.index(self.settings.positive)
        return 1 if len(self.labels) == 2 else None


# --- rows and heads -------------------------------------------------------------------------------


def balanced(rows: list[Row], seed: int) -> list[Row]:
    """As many rows of each label as the rarest has, drawn by `seed`, in their order."""
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault(row.values["label"], []).append(number)
    least = min(map(len, places.values()), default=0)
    drawn = {
        numbers[at]
        for numbers in places.values()
        for at in drawing_order(len(numbers), seed)[:least]
    }
    return [row for number, row in enumerate(rows) if number in drawn]


def start_at(model: Model, value: float) -> None:
    """Let a fresh regression say the mean of what it is to learn; no bias, no change."""
    assert isinstance(model, ScoringHead)
    if model.out.bias is not None and not model.out.bias.any():
        with torch.no_grad():
            model.out.bias.fill_(value)


def stored_config(name: str) -> dict[str, Any]:
    """config.json of the folder that MODEL names; empty where it has none."""
    try:
        values = json.loads((locate(name) / "config.json").read_text(encoding="utf-8"))
    except (UserError, OSError, ValueError):
        return {}  # what is wrong with it is said when it is loaded
    return values if isinstance(values, dict) else {}


def has_class(name: str, kind: str) -> bool:
    """Whether the family of MODEL has a class with such a head."""
    family = FAMILIES.get(str(stored_config(name).get("model_type")))
    return family is not None and kind in family.classes


def in_stored_order(name: str, labels: tuple[str, ...]) -> tuple[str, ...]:
    """The labels in the order in which a classifier of the same ones has them."""
    table = stored_config(name).get("id2label")
    if not isinstance(table, dict):
        return labels
    stored = tuple(str(table.get(str(number))) for number in range(len(table)))
    return stored if {*stored} == {*labels} and len(stored) == len(labels) else labels
