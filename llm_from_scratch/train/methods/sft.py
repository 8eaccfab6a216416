"""Supervised fine-tuning: a model learns to write the answers of conversations.

The conversations of a batch are laid out one behind the other in a single row (`sft.packing`), each
seeing itself alone: no padding is computed, and nothing else changes. The loss is taken where it
counts only, so that prompts never reach the head.

Axes: b batch, t time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.chats import conversation_of
from llm_from_scratch.data.loader import IGNORED, Batch
from llm_from_scratch.data.records import BadRow, BadRows, Row
from llm_from_scratch.evaluate.bits_per_byte import bits_per_byte
from llm_from_scratch.evaluate.text_metrics import check_names, check_packages, language_of
from llm_from_scratch.evaluate.written_texts import (
    Written,
    evenly,
    sureness,
    write_all,
    written_examples,
    written_figures,
    written_sections,
)
from llm_from_scratch.generate.generate import wants_bos
from llm_from_scratch.generate.settings import make_settings
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.surgery import add_tokens
from llm_from_scratch.text.answer_ends import answer_end, chosen_template, missing_tokens
from llm_from_scratch.text.chat import ChatTokens, encode_chat, encode_chat_prompt, show_mask
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.train.logprobs import token_logprobs
from llm_from_scratch.train.loop import to_device
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome
from llm_from_scratch.weights.assemble import Model

METRICS = ("rouge", "chrf")


@dataclass(frozen=True)
class SftSettings:
    """How conversations are read, and how much is written to look at the result."""

    template: str | None = None
    """plain, alpaca, chatml, phi3, llama3, japanese, a file, or Jinja; default the model's own."""
    loss_on: str = "answers"
    """answers (the assistant's words alone) or all tokens."""
    packing: bool = True
    """Lay the conversations of a batch out without padding; changes the speed alone."""
    recompute: bool = False
    """Compute each block again for the gradients: less memory, a quarter slower."""
    add_tokens: bool = False
    """Add the template's control tokens to the vocabulary where it lacks them."""
    metrics: tuple[str, ...] = ()
    """rouge, bleu, chrf, exact_match; default rouge and chrf, as far as their packages are here."""
    language: str = "auto"
    """The answers' language for ROUGE and BLEU: en, ja, zh, other, or auto (by the script)."""
    eval_rows: int = 64
    """At most so many rows are answered to look at the result; 0: none."""
    max_new_tokens: int = 128
    """The longest answer written for that."""

    def __post_init__(self) -> None:
        if self.loss_on not in ("answers", "all"):
            raise UserError(f"sft.loss_on is '{self.loss_on}'; it must be answers or all.")
        check_names(self.metrics, self.language, "sft.")
        if self.eval_rows < 0:
            raise UserError(f"sft.eval_rows is {self.eval_rows}; it must not be negative.")
        if self.max_new_tokens < 1:
            raise UserError(f"sft.max_new_tokens is {self.max_new_tokens}; it must be at least 1.")


@dataclass(frozen=True)
class SftConfig(FinetuneConfig):
    """A complete run of `finetune sft`."""

    method: str = "sft"
    sft: SftSettings = field(default_factory=SftSettings)


@dataclass
class ChatBatch(Batch):
    """A `Batch` that knows how many tokens are read of it, padding left out."""

    read: int = 0


