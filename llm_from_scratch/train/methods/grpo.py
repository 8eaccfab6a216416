"""Group-relative policy optimisation: a model learns from what it writes, by rules that check it.

    write several completions of each prompt -> verifiers -> advantage within the group -> step

The engine writes (train/rollouts.py), rules judge (evaluate/verifiers.py), and what is above its
group's mean becomes likelier (train/policy_loss.py). DeepSeekMath, arXiv:2402.03300.

Axes: b completion, t time, k figure.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.records import BadRow, Row
from llm_from_scratch.evaluate.verified import (
    Checked,
    checked_figures,
    policy_sections,
    verifiers_section,
)
from llm_from_scratch.evaluate.verifiers import Finding, make_verifiers, missing, score
from llm_from_scratch.generate.generate import encode_prompt
from llm_from_scratch.model.adapters import changes_nothing, without_adapters
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.text.answer_ends import chosen_template
from llm_from_scratch.text.chat import encode_chat_prompt
from llm_from_scratch.train.examples import Examples
from llm_from_scratch.train.logprobs import token_logprobs, token_logprobs_and_entropy
from llm_from_scratch.train.losses import LossSum
from llm_from_scratch.train.methods.base import FinetuneConfig, FinetuneMethod, Outcome, tuned
from llm_from_scratch.train.policy_loss import (
    LOSSES,
    advantages,
    completion_weights,
    policy_sums,
)
from llm_from_scratch.train.rollouts import PolicyBatch, Rollout, Rollouts, Written, write
from llm_from_scratch.train.settings import TrainSettings
from llm_from_scratch.weights.assemble import Model

SHOWN = 20  # examples in the report
FIGURES = ("reward", "reward_std", "zero_variance", "completion_length", "truncated")


@dataclass(frozen=True)
class GrpoSettings:
    """What is written, how it is judged, and how far a step may go."""

    rewards: tuple[str, ...] = ("number",)
    """Verifiers: number, exact, json, json_equal, regex, format; the first decides accuracy."""
    weights: tuple[float, ...] = ()
    """What each verifier's reward is multiplied by; default 1."""
    prompt_field: str = "prompt"
    """The field with the prompt: a text, or messages."""
    answer_field: str = "answer"
    """The field with the right answer, for the verifiers that need one."""
    answer_pattern: str | None = None
    """Where the answer stands in what is written: the last match's first group; default all."""
    pattern: str | None = None
    """What the verifier regex asks for, where a row has no pattern."""
    template: str | None = None
    """The chat template: a name, Jinja, or none for the bare prompt; default the model's own."""
    stop: tuple[str, ...] = ()
    """Tokens at which a completion ends, besides the model's own end tokens."""
    group_size: int = 8
    """Completions per prompt, which are compared with each other."""
    steps_per_rollout: int = 1
    """Over how many steps the completions of a rollout are divided."""
    repeats: int = 1
    """How many times the completions of a rollout are learnt from."""
    max_new_tokens: int = 256
    """The longest completion, in tokens."""
    temperature: float = 1.0
    """How completions are drawn; 1 is the model's own distribution."""
    at_once: int = 128
    """Completions that are written at the same time; more is faster and takes memory."""
    loss: str = "grpo"
    """grpo (mean per completion), dr_grpo (no length is favoured) or dapo (mean over tokens)."""
    scale: bool | None = None
    """Divide by the group's standard deviation; default yes, but not for dr_grpo."""
    clip_low: float = 0.2
    """How far below 1 a token's probability ratio counts."""
    clip_high: float = 0.2
    """How far above 1 a token's probability ratio counts."""
    kl: float = 0.04
    """Weight of the divergence from the starting model; 0 spares that model's memory and time."""
    mask_truncated: bool = False
    """Learn nothing from completions that were cut off at max_new_tokens."""
    eval_prompts: int = 200
    """At most so many validation prompts are answered in an evaluation during training."""

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError("grpo.rewards is empty; name at least one verifier, such as number.")
        if self.weights and len(self.weights) != len(self.rewards):
            raise UserError(
                f"grpo.weights has {len(self.weights)} numbers for {len(self.rewards)} verifiers; "
                "give one for each."
            )
        if self.loss not in LOSSES:
            raise UserError(
                f"grpo.loss is '{self.loss}'; it must be one of {', '.join(LOSSES)}."
                + nearest(self.loss, LOSSES)
            )
        for name, least in (
            ("group_size", 2), ("steps_per_rollout", 1), ("repeats", 1), ("max_new_tokens", 1),
            ("at_once", 1), ("eval_prompts", 1), ("kl", 0), ("clip_low", 0), ("clip_high", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(
                    f"grpo.{name} is {getattr(self, name)}; it must be at least {least}."
                )
        if self.temperature <= 0:
            raise UserError(
                f"grpo.temperature is {self.temperature}; it must be above 0, as a group whose "
                "completions are all the same teaches nothing."
            )

    @property
    def scaled(self) -> bool:
        """Whether advantages are divided by the group's standard deviation."""
        return self.loss != "dr_grpo" if self.scale is None else self.scale


def train_settings() -> TrainSettings:
    return tuned(
        epochs=1.0, batch_size=64, learning_rate=1e-6, schedule="constant", weight_decay=0.0,
        eval_every=20, sample_every=50, checkpoint_every=50,
    )  # fmt: skip


@dataclass(frozen=True)
class GrpoConfig(FinetuneConfig):
    """A complete run of `finetune grpo`; train.batch_size counts completions."""

    method: str = "grpo"
    grpo: GrpoSettings = field(default_factory=GrpoSettings)
    train: TrainSettings = field(default_factory=train_settings)

    def __post_init__(self) -> None:
        if self.lora.dropout:
            raise UserError(
                f"lora.dropout is {self.lora.dropout}; grpo compares exact likelihoods and drops "
                "nothing: leave it at 0."
            )
        rollout = self.train.batch_size * self.grpo.steps_per_rollout
        if rollout % self.grpo.group_size:
            raise UserError(
                f"train.batch_size {self.train.batch_size} times grpo.steps_per_rollout "
                f"{self.grpo.steps_per_rollout} is no multiple of grpo.group_size "
                f"{self.grpo.group_size}; a rollout has whole groups."
            )


@dataclass(frozen=True)
class Prompt:
    """What is asked, in tokens, and the row with what the verifiers need."""

    ids: list[int]
    values: dict[str, Any]


class Grpo(FinetuneMethod):
    """Completions above their group's mean become likelier."""

    Config = GrpoConfig
    config: GrpoConfig
    shows_before = True

    def __init__(self, config: GrpoConfig) -> None:
        super().__init__(config)
        g = self.g = config.grpo
        self.finding = Finding(g.answer_pattern, g.pattern)
        self.verifiers = make_verifiers(g.rewards, self.finding)
        self.weights = dict(zip(g.rewards, g.weights or (1.0,) * len(g.rewards), strict=True))
        self.model: Decoder
        self.reference: Decoder | None = None  # one with fresh adapters is its own, without them

    # --- rows --------------------------------------------------------------------------------

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        g = self.g
        if g.prompt_field not in values:
            raise BadRow(
                f"has no field '{g.prompt_field}'; name the column with --grpo.prompt_field."
            )
        prompt = values[g.prompt_field]
        if not isinstance(prompt, str | list) or not prompt:
            raise BadRow(f"has a '{g.prompt_field}' that is neither a text nor messages.")
        own = (g.prompt_field, g.answer_field, "prompt", "answer", "place")
        row = {"prompt": prompt, **{k: v for k, v in values.items() if k not in own}}
        if g.answer_field in values:
            row["answer"] = values[g.answer_field]
        for name in g.rewards:
            if lacks := missing(name, row, self.finding):
                raise BadRow(lacks)
        return row

    def text_of(self, values: dict[str, Any]) -> str:
        prompt = values["prompt"]
        if isinstance(prompt, str):
            return prompt
        return "\n".join(str(m.get("content")) if isinstance(m, dict) else str(m) for m in prompt)

    # --- the model ---------------------------------------------------------------------------

    def open(self) -> Model:
        model = self.open_with()
        if not isinstance(model, Decoder):
            raise UserError(
                f"{self.config.model} is no decoder; grpo needs a model that goes on writing."
            )
        self.context = model.config.max_seq_len
        if self.g.template not in (None, "none"):  # the model is saved with the one it learnt in
            self.tokenizer.chat_template = chosen_template(self.g.template, self.tokenizer)
        self.tokenizer.extra_stop_ids |= {self._end(text) for text in self.g.stop}
        self.end_ids = frozenset(self.tokenizer.stop_ids)
        if not self.end_ids:
            raise UserError(
                "The tokenizer has no token that ends a text; name one with --grpo.stop."
            )
        return model

    def _end(self, text: str) -> int:
        ids = self.tokenizer.encode(text, special=True)
        if len(ids) != 1:
            raise UserError(
                f"grpo.stop has {text!r}, which is {len(ids)} tokens; give what is one token."
            )
        return ids[0]

    def encode(self, values: dict[str, Any]) -> Prompt:
        prompt = values["prompt"]
        bare = self.g.template == "none" or not self.tokenizer.chat_template
        if isinstance(prompt, str) and bare:
            ids = encode_prompt(self.tokenizer, prompt)
        else:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            try:
                ids = encode_chat_prompt(self.tokenizer, messages)
            except UserError as error:
                raise BadRow(f"cannot be read: {error}") from error
        limit = min(self.context - self.g.max_new_tokens, self.config.data.max_length or 2**62)
        if len(ids) > limit:
            raise BadRow(
                f"has {len(ids)} tokens, more than the {max(limit, 0)} that leave room for "
                f"grpo.max_new_tokens ({self.g.max_new_tokens}); cut it, or lower that."
            )
        return Prompt(ids, values)

    def prepare(
        self, model: nn.Module, items: dict[str, list[Any]], folder: Path, line: LiveLine
    ) -> None:
        assert isinstance(model, Decoder)
        self.model, self.folder, self.line = model, folder, line
        if self.g.kl and not changes_nothing(model):
            frozen: dict[int, Any] = {id(p): p for p in model.parameters() if not p.requires_grad}
            self.reference = copy.deepcopy(model, frozen).eval().requires_grad_(False)

    # --- writing -----------------------------------------------------------------------------

    def sequences(self, items: Sequence[Any]) -> int:
        """Completions that an epoch learns from: `train.epochs` is about prompts."""
        return len(items) * self.g.group_size * self.g.repeats

    def source(self, items: Sequence[Any]) -> Rollouts:
        g, train = self.g, self.config.train
        order: Examples[Prompt] = Examples(items, list, train.seed)
        return Rollouts(
            order.batch, self.play,
            prompts_each=train.batch_size * g.steps_per_rollout // g.group_size,
            size=g.group_size, repeats=g.repeats, seed=train.seed,
        )  # fmt: skip

    def play(self, number: int, prompts: list[Prompt]) -> Rollout:
        """Let the model answer the prompts, and judge what it wrote."""
        g = self.g
        self.line.show(f"Writing {len(prompts) * g.group_size:,} completions")
        written = self.write(self.model, prompts, g.group_size, g.temperature, number)
        flat = [(p, w) for p, group in zip(prompts, written, strict=True) for w in group]
        each = [score(self.verifiers, self.text(w), p.values) for p, w in flat]
        rewards = torch.tensor([self.total(found) for found in each])
        above, std = advantages(rewards, g.group_size, g.scaled)
        lengths = torch.tensor([float(len(w.tokens)) for _, w in flat])
        cut = torch.tensor([float(not w.ended) for _, w in flat])
        learnt = 1 - cut if g.mask_truncated else torch.ones_like(cut)
        weights = completion_weights(g.loss, lengths * learnt, g.max_new_tokens) * learnt
        columns = [rewards, std, (std == 0).float(), lengths, cut]
        if len(self.verifiers) > 1:
            columns += [torch.tensor([f[name] for f in each]) for name in self.verifiers]
        empty = torch.zeros(0)
        rollout = Rollout(
            torch.tensor([i for p, w in flat for i in (*p.ids, *w.tokens)]),
            torch.tensor([len(p.ids) + len(w.tokens) for p, w in flat]),
            torch.tensor([len(p.ids) for p, _ in flat]),
            empty, empty, above, weights, torch.stack(columns, 1),
        )  # fmt: skip
        if g.steps_per_rollout * g.repeats > 1:  # else the model is still the one that wrote
            rollout.old = self.logprobs(self.model, rollout)
        if self.reference is not None:
            rollout.reference = self.logprobs(self.reference, rollout)
        elif g.kl:
            with without_adapters(self.model):
                rollout.reference = self.logprobs(self.model, rollout)
        return rollout

    def write(
        self, model: nn.Module, prompts: list[Prompt], size: int, temperature: float, number: int
    ) -> list[list[Written]]:
        """Completions of the prompts by the engine."""
        assert isinstance(model, Decoder)
        return write(
            model, [p.ids for p in prompts], size,
            max_new_tokens=self.g.max_new_tokens, temperature=temperature, end_ids=self.end_ids,
            seed=(self.config.train.seed << 32) + number, at_once=self.g.at_once,
        )  # fmt: skip

    def text(self, written: Written) -> str:
        """What was written, without the token that ended it."""
        ids = written.tokens[:-1] if written.ended else written.tokens
        return self.tokenizer.decode(ids)

    def total(self, found: dict[str, float]) -> float:
        """The reward: what the verifiers gave, weighted."""
        return sum(weight * found[name] for name, weight in self.weights.items())

    @torch.no_grad()
    def logprobs(self, model: Decoder, rollout: Rollout) -> Tensor:
        """Those of all tokens that were written, one completion behind the other."""
        size = self.config.train.micro_batch_size or self.config.train.batch_size
        training, found = model.training, []
        model.eval()
        for start in range(0, len(rollout), size):
            batch = rollout.batch(range(start, min(start + size, len(rollout))))
            targets = batch.targets.to(model.device)
            hidden = model.hidden(batch.tokens.to(model.device))
            values = token_logprobs(model, hidden, targets, temperature=self.g.temperature)
            found.append(values[targets != IGNORED].cpu())
        model.train(training)
        return torch.cat(found)

    # --- learning ----------------------------------------------------------------------------

    def step(self, model: nn.Module, batch: PolicyBatch) -> LossSum:
        assert isinstance(model, Decoder)
        g, written = self.g, batch.targets != IGNORED
        training = model.training
        model.eval()  # no dropout: likelihoods are compared with those of the model that wrote
        try:
            logprobs, entropy = token_logprobs_and_entropy(
                model, model.hidden(batch.tokens), batch.targets, temperature=g.temperature
            )
        finally:
            model.train(training)
        sums = policy_sums(
            logprobs, logprobs.detach() if batch.old is None else batch.old, batch.reference,
            batch.advantages, batch.weights, written,
            low=g.clip_low, high=g.clip_high, kl=g.kl,
        )  # fmt: skip
        metrics = {
            "policy_loss": sums.policy_loss, "kl": sums.kl,
            "clip_fraction": sums.clip_low + sums.clip_high,
            "clip_low": sums.clip_low, "clip_high": sums.clip_high,
            "entropy": (entropy * written).sum(1) / written.sum(1).clamp(min=1),
        }  # fmt: skip
        names = [*FIGURES, *(f"reward_{name}" for name in self.verifiers)]
        metrics |= dict(zip(names, batch.figures.T, strict=False))
        places = torch.arange(1, written.shape[1] + 1, device=written.device)
        read = int((written * places).amax(1).sum())  # up to the last token of each
        return LossSum(
            sums.loss.sum(), len(batch.tokens), {n: v.sum() for n, v in metrics.items()}, read
        )

    # --- looking -----------------------------------------------------------------------------

    def val_batches(self, items: Sequence[Any]) -> Iterator[Any]:
        """None: what counts is what the model writes, not how likely some text is."""
        return iter(())

    def val_figures(self, model: nn.Module, items: Sequence[Any]) -> dict[str, float]:
        """Greedy answers; `val_loss` is what is missing of the full reward."""
        answers = self.answer(model, list(items[: self.g.eval_prompts]))
        figures = checked_figures(answers, self.weights)
        loss = sum(self.weights.values()) - figures["reward"]
        return {"val_loss": loss, **{f"val_{name}": value for name, value in figures.items()}}

    def answer(self, model: nn.Module, prompts: list[Prompt]) -> list[Checked]:
        """Greedy answers, and what the verifiers say of them."""
        found = []
        for prompt, (w,) in zip(prompts, self.write(model, prompts, 1, 0.0, 0), strict=True):
            text = self.text(w)
            scores = score(self.verifiers, text, prompt.values)
            found.append(Checked(text, scores, len(w.tokens), w.ended))
        return found

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], items: Sequence[Any], line: LiveLine
    ) -> Outcome:
        line.show(f"Answering {len(items):,} prompts")
        answers = self.answer(model, list(items))
        examples = [
            {
                "place": row.place,
                "given": self.text_of(row.values),
                "wanted": str(row.values.get("answer", "")),
                "got": answer.text,
            }
            for row, answer in zip(rows[:SHOWN], answers, strict=False)
        ]
        sections = [verifiers_section(answers, self.weights), *policy_sections(self.folder)]
        return Outcome(checked_figures(answers, self.weights), examples, sections)
