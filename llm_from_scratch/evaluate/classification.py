"""How good a classifier or a regression is: counts and ratios, nothing that depends on a model.

Axes: r rows, n labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llm_from_scratch.evaluate.report_parts import calibration_error, reliability

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def confusion(wanted: Sequence[int] | Ints, got: Sequence[int] | Ints, labels: int) -> Ints:
    """(n, n): how many rows of the label of the line were given the label of the column."""
    counts = np.zeros((labels, labels), np.int64)
    np.add.at(counts, (np.asarray(wanted, np.int64), np.asarray(got, np.int64)), 1)
    return counts


def accuracy(counts: Ints) -> float:
    """The share of rows with the right label."""
    return float(np.trace(counts) / max(1, counts.sum()))


def f1_of_each(counts: Ints) -> Floats:
    """(n,): each label's harmonic mean of precision and recall; 0 for one never right."""
    right = np.diag(counts).astype(np.float64)
    given_or_wanted = counts.sum(0) + counts.sum(1)
    return np.divide(2 * right, given_or_wanted, out=np.zeros_like(right), where=right > 0)


def macro_f1(counts: Ints) -> float:
    """The mean of `f1_of_each` over the labels that were wanted or given at least once."""
    present = counts.sum(0) + counts.sum(1) > 0
    return float(f1_of_each(counts)[present].mean()) if present.any() else 0.0


def matthews(counts: Ints) -> float:
    """Matthews' correlation of wanted and given labels, -1 to 1, for any number of labels.

    Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation coefficient".
    0 where only one label is wanted or only one given.
    """
    c = counts.astype(np.float64)
    total, right, wanted, given = c.sum(), np.trace(c), c.sum(1), c.sum(0)
    spread = (total**2 - (given**2).sum()) * (total**2 - (wanted**2).sum())
    if spread <= 0:
        return 0.0
    return float((right * total - given @ wanted) / np.sqrt(spread))


# --- numbers -------------------------------------------------------------------------------------


def pearson(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """The linear correlation; 0 where one of the two does not vary."""
    x, y = (np.asarray(values, np.float64) for values in (first, second))
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else 0.0


def ranks(values: Sequence[float] | Floats) -> Floats:
    """Each value's place in the order, from 1; equal values share the mean of their places."""
    x = np.asarray(values, np.float64)
    _, which, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means: Floats = (last - (counts - 1) / 2)[which]
    return means


def spearman(first: Sequence[float] | Floats, second: Sequence[float] | Floats) -> float:
    """The correlation of the ranks."""
    return pearson(ranks(first), ranks(second))


# --- all of them ---------------------------------------------------------------------------------


def label_figures(
    probabilities: Floats, wanted: Sequence[int] | Ints, positive: int | None = None
) -> dict[str, float]:
    """accuracy, macro_f1, mcc and ece of rows of probabilities (r, n).

    With `positive`, the number of the label that is looked for, also its f1, precision and recall.
    """
    target = np.asarray(wanted, np.int64)
    got = probabilities.argmax(1)
    counts = confusion(target, got, probabilities.shape[1])
    figures = {
        "accuracy": accuracy(counts),
        "macro_f1": macro_f1(counts),
        "mcc": matthews(counts),
        "ece": calibration_error(reliability(probabilities.max(1), got == target)),
    }
    if positive is not None:
        right = float(counts[positive, positive])
        figures["f1"] = float(f1_of_each(counts)[positive])
        figures["precision"] = right / max(1.0, float(counts[:, positive].sum()))
        figures["recall"] = right / max(1.0, float(counts[positive].sum()))
    return figures


def number_figures(got: Sequence[float] | Floats, wanted: Sequence[float] | Floats) -> dict[
    str, float
]:  # fmt: skip
    """pearson, spearman, mean absolute error and root of the mean squared error."""
    error = np.asarray(got, np.float64) - np.asarray(wanted, np.float64)
    return {
        "pearson": pearson(got, wanted),
        "spearman": spearman(got, wanted),
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
    }
