"""What becomes of the logits: how the texts of one request grow, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from llm_from_scratch.generate.requests import NewToken, Request, Sequence, obey
from llm_from_scratch.generate.sampling import (
    Chooser,
    TokenLogprobs,
    make_generator,
    top_logprobs,
    top_logprobs_of_all,
)
from llm_from_scratch.generate.speculative import check_guess

if TYPE_CHECKING:
    from llm_from_scratch.generate.engine import Engine

Rows = list[tuple[Sequence, Tensor, list[int]]]  # logits (want, vocab) and their argmax


class Run:
    """The texts of a request that are not finished. This is the way of most: each by itself."""

    def __init__(self, engine: Engine, number: int, request: Request, beginning: list[int]) -> None:
        self.engine = engine
        self.number = number
        self.request = request
        end = min(len(beginning) + request.settings.max_new_tokens, engine.room)
        choosers = [self._chooser(choice, beginning) for choice in range(self._texts())]
        self.sequences = [
            Sequence(number, choice, request, list(beginning), end, chooser)
            for choice, chooser in enumerate(choosers)
        ]

    def _texts(self) -> int:
        """How many sequences begin."""
        return self.request.settings.n

    def _chooser(self, choice: int, beginning: list[int]) -> Chooser:
        settings, constraint = self.request.settings, self.request.constraint
        seed = None if settings.seed is None else (settings.seed + choice) % 2**63
        own = None if constraint is None else constraint.copy()
        return Chooser(settings, make_generator(seed), beginning, own)

    def may_begin(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence may be let in."""
        return True

    def ready(self, sequence: Sequence) -> bool:
        """Whether a running sequence may go through the model in this step."""
        return True

    def company(self, sequence: Sequence) -> list[Sequence]:
        """Those who come and go with it, itself included."""
        return [sequence]

    def take(self, rows: Rows) -> list[NewToken]:
        """Choose what comes next, given the logits of a step."""
        whole: Rows = []
        for sequence, logits, best in rows:
            if sequence.wants_prompt_logprobs:
                self._listen(sequence, logits)
                logits, best = logits[-1:], best[-1:]
            if sequence.pending <= 0:
                whole.append((sequence, logits, best))
        return self._advance(whole)

    def _advance(self, rows: Rows) -> list[NewToken]:
        """Choose what comes next of texts that were read to their end."""
        raise NotImplementedError

    def _listen(self, sequence: Sequence, logits: Tensor) -> None:
        """Keep what the model thought of the prompt's tokens."""
        k = self.request.settings.prompt_logprobs
        assert k is not None and sequence.prompt_logprobs is not None
        first = sequence.cached - len(logits) + 1
        tokens = sequence.tokens[first : sequence.cached + 1]
        # Whoever was sent back reads the prompt again.
        sequence.prompt_logprobs[first - 1 :] = top_logprobs_of_all(
            logits[: len(tokens)], k, tokens
        )

    def reason(self, chooser: Chooser, token: int, length: int, end: int) -> str | None:
        """Why a text of now `length` tokens ends with `token`; None if it goes on."""
        pair, constraint = self.engine.pair, chooser.constraint
        made_to_end = length >= end and pair is not None and pair.end_id is not None
        if token in self.request.end_ids and not made_to_end:
            return "stop"
        if constraint is not None and constraint.finished:
            return "stop" if constraint.complete else "length"  # it got stuck: the text is cut
        return "length" if length >= end else None


class Sampling(Run):
    """One or several texts for a prompt, each drawn by itself."""

    def may_begin(self, sequence: Sequence) -> bool:
        """The first text reads the prompt; the others then find it in the first one's pages."""
        first = self.sequences[0]
        shares = self.engine.reuse_prefixes and first.given > self.engine.pages.page_size
        return sequence is first or not shares or first.cached >= first.given

    def _advance(self, rows: Rows) -> list[NewToken]:
        return [new for row in rows for new in self._write(*row)]

    def _write(self, sequence: Sequence, logits: Tensor, best: list[int]) -> Iterator[NewToken]:
        """Add the next token, or as many as were guessed and found right, and one more."""
        said = None if len(sequence.tokens) > sequence.given else sequence.prompt_logprobs
        guess, odds = sequence.guess, sequence.guess_odds
        sequence.guess, sequence.guess_odds = [], None
        sequence.cached = len(sequence.tokens)  # of the guess nothing is certain yet
        reason = None
        for place in range(len(guess) + 1):
            row = logits[place]
            if self.engine.pair is not None:
                row = obey(self.engine.pair, sequence, row)
            if sequence.chooser.plain_greedy and self.engine.pair is None:
                token = best[place]
            elif place < len(guess):
                token = check_guess(
                    sequence.chooser, row, guess[place], None if odds is None else odds[place]
                )
            else:
                token = sequence.chooser.choose(row)
            sequence.chooser.accept(token)
            sequence.tokens.append(token)
            length = len(sequence.tokens)
            reason = self.reason(sequence.chooser, token, length, sequence.end)
            heard = self._logprobs(logits[place], token)
            yield NewToken(self.number, sequence.choice, token, reason, heard, said)
            said = None
            if reason is not None or (place < len(guess) and token != guess[place]):
                break
        sequence.cached = len(sequence.tokens) - 1
        if reason is not None:
            self.engine.finish(sequence)

    def _logprobs(self, row: Tensor, token: int) -> TokenLogprobs | None:
        k = self.request.settings.logprobs
        return None if k is None else top_logprobs(row, k, token)