class Sft(FinetuneMethod):
    """Cross-entropy of each next token of the answers."""

    Config = SftConfig
    config: SftConfig
    shows_before = True

    # --- rows --------------------------------------------------------------------------------

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        return conversation_of(values)

    def text_of(self, values: dict[str, Any]) -> str:
        return text_of_messages(values["messages"])

    def group_of(self, values: dict[str, Any]) -> str:
        """What is asked: a prompt of the test with another answer is no new prompt."""
        return text_of_messages(values["messages"][:-1])

    def learn(self, rows: Sequence[Row]) -> None:
        s = self.config.sft
        self.language = s.language
        if self.language == "auto":
            self.language = language_of(row.values["messages"][-1]["content"] or "" for row in rows)
        if s.metrics:
            check_packages(s.metrics, self.language)
        self.metrics = s.metrics or tuple(m for m in METRICS if _is_here(m, self.language))

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        model = self.open_with()
        if not isinstance(model, Decoder):
            raise UserError(
                f"{self.config.model} is no decoder, which sft needs; for an encoder-decoder there "
                "is scratchlm finetune seq2seq, for an encoder classify and ner."
            )
        wanted = template_for(self.config, self.tokenizer)
        if lacking := missing_tokens(wanted, self.tokenizer):
            model, self.tokenizer = self._grown(model, lacking)
        self.teach(wanted)
        self.limit = self.longest(model)
        model.recompute = self.config.sft.recompute
        return model

    def _grown(self, model: Decoder, lacking: list[str]) -> tuple[Decoder, Tokenizer]:
        """Model and tokenizer with the control tokens that the template needs."""
        names = ", ".join(lacking)
        if not self.config.sft.add_tokens:
            raise UserError(
                f"The chat template writes {names}, which the vocabulary of {self.config.model} "
                "does not have: add them with --sft.add_tokens true, or take another --sft.template"
                " (alpaca and japanese need none)."
            )
        if self.config.lora.rank:
            raise UserError(
                f"The chat template needs new tokens ({names}), whose embeddings adapters leave "
                "untrained: train the weights themselves (--lora.rank 0), or take a template that "
                "needs none (--sft.template alpaca)."
            )
        dtype = model.compute_dtype
        model, tokenizer = add_tokens(model, self.tokenizer, lacking, special=True)
        model.compute_dtype = dtype
        return model, tokenizer

    def teach(self, template: str) -> None:
        """Let the tokenizer have the template, and the end of its answers end what is written."""
        end = answer_end(template, self.tokenizer, everything=self.config.sft.loss_on == "all")
        self.tokenizer.chat_template = template
        if end not in self.tokenizer.stop_ids:
            self.tokenizer.extra_stop_ids.add(end)

    # --- learning ----------------------------------------------------------------------------

    def encode(self, values: dict[str, Any]) -> ChatTokens:
        try:
            tokens = encode_chat(self.tokenizer, values["messages"], tools=values.get("tools"))
        except UserError as error:  # refused by the template, or by the vocabulary
            raise BadRow(f"cannot be encoded. {error}") from error
        if len(tokens.ids) > self.limit:
            raise BadRow(
                f"has {len(tokens.ids):,} tokens, more than {self.limit:,}; shorten it, or raise "
                "--data.max_length as far as the model's context allows."
            )
        if not any(tokens.mask[1:]):
            raise BadRow("has no token of an answer behind the template; leave it out.")
        return tokens

    def collate(self, items: list[ChatTokens], everything: bool | None = None) -> ChatBatch:
        """Conversations as rows; packed: as one row, whose document ids keep them apart."""
        everything = self.config.sft.loss_on == "all" if everything is None else everything
        ids = [item.ids[:-1] for item in items]
        wanted = [
            [i if on or everything else IGNORED for i, on in zip(*item, strict=True)][1:]
            for item in items
        ]
        read = sum(map(len, ids))
        if self.config.sft.packing:
            numbers = [[number] * len(row) for number, row in enumerate(ids)]
            tokens, targets, documents = (
                torch.tensor([[i for row in rows for i in row]]) for rows in (ids, wanted, numbers)
            )
            return ChatBatch(tokens, targets, documents, read)
        longest = max(map(len, ids))  # padding comes last: nothing that counts sees it
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        targets = torch.tensor([row + [IGNORED] * (longest - len(row)) for row in wanted])
        return ChatBatch(tokens, targets, None, read)

    def step(self, model: nn.Module, batch: ChatBatch) -> LossSum:
        assert isinstance(model, Decoder)
        hidden = model.hidden(batch.tokens, document_ids_bt=batch.document_ids)
        loss_sum = -token_logprobs(model, hidden, batch.targets).sum()
        return LossSum(loss_sum, (batch.targets != IGNORED).sum(), tokens=batch.read)

    # --- looking -----------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[ChatTokens], line: LiveLine
    ) -> Outcome:
        """How well the answers are predicted, and what the model answers by itself."""
        assert isinstance(model, Decoder)
        figures = self._likelihood(model, rows, items, line)
        texts = self._answers(model, rows, line)
        return Outcome(
            figures | written_figures(texts, self.language, self.metrics),
            written_examples(texts),
            written_sections(texts, self.language, self.metrics),
        )

    def _likelihood(
        self, model: Decoder, rows: Sequence[Row], items: Sequence[ChatTokens], line: LiveLine
    ) -> dict[str, float]:
        """Nats per token and bits per byte of the answers, whatever the loss is taken on."""
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        nats, count = 0.0, 0
        for start in range(0, len(items), size):
            line.show(f"Reading answers: row {start + 1:,} of {len(items):,}")
            batch = self.collate(list(items[start : start + size]), everything=False)
            batch = to_device(batch, model.device)
            hidden = model.hidden(batch.tokens, document_ids_bt=batch.document_ids)
            nats -= token_logprobs(model, hidden, batch.targets).sum().item()
            count += int((batch.targets != IGNORED).sum())
        answers = [m for row in rows for m in row.values["messages"] if m["role"] == "assistant"]
        size_in_bytes = sum(len((message["content"] or "").encode()) for message in answers)
        found = {"answer_loss": nats / max(1, count)}
        return found | (
            {"bits_per_byte": bits_per_byte(nats, size_in_bytes)} if size_in_bytes else {}
        )

    def _answers(self, model: Decoder, rows: Sequence[Row], line: LiveLine) -> list[Written]:
        """What the model says, greedily, where the last answer of each row stands."""
        s = self.config.sft
        if not s.eval_rows:
            return []
        asked = []
        for place in evenly(len(rows), s.eval_rows):
            *before, last = rows[place].values["messages"]
            prompt = (
                encode_chat_prompt(self.tokenizer, before, tools=rows[place].values.get("tools"))
                if before
                else []
            )
            if prompt and len(prompt) < model.config.max_seq_len and last["content"]:
                asked.append((rows[place], prompt))
        if not asked:
            return []
        # Each answer ends with the context by itself: a long prompt shortens no other's answer.
        settings = make_settings(temperature=0.0, max_new_tokens=s.max_new_tokens, logprobs=0)
        results = write_all(model, self.tokenizer, [prompt for _, prompt in asked], settings, line)
        return [
            Written(
                row.place, row.values["messages"][-2]["content"] or "",
                (row.values["messages"][-1]["content"],), result.text.strip(), sureness(result),
                len(result.tokens), result.finish_reason == "length",
            )
            for (row, _), result in zip(asked, results, strict=True)
        ]  # fmt: skip


