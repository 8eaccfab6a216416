"""What a model writes for given prompts, beside what was wanted: figures, and parts of a report.

For any task whose answer is a text: summaries, headlines, translations, answers of a chat.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from llm_from_scratch.core.runlog import LiveLine
from llm_from_scratch.evaluate.report import Section, Table
from llm_from_scratch.evaluate.report_parts import Mistake, errors_section
from llm_from_scratch.evaluate.text_metrics import METRICS, rouge, text_metrics
from llm_from_scratch.generate.generate import stream
from llm_from_scratch.generate.requests import Writer
from llm_from_scratch.generate.settings import SamplingSettings
from llm_from_scratch.generate.texts import Result
from llm_from_scratch.text.tokenizer import Tokenizer

TOGETHER = 16  # prompts that are answered at once
WORST = 4  # one text in so many, those with the least overlap, is looked at for errors


@dataclass(frozen=True)
class Written:
    """One text of a model.

    `wanted` holds its references, `sureness` is the geometric mean of its tokens' probabilities,
    `tokens` their number, and `cut` tells that the text was not finished when it had to end.
    """

    place: str
    given: str
    wanted: tuple[str, ...]
    got: str
    sureness: float
    tokens: int
    cut: bool


def evenly(count: int, most: int) -> list[int]:
    """The places of at most `most` of `count` things (0: of all), spread evenly."""
    if not most or count <= most:
        return list(range(count))
    return [place * count // most for place in range(most)]


def write_all(
    model: Writer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    line: LiveLine | None = None,
) -> list[Result]:
    """One text for each prompt (token ids), some of them at a time; the model must be in eval mode.

    `settings.n` is 1. With `settings.logprobs` results tell how likely their tokens were.
    """
    found: dict[int, Result] = {}
    for start in range(0, len(prompts), TOGETHER):
        if line is not None:
            line.show(f"Writing: text {start + 1:,} of {len(prompts):,}")
        for piece in stream(model, tokenizer, prompts[start : start + TOGETHER], settings):
            if piece.result is not None:
                found[start + piece.row] = piece.result
    return [found[place] for place in range(len(prompts))]


def sureness(result: Result) -> float:
    """The geometric mean of the probabilities of a text's tokens; 1 for an empty text."""
    told = result.logprobs or []
    return math.exp(sum(one.logprob for one in told) / len(told)) if told else 1.0


def written_figures(
    texts: Sequence[Written], language: str, metrics: Iterable[str] = METRICS
) -> dict[str, float]:
    """`text_metrics` of the texts, and how many of them there are (`written_rows`)."""
    if not texts:
        return {}
    got, wanted = [one.got for one in texts], [one.wanted for one in texts]
    figures = text_metrics(got, wanted, language=language, metrics=metrics)
    return {**figures, "written_rows": len(texts)}


def written_examples(texts: Sequence[Written], most: int = 20) -> list[dict[str, str]]:
    """For people to read: {"place", "given", "wanted", "got"} of texts spread over all of them."""
    return [
        {"place": one.place, "given": one.given, "wanted": " | ".join(one.wanted), "got": one.got}
        for one in (texts[place] for place in evenly(len(texts), most))
    ]


def written_sections(
    texts: Sequence[Written], language: str, metrics: Iterable[str] = METRICS
) -> list[Section]:
    """Lengths; with "rouge" among the metrics also sureness and the surest of the worst texts."""
    if not texts:
        return []
    if "rouge" not in metrics:
        return [lengths_section(texts)]
    overlaps = [rouge(one.got, one.wanted, language).rougeL for one in texts]
    return [
        lengths_section(texts),
        sureness_section(texts, overlaps),
        worst_section(texts, overlaps),
    ]


def lengths_section(texts: Sequence[Written]) -> Section:
    """How long the texts are beside their references."""
    got = [len(one.got) for one in texts]
    wanted = [len(one.wanted[0]) for one in texts]
    cut = sum(one.cut for one in texts)
    rows = [
        (name, min(sizes), median(sizes), round(sum(sizes) / len(sizes), 1), max(sizes))
        for name, sizes in (("wanted", wanted), ("written", got))
    ]
    text = f"Characters of {len(texts):,} texts. {cut:,} of them reached the greatest length "
    text += "before their end; where these are many, allow longer ones."
    table = Table(("", "least", "median", "mean", "greatest"), rows)
    return Section("Lengths of the texts", text, table)


def sureness_section(texts: Sequence[Written], overlaps: Sequence[float]) -> Section:
    """Whether texts that the model is sure of have more in common with what was wanted."""
    order = sorted(range(len(texts)), key=lambda place: -texts[place].sureness)
    parts = [order[len(order) * i // 4 : len(order) * (i + 1) // 4] for i in range(4)]
    names = ("surest quarter", "second", "third", "least sure quarter")
    rows = [
        (
            name,
            len(part),
            sum(texts[place].sureness for place in part) / len(part),
            sum(overlaps[place] for place in part) / len(part),
        )
        for name, part in zip(names, parts, strict=True)
        if part
    ]

    def draw(axes: Any) -> None:
        axes.scatter([one.sureness for one in texts], overlaps, s=14, alpha=0.5)
        axes.set(xlabel="sureness", ylabel="ROUGE-L", xlim=(0, 1.03), ylim=(0, 1.03))
        axes.grid(True)

    text = (
        "Sureness is the geometric mean of the probabilities of a text's tokens. A model that "
        "knows what it knows has its higher dots on the right."
    )
    table = Table(("texts", "number", "sureness", "ROUGE-L"), rows)
    return Section("Sureness and overlap", text, table, draw, "sureness", (4.8, 4.2))


def worst_section(texts: Sequence[Written], overlaps: Sequence[float]) -> Section:
    """Of the texts with the least overlap, those that the model was surest of."""
    order = sorted(range(len(texts)), key=lambda place: overlaps[place])
    worst = [
        Mistake(one.place, one.given, " | ".join(one.wanted), one.got, one.sureness)
        for one in (texts[place] for place in order[: -(-len(texts) // WORST)])
        if one.got not in one.wanted
    ]
    return errors_section(worst, title="Surest of the worst quarter")
