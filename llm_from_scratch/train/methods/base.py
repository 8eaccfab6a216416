"""What all methods of fine-tuning share: their settings, and the questions that each answers.

A method is a class. `train/finetune.py` asks it, in this order:

    read -> check -> text_of          rows of files become rows of one shape, known by their text
    group_of                          which rows must not be divided
    learn                             what the training rows say: labels, say
    open                              the model, with the head that the method needs
    encode -> collate -> step         a row becomes an item, items a batch, a batch a loss
    evaluate                          figures, examples and the sections of the report

Everything else (splits, near-duplicates, adapters, frozen layers, checkpoints, the best model,
reports) is the same for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.records import BadRows, Row, read_rows
from llm_from_scratch.evaluate.report import Section
from llm_from_scratch.model.lora import LoraSettings
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.examples import Examples
from llm_from_scratch.train.loop import Source
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.sources import load

LONGEST = 1024  # tokens of a row by default, where the model takes more


@dataclass(frozen=True)
class RecordSettings:
    """Which rows, and how they are divided."""

    paths: tuple[str, ...] = ()
    """Files with the rows to learn from."""
    val: tuple[str, ...] = ()
    """Files with the rows that the best model is chosen on; default a share of the first."""
    test: tuple[str, ...] = ()
    """Files with the rows that the result is measured on; default a share of the first."""
    val_fraction: float = 0.1
    """Share of the rows that the best model is chosen on, without data.val."""
    test_fraction: float = 0.1
    """Share of the rows that the result is measured on, without data.test."""
    avoid: tuple[str, ...] = ()
    """Files with texts that must not be learnt from, such as the tests of other tasks."""
    drop_duplicates: bool = True
    """Leave out duplicates and near-duplicates before the split, so that what is tested is new."""
    similarity: float = 0.8
    """The share of a text's word sequences in another one that makes it a near-duplicate."""
    max_length: int | None = None
    """The longest row in tokens; default what the model takes, at most 1,024."""
    columns: tuple[str, ...] = ()
    """The columns' names, for a table without a header."""
    on_bad: str = "skip"
    """What to do with a row that cannot be used: skip (and name it) or stop."""

    def __post_init__(self) -> None:
        for name in ("val_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be in [0, 1).")
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                "data.val_fraction and data.test_fraction leave nothing to learn from; they must "
                "be below 1 together."
            )
        if self.on_bad not in ("skip", "stop"):
            raise UserError(f"data.on_bad is '{self.on_bad}'; it must be skip or stop.")
        if not 0 < self.similarity <= 1:
            raise UserError(f"data.similarity is {self.similarity}; it must be in (0, 1].")
        if self.max_length is not None and self.max_length < 2:
            raise UserError(f"data.max_length is {self.max_length}; it must be at least 2.")


@dataclass(frozen=True)
class FreezeSettings:
    """What stays as it is when the weights themselves are trained."""

    blocks: int = 0
    """So many blocks, counted from the input; negative: all but so many of the last."""
    embeddings: bool = False
    """Whether the embeddings stay (and an output matrix that is tied to them)."""


def tuned(**changes: Any) -> TrainSettings:
    """`train` settings for a model that has learnt already, with a method's own changes."""
    usual = {
        "epochs": 3.0, "batch_size": 16, "learning_rate": 2e-5, "optimizer": "adamw",
        "schedule": "cosine", "weight_decay": 0.01, "beta2": 0.999, "eval_every": 100,
        "checkpoint_every": 200,
    }  # fmt: skip
    return TrainSettings(**{**usual, **changes})


