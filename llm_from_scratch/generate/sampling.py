"""From logits to the next token: penalise, sharpen, cut off the tail, draw.

Every function takes logits (rows, vocab) and returns logits of the same shape; what is cut off is
-inf. They are applied in the order of `transformers`: repetition penalty, temperature, top-k,
top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.core.errors import UserError

NUCLEUS = 1024  # as many of the likeliest tokens nearly always hold top_p of the probability


@dataclass(frozen=True)
class SamplingSettings:
    """How to choose tokens, and when to stop.

    `temperature` 0 always takes the likeliest token. `top_k` 0, `top_p` 1, `min_p` 0 and
    `repetition_penalty` 1 leave the model's distribution as it is. With a `seed`, the same prompt
    gives the same text on the same model; None draws a fresh seed. `stop` holds strings at which
    the text ends (they are not part of it).
    """

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        for name, valid, remedy in (
            ("max_new_tokens", self.max_new_tokens >= 1, "it must be at least 1"),
            (
                "temperature",
                0.0 <= self.temperature < math.inf,
                "it must be 0 (always the likeliest token) or more",
            ),
            ("top_k", self.top_k >= 0, "it must be 0 (off) or a number of tokens"),
            ("top_p", 0.0 < self.top_p <= 1.0, "it must be above 0 and at most 1 (off)"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "it must be between 0 (off) and 1"),
            (
                "repetition_penalty",
                0.0 < self.repetition_penalty < math.inf,
                "it must be above 0 (1 is off, 1.1 is usual)",
            ),
            (
                "seed",
                self.seed is None or 0 <= self.seed < 2**63,
                "it must be from 0 to 2^63 - 1",
            ),
        ):
            if not valid:
                raise UserError(f"{name} is {getattr(self, name)}; {remedy}.")
        if "" in self.stop:
            raise UserError("A stop string is empty; give at least one character or leave it out.")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that already occurred less likely (CTRL, arXiv:1909.05858, section 4.1).

    `seen` is boolean (rows, vocab). Positive logits are divided by the penalty, negative ones
    multiplied, so a penalty above 1 always lowers them.
    """
    lowered = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lowered, logits)


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
    if size < vocab and bool((top.values.sum(-1) < p).any()):
        top = probabilities.topk(vocab)
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
    """Apply what the settings ask for; their softmax is the distribution that is drawn from.

    `seen` is needed where `repetition_penalty` is not 1. At temperature 0 only the penalty is
    applied, as nothing else changes which token is the likeliest.
    """
    if settings.repetition_penalty != 1.0 and seen is not None:
        logits = penalise_repetition(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0.0:
        return logits
    if settings.temperature != 1.0:
        # Shifting by the maximum first keeps tiny temperatures from overflowing.
        logits = (logits - logits.max(-1, keepdim=True).values) / settings.temperature
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
