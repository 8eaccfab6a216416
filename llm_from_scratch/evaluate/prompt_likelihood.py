"""Labels without training: which label is the likeliest continuation of a prompt?

A text is put into a template, "A lovely film.\nLabel: good", once with each label; the model that
writes gives each of them a probability (Brown et al. 2020, arXiv:2005.14165). With shots, texts
whose labels are shown before, it sees what is wanted. Some labels are likely whatever the text;
calibration takes that away (Zhao et al. 2021, arXiv:2102.09690).

What all prompts begin with, the shots above all, is read once.

Axes: b rows, t time, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.data.records import BadRow
from llm_from_scratch.model.cache import KVCache, PagePool
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder
from llm_from_scratch.text.inputs import put_around
from llm_from_scratch.text.tokenizer import Tokenizer

TEMPLATE = "{text}\nLabel: {label}"
PAIR_TEMPLATE = "{text}\n{pair}\nLabel: {label}"
BETWEEN = "\n\n"  # shots
NOTHING = ("N/A", "", "[MASK]")  # texts that say nothing, for the calibration
NORMALISE = ("token", "byte", "none")
PAGE = 16  # positions in a page of the cache
TOKENS_AT_ONCE = 4096  # padding included
Ids = list[int]


@dataclass(frozen=True)
class Shot:
    """A text, or a pair, whose label is shown to the model; for a question, without one."""

    text: str
    label: str = ""
    pair: str = ""


@dataclass(frozen=True)
class PromptSettings:
    """How labels are asked for."""

    template: str = TEMPLATE
    """A text with {text}, perhaps {pair}, and {label} at its end."""
    normalise: str = "token"
    """What a label's log-probability is divided by: its tokens, its bytes, or nothing (none)."""
    calibrate: bool = False
    """Take away what the labels are worth when the text says nothing."""

    def __post_init__(self) -> None:
        if self.normalise not in NORMALISE:
            raise UserError(
                f"normalise is '{self.normalise}'; it must be one of {', '.join(NORMALISE)}."
            )
        if "{text}" not in self.template or not self.template.rstrip().endswith("{label}"):
            raise UserError(
                f"The template is {self.template!r}; it needs {{text}}, and {{label}} at its end."
            )


@dataclass(frozen=True)
class _Asked:
    """A row of the model: what it reads, and the tokens at its end that are scored."""

    ids: Ids
    tails: list[Ids]
    """One or more continuations of `ids`, of one token each if there are several."""
    places: list[int]
    """The number of the score that each tail is."""


