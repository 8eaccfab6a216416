"""Names in texts: which characters are a person, a place, a product.

Each unit of a text (a token, or a word) is tagged O, B-type or I-type. The head scores the tags of
each unit alone; the chain (`model/crf.py`) decides on all tags of a text at once, by the rules of
BIO and, as a CRF, by what it has learnt of neighbours.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.json_files import read_json_object
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.bio import Span, labels_of, spans_of, tags_of
from llm_from_scratch.data.conll import read_tagged
from llm_from_scratch.data.entities import entity_row
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow, BadRows, Row
from llm_from_scratch.evaluate.ner import figures, marked, score_spans, sections
from llm_from_scratch.evaluate.report import Section
from llm_from_scratch.evaluate.report_parts import counts_section
from llm_from_scratch.evaluate.tagger import (
    UNITS,
    Piece,
    Reader,
    Reading,
    Tagged,
    Tagger,
    batch_of,
    load_chain,
    save_chain,
    unit_scores,
)
from llm_from_scratch.model.crf import Chain
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import TokenClassifier
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.losses import LossSum, cross_entropy_sum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model
from llm_from_scratch.weights.sources import locate

SHOWN = 12  # examples in the report


@dataclass(frozen=True)
class NerSettings:
    """How rows are read, and what is learnt."""

    crf: bool = True
    """Learn which tags follow which (a CRF); else each tag alone, decoded by the rules of BIO."""
    unit: str = "auto"
    """What is tagged: token, word (one token speaks for it) or auto (words where all rows say what
    their words are and have spaces between them)."""
    twice: bool = False
    """Let the model read each text twice and tag it the second time: a decoder, which sees nothing
    but the left, then knows the whole text (arXiv:2402.15449)."""
    overlap: float = 0.25
    """The share of a window that it has in common with the next, where a text takes several."""
    text_field: str = "text"
    """Which field of a row holds the text."""
    entities_field: str = "entities"
    """Which field of a row lists the entities."""

    def __post_init__(self) -> None:
        if self.unit not in ("auto", *UNITS):
            raise UserError(
                f"ner.unit is '{self.unit}'; it must be auto, {' or '.join(UNITS)}."
                + nearest(self.unit, ("auto", *UNITS))
            )
        if not 0 <= self.overlap < 1:
            raise UserError(f"ner.overlap is {self.overlap}; it must be in [0, 1).")


def ner_training() -> TrainSettings:
    """The usual way to train: a head that knows nothing bears larger steps."""
    return tuned(learning_rate=5e-5, epochs=5.0)


@dataclass(frozen=True)
class NerConfig(FinetuneConfig):
    """A complete run of `finetune ner`."""

    method: str = "ner"
    ner: NerSettings = field(default_factory=NerSettings)
    train: TrainSettings = field(default_factory=ner_training)


@dataclass(frozen=True)
class Item:
    """A text with its tags by number, and the windows to learn from."""

    tagged: Tagged
    tags: list[int]
    pieces: list[Piece]

    def __len__(self) -> int:
        return sum(len(piece.ids) for piece in self.tagged.pieces)


class Ner(FinetuneMethod):
    """Cross-entropy of the tags, or the negative log-likelihood of a CRF, per unit."""

    Config = NerConfig
    config: NerConfig
    pipeline = "token-classification"
    shows_before = True
    wants = "types"

    def __init__(self, config: FinetuneConfig) -> None:
        super().__init__(config)
        self.settings = self.config.ner
        self.labels: tuple[str, ...] = ()
        self.trained_on: Counter[str] = Counter()  # entities of each type
        self.unit = self.settings.unit
        self.reader: Reader
        self.reading: Reading

    # --- rows --------------------------------------------------------------------------------

    def read(self, path: str, bad: BadRows) -> Iterator[Row]:
        return read_tagged(path, bad, self.config.data.columns)

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        return entity_row(values, self.settings.text_field, self.settings.entities_field)

    def text_of(self, values: dict[str, Any]) -> str:
        return str(values["text"])

    def learn(self, rows: Sequence[Row]) -> None:
        self.trained_on = Counter(kind for row in rows for _, _, kind in row.values["entities"])
        if rows and not self.trained_on:
            raise UserError(
                f"None of the {len(rows):,} training rows (the first is {rows[0].place}) has an "
                "entity; add rows that have, or name the field with --ner.entities_field."
            )
        self.labels = labels_of(sorted(self.trained_on))
        if self.unit == "auto":
            self.unit = "word" if rows and all(map(_has_words, rows)) else "token"

    def check_against(self, values: dict[str, Any]) -> None:
        for begin, end, kind in values["entities"]:
            if kind not in self.trained_on:
                raise BadRow(
                    f"has the entity '{values['text'][begin:end]}' of the type '{kind}', which no "
                    f"training row has (there are {', '.join(sorted(self.trained_on))}); mend it, "
                    "or add such rows to those that are learnt from."
                )

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        folder = locate(self.config.model)
        known = _labels_in(folder)
        if {*known} == {*self.labels}:  # it goes on with a tagger: the same tags in the same order
            self.labels = known
        model = self.open_with("token_classification", self.labels)
        assert isinstance(model, TokenClassifier)
        causal = isinstance(model.backbone, Decoder)
        if self.settings.twice and not causal:
            raise UserError(
                "ner.twice is for decoders, which see nothing but the left; this model sees the "
                "whole text at once. Leave it out."
            )
        limit = min(model.stack.max_seq_len, self.config.data.max_length or 512)
        self.reading = Reading(self.unit, self.settings.twice, limit, self.settings.overlap)
        self.reader = Reader(self.tokenizer, self.reading, causal=causal)
        chain = Chain(self.labels, learnt=self.settings.crf)
        if self.settings.crf and known == self.labels:
            earlier, _ = load_chain(folder, known, limit)
            chain = earlier if earlier.learnt else chain
        model.chain = chain.to(model.out.weight.device)
        return model

    def save_beside(self, model: nn.Module, folder: Path) -> None:
        save_chain(folder, chain_of(model), self.reading)

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> Item:
        try:
            (tagged,) = self.reader.read([values["text"]], [values.get("words")])
        except UserError as error:
            raise BadRow(f"cannot be read by this model: {error}") from error
        if not tagged.units:
            raise BadRow("has no character that this model's tokenizer knows; take it out.")
        spans = [(a, b, kind) for a, b, kind in values["entities"]]
        number = {label: n for n, label in enumerate(self.labels)}
        tags = [number[tag] for tag in tags_of(tagged.units, spans)]
        pieces = [self._to_learn(piece, tags) for piece in tagged.pieces]
        return Item(tagged, tags, [piece for piece in pieces if piece.takes])

    def _to_learn(self, piece: Piece, tags: list[int]) -> Piece:
        """The piece without the rest of a name that begins in the window before it."""
        cut = 0
        if piece.first > 0:
            inner = (self.labels[tag].startswith("I-") for tag in tags[piece.first :])
            while cut < len(piece.takes) and next(inner):
                cut += 1
        return dataclasses.replace(piece, takes=piece.takes[cut:], first=piece.first + cut)

    def source(self, items: Sequence[Item]) -> ByLength[Item]:
        train = self.config.train
        return ByLength(items, self.collate, train.seed, train.batch_size)

    def collate(self, items: list[Item]) -> dict[str, Tensor]:
        rows = [(item, piece) for item in items for piece in item.pieces]
        batch = batch_of([piece for _, piece in rows], self.tokenizer.pad_id or 0)
        tags = torch.full(batch["takes"].shape, IGNORED)
        for number, (item, piece) in enumerate(rows):
            wanted = item.tags[piece.first : piece.first + len(piece.takes)]
            tags[number, : len(wanted)] = torch.tensor(wanted)
        return {**batch, "tags": tags}

    def step(self, model: nn.Module, batch: dict[str, Tensor]) -> LossSum:
        assert isinstance(model, TokenClassifier)
        scores, tags, decides = unit_scores(model, batch), batch["tags"], batch["decides"]
        chain = chain_of(model)
        if chain.learnt:
            loss_sum = chain.loss_sum(scores, tags, decides)
        else:
            loss_sum = cross_entropy_sum(scores, tags)
        right = ((scores.argmax(-1) == tags) & decides).sum()
        tokens = int(batch["mask"].sum())
        return LossSum(loss_sum, decides.sum(), {"tag_accuracy": right.detach()}, tokens)

    # --- looking -----------------------------------------------------------------------------

    def tagger(self, model: nn.Module) -> Tagger:
        """What finds names with the model as it is."""
        assert isinstance(model, TokenClassifier)
        return Tagger(model, chain_of(model), self.tokenizer, self.reading)

    def val_figures(self, model: nn.Module, items: Sequence[Item]) -> dict[str, float]:
        decided = self.tagger(model).decide([item.tagged for item in items])
        wanted = [self._reachable(item) for item in items]
        return {"val_f1": score_spans(wanted, [one.spans for one in decided]).f1}

    def _reachable(self, item: Item) -> list[Span]:
        return spans_of(item.tagged.units, [self.labels[tag] for tag in item.tags])

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        def progress(done: int) -> None:
            line.show(f"Finding names: text {done:,} of {len(rows):,}")

        decided = self.tagger(model).decide([item.tagged for item in items], progress)
        wanted = [[(a, b, kind) for a, b, kind in row.values["entities"]] for row in rows]
        found = [one.spans for one in decided]
        # What units cannot express (a border inside of a token) nobody could have found.
        ceiling = score_spans(wanted, [self._reachable(item) for item in items])
        texts = [str(row.values["text"]) for row in rows]
        places = [row.place for row in rows]
        confidences = [one.confidences for one in decided]
        interesting = sorted(range(len(rows)), key=lambda n: (not wanted[n], n))[:SHOWN]
        examples = [
            {
                "place": places[n],
                "given": texts[n],
                "wanted": marked(texts[n], wanted[n]),
                "got": marked(texts[n], found[n]),
            }
            for n in sorted(interesting)
        ]
        return Outcome(
            {**figures(wanted, found), "reachable_f1": ceiling.f1},
            examples,
            [self._counts(rows), *sections(places, texts, wanted, found, confidences)],
        )

    def _counts(self, rows: Sequence[Row]) -> Section:
        here = Counter(kind for row in rows for _, _, kind in row.values["entities"])
        counts = {"train": self.trained_on, "evaluated here": here}
        return counts_section(counts, "Entities in the data")


def chain_of(model: nn.Module) -> Chain:
    """The chain that `Ner.open` put beside the head."""
    chain = model.chain
    assert isinstance(chain, Chain)
    return chain


def _has_words(row: Row) -> bool:
    """Whether the row says what its words are, and they have spaces between them."""
    words: list[list[int]] = row.values.get("words") or []
    return bool(words) and all(a[1] < b[0] for a, b in pairwise(words))


def _labels_in(folder: Path) -> tuple[str, ...]:
    """The labels of the token classifier in a folder; none for another model."""
    if not (folder / "config.json").is_file():
        return ()
    values = read_json_object(folder / "config.json")
    kind, names = str(values.get("architectures")), values.get("id2label")
    if "ForTokenClassification" not in kind or not isinstance(names, dict):
        return ()
    return tuple(str(names.get(str(number))) for number in range(len(names)))
