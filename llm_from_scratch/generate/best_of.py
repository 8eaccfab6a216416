"""Several texts for one prompt, and one answer out of them: best-of-n and self-consistency.

    best-of-n           draw n texts, score each, keep the best
    self-consistency    draw n texts, read the answer out of each, take the commonest

A scorer is a function of the prompt and all candidates; `Likelihood` asks the model that wrote
them, `each` makes one of a function of your own, and `evaluate/choosing.py` has reward models. Both
ways spend computing instead of training: n texts are written instead of one. Papers: Stiennon et
al., arXiv:2009.01325 (best-of-n); Wang et al., arXiv:2203.11171 (self-consistency).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llm_from_scratch.core.errors import RunError, UserError, shown
from llm_from_scratch.generate.chat import Chat, protocol_reason
from llm_from_scratch.generate.settings import SamplingSettings

if TYPE_CHECKING:
    from llm_from_scratch.generate.requests import Writer
    from llm_from_scratch.text.chat import Message
    from llm_from_scratch.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """One of several texts.

    `logprob` is the sum of the natural log-probabilities of its `tokens` tokens under the model
    that wrote it (NaN where that was not told), `score` what a scorer gave it.
    """

    text: str
    finish_reason: str = "stop"
    tokens: int = 0
    logprob: float = math.nan
    score: float = math.nan


Scorer = Callable[[str, Sequence[Candidate]], Sequence[float]]
Extract = Callable[[str], str | None]


# --- drawing -------------------------------------------------------------------------------------


def draw(
    model: Writer, tokenizer: Tokenizer, prompt: str | Sequence[int], n: int, **settings: Any
) -> list[Candidate]:
    """n continuations of a prompt, in the order in which they were drawn.

    Takes the fields of `SamplingSettings` and the `options` of `complete`; with a `seed` it gives
    the same texts again.
    """
    from llm_from_scratch.generate.generate import complete

    check_drawing(n, settings)
    settings = {**settings, "n": n, "logprobs": settings.get("logprobs") or 0}
    found = complete(model, tokenizer, [prompt], **settings)
    return [
        Candidate(
            one.text, protocol_reason(one.finish_reason), len(one.tokens),
            sum(told.logprob for told in one.logprobs or ()),
        )
        for one in found
    ]  # fmt: skip


def draw_replies(
    chat: Chat, messages: Sequence[Message], n: int, **settings: Any
) -> list[Candidate]:
    """n answers to one conversation, of a model of this machine or at an address."""
    check_drawing(n, settings)
    settings = {**settings, "logprobs": settings.get("logprobs") or 0}
    found = []
    for reply in chat.replies([messages] * n, **settings):
        told = None if reply.logprobs is None else [one.logprob for one in reply.logprobs]
        count = reply.usage.completion_tokens if reply.usage else len(told or ())
        total = math.nan if told is None else sum(told)
        found.append(Candidate(reply.text, reply.finish_reason, count, total))
    return found


def check_drawing(n: int, settings: dict[str, Any]) -> None:
    """`UserError` where n texts cannot be drawn, or would all be the same."""
    if n < 2:
        raise UserError(f"Of {n} texts none can be chosen; draw at least 2.")
    if settings.get("temperature", SamplingSettings.temperature) == 0:
        raise UserError(
            f"At temperature 0 all {n} texts are the same, and there is nothing to choose from; "
            "set a temperature above 0."
        )
    if settings.get("num_beams", 1) > 1:
        raise UserError("Beam search draws nothing to choose from; leave num_beams out.")


# --- best of n -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Likelihood:
    """How likely the writing model finds its text: the sum of its tokens' log-probabilities, over
    their number to the power of `length_penalty` (1: the mean, 0: the sum, which favours short
    texts). An empty text comes last."""

    length_penalty: float = 1.0

    def __call__(self, prompt: str, candidates: Sequence[Candidate]) -> list[float]:
        if any(math.isnan(one.logprob) for one in candidates):
            raise UserError(
                "How likely these texts are was not told with them (some servers give no "
                "logprobs); choose by something else."
            )
        return [
            one.logprob / one.tokens**self.length_penalty if one.tokens else -math.inf
            for one in candidates
        ]


def each(function: Callable[[str, str], float]) -> Scorer:
    """A scorer of a function of your own: (prompt, text) -> how good, more is better."""
    return lambda prompt, candidates: [function(prompt, one.text) for one in candidates]


def ranked(prompt: str, candidates: Sequence[Candidate], scorer: Scorer) -> list[Candidate]:
    """The candidates with their scores, best first; of equal ones the one that was drawn first.

    Raises `RunError` for a score that is no number.
    """
    scores = [float(score) for score in scorer(prompt, candidates)]
    if len(scores) != len(candidates):
        raise RunError(f"The scorer gave {len(scores)} scores for {len(candidates)} texts.")
    for score, one in zip(scores, candidates, strict=True):
        if math.isnan(score):
            raise RunError(f"The scorer gave no number (NaN) for {shown(one.text)}.")
    scored = [replace(one, score=s) for one, s in zip(candidates, scores, strict=True)]
    return sorted(scored, key=lambda one: -one.score)


def best_of(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    n: int,
    scorer: Scorer | None = None,
    **settings: Any,
) -> Candidate:
    """The best of n continuations of a prompt; by default the likeliest per token.

    >>> best_of(model, tokenizer, "Once upon a time", 8, each(lambda _, text: -len(text)), seed=1)
    """
    candidates = draw(model, tokenizer, prompt, n, **settings)
    return ranked(prompt, candidates, scorer or Likelihood())[0]


# --- self-consistency ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Consensus:
    """What most texts arrive at.

    Attributes:
        answer: the answer; None where no text has one.
        share: the part of all texts that have this answer, from 0 to 1.
        votes: how many texts have each answer, most first.
        without: how many texts have none.
        candidates: all texts; the first with the winning answer stands first, its score the share.
    """

    answer: str | None
    share: float
    votes: dict[str, int]
    without: int
    candidates: list[Candidate]


def consensus(candidates: Sequence[Candidate], extract: Extract) -> Consensus:
    """The answer that most of the texts have.

    `extract` reads it out of a text, and gives None where there is none. Of answers with as many
    votes the one that was drawn first wins.
    """
    found = [extract(one.text) for one in candidates]
    votes: dict[str, int] = {}
    for answer in found:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    votes = dict(sorted(votes.items(), key=lambda vote: -vote[1]))
    if not votes:
        return Consensus(None, 0.0, {}, len(found), list(candidates))
    scored = [
        (answer, replace(one, score=0.0 if answer is None else votes[answer] / len(found)))
        for answer, one in zip(found, candidates, strict=True)
    ]
    winner = next(iter(votes))
    order = sorted(scored, key=lambda one: (one[0] != winner, -one[1].score))
    return Consensus(
        winner, votes[winner] / len(found), votes, found.count(None), [one for _, one in order]
    )


def self_consistency(
    model: Writer,
    tokenizer: Tokenizer,
    prompt: str,
    n: int,
    extract: Extract,
    **settings: Any,
) -> Consensus:
    """What most of n continuations of a prompt arrive at."""
    return consensus(draw(model, tokenizer, prompt, n, **settings), extract)
