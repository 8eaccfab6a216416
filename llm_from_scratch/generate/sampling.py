"""From logits to the next token: bias, penalise, forbid, sharpen, cut off the tail, draw.

The functions take logits (rows, vocab) and return logits of the same shape; what is cut off is
-inf. A `Chooser` applies them for one sequence, in the order of `transformers`: logit bias,
repetition penalty, presence and frequency penalties, no-repeat n-gram, what a constraint allows,
temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llm_from_scratch.generate.settings import SamplingSettings, check_bias

if TYPE_CHECKING:
    from llm_from_scratch.generate.constraint import Constraint

__all__ = [
    "Chooser",
    "SamplingSettings",
    "TokenLogprobs",
    "check_bias",
    "choose",
    "draw",
    "filter_logits",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "make_generator",
    "penalise_counts",
    "penalise_repetition",
    "top_logprobs",
    "top_logprobs_of_all",
]

NUCLEUS = 1024  # as many of the likeliest tokens nearly always hold top_p of the probability


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely (CTRL, arXiv:1909.05858, section 4.1).

    `seen` is boolean (rows, vocab). Positive logits are divided by the penalty, negative ones
    multiplied, so a penalty above 1 always lowers them.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


def penalise_counts(logits: Tensor, counts: Tensor, presence: float, frequency: float) -> Tensor:
    """Lower the logit of every token that was written, once and for each time it was.

    logit - presence * (count > 0) - frequency * count, as OpenAI's API has it; `counts` are of the
    new tokens alone, (rows, vocab) like the logits.
    """
    return logits - presence * (counts > 0) - frequency * counts


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k likeliest tokens of each row (and what ties with the last of them)."""
    last = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens that holds p of the probability (arXiv:1904.09751).

    The likeliest token always stays. Sorting a whole vocabulary costs more than the rest of the
    sampling together, so the sorted part is first only as large as nuclei usually are.
    """
    probabilities = logits.softmax(-1)
    vocab = logits.shape[-1]
    size = min(NUCLEUS, vocab)
    top = probabilities.topk(size)
    while size < vocab and bool((top.values.sum(-1) < p).any()):
        size = min(16 * size, vocab)
        top = probabilities.topk(size)
    before = top.values.cumsum(-1) - top.values  # the probability of everything likelier
    keep = before < p
    keep[:, 0] = True
    kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top.indices, keep)
    return logits.masked_fill(~kept, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens at least p times as likely as the likeliest one (arXiv:2407.01082)."""
    if p == 0.0:
        return logits
    floor = logits.max(-1, keepdim=True).values + math.log(p)
    return logits.masked_fill(logits < floor, -math.inf)


