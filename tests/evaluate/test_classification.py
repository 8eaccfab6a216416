"""Metrics equal scikit-learn's and scipy's, and behave at their edges."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from llm_from_scratch.evaluate import classification as c


def some_rows(labels: int, rows: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(rows, labels)) * 1.5
    wanted = generator.integers(0, labels, rows)
    scores[np.arange(rows), wanted] += 1
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return probabilities, wanted


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_labels_as_scikit_learn(labels: int) -> None:
    probabilities, wanted = some_rows(labels)
    got = probabilities.argmax(1)
    found = c.label_figures(probabilities, wanted, positive=1)
    m = sklearn.metrics
    counts = c.confusion(wanted, got, labels)
    assert (counts == m.confusion_matrix(wanted, got)).all()
    assert found["accuracy"] == pytest.approx(m.accuracy_score(wanted, got))
    assert found["macro_f1"] == pytest.approx(m.f1_score(wanted, got, average="macro"))
    assert found["mcc"] == pytest.approx(m.matthews_corrcoef(wanted, got))
    one = m.precision_recall_fscore_support(wanted, got, labels=[1], zero_division=0)
    assert found["precision"] == pytest.approx(one[0][0])
    assert found["recall"] == pytest.approx(one[1][0])
    assert found["f1"] == pytest.approx(one[2][0])


def test_labels_that_are_missing() -> None:
    counts = c.confusion([0, 0, 0], [0, 0, 0], 3)
    assert c.accuracy(counts) == 1
    assert c.macro_f1(counts) == 1  # the two labels that nobody asked for do not count
    assert c.matthews(counts) == 0
    assert c.macro_f1(c.confusion([0, 1], [1, 0], 2)) == 0
    assert c.macro_f1(c.confusion([], [], 2)) == 0
    found = c.label_figures(np.array([[0.9, 0.1]]), [0], positive=1)
    assert (found["f1"], found["precision"], found["recall"]) == (0, 0, 0)


def test_calibration_by_hand() -> None:
    probabilities = np.array([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55], [0.55, 0.45], [1.0, 0.0]])
    wanted = [0, 1, 1, 0, 0]
    error = (2 * 0.45 + 3 * abs((0.95 + 0.95 + 1) / 3 - 2 / 3)) / 5
    assert c.label_figures(probabilities, wanted)["ece"] == pytest.approx(error)


def test_numbers_as_scipy() -> None:
    generator = np.random.default_rng(1)
    x = generator.integers(0, 9, 80) / 2.0  # many ties
    y = x + generator.normal(size=80)
    found = c.number_figures(x, y)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(x, y)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(x, y)[0])
    assert found["mae"] == pytest.approx(np.abs(x - y).mean())
    assert found["rmse"] == pytest.approx(sklearn.metrics.root_mean_squared_error(y, x))
    assert (c.ranks(x) == scipy.stats.rankdata(x)).all()


def test_numbers_that_do_not_vary() -> None:
    assert c.pearson([1.0, 1.0], [0.0, 2.0]) == 0
    assert c.spearman([1.0], [2.0]) == 0
