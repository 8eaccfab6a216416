"""How well a model tells the better of two answers, and how far it moved to learn that."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.report_parts import (
    Mistake,
    calibration_section,
    errors_section,
    histogram_section,
)


@dataclass(frozen=True)
class ScoredPair:
    """What a model makes of a pair: in nats, the log-probability of each whole answer.

    `..._reward` is what the loss compares; `reference_...` the log-probabilities of the model that
    training started from; `drift` is the mean over the tokens of both answers.
    """

    loss: float
    chosen_reward: float
    rejected_reward: float
    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    chosen_tokens: int
    rejected_tokens: int
    drift: float

    @property
    def margin(self) -> float:
        return self.chosen_reward - self.rejected_reward


def preference_figures(pairs: Sequence[ScoredPair]) -> dict[str, float]:
    """Means over pairs.

    reward_accuracy: how often the chosen answer has the higher reward; a tie counts half.
    likelihood_accuracy: how often it has the higher mean log-probability per token.
    chosen_not_less: how often the chosen answer is at least as likely as before training.
    ..._per_token: sum of log-probabilities over sum of tokens.
    """
    if not pairs:
        return {}

    def share(gaps: Sequence[float]) -> float:
        return fmean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in gaps)

    chosen_tokens = sum(pair.chosen_tokens for pair in pairs)
    rejected_tokens = sum(pair.rejected_tokens for pair in pairs)
    per_token = [
        pair.chosen / pair.chosen_tokens - pair.rejected / pair.rejected_tokens for pair in pairs
    ]
    return {
        "loss": fmean(pair.loss for pair in pairs),
        "reward_accuracy": share([pair.margin for pair in pairs]),
        "reward_margin": fmean(pair.margin for pair in pairs),
        "chosen_reward": fmean(pair.chosen_reward for pair in pairs),
        "rejected_reward": fmean(pair.rejected_reward for pair in pairs),
        "chosen_logprob": fmean(pair.chosen for pair in pairs),
        "rejected_logprob": fmean(pair.rejected for pair in pairs),
        "chosen_logprob_per_token": sum(pair.chosen for pair in pairs) / chosen_tokens,
        "rejected_logprob_per_token": sum(pair.rejected for pair in pairs) / rejected_tokens,
        "likelihood_accuracy": share(per_token),
        "chosen_not_less": fmean(pair.chosen >= pair.reference_chosen for pair in pairs),
        "drift": fmean(pair.drift for pair in pairs),
    }


def preference_sections(
    pairs: Sequence[ScoredPair],
    texts: Sequence[tuple[str, str, str, str]],
    *,
    probabilities: bool = True,
) -> list[Section]:
    """The report's parts on preferences.

    `texts` are place, prompt, chosen and rejected of each pair. `probabilities` says whether
    sigmoid(margin) is the probability that the chosen answer is the better one (not so for ipo).
    """
    sections = [lengths_section(pairs)] if pairs else []
    rewards = {
        "chosen": [pair.chosen_reward for pair in pairs],
        "rejected": [pair.rejected_reward for pair in pairs],
    }
    margins = {"margin": [pair.margin for pair in pairs]}
    gains = {
        "chosen": [pair.chosen - pair.reference_chosen for pair in pairs],
        "rejected": [pair.rejected - pair.reference_rejected for pair in pairs],
    }
    sections += [
        histogram_section(rewards, "Rewards", xlabel="reward"),
        histogram_section(
            margins, "Margins", xlabel="reward of chosen - reward of rejected",
            text="Pairs left of 0 are judged the wrong way round.",
        ),
        histogram_section(
            gains, "Likelihood since the start", xlabel="log p - log p of the reference (nats)",
            text="Where the chosen answers lie left of 0, training made them less likely too: the "
            "margin grew because the rejected ones fell faster. dpo.sft_weight holds against it.",
        ),
    ]  # fmt: skip
    if probabilities:
        sure = [1 / (1 + math.exp(-min(abs(pair.margin), 700))) for pair in pairs]
        sections.append(calibration_section(sure, [pair.margin > 0 for pair in pairs]))
        wrong = [
            Mistake(place, prompt, chosen, rejected, confidence)
            for pair, confidence, (place, prompt, chosen, rejected) in zip(
                pairs, sure, texts, strict=True
            )
            if pair.margin < 0
        ]
        sections.append(errors_section(wrong))
    return sections


def lengths_section(pairs: Sequence[ScoredPair]) -> Section:
    """Whether people simply liked the longer answer, and whether the model does."""

    def row(name: str, chosen: Sequence[bool]) -> tuple[str, int, str]:
        return name, sum(chosen), f"{fmean(chosen):.1%}"

    counts: Mapping[str, float] = {
        "chosen": fmean(pair.chosen_tokens for pair in pairs),
        "rejected": fmean(pair.rejected_tokens for pair in pairs),
    }
    longer = [pair for pair in pairs if pair.chosen_tokens != pair.rejected_tokens]
    rows = [
        row("chosen answer is longer", [p.chosen_tokens > p.rejected_tokens for p in pairs]),
        row("both have as many tokens", [p.chosen_tokens == p.rejected_tokens for p in pairs]),
    ]
    if longer:
        wants_long = [(p.margin > 0) == (p.chosen_tokens > p.rejected_tokens) for p in longer]
        rows.append(row("model prefers the longer one (of unequal ones)", wants_long))
    text = (
        f"Tokens per answer: chosen {counts['chosen']:.1f}, rejected {counts['rejected']:.1f}. A "
        "model that only learnt to prefer long answers shows here."
    )
    return Section("Lengths", text, Table(("", "pairs", "share"), rows))
