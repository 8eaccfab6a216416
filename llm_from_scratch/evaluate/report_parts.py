"""The parts that reports of many kinds have in common, each a `Section`.

counts_section      how many rows have which label
curves_sections     what was logged while training: the loss and every validation metric
confusion_section   what was taken for what
calibration_section whether 80 % sure is right in 80 % of the cases
errors_section      the errors that the model was surest of
scatter_section     wanted against got, for numbers
histogram_section   how values are spread: margins, lengths, rewards
examples_section    the same rows before and after training
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_from_scratch.core.runlog import read_metrics
from llm_from_scratch.evaluate.report import INK, Section, Table

SHOWN_LABELS = 40  # a larger confusion matrix is not drawn; its commonest errors are listed
SMOOTH = 25  # the training loss is smoothed over about so many steps


def counts_section(
    counts: Mapping[str, Mapping[str, int]], title: str = "Labels", text: str = ""
) -> Section:
    """How many rows of each part ("train", "val", "test") have which label.

    `counts` is by part, then by label. The table has a row per label (the commonest of the first
    part first) with its share in that part, and a last row with the sums.
    """
    parts = [part for part in counts if counts[part]]
    labels = sorted(
        {label for part in parts for label in counts[part]},
        key=lambda label: tuple(-counts[part].get(label, 0) for part in parts),
    )
    total = sum(counts[parts[0]].values()) if parts else 0
    rows: list[Sequence[Any]] = [
        (
            label,
            *(counts[part].get(label, 0) for part in parts),
            f"{counts[parts[0]].get(label, 0) / max(1, total):.1%}",
        )
        for label in labels
    ]
    rows.append(("all", *(sum(counts[part].values()) for part in parts), "100.0%"))
    header = ("label", *parts, f"share of {parts[0]}" if parts else "share")
    return Section(title, text, Table(header, rows))


def curves_sections(folder: Path) -> list[Section]:
    """The curves of a run folder's metrics.jsonl: the loss, then each other validation metric."""
    records = read_metrics(folder)
    names = dict.fromkeys(name for record in records for name in record)
    sections = [Section("Loss", draw=_loss_drawer(records), name="loss")]
    for name in names:
        if name.startswith("val_") and name != "val_loss":
            plain = name.removeprefix("val_")
            lines = {"validation": _points(records, name)}
            if plain in names:
                lines = {"training": _points(records, plain), **lines}
            sections.append(curve_section(plain.replace("_", " "), lines, name=plain))
    return sections


def curve_section(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    text: str = "",
    xlabel: str = "step",
    name: str = "",
) -> Section:
    """Lines by name, each a list of (x, y); single points are marked."""

    def draw(axes: Any) -> None:
        for label, points in lines.items():
            if points:
                xs, ys = zip(*points, strict=True)
                marker = "o" if len(points) < 30 else None
                axes.plot(xs, ys, marker=marker, ms=4, linewidth=1.6, label=label)
        axes.set(xlabel=xlabel, ylabel=title)
        axes.grid(True)
        if len(lines) > 1:
            axes.legend()

    return Section(title[:1].upper() + title[1:], text, draw=draw, name=name or title)


