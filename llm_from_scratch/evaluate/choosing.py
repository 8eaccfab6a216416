"""What decides between several texts: a reward model, or the answer that stands in each.

For `generate/best_of.py`: `RewardModel` is a scorer for best-of-n, `number_in` and `found_by` read
answers for self-consistency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import Any

from llm_from_scratch.core.errors import UserError, nearest
from llm_from_scratch.evaluate.classifier import Question, answer, line_of
from llm_from_scratch.evaluate.verifiers import DIGITS, Finding, numbers_in
from llm_from_scratch.generate.best_of import Candidate
from llm_from_scratch.model.heads import SequenceClassifier
from llm_from_scratch.text.tokenizer import Tokenizer


class RewardModel:
    """A classifier or a regression that reads prompt and text, and says how good the text is.

    Args:
        model: with one output, that is the reward; with several, the log-probability of `label`.
        tokenizer: the model's own.
        label: the good label's name, where the model has several.
        pair: whether prompt and text are given as a pair, as a model reads them that was trained
            with `--classify.pair_field`; else as one text, one behind the other.

    Prompt and text together are cut to the model's context; of a pair the longer one gives way.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, *, label: str | None = None, pair: bool = False
    ) -> None:
        if not isinstance(model, SequenceClassifier):
            raise UserError(
                "A reward model gives a text a number or a label, and this model has no head that "
                "does: train one with `scratchlm finetune classify`."
            )
        labels = model.head_config.labels
        if len(labels) > 1 and label is None:
            raise UserError(
                f"The reward model has the labels {', '.join(labels)}; say which of them is good."
            )
        if label is not None and len(labels) > 1 and label not in labels:
            raise UserError(
                f"The reward model has no label '{label}'; there are {', '.join(labels)}."
                + nearest(label, labels)
            )
        self.model, self.tokenizer, self.pair = model, tokenizer, pair
        self.place = labels.index(label) if label is not None and len(labels) > 1 else None

    @classmethod
    def open(
        cls, name: str, *, device: str = "auto", label: str | None = None, pair: bool = False
    ) -> RewardModel:
        """The reward model that a MODEL names."""
        from llm_from_scratch.weights.sources import load

        model, tokenizer = load(name, device=device)
        return cls(model, tokenizer, label=label, pair=pair)

    def __call__(self, prompt: str, candidates: Sequence[Candidate]) -> list[float]:
        limit = self.model.config.max_seq_len
        texts = [one.text for one in candidates]
        lines = [
            line_of(self.tokenizer, prompt, text, limit)
            if self.pair
            else line_of(self.tokenizer, prompt + text, None, limit)
            for text in texts
        ]
        scores = answer(self.model, [Question([line]) for line in lines])
        if self.place is None:
            return [float(row[0]) for row in scores]
        return [float(row.log_softmax(-1)[self.place]) for row in scores]


def number_in(text: str) -> str | None:
    """The last number in a text, written plainly: `1,000.50` and `１０００．５` are `1000.5`."""
    numbers = numbers_in(text)
    if not numbers:
        return None
    with localcontext(prec=4 * DIGITS):  # exact: whatever is written in digits ends
        found = Decimal(numbers[-1].numerator) / Decimal(numbers[-1].denominator)
        return format(found.normalize(), "f")


def found_by(pattern: str) -> Callable[[str], str | None]:
    """A function that reads an answer: the last match of a pattern, or of its first group.

    White space around the answer does not count. Raises `UserError` for a broken pattern.
    """
    return Finding(pattern).find
