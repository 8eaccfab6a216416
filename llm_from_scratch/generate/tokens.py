"""Token by token: prompts in, new tokens out, every row of the batch one step at a time.

A step runs the model once for all rows that are still going. The first step reads the prompts,
padded on the right to a rectangle; afterwards only the newest token of each row goes in, and
everything before it comes from the key-value cache. A row that ends leaves the batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.sampling import SamplingSettings, choose, make_generator
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.decoder import Decoder


@dataclass(frozen=True)
class NewToken:
    """One token of one row; `finish_reason` is None until the row's last one.

    "stop": the token is an end token. "length": `max_new_tokens` or the context is used up.
    """

    row: int
    token: int
    finish_reason: str | None = None


def check_prompts(model: Decoder, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read, in a sentence."""
    context, vocab = model.config.max_seq_len, model.config.vocab_size
    if not prompts:
        raise UserError("There is no prompt to continue; give at least one.")
    for prompt in prompts:
        if not prompt:
            raise UserError("The prompt has no tokens; give at least one to start from.")
        if len(prompt) > context:
            raise UserError(
                f"The prompt has {len(prompt)} tokens, but the model's context is {context} "
                "tokens. Give a shorter prompt."
            )
        if max(prompt) >= vocab or min(prompt) < 0:
            raise UserError(
                f"The prompt has the token id {max(prompt)}, but the model's vocabulary ends at "
                f"{vocab - 1}. Use the tokenizer that belongs to this model."
            )


class Generation:
    """Prompts being continued. Row numbers are the places of the prompts and never change.

    Row i draws from its own generator, seeded with `settings.seed` + i, and no row sees another:
    a prompt is continued as it would be alone. `step` until `rows` is empty.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        stop_ids: Collection[int] = (),
    ) -> None:
        check_prompts(model, prompts)
        self.model = model
        self.settings = settings
        self.stop_ids = frozenset(stop_ids)
        self.rows = list(range(len(prompts)))
        self.lengths = [len(prompt) for prompt in prompts]  # by row: prompt and new tokens
        self.ends = [
            min(len(prompt) + settings.max_new_tokens, model.config.max_seq_len)
            for prompt in prompts
        ]
        first = settings.seed
        self.generators = [
            make_generator(None if first is None else first + row) for row in self.rows
        ]
        weight = model.embedding.weight
        self.device = weight.device
        self.cache = KVCache(
            model.config,
            batch=len(prompts),
            capacity=max(self.ends),
            dtype=model.compute_dtype or weight.dtype,
            device=self.device,
        )
        self._next = self._padded(prompts)
        self._seen = self._first_seen(prompts)

    def _padded(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(rows, longest) ids; what stands behind a prompt's end is never looked at."""
        longest = max(len(prompt) for prompt in prompts)
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        return torch.tensor(rows, device=self.device)

    def _first_seen(self, prompts: Sequence[Sequence[int]]) -> Tensor | None:
        """(rows, vocab), True for tokens of the prompt; kept only where a penalty needs it."""
        if self.settings.repetition_penalty == 1.0:
            return None
        vocab = self.model.config.vocab_size
        seen = torch.zeros(len(prompts), vocab, dtype=torch.bool, device=self.device)
        for row, prompt in enumerate(prompts):
            seen[row, torch.tensor(prompt, device=self.device)] = True
        return seen

    @torch.inference_mode()
    def step(self) -> list[NewToken]:
        """One new token for every row that is still going, in the order of the rows."""
        if not self.rows:
            return []
        logits = self._last_logits()
        if math.isnan(logits.amax().item()):  # the maximum is NaN if anything is
            raise RunError(
                "The model's output is not a number (NaN): its weights are broken or overflow in "
                "this precision. Try --dtype fp32."
            )
        generators = [self.generators[row] for row in self.rows]
        chosen = choose(logits, self.settings, generators, self._seen)
        if self._seen is not None:
            self._seen.scatter_(1, chosen[:, None], True)
        new = [self._new_token(r, t) for r, t in zip(self.rows, chosen.tolist(), strict=True)]
        self._next = chosen[:, None]
        self.drop([one.row for one in new if one.finish_reason])
        return new

    def _last_logits(self) -> Tensor:
        """Run the model over `_next`: logits (rows, vocab) of what follows each row's end."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            hidden_btm = self.model.hidden(self._next, cache=self.cache)
            if hidden_btm.shape[1] > 1:  # the prompts: each row ends at its own place
                lengths = torch.tensor([self.lengths[row] for row in self.rows])
                self.cache.set_lengths(lengths)
                index = torch.arange(len(self.rows), device=self.device)
                last_bm = hidden_btm[index, lengths.to(self.device) - 1]
            else:
                last_bm = hidden_btm[:, -1]
            return self.model.logits(last_bm)
        finally:
            if was_training:
                self.model.train()

    def _new_token(self, row: int, token: int) -> NewToken:
        self.lengths[row] += 1
        reason = None
        if token in self.stop_ids:
            reason = "stop"
        elif self.lengths[row] >= self.ends[row]:
            reason = "length"
        return NewToken(row, token, reason)

    def drop(self, rows: Collection[int]) -> None:
        """Take rows out of the batch: they have ended, or nobody waits for them any more."""
        keep = [i for i, row in enumerate(self.rows) if row not in rows]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        if not self.rows:
            return
        index = torch.tensor(keep, device=self.device)
        with torch.inference_mode():
            self._next = self._next[index]
            self._seen = None if self._seen is None else self._seen[index]
            self.cache.select(index)


def generate_tokens(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    stop_ids: Collection[int] = (),
) -> Iterator[list[NewToken]]:
    """Continue token ids: each step yields the new token of every row that is still going."""
    generation = Generation(model, prompts, settings, stop_ids)

    def steps() -> Iterator[list[NewToken]]:
        while generation.rows:
            yield generation.step()

    return steps()
