"""ROUGE against `rouge_score`, BLEU and chrF against sacrebleu, Japanese against sums by hand."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.evaluate import text_metrics as metrics
from llm_from_scratch.evaluate.text_metrics import (
    Rouge,
    exact_match,
    language_of,
    longest_common_subsequence,
    rouge,
    text_metrics,
    words,
)

ORACLE = RougeScorer(["rouge1", "rouge2", "rougeL"])
WORDS = st.lists(
    st.sampled_from(["the", "Cat", "sat,", "don't", "on2", "...", "café"]), max_size=12
)


def figures(scores: Rouge) -> tuple[float, float, float]:
    return scores.rouge1, scores.rouge2, scores.rougeL


def oracle(got: str, wanted: list[str]) -> Rouge:
    scores = ORACLE.score_multi(wanted, got)
    return Rouge(*(scores[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_rouge_is_that_of_the_reference_package(got: list[str], wanted: list[list[str]]) -> None:
    text, references = " ".join(got), [" ".join(one) for one in wanted]
    expected, found = oracle(text, references), rouge(text, references)
    assert figures(found) == pytest.approx(figures(expected), abs=1e-12)


def test_rouge_of_real_answers_is_that_of_the_reference_package(data_dir: Path) -> None:
    path = data_dir / "instruction-data" / "instruction-data-with-response.json"
    for row in json.loads(path.read_text(encoding="utf-8"))[:60]:
        got, wanted = row["model_response"], row["output"]
        expected = figures(oracle(got, [wanted]))
        assert figures(rouge(got, wanted)) == pytest.approx(expected, abs=1e-12)


@given(st.text("abc", max_size=40), st.text("abcd", max_size=70))
def test_the_longest_common_subsequence_is_that_of_the_table(first: str, second: str) -> None:
    row = [0] * (len(second) + 1)
    for a in first:
        before, row = row, [0]
        for place, b in enumerate(second):
            row.append(before[place] + 1 if a == b else max(before[place + 1], row[-1]))
    assert longest_common_subsequence(first, second) == row[-1]


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    got = ["The dog bit the man.", "It was not surprising.", "He had the café, then."]
    first = ["The dog bit the man.", "It was not unexpected.", "He drank the coffee first."]
    second = ["The dog had bit the man.", "No one was surprised.", "Then he had the café."]
    wanted = [list(pair) for pair in zip(first, second, strict=True)]
    found = text_metrics(got, wanted)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match"]
    assert found["bleu"] == sacrebleu.corpus_bleu(got, [first, second]).score
    assert found["chrf"] == sacrebleu.corpus_chrf(got, [first, second]).score
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_fewer_references_count_as_if_they_were_alone() -> None:
    got = ["the cat sat on the mat", "a dog is a good dog"]
    wanted = [["the cat sat on a mat", "a cat was on the mat"], ["the dog is a good one"]]
    columns: list[Any] = [[wanted[0][0], wanted[1][0]], [wanted[0][1], None]]
    expected = sacrebleu.corpus_bleu(got, columns)
    assert text_metrics(got, wanted)["bleu"] == pytest.approx(expected.score)


def test_japanese_words_are_those_of_mecab() -> None:
    assert words("吾輩は猫である。ＡＢＣ　１２", "ja") == [
        "吾輩", "は", "猫", "で", "ある", "abc", "12",
    ]  # fmt: skip
    found = rouge("吾輩は犬である。", "吾輩は猫である", "ja")
    # 吾輩 は 犬 で ある / 吾輩 は 猫 で ある: four of five words, two of four pairs
    assert found == Rouge(0.8, 0.5, 0.8)
    # English words only, there would be nothing to compare.
    assert rouge("吾輩は犬である。", "吾輩は猫である", "en") == Rouge(0, 0, 0)


def test_japanese_bleu_counts_words_of_mecab() -> None:
    got, wanted = ["今日はとても良い天気です。"], ["今日は良い天気です。"]
    found = text_metrics(got, wanted)
    cut = [" ".join(metrics._mecab().words(text)) for text in (got[0], wanted[0])]
    assert cut[0] == "今日 は とても 良い 天気 です 。"
    expected = sacrebleu.corpus_bleu([cut[0]], [[cut[1]]], tokenize="none", force=True)
    assert found["bleu"] == expected.score > 20
    assert found["chrf"] == sacrebleu.corpus_chrf(got, [wanted]).score
    assert text_metrics(wanted, wanted)["bleu"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The cat sat on the mat.", "en"),
        ("吾輩は猫である。名前はまだ無い。", "ja"),
        ("Pythonで書く", "ja"),
        ("今天天气很好", "zh"),
        ("Die Übergröße passt mir nicht.", "other"),
        ("Кошка сидит", "other"),
        ("1234 !", "en"),
    ],
)
def test_the_language_is_told_by_the_script(text: str, language: str) -> None:
    assert language_of([text]) == language


def test_other_languages_keep_their_letters() -> None:
    assert words("L'Été à Łódź", "other") == ["l", "été", "à", "łódź"]
    assert words("今天GPT很好", "zh") == ["今", "天", "gpt", "很", "好"]
    same = "Été à Łódź"
    assert text_metrics([same], [same], metrics=["rouge"])["rouge2"] == 1.0


def test_an_exact_match_overlooks_white_space_and_width() -> None:
    assert exact_match(" ４２\n", "42")
    assert exact_match("b", ["a", "b"])
    assert not exact_match("Paris.", "Paris")


def test_impossible_questions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"metrics has 'rogue'.*Did you mean 'rouge'"):
        text_metrics(["a"], ["a"], metrics=["rogue"])
    with pytest.raises(UserError, match="language is 'jp'; there are auto"):
        text_metrics(["a"], ["a"], language="jp")
    with pytest.raises(UserError, match="1 texts and 2 references"):
        text_metrics(["a"], ["a", "b"])
    with pytest.raises(UserError, match="no reference"):
        text_metrics(["a"], [[]])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'sacrebleu', which is missing: .*scratchlm\[eval\]"):
        text_metrics(["a"], ["a"])
    with pytest.raises(UserError, match=r"'fugashi', which is missing: .*scratchlm\[ja\]"):
        text_metrics(["猫だ"], ["猫だ"], metrics=["rouge"])
