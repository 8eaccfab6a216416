"""What a model says of texts: its labels, numbers, choices, names or missing words.

One question for all kinds of models; the head decides what comes back, as JSON's types:

    labels       {"label", "probability", "probabilities": {label: p}}
    numbers      {"value"}
    choices      {"choice", "text", "probability", "probabilities": [p, ...]}
    several      {"labels": [...], "probabilities": {label: p}}, where each label may hold or not
    names        {"entities": [{"start", "end", "type", "text", "confidence"}]}
    missing      {"words": [[{"word", "probability"}, ...], ...]}, the likeliest for each gap
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRow
from llm_from_scratch.evaluate.classification import label_figures, number_figures
from llm_from_scratch.evaluate.classifier import CHOICE, Line, Question, answer, line_of
from llm_from_scratch.evaluate.prompt_likelihood import PromptClassifier, Shot
from llm_from_scratch.evaluate.tagger import as_tagger
from llm_from_scratch.model.heads import (
    Head,
    MaskedLM,
    MultipleChoice,
    SequenceClassifier,
    TokenClassifier,
)
from llm_from_scratch.text.tokenizer import Tokenizer
from llm_from_scratch.weights.sources import locate

GUESSES = 5  # for each missing word
TEXTS_AT_ONCE = 64
Report = Callable[[int], Any]


class Predictor:
    """A model with its way of answering. `kind` says what comes back (see the head of the file)."""

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str = "") -> None:
        self.model, self.tokenizer = model, tokenizer
        if isinstance(model, PromptClassifier):
            self.kind, self.labels = "labels", tuple(model.labels)
            return
        self.kind = kind_of(model)
        self.labels = tuple(model.head_config.labels)
        if self.kind == "names":
            self.tagger = as_tagger(model, tokenizer, locate(name))
        self.limit = int(model.stack.max_seq_len)

    def check(self, row: Mapping[str, Any]) -> None:
        """`BadRow` for a row that `predict` would end at: no mask token, a prompt that is too long.

        What a head reads is cut instead.
        """
        if isinstance(self.model, PromptClassifier):
            self.model.check(Shot(row["text"], pair=row.get("pair", "")))
        elif self.kind == "missing":
            self._gaps(row["text"])

    def predict(
        self, rows: Sequence[Mapping[str, Any]], report: Report = lambda done: None
    ) -> list[dict[str, Any]]:
        """One answer for each row {"text", "pair", "choices"}, of which only the first must be.

        Rows longer than the context are cut; those that cannot be (see `check`) are a `UserError`.
        `report` is told how many are done.
        """
        if isinstance(self.model, PromptClassifier):
            shots = [Shot(row["text"], pair=row.get("pair", "")) for row in rows]
            found = self.model.predict(shots, report)
            return [self._label(probabilities) for probabilities in found]
        if self.kind == "names":
            return self._names(rows, report)
        if self.kind == "missing":
            return [self._missing(row["text"]) for row in rows]
        several = self.kind == "choices"
        questions = [self._question(row) for row in rows]
        scores = answer(self.model, questions, several=several, report=report)
        if several:
            return [
                choice_answer(score.softmax(-1).tolist(), row["choices"])
                for score, row in zip(scores, rows, strict=True)
            ]
        if self.kind == "numbers":
            return [{"value": float(score[0])} for score in scores]
        if self.kind == "several":
            return [self._several(score.sigmoid().tolist()) for score in scores]
        return [self._label(score.softmax(-1).tolist()) for score in scores]

    def _question(self, row: Mapping[str, Any]) -> Question:
        if self.kind == "choices" and "choices" not in row:
            raise UserError("The model chooses among texts; give the choices with each question.")
        seconds = row["choices"] if self.kind == "choices" else [row.get("pair")]
        lines = [line_of(self.tokenizer, row["text"], second, self.limit) for second in seconds]
        # A tokenizer may find nothing in a text; the model must read something.
        return Question([line if line.ids else Line([0], [0]) for line in lines])

    def _label(self, probabilities: Sequence[float]) -> dict[str, Any]:
        best = int(np.argmax(probabilities))
        return {
            "label": self.labels[best],
            "probability": probabilities[best],
            "probabilities": dict(zip(self.labels, probabilities, strict=True)),
        }

    def _several(self, probabilities: Sequence[float]) -> dict[str, Any]:
        known = dict(zip(self.labels, probabilities, strict=True))
        return {"labels": [label for label, p in known.items() if p > 0.5], "probabilities": known}

    def _names(self, rows: Sequence[Mapping[str, Any]], report: Report) -> list[dict[str, Any]]:
        texts = [row["text"] for row in rows]
        found: list[dict[str, Any]] = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            for entities in self.tagger.find(texts[start : start + TEXTS_AT_ONCE]):
                found.append({"entities": [entity.to_dict() for entity in entities]})
            report(len(found))
        return found

    def _gaps(self, text: str) -> tuple[list[int], list[bool]]:
        """A text as the model reads it, cut to the context, and where in it a word is missing."""
        mask = -1 if self.tokenizer.mask_id is None else self.tokenizer.mask_id
        ids = self.tokenizer.encode_inputs([text], max_length=self.limit, special=True).ids[0]
        if mask in ids:
            return ids, [one == mask for one in ids]
        name = "a mask token" if mask < 0 else str(self.tokenizer.tokens[mask])
        whole = self.tokenizer.encode_inputs([text], special=True).ids[0]
        if mask in whole:
            raise BadRow(
                f"has {len(whole):,} tokens, and its first {name} stands behind the {self.limit:,} "
                "that the model reads; shorten it."
            )
        raise BadRow(f"has no gap for the model to fill; write {name} where a word is missing.")

    @torch.no_grad()
    def _missing(self, text: str) -> dict[str, Any]:
        tokenizer, device = self.tokenizer, next(self.model.parameters()).device
        try:
            found, missing = self._gaps(text)
        except BadRow as error:
            raise UserError(f"The text {text!r:.60} {error}") from error
        ids, gaps = torch.tensor([found], device=device), torch.tensor(missing, device=device)
        scores = self.model.answer(self.model.states(ids, None, None)[0][gaps], None)
        best, which = scores.float().softmax(-1).topk(min(GUESSES, scores.shape[-1]))
        return {
            "words": [
                [
                    {"word": tokenizer.token_text(number).strip(), "probability": p}
                    for number, p in zip(numbers, values, strict=True)
                ]
                for numbers, values in zip(which.tolist(), best.tolist(), strict=True)
            ]
        }


def kind_of(model: Any) -> str:
    """What a model's head answers with; `UserError` for one that says nothing of texts."""
    if isinstance(model, TokenClassifier):
        return "names"
    if isinstance(model, MaskedLM):
        return "missing"
    if isinstance(model, MultipleChoice):
        return "choices"
    if isinstance(model, SequenceClassifier):
        head = model.head_config
        if head.labels == (CHOICE,):
            return "choices"
        if len(head.labels) == 1 or head.problem_type == "regression":
            return "numbers"
        return "several" if head.problem_type == "multi_label_classification" else "labels"
    if isinstance(model, Head):
        raise UserError(
            "The model makes vectors of texts and says nothing of them; train a classifier on it "
            "with scratchlm finetune classify."
        )
    raise UserError(
        "The model has no head that labels texts: name the labels to choose from with --labels "
        "good,bad (a model that writes says which is likelier), or train one with scratchlm "
        "finetune classify."
    )


