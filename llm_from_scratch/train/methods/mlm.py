"""Masked language modelling: an encoder goes on learning, from texts without any label.

An encoder that has read the texts of a field (law, medicine, chat) is a better beginning for a
classifier of that field (Gururangan et al. 2020, arXiv:2004.10964).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.read import ReadReport, read_documents
from llm_from_scratch.data.records import BadRow, BadRows, Row
from llm_from_scratch.evaluate.report_parts import (
    Mistake,
    calibration_error,
    calibration_section,
    errors_section,
    reliability,
)
from llm_from_scratch.model.heads import MaskedLM
from llm_from_scratch.text.inputs import with_special
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.losses import LossSum, cross_entropy_sum
from llm_from_scratch.train.masking import Masking, masking_for
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model

PASSAGE = 4000  # characters; longer documents are cut at the ends of lines
EXAMPLES = 6
AROUND = 12  # tokens on each side of a word in the table of errors
VALIDATION = 1 << 40  # what is hidden in validation text is numbered apart


@dataclass(frozen=True)
class MlmSettings:
    """What is hidden."""

    text_field: str = "text"
    """Which field of .jsonl, .csv, .tsv and .parquet rows holds the text."""
    share: float = 0.15
    """Share of the tokens that must be guessed."""
    whole_words: bool = False
    """Hide all tokens of a word or none."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UserError(f"mlm.share is {self.share}; it must be above 0 and below 1.")


def mlm_training() -> TrainSettings:
    """The usual way to train: as at first, more gently."""
    return tuned(learning_rate=1e-4, batch_size=32)


@dataclass(frozen=True)
class MlmConfig(FinetuneConfig):
    """A complete run of `finetune mlm`."""

    method: str = "mlm"
    mlm: MlmSettings = field(default_factory=MlmSettings)
    train: TrainSettings = field(default_factory=mlm_training)


