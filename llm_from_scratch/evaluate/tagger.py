"""Finding names in texts: how a text becomes what a token classifier reads, and its scores names.

    text -> tokens with places -> units -> windows -> scores of the units -> best chain -> entities

A text that is longer than the model's context is read in overlapping windows; each unit takes its
scores from the window that it lies deepest in, and the chain runs over the whole text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.files import explain_os_error
from llm_from_scratch.data.bio import (
    OUTSIDE,
    Span,
    Unit,
    spans_of,
    token_units,
    windows,
    word_units,
    words_of,
)
from llm_from_scratch.model.crf import Chain
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.heads import TokenClassifier
from llm_from_scratch.text.inputs import with_special
from llm_from_scratch.text.places import encode_with_places
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.sources import load, locate

FILE = "ner.safetensors"  # in a model folder: the chain's scores, and how texts are read
UNITS = ("token", "word")
TOKENS_AT_ONCE = 2048  # padding included, when texts are searched; more is slower on a CPU
TEXTS_AT_ONCE = 64
Words = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Reading:
    """How texts become what the model reads."""

    unit: str = "token"
    """What is tagged: tokens or words."""
    twice: bool = False
    """Whether the model reads each text twice, and its tokens are tagged the second time."""
    max_length: int = 512
    """The longest window in tokens, special tokens included."""
    overlap: float = 0.25
    """The share of a window that it has in common with the next."""


@dataclass(frozen=True)
class Piece:
    """One window: what the model reads, and at which places the units that it decides speak."""

    ids: list[int]
    takes: list[int]
    first: int
    """The number of the first of these units in the text."""


@dataclass(frozen=True)
class Tagged:
    """A text as units and windows."""

    units: list[Unit]
    pieces: list[Piece]


@dataclass(frozen=True)
class Entity:
    """A name in a text: text[start:end], its type, and how sure the model is of it."""

    start: int
    end: int
    type: str
    text: str
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """As the fields of a JSON object."""
        return dict(vars(self))


@dataclass(frozen=True)
class Decision:
    """What was decided on a text: the tag of each unit, the spans, and each one's confidence."""

    tags: list[str]
    spans: list[Span]
    confidences: list[float]


class Reader:
    """Turns texts into units and windows by one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, reading: Reading, *, causal: bool) -> None:
        self.tokenizer, self.reading, self.causal = tokenizer, reading, causal
        around = with_special(tokenizer, [-1])
        split = around.index(-1)
        self.before, self.behind = around[:split], around[split + 1 :]
        self.between = tokenizer.encode("\n") if reading.twice and tokenizer.kind != "char" else []
        room = reading.max_length - len(around) + 1
        self.room = (room - len(self.between)) // 2 if reading.twice else room
        if self.room < 2:
            raise UserError(
                f"{reading.max_length} tokens at once leave no room for text beside special "
                "tokens; give more (data.max_length)."
            )

    def read(self, texts: Sequence[str], words: Sequence[Words | None]) -> list[Tagged]:
        """Each text as units and windows; `words` has the places of its words where known."""
        found = encode_with_places(self.tokenizer, texts)
        return [
            self._tagged(text, row, known)
            for text, row, known in zip(texts, found, words, strict=True)
        ]

    def _tagged(self, text: str, row: list[tuple[int, int, int]], words: Words | None) -> Tagged:
        if not row:
            return Tagged([], [])
        if self.reading.unit == "token":
            units = token_units(row)
        else:
            # A decoder has seen a word only at its last token.
            last = self.causal and not self.reading.twice
            units = word_units(row, words_of(text) if words is None else words, last=last)
        pieces = []
        at = 0
        for window in windows(len(row), self.room, self.reading.overlap):
            first = at
            while at < len(units) and units[at].token < window.last:
                at += 1
            inside = units[first:at]
            ids = [token for token, _, _ in row[window.start : window.stop]]
            shift = len(self.before) - window.start
            if self.reading.twice:
                shift += len(ids) + len(self.between)
                ids = [*ids, *self.between, *ids]
            takes = [unit.token + shift for unit in inside]
            if takes:
                pieces.append(Piece([*self.before, *ids, *self.behind], takes, first))
        return Tagged(units, pieces)


def batch_of(pieces: Sequence[Piece], pad_id: int) -> dict[str, Tensor]:
    """Windows as tensors: ids (w, t), mask (w, t), takes (w, u), decides (w, u)."""
    longest = max(len(piece.ids) for piece in pieces)
    most = max(len(piece.takes) for piece in pieces)

    def filled(values: list[int], length: int, by: int) -> list[int]:
        return [*values, *[by] * (length - len(values))]

    return {
        "ids": torch.tensor([filled(p.ids, longest, pad_id) for p in pieces]),
        "mask": torch.tensor([filled([1] * len(p.ids), longest, 0) for p in pieces]),
        "takes": torch.tensor([filled(p.takes, most, 0) for p in pieces]),
        "decides": torch.tensor([filled([1] * len(p.takes), most, 0) for p in pieces]).bool(),
    }


def unit_scores(model: TokenClassifier, batch: dict[str, Tensor]) -> Tensor:
    """The scores of each window's units: (w, u, n)."""
    mask = batch["mask"]
    hidden_wtm = model.states(batch["ids"], None if bool(mask.all()) else mask, None)
    takes_wum = batch["takes"][..., None].expand(-1, -1, hidden_wtm.shape[-1])
    return model.score(hidden_wtm.gather(1, takes_wum))  # no score for what speaks for no unit


