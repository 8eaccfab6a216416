"""What a report says of answers that rules have checked, and of a model that learnt from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_from_scratch.core.runlog import read_metrics
from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.report_parts import curve_section

# Title, the figures of one picture, and what it says.
CURVES = (
    ("policy loss", ("policy_loss",),
     "Near 0 by construction: the advantages of a group add up to nothing. It says how the step "
     "weighs what is better than average, not how good the model is."),
    ("divergence", ("kl",),
     "How far the model has moved from where it began, in nats per token (estimator k3). A steep "
     "rise with no gain in reward is a model that leaves its language behind."),
    ("entropy", ("entropy",),
     "How undecided the model is, in nats per token. When it reaches 0 all completions of a group "
     "are the same and nothing can be learnt any more."),
    ("shares", ("zero_variance", "clip_fraction", "truncated"),
     "zero_variance: groups in which all are equally good or bad, which teach nothing. "
     "clip_fraction: tokens at which the step had gone far enough. truncated: completions that "
     "were cut off."),
)  # fmt: skip


@dataclass(frozen=True)
class Checked:
    """An answer: what each verifier gave, its length in tokens, and whether it came to its end."""

    text: str
    scores: Mapping[str, float]
    length: int
    ended: bool


def checked_figures(answers: Sequence[Checked], weights: Mapping[str, float]) -> dict[str, float]:
    """Means over answers. `accuracy` is the share to which the first verifier gave full marks."""
    n, first = max(1, len(answers)), next(iter(weights))
    figures = {
        "reward": sum(w * a.scores[name] for a in answers for name, w in weights.items()) / n,
        "accuracy": sum(a.scores[first] >= 1 for a in answers) / n,
        "completion_length": sum(a.length for a in answers) / n,
        "truncated": sum(not a.ended for a in answers) / n,
    }
    if len(weights) > 1:
        figures |= {f"reward_{k}": sum(a.scores[k] for a in answers) / n for k in weights}
    return figures


def verifiers_section(answers: Sequence[Checked], weights: Mapping[str, float]) -> Section:
    """How many answers each verifier was content with, and how many were cut off."""
    n = max(1, len(answers))
    rows = [
        (
            name,
            weight,
            sum(a.scores[name] >= 1 for a in answers),
            sum(a.scores[name] for a in answers) / n,
        )
        for name, weight in weights.items()
    ]
    cut = sum(not a.ended for a in answers)
    return Section(
        "Verifiers",
        f"Greedy answers to {len(answers):,} prompts; {cut:,} of them were cut off before their "
        "end.",
        Table(("verifier", "weight", "full marks", "mean reward"), rows),
    )


def policy_sections(folder: Path) -> list[Section]:
    """The curves of a run that learnt from its own answers, each with what it means."""
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    sections = []
    for title, names, text in CURVES:
        lines = {
            name: [(record["step"], record[name]) for record in records if name in record]
            for name in names
        }
        if any(lines.values()):
            sections.append(curve_section(title, lines, text=text))
    return sections