@dataclass
class MaskedBatch:
    """Rows (b, t): what is seen, 1 where that is text, and what is asked for (-100: nothing)."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor


Ids = list[int]
Numbered = tuple[Ids, int]


class MaskedTexts(ByLength[Ids]):
    """Texts by number, each with other words hidden every time it comes."""

    def __init__(
        self,
        items: Sequence[Ids],
        hide: Callable[[list[Numbered]], MaskedBatch],
        seed: int,
        batch_size: int,
    ) -> None:
        super().__init__(items, list, seed, batch_size)
        self.hide = hide

    def batch(self, start: int, count: int) -> MaskedBatch:
        """Texts number `start` to `start + count - 1` of the endless order."""
        return self.hide([(self.item(number), number) for number in range(start, start + count)])


class Mlm(FinetuneMethod):
    """Cross-entropy of the tokens that are hidden, in nats."""

    Config = MlmConfig
    config: MlmConfig
    pipeline = "fill-mask"
    shows_before = True

    # --- rows --------------------------------------------------------------------------------

    def read(self, path: str, bad: BadRows) -> Iterator[Row]:
        """Documents; long ones in passages, so that they can be divided."""
        report, data = ReadReport(), self.config.data
        documents = read_documents(
            [path], on_bad=data.on_bad, report=report, text_field=self.config.mlm.text_field,
            columns=data.columns,
        )  # fmt: skip
        for document in documents:
            parts = passages(document.text)
            for number, part in enumerate(parts, start=1):
                place = document.source if len(parts) == 1 else f"{document.source}#{number}"
                yield Row({"text": part}, place)
        for sentence in report.bad:
            bad(sentence)

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        if not values["text"].strip():
            raise BadRow("is empty; leave it out.")
        return {"text": values["text"]}

    def text_of(self, values: dict[str, Any]) -> str:
        return str(values["text"])

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        model = self.open_with("masked_lm")
        self.masking: Masking = masking_for(
            self.tokenizer, self.config.mlm.share, self.config.mlm.whole_words
        )
        self.limit = self.longest(model)
        return model

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> list[Ids]:
        """The windows of a text, each with the special tokens that belong around it."""
        ids = self.tokenizer.encode(values["text"])
        if not ids:
            raise BadRow("has no token that the model knows.")
        around = with_special(self.tokenizer, [-1])
        place = around.index(-1)
        room = self.limit - len(around) + 1
        if room < 1:
            raise UserError(
                f"data.max_length is {self.limit}, which leaves no room for text beside "
                f"{len(around) - 1} special tokens; give more."
            )
        # Windows of equal length: no last one of a few tokens.
        count = math.ceil(len(ids) / room)
        cuts = [number * len(ids) // count for number in range(count + 1)]
        return [
            [*around[:place], *ids[a:b], *around[place + 1 :]] for a, b in itertools.pairwise(cuts)
        ]

    def collate(self, items: list[Numbered]) -> MaskedBatch:
        rows = [self.masking.hide(ids, self.config.train.seed, number) for ids, number in items]
        longest = max(len(seen) for seen, _ in rows)

        def filled(values: list[list[int]], by: int) -> Tensor:
            return torch.tensor([[*row, *[by] * (longest - len(row))] for row in values])

        return MaskedBatch(
            filled([seen for seen, _ in rows], 0),
            filled([[1] * len(seen) for seen, _ in rows], 0),
            filled([targets for _, targets in rows], IGNORED),
        )

    def source(self, items: Sequence[list[Ids]]) -> MaskedTexts:
        train = self.config.train
        return MaskedTexts([*itertools.chain(*items)], self.collate, train.seed, train.batch_size)

    def sequences(self, items: Sequence[list[Ids]]) -> int:
        return sum(map(len, items))

    def val_batches(self, items: Sequence[list[Ids]]) -> Iterator[MaskedBatch]:
        """Always the same words are hidden; at most train.eval_tokens are read."""
        left = self.config.train.eval_tokens
        chosen: list[Numbered] = []
        for number, ids in enumerate(itertools.chain(*items)):
            left -= len(ids)
            if left < 0 and chosen:
                break
            chosen.append((ids, VALIDATION + number))
        return super().val_batches(sorted(chosen, key=lambda pair: len(pair[0])))

    def step(self, model: nn.Module, batch: MaskedBatch) -> LossSum:
        assert isinstance(model, MaskedLM)
        asked = batch.targets != IGNORED
        hidden_btm = model.states(batch.tokens, batch.mask, None)
        scores = model.answer(hidden_btm[asked], None)  # the vocabulary is wide: only where asked
        targets = batch.targets[asked]
        right = (scores.argmax(-1) == targets).sum()
        loss_sum = cross_entropy_sum(scores, targets)
        return LossSum(loss_sum, len(targets), {"accuracy": right}, int(batch.mask.sum()))

    # --- looking -----------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[list[Ids]], line: LiveLine
    ) -> Outcome:
        assert isinstance(model, MaskedLM)
        places = [row.place for row, windows in zip(rows, items, strict=True) for _ in windows]
        texts = [*itertools.chain(*items)]
        device = next(model.parameters()).device
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        nats, sure, right = 0.0, list[float](), list[bool]()
        examples: list[dict[str, str]] = []
        mistakes: list[Mistake] = []
        for start in range(0, len(texts), size):
            line.show(f"Measuring: {start:,} of {len(texts):,}")
            here = range(start, min(start + size, len(texts)))
            batch = self.collate([(texts[n], VALIDATION + n) for n in here])
            asked = batch.targets != IGNORED
            if not asked.any():
                continue
            hidden = model.states(batch.tokens.to(device), batch.mask.to(device), None)
            logprobs = model.answer(hidden[asked.to(device)], None).float().log_softmax(-1).cpu()
            targets = batch.targets[asked]
            nats -= float(logprobs.gather(1, targets[:, None]).double().sum())
            best, said = logprobs.max(-1)
            sure += best.exp().tolist()
            right += (said == targets).tolist()
            whole = torch.full_like(batch.targets, IGNORED)
            whole[asked] = said
            for number, row in zip(here, range(len(here)), strict=True):
                found = self._shown(places[number], batch, whole, row)
                if len(examples) < EXAMPLES and found is not None:
                    examples.append(found)
            confidences = torch.zeros(batch.targets.shape)
            confidences[asked] = best.exp()
            mistakes += self._mistakes(places[start:], batch, whole, confidences)
        if not right:
            return Outcome()
        figures = {
            "accuracy": sum(right) / len(right),
            "perplexity": math.exp(min(700.0, nats / len(right))),
            "ece": calibration_error(reliability(sure, right)),
            "guesses": float(len(right)),
        }
        return Outcome(
            figures, examples, [calibration_section(sure, right), errors_section(mistakes)]
        )

    def _shown(
        self, place: str, batch: MaskedBatch, said: Tensor, row: int
    ) -> dict[str, str] | None:
        """A text with gaps, what stood in them, and what the model put there."""
        asked = batch.targets[row] != IGNORED
        if not asked.any():
            return None
        gaps = batch.tokens[row].masked_fill(asked, self.masking.mask_id)
        return {
            "place": place,
            "given": self.tokenizer.decode(gaps[batch.mask[row].bool()].tolist()),
            "wanted": " | ".join(map(self.word, batch.targets[row][asked].tolist())),
            "got": " | ".join(map(self.word, said[row][asked].tolist())),
        }

    def _mistakes(
        self, places: Sequence[str], batch: MaskedBatch, said: Tensor, confidences: Tensor
    ) -> list[Mistake]:
        wrong = (batch.targets != IGNORED) & (said != batch.targets)
        found = []
        for row, at in wrong.nonzero().tolist():
            gaps = batch.tokens[row][batch.mask[row].bool()]
            gaps[at] = self.masking.mask_id
            around = gaps[max(0, at - AROUND) : at + AROUND]
            found.append(
                Mistake(
                    places[row], self.tokenizer.decode(around.tolist()),
                    self.word(int(batch.targets[row, at])), self.word(int(said[row, at])),
                    float(confidences[row, at]),
                )
            )  # fmt: skip
        return found

    def word(self, number: int) -> str:
        """A token for people to read."""
        return self.tokenizer.token_text(number).strip() or repr(self.tokenizer.token_text(number))


def passages(text: str, longest: int = PASSAGE) -> list[str]:
    """A text cut at ends of lines into parts of at most so many characters.

    A line that is longer itself stays whole.
    """
    if len(text) <= longest:
        return [text]
    found: list[str] = []
    part: list[str] = []
    size = 0
    for line in text.split("\n"):
        if part and size + len(line) > longest:
            found.append("\n".join(part))
            part, size = [], 0
        part.append(line)
        size += len(line) + 1
    found.append("\n".join(part))
    return [part for part in found if part.strip()]