class Tagger:
    """A token classifier with its chain, its tokenizer and its way of reading."""

    def __init__(
        self, model: TokenClassifier, chain: Chain, tokenizer: Tokenizer, reading: Reading
    ) -> None:
        self.model, self.chain, self.tokenizer = model, chain, tokenizer
        self.labels = model.head_config.labels
        self.reader = Reader(tokenizer, reading, causal=isinstance(model.backbone, Decoder))
        self.pad_id = tokenizer.pad_id or 0

    def find(
        self, texts: Sequence[str], words: Sequence[Words | None] | None = None
    ) -> list[list[Entity]]:
        """The names in each text, in the order of the text.

        `words` has the places of each text's words for a model that tags words; without it they are
        found by white space and punctuation.
        """
        if isinstance(texts, str):
            raise UserError("find takes a list of texts: put a single text in a list.")
        known = [None] * len(texts) if words is None else words
        decisions = self.decide(self.reader.read(texts, known))
        return [
            [
                Entity(start, end, kind, text[start:end], confidence)
                for (start, end, kind), confidence in zip(
                    one.spans, one.confidences, strict=True
                )
            ]
            for text, one in zip(texts, decisions, strict=True)
        ]  # fmt: skip

    @torch.no_grad()
    def decide(
        self, items: Sequence[Tagged], progress: Callable[[int], None] | None = None
    ) -> list[Decision]:
        """The best chain of tags of each text. `progress` is told how many texts are done."""
        # Texts of about one length together: less padding.
        order = sorted(range(len(items)), key=lambda i: len(items[i].units))
        found: dict[int, Decision] = {}
        training = self.model.training
        self.model.eval()
        for start in range(0, len(order), TEXTS_AT_ONCE):
            numbers = order[start : start + TEXTS_AT_ONCE]
            decided = self._decide([items[number] for number in numbers])
            found.update(zip(numbers, decided, strict=True))
            if progress is not None:
                progress(len(found))
        self.model.train(training)
        return [found[number] for number in range(len(items))]

    def _decide(self, items: Sequence[Tagged]) -> list[Decision]:
        most = max((len(item.units) for item in items), default=0)
        if not most:
            return [Decision([], [], []) for _ in items]
        device = self.model.out.weight.device
        scores_bun = torch.zeros(len(items), most, len(self.labels), device=device)
        owners = [(b, piece) for b, item in enumerate(items) for piece in item.pieces]
        for part in _by_size(owners):
            batch = batch_of([piece for _, piece in part], self.pad_id)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            found_wun = unit_scores(self.model, batch).float()
            for (b, piece), found_un in zip(part, found_wun, strict=True):
                count = len(piece.takes)
                scores_bun[b, piece.first : piece.first + count] = found_un[:count]
        lengths = torch.tensor([len(item.units) for item in items], device=device)
        mask_bu = torch.arange(most, device=device) < lengths[:, None]
        paths = self.chain.best(scores_bun, mask_bu)
        sure = self.chain.marginals(scores_bun, mask_bu).cpu()
        return [self._decision(item, paths[b], sure[b]) for b, item in enumerate(items)]

    def _decision(self, item: Tagged, path: list[int], sure_un: Tensor) -> Decision:
        tags = [self.labels[tag] for tag in path]
        spans = spans_of(item.units, tags)
        sure = sure_un[torch.arange(len(path)), torch.tensor(path, dtype=torch.long)].tolist()
        number_of = {unit.begin: number for number, unit in enumerate(item.units)}
        least = []  # a span is as sure as its weakest unit
        for begin, end, _ in spans:
            number = stop = number_of[begin]
            while stop < len(sure) and item.units[stop].end <= end:
                stop += 1
            least.append(min(sure[number:stop]))
        return Decision(tags, spans, least)


