"""Token by token: prompts in, new tokens out, every row of the batch one step at a time.

A step runs the model once for all rows that are still going. The first step reads the prompts,
padded on the right to a rectangle; afterwards only the newest token of each row goes in, and
everything before it comes from the key-value cache. A row that ends leaves the batch.

Of an encoder-decoder the prompts are the sources: the encoder reads them at the first step, and
the decoder's rows begin with the start token.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_from_scratch.core.errors import RunError, UserError
from llm_from_scratch.generate.sampling import SamplingSettings, choose, make_generator
from llm_from_scratch.model.cache import KVCache
from llm_from_scratch.model.config import EncoderDecoderConfig
from llm_from_scratch.model.decoder import Decoder
from llm_from_scratch.model.encoder_decoder import EncoderDecoder

Writer = Decoder | EncoderDecoder


@dataclass(frozen=True)
class NewToken:
    """One token of one row; `finish_reason` is None until the row's last one.

    "stop": the token is an end token. "length": `max_new_tokens` or the context is used up; some
    encoder-decoders are then made to end, so that this token too may be an end token.
    """

    row: int
    token: int
    finish_reason: str | None = None


def as_writer(model: nn.Module) -> Writer:
    """The model, if it is one that writes text; a `UserError` if not."""
    if not isinstance(model, Decoder | EncoderDecoder):
        raise UserError(
            "This model reads text and writes none (it is an encoder, or has a head that labels): "
            "give a decoder or an encoder-decoder. "
            "For embeddings: llm.load(MODEL, head='embedding')."
        )
    return model


def check_prompts(model: Writer, prompts: Sequence[Sequence[int]]) -> None:
    """Refuse prompts that the model cannot read, in a sentence."""
    reader = model.encoder if isinstance(model, EncoderDecoder) else model
    context, vocab = reader.config.max_seq_len, reader.config.vocab_size
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


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(rows, longest) ids; what stands behind a row's end is never looked at."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


class Generation:
    """Prompts being continued. Row numbers are the places of the prompts and never change.

    Row i draws from its own generator, seeded with `settings.seed` + i, and no row sees another:
    a prompt is continued as it would be alone. `step` until `rows` is empty. `beginnings` is what
    the decoder continues: the prompts, or in an encoder-decoder the start token.
    """

    def __init__(
        self,
        model: Writer,
        prompts: Sequence[Sequence[int]],
        settings: SamplingSettings,
        stop_ids: Collection[int] = (),
    ) -> None:
        check_prompts(as_writer(model), prompts)
        self.model = model
        self.settings = settings
        self.stop_ids = frozenset(stop_ids)
        self.pair: EncoderDecoderConfig | None = None
        self.beginnings = prompts
        self._unread: Sequence[Sequence[int]] = []  # sources that the encoder has not read yet
        stack = model
        if isinstance(model, EncoderDecoder):
            stack, self.pair, self._unread = model.decoder, model.config, prompts
            self.beginnings = [[self.pair.start_id]] * len(prompts)
            self.stop_ids |= set() if self.pair.end_id is None else {self.pair.end_id}
        assert isinstance(stack, Decoder)
        self.rows = list(range(len(prompts)))
        self.lengths = [len(ids) for ids in self.beginnings]  # by row, new tokens included
        context = stack.config.max_seq_len
        self.ends = [min(length + settings.max_new_tokens, context) for length in self.lengths]
        first = settings.seed
        self.generators = [
            make_generator(None if first is None else first + row) for row in self.rows
        ]
        weight = stack.embedding.weight
        self.device = weight.device
        self.cache = KVCache(
            stack.config,
            batch=len(prompts),
            capacity=max(self.ends),
            dtype=stack.compute_dtype or weight.dtype,
            device=self.device,
        )
        self._next = padded(self.beginnings, self.device)
        self._seen = self._first_seen()

    def _first_seen(self) -> Tensor | None:
        """(rows, vocab), True for tokens that are there; kept only where a penalty needs it."""
        if self.settings.repetition_penalty == 1.0:
            return None
        vocab = self.model.config.vocab_size
        seen = torch.zeros(len(self.rows), vocab, dtype=torch.bool, device=self.device)
        for row, ids in enumerate(self.beginnings):
            seen[row, torch.tensor(ids, device=self.device)] = True
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
        if self.pair is not None:
            logits = self._allowed(logits, self.pair)
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
            hidden_btm = self.model.hidden(self._next, cache=self.cache, **self._source())
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

    def _source(self) -> dict[str, Tensor]:
        """What the encoder makes of the sources, and their mask; later the cache holds both."""
        if not self._unread or not isinstance(self.model, EncoderDecoder):
            return {}
        lengths = torch.tensor([len(source) for source in self._unread], device=self.device)
        source_bs = padded(self._unread, self.device)
        mask_bs = torch.arange(source_bs.shape[1], device=self.device) < lengths[:, None]
        self._unread = []
        if bool(mask_bs.all()):
            return {"encoded_bsm": self.model.encoder(source_bs)}
        encoded_bsm = self.model.encoder(source_bs, attention_mask=mask_bs)
        return {"encoded_bsm": encoded_bsm, "attention_mask": mask_bs}

    def _allowed(self, logits: Tensor, pair: EncoderDecoderConfig) -> Tensor:
        """The logits without what the model never writes: padding, another beginning than the
        one that is set, or more than there is room."""
        logits = logits.clone()
        if not pair.writes_start:
            logits[:, pair.start_id] = -math.inf
        first = [i for i, row in enumerate(self.rows) if self.lengths[row] == 1]  # the start alone
        if pair.first_id is not None and first:
            logits[first] = -math.inf
            logits[first, pair.first_id] = 0.0
        last = [i for i, row in enumerate(self.rows) if self.lengths[row] + 1 >= self.ends[row]]
        if pair.end_id is not None and last:
            logits[last] = -math.inf
            logits[last, pair.end_id] = 0.0
        return logits

    def _new_token(self, row: int, token: int) -> NewToken:
        self.lengths[row] += 1
        full = self.lengths[row] >= self.ends[row]
        made_to_end = full and self.pair is not None and self.pair.end_id is not None
        reason = None
        if token in self.stop_ids and not made_to_end:
            reason = "stop"
        elif full:
            reason = "length"
        return NewToken(row, token, reason)

    def drop(self, rows: Collection[int]) -> None:
        """Take rows out of the batch: they have ended, or nobody waits for them any more."""
        keep = [i for i, row in enumerate(self.rows) if row not in rows]
        if len(keep) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in keep]
        self._unread = [self._unread[i] for i in keep] if self._unread else []
        if not self.rows:
            return
        index = torch.tensor(keep, device=self.device)
        with torch.inference_mode():
            self._next = self._next[index]
            self._seen = None if self._seen is None else self._seen[index]
            self.cache.select(index)


def generate_tokens(
    model: Writer,
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