def filter_logits(logits: Tensor, settings: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """Sharpen and cut off the tail as the settings ask; the softmax is what is drawn from.

    With `seen` the repetition penalty comes first. At temperature 0 only the penalty is applied,
    as nothing else changes which token is the likeliest.
    """
    if settings.repetition_penalty != 1.0 and seen is not None:
        logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0.0:
        return logits
    if settings.temperature != 1.0:
        # Shifting by the maximum first keeps tiny temperatures from overflowing.
        logits = logits - logits.max(-1, keepdim=True).values
        logits = logits / max(settings.temperature, 1e-30)  # less is zero in fp32
    if 0 < settings.top_k < logits.shape[-1]:
        logits = keep_top_k(logits, settings.top_k)
    if settings.top_p < 1.0:
        logits = keep_top_p(logits, settings.top_p)
    if settings.min_p > 0.0:
        logits = keep_min_p(logits, settings.min_p)
    return logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row, (rows,), from softmax(logits).

    Each row takes one number in [0, 1) from its own CPU generator and looks up where the
    cumulated distribution passes it: the draw of a row depends neither on the other rows nor on
    the device that computes.
    """
    numbers = [torch.rand((), generator=one, dtype=torch.float64).item() for one in generators]
    share = torch.tensor(numbers, dtype=logits.dtype, device=logits.device)[:, None]
    cumulated = logits.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    # Rounding must not push the threshold up to the total, behind the last possible token.
    threshold = (share * total).minimum(total * (1.0 - 1e-6))
    return torch.searchsorted(cumulated, threshold, right=True)[:, 0]


def choose(
    logits: Tensor,
    settings: SamplingSettings,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> Tensor:
    """The next token of each row, (rows,): the likeliest one at temperature 0, else drawn."""
    logits = filter_logits(logits.float(), settings, seen)
    if settings.temperature == 0.0:
        return logits.argmax(-1)
    return draw(logits, generators)


def make_generator(seed: int | None) -> torch.Generator:
    """A generator on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


class Chooser:
    """One sequence's way from logits to its next token.

    Ask `choose` for a token, then tell `accept` which token was taken: the penalties, the n-grams
    and the constraint follow what was accepted. `prompt` is what stands before the first new token
    in the same stack: the prompt, or of an encoder-decoder the start token.

    Attributes:
        settings: how to choose.
        generator: where the random numbers come from, one per drawn token.
        constraint: what may be written at all, or None.
        plain: whether nothing but temperature and cuts stands between logits and choice.
        plain_greedy: `plain` at temperature 0: the choice is the argmax of the logits.
    """

    def __init__(
        self,
        settings: SamplingSettings,
        generator: torch.Generator,
        prompt: Sequence[int],
        constraint: Constraint | None = None,
    ) -> None:
        self.settings = settings
        self.generator = generator
        self.constraint = constraint
        self.plain = constraint is None and not settings.looks_back and not settings.logit_bias
        self.plain_greedy = self.plain and settings.temperature == 0.0
        self._prompt = list(prompt) if settings.looks_back else []
        self._new: list[int] = []
        self._told = 0  # how many of the new tokens the tensors below know of
        self._seen: set[int] = set()
        self._seen_ids: Tensor | None = None
        self._counts_v: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None
        self._followers: dict[tuple[int, ...], tuple[int, ...]] = {}
        if settings.no_repeat_ngram:
            size = settings.no_repeat_ngram
            for end in range(size, len(self._prompt) + 1):
                self._remember(self._prompt[end - size : end])

    @torch.inference_mode()
    def distribution(self, logits_v: Tensor) -> Tensor:
        """The log-probabilities that the next token is drawn from, (vocab,) fp32.

        After bias, penalties, bans, constraint, temperature and cuts. At temperature 0 all
        probability lies on the likeliest token.
        """
        logits_v = self._filtered(logits_v)
        if self.settings.temperature > 0.0:
            return logits_v.log_softmax(-1)
        sure_v = torch.full_like(logits_v, -math.inf)
        sure_v[logits_v.argmax()] = 0.0
        return sure_v

    @torch.inference_mode()
    def scores(self, logprobs_v: Tensor) -> Tensor:
        """The model's log-probabilities (vocab,) as beams are compared by them, fp32.

        With bias, penalties, bans and constraint, which here act on log-probabilities (as in
        `transformers`); they are not brought back to the sum 1, so that a text is not found likely
        because little else was allowed.
        """
        logprobs_v = logprobs_v.float()
        return logprobs_v if self.plain else self._permitted(self._penalised(logprobs_v))

    @torch.inference_mode()
    def choose(self, logits_v: Tensor) -> int:
        """The next token, of logits (vocab,); nothing is remembered before `accept`."""
        logits_v = self._filtered(logits_v)
        if self.settings.temperature == 0.0:
            return int(logits_v.argmax())
        return int(draw(logits_v[None], [self.generator]))

    def accept(self, token: int) -> None:
        """Take note that `token` now stands at the end of the sequence."""
        if self.constraint is not None:
            self.constraint.accept(token)
        if not self.settings.looks_back:
            return
        self._new.append(token)
        if size := self.settings.no_repeat_ngram:
            self._remember([*self._prompt[-size:], *self._new[-size:]][-size:])

    def copy(self, generator: torch.Generator | None = None) -> Chooser:
        """One more that goes on from here by itself; without a generator of its own it draws the
        same numbers as this one would."""
        if generator is None:
            generator = torch.Generator()
            generator.set_state(self.generator.get_state())
        twin = Chooser.__new__(Chooser)
        twin.__dict__.update(self.__dict__)
        twin.generator = generator
        twin.constraint = None if self.constraint is None else self.constraint.copy()
        twin._new = self._new.copy()
        twin._followers = self._followers.copy()
        twin._seen = self._seen.copy()
        twin._counts_v = None if self._counts_v is None else self._counts_v.clone()
        return twin

    def _filtered(self, logits_v: Tensor) -> Tensor:
        """The logits (vocab,) whose softmax is drawn from, in fp32."""
        logits_v = logits_v.float()
        if not self.plain:
            logits_v = self._permitted(self._penalised(logits_v))
        if self.settings.temperature == 0.0:
            return logits_v
        return filter_logits(logits_v[None], self.settings)[0]

    def _penalised(self, logits_v: Tensor) -> Tensor:
        """With the bias, and lower where tokens occurred."""
        settings = self.settings
        if settings.logit_bias:
            if self._bias is None:
                check_bias(settings, logits_v.shape[0])
                ids = torch.tensor(list(settings.logit_bias), device=logits_v.device)
                values = torch.tensor(list(settings.logit_bias.values()), device=logits_v.device)
                self._bias = ids, values
            logits_v = logits_v.index_add(0, *self._bias)
        if settings.looks_back:
            self._count(logits_v)
        if (seen := self._seen_ids) is not None:  # few of a vocabulary; the rest stays untouched
            here = logits_v.new_ones((), dtype=torch.bool)
            lowered = penalise_repetition(logits_v[seen], here, settings.repetition_penalty)
            logits_v = logits_v.index_put((seen,), lowered)
        if self._counts_v is not None:
            logits_v = penalise_counts(
                logits_v, self._counts_v, settings.presence_penalty, settings.frequency_penalty
            )
        return logits_v

    def _permitted(self, logits_v: Tensor) -> Tensor:
        """Without what would repeat an n-gram, and without what the constraint forbids.

        Should nothing be left, the n-grams give way, as a text that breaks its grammar is of no
        use; and should the model itself leave nothing that the constraint allows (it is made to
        end here), the constraint does.
        """
        candidates = [logits_v]
        if self.constraint is not None:
            allowed_v = self.constraint.allowed(logits_v.shape[0]).to(logits_v.device)
            candidates.insert(0, logits_v.masked_fill(~allowed_v, -math.inf))
        if banned := self._banned():
            index = torch.tensor(banned, device=logits_v.device)
            candidates.insert(0, candidates[0].index_fill(0, index, -math.inf))
        for left_v in candidates[:-1]:
            if left_v.max() > -math.inf:
                return left_v
        return logits_v

    def _count(self, logits_v: Tensor) -> None:
        """Bring what is known of the tokens so far up to date; tensors live where the logits do."""
        settings = self.settings
        fresh = self._new[self._told :]
        if settings.repetition_penalty != 1.0:
            ids = dict.fromkeys(fresh if self._seen else [*self._prompt, *fresh])
            unseen = [token for token in ids if token not in self._seen]
            self._seen.update(unseen)
            if unseen:
                index = torch.tensor(unseen, device=logits_v.device)
                old = [] if self._seen_ids is None else [self._seen_ids]
                self._seen_ids = torch.cat([*old, index])
        if self._counts_v is None and (settings.presence_penalty or settings.frequency_penalty):
            self._counts_v = torch.zeros_like(logits_v)
        if self._counts_v is not None:
            for token in fresh:
                self._counts_v[token] += 1
        self._told = len(self._new)

    def _remember(self, ngram: list[int]) -> None:
        """Note what followed the first n - 1 tokens of an n-gram."""
        if len(ngram) == self.settings.no_repeat_ngram:
            *before, last = ngram
            known = self._followers.get(tuple(before), ())
            if last not in known:
                self._followers[tuple(before)] = (*known, last)

    def _banned(self) -> list[int]:
        """Tokens that would complete an n-gram which is already there."""
        size = self.settings.no_repeat_ngram
        if not size:
            return []
        before = [*self._prompt[-size:], *self._new[-size:]][1 - size :] if size > 1 else []
        return list(self._followers.get(tuple(before), ()))


@dataclass(frozen=True)
class TokenLogprobs:
    """How likely the model found one token, and which it found the likeliest in its place.

    Natural logarithms of the model's own probabilities: before bias, penalties, constraint,
    temperature and cuts, as OpenAI's API and vLLM give them.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def top_logprobs_of_all(logits_tv: Tensor, k: int, tokens: Sequence[int]) -> list[TokenLogprobs]:
    """For each of the logits (t, vocab) what the model thought of the token that stands there."""
    logprobs_tv = logits_tv.float().log_softmax(-1)
    index = torch.tensor(tokens, dtype=torch.long, device=logits_tv.device)[:, None]
    own = logprobs_tv.gather(1, index)[:, 0].tolist()
    best = logprobs_tv.topk(min(k, logits_tv.shape[-1]))
    return [
        TokenLogprobs(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, own, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]


def top_logprobs(logits_v: Tensor, k: int, token: int) -> TokenLogprobs:
    """What the model thought of `token`, and its k likeliest, from its logits (vocab,).

    `k` 0 gives the token's own log-probability alone.
    """
    return top_logprobs_of_all(logits_v[None], k, [token])[0]
