"""Writing one text for another: summaries, headlines, translations.

An encoder-decoder reads the source and writes the target (Sutskever et al., arXiv:1409.3215). A
decoder reads both as one text, as GPT-2 did with "TL;DR:" (Radford et al. 2019), and learns the
target's tokens alone.

Axes: b batch, t time.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.text_metrics import METRICS, check_names, check_packages, language_of
from llm_from_scratch.evaluate.written_texts import (
    Written,
    evenly,
    sureness,
    write_all,
    written_examples,
    written_figures,
    written_sections,
)
from llm_from_scratch.generate.generate import encode_prompt, encode_source
from llm_from_scratch.generate.requests import Writer, as_writer
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.logprobs import token_logprobs
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.seq2seq import Seq2Seq as EncoderDecoderStep
from llm_from_scratch.train.seq2seq import Seq2SeqBatch, pad_pairs
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model

# Names under which pairs are found, the first that a row has.
PAIRS = (
    ("source", "target"), ("document", "summary"), ("article", "highlights"),
    ("article", "summary"), ("text", "summary"), ("article", "headline"), ("text", "headline"),
    ("text", "title"), ("body", "title"), ("input", "output"), ("prompt", "response"),
)  # fmt: skip
FOR_DECODERS = "{source}\n\nTL;DR: {target}"


@dataclass(frozen=True)
class Pair:
    """What the model reads and what it is to write, as ids."""

    source: list[int]
    target: list[int]

    def __len__(self) -> int:
        return len(self.source) + len(self.target)


@dataclass(frozen=True)
class Seq2SeqSettings:
    """Which texts are given and wanted, and how they are written."""

    source_field: str | None = None
    """The field with the text that is given; default the first pair of well-known names."""
    target_field: str | None = None
    """The field with the text that is wanted; in test rows it may be a list of several."""
    template: str | None = None
    """What the model reads, with {source} (for decoders also, at its end, {target}); default
    {source} alone, for decoders "{source}\\n\\nTL;DR: {target}"."""
    cut_sources: bool = False
    """Whether a source that is too long is cut at its end; otherwise its row is left out."""
    max_target: int = 128
    """Tokens of the longest target, its end included; also of the texts that are written."""
    language: str = "auto"
    """What words are: en, ja (MeCab), zh, other, or auto: by the script of the targets."""
    metrics: tuple[str, ...] = METRICS
    """What is measured: rouge, bleu, chrf, exact_match."""
    eval_rows: int = 200
    """How many rows of each part are written out and measured at most, spread evenly; 0: all."""
    num_beams: int = 4
    """Texts side by side in the beam search with which texts are written; 1: greedy."""
    length_penalty: float = 1.0
    """Above 0 the beam search favours longer texts."""
    no_repeat_ngram: int = 0
    """So many words in a row (tokens) must not come twice in a written text; 0: off."""

    def __post_init__(self) -> None:
        check_names(self.metrics, self.language, "seq2seq.")
        for name, least in (("max_target", 2), ("eval_rows", 0)):
            if getattr(self, name) < least:
                raise UserError(f"seq2seq.{name} is {getattr(self, name)}; it must be {least} up.")
        if (self.source_field is None) != (self.target_field is None):
            raise UserError(
                "seq2seq.source_field and seq2seq.target_field belong together; give both, or "
                "neither."
            )
        if self.template is not None and self.template.count("{source}") != 1:
            raise UserError(
                f"seq2seq.template is {self.template!r}; it must have {{source}} once, where the "
                "given text belongs."
            )
        self.sampling()

    def sampling(self) -> SamplingSettings:
        """How texts are written when the model is measured."""
        return SamplingSettings(
            max_new_tokens=self.max_target, temperature=0.0, num_beams=self.num_beams,
            length_penalty=self.length_penalty, no_repeat_ngram=self.no_repeat_ngram, logprobs=0,
        )  # fmt: skip


@dataclass(frozen=True)
class Seq2SeqConfig(FinetuneConfig):
    """A complete run of `finetune seq2seq`."""

    method: str = "seq2seq"
    seq2seq: Seq2SeqSettings = field(default_factory=Seq2SeqSettings)
    train: TrainSettings = field(default_factory=lambda: tuned(learning_rate=5e-5))


class Seq2Seq(FinetuneMethod):
    """Cross-entropy of each next token of the target, given the source."""

    Config = Seq2SeqConfig
    config: Seq2SeqConfig
    pipeline = "summarization"
    shows_before = True

    # --- rows --------------------------------------------------------------------------------

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        given, wanted = self._fields(values)
        targets = values[wanted] if isinstance(values[wanted], list) else [values[wanted]]
        for name, text in ((given, values[given]), *((wanted, one) for one in targets)):
            if not isinstance(text, str):
                raise BadRow(f"has {text!r:.40} for '{name}', which is no text.")
            if not text.strip():
                raise BadRow(f"has an empty '{name}'; fill it, or leave the row out.")
        if not targets:
            raise BadRow(f"has an empty '{wanted}'; fill it, or leave the row out.")
        return {
            "source": values[given].strip(),
            "targets": list(dict.fromkeys(text.strip() for text in targets)),
        }

    def _fields(self, values: dict[str, Any]) -> tuple[str, str]:
        settings = self.config.seq2seq
        if settings.source_field is None or settings.target_field is None:
            for pair in PAIRS:
                if all(name in values for name in pair):
                    return pair
            raise BadRow(
                f"has no known pair of fields (it has {', '.join(map(repr, values)) or 'none'}): "
                "name yours with --seq2seq.source_field and --seq2seq.target_field."
            )
        for flag in ("source_field", "target_field"):
            if (name := getattr(settings, flag)) not in values:
                raise BadRow(f"has no field '{name}'; name the right one with --seq2seq.{flag}.")
        return settings.source_field, settings.target_field

    def text_of(self, values: dict[str, Any]) -> str:
        return str(values["source"])

    def learn(self, rows: Sequence[Row]) -> None:
        settings = self.config.seq2seq
        targets = [row.values["targets"][0] for row in rows]
        self.lengths = {
            "source": [len(row.values["source"]) for row in rows],
            "target": [len(target) for target in targets],
        }
        self.language = settings.language
        if self.language == "auto":
            self.language = language_of(targets)
        check_packages(settings.metrics, self.language)

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        model = self.open_with()
        self.writer: Writer = as_writer(model)
        self.limit = self.longest(model)
        self.max_target = self.config.seq2seq.max_target
        template = self.config.seq2seq.template
        if isinstance(model, EncoderDecoder):
            self.max_target = min(self.max_target, model.config.decoder.max_seq_len)
            self.before, self.gap = template or "{source}", ""
            if "{target}" in self.before:
                raise UserError(
                    "seq2seq.template has {target}, but this model is an encoder-decoder: it reads "
                    "the source alone. Leave {target} out."
                )
            return model
        template = template or FOR_DECODERS
        before, found, after = template.partition("{target}")
        if not found or after or "{source}" not in before:
            raise UserError(
                f"seq2seq.template is {template!r}; for a decoder it must end with {{target}}, "
                "behind {source}."
            )
        if self.limit <= self.max_target:
            raise UserError(
                f"seq2seq.max_target is {self.max_target}, but source and target together have "
                f"room for {self.limit} tokens (the model's context, or data.max_length); lower it."
            )
        # A space before a word is part of the word in most vocabularies.
        self.before = before.rstrip(" ")
        self.gap = before[len(self.before) :]
        if self.tokenizer.eos_id is None:
            raise UserError(
                f"{self.config.model} has no token that ends a text (eos), so it could not learn "
                "where a target ends. Take another model, or name one in its tokenizer_config.json."
            )
        return model

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> Pair:
        try:
            target = self._target(values["targets"][0])
            source = self._source(values["source"])
        except BadRow:
            raise
        except UserError as error:  # a character that the vocabulary cannot write
            raise BadRow(f"cannot be encoded. {error}") from error
        return Pair(source, target)

    def _target(self, text: str) -> list[int]:
        """What is to be written, with what belongs around it."""
        if isinstance(self.writer, EncoderDecoder):
            config = self.writer.config
            ids = self.tokenizer.target.encode_inputs([text]).ids[0]
            if config.first_id is not None and ids[:1] != [config.first_id]:
                ids = [config.first_id, *ids]
            ends = {config.end_id, self.tokenizer.eos_id} - {None}
            if ends and ids[-1] not in ends:
                end = self.tokenizer.eos_id if config.end_id is None else config.end_id
                ids = [*ids, *([end] if end is not None else [])]
        else:
            assert self.tokenizer.eos_id is not None
            ids = [*self.tokenizer.encode(self.gap + text), self.tokenizer.eos_id]
        if len(ids) > self.max_target:
            raise BadRow(
                f"has a target of {len(ids)} tokens, more than {self.max_target}; shorten it, or "
                "raise --seq2seq.max_target."
            )
        return ids

    def _prompt(self, source: str) -> list[int]:
        text = self.before.replace("{source}", source)
        encode = encode_source if isinstance(self.writer, EncoderDecoder) else encode_prompt
        return encode(self.tokenizer, text)

    def _source(self, source: str) -> list[int]:
        """What the model reads, cut if it must be and may be."""
        both = not isinstance(self.writer, EncoderDecoder)  # source and target share the context
        room = self.limit - (self.max_target if both else 0)
        found = self._prompt(source)
        if len(found) <= room:
            return found
        said = f"has {len(found)} tokens in its source"
        if not self.config.seq2seq.cut_sources:
            raise BadRow(
                f"{said}, more than {room}; shorten it, or let sources be cut with "
                "--seq2seq.cut_sources true."
            )
        ids = self.tokenizer.encode(source)
        kept = len(ids)
        while len(found) > room and kept > 0:
            kept -= len(found) - room
            # Where a cut runs through a character, what is left of it is dropped.
            found = self._prompt(self.tokenizer.decode(ids[: max(0, kept)]).rstrip("\ufffd"))
        if kept <= 0:
            raise BadRow(f"{said}, of which none fit beside the template in {room}.")
        return found

    def collate(self, items: list[Pair]) -> Seq2SeqBatch | PromptBatch:
        pairs = [(item.source, item.target) for item in items]
        return pad_pairs(pairs) if isinstance(self.writer, EncoderDecoder) else pad_prompts(pairs)

    def source(self, items: Sequence[Pair]) -> ByLength[Pair]:
        train = self.config.train
        return ByLength(items, self.collate, train.seed, train.batch_size)

    def step(self, model: nn.Module, batch: Seq2SeqBatch | PromptBatch) -> LossSum:
        if isinstance(batch, Seq2SeqBatch):
            return EncoderDecoderStep().step(model, batch)
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens)  # padding comes last: nothing that counts sees it
        loss_sum = -token_logprobs(model, hidden, batch.targets).sum()
        read = int(batch.lengths.sum())
        return LossSum(loss_sum, (batch.targets != IGNORED).sum(), tokens=read)

    # --- looking -----------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Pair], line: LiveLine
    ) -> Outcome:
        """Figures of the texts that beam search writes for some of the rows."""
        settings = self.config.seq2seq
        places = evenly(len(rows), settings.eval_rows)
        sampling = replace(settings.sampling(), max_new_tokens=self.max_target)
        results = write_all(
            as_writer(model), self.tokenizer, [items[p].source for p in places], sampling, line
        )
        texts = [
            Written(
                rows[p].place, rows[p].values["source"], tuple(rows[p].values["targets"]),
                result.text.strip(), sureness(result), len(result.tokens),
                result.finish_reason == "length",
            )
            for p, result in zip(places, results, strict=True)
        ]  # fmt: skip
        return Outcome(
            written_figures(texts, self.language, settings.metrics),
            written_examples(texts),
            [self._data_section(), *written_sections(texts, self.language, settings.metrics)],
        )

    def _data_section(self) -> Section:
        """How long the training texts are."""
        rows = [
            (name, min(sizes), statistics.median(sizes), round(statistics.mean(sizes), 1),
             max(sizes))
            for name, sizes in self.lengths.items()
        ]  # fmt: skip
        count = len(self.lengths["source"])
        text = f"Characters of the {count:,} pairs that were learnt; language: {self.language}."
        table = Table(("", "least", "median", "mean", "greatest"), rows)
        return Section("Training texts", text, table)


@dataclass
class PromptBatch:
    """Prompts and their targets, as one text each, for a decoder.

    tokens, targets: (b, t) as in `Batch`, -100 wherever no target's token follows; lengths: (b,)
    tokens of each row without padding.
    """

    tokens: Tensor
    targets: Tensor
    lengths: Tensor


def pad_prompts(pairs: Sequence[tuple[list[int], list[int]]]) -> PromptBatch:
    """Pairs of prompt and target ids, each as one row."""
    longest = max(len(source) + len(target) for source, target in pairs)
    ids, wanted, lengths = [], [], []
    for source, target in pairs:
        room = longest - len(source) - len(target)
        ids.append([*source, *target, *[0] * room])
        wanted.append([*[IGNORED] * len(source), *target, *[IGNORED] * room])
        lengths.append(len(source) + len(target) - 1)
    return PromptBatch(
        torch.tensor(ids)[:, :-1], torch.tensor(wanted)[:, 1:], torch.tensor(lengths)
    )