def choice_answer(probabilities: Sequence[float], choices: Sequence[str]) -> dict[str, Any]:
    best = int(np.argmax(probabilities))
    return {
        "choice": best,
        "text": choices[best],
        "probability": probabilities[best],
        "probabilities": list(probabilities),
    }


def figures_of(
    kind: str,
    labels: Sequence[str],
    answers: Sequence[Mapping[str, Any]],
    wanted: Sequence[str | float | int | None],
) -> dict[str, float]:
    """How good answers are, over the rows where something is wanted that can be; "rows" of them.

    "unknown_labels" counts those that want a label which the model does not have.
    """
    asked = [(one, want) for one, want in zip(answers, wanted, strict=True) if want is not None]
    pairs = [(one, want) for one, want in asked if kind != "labels" or want in labels]
    unknown = {"unknown_labels": len(asked) - len(pairs)} if len(pairs) < len(asked) else {}
    if not pairs:
        return {**unknown}
    found: dict[str, float] = {"rows": len(pairs), **unknown}
    if kind == "numbers":
        got = [float(one["value"]) for one, _ in pairs]
        return found | number_figures(got, [float(want) for _, want in pairs])
    if kind == "choices":
        right = [one["choice"] == want for one, want in pairs]
        return found | {"accuracy": sum(right) / len(right)}
    probabilities = np.array([[*one["probabilities"].values()] for one, _ in pairs])
    numbers = [list(labels).index(str(want)) for _, want in pairs]
    return found | label_figures(probabilities, numbers, 1 if len(labels) == 2 else None)