def _by_size(owners: list[tuple[int, Piece]]) -> Iterable[list[tuple[int, Piece]]]:
    """Windows in groups of a bounded number of tokens, the short ones first."""
    group: list[tuple[int, Piece]] = []
    for owner in sorted(owners, key=lambda pair: len(pair[1].ids)):
        if group and len(owner[1].ids) * (len(group) + 1) > TOKENS_AT_ONCE:
            yield group
            group = []
        group.append(owner)
    if group:
        yield group


# --- folders -------------------------------------------------------------------------------------


def check_labels(labels: Sequence[str], where: str) -> None:
    """Raise `UserError` for labels that are no tags of BIO."""
    strange = [name for name in labels if name != OUTSIDE and name[:2] not in ("B-", "I-")]
    if strange or OUTSIDE not in labels:
        raise UserError(
            f"{where} labels tokens with {(strange or labels)[0]!r}, which is no tag such as O, "
            "B-PER or I-PER; take a model that was trained to find names (scratchlm finetune ner)."
        )


def save_chain(folder: Path, chain: Chain, reading: Reading) -> None:
    """ner.safetensors beside a saved model: the chain's scores, and how texts are read."""
    tensors = {}
    if chain.learnt:
        names = ("start", "table", "end")
        tensors = {n: x.detach().cpu() for n, x in zip(names, chain.scores(), strict=True)}
    about = {name: str(value) for name, value in vars(reading).items()}
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / FILE, about)


def load_chain(folder: Path, labels: Sequence[str], longest: int) -> tuple[Chain, Reading]:
    """What `save_chain` wrote; a folder without it is read by tokens and decoded by the rules."""
    path = folder / FILE
    if not path.is_file():
        return Chain(labels, learnt=False), Reading(max_length=min(longest, 512))
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        reading = Reading(
            unit=about["unit"],
            twice=about["twice"] == "True",
            max_length=min(longest, int(about["max_length"])),
            overlap=float(about["overlap"]),
        )
        n = len(labels)
        shapes = {name: tuple(x.shape) for name, x in found.items()}
        fits = shapes in ({}, {"start": (n,), "table": (n, n), "end": (n,)})
        if not fits or reading.unit not in UNITS or not 0 <= reading.overlap < 1:
            raise ValueError("it does not fit the model")
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); copy the model anew.") from error
    except OSError as error:
        raise explain_os_error(error, path) from error
    chain = Chain(labels, learnt=bool(found))
    if found:
        chain.set_scores(found["start"], found["table"], found["end"])
    return chain, reading


def load_tagger(model: str | Path, *, device: str = "auto") -> Tagger:
    """The tagger that MODEL names: one of `finetune ner`, or any token classifier with BIO labels.

    Raises `UserError` for a model of another kind.
    """
    found, tokenizer = load(model, device=device)
    return as_tagger(found, tokenizer, locate(model))


def as_tagger(model: Any, tokenizer: Tokenizer, folder: Path) -> Tagger:
    """A loaded model, of the folder `folder`, as a tagger; `UserError` if it is none."""
    if not isinstance(model, TokenClassifier):
        raise UserError(
            f"{folder} is no model that labels tokens; train one with scratchlm finetune ner."
        )
    labels = model.head_config.labels
    check_labels(labels, str(folder))
    chain, reading = load_chain(folder, labels, model.stack.max_seq_len)
    return Tagger(model, chain.to(model.out.weight.device), tokenizer, reading)
