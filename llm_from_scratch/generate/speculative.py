"""Speculative decoding: somebody guesses the next tokens, the model checks them all at once.

Reading several tokens costs the model little more than reading one, so every guess that it agrees
with is nearly free. What comes out is exactly what the model alone would have written: the same
tokens at temperature 0, the same distribution otherwise (Leviathan et al., arXiv:2211.17192; Chen
et al., arXiv:2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError
from llm_from_scratch.generate.fast import make_runner
from llm_from_scratch.generate.pages import Pages
from llm_from_scratch.generate.requests import (
    BASE,
    Feed,
    Request,
    Sequence,
    Writer,
    check_numbers,
)
from llm_from_scratch.generate.sampling import Chooser, draw
from llm_from_scratch.model.adapters import adapter_names
from llm_from_scratch.model.cache import PagePool
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.lora import switch_of
from llm_from_scratch.quant import kernels

GUESSES = 5


class Proposer(Protocol):
    """Who guesses. Guesses may be wrong, and there may be none."""

    def check(self, model: Writer) -> None:
        """Raise a `UserError` if it cannot guess for this model."""

    def propose(self, sequences: Many[Sequence]) -> None:
        """Set `guess` (and `guess_odds`, where it was drawn) of sequences that go on."""

    def leave(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended."""


def check_guess(chooser: Chooser, logits_v: Tensor, guess: int, odds_v: Tensor | None) -> int:
    """The guessed token where the model agrees, else another one.

    With p the model's distribution and q that of the guesser, the guess x is taken with
    probability min(1, p(x) / q(x)); otherwise a token is drawn from what p has more than q. The
    two cases together give p. A guess that was not drawn has q(x) = 1.
    """
    if chooser.settings.temperature == 0.0:
        return chooser.choose(logits_v)
    p = chooser.distribution(logits_v).exp()
    if odds_v is None:
        odds_v = torch.zeros_like(p)
        odds_v[guess] = 1.0
    number = torch.rand((), generator=chooser.generator, dtype=torch.float64).item()
    if number * float(odds_v[guess]) < float(p[guess]):
        return guess
    more = (p - odds_v).clamp_(min=0.0)
    if not bool(more.any()):  # p and q agree up to rounding
        more = p
    return int(draw(more.log()[None], [chooser.generator]))


def room_for_guesses(sequence: Sequence, most: int) -> int:
    """How many tokens may be guessed: the model adds one of its own, and texts have an end."""
    if sequence.request.settings.num_beams > 1 or sequence.wants_prompt_logprobs:
        return 0
    return min(most, sequence.end - len(sequence.tokens) - 1)


class Lookup:
    """Guesses that a text repeats itself: what followed the last few tokens before, follows again.

    Costs nothing, and pays where the answer quotes the prompt: code, summaries, corrections
    (prompt lookup decoding).
    """

    def __init__(self, most: int = GUESSES, longest: int = 3) -> None:
        self.most = most
        self.longest = longest
        self._read: dict[Sequence, tuple[int, dict[tuple[int, ...], int]]] = {}

    def check(self, model: Writer) -> None:
        """It can guess for any."""

    def propose(self, sequences: Many[Sequence]) -> None:
        for sequence in sequences:
            tokens = sequence.tokens
            read, after = self._read.get(sequence, (0, {}))
            for end in range(max(read, 1), len(tokens)):  # what ends before `end` is followed by it
                for size in range(1, min(self.longest, end) + 1):
                    after[tuple(tokens[end - size : end])] = end
            self._read[sequence] = (len(tokens), after)
            sequence.guess, sequence.guess_odds = [], None
            room = room_for_guesses(sequence, self.most)
            for size in range(min(self.longest, len(tokens)), 0, -1):
                place = after.get(tuple(tokens[-size:]))
                if place is not None and room > 0:
                    sequence.guess = tokens[place : place + room]
                    break

    def leave(self, sequence: Sequence) -> None:
        self._read.pop(sequence, None)