def text_of_messages(messages: Sequence[dict[str, Any]]) -> str:
    """What is said, whoever says it."""
    return "\n".join(message["content"] or "" for message in messages)


def _is_here(metric: str, language: str) -> bool:
    """Whether what a metric is computed by is installed."""
    try:
        check_packages([metric], language)
    except UserError:
        return False
    return True


def template_for(config: SftConfig, tokenizer: Tokenizer) -> str:
    """The template to learn with: its texts begin as the tokenizer wants them to."""
    template = chosen_template(config.sft.template, tokenizer)
    own = config.sft.template is None and tokenizer.chat_template is not None
    if wants_bos(tokenizer) and not own and "bos_token" not in template:
        return "{{- bos_token -}}\n" + template
    return template


def mask_texts(
    config: SftConfig, tokenizer: Tokenizer, count: int, *, color: bool = True
) -> Iterator[str]:
    """The first rows as the model reads them, with what it learns marked; and broken ones named."""
    method, bad = Sft(config), BadRows(config.data.on_bad)
    wanted = template_for(config, tokenizer)
    if config.sft.add_tokens and (lacking := missing_tokens(wanted, tokenizer)):
        tokenizer.add_tokens(lacking, special=True)
    method.tokenizer, method.limit = tokenizer, config.data.max_length or 2**31
    method.teach(wanted)
    everything = config.sft.loss_on == "all"
    for path in config.data.paths:
        for row in method.read(path, bad):
            if count < 1:
                return
            try:
                tokens = method.encode(method.check(row.values))
            except BadRow as error:
                yield f"{row.place}: {error}"
                continue
            if everything:
                tokens = ChatTokens(tokens.ids, [1] * len(tokens.ids))
            learnt = sum(tokens.mask[1:])
            head = f"{row.place}: {len(tokens.ids):,} tokens, {learnt:,} of them learnt"
            yield f"{head}\n{show_mask(tokenizer, tokens, color=color)}"
            count -= 1