class PromptClassifier:
    """A model that writes, asked for labels.

    A label may be asked for by other words than its name: "0=bad" is the label 0, written as bad.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        labels: Sequence[str],
        shots: Sequence[Shot] = (),
        settings: PromptSettings | None = None,
    ) -> None:
        if not isinstance(model, Decoder | EncoderDecoder):
            raise UserError(
                "Labels by their likelihood need a model that writes; this one has another head. "
                "Leave --labels out to use its own."
            )
        names = [label.partition("=")[0].strip() for label in labels]
        words = [
            label.partition("=")[2].strip() or name
            for label, name in zip(labels, names, strict=True)
        ]
        distinct = len({*names}) == len({*words}) == len(names)
        if not distinct or len(names) < 2 or not all(names):
            raise UserError("The labels must be different and not empty, at least two.")
        self.settings = settings or PromptSettings()
        self.model: Any = model
        self.tokenizer, self.labels, self.words = tokenizer, names, words
        for number, shot in enumerate(shots, start=1):
            if shot.label not in self.labels:
                raise UserError(
                    f"Shot {number} has the label '{shot.label}', which is none of "
                    f"{', '.join(self.labels)}; mend it, or name it among the labels."
                )
        spoken = dict(zip(names, words, strict=True))
        written = [
            fill(self.settings.template, Shot(shot.text, spoken[shot.label], shot.pair))
            for shot in shots
        ]
        self.before = "".join(text + BETWEEN for text in written)
        self.offsets = torch.zeros(len(self.labels), dtype=torch.float64)
        if self.settings.calibrate:
            empty = torch.tensor(self._scores([Shot(text, pair=text) for text in NOTHING]))
            self.offsets = empty.log_softmax(-1).exp().mean(0).log()

    def predict(
        self, questions: Sequence[Shot], report: Callable[[int], Any] = lambda done: None
    ) -> list[list[float]]:
        """The probability of each label, for each text; over the given labels they sum to 1.

        `report` is told how many rows of the model are done.
        """
        if not questions:
            return []
        scores = torch.tensor(self._scores(questions, report), dtype=torch.float64)
        found: list[list[float]] = (scores.log_softmax(-1) - self.offsets).softmax(-1).tolist()
        return found

    def _scores(
        self, questions: Sequence[Shot], report: Callable[[int], Any] = lambda done: None
    ) -> list[list[float]]:
        """The log-probability of each label after each prompt, divided as the settings say."""
        count = len(self.labels)
        scores = [math.nan] * (len(questions) * count)
        rows: list[_Asked] = []
        for number, question in enumerate(questions):
            try:
                rows += self._rows(question, number * count)
            except BadRow as error:
                raise UserError(f"Text {number + 1} {error}") from error
        for done, (asked, found) in enumerate(self._run(rows), start=1):
            for place, tail, logprob in zip(asked.places, asked.tails, found, strict=True):
                scores[place] = logprob / self._size(self.words[place % count], tail)
            report(done)
        return [scores[start : start + count] for start in range(0, len(scores), count)]

    def _size(self, label: str, tail: Ids) -> int:
        match self.settings.normalise:
            case "token":
                return len(tail)
            case "byte":
                return len(label.encode())
        return 1

    # --- prompts -----------------------------------------------------------------------------

    def check(self, question: Shot) -> None:
        """`BadRow` for a text whose prompt is longer than the model's context."""
        self._rows(question, 0)

    def _rows(self, question: Shot, place: int) -> list[_Asked]:
        """The rows of one prompt: one for all labels where each of them is a single token."""
        ends = self._ends(question)
        beginnings, tails = [ids for ids, _ in ends], [tail for _, tail in ends]
        single = all(len(tail) == 1 for tail in tails)
        if single and all(ids == beginnings[0] for ids in beginnings):
            rows = [_Asked(beginnings[0], tails, [*range(place, place + len(tails))])]
        else:
            rows = [_Asked(ids, [tail], [place + n]) for n, (ids, tail) in enumerate(ends)]
        limit = self._limit()
        longest = max(len(row.ids) + len(row.tails[0]) - 1 for row in rows)
        if longest > limit:
            raise BadRow(
                f"makes a prompt of {longest} tokens, more than the model's {limit}; give fewer "
                "shots or a shorter text."
            )
        return rows

    def _limit(self) -> int:
        config = self.model.config
        stack = config.encoder if isinstance(self.model, EncoderDecoder) else config
        return int(stack.max_seq_len)

    def _ends(self, question: Shot) -> list[tuple[Ids, Ids]]:
        """For each label: what is read, and the tokens that are scored behind it."""
        texts = [
            self.before + fill(self.settings.template, Shot(question.text, word, question.pair))
            for word in self.words
        ]
        head = self.before + fill(self.settings.template, Shot(question.text, "", question.pair))
        tokenizer = self.tokenizer
        if isinstance(self.model, EncoderDecoder):
            source = tokenizer.encode_inputs([head.rstrip()]).ids[0]
            end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
            return [(source, [*tokenizer.target.encode(word), *end]) for word in self.words]
        first = tokenizer.bos_id if put_around(tokenizer)[0] else None
        begin = [] if first is None else [first]
        rows = [[*begin, *ids] for ids in tokenizer.encode_batch([head, *texts])]
        # A label may change how the end of the prompt is cut; what all have in common is given.
        shared = min(common(rows[0], row) for row in rows[1:])
        shared = min(shared, *(len(row) - 1 for row in rows[1:]))
        if shared < 1:
            raise UserError(
                "The prompt begins with the label; put something before it in the template."
            )
        return [(row[:shared], row[shared:]) for row in rows[1:]]

    # --- the model ---------------------------------------------------------------------------

    @torch.no_grad()
    def _run(self, rows: list[_Asked]) -> Iterator[tuple[_Asked, list[float]]]:
        """The log-probability of each tail."""
        if isinstance(self.model, EncoderDecoder):
            for batch in batches(rows, lambda row: len(row.ids) + len(row.tails[0])):
                yield from zip(batch, self._written(batch), strict=True)
            return
        known = rows[0].ids
        for row in rows:
            known = known[: common(known, row.ids)]
        # At least one token of each row is read with it: the first tail stands behind it.
        shared = min(len(known), *(len(row.ids) - 1 for row in rows)) // PAGE * PAGE
        prefix = known[:shared] if len(rows) > 1 else []
        pool, table = self._read(prefix, rows)
        for batch in batches(rows, lambda row: whole_pages(len(row.ids) - len(prefix), row)):
            yield from zip(batch, self._continued(batch, prefix, pool, table), strict=True)

    def _read(self, prefix: Ids, rows: list[_Asked]) -> tuple[PagePool | None, list[int]]:
        """The pages that hold what all rows begin with, in a pool with room for a batch."""
        if not prefix:
            return None, []
        stack, device = self.model.config, self._device
        own = [whole_pages(len(row.ids) - len(prefix), row) // PAGE for row in rows]
        room = max(*own, min(TOKENS_AT_ONCE // PAGE, len(own) * max(own)))
        pages = len(prefix) // PAGE
        pool = PagePool(stack, 1 + pages + room, PAGE, self.model.activation_dtype, device)
        table = [*range(1, 1 + pages)]
        cache = KVCache.over(pool, [table], [0], len(prefix))
        self.model.hidden(torch.tensor([prefix], device=device), cache=cache)
        return pool, table

    def _continued(
        self, batch: list[_Asked], prefix: Ids, pool: PagePool | None, table: list[int]
    ) -> list[list[float]]:
        """Each row: its own tokens behind the prefix, then its tail but for the last token."""
        given = [[*row.ids[len(prefix) :], *row.tails[0][:-1]] for row in batch]
        tokens_bt = padded(given, self._device)
        if pool is None:
            hidden_btm = self.model.hidden(tokens_bt)
        else:
            own = -(-tokens_bt.shape[1] // PAGE)
            begin = 1 + len(table)
            tables = [
                [*table, *range(begin + n * own, begin + (n + 1) * own)] for n in range(len(batch))
            ]
            cache = KVCache.over(pool, tables, [len(prefix)] * len(batch), tokens_bt.shape[1])
            hidden_btm = self.model.hidden(tokens_bt, cache=cache)
        found = []
        for row, hidden_tm, ids in zip(batch, hidden_btm, given, strict=True):
            length = len(row.tails[0])
            states = hidden_tm[len(ids) - length : len(ids)]
            logprobs = self.model.logits(states).float().log_softmax(-1)
            if len(row.tails) > 1:
                found.append([float(logprobs[0, tail[0]]) for tail in row.tails])
            else:
                found.append([pick(logprobs, row.tails[0])])
        return found

    def _written(self, batch: list[_Asked]) -> list[list[float]]:
        """Of an encoder-decoder: the tail is what the decoder writes."""
        model, device = self.model, self._device
        source_bs = padded([row.ids for row in batch], device)
        mask_bs = padded([[1] * len(row.ids) for row in batch], device)
        encoded = model.encoder(source_bs, attention_mask=mask_bs)
        start = model.config.start_id
        longest = [[start, *max(row.tails, key=len)[:-1]] for row in batch]
        hidden_btm = model.hidden(padded(longest, device), encoded, attention_mask=mask_bs)
        found = []
        for row, hidden_tm in zip(batch, hidden_btm, strict=True):
            logprobs = model.logits(hidden_tm[: len(row.tails[0])]).float().log_softmax(-1)
            found.append([pick(logprobs[: len(tail)], tail) for tail in row.tails])
        return found

    @property
    def _device(self) -> torch.device:
        stack = self.model.encoder if isinstance(self.model, EncoderDecoder) else self.model
        device: torch.device = stack.device
        return device


def fill(template: str, shot: Shot) -> str:
    """The template with a text in it; braces in the text mean nothing."""
    values = {"{text}": shot.text, "{pair}": shot.pair, "{label}": shot.label}
    return re.sub(r"\{(?:text|pair|label)\}", lambda found: values[found[0]], template)


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    for at, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return at
    return min(len(first), len(second))


def pick(logprobs_tv: Tensor, tail: Ids) -> float:
    """The log-probability of a continuation."""
    wanted = torch.tensor(tail, device=logprobs_tv.device)
    return float(logprobs_tv.gather(1, wanted[:, None]).double().sum())


def whole_pages(own: int, row: _Asked) -> int:
    """The positions that a row with `own` tokens before its tail takes, in whole pages."""
    return -(-(own + len(row.tails[0])) // PAGE) * PAGE


def padded(rows: list[Ids], device: torch.device) -> Tensor:
    """Rows as one tensor, filled up on the right, where nothing looks."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def batches(rows: list[_Asked], size: Callable[[_Asked], int]) -> Iterator[list[_Asked]]:
    """Rows of like length together, at most `TOKENS_AT_ONCE` with their padding."""
    batch: list[_Asked] = []
    for row in sorted(rows, key=size):
        if batch and (len(batch) + 1) * size(row) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
