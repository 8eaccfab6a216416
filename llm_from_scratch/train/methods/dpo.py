"""Direct preference optimisation, with IPO and SimPO: learning which of two answers is better.

Each pair is read twice, with the chosen and with the rejected answer; the loss compares what the
model thinks of both with what it thought before training. Those reference log-probabilities are
computed once, token by token, and kept in the run folder.

Axes: b pairs (2b rows: all chosen, then all rejected), t time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.preferences import preference_of
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.evaluate.preference import (
    ScoredPair,
    preference_figures,
    preference_sections,
)
from llm_from_scratch.generate.generate import complete
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.answer_ends import answer_end, chosen_template, missing_tokens
from llm_from_scratch.text.chat import encode_chat, encode_chat_prompt, stop_strings
from llm_from_scratch.train.by_length import ByLength
from llm_from_scratch.train.logprobs import token_logprobs
from llm_from_scratch.train.loop import to_device
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.pairs import Pair, PairBatch, keep, pad_pairs, take_up
from llm_from_scratch.train.preference_losses import LOSSES, Likelihood, drift, pair_loss
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model

SHOWN = 6  # pairs whose prompts are answered for people to read
BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0}
STORED = "reference.safetensors"


@dataclass(frozen=True)
class DpoSettings:
    """Which loss, and how strongly it holds to the model as it was."""

    loss: str = "dpo"
    """dpo, ipo (does not push what is already well apart) or simpo (needs no reference)."""
    beta: float | None = None
    """How dear it is to move away from the reference; default 0.1, for simpo 2."""
    gamma: float = 1.0
    """simpo: by how much the chosen reward is to be above the rejected one."""
    label_smoothing: float = 0.0
    """dpo, simpo: the share of pairs that are thought to be the wrong way round."""
    sft_weight: float = 0.0
    """Weight of the chosen answer's own loss (RPO), which keeps it from becoming less likely."""
    template: str | None = None
    """plain, alpaca, chatml, phi3, llama3, japanese, a file, or Jinja; default the model's own."""
    max_new_tokens: int = 96
    """The longest answer written for the examples in the report."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(
                f"dpo.loss is '{self.loss}'; it must be one of {', '.join(LOSSES)}."
                + nearest(self.loss, LOSSES)
            )
        if self.beta is not None and not self.beta > 0:
            raise UserError(f"dpo.beta is {self.beta}; it must be above 0.")
        for name in ("gamma", "sft_weight"):
            if not getattr(self, name) >= 0:
                raise UserError(f"dpo.{name} is {getattr(self, name)}; it must not be negative.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"dpo.label_smoothing is {self.label_smoothing}; it must be in [0, 0.5)."
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError("dpo.label_smoothing is for dpo and simpo; ipo has none. Leave it out.")
        if self.max_new_tokens < 1:
            raise UserError(f"dpo.max_new_tokens is {self.max_new_tokens}; it must be at least 1.")

    @property
    def strength(self) -> float:
        """beta, given or by default."""
        return BETA[self.loss] if self.beta is None else self.beta


@dataclass(frozen=True)
class DpoConfig(FinetuneConfig):
    """A complete run of `finetune dpo`."""

    method: str = "dpo"
    dpo: DpoSettings = field(default_factory=DpoSettings)
    train: TrainSettings = field(
        default_factory=lambda: tuned(epochs=1.0, learning_rate=1e-6, weight_decay=0.0)
    )

    def __post_init__(self) -> None:
        if self.lora.dropout:
            raise UserError(
                f"lora.dropout is {self.lora.dropout}; dpo compares exact likelihoods and drops "
                "nothing: leave it at 0."
            )


class Dpo(FinetuneMethod):
    """The chosen answer's probability up against the rejected one's."""

    Config = DpoConfig
    config: DpoConfig
    shows_before = True

    # --- rows --------------------------------------------------------------------------------

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        return preference_of(values)

    def text_of(self, values: dict[str, Any]) -> str:
        """The prompt alone: what is asked in validation or test must not be learnt from."""
        return prompt_text(values)

    def encode(self, values: dict[str, Any]) -> Pair:
        sides = [self._side(values["prompt"], values[name]) for name in ("chosen", "rejected")]
        (chosen, chosen_mask), (rejected, rejected_mask) = sides
        if chosen == rejected:
            raise BadRow("has two answers that are the same to the tokenizer; leave it out.")
        return Pair((chosen, rejected), (chosen_mask, rejected_mask))

    def _side(self, prompt: list[dict[str, Any]], answer: str) -> tuple[list[int], list[int]]:
        """The ids of a conversation, and a mask of its last answer alone."""
        messages = [*prompt, {"role": "assistant", "content": answer}]
        try:
            ids, mask = encode_chat(self.tokenizer, messages)
        except UserError as error:
            raise BadRow(f"does not fit the chat template: {error}") from error
        if len(ids) > self.limit:
            raise BadRow(
                f"has {len(ids):,} tokens with one of its answers, more than {self.limit:,}; "
                "shorten it or raise --data.max_length as far as the model's context."
            )
        if not any(mask):
            raise BadRow("has an answer without a token to learn from; look at dpo.template.")
        end = len(mask) - mask[::-1].index(1)
        start = end
        while start and mask[start - 1]:
            start -= 1
        return ids, [int(start <= place < end) for place in range(len(mask))]

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        model = self.open_with()
        if not isinstance(model, Decoder):
            raise UserError(
                f"{self.config.model} is no decoder; dpo trains models that write on from a "
                "prompt. Choose such a one."
            )
        self._take_template()
        self.limit = self.longest(model)
        return model

    def _take_template(self) -> None:
        """Let the tokenizer have the template: the model is saved with the one it learnt in."""
        template = chosen_template(self.config.dpo.template, self.tokenizer)
        if lacking := missing_tokens(template, self.tokenizer):
            raise UserError(
                f"The chat template writes {', '.join(lacking)}, which the vocabulary of "
                f"{self.config.model} does not have: start from a model that was taught in this "
                "template (finetune sft), or take another --dpo.template."
            )
        self.tokenizer.chat_template = template
        end = answer_end(template, self.tokenizer)
        if end not in self.tokenizer.stop_ids:
            self.tokenizer.extra_stop_ids.add(end)

    @torch.no_grad()
    def prepare(
        self, model: nn.Module, items: dict[str, list[Any]], folder: Path, line: LiveLine
    ) -> None:
        """The reference log-probabilities, computed once or read from the run folder.

        Pairs that a run of few steps never comes to are left out.
        """
        path = folder / "data" / STORED
        items = {**items, "train": self._used(items["train"])}
        if (folder / "config.yaml").is_file():
            take_up(items, path)
            return
        assert isinstance(model, Decoder)
        total, done = sum(map(len, items.values())), 0
        # Part by part, as they are evaluated: so the start is a tie to the last bit.
        for part in items.values():
            for batch, pairs in self._by_length(part):
                line.show(f"Reference: pair {done:,} of {total:,}")
                logprobs = self.logprobs(model, to_device(batch, model.device)).cpu()
                for row, pair in enumerate(pairs):
                    places = (row, row + len(pairs))
                    chosen, rejected = (logprobs[p][batch.mask[p]] for p in places)
                    pair.reference = (chosen, rejected)
                done += len(pairs)
        keep(items, path)

    def _used(self, items: list[Pair]) -> list[Pair]:
        """The training pairs that the steps of this run see, in their order."""
        train = self.config.train
        count = train.max_steps * train.batch_size
        if count >= len(items):
            return items
        source = self.source(items)
        seen = {id(source.item(number)) for number in range(count)}
        return [item for item in items if id(item) in seen]

    def _by_length(self, items: Sequence[Pair]) -> Iterator[tuple[PairBatch, list[Pair]]]:
        """Batches of pairs of like length."""
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        order = sorted(items, key=len)
        for start in range(0, len(order), size):
            pairs = order[start : start + size]
            yield self.collate(pairs), pairs

    # --- learning ----------------------------------------------------------------------------

    def source(self, items: Sequence[Any]) -> ByLength[Any]:
        train = self.config.train
        return ByLength(items, self.collate, train.seed, train.batch_size)

    def collate(self, items: list[Pair]) -> PairBatch:
        return pad_pairs(items)

    def logprobs(self, model: nn.Module, batch: PairBatch) -> Tensor:
        """(2b, t): of the answers' tokens, 0 elsewhere. Dropout is off: likelihoods are compared.

        Padding stands behind the text, where no token of it looks.
        """
        assert isinstance(model, Decoder)
        training = model.training
        model.eval()
        try:
            return token_logprobs(model, model.hidden(batch.tokens), batch.targets)
        finally:
            model.train(training)

    def step(self, model: nn.Module, batch: PairBatch) -> LossSum:
        figures = self.score(model, batch)
        metrics = {name: values.detach().sum() for name, values in figures.items()}
        margin = figures["chosen_reward"] - figures["rejected_reward"]
        metrics["reward_margin"] = margin.sum()
        metrics["reward_accuracy"] = ((margin.sign() + 1) / 2).sum()  # a tie counts half
        del metrics["loss"]
        return LossSum(figures["loss"].sum(), len(margin), metrics, tokens=batch.read)

    def score(self, model: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """What the model makes of each pair (b,); `loss` carries gradients."""
        settings = self.config.dpo
        logprobs, mask = self.logprobs(model, batch), batch.mask
        lengths = mask.sum(1)
        moved = (drift(logprobs, batch.reference) * mask).sum(1)
        sums = [logprobs.sum(1), batch.reference.sum(1), lengths]
        halves = [values.chunk(2) for values in sums]
        chosen, rejected = (Likelihood(*(half[side] for half in halves)) for side in range(2))
        found = pair_loss(
            settings.loss, chosen, rejected, beta=settings.strength, gamma=settings.gamma,
            label_smoothing=settings.label_smoothing,
        )  # fmt: skip
        own = -chosen.logprob / chosen.length
        loss = found.loss
        if settings.sft_weight:
            loss = loss + settings.sft_weight * own
        return {
            "loss": loss,
            "chosen_reward": found.chosen_reward,
            "rejected_reward": found.rejected_reward,
            "chosen_logprob": chosen.logprob,
            "rejected_logprob": rejected.logprob,
            "chosen_loss": own,
            "drift": moved.view(2, -1).sum(0) / lengths.view(2, -1).sum(0),
        }

    # --- looking -----------------------------------------------------------------------------

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        assert isinstance(model, Decoder)
        scored: dict[int, ScoredPair] = {}
        for batch, pairs in self._by_length(items):
            line.show(f"Evaluating: pair {len(scored):,} of {len(items):,}")
            found = self.score(model, to_device(batch, model.device))
            for pair, one in zip(pairs, scored_pairs(found, batch), strict=True):
                scored[id(pair)] = one
        ordered = [scored[id(item)] for item in items]
        texts = [
            (row.place, prompt_text(row.values), row.values["chosen"], row.values["rejected"])
            for row in rows
        ]
        sections = preference_sections(ordered, texts, probabilities=self.config.dpo.loss != "ipo")
        return Outcome(preference_figures(ordered), self._answers(model, rows[:SHOWN]), sections)

    def _answers(self, model: nn.Module, rows: Sequence[Row]) -> list[dict[str, str]]:
        """What the model itself answers, beside the answer that people preferred."""
        assert isinstance(model, Decoder)
        prompts = [encode_chat_prompt(self.tokenizer, row.values["prompt"]) for row in rows]
        results = complete(
            model, self.tokenizer, prompts, temperature=0.0,
            max_new_tokens=self.config.dpo.max_new_tokens,
            stop=stop_strings(self.tokenizer),
        )  # fmt: skip
        return [
            {
                "place": row.place,
                "given": prompt_text(row.values),
                "wanted": row.values["chosen"],
                "got": result.text.strip(),
            }
            for row, result in zip(rows, results, strict=True)
        ]


def prompt_text(values: dict[str, Any]) -> str:
    """The messages of a prompt as one text."""
    return "\n".join(str(message["content"]) for message in values["prompt"])


def scored_pairs(found: dict[str, Tensor], batch: PairBatch) -> list[ScoredPair]:
    """The results of `Dpo.score` pair by pair."""
    reference = batch.reference.sum(1).view(2, -1)
    lengths = batch.mask.sum(1).view(2, -1)
    columns = (
        found["loss"], found["chosen_reward"], found["rejected_reward"], found["chosen_logprob"],
        found["rejected_logprob"], reference[0], reference[1], lengths[0], lengths[1],
        found["drift"],
    )  # fmt: skip
    return [ScoredPair(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]