@dataclass(frozen=True)
class FinetuneConfig:
    """A complete fine-tuning run: what stands in config.yaml. Methods add a part of their own."""

    method: str = ""
    """The method's name."""
    model: str = ""
    """What to start from: any MODEL."""
    out: str = ""
    """The run folder."""
    data: RecordSettings = field(default_factory=RecordSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    train: TrainSettings = field(default_factory=tuned)


@dataclass
class Outcome:
    """What a model did on some rows.

    figures: names and numbers for summary.json, without a part's prefix (`accuracy`).
    examples: what was given, wanted and got, for people to read: {"place", "given", "wanted",
        "got"}; the same rows before and after training are shown side by side.
    sections: the method's own parts of the report.
    """

    figures: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


class FinetuneMethod:
    """One kind of fine-tuning; see the head of this file for who is asked when."""

    Config: ClassVar[type[FinetuneConfig]] = FinetuneConfig
    pipeline: ClassVar[str] = "text-generation"  # what the model card calls the result
    shows_before: ClassVar[bool] = False  # whether the untrained model is evaluated as well
    wants: ClassVar[str] = "labels"  # what `check_against` looks for, in the plural

    def __init__(self, config: FinetuneConfig) -> None:
        self.config = config
        self.tokenizer: Tokenizer

    # --- rows --------------------------------------------------------------------------------

    def read(self, path: str, bad: BadRows) -> Iterator[Row]:
        """The rows of a file, as they stand there."""
        return read_rows(path, bad, self.config.data.columns)

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row in the method's one shape, of JSON's types; `BadRow` if it cannot be used."""
        raise NotImplementedError

    def text_of(self, values: dict[str, Any]) -> str:
        """The text by which near-duplicates of a checked row are found."""
        raise NotImplementedError

    def group_of(self, values: dict[str, Any]) -> str:
        """The text that rows of one group share: a group lands in one part, whole."""
        return self.text_of(values)

    def label_of(self, values: dict[str, Any]) -> Any:
        """What a checked row wants, by which rows of the same text may contradict each other."""
        return values.get("label")

    def select(self, rows: list[Row]) -> list[Row]:
        """The rows of data.paths that are used at all, before they are divided: a balance, say."""
        return rows

    def learn(self, rows: Sequence[Row]) -> None:
        """Look at the checked training rows (labels, say) before the model is opened."""

    def check_against(self, values: dict[str, Any]) -> None:
        """`BadRow` for a checked row that does not fit what `learn` found: a label never seen."""

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        """The model to start from, with the head that the method needs; sets `self.tokenizer`."""
        return self.open_with()

    def open_with(self, head: str | None = None, labels: Sequence[str] | None = None) -> Model:
        """`load`, in full precision, computing in train.precision."""
        train = self.config.train
        model, self.tokenizer = load(
            self.config.model, dtype=torch.float32, device=train.device, head=head, labels=labels
        )
        model.compute_dtype = torch.bfloat16 if train.precision == "bf16" else None
        return model

    def prepare(
        self, model: nn.Module, items: dict[str, list[Any]], folder: Path, line: LiveLine
    ) -> None:
        """Before the first step and when resuming, with items of "train", "val" and "test".

        The place for what is computed once with the model as it was; a resumed run must find it in
        the folder, under `preparation`.
        """

    def save_beside(self, model: nn.Module, folder: Path) -> None:
        """Write into a saved model's (or adapter's) folder what its class cannot hold."""

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> Any:
        """A checked row as an item to learn from; `BadRow` for one longer than the context."""
        raise NotImplementedError

    def collate(self, items: list[Any]) -> Any:
        """Items as one batch of tensors."""
        raise NotImplementedError

    def step(self, model: nn.Module, batch: Any) -> LossSum:
        """The loss of a batch, as sum and count."""
        raise NotImplementedError

    def source(self, items: Sequence[Any]) -> Source:
        """The training items by number."""
        return Examples(items, self.collate, self.config.train.seed)

    def sequences(self, items: Sequence[Any]) -> int:
        """How many sequences an epoch has: more than items where one of these gives several."""
        return len(items)

    def val_batches(self, items: Sequence[Any]) -> Iterator[Any]:
        """The validation items in batches, always the same."""
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        for start in range(0, len(items), size):
            yield self.collate(list(items[start : start + size]))

    # --- looking -----------------------------------------------------------------------------

    def val_figures(self, model: nn.Module, items: Sequence[Any]) -> dict[str, float]:
        """What is logged of the validation items besides the step's metrics, as `val_...`.

        A `val_loss` among them takes the place of the loss by which the best model is chosen.
        """
        return {}

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        """What the model does on rows that it has not learnt; `items` are the same, encoded."""
        return Outcome()

    def longest(self, model: Model) -> int:
        """The longest row in tokens."""
        config: Any = model.config
        limit = getattr(config, "max_seq_len", None) or config.encoder.max_seq_len
        return min(int(limit), self.config.data.max_length or LONGEST)