class Draft:
    """A small model with the same vocabulary writes ahead.

    It keeps a cache of its own with room for `cache_tokens`; a text that finds no room there is
    not guessed for.
    """

    def __init__(
        self, model: Decoder, *, most: int = GUESSES, cache_tokens: int = 8192, page_size: int = 16
    ) -> None:
        if not isinstance(model, Decoder):
            raise UserError("The draft is no decoder, and only these write ahead.")
        self.model = model
        self.most = most
        count = 1 + -(-cache_tokens // page_size)
        self.pool = PagePool(model.config, count, page_size, model.activation_dtype, model.device)
        self.pages = Pages(count, page_size)
        self.runner = make_runner(model, self.pool)
        self.switch = switch_of(model)
        self._twins: dict[Sequence, Sequence] = {}

    def check(self, model: Writer) -> None:
        """Refuse a draft that speaks another language than the model."""
        if not isinstance(model, Decoder):
            raise UserError(
                "A draft can write ahead for a decoder alone, and this model has an encoder, too. "
                "Guess by lookup instead."
            )
        mine, yours = self.model.config.vocab_size, model.config.vocab_size
        if mine != yours:
            raise UserError(
                f"The draft's vocabulary has {mine} tokens, the model's {yours}: a draft must have "
                "the same tokenizer."
            )

    def propose(self, sequences: Many[Sequence]) -> None:
        twins = [(one, twin) for one in sequences if (twin := self._twin(one)) is not None]
        for _ in range(self.most):
            twins = [(one, twin) for one, twin in twins if len(twin.tokens) < twin.end]
            if not twins:
                return
            feeds = [Feed(twin, twin.tokens[twin.cached :], 1) for _, twin in twins]
            logits_nv = self.runner.run(feeds)
            with kernels.pytorch_alone():
                check_numbers(logits_nv, "draft")
                for (one, twin), logits_v in zip(twins, logits_nv, strict=True):
                    self._guess(one, twin, logits_v)

    def _twin(self, sequence: Sequence) -> Sequence | None:
        """The draft's own copy of a text, cut back to what is agreed on, with room for guesses."""
        sequence.guess, sequence.guess_odds = [], None
        room = min(
            room_for_guesses(sequence, self.most),
            self.model.config.max_seq_len - len(sequence.tokens),
        )
        if room <= 0:
            return None
        tokens = list(sequence.tokens)
        twin = self._twins.get(sequence)
        if twin is None:
            twin = Sequence(0, 0, self._asked(sequence.request), tokens, 0, sequence.chooser)
            self._twins[sequence] = twin
        # A guess that was wrong stood where the last token is now, or behind it.
        twin.cached = min(twin.cached, len(tokens) - 1)
        twin.tokens, twin.end = tokens, len(tokens) + room
        twin.chooser = sequence.chooser.copy(sequence.chooser.generator)
        while len(twin.table) * self.pool.page_size < twin.end:
            page = self.pages.take(twin.table[-1] if twin.table else None)
            if page is None:
                self.leave(sequence)
                return None
            twin.table.append(page)
        return twin

    def _asked(self, request: Request) -> Request:
        """The request with an adapter of the draft: the one of that name, or the one that acts."""
        if self.switch is None or request.adapter in adapter_names(self.model):
            return request
        return replace(request, adapter=self.switch.active or BASE)

    def _guess(self, sequence: Sequence, twin: Sequence, logits_v: Tensor) -> None:
        """Let the draft choose as the model would: the same settings, its own logits."""
        twin.cached = len(twin.tokens)
        if twin.chooser.settings.temperature == 0.0:
            token = twin.chooser.choose(logits_v)
        else:
            odds_v = twin.chooser.distribution(logits_v)
            token = int(draw(odds_v[None], [twin.chooser.generator]))
            before = [] if sequence.guess_odds is None else [sequence.guess_odds]
            sequence.guess_odds = torch.cat([*before, odds_v.exp()[None]])
        twin.chooser.accept(token)
        twin.tokens.append(token)
        sequence.guess = [*sequence.guess, token]

    def leave(self, sequence: Sequence) -> None:
        twin = self._twins.pop(sequence, None)
        for page in [] if twin is None else twin.table:
            self.pages.release(page)
