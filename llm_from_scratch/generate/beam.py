"""Beam search: keep the few likeliest beginnings, and at the end the likeliest whole text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.requests import NewToken, Request, Sequence, obey
from llm_from_scratch.generate.runs import Rows, Run
from llm_from_scratch.generate.sampling import Chooser, TokenLogprobs, top_logprobs

if TYPE_CHECKING:
    from llm_from_scratch.generate.engine import Engine

Said = tuple[TokenLogprobs, ...]  # what was thought of each token


@dataclass(frozen=True)
class _Beam:
    """A text one token longer than `parent`; `score` is the sum of its log-probabilities."""

    parent: Sequence
    tokens: list[int]
    chooser: Chooser
    score: float
    logprobs: Said


@dataclass(frozen=True)
class _Whole:
    """A finished text; `value` is its log-probability per token ** length_penalty."""

    value: float
    tokens: list[int]
    reason: str
    logprobs: Said


class Beams(Run):
    """`num_beams` texts side by side, of which the `n` likeliest are the answer.

    A text's value is the sum of its tokens' log-probabilities, divided by their number to the power
    of `length_penalty` (Wu et al., arXiv:1609.08144, in the simple form of `transformers`).
    Above 0 longer texts are favoured, as log-probabilities are negative. The search ends when no
    text under way can become better than the worst of the finished ones, as far as can be told
    from its value now. There may be fewer than `n` texts where a constraint allows no more.
    """

    def __init__(self, engine: Engine, number: int, request: Request, beginning: list[int]) -> None:
        super().__init__(engine, number, request, beginning)
        settings = request.settings
        self.width = settings.num_beams
        self.penalty = settings.length_penalty
        self.first = self.sequences[0]
        # All beams must fit into the cache at once, or they could never go on.
        size = engine.pages.page_size
        room = (engine.pages.count - 1) // self.width * size
        if len(beginning) > room:
            raise UserError(
                f"The prompt has {len(beginning)} tokens, but the cache has room for {room} in "
                f"each of {self.width} beams. Give fewer beams or more room (cache_tokens)."
            )
        self.first.end = min(self.first.end, room)
        # Beside each text under way: its score, and what was thought of its tokens.
        self.beams: dict[Sequence, tuple[float, Said]] = {self.first: (0.0, ())}
        # The model's logits for those whose company is still reading.
        self.found: dict[Sequence, Tensor] = {}
        self.whole: list[_Whole] = []
        self._twins = 0

    def _texts(self) -> int:
        return 1

    def company(self, sequence: Sequence) -> list[Sequence]:
        """Beams are compared, so they come, go and wait together."""
        return list(self.sequences)

    def ready(self, sequence: Sequence) -> bool:
        """A beam waits for those that have more to read, and for those that read in pieces."""
        if sequence.pending == 1:
            return all(one.pending <= 1 for one in self.sequences)
        return sequence.pending > 1

    def _advance(self, rows: Rows) -> list[NewToken]:
        self.found |= {sequence: logits[-1] for sequence, logits, _ in rows}
        if len(self.found) < len(self.sequences):
            return []
        kept: list[_Beam] = []
        for rank, beam in enumerate(self._candidates()):
            length = len(beam.tokens)
            reason = self.reason(beam.chooser, beam.tokens[-1], length, beam.parent.end)
            if reason is None:
                kept.append(beam)
            elif rank < self.width:
                value = beam.score / (length - beam.parent.given) ** self.penalty
                new = beam.tokens[beam.parent.given :]
                self.whole.append(_Whole(value, new, reason, beam.logprobs))
        self.whole = sorted(self.whole, key=lambda one: -one.value)[: self.width]
        self.found = {}
        kept = kept[: self.width]
        if not kept or self._is_over(kept[0]):
            return self._answer()
        self._follow(kept)
        return []

    def _candidates(self) -> list[_Beam]:
        """The likeliest ways to go on, best first.

        Enough that even if every end token is among a beam's likeliest, one way goes on.
        """
        scores = []
        for sequence, logits_v in self.found.items():
            logprobs_v = logits_v.log_softmax(-1)
            if self.engine.pair is not None:
                logprobs_v = obey(self.engine.pair, sequence, logprobs_v)
            scores.append(self.beams[sequence][0] + sequence.chooser.scores(logprobs_v))
        table = torch.stack(scores)
        texts = list(self.found)
        most = max(2, 1 + len(self.request.end_ids)) * self.width
        best = table.flatten().topk(min(most, table.numel()))
        k = self.request.settings.logprobs
        found = []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if score == -math.inf:
                break
            parent = texts[place // table.shape[1]]
            token = place % table.shape[1]
            chooser = parent.chooser.copy(parent.chooser.generator)
            chooser.accept(token)
            said = self.beams[parent][1]
            if k is not None:
                said = (*said, top_logprobs(self.found[parent], k, token))
            found.append(_Beam(parent, [*parent.tokens, token], chooser, score, said))
        return found

    def _follow(self, kept: list[_Beam]) -> None:
        """Let the sequences become the beams that were kept; forks share their parents' pages."""
        parents = {beam.parent for beam in kept}
        for sequence in list(self.sequences):
            if sequence not in parents:
                self.engine.finish(sequence)
        self.beams = {}
        forks = []
        for beam in kept:
            child = beam.parent
            if child in self.beams:
                self._twins += 1
                child = Sequence(
                    self.number, self._twins, self.request, [], child.end, beam.chooser, child.given
                )
                forks.append((beam.parent, child))
            self.beams[child] = (beam.score, beam.logprobs)
            child.tokens, child.chooser = beam.tokens, beam.chooser
        for parent, child in forks:
            self.engine.fork(parent, child)

    def _is_over(self, best: _Beam) -> bool:
        """Whether nothing under way is still better than the worst finished text."""
        length = len(best.tokens) - best.parent.given
        full = len(self.whole) >= self.width
        return full and best.score / length**self.penalty <= self.whole[-1].value

    def _answer(self) -> list[NewToken]:
        """The n likeliest whole texts, all at once."""
        for sequence in list(self.sequences):
            self.engine.finish(sequence)
        new = []
        for choice, text in enumerate(self.whole[: self.request.settings.n]):
            heard = None if choice else self.first.prompt_logprobs
            for place, token in enumerate(text.tokens):
                reason = text.reason if place + 1 == len(text.tokens) else None
                said = text.logprobs[place] if text.logprobs else None
                new.append(NewToken(self.number, choice, token, reason, said, heard))
                heard = None
        return new