def _points(records: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    return [(x, y) for x, y in points if isinstance(y, int | float) and math.isfinite(y)]


def _loss_drawer(records: Sequence[dict[str, Any]]) -> Any:
    train, val = _points(records, "loss"), _points(records, "val_loss")

    def draw(axes: Any) -> None:
        if train:
            steps, losses = zip(*train, strict=True)
            axes.plot(steps, losses, linewidth=0.6, alpha=0.45, label="training, each step")
            smooth, mean = [], 0.0
            for number, loss in enumerate(losses):  # a plain mean at first
                mean += (loss - mean) / min(number + 1, SMOOTH)
                smooth.append(mean)
            axes.plot(steps, smooth, color="C0", linewidth=1.8, label="training, smoothed")
        if val:
            steps, losses = zip(*val, strict=True)
            axes.plot(steps, losses, "o-", color="C1", linewidth=1.8, ms=4, label="validation")
        axes.set(xlabel="step", ylabel="loss")
        axes.grid(True)
        if train or val:
            axes.legend()

    return draw


# --- classes -------------------------------------------------------------------------------------


def confusion_section(
    labels: Sequence[str],
    matrix: Sequence[Sequence[int]] | npt.NDArray[Any],
    title: str = "Confusion matrix",
) -> Section:
    """Which label was taken for which: `matrix[wanted][got]` counts, both in the order of `labels`.

    Up to 40 labels are drawn; the table lists the commonest confusions.
    """
    counts = np.asarray(matrix, dtype=np.int64)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(f"{counts.shape} counts for {len(labels)} labels")
    wrong = [
        (labels[i], labels[j], int(counts[i, j]), f"{counts[i, j] / counts[i].sum():.1%}")
        for i, j in np.argwhere(counts > 0).tolist()
        if i != j
    ]
    wrong.sort(key=lambda row: -row[2])
    table = Table(("wanted", "taken for", "rows", "share of wanted"), wrong[:20]) if wrong else None
    text = "Rows: the label that was wanted; columns: what the model said."
    if len(labels) > SHOWN_LABELS:
        return Section(title, f"{len(labels)} labels; the commonest confusions.", table)
    side = 2.2 + 0.42 * len(labels)
    size = (side + 1.2, side)
    return Section(title, text, table, _confusion_drawer(labels, counts), "confusion", size)


def _confusion_drawer(labels: Sequence[str], counts: npt.NDArray[np.int64]) -> Any:
    def draw(axes: Any) -> None:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1.2, edgecolors=INK, linewidth=0.3)
        for i in range(len(labels)):
            for j in range(len(labels)):
                if counts[i, j]:
                    colour = "#ffffff" if shares[i, j] > 0.55 else "#1c2128"
                    axes.text(
                        j + 0.5, i + 0.5, f"{counts[i, j]}", ha="center", va="center",
                        color=colour, fontsize=8 if len(labels) > 12 else 10,
                    )  # fmt: skip
        short = [label if len(label) <= 18 else f"{label[:17]}…" for label in labels]
        ticks = np.arange(len(labels)) + 0.5
        axes.set_xticks(ticks, short, rotation=0 if len(labels) < 4 else 60, ha="center")
        axes.set_yticks(ticks, short)
        axes.set(xlabel="said", ylabel="wanted", aspect="equal")
        axes.invert_yaxis()
        axes.tick_params(length=0)

    return draw


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: how many, how sure on average, how often right."""

    count: int
    confidence: float
    accuracy: float


def reliability(
    confidences: Sequence[float] | npt.NDArray[Any],
    correct: Sequence[bool] | npt.NDArray[Any],
    bins: int = 15,
) -> list[Bin]:
    """Answers in bins of equal width by their confidence, empty ones left out."""
    sure, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    places = np.minimum((sure * bins).astype(np.int64), bins - 1)
    found = []
    for number in range(bins):
        inside = places == number
        if inside.any():
            found.append(
                Bin(int(inside.sum()), float(sure[inside].mean()), float(right[inside].mean()))
            )
    return found


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error (Guo et al. 2017): the mean of |confidence - accuracy|."""
    total = sum(one.count for one in bins)
    return sum(one.count * abs(one.confidence - one.accuracy) for one in bins) / max(1, total)


