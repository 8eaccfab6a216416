"""Rollouts: what a model writes during training, to learn from.

`write` lets our own engine answer prompts, several times each. `Rollouts` is the loop's source: it
asks for new completions when those that it has are used up, and keeps them in the checkpoints, so
that a run goes on in the middle of a rollout as if nothing had happened.

Axes: b completion, t time, k figure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from llm_from_scratch.data.loader import IGNORED
from llm_from_scratch.data.split import drawing_order
from llm_from_scratch.generate.engine import PAGE, Engine, default_room
from llm_from_scratch.generate.requests import Request, Writer, writing_stack
from llm_from_scratch.generate.sampling import SamplingSettings

CHUNK = 2048  # tokens of prompts that the engine reads in one step


@dataclass(frozen=True)
class Written:
    """What a model wrote for a prompt: its tokens, the end token included, and if that came."""

    tokens: list[int]
    ended: bool


def write(
    model: Writer,
    prompts: Sequence[Sequence[int]],
    size: int,
    *,
    max_new_tokens: int,
    temperature: float,
    end_ids: frozenset[int],
    seed: int,
    at_once: int,
) -> list[list[Written]]:
    """`size` completions of each prompt, drawn from the model as it is; each has its own seed.

    The engine is a fresh one, because what another knows of texts was computed with other weights.
    One completion of each prompt begins; the others follow when the prompts have been read, and
    find them in the cache.
    """
    stack = writing_stack(model)
    lengths = [min(len(p) + max_new_tokens, stack.config.max_seq_len) for p in prompts]
    pages = sorted((-(-n // PAGE) for n in lengths for _ in range(size)), reverse=True)
    room = default_room(stack.config, at_once, stack.activation_dtype, stack.device)
    engine = Engine(
        model, cache_tokens=min(PAGE * sum(pages[:at_once]), room), max_running=at_once, chunk=CHUNK
    )
    seeds = seeds_of(seed, len(prompts) * size)
    found = [[Written([], False) for _ in range(size)] for _ in prompts]
    place_of: dict[int, tuple[int, int]] = {}

    def submit(choice: int) -> None:
        for place, prompt in enumerate(prompts):
            settings = SamplingSettings(
                max_new_tokens=max_new_tokens, temperature=temperature,
                seed=seeds[place * size + choice],
            )  # fmt: skip
            number = engine.submit(Request(list(prompt), settings, end_ids))
            place_of[number] = place, choice

    training = model.training
    model.eval()
    try:
        submit(0)
        unread, rest = set(place_of), range(1, size)
        while engine.busy:
            for new in engine.step():
                place, choice = place_of[new.request]
                unread.discard(new.request)
                found[place][choice].tokens.append(new.token)
                if new.finish_reason is not None:
                    ended = new.finish_reason == "stop"
                    found[place][choice] = Written(found[place][choice].tokens, ended)
            if not unread:
                for choice in rest:
                    submit(choice)
                rest = range(0)
    finally:
        model.train(training)
    return found


def seeds_of(seed: int, count: int) -> list[int]:
    """So many seeds for generators; the same in every version of numpy."""
    bits = np.random.PCG64(np.random.SeedSequence(seed % 2**64)).random_raw(count)
    return [int(b) >> 1 for b in bits]


# --- batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyBatch:
    """Completions to learn from.

    tokens, targets: (b, t) prompt and completion, and what follows each position; IGNORED where
        that is not the model's own.
    old, reference: (b, t) log-probabilities of the targets when they were drawn (None where they
        are those of the model as it is), and under the reference model (None without one).
    advantages, weights: (b,). figures: (b, k), what is logged of each completion.
    """

    tokens: Tensor
    targets: Tensor
    old: Tensor | None
    reference: Tensor | None
    advantages: Tensor
    weights: Tensor
    figures: Tensor


@dataclass
class Rollout:
    """All completions of a rollout, their tokens one behind the other.

    tokens (sum of lengths,), lengths and given (b,): how many tokens each has, and how many of
    these are its prompt. old and reference stand for the tokens that were written, (sum of what
    was written,), or are empty.
    """

    tokens: Tensor
    lengths: Tensor
    given: Tensor
    old: Tensor
    reference: Tensor
    advantages: Tensor
    weights: Tensor
    figures: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, places: Sequence[int]) -> PolicyBatch:
        """Some of its completions, padded at their ends."""
        lengths, given = self.lengths.tolist(), self.given.tolist()
        starts = np.concatenate([[0], np.cumsum(lengths)]).tolist()
        written = np.subtract(lengths, given)
        firsts = np.concatenate([[0], np.cumsum(written)]).tolist()
        t = max(lengths[p] for p in places) - 1
        tokens = torch.zeros(len(places), t, dtype=torch.long)
        targets = torch.full_like(tokens, IGNORED)
        old, reference = torch.zeros(len(places), t), torch.zeros(len(places), t)
        for row, p in enumerate(places):
            ids = self.tokens[starts[p] : starts[p + 1]]
            own = slice(given[p] - 1, lengths[p] - 1)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, own] = ids[given[p] :]
            for table, values in ((old, self.old), (reference, self.reference)):
                if len(values):
                    table[row, own] = values[firsts[p] : firsts[p + 1]]
        index = torch.tensor(list(places))
        return PolicyBatch(
            tokens, targets, old if len(self.old) else None,
            reference if len(self.reference) else None,
            self.advantages[index], self.weights[index], self.figures[index],
        )  # fmt: skip


class Play(Protocol):
    """Lets the model write: the completions of rollout `number`, for these prompts."""

    def __call__(self, number: int, prompts: list[Any]) -> Rollout: ...


class Rollouts:
    """The completions of a run by number.

    A rollout answers `prompts_each` prompts with `size` completions each. They are used `repeats`
    times over, in another order each time, `batch_size` per step.
    """

    def __init__(
        self,
        prompts: Callable[[int, int], list[Any]],
        play: Play,
        *,
        prompts_each: int,
        size: int,
        repeats: int,
        seed: int,
    ) -> None:
        self.prompts, self.play = prompts, play
        self.prompts_each, self.each = prompts_each, prompts_each * size
        self.repeats, self.seed = repeats, seed
        self.number = -1
        self.rollout: Rollout | None = None

    def batch(self, start: int, count: int) -> PolicyBatch:
        """Completions `start` to `start + count - 1` of the run; never beyond their rollout."""
        use, first = divmod(start, self.each)
        number = use // self.repeats
        if number != self.number or self.rollout is None:
            asked = self.prompts(number * self.prompts_each, self.prompts_each)
            self.number, self.rollout = number, self.play(number, asked)
        order = drawing_order(self.each, self.seed + use)
        return self.rollout.batch(order[first : first + count])

    def state_tensors(self) -> dict[str, Tensor]:
        """The rollout that is being used, if any."""
        if self.rollout is None:
            return {}
        kept = {f.name: getattr(self.rollout, f.name) for f in fields(Rollout)}
        return {"number": torch.tensor(self.number), **kept}

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on with the rollout that `state_tensors` gave."""
        if tensors:
            self.number = int(tensors["number"])
            self.rollout = Rollout(**{f.name: tensors[f.name] for f in fields(Rollout)})