def calibration_section(
    confidences: Sequence[float] | npt.NDArray[Any],
    correct: Sequence[bool] | npt.NDArray[Any],
    bins: int = 15,
    title: str = "Calibration",
) -> Section:
    """A reliability diagram: for answers of each confidence, how many were right."""
    found = reliability(confidences, correct, bins)

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=INK, alpha=0.4, linewidth=1, linestyle="--")
        most = max((one.count for one in found), default=1)
        axes.scatter(
            [one.confidence for one in found], [one.accuracy for one in found],
            s=[20 + 260 * one.count / most for one in found], alpha=0.55, color="C0", zorder=3,
        )  # fmt: skip
        axes.plot([one.confidence for one in found], [one.accuracy for one in found], color="C0")
        axes.set(xlabel="confidence", ylabel="share that is right")
        axes.set(xlim=(0, 1.03), ylim=(0, 1.03))
        axes.grid(True)

    text = (
        f"Expected calibration error {calibration_error(found):.4f} in {bins} bins. A dot below "
        "the dashed line: surer than right; its size says how many answers it stands for."
    )
    return Section(title, text, draw=draw, name=title, size=(4.8, 4.2))


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, for people to read."""

    place: str
    text: str
    wanted: str
    got: str
    confidence: float


def errors_section(
    mistakes: Sequence[Mistake], most: int = 20, title: str = "Most confident errors"
) -> Section:
    """The wrong answers that the model was surest of; often it is the label that is wrong."""
    surest = sorted(mistakes, key=lambda one: -one.confidence)[:most]
    rows = [(one.place, one.text, one.wanted, one.got, one.confidence) for one in surest]
    text = f"{len(mistakes):,} error{'' if len(mistakes) == 1 else 's'}"
    text += f", the first {most}." if len(mistakes) > most else "."
    header = ("row", "text", "wanted", "got", "confidence")
    return Section(title, text, Table(header, rows) if rows else None)


# --- numbers and texts ---------------------------------------------------------------------------


def scatter_section(
    wanted: Sequence[float], got: Sequence[float], title: str = "Wanted and got", text: str = ""
) -> Section:
    """Numbers that were wanted (x) against those that came (y)."""

    def draw(axes: Any) -> None:
        low, high = min([*wanted, *got], default=0.0), max([*wanted, *got], default=1.0)
        axes.plot([low, high], [low, high], color=INK, alpha=0.4, linewidth=1, linestyle="--")
        axes.scatter(wanted, got, s=8, alpha=0.4)
        axes.set(xlabel="wanted", ylabel="got")
        axes.grid(True)

    return Section(title, text, draw=draw, name=title, size=(4.8, 4.2))


def histogram_section(
    series: Mapping[str, Sequence[float]],
    title: str,
    *,
    xlabel: str = "",
    text: str = "",
    bins: int = 30,
) -> Section:
    """How values are spread, one colour per series ("before", "after"), in shared bins."""
    finite = {name: [v for v in values if math.isfinite(v)] for name, values in series.items()}
    every = [value for values in finite.values() for value in values]

    def draw(axes: Any) -> None:
        edges = np.histogram_bin_edges(every, bins) if every else np.array([0.0, 1.0])
        for name, values in finite.items():
            axes.hist(values, edges.tolist(), alpha=0.55, label=name)
        axes.set(xlabel=xlabel or title, ylabel="rows")
        if len(finite) > 1:
            axes.legend()

    rows = [
        (name, len(v), float(np.mean(v)), float(np.median(v)), min(v), max(v))
        for name, v in finite.items()
        if v
    ]
    table = Table(("", "rows", "mean", "median", "least", "greatest"), rows) if rows else None
    return Section(title, text, table, draw, title)


def examples_section(
    before: Sequence[Mapping[str, str]], after: Sequence[Mapping[str, str]], title: str = "Examples"
) -> Section:
    """The same rows before and after training: {"place", "given", "wanted", "got"} each."""
    earlier = {example["place"]: example["got"] for example in before}
    rows: list[Sequence[Any]]
    if earlier:
        header = ["row", "given", "wanted", "before", "after"]
        rows = [
            (e["place"], e["given"], e["wanted"], earlier.get(e["place"], ""), e["got"])
            for e in after
        ]
    else:
        header = ["row", "given", "wanted", "got"]
        rows = [(e["place"], e["given"], e["wanted"], e["got"]) for e in after]
    return Section(title, table=Table(header, rows))
